"""``laser-attention demo``: the same small model trained with softmax attention and with LASER."""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import _model, _text
from ._common import Failure, Usage, table
from ._model import Floats, Parameters, Sizes
from ._text import Bytes, Text

LN2 = math.log(2)

ATTENTIONS = (("softmax", 0.0), ("LASER", 1.0))
EXTRA = ("matplotlib", "threadpoolctl", "tqdm")
PROJECTIONS = ("query", "key")
SMALL = (1e-3, 1e-7)
EVALUATIONS = 24  # points of the held-out curve
FINAL_BATCHES = 16  # of held-out text, for the figures in the table
LAST_PART = 4  # the last quarter of the training is what the table averages over


@dataclass
class Run:
    """What one training leaves behind; losses in bits per byte."""

    name: str
    beta: float
    train: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    gradient_norms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PROJECTIONS})
    final: list[float] = field(default_factory=list)
    small_probabilities: dict[float, float] = field(default_factory=dict)
    seconds: float = 0.0

    def figures(self) -> dict[str, Any]:
        """The figures of the table."""
        return {
            "train_loss": _last_mean(self.train),
            "held_out_loss": float(np.mean(self.final)),
            "gradient_norm": {part: _last_mean(norms) for part, norms in self.gradient_norms.items()},
            "probabilities_below": {f"{limit:g}": share for limit, share in self.small_probabilities.items()},
            "seconds": self.seconds,
        }


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    sizes = Sizes()
    parser.add_argument("--text", nargs="+", metavar="FILE", default=[], help="default: Python's standard library")
    parser.add_argument("--steps", type=_positive(int), default=300, help="of each training (default: %(default)s)")
    parser.add_argument("--seed", type=_seed, default=0, help="of weights and batches (default: %(default)s)")
    parser.add_argument("--out", default="laser-demo.png", metavar="PNG", help="the curves (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON too; - is standard output")
    group = parser.add_argument_group("sizes")
    for name, default, meaning in (
        ("layers", sizes.layers, "blocks of attention and MLP"),
        ("width", sizes.width, "of the residual stream"),
        ("heads", sizes.heads, "of the attention"),
        ("context", sizes.context, "bytes that a prediction sees at most"),
        ("batch", 8, "windows per step"),
    ):
        group.add_argument(f"--{name}", type=_positive(int), default=default, help=f"{meaning} (default: %(default)s)")
    group.add_argument("--rate", type=_positive(float), default=5e-3, help="peak learning rate (default: %(default)s)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Train twice, print the table and write the curves."""
    sizes = _check(options)
    say = functools.partial(print, file=sys.stderr if options.json == "-" else sys.stdout, flush=True)
    text = _text.read(options.text, sizes.context)
    data = _batches(options, sizes, text)
    initial = _model.initial(sizes, options.seed)
    count = sum(x.size for x in initial.values())
    say(f"text   {text.source}: {_size(text.train.size)} to train on, {_size(text.held_out.size)} held out")
    say(f"model  {sizes.layers} blocks, width {sizes.width}, {sizes.heads} heads, {count:,} parameters")
    say(f"steps  {options.steps} of {options.batch} windows of {sizes.context} bytes, seed {options.seed}\n")

    from threadpoolctl import threadpool_limits
    from tqdm import tqdm

    # Threads do not pay for matrices of this size, and cost much where the cores are shared; and the sums of a run then
    # do not depend on how many cores there are.
    one_thread = threadpool_limits(1)
    with one_thread, tqdm(total=len(ATTENTIONS) * options.steps, disable=None, file=sys.stderr, leave=False) as bar:

        def tick(attention: Run) -> None:
            bar.set_description(attention.name, refresh=False)
            bar.set_postfix_str(f"{attention.train[-1]:.2f} bits/byte", refresh=False)
            bar.update()

        runs = [train(Run(name, beta), initial, sizes, options.rate, data, tick) for name, beta in ATTENTIONS]
    say(report(runs))
    say(f"\n{verdict(runs)}")

    from . import _plot

    title = f"{sizes.layers} blocks, width {sizes.width}, {options.batch} × {sizes.context} bytes a step"
    _writing("--out", lambda: _plot.save(runs, title, options.out))
    say(f"Curves: {options.out}")
    if options.json:
        document = json.dumps(_document(options, text, runs), indent=2)
        if options.json == "-":
            print(document)
        else:
            _writing("--json", lambda: Path(options.json).write_text(document + "\n", encoding="utf-8"))
            say(f"Results: {options.json}")
    return 0


def _check(options: argparse.Namespace) -> Sizes:
    """Refuse, before any work, what could only fail after it."""
    for module in EXTRA:
        if importlib.util.find_spec(module) is None:
            raise Failure(f"needs {module}, which is not installed: pip install {' '.join(EXTRA)}, or the extra demo")
    if options.width % options.heads:
        raise Usage(f"--heads: got {options.heads}; allowed: a divisor of --width {options.width}")
    for name in ("out", "json"):
        target = getattr(options, name)
        if target is None or target == "-":
            continue
        path = Path(target)
        if not path.parent.is_dir():
            raise Usage(f"--{name}: got {target}; allowed: a file in a directory that exists")
        if path.is_dir():
            raise Usage(f"--{name}: got {target}, a directory; allowed: a file")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise Usage(f"--{name}: got {target}, which may not be written; allowed: a file that may")
    if Path(options.out).suffix.lower() != ".png":
        raise Usage(f"--out: got {options.out}; allowed: a name that ends in .png")
    return Sizes(options.layers, options.width, options.heads, options.context)


@dataclass(frozen=True)
class Data:
    """The windows of every training step, those of the held-out curve, and those of the final figure."""

    train: Bytes
    starts: NDArray[np.int64]
    curve: Bytes
    final: list[Bytes]


def _batches(options: argparse.Namespace, sizes: Sizes, text: Text) -> Data:
    random = np.random.default_rng([options.seed, 1])

    def starts(part: Bytes, *shape: int) -> NDArray[np.int64]:
        return random.integers(0, part.size - sizes.context, shape)

    train = starts(text.train, options.steps, options.batch)
    curve = starts(text.held_out, options.batch)
    final = starts(text.held_out, FINAL_BATCHES, options.batch)
    return Data(
        text.train,
        train,
        _text.windows(text.held_out, curve, sizes.context),
        [_text.windows(text.held_out, x, sizes.context) for x in final],
    )


def train(run: Run, initial: Parameters, sizes: Sizes, rate: float, data: Data, tick: Callable[[Run], None]) -> Run:
    """Train from ``initial``, which is left as it is, over the windows of ``data``.

    Raises:
        Failure: The loss is no longer finite.
    """
    began = time.perf_counter()
    with np.errstate(all="ignore"):  # what diverges is seen in the loss
        _train(run, initial, sizes, rate, data, tick)
    run.seconds = time.perf_counter() - began
    return run


def _train(run: Run, initial: Parameters, sizes: Sizes, rate: float, data: Data, tick: Callable[[Run], None]) -> None:
    parameters = {name: x.copy() for name, x in initial.items()}
    optimizer = _model.Adam(parameters)
    steps = len(data.starts)
    evaluate_at = set(np.linspace(0, steps, min(steps, EVALUATIONS) + 1, dtype=int).tolist())

    def bits(step: int, text: Bytes, observe: _model.Observer | None = None) -> tuple[Floats, Callable[[], Parameters]]:
        """The loss of each window, and what returns the gradient."""
        nats, pullback = _model.loss(parameters, sizes, text, run.beta, observe)
        if not np.all(np.isfinite(nats)):
            raise Failure(f"the training with {run.name} diverged at step {step}: try a smaller --rate than {rate:g}")
        return np.mean(nats, axis=-1) / LN2, pullback

    for step, (starts, now) in enumerate(zip(data.starts, _model.rates(steps, rate), strict=True)):
        if step in evaluate_at:
            run.held_out.append((step, float(np.mean(bits(step, data.curve)[0]))))
        losses, pullback = bits(step, _text.windows(data.train, starts, sizes.context))
        gradients = pullback()
        for part, norms in run.gradient_norms.items():
            squares = (np.sum(np.square(gradients[f"{n}.attention.{part}"])) for n in range(sizes.layers))
            norms.append(math.sqrt(sum(map(float, squares))))
        optimizer.update(parameters, gradients, now)
        run.train.append(float(np.mean(losses)))
        tick(run)
    run.held_out.append((steps, float(np.mean(bits(steps, data.curve)[0]))))
    counted = _SmallProbabilities()
    for text in data.final:
        run.final += bits(steps, text, counted)[0].tolist()
    run.small_probabilities = counted.shares()


class _SmallProbabilities:
    """Counts the attention probabilities of visible keys below each limit, over blocks, heads and queries."""

    def __init__(self) -> None:
        self._below = dict.fromkeys(SMALL, 0)
        self._visible = 0

    def __call__(self, q: Floats, k: Floats, lse: Floats) -> None:
        scores = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
        visible = np.tri(q.shape[-2], k.shape[-2], dtype=bool)
        log_p = (scores - lse[..., None])[..., visible]
        self._visible += log_p.size
        for limit in SMALL:
            self._below[limit] += int(np.count_nonzero(log_p < math.log(limit)))

    def shares(self) -> dict[float, float]:
        return {limit: count / self._visible for limit, count in self._below.items()}


def report(runs: list[Run]) -> str:
    """The figures of the runs side by side."""
    figures = [run.figures() for run in runs]

    def row(name: str, show: Callable[[dict[str, Any]], str]) -> list[str]:
        return [name, *(show(figure) for figure in figures)]

    rows = [
        row("training loss, bits per byte", lambda f: f"{f['train_loss']:.3f}"),
        row("held-out loss, bits per byte", lambda f: f"{f['held_out_loss']:.3f}"),
        row("gradient norm at W_q", lambda f: f"{f['gradient_norm']['query']:.2e}"),
        row("gradient norm at W_k", lambda f: f"{f['gradient_norm']['key']:.2e}"),
        *(row(f"attention probabilities < {limit}", _share(limit)) for limit in map("{:g}".format, SMALL)),
        row("seconds", lambda f: f"{f['seconds']:.1f}"),
    ]
    note = (
        "Training loss and gradient norms: mean over the last quarter of the steps.\n"
        "Probabilities: of visible keys, on held-out text.\n"
        "Seconds: softmax attention is LASER's code at β = 0, not a kernel of its own, which could be faster."
    )
    columns = table(rows, header=["", *(f"{run.name} (β = {run.beta:g})" for run in runs)], right=range(1, 3))
    return f"{columns}\n\n{note}"


def _share(limit: str) -> Callable[[dict[str, Any]], str]:
    return lambda figures: f"{figures['probabilities_below'][limit]:.1%}"


def verdict(runs: list[Run]) -> str:
    """One sentence on who is ahead on held-out text, and by how much against the noise of that figure."""
    softmax, laser = runs
    difference = np.subtract(softmax.final, laser.final)  # window by window: the same text for both
    gain, error = float(np.mean(difference)), float(np.std(difference, ddof=1) / math.sqrt(len(difference)))
    over = f"{abs(gain):.3f} ± {error:.3f} bits per byte on {len(difference)} held-out windows (± standard error)"
    caveat = "one seed, one small model: no more than that is shown"
    if abs(gain) <= 2 * error:
        return f"LASER and softmax attention are level, {over}; {caveat}."
    return f"LASER is {'ahead of' if gain > 0 else 'behind'} softmax attention by {over}; {caveat}."


def _document(options: argparse.Namespace, text: Text, runs: list[Run]) -> dict[str, Any]:
    names = ("steps", "seed", "layers", "width", "heads", "context", "batch", "rate")
    return {
        "version": version("laser-attention"),
        "numpy": version("numpy"),
        "text": {"source": text.source, "train_bytes": text.train.size, "held_out_bytes": text.held_out.size},
        "options": {name: getattr(options, name) for name in names},
        "verdict": verdict(runs),
        "runs": [
            {
                "attention": run.name,
                "beta": run.beta,
                **run.figures(),
                "curves": {
                    "train": run.train,
                    "held_out": [{"step": step, "loss": loss} for step, loss in run.held_out],
                    "gradient_norm": run.gradient_norms,
                },
            }
            for run in runs
        ],
    }


def _writing(option: str, write: Callable[[], object]) -> None:
    try:
        write()
    except OSError as error:
        raise Failure(f"{option}: cannot write {error.filename}: {error.strerror}") from None


def _last_mean(series: list[float]) -> float:
    return float(np.mean(series[-math.ceil(len(series) / LAST_PART) :]))


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    """The parser of a positive finite number of that kind."""

    def parse(text: str) -> float:
        try:
            x = kind(text)
        except ValueError:
            x = kind(0)
        if not (0 < x < math.inf):
            what = "an integer of 1 or more" if kind is int else "a positive number"
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed: {what}")
        return x

    return parse


def _seed(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: an integer of 0 or more")
    return int(text)
