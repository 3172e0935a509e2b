"""What ``torch.nn.functional`` calls attention, with LASER in its place."""

from __future__ import annotations

import torch
from torch import Tensor

from laser_core import _problem, laser_attention

from .binding import autocast

_refuse = _problem._refuse


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    beta: float | Tensor = 1.0,
) -> Tensor:
    r"""LASER attention with the arguments of ``torch.nn.functional.scaled_dot_product_attention``.

    .. math::
        o_{ie} = \frac{1}{\beta_e} \log \sum_j p_{ij}\, e^{\beta_e v_{je}}, \qquad
        p_{ij} = \operatorname{softmax}_j(\mathrm{scale} \cdot \langle q_i, k_j \rangle + \mathrm{mask}_{ij})

    It differs from torch's in three things: the formula; a query that sees no key has output 0, not NaN; and there is
    no dropout. Under ``torch.autocast`` query, key and value are cast as torch casts them.

    Args:
        query: ``(..., Hq, Lq, D)``; also ``(..., Lq, D)`` of any rank from 2.
        key: ``(..., Hkv, Lk, D)``. Leading dimensions broadcast against those of query and value.
        value: ``(..., Hkv, Lk, E)``.
        attn_mask: Broadcastable to ``(..., Hq, Lq, Lk)``: boolean, True = may attend, or floating, added to the scores.
        dropout_p: Must be 0: dropping every visible key of a channel would be log 0.
        is_causal: Query i sees keys ≤ i. Not together with ``attn_mask``.
        scale: Factor of the scores; default 1/√D.
        enable_gqa: Whether Hkv may be a divisor of Hq.
        beta: Inverse temperature: a finite number, or a tensor that broadcasts to ``(Hq, E)``.

    Returns:
        ``(..., Hq, Lq, E)`` in the dtype of query.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A shape or option that does not fit; dropout.
    """
    if dropout_p != 0:
        raise ValueError(_refuse("dropout_p", dropout_p, "0: dropping every visible key of a channel would be log 0"))
    if attn_mask is not None and is_causal:
        raise ValueError(_refuse("is_causal", is_causal, "False where attn_mask is given, as in torch"))
    if not isinstance(is_causal, bool):
        raise TypeError(_refuse("is_causal", repr(is_causal), "True or False, as in torch"))
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not isinstance(x, Tensor):
            raise TypeError(_refuse(name, type(x).__name__, "a tensor"))
        if x.ndim < 2:
            raise ValueError(_refuse(name, f"shape {tuple(x.shape)}", "rank 2 or more, (..., length, dim)"))
    query, key, value = autocast(query, key, value)
    lone = query.ndim == key.ndim == value.ndim == 2
    query, key, value = (x[None] if x.ndim == 2 else x for x in (query, key, value))
    query, key, value = _broadcast(query, key, value, enable_gqa)
    floating = attn_mask is not None and attn_mask.dtype != torch.bool
    out = laser_attention(
        query,
        key,
        value,
        None if floating else attn_mask,
        attn_mask if floating else None,
        scale=scale,
        beta=beta,
        is_causal=is_causal,
    )
    assert isinstance(out, Tensor)
    return out[0] if lone else out


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The three with the same leading dimensions; heads among them unless they are grouped."""
    trailing = 3 if enable_gqa else 2
    leading = [x.shape[: max(x.ndim - trailing, 0)] for x in (query, key, value)]
    try:
        shape = torch.broadcast_shapes(*leading)  # type: ignore[no-untyped-call]
    except RuntimeError:
        allowed = f"leading dimensions that broadcast to those of query and value, {[tuple(s) for s in leading]}"
        if not enable_gqa and query.shape[-3] != key.shape[-3]:
            allowed += "; enable_gqa=True for grouped heads"
        raise ValueError(_refuse("key", f"shape {tuple(key.shape)}", allowed)) from None
    query, key, value = (x.expand(*shape, *x.shape[-trailing:]) for x in (query, key, value))
    return query, key, value
