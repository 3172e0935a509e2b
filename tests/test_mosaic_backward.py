"""The backward kernel in Pallas for Hopper GPUs: run by JAX's interpreter, and compiled ahead of time."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
FORMS = [
    {"width": 128, "dtype": "bfloat16", "causal": True},
    {"width": 64, "dtype": "float16", "causal": False},
]
SPILLS = 64  # bytes: what a thread computes with stays in registers


def _modern() -> bool:
    try:
        version = importlib.metadata.version("jax").split(".")
    except importlib.metadata.PackageNotFoundError:
        return False
    return (int(version[0]), int(version[1])) >= (0, 11)


pytestmark = pytest.mark.skipif(not _modern(), reason="Mosaic GPU as used here needs JAX 0.11")


def _run(script: str, *arguments: str, **env: str) -> str:
    # a process of its own: threads of the interpreter that wait for each other would take the other tests along
    done = subprocess.run(
        [sys.executable, str(HERE / script), *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "RACE DETECTED" not in done.stdout, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize("name", ["full", "grouped", "blind"])
def test_interpreted(name: str) -> None:
    # warpgroups wait in callbacks of XLA, which has as many threads for them as NPROC says
    assert "without a race" in _run("interpret_mosaic_backward.py", name, NPROC="16")


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f['width']}-{f['dtype']}")
def test_fits_the_hardware(form: dict[str, Any], tmp_path: Path) -> None:
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.skip("jax-cuda13-plugin is not installed: nothing here compiles for a GPU")
    dump = {"MOSAIC_GPU_DUMP_TO": str(tmp_path), "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}
    found = json.loads(_run("aot_mosaic_backward.py", json.dumps(form), **dump).splitlines()[-1])
    print(found)
    assert not found["serialised"], found["report"]
    assert found["spill stores"] <= SPILLS
    assert found["spill loads"] <= SPILLS
    # five products of each tile pair, 16 deep, for two warpgroups in one code
    assert found["wgmma.mma_async"] >= 5 * 4
    assert min(found[name] for name in ("cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "setmaxnreg")) > 0
