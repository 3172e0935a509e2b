"""LASER attention over a paged cache: keys and values in blocks, found through a table of block numbers."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from laser_core import Inputs, Problem, _array, _problem, laser_attention
from laser_core._problem import Alignment

from . import DECODE

_refuse = _problem._refuse


def laser_attention_paged(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    key_value_seq_lengths: Tensor,
    *,
    scale: float | None = None,
    beta: float = 1.0,
    is_causal: bool | Alignment = False,
    window_size: tuple[int | None, int | None] | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""LASER attention of new queries over caches in pages; :func:`laser_core.laser_attention` has the equation.

    Key j of sequence b is ``key_cache[block_table[b, j // block_size], j % block_size]``: the layout of vLLM and of
    FlashAttention's ``flash_attn_with_kvcache``. The caches hold plain keys and values: nothing is exponentiated
    before it is stored. What lies beyond a sequence's length, in the cache or in the table, is never used.

    Few queries (up to 16) without a gradient run in the decode kernel on a GPU. Anything else gathers the pages into
    one array first, and then is :func:`laser_core.laser_attention`, gradients included.

    Args:
        query: ``(B, Hq, Lq, D)``; float16, bfloat16 or float32, as the caches.
        key_cache: ``(blocks, block_size, Hkv, D)``, where Hkv divides Hq.
        value_cache: ``(blocks, block_size, Hkv, E)``.
        block_table: ``(B, blocks per sequence)``, int32 or int64: the blocks of each sequence, in order.
        key_value_seq_lengths: ``(B,)``, int32 or int64: how many keys each sequence has, its new ones included.
            A length of 0 gives output 0 and log-sum-exp −∞.
        scale: Factor of the scores; default 1/√D.
        beta: Inverse temperature, a finite number.
        is_causal: ``"bottom_right"``: query i sees keys ≤ i + length − Lq, the length being the sequence's own: so the
            queries are the last of the sequence. True or ``"top_left"``: keys ≤ i.
        window_size: ``(left, right)`` relative to the same diagonal, or None.
        logits_soft_cap: c > 0: scores pass through c·tanh(·/c).
        return_lse: Whether to return ``(out, lse)``.

    Returns:
        ``out (B, Hq, Lq, E)`` in the dtype of query; with ``return_lse`` also ``lse (B, Hq, Lq)``, in float32.

    Raises:
        TypeError: An argument of the wrong kind or dtype.
        ValueError: A shape, device or option that does not fit. Block numbers are not checked: that would wait for
            the device. They must be inside the cache for every block that holds a key of the sequence.
    """
    arrays = (query, key_cache, value_cache, block_table, key_value_seq_lengths)
    options = (scale, beta, is_causal, window_size, logits_soft_cap, return_lse)
    seen = _problem._signature(dict(zip(_ARRAYS, arrays, strict=True)), options)
    known = None if seen is None else _KNOWN.get(seen)
    if known is None:
        known = _described(arrays, options)
        if seen is not None:
            if len(_KNOWN) >= _MOST:
                _KNOWN.clear()
            _KNOWN[seen] = known
    problem, served = known
    if not served or (torch.is_grad_enabled() and any(x.requires_grad for x in arrays[:3])):
        out, lse = _gathered(problem, query, key_cache, value_cache, block_table, key_value_seq_lengths)
    else:
        from . import decode

        inputs = Inputs(query, key_cache, value_cache, None, None, None, None, key_value_seq_lengths)
        pages = decode.Pages(block_table, key_cache.shape[1])
        cut = decode.tiles(problem, decode.device_of(query.device))
        out, _, lse = decode.launch(problem, inputs, pages, cut, residual=False)
    return (out, lse) if return_lse else out


_ARRAYS = ("query", "key_cache", "value_cache", "block_table", "key_value_seq_lengths")
_KNOWN: dict[Hashable, tuple[Problem, bool]] = {}  # calls that were found to be right
_MOST = 4096


def _described(arrays: tuple[Tensor, ...], options: tuple[Any, ...]) -> tuple[Problem, bool]:
    """The problem of a call with its pages gathered, all looked at, and whether the decode kernel serves it."""
    query, key_cache, value_cache, block_table, lengths = arrays
    scale, beta, is_causal, window_size, logits_soft_cap, return_lse = options
    _check(query, key_cache, value_cache, block_table, lengths, beta)
    shape = (*query.shape[:1], key_cache.shape[2], block_table.shape[1] * key_cache.shape[1])
    problem, _ = _problem.describe(  # of arrays that stand for the gathered ones
        query,
        query.new_empty(1).expand(*shape, key_cache.shape[3]),
        query.new_empty(1).expand(*shape, value_cache.shape[3]),
        scale=scale,
        beta=beta,
        is_causal=is_causal,
        window_size=window_size,
        key_value_seq_lengths=lengths,
        logits_soft_cap=logits_soft_cap,
        return_lse=return_lse,
    )
    return problem, DECODE.refuses(problem) is None and 0 not in problem.score_shape


def _gathered(
    problem: Problem, query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """The same through one array per sequence."""
    size = key_cache.shape[1]
    used = torch.arange(block_table.shape[1], device=query.device) * size < lengths[:, None]
    table = torch.where(used, block_table, 0).to(torch.int64)  # numbers that stand for nothing may be anything
    if key_cache.shape[0] == 0:
        key, value = (x.new_zeros(*table.shape, *x.shape[1:]) for x in (key_cache, value_cache))
    else:
        key, value = key_cache[table], value_cache[table]
    key, value = (x.flatten(1, 2).transpose(1, 2) for x in (key, value))
    i = torch.arange(problem.query_length, device=query.device)[:, None]
    j = torch.arange(problem.key_length, device=query.device)
    low, high = problem.band
    distance = j - i
    if problem.causal == "bottom_right":
        distance = distance + (problem.key_length - lengths.clamp(0, problem.key_length)[:, None, None, None])
    seen = torch.ones((), dtype=torch.bool, device=query.device)
    if low is not None:
        seen = seen & (distance >= low)
    if high is not None:
        seen = seen & (distance <= high)
    out, lse = laser_attention(
        query,
        key,
        value,
        seen if seen.ndim else None,
        scale=problem.scale,
        beta=problem.beta,
        key_value_seq_lengths=lengths,
        logits_soft_cap=problem.logits_soft_cap,
        return_lse=True,
    )
    return out, lse


def _check(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, block_table: Tensor, lengths: Tensor, beta: float
) -> None:
    arrays = dict(zip(_ARRAYS, (query, key_cache, value_cache, block_table, lengths), strict=True))
    _problem._check_arrays(arrays, required=tuple(arrays))
    for name, x in arrays.items():
        got = _array.dtype_name(x)
        if name in ("block_table", "key_value_seq_lengths"):
            if got not in ("int32", "int64"):
                raise TypeError(_refuse(name, f"dtype {got}", "int32, int64"))
        elif got != _array.dtype_name(query) or got not in DECODE.dtypes:
            allowed = ", ".join(DECODE.dtypes) if name == "query" else f"the dtype of query, {query.dtype}"
            raise TypeError(_refuse(name, f"dtype {got}", allowed))
    if isinstance(beta, Tensor):
        raise TypeError(_refuse("beta", f"a tensor of shape {tuple(beta.shape)}", "a finite real number"))
    for name, rank, layout in (
        ("query", 4, "(B, Hq, Lq, D)"),
        ("key_cache", 4, "(blocks, block_size, Hkv, D)"),
        ("value_cache", 4, "(blocks, block_size, Hkv, E)"),
        ("block_table", 2, "(B, blocks per sequence)"),
        ("key_value_seq_lengths", 1, "(B,)"),
    ):
        if arrays[name].ndim != rank:
            raise ValueError(_refuse(name, f"shape {tuple(arrays[name].shape)}", f"rank {rank}, {layout}"))
    batch, heads, _, dim = query.shape
    blocks, size, kv_heads, _ = key_cache.shape
    wanted = {
        "key_cache": (blocks, size, kv_heads, dim),
        "value_cache": (blocks, size, kv_heads, value_cache.shape[3]),
        "block_table": (batch, block_table.shape[1]),
        "key_value_seq_lengths": (batch,),
    }
    for name, want in wanted.items():
        if tuple(arrays[name].shape) != want:
            raise ValueError(_refuse(name, f"shape {tuple(arrays[name].shape)}", f"{want}, from the other arguments"))
    if size < 1:
        raise ValueError(_refuse("key_cache", f"block_size = {size}", "1 or more"))
    if math.prod((kv_heads, heads)) == 0 or heads % kv_heads:
        raise ValueError(_refuse("query", f"{heads} heads", f"a multiple of the {kv_heads} key/value heads"))
