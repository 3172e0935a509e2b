"""Which engine the Triton backend takes, from tables that are written here: no GPU is needed."""

import pytest
from problems import check_tables

torch = pytest.importorskip("torch")
pytest.importorskip("triton")

from laser_torch import cudnn, engines, hopper, tune  # noqa: E402

from laser_core import Problem, _tables  # noqa: E402


def problem(**changes) -> Problem:
    sizes = {"query_heads": 4, "key_value_heads": 4, "query_length": 3000, "key_length": 3000, "head_dim": 128}
    usual = {"framework": "torch", "device": "cuda", "dtype": "bfloat16", "batch": (2,), "value_dim": 128, "scale": 0.1}
    return Problem(**(sizes | usual | changes))


def row(engine: str, ms: float | None, tile=None, length=4096, width=128, causal=False, which="forward"):
    timed = {"ms": ms} if ms is not None else {"not timed": "wrong"}
    found = {"pass": which, "width": width, "length": length, "causal": causal, "engine": engine, "tile": tile}
    return found | timed


def table(*rows):
    return {"device": "a card", "capability": [9, 0], "date": "2026-11-25", "rows": list(rows)}


def chosen(found, **changes) -> list[tuple[str, object]]:
    return [(c.engine, c.tile) for c in engines.choices("forward", problem(**changes), found)]


def test_the_fastest_tile_of_each_engine_in_order():
    """A candidate that was wrong, and so was not timed, does not count."""
    found = table(
        row("triton", 0.9, [64, 64, 4, 3, True]),
        row("triton", 0.7, [128, 64, 8, 3, True]),
        row("hopper", 0.8, [128, 2, 2, 240, False, "static"]),
        row("hopper", None, [128, 2, 2, 240, True, "static"]),
    )
    expected = [("triton", (128, 64, 8, 3, True)), ("hopper", (128, 2, 2, 240, False, "static")), ("cudnn", None)]
    assert chosen(found) == expected


def test_the_nearest_length_of_the_same_kind_counts():
    found = table(
        row("triton", 0.1, length=1024),
        row("cudnn", 0.5, length=1024),
        row("cudnn", 1.0),
        row("triton", 2.0),
        row("hopper", 0.1, causal=True),
        row("hopper", 0.1, width=64),
    )
    assert chosen(found)[0][0] == "cudnn"
    assert chosen(found, key_length=1100)[0][0] == "triton"
    assert chosen(found, causal="top_left")[0][0] == "hopper"
    assert chosen(found, head_dim=40, value_dim=64)[0][0] == "hopper"
    for unmeasured in ({"head_dim": 256}, {"head_dim": 16, "value_dim": 16}, {"dtype": "float32"}):
        assert [engine for engine, _ in chosen(found, **unmeasured)] == list(engines.ENGINES["forward"])


def test_shipped_tables_are_tables():
    """Each says where it comes from, and names engines and tiles that there are."""
    assert check_tables("laser_torch", engines.ENGINES)


def test_candidates_begin_with_the_default_of_each_engine():
    for which, names in engines.ENGINES.items():
        for width in _tables.WIDTHS:
            found = list(tune.candidates(which, width))
            assert [c.engine for c in found if c.tile is None] == list(names)
            assert len(set(found)) == len(found)
    assert {hopper.Tiles(*tile).consumers for tile in tune.HOPPER[64]} == {2, 3}


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gradient": True}, "a gradient may be asked for"),
        ({"dtype": "float16"}, "bfloat16 alone"),
        ({"head_dim": 192}, "multiples of 8 up to 128"),
        ({"head_dim": 60}, "multiples of 8 up to 128"),
        ({"logits_soft_cap": 3.0}, "logits_soft_cap"),
        ({"key_value_lengths": True}, "sequence lengths"),
        ({"window": (3, None)}, "top left alone"),
        ({"query_length": 0}, "nothing to launch"),
    ],
)
def test_cudnn_says_what_it_does_not_serve(changes, told):
    assert told in (cudnn.why_not(problem(**({"gradient": False} | changes))) or "")
    assert cudnn.why_not(problem(gradient=False, causal="top_left")) is None
