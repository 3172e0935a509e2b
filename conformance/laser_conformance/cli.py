"""The command ``laser-conformance``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import html, report, vectors
from .arrays import known_libraries
from .cases import LEVELS, choose
from .generate import DTYPES
from .judge import Verdict, arrays_of
from .run import TIME_LIMIT, CannotRun, Setup, run

PASSED, FAILED, COULD_NOT = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0 where all is well, 1 where a case failed, 2 where nothing could be run."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        return code
    except (CannotRun, ValueError, FileExistsError, NotADirectoryError) as error:
        print(f"laser-conformance: {error}", file=sys.stderr)
        return COULD_NOT
    except BrokenPipeError:
        return COULD_NOT


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="laser-conformance", description="Judge an implementation of LASER attention.", epilog=main.__doc__
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    judge = commands.add_parser("run", help="judge a registered backend")
    judge.add_argument("--backend", required=True, metavar="NAME", help="the name that it is registered under")
    judge.add_argument("--arrays", default="", metavar="LIBRARY", help=f"whose arrays: {', '.join(known_libraries())}")
    judge.add_argument("--device", default="", help="a device of that library; default: its own default")
    _selection(judge)
    judge.add_argument(
        "--dtype", action="append", default=[], choices=list(DTYPES), help="only this dtype; may be repeated"
    )
    judge.add_argument("--load", default="", metavar="MODULE:NAME", help="a backend record that no entry point names")
    judge.add_argument("--limit", type=float, default=TIME_LIMIT, metavar="S", help="seconds per case (%(default)g)")
    judge.add_argument("--jobs", type=int, default=1, metavar="N", help="cases at a time (%(default)d)")
    _outputs(judge)
    judge.set_defaults(command=_run)

    exports = commands.add_parser("export", help="write problems and expected results as files")
    exports.add_argument("folder", type=Path, help="a new or empty folder")
    _selection(exports)
    exports.add_argument(
        "--dtype", action="append", default=[], choices=list(DTYPES), help="default: float32, bfloat16"
    )
    exports.set_defaults(command=_export)

    checks = commands.add_parser("check", help="judge the results that an implementation wrote beside exported files")
    checks.add_argument("folder", type=Path)
    checks.add_argument("--name", default="files", help="what to call the implementation")
    _outputs(checks)
    checks.set_defaults(command=_check)

    reports = commands.add_parser("report", help="one HTML page from the JSON files of several runs")
    reports.add_argument("runs", type=Path, nargs="+", metavar="JSON")
    reports.add_argument("--html", type=Path, required=True, metavar="FILE", help="the page to write")
    reports.add_argument("--force", action="store_true", help="overwrite it")
    reports.set_defaults(command=_report)

    lists = commands.add_parser("list", help="the levels and cases, a sentence each")
    _selection(lists)
    lists.set_defaults(command=_list)
    return parser


def _selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--level",
        action="append",
        default=[],
        metavar="LEVEL",
        help=f"only this level; may be repeated: {', '.join(LEVELS)}",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="CASE",
        help="only cases whose id begins like this; may be repeated",
    )
    parser.add_argument("--quick", action="store_true", help="the quick subset of the cases")


def _outputs(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the verdicts")
    parser.add_argument("--html", type=Path, metavar="FILE", help="write a report to look at")
    parser.add_argument("--force", action="store_true", help="overwrite these files")


def _run(arguments: argparse.Namespace) -> int:
    cases = choose(tuple(arguments.level), tuple(arguments.only), arguments.quick)
    for path in (arguments.json, arguments.html):
        report.may_write(path, arguments.force)
    if not arguments.limit > 0:
        raise ValueError(f"limit: got {arguments.limit:g}; allowed: a positive number of seconds")
    if arguments.jobs < 1:
        raise ValueError(f"jobs: got {arguments.jobs}; allowed: 1 and more")
    setup = Setup(
        arguments.backend, arguments.arrays, arguments.device, arguments.load, tuple(arguments.dtype), arguments.quick
    )
    verdicts: list[Verdict] = []
    progress = report.Progress(len(cases))
    complete = True
    try:
        for verdict in run(setup, cases, arguments.limit, arguments.jobs):
            if not verdicts or verdicts[-1].case != verdict.case:
                progress.step(verdict)
            verdicts.append(verdict)
    except KeyboardInterrupt:  # what was judged is not lost
        complete = False
    progress.done()
    subject = setup.subject()
    done = {verdict.case for verdict in verdicts}
    for case in cases:
        if case.id not in done:
            who = (case.id, case.level, setup.backend, arrays_of(subject), "")
            verdicts.append(Verdict(*who, "skipped", None, "not run: interrupted", 0.0))
    order = {case.id: i for i, case in enumerate(cases)}
    verdicts.sort(key=lambda verdict: order[verdict.case])
    code = _conclude(verdicts, arguments, subject.library.hardware(), _chosen(arguments))
    return code if complete or code == FAILED else COULD_NOT


def _chosen(arguments: argparse.Namespace) -> str:
    """Which cases these are, in words."""
    some = [*arguments.level, *arguments.only, *arguments.dtype]
    return ("quick subset" if arguments.quick else "all") + (f" of {', '.join(some)}" if some else "")


def _conclude(verdicts: list[Verdict], arguments: argparse.Namespace, device: str = "", chosen: str = "") -> int:
    """Write what was asked for, print the table, and say how it went."""
    record = report.record(verdicts, device, chosen)
    if arguments.json:
        report.write(arguments.json, record)
    if arguments.html:
        arguments.html.write_text(html.page([record]), encoding="utf-8")
    print(report.table(verdicts))
    if any(v.status == "failed" for v in verdicts):
        return FAILED
    return PASSED if any(v.status == "passed" for v in verdicts) else COULD_NOT


def _export(arguments: argparse.Namespace) -> int:
    cases = choose(tuple(arguments.level), tuple(arguments.only), arguments.quick)
    count = vectors.export(arguments.folder, cases, tuple(arguments.dtype) or ("float32", "bfloat16"))
    print(f"{count} problems in {arguments.folder}")
    return PASSED if count else COULD_NOT


def _check(arguments: argparse.Namespace) -> int:
    for path in (arguments.json, arguments.html):
        report.may_write(path, arguments.force)
    return _conclude(vectors.check(arguments.folder, arguments.name), arguments)


def _report(arguments: argparse.Namespace) -> int:
    report.may_write(arguments.html, arguments.force)
    page = html.page([report.read(path) for path in arguments.runs])
    arguments.html.write_text(page, encoding="utf-8")
    return PASSED


def _list(arguments: argparse.Namespace) -> int:
    cases = choose(tuple(arguments.level), tuple(arguments.only), arguments.quick)
    width = max((len(case.id) for case in cases), default=0)
    for level, sentence in LEVELS.items():
        own = [case for case in cases if case.level == level]
        if own:
            print(f"{level} ({len(own)}): {sentence}")
            for case in own:
                print(f"  {case.id:<{width}}  {case.sentence}")
    return PASSED
