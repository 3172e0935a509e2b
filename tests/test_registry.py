"""Backends are found through entry points: ours, a stranger's, absent and broken ones."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from laser_core import Backend, Unsupported, _registry

PROBE = """
import numpy as np
import laser_core
q = np.ones((1, 2, 4))
print(laser_core.laser_attention(q, q, q, backend="stranger").sum())
print(laser_core.explain(q, q, q).chosen)
"""

STRANGER = """
import laser_core

def forward(problem, inputs):
    return laser_core.Forward(inputs.query * 0 + 7, inputs.query[..., 0])

BACKEND = laser_core.Backend(
    name="stranger", summary="sevens", forward=forward, backward=forward, priority=lambda problem: 1000,
    why_not=lambda problem: "only heads of 4" if problem.head_dim != 4 else None,
)
"""


def install(folder: Path, name: str, module: str, source: str) -> None:
    """A throwaway distribution: a module, and the metadata that an installer would write for it."""
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[laser_core.backends]\n{name} = {module}:BACKEND\n")


def probe(folder: Path, code: str = PROBE) -> subprocess.CompletedProcess[str]:
    path = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)


def test_a_third_party_registers_as_ours_do(tmp_path):
    install(tmp_path, "stranger", "laser_stranger", STRANGER)
    ran = probe(tmp_path)
    assert ran.stdout.split() == ["56.0", "stranger"], ran.stderr


def test_its_refusal_is_honoured(tmp_path):
    install(tmp_path, "stranger", "laser_stranger", STRANGER)
    ran = probe(tmp_path, PROBE.replace("(1, 2, 4)", "(1, 2, 5)"))
    assert "Unsupported: backend 'stranger' cannot run this: only heads of 4" in ran.stderr


def test_a_name_taken_twice_is_an_error(tmp_path):
    install(tmp_path, "streaming", "laser_stranger", STRANGER.replace('"stranger"', '"streaming"'))
    ran = probe(tmp_path)
    assert "two backends are registered under the name 'streaming'" in ran.stderr


def test_a_missing_framework_is_a_reason(tmp_path):
    install(tmp_path, "stranger", "laser_stranger", "import a_framework_that_is_not_here\n" + STRANGER)
    ran = probe(tmp_path, "import laser_core; print(laser_core.backends()['stranger'].missing())")
    assert ran.stdout.strip() == "needs a_framework_that_is_not_here, which is not installed", ran.stderr
    ran = probe(tmp_path)
    assert "backend 'stranger' cannot run this: needs a_framework_that_is_not_here" in ran.stderr


@pytest.mark.parametrize("broken", ["1/0\n", "import json.nothing\n", "from numpy import no_such_name\n"])
def test_any_other_exception_propagates(tmp_path, broken):
    install(tmp_path, "stranger", "laser_stranger", broken + STRANGER)
    ran = probe(tmp_path)
    assert ran.returncode != 0
    assert broken.split()[-1].rpartition(".")[2].rpartition("/")[2] in ran.stderr or "ZeroDivisionError" in ran.stderr


def test_something_that_is_no_backend_is_an_error(tmp_path):
    install(tmp_path, "stranger", "laser_stranger", "BACKEND = 3\n")
    assert "got int; allowed: Backend" in probe(tmp_path).stderr


def record(name: str, **fields: object) -> Backend:
    return Backend(name=name, summary="", forward=None, backward=None, **fields)  # type: ignore[arg-type]


def test_a_deferred_function_imports_when_it_is_called(tmp_path):
    install(tmp_path, "stranger", "laser_stranger", STRANGER)
    (tmp_path / "laser_heavy.py").write_text("def double(x):\n    return 2 * x\n")
    code = "import laser_core; f = laser_core.deferred('laser_heavy:double'); print('laser_heavy' in sys.modules, f(4))"
    ran = probe(tmp_path, code)
    assert ran.stdout.split() == ["False", "8"], ran.stderr


def test_selection(monkeypatch):
    from problems import make

    from laser_core._problem import describe

    call, _, _ = make("square", "plain")
    problem, _ = describe(**call)
    known = {
        "slow": record("slow", priority=lambda problem: 1),
        "fast": record("fast", priority=lambda problem: 2),
        "other": record("other", frameworks=("mlx",), priority=lambda problem: 3),
        "half": record("half", dtypes=("float16",)),
        "gpu": record("gpu", devices=("cuda",)),
    }
    monkeypatch.setattr(_registry, "backends", lambda: known)
    assert _registry.select(problem).name == "fast"
    assert _registry.select(problem, "slow").name == "slow"
    assert _registry.select(problem, ["other", "slow", "fast"]).name == "slow"
    with pytest.raises(Unsupported) as caught:
        _registry.select(problem, ["other", "half", "gpu"])
    for reason in ("arrays of numpy (supported: mlx)", "dtype float64 (supported: float16)", "device cpu"):
        assert reason in str(caught.value)
