"""Which engine JAX takes on a GPU, from a table that is written here: no GPU is needed."""

import json
from types import SimpleNamespace

import pytest
from problems import check_tables

pytest.importorskip("jax")

from laser_jax import engines, served, tune

from laser_core import Problem, _registry, _tables
from laser_core._attention import explain_problem


def problem(**changes) -> Problem:
    sizes = {"query_heads": 4, "key_value_heads": 4, "query_length": 3000, "key_length": 3000, "head_dim": 128}
    usual = {"framework": "jax", "device": "cuda", "dtype": "bfloat16", "batch": (2,), "value_dim": 128, "scale": 0.1}
    return Problem(**(sizes | usual | changes))


def row(engine, ms, which="forward", length=4096):
    timed = {"ms": ms} if ms is not None else {"not timed": "wrong"}
    found = {"pass": which, "width": 128, "length": length, "causal": False, "engine": engine, "tile": None}
    return found | timed


@pytest.fixture
def _card(tmp_path, monkeypatch):
    rows = [row("jax-mosaic", 0.7), row("jax-cudnn", 0.6), row("jax-xla", 9.0), row("jax-xla", 0.1, length=64)]
    rows += [row("jax-mosaic", 2.0, engines.PASSES[1]), row("jax-xla", None, engines.PASSES[1])]
    path = tmp_path / "table.json"
    path.write_text(json.dumps({"device": "a card", "capability": [9, 0], "date": "2026-11-25", "rows": rows}))
    monkeypatch.setenv("LASER_JAX_TABLE", str(path))
    monkeypatch.setattr(served, "gpu", lambda: SimpleNamespace(device_kind="a card", compute_capability="9.0"))
    monkeypatch.setattr(served, "missing", lambda: None)
    for cache in (_tables.find, _registry._known):
        cache.cache_clear()
    yield
    for cache in (_tables.find, _registry._known):
        cache.cache_clear()


@pytest.mark.usefixtures("_card")
def test_the_fastest_that_serves_the_problem():
    """With a gradient it is another one than without; what was not timed comes last."""
    report = explain_problem(problem(gradient=False))
    lines = ("forward: 0.6 ms at L = 4096 on a card, 2026-11-25", "forward and backward: not by this one")
    assert (report.chosen, report.how) == ("jax-cudnn", "\n".join(lines))
    report = explain_problem(problem())
    assert report.chosen == "jax-mosaic"
    assert str(report.how).splitlines()[1] == "forward and backward: 2 ms at L = 4096 on a card, 2026-11-25"
    assert list(engines.order(engines.PASSES[1], problem())) == ["jax-mosaic", "jax-xla"]
    assert explain_problem(problem(gradient=False, key_length=50)).chosen == "jax-xla"
    assert explain_problem(problem(logits_soft_cap=3.0)).chosen == "jax-xla"
    assert explain_problem(problem(dtype="float32", gradient=False)).chosen == "jax-xla"


@pytest.mark.usefixtures("_card")
def test_without_a_table_the_order_is_fixed(monkeypatch):
    monkeypatch.delenv("LASER_JAX_TABLE")
    monkeypatch.setattr(_tables, "shipped", lambda package: [])
    report = explain_problem(problem())
    assert (report.chosen, report.how) == ("jax-mosaic", "forward: not measured\nforward and backward: not measured")


def test_shipped_tables_are_tables():
    check_tables("laser_jax", engines.ENGINES)


def test_every_engine_is_tried():
    found = list(tune.trials((64,), (1024,)))
    assert {(t.engine, t.which, t.causal) for t in found} == {
        (engine, which, causal)
        for which, names in engines.ENGINES.items()
        for engine in names
        for causal in (True, False)
    }
