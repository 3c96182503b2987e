"""A study's plan.json: which runs there are. Written anew where the study changes; what was begun is never lost by that."""

from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from lab import plan_file, records
from lab.plan_file import Rows
from sweeps.files import Files, check_name
from sweeps.index import DIRECTORY as ENDED

OWN = ("runs", "logs", "locks", ENDED, "groups", "code", "slurm")  # what may be there when the plan is not


class Planned:
    """Read when it is asked for, once; `write` forgets what was read."""

    def __init__(self, files: Files):
        self.files = files

    @cached_property
    def content(self) -> dict[str, Any]:
        try:
            return plan_file.from_text(self.files.read(records.PLAN), f"{self.files}/{records.PLAN}")
        except FileNotFoundError:
            raise ValueError(
                f"{self.files}: no {records.PLAN} here; give the directory that `lab run` or `lab plan --out` wrote"
            ) from None

    @cached_property
    def runs(self) -> Mapping[str, dict[str, Any]]:
        """One row of the plan for each run, in order; parsed when it is asked for."""
        return _ByRun(self.content["runs"])

    def write(self, plan: Mapping[str, Any], *, replace: bool = False) -> str:
        """Writes it and says what changed. What is done is kept: a run's id is its content.

        Refuses another study's directory, and, without `replace`, a plan that no longer has runs which were begun.
        """
        ids = [row["run_id"] for row in plan["runs"]] if not isinstance(plan["runs"], Rows) else plan["runs"].ids
        for run_id in ids:
            check_name("run_id", run_id)
        text = plan_file.to_text(plan)
        if not self.files.exists(records.PLAN):
            there = self.files.names("")
            strange = [name for name in there if name not in OWN and not name.startswith(".")]
            if strange and ENDED not in there:  # where runs have ended, reports and tables lie beside them
                raise ValueError(f"{self.files}: no study's directory, it holds {strange[0]}; give a new one (--out)")
            self.files.write(records.PLAN, text)
            return f"new plan of {len(ids)} rows"
        before_text = self.files.read(records.PLAN)
        old = plan_file.from_text(before_text, f"{self.files}/{records.PLAN}")
        if old["study"]["name"] != plan["study"]["name"]:
            raise ValueError(
                f"{self.files}: holds study {old['study']['name']!r}, not {plan['study']['name']!r}; "
                "two studies can not share a directory: give another --out"
            )
        before, after = set(old["runs"].ids), set(ids)
        begun = sorted((before - after) & set(self.files.names("runs")))
        difference = f"{len(after - before)} runs added, {len(before - after)} dropped, {len(before & after)} kept"
        if begun and not replace:
            raise ValueError(
                f"{self.files}: the plan changed under its runs: {difference}; {len(begun)} of the dropped ones were begun "
                f"({', '.join(begun[:3])}{', ...' if len(begun) > 3 else ''}). --replace-plan plans anew and keeps their "
                "directories; --out DIR leaves this study as it is"
            )
        if before_text != text:
            self.files.write(records.PLAN, text)
            for cached in ("content", "runs"):
                self.__dict__.pop(cached, None)
        return difference


class _ByRun(Mapping[str, dict[str, Any]]):
    """The first of a plan's rows for each run: an A/A comparison has two."""

    def __init__(self, rows: Rows):
        self._rows, self._index = rows, {}
        for index, run_id in enumerate(rows.ids):
            check_name("run_id", run_id)
            self._index.setdefault(run_id, index)

    def __getitem__(self, run_id: str) -> dict[str, Any]:
        return self._rows[self._index[run_id]]

    def __contains__(self, run_id: object) -> bool:
        return run_id in self._index

    def __iter__(self) -> Iterator[str]:
        return iter(self._index)

    def __len__(self) -> int:
        return len(self._index)
