"""Tables for documents, from the records of runs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from . import report
from .case import LEVELS
from .judge import Verdict, from_json

Record = dict[str, Any]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def runs(records: Iterable[Record]) -> list[tuple[Record, list[Verdict]]]:
    """The records that have verdicts, with these, by backend and arrays."""
    found = [(record, [from_json(v) for v in record["verdicts"]]) for record in records]
    kept = [(record, verdicts) for record, verdicts in found if verdicts]
    return sorted(kept, key=lambda run: (run[1][0].backend, run[1][0].arrays))


def support(records: Iterable[Record], registered: dict[str, str]) -> str:
    """What each backend has been seen to do, a line for each run; and those that no run is about.

    Args:
        records: Of runs.
        registered: Names of backends and what they are.
    """
    rows, judged = [], set()
    for record, verdicts in runs(records):
        name = verdicts[0].backend
        judged.add(name)
        rows.append([f"`{name}`", verdicts[0].arrays, *_outcome(verdicts), record.get("cases", ""), _where(record)])
    rows += [[f"`{name}`", "–", "not judged yet", "", "", "", ""] for name in registered if name not in judged]
    header = ["backend", "arrays", "levels passed", "cases passed, refused", "worst error / allowed", "of", "judged on"]
    lines = [f"- `{name}`: {summary}" for name, summary in registered.items()]
    return "\n".join(lines) + "\n\n" + table(header, rows)


def _outcome(verdicts: list[Verdict]) -> tuple[str, str, str]:
    """Levels, cases and worst error."""
    levels = {level: report.outcome(own) for level, own in report.by_level(verdicts).items()}
    passed = [level for level, outcome in levels.items() if outcome == "pass"]
    failed = [level for level, outcome in levels.items() if outcome == "FAIL"]
    asked = sum(outcome in ("pass", "FAIL") for outcome in levels.values())
    said = f"{len(passed)} of {asked}" + (f"; **failed: {', '.join(failed)}**" if failed else "")
    count = {s: sum(v.status == s for v in verdicts) for s in ("passed", "refused")}
    worst = report.worst([v for v in verdicts if v.status == "passed"])
    return said, f"{count['passed']}, {count['refused']}", "–" if worst is None else f"{worst:.0%}"


def _where(record: Record) -> str:
    device = str(record.get("device") or "CPU").partition(",")[0]
    return f"{device}, {record['date'].split()[0]}"


def matrix(records: Iterable[Record]) -> str:
    """Levels by runs: the outcome and the worst error as a share of what is allowed; then where each run was."""
    found = runs(records)
    names = [f"`{verdicts[0].backend}` on {verdicts[0].arrays}" for _, verdicts in found]
    columns = [report.by_level(verdicts) for _, verdicts in found]
    rows = [[name, *(_cell(own.get(level, [])) for level in LEVELS)] for name, own in zip(names, columns, strict=True)]
    lines = [f"- {name}: {provenance(record)}" for name, (record, _) in zip(names, found, strict=True)]
    return table(["", *LEVELS], rows) + "\n\n" + "\n".join(lines)


def _cell(verdicts: list[Verdict]) -> str:
    if not verdicts:
        return "–"
    outcome = report.outcome(verdicts)
    if outcome in ("refused", "skipped"):
        return outcome
    ran = [v for v in verdicts if v.status in ("passed", "failed")]
    failed = sum(v.status == "failed" for v in ran)
    if failed:
        return f"**{failed} of {len(ran)} failed**"
    worst = report.worst(ran)
    return f"{len(ran)} passed" + ("" if worst is None else f", {worst:.0%}")


def provenance(record: Record) -> str:
    """Date, commit, versions and device of a run."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    commit = f", commit `{record['commit']}`" if record.get("commit") else ""
    device = f", {record['device']}" if record.get("device") else ""
    cases = f"; cases: {record['cases']}" if record.get("cases") else ""
    return f"{record['date']}{commit}, Python {record['python']}, {versions}; {record['machine']}{device}{cases}"
