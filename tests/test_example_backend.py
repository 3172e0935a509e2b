"""The example of the porting guide: in a distribution of its own, installed beside ours, found, judged and accepted."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "docs" / "examples" / "laser_example"
LEVELS = ("forward", "gradients", "masks", "precision", "hostile", "isolation", "determinism", "layout")


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for a process in which the example is installed: its wheel, unpacked to a folder on the path."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77 or later")
    root = tmp_path_factory.mktemp("example")
    shutil.copytree(SOURCE, root / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    build = f"from setuptools import build_meta; build_meta.build_wheel({os.fspath(root)!r})"
    subprocess.run([sys.executable, "-c", build], cwd=root / "source", check=True, capture_output=True)
    (wheel,) = root.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(root / "site")
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(root / "site"), os.environ.get("PYTHONPATH", "")])}


def test_the_example_conforms(environment: dict[str, str], tmp_path: Path) -> None:
    """Every level but those of other frameworks; what it has not, it refuses, for a reason."""
    out = tmp_path / "out.json"
    command = [sys.executable, "-m", "laser_conformance", "run", "--backend", "example", "--quick", "--json", str(out)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    verdicts = json.loads(out.read_text())["verdicts"]
    assert {v["level"] for v in verdicts if v["status"] == "passed"} >= set(LEVELS)
    refused = {v["message"].partition(":")[0] for v in verdicts if v["status"] == "refused"}
    assert refused <= {"beta", "bias", "logits_soft_cap"}
    assert all(v["level"] in ("options", "isolation", "laws") for v in verdicts if v["status"] == "refused")


def test_it_is_chosen_by_name_and_explains_itself(environment: dict[str, str], tmp_path: Path) -> None:
    program = """
import numpy, laser_core
q, k, v = numpy.random.default_rng(0).standard_normal((3, 2, 4, 70, 16))
ours = laser_core.laser_attention(q, k, v, is_causal=True, backend="streaming")
assert abs(laser_core.laser_attention(q, k, v, is_causal=True, backend="example") - ours).max() < 1e-12
print(laser_core.explain(q, k, v, beta=0.5))
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "(supported: a number with |beta| ≥ 1)" in done.stdout


def test_it_is_not_part_of_our_distribution() -> None:
    import laser_core

    assert "example" not in laser_core.backends()
