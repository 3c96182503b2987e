"""What attends to what: which keys a query sees by where both stand, how many such pairs there are, and which runs can have it.

Nothing here needs a device: masks are comparisons of whole numbers, of the host's or of a program's.

Letters: S keys, T queries, n positions, w a window.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lab.checks import require
from lab.forms import Form, Objective, forms
from lab.structure import Structure

if TYPE_CHECKING:
    from lab.spec import Options

BUCKETS = 32  # in which T5 tells distances apart: columns of a stack's table


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A query at position i sees a key at position j where both hold:

    causal   j is not in a later turn than i; turns are `turn` positions each, so that with 1 no query sees a later key
    window   |i - j| < window
    """

    causal: bool
    turn: int = 1
    window: int | None = None

    def mask(self, queries: Any, keys: Any) -> Any:
        """[..., T, S] of positions [..., T] and [..., S], of one rank; True where the query sees the key."""
        i, j = queries[..., :, None], keys[..., None, :]
        seen = (i >= 0) & (j >= 0)  # all
        if self.causal:
            seen = j <= i if self.turn == 1 else j // self.turn <= i // self.turn
        if self.window is not None:
            seen = seen & (i - j < self.window) & (j - i < self.window)
        return seen

    def reach(self, first: int, last: int, keys: int) -> tuple[int, int]:
        """The range of keys, of so many, outside of which no query from `first` to `last` sees any."""
        low, high = 0, keys
        if self.causal:
            high = min(high, (last // self.turn + 1) * self.turn)
        if self.window is not None:
            low, high = max(low, first - self.window + 1), min(high, last + self.window)
        return low, high

    def pairs(self, n: int) -> int:
        """That n positions attend to among themselves."""
        back = band(n, self.window)
        if not self.causal:
            return 2 * back - n
        whole, rest = divmod(n, self.turn)
        ahead = whole * (band(self.turn, self.window) - self.turn) + band(rest, self.window) - rest
        return back + ahead


def band(n: int, window: int | None) -> int:
    """The sum of min(i, window) over i = 1 .. n: pairs of n causal queries, each with at most `window` keys."""
    w = n if window is None else min(n, window)
    return w * (w + 1) // 2 + (n - w) * w


def among_inputs(structure: Structure, options: "Options") -> Rule:
    """What the inputs see of each other."""
    causal = structure.inputs == "causal" or options.turn is not None
    return Rule(causal=causal, turn=options.turn or 1, window=options.window)


def places(objective: Objective | Form, options: "Options") -> int:
    """How many positions the longest form has: the rows of a learned table, and of a matrix that mixes tokens."""
    if objective.name == "masked_lm":
        return objective.S
    found = [objective] if isinstance(objective, Form) else forms(objective)
    if options.positions == "restart":
        return max(max(form.S, form.T) for form in found)
    return max(form.S + form.T for form in found)


def check(structure: Structure, options: "Options", objective: Objective, splits: tuple[int, ...]) -> None:
    """Raises ValueError, with the reason, for what this structure or objective can not carry."""
    encoding, name = options.encoding, objective.name
    if options.turn is not None:
        require(structure.inputs == "bidirectional", "options.turn", options.turn,
                "turns are within bidirectional inputs: use structure.inputs = 'bidirectional', or null")  # fmt: skip
        require(name != "pairs", "options.turn", options.turn,
                "pairs are padded before their sources, which would move the turns' ends: use null")  # fmt: skip
    if options.window is not None:
        require(name != "causal_lm", "options.window", options.window,
                "objective.attended counts whole documents of a packed row: use null, or objective lm")  # fmt: skip
    if options.positions == "restart":
        require(encoding in ("rope", "learned", "sinusoidal"), "options.positions", options.positions,
                f"encoding {encoding!r} knows no positions that could start again, distances go on from inputs into targets: "
                "use 'continue'")  # fmt: skip
        longest = max((max(S, objective.length - S) for S in splits), default=0)
        require(encoding != "learned" or longest <= places(objective, options), "evaluation.splits", splits,
                f"a stream of {longest} tokens has more positions than the {places(objective, options)} that are learned: use "
                "splits nearer to the objective's, or options.positions = 'continue'")  # fmt: skip
    if options.mixing == "dense":
        _check_mixing(structure, options, objective, splits)


def _check_mixing(structure: Structure, options: "Options", objective: Objective, splits: tuple[int, ...]) -> None:
    """A matrix over positions needs one sequence of tokens, of one length."""
    name = objective.name
    require(structure.encoder_only or (structure.joint and structure.cross == "merged"), "options.mixing", options.mixing,
            f"structure {structure.name} has tokens of one stream read another's: a matrix mixes one sequence. Use decoder_only, "
            "prefix_lm or encoder_only, or mixing='attention'")  # fmt: skip
    require(name in ("lm", "masked_lm"), "options.mixing", options.mixing,
            f"{name} has rows of several lengths, documents or padding in a row, and a matrix has one entry for a pair of "
            "places whatever is there: use objective lm or masked_lm, or mixing='attention'")  # fmt: skip
    require(options.encoding not in ("rope", "alibi", "t5"), "options.encoding", options.encoding,
            "mixing='dense' has no queries and keys, its matrices know positions: use 'none' or 'learned'")  # fmt: skip
    require(
        not options.qk_norm, "options.qk_norm", options.qk_norm, "mixing='dense' has no queries and keys: use false"
    )
    require(options.positions == "continue", "options.positions", options.positions,
            "mixing='dense' has a row for each place of [inputs ; targets]: use 'continue'")  # fmt: skip
    require(set(splits) <= {objective.S}, "evaluation.splits", splits,
            f"mixing='dense' was trained with {objective.S} inputs: use none")  # fmt: skip
