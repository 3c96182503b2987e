"""The arms of the study `no_train_no_gain`, tuned alike at its size and at each of its budgets (small: from the least of them
to some beyond).

command    lab tune gains --rules sweeps/rules/gains.json
cost       `lab tune gains --dry`
expected   docs/no-train-no-gain.md; then `learning_rate="tuned:gains"` in the study's preset
"""

from lab.spec import Data
from sweeps.studies.no_train_no_gain import BASELINE, MORE, NO_OP, PRESETS, against, budgets, templates
from sweeps.study import corpus
from sweeps.tune.tuning import Tuning


def tuning(preset: str = "small", data: Data | None = None) -> Tuning:
    chosen = PRESETS[preset]
    data = data or corpus("python", allow_repeat=bool(chosen.updates))
    arms = templates(preset, data)
    arms = {name: run for name, run in arms.items() if name.split("/")[1] not in (NO_OP, MORE)}
    first = f"{chosen.families[0]}/{BASELINE}"
    return Tuning(
        name="gains" if preset == "small" else f"gains-{preset}",
        arms={first: arms.pop(first), **arms},
        against=against(arms),
        budgets=chosen.tuned_at or budgets(preset, data),
        sizes=(chosen.shape,),
        batch=chosen.batch,
        rates=(0.25, 0.5, 1.0, 2.0, 4.0),
        relative=True,
        seeds=2,
    )
