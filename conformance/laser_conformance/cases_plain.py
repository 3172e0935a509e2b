"""Cases of the levels forward, gradients, masks and options."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .case import TWO, Case
from .generate import Fill
from .problems import Spec


def pair(id: str, sentence: str, *, quick: bool = False, dtypes: str = TWO, **spec: Any) -> Iterator[Case]:
    """The case itself and the one with gradients."""
    problem = Spec(seed=id, **spec)
    yield Case(id=id, sentence=sentence, spec=problem, dtypes=dtypes)
    with_grad = f"{sentence.removesuffix('.')}; with gradients."
    yield Case(id=f"{id}+grad", sentence=with_grad, spec=problem, check="gradients", dtypes=dtypes, quick=quick)


def plain() -> Iterator[Case]:
    """Plain problems, with and without gradients."""
    for name, sentence, spec in (
        ("plain", "33 queries, 40 keys, two heads.", {}),
        ("square", "As many queries as keys, a multiple of 64, D = E = 64.", {"lengths": (64, 64), "dims": (64, 64)}),
        ("batch", "Two leading dimensions.", {"batch": (2, 3), "lengths": (17, 19)}),
        ("unbatched", "No leading dimension.", {"batch": ()}),
        ("decode", "One query, 300 keys.", {"lengths": (1, 300)}),
        ("one-key", "One key: the output is its value.", {"lengths": (9, 1)}),
        ("wide-values", "E larger than D.", {"dims": (24, 72)}),
        ("narrow-values", "E smaller than D.", {"dims": (80, 8)}),
        ("many-keys", "More keys than a tile holds.", {"lengths": (5, 700), "dims": (16, 32)}),
    ):
        problem = Spec(seed=f"forward/{name}", **spec)
        quick = name in ("plain", "decode", "wide-values")
        yield Case(id=f"forward/{name}", sentence=sentence, spec=problem, quick=quick)
        yield Case(id=f"gradients/{name}", sentence=sentence, spec=problem, check="gradients", quick=quick)


def masks() -> Iterator[Case]:
    """What a query sees."""
    square: dict[str, Any] = {"lengths": (37, 37)}
    yield from pair("masks/causal", "Query i sees keys ≤ i.", causal="top_left", **square, quick=True)
    yield from pair(
        "masks/causal-top-left", "More queries than keys, aligned at the top.", causal="top_left", lengths=(50, 30)
    )
    yield from pair(
        "masks/causal-top-left-wide", "More keys than queries, aligned at the top.", causal="top_left", lengths=(20, 45)
    )
    yield from pair(
        "masks/causal-bottom-right",
        "More keys than queries, aligned at the bottom.",
        causal="bottom_right",
        lengths=(20, 45),
    )
    yield from pair(
        "masks/causal-see-nothing",
        "Aligned at the bottom, so that the first queries see nothing.",
        causal="bottom_right",
        lengths=(45, 20),
        quick=True,
    )
    yield from pair(
        "masks/causal-tiles",
        "A causal diagonal through several tiles.",
        causal="top_left",
        lengths=(270, 270),
        dims=(8, 8),
        heads=(1, 1),
    )
    for left, right in ((5, 3), (0, 0), (None, 4), (4, None)):
        yield from pair(
            f"masks/window-{left}-{right}".lower(),
            f"A window of {left} to the left, {right} to the right.",
            window=(left, right),
            quick=(left == 5),
        )
    yield from pair(
        "masks/window-causal", "A window behind a causal diagonal.", window=(6, None), causal="top_left", **square
    )
    yield from pair(
        "masks/window-bottom-right",
        "A window relative to the bottom-right diagonal.",
        window=(4, 2),
        causal="bottom_right",
        lengths=(20, 45),
    )
    yield from pair(
        "masks/window-past-the-end",
        "Windows beyond the last key: those queries see nothing.",
        window=(3, 3),
        lengths=(60, 20),
    )
    yield from pair("masks/groups", "Two query heads for each key/value head.", heads=(4, 2), quick=True)
    yield from pair(
        "masks/groups-of-three", "Six query heads, two key/value heads, causal.", heads=(6, 2), causal="top_left"
    )
    yield from pair("masks/one-key-value-head", "All query heads read one key/value head.", heads=(5, 1), batch=(2,))
    lengths: dict[str, Any] = {"batch": (4,)}
    yield from pair(
        "masks/key-lengths",
        "Keys beyond a length do not exist; one entry has none at all.",
        key_lengths=(40, 17, 0, 1),
        **lengths,
        quick=True,
    )
    yield from pair(
        "masks/query-lengths", "Queries beyond a length see nothing.", query_lengths=(33, 9, 0, 32), **lengths
    )
    yield from pair(
        "masks/both-lengths",
        "Lengths of queries and keys, causal, grouped.",
        query_lengths=(33, 9, 20, 1),
        key_lengths=(7, 40, 21, 39),
        causal="bottom_right",
        heads=(4, 2),
        **lengths,
    )
    yield from pair("masks/mask", "A boolean mask for each head.", mask_shape=(1, 2, 33, 40))
    yield from pair("masks/mask-of-keys", "A padding mask, (B, 1, 1, Lk).", mask_shape=(3, 1, 1, 40), batch=(3,))
    yield from pair("masks/mask-broadcast", "A mask (Lq, Lk) for all.", mask_shape=(33, 40), batch=(2,))
    yield from pair("masks/mask-of-queries", "A mask (Lq, 1): some queries see nothing.", mask_shape=(33, 1))
    yield from pair(
        "masks/mask-sparse",
        "A sparse mask: some queries see nothing, some one key.",
        mask_shape=(1, 2, 33, 40),
        mask_density=0.04,
        quick=True,
    )
    yield from pair("masks/mask-none", "A mask that hides everything.", mask_shape=(33, 40), mask_density=0.0)
    yield from pair(
        "masks/all",
        "Mask, causality, window, lengths and groups together.",
        mask_shape=(2, 1, 33, 40),
        mask_density=0.8,
        causal="bottom_right",
        window=(12, None),
        key_lengths=(31, 40),
        query_lengths=(33, 20),
        heads=(4, 2),
        batch=(2,),
        quick=True,
    )


def options() -> Iterator[Case]:
    """Options of the call."""
    yield from pair("options/lse", "The log-sum-exp, and its gradient.", lse=True, quick=True)
    yield from pair(
        "options/lse-causal",
        "The log-sum-exp where some queries see nothing.",
        lse=True,
        causal="bottom_right",
        lengths=(45, 20),
        heads=(4, 2),
    )
    yield from pair("options/bias", "A bias for each head.", bias_shape=(1, 2, 33, 40))
    yield from pair(
        "options/bias-broadcast",
        "A bias (1, H, 1, Lk), broadcast over batch and queries.",
        bias_shape=(1, 2, 1, 40),
        batch=(3,),
    )
    yield from pair(
        "options/bias-of-positions",
        "A bias (Lq, Lk) for all batch entries and heads.",
        bias_shape=(33, 40),
        batch=(2,),
        heads=(4, 2),
    )
    yield from pair("options/bias-one", "A bias (1, 1): it moves the log-sum-exp alone.", bias_shape=(1, 1), lse=True)
    yield from pair(
        "options/bias-hides", "−∞ in the bias hides keys.", bias_shape=(1, 2, 33, 40), bias_hides=0.4, lse=True
    )
    yield from pair("options/soft-cap", "Scores through 2·tanh(·/2).", soft_cap=2.0, query=Fill("normal", 3))
    yield from pair(
        "options/soft-cap-bias",
        "The cap comes before the bias.",
        soft_cap=1.5,
        bias_shape=(1, 2, 33, 40),
        bias=Fill("normal", 3),
        query=Fill("normal", 3),
        lse=True,
        quick=True,
    )
    for scale in (0.0, 1.0, -0.4):
        yield from pair(f"options/scale-{scale}", f"scale = {scale}.", scale=scale, lse=True, quick=(scale == 0.0))
    yield from pair(
        "options/scale-0.0-causal",
        "scale = 0, causal: hidden is −∞ once scaled; 0·(−∞) is NaN.",
        scale=0.0,
        causal="top_left",
        lse=True,
        quick=True,
    )
    yield from pair(
        "options/scale-negative-causal",
        "scale = −2 and large scores, causal: the greatest score is that of the least product.",
        scale=-2.0,
        causal="top_left",
        query=Fill("normal", 10),
        lse=True,
        quick=True,
    )
    for beta in (0.0, 1e-3, -1e-3, 0.3, 2.0, -1.0, -0.5, 20.0):
        yield from pair(f"options/beta-{beta:g}", f"β = {beta:g}.", beta=beta, quick=beta in (0.0, 1e-3))
    yield from pair(
        "options/beta-array",
        "β for each head and channel, of either sign, zero and small.",
        beta_shape=(2, 16),
        quick=True,
    )
    yield from pair(
        "options/beta-of-heads", "β for each head, (Hq, 1), grouped.", beta_shape=(4, 1), heads=(4, 2), lse=True
    )
    yield from pair(
        "options/beta-of-channels",
        "β for each channel, (E,), with offset values.",
        beta_shape=(16,),
        value=Fill("normal", 1, 0.5),
    )
    yield from pair(
        "options/beta-large-array",
        "|β| ≥ 1 for each channel.",
        beta_shape=(1, 16),
        betas=(1.0, -2.0, 5.0),
        causal="top_left",
        lengths=(37, 37),
    )
    yield from pair(
        "options/all",
        "Everything together.",
        bias_shape=(2, 1, 33, 40),
        bias_hides=0.1,
        mask_shape=(33, 40),
        mask_density=0.8,
        soft_cap=4.0,
        beta_shape=(4, 16),
        lse=True,
        causal="bottom_right",
        window=(30, None),
        key_lengths=(40, 22),
        heads=(4, 2),
        batch=(2,),
        scale=0.3,
        quick=True,
    )
