"""Runs as JSON: complete, strict, hashed; every wrong value named with its remedy."""

import copy
import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.spec import (
    Budget,
    Data,
    Evaluation,
    Objective,
    Optimizer,
    Options,
    Run,
    Seed,
    Shape,
    from_json,
    read_run,
    to_json,
)
from lab.structure import ALL_TWO_STREAM, STRUCTURES, Structure, canonical
from runs import EVERY_STRUCTURE, make_run, name_of


@pytest.mark.parametrize("structure", EVERY_STRUCTURE, ids=name_of)
def test_json_round_trip(structure):
    run = make_run(structure)
    again = from_json(json.loads(json.dumps(to_json(run))))
    assert again == run and again.run_id == run.run_id


def test_there_are_24_two_stream_structures():
    assert len(set(ALL_TWO_STREAM)) == 24 and len({s.name for s in EVERY_STRUCTURE}) == 25


@given(st.floats(1e-6, 1.0), st.integers(0, 2**31 - 1), st.integers(1, 512), st.sampled_from(ALL_TWO_STREAM))
def test_the_id_is_the_content(rate, seed, batch, structure):
    run = make_run(structure, optimizer=Optimizer(learning_rate=rate), seed=Seed(init=seed), batch=batch)
    assert from_json(to_json(run)).run_id == run.run_id
    assert replace(run, revision=1).run_id != run.run_id
    assert replace(run, data=replace(run.data, path="/moved")).run_id == run.run_id
    content = to_json(run)
    content["optimizer"]["clip"] = 1  # a whole number where a float is meant
    assert from_json(content).run_id == run.run_id


def leaves(content, where=()):
    for key, value in content.items():
        yield (*where, key)
        if isinstance(value, dict):
            yield from leaves(value, (*where, key))


def test_every_missing_key_is_named():
    whole = to_json(make_run())
    for path in leaves(whole):
        content = copy.deepcopy(whole)
        part = content
        for key in path[:-1]:
            part = part[key]
        del part[path[-1]]
        expected = "schema = None" if path == ("schema",) else f"missing key {'.'.join(path)}:"
        with pytest.raises(ValueError, match=expected.replace(".", r"\.")):
            from_json(content)


def test_every_field_changes_the_id():
    """But the path: where the text lies is no part of what the run is."""
    run = make_run()
    changed = [
        replace(run, structure=STRUCTURES["prefix_lm"]), replace(run, shape=replace(run.shape, F=13)),
        replace(run, options=Options(tied_embeddings=False)), replace(run, objective=Objective(S=7, T=4)),
        replace(run, data=replace(run.data, manifest="1" * 64)), replace(run, optimizer=Optimizer(learning_rate=1.0)),
        replace(run, budget=Budget(unit="tokens", amount=8)), replace(run, seed=Seed(data=1)), replace(run, batch=5),
        replace(run, evaluation=Evaluation(times=2)), replace(run, precision="bf16"), replace(run, revision=2),
    ]  # fmt: skip
    assert len({r.run_id for r in (run, *changed)}) == 13


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (("optimizer", "learning_rat"), r"unknown key optimizer\.learning_rat: did you mean 'learning_rate'"),
        (("bacth",), "unknown key bacth: did you mean 'batch'"),
    ],
)
def test_an_unknown_key_names_the_nearest(key, message):
    content = to_json(make_run())
    part = content if len(key) == 1 else content[key[0]]
    part[key[-1]] = 1.0
    with pytest.raises(ValueError, match=message):
        from_json(content)


def dials(**changed):
    return Structure(**{**vars(STRUCTURES["prefix_lm"]), **changed})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective(S=0, T=4), r"objective\.S = 0: use a whole number of at least 1"),
        (lambda: Objective(S=4, T=True), r"objective\.T = True"),
        (lambda: Objective(name="masked_lm", S=4, T=5), "mask at most the S = 4"),
        (lambda: Objective(name="masked_lm", S=4, T=2, loss="all"), "use 'targets'"),
        (lambda: Shape(D=8, F=8, N=3, K=2, H=4, L=1, L_input=1), r"shape\.K = 2: use a divisor of shape\.N = 3"),
        (lambda: Shape(D=8, F=8, N=2, K=2, H=3, L=1, L_input=1), r"shape\.H = 3: use an even"),
        (lambda: Shape(D=0, F=8, N=2, K=2, H=4, L=1, L_input=1), r"shape\.D = 0"),
        (lambda: Optimizer(learning_rate=float("nan")), r"optimizer\.learning_rate = nan"),
        (lambda: Optimizer(learning_rate=0.0), r"optimizer\.learning_rate = 0\.0: use a number in \(0, 10\]"),
        (lambda: Optimizer(learning_rate=1.0, schedule="wsd"), "wsd needs the share"),
        (lambda: Optimizer(learning_rate=1.0, decay=0.2), "cosine decays from the end of warm-up"),
        (lambda: Optimizer(learning_rate=1.0, schedule="cosin"), "use one of cosine, linear, wsd"),  # type: ignore[arg-type]
        (lambda: Budget(amount=-1.0), r"budget\.amount = -1\.0"),
        (lambda: Budget(unit="hours", amount=1.0), "use one of flops, reference_seconds, tokens, steps"),  # type: ignore[arg-type]
        (lambda: Data(manifest="abc", train_tokens=5), r"data\.manifest"),
        (lambda: Options(mlp="glu"), r"options\.mlp = 'glu': use one of swiglu, geglu, gelu, relu, relu2"),  # type: ignore[arg-type]
        (lambda: Options(norm="batch"), r"options\.norm = 'batch': use one of rms, layer, scale"),  # type: ignore[arg-type]
        (lambda: Options(norm_place="mid"), "use one of pre, post, sandwich"),  # type: ignore[arg-type]
        (lambda: Options(block="both"), "use one of serial, parallel"),  # type: ignore[arg-type]
        (lambda: Options(share_layers=1), r"options\.share_layers = 1: use true or false"),  # type: ignore[arg-type]
        (lambda: Options(embedding_width=0), r"options\.embedding_width = 0: use a whole number of at least 1"),
        (lambda: Options(logit_softcap=0.0), r"options\.logit_softcap = 0\.0: use a number in \(0,"),
        (lambda: Options(z_loss=-0.1), r"options\.z_loss = -0\.1: use a number in \[0, 1\]"),
        (lambda: dials(cross="none", memory="final"), "encoder-only, with one bidirectional stream"),
        (lambda: dials(inputs="both"), r"structure\.inputs = 'both': use one of bidirectional, causal"),
        (lambda: make_run("prefix_lm", objective=Objective(S=4, T=4, loss="all")), "already seen the token"),
        (lambda: make_run("prefix_lm", shape=replace(make_run().shape, L_input=3)), "unequal depths need"),
        (
            lambda: make_run("prefix_lm", objective=Objective(name="masked_lm", S=4, T=2)),
            "encoder-only takes masked_lm",
        ),
        (lambda: make_run("encoder_only", objective=Objective(S=4, T=2)), "encoder-only takes masked_lm"),
        (lambda: make_run(batch=0), "batch = 0"),
        (lambda: make_run(precision="f16"), "use one of f32, bf16"),
    ],
)
def test_wrong_values_are_named_with_the_way_out(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("value", "message"), [("x", r"batch = 'x': use int"), (1.5, r"batch = 1\.5: use int"), (None, "batch = None")]
)
def test_types_are_not_guessed(value, message):
    with pytest.raises(ValueError, match=message):
        from_json({**to_json(make_run()), "batch": value})


def test_files_that_are_no_runs_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere\.json: no such file"):
        read_run(tmp_path / "nowhere.json")
    (tmp_path / "torn.json").write_text('{"schema": 1,')
    with pytest.raises(ValueError, match=r"torn\.json: not a JSON file"):
        read_run(tmp_path / "torn.json")
    (tmp_path / "old.json").write_text(json.dumps({**to_json(make_run()), "schema": 0}))
    with pytest.raises(ValueError, match=r"old\.json: schema = 0: this version reads 3"):
        read_run(tmp_path / "old.json")


def test_idle_dials():
    prefix, decoder = STRUCTURES["prefix_lm"], STRUCTURES["decoder_only"]
    assert canonical(prefix, L=1, S=8, loss="targets") == decoder
    assert canonical(prefix, L=2, S=8, loss="targets") == prefix
    assert canonical(prefix, L=2, S=1, loss="targets") == decoder
    assert canonical(STRUCTURES["encoder_decoder"], L=1, S=8, loss="targets") == STRUCTURES["encoder_decoder"]


def test_a_run_is_frozen():
    run: Run = make_run()
    with pytest.raises(AttributeError):
        run.batch = 3  # type: ignore[misc]
