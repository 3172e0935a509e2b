"""Packed sequences: as a padded batch here, by the Triton kernels interpreted, and as torch sees the operators."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import varlen_checks as checks  # noqa: E402
from laser_torch import laser_attention_varlen  # noqa: E402

from laser_core import Unsupported  # noqa: E402

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed: it has no wheels for this platform"
)


@pytest.mark.parametrize("name", checks.CALLS)
def test_padded(name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        checks.judge(name, dtype, None, **checks.CALLS[name])


@pytest.mark.parametrize("backend", [None, "reference"])
def test_beta_array(backend: str | None) -> None:
    beta = torch.linspace(-2, 2, 24, dtype=torch.float64, requires_grad=True)
    checks.judge("beta array", torch.float64, backend, beta=beta, is_causal="bottom_right")


def test_nothing_leaks() -> None:
    checks.leaks(None)


@needs_triton
@pytest.mark.parametrize("words", [("bfloat16", "everything"), ("float32", "bottom right"), ("leaks",)])
def test_interpreted(words: tuple[str, ...]) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(checks.__file__)), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def call(**change: Any) -> dict[str, Any]:
    arrays = checks.make(torch.float32)
    return arrays | {"max_seqlen_q": 40, "max_seqlen_k": 40} | change


def test_operators() -> None:
    given = call()
    arrays = [given[n].nan_to_num(0, 0, 0).requires_grad_() for n in ("query", "key", "value")]
    args = (
        *arrays,
        given["cu_seqlens_q"],
        given["cu_seqlens_k"],
        None,
        40,
        40,
        0.25,
        1.0,
        "bottom_right",
        7,
        None,
        None,
    )
    torch.library.opcheck(torch.ops.laser_attention.varlen_forward.default, (*args, True, "streaming"))


def test_compiled() -> None:
    """In one graph, with other lengths and totals in the same one."""
    attend = torch.compile(laser_attention_varlen, fullgraph=True, backend="aot_eager", dynamic=True)
    for spare in (0, 1):
        given = call()
        for n in ("query", "key", "value"):
            x = given[n].nan_to_num(0, 0, 0)
            given[n] = x[: x.shape[0] - spare].requires_grad_()
        found = []
        for attention in (laser_attention_varlen, attend):
            out, lse = attention(**given, is_causal=True, return_lse=True)
            grads = torch.autograd.grad(out.sum() + lse[lse.isfinite()].sum(), [given["query"], given["value"]])
            found.append((out, lse, *grads))
        for x, y in zip(*found, strict=True):
            assert torch.equal(x, y)


def test_no_sequence_and_no_key() -> None:
    given = call(cu_seqlens_q=torch.zeros(1, dtype=torch.int32), cu_seqlens_k=torch.zeros(1, dtype=torch.int32))
    out, lse = laser_attention_varlen(**given, return_lse=True)
    assert bool((out == 0).all() and lse.isneginf().all())
    given = call(key=torch.zeros(0, 2, 16, requires_grad=True), value=torch.zeros(0, 2, 24))
    out = laser_attention_varlen(**given)
    assert bool((out == 0).all())
    (dk,) = torch.autograd.grad(out.sum(), given["key"])
    assert dk.shape == (0, 2, 16)


def test_longer_than_said() -> None:
    """Sequences are cut off at the length that the caller has named."""
    given = call(max_seqlen_q=8, max_seqlen_k=8)
    out = laser_attention_varlen(**given)
    starts = given["cu_seqlens_q"].tolist()
    assert bool((out[starts[4] + 8 : starts[5]] == 0).all())
    assert bool((out[starts[4] : starts[4] + 8] == 0).all())  # this sequence has no key
    assert bool((out[starts[1] : starts[1] + 8] != 0).any())


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"query": torch.zeros(4, 4)}, ValueError, r"query: got shape \(4, 4\); allowed: rank 3"),
        ({"query": torch.zeros(71, 3, 16)}, ValueError, "query: got 3 heads"),
        ({"key": torch.zeros(91, 2, 16).half()}, TypeError, "key: got dtype float16"),
        ({"value": torch.zeros(90, 2, 24)}, ValueError, "value: got shape"),
        ({"cu_seqlens_q": torch.zeros(7)}, TypeError, "cu_seqlens_q: got dtype float32; allowed: int32, int64"),
        ({"cu_seqlens_k": torch.zeros(3, dtype=torch.int32)}, ValueError, "cu_seqlens_k: got shape"),
        ({"cu_seqlens_k": None}, TypeError, "cu_seqlens_k: got NoneType None"),
        ({"max_seqlen_q": -1}, ValueError, "max_seqlen_q: got -1"),
        ({"max_seqlen_k": torch.tensor(3)}, TypeError, "max_seqlen_k: got tensor"),
        ({"beta": torch.ones(5)}, ValueError, "beta: got shape"),
        ({"beta": "1"}, TypeError, "beta: got str"),
        ({"is_causal": "left"}, ValueError, "is_causal: got 'left'"),
        ({"return_lse": 1}, TypeError, "return_lse: got 1"),
        ({"backend": "torch-triton"}, Unsupported, "torch-triton"),
        ({"backend": "no-such"}, ValueError, "backend: got 'no-such'"),
    ],
)
def test_refusals(change: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        laser_attention_varlen(**call(**change))


def test_autocast() -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert laser_attention_varlen(**call()).dtype == torch.bfloat16
