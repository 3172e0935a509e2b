"""Cases of the levels precision, hostile, isolation, determinism, layout and scale."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from .case import EACH, Case
from .cases_plain import pair
from .generate import Fill
from .problems import Spec

SIGMAS = (0.1, 1.0, 3.0, 5.0, 10.0, 20.0, 50.0, 100.0, 400.0)


def precision() -> Iterator[Case]:
    """Value ranges and dtypes."""
    for sigma in SIGMAS:
        spec = Spec(
            seed=f"precision/{sigma:g}",
            value=Fill("normal", sigma),
            causal="top_left",
            lengths=(96, 96),
            dims=(16, 16),
            lse=True,
        )
        yield Case(
            id=f"precision/range-{sigma:g}",
            sentence=f"value ~ N(0, {sigma:g}²), causal.",
            spec=spec,
            dtypes=EACH,
        )
        yield Case(
            id=f"precision/range-{sigma:g}+grad",
            sentence=f"value ~ N(0, {sigma:g}²), causal; with gradients.",
            spec=spec,
            check="gradients",
            dtypes=EACH,
            quick=sigma in (1.0, 20.0),
        )
    for beta in (-4.0, 0.25, 0.0):
        spec = Spec(seed=f"precision/beta{beta:g}", value=Fill("normal", 2), beta=beta, lengths=(96, 96), dims=(16, 16))
        yield Case(
            id=f"precision/beta-{beta:g}+grad",
            sentence=f"β = {beta:g}; with gradients.",
            spec=spec,
            check="gradients",
            dtypes=EACH,
        )


def hostile() -> Iterator[Case]:
    """Hard numbers."""
    causal: dict[str, Any] = {"causal": "top_left", "lengths": (64, 64)}
    yield from pair(
        "hostile/values-beyond-float16",
        "Values up to 6·10⁴, most of float16's range.",
        value=Fill("normal", 1e4),
        quick=True,
    )
    yield from pair(
        "hostile/scores-of-1000",
        "Scores of ±10³.",
        query=Fill("normal", 16),
        key=Fill("normal", 16),
        lse=True,
        quick=True,
    )
    yield from pair(
        "hostile/large-everything",
        "Scores of ±10³ and values of ±10³, which compete.",
        query=Fill("normal", 16),
        key=Fill("normal", 16),
        value=Fill("normal", 300),
    )
    yield from pair(
        "hostile/future-outliers",
        "Values of the future are 10³ times larger.",
        value=Fill("future", 1e3),
        **causal,
        quick=True,
    )
    yield from pair(
        "hostile/future-outliers-negative-beta", "The same with β = −1.", value=Fill("future", 1e3), beta=-1.0, **causal
    )
    yield from pair("hostile/spikes", "One value in 16 is 200 times larger.", value=Fill("spikes", 200))
    yield from pair(
        "hostile/constant-columns",
        "Each channel has one value: the output is that.",
        value=Fill("columns", 3),
        quick=True,
    )
    yield from pair("hostile/one-value", "All values are 0.3.", value=Fill("same", 0.3))
    yield from pair("hostile/offset-values", "Values of 100 ± 1.", value=Fill("normal", 1, 100))
    yield from pair(
        "hostile/offset-values-of-betas",
        "Values of 100 ± 1, β of either sign, zero and small, with its gradient: what is far from zero cancels in it.",
        value=Fill("normal", 1, 100),
        beta_shape=(2, 16),
    )
    yield from pair(
        "hostile/large-values-of-betas",
        "Values of hundreds, β of either sign, small and not, with its gradient: e^(βv) overflows in one form of it.",
        value=Fill("normal", 300),
        beta_shape=(2, 16),
        betas=(2.0, -0.25, 0.5, -3.0, 0.3),
    )
    yield from pair("hostile/very-negative-values", "Values of −500 ± 1.", value=Fill("normal", 1, -500), quick=True)
    yield from pair(
        "hostile/equal-scores", "All scores are equal: the queries are zero.", query=Fill("same", 0), lse=True
    )
    yield from pair(
        "hostile/all-zero",
        "Everything is zero.",
        query=Fill("same", 0),
        key=Fill("same", 0),
        value=Fill("same", 0),
        lse=True,
    )
    yield from pair("hostile/subnormal-values", "Values are subnormal numbers.", value=Fill("subnormal"))
    yield from pair("hostile/subnormal-keys", "Keys are subnormal numbers.", key=Fill("subnormal"))
    yield from pair("hostile/bias-of-1000", "A bias of ±10³.", bias_shape=(33, 40), bias=Fill("normal", 300), lse=True)
    yield from pair(
        "hostile/small-beta-large-values", "β = 10⁻³, values of ±10³.", beta=1e-3, value=Fill("normal", 300)
    )
    yield from pair("hostile/large-beta", "β = 300: almost the maximum.", beta=300.0, value=Fill("normal", 3))
    yield from pair(
        "hostile/peaked",
        "One key takes nearly all the weight of each query.",
        query=Fill("normal", 8),
        key=Fill("normal", 8),
        **causal,
        lse=True,
    )
    yield Case(
        id="hostile/largest-values",
        sentence="Values near the largest of the dtype, of either sign.",
        spec=Spec(seed="hostile/largest", value=Fill("largest")),
        quick=True,
    )
    yield Case(
        id="hostile/largest-values-causal",
        sentence="The same, causal, grouped.",
        spec=Spec(seed="hostile/largest-causal", value=Fill("largest"), heads=(4, 2), **causal),
    )


def isolation() -> Iterator[Case]:
    """What must not matter."""

    def case(name: str, sentence: str, check: str = "isolation", quick: bool = False, **spec: Any) -> Case:
        return Case(
            id=f"isolation/{name}",
            sentence=sentence,
            spec=Spec(seed=f"isolation/{name}", **spec),
            check=check,
            quick=quick,
        )

    yield case(
        "key-lengths",
        "NaN, ∞ and other numbers beyond the length of the keys.",
        key_lengths=(25, 40),
        query_lengths=(33, 20),
        batch=(2,),
        lse=True,
        quick=True,
    )
    yield case("causal-top-left", "Keys after the last query.", causal="top_left", lengths=(20, 40), heads=(4, 2))
    yield case("causal-bottom-right", "Queries that see nothing hold NaN.", causal="bottom_right", lengths=(40, 20))
    yield case("window", "Keys outside of every window.", window=(2, 2), lengths=(12, 300), dims=(8, 8))
    yield case("mask", "Keys that the mask hides.", mask_shape=(2, 1, 1, 40), batch=(2,), heads=(4, 2), quick=True)
    yield case("bias", "Keys that −∞ in the bias hides.", bias_shape=(1, 1, 1, 40), bias_hides=0.4)
    yield case("beta-small", "With β = ½.", beta=0.5, key_lengths=(25, 40), batch=(2,))
    yield case("beta-zero", "With β = 0.", beta=0.0, key_lengths=(25, 40), batch=(2,))
    yield case("beta-negative", "With β = −1.", beta=-1.0, key_lengths=(25, 40), batch=(2,))
    yield case(
        "rows-causal",
        "NaN and ∞ in the future of some queries.",
        check="isolation of rows",
        causal="top_left",
        lengths=(48, 48),
        lse=True,
        quick=True,
    )
    yield case(
        "rows-tiles",
        "The same, several tiles away.",
        check="isolation of rows",
        causal="top_left",
        lengths=(300, 300),
        dims=(8, 8),
    )
    yield case("rows-window", "The same behind a window.", check="isolation of rows", window=(5, 5), lengths=(60, 60))
    yield case("rows-mask", "The same behind a mask.", check="isolation of rows", mask_shape=(33, 40), mask_density=0.3)
    yield case(
        "entries-bias",
        "NaN and ∞ in entries of the bias that causality hides.",
        check="isolation of entries",
        bias_shape=(33, 40),
        causal="top_left",
        quick=True,
    )
    yield case(
        "entries-mask",
        "Entries of the mask that causality and lengths hide.",
        check="isolation of entries",
        mask_shape=(33, 40),
        causal="bottom_right",
        key_lengths=(30,),
    )
    yield case("batches", "NaN in all of another batch entry.", check="isolation of batches", batch=(3,), heads=(4, 2))
    kinds: tuple[tuple[str, str, bool, dict[str, Any]], ...] = (  # lengths that no tile divides
        ("plain", "A head outside the fast range beside others.", False, {"lengths": (75, 83), "dims": (32, 32)}),
        (
            "keys",
            "The same, and a head whose first keys, which no query sees, hold NaN and ∞.",
            True,
            {"lengths": (75, 99), "dims": (16, 32), "causal": "bottom_right", "window": (8, None)},
        ),
        (
            "queries",
            "The same, and a head whose first queries, which see nothing, hold NaN and ∞; grouped.",
            False,
            {"lengths": (99, 75), "dims": (32, 16), "causal": "bottom_right", "heads": (8, 4)},
        ),
    )
    for name, sentence, quick, spec in kinds:
        yield Case(
            id=f"isolation/heads-{name}",
            sentence=sentence,
            spec=Spec(seed=f"isolation/heads-{name}", lse=True, **{"heads": (4, 4), **spec}),
            check="isolation of heads",
            dtypes=EACH,
            quick=quick,
        )


def determinism() -> Iterator[Case]:
    """Repetition."""
    for name, sentence, spec in (
        ("plain", "Several tiles of queries and keys.", {"lengths": (150, 530), "heads": (1, 1), "dims": (8, 8)}),
        (
            "groups",
            "Gradients summed over a group of heads.",
            {"lengths": (130, 130), "heads": (8, 2), "causal": "top_left"},
        ),
        (
            "broadcast",
            "Gradients of a broadcast bias and of β.",
            {"batch": (3,), "bias_shape": (33, 40), "beta_shape": (1, 1)},
        ),
        ("wide-range", "Outside the fast range.", {"lengths": (70, 200), "value": Fill("normal", 300)}),
    ):
        yield Case(
            id=f"determinism/{name}",
            sentence=sentence,
            spec=Spec(seed=f"determinism/{name}", **spec),
            check="deterministic",
            quick=name == "groups",
        )


def layout() -> Iterator[Case]:
    """Strides and sizes."""
    bias: dict[str, Any] = {"bias_shape": (2, 4, 33, 40), "heads": (4, 2)}
    for check, sentence in (
        ("heads inside", "Stored as (..., L, H, D)."),
        ("columns", "Stored as (..., D, L)."),
        ("gaps", "Every second row and column of a larger array."),
        ("stride 0", "Broadcast views."),
    ):
        name = check.replace(" ", "-")
        for suffix, more in (("", {}), ("-bias", bias)):
            problem = Spec(seed=f"layout/{name}{suffix}", batch=(2,), **more)
            quick = check in ("heads inside", "columns") and not more
            yield Case(id=f"layout/{name}{suffix}", sentence=sentence, spec=problem, check=check, quick=quick)
    for lq, lk in (
        (1, 1),
        (7, 3),
        (15, 17),
        (63, 65),
        (64, 64),
        (127, 129),
        (128, 128),
        (129, 127),
        (256, 255),
        (257, 513),
    ):
        yield from pair(
            f"layout/sizes-{lq}x{lk}",
            f"{lq} queries, {lk} keys, causal at the bottom.",
            lengths=(lq, lk),
            dims=(16, 8),
            causal="bottom_right",
            heads=(2, 1),
            quick=(lq in (63, 129)),
        )
    for d, e in ((1, 1), (3, 5), (40, 24), (96, 96), (128, 128), (160, 256)):
        yield from pair(f"layout/dims-{d}x{e}", f"D = {d}, E = {e}.", lengths=(20, 30), dims=(d, e), quick=d == 3)
    for name, sentence, spec in (
        ("no-keys", "No key: zeros and −∞.", {"lengths": (5, 0), "lse": True}),
        ("no-queries", "No query: an empty output, zero gradients.", {"lengths": (0, 5), "lse": True}),
        ("no-batch", "An empty batch.", {"batch": (0,)}),
        ("nothing", "Neither queries nor keys.", {"lengths": (0, 0)}),
    ):
        yield from pair(f"layout/{name}", sentence, **spec, quick=name == "no-keys")


def scale() -> Iterator[Case]:
    """Long and far."""
    for name, sentence, spec in (
        ("decode-64k", "One query, 65536 keys.", {"lengths": (1, 65536), "dims": (32, 32), "heads": (2, 1)}),
        (
            "prefill-4k",
            "4096 causal queries and keys.",
            {"lengths": (4096, 4096), "dims": (16, 16), "heads": (1, 1), "causal": "top_left"},
        ),
        (
            "window-16k",
            "16384 queries and keys, a window of 128.",
            {"lengths": (16384, 16384), "dims": (8, 8), "heads": (1, 1), "window": (128, 0)},
        ),
        (
            "many-heads",
            "A batch of 64 with 16 heads.",
            {"lengths": (16, 16), "batch": (64,), "heads": (16, 4), "dims": (8, 8)},
        ),
    ):
        yield Case(
            id=f"scale/{name}", sentence=sentence, spec=Spec(seed=f"scale/{name}", **spec), check="long", memory=2**31
        )
    yield Case(
        id="scale/beyond-2-31",
        sentence="Two heads 2³¹ elements apart in memory.",
        spec=Spec(seed="scale/far"),
        check="far apart",
    )
