"""The decode backend: its kernels, interpreted and compiled for targets that are not there, and its refusals.

Triton reads TRITON_INTERPRET when a kernel is defined, so each of these runs in a process of its own.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from laser_torch import DECODE, laser_attention_paged  # noqa: E402
from problems import on_gpu  # noqa: E402

from laser_core import laser_attention  # noqa: E402

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it has no wheels for this platform"
)
PROBLEM = on_gpu("torch", query_length=1, key_length=4096, head_dim=128, value_dim=128)


def run(*command: str, interpret: bool = True) -> str:
    """The output of a program that sees the test folder, with Triton's interpreter or without."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE)}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@needs_triton
@pytest.mark.parametrize("part", ["outputs", "isolation", "lengths", "paged"])
def test_interpreted(part: str) -> None:
    assert "ok" in run(str(HERE / "decode_checks.py"), part)


@needs_triton
def test_conformance() -> None:
    """Cases of every kind, with more queries than decoding has."""
    cases = (
        "masks/all",
        "masks/causal-see-nothing",
        "options/lse-causal",
        "options/soft-cap-bias",
        "hostile/scores-of-1000",
    )
    only = [word for case in cases for word in ("--only", case)]
    load = ["--backend", "torch-decode-any", "--load", "decode_any:ANY", "--arrays", "torch"]
    said = run("-m", "laser_conformance", "run", *load, *only, "--dtype", "bfloat16")
    assert "refused" not in said.split("seconds")[1], said


@needs_triton
@pytest.mark.parametrize(
    ("target", "shared"), [("cuda 80", 166912), ("cuda 90", 232448), ("cuda 100", 232448), ("hip gfx942", 65536)]
)
def test_compiles(target: str, shared: int) -> None:
    """For the sizes that would be launched: inside the target's limits, on its matrix units, registers hardly spilt."""
    lines = run(str(HERE / "decode_compile.py"), *target.split(), interpret=False).splitlines()
    reports = [json.loads(line) for line in lines]
    assert [r["kernel"] for r in reports] == ["decode_kernel", "merge_kernel"] * 3  # one array, pages of 64 and of 16
    for report in reports:
        assert report["shared"] <= shared
        assert report.get("STACK", 0) <= 64, report  # bytes of each thread
        assert report["products"] >= 8 or report["kernel"] == "merge_kernel"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"query_length": 17}, "17 queries: it is for decoding"),
        ({"beta": None, "beta_shape": (128,)}, "beta is an array"),
        ({"beta": 0.5}, "beta = 0.5"),
        ({"head_dim": 257}, "head dim D = 257"),
        ({"value_dim": 512}, "value dim E = 512"),
        ({"key_length": 2**30 + 1}, "positions are 32-bit"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"device": "cpu"}, "device cpu"),
        ({"framework": "numpy"}, "arrays of numpy"),
    ],
)
def test_refusals(change: dict[str, Any], reason: str) -> None:
    refused = DECODE.refuses(dataclasses.replace(PROBLEM, **change))
    assert refused is not None
    assert refused.startswith(reason) or reason in refused


@needs_triton
def test_takes_what_it_should() -> None:
    for change in ({}, {"beta": 0.0}, {"beta": -3.0}, {"bias_shape": (1, 4096)}, {"logits_soft_cap": 5.0}):
        assert DECODE.refuses(dataclasses.replace(PROBLEM, **change)) is None


def paged(**change: Any) -> Any:
    arguments = {
        "query": torch.zeros(2, 4, 1, 8),
        "key_cache": torch.zeros(6, 16, 2, 8),
        "value_cache": torch.zeros(6, 16, 2, 5),
        "block_table": torch.zeros(2, 3, dtype=torch.int32),
        "key_value_seq_lengths": torch.tensor([40, 3]),
    }
    return laser_attention_paged(**arguments | change)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.zeros(2, 4, 8)}, ValueError, r"query: got shape \(2, 4, 8\); allowed: rank 4"),
        ({"query": torch.zeros(2, 3, 1, 8)}, ValueError, "query: got 3 heads"),
        ({"key_cache": torch.zeros(6, 16, 2, 9)}, ValueError, "key_cache: got shape"),
        ({"value_cache": torch.zeros(6, 15, 2, 5)}, ValueError, "value_cache: got shape"),
        ({"value_cache": torch.zeros(6, 16, 2, 5).half()}, TypeError, "value_cache: got dtype float16"),
        ({"block_table": torch.zeros(3, 3, dtype=torch.int32)}, ValueError, "block_table: got shape"),
        ({"block_table": torch.zeros(2, 3)}, TypeError, "block_table: got dtype float32; allowed: int32, int64"),
        ({"key_value_seq_lengths": torch.tensor([1])}, ValueError, "key_value_seq_lengths: got shape"),
        ({"key_value_seq_lengths": None}, TypeError, "key_value_seq_lengths: got NoneType None"),
        ({"beta": torch.ones(5)}, TypeError, "beta: got a tensor"),
        ({"is_causal": "left"}, ValueError, "is_causal: got 'left'"),
        ({"window_size": (-1, 0)}, ValueError, "window_size"),
    ],
)
def test_paged_refusals(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        paged(**change)


@pytest.mark.parametrize("causal", [False, "bottom_right", True])
def test_paged_gathers(causal: Any) -> None:
    """Without the kernel the pages are gathered, with gradients; nothing beyond a length is touched."""
    torch.manual_seed(0)
    q = torch.randn(2, 4, 3, 8, requires_grad=True)
    caches = [torch.randn(6, 16, 2, n) for n in (8, 5)]
    table, lengths = torch.tensor([[4, 0, 5], [2, 99, -7]], dtype=torch.int32), torch.tensor([40, 3])
    for cache in caches:
        cache[2, 3:] = cache[5, 8:] = cache[1] = torch.nan
        cache.requires_grad_()
    out, lse = laser_attention_paged(q, *caches, table, lengths, is_causal=causal, return_lse=True)
    found = torch.autograd.grad(out.sum() + lse.sum(), (q, *caches))
    for b, (blocks, n) in enumerate((([4, 0, 5], 40), ([2], 3))):
        k, v = (c[blocks].flatten(0, 1)[:n].transpose(0, 1) for c in caches)
        want = laser_attention(q[b], k, v, is_causal=causal, return_lse=True)
        assert torch.allclose(out[b], want[0], atol=1e-5)
        assert torch.allclose(lse[b], want[1], atol=1e-5)
        (dq,) = torch.autograd.grad(want[0].sum() + want[1].sum(), q)
        assert torch.allclose(found[0][b], dq[b], atol=1e-5)
    assert all(bool(g.isfinite().all()) for g in found)
    assert bool((found[2][1] == 0).all())


def test_paged_without_keys() -> None:
    out, lse = paged(key_value_seq_lengths=torch.tensor([0, 0]), return_lse=True)
    assert bool((out == 0).all())
    assert bool(lse.isneginf().all())
