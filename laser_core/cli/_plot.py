"""The demo's figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ._demo import Run

COLORS = ("#5b6b7f", "#d1462f")
LOSS_TICKS, NORM_TICKS = (1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8), (1, 2, 3, 5, 7)  # of a decade
INK, GRID = "#22272e", "#e3e6ea"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9aa3ad",
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "xtick.color": "#5b6470",
    "ytick.color": "#5b6470",
    "legend.frameon": False,
}


def save(runs: Sequence[Run], title: str, path: str) -> None:
    """Write loss and gradient norms against steps as a PNG."""
    import matplotlib

    matplotlib.use("Agg")  # no display is needed, or asked for
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    with pyplot.rc_context(STYLE):
        figure, (losses, norms) = pyplot.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
        for run, color in zip(runs, COLORS, strict=True):
            label = f"{run.name} (β = {run.beta:g})"
            steps, smooth = _smooth(run.train, 30)
            losses.plot(steps, smooth, color=color, alpha=0.4, linewidth=1.2, label=f"{label}, training")
            at, held_out = zip(*run.held_out, strict=True)
            losses.plot(at, held_out, color=color, linewidth=2, marker="o", markersize=3.5, label=f"{label}, held out")
            for part, dashes in (("query", "-"), ("key", (0, (4, 2)))):
                steps, smooth = _smooth(run.gradient_norms[part], 10)
                name = f"{label}, $W_{part[0]}$"
                norms.plot(steps, smooth, color=color, linestyle=dashes, linewidth=1.8, label=name)
        losses.set(title="Loss", xlabel="step", ylabel="bits per byte")
        norms.set(title="Gradient norm at the query and key projections", xlabel="step")
        for axes, ticks in ((losses, LOSS_TICKS), (norms, NORM_TICKS)):
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=ticks, numticks=30))
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.title.set(fontsize=11, fontweight="bold")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set_xlim(left=0)
            axes.margins(x=0.02)
            axes.legend(fontsize=8.5)
        figure.suptitle(f"Softmax attention and LASER: {title}", fontsize=12)
        figure.savefig(path, dpi=150, facecolor="white")
        pyplot.close(figure)


def _smooth(series: Sequence[float], parts: int) -> tuple[list[int], list[float]]:
    """The running mean over one of so many parts of the steps, and the steps it ends at."""
    width = max(1, len(series) // parts)
    mean = np.convolve(series, np.full(width, 1 / width), mode="valid")
    return list(range(width, len(series) + 1)), mean.tolist()
