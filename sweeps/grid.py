"""Sweep algebra on frozen dataclasses: product, zip and chain of overrides, strict about every path.

expand(run, product(axis("optimizer.learning_rate", 1e-3, 3e-3), axis("shape.D", 32, 64)))  -> four runs
"""

import dataclasses
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

from lab.checks import nearest
from lab.hyperparameters import Numbers

Overrides = Mapping[str, Any]
Grid = list[dict[str, Any]]
T = TypeVar("T")


def axis(path: str, *values: Any) -> Grid:
    """One override for each value."""
    return [{path: value} for value in values]


def product(*grids: Sequence[Overrides]) -> Grid:
    """Every combination; the first grid varies slowest. A path that two grids set is an error."""
    combined: Grid = [{}]
    for grid in grids:
        combined = [_merge(left, right) for left in combined for right in grid]
    return combined


def zip_(*grids: Sequence[Overrides]) -> Grid:
    """Grids of one length, taken in step."""
    lengths = [len(grid) for grid in grids]
    if len(set(lengths)) > 1:
        raise ValueError(f"zip_ of grids of lengths {lengths}: give grids of one length, or use product")
    combined: Grid = [{} for _ in range(lengths[0] if lengths else 0)]
    for grid in grids:
        combined = [_merge(left, right) for left, right in zip(combined, grid, strict=True)]
    return combined


def chain(*grids: Sequence[Overrides]) -> Grid:
    """One grid after the other."""
    return [dict(overrides) for grid in grids for overrides in grid]


def expand(template: T, grid: Sequence[Overrides]) -> list[T]:
    """The template under each set of overrides."""
    return [override(template, overrides) for overrides in grid]


def target_share(total: int, share: Fraction | str | float) -> tuple[int, int]:
    """(S, T) of an example of `total` tokens, of which `share` are targets: from 1/16 to 15/16, as "3/16" or 0.1875.

    A sweep over shares at one total holds what is read fixed and changes what is asked:

        [arm(structure, data, S=S, T=T) for S, T in (target_share(256, f"{k}/16") for k in range(1, 16))]

    Raises ValueError for a share out of range, and where the share of the total is no whole number of tokens.
    """
    try:
        exact = Fraction(str(share))  # 0.3 means 3/10, not the nearest binary fraction
    except (ValueError, ZeroDivisionError, OverflowError) as error:
        raise ValueError(f"share = {share!r}: use a fraction such as '3/16', or a number") from error
    if not (isinstance(total, int) and total >= 2):
        raise ValueError(f"total = {total!r}: use a whole number of tokens, at least 2")
    if not Fraction(1, 16) <= exact <= Fraction(15, 16):
        raise ValueError(f"share = {share!r}: use a share of the tokens from 1/16 to 15/16")
    targets = total * exact
    if targets.denominator != 1:
        step = exact.limit_denominator(16).denominator
        near = max(step, round(total / step) * step)
        raise ValueError(
            f"share = {share!r} of total = {total} is {float(targets):g} targets: use whole tokens, such as a total of {near} "
            f"and a share in {step}ths"
        )
    return total - int(targets), int(targets)


def override(value: T, overrides: Overrides, *, where: str = "") -> T:
    """A copy of a frozen dataclass with fields at dotted paths replaced, all of one part at once.

    Raises ValueError for a path that does not exist, naming the nearest one, and for one that lies inside another.
    """
    if isinstance(value, Numbers):
        return _renumbered(value, overrides, where)
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        path = next(iter(overrides))
        raise ValueError(f"override {where}.{path}: {where} is {value!r} and has no parts; set {where} itself")
    names = [item.name for item in dataclasses.fields(value)]
    direct: dict[str, Any] = {}
    deeper: dict[str, dict[str, Any]] = {}
    prefix = f"{where}." if where else ""
    for path, new in overrides.items():
        head, _, rest = path.partition(".")
        if head not in names:
            raise ValueError(f"override {prefix}{path}: no field {prefix}{head}; {nearest(head, names)}")
        if rest:
            deeper.setdefault(head, {})[rest] = new
        else:
            direct[head] = new
    for head, inner in deeper.items():
        if head in direct:
            raise ValueError(
                f"override {prefix}{head}: it and {prefix}{head}.{next(iter(inner))} are both set; set one"
            )
        direct[head] = override(getattr(value, head), inner, where=prefix + head)
    return dataclasses.replace(value, **direct)


def _renumbered(value: Any, overrides: Overrides, where: str) -> Any:
    for name in overrides:
        if name not in value:
            known = nearest(name, list(value)) if len(value) else "it has none"
            raise ValueError(f"override {where}.{name}: no field {where}.{name}; {known}")
    return Numbers({**value, **overrides})


def _merge(left: Overrides, right: Overrides) -> dict[str, Any]:
    both = sorted(set(left) & set(right))
    if both:
        raise ValueError(f"override {both[0]}: set by two grids that are combined; set it in one")
    return {**left, **right}
