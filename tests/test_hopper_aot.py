"""The Hopper kernels, compiled ahead of time: what the compiler made of it, held to what the hardware has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FORMS = [
    {"dtype": "bf16", "width": 128, "causal": True, "keeps": True, "values": True},
    {"dtype": "bf16", "width": 64, "causal": False, "keeps": True, "values": False},
    {"dtype": "fp16", "width": 64, "causal": True, "keeps": False, "values": True},
    {"backward": True, "dtype": "bf16", "width": 128, "causal": True},
    {"backward": True, "dtype": "fp16", "width": 64, "causal": False},
    {"backward": True, "dtype": "bf16", "width": 64, "causal": True},
]
SHARED = 227 << 10  # bytes that a block may have on sm_90
SPILLS = 48  # instructions outside of loops that multiply: words kept across the whole kernel


def _compile(tmp_path: Path, form: dict[str, Any]) -> dict[str, Any]:
    # a process of its own: the compiler aborts on what it does not expect, and never frees what it has loaded
    script = Path(__file__).with_name("aot_hopper.py")
    env = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(form)], capture_output=True, text=True, env=env, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f"{f['dtype']}-{f['width']}-{f['causal']}")
def test_fits_the_hardware(form: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("triton.experimental.gluon", reason="Triton with Gluon is not installed")
    found = _compile(tmp_path, form)
    print(found)
    assert found["shared"] <= SHARED
    assert found["threads"] * found["registers"] <= 65536
    assert found["SPILLS_IN_LOOPS"] == 0
    assert found["STL"] + found["LDL"] <= SPILLS
    assert min(found[name] for name in ("HGMMA", "UTMALDG", "UTMASTG")) > 0
    # a wgmma that ptxas serialises brings an arrival of its own: many more of them than products started
    assert found["WARPGROUP"] <= found["HGMMA"]
