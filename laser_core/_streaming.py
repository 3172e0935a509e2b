"""LASER attention in tiles: what runs on NumPy by default, and what to read before writing a kernel.

One query tile walks over its key tiles and keeps, per row, the running maximum m of the scores, the denominator
l = Σ exp(s − m) and acc = Σ exp(s − m)·X, where X are the values in exponentiated form (``_values``). That is a
flash kernel, and for heads inside the fast range it is all. A head outside it takes the exact path: each tile is the
definition itself (``_reference.attend``), and tiles are merged in the log domain: exact for every finite input.

The backward pass walks over key tiles, recomputes p = exp(s − l) tile by tile, and needs O(Lq + Lk) memory beside its
results. Deterministic: every sum has one order. The rule that keeps hidden NaN and ∞ out: operands of matrix products
are always finite, and what is not finite travels in p, which is zero where a key is hidden.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from . import _array, _gradient, _merge, _reference, _tiles, _values
from ._array import Array, DType, Namespace
from ._problem import Inputs, Problem
from ._registry import Backend, Forward, Gradients, unrounded_output
from ._tiles import Block, Index, Tiles
from ._values import Forms, Values


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output tile by tile."""
    xp = _array.namespace(inputs.query)
    device, dtype = _array.device(inputs.query), _array.dtype(xp, problem.compute_dtype)
    out = xp.zeros(problem.out_shape, dtype=dtype, device=device)
    lse = xp.full(problem.lse_shape, -math.inf, dtype=dtype, device=device)
    which = _values.forms(xp, problem, inputs)
    tiles = Tiles.fast(problem)
    for block, values, exact in _tiles.blocks(xp, problem, inputs, which, tiles.heads):
        inside = values.inside[..., None, None]
        for rows in _tiles.spans(problem.query_length, tiles.block_q):
            o, l = _fast_rows(xp, block, values, which, rows, tiles.block_k)
            if exact:
                o_exact, l_exact = _exact_rows(xp, block, which, rows)
                o, l = xp.where(inside, o, o_exact), xp.where(inside[..., 0], l, l_exact)
            shape = (block.problem.query_heads, rows.stop - rows.start)
            out = _array.put(out, (*block.at_query_heads, rows), xp.reshape(o, (*shape, problem.value_dim)))
            lse = _array.put(lse, (*block.at_query_heads, rows), xp.reshape(l, shape))
    if problem.dtype == problem.compute_dtype:
        return Forward(out, lse)
    return Forward(xp.astype(out, inputs.query.dtype), lse, residual=out)


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """All gradients in one walk over the tiles."""
    xp = _array.namespace(inputs.query)
    device, dtype = _array.device(inputs.query), _array.dtype(xp, problem.compute_dtype)
    out = forward.out if forward.residual is None else forward.residual
    total = _Totals(xp, problem, inputs)
    which = _values.forms(xp, problem, inputs)
    tiles = Tiles.fast(problem)
    for block, values, exact in _tiles.blocks(xp, problem, inputs, which, tiles.heads):
        shape = (block.problem.key_value_heads, problem.group, problem.query_length)
        o = xp.reshape(out[(*block.at_query_heads, ...)], (*shape, problem.value_dim))
        l = xp.reshape(forward.lse[(*block.at_query_heads, ...)], shape)
        do = xp.reshape(xp.astype(d_out[(*block.at_query_heads, ...)], dtype), o.shape)
        dl = xp.zeros(shape, dtype=dtype, device=device)
        if d_lse is not None:
            dl = xp.reshape(xp.astype(d_lse[(*block.at_query_heads, ...)], dtype), shape)
        state, block = _cotangents(xp, block, o, l, do, dl)
        inside = values.inside[..., None]
        if exact:
            _exact_backward(xp, block, state.only(xp, ~inside), Tiles.exact(block.problem), total)
        else:
            inside = xp.all(inside, axis=-2, keepdims=True)
        _fast_backward(xp, block, state.only(xp, inside), values, which, tiles, total)
    return total.gradients()


# ---------------------------------------------------------------------------------------------------------- forward


def _fast_rows(
    xp: Namespace, block: Block, values: Values, which: Forms, rows: slice, block_k: int
) -> tuple[Array, Array]:
    """o and l of some queries: a flash kernel over X."""
    shape = (*block.q.shape[:2], rows.stop - rows.start, 1)
    m = xp.full(shape, -math.inf, dtype=block.q.dtype, device=_array.device(block.q))
    l = xp.zeros_like(m)
    acc = xp.zeros_like(m)
    broken = xp.zeros_like(m)
    for columns in _tiles.key_spans(block.problem, rows, block_k):
        s, _, partial = _tiles.scores(xp, block, rows, columns)
        m_new = xp.maximum(m, xp.max(s, axis=-1, keepdims=True))
        reference = m_new if not partial else xp.where(m_new == -math.inf, xp.zeros_like(m_new), m_new)
        rescale = xp.exp(m - m_new) if not partial else xp.where(m == m_new, xp.ones_like(m), xp.exp(m - m_new))
        p = xp.exp(s - reference)
        l = l * rescale + xp.sum(p, axis=-1, keepdims=True)
        acc = acc * rescale + xp.matmul(p, values.x[..., columns, :])
        m = m_new
        if values.broken is not None:
            seen = xp.astype(s != -math.inf, s.dtype)
            broken = broken + xp.matmul(seen, values.broken[..., columns, :])
    empty = l == 0
    safe_l = xp.where(empty, xp.ones_like(l), l)
    acc = xp.broadcast_to(acc, (*shape[:3], values.x.shape[-1]))
    o = _values.finish(xp, acc / safe_l, values, block.beta, which)
    if values.broken is not None:
        o = _values.mark_broken(xp, o, xp.broadcast_to(broken, (*shape[:3], values.broken.shape[-1])), block.beta)
    o = xp.where(empty, xp.zeros_like(o), o)
    log_l = xp.where(empty, xp.full_like(l, -math.inf), m + xp.log(safe_l))
    return o, log_l[..., 0]


def _exact_rows(xp: Namespace, block: Block, which: Forms, rows: slice) -> tuple[Array, Array]:
    """o and l of some queries for every finite input: the definition, tile by tile, merged in the log domain."""
    tiles = Tiles.exact(block.problem)
    parts = []
    for few in _tiles.spans(rows.stop - rows.start, tiles.block_q):
        own = slice(rows.start + few.start, rows.start + few.stop)
        shape = (*block.q.shape[:2], own.stop - own.start)
        like = {"dtype": block.q.dtype, "device": _array.device(block.q)}
        o = xp.zeros((*shape, block.v.shape[-1]), **like)
        l = xp.full(shape, -math.inf, **like)
        for columns in _tiles.key_spans(block.problem, own, tiles.block_k):
            s = _tiles.scores(xp, block, own, columns).s
            part = _reference.attend(xp, s, block.v[..., None, columns, :], block.beta, not which.expm1)
            o, l = _merge.merge(xp, o, l, *part, block.beta)
        parts.append((o, l))
    return xp.concat([o for o, _ in parts], axis=-2), xp.concat([l for _, l in parts], axis=-1)


# --------------------------------------------------------------------------------------------------------- backward


class _State(NamedTuple):
    """o, l and their cotangents, for all queries of a block; zero cotangents where they do not count."""

    o: Array
    l: Array
    do: Array
    dl: Array
    silent: Array | None  # queries that nothing flows through, though they may be NaN; None where none is NaN

    def only(self, xp: Namespace, which: Array) -> _State:
        """The same with everything but l set to zero in the other heads, so that they add nothing."""
        o, do = (xp.where(which[..., None], x, xp.zeros_like(x)) for x in (self.o, self.do))
        return self._replace(o=o, do=do, dl=xp.where(which, self.dl, xp.zeros_like(self.dl)))


def _cotangents(xp: Namespace, block: Block, o: Array, l: Array, do: Array, dl: Array) -> tuple[_State, Block]:
    """Finite operands for the products; rows whose o, do or dl are not finite are marked broken instead."""
    empty = l == -math.inf
    fine = xp.all(xp.isfinite(o) & xp.isfinite(do), axis=-1) & xp.isfinite(dl) & xp.isfinite(l)
    silent = None
    if block.broken is not None or _array.known(xp.all(fine)) is not True:
        silent = _gradient.silent(xp, do, dl)
        odd = (~fine & ~empty & ~silent)[..., None]
        nothing = xp.zeros_like(block.k[..., 0], dtype=xp.bool)[..., None, :]
        queries, keys = block.broken or (odd, nothing)
        block = block._replace(broken=(queries | odd, keys))
        o, do = (xp.where(fine[..., None], x, xp.zeros_like(x)) for x in (o, do))
        dl, l = (xp.where(fine, x, xp.zeros_like(x)) for x in (dl, l))
        silent = silent[..., None]
    return _State(o, l, do, dl, silent), block


class _Totals:
    """The gradients under construction, in the compute dtype."""

    def __init__(self, xp: Namespace, problem: Problem, inputs: Inputs) -> None:
        self.xp, self.problem, self.inputs = xp, problem, inputs
        like = {"dtype": _array.dtype(xp, problem.compute_dtype), "device": _array.device(inputs.query)}
        self.q, self.k, self.v, self.bias = (
            None if x is None else xp.zeros(tuple(x.shape), **like)
            for x in (inputs.query, inputs.key, inputs.value, inputs.bias)
        )
        self.beta = xp.zeros((problem.query_heads, problem.value_dim), **like) if inputs.beta is not None else None

    def add(self, name: str, index: Index, block: Array) -> None:
        """Add a block to one of the gradients."""
        whole = getattr(self, name)
        setattr(self, name, _array.put(whole, index, whole[(*index, ...)] + block))

    def add_bias(self, block: Block, rows: slice, columns: slice, ds: Array) -> None:
        """Add a tile of ds to the gradient of the bias, summed over the axes that it was broadcast along."""
        if self.bias is None:
            return
        shape = self.bias.shape
        full = (1,) * (len(self.problem.batch) + 3 - len(shape)) + tuple(shape)
        wanted = (*block.at_query_heads, rows, columns)
        index = tuple(slice(0, 1) if n == 1 else _as_slice(i) for n, i in zip(full, wanted, strict=True))
        ds = self.xp.reshape(ds, (block.problem.query_heads, *ds.shape[-2:]))
        leading = (1,) * len(self.problem.batch)
        part = _array.unbroadcast(
            self.xp, ds, tuple(1 if n == 1 else m for n, m in zip(full[-3:], ds.shape, strict=True))
        )
        part = self.xp.reshape(part, (*leading, *part.shape))
        drop = len(full) - len(shape)
        self.add("bias", index[drop:], self.xp.reshape(part, part.shape[drop:]))

    def gradients(self) -> Gradients:
        """Each in the shape and dtype of its argument."""
        i = self.inputs

        def cast(x: Array, dtype: DType) -> Array:
            return self.xp.astype(x, dtype, copy=False)

        return Gradients(
            query=cast(self.q, i.query.dtype),
            key=cast(self.k, i.key.dtype),
            value=cast(self.v, i.value.dtype),
            bias=None if i.bias is None else cast(self.bias, i.bias.dtype),
            beta=None
            if i.beta is None
            else cast(_array.unbroadcast(self.xp, self.beta, tuple(i.beta.shape)), i.beta.dtype),
        )


def _as_slice(i: int | slice) -> slice:
    return i if isinstance(i, slice) else slice(i, i + 1)


def _fast_backward(
    xp: Namespace, block: Block, state: _State, values: Values, which: Forms, tiles: Tiles, total: _Totals
) -> None:
    problem = block.problem
    side = _values.rows(xp, state.o, state.do, state.dl, values, block.beta, which)
    other = _values.keys(xp, block.v, values, block.beta, which)
    lse = xp.where(state.l == -math.inf, xp.zeros_like(state.l), state.l)[..., None]
    if total.beta is not None:
        for_beta = _values.for_beta(xp, block.v, state.o, state.do, values, block.beta, which)
        _add_beta(xp, block, for_beta.of_queries[..., 0, :], total)
    for columns, walk in _transposed(problem, tiles):
        k, x = block.k[..., columns, :], xp.matrix_transpose(other.x[..., columns, :])
        dk = xp.zeros((*block.q.shape[:2], k.shape[-2], k.shape[-1]), dtype=k.dtype, device=_array.device(k))
        pg = xp.zeros((*block.q.shape[:2], k.shape[-2], side.g.shape[-1]), dtype=k.dtype, device=_array.device(k))
        for rows in walk:
            s, slope, _ = _tiles.scores(xp, block, rows, columns)
            if state.silent is not None:
                s = xp.where(state.silent[..., rows, :], xp.full_like(s, -math.inf), s)
            p = xp.exp(s - lse[..., rows, :])
            g = side.g[..., rows, :]
            pg = pg + xp.matmul(xp.matrix_transpose(p), g)
            ds = p * (xp.matmul(g, x) + side.r[..., rows, :])
            dk = dk + _through_scores(xp, block, rows, columns, ds, slope, total)
        _add_keys(xp, block, columns, dk, _values.sum_forms(xp, other.to_dv[..., columns, :] * pg, which), total)
        if total.beta is not None:
            at_keys = _values.sum_forms(xp, for_beta.to_keys[..., columns, :] * pg, which)
            _add_beta(xp, block, xp.sum(at_keys, axis=-2), total)


def _exact_backward(xp: Namespace, block: Block, state: _State, tiles: Tiles, total: _Totals) -> None:
    for columns, walk in _transposed(block.problem, tiles):
        k, v = block.k[..., columns, :], block.v[..., None, columns, :]
        dk = xp.zeros((*block.q.shape[:2], k.shape[-2], k.shape[-1]), dtype=k.dtype, device=_array.device(k))
        dv = xp.zeros((*block.q.shape[:2], k.shape[-2], v.shape[-1]), dtype=k.dtype, device=_array.device(k))
        for rows in walk:
            s, slope, _ = _tiles.scores(xp, block, rows, columns)
            o, l, do, dl = (state.o[..., rows, :], state.l[..., rows], state.do[..., rows, :], state.dl[..., rows])
            ds, dv_part, dbeta = _gradient.through_values(xp, s, v, block.beta, o, l, do, dl)
            dk, dv = dk + _through_scores(xp, block, rows, columns, ds, slope, total), dv + dv_part
            _add_beta(xp, block, dbeta, total)
        _add_keys(xp, block, columns, dk, dv, total)


def _transposed(problem: Problem, tiles: Tiles) -> list[tuple[slice, list[slice]]]:
    """Each key tile with the query tiles that may see something of it."""
    rows = _tiles.spans(problem.query_length, tiles.block_q)
    seen = {(r.start, c.start) for r in rows for c in _tiles.key_spans(problem, r, tiles.block_k)}
    return [
        (c, [r for r in rows if (r.start, c.start) in seen]) for c in _tiles.spans(problem.key_length, tiles.block_k)
    ]


def _through_scores(
    xp: Namespace, block: Block, rows: slice, columns: slice, ds: Array, slope: Array | None, total: _Totals
) -> Array:
    """Pass ds on to the bias and the queries; returns the keys' share, per query head."""
    total.add_bias(block, rows, columns, ds)
    if slope is not None:
        ds = ds * slope
    dq = block.problem.scale * xp.matmul(ds, block.k[..., columns, :])
    heads = (block.problem.query_heads, *dq.shape[-2:])
    total.add("q", (*block.at_query_heads, rows), xp.reshape(dq, heads))
    return xp.matmul(xp.matrix_transpose(ds), block.q[..., rows, :])  # q carries the scale


def _add_keys(xp: Namespace, block: Block, columns: slice, dk: Array, dv: Array, total: _Totals) -> None:
    """Add to dk and dv, summed over the query heads of the group."""
    total.add("k", (*block.at_key_value_heads, columns), xp.sum(dk, axis=1))
    total.add("v", (*block.at_key_value_heads, columns), xp.sum(dv, axis=1))


def _add_beta(xp: Namespace, block: Block, dbeta: Array, total: _Totals) -> None:
    if total.beta is not None:
        shape = (block.problem.query_heads, block.problem.value_dim)
        whole = xp.broadcast_to(dbeta, (block.problem.key_value_heads, block.problem.group, shape[1]))
        total.add("beta", (block.at_query_heads[-1],), xp.reshape(whole, shape))


BACKEND = Backend(
    name="streaming",
    summary="the definition in tiles: every option on every array library, O(L) extra memory",
    forward=forward,
    backward=backward,
    priority=lambda problem: 10,
    residual=unrounded_output,
)
