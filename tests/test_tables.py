"""Where tables of engines are looked for, and what is read from them."""

import json
from pathlib import Path

import pytest

from laser_core import _tables


def table(**changes) -> dict[str, object]:
    return {"device": "a card", "capability": [9, 0], "date": "2026-11-25", "rows": []} | changes


@pytest.fixture(autouse=True)
def _afresh():
    _tables.find.cache_clear()
    yield
    _tables.find.cache_clear()


def test_found_by_variable_then_own_then_shipped(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.delenv("LASER_SOME_TABLE", raising=False)
    shipped = tmp_path / "shipped.json"
    shipped.write_text(json.dumps(table(device="another card")))
    monkeypatch.setattr(_tables, "shipped", lambda package: [shipped])

    def device(capability: tuple[int, ...]) -> object:
        _tables.find.cache_clear()
        found = _tables.find("laser_some", "A card", capability)
        return None if found is None else found["device"]

    assert device((8, 0)) is None
    assert device((9, 0)) == "another card"
    own = _tables.own("laser_some", "A card")
    assert own.name == "a-card.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps(table()))
    assert device((9, 0)) == "a card"
    broken = tmp_path / "broken.json"
    broken.write_text('{"device": "x"}')
    monkeypatch.setenv("LASER_SOME_TABLE", str(broken))
    with pytest.raises(ValueError, match=r"broken\.json: no table of engines: it has no capability, date, rows"):
        device((9, 0))


def test_what_is_written_is_a_table(tmp_path: Path):
    path = tmp_path / "folder" / "table.json"
    _tables.write(path, "a card", (9, 0), ("numpy",), iter([{"ms": 1.0}]))
    found = _tables.read(path)
    assert (found["device"], found["capability"], found["rows"]) == ("a card", [9, 0], [{"ms": 1.0}])
    assert set(found["versions"]) == {"laser-attention", "numpy"}
