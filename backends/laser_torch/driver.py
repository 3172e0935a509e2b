"""Launches by the CUDA driver itself: the arguments of a kernel are laid out in memory once, and only addresses change.

Triton's launcher goes through every argument at every call, and encodes every tile descriptor anew.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FORMATS = {"i1": "?", "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u32": "I", "u64": "Q", "fp32": "f", "fp64": "d"}
_MAP = 128  # bytes of a tile descriptor, and what it wants its address to be a multiple of


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("pad", ctypes.c_int), ("value", ctypes.c_int), ("rest", ctypes.c_int * 15))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )


_COOPERATIVE, _OVERLAPPING = 2, 6  # CUlaunchAttributeID: all programs at a time; begun while the kernel before ends


class Placed(NamedTuple):
    """An array as an argument that is a tile descriptor: ``described()`` is what Triton takes for it."""

    array: Tensor
    described: Any


class Arguments:
    """Of a compiled kernel: what is given with each call is where its arrays are."""

    def __init__(self, cuda: Any, kernel: Any, grid: tuple[int, int, int], given: Sequence[Any], arrays: int) -> None:
        """Lay them out.

        Args:
            cuda: The driver's library.
            kernel: As Triton has compiled and loaded it.
            grid: Programs along its three axes.
            given: All arguments of a launch, compile-time ones included.
            arrays: How many of them come anew with each call: the first ones.

        Raises:
            LookupError: Something that is not known here, or other arguments than the kernel has.
        """
        self._cuda, self._lock = cuda, threading.Lock()
        self._pointers: list[int] = []  # arguments that are addresses
        self._maps: list[tuple[int, int]] = []  # arguments that are tiles, and where their descriptors are
        self._seen: list[int] = []  # and which addresses these have
        laid = _laid_out(kernel, given)
        pointers = [i for i, (kind, _) in laid if kind == "pointer"]
        if any(i >= arrays for i in pointers):
            raise LookupError("an array among the arguments that do not change")
        sizes = {"map": _MAP}
        end = 8 * (len(pointers) + 2)  # and two that are 0: scratch that the kernel does not ask for
        places: list[tuple[int, int]] = []  # of each parameter, and its size
        fixed: list[tuple[int, bytes]] = []
        for i, (kind, content) in laid:
            if kind == "pointer":
                places.append((8 * len(self._pointers), 8))
                self._pointers.append(i)
                continue
            size = sizes.get(kind) or len(content)
            at = -(-end // size) * size
            end = at + size
            places.append((at, size))
            fixed.append((at, content))
            if kind == "map":
                self._maps.append((i, at))
                self._seen.append(given[i].array.data_ptr())
        places += [(8 * len(pointers), 8), (8 * len(pointers) + 8, 8)]
        _check(cuda, kernel.function, [size for _, size in places])
        self._memory = ctypes.create_string_buffer(end + _MAP)
        self._base = -ctypes.addressof(self._memory) % _MAP
        start = ctypes.addressof(self._memory) + self._base
        for at, content in fixed:
            ctypes.memmove(start + at, content, len(content))
        self._maps = [(i, start + at) for i, at in self._maps]
        self._pack = struct.Struct(f"{len(pointers)}Q").pack_into
        self._parameters = (ctypes.c_void_p * len(places))(*(start + at for at, _ in places))
        warps, _, shared = kernel.packed_metadata
        about = kernel.metadata
        wanted = ((_COOPERATIVE, about.launch_cooperative_grid), (_OVERLAPPING, about.launch_pdl))
        self._attributes = (_Attribute * 2)(*(_Attribute(n, 0, 1) for n, asked in wanted if asked))
        count = sum(bool(asked) for _, asked in wanted)
        self._config = _Config(grid, (32 * warps, 1, 1), shared, None, self._attributes, count)
        self._given = (ctypes.byref(self._config), kernel.function, self._parameters, None)

    def launch(self, arrays: Sequence[Any]) -> bool:
        """Launch on the current stream of the current device; whether that went well."""
        stream = torch._C._cuda_getCurrentRawStream(torch._C._cuda_getDevice())
        with self._lock:
            for n, (i, at) in enumerate(self._maps):
                address = arrays[i].array.data_ptr()
                if address != self._seen[n]:
                    if self._cuda.cuTensorMapReplaceAddress(at, address):
                        return False
                    self._seen[n] = address
            self._pack(self._memory, self._base, *[arrays[i].data_ptr() for i in self._pointers])
            self._config.stream = stream
            return not self._cuda.cuLaunchKernelEx(*self._given)


def arguments(kernel: Any, grid: tuple[int, int, int], given: Sequence[Any], arrays: int) -> Arguments | None:
    """:class:`Arguments`, where the driver is CUDA's and all is as it is known here."""
    cuda = _library() if kernel.metadata.target.backend == "cuda" else None
    try:
        return None if cuda is None else Arguments(cuda, kernel, grid, given, arrays)
    except (LookupError, OverflowError, struct.error):
        return None


@functools.cache
def _library() -> Any:
    """The driver's library, or None where it has not what is needed."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        address = ctypes.c_void_p
        cuda.cuLaunchKernelEx.argtypes = [address] * 4
        cuda.cuTensorMapReplaceAddress.argtypes = [address, address]
        cuda.cuFuncGetParamInfo.argtypes = [address, ctypes.c_size_t, address, address]
    except (OSError, AttributeError):
        return None
    return cuda


def _laid_out(kernel: Any, given: Sequence[Any]) -> list[tuple[int, tuple[str, bytes]]]:
    """The parameters of a kernel: of which argument each is made, what it is, and the bytes of what is not an array."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    about = kernel.metadata
    if about.num_ctas != 1:
        raise LookupError("clusters")
    if about.global_scratch_size or about.profile_scratch_size:
        raise LookupError("scratch memory")
    kinds, tiles = list(kernel.src.signature.values()), iter(about.tensordesc_meta or ())
    if len(kinds) != len(given):
        raise LookupError("other arguments")
    laid: list[tuple[int, tuple[str, bytes]]] = []
    for i, (kind, x) in enumerate(zip(kinds, given, strict=True)):
        if kind == "constexpr":
            continue
        if kind.startswith("*"):
            laid.append((i, ("pointer", b"")))
        elif kind.startswith("tensordesc"):
            cut = next(tiles, None)
            if cut is None:
                raise LookupError("tiles that the hardware does not copy")
            encoded, *numbers = make_tensordesc_arg(x.described(), cut)
            laid.append((i, ("map", ctypes.string_at(id(encoded) + type(encoded).__basicsize__ - _MAP, _MAP))))
            formats = "i" * (len(numbers) // 2) + "q" * (len(numbers) // 2)  # shape and strides
            laid += [(i, ("number", struct.pack(f, n))) for f, n in zip(formats, numbers, strict=True)]
        else:
            laid.append((i, ("number", struct.pack(_FORMATS[kind], x))))
    return laid


def _check(cuda: Any, function: int, sizes: Sequence[int]) -> None:
    """Whether these are the sizes of the parameters that the kernel has."""
    offset, size = ctypes.c_size_t(), ctypes.c_size_t()
    for n in range(len(sizes) + 1):
        failed = cuda.cuFuncGetParamInfo(function, n, ctypes.byref(offset), ctypes.byref(size))
        if bool(failed) != (n == len(sizes)) or (not failed and size.value != sizes[n]):
            raise LookupError("other parameters")
