"""Launches that are prepared once: a kernel with all of its arguments but the arrays, and tiles of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from . import driver

ALIGNMENT = 16  # bytes, of what the hardware copies by itself and of what compiled kernels rely on


class Launch:
    """A kernel and all of its arguments but the arrays, which come first.

    The first call goes through Triton's own path, which compiles the kernel for these arguments. Later ones give the
    compiled kernel its arrays, which must be the same but for where they begin, each a multiple of 16 bytes or not as
    in the first call.
    """

    def __init__(  # noqa: D107
        self, function: Any, programs: int | tuple[int, int], scalars: Sequence[Any], **constants: Any
    ) -> None:
        grid = programs if isinstance(programs, tuple) else (programs, 1)
        self._function, self._grid = function, (*grid, 1)
        self._scalars, self._constants = tuple(scalars), constants
        self._kernel: Any = None
        self._rest: tuple[Any, ...] = ()
        self._direct: driver.Arguments | None = None
        self._untried = True

    def __call__(self, *arrays: Any) -> None:
        """Launch on the current stream of the current device."""
        if self._direct is not None and self._direct.launch(arrays):
            return
        described = [x.described() if isinstance(x, driver.Placed) else x for x in arrays]
        if self._kernel is not None:
            self._kernel[self._grid](*described, *self._rest)
            if self._untried:  # it is worth it: there was a second call
                self._untried = False
                self._direct = driver.arguments(self._kernel, self._grid, (*arrays, *self._rest), len(arrays))
            return
        kernel = self._function[self._grid](*described, *self._scalars, **self._constants)
        if hasattr(kernel, "packed_metadata"):  # compiled: not interpreted
            names = self._function.arg_names[len(arrays) + len(self._scalars) :]
            self._rest = (*self._scalars, *(self._constants[name] for name in names))
            self._kernel = kernel


class Tiles:
    """How the hardware cuts an array into tiles: a descriptor of it, but for where it begins."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:  # noqa: D107
        self._make = make

    def of(self, x: Tensor) -> driver.Placed:
        """The descriptor of an array of the shape and strides that this was made for."""
        return driver.Placed(x, lambda: self._make(x))


def fits(shape: Sequence[int], strides: Sequence[int], aligned: bool, size: int) -> bool:
    """Whether the hardware can copy tiles of an array (B, H, L, D) of elements of that size as it lies."""
    lies = all(n == 1 or (s > 0 and s * size % ALIGNMENT == 0) for n, s in zip(shape[:-1], strides, strict=False))
    return aligned and lies and strides[-1] == 1 and shape[-1] * size % ALIGNMENT == 0


def strides_of(x: Tensor) -> list[int]:
    """Strides as the hardware takes them: of an axis of one element it wants to hear nothing odd."""
    return [x.shape[-1] if n == 1 else s for n, s in zip(x.shape[:-1], x.stride(), strict=False)] + [1]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which this device is the current one."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)
