"""The end of a tile of queries in the forward kernel (Mosaic GPU): from sums of p·x to outputs.

    o_ie = (log Σ_j p_ij x_je − log Σ_j p_ij + c_e·ln2)/β          l_i = log Σ_j exp(s_ij)

Device code only, in JAX 0.11 or later.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_values import split

if TYPE_CHECKING:
    from .mosaic_forward import Form, _Place, _State, _Tiles

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


def _log_parts(a: Array) -> tuple[Array, Array]:
    """log2 of a normal number > 0 as an integer and the rest: a power of two changes only the integer."""
    bits = lax.bitcast_convert_type(a, jnp.int32)
    mantissa = lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F800000, jnp.float32)
    return (lax.shift_right_logical(bits, 23) - 127).astype(jnp.float32), lax.log2(mantissa)


def store(
    form: Form, place: _Place, first: Array, state: _State, tiles: _Tiles, known: list[Ref], results: list[Ref]
) -> None:
    """The end of a tile of queries: the logarithms, and out."""
    shape = state.o.shape
    sees = state.l > 0
    l = jnp.where(sees, state.l, 1.0)
    l_whole, l_rest = _log_parts(l)

    v_ref, c_ref, low_ref, high_ref = known

    def of_channels(ref: Ref, *at: Array) -> Array:
        place_of = ref.at[place.batch, place.kv_head, *at]
        loaded = plgpu.load(place_of, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
        return lax.broadcast_in_dim(loaded.astype(jnp.float32), shape, [1])

    def within_seen(o: Array) -> Array:
        last = plgpu.broadcasted_iota(jnp.int32, l.shape, 0, layout=plgpu.Layout.WGMMA.reduce(1))
        last = last + (first + (form.offset or 0))
        for better, bound, start in ((jnp.minimum, jnp.maximum, jnp.inf), (jnp.maximum, jnp.minimum, -jnp.inf)):
            number = min(form.few - 1, form.key_length)

            def three(i: Array, end: Array, better: Callable[..., Array] = better, number: int = number) -> Array:
                for t in range(3):  # more at a time would not fit the registers
                    j = jnp.minimum(i * 3 + t, number - 1)
                    seen = better(end, of_channels(v_ref, j) * form.beta)
                    end = jnp.where(lax.broadcast_in_dim(last >= j, shape, [0]), seen, end)
                return end

            end = plgpu.layout_cast(jnp.full(shape, start, jnp.float32), plgpu.Layout.WGMMA)
            end = lax.fori_loop(0, pl.cdiv(number, 3), three, end)
            if form.key_length >= form.few:
                end = jnp.where(lax.broadcast_in_dim(last < form.few - 1, shape, [0]), end, o)
            o = bound(o, end)
        return o

    whole, rest = _log_parts(state.o)
    whole = whole - lax.broadcast_in_dim(l_whole, shape, [0]) + of_channels(c_ref)
    rest = rest - lax.broadcast_in_dim(l_rest, shape, [0])
    o = (whole + rest) * _LN2
    # rounded X can lead out of the range of the values, of a mean of many seldom; no hidden value has a say in it
    if form.offset is None:
        o = jnp.minimum(jnp.maximum(o, of_channels(low_ref)), of_channels(high_ref))
    elif form.key_length < form.few:
        o = within_seen(o)
    else:
        o = lax.cond(first + form.offset < form.few - 1, within_seen, lambda o: o, o)
    o = o * (1 / form.beta)
    l = (state.m * (form.scale * _LOG2E) + (l_whole - form.shift + l_rest)) * _LN2
    # a row without a weight sees nothing, or nothing that is finite
    row = plgpu.broadcasted_iota(jnp.int32, l.shape, 0, layout=plgpu.Layout.WGMMA.reduce(1))
    blind = row < (0 if form.offset is None else -form.offset - first)
    o = jnp.where(
        lax.broadcast_in_dim(sees, shape, [0]), o, lax.broadcast_in_dim(jnp.where(blind, 0.0, jnp.nan), shape, [0])
    )
    l = jnp.where(sees, l, jnp.where(blind, -jnp.inf, jnp.nan))
    rounded, rest = split(o, tiles.o.dtype)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    tiles.l[...] = l
    tiles.odd[...] = state.odd
    tiles.o[...] = rounded
    if form.keeps:
        tiles.rest[...] = rest.astype(jnp.int8)
    plgpu.commit_smem()
    at = (place.batch, place.head, pl.ds(first, shape[0]))
    for tile, ref in zip((tiles.o, tiles.l, tiles.rest), results, strict=False):
        plgpu.copy_smem_to_gmem(tile, ref.at[at])
