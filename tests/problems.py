"""Problems that several test files share: names, shapes and options, and random arrays for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from laser_core import Problem, _tables

SHAPES = {  # batch, Hq, Hkv, Lq, Lk, D, E
    "square": ((2,), 2, 2, 9, 9, 4, 4),
    "grouped": ((2,), 4, 2, 7, 11, 5, 3),
    "more queries": ((), 3, 1, 12, 5, 4, 6),
    "two batch axes": ((2, 3), 2, 1, 5, 6, 3, 2),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "bottom right": {"is_causal": "bottom_right"},
    "window": {"window_size": (2, 1)},
    "left window, causal": {"window_size": (3, None), "is_causal": "bottom_right"},
    "mask": {"attn_mask": "full"},
    "mask per key": {"attn_mask": "keys"},
    "bias": {"bias": "full"},
    "bias per head": {"bias": "heads"},
    "lengths": {"query_seq_lengths": "q", "key_value_seq_lengths": "k"},
    "soft cap and bias": {"logits_soft_cap": 1.5, "bias": "rows"},
    "scale 0": {"scale": 0.0},
    "beta 0": {"beta": 0.0},
    "beta 1e-3": {"beta": 1e-3},
    "beta -2": {"beta": -2.0},
    "beta per channel": {"beta": "channels"},
    "beta per head and channel": {"beta": "full"},
    "all together": {
        "is_causal": "bottom_right",
        "window_size": (6, None),
        "attn_mask": "full",
        "bias": "full",
        "key_value_seq_lengths": "k",
        "logits_soft_cap": 2.0,
        "beta": "full",
        "scale": 0.7,
    },
}


def make(shape: str, options: str, seed: int = 0, sigma: float = 1.0) -> tuple[dict[str, Any], np.ndarray, np.ndarray]:
    """Keyword arguments of a call in float64, and cotangents of output and log-sum-exp."""
    rng = np.random.default_rng(seed)
    batch, hq, hkv, lq, lk, d, e = SHAPES[shape]
    arrays = {
        ("attn_mask", "full"): lambda: rng.random((*batch, hq, lq, lk)) < 0.6,
        ("attn_mask", "keys"): lambda: rng.random((lk,)) < 0.7,
        ("bias", "full"): lambda: rng.standard_normal((*batch, hq, lq, lk)),
        ("bias", "heads"): lambda: rng.standard_normal((hq, 1, lk)),
        ("bias", "rows"): lambda: rng.standard_normal((lq, 1)),
        ("query_seq_lengths", "q"): lambda: rng.integers(1, lq + 1, batch),
        ("key_value_seq_lengths", "k"): lambda: rng.integers(0, lk + 1, batch),
        ("beta", "channels"): lambda: np.linspace(-1.5, 2, e),
        ("beta", "full"): lambda: np.linspace(-2, 2, hq * e).reshape(hq, e),
    }
    call: dict[str, Any] = {
        "query": rng.standard_normal((*batch, hq, lq, d)),
        "key": rng.standard_normal((*batch, hkv, lk, d)),
        "value": sigma * rng.standard_normal((*batch, hkv, lk, e)),
    }
    for name, value in OPTIONS[options].items():
        found = arrays.get((name, value)) if isinstance(value, str) else None
        call[name] = value if found is None else np.asarray(found())
    return call, rng.standard_normal((*batch, hq, lq, e)), rng.standard_normal((*batch, hq, lq))


def error(got: np.ndarray, want: np.ndarray) -> float:
    """The largest difference; a finite number only where both agree on what is not finite."""
    assert got.shape == want.shape
    if not np.array_equal(np.isneginf(got), np.isneginf(want)):
        return float("inf")
    finite = ~np.isneginf(want)
    return float(np.max(np.abs(got[finite] - want[finite]), initial=0.0))


def on_gpu(framework: str, **sizes: Any) -> Problem:
    """A grouped problem in bfloat16 on a GPU, for questions to a record that need no GPU."""
    plain: dict[str, Any] = {
        "batch": (2,),
        "query_heads": 4,
        "key_value_heads": 2,
        "query_length": 100,
        "key_length": 90,
        "head_dim": 64,
        "value_dim": 64,
        "scale": 0.125,
    }
    return Problem(framework=framework, device="cuda", dtype="bfloat16", **plain | sizes)


def check_tables(package: str, engines: Mapping[str, tuple[str, ...]]) -> list[Path]:
    """The tables that a package ships: each says where it comes from, and names engines that there are."""
    shipped = _tables.shipped(package)
    for path in shipped:
        found = _tables.read(path)
        assert found["commit"]
        assert found["versions"]
        for r in found["rows"]:
            assert r["engine"] in engines[r["pass"]]
            assert ("ms" in r) != ("not timed" in r)
    return shipped
