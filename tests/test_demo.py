"""The demo: its model's gradient against finite differences, its results, and what it refuses."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from laser_core.cli import _demo, _model, _text, main

WORDS = b"the laser reads the value that the softmax would blur; "


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A file of some English."""
    path = tmp_path / "text.txt"
    path.write_bytes(WORDS * 60)
    return path


def small(text: Path, out: Path, *more: str) -> list[str]:
    """Arguments of a demo that takes a second."""
    sizes = "--layers 1 --width 16 --heads 2 --context 16 --batch 4 --steps 40 --rate 1e-2"
    return ["demo", "--text", str(text), "--out", str(out), *sizes.split(), *more]


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_gradient_is_that_of_finite_differences(beta: float) -> None:
    sizes = _model.Sizes(layers=2, width=12, heads=2, context=7)
    parameters = _model.initial(sizes, seed=0, dtype=np.float64)
    random = np.random.default_rng(1)
    text = random.integers(0, 256, (3, sizes.context + 1))
    _, pullback = _model.loss(parameters, sizes, text, beta)
    gradients = pullback()
    assert gradients.keys() == parameters.keys()
    for name, x in parameters.items():
        direction, h = random.standard_normal(x.shape), 1e-5
        ends = (
            _model.loss(parameters | {name: x + sign * h * direction}, sizes, text, beta)[0].mean() for sign in (1, -1)
        )
        expected = (next(ends) - next(ends)) / (2 * h)
        error = abs(np.sum(direction * gradients[name]) - expected)
        assert error <= 1e-6 * abs(expected) + 1e-10, name


def test_both_trainings_start_from_the_same_weights_and_learn(text: Path, tmp_path: Path, capsys: Any) -> None:
    out, results = tmp_path / "curves.png", tmp_path / "results.json"
    assert main(small(text, out, "--json", str(results))) == 0
    captured = capsys.readouterr()
    assert captured.err == ""  # no progress bar where nobody looks
    assert "softmax (β = 0)  LASER (β = 1)" in captured.out
    assert out.read_bytes().startswith(b"\x89PNG\r\n")

    answer = json.loads(results.read_text())
    softmax, laser = answer["runs"]
    assert (softmax["beta"], laser["beta"]) == (0.0, 1.0)
    for run in answer["runs"]:
        curves = run["curves"]
        assert (
            len(curves["train"]) == len(curves["gradient_norm"]["query"]) == len(curves["gradient_norm"]["key"]) == 40
        )
        assert run["held_out_loss"] < 0.75 * curves["held_out"][0]["loss"]
        assert run["train_loss"] == pytest.approx(np.mean(curves["train"][-10:]))
        assert min(curves["gradient_norm"]["query"]) > 0
        assert 0 <= run["probabilities_below"]["1e-07"] <= run["probabilities_below"]["0.001"] < 1
    assert softmax["curves"]["train"][0] == pytest.approx(laser["curves"]["train"][0], abs=0.3)
    assert softmax["curves"]["train"] != laser["curves"]["train"]
    assert answer["verdict"] in captured.out


def test_same_seed_same_result_and_json_alone_on_standard_output(text: Path, tmp_path: Path, capsys: Any) -> None:
    answers = []
    for seed in ("1", "1", "2"):
        assert main(small(text, tmp_path / "curves.png", "--steps", "3", "--seed", seed, "--json", "-")) == 0
        answers.append([run["curves"] for run in json.loads(capsys.readouterr().out)["runs"]])
    assert answers[0] == answers[1]
    assert answers[0] != answers[2]


@pytest.mark.parametrize(
    ("softmax", "laser", "says"),
    [
        ([3.0, 3.2, 3.1], [2.0, 2.1, 2.2], "LASER is ahead of softmax attention by 1.000 ±"),
        ([2.0, 2.1, 2.2], [3.0, 3.2, 3.1], "LASER is behind softmax attention by 1.000 ±"),
        ([2.0, 3.0, 4.0], [2.1, 2.9, 4.0], "are level, 0.000 ±"),
    ],
)
def test_verdict_follows_the_numbers(softmax: list[float], laser: list[float], says: str) -> None:
    runs = [_demo.Run("softmax", 0.0, final=softmax), _demo.Run("LASER", 1.0, final=laser)]
    assert says in _demo.verdict(runs)


def test_small_probabilities_are_counted_among_visible_keys() -> None:
    q = np.ones((1, 1, 2, 1))
    k = np.asarray([0.0, -math.log(1e4)]).reshape(1, 1, 2, 1)
    lse = np.log(np.asarray([1.0, 1 + 1e-4])).reshape(1, 1, 2)
    counted = _demo._SmallProbabilities()
    counted(q, k, lse)  # visible: 1; 1 and 1e-4
    assert counted.shares() == {1e-3: 1 / 3, 1e-7: 0.0}


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--steps", "0"], "'0'; allowed: an integer of 1 or more"),
        (["--rate", "nan"], "'nan'; allowed: a positive number"),
        (["--seed", "-1"], "'-1'; allowed: an integer of 0 or more"),
        (["--heads", "3"], "--heads: got 3; allowed: a divisor of --width 16"),
        (["--context", "4000"], "2970 bytes of training text; allowed: 8002 or more"),
        (["--out", "missing/curves.png"], "--out: got missing/curves.png; allowed: a file in a directory that exists"),
        (["--out", "curves.pdf"], "ends in .png"),
        (["--json", "."], "--json: got ., a directory"),
        (["--text", "missing.txt"], "--text: cannot read missing.txt: No such file or directory"),
    ],
)
def test_refuses_before_any_training(
    text: Path, tmp_path: Path, more: list[str], says: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(_demo, "train", None)
    try:
        code = main(small(text, tmp_path / "curves.png", *more))
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    assert (code, captured.out, captured.err.count("\n")) == (2, "", 1)
    assert says in captured.err


def test_empty_text_is_refused(tmp_path: Path, capsys: Any) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    assert main(small(empty, tmp_path / "curves.png")) == 2
    assert "--text: got 0 bytes of training text" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["matplotlib", "threadpoolctl", "tqdm"])
def test_a_missing_extra_is_named(
    text: Path, tmp_path: Path, module: str, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    assert main(small(text, tmp_path / "curves.png")) == 1
    assert f"needs {module}, which is not installed: pip install matplotlib" in capsys.readouterr().err


def test_divergence_is_a_failure_of_the_run(text: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(small(text, tmp_path / "curves.png", "--rate", "1e30")) == 1
    err = capsys.readouterr().err
    assert "diverged at step" in err
    assert err.count("\n") == 1


def test_a_model_too_large_is_no_traceback(text: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(small(text, tmp_path / "curves.png", "--width", str(2**40))) == 1
    assert "not enough memory" in capsys.readouterr().err


def test_standard_library_is_split_by_file_in_a_fixed_order() -> None:
    first, again = (_text.read([], context=128) for _ in range(2))
    assert first.train.tobytes() == again.train.tobytes()
    assert first.held_out.size > 10_000
    assert b"import" in first.train[:100_000].tobytes()
    assert first.train.size > 4 * first.held_out.size


def test_files_are_split_by_file_and_one_file_by_its_end(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in "abc"]
    for path in paths:
        path.write_bytes(path.name.encode() * 100)
    several = _text.read([str(path) for path in paths], context=8)
    assert (set(several.train.tobytes()), set(several.held_out.tobytes())) == (set(b"a\nc"), set(b"b"))
    alone = _text.read([str(paths[0])], context=4)
    assert (alone.train.size, alone.held_out.size) == (90, 10)
