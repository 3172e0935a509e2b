"""The runner: cases in a process of their own, so that one that crashes or hangs is a failed case and no more."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import queue
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import laser_core

from .arrays import Absent, open_library
from .cases import Case, all_cases
from .judge import Verdict, arrays_of, free_memory, from_json, judge, to_json
from .problems import CONTENTS, Spec
from .subject import Subject

TIME_LIMIT = 300.0  # seconds per case
_START_LIMIT = 180.0  # for importing a framework


class CannotRun(RuntimeError):
    """There is nothing to judge: an unknown or absent backend, or arrays that are not there."""


@dataclass(frozen=True)
class Setup:
    """Who is judged, on what.

    Attributes:
        backend: A registered name.
        arrays: An array library; "" is the first that the backend names, or NumPy.
        device: One of its devices; "" is its default.
        load: ``module:ATTRIBUTE`` of a record to register first, for a backend that no entry point names.
        dtypes: The dtypes to try; empty leaves the choice to the cases.
        quick: Try fewer dtypes.
    """

    backend: str
    arrays: str = ""
    device: str = ""
    load: str = ""
    dtypes: tuple[str, ...] = ()
    quick: bool = False

    def subject(self) -> Subject:
        """The backend and its arrays.

        Raises:
            CannotRun: Says why.
        """
        if self.load:
            register(self.load)
        known = laser_core.backends()
        if self.backend not in known:
            raise CannotRun(f"backend: got {self.backend!r}; allowed: {', '.join(map(repr, known))}")
        record = known[self.backend]
        if (reason := record.missing()) is not None:
            raise CannotRun(f"backend {self.backend!r} is not there: it {reason}")
        try:
            return Subject(self.backend, open_library(self.arrays or (record.frameworks or ("numpy",))[0], self.device))
        except (Absent, ValueError) as error:
            raise CannotRun(str(error)) from error


def register(load: str) -> laser_core.Backend:
    """Add the record ``module:ATTRIBUTE`` to the registered backends of this process."""
    module, _, attribute = load.partition(":")
    try:
        record = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise CannotRun(f"load: got {load!r}; allowed: module:ATTRIBUTE of a laser_core.Backend; {error}") from error
    if not isinstance(record, laser_core.Backend):
        raise CannotRun(f"load: {load!r} is a {type(record).__name__}; allowed: a laser_core.Backend")
    laser_core.backends()[record.name] = record
    return record


def run_here(setup: Setup, cases: tuple[Case, ...]) -> Iterator[Verdict]:
    """Verdicts, in this process."""
    subject = setup.subject()
    for case in cases:
        yield from judge(subject, case, setup.dtypes, setup.quick)


def run(setup: Setup, cases: tuple[Case, ...], limit: float = TIME_LIMIT, jobs: int = 1) -> Iterator[Verdict]:
    """Verdicts, each case within a time limit, whatever an implementation does; with several jobs as they come.

    Raises:
        CannotRun: Before the first case.
    """
    subject = setup.subject()
    workers = [_Worker(setup) for _ in range(max(1, min(jobs, len(cases))))]
    free: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
    for worker in workers:
        free.put(worker)

    found: queue.SimpleQueue[list[Verdict] | None] = queue.SimpleQueue()

    def verdicts(group: list[Case]) -> None:
        worker = free.get()
        try:
            for case in group:
                start = time.monotonic()
                answer = worker.ask(case.id, limit)
                if not isinstance(answer, str):
                    found.put([from_json(verdict) for verdict in answer])
                    continue
                worker.restart()
                who = (case.id, case.level, setup.backend, arrays_of(subject), "")
                found.put([Verdict(*who, "failed", None, answer, time.monotonic() - start)])
        finally:
            found.put(None)
            free.put(worker)

    groups = _groups(cases) if len(workers) > 1 else [list(cases)]
    pool = ThreadPoolExecutor(len(workers))
    try:
        futures = [pool.submit(verdicts, group) for group in groups]
        left = len(groups)
        while left:
            answer = found.get()
            left -= answer is None
            yield from answer or ()
        for future in futures:
            future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.close()


def _groups(cases: tuple[Case, ...]) -> list[list[Case]]:
    """Cases of the same sizes and options together, in one worker: an implementation may compile once for all of them.

    Every level begins early, so that a run that is interrupted has judged something of each.
    """
    groups: dict[object, list[Case]] = {}
    begins: dict[object, int] = {}
    seen: dict[str, int] = {}
    for case in cases:
        what: object = case.id
        if case.level not in _OF_THEIR_OWN:
            what = dataclasses.replace(case.spec, **_CONTENTS)
        groups.setdefault(what, []).append(case)
        place = seen[case.level] = seen.get(case.level, -1) + 1
        begins[what] = min(place, begins.get(what, place))
    return [groups[what] for what in sorted(groups, key=lambda what: begins[what])]


_OF_THEIR_OWN = ("laws", "framework", "scale")  # levels whose cases draw or transform problems
_CONTENTS: Any = {f.name: f.default for f in dataclasses.fields(Spec) if f.name in CONTENTS}


class _Worker:
    """A process that judges cases by id; its answers come through a pipe of their own."""

    def __init__(self, setup: Setup) -> None:
        self.setup, self.closed = setup, False
        self._start()

    def _start(self) -> None:
        self.output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        read, write = os.pipe()
        # memory from malloc is filled with 0x7f, so that what compiled code does not write is noticed too
        environment = os.environ | {
            "MALLOC_PERTURB_": "128",
            "PYTHONUNBUFFERED": "1",
            "HYPOTHESIS_STORAGE_DIRECTORY": os.path.join(tempfile.gettempdir(), "laser-conformance-hypothesis"),
        }
        arguments = json.dumps({"pipe": write, **vars(self.setup)})
        self.process = subprocess.Popen(
            [sys.executable, "-m", "laser_conformance.run", arguments],
            stdin=subprocess.PIPE,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            pass_fds=(write,),
            env=environment,
            start_new_session=True,  # an interrupt from the keyboard is for the runner
        )
        os.close(write)
        self.answers = os.fdopen(read, "rb", buffering=0)
        self.rest = b""
        self.started = False

    def ask(self, case: str, limit: float) -> list[dict[str, Any]] | str:
        """The verdicts on a case; or a sentence where there are none."""
        if not self.started:
            ready = self._line(_START_LIMIT)
            if ready is None:
                return f"the worker did not start: {self._death()}"
            self.started = True
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(case.encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return f"crashed: {self._death()}"
        line = self._line(limit)
        if line is None:
            if self.process.poll() is None and not self._ended():
                return f"gave no answer within {limit:g} s"
            return f"crashed: {self._death()}"
        answer: list[dict[str, Any]] = json.loads(line)
        return answer

    def _line(self, limit: float) -> bytes | None:
        end = time.monotonic() + limit
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            while b"\n" not in self.rest:
                left = end - time.monotonic()
                if left <= 0 or not selector.select(left):
                    return None
                chunk = os.read(self.answers.fileno(), 65536)
                if not chunk:
                    return None
                self.rest += chunk
        line, _, self.rest = self.rest.partition(b"\n")
        return line

    def _ended(self) -> bool:
        try:
            self.process.wait(0.2)
        except subprocess.TimeoutExpired:
            return False
        return True

    def _death(self) -> str:
        try:
            code = self.process.wait(5)
        except subprocess.TimeoutExpired:
            return "closed its pipe"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self.output.seek(0)
        said = self.output.read()[-2000:].decode(errors="replace").strip().splitlines()
        return f"{how}; its last words: {' | '.join(said[-3:])}" if said else how

    def restart(self) -> None:
        """Take a new process in place of one that is lost."""
        if not self.closed:
            self._end()
            self._start()

    def close(self) -> None:
        """End the process for good."""
        self.closed = True
        self._end()

    def _end(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.answers, self.output):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


def _spare_the_machine(subject: Subject) -> None:
    """Where memory runs out, it is this process that goes; on NumPy with a MemoryError, which is a failed case."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")
    free = free_memory()
    if subject.library.name in ("numpy", "array_api_strict") and free is not None:
        import resource  # of POSIX alone, where free_memory knows something

        _, most = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (max(free * 3 // 4, 12 * 2**30), most))


def _serve(arguments: str) -> None:
    """The worker: a case id a line from standard input, verdicts as JSON a line to the pipe."""
    options = json.loads(arguments)
    pipe = options.pop("pipe")
    setup = Setup(**(options | {"dtypes": tuple(options["dtypes"])}))
    cases = {case.id: case for case in all_cases()}
    subject = setup.subject()
    _spare_the_machine(subject)
    with os.fdopen(pipe, "w", buffering=1) as answers:
        answers.write("ready\n")
        for line in sys.stdin:
            verdicts = judge(subject, cases[line.strip()], setup.dtypes, setup.quick)
            answers.write(json.dumps([to_json(v) for v in verdicts]) + "\n")


if __name__ == "__main__":
    _serve(sys.argv[1])
