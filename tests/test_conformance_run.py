"""The runner, its command line, pytest and the report: what they say, and what they survive."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from laser_conformance.cases import LEVELS, all_cases, choose
from laser_conformance.cli import main
from laser_conformance.judge import Verdict, from_json, judge, to_json
from laser_conformance.report import outcome
from laser_conformance.run import Setup

MISBEHAVING = """
import os, sys, time
import numpy as np
from laser_conformance.sabotage import Honest


class Crash(Honest):
    '''Ends the process on grouped heads.'''

    def repeat(self, problem, x):
        if problem.group > 1:
            os.abort()
        return x


class Hang(Honest):
    '''Sleeps on grouped heads.'''

    def repeat(self, problem, x):
        if problem.group > 1:
            open(os.environ.get("ASLEEP", os.devnull), "w").close()
            time.sleep(60)
        return x


class Nonsense(Honest):
    '''Prints to standard output, and returns a word.'''

    def forward(self, problem, inputs):
        os.write(1, b'[{"status": "passed"}]\\n')
        return super().forward(problem, inputs)._replace(out="excellent")


class Exit(Honest):
    '''Leaves with sys.exit.'''

    def forward(self, problem, inputs):
        sys.exit("enough")


CRASH, HANG, NONSENSE, EXIT = (cls.backend() for cls in (Crash, Hang, Nonsense, Exit))
"""


def verdicts(path: Path) -> list[Verdict]:
    return [from_json(record) for record in json.loads(path.read_text())["verdicts"]]


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "misbehaving.py").write_text(textwrap.dedent(MISBEHAVING))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("misbehaving", None)


ONLY = ["--only", "masks/groups", "--only", "masks/mask-none", "--dtype", "float32"]


@pytest.mark.parametrize(
    ("name", "told", "survivors"),
    [
        ("crash", "crashed: signal SIGABRT", {"masks/mask-none", "masks/mask-none+grad"}),
        ("hang", "gave no answer within 3 s", {"masks/mask-none", "masks/mask-none+grad"}),
        ("nonsense", "out is a str, not an array", set()),
        ("exit", "raised SystemExit: enough", set()),
    ],
)
def test_misbehaviour_is_a_failed_case(name, told, survivors, module, tmp_path, capsys):
    """The run goes on after each."""
    out = tmp_path / "out.json"
    load = ["--load", f"misbehaving:{name.upper()}", "--limit", "3"]
    assert main(["run", "--backend", name, *load, *ONLY, "--json", str(out)]) == 1
    found = verdicts(out)
    wanted = [case.id for case in choose(only=("masks/groups", "masks/mask-none"))]
    assert [v.case for v in found] == wanted
    assert {v.case for v in found if v.status == "passed"} == survivors
    assert all(told in v.message for v in found if v.status == "failed" and "+grad" not in v.case)
    assert f"--only {found[0].case}" in capsys.readouterr().out


def test_jobs_change_no_verdict(module, tmp_path):
    """Not their order either, and the case that crashes is one failed case."""
    found = {}
    for jobs in ("1", "3"):
        out = tmp_path / f"{jobs}.json"
        command = ["run", "--backend", "crash", "--load", "misbehaving:CRASH", *ONLY]
        assert main([*command, "--jobs", jobs, "--json", str(out)]) == 1
        found[jobs] = [(v.case, v.dtype, v.status, v.ratio, v.message) for v in verdicts(out)]
    assert found["1"] == found["3"]


def test_an_interrupt_loses_nothing(module, tmp_path):
    """What was judged is written; the rest is skipped, with the reason, and that is no success."""
    out, asleep = tmp_path / "out.json", tmp_path / "asleep"
    command = [sys.executable, "-m", "laser_conformance", "run", "--backend", "hang", "--load", "misbehaving:HANG"]
    only = ["--only", "masks/causal-top-left", "--only", "masks/groups", "--dtype", "float32"]
    before = [case.id for case in choose(only=("masks/causal-top-left",))]  # none of them sleeps
    command += [*only, "--json", str(out)]
    before_it = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job inherits it ignored
    with subprocess.Popen(command, env=os.environ | {"ASLEEP": str(asleep)}) as process:
        signal.signal(signal.SIGINT, before_it)
        while not asleep.exists():
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 2
    found = {v.case: v for v in verdicts(out)}
    assert [case for case, v in found.items() if v.status == "passed"] == before
    rest = [v for v in found.values() if v.status != "passed"]
    assert {v.case for v in rest} == {case.id for case in choose(only=("masks/groups",))}
    assert all((v.status, v.message) == ("skipped", "not run: interrupted") for v in rest)


def test_reference_passes_and_reports(tmp_path, capsys):
    out, page = tmp_path / "out.json", tmp_path / "out.html"
    command = [
        "run",
        "--backend",
        "reference",
        "--quick",
        "--level",
        "forward",
        "--json",
        str(out),
        "--html",
        str(page),
    ]
    assert main(command) == 0
    record = json.loads(out.read_text())
    assert record["versions"]["numpy"]
    assert {v["status"] for v in record["verdicts"]} == {"passed"}
    assert "<svg" not in page.read_text()  # no sweep was run
    assert main(command) == 2
    assert "--force" in capsys.readouterr().err
    again = tmp_path / "again.html"
    assert main(["report", str(out), "--html", str(again)]) == 0
    assert again.read_text() == page.read_text()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--backend", "nobody"], "backend: got 'nobody'; allowed: "),
        (["--backend", "reference", "--level", "speed"], "level: got 'speed'; allowed: forward, "),
        (["--backend", "reference", "--only", "forward/unheard-of"], "only: got 'forward/unheard-of'; allowed: "),
        (["--backend", "reference", "--arrays", "lists"], "arrays: got 'lists'; allowed: numpy, "),
        (["--backend", "reference", "--device", "abacus"], "device: got 'abacus'; allowed for numpy: cpu"),
        (["--backend", "x", "--load", "nothing:X"], "load: got 'nothing:X'"),
        (["--backend", "x", "--load", "json:loads"], "load: 'json:loads' is a function"),
        (["--backend", "reference", "--limit", "0"], "limit: got 0; allowed: a positive number"),
        (["--backend", "reference", "--json", "/no/such/folder/x.json"], "there is no folder /no/such/folder"),
    ],
)
def test_what_cannot_be_run_says_why(arguments, told, capsys):
    assert main(["run", *arguments]) == 2
    assert told in capsys.readouterr().err


def test_list_has_a_sentence_for_each(capsys):
    assert main(["list"]) == 0
    listed = capsys.readouterr().out
    cases = all_cases()
    assert len({case.id for case in cases}) == len(cases)
    assert {case.level for case in cases} == set(LEVELS)
    for case in cases:
        assert case.sentence.endswith(".")
        assert f"  {case.id} " in listed


def test_what_a_library_lacks_is_not_a_refusal():
    """Refused is the backend's own word: array-api-strict has no bfloat16, and no strides."""
    pytest.importorskip("array_api_strict")
    cases = {case.id: case for case in all_cases()}
    subject = Setup("streaming", "array_api_strict").subject()
    for name in ("laws/shift", "forward/plain", "layout/columns"):
        (verdict,) = judge(subject, cases[name], ("bfloat16",))
        assert verdict.status == "skipped", name
        assert "array_api_strict" in verdict.message
    (strides,) = judge(subject, cases["layout/columns"], ("float32",))
    assert (strides.status, strides.message) == ("skipped", "arrays of array_api_strict have no strides of their own")


def test_verdicts_survive_json():
    verdict = Verdict("a/b", "forward", "x", "numpy", "float32", "failed", float("inf"), "because", 1.0)
    assert from_json(json.loads(json.dumps(to_json(verdict)))) == verdict
    assert outcome([verdict]) == "FAIL"


def test_pytest_runs_the_suite(tmp_path):
    command = [sys.executable, "-m", "pytest", "--pyargs", "laser_conformance", "-q", "-p", "no:cacheprovider", "-o"]
    command += ["addopts=", "--laser-backend"]
    good = [*command, "streaming", "-k", "forward/plain or masks/groups"]
    done = subprocess.run(good, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "5 passed" in done.stdout
    absent = subprocess.run([*command, "nobody"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert absent.returncode == 1
    assert "backend: got 'nobody'" in absent.stdout
