"""The order in which the forward kernel (Mosaic GPU) works on tiles of queries.

Device code only, in JAX 0.11 or later.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

Array: TypeAlias = jax.Array

FEW = 6  # the first tile of queries, some of which see few keys, takes as long as one of so many tiles of keys
SPAN = 4  # tiles that a block takes of heads that are worked on together


class Place(NamedTuple):
    """A tile of queries."""

    batch: Array
    head: Array
    kv_head: Array
    first: Array  # query row
    total: Array  # key tiles seen by some row of the block; at least one is worked on
    full: Array  # of these, the first so many need no mask
    asks: Array  # whether it sees all keys that any query of the head sees, and looks for what is not finite


class Work(NamedTuple):
    """All tiles of queries, in an order, and which of them are a block's."""

    processors: int
    rows: int  # of a tile
    block_k: int
    key_length: int
    offset: int | None  # query i sees the keys ≤ i + offset; None: all
    everything: int  # heads of all batch entries
    heads: int
    group: int
    q_tiles: int

    @property
    def blocks(self) -> int:
        """Of the grid."""
        return min(self.processors, self.everything * self.q_tiles)

    @property
    def section(self) -> int:
        """Heads that are worked on together: few enough for the L2 cache."""
        return min(self.everything, max(1, SPAN * self.blocks // self.q_tiles))

    def _rounds(self, tiles: int) -> Array:
        """How many of so many tiles are this block's, in rounds from the first block to the last and back."""
        own, rounds = lax.axis_index("block"), tiles // self.blocks
        place = self.blocks - 1 - own if rounds % 2 else own
        return rounds + (place < tiles % self.blocks).astype(jnp.int32)

    def turns(self) -> Array:
        """How many tiles this block works on."""
        if self.offset is None:
            return lax.div(self.everything * self.q_tiles - lax.axis_index("block") + (self.blocks - 1), self.blocks)
        sections, last = divmod(self.everything, self.section)
        return sections * self._rounds(self.section * self.q_tiles) + self._rounds(last * self.q_tiles)

    def place(self, turn: Array) -> Place:
        """The tile of a turn: those that see many keys first, among heads whose keys are in the L2 cache."""
        own = lax.axis_index("block")
        if self.offset is None:
            index = own + self.blocks * turn
            head, tile = lax.div(index, self.q_tiles), lax.rem(index, self.q_tiles)
        else:
            rounds = jnp.maximum(self._rounds(self.section * self.q_tiles), 1)
            sections, last = divmod(self.everything, self.section)
            section = jnp.minimum(lax.div(turn, rounds), sections)
            turn = turn - section * rounds
            index = turn * self.blocks + jnp.where(lax.rem(turn, 2) == 0, own, self.blocks - 1 - own)
            heads = jnp.where(section < sections, self.section, last) if last else jnp.int32(self.section)
            head = section * self.section + lax.rem(index, heads)
            rank = lax.div(index, heads)
            tile = self.q_tiles - 1 - rank
            if self.offset == 0:
                early = max(0, self.q_tiles - FEW)
                tile = jnp.where(rank == early, 0, jnp.where(rank > early, tile + 1, tile))
        first, block = tile * self.rows, self.block_k
        total, full = jnp.int32(pl.cdiv(self.key_length, block)), jnp.int32(self.key_length // block)
        if self.offset is not None:
            end = first + (self.rows + self.offset)  # one beyond what the last row sees
            total = jnp.maximum(jnp.minimum(total, lax.div(jnp.maximum(end, 0) + (block - 1), block)), 1)
            full = jnp.minimum(full, lax.div(jnp.maximum(first + self.offset + 1, 0), block))
        b, h = lax.div(head, self.heads), lax.rem(head, self.heads)
        return Place(b, h, lax.div(h, self.group), first, total, full, tile == self.q_tiles - 1)
