"""The command line: answers, exit codes, and errors of one sentence."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.metadata import version
from typing import Any

import pytest

import laser_core
from laser_core.cli import _common, _doctor, main


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Any:
    """Run the command line in this process: exit code, standard output, standard error."""

    def run(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_version(call: Any) -> None:
    assert call("--version") == (0, f"laser-attention {version('laser-attention')}\n", "")


@pytest.mark.parametrize("command", [[], ["demo"], ["doctor"], ["explain"]])
def test_help_goes_to_standard_output(call: Any, command: list[str]) -> None:
    code, out, err = call(*command, "--help")
    assert code == 0
    assert out.startswith(f"usage: {' '.join(['laser-attention', *command])}")
    assert err == ""


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "COMMAND"),
        (["train"], "'train'"),
        (["doctor", "--shape", "1"], "--shape"),
        (["explain"], "--shape"),
        (["explain", "--shape", "2,8,x,64"], "'2,8,x,64'"),
        (["explain", "--shape", "8,64"], "three sizes or more"),
        (["explain", "--shape", "2,8,16,64", "--key-shape", "2,3,16,64"], "a multiple of the 3 key/value heads"),
        (["explain", "--shape", "2,8,16,64", "--value-shape", "2,8,17,64"], "--value-shape: got shape (2, 8, 17, 64)"),
        (["explain", "--shape", "2,8,16,64", "--dtype", "int8"], "'int8'"),
        (["explain", "--shape", "2,8,16,64", "--framework", "tensorflow"], "'tensorflow'"),
        (["explain", "--shape", "2,8,16,64", "--device", "cuda"], "--device: got cuda; allowed: cpu"),
        (["explain", "--shape", "2,8,16,64", "--window", "3"], "L,R"),
        (["explain", "--shape", "2,8,16,64", "--window", "3,-1"], "L,R"),
        (["explain", "--shape", "2,8,16,64", "--beta", "inf"], "'inf'"),
        (["explain", "--shape", "2,8,16,64", "--scale", "nan"], "--scale: got nan"),
        (["explain", "--shape", "2,8,16,64", "--soft-cap", "0"], "--soft-cap: got 0.0"),
        (["explain", "--shape", "2,8,16,64", "--mask", "5,16"], "--mask: got shape (5, 16)"),
        (["explain", "--shape", "2,8,16,64", "--backend", "nonesuch"], "'streaming'"),
        (["explain", "--shape", f"{10**12},{10**12},16,64"], "one that an array can have"),
    ],
)
def test_wrong_usage_is_one_sentence_and_code_2(call: Any, arguments: list[str], says: str) -> None:
    code, out, err = call(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("laser-attention")
    assert says in err


def test_explain_names_the_backend_that_runs(call: Any) -> None:
    code, out, _ = call("explain", "--shape", "2,8,128,64")
    assert code == 0
    assert "backend: streaming\n" in out
    assert re.search(r"^streaming +chosen$", out, re.MULTILINE)
    assert re.search(r"^reference +can run this; streaming comes first$", out, re.MULTILINE)


def test_explain_says_what_a_backend_would_take(call: Any) -> None:
    code, out, _ = call("explain", "--shape", "2,8,4096,64")
    assert code == 0
    assert re.search(r"^reference +.*it materialises terms of shape \(2, 8, 4096, 4096, 64\)", out, re.MULTILINE)


def test_explain_takes_every_option(call: Any) -> None:
    arguments = "--shape 2,8,16,64 --key-shape 2,4,32,64 --value-shape 2,4,32,48 --dtype bfloat16 --framework torch"
    arguments += " --device cuda --mask --bias 8,16,32 --lengths both --causal bottom_right --window 128,none"
    arguments += " --scale 0.5 --beta array --soft-cap 30 --return-lse --no-gradient"
    arguments += " --backend streaming reference --json"
    code, out, err = call("explain", *arguments.split())
    assert (code, err) == (0, "")
    answer = json.loads(out)
    assert answer["problem"] == {
        "framework": "torch",
        "device": "cuda",
        "dtype": "bfloat16",
        "batch": [2],
        "query_heads": 8,
        "key_value_heads": 4,
        "query_length": 16,
        "key_length": 32,
        "head_dim": 64,
        "value_dim": 48,
        "scale": 0.5,
        "beta": None,
        "causal": "bottom_right",
        "window": [128, None],
        "mask_shape": [16, 32],
        "bias_shape": [8, 16, 32],
        "beta_shape": [8, 48],
        "query_lengths": True,
        "key_value_lengths": True,
        "logits_soft_cap": 30.0,
        "return_lse": True,
        "gradient": False,
    }
    assert {answer["chosen"], *answer["passed_over"], *answer["refused"]} == {"streaming", "reference"}


def test_explain_of_a_problem_that_no_backend_can_run_is_code_1(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    only = laser_core.Backend(
        name="only", summary="", forward=_never, backward=_never, why_not=lambda problem: "it is a Monday"
    )
    monkeypatch.setattr("laser_core._registry.backends", lambda: {"only": only})
    code, out, _ = call("explain", "--shape", "2,8,16,64")
    assert code == 1
    assert "backend: none can run this" in out
    assert "cannot: it is a Monday" in out


def test_doctor_reports_versions_and_backends(call: Any) -> None:
    code, out, err = call("doctor")
    assert (code, err) == (0, "")
    assert version("numpy") in out
    for name in laser_core.backends():
        assert f"\n{name} " in out


def test_doctor_json(call: Any) -> None:
    code, out, _ = call("doctor", "--json")
    answer = json.loads(out)
    assert (code, answer["error"]) == (0, None)
    assert [backend["name"] for backend in answer["backends"]] == list(laser_core.backends())
    numpy = next(package for package in answer["packages"] if package["name"] == "numpy")
    assert numpy == {"name": "numpy", "version": version("numpy"), "devices": ["cpu"], "error": None}


def test_doctor_reports_what_is_broken_with_code_1(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(module: object) -> list[str]:
        raise OSError("libnumpy.so: cannot\nopen")

    def clash() -> None:
        raise RuntimeError("two backends are registered under the name 'x'")

    monkeypatch.setattr(_doctor, "DEVICES", {"numpy": broken})
    code, out, _ = call("doctor")
    assert code == 1
    assert "broken: OSError: libnumpy.so: cannot open" in out
    monkeypatch.setattr(_doctor, "DEVICES", {})
    monkeypatch.setattr(laser_core, "backends", clash)
    code, out, _ = call("doctor")
    assert code == 1
    assert "backends: broken: RuntimeError: two backends are registered under the name 'x'" in out


def test_doctor_says_what_a_backend_lacks(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = laser_core.Backend(
        name="absent", summary="", forward=_never, backward=_never, requires=("a_module_that_is_not_there",)
    )
    monkeypatch.setattr(laser_core, "backends", lambda: {"absent": absent})
    code, out, _ = call("doctor")
    assert code == 0
    assert "not available: needs a_module_that_is_not_there, which is not installed" in out


def test_explain_needs_numpy_alone() -> None:
    program = """
import sys
for name in ("matplotlib", "tqdm"):
    sys.modules[name] = None
from laser_core.cli import main
code = main(["explain", "--shape", "1,1,8,4", "--framework", "torch", "--backend", "streaming"])
print("imported:", *sorted(set(sys.modules) & {"torch", "jax", "cupy", "array_api_strict"}))
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.stderr == ""
    assert "backend: streaming" in ran.stdout
    assert ran.stdout.endswith("imported:\n")


def test_a_closed_pipe_is_no_traceback() -> None:
    program = "import sys; from laser_core.cli import main; sys.exit(main(['explain', '--shape', '1,1,8,4']))"
    command = f'{sys.executable} -c "{program}" | true'
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert ran.stderr == ""


def test_interruption_is_one_line(call: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(_doctor, "examine", interrupt)
    assert call("doctor") == (1, "", "laser-attention doctor: interrupted\n")


def test_a_terminal_without_greek_is_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    ran = subprocess.run(
        [sys.executable, "-c", "from laser_core.cli import main; main(['explain', '--shape', '1,1,8,4'])"],
        env={"PYTHONIOENCODING": "ascii", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stderr) == (0, "")


def test_table_aligns_columns() -> None:
    shown = _common.table([["a", "1", "x"], ["bbb", "10", ""]], header=["name", "n", ""], right=[1])
    assert shown == "name   n\n────  ──  ─\na      1  x\nbbb   10"


def _never(*_: object) -> Any:
    raise AssertionError("nothing is computed here")
