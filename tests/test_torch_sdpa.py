"""The guarded engine on torch's own attention, on the CPU: against the reference in float64."""

from __future__ import annotations

import dataclasses
import math
import subprocess
import sys

import problems
import pytest

torch = pytest.importorskip("torch")

import laser_torch  # noqa: E402
import numpy as np  # noqa: E402
from torch_calls import agree, run, tensors  # noqa: E402

import laser_core  # noqa: E402
from laser_core import Unsupported, laser_attention  # noqa: E402

REFUSED = {"bottom right", "window", "left window, causal", "bias", "bias per head", "soft cap and bias", "beta 1e-3"}
REFUSED |= {"beta per channel", "beta per head and channel", "all together"}
SERVED = [o for o in problems.OPTIONS if o not in REFUSED]


@pytest.mark.parametrize("shape", problems.SHAPES)
@pytest.mark.parametrize("options", SERVED)
def test_engine_agrees_with_the_definition(shape: str, options: str) -> None:
    call, do, dl = problems.make(shape, options)
    want = run(call, do, dl, torch.float64, "reference")
    agree(run(call, do, dl, torch.float64, "torch-sdpa"), want, 1e-12, 1e-12)
    rounded = run(call, do, dl, torch.float64, "reference", via=torch.float32)
    agree(run(call, do, dl, torch.float32, "torch-sdpa"), rounded, 1e-5, 1e-5)


@pytest.mark.parametrize("options", problems.OPTIONS)
def test_automatic_choice_agrees_with_the_definition(options: str) -> None:
    call, do, dl = problems.make("grouped", options)
    agree(run(call, do, dl, torch.float64), run(call, do, dl, torch.float64, "reference"), 1e-11, 1e-11)


@pytest.mark.parametrize("backend", ["torch-sdpa", "streaming"])
@pytest.mark.parametrize(("dtype", "unit"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_half_precision(backend: str, dtype: torch.dtype, unit: float) -> None:
    call, do, dl = problems.make("two batch axes", "causal", sigma=3.0)
    want = run(call, do, dl, torch.float64, "reference", via=dtype)
    got = run(call, do, dl, dtype, backend)
    agree(got, want, unit, 2 * unit)
    assert ((got["lse"] - want["lse"]).abs() / (1 + want["lse"].abs())).max() <= 1e-4


@pytest.mark.parametrize("sigma", [1, 5, 10, 20, 60, 400])
@pytest.mark.parametrize("offset", [0.0, 40.0, -1000.0, 1000.0])
@pytest.mark.parametrize("options", ["causal", "mask", "lengths", "beta -2"])
def test_every_range_of_values(sigma: float, offset: float, options: str) -> None:
    call, do, dl = problems.make("square", options, sigma=sigma)
    call["value"] = call["value"] + offset
    if call.get("attn_mask") is not None:
        call["attn_mask"][0, 0, 3] = False  # a query that sees nothing
    want = run(call, do, dl, torch.float64, "reference", via=torch.float32)
    got = run(call, do, dl, torch.float32, "torch-sdpa")
    # A gradient is read from o, which float32 rounds: exp(βo) carries β·u·|o|.
    agree(got, want, 1e-5, 1e-5 + 4 * 2**-23 * abs(want["out"]).max().item() * abs(call.get("beta", 1.0)))
    seen = want["lse"] != -math.inf
    assert got["out"][seen].isfinite().all()


def test_the_published_recipe_fails_where_the_engine_does_not() -> None:
    """The inputs above are hard: without a guard they give −∞."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 64, 8) * s for s in (1, 1, 60))
    top = v.amax(-2, keepdim=True)
    recipe = torch.nn.functional.scaled_dot_product_attention(q, k, (v - top).exp(), is_causal=True).log() + top
    assert recipe.isneginf().any()
    assert laser_attention(q, k, v, is_causal=True).isfinite().all()


def test_each_head_has_its_own_guard() -> None:
    """Heads inside the fast range keep their bits whatever other heads hold, and gradients do too."""
    call, do, dl = problems.make("grouped", "causal")
    calm = run(call, do, dl, torch.float32, "torch-sdpa")
    wild = call | {"value": call["value"].copy()}
    wild["value"][1, 1] *= 500
    got = run(wild, do, dl, torch.float32, "torch-sdpa")
    agree(got, run(wild, do, dl, torch.float64, "reference", via=torch.float32), 1e-5, 1e-2)
    for name, heads in {"out": 2, "lse": 2, "d_query": 2, "d_key": 1, "d_value": 1}.items():
        assert torch.equal(got[name][0], calm[name][0]), name
        assert torch.equal(got[name][1, :heads], calm[name][1, :heads]), name
    assert not torch.equal(got["out"][1, 2:], calm["out"][1, 2:])


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf, 30.0])
@pytest.mark.parametrize("hide", ["mask", "causal", "lengths"])
@pytest.mark.parametrize("offset", [0.0, 45.0])
@pytest.mark.parametrize("beta", [1.0, 0.0])
def test_nothing_hidden_leaks(junk: float, hide: str, offset: float, beta: float) -> None:
    call, do, dl = problems.make("square", "plain")
    call |= {"beta": beta, "value": call["value"] + offset}
    call |= {
        "mask": {"attn_mask": np.arange(9) != 8},
        "causal": {"is_causal": True},
        "lengths": {"key_value_seq_lengths": np.array([8, 8])},
    }[hide]
    if hide == "causal":
        do[..., 8, :], dl[..., 8] = 0, 0  # the one query that sees the last key
    clean = run(call, do, dl, torch.float32, "torch-sdpa")
    dirty = {n: call[n].copy() for n in ("key", "value")}
    for x in dirty.values():
        x[..., 8, :] = junk
    got = run(call | dirty, do, dl, torch.float32, "torch-sdpa")
    rows = slice(0, 8) if hide == "causal" else slice(None)
    for name in ("out", "lse", "d_query"):
        assert torch.equal(
            got[name][..., rows, :] if name != "lse" else got[name][..., rows],
            clean[name][..., rows, :] if name != "lse" else clean[name][..., rows],
        ), name
    for name in ("d_key", "d_value"):
        assert torch.equal(got[name][..., :8, :], clean[name][..., :8, :]), name
        assert (got[name][..., 8, :] == 0).all(), name


def test_what_is_visible_and_not_finite_shows() -> None:
    call, do, dl = problems.make("square", "causal")
    call["value"][0, 0, 4, 2] = math.nan
    call["value"][0, 1, 5, 1] = math.inf
    call["value"][1, 0, 0, 3] = -math.inf
    call["query"][1, 1, 6] = math.nan
    outputs = run(call, do, dl, torch.float64, "reference")
    want = run(call, do, dl, torch.float64, "streaming")  # which rows and keys a NaN reaches is told apart there
    want |= {"out": outputs["out"], "lse": outputs["lse"]}
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        got = run(call, do, dl, dtype, "torch-sdpa")
        for name, w in want.items():
            g, fine = got[name], w.isfinite()
            assert torch.equal(g.masked_fill(fine, 0).nan_to_num(7), w.masked_fill(fine, 0).nan_to_num(7)), name
            assert ((g - w).abs() / (1 + w.abs()))[fine].max() <= tolerance, name
        assert not got["out"].isfinite().all()


@pytest.mark.parametrize(("lq", "lk"), [(0, 5), (4, 0), (0, 0)])
def test_empty(lq: int, lk: int) -> None:
    q, k, v = (torch.randn(2, 3, n, 4, requires_grad=True) for n in (lq, lk, lk))
    out, lse = laser_attention(q, k, v, return_lse=True)
    assert out.shape == (2, 3, lq, 4)
    assert (out == 0).all()
    assert (lse == -math.inf).all()
    for x in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (x == 0).all()


def test_deterministic() -> None:
    call, do, dl = problems.make("grouped", "causal", sigma=30.0)
    first, second = (run(call, do, dl, torch.float32) for _ in range(2))
    assert all(torch.equal(first[n], second[n]) for n in first)


def test_reasons_need_no_device() -> None:
    """``why_not`` sees a description alone, and importing the records does not import torch."""
    call, _, _ = problems.make("square", "causal")
    problem = laser_core.explain(**tensors(call, torch.float32)).problem
    assert laser_torch.SDPA.refuses(problem) is None
    assert laser_torch.SDPA.refuses(dataclasses.replace(problem, device="cuda")) == "device cuda (supported: cpu)"
    big = dataclasses.replace(problem, mask_shape=(2, 2, 2**14, 2**14), key_length=2**14, query_length=2**14)
    assert "additive mask" in str(laser_torch.SDPA.refuses(big))
    code = "import sys, laser_torch; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("options", sorted(REFUSED))
def test_what_the_engine_refuses_runs_elsewhere(options: str) -> None:
    call, _, _ = problems.make("square" if options != "bottom right" else "grouped", options)
    args = tensors(call, torch.float32)
    with pytest.raises(Unsupported, match="torch-sdpa"):
        laser_attention(**args, backend="torch-sdpa")
    assert laser_attention(**args, backend=["torch-sdpa", "streaming"]).isfinite().all()
