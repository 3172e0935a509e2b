"""Launches that are prepared once: a kernel with all of its arguments but the arrays, and tiles of arrays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes, of what the hardware copies by itself and of what compiled kernels rely on


class Launch:
    """A kernel and all of its arguments but the arrays, which come first.

    The first call goes through Triton's own path, which compiles the kernel for these arguments. Later ones give the
    arguments to the compiled kernel, and so must have arrays that are the same but for where they begin, each a
    multiple of 16 bytes or not as in the first call.
    """

    def __init__(self, function: Any, programs: int, scalars: Sequence[Any], **constants: Any) -> None:  # noqa: D107
        self._function, self._grid = function, (programs, 1, 1)
        self._scalars, self._constants = tuple(scalars), constants
        self._kernel: Any = None
        self._rest: tuple[Any, ...] = ()

    def __call__(self, *arrays: Any) -> None:
        """Launch on the current stream of the current device."""
        if self._kernel is not None:
            self._kernel[self._grid](*arrays, *self._rest)
            return
        kernel = self._function[self._grid](*arrays, *self._scalars, **self._constants)
        if hasattr(kernel, "packed_metadata"):  # compiled: not interpreted
            names = self._function.arg_names[len(arrays) + len(self._scalars) :]
            self._rest = (*self._scalars, *(self._constants[name] for name in names))
            self._kernel = kernel


class Tiles:
    """How the hardware cuts an array into tiles: a descriptor of it, but for where it begins."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:  # noqa: D107
        self._make = make
        self._found: Any = None

    def of(self, x: Tensor) -> Any:
        """The descriptor of an array of the shape and strides that this was made for."""
        if self._found is None:
            self._found = self._make(x)  # this one is checked
            self._found.base = None
        descriptor = object.__new__(type(self._found))
        descriptor.__dict__.update(self._found.__dict__, base=x)
        return descriptor


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
