"""The drop-in form, autocast, FLOP counts and selective checkpointing: what torch's users expect of an attention."""

from __future__ import annotations

import functools
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from laser_torch import binding, scaled_dot_product_attention  # noqa: E402
from torch.utils.checkpoint import (  # noqa: E402
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from laser_core import laser_attention  # noqa: E402

sdpa = torch.nn.functional.scaled_dot_product_attention


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


SHAPES = {
    "rank 2": ((5, 4), (7, 4), (7, 3)),
    "rank 3": ((2, 5, 4), (2, 7, 4), (2, 7, 3)),
    "rank 4": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 3)),
    "rank 5": ((2, 1, 3, 5, 4), (2, 1, 3, 7, 4), (2, 1, 3, 7, 3)),
    "broadcast batch": ((2, 3, 5, 4), (1, 3, 7, 4), (3, 7, 3)),
    "broadcast heads": ((2, 3, 5, 4), (2, 1, 7, 4), (2, 1, 7, 3)),
}


@pytest.mark.parametrize("shapes", SHAPES.values(), ids=list(SHAPES))
@pytest.mark.parametrize("mask", ["none", "causal", "bool", "float"])
def test_is_torchs_own_at_beta_zero(shapes: tuple[tuple[int, ...], ...], mask: str) -> None:
    """At β = 0 LASER is softmax attention, so torch itself says what each argument means."""
    q, k, v = normal(*shapes)
    call: dict[str, Any] = {"scale": 0.7}
    if mask == "causal":
        call["is_causal"] = True
    elif mask != "none":
        call["attn_mask"] = torch.arange(35).view(5, 7) % 3 > 0 if mask == "bool" else normal((5, 7))[0]
    got, want = scaled_dot_product_attention(q, k, v, **call, beta=0.0), sdpa(q, k, v, **call)
    assert got.shape == want.shape
    assert torch.allclose(got, want, atol=1e-12)
    logs = scaled_dot_product_attention(q, k, v, **call), sdpa(q, k, v.exp(), **call).log()
    assert torch.allclose(*logs, atol=1e-12)


def test_grouped_heads() -> None:
    q, k, v = normal((2, 4, 5, 4), (1, 2, 7, 4), (1, 2, 7, 3))
    got = scaled_dot_product_attention(q, k, v, enable_gqa=True)
    assert torch.allclose(got, laser_attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1)))
    with pytest.raises(ValueError, match="enable_gqa=True for grouped heads"):
        scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        ({"dropout_p": 0.1}, ValueError, "dropout_p: got 0.1; allowed: 0: dropping every visible key"),
        ({"is_causal": True, "attn_mask": torch.ones(5, 7, dtype=torch.bool)}, ValueError, "is_causal: got True"),
        ({"is_causal": "bottom_right"}, TypeError, "is_causal: got 'bottom_right'"),
        ({"attn_mask": torch.ones(5, 7, dtype=torch.int64)}, TypeError, "bias: got dtype int64"),
        ({"attn_mask": torch.ones(4, 7, dtype=torch.bool)}, ValueError, "attn_mask: got shape"),
    ],
)
def test_refusals(call: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        scaled_dot_product_attention(*normal((2, 5, 4), (2, 7, 4), (2, 7, 3)), **call)


def test_refuses_rank_one() -> None:
    with pytest.raises(ValueError, match="key: got shape"):
        scaled_dot_product_attention(*normal((5, 4), (7,), (7, 3)))


def test_compile_with_dynamic_shapes() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (5, 6, 9):
        args = [x.requires_grad_() for x in normal((2, 2, length, 4), (2, 2, length, 4), (2, 2, length, 3))]
        got, want = (f(*args, is_causal=True) for f in (compiled, scaled_dot_product_attention))
        assert torch.allclose(got, want)
        for g, w in zip(*(torch.autograd.grad(x.sum(), args) for x in (got, want)), strict=True):
            assert torch.allclose(g, w)


@pytest.mark.parametrize("backend", ["torch-sdpa", "streaming", "reference"])
def test_autocast(backend: str) -> None:
    """Under autocast the call is that in bfloat16, bit for bit, and gradients arrive in float32."""
    args = [x.requires_grad_() for x in normal((2, 4, 33, 16), (2, 2, 33, 16), (2, 2, 33, 16), dtype=torch.float32)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = laser_attention(*args, is_causal=True, backend=backend)
    want = laser_attention(*(x.bfloat16() for x in args), is_causal=True, backend=backend)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, want)
    with torch.autocast("cpu", enabled=backend != "reference"):  # whose backward pass is torch's own
        got_grads = torch.autograd.grad(got.float().square().sum(), args)
    for g, w in zip(got_grads, torch.autograd.grad(want.float().square().sum(), args), strict=True):
        assert g.dtype == torch.float32
        assert torch.equal(g, w)


def test_autocast_casts_what_differs() -> None:
    """As torch does: a normalised query in float32 beside a value in bfloat16; and float64 is left alone."""
    q, k, v = normal((2, 5, 4), (2, 7, 4), (2, 7, 3), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert scaled_dot_product_attention(q, k, v.bfloat16()).dtype == sdpa(q, k, v.bfloat16()).dtype
        assert scaled_dot_product_attention(q.double(), k.double(), v.double()).dtype == torch.float64


@pytest.mark.parametrize("compiled", [False, True])
def test_autocast_of_float32_computes_in_its_own_dtypes(compiled: bool) -> None:
    """Inside the operators nothing is cast: float64 would otherwise meet bfloat16 products, and lse lose its digits."""
    torch._dynamo.reset()
    q, k, v = normal((2, 5, 4), (2, 7, 4), (2, 7, 3), dtype=torch.float32)

    def f(*x: torch.Tensor) -> Any:
        return laser_attention(*x, return_lse=True)

    run = torch.compile(f, fullgraph=True, backend="aot_eager") if compiled else f
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, lse = run(q, k, v)
    _, want = laser_attention(*(x.bfloat16().double() for x in (q, k, v)), return_lse=True)
    assert torch.allclose(lse.double(), want, atol=1e-6)


def test_flops() -> None:
    """As many as torch counts for its own attention of the same sizes."""
    q, k, v = (x.requires_grad_() for x in normal((2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 3)))
    with FlopCounterMode(display=False) as counted:
        out = laser_attention(q, k, v)
    assert counted.get_total_flops() == 2 * (2 * 4) * 5 * 7 * (8 + 3)
    with FlopCounterMode(display=False) as counted:
        out.sum().backward()
    assert counted.get_total_flops() == 2 * (2 * 4) * 5 * 7 * (3 * 8 + 2 * 3)


def test_selective_checkpointing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Named in a policy, the operator runs once; without one, it is computed again; gradients are the same."""
    calls = 0

    def counting(run: Any) -> Any:
        def counted(*args: Any) -> Any:
            nonlocal calls
            calls += 1
            return run(*args)

        return counted

    for name in ("_run_forward", "_run_backward"):
        monkeypatch.setattr(binding, name, counting(getattr(binding, name)))
    save = [torch.ops.laser_attention.forward.default]
    args = [x.requires_grad_() for x in normal((2, 5, 4), (2, 7, 4), (2, 7, 3))]

    def f(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return laser_attention(q * 2, k, v).square()

    def policy(ctx: Any, op: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in save else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    found = []
    for call in (
        lambda: f(*args),
        lambda: checkpoint(f, *args, use_reentrant=False),
        lambda: checkpoint(f, *args, use_reentrant=False, context_fn=contexts),
    ):
        calls = 0
        grads = torch.autograd.grad(call().sum(), args)
        found.append((calls, grads))
    assert [n for n, _ in found] == [2, 3, 2]  # forward, backward, and forward again
    for _, grads in found[1:]:
        for g, w in zip(grads, found[0][1], strict=True):
            assert torch.equal(g, w)
