"""What the verdicts say: a progress bar, a table, a record."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .cases import LEVELS
from .judge import Verdict, to_json

FORMAT = "laser-conformance-verdicts"
VERSION = 1


class Progress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, total: int) -> None:
        """For so many cases."""
        self.total, self.count, self.failed = total, 0, 0
        self.shown = sys.stderr.isatty()

    def step(self, verdict: Verdict) -> None:
        """One case more."""
        self.count += 1
        self.failed += verdict.status == "failed"
        if self.shown:
            filled = 30 * self.count // max(self.total, 1)
            state = f" {self.failed} failed" if self.failed else ""
            bar = "█" * filled + "░" * (30 - filled)
            print(
                f"\r\033[K{bar} {self.count}/{self.total}{state}  {verdict.case}", end="", file=sys.stderr, flush=True
            )

    def done(self) -> None:
        """Take the bar away."""
        if self.shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)


def may_write(path: Path | None, force: bool) -> None:
    """Refuse to overwrite a file unasked, and a folder that is not there, before anything is computed."""
    if path is None:
        return
    if not path.parent.is_dir():
        raise NotADirectoryError(f"{path}: there is no folder {path.parent}")
    if path.exists() and not force:
        raise FileExistsError(f"{path} is there already; --force overwrites it")


def by_level(verdicts: Iterable[Verdict]) -> dict[str, list[Verdict]]:
    """Verdicts by level, in the order of the levels."""
    found: dict[str, list[Verdict]] = {level: [] for level in LEVELS}
    for verdict in verdicts:
        found[verdict.level].append(verdict)
    return {level: own for level, own in found.items() if own}


def outcome(verdicts: list[Verdict]) -> str:
    """``pass``, ``FAIL``, ``refused`` or ``skipped``, of a level."""
    statuses = {v.status for v in verdicts}
    if "failed" in statuses:
        return "FAIL"
    return "pass" if "passed" in statuses else ("refused" if "refused" in statuses else "skipped")


def worst(verdicts: list[Verdict]) -> float | None:
    """The worst error as a share of what is allowed."""
    ratios = [v.ratio for v in verdicts if v.ratio is not None]
    return max(ratios) if ratios else None


def reasons(verdicts: list[Verdict], status: str) -> list[str]:
    """Each reason once, with how often it was given."""
    counts: dict[str, int] = {}
    for v in verdicts:
        if v.status == status:
            counts[v.message] = counts.get(v.message, 0) + 1
    return [f"{reason} ({n}×)" if n > 1 else reason for reason, n in sorted(counts.items(), key=lambda item: -item[1])]


def table(verdicts: list[Verdict]) -> str:
    """A line for each level, then each failure with its message and command."""
    if not verdicts:
        return "no case was selected"
    lines = [f"{verdicts[0].backend} on {verdicts[0].arrays}", ""]
    lines.append(
        f"{'level':<12} {'':<8} {'passed':>6} {'failed':>6} {'refused':>7} {'skipped':>7} {'worst':>6} {'seconds':>8}"
    )
    for level, own in by_level(verdicts).items():
        count = {s: sum(v.status == s for v in own) for s in ("passed", "failed", "refused", "skipped")}
        ratio = worst(own)
        share = "" if ratio is None else (f"{ratio:.0%}" if ratio < 100 else "> 99×")
        lines.append(
            f"{level:<12} {outcome(own):<8} {count['passed']:>6} {count['failed']:>6} {count['refused']:>7} "
            f"{count['skipped']:>7} {share:>6} {sum(v.seconds for v in own):>8.1f}"
        )
    for status in ("refused", "skipped"):
        own_reasons = reasons(verdicts, status)
        if own_reasons:
            lines += ["", f"{status}:"] + [f"  {reason}" for reason in own_reasons]
    failed = [v for v in verdicts if v.status == "failed"]
    if failed:
        lines += ["", f"{len(failed)} failed:"]
        for v in failed:
            message = v.message.replace("\n", "\n      ")
            lines += [f"  {v.case} {v.dtype}", f"      {message}", f"      {v.reproduce}"]
    return "\n".join(lines)


def write(path: Path, record: dict[str, Any]) -> None:
    """The record of a run as JSON, with a line for each verdict, so that two of them can be compared."""
    head = json.dumps({name: x for name, x in record.items() if name != "verdicts"}, indent=1, ensure_ascii=False)
    lines = ",\n".join(json.dumps(v, ensure_ascii=False) for v in record["verdicts"])
    path.write_text(head[: -len("\n}")] + ',\n "verdicts": [\n' + lines + "\n ]\n}\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    """The record of a run, from its JSON file."""
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        form, version = found["format"], found["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: no record of a run: {error}") from error
    if (form, version) != (FORMAT, VERSION):
        raise ValueError(f"{path}: got {form!r} version {version!r}; allowed: {FORMAT!r} version {VERSION}")
    return found


def _commit() -> str | None:
    """The commit of the working tree that the suite runs from, or what LASER_COMMIT says of an installed one."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # an installation may lie in somebody else's working tree
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("LASER_COMMIT")


def record(verdicts: list[Verdict], device: str = "", cases: str = "") -> dict[str, Any]:
    """The verdicts and where they were reached, for JSON.

    Args:
        verdicts: Of one run.
        device: The hardware that was computed on, in words.
        cases: Which cases these are, in words.
    """
    versions = {}
    for name in ("laser-attention", "numpy", "array-api-strict", "torch", "jax", "cupy-cuda13x", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "format": FORMAT,
        "version": VERSION,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _commit(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "device": device,
        "cases": cases,
        "verdicts": [to_json(v) for v in verdicts],
    }
