"""Tile sizes of the Triton kernels, in one small table; nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

VALUE_BLOCK = 64
ROWS = 128  # no tile has more queries


class Tile(NamedTuple):
    """How a kernel is cut and launched."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False  # where the hardware has it


def forward_tile(dtype: torch.dtype, head_dim: int, value_dim: int) -> Tile:
    """Of the forward kernel; widths are those of the tiles."""
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2) if width <= 64 else Tile(32, 32, 4, 2)
    if width <= 64:
        return Tile(128, 64, 4, 3, True)
    return Tile(128, 128, 8, 2, True) if width <= 128 else Tile(128, 64, 8, 2, True)


def backward_tiles(dtype: torch.dtype, head_dim: int, value_dim: int) -> tuple[Tile, Tile]:
    """Of the kernels that walk over queries (dk, dv) and over keys (dq)."""
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        if width <= 64:
            return Tile(32, 64, 4, 1), Tile(64, 32, 4, 1)
        return (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)) if width <= 128 else (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
    if width <= 64:
        return Tile(64, 128, 4, 2, True), Tile(128, 64, 4, 2, True)
    if width <= 128:
        return Tile(64, 128, 8, 2, True), Tile(128, 64, 8, 2, True)
    return Tile(32, 64, 8, 1, True), Tile(64, 32, 8, 1, True)
