"""LASER in Triton kernels, backward: what the host does."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from laser_core import Forward, Gradients, Inputs, Problem, _array, _gradient

from . import engines, hopper, hopper_gradient, triton_backward, triton_exact
from .call import (
    Call,
    Plan,
    Values,
    adjacent,
    cdiv,
    describe,
    layout,
    matrix,
    padded,
    prepare,
    value_pass,
    workers,
)
from .engines import Choice
from .fused import joined
from .launch import Launch, on
from .tiles import ROWS, Tile, backward_tiles, row_block


class Cotangents(NamedTuple):
    """What flows back, and what the kernels make of it."""

    o: Tensor  # contiguous; unrounded, or beside it
    rest: Tensor | None  # what o was rounded by
    do: Tensor  # (B, Hq, Lq, E)
    dl: Tensor | None  # (B, Hq, Lq)
    g: Tensor  # (B, Hq, Lq, E)
    rows: Tensor  # (2, B·Hq, Lq up to a multiple of ROWS): r and l2
    lies: tuple[Any, ...]  # what a prepared launch depends on of these

    @property
    def r(self) -> Tensor:
        """What ds has in common in a row."""
        return self.rows[0]

    @property
    def l2(self) -> Tensor:
        """The log-sum-exp in base 2."""
        return self.rows[1]


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> Gradients:
    """The gradients; no synchronisation with the device."""
    if 0 in problem.score_shape:
        return _gradient.no_gradients(_array.namespace(inputs.query), inputs)
    call = prepare(problem, inputs)
    with on(inputs.query.device):
        choice = call.plan.prepared(engines.chosen, "backward")
        values = known(call, forward, choice)
        side = prepare_rows(call, values, forward, d_out, d_lse)
        dbias = None if inputs.bias is None else _bias_gradient(call, values, side, inputs.bias)
        dq, dk, dv = run(call, values, side, choice)  # dv may be where X was
        if problem.beta != 0:
            _exact_backward(call, values, side, dq, dk, dv)
    return Gradients(_like(inputs.query, dq), _like(inputs.key, dk), _like(inputs.value, dv), dbias)


def run(call: Call, values: Values, side: Cotangents, choice: Choice) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the heads inside the fast range, by an engine that serves the call."""
    if choice.engine == "hopper":
        made = call.plan.prepared(_hopper)
        return hopper_gradient.backward(
            made, call.q, call.k, values.x, values.c, side.g, side.rows, values.flags, values.counter
        )
    return _portable_backward(call, values, side, choice.tile)


def known(call: Call, forward: Forward, choice: Choice) -> Values:
    """What is known of the values: the kernel for Hopper works X out on its way, and needs c and the flags alone."""
    if choice.engine != "hopper":
        return value_pass(call)  # those kernels clean what they read
    v = call.v if call.plan.fits("v") else call.v.clone(memory_format=torch.contiguous_format)
    _, c, flags = forward.residual
    turns = torch.empty((call.plan.prepared(_hopper).turns,), dtype=torch.int32, device=v.device)
    return Values(v, c.view(-1, c.shape[-1]), flags.view(-1) & 1, turns)  # 1: outside of the fast range


def _like(x: Tensor, gradient: Tensor) -> Tensor:
    """A gradient in the shape and dtype of its argument: those of the kernels have one batch axis."""
    same = gradient.shape == x.shape and gradient.dtype == x.dtype
    return gradient if same else gradient.view(x.shape).to(x.dtype)


def _output(forward: Forward, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The output, and the rest of it where it is kept apart."""
    out, rest = forward.out, forward.residual
    if isinstance(rest, tuple):
        rest = rest[0]
    if rest is None:
        return out.contiguous(), None
    if rest.dtype != torch.int16:
        return rest.contiguous(), None  # it is the output before rounding
    if out.dtype != dtype:
        return joined(out, rest).contiguous(), None  # interpreted
    return out.contiguous(), rest.contiguous()


def prepare_rows(call: Call, values: Values, forward: Forward, d_out: Tensor, d_lse: Tensor | None) -> Cotangents:
    """G, and what the kernels want to know of each row."""
    plan = call.plan
    p = plan.problem
    packed = plan.packed is not None
    if packed:
        do, dl = adjacent(d_out, 0), None if d_lse is None else d_lse.T
    else:
        do, dl = matrix(d_out), None if d_lse is None else d_lse.reshape(plan.batch, *d_lse.shape[-2:])
    o, rest = _output(forward, plan.dtype)
    lse = forward.lse.contiguous()
    g = torch.empty((*call.q.shape[:-1], p.value_dim), dtype=plan.dtype, device=plan.device)
    heads = p.query_heads * (1 if packed else plan.batch)
    rows = torch.empty((2, heads, plan.padded_length), dtype=torch.float32, device=plan.device)
    begins = [x is None or layout(x)[1] for x in (lse, o, rest)]
    lies = (layout(do, packed), None if dl is None else layout(dl, packed), tuple(begins), plan.dtype)
    side = Cotangents(o, rest, do, dl, g, rows, (*lies, rest is not None, o.dtype))
    plan.prepared(_rows_launch, side.lies, values.counter.numel())(
        o, rest, do, dl, lse, values.c, values.flags, g, side.r, side.l2, values.counter, call.query_lengths
    )
    return side


def _side_strides(lies: tuple[Any, ...]) -> list[int]:
    """Of do and dl."""
    return [*lies[0][0][:3], *((0, 0, 0) if lies[1] is None else lies[1][0])]


def _rows_launch(plan: Plan, lies: tuple[Any, ...], count: int) -> Launch:
    p, width = plan.problem, padded(plan.problem.value_dim)
    block = row_block(width)
    blocks = cdiv(p.query_length, ROWS) * (ROWS // block)
    scales = (plan.y_scale, plan.inverse_beta)
    scalars = (p.query_heads, p.group, p.query_length, *scales, plan.padded_length, plan.total, count)
    return Launch(
        triton_backward.prepare_rows, plan.batch * p.query_heads * blocks, (*_side_strides(lies), *scalars),
        E=p.value_dim, EP=width, BM=block, LINEAR=p.beta == 0, WITH_DL=lies[1] is not None, REST=lies[4],
        QUERY_LENGTHS=plan.lengths()["QUERY_LENGTHS"], num_warps=8,
    )  # fmt: skip


def _hopper(plan: Plan) -> hopper_gradient.Prepared:
    """The launches of the kernel for Hopper."""
    p = plan.problem
    q = (plan.batch, p.query_heads, p.query_length, p.head_dim)
    k = (plan.batch, p.key_value_heads, p.key_length, p.head_dim)
    return hopper_gradient.prepare(q, k, plan.dtype, plan.device, p.beta or 1.0, p.scale, hopper.causal_offset(p))


def _portable_backward(
    call: Call, values: Values, side: Cotangents, cut: tuple[Any, ...] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv of the heads inside the fast range, contiguous.

    dv takes the place of X, which the kernel that makes it reads no other rows of; so dq comes first.
    """
    plan, p = call.plan, call.plan.problem
    dq = plan.new(p.query_heads, p.query_length, p.head_dim)
    for_keys, for_queries = backward_tiles(*plan.tile_of()) if cut is None else (Tile(*part) for part in cut)
    common = (side.r, side.l2, values.flags, call.mask, call.bias, call.query_lengths, call.key_lengths)
    k, x = (describe(plan, a, for_queries.block_k) if for_queries.tma else None for a in (call.k, values.x))
    tma = k is not None and x is not None
    plan.prepared(_queries_launch, for_queries, tma)(
        call.q, k if tma else call.k, x if tma else values.x, side.g, *common, dq
    )
    dk = plan.new(p.key_value_heads, p.key_length, p.head_dim, keys=True)
    dv = values.x
    q, g = (describe(plan, a, for_keys.block_q) if for_keys.tma else None for a in (call.q, side.g))
    tma = q is not None and g is not None
    plan.prepared(_keys_launch, for_keys, tma)(
        q if tma else call.q, call.k, values.x, g if tma else side.g, *common, dk, dv
    )
    return dq, dk, dv


def _keys_launch(plan: Plan, tile: Tile, tma: bool) -> Launch:
    p = plan.problem
    return Launch(
        triton_backward.backward_keys, plan.batch * p.key_value_heads * cdiv(p.key_length, tile.block_k),
        (*plan.strides("q", "k", "mask", "bias"), *plan.geometry(), plan.inverse_beta, plan.padded_length),
        **plan.options(), EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, TMA=tma,
        SHIFT=0 if p.beta == 0 else plan.limits.shift, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _queries_launch(plan: Plan, tile: Tile, tma: bool) -> Launch:
    p = plan.problem
    return Launch(
        triton_backward.backward_queries, plan.batch * p.query_heads * cdiv(p.query_length, tile.block_q),
        (*plan.strides("q", "k", "mask", "bias"), *plan.geometry(), plan.inverse_beta, plan.padded_length),
        **plan.options(), EP=padded(p.value_dim), BM=tile.block_q, BN=tile.block_k, TMA=tma,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def _exact_backward(call: Call, values: Values, side: Cotangents, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """The definition, for heads outside the fast range."""
    arrays = (
        call.q, call.k, call.v, side.o, side.rest, side.do, side.dl, side.l2, values.flags, call.mask, call.bias,
        call.query_lengths, call.key_lengths,
    )  # fmt: skip
    call.plan.prepared(_exact_launch, side.lies)(*arrays, dq, dk, dv)


def _exact_scalars(plan: Plan, lies: tuple[Any, ...], *more: int) -> tuple[Any, ...]:
    strides = (*plan.strides("q", "k", "v"), *_side_strides(lies), *plan.strides("mask", "bias"))
    return (*strides, *more, *plan.geometry(), plan.y_scale, plan.inverse_beta, plan.padded_length)


def _exact_constants(plan: Plan, lies: tuple[Any, ...]) -> dict[str, Any]:
    options = plan.options()
    del options["LINEAR"]
    more = {"BM": 16, "BN": 16, "BE": 16, "WITH_DL": lies[1] is not None, "REST": lies[4]}
    return options | more | {"num_warps": 4, "num_stages": 1}


def _exact_launch(plan: Plan, lies: tuple[Any, ...]) -> Launch:
    p, programs, shares = plan.problem, [], []
    parts = cdiv(p.value_dim, 16) + 1
    for heads, work in (p.query_heads, cdiv(p.query_length, 16)), (p.key_value_heads, cdiv(p.key_length, 16) * parts):
        shares.append(workers(plan.batch * heads, work))
        programs.append(plan.batch * heads * shares[-1])
    scalars = _exact_scalars(plan, lies, programs[0], *shares)
    return Launch(triton_exact.exact_gradients, sum(programs), scalars, **_exact_constants(plan, lies))


def _bias_gradient(call: Call, values: Values, side: Cotangents, bias: Tensor) -> Tensor:
    p = call.plan.problem
    launch, shape = call.plan.prepared(_bias_launch, side.lies)
    found = torch.empty(shape, dtype=torch.float32, device=bias.device)
    launch(
        call.q, call.k, call.v, values.x, side.g, side.r, side.o, side.rest, side.do, side.dl, side.l2, values.flags,
        call.mask, call.bias, call.query_lengths, call.key_lengths, found,
    )  # fmt: skip
    if shape[0] > 1:  # (B, …) back to the batch axes that the bias has
        found = found.reshape(*p.batch, *shape[1:])
    gradient: Tensor = _array.unbroadcast(_array.namespace(bias), found, tuple(bias.shape))
    return gradient.to(bias.dtype)


def _bias_launch(plan: Plan, lies: tuple[Any, ...]) -> tuple[Launch, tuple[int, ...]]:
    """The launch, and the shape of the gradient with one batch axis."""
    p, own = plan.problem, plan.problem.bias_shape or ()
    shape = (1,) * (len(p.score_shape) - len(own)) + own
    own_batch = plan.batch if any(n != 1 for n in shape[:-3]) else 1
    block_q, block_k = 32, 32
    tiles = cdiv(shape[-2], block_q) * cdiv(shape[-1], block_k)
    scalars = _exact_scalars(plan, lies, shape[-3], plan.batch // own_batch, p.query_heads // shape[-3])
    launch = Launch(
        triton_exact.backward_bias, own_batch * shape[-3] * tiles, scalars,
        **plan.options(), EP=padded(p.value_dim), BM=block_q, BN=block_k, BE=16,
        SUM_I=shape[-2] == 1 and p.query_length > 1, SUM_J=shape[-1] == 1 and p.key_length > 1,
        WITH_DL=lies[1] is not None, REST=lies[4], num_warps=4, num_stages=1,
    )  # fmt: skip
    return launch, (own_batch, *shape[-3:])
