"""The torch binding: autograd, torch.compile, torch.func, and the operators themselves."""

from __future__ import annotations

import warnings
from typing import Any

import problems
import pytest

torch = pytest.importorskip("torch")

from laser_torch import binding  # noqa: E402
from torch_calls import tensors  # noqa: E402

import laser_core  # noqa: E402
from laser_core import Unsupported, laser_attention  # noqa: E402


def small(dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(0)
    shapes = ((2, 2, 3, 3), (2, 1, 4, 3), (2, 1, 4, 2))
    return [torch.randn(s, dtype=dtype).requires_grad_() for s in shapes]


def plain(q: Any, k: Any, v: Any) -> Any:
    return laser_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("backend", ["torch-sdpa", "streaming"])
def test_gradcheck(backend: str) -> None:
    assert torch.autograd.gradcheck(lambda *x: laser_attention(*x, return_lse=True, backend=backend), small())


def test_gradcheck_bias_and_beta() -> None:
    q, k, v = small()
    bias = torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True)
    beta = torch.tensor([[0.3], [-1.5]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: laser_attention(*x[:3], bias=x[3], beta=x[4]), (q, k, v, bias, beta))


def test_derivatives_of_every_order_through_the_reference() -> None:
    assert torch.autograd.gradgradcheck(lambda *x: laser_attention(*x, backend="reference"), small())


def test_second_derivatives_of_the_analytic_gradient_say_what_to_do() -> None:
    q, k, v = small()
    (dq,) = torch.autograd.grad(plain(q, k, v).sum(), q, create_graph=True)
    with pytest.raises(Unsupported, match='first order only; backend="reference"'):
        torch.autograd.grad(dq.sum(), k)


OPERATOR_CALLS: dict[str, tuple[Any, ...]] = {
    "plain": (None, None, None, None, None, 0.3, 1.0, None, None, None, None, False, True, None),
    "options": (
        torch.rand(3, 4) > 0.2,
        torch.randn(2, 1, 4, dtype=torch.float64, requires_grad=True),
        torch.tensor([[1.5], [0.5]], dtype=torch.float64, requires_grad=True),
        torch.tensor([2, 3]),
        None,
        0.3,
        None,
        "top_left",
        2,
        None,
        5.0,
        True,
        True,
        "torch-sdpa,streaming",
    ),
}


@pytest.mark.parametrize("call", OPERATOR_CALLS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_opcheck(call: str, dtype: torch.dtype) -> None:
    torch.library.opcheck(binding.forward_operator, (*small(dtype), *OPERATOR_CALLS[call]))


def test_what_is_kept() -> None:
    """For a backward pass what the record says, otherwise nothing."""
    record = laser_core.backends()["torch-sdpa"]
    args = [x.detach().bfloat16() for x in small()]
    problem, _ = laser_core._problem.describe(*args)
    for gradient, want in ((True, record.residual(problem)), (False, ())):
        options = (*OPERATOR_CALLS["plain"][5:-2], gradient, "torch-sdpa")
        _, _, kept = binding.forward_operator(*args, *OPERATOR_CALLS["plain"][:5], *options)
        assert [(tuple(x.shape), str(x.dtype)[6:]) for x in kept] == list(want)


def test_opcheck_backward() -> None:
    args = [x.detach() for x in small()]
    out, lse, kept = binding.forward_operator(*args, *OPERATOR_CALLS["plain"])
    arrays = (*args, *OPERATOR_CALLS["plain"][:5], out, lse, torch.ones_like(out), None)
    torch.library.opcheck(binding.backward_operator, (*arrays, *OPERATOR_CALLS["plain"][5:], kept))


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [(None, False), (None, True), ("streaming", True), ("reference", False)],  # all of the reference is traced: slow
)
def test_compile(backend: str | None, dynamic: bool) -> None:
    torch._dynamo.reset()

    def f(q: Any, k: Any, v: Any) -> Any:
        return laser_attention(q * 2, k, v, is_causal=True, backend=backend) + 1

    compiled = torch.compile(f, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    args = small(torch.float32)
    for size in (4, 3):
        x = [a.detach()[..., :size, :].requires_grad_() for a in args]
        want, got = f(*x), compiled(*x)
        assert torch.allclose(got, want, atol=1e-6)
        for g, w in zip(*(torch.autograd.grad(y.sum(), x) for y in (got, want)), strict=True):
            assert torch.allclose(g, w, atol=1e-6)


def test_compile_options() -> None:
    torch._dynamo.reset()
    call, _, _ = problems.make("grouped", "all together")
    args = tensors(call, torch.float32)
    compiled = torch.compile(laser_attention, fullgraph=True, backend="aot_eager")
    got, want = (f(**args, return_lse=True) for f in (compiled, laser_attention))
    for g, w in zip(got, want, strict=True):
        assert torch.equal(g, w)
    got, want = (torch.autograd.grad(x[0].sum(), (args["bias"], args["beta"])) for x in (got, want))
    for g, w in zip(got, want, strict=True):
        assert torch.allclose(g, w, atol=1e-6)


def test_compile_inductor() -> None:
    torch._dynamo.reset()
    args = small(torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own making
        got = torch.compile(plain, fullgraph=True)(*args)
        grads = torch.autograd.grad(got.sum(), args)
    assert torch.allclose(got, plain(*args), atol=1e-6)
    for g, w in zip(grads, torch.autograd.grad(plain(*args).sum(), args), strict=True):
        assert torch.allclose(g, w, atol=1e-6)


@pytest.mark.parametrize("in_dims", [(0, 0, 0), (0, None, 1), (None, None, 0), (1, 0, None)])
def test_vmap(in_dims: tuple[int | None, ...]) -> None:
    """A batch is what single calls give, forward and gradients, whatever is batched."""
    args = [
        x.detach() if d is None else torch.stack([x.detach() * (1 + i) for i in range(3)], d)
        for x, d in zip(small(), in_dims, strict=True)
    ]

    def one(i: int) -> list[torch.Tensor]:
        return [x if d is None else x.select(d, i) for x, d in zip(args, in_dims, strict=True)]

    def gradients(*x: Any) -> Any:
        return torch.func.grad(lambda *x: plain(*x).square().sum(), argnums=(0, 1, 2))(*x)

    got, grads = (torch.func.vmap(f, in_dims)(*args) for f in (plain, gradients))
    for i in range(3):
        assert torch.allclose(got[i], plain(*one(i)), atol=1e-12)
        for g, w in zip(grads, gradients(*one(i)), strict=True):
            assert torch.allclose(g[i], w, atol=1e-12)


@pytest.mark.parametrize("backend", ["reference", "streaming", "torch-sdpa"])
def test_unsigned_lengths(backend):
    q = torch.randn(2, 2, 5, 8)
    want = laser_attention(q, q, q, key_value_seq_lengths=torch.tensor([3, 5]), backend=backend)
    for dtype, large in ((torch.uint8, 200), (torch.uint16, 60000), (torch.uint32, 2**32 - 1), (torch.uint64, 2**63)):
        lengths = torch.tensor([3, large], dtype=dtype)
        got = laser_attention(q, q, q, key_value_seq_lengths=lengths, backend=backend)
        assert torch.equal(got, want), dtype


@pytest.mark.parametrize("batched", ["attn_mask", "bias", "beta", "query_seq_lengths", "key_value_seq_lengths", "none"])
def test_vmap_options(batched: str) -> None:
    q, k, v = (x.detach() for x in small())
    torch.manual_seed(1)
    options = {
        "attn_mask": torch.rand(3, 4) > 0.3,
        "bias": torch.randn(2, 1, 4, dtype=torch.float64),
        "beta": torch.rand(2, 2, dtype=torch.float64) + 0.5,
        "query_seq_lengths": torch.tensor([2, 3]),
        "key_value_seq_lengths": torch.tensor([4, 3]),
    }
    queries = torch.stack([q, q + 1, q - 1])
    if batched in options:
        x = options[batched]
        options[batched] = torch.stack([x, x.flip(-1), x.roll(1, -1)])

    def f(q: Any, options: Any) -> Any:
        return torch.func.grad_and_value(
            lambda q, bias, beta: laser_attention(q, k, v, **options | {"bias": bias, "beta": beta}).square().sum(),
            argnums=(0, 1, 2),
        )(q, options["bias"], options["beta"])

    dims = {n: 0 if n == batched else None for n in options}
    got = torch.func.vmap(f, in_dims=(0, dims))(queries, options)
    for i in range(3):
        want = f(queries[i], {n: x[i] if n == batched else x for n, x in options.items()})
        for g, w in zip((*got[0], got[1]), (*want[0], want[1]), strict=True):
            assert g[i].shape == w.shape
            assert torch.allclose(g[i], w, atol=1e-12)


def test_jacobians() -> None:
    q, k, v = (x.detach() for x in small())
    got = torch.func.jacrev(plain, argnums=2)(q, k, v)
    want = torch.func.jacrev(lambda *x: laser_attention(*x, is_causal=True, backend="reference"), argnums=2)(q, k, v)
    assert torch.allclose(got, want, atol=1e-10)


def test_any_strides() -> None:
    """Transposed and expanded inputs, expanded cotangents; nothing is written to, and only what is asked for comes."""
    q, k, v = (x.detach() for x in small())
    q, k, v = q.transpose(0, 1).contiguous().transpose(0, 1), k[:1].expand(2, 1, 4, 3), v[..., :1].expand(2, 1, 4, 2)
    copies = [x.clone() for x in (q, k, v)]
    leaf = v.clone().requires_grad_()
    got, want = plain(q, k, leaf), laser_attention(*copies[:2], leaf, is_causal=True, backend="reference")
    assert torch.allclose(got, want, atol=1e-12)
    got.sum().backward()  # an expanded cotangent
    (expected,) = torch.autograd.grad(want.sum(), leaf)
    assert torch.allclose(leaf.grad, expected, atol=1e-12)
    assert all(torch.equal(x, c) for x, c in zip((q, k, v), copies, strict=True))


def test_gradient_of_the_log_sum_exp_alone() -> None:
    q, k, v = small()
    got, want = (laser_attention(q, k, v, return_lse=True, backend=b)[1] for b in (None, "reference"))
    for g, w in zip(*(torch.autograd.grad(x.square().sum(), (q, k)) for x in (got, want)), strict=True):
        assert torch.allclose(g, w, atol=1e-12)


def test_vjp_and_autograd_are_one() -> None:
    q, k, v = small()
    out, pullback = laser_core.laser_attention_vjp(q, k, v)
    assert not out.requires_grad
    want = torch.autograd.grad(laser_attention(q, k, v).sum(), (q, k, v))
    got = pullback(torch.ones_like(out))
    assert all(torch.equal(g, w) for g, w in zip(got[:3], want, strict=True))


def test_errors_come_through() -> None:
    q, k, v = small()
    with pytest.raises(ValueError, match=r"backend: got 'nonesuch'; allowed: None, .*'torch-sdpa'"):
        laser_attention(q, k, v, backend="nonesuch")
    with pytest.raises(ValueError, match="backend: got an empty sequence"):
        laser_attention(q, k, v, backend=[])
    with pytest.raises(TypeError, match="attn_mask: got dtype float64"):
        laser_attention(q, k, v, attn_mask=torch.zeros(3, 4, dtype=torch.float64))


def test_where_a_key_lies_in_memory_changes_no_bit() -> None:
    """Products with a single column round by its address: hidden keys are cleaned in a copy, so all are copied."""
    options: dict[str, Any] = {"key_value_seq_lengths": torch.tensor([94, 94]), "backend": "streaming"}
    for seed in range(40):
        torch.manual_seed(seed)
        query, d_out = torch.randn(2, 1, 17, 1), torch.randn(2, 1, 17, 40)
        key, value = torch.randn(2, 1, 129, 1), torch.randn(2, 1, 129, 40)
        poisoned = key.clone()
        poisoned[..., 94:, :] = torch.nan
        one, two = (laser_core.laser_attention_vjp(query, k, value, **options)[1](d_out) for k in (key, poisoned))
        assert all(torch.equal(a, b) for a, b in zip(one[:3], two[:3], strict=True))
