"""What the array API standard leaves open: the one module that knows array-api-compat."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeAlias

import array_api_compat as compat
import numpy

Array: TypeAlias = Any
Namespace: TypeAlias = Any
DType: TypeAlias = Any

FLOATING = ("float16", "bfloat16", "float32", "float64")


def is_array(x: object) -> bool:
    """Whether ``x`` is an array of a namespace that speaks the standard."""
    return _is_torch(x) or (bool(compat.is_array_api_obj(x)) and not isinstance(x, numpy.generic))


def _is_torch(x: object) -> bool:
    """Whether ``x`` is a torch tensor; torch.compile traces this without the warning that a cached function gets."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def signature(arrays: Iterable[Any]) -> list[object] | None:
    """Shapes, dtypes and devices of plain torch tensors, as a key; None for all others, and while torch traces."""
    torch = sys.modules.get("torch")
    if torch is None or torch.compiler.is_compiling():
        return None
    plain = (torch.Tensor, torch.nn.Parameter)
    found: list[object] = []
    for x in arrays:
        if x is None:
            found.append(None)
        elif type(x) in plain:
            found += (x.shape, x.dtype, x.device)
        else:
            return None
    return found


def namespace(*arrays: Array) -> Namespace:
    """The array namespace that ``arrays`` share; ``TypeError`` where they do not share one."""
    if all(map(_is_torch, arrays)):
        import array_api_compat.torch

        return array_api_compat.torch
    return compat.array_namespace(*arrays)


def framework(xp: Namespace) -> str:
    """The framework behind a namespace: ``numpy``, ``torch``, ``jax``, ``cupy``, ``array_api_strict``, …"""
    return str(xp.__name__.removeprefix("array_api_compat.").partition(".")[0])


def dtype_name(x: Array) -> str:
    """The name of an array's dtype without its framework: ``float32``, ``bfloat16``, ``bool``."""
    return str(getattr(x.dtype, "name", x.dtype)).rpartition(".")[2]


def dtype(xp: Namespace, name: str) -> DType:
    """The dtype of that name in ``xp``; NumPy-like namespaces take bfloat16 from ml_dtypes."""
    found = getattr(xp, name, None)
    if found is None:
        import ml_dtypes  # only ever asked for by someone who already holds such an array

        found = numpy.dtype(getattr(ml_dtypes, name))
    return found


def device(x: Array) -> Any:
    """The device of ``x``, to create arrays beside it; None where the framework places arrays itself (JAX)."""
    if _is_torch(x):
        return x.device
    return None if compat.is_jax_array(x) else compat.device(x)


def device_kind(x: Array) -> str:
    """The kind of device that ``x`` is on: ``cpu``, ``cuda``, ``tpu``, ``mps``, …"""
    if _is_torch(x):
        return str(x.device.type)
    if compat.is_jax_array(x):
        jax = sys.modules["jax"]
        traced = isinstance(x, jax.core.Tracer)
        kind = jax.default_backend() if traced else next(iter(x.devices())).platform
        return "cuda" if kind == "gpu" else str(kind)
    if compat.is_cupy_array(x):
        return "cuda"
    return str(getattr(compat.device(x), "type", "cpu"))


def known(condition: Array) -> bool | None:
    """The value of a 0-D boolean array, or None while it is being traced and has no value yet."""
    try:
        return bool(condition)
    except TypeError:  # JAX refuses to turn a tracer into a bool
        return None


def quiet(framework: str) -> AbstractContextManager[object]:
    """Silence NumPy's floating point warnings: exp underflows by design, and ∞ − ∞ in a branch not taken is no news."""
    return numpy.errstate(all="ignore") if framework in ("numpy", "array_api_strict") else nullcontext()


def put(x: Array, index: tuple[int | slice, ...], block: Array) -> Array:
    """``x`` with ``x[index]`` replaced by ``block``; in place where arrays are mutable."""
    if compat.is_jax_array(x):
        return x.at[index].set(block)
    x[(*index, ...)] = block
    return x


def expm1_over(xp: Namespace, t: Array) -> Array:
    """``g(t) = (eᵗ − 1)/t``, smooth through ``g(0) = 1``."""
    return _smooth(xp, t, lambda t: xp.expm1(t) / t, [1 / _FACTORIAL[n + 1] for n in range(9)])


def log1p_over(xp: Namespace, u: Array) -> Array:
    """``h(u) = log(1 + u)/u``, smooth through ``h(0) = 1``."""
    return _smooth(xp, u, lambda u: xp.log1p(u) / u, [(-1) ** n / (n + 1) for n in range(11)])


def exp_minus_g_over(xp: Namespace, t: Array) -> Array:
    """``k(t) = (eᵗ − g(t))/t``, smooth through ``k(0) = ½``."""
    return _smooth(xp, t, lambda t: (xp.exp(t) - xp.expm1(t) / t) / t, [(n + 1) / _FACTORIAL[n + 2] for n in range(9)])


def log1p_defect(xp: Namespace, u: Array) -> Array:
    """``((1 + u)·log(1 + u) − u)/u²``, smooth through ½ at 0."""
    direct = lambda u: ((1 + u) * xp.log1p(u) - u) / (u * u)  # noqa: E731
    return _smooth(xp, u, direct, [(-1) ** n / ((n + 1) * (n + 2)) for n in range(11)])


_FACTORIAL = [1, 1, 2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800]
_SERIES_BELOW = 0.03  # there the first term left out is below the rounding of float64


def _smooth(xp: Namespace, t: Array, direct: Any, coefficients: Sequence[float]) -> Array:
    """``direct(t)`` away from zero and its Taylor series near it, so that every derivative is right at 0 too."""
    near = xp.abs(t) < _SERIES_BELOW
    small = xp.where(near, t, xp.zeros_like(t))
    series = xp.full_like(t, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        series = series * small + c
    return xp.where(near, series, direct(xp.where(near, xp.ones_like(t), t)))


def unbroadcast(xp: Namespace, x: Array, shape: tuple[int, ...]) -> Array:
    """``x`` summed over the axes along which an array of ``shape`` was broadcast to ``x.shape``."""
    extra = x.ndim - len(shape)
    axes = tuple(range(extra)) + tuple(extra + a for a, n in enumerate(shape) if n == 1 and x.shape[extra + a] != 1)
    return xp.reshape(xp.sum(x, axis=axes) if axes else x, shape)
