"""A problem apart from its dtype, and its data as NumPy arrays."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .generate import Fill, Floats, fill, key_of, rounded, uniform

NORMAL = Fill()
Alignment = Literal["top_left", "bottom_right"]
GRADIENTS = ("query", "key", "value", "bias", "beta")
CONTENTS = ("query", "key", "value", "betas", "mask_density", "bias", "bias_hides", "seed")  # what no shape depends on


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Sizes, options and the contents of the arrays.

    ``beta_shape``, ``bias_shape`` and ``mask_shape`` ask for arrays of these shapes; β's entries are then taken in turn
    from ``betas``. ``mask_density`` is the share of True. ``poison`` is written into what no query sees.
    """

    batch: tuple[int, ...] = (1,)
    heads: tuple[int, int] = (2, 2)  # Hq, Hkv
    lengths: tuple[int, int] = (33, 40)  # Lq, Lk
    dims: tuple[int, int] = (16, 16)  # D, E
    query: Fill = NORMAL
    key: Fill = NORMAL
    value: Fill = NORMAL
    scale: float | None = None
    beta: float = 1.0
    beta_shape: tuple[int, ...] | None = None
    betas: tuple[float, ...] = (1.0, -2.0, 0.5, 0.0, 1e-3, 3.0, -0.25)
    causal: Alignment | None = None
    window: tuple[int | None, int | None] | None = None
    mask_shape: tuple[int, ...] | None = None
    mask_density: float = 0.6
    bias_shape: tuple[int, ...] | None = None
    bias: Fill = NORMAL
    bias_hides: float = 0.0  # the share of −∞ in the bias
    query_lengths: tuple[int, ...] | None = None
    key_lengths: tuple[int, ...] | None = None
    soft_cap: float | None = None
    lse: bool = False
    seed: str = ""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """(..., Hq, Lq, E)."""
        return (*self.batch, self.heads[0], self.lengths[0], self.dims[1])

    @property
    def terms(self) -> int:
        """How many p_ij·exp(βv_je) there are."""
        return math.prod(self.batch) * self.heads[0] * self.lengths[0] * self.lengths[1] * self.dims[1]


@dataclass(frozen=True)
class Data:
    """The arrays of a problem and its other options, by the names of :func:`laser_core.laser_attention`."""

    spec: Spec
    dtype: str
    arrays: Mapping[str, Floats]
    d_out: Floats
    d_lse: Floats | None

    @property
    def compute_dtype(self) -> str:
        """The dtype of the log-sum-exp."""
        return "float64" if self.dtype == "float64" else "float32"

    def options(self) -> dict[str, Any]:
        """The options that are not arrays."""
        s = self.spec
        options: dict[str, Any] = {"return_lse": s.lse}
        if "beta" not in self.arrays:
            options["beta"] = s.beta
        for name, value in (("scale", s.scale), ("window_size", s.window), ("logits_soft_cap", s.soft_cap)):
            if value is not None:
                options[name] = value
        if s.causal is not None:
            options["is_causal"] = s.causal
        return options

    def with_arrays(self, **changed: Floats) -> Data:
        """The same problem with other contents."""
        return dataclasses.replace(self, arrays={**self.arrays, **changed})

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        return 1 / math.sqrt(self.spec.dims[0]) if self.spec.scale is None else self.spec.scale


def build(spec: Spec, dtype: str) -> Data:
    """The data of a problem in a dtype."""
    (hq, hkv), (lq, lk), (d, e) = spec.heads, spec.lengths, spec.dims
    arrays: dict[str, Floats] = {
        "query": fill(spec.query, f"{spec.seed}/query", (*spec.batch, hq, lq, d), dtype),
        "key": fill(spec.key, f"{spec.seed}/key", (*spec.batch, hkv, lk, d), dtype),
        "value": fill(spec.value, f"{spec.seed}/value", (*spec.batch, hkv, lk, e), dtype),
    }
    if spec.mask_shape is not None:
        arrays["attn_mask"] = uniform(key_of(f"{spec.seed}/mask"), spec.mask_shape) < spec.mask_density
    if spec.bias_shape is not None:
        bias = fill(spec.bias, f"{spec.seed}/bias", spec.bias_shape, dtype)
        hide = uniform(key_of(f"{spec.seed}/hide"), spec.bias_shape) < spec.bias_hides
        arrays["bias"] = rounded(np.where(hide, -math.inf, bias.astype(np.float64)), dtype)
    if spec.beta_shape is not None:
        arrays["beta"] = rounded(np.resize(np.asarray(spec.betas), spec.beta_shape), dtype)
    for name, lengths in (("query_seq_lengths", spec.query_lengths), ("key_value_seq_lengths", spec.key_lengths)):
        if lengths is not None:
            arrays[name] = np.asarray(lengths, dtype=np.int32).reshape(spec.batch)
    compute = "float64" if dtype == "float64" else "float32"
    return Data(
        spec,
        dtype,
        arrays,
        d_out=fill(Fill(), f"{spec.seed}/d_out", spec.out_shape, dtype),
        d_lse=fill(Fill(), f"{spec.seed}/d_lse", spec.out_shape[:-1], compute) if spec.lse else None,
    )


def visible(data: Data, rows: slice | None = None) -> Floats:
    """Which keys each query sees, (..., Hq, Lq, Lk)."""
    s = data.spec
    lq, lk = s.lengths
    i = np.arange(lq)[rows or slice(None), None]
    j = np.arange(lk)[None, :]
    seen = np.ones((*s.batch, s.heads[0], i.shape[0], lk), dtype=bool)
    diagonal = i + (lk - lq if s.causal == "bottom_right" else 0)
    if s.causal is not None:
        seen &= j <= diagonal
    left, right = s.window or (None, None)
    if left is not None:
        seen &= j >= diagonal - left
    if right is not None:
        seen &= j <= diagonal + right
    if "attn_mask" in data.arrays:
        mask = np.broadcast_to(data.arrays["attn_mask"], (*s.batch, s.heads[0], lq, lk))
        seen &= mask[..., rows or slice(None), :]
    if "bias" in data.arrays:
        bias = np.broadcast_to(data.arrays["bias"], (*s.batch, s.heads[0], lq, lk))
        seen &= bias[..., rows or slice(None), :] != -math.inf
    for name, position in (("query_seq_lengths", i), ("key_value_seq_lengths", j)):
        if name in data.arrays:
            seen &= position < data.arrays[name].reshape((*s.batch, 1, 1, 1))
    return seen
