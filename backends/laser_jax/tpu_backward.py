"""Device code for TPUs: the flash backward on (X, G), in two kernels, so that every sum has one order.

With ``ds = p ∘ (X·Gᵀ + r)`` transposed as in ``tpu_forward``, one kernel walks over the queries of a key tile and sums
``dk = ds·q`` and ``p·G``; the other walks over the keys of a query tile and sums ``dq = dsᵀ·k``.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.experimental import pallas as pl

from .tpu_forward import _NN, _NT, _TN, Array, Ref, Tile, product, scores, walk


def _through(tile: Tile, refs: tuple[Ref, ...], seen: Array | None) -> tuple[Array, Array]:
    """p and the gradient of the scores before the cap, ``(block_k, block_q)``."""
    q, k, x, g, l2, r = (ref[...] for ref in refs)
    s, slope = scores(tile, q, k, seen)
    p = jnp.exp2(s - l2)
    ds = p * (product(x, g, _NT) + r)
    return p, ds if slope is None else ds * slope


def backward_keys(tile: Tile, *refs: Ref, shared: bool) -> None:
    """dk and pᵀG of a tile of keys.

    Grid: batch …, Hkv, key tiles, group, query tiles. In: lengths, q ``(block_q, D)``, k ``(block_k, D)``,
    X ``(block_k, W)``, G ``(block_q, W)``, lse in base 2 and r ``(1, block_q)``, mask ``(block_k, block_q)``. Out and
    scratch: dk ``(block_k, D)``, summed over the group; pᵀG ``(block_k, W)``, summed if the group has ``shared`` X.
    """
    lengths, refs = (refs[0], refs[1:]) if tile.lengths else (None, refs)
    operands, others = refs[:6], refs[6:]
    mask, (dk_ref, pg_ref, dk_sum, pg_sum) = (others[0], others[1:]) if tile.mask else (None, others)
    at = tuple(pl.program_id(axis) for axis in range(len(tile.batch)))
    j, member, i = (pl.program_id(len(tile.batch) + axis) for axis in (1, 2, 3))
    last_member, last = (pl.num_programs(len(tile.batch) + axis) - 1 for axis in (2, 3))
    first_of_group, last_of_group = (member == 0) & (i == 0), (member == last_member) & (i == last)

    @pl.when(first_of_group)
    def start() -> None:
        dk_sum[...] = jnp.zeros_like(dk_sum)

    @pl.when(first_of_group if shared else i == 0)
    def start_values() -> None:
        pg_sum[...] = jnp.zeros_like(pg_sum)

    def step(seen: Array | None) -> None:
        p, ds = _through(tile, operands, seen)
        q, g = operands[0][...], operands[3][...]
        pg_sum[...] += product(p.astype(g.dtype), g, _NN)
        dk_sum[...] += product(ds.astype(q.dtype), q, _NN)

    walk(tile, lengths, mask, at, i, j, step)

    @pl.when(last_of_group)
    def finish() -> None:
        dk_ref[...] = dk_sum[...]

    @pl.when(last_of_group if shared else i == last)
    def finish_values() -> None:
        pg_ref[...] = pg_sum[...]


def backward_queries(tile: Tile, *refs: Ref) -> None:
    """dq of a tile of queries, transposed.

    Grid: batch …, Hkv, group, query tiles, key tiles. In: as ``backward_keys``. Out and scratch: dq ``(D, block_q)``.
    """
    lengths, refs = (refs[0], refs[1:]) if tile.lengths else (None, refs)
    operands, others = refs[:6], refs[6:]
    mask, (dq_ref, dq_sum) = (others[0], others[1:]) if tile.mask else (None, others)
    at = tuple(pl.program_id(axis) for axis in range(len(tile.batch)))
    i, j = pl.program_id(len(tile.batch) + 2), pl.program_id(len(tile.batch) + 3)

    @pl.when(j == 0)
    def start() -> None:
        dq_sum[...] = jnp.zeros_like(dq_sum)

    def step(seen: Array | None) -> None:
        _, ds = _through(tile, operands, seen)
        k = operands[1][...]
        dq_sum[...] += product(k, ds.astype(k.dtype), _TN)

    walk(tile, lengths, mask, at, i, j, step)

    @pl.when(j == pl.num_programs(len(tile.batch) + 3) - 1)
    def finish() -> None:
        dq_ref[...] = dq_sum[...]
