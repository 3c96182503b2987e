"""An independent count of executed FLOPs: a walk over the jaxpr, `dot_general` times the length of its scans."""

import math

import jax


def count(function, *arguments) -> int:
    """FLOPs (2 for a multiply-add) of all matrix products in `function`; arguments may be shapes."""
    return _walk(jax.make_jaxpr(function)(*arguments).jaxpr)


def _walk(jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
            continue
        assert equation.primitive.name not in ("while", "cond"), "this walk knows no data-dependent repetition"
        repeats = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    total += repeats * _walk(inner)
    return total
