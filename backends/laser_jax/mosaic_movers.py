"""The warps of the backward kernel in Mosaic GPU that move data: one brings tiles of queries, one adds up dq.

The parts of dq are added in global memory by the copy engine, in turn from the first block of keys to the last, which
takes the sum so far instead, adds to it and gives dq rounded. So sums are kept of two sections of heads alone, used by
turns: the first block of a head waits until the head two sections before it is done with. Device code only.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

Array: TypeAlias = jax.Array
Ref: TypeAlias = Any

WARPGROUPS = 2  # that compute; each owns 64 keys
BLOCK_K = 64 * WARPGROUPS
STAGES = 2  # of q and g in shared memory
NUMBERS = 4  # stages of l: that of a tile is asked for when the next but one may have come
SECTIONS = 2  # of heads that have room for sums


class Walk(NamedTuple):
    """The sizes of a problem in whole tiles, and the queries that see a block of keys."""

    group: int
    tiles: int  # of queries
    blocks: int  # of keys
    block_q: int
    span: int  # heads in turn, a section
    key_length: int  # without padding
    causal_offset: int | None

    def first(self, n0: Array) -> Array:
        """The first tile that sees some of the keys from n0 on."""
        if self.causal_offset is None:
            return 0 * n0
        first = jnp.clip(lax.div(n0 - self.causal_offset, self.block_q), 0, self.tiles)
        seen: Array = jnp.where(n0 == 0, 0, first)  # the first keys give every tile of dq a value, seen or not
        return seen

    def closing(self, tile: Array) -> Array:
        """The last block of keys that a tile of a head sees some of, or the first."""
        if self.causal_offset is None:
            return 0 * tile + (self.blocks - 1)
        last = lax.div(jnp.maximum(tile * self.block_q + (self.block_q - 1 + self.causal_offset), 0), BLOCK_K)
        found: Array = jnp.minimum(last, self.blocks - 1)
        return found


class Place(NamedTuple):
    """What a program has to do."""

    walk: Walk
    section: Array
    head: Array  # within the section
    block: Array  # of keys
    each: Array  # tiles of each query head of the group

    @property
    def heads_kv(self) -> Array:
        """Among the heads of keys of all batches."""
        return self.section * self.walk.span + self.head

    def tile(self, step: Array) -> tuple[Array, Array]:
        """The tile of a step: among those of the group, and of its head."""
        member = lax.div(step, jnp.maximum(self.each, 1))
        tile = self.walk.tiles - 1 - (step - member * self.each)
        return member * self.walk.tiles + tile, tile


class Shared(NamedTuple):
    """Shared memory, and what says that it is filled or free."""

    q: Ref
    g: Ref
    r: Ref
    l: Ref
    dq: Ref  # (warpgroups, 64, 64), float32
    rounded: Ref
    q_full: Ref
    g_full: Ref
    empty: Ref
    dq_full: Ref
    dq_empty: Ref
    fetched: Ref


def bring(place: Place, q: Ref, g: Ref, r: Ref, l2: Ref, shared: Shared) -> None:
    """The tiles of queries, and one more for scores that are begun and not used."""
    walk, total = place.walk, place.each * place.walk.group

    @pl.loop(0, total + 1)
    def _tile(step: Array) -> None:
        slot = lax.rem(step, jnp.int32(STAGES))

        @pl.when(step >= STAGES)
        def _() -> None:
            plgpu.barrier_wait(shared.empty.at[slot])

        tile = place.tile(jnp.clip(step, 0, jnp.maximum(total - 1, 0)))[0]
        rows = pl.ds((place.heads_kv * (walk.group * walk.tiles) + tile) * walk.block_q, walk.block_q)
        plgpu.copy_gmem_to_smem(q.at[rows], shared.q.at[slot], shared.q_full.at[slot])
        plgpu.copy_gmem_to_smem(l2.at[rows], shared.l.at[lax.rem(step, jnp.int32(NUMBERS))], shared.q_full.at[slot])

        @pl.when(step < total)
        def _() -> None:
            plgpu.copy_gmem_to_smem(g.at[rows], shared.g.at[slot], shared.g_full.at[slot])
            plgpu.copy_gmem_to_smem(r.at[rows], shared.r.at[slot], shared.g_full.at[slot])

    @pl.loop(jnp.maximum(total + 1 - STAGES, 0), total + 1)
    def _drain(step: Array) -> None:
        plgpu.barrier_wait(shared.empty.at[lax.rem(step, jnp.int32(STAGES))])


def add(place: Place, sums: Ref, dq: Ref, turns: Ref | None, shared: Shared, part: int) -> None:
    """What one of the warpgroups has of dq; without turns, each block of keys has room of its own for its sums."""
    walk, block = place.walk, place.block
    tiles, width, total = walk.group * walk.tiles, dq.shape[1], place.each * walk.group
    first = place.heads_kv * tiles
    room: Array = block * (dq.shape[0] // walk.block_q) + first
    if turns is not None:
        room = (lax.rem(place.section, jnp.int32(SECTIONS)) * walk.span + place.head) * tiles
    mine, full, empty = shared.dq.at[part], shared.dq_full.at[part], shared.dq_empty.at[part]

    def of(ref: Ref, tile: Array) -> Ref:
        """What the warpgroup has of a tile."""
        row = tile * walk.block_q
        return ref.at[pl.ds(row + part * 64, 64)] if width == 64 else ref.at[pl.ds(row, 64), pl.ds(part * 64, 64)]

    def wait(tile: Array, count: Array) -> None:
        assert turns is not None
        plgpu.semaphore_wait(turns.at[2 * tile + part], count, decrement=False, memory_scope="gpu")

    def later(step: Array) -> Array:
        """How many blocks of keys add to dq after this one."""
        return walk.closing(place.tile(step)[1]) - block

    def offer(step: Array) -> None:
        """The room for what a step adds to dq, or with the sum so far if nothing is added after it."""
        if turns is not None:

            @pl.when((later(step) == 0) & (block > 0) & (step < total))
            def _fetch() -> None:
                tile, _ = place.tile(step)
                wait(first + tile, block)
                plgpu.copy_gmem_to_smem(of(sums, room + tile), mine, shared.fetched.at[part])
                plgpu.barrier_wait(shared.fetched.at[part])

        plgpu.barrier_arrive(empty)

    plgpu.barrier_arrive(empty)
    plgpu.barrier_wait(full)  # of no tile
    offer(jnp.int32(0))

    @pl.loop(0, total)
    def _tile(step: Array) -> None:
        tile, within = place.tile(step)
        last = walk.closing(within)
        plgpu.barrier_wait(full)
        if turns is None:
            plgpu.copy_smem_to_gmem(mine, of(sums, room + tile))
            plgpu.wait_smem_to_gmem(0)
            plgpu.barrier_arrive(empty)
            return

        @pl.when(block == last)
        def _close() -> None:
            plgpu.copy_smem_to_gmem(shared.rounded.at[part], of(dq, first + tile))

        @pl.when((block == 0) & (last > 0))
        def _open() -> None:
            @pl.when(place.section >= SECTIONS)
            def _() -> None:
                wait(first + tile - SECTIONS * walk.span * tiles, last + 1)

            plgpu.copy_smem_to_gmem(mine, of(sums, room + tile))

        @pl.when((block > 0) & (block < last))
        def _next() -> None:
            wait(first + tile, block)
            plgpu.copy_smem_to_gmem(mine, of(sums, room + tile), reduction_op="add")

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        following = later(step + 1)

        @pl.when((following != 0) | (block == 0))
        def _() -> None:
            plgpu.barrier_arrive(empty)

        plgpu.wait_smem_to_gmem(0)
        plgpu.semaphore_signal(turns.at[2 * (first + tile) + part], 1, memory_scope="gpu")

        @pl.when((following == 0) & (block > 0))
        def _() -> None:
            offer(step + 1)
