"""NumPy data to the arrays that a backend serves, and back; uninitialised memory that cannot go unnoticed."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import math
import platform
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np

from .generate import Floats

Array = Any


@dataclass(frozen=True)
class Library:
    """An array library, on one of its devices.

    Attributes:
        name: As :class:`laser_core.Problem` names the framework.
        device: A device in the library's own words; "" is its default.
        put: From NumPy to an array on the device, with the strides of the data where the library has any.
        get: From an array to NumPy, bit for bit.
        dtypes: The floating dtypes it has.
        strided: Whether its arrays can be views with strides of their own.
        context: What to wrap a call in, given the dtype.
        synchronize: Waits until the device has finished.
        hardware: What the device is, in words.
    """

    name: str
    device: str
    put: Callable[[Floats], Array]
    get: Callable[[Array], Floats]
    dtypes: tuple[str, ...]
    strided: bool
    context: Callable[[str], AbstractContextManager[Any]]
    synchronize: Callable[[Array], None] = lambda x: None
    hardware: Callable[[], str] = lambda: processor()


ALL = ("float64", "float32", "bfloat16", "float16")


class Absent(RuntimeError):
    """An array library or device that is not there."""


def open_library(name: str, device: str = "") -> Library:
    """An array library by name.

    Raises:
        ValueError: An unknown name; lists the known ones.
        Absent: It is not installed, or has no such device.
    """
    if name not in _MAKERS:
        raise ValueError(f"arrays: got {name!r}; allowed: {', '.join(_MAKERS)}")
    if importlib.util.find_spec(name) is None:
        raise Absent(f"arrays of {name}: {name} is not installed")
    return _MAKERS[name](device)


def known_libraries() -> tuple[str, ...]:
    """The names that :func:`open_library` takes."""
    return tuple(_MAKERS)


def processor() -> str:
    """The name of the CPU."""
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _numpy(device: str) -> Library:
    if device not in ("", "cpu"):
        raise Absent(f"device: got {device!r}; allowed for numpy: cpu")
    return Library("numpy", "cpu", lambda x: x, np.asarray, ALL, True, lambda dtype: contextlib.nullcontext())


def _strict(device: str) -> Library:
    xp: Any = importlib.import_module("array_api_strict")
    known = {str(getattr(d, "_device", d)): d for d in xp.__array_namespace_info__().devices()}
    if device and device not in known:
        raise Absent(f"device: got {device!r}; allowed for array_api_strict: {', '.join(known)}")
    place = known[device] if device else xp.Device("CPU_DEVICE")
    dtypes = ("float32",) if device in ("no_float64", "no_x64") else ("float64", "float32")

    def context(dtype: str) -> AbstractContextManager[Any]:
        flags: AbstractContextManager[Any] = xp.ArrayAPIStrictFlags(
            boolean_indexing=False, data_dependent_shapes=False, enabled_extensions=()
        )
        return flags

    def put(x: Floats) -> Array:
        return xp.asarray(x, device=place)

    return Library("array_api_strict", device, put, lambda a: np.asarray(a._array), dtypes, False, context)


def _torch(device: str) -> Library:
    torch: Any = importlib.import_module("torch")
    try:
        place = torch.empty(0, device=device or "cpu").device
    except (RuntimeError, AssertionError) as error:
        raise Absent(f"device: got {device!r}; torch says {str(error).splitlines()[0]}") from None

    def put(x: Floats) -> Array:
        half = x.dtype == ml_dtypes.bfloat16
        if not x.flags.writeable:
            x = x.copy() if 0 not in x.strides else _writable(x)
        tensor = torch.from_numpy(x.view(np.int16) if half else x)
        tensor = tensor.view(torch.bfloat16) if half else tensor
        return tensor if place.type == "cpu" else _to_strided(torch, tensor, place)

    def get(a: Array) -> Floats:
        a = a.detach().cpu()
        if a.dtype == torch.bfloat16:
            return a.contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return np.asarray(a.numpy())

    def synchronize(a: Array) -> None:
        if place.type == "cuda":
            torch.cuda.synchronize(place)

    def hardware() -> str:
        if place.type == "cpu":
            return processor()
        return str(torch.cuda.get_device_name(place)) if place.type == "cuda" else str(place)

    return Library("torch", device, put, get, ALL, True, lambda dtype: contextlib.nullcontext(), synchronize, hardware)


def _writable(x: Floats) -> Floats:
    """A view with the same strides that torch takes without a warning."""
    return np.lib.stride_tricks.as_strided(x, x.shape, x.strides, writeable=True)


def _to_strided(torch: Any, tensor: Array, place: Any) -> Array:
    """A copy on the device with the strides of the tensor, stride 0 included."""
    reach = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    flat = torch.as_strided(tensor, (reach,), (1,)).to(place)
    return torch.as_strided(flat, tensor.shape, tensor.stride())


def _jax(device: str) -> Library:
    jax: Any = importlib.import_module("jax")
    try:
        place = jax.devices(device or None)[0]
    except RuntimeError as error:
        raise Absent(f"device: got {device!r}; jax says {str(error).splitlines()[0]}") from None

    def put(x: Floats) -> Array:
        return jax.device_put(np.array(x), place)

    def context(dtype: str) -> AbstractContextManager[Any]:
        return jax.enable_x64(dtype == "float64")  # type: ignore[no-any-return]

    def hardware() -> str:
        return processor() if place.platform == "cpu" else str(place.device_kind)

    return Library("jax", device, put, np.asarray, ALL, False, context, lambda a: a.block_until_ready(), hardware)


def _cupy(device: str) -> Library:
    cupy: Any = importlib.import_module("cupy")
    try:
        cupy.cuda.Device(int(device.partition(":")[2] or 0)).use()
    except cupy.cuda.runtime.CUDARuntimeError as error:
        raise Absent(f"device: got {device!r}; cupy says {error}") from None

    def put(x: Floats) -> Array:
        reach = 1 + sum((n - 1) * (s // x.itemsize) for n, s in zip(x.shape, x.strides, strict=True)) if x.size else 0
        flat = cupy.asarray(np.lib.stride_tricks.as_strided(x, (reach,), (x.itemsize,)))
        return cupy.lib.stride_tricks.as_strided(flat, x.shape, x.strides)

    dtypes = ("float64", "float32", "bfloat16", "float16")
    return Library(
        "cupy",
        device,
        put,
        cupy.asnumpy,
        dtypes,
        True,
        lambda dtype: contextlib.nullcontext(),
        lambda a: cupy.cuda.get_current_stream().synchronize(),
        lambda: str(cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"].decode()),
    )


_MAKERS: dict[str, Callable[[str], Library]] = {
    "numpy": _numpy,
    "array_api_strict": _strict,
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
}


# ------------------------------------------------------------------------------------------------------------- poison


@contextlib.contextmanager
def poisoned(library: str) -> Iterator[None]:
    """Within, memory that ``empty`` and its like hand out is full of NaN, so that what is not written is noticed."""
    with ExitStack() as stack:
        for module in {"numpy", library} & {"numpy", "torch", "cupy"}:
            target: Any = importlib.import_module(module)
            for name in ("empty", "empty_like", "empty_strided", "empty_permuted"):
                if hasattr(target, name):
                    stack.enter_context(mock.patch.object(target, name, _filling(getattr(target, name))))
        yield


def _filling(function: Callable[..., Array]) -> Callable[..., Array]:
    @functools.wraps(function)
    def filled(*args: Any, **kwargs: Any) -> Array:
        x = function(*args, **kwargs)
        kind = str(x.dtype)
        if hasattr(x, "fill_"):
            if "float" in kind:
                x.fill_(math.nan)
            elif "int" in kind:
                x.fill_(77)
        elif "float" in kind and x.size < 2**28:
            x.fill(math.nan)
        elif kind.startswith(("int", "uint")) and x.size < 2**28:
            x.fill(77)
        return x

    return filled
