"""Cases at the head dimensions 64 and 128, over several tiles: kernels for matrix units may serve nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .case import EACH, Case
from .cases_plain import pair
from .generate import Fill
from .problems import Spec

WIDTHS = (64, 128)


def wide() -> Iterator[Case]:
    """What other levels ask of small heads, asked of those that models have."""
    for width in WIDTHS:
        dims: dict[str, Any] = {"dims": (width, width)}
        causal: dict[str, Any] = {**dims, "causal": "top_left", "lengths": (140, 140)}
        alone: dict[str, Any] = {**causal, "heads": (1, 1)}
        name = f"of-{width}"
        yield from pair(
            f"forward/heads-{name}", f"D = E = {width}, several tiles.", lengths=(70, 200), lse=True, **dims
        )
        yield from pair(f"masks/causal-{name}", f"D = E = {width}, causal, grouped.", heads=(4, 2), lse=True, **causal)
        yield from pair(
            f"masks/causal-bottom-right-{name}",
            f"D = E = {width}, causal at the bottom, the first queries see nothing.",
            causal="bottom_right",
            lengths=(150, 70),
            **dims,
        )
        yield from pair(f"options/negative-beta-{name}", f"D = E = {width}, β = −2.", beta=-2.0, **alone)
        for sigma in (3.0, 12.0, 100.0):
            yield Case(
                id=f"precision/range-{sigma:g}-{name}+grad",
                sentence=f"D = E = {width}, value ~ N(0, {sigma:g}²), causal; with gradients.",
                spec=Spec(seed=f"precision/{sigma:g}-{name}", value=Fill("normal", sigma), **alone),
                check="gradients",
                dtypes=EACH,
            )
        for kind, sentence, fill in (
            ("constant-columns", "Each channel has one value.", Fill("columns", 3)),
            ("small-constant-columns", "Each channel has one small value.", Fill("columns", 0.2)),
            ("offset-values", "Values of 100 ± 1.", Fill("normal", 1, 100)),
            ("very-negative-values", "Values of −500 ± 1.", Fill("normal", 1, -500)),
            ("future-outliers", "Values of the future are 100 times larger.", Fill("future", 100)),
        ):
            yield Case(
                id=f"hostile/{kind}-{name}+grad",
                sentence=f"{sentence} D = E = {width}, causal; with gradients.",
                spec=Spec(seed=f"hostile/{kind}-{name}", value=fill, **alone),
                check="gradients",
            )
        yield Case(
            id=f"isolation/rows-{name}",
            sentence="NaN, ∞ and other numbers in the future of some queries, several tiles away.",
            spec=Spec(seed=f"isolation/rows-{name}", **alone),
            check="isolation of rows",
            dtypes=EACH,
        )
        yield Case(
            id=f"isolation/causal-{name}",
            sentence="Keys after the last query.",
            spec=Spec(seed=f"isolation/causal-{name}", heads=(2, 1), **dims, causal="top_left", lengths=(130, 150)),
            check="isolation",
        )
        yield Case(
            id=f"isolation/heads-{name}",
            sentence="A head outside the fast range beside others, and one whose hidden queries hold NaN and ∞.",
            spec=Spec(
                seed=f"isolation/heads-{name}",
                heads=(4, 4),
                lse=True,
                **dims,
                causal="bottom_right",
                lengths=(140, 77),
            ),
            check="isolation of heads",
        )
        yield Case(
            id=f"determinism/{name}",
            sentence=f"D = E = {width}, grouped, several tiles.",
            spec=Spec(seed=f"determinism/{name}", heads=(4, 2), lengths=(200, 300), **dims),
            check="deterministic",
        )
