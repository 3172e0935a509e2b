"""Engine ``jax-tpu``: LASER in Mosaic kernels for TPUs. What the host does; the kernels are in ``tpu_*.py``.

The kernels are the fast path, a flash forward and backward over exponentiated values in the dtype of the inputs; XLA
makes those values and takes the logarithm, and ``guard`` mends the heads that this cannot serve. They are
tested in Pallas' TPU interpreter and compiled by the TPU compiler; no TPU has run them yet.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from laser_core import Backend, Forward, Gradients, Inputs, Problem, _reference, _values

from . import TPU, guard, tiles
from .guard import Call, State, Totals
from .tiles import Array, Axis, Grid
from .tpu_backward import backward_keys, backward_queries
from .tpu_forward import Tile
from .tpu_forward import forward as forward_kernel

LANES = 128
FEW = 16  # a mean of fewer X than that, rounded to bfloat16, can leave the range of the values
_LOG2E = math.log2(math.e)


@functools.partial(jax.jit, static_argnums=(0, 2))
def forward(problem: Problem, inputs: Inputs, interpret: Any = False) -> Forward:
    """The output and the log-sum-exp."""
    return guard.forward(problem, inputs, functools.partial(fast_forward, interpret=interpret))


@functools.partial(jax.jit, static_argnums=(0, 5))
def backward(
    problem: Problem, inputs: Inputs, done: Forward, d_out: Array, d_lse: Array | None, interpret: Any = False
) -> Gradients:
    """All gradients; p is recomputed tile by tile."""
    return guard.backward(problem, inputs, done, d_out, d_lse, functools.partial(fast_backward, interpret=interpret))


def fast_forward(call: Call, interpret: Any) -> tuple[Array, Array]:
    """o and l of all heads."""
    plan = Plan.of(call)
    x = jnp.matrix_transpose(plan.keys(call.values.x.astype(plan.k.dtype)))
    a, l = plan.run(
        forward_kernel,
        plan.by_queries,
        [(plan.queries(plan.q), "q."), (plan.keys(plan.k), "k."), (x, ".k")],
        [(plan.heads, x.shape[-2], ".q"), (plan.heads, 1, ".q")],
        scratch=[(1, plan.tile.block_q), (1, plan.tile.block_q), (x.shape[-2], plan.tile.block_q)],
        depth=call.problem.head_dim + x.shape[-2],
        interpret=interpret,
    )
    a, l = (jnp.matrix_transpose(t[..., : call.problem.query_length]) for t in (a, l))
    empty = l == -jnp.inf
    o = _values.finish(jnp, jnp.where(empty, 1, a), call.values, call.ops.beta, call.which)
    o = tiles.pad_to(jnp.where(empty, 0, o), -2, call.grid.rows)
    return (o if plan.q.dtype == jnp.float32 else _few(call, o)), tiles.pad_to(l, -2, call.grid.rows)


def _few(call: Call, o: Array) -> Array:
    """``o`` with the rows that see few keys by causality from the definition: see ``FEW``."""
    problem, high = call.problem, call.problem.band[1]
    if high is None:
        return o
    first, stop = max(0, -high), min(problem.query_length, FEW - 1 - high)
    if stop <= first:
        return o
    grid = Grid(Axis(problem.query_length, stop - first, problem.query_length), Axis(problem.key_length, FEW, 2**16))
    s, _ = tiles.scores(problem, call.ops, grid, first, 0)
    v = call.ops.v[..., None, :FEW, :]
    exact, _ = _reference.attend(jnp, s, v, call.ops.beta, not call.which.expm1)
    return o.at[..., first:stop, :].set(exact)


def fast_backward(call: Call, state: State, total: Totals, interpret: Any) -> Totals:
    """The gradients of all heads; a row without cotangents adds nothing."""
    problem, ops, which, plan = call.problem, call.ops, call.which, Plan.of(call)
    side = _values.rows(jnp, state.o, state.do, state.dl[..., 0], call.values, ops.beta, which)
    other = _values.keys(jnp, ops.v, call.values, ops.beta, which)
    l2, r = (jnp.matrix_transpose(plan.queries(t, pad)) for t, pad in ((state.l * _LOG2E, jnp.inf), (side.r, 0)))
    operands = [
        (plan.queries(plan.q), "q."),
        (plan.keys(plan.k), "k."),
        (plan.keys(other.x.astype(plan.k.dtype)), "k."),
        (plan.queries(side.g.astype(plan.k.dtype)), "q."),
        (l2, ".q"),
        (r, ".q"),
    ]
    width, dim, tile = other.x.shape[-1], problem.head_dim, plan.tile
    (dq,) = plan.run(
        backward_queries,
        plan.by_queries,
        operands,
        [(plan.heads, dim, ".q")],
        scratch=[(dim, tile.block_q)],
        depth=2 * dim + width,
        interpret=interpret,
    )
    shared = other.x.shape[-3] == 1
    alone = (*plan.heads[:-1], 1)
    dk, pg = plan.run(
        functools.partial(backward_keys, shared=shared),
        plan.by_keys,
        operands,
        [(alone, dim, "k."), (alone if shared else plan.heads, width, "k.")],
        scratch=[(tile.block_k, dim), (tile.block_k, width)],
        depth=2 * (dim + width),
        interpret=interpret,
    )
    dq = jnp.matrix_transpose(dq[..., : problem.query_length])
    dk, pg = (tiles.pad_to(t[..., : problem.key_length, :], -2, call.grid.columns) for t in (dk, pg))
    dv = _values.sum_forms(jnp, other.to_dv * pg, which)
    return guard.with_beta(call, state, total, pg)._replace(
        q=tiles.pad_to(dq, -2, call.grid.rows),
        k=dk * problem.scale,
        v=jnp.sum(dv, axis=-3, keepdims=True),
    )


class Plan(NamedTuple):
    """A call as the kernels see it: arrays ``(batch …, Hkv, group, rows, columns)`` whose lengths are whole tiles."""

    call: Call
    tile: Tile
    grid: Grid
    q: Array  # in the dtype of the inputs, or float32 where all rows see few keys; without the scale; finite
    k: Array
    lengths: Array | None  # (2 · batch,): of the queries, then of the keys
    mask: Array | None  # bytes, transposed

    @classmethod
    def of(cls, call: Call) -> Plan:
        """Tiles of a size that fits into the VMEM of every TPU."""
        problem, inputs, ops = call.problem, call.inputs, call.ops
        low, high = tiles._band(problem)
        narrow = low is not None and high is not None and high - low < FEW
        dtype = jnp.float32 if narrow or problem.key_length < FEW else inputs.query.dtype
        most = 512 if dtype == jnp.bfloat16 and max(problem.head_dim, call.values.x.shape[-1]) <= 256 else 256
        axes = []
        for length in (problem.query_length, problem.key_length):
            block = min(most, LANES * math.ceil(length / LANES))
            axes.append(Axis(length, block, math.ceil(length / block)))
        grid = Grid(*axes)
        cap = problem.logits_soft_cap
        tile = Tile(
            block_q=grid.rows.block,
            block_k=grid.columns.block,
            query_length=problem.query_length,
            key_length=problem.key_length,
            low=low,
            high=high,
            factor=problem.scale * _LOG2E if cap is None else problem.scale / cap,
            cap=None if cap is None else cap * _LOG2E,
            lengths=ops.query_lengths is not None or ops.key_lengths is not None,
            mask=ops.mask is not None,
            batch=problem.batch,
        )
        q, k = (
            tiles.laid_out(
                _reference.finite(jnp, x.astype(dtype)), problem.key_value_heads, group, len(problem.batch) + 4
            )
            for x, group in ((inputs.query, problem.group), (inputs.key, 1))
        )
        plan = cls(call, tile, grid, q, k, None, None)
        if tile.lengths:
            ends = []
            for given, length in ((ops.query_lengths, problem.query_length), (ops.key_lengths, problem.key_length)):
                end = jnp.full((), length, jnp.int32) if given is None else given[..., 0, 0, 0, 0].astype(jnp.int32)
                ends.append(jnp.ravel(jnp.broadcast_to(end, problem.batch)))
            plan = plan._replace(lengths=jnp.concat(ends))
        if ops.mask is not None:
            mask = plan.keys(jnp.matrix_transpose(plan.queries(ops.mask.astype(jnp.int8))))
            plan = plan._replace(mask=mask)
        return plan

    @property
    def heads(self) -> tuple[int, ...]:
        """The axes that tell query heads apart."""
        return (*tiles.leading(self.call.problem), self.call.problem.group)

    @property
    def pairs(self) -> int:
        """Queries times keys in all tiles that causality and window leave."""
        low, high = self.tile.low, self.tile.high
        count = 0
        for row in range(0, self.grid.rows.padded, self.tile.block_q):
            first = 0 if low is None else max(row + low, 0) // self.tile.block_k
            stop = self.grid.columns.number
            if high is not None:
                stop = min(max(row + self.tile.block_q - 1 + high, -1) // self.tile.block_k + 1, stop)
            count += max(stop - first, 0)
        return math.prod(self.heads) * count * self.tile.block_q * self.tile.block_k

    def queries(self, x: Array, value: float = 0) -> Array:
        """``x (..., rows, columns)`` with the queries in whole tiles; a single row for all of them stays."""
        return _whole(x, self.grid.rows, value)

    def keys(self, x: Array) -> Array:
        """The same for keys."""
        return _whole(x, self.grid.columns, 0)

    def by_queries(self, *ids: Any) -> tuple[tuple[Any, ...], Any, Any]:
        """Grid batch …, Hkv, group, query tiles, key tiles: the head, the query tile and the key tile to load."""
        *head, i, j = ids
        return tuple(head), i, _inside(j, self.grid.columns, *self.grid.columns_of(self.call.problem, i))

    def by_keys(self, *ids: Any) -> tuple[tuple[Any, ...], Any, Any]:
        """Grid batch …, Hkv, key tiles, group, query tiles."""
        *head, j, member, i = ids
        return (*head, member), _inside(i, self.grid.rows, *self.grid.rows_of(self.call.problem, j)), j

    def run(
        self,
        kernel: Callable[..., None],
        order: Callable[..., tuple[tuple[Any, ...], Any, Any]],
        operands: Sequence[tuple[Array, str]],
        results: Sequence[tuple[tuple[int, ...], int, str]],
        scratch: Sequence[tuple[int, int]],
        depth: int,
        interpret: Any,
    ) -> list[Array]:
        """Run a kernel over the grid of an order; "q." names an array with query tiles along its rows, all its columns.

        Args:
            kernel: Takes a ``Tile``, and then the lengths, the operands, the mask, the results and the scratch.
            order: ``by_queries`` or ``by_keys``.
            operands: Arrays and their axes.
            results: Leading axes, the length of the axis that is not cut into tiles, and the axes.
            scratch: Shapes, in float32.
            depth: Multiplications for a query and a key, of all products together.
            interpret: Whether to interpret it: False, or what Pallas takes.
        """
        tile, rows, columns = self.tile, self.grid.rows, self.grid.columns
        *leading, group = self.heads
        if order == self.by_queries:
            grid = (*leading, group, rows.number, columns.number)
        else:
            grid = (*leading, columns.number, group, rows.number)
        sequential = 1 if order == self.by_queries else 2
        semantics: Any = ("parallel",) * (len(grid) - sequential) + ("arbitrary",) * sequential

        def spec(shape: tuple[int, ...], axes: str) -> pl.BlockSpec:
            block = [
                n if axis == "." or n == 1 else (tile.block_q if axis == "q" else tile.block_k)
                for n, axis in zip(shape[-2:], axes, strict=True)
            ]

            def index(*ids: Any) -> tuple[Any, ...]:
                head, i, j = order(*ids[: len(grid)])
                at = [0 if n == 1 else place for n, place in zip(shape[:-2], head, strict=True)]
                for n, axis in zip(shape[-2:], axes, strict=True):
                    at.append(0 if axis == "." or n == 1 else i if axis == "q" else j)
                return tuple(at)

            return pl.BlockSpec((*(None,) * len(self.heads), *block), index)

        if self.mask is not None:
            operands = [*operands, (self.mask, "kq")]
        arrays = ([self.lengths] if tile.lengths else []) + [x for x, _ in operands]
        arrays = tiles.vary(arrays, arrays)
        shapes = []
        for heads, other, axes in results:
            lengths = {".": other, "q": rows.padded, "k": columns.padded}
            shape = (*heads, *(lengths[axis] for axis in axes))
            manual = jax.typeof(arrays[-1]).manual_axis_type
            shapes.append(jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=manual))
        call = pl.pallas_call(
            functools.partial(kernel, tile),
            out_shape=shapes,
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=int(tile.lengths),
                grid=grid,
                in_specs=[spec(x.shape, axes) for x, axes in operands],
                out_specs=[spec(shape.shape, axes) for shape, (_, _, axes) in zip(shapes, results, strict=True)],
                scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
            ),
            compiler_params=pltpu.CompilerParams(dimension_semantics=semantics),
            cost_estimate=pl.CostEstimate(
                flops=2 * depth * self.pairs,
                transcendentals=self.pairs,
                bytes_accessed=sum(x.size * x.dtype.itemsize for x in (*arrays, *shapes)),
            ),
            interpret=interpret,
            name=f"laser_{getattr(kernel, 'func', kernel).__name__}",
        )
        with jax.enable_x64(False):  # the kernels' integers are of 32 bits
            done: list[Array] = call(*arrays)
        return done


def _whole(x: Array, axis: Axis, value: float) -> Array:
    """``x`` with its rows in whole tiles, whatever the padding it comes with."""
    if x.shape[-2] == 1 and axis.length != 1:
        return x
    x = x[..., : axis.length, :]
    widths = [(0, 0)] * x.ndim
    widths[-2] = (0, axis.padded - axis.length)
    return jnp.pad(x, widths, constant_values=value)


def _inside(tile: Any, axis: Axis, first: Any, stop: Any) -> Any:
    """The tile, or the one next to it that shows something: what is not computed with is not loaded."""
    return jnp.clip(tile, jnp.minimum(first, axis.number - 1), jnp.maximum(stop - 1, 0))


def interpreted(**options: Any) -> Backend:
    """The backend on a CPU, in Pallas' TPU interpreter with these options."""
    interpret = pltpu.InterpretParams(**options)
    return dataclasses.replace(
        TPU,
        name="jax-tpu-interpreted",
        summary="the TPU kernels on a CPU, interpreted",
        forward=lambda problem, inputs: forward(problem, inputs, interpret),
        backward=lambda *arguments: backward(*arguments, interpret),
        devices=("cpu",),
        priority=lambda problem: -1,
    )


INTERPRETED = interpreted()
