"""The sweep algebra: sizes, order, and strictness about paths."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.structure import STRUCTURES
from runs import make_run
from sweeps.grid import axis, chain, expand, override, product, target_share, zip_

values = st.lists(st.integers(), min_size=1, max_size=4)


@given(values, values, values)
def test_product_multiplies_and_is_associative(a, b, c):
    A, B, C = axis("a", *a), axis("b", *b), axis("c", *c)
    assert product(A, B, C) == product(product(A, B), C) == product(A, product(B, C))
    assert [tuple(d.values()) for d in product(A, B, C)] == [(x, y, z) for x in a for y in b for z in c]


@given(values, values)
def test_chain_adds_and_zip_pairs(a, b):
    assert chain(axis("a", *a), axis("b", *b)) == axis("a", *a) + axis("b", *b)
    n = min(len(a), len(b))
    assert zip_(axis("a", *a[:n]), axis("b", *b[:n])) == [{"a": x, "b": y} for x, y in zip(a[:n], b[:n], strict=True)]


@given(st.integers(1, 50).map(lambda i: 8 * i), st.integers(1, 9))
def test_overrides_of_one_part_are_applied_together(D, L):
    run = override(make_run(), {"shape.D": D, "shape.L": L, "shape.L_input": L, "batch": L})
    assert (run.shape.D, run.shape.L, run.shape.L_input, run.batch) == (D, L, L, L)
    assert override(run, {"shape.D": D}) == run
    with pytest.raises(ValueError, match="L_input"):
        override(make_run(), {"shape.L": L + 2})


paths = {
    "optimizer.learning_rate": 2e-3,
    "optimizer.clip": 0.5,
    "seed.init": 3,
    "seed.data": 4,
    "batch": 8,
    "shape.D": 16,
}


@given(st.permutations(list(paths.items())), st.integers(0, len(paths)))
def test_overriding_is_idempotent_and_knows_no_order(items, cut):
    once = override(make_run(), dict(items))
    assert once == override(make_run(), paths) == override(once, paths)
    assert once == override(override(make_run(), dict(items[:cut])), dict(items[cut:]))


@given(st.sampled_from(sorted(paths)), st.text("abcxyz", min_size=1, max_size=4))
def test_an_unknown_path_is_named_in_full(path, more):
    with pytest.raises(ValueError, match=rf"override {path}{more}\b"):
        override(make_run(), {path + more: 1})


def test_whole_parts_and_grids():
    grid = product(
        axis("structure", *(STRUCTURES[n] for n in ("prefix_lm", "decoder_only"))), axis("seed.init", 0, 1, 2)
    )
    runs = expand(make_run(), grid)
    assert [(r.structure.name, r.seed.init) for r in runs] == [
        (n, i) for n in ("prefix_lm", "decoder_only") for i in (0, 1, 2)
    ]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"optimiser.learning_rate": 1.0}, "did you mean 'optimizer'"),
        ({"optimizer.learning_rat": 1.0}, r"no field optimizer\.learning_rat; did you mean 'learning_rate'"),
        ({"batch.size": 2}, "batch is 4 and has no parts"),
        ({"shape": make_run().shape, "shape.D": 16}, "both set"),
    ],
)
def test_paths_are_strict(overrides, message):
    with pytest.raises(ValueError, match=message):
        override(make_run(), overrides)


def test_grids_that_do_not_fit():
    with pytest.raises(ValueError, match=r"lengths \[1, 2\]"):
        zip_(axis("a", 1), axis("b", 1, 2))
    with pytest.raises(ValueError, match="override a: set by two grids"):
        product(axis("a", 1), axis("a", 2))


def test_shares_of_targets_at_one_total():
    found = [target_share(64, Fraction(k, 16)) for k in range(1, 16)]
    assert found == [(64 - 4 * k, 4 * k) for k in range(1, 16)]
    assert target_share(256, "3/16") == target_share(256, 0.1875) == (208, 48)
    assert target_share(12, "1/3") == (8, 4)
    assert target_share(100, 0.3) == (70, 30)


@pytest.mark.parametrize(
    ("total", "share", "message"),
    [
        (
            60,
            "1/16",
            r"share = '1/16' of total = 60 is 3.75 targets: use whole tokens, such as a total of 64 and .* 16ths",
        ),
        (
            64,
            0.3,
            r"share = 0\.3 of total = 64 is 19\.2 targets: use whole tokens, such as a total of 60 and a share in 10ths",
        ),
        (64, "1/32", r"share = '1/32': use a share of the tokens from 1/16 to 15/16"),
        (64, 1, "from 1/16 to 15/16"),
        (64, "half", r"share = 'half': use a fraction such as '3/16'"),
        (64, float("nan"), "use a fraction"),
        (64.0, "1/2", r"total = 64\.0: use a whole number of tokens"),
    ],
)
def test_shares_that_are_refused(total, share, message):
    with pytest.raises(ValueError, match=message):
        target_share(total, share)
