"""Where a model sits between encoder-decoder and decoder-only: four dials (Chung, CS25 2024).

    dial     more structure                          less structure
    cross    separate: own projections and softmax   merged: one softmax over [inputs ; targets]
             tied: self-attention's projections, own softmax
    stacks   separate: each stream its own weights   shared: one set of weights for both
    memory   final: the input stack's last layer     same: the target layer's own depth, the stream it is fed with
    inputs   bidirectional                           causal

`cross = none` is the one structure without a target stream: encoder-only, for masked language modelling.
"""

from dataclasses import dataclass, replace
from itertools import product
from typing import Literal, get_args

Cross = Literal["separate", "tied", "merged", "none"]
Stacks = Literal["separate", "shared"]
Memory = Literal["final", "same"]
Inputs = Literal["bidirectional", "causal"]


@dataclass(frozen=True, kw_only=True)
class Structure:
    cross: Cross
    stacks: Stacks
    memory: Memory
    inputs: Inputs

    def __post_init__(self):
        for dial, allowed in (("cross", Cross), ("stacks", Stacks), ("memory", Memory), ("inputs", Inputs)):
            value = getattr(self, dial)
            if value not in get_args(allowed):
                raise ValueError(f"structure.{dial} = {value!r}: use one of {', '.join(get_args(allowed))}")
        dials = (self.stacks, self.memory, self.inputs)
        if self.cross == "none" and dials != ("shared", "same", "bidirectional"):
            raise ValueError(
                f"structure.cross = 'none' is encoder-only, with one bidirectional stream, but the dials are {dials}: "
                "use stacks='shared', memory='same', inputs='bidirectional', or another cross"
            )

    @property
    def encoder_only(self) -> bool:
        return self.cross == "none"

    @property
    def joint(self) -> bool:
        """Both streams go through the same weights at the same depth, so one projection serves both."""
        return self.stacks == "shared" and self.memory == "same"

    @property
    def memory_is_free(self) -> bool:
        """The keys and values of the inputs' own attention are those that the targets read: nothing more is projected."""
        return self.joint and self.cross != "separate"

    def keeps_replies(self, positions: str) -> bool:
        """Whether what was made in the target stream has the keys and values that it would have as input: both streams
        do the same, and a reply stays where it is. Else a conversation's replies are read anew as inputs."""
        return self.joint and self.cross == "merged" and self.inputs == "causal" and positions == "continue"

    def memory_is_one(self, share_layers: bool) -> bool:
        """One layer reads one memory at every depth, so its keys and values are projected once."""
        return share_layers and self.memory == "final"

    @property
    def name(self) -> str:
        """The named point, or the dials' values joined by dashes."""
        for name, structure in STRUCTURES.items():
            if structure == self:
                return name
        return f"{self.cross}-{self.stacks}-{self.memory}-{self.inputs}"


def _structure(cross: Cross, stacks: Stacks, memory: Memory, inputs: Inputs) -> Structure:
    return Structure(cross=cross, stacks=stacks, memory=memory, inputs=inputs)


# Chung's ladder takes structure away one dial at a time, from encoder-decoder (0) to decoder-only (4).
STRUCTURES: dict[str, Structure] = {
    "encoder_decoder": _structure("separate", "separate", "final", "bidirectional"),  # 0
    "tied_cross": _structure("tied", "separate", "final", "bidirectional"),  # 1a
    "merged_cross": _structure("merged", "separate", "final", "bidirectional"),  # 1b
    "shared_stacks": _structure("merged", "shared", "final", "bidirectional"),  # 2
    "prefix_lm": _structure("merged", "shared", "same", "bidirectional"),  # 3
    "decoder_only": _structure("merged", "shared", "same", "causal"),  # 4
    "encoder_only": _structure("none", "shared", "same", "bidirectional"),
}
LADDER = ("encoder_decoder", "tied_cross", "merged_cross", "shared_stacks", "prefix_lm", "decoder_only")
# The dials that the ladder turns late, each turned alone (cross alone is merged_cross).
ALONE = {
    "only_shared": _structure("separate", "shared", "final", "bidirectional"),
    "only_same_memory": _structure("separate", "separate", "same", "bidirectional"),
    "only_causal": _structure("separate", "separate", "final", "causal"),
}

ALL_TWO_STREAM: tuple[Structure, ...] = tuple(
    _structure(*dials)
    for dials in product(
        ("separate", "tied", "merged"), ("separate", "shared"), ("final", "same"), ("bidirectional", "causal")
    )
)


def check(structure: Structure, *, L: int, L_input: int, loss: str, objective: str) -> None:
    """Raises ValueError, with the reason, for a structure that can not be built or trained like this."""
    if structure.encoder_only != (objective == "masked_lm"):
        raise ValueError(
            f"objective {objective!r} does not fit structure {structure.name}: encoder-only "
            "takes masked_lm and nothing else does; change objective.name or structure.cross"
        )
    if objective == "causal_lm" and structure != STRUCTURES["decoder_only"]:
        raise ValueError(
            f"objective 'causal_lm' does not fit structure {structure.name}: packed documents have no inputs apart from "
            "targets, and only decoder_only needs none; use objective lm with loss='all', or decoder_only"
        )
    if loss == "all" and structure.inputs != "causal":
        raise ValueError(
            "objective.loss = 'all' needs structure.inputs = 'causal': a bidirectional input has already seen the "
            "token that it would predict; use loss='targets'"
        )
    if L_input != L and not (structure.stacks == "separate" and structure.memory == "final"):
        raise ValueError(
            f"shape.L_input = {L_input} but shape.L = {L}: unequal depths need stacks='separate' and memory='final'; "
            f"set L_input = {L}"
        )


def canonical(structure: Structure, *, L: int, S: int, loss: str) -> Structure:
    """The structure that computes the same target predictions with dials that have no effect set to `causal`.

    One input token attends to itself either way. With one layer and memory=same, a target reads the input stream
    before any input has attended to another, so `inputs` can not reach the target loss.
    """
    if structure.encoder_only or structure.inputs == "causal":
        return structure
    unreached = L == 1 and structure.memory == "same" and loss == "targets"
    return replace(structure, inputs="causal") if S == 1 or unreached else structure
