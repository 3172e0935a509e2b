"""One frozen description of a call, and the one place where bad arguments are refused."""

from __future__ import annotations

import functools
import math
import numbers
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, TypedDict

from . import _array
from ._array import FLOATING, Array

Alignment = Literal["top_left", "bottom_right"]


class Options(TypedDict, total=False):
    """The keyword options of :func:`laser_core.laser_attention`, which documents them."""

    scale: float | None
    beta: float | Array
    is_causal: bool | Alignment
    window_size: tuple[int | None, int | None] | None
    query_seq_lengths: Array | None
    key_value_seq_lengths: Array | None
    logits_soft_cap: float | None
    return_lse: bool


class Inputs(NamedTuple):
    """The arrays of a call; None where an argument was not given, or was not given as an array."""

    query: Array
    key: Array
    value: Array
    attn_mask: Array | None
    bias: Array | None
    beta: Array | None
    query_seq_lengths: Array | None
    key_value_seq_lengths: Array | None


@dataclass(frozen=True, kw_only=True)
class Problem:
    """All that can be known of a call without its data: shapes, dtypes, options and the kind of device.

    Attributes:
        framework: The arrays' framework: ``numpy``, ``torch``, ``jax``, ``cupy``, ``array_api_strict``, ….
        device: The kind of device: ``cpu``, ``cuda``, ``tpu``, ….
        dtype: The dtype of query, key and value: ``float16``, ``bfloat16``, ``float32`` or ``float64``.
        batch: The leading dimensions.
        query_heads, key_value_heads, query_length, key_length, head_dim, value_dim: Hq, Hkv, Lq, Lk, D, E.
        scale: The factor of the scores.
        beta: The inverse temperature; None where it is an array, of shape ``beta_shape``.
        causal: The alignment of the causal diagonal, or None.
        window: How far to the left and to the right of the diagonal a query sees; None is unbounded.
        mask_shape, bias_shape, beta_shape: Shapes of these arrays, or None.
        query_lengths, key_value_lengths: Whether sequence lengths are given.
        logits_soft_cap: The bound of the scores before the bias, or None.
        return_lse: Whether the log-sum-exp is asked for.
        gradient: Whether a backward pass may follow: if not, nothing needs to be kept for it.
    """

    framework: str
    device: str
    dtype: str
    batch: tuple[int, ...]
    query_heads: int
    key_value_heads: int
    query_length: int
    key_length: int
    head_dim: int
    value_dim: int
    scale: float
    beta: float | None = 1.0
    causal: Alignment | None = None
    window: tuple[int | None, int | None] = (None, None)
    mask_shape: tuple[int, ...] | None = None
    bias_shape: tuple[int, ...] | None = None
    beta_shape: tuple[int, ...] | None = None
    query_lengths: bool = False
    key_value_lengths: bool = False
    logits_soft_cap: float | None = None
    return_lse: bool = False
    gradient: bool = True

    def __hash__(self) -> int:
        """Computed once: a problem is the key of many tables."""
        return self._hash

    @functools.cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, field.name) for field in fields(self)))

    def __getstate__(self) -> dict[str, object]:
        """Without the hash, which is another one in another process."""
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    @property
    def group(self) -> int:
        """Query heads per key/value head."""
        return self.query_heads // self.key_value_heads

    @property
    def offset(self) -> int:
        """Where the diagonal is: query i is aligned with key i + offset."""
        return self.key_length - self.query_length if self.causal == "bottom_right" else 0

    @property
    def band(self) -> tuple[int | None, int | None]:
        """Query i sees keys i + low … i + high by causality and window; None is unbounded."""
        left, right = self.window
        if self.causal is not None:
            right = 0
        return (None if left is None else self.offset - left, None if right is None else self.offset + right)

    @property
    def compute_dtype(self) -> str:
        """The dtype of scores, accumulators and log-sum-exp."""
        return "float64" if self.dtype == "float64" else "float32"

    @property
    def out_shape(self) -> tuple[int, ...]:
        """The shape of the output."""
        return (*self.batch, self.query_heads, self.query_length, self.value_dim)

    @property
    def score_shape(self) -> tuple[int, ...]:
        """The shape that mask and bias broadcast to."""
        return (*self.batch, self.query_heads, self.query_length, self.key_length)

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """The shape of the log-sum-exp."""
        return self.score_shape[:-1]


def describe(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    bias: Array | None = None,
    *,
    scale: float | None = None,
    beta: float | Array = 1.0,
    is_causal: bool | Alignment = False,
    window_size: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
) -> tuple[Problem, Inputs]:
    """The problem and the arrays of a call, or the error that says what is wrong with it.

    Raises:
        TypeError: An argument is of the wrong kind or dtype, or arrays are of different namespaces.
        ValueError: A shape, a device or a value does not fit.
    """
    beta_array = None if isinstance(beta, numbers.Real) else beta
    arrays = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": attn_mask,
        "bias": bias,
        "beta": beta_array,
        "query_seq_lengths": query_seq_lengths,
        "key_value_seq_lengths": key_value_seq_lengths,
    }
    options = (scale, beta if beta_array is None else None, is_causal, window_size, logits_soft_cap, return_lse)
    seen = _signature(arrays, options)
    problem = None if seen is None else _KNOWN.get(seen)
    if problem is None:
        problem = _checked(arrays, *options)
        if seen is not None:
            if len(_KNOWN) >= _MOST:
                _KNOWN.clear()
            _KNOWN[seen] = problem
    for name, limit in (("query_seq_lengths", problem.query_length), ("key_value_seq_lengths", problem.key_length)):
        if arrays[name] is not None:
            arrays[name] = _signed(arrays[name], limit)
    return problem, Inputs(**arrays)


_KNOWN: dict[Hashable, Problem] = {}  # calls that were found to be right
_MOST = 4096


def _signature(arrays: dict[str, Any], options: tuple[Any, ...]) -> Hashable | None:
    """A key that two calls share only if the same can be said of them; None where there is no cheap one."""
    found = _array.signature(arrays.values())
    if found is None:
        return None
    for option in options:
        for x in option if type(option) is tuple else (option,):
            if not (x is None or isinstance(x, bool | float | int | str)):
                return None
            found += [type(x), x]  # as keys, 1, 1.0 and True are one
        found.append(type(option))
    return tuple(found)


def _checked(
    arrays: dict[str, Any],
    scale: Any,
    beta: Any,
    is_causal: Any,
    window_size: Any,
    logits_soft_cap: Any,
    return_lse: Any,
) -> Problem:
    """The problem of these arguments, every one of them looked at; β is None where it is an array."""
    _check_arrays(arrays)
    _check_dtypes(arrays)
    query, beta_array = arrays["query"], arrays["beta"]
    sizes = _sizes(query, arrays["key"], arrays["value"])
    problem = Problem(
        framework=_array.framework(_array.namespace(query)),
        device=_array.device_kind(query),
        dtype=_array.dtype_name(query),
        **sizes,
        scale=_number("scale", scale) if scale is not None else 1 / math.sqrt(sizes["head_dim"]),
        beta=_number("beta", beta) if beta_array is None else None,
        causal=_causal(is_causal),
        window=_window(window_size),
        mask_shape=_shape(arrays["attn_mask"]),
        bias_shape=_shape(arrays["bias"]),
        beta_shape=_shape(beta_array),
        query_lengths=arrays["query_seq_lengths"] is not None,
        key_value_lengths=arrays["key_value_seq_lengths"] is not None,
        logits_soft_cap=_soft_cap(logits_soft_cap),
        return_lse=_flag("return_lse", return_lse),
    )
    heads = (problem.query_heads, problem.value_dim)
    for name, target, meaning in (
        ("attn_mask", problem.score_shape, "(..., Hq, Lq, Lk)"),
        ("bias", problem.score_shape, "(..., Hq, Lq, Lk)"),
        ("beta", heads, "(Hq, E)"),
        ("query_seq_lengths", problem.batch, "the leading batch dimensions"),
        ("key_value_seq_lengths", problem.batch, "the leading batch dimensions"),
    ):
        if arrays[name] is not None:
            _check_broadcast(name, tuple(arrays[name].shape), target, meaning)
    return problem


def _signed(lengths: Array, limit: int) -> Array:
    """Lengths in a dtype that can be computed with: what int64 does not hold is beyond the end anyway."""
    xp, dtype = _array.namespace(lengths), _array.dtype_name(lengths)
    # torch has hardly a function for unsigned dtypes above uint8
    if dtype != "uint64" and not (dtype in ("uint16", "uint32") and _array.framework(xp) == "torch"):
        return lengths
    signed = xp.astype(lengths, xp.int64)  # from 2⁶³ on it is negative
    return xp.where(signed < 0, xp.full_like(signed, limit), signed)


def check_cotangent(name: str, x: Array, out: Array) -> None:
    """Refuse a cotangent that is not like the output that it belongs to."""
    _check_arrays({"query": out, name: x}, required=("query", name), of="the output")
    if _array.dtype_name(x) != _array.dtype_name(out):
        raise TypeError(_refuse(name, f"dtype {_array.dtype_name(x)}", f"{_array.dtype_name(out)}, as the output"))
    if tuple(x.shape) != tuple(out.shape):
        raise ValueError(_refuse(name, f"shape {tuple(x.shape)}", f"{tuple(out.shape)}, as the output"))


def check_states(arrays: dict[str, Any], beta: float | Array) -> None:
    """Refuse partial results that do not fit together."""
    names = ("out_a", "lse_a", "out_b", "lse_b")
    _check_arrays(arrays, required=names, of="out_a")
    for name, x in arrays.items():
        if x is not None and _array.dtype_name(x) not in FLOATING:
            raise TypeError(_refuse(name, f"dtype {_array.dtype_name(x)}", ", ".join(FLOATING)))
    out, lse = arrays["out_a"], arrays["lse_a"]
    if out.ndim < 3:
        raise ValueError(_refuse("out_a", f"shape {tuple(out.shape)}", "rank 3 or more, (..., Hq, Lq, E)"))
    for name, like, shape in (
        ("lse_a", lse, out.shape[:-1]),
        ("out_b", out, out.shape),
        ("lse_b", lse, out.shape[:-1]),
    ):
        x = arrays[name]
        if tuple(x.shape) != tuple(shape):
            raise ValueError(_refuse(name, f"shape {tuple(x.shape)}", f"{tuple(shape)}, from the shape of out_a"))
        if _array.dtype_name(x) != _array.dtype_name(like):
            allowed = f"{_array.dtype_name(like)}, as {name[:-1]}a"
            raise TypeError(_refuse(name, f"dtype {_array.dtype_name(x)}", allowed))
    if arrays["beta"] is None:
        _number("beta", beta)
    else:
        target = (out.shape[-3], out.shape[-1])
        _check_broadcast("beta", tuple(arrays["beta"].shape), target, "(Hq, E)")


def _refuse(name: str, got: object, allowed: str) -> str:
    return f"{name}: got {got}; allowed: {allowed}"


def _check_arrays(
    arrays: dict[str, Any], required: tuple[str, ...] = ("query", "key", "value"), of: str = "query"
) -> None:
    """Every argument that should be an array is one, all of the namespace and device of the first."""
    first = next(iter(arrays.values()))
    kind = type(first) if _array.is_array(first) else None
    for name, x in arrays.items():
        needed = name in required
        if not ((x is None and not needed) or type(x) is kind or _array.is_array(x)):
            what = "an array" if needed else ("a real number or an array" if name == "beta" else "an array or None")
            shown = (
                f"{type(x).__name__} {x!r}" if x is None or isinstance(x, str | numbers.Number) else type(x).__name__
            )
            raise TypeError(_refuse(name, shown, f"{what} of a namespace that speaks the array API standard"))
    own, place = _array.framework(_array.namespace(first)), _array.device(first)
    for name, x in arrays.items():
        if x is None or x is first:
            continue
        if type(x) is not kind and (other := _array.framework(_array.namespace(x))) != own:
            raise TypeError(_refuse(name, f"an array of {other}", f"the namespace of {of}, {own}"))
        if _array.device(x) != place:
            raise ValueError(_refuse(name, f"an array on {_array.device(x)}", f"the device of {of}, {place}"))


def _check_dtypes(arrays: dict[str, Any]) -> None:
    query = arrays["query"]
    own = _array.dtype_name(query)
    for name, x in arrays.items():
        if x is None or (x.dtype == query.dtype and name in ("key", "value")):  # query's own comes first
            continue
        got = _array.dtype_name(x)
        if name == "attn_mask":
            if got != "bool":
                raise TypeError(_refuse(name, f"dtype {got}", "bool, True = may attend; additive scores go in bias"))
        elif name.endswith("lengths"):
            if not got.startswith(("int", "uint")):
                raise TypeError(_refuse(name, f"dtype {got}", "an integer dtype"))
        elif got not in FLOATING:
            raise TypeError(_refuse(name, f"dtype {got}", ", ".join(FLOATING)))
        elif name in ("key", "value") and got != own:
            raise TypeError(_refuse(name, f"dtype {got}", f"the dtype of query, {own}"))


def _sizes(query: Array, key: Array, value: Array) -> dict[str, Any]:
    """The sizes that query, key and value agree on."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim < 3:
            raise ValueError(_refuse(name, f"shape {tuple(x.shape)}", "rank 3 or more, (..., heads, length, dim)"))
    *batch, hq, lq, d = query.shape
    *_, hkv, lk, _ = key.shape
    e = value.shape[-1]
    for name, x, want in (("key", key, (*batch, hkv, lk, d)), ("value", value, (*batch, hkv, lk, e))):
        if tuple(x.shape) != want:
            others = "query" if name == "key" else "query and key"
            raise ValueError(_refuse(name, f"shape {tuple(x.shape)}", f"{want}, from the shape of {others}"))
    for name, size, what in (("query", d, "head dim D"), ("value", e, "value dim E"), ("key", hkv, "heads Hkv")):
        if size < 1:
            raise ValueError(_refuse(name, f"{what} = {size}", "1 or more"))
    if hq % hkv or hq < 1:
        raise ValueError(_refuse("query", f"{hq} heads", f"a multiple of the {hkv} key/value heads"))
    return {
        "batch": tuple(batch),
        "query_heads": hq,
        "key_value_heads": hkv,
        "query_length": lq,
        "key_length": lk,
        "head_dim": d,
        "value_dim": e,
    }


def _check_broadcast(name: str, shape: tuple[int, ...], target: tuple[int, ...], meaning: str) -> None:
    fits = len(shape) <= len(target) and all(
        n == 1 or n == t for n, t in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise ValueError(_refuse(name, f"shape {shape}", f"a shape that broadcasts to {meaning} = {target}"))


def _shape(x: Array | None) -> tuple[int, ...] | None:
    return None if x is None else tuple(x.shape)


def _number(name: str, x: Any) -> float:
    if not isinstance(x, numbers.Real) or isinstance(x, bool) or not -math.inf < float(x) < math.inf:
        raise _kind(x)(_refuse(name, repr(x), "a finite real number"))
    return float(x)


def _kind(x: Any) -> type[Exception]:
    """A number out of range is a ``ValueError``, anything else a ``TypeError``."""
    return ValueError if isinstance(x, numbers.Real) and not isinstance(x, bool) else TypeError


def _flag(name: str, x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError(_refuse(name, repr(x), "True or False"))
    return x


def _causal(is_causal: Any) -> Alignment | None:
    if isinstance(is_causal, bool):
        return "top_left" if is_causal else None
    if is_causal == "top_left":
        return "top_left"
    if is_causal == "bottom_right":
        return "bottom_right"
    raise ValueError(_refuse("is_causal", repr(is_causal), "False, True (= 'top_left'), 'top_left', 'bottom_right'"))


def _window(window: Any) -> tuple[int | None, int | None]:
    if window is None:
        return (None, None)
    sides = tuple(window) if isinstance(window, Iterable) and not isinstance(window, str) else ()
    if len(sides) != 2 or not all(
        side is None or (isinstance(side, numbers.Integral) and not isinstance(side, bool) and int(side) >= 0)
        for side in sides
    ):
        allowed = "None, or (left, right), each a non-negative integer or None for unbounded"
        raise ValueError(_refuse("window_size", repr(window), allowed))
    left, right = (None if side is None else int(side) for side in sides)
    return (left, right)


def _soft_cap(cap: Any) -> float | None:
    if cap is None:
        return None
    if not isinstance(cap, numbers.Real) or isinstance(cap, bool) or not 0 < float(cap) < math.inf:
        raise _kind(cap)(_refuse("logits_soft_cap", repr(cap), "a positive finite number, or None"))
    return float(cap)
