"""Does the encoder-decoder's structure pay at the smallest scale? The lab from end to end.

command    lab quickstart (on other text: lab quickstart --data SOURCE)
cost       1.1e13 FLOPs in 56 runs; about 5 minutes on 2 CPU cores
expected   see the README: differences of a few hundredths of a nat against a seed noise of as much; three budgets over
           a factor of 16 can show who is ahead there, and not where curves cross
"""

from lab.spec import Data
from sweeps.ladder import ladder
from sweeps.study import Study, arm, corpus, name_of

# smoke: the same study at a size that shows in a minute whether every part works, and nothing else.
PRESETS = {
    "small": {"budgets": (3e10, 1.2e11, 4.8e11), "batch": 8, "widths": (8, 12, 16, 24, 32, 48)},
    "smoke": {"budgets": (1e9, 2e9, 4e9), "batch": 1, "widths": (8, 12, 16, 24)},
}


def study(preset: str = "small", data: Data | None = None) -> Study:
    text = "Python source" if data is None else name_of(data)
    data = data or corpus("python")
    return Study(
        name="quickstart",
        question=f"At matched compute on {text}, does an encoder-decoder's structure beat a decoder-only model?",
        arms={
            "encoder_decoder": arm("encoder_decoder", data, S=64, T=64),
            "prefix_lm": arm("prefix_lm", data, S=64, T=64),
            "decoder_only": arm("decoder_only", data, S=64, T=64),
            "decoder_only_all": arm("decoder_only", data, S=64, T=64, loss="all"),
        },
        baseline="decoder_only",
        budgets=PRESETS[preset]["budgets"],
        sizes=ladder(*PRESETS[preset]["widths"], depth=2),
        window=4,
        # A large vocabulary makes a step cost more: smaller steps, so that whole ones still match.
        batch=max(1, PRESETS[preset]["batch"] * 256 // max(256, data.vocabulary // 4)),
        extra_seeds={(1, 2): 3},
    )
