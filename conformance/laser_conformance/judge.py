"""One case, one dtype, one subject: a verdict."""

from __future__ import annotations

import dataclasses
import math
import os
import time
import traceback
from dataclasses import dataclass
from typing import Any, Literal

from . import checks, frameworks, properties
from .cases import EACH, Case
from .compare import Finding
from .generate import DTYPES
from .problems import build
from .subject import NotThere, Refused, Subject

Status = Literal["passed", "failed", "refused", "skipped"]
WIDE, NARROW = ("float32", "float64"), ("bfloat16", "float16")
CHECKS = checks.CHECKS | frameworks.CHECKS | properties.CHECKS


@dataclass(frozen=True)
class Verdict:
    """What became of a case.

    Attributes:
        case: Its id.
        level: Its level.
        backend: Who was judged.
        arrays: On whose arrays, with ``:device`` where one was named.
        dtype: In which dtype; "" where there was none to run in.
        status: ``refused`` is the backend's own word, ``skipped`` the suite's.
        ratio: The worst error as a share of what is allowed; None where nothing was measured.
        message: Why, unless it passed.
        seconds: How long it took, truth and tolerance included.
    """

    case: str
    level: str
    backend: str
    arrays: str
    dtype: str
    status: Status
    ratio: float | None
    message: str
    seconds: float

    @property
    def reproduce(self) -> str:
        """The command that runs this case alone, or writes the problem alone where it is judged from files."""
        if self.arrays == "files":
            return f"laser-conformance export FOLDER --only {self.case} --dtype {self.dtype}"
        name, _, device = self.arrays.partition(":")
        place = f" --device {device}" if device else ""
        dtype = f" --dtype {self.dtype}" if self.dtype else ""
        return f"laser-conformance run --backend {self.backend} --arrays {name}{place} --only {self.case}{dtype}"


def arrays_of(subject: Subject) -> str:
    """The subject's arrays as a verdict names them."""
    library = subject.library
    return f"{library.name}:{library.device}" if library.device not in ("", "cpu") else library.name


def judge(subject: Subject, case: Case, asked: tuple[str, ...] = (), quick: bool = False) -> list[Verdict]:
    """A verdict for each dtype that the case is to be tried in, of those ``asked`` for.

    A case for two dtypes is tried in the first wide one and the first narrow one that are served; ``quick``: in the
    first that is served.
    """
    reason = _not_here(subject, case)
    if reason is not None:
        return [_verdict(subject, case, "", "skipped", reason)]
    if asked or case.dtypes == EACH:
        return [_in_dtype(subject, case, dtype) for dtype in (asked or tuple(DTYPES))]
    verdicts = []
    for preference in (WIDE + NARROW,) if quick else (WIDE, NARROW):
        tried = []
        for dtype in preference:
            tried.append(_in_dtype(subject, case, dtype))
            if tried[-1].status in ("passed", "failed"):
                break
        else:
            tried.sort(key=lambda v: v.status != "refused")  # the backend's own word says more
            verdicts.append(tried[0])
            continue
        verdicts.append(tried[-1])
    return verdicts


def _not_here(subject: Subject, case: Case) -> str | None:
    if case.libraries and subject.library.name not in case.libraries:
        return f"for arrays of {', '.join(case.libraries)}"
    if case.memory and (free := free_memory()) is not None and free < case.memory:
        return f"needs {case.memory / 2**30:.0f} GiB of memory; {free / 2**30:.0f} GiB are free"
    return None


def free_memory() -> int | None:
    """Bytes of memory that are free or can be freed, where the system says so."""
    try:
        with open("/proc/meminfo") as file:
            lines = dict(line.split(":", 1) for line in file)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None


def _in_dtype(subject: Subject, case: Case, dtype: str) -> Verdict:
    start = time.perf_counter()
    try:
        found = CHECKS[case.check](subject, build(case.spec, dtype))
    except Refused as error:
        status: Status = "skipped" if isinstance(error, NotThere) else "refused"
        return _verdict(subject, case, dtype, status, str(error), start)
    except (Exception, SystemExit) as error:
        return _verdict(subject, case, dtype, "failed", _told(error), start)
    return _from_findings(subject, case, dtype, found, start)


def _told(error: BaseException) -> str:
    """An exception as a sentence, and where it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    text = str(error).strip().splitlines()
    return f"raised {type(error).__name__}: {text[0] if text else ''}{where}"


def _from_findings(subject: Subject, case: Case, dtype: str, found: list[Finding], start: float) -> Verdict:
    problems = [f.problem for f in found if f.problem is not None]
    ratios = [f.ratio for f in found if f.ratio is not None]
    verdict = _verdict(subject, case, dtype, "failed" if problems else "passed", "\n".join(problems[:6]), start)
    return dataclasses.replace(verdict, ratio=max(ratios) if ratios else None)


def _verdict(
    subject: Subject, case: Case, dtype: str, status: Status, message: str, start: float | None = None
) -> Verdict:
    seconds = 0.0 if start is None else time.perf_counter() - start
    return Verdict(case.id, case.level, subject.backend, arrays_of(subject), dtype, status, None, message, seconds)


def to_json(verdict: Verdict) -> dict[str, Any]:
    """A verdict as JSON has it: four digits are enough, and an infinite ratio is the string ``inf``."""
    record = dataclasses.asdict(verdict)
    if verdict.ratio is not None:
        record["ratio"] = float(f"{verdict.ratio:.4g}") if math.isfinite(verdict.ratio) else "inf"
    record["seconds"] = round(verdict.seconds, 4)
    return record


def from_json(record: dict[str, Any]) -> Verdict:
    """The inverse of :func:`to_json`."""
    return Verdict(**(record | {"ratio": math.inf if record["ratio"] == "inf" else record["ratio"]}))
