"""plan.json: what is written is read, row by row; what is torn is noticed; what earlier versions wrote is read too."""

import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import plan_file, records

ABOUT = {"schema": records.SCHEMA, "study": {"name": "one", "notes": ['a "runs": [ in a note', "\n]}\n"]}}
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
NAMES = st.text("abcdefghij-_.0123456789", min_size=1, max_size=12)
ROWS = st.lists(
    st.builds(lambda i, v: {"arm": "a", **v, "run_id": i}, NAMES, st.dictionaries(st.text(), VALUES, max_size=4)),
    max_size=6,
)


@given(ROWS)
def test_what_is_written_is_read(rows):
    text = plan_file.to_text({**ABOUT, "runs": rows})
    plan = plan_file.from_text(text, "plan.json")
    assert plan == {**ABOUT, "runs": rows} == json.loads(text)  # other programs read it as JSON
    assert list(plan["runs"].ids) == [row["run_id"] for row in rows]
    assert plan["runs"][1:] == rows[1:] and len(plan["runs"]) == len(rows)
    assert plan_file.to_text(plan) == text


def test_an_indented_plan_of_earlier_versions_is_read():
    rows = [{"run_id": "one", "arm": "a"}, {"arm": "b", "run_id": "two"}]
    old = json.dumps({**ABOUT, "runs": rows}, indent=1).encode() + b"\n"
    plan = plan_file.from_text(old, "plan.json")
    assert plan["runs"] == rows and plan["runs"].ids == ("one", "two")
    with pytest.raises(ValueError, match=r"plan\.json: not a plan"):
        plan_file.from_text(json.dumps({**ABOUT, "runs": [{"arm": "a"}]}).encode(), "plan.json")


def test_a_plan_that_is_cut_anywhere_is_refused():
    text = plan_file.to_text({**ABOUT, "runs": [{"run_id": f"run-{i}", "values": [i, {"x": "]}"}]} for i in range(5)]})
    for cut in range(len(text) - 1):  # without its last newline it is whole
        with pytest.raises(ValueError, match=r"here/plan\.json"):
            plan_file.from_text(text[:cut], "here/plan.json")


def test_a_line_that_is_lost_or_doubled_in_part_is_refused_or_named_when_it_is_read():
    rows = [{"run_id": f"run-{i}", "value": i} for i in range(5)]
    text, chance, refused = plan_file.to_text({**ABOUT, "runs": rows}), random.Random(0), 0
    start = text.index(b'{"run_id"')
    for _ in range(300):
        first, last = sorted(chance.randrange(start, len(text)) for _ in range(2))
        damaged = text[:first] + text[last:] if chance.random() < 0.5 else text[:last] + text[first:]
        try:
            read = list(plan_file.from_text(damaged, "here/plan.json")["runs"])
            assert read == json.loads(damaged)["runs"]  # nothing but what stands there
        except ValueError as error:
            assert "here/plan.json" in str(error)
            refused += 1
    assert refused > 200


def test_rows_are_made_when_they_are_asked_for():
    made = []
    rows = plan_file.Rows(["a", "b", "c"], lambda i: made.append(i) or {"run_id": "abc"[i]})
    assert len(rows) == 3 and rows.ids == ("a", "b", "c") and made == []
    assert rows[-1] == {"run_id": "c"} and made == [2]
    with pytest.raises(IndexError):
        rows[3]


def test_a_number_that_json_has_not_is_refused():
    with pytest.raises(ValueError, match="not JSON compliant"):
        plan_file.to_text({**ABOUT, "runs": [{"run_id": "one", "value": float("nan")}]})
