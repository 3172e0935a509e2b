"""The end of a tile of queries in the forward kernel (Mosaic GPU): from sums of p·x to outputs.

    o_ie = (log Σ_j p_ij x_je − log Σ_j p_ij + c_e·ln2)/β          l_i = log Σ_j exp(s_ij)

Device code only, in JAX 0.11 or later.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from .mosaic_values import split

if TYPE_CHECKING:
    from .mosaic_forward import Form, _State, _Tiles
    from .mosaic_order import Place

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


def _log_parts(a: Array) -> tuple[Array, Array]:
    """n + 2^23 + 127 and log2 of the mantissa, for normal numbers > 0 of exponent n: a power of two changes only n."""
    bits = lax.bitcast_convert_type(a, jnp.int32)
    mantissa = lax.bitcast_convert_type((bits & 0x007FFFFF) | 0x3F800000, jnp.float32)
    whole = lax.shift_right_logical(bits, 23) + 0x4B000000  # the bits of 2^23: what is added to them, is added to it
    return lax.bitcast_convert_type(whole, jnp.float32), lax.log2(mantissa)


def of_channels(ref: Ref, place: Place, shape: tuple[int, ...], *at: Array | int) -> Array:
    """What is known of the channels of a tile's head, in all rows of a tile."""
    place_of = ref.at[place.batch, place.kv_head, *at]
    loaded = plgpu.load(place_of, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)
    return lax.broadcast_in_dim(loaded, shape, [1])


def store(
    form: Form, place: Place, first: Array, state: _State, tiles: _Tiles, known: list[Ref], ends: list[Array],
    results: list[Ref],
) -> None:  # fmt: skip
    """The end of a tile of queries: the logarithms, and out. ``ends``: c, and the greatest −βv and βv."""
    shape = state.o.shape
    sees = state.l > 0
    log_l = lax.log2(jnp.where(sees, state.l, 1.0))
    v_ref = known[0]

    def within_seen(o: Array) -> Array:
        last = plgpu.broadcasted_iota(jnp.int32, log_l.shape, 0, layout=plgpu.Layout.WGMMA.reduce(1))
        last = last + (first + (form.offset or 0))
        number = min(form.few - 1, form.key_length)

        def three(i: Array, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            least, greatest = ends  # in the dtype of v, two to a register
            for t in range(3):  # more at a time would not fit the registers
                j = jnp.minimum(i * 3 + t, number - 1)
                v, sees = of_channels(v_ref, place, shape, j), lax.broadcast_in_dim(last >= j, shape, [0])
                least = jnp.where(sees, jnp.minimum(least, v), least)
                greatest = jnp.where(sees, jnp.maximum(greatest, v), greatest)
            return least, greatest

        least, greatest = (
            plgpu.layout_cast(jnp.full(shape, start, v_ref.dtype), plgpu.Layout.WGMMA) for start in (jnp.inf, -jnp.inf)
        )
        ends = lax.fori_loop(0, pl.cdiv(number, 3), three, (least, greatest))
        low, high = (x.astype(jnp.float32) * form.beta for x in (ends if form.beta > 0 else ends[::-1]))
        if form.key_length >= form.few:
            few = lax.broadcast_in_dim(last < form.few - 1, shape, [0])
            low, high = jnp.where(few, low, -jnp.inf), jnp.where(few, high, jnp.inf)
        return jnp.minimum(jnp.maximum(o, low), high)

    whole, part = _log_parts(state.o)
    part = part - lax.broadcast_in_dim(jnp.where(sees, log_l, jnp.nan), shape, [0])  # NaN without a weight
    o = (whole + (ends[0] - (2.0**23 + 127)) + part) * _LN2
    # rounded X can lead out of the range of the values, of a mean of many seldom; no hidden value has a say in it
    if form.offset is None:
        o = jnp.minimum(jnp.maximum(o, -ends[1]), ends[2])
    elif form.key_length < form.few:
        o = within_seen(o)
    else:
        o = lax.cond(first + form.offset < form.few - 1, within_seen, lambda o: o, o)
    o = o * (1 / form.beta)
    l = (state.m * (form.scale * _LOG2E) + (log_l - form.shift)) * _LN2
    # a row without a weight sees nothing, or nothing that is finite
    if form.offset is None or form.offset >= 0:
        l = jnp.where(sees, l, jnp.nan)
    else:
        row = plgpu.broadcasted_iota(jnp.int32, l.shape, 0, layout=plgpu.Layout.WGMMA.reduce(1))
        blind = row < -form.offset - first
        o = jnp.where(lax.broadcast_in_dim(blind, shape, [0]), 0.0, o)
        l = jnp.where(sees, l, jnp.where(blind, -jnp.inf, jnp.nan))
    rounded, rest = split(o, tiles.o.dtype) if form.keeps else (o.astype(tiles.o.dtype), None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
    tiles.l[...] = l
    tiles.odd[...] = state.odd
    tiles.o[...] = rounded
    if rest is not None:
        tiles.rest[...] = rest.astype(jnp.int8)
    plgpu.commit_smem()
    at = (place.batch, place.head, pl.ds(first, shape[0]))
    for tile, ref in zip((tiles.o, tiles.l, tiles.rest), results, strict=False):
        plgpu.copy_smem_to_gmem(tile, ref.at[at])
