"""The plots of docs/performance.md, from the result files: the documentation calls these functions as it is built.

``python benchmarks/plots.py FOLDER`` writes them as PNG, to be looked at.
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from report import latest

NAMES = {"softmax": "softmax, cuDNN", "recipe": "recipe on cuDNN", "laser": "LASER"}
COLOURS = {"softmax": "0.6", "recipe": "tab:orange", "laser": "tab:blue"}
LOST = 4.0  # where the plot puts a result with outputs that are not finite, in bounds


def speed(kind: str = "gpu") -> None:
    """TFLOP/s of every candidate at every shape, a row of bars for each pass, from the last file of a kind."""
    result = latest(kind)
    records = [r for r in result["records"] if "TFLOP/s" in r and r["dtype"] == "bfloat16"]
    problems = list(dict.fromkeys((tuple(r["shape"]), r["causal"]) for r in records))
    _, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, layout="constrained")
    for axis, what in zip(axes, ("forward", "backward"), strict=True):
        for i, (name, label) in enumerate(NAMES.items()):
            own = [r for r in records if (r["pass"], r["candidate"]) == (what, name)]
            found = {(tuple(r["shape"]), r["causal"]): r for r in own}
            heights = [found[p]["TFLOP/s"] for p in problems]
            bars = axis.bar([x + 0.27 * (i - 1) for x in range(len(problems))], heights, 0.25, color=COLOURS[name])
            bars.set_label(label)
            if name != "softmax":
                axis.bar_label(bars, [f"{found[p]['speed']:.2f}" for p in problems], fontsize=7)
        axis.set_ylabel(f"{what}, TFLOP/s")
        axis.spines[["top", "right"]].set_visible(False)
    labels = [",".join(map(str, shape)) + ("\ncausal" if causal else "\nfull") for shape, causal in problems]
    axes[1].set_xticks(range(len(problems)), labels, fontsize=8)
    axes[1].set_xlabel("B,H,L,D")
    where = f"{result['device']}, {result['date']}"
    axes[0].set_title(f"{where}; above the bars: ratio to softmax in the same run", fontsize=9)
    axes[0].legend(ncols=3, frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, -0.14))


def accuracy(kind: str = "gpu") -> None:
    """Worst error over the bound of docs/numerics.md for growing ranges of the values, LASER's and the recipe's."""
    result = latest(kind)
    dtypes = list(dict.fromkeys(r["dtype"] for r in result["accuracy"]))
    _, axes = plt.subplots(1, len(dtypes), figsize=(9, 3.2), sharey=True, layout="constrained")
    for axis, dtype in zip(axes, dtypes, strict=True):
        for name in ("recipe", "laser"):
            own = [r for r in result["accuracy"] if (r["dtype"], r["candidate"]) == (dtype, name)]
            heights = [LOST if r["lost"] else r["error"] for r in own]
            axis.plot([r["sigma"] for r in own], heights, marker="o", color=COLOURS[name], label=NAMES[name])
            broken = [r["sigma"] for r in own if r["lost"]]
            axis.scatter(broken, [LOST] * len(broken), marker="x", s=90, color=COLOURS[name], zorder=3)
        axis.axhline(1, color="0.3", linewidth=1, linestyle="--")
        axis.set_xscale("log")
        axis.set_title(dtype, fontsize=10)
        axis.set_xlabel("standard deviation of the values")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("worst error / bound")
    axes[0].set_yticks([0, 1, 2, 3, LOST], ["0", "1", "2", "3", "not finite"])
    axes[0].legend(frameon=False, fontsize=8)


def draw(folder: Path) -> None:
    """Write every plot into a folder."""
    for plot in (speed, accuracy):
        plot()
        plt.savefig(folder / f"{plot.__name__}.png", dpi=110)
        plt.close("all")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
