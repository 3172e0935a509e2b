"""Bad arguments: each is refused before anything is computed, by name, with what came and what is allowed."""

from __future__ import annotations

import numpy as np
import pytest

from laser_core import Backend, Problem, Unsupported, _registry, explain, laser_attention, laser_attention_vjp


def good():
    rng = np.random.default_rng(0)
    return {n: rng.standard_normal((2, 2, 5, 4)) for n in ("query", "key", "value")}


Z = np.zeros
CASES = {
    "query: got shape (5, 4); allowed: rank 3 or more": {"query": Z((5, 4))},
    "key: got shape (2, 2, 5, 3); allowed: (2, 2, 5, 4)": {"key": Z((2, 2, 5, 3))},
    "key: got shape (3, 2, 5, 4); allowed: (2, 2, 5, 4)": {"key": Z((3, 2, 5, 4))},
    "value: got shape (2, 2, 6, 4); allowed: (2, 2, 5, 4)": {"value": Z((2, 2, 6, 4))},
    "query: got 3 heads; allowed: a multiple of the 2": {"query": Z((2, 3, 5, 4))},
    "query: got head dim D = 0": {"query": Z((2, 2, 5, 0)), "key": Z((2, 2, 5, 0))},
    "value: got value dim E = 0": {"value": Z((2, 2, 5, 0))},
    "query: got dtype int64": {"query": Z((2, 2, 5, 4), np.int64)},
    "query: got dtype bool": {"query": Z((2, 2, 5, 4), bool)},
    "query: got dtype complex128": {"query": Z((2, 2, 5, 4), complex)},
    "key: got dtype float32; allowed: the dtype of query, float64": {"key": Z((2, 2, 5, 4), np.float32)},
    "query: got list": {"query": [[1.0]]},
    "value: got NoneType None": {"value": None},
    "attn_mask: got dtype float64; allowed: bool": {"attn_mask": Z((5, 5))},
    "attn_mask: got shape (4, 5); allowed: a shape that broadcasts": {"attn_mask": Z((4, 5), bool)},
    "attn_mask: got str 'causal'": {"attn_mask": "causal"},
    "bias: got shape (2, 2, 2, 5, 5)": {"bias": Z((2, 2, 2, 5, 5))},
    "bias: got dtype int64": {"bias": Z((5, 5), np.int64)},
    "beta: got shape (3,); allowed: a shape that broadcasts to (Hq, E) = (2, 4)": {"beta": Z(3)},
    "beta: got nan; allowed: a finite real number": {"beta": float("nan")},
    "beta: got -inf; allowed: a finite real number": {"beta": -np.inf},
    "beta: got True": {"beta": True},
    "beta: got complex 1j": {"beta": 1j},
    "beta: got None; allowed: a finite real number": {"beta": None},
    "beta: got list": {"beta": [0.5]},
    "scale: got inf": {"scale": np.inf},
    "scale: got '1'": {"scale": "1"},
    "is_causal: got 'left'; allowed: False, True (= 'top_left'), 'top_left', 'bottom_right'": {"is_causal": "left"},
    "is_causal: got 2": {"is_causal": 2},
    "window_size: got 3; allowed: None, or (left, right)": {"window_size": 3},
    "window_size: got (1, 2, 3)": {"window_size": (1, 2, 3)},
    "window_size: got (-1, 0)": {"window_size": (-1, 0)},
    "window_size: got (1.5, 0)": {"window_size": (1.5, 0)},
    "window_size: got 'ab'": {"window_size": "ab"},
    "logits_soft_cap: got 0": {"logits_soft_cap": 0},
    "logits_soft_cap: got -1.0": {"logits_soft_cap": -1.0},
    "logits_soft_cap: got nan": {"logits_soft_cap": float("nan")},
    "query_seq_lengths: got dtype float64; allowed: an integer dtype": {"query_seq_lengths": Z(2)},
    "key_value_seq_lengths: got shape (3,); allowed: a shape that broadcasts": {"key_value_seq_lengths": Z(3, int)},
    "key_value_seq_lengths: got list": {"key_value_seq_lengths": [5, 5]},
    "return_lse: got 'yes'": {"return_lse": "yes"},
    "backend: got 'fastest'; allowed: None, '": {"backend": "fastest"},
    "backend: got 3": {"backend": 3},
    "backend: got an empty sequence": {"backend": []},
}


@pytest.mark.parametrize("message", CASES)
@pytest.mark.parametrize("function", [laser_attention, laser_attention_vjp, explain])
def test_refused_by_name(monkeypatch, message, function):
    def computed(*_):
        raise AssertionError("something was computed")

    spy = Backend(name="spy", summary="", forward=computed, backward=computed, priority=lambda problem: 999)
    known = _registry.backends()
    monkeypatch.setattr(_registry, "backends", lambda: known | {"spy": spy})
    with pytest.raises((TypeError, ValueError)) as caught:
        function(**good() | CASES[message])
    assert message in str(caught.value)


def test_namespaces_and_devices_do_not_mix():
    strict = pytest.importorskip("array_api_strict")
    call = good()
    with pytest.raises(
        TypeError, match="key: got an array of array_api_strict; allowed: the namespace of query, numpy"
    ):
        laser_attention(**call | {"key": strict.asarray(call["key"])})
    here = {n: strict.asarray(x, device=strict.Device("CPU_DEVICE")) for n, x in call.items()}
    with pytest.raises(ValueError, match=r"value: got an array on .*device1"):
        laser_attention(**here | {"value": strict.asarray(call["value"], device=strict.Device("device1"))})


def test_dropout_is_not_an_option():
    with pytest.raises(TypeError, match="dropout"):
        laser_attention(**good(), dropout=0.1)


def test_a_backend_that_cannot_says_why():
    with pytest.raises(Unsupported, match="backend 'torch-sdpa' cannot run this: arrays of numpy"):
        laser_attention(**good(), backend="torch-sdpa")
    assert isinstance(laser_attention(**good(), backend=["torch-sdpa", "streaming"]), np.ndarray)


def test_explain_has_a_line_for_every_backend():
    report = explain(**good(), is_causal=True)
    assert report.chosen == "reference"
    assert str(report).startswith("backend: reference")
    for name in _registry.backends():
        assert name in str(report)
    assert "arrays of numpy (supported: torch)" in report.refused["torch-sdpa"]


def test_problems_are_frozen_and_hashable():
    problem = Problem(
        framework="numpy", device="cpu", dtype="float32", batch=(), query_heads=4, key_value_heads=2, query_length=3,
        key_length=5, head_dim=8, value_dim=8, scale=1.0, causal="bottom_right", window=(2, None),
    )  # fmt: skip
    assert problem.band == (0, 2)
    assert problem.group == 2
    assert len({problem, problem}) == 1
    with pytest.raises(AttributeError):
        problem.scale = 2.0  # type: ignore[misc]
