"""The Triton backend without a GPU: interpreted on small problems, and compiled for cards that are not here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from laser_core import backends
from laser_core._problem import Problem

pytest.importorskip("torch")
pytest.importorskip("triton")

JUDGED = (  # cases of the conformance suite: quick ones, since every tile is interpreted
    *("forward", "gradients", "masks", "options"),
    *("precision/range-1+grad", "hostile/future-outliers+grad", "hostile/largest-values", "layout"),
    "hostile/very-negative-values+grad",
)
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}  # bytes a block may have
STACK = 1300  # bytes a thread; all of it is spilled registers
PRODUCTS = {"forward", "exact", "backward_keys", "backward_queries", "exact_gradients"}


def interpret(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where Triton interprets its kernels: it decides so when they are defined."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment)


def test_conformance_interpreted():
    chosen = [x for case in JUDGED for x in ("--only", case)]
    done = interpret(
        *("-m", "laser_conformance", "run", "--quick", "--backend", "torch-triton"),
        *("--arrays", "torch", "--device", "cpu", *chosen),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_isolation_interpreted():
    """In float16, whose X is rounded; of bfloat16 the interpreter would see float32."""
    done = interpret(
        *("-m", "laser_conformance", "run", "--backend", "torch-triton", "--arrays", "torch", "--device", "cpu"),
        *("--dtype", "float16", "--jobs", "2", "--only", "isolation/causal-top-left", "--only", "isolation/bias"),
        *("--only", "isolation/rows-causal"),
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_bfloat16_does_not_reach_the_interpreter():
    """Its products of bfloat16 are silently wrong, so the host widens: the output is float32's, rounded."""
    program = """
import torch
from laser_core import laser_attention
q, k, v = torch.randn((3, 1, 1, 40, 16), generator=torch.Generator().manual_seed(0)).bfloat16()
got = laser_attention(q, k, v, backend="torch-triton")
want = laser_attention(q.float(), k.float(), v.float(), backend="torch-triton").bfloat16()
assert got.dtype == torch.bfloat16 and torch.equal(got, want)
"""
    done = interpret("-c", program)
    assert done.returncode == 0, done.stderr


def test_channels_that_hardly_vary_stay_within_their_values():
    done = interpret(str(Path(__file__).with_name("triton_narrow.py")))
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_output_comes_back_whole(dtype: str) -> None:
    """From what is kept of it: 16 bits beside the rounded one."""
    import torch
    from laser_torch.fused import joined, split

    torch.manual_seed(0)
    o = torch.randn(10000) * 10.0 ** torch.randint(-3, 4, (10000,))
    o = torch.cat([o, torch.tensor([0.0, -0.0, 1.0, 1 + 2**-9, 1 + 3 * 2**-9, 65504.0, 1e-7, -1e-7])])
    out, rest = split(o, getattr(torch, dtype))
    assert torch.equal(out, o.to(out.dtype))
    assert rest.dtype == torch.int16
    lost = (joined(out, rest) - o).abs()
    assert bool((lost <= 2.0**-23 * o.abs() + (2.0**-25 if dtype == "float16" else 0)).all())


def test_the_record_serves_gpus_and_says_what_it_leaves_to_others():
    record = backends()["torch-triton"]
    sizes = {"batch": (2,), "query_heads": 4, "key_value_heads": 2, "query_length": 9, "key_length": 9}
    fine = {"framework": "torch", "device": "cuda", "dtype": "bfloat16", "head_dim": 40, "value_dim": 96, "scale": 0.1}
    assert record.refuses(Problem(**sizes, **fine)) is None
    for change, reason in (
        ({"beta": None, "beta_shape": (4, 1)}, "beta is an array"),
        ({"beta": 0.5}, "beta = 0.5"),
        ({"head_dim": 257}, "head dim D = 257"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"device": "cpu"}, "device cpu"),
    ):
        assert reason in (record.refuses(Problem(**sizes, **fine | change)) or "")


@pytest.mark.parametrize("words", [*SHARED, "sm_90 packed"])
def test_compiles_for(words):
    target = words.split()[0]
    script = Path(__file__).with_name("triton_compile.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, script, *words.split()], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    kernels = {found["kernel"]: found for found in map(json.loads, done.stdout.splitlines())}
    print(*kernels.values(), sep="\n")
    for name, found in kernels.items():
        assert found["shared"] <= SHARED[target], found
        assert found["stack"] <= STACK, found
        assert (found["products"] > 0) == (name in PRODUCTS), found
