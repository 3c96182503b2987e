"""What claims to train faster: one file and one line each; the settings that a run gives them are lab.technique's.

Each follows its paper, is charged what it executes, and says where released code differs (docs/techniques.md has the table).
"""

from collections.abc import Callable

from lab.method import Method
from lab.spec import Run
from lab.techniques.averaging import Ema, Lawa
from lab.techniques.layer_dropping import LayerDropping
from lab.techniques.rho_loss import RhoLoss
from lab.techniques.selective_backprop import SelectiveBackprop
from lab.techniques.stacking import Stacking

# (run, updates that the budget of a plain run pays for) -> what the run does at each step.
METHODS: dict[str, Callable[[Run, float], Method]] = {
    "nothing": Method,
    "stacking": Stacking,
    "layer_dropping": LayerDropping,
    "selective_backprop": SelectiveBackprop,
    "rho_loss": RhoLoss,
    "ema": Ema,
    "lawa": Lawa,
}
