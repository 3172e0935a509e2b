"""What JAX and Flax call attention, with LASER in its place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import jax
import jax.numpy as jnp

from laser_core import Unsupported, _problem, backends, laser_attention

Array: TypeAlias = jax.Array
ArrayLike: TypeAlias = Any  # whatever jnp.asarray takes
Implementation: TypeAlias = Literal["xla", "cudnn", "pallas"]

ENGINES = {"xla": ("jax-xla",), "cudnn": ("jax-cudnn",), "pallas": ("jax-mosaic", "jax-tpu")}

_refuse = _problem._refuse


def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    beta: float | Array = 1.0,
    implementation: Implementation | None = None,
) -> Array:
    r"""LASER attention with the arguments of ``jax.nn.dot_product_attention``.

    .. math::
        o_{ie} = \frac{1}{\beta_e} \log \sum_j p_{ij}\, e^{\beta_e v_{je}}, \qquad
        p_{ij} = \operatorname{softmax}_j(\mathrm{scale} \cdot \langle q_i, k_j \rangle + \mathrm{bias}_{ij})

    It differs from JAX's in three things: the formula; a query that sees no key, or that lies beyond its sequence
    length, has output 0; and the last dimension of value may be another than that of query and key.

    Args:
        query: ``(B, T, N, H)`` or ``(T, N, H)``.
        key: ``(B, S, K, H)`` or ``(S, K, H)``, where K divides N: query head n reads head n // (N/K).
        value: ``(B, S, K, E)`` or ``(S, K, E)``.
        bias: Added to the scores; broadcastable to ``(B, N, T, S)``, of rank 4, or below it with the batch left out.
        mask: Boolean, True = may attend; of a shape as bias.
        scale: Factor of the scores; default 1/√H.
        is_causal: Query i sees keys ≤ i.
        query_seq_lengths: int32 ``(B,)``; queries from there on see nothing.
        key_value_seq_lengths: int32 ``(B,)``; keys from there on are not seen.
        local_window_size: ``(left, right)``: query i sees keys i − left … i + right; an integer is both.
        beta: Inverse temperature: a finite number, or an array that broadcasts to ``(N, E)``.
        implementation: None for the best that can, ``"xla"``, ``"cudnn"`` or ``"pallas"``.

    Returns:
        ``(B, T, N, E)`` or ``(T, N, E)`` in the dtype of query.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A shape or option that does not fit.
        Unsupported: The implementation asked for cannot run this; says why.
    """
    backend = _engines(implementation)
    lone = jnp.ndim(query) == 3
    query, key, value, bias, mask = (
        None if x is None else _rank_4(name, jnp.asarray(x))
        for name, x in (("query", query), ("key", key), ("value", value), ("bias", bias), ("mask", mask))
    )
    b, t, n, h = query.shape
    s, k = key.shape[1:3]
    for name, x, wanted in (("key", key, (b, s, k, h)), ("value", value, (b, s, k, value.shape[-1]))):
        if x.shape != wanted:
            allowed = f"{wanted}, from query {query.shape} and key {key.shape}"
            raise ValueError(_refuse(name, f"shape {x.shape}", allowed))
    for name, x in (("bias", bias), ("mask", mask)):
        if x is not None and not all(m in (1, w) for m, w in zip(x.shape, (b, n, t, s), strict=True)):
            raise ValueError(
                _refuse(name, f"shape {x.shape}", f"a shape that broadcasts to (B, N, T, S) = {b, n, t, s}")
            )
    if mask is not None and mask.dtype != bool:
        raise TypeError(_refuse("mask", f"dtype {mask.dtype}", "bool, True = may attend; additive scores go in bias"))
    if not isinstance(is_causal, bool):
        raise TypeError(_refuse("is_causal", repr(is_causal), "True or False, as in JAX"))
    lengths = []
    for name, x in (("query_seq_lengths", query_seq_lengths), ("key_value_seq_lengths", key_value_seq_lengths)):
        x = None if x is None else jnp.asarray(x)
        if x is not None and (x.shape, x.dtype) != ((b,), jnp.int32):
            raise ValueError(_refuse(name, f"{x.dtype} of shape {x.shape}", f"int32 of shape (B,) = {(b,)}"))
        lengths.append(x)
    window: Any = local_window_size
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    out: Any = laser_attention(
        query,
        key,
        value,
        mask,
        bias,
        scale=scale,
        beta=beta,
        is_causal=is_causal,
        window_size=(window, window) if isinstance(window, int) and not isinstance(window, bool) else window,
        query_seq_lengths=lengths[0],
        key_value_seq_lengths=lengths[1],
        backend=backend,
    )
    out = jnp.swapaxes(out, 1, 2)
    return out[0] if lone else out  # type: ignore[no-any-return]


def _rank_4(name: str, x: Array) -> Array:
    """With leading dimensions of 1, as JAX adds them."""
    allowed = ("BTNH", "TNH") if name in ("query", "key", "value") else ("BNTS", "NTS")
    least = 3 if name in ("query", "key", "value") else 0
    if not least <= x.ndim <= 4:
        raise ValueError(_refuse(name, f"shape {x.shape}", f"{allowed[0]} or {allowed[1]}"))
    return jnp.reshape(x, (1,) * (4 - x.ndim) + x.shape)


def _engines(implementation: str | None) -> Sequence[str] | None:
    """The backends of an implementation, as far as they are there."""
    if implementation is None:
        return None
    if implementation not in ENGINES:
        raise ValueError(_refuse("implementation", repr(implementation), f"None, {', '.join(map(repr, ENGINES))}"))
    known = backends()
    names = [name for name in ENGINES[implementation] if name in known]
    if not names:
        raise Unsupported(_refuse("implementation", repr(implementation), "one of which a backend is registered"))
    return names


def attention_fn(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: object = None,
    promote_dtype: Callable[..., Any] | None = None,
    is_causal: bool = False,
    *,
    beta: float | Array = 1.0,
    implementation: Implementation | None = None,
) -> Array:
    """LASER attention as the ``attention_fn`` of ``flax.nnx.MultiHeadAttention``, with its arguments.

    ``functools.partial(attention_fn, beta=2.0)`` is one of another β.

    Args:
        query: ``(..., T, N, H)``.
        key: ``(..., S, K, H)``, where K divides N.
        value: ``(..., S, K, E)``.
        bias: Added to the scores; broadcastable to ``(..., N, T, S)``.
        mask: Not 0 = may attend; broadcastable to ``(..., N, T, S)``.
        broadcast_dropout: Without effect, for there is no dropout.
        dropout_rng: Without effect.
        dropout_rate: Must be 0 unless ``deterministic``: dropping every visible key of a channel would be log 0.
        deterministic: Whether there is no dropout.
        dtype: The dtype of the computation; default: the one that query, key and value promote to.
        precision: Of the products of float32; default: JAX's setting, or else float32 itself.
        module: Must be None: it would be given the attention weights, which are never formed.
        promote_dtype: Flax's function to bring query, key and value to one dtype.
        is_causal: Query i sees keys ≤ i.
        beta: Inverse temperature: a finite number, or an array that broadcasts to ``(N, E)``.
        implementation: As in :func:`dot_product_attention`.

    Returns:
        ``(..., T, N, E)``.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A shape or option that does not fit; dropout; a module.
        Unsupported: The implementation asked for cannot run this; says why.
    """
    if dropout_rate != 0 and not deterministic:
        reason = "0, or deterministic=True: dropping every visible key of a channel would be log 0"
        raise ValueError(_refuse("dropout_rate", dropout_rate, reason))
    if module is not None:
        raise ValueError(_refuse("module", type(module).__name__, "None (sow_weights=False): no weights are formed"))
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    else:
        dtype = jnp.result_type(query, key, value) if dtype is None else dtype
        query, key, value = (jnp.asarray(x, dtype) for x in (query, key, value))
    chosen = precision.name.lower() if isinstance(precision, jax.lax.Precision) else precision
    with jax.default_matmul_precision(chosen) if chosen is not None else contextlib.nullcontext():
        query, key, value = (jnp.swapaxes(x, -3, -2) for x in (query, key, value))
        out: Any = laser_attention(
            query,
            key,
            value,
            None if mask is None else mask.astype(bool),
            bias,
            beta=beta,
            is_causal=is_causal,
            backend=_engines(implementation),
        )
    return jnp.swapaxes(out, -3, -2)
