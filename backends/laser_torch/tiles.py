"""Tile sizes of the Triton kernels, in one small table; nothing is tuned at run time."""

from __future__ import annotations

from typing import NamedTuple

import torch

ROWS = 128  # no tile has more queries


class Tile(NamedTuple):
    """How a kernel is cut and launched."""

    block_q: int
    block_k: int
    warps: int
    stages: int
    tma: bool = False  # by descriptors, where the hardware copies tiles by itself


def row_block(width: int) -> int:
    """Keys or queries per block of the small kernels: 16 elements a thread of eight warps."""
    return min(ROWS, 4096 // width)


def is_large(device: torch.device) -> bool:
    """Whether the tiles of NVIDIA's data centre cards from Hopper on fit; the others have 99 KiB a block, or 64 KiB.

    A CPU, where Triton is interpreted, has any size.
    """
    if device.type != "cuda":
        return True
    return torch.version.hip is None and torch.cuda.get_device_capability(device)[0] in (9, 10)


def forward_tile(dtype: torch.dtype, head_dim: int, value_dim: int, large: bool) -> Tile:
    """Of the forward kernel; widths are those of the tiles."""
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        return Tile(64, 32, 4, 2) if width <= 64 else Tile(32, 32, 4, 2) if width <= 128 else Tile(16, 32, 4, 1)
    if width <= 64:
        return Tile(64, 64, 4, 3, True)
    if not large:
        return Tile(64, 64, 4, 2) if width <= 128 else Tile(32, 32, 4, 2)
    return Tile(128, 64, 8, 3, True) if width <= 128 else Tile(128, 64, 8, 2, True)


def backward_tiles(dtype: torch.dtype, head_dim: int, value_dim: int, large: bool) -> tuple[Tile, Tile]:
    """Of the kernels that walk over queries (dk, dv) and over keys (dq)."""
    width = max(head_dim, value_dim)
    if dtype == torch.float32:
        if width <= 64:
            return Tile(32, 32, 4, 1), Tile(32, 32, 4, 1)
        return (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1)) if width <= 128 else (Tile(16, 16, 4, 1), Tile(16, 16, 4, 1))
    if width <= 64:
        return Tile(64, 64, 4, 2, True), Tile(64, 64, 4, 3 if large else 2, True)
    if width <= 128:
        return (
            (Tile(64, 64, 4, 2, True), Tile(128, 64, 8, 3, True)) if large else (Tile(32, 64, 8, 2), Tile(64, 64, 8, 2))
        )
    return (Tile(32, 64, 8, 1, True), Tile(64, 32, 8, 1, True)) if large else (Tile(16, 32, 4, 1), Tile(32, 16, 4, 1))
