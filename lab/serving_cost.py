"""What a conversation costs, turn by turn: FLOPs and the bytes of what is kept. lab.conversation measures the same.

Letters as in lab.cost.
"""

from dataclasses import dataclass
from typing import Literal

from lab import seen
from lab.cost import pair_flops, projections, target_pairs
from lab.spec import Options, Shape
from lab.structure import Structure


@dataclass(frozen=True, kw_only=True)
class Turn:
    """One turn of a conversation: FLOPs before the first reply token, FLOPs of the reply, bytes of keys and values."""

    prefill: int
    decode: int
    cache_bytes: int


def conversation(
    structure: Structure,
    shape: Shape,
    options: Options,
    V: int,
    *,
    turns: int,
    user: int,
    reply: int,
    bytes_per_element: int = 2,
    convention: Literal["textbook", "exact", "dense"] = "textbook",
) -> tuple[Turn, ...]:
    """Cost of `turns` turns in which a user writes `user` tokens and the model answers with `reply` tokens.

    A bidirectional input is encoded again at each turn, since every earlier token may now see the new ones; a causal
    one is only extended, and so is one that is bidirectional within turns (options.turn): all its whole turns are kept, and what
    begins a turn that was not full is read again. Keys that a window has left behind are kept, and are in the bytes.
    A reply was made in the target stream: only where that stream's layers do just what the input stream's do (joint, merged,
    positions that go on) do its keys and values remain; else it is encoded as input in the next turn. A reply's t tokens are
    the t that the target stream is fed with, SEP first: its last one ends it, and no
    later turn reads it. `textbook` charges every input layer whole, `exact` and `dense` what lab.serving executes, by
    the pairs that are attended or that are computed where arrays have the very lengths of the turn. The cache holds what
    the next token or the next turn needs.
    """
    if structure.encoder_only:
        raise ValueError("structure.cross = 'none': encoder-only has no target stream and can not reply")
    p, pair = projections(structure, shape, options, V), pair_flops(shape, options)
    rule, free = seen.among_inputs(structure, options), structure.memory_is_free
    extends = rule.causal
    replies_stay = structure.keeps_replies(options.positions)
    # With memory=same nothing reads what comes out of the last input layer, only the keys and values of what goes in.
    needed = shape.L_input - (structure.memory == "same")
    one = structure.memory_is_one(options.share_layers)
    whole = shape.L_input if convention == "textbook" else needed
    token_bytes = (2 if options.mixing == "attention" else 1) * shape.K * shape.H * bytes_per_element
    result, history, cached = [], 0, 0
    for _ in range(turns):
        n = history + user
        kept = cached // rule.turn * rule.turn if extends else 0
        new = n - kept
        pairs = new * n if convention == "dense" else rule.pairs(n) - rule.pairs(kept)
        of_targets = reply * (n + reply) if convention == "dense" else target_pairs(structure, options, n, reply)
        prefill = whole * (2 * new * p.layer + pair * pairs) + 2 * new * p.embed
        if not free:
            prefill += (1 if one and convention != "textbook" else shape.L) * 2 * new * p.key_value
        elif whole < shape.L_input:
            prefill += 2 * new * p.key_value
        decode = shape.L * (2 * reply * (p.layer + p.reading) + pair * of_targets) + 2 * reply * (p.embed + p.head)
        layers_of_inputs = 1 if one and structure.cross != "merged" else shape.L
        if extends and not free:
            layers_of_inputs += needed  # the input stream's own, to go on from
        cache = token_bytes * (layers_of_inputs * n + shape.L * reply)
        result.append(Turn(prefill=prefill, decode=decode, cache_bytes=cache))
        history = n + reply
        cached = history if replies_stay else n
    return tuple(result)
