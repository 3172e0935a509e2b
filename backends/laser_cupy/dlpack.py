"""LASER attention for whatever is on a CUDA device and speaks DLPack: torch tensors, JAX arrays, CuPy arrays, ….

Nothing is copied on the way in or out, and everything runs on the caller's stream: torch's current one for tensors,
CuPy's for all others, in the order that DLPack asks of producer and consumer. CuPy's exchange knows no bfloat16: that
dtype is renamed in the capsule, to integers of 16 bits and back.
"""

from __future__ import annotations

import ctypes
import numbers
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Unpack

import laser_core
from laser_core import Gradients
from laser_core._array import Array, framework, namespace
from laser_core._attention import Backends, Pullback
from laser_core._problem import Options

_CUDA = (2, 13)  # kDLCUDA, kDLCUDAManaged
_UINT, _BFLOAT = 1, 4  # kDLUInt, kDLBfloat
_CODE_AT = {b"dltensor": 20, b"dltensor_versioned": 52}  # bytes from the beginning of what a capsule holds


def laser_attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    bias: Any = None,
    *,
    backend: Backends = None,
    **options: Unpack[Options],
) -> Any:
    """:func:`laser_core.laser_attention` on arrays of any kind that are on a CUDA device and speak DLPack.

    The arguments are those of :func:`laser_core.laser_attention`, and so are their shapes. It runs the kernels of
    ``laser_cupy``, whatever the arrays are, and knows no automatic differentiation: :func:`laser_attention_vjp` has
    the gradient.

    Args:
        query: ``(..., Hq, Lq, D)``, of float16, bfloat16, float32 or float64; a torch tensor on a CUDA device, a JAX
            array on a GPU, a CuPy array, or another whose namespace has ``from_dlpack``.
        key: ``(..., Hkv, Lk, D)``, of the same kind and dtype, on the same device, as all arrays are.
        value: ``(..., Hkv, Lk, E)``.
        attn_mask: Boolean, broadcastable to ``(..., Hq, Lq, Lk)``.
        bias: Floating, broadcastable to ``(..., Hq, Lq, Lk)``.
        backend: As there, among those that take CuPy arrays.
        **options: As there.

    Returns:
        ``out (..., Hq, Lq, E)`` of the kind of ``query``, or ``(out, lse)``.

    Raises:
        TypeError: An array of another kind than ``query``, one that does not speak DLPack, or as in ``laser_core``.
        ValueError: An array that is not on a CUDA device or that wants a gradient, or as in ``laser_core``.
        Unsupported: No backend asked for can run this; says why.
    """
    arrays, rest = _split(query, key, value, attn_mask, bias, options)
    exchange = _Exchange(arrays)
    with exchange.stream():
        return exchange.given_back(laser_core.laser_attention(**exchange.taken(), **rest, backend=backend))


def laser_attention_vjp(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    bias: Any = None,
    *,
    backend: Backends = None,
    **options: Unpack[Options],
) -> tuple[Any, Pullback]:
    """:func:`laser_core.laser_attention_vjp` on arrays of any kind that are on a CUDA device and speak DLPack.

    The arguments are those of :func:`laser_attention`; each array keeps its memory until ``pullback`` is gone.

    Returns:
        ``out``, or ``(out, lse)``, and ``pullback(d_out, d_lse=None)``, which takes cotangents of the kind of ``query``
        and returns ``Gradients(query, key, value, bias, beta)`` of that kind.

    Raises:
        TypeError: As :func:`laser_attention`; ``pullback`` too.
        ValueError: As :func:`laser_attention`; ``pullback`` too.
        Unsupported: As :func:`laser_attention`.
    """
    arrays, rest = _split(query, key, value, attn_mask, bias, options)
    exchange = _Exchange(arrays)
    with exchange.stream():
        out, pull = laser_core.laser_attention_vjp(**exchange.taken(), **rest, backend=backend)
        out = exchange.given_back(out)

    def pullback(d_out: Any, d_lse: Any = None) -> Gradients:
        cotangents = _Exchange({"d_out": d_out, "d_lse": d_lse}, like=exchange)
        with cotangents.stream():
            return Gradients(*exchange.given_back(tuple(pull(**cotangents.taken()))))

    return out, pullback


def _split(
    query: Any, key: Any, value: Any, attn_mask: Any, bias: Any, options: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that are arrays or None, and the others."""
    arrays = {"query": query, "key": key, "value": value, "attn_mask": attn_mask, "bias": bias}
    rest = dict(options)
    for name in ("beta", "query_seq_lengths", "key_value_seq_lengths"):
        if name in rest and not isinstance(rest[name], numbers.Real):
            arrays[name] = rest.pop(name)
    return arrays, rest


class _Exchange:
    """Arrays of one kind, on one device: that of another exchange, or else that of the first."""

    def __init__(self, arrays: dict[str, Any], like: _Exchange | None = None) -> None:
        self.arrays = arrays
        for name, x in arrays.items():
            if x is None:
                continue
            if not hasattr(x, "__dlpack__"):
                raise TypeError(f"{name}: got {type(x).__name__}; allowed: an array that speaks DLPack")
            if like is None:
                like = self
                self.namespace = namespace(x)
                self.kind = framework(self.namespace)
            kind = framework(namespace(x))
            if kind != like.kind:
                raise TypeError(f"{name}: got an array of {kind}; allowed: the kind of the others, {like.kind}")
            if getattr(x, "requires_grad", False):
                raise ValueError(
                    f"{name}: got a tensor that requires a gradient, which cannot be recorded here; allowed: "
                    "x.detach(), with the gradient from laser_attention_vjp, or laser_core.laser_attention"
                )
            if x.__dlpack_device__()[0] not in _CUDA:
                raise ValueError(f"{name}: got an array that is not on a CUDA device; allowed: one that is")
            self.device = int(x.__dlpack_device__()[1])

    @contextmanager
    def stream(self) -> Iterator[None]:
        """The device and stream of the caller, made CuPy's."""
        import cupy

        torch = sys.modules.get("torch")
        with cupy.cuda.Device(self.device), ExitStack() as stack:
            if torch is not None and any(isinstance(x, torch.Tensor) for x in self.arrays.values()):
                current = torch.cuda.current_stream(self.device).cuda_stream
                stack.enter_context(cupy.cuda.ExternalStream(current, self.device))
            yield

    def taken(self) -> dict[str, Any]:
        """The arrays as CuPy's, on the same memory."""
        import cupy

        return {name: None if x is None else take(x, cupy) for name, x in self.arrays.items()}

    def given_back(self, x: Any) -> Any:
        """CuPy arrays as arrays of the caller's kind, on the same memory."""
        if isinstance(x, tuple):
            return tuple(map(self.given_back, x))
        return x if x is None or self.kind == "cupy" else self.namespace.from_dlpack(Renamed(x))


def take(x: Any, xp: Any) -> Array:
    """``x`` as an array of the NumPy-like namespace ``xp`` on the same memory; bfloat16 as that of ml_dtypes."""
    if type(x) is xp.ndarray:
        return x
    renamed = Renamed(x)
    taken = xp.from_dlpack(renamed)
    if not renamed.bfloat:
        return taken
    import ml_dtypes

    return taken.view(ml_dtypes.bfloat16)


class Renamed:
    """An array whose bfloat16 is called an unsigned integer, or the bfloat16 of NumPy and CuPy by its name."""

    def __init__(self, x: Any) -> None:
        """Wrap an array."""
        self.narrow = getattr(x.dtype, "name", "") == "bfloat16" and hasattr(x, "view") and hasattr(x, "strides")
        self.x = x
        self.bfloat = False

    def __dlpack_device__(self) -> Any:
        """Where the array is."""
        return self.x.__dlpack_device__()

    def __dlpack__(self, **arguments: Any) -> Any:
        """The array's capsule, with another name for the dtype."""
        if self.narrow:
            capsule = self.x.view("uint16").__dlpack__(**arguments)
            _code(capsule).value = _BFLOAT
            return capsule
        capsule = self.x.__dlpack__(**arguments)
        code = _code(capsule)
        if code.value == _BFLOAT:
            self.bfloat = True
            code.value = _UINT
        return capsule


def _code(capsule: Any) -> ctypes.c_uint8:
    """The code of the dtype in a DLPack capsule."""
    api = ctypes.pythonapi
    name_of = ctypes.PYFUNCTYPE(ctypes.c_char_p, ctypes.py_object)(("PyCapsule_GetName", api))
    pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(("PyCapsule_GetPointer", api))
    name: bytes = name_of(capsule)
    return ctypes.c_uint8.from_address((pointer_of(capsule, name) or 0) + _CODE_AT[name])
