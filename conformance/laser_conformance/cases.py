"""The levels, each a promise with a name, and their cases, each with a sentence."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from .generate import Fill
from .problems import Spec

LEVELS = {
    "forward": "Outputs of plain problems are right.",
    "gradients": "So are the gradients of query, key and value.",
    "masks": "Causality both ways, windows, grouped heads, lengths, boolean masks, queries that see nothing.",
    "options": "Bias, soft cap, β as a number and as an array, log-sum-exp, scale; with their gradients.",
    "precision": "Each dtype served is as precise as promised, at every range of values.",
    "hostile": "Numbers that break naive implementations: large scores, outliers, subnormals, the largest of the dtype.",
    "isolation": "What a query cannot see does not change its results, NaN and ∞ included.",
    "determinism": "The same bits from run to run, forward and backward.",
    "layout": "Any strides, any size: odd, around tile edges, one, none.",
    "laws": "What holds for every problem and needs no reference: shifts, limits, permutations, merging, prefixes.",
    "framework": "What the array library does with functions: automatic differentiation, compilation, vectorisation.",
    "scale": "Long sequences, and addresses beyond 2³¹.",
}

EACH = "each"  # in every dtype that is served
TWO = "two"  # in one wide and one narrow dtype


@dataclass(frozen=True, kw_only=True)
class Case:
    """One question to an implementation.

    Attributes:
        id: ``level/name``, plus ``+grad`` where gradients are asked for.
        sentence: What it is about.
        spec: The problem.
        check: The name of what is done with it, in :mod:`laser_conformance.checks` and its neighbours.
        dtypes: ``EACH`` or ``TWO``.
        quick: Whether it is part of the quick subset.
        libraries: Array libraries for which it makes sense; empty is all.
        memory: Bytes that it needs beside the implementation's own.
    """

    id: str
    sentence: str
    spec: Spec = Spec()
    check: str = "forward"
    dtypes: str = TWO
    quick: bool = False
    libraries: tuple[str, ...] = ()
    memory: int = 0

    @property
    def level(self) -> str:
        """The level that the case belongs to."""
        return self.id.partition("/")[0]


def _pair(id: str, sentence: str, *, quick: bool = False, dtypes: str = TWO, **spec: Any) -> Iterator[Case]:
    """The case itself and the one with gradients."""
    problem = Spec(seed=id, **spec)
    yield Case(id=id, sentence=sentence, spec=problem, dtypes=dtypes, quick=quick)
    with_grad = f"{sentence.removesuffix('.')}; with gradients."
    yield Case(id=f"{id}+grad", sentence=with_grad, spec=problem, check="gradients", dtypes=dtypes, quick=quick)


def _plain() -> Iterator[Case]:
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
        problem = Spec(seed=f"forward/{name}", **spec)  # type: ignore[arg-type]
        quick = name in ("plain", "decode", "wide-values")
        yield Case(id=f"forward/{name}", sentence=sentence, spec=problem, dtypes=EACH, quick=quick)
        yield Case(
            id=f"gradients/{name}", sentence=sentence, spec=problem, check="gradients", dtypes=EACH, quick=quick
        )


def _masks() -> Iterator[Case]:
    square: dict[str, Any] = {"lengths": (37, 37)}
    yield from _pair("masks/causal", "Query i sees keys ≤ i.", causal="top_left", **square, quick=True)
    yield from _pair("masks/causal-top-left", "More queries than keys, aligned at the top.", causal="top_left", lengths=(50, 30))
    yield from _pair("masks/causal-top-left-wide", "More keys than queries, aligned at the top.", causal="top_left", lengths=(20, 45))
    yield from _pair("masks/causal-bottom-right", "More keys than queries, aligned at the bottom.", causal="bottom_right", lengths=(20, 45), quick=True)
    yield from _pair("masks/causal-see-nothing", "Aligned at the bottom, so that the first queries see nothing.", causal="bottom_right", lengths=(45, 20), quick=True)
    yield from _pair("masks/causal-tiles", "A causal diagonal through several tiles.", causal="top_left", lengths=(270, 270), dims=(8, 8), heads=(1, 1))
    for left, right in ((5, 3), (0, 0), (None, 4), (4, None)):
        yield from _pair(f"masks/window-{left}-{right}".lower(), f"A window of {left} to the left, {right} to the right.", window=(left, right), quick=(left == 5))
    yield from _pair("masks/window-causal", "A window behind a causal diagonal.", window=(6, None), causal="top_left", **square)
    yield from _pair("masks/window-bottom-right", "A window relative to the bottom-right diagonal.", window=(4, 2), causal="bottom_right", lengths=(20, 45))
    yield from _pair("masks/window-past-the-end", "Windows beyond the last key: those queries see nothing.", window=(3, 3), lengths=(60, 20))
    yield from _pair("masks/groups", "Two query heads for each key/value head.", heads=(4, 2), quick=True)
    yield from _pair("masks/groups-of-three", "Six query heads, two key/value heads, causal.", heads=(6, 2), causal="top_left")
    yield from _pair("masks/one-key-value-head", "All query heads read one key/value head.", heads=(5, 1), batch=(2,))
    lengths: dict[str, Any] = {"batch": (4,)}
    yield from _pair("masks/key-lengths", "Keys beyond a length do not exist; one entry has none at all.", key_lengths=(40, 17, 0, 1), **lengths, quick=True)
    yield from _pair("masks/query-lengths", "Queries beyond a length see nothing.", query_lengths=(33, 9, 0, 32), **lengths)
    yield from _pair("masks/both-lengths", "Lengths of queries and keys, causal, grouped.", query_lengths=(33, 9, 20, 1), key_lengths=(7, 40, 21, 39), causal="bottom_right", heads=(4, 2), **lengths)
    yield from _pair("masks/mask", "A boolean mask for each head.", mask_shape=(1, 2, 33, 40), quick=True)
    yield from _pair("masks/mask-of-keys", "A padding mask, (B, 1, 1, Lk).", mask_shape=(3, 1, 1, 40), batch=(3,))
    yield from _pair("masks/mask-broadcast", "A mask (Lq, Lk) for all.", mask_shape=(33, 40), batch=(2,))
    yield from _pair("masks/mask-of-queries", "A mask (Lq, 1): some queries see nothing.", mask_shape=(33, 1))
    yield from _pair("masks/mask-sparse", "A sparse mask: some queries see nothing, some one key.", mask_shape=(1, 2, 33, 40), mask_density=0.04, quick=True)
    yield from _pair("masks/mask-none", "A mask that hides everything.", mask_shape=(33, 40), mask_density=0.0)
    yield from _pair("masks/all", "Mask, causality, window, lengths and groups together.", mask_shape=(2, 1, 33, 40), mask_density=0.8, causal="bottom_right", window=(12, None), key_lengths=(31, 40), query_lengths=(33, 20), heads=(4, 2), batch=(2,), quick=True)


def _options() -> Iterator[Case]:
    yield from _pair("options/lse", "The log-sum-exp, and its gradient.", lse=True, quick=True)
    yield from _pair("options/lse-causal", "The log-sum-exp where some queries see nothing.", lse=True, causal="bottom_right", lengths=(45, 20), heads=(4, 2))
    yield from _pair("options/bias", "A bias for each head.", bias_shape=(1, 2, 33, 40), quick=True)
    yield from _pair("options/bias-broadcast", "A bias (1, H, 1, Lk), broadcast over batch and queries.", bias_shape=(1, 2, 1, 40), batch=(3,))
    yield from _pair("options/bias-of-positions", "A bias (Lq, Lk) for all batch entries and heads.", bias_shape=(33, 40), batch=(2,), heads=(4, 2))
    yield from _pair("options/bias-one", "A bias (1, 1): it moves the log-sum-exp alone.", bias_shape=(1, 1), lse=True)
    yield from _pair("options/bias-hides", "−∞ in the bias hides keys.", bias_shape=(1, 2, 33, 40), bias_hides=0.4, lse=True)
    yield from _pair("options/soft-cap", "Scores through 2·tanh(·/2).", soft_cap=2.0, query=Fill("normal", 3), quick=True)
    yield from _pair("options/soft-cap-bias", "The cap comes before the bias.", soft_cap=1.5, bias_shape=(1, 2, 33, 40), bias=Fill("normal", 3), query=Fill("normal", 3), lse=True, quick=True)
    for scale in (0.0, 1.0, -0.4):
        yield from _pair(f"options/scale-{scale}", f"scale = {scale}.", scale=scale, lse=True, quick=(scale == 0.0))
    for beta in (0.0, 1e-3, -1e-3, 0.3, 2.0, -1.0, -0.5, 20.0):
        yield from _pair(f"options/beta-{beta:g}", f"β = {beta:g}.", beta=beta, quick=beta in (0.0, 1e-3, -1.0))
    yield from _pair("options/beta-array", "β for each head and channel, of either sign, zero and small.", beta_shape=(2, 16), quick=True)
    yield from _pair("options/beta-of-heads", "β for each head, (Hq, 1), grouped.", beta_shape=(4, 1), heads=(4, 2), lse=True)
    yield from _pair("options/beta-of-channels", "β for each channel, (E,), with offset values.", beta_shape=(16,), value=Fill("normal", 1, 0.5))
    yield from _pair("options/beta-large-array", "|β| ≥ 1 for each channel.", beta_shape=(1, 16), betas=(1.0, -2.0, 5.0), causal="top_left", lengths=(37, 37))
    yield from _pair("options/all", "Everything together.", bias_shape=(2, 1, 33, 40), bias_hides=0.1, mask_shape=(33, 40), mask_density=0.8, soft_cap=4.0, beta_shape=(4, 16), lse=True, causal="bottom_right", window=(30, None), key_lengths=(40, 22), heads=(4, 2), batch=(2,), scale=0.3, quick=True)


SIGMAS = (0.1, 1.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 400.0)


def _precision() -> Iterator[Case]:
    for sigma in SIGMAS:
        spec = Spec(seed=f"precision/{sigma:g}", value=Fill("normal", sigma), causal="top_left", lengths=(96, 96), dims=(16, 16), lse=True)
        yield Case(id=f"precision/range-{sigma:g}", sentence=f"value ~ N(0, {sigma:g}²), causal.", spec=spec, dtypes=EACH, quick=sigma in (1.0, 20.0))
        yield Case(id=f"precision/range-{sigma:g}+grad", sentence=f"value ~ N(0, {sigma:g}²), causal; with gradients.", spec=spec, check="gradients", dtypes=EACH, quick=sigma in (1.0, 20.0))
    for beta in (-4.0, 0.25, 0.0):
        spec = Spec(seed=f"precision/beta{beta:g}", value=Fill("normal", 2), beta=beta, lengths=(96, 96), dims=(16, 16))
        yield Case(id=f"precision/beta-{beta:g}+grad", sentence=f"β = {beta:g}; with gradients.", spec=spec, check="gradients", dtypes=EACH)


def _hostile() -> Iterator[Case]:
    causal: dict[str, Any] = {"causal": "top_left", "lengths": (64, 64)}
    yield from _pair("hostile/values-beyond-float16", "Values up to 6·10⁴, most of float16's range.", value=Fill("normal", 1e4), quick=True)
    yield from _pair("hostile/scores-of-1000", "Scores of ±10³.", query=Fill("normal", 16), key=Fill("normal", 16), lse=True, quick=True)
    yield from _pair("hostile/large-everything", "Scores of ±10³ and values of ±10³, which compete.", query=Fill("normal", 16), key=Fill("normal", 16), value=Fill("normal", 300))
    yield from _pair("hostile/future-outliers", "Values of the future are 10³ times larger.", value=Fill("future", 1e3), **causal, quick=True)
    yield from _pair("hostile/future-outliers-negative-beta", "The same with β = −1.", value=Fill("future", 1e3), beta=-1.0, **causal)
    yield from _pair("hostile/spikes", "One value in 16 is 200 times larger.", value=Fill("spikes", 200))
    yield from _pair("hostile/constant-columns", "Each channel has one value: the output is that.", value=Fill("columns", 3), quick=True)
    yield from _pair("hostile/one-value", "All values are 0.3.", value=Fill("same", 0.3))
    yield from _pair("hostile/offset-values", "Values of 100 ± 1.", value=Fill("normal", 1, 100))
    yield from _pair("hostile/very-negative-values", "Values of −500 ± 1.", value=Fill("normal", 1, -500), quick=True)
    yield from _pair("hostile/equal-scores", "All scores are equal: the queries are zero.", query=Fill("same", 0), lse=True)
    yield from _pair("hostile/all-zero", "Everything is zero.", query=Fill("same", 0), key=Fill("same", 0), value=Fill("same", 0), lse=True)
    yield from _pair("hostile/subnormal-values", "Values are subnormal numbers.", value=Fill("subnormal"))
    yield from _pair("hostile/subnormal-keys", "Keys are subnormal numbers.", key=Fill("subnormal"))
    yield from _pair("hostile/bias-of-1000", "A bias of ±10³.", bias_shape=(33, 40), bias=Fill("normal", 300), lse=True)
    yield from _pair("hostile/small-beta-large-values", "β = 10⁻³, values of ±10³.", beta=1e-3, value=Fill("normal", 300))
    yield from _pair("hostile/large-beta", "β = 300: almost the maximum.", beta=300.0, value=Fill("normal", 3))
    yield from _pair("hostile/peaked", "One key takes nearly all the weight of each query.", query=Fill("normal", 8), key=Fill("normal", 8), **causal, lse=True)
    yield Case(id="hostile/largest-values", sentence="Values near the largest of the dtype, of either sign.", spec=Spec(seed="hostile/largest", value=Fill("largest")), quick=True)
    yield Case(id="hostile/largest-values-causal", sentence="The same, causal, grouped.", spec=Spec(seed="hostile/largest-causal", value=Fill("largest"), heads=(4, 2), **causal))


def _isolation() -> Iterator[Case]:
    def case(name: str, sentence: str, check: str = "isolation", quick: bool = False, **spec: Any) -> Case:
        return Case(id=f"isolation/{name}", sentence=sentence, spec=Spec(seed=f"isolation/{name}", **spec), check=check, quick=quick)

    yield case("key-lengths", "NaN, ∞ and other numbers beyond the length of the keys.", key_lengths=(25, 40), query_lengths=(33, 20), batch=(2,), lse=True, quick=True)
    yield case("causal-top-left", "Keys after the last query.", causal="top_left", lengths=(20, 40), heads=(4, 2))
    yield case("causal-bottom-right", "Queries that see nothing hold NaN.", causal="bottom_right", lengths=(40, 20))
    yield case("window", "Keys outside of every window.", window=(2, 2), lengths=(12, 300), dims=(8, 8))
    yield case("mask", "Keys that the mask hides.", mask_shape=(2, 1, 1, 40), batch=(2,), heads=(4, 2), quick=True)
    yield case("bias", "Keys that −∞ in the bias hides.", bias_shape=(1, 1, 1, 40), bias_hides=0.4)
    yield case("beta-small", "With β = ½.", beta=0.5, key_lengths=(25, 40), batch=(2,))
    yield case("beta-zero", "With β = 0.", beta=0.0, key_lengths=(25, 40), batch=(2,))
    yield case("beta-negative", "With β = −1.", beta=-1.0, key_lengths=(25, 40), batch=(2,))
    yield case("rows-causal", "NaN and ∞ in the future of some queries.", check="isolation of rows", causal="top_left", lengths=(48, 48), lse=True, quick=True)
    yield case("rows-tiles", "The same, several tiles away.", check="isolation of rows", causal="top_left", lengths=(300, 300), dims=(8, 8))
    yield case("rows-window", "The same behind a window.", check="isolation of rows", window=(5, 5), lengths=(60, 60))
    yield case("rows-mask", "The same behind a mask.", check="isolation of rows", mask_shape=(33, 40), mask_density=0.3)
    yield case("entries-bias", "NaN and ∞ in entries of the bias that causality hides.", check="isolation of entries", bias_shape=(33, 40), causal="top_left", quick=True)
    yield case("entries-mask", "Entries of the mask that causality and lengths hide.", check="isolation of entries", mask_shape=(33, 40), causal="bottom_right", key_lengths=(30,))
    yield case("batches", "NaN in all of another batch entry.", check="isolation of batches", batch=(3,), heads=(4, 2))


def _determinism() -> Iterator[Case]:
    for name, sentence, spec in (
        ("plain", "Several tiles of queries and keys.", {"lengths": (150, 530), "heads": (1, 1), "dims": (8, 8)}),
        ("groups", "Gradients summed over a group of heads.", {"lengths": (130, 130), "heads": (8, 2), "causal": "top_left"}),
        ("broadcast", "Gradients of a broadcast bias and of β.", {"batch": (3,), "bias_shape": (33, 40), "beta_shape": (1, 1)}),
        ("wide-range", "Outside the fast range.", {"lengths": (70, 200), "value": Fill("normal", 300)}),
    ):
        yield Case(id=f"determinism/{name}", sentence=sentence, spec=Spec(seed=f"determinism/{name}", **spec), check="deterministic", quick=name == "groups")  # type: ignore[arg-type]


def _layout() -> Iterator[Case]:
    for check, sentence in (
        ("heads inside", "Stored as (..., L, H, D)."),
        ("columns", "Stored as (..., D, L)."),
        ("gaps", "Every second row and column of a larger array."),
        ("stride 0", "Broadcast views."),
    ):
        name = check.replace(" ", "-")
        yield Case(id=f"layout/{name}", sentence=sentence, spec=Spec(seed=f"layout/{name}", batch=(2,), heads=(4, 2), bias_shape=(2, 4, 33, 40)), check=check, quick=check == "heads inside")
    for lq, lk in ((1, 1), (7, 3), (15, 17), (63, 65), (64, 64), (127, 129), (128, 128), (129, 127), (256, 255), (257, 513)):
        yield from _pair(f"layout/sizes-{lq}x{lk}", f"{lq} queries, {lk} keys, causal at the bottom.", lengths=(lq, lk), dims=(16, 8), causal="bottom_right", heads=(2, 1), quick=(lq in (63, 129)))
    for d, e in ((1, 1), (3, 5), (40, 24), (96, 96), (128, 128), (160, 256)):
        yield from _pair(f"layout/dims-{d}x{e}", f"D = {d}, E = {e}.", lengths=(20, 30), dims=(d, e), quick=d == 3)
    for name, sentence, spec in (
        ("no-keys", "No key: zeros and −∞.", {"lengths": (5, 0), "lse": True}),
        ("no-queries", "No query: an empty output, zero gradients.", {"lengths": (0, 5), "lse": True}),
        ("no-batch", "An empty batch.", {"batch": (0,)}),
        ("nothing", "Neither queries nor keys.", {"lengths": (0, 0)}),
    ):
        yield from _pair(f"layout/{name}", sentence, **spec, quick=name == "no-keys")  # type: ignore[arg-type]


def _scale() -> Iterator[Case]:
    for name, sentence, spec in (
        ("decode-64k", "One query, 65536 keys.", {"lengths": (1, 65536), "dims": (32, 32), "heads": (2, 1)}),
        ("prefill-4k", "4096 causal queries and keys.", {"lengths": (4096, 4096), "dims": (16, 16), "heads": (1, 1), "causal": "top_left"}),
        ("window-16k", "16384 queries and keys, a window of 128.", {"lengths": (16384, 16384), "dims": (8, 8), "heads": (1, 1), "window": (128, 0)}),
        ("many-heads", "A batch of 64 with 16 heads.", {"lengths": (16, 16), "batch": (64,), "heads": (16, 4), "dims": (8, 8)}),
    ):
        yield Case(id=f"scale/{name}", sentence=sentence, spec=Spec(seed=f"scale/{name}", **spec), check="long", memory=2**31)  # type: ignore[arg-type]
    yield Case(id="scale/beyond-2-31", sentence="Two heads 2³¹ elements apart in memory.", spec=Spec(seed="scale/far"), check="far apart", memory=20 * 2**30)


def all_cases() -> tuple[Case, ...]:
    """Every case, in the order of the levels."""
    found = (*_plain(), *_masks(), *_options(), *_precision(), *_hostile(), *_isolation(), *_determinism(), *_layout(), *_scale())
    order = list(LEVELS)
    return tuple(sorted(found, key=lambda case: order.index(case.level)))


def choose(levels: tuple[str, ...] = (), only: tuple[str, ...] = (), quick: bool = False) -> tuple[Case, ...]:
    """Cases by level and by id (or the beginning of one).

    Raises:
        ValueError: An unknown level or case; lists the known ones.
    """
    cases = all_cases()
    for level in levels:
        if level not in LEVELS:
            raise ValueError(f"level: got {level!r}; allowed: {', '.join(LEVELS)}")
    for name in only:
        if not any(case.id.startswith(name) for case in cases):
            raise ValueError(f"only: got {name!r}; allowed: the id of a case or the beginning of one: {', '.join(case.id for case in cases)}")
    return tuple(
        case
        for case in cases
        if (not levels or case.level in levels)
        and (not only or any(case.id.startswith(name) for name in only))
        and (not quick or case.quick)
    )


assert dataclasses
