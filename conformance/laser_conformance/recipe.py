"""The published recipe in a dtype, to draw beside what is judged: exp of the values, attention, log."""

from __future__ import annotations

import math

import numpy as np

from .case import Case
from .cases import all_cases
from .compare import entries
from .generate import Floats, rounded
from .problems import Data, build, visible
from .tolerance import out_bound
from .truth import truth


def recipe(data: Data) -> Floats:
    """o for β = 1: values relative to their maximum over the whole sequence, operands and result in the dtype."""
    compute = np.dtype(data.compute_dtype)
    q, k, v = (data.arrays[n].astype(compute) for n in ("query", "key", "value"))
    group = data.spec.heads[0] // data.spec.heads[1]
    k, v = (np.repeat(x, group, axis=-3) for x in (k, v))
    s = np.where(visible(data), data.scale * (q @ k.swapaxes(-1, -2)), -math.inf)
    p = np.exp(s - s.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    top = v.max(axis=-2, keepdims=True)

    def narrow(x: Floats) -> Floats:
        return rounded(x, data.dtype).astype(compute)

    attended = narrow(narrow(p) @ narrow(np.exp(v - top)))
    return rounded(np.log(attended) + top, data.dtype)


def sweep() -> list[tuple[float, Case]]:
    """The cases that differ in the range of their values alone, with that range."""
    found = []
    for case in all_cases():
        if case.id.startswith("precision/range-") and case.check == "forward":
            found.append((case.spec.value.scale, case))
    return found


def recipe_shares(dtype: str) -> list[tuple[float, float]]:
    """Worst error of the recipe over what is allowed, for each range; infinite where a result is not finite."""
    shares = []
    for sigma, case in sweep():
        data = build(case.spec, dtype)
        expected = truth(data)
        with np.errstate(all="ignore"):
            finding = entries("out", recipe(data), expected.out, out_bound(data, expected))
        shares.append((sigma, finding.ratio or 0.0))
    return shares
