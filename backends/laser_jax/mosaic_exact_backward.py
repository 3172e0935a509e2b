"""The gradients of single heads from the definition, in Pallas (Mosaic GPU): what the fast kernel has left is replaced.

    w_ije = p_ij exp(β(v_je − o_ie) − n_ie)    ds = Σ_e do_ie w_ije/β + p_ij r_i    dv_je = Σ_i do_ie w_ije

o is the rounded output: n, from another pass over the keys, makes Σ_j w_ije of it what Σ_j p_ij is, however large o may
be. One kernel owns its queries and makes n and dq, another its keys and makes dk and dv; w is worked out a query at a
time, for some keys and all channels. A block of a head that is not asked for returns at once. Device code only, in JAX
0.11 or later.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_rows import ODD

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

BLOCK = 64  # queries, keys and channels at a time
_LOG2E = math.log2(math.e)
_ROWS, _COLUMNS = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Form(NamedTuple):
    """What is compiled in."""

    key_length: int
    offset: int | None  # query i sees the keys ≤ i + offset; None: all
    scale: float
    beta: float
    shift: int
    interpreted: bool


class Rows(NamedTuple):
    """All that there is of queries, (B, Hq, L, W) or (B, Hq, L)."""

    q: Any
    o: Any
    do: Any
    r: Any  # as mosaic_rows.prepare makes them
    l2: Any


class _Tiles(NamedTuple):
    """Shared memory."""

    q: Ref
    o: Ref
    do: Ref
    k: Ref
    v: Ref
    s: Ref  # of queries and keys, in base 2, without l
    raw: Ref  # Σ_e do·w
    ds: Ref
    total: Ref  # dq or dk; before, of the exponentials
    norm: Ref  # n in base 2; before, the greatest exponents


def rewrite(
    form: Form, chosen: Array, reach: Array, rows: Rows, k: Array, v: Array, dq: Array, dk: Array, dv: Array
) -> tuple[Array, ...]:
    """dq, dk and dv, those of the chosen heads from the definition.

    Args:
        form: What is compiled in.
        chosen: (B, Hkv), int32.
        reach: (B, Hkv), int32: dk and dv of keys before it are NaN.
        rows: What there is of queries.
        k: (B, Hkv, Lk, W), float16 or bfloat16; W is 64 or 128, and lengths of all are multiples of 8.
        v: (B, Hkv, Lk, W).
        dq: (B, Hq, L, W); L, as that of r and l2, a multiple of 64.
        dk: (B, Hkv, L', W), L' too.
        dv: (B, Hkv, L', W).
    """
    batch, kv_heads, keys, width = dk.shape
    heads, queries = dq.shape[1:3]
    group = heads // kv_heads
    norms = jax.ShapeDtypeStruct(dq.shape, jnp.float32)

    def run(arrays: tuple[Any, ...], out_type: Any, name: str, tiles: int, heads: int, block: Any) -> Any:
        scratch = _scratch(width, k.dtype, norms=not out_type)
        share = min(tiles, max(1, pl.cdiv(512, batch * heads)))

        def every(*refs: Ref) -> None:
            chosen_ref, reach_ref, *arrays = refs
            b, h = lax.axis_index("batch"), lax.axis_index("head")
            h_kv = h if heads == kv_heads else lax.div(h, group)

            @pl.when(chosen_ref[b, h_kv] != 0)
            def _() -> None:
                @pl.loop(lax.axis_index("share"), tiles, step=share)
                def _(tile: Array) -> None:
                    place = (b, h, h_kv, tile * BLOCK, reach_ref[b, h_kv])

                    def work(*scoped: Ref) -> None:
                        tiles = _Tiles(*scoped[:-2])
                        if not form.interpreted:
                            for plain in (tiles.o, tiles.do, tiles.v, tiles.s, tiles.raw, tiles.total, tiles.norm):
                                _plain(plain)
                        block(form, place, arrays, scoped)

                    pl.run_scoped(work, *scratch)

        mesh = plgpu.Mesh(grid=(share, heads, batch), grid_names=("share", "head", "batch"))
        parameters = plgpu.CompilerParams(approx_math=True)
        return pl.kernel(every, out_type=out_type, mesh=mesh, compiler_params=parameters, name=name,
            **({"interpret": plgpu.InterpretGPUParams(detect_races=True)} if form.interpreted else {}),
        )(chosen, reach, *rows, k, v, *arrays)  # fmt: skip

    def write(written: tuple[Ref, ...]) -> None:
        (norm,) = run(written, (norms,), "laser_exact_queries", queries // BLOCK, heads, _queries)
        block = functools.partial(_keys, group, queries // BLOCK)
        run((*written, norm), (), "laser_exact_keys", keys // BLOCK, kv_heads, block)

    return pl.run_state(write)((dq, dk, dv))


def _scratch(width: int, dtype: Any, norms: bool) -> list[Any]:
    layout = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    operand = plgpu.SMEM((BLOCK, width), dtype, transforms=layout)
    plain, wide = plgpu.SMEM((BLOCK, width), dtype), plgpu.SMEM((BLOCK, width), jnp.float32)
    square = plgpu.SMEM((BLOCK, BLOCK), jnp.float32)
    return [operand, plain, plain, operand, plain, square, square,
        plgpu.SMEM((BLOCK, BLOCK), dtype, transforms=layout), wide, wide,
        plgpu.Barrier(num_arrivals=3 + norms), plgpu.Barrier(num_arrivals=2)]  # fmt: skip


@plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
def _plain(_: Any, tile: Any) -> None:
    """Nothing; but so layouts are known to be plain, and the inference of layouts need not try what else fits."""


def _parts(tile: Ref) -> list[Ref]:
    """Of 64 channels each."""
    return [tile.at[:, pl.ds(column, BLOCK)] for column in range(0, tile.shape[1], BLOCK)]


def _finite(x: Array, other: float = 0.0) -> Array:
    return jnp.where(jnp.abs(x) < jnp.inf, x, other)


def _clean(tile: Ref) -> None:
    for part in _parts(tile):
        x = plgpu.load(part, layout=plgpu.Layout.WGMMA)
        part[...] = _finite(x.astype(jnp.float32)).astype(x.dtype)


def _fetch_rows(refs: Rows, norm: Ref | None, tiles: _Tiles, at: tuple[Any, ...], full: Ref) -> tuple[Array, Array]:
    """r and l2; all else is in shared memory."""
    for ref, tile in ((refs.q, tiles.q), (refs.o, tiles.o), (refs.do, tiles.do), (norm, tiles.norm)):
        if ref is not None:
            plgpu.copy_gmem_to_smem(ref.at[at], tile, full)
    r, l2 = (plgpu.load(ref.at[at], layout=_ROWS, optimized=False) for ref in (refs.r, refs.l2))
    plgpu.barrier_wait(full)
    _clean(tiles.q)
    return r, l2


def _fetch_keys(k: Ref, v: Ref, tiles: _Tiles, at: tuple[Any, ...], full: Ref) -> None:
    plgpu.copy_gmem_to_smem(k.at[at], tiles.k, full)
    plgpu.copy_gmem_to_smem(v.at[at], tiles.v, full)
    plgpu.barrier_wait(full)
    _clean(tiles.k)


def _values(form: Form, v: Array) -> Array:
    """v, infinite where βv is not finite, so that w is 0: what sees that is not asked for here."""
    v = v.astype(jnp.float32)
    return jnp.where(jnp.abs(v * (form.beta * _LOG2E)) < jnp.inf, v, math.copysign(math.inf, -form.beta))


def _all_values(form: Form, v: Ref) -> list[Array]:
    return [_values(form, plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)) for part in _parts(v)]


def _exponents(form: Form, v: Array, o: Array) -> Array:
    """β(v − o) in base 2. The difference first: it is small where it matters, v and o may be large."""
    return jnp.minimum((v - o) * (form.beta * _LOG2E), 1e38)


def _zeros(number: int) -> tuple[Array, ...]:
    return tuple(plgpu.layout_cast(jnp.zeros((BLOCK, BLOCK), jnp.float32), plgpu.Layout.WGMMA) for _ in range(number))


def _seen(form: Form, first: Array, start: Array, keys: int) -> Array:
    """Of a tile that has its keys along that axis."""
    shape = (BLOCK, BLOCK)
    row, column = (plgpu.broadcasted_iota(jnp.int32, shape, a, layout=plgpu.Layout.WGMMA) for a in (1 - keys, keys))
    seen = column < form.key_length - start
    return seen if form.offset is None else seen & (column - row <= first + form.offset - start)


def _add_norms(form: Form, tiles: _Tiles, l2: Array, sums: Array, first: Array, start: Array, end: Array) -> Array:
    """Adds a tile of keys to the exponentials of all channels; returns Σ p with its share."""
    shape = (BLOCK, BLOCK)
    plgpu.commit_smem()
    s = _product(tiles.k, tiles.q.transpose((1, 0))) * (form.scale * _LOG2E)
    tiles.s[...] = jnp.where(_seen(form, first, start, 0), s, -jnp.inf)
    plgpu.commit_smem()

    def scores(j: Array) -> Array:
        return plgpu.load(tiles.s.at[j], layout=_ROWS, optimized=False) - (l2 + form.shift)

    number = jnp.minimum(end - start, BLOCK)
    for column, o_s, top_s, acc_s in zip(
        range(0, tiles.o.shape[1], BLOCK), *map(_parts, (tiles.o, tiles.norm, tiles.total)), strict=True
    ):
        o, top, acc = (plgpu.load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in (o_s, top_s, acc_s))
        o = _finite(o.astype(jnp.float32))

        def one(j: Array, state: tuple[Array, ...], column: int = column, o: Array = o) -> tuple[Array, ...]:
            top, acc = state
            v = plgpu.load(tiles.v.at[j, pl.ds(column, BLOCK)], layout=_COLUMNS, optimized=False)
            t = _exponents(form, lax.broadcast_in_dim(_values(form, v), shape, [1]), o)
            t = t + lax.broadcast_in_dim(scores(j), shape, [0])
            higher = jnp.maximum(top, t)
            about = _finite(higher)
            return higher, acc * jnp.exp2(top - about) + jnp.exp2(t - about)

        top_s[...], acc_s[...] = lax.fori_loop(0, number, one, (top, acc))
    sums = lax.fori_loop(0, number, lambda j, sums: sums + jnp.exp2(scores(j)), sums)
    plgpu.commit_smem()
    return sums


def _finish_norms(tiles: _Tiles, sums: Array, place: Ref) -> None:
    """log2 of Σ_j p_ij exp(β(v_je − o_ie)) over Σ_j p_ij; ∞ in rows that nothing flows through, so that w is 0."""
    sums = lax.broadcast_in_dim(sums, (BLOCK, BLOCK), [0])
    for norm, total in zip(_parts(tiles.norm), _parts(tiles.total), strict=True):
        top, acc = (plgpu.load(x, layout=plgpu.Layout.WGMMA, optimized=False) for x in (norm, total))
        sound = (acc > 0) & (acc < jnp.inf) & (sums > 0) & (sums < jnp.inf)
        found = top + lax.log2(jnp.where(sound, acc, 1.0)) - lax.log2(jnp.where(sound, sums, 1.0))
        norm[...] = jnp.where(sound, found, jnp.inf)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tiles.norm, place)
    plgpu.wait_smem_to_gmem(0)


def _cotangents(
    form: Form, tiles: _Tiles, v: list[Array], r: Array, l2: Array, first: Array, start: Array, dv: tuple[Array, ...]
) -> tuple[Array, ...]:
    """Puts ds of the queries from ``first`` and the keys from ``start`` into its tile; returns dv with their share."""
    shape = (BLOCK, BLOCK)
    plgpu.commit_smem()
    s = _product(tiles.q, tiles.k.transpose((1, 0))) * (form.scale * _LOG2E)
    s = s - lax.broadcast_in_dim(l2 + form.shift, shape, [0])
    tiles.s[...] = jnp.where(_seen(form, first, start, 1), s, -jnp.inf)
    plgpu.commit_smem()

    def one(i: Array, dv: tuple[Array, ...]) -> tuple[Array, ...]:
        s_i = lax.broadcast_in_dim(plgpu.load(tiles.s.at[i], layout=_ROWS, optimized=False), shape, [0])
        shares = []
        for n, v_n in enumerate(v):
            channels = pl.ds(n * BLOCK, BLOCK)
            o, norm, do = (
                plgpu.load(tile.at[i, channels], layout=_COLUMNS, optimized=False).astype(jnp.float32)
                for tile in (tiles.o, tiles.norm, tiles.do)
            )
            o, norm = (lax.broadcast_in_dim(x, shape, [1]) for x in (_finite(o), norm))
            w = jnp.exp2(_exponents(form, v_n, o) + s_i - norm)
            shares.append(w * lax.broadcast_in_dim(_finite(do), shape, [1]))
        raw = shares[0] if len(shares) == 1 else shares[0] + shares[1]
        tiles.raw.at[i][...] = raw.sum(axis=1)
        return tuple(a + b for a, b in zip(dv, shares, strict=False))

    dv = lax.fori_loop(0, BLOCK, one, dv)
    plgpu.commit_smem()
    p = jnp.exp2(plgpu.load(tiles.s, layout=plgpu.Layout.WGMMA, optimized=False))
    raw = plgpu.load(tiles.raw, layout=plgpu.Layout.WGMMA, optimized=False)
    ds = raw * (1 / form.beta) + p * lax.broadcast_in_dim(r * 2.0**form.shift, shape, [0])
    tiles.ds[...] = ds.astype(tiles.ds.dtype)
    plgpu.commit_smem()
    return dv


def _product(a: Ref, b: Ref) -> Array:
    def multiply(acc: Ref) -> Array:
        plgpu.wgmma(acc, a, b)
        found: Array = acc[...]
        return found

    found: Array = pl.run_scoped(multiply, plgpu.ACC((BLOCK, BLOCK), jnp.float32))
    return found


def _fill(tile: Ref, value: float) -> None:
    for part in _parts(tile):
        part[...] = plgpu.layout_cast(jnp.full((BLOCK, BLOCK), value, jnp.float32), plgpu.Layout.WGMMA)


def _add(total: Ref, ds: Ref, other: Ref) -> None:
    """total + ds·other; then shared memory may be written to."""
    for part, of in zip(_parts(total), _parts(other), strict=True):
        old = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
        part[...] = old + _product(ds, of)
    plgpu.commit_smem()


def _finish(total: list[Array], odd: Array, tile: Ref, place: Ref) -> None:
    """Out, NaN in rows that are odd."""
    for part, x in zip(_parts(tile), total, strict=True):
        x = jnp.where(lax.broadcast_in_dim(odd, x.shape, [0]), jnp.nan, x)
        part[...] = x.astype(tile.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(tile, place)
    plgpu.wait_smem_to_gmem(0)


def _scaled(form: Form, total: Ref) -> list[Array]:
    return [plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False) * form.scale for part in _parts(total)]


def _queries(form: Form, place: tuple[Array, ...], arrays: list[Ref], scoped: tuple[Ref, ...]) -> None:
    """dq of a tile."""
    b, h, h_kv, first, _ = place
    *tiles_, q_full, kv_full = scoped
    tiles, rows = _Tiles(*tiles_), Rows(*arrays[:5])
    k, v, dq, _, _, norm = arrays[5:]
    here = (b, h, pl.ds(first, BLOCK))
    r, l2 = _fetch_rows(rows, None, tiles, here, q_full)
    end = jnp.int32(form.key_length)
    if form.offset is not None:
        end = jnp.clip(first + (BLOCK + form.offset), 0, end)
    number = lax.div(end + (BLOCK - 1), BLOCK)

    def fetch(index: Array) -> Array:
        start = index * BLOCK
        _fetch_keys(k, v, tiles, (b, h_kv, pl.ds(start, BLOCK)), kv_full)
        return start

    _fill(tiles.total, 0.0)
    _fill(tiles.norm, -jnp.inf)
    nothing = plgpu.layout_cast(jnp.zeros((BLOCK,), jnp.float32), _ROWS)
    sums = lax.fori_loop(0, number, lambda i, x: _add_norms(form, tiles, l2, x, first, fetch(i), end), nothing)
    _finish_norms(tiles, sums, norm.at[here])
    _fill(tiles.total, 0.0)

    @pl.loop(0, number)
    def _(index: Array) -> None:
        start = fetch(index)
        _cotangents(form, tiles, _all_values(form, tiles.v), r, l2, first, start, ())
        _add(tiles.total, tiles.ds, tiles.k)

    odd = (l2 >= ODD) & (l2 < jnp.inf)
    _finish(_scaled(form, tiles.total), odd, tiles.q, dq.at[here])


def _keys(
    group: int, number: int, form: Form, place: tuple[Array, ...], arrays: list[Ref], scoped: tuple[Ref, ...]
) -> None:
    """dk and dv of a tile."""
    b, _, h_kv, start, reach = place
    *tiles_, q_full, kv_full = scoped
    tiles, rows = _Tiles(*tiles_), Rows(*arrays[:5])
    k, v, _, dk, dv, norm = arrays[5:]
    keys = (b, h_kv, pl.ds(start, BLOCK))
    _fetch_keys(k, v, tiles, keys, kv_full)
    values = _all_values(form, tiles.v)
    _fill(tiles.total, 0.0)
    since = jnp.int32(0) if form.offset is None else lax.div(jnp.clip(start - form.offset, 0, number * BLOCK), BLOCK)
    each = number - since

    def one(index: Array, total: tuple[Array, ...]) -> tuple[Array, ...]:
        member = lax.div(index, each)
        first = (since + index - member * each) * BLOCK
        r, l2 = _fetch_rows(rows, norm, tiles, (b, h_kv * group + member, pl.ds(first, BLOCK)), q_full)
        total = _cotangents(form, tiles, values, r, l2, first, start, total)
        _add(tiles.total, tiles.ds.transpose((1, 0)), tiles.q)
        return total

    shares = lax.fori_loop(0, each * group, one, _zeros(len(values)))
    odd = plgpu.broadcasted_iota(jnp.int32, (BLOCK,), 0, layout=_ROWS) < reach - start
    _finish(_scaled(form, tiles.total), odd, tiles.k, dk.at[keys])
    _finish(list(shares), odd, tiles.v, dv.at[keys])
