"""A study's answer as files: what the page says is what the answer says, and the table beside it has every run."""

import re
from dataclasses import replace

import pandas as pd

import synthetic
from analysis.answer import analyse
from analysis.markdown import RUN_COLUMNS, publish, text

TWO = {name: synthetic.FOUR_ARMS[name] for name in ("prefix_lm", "decoder_only")}


def test_a_published_study_is_its_answer(tmp_path):
    study = synthetic.Study(arms=TWO, baseline="decoder_only", question="Is x | y better?", notes=("a note",))
    synthetic.write(tmp_path / "study", study)
    page = publish(tmp_path / "study", tmp_path / "out")
    written, answer = page.read_text(), analyse(tmp_path / "study")
    name = answer.study["name"]
    assert page.name == f"{name}.md"
    for kept in re.findall(r"\]\(([^)]*)\)", written):
        assert (tmp_path / "out" / kept).stat().st_size > 100, kept
    (verdict,) = answer.verdicts
    assert verdict.kind == "A better" and f"**prefix_lm better**: {verdict.sentence}" in written
    for budget in answer.budgets:
        difference = answer.differences["prefix_lm", budget]
        assert f"{difference.value:+.4f} | {difference.low:+.4f} to {difference.high:+.4f}" in written
    assert all(f"- {caveat}" in written for caveat in answer.caveats) and "a note" in written
    runs = pd.read_csv(tmp_path / "out" / f"{name}.csv")
    assert list(runs) == list(RUN_COLUMNS) and len(runs) == len(answer.frame)
    tables = [line for line in written.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) == len(re.findall(r"(?<!\\)\|", tables[0])) for line in tables[:4])


def test_the_page_says_whether_verdicts_last_without_the_largest_budget(tmp_path):
    """One arm leads by as much at every budget; of the other only the largest budget is made to say so."""
    study = synthetic.Study(arms=TWO, baseline="decoder_only")
    synthetic.write(tmp_path / "study", study)
    answer = analyse(tmp_path / "study")
    assert "every verdict is the same" in text(answer)
    changed = tuple(replace(verdict, kind="not resolved") for verdict in answer.verdicts)
    assert "is *prefix_lm better* instead of *not resolved*: it is not stable" in text(
        replace(answer, verdicts=changed)
    )
