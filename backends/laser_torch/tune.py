"""Measure every engine and tile on this GPU and write the table that the automatic choice reads.

    python -m laser_torch.tune            # a table of one's own, which is used from then on
    python -m laser_torch.tune --out FILE # a file, to be shipped or looked at

A result is compared with float64 before it is timed, and a wrong one is not timed. Nothing is tuned at any other time.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from laser_core import Forward, Inputs, Problem, _tables

from . import engines, fused, fused_backward
from .call import prepare
from .engines import Choice, Pass

LENGTHS = (1024, 4096, 16384)
ELEMENTS = 2**25  # of each array: B·H·L·D
ROWS = 8  # queries that are compared with float64
BUSY = 3_000_000  # cycles in which the host can launch

Tile = tuple[Any, ...]
HOPPER: dict[int, tuple[Tile, ...]] = {
    64: tuple(
        (128, n, 4, r, o, s) for n, r in ((2, 232), (3, 160)) for o in (False, True) for s in ("static", "dynamic")
    ),
    128: tuple((128, 2, 2, 232, o, s) for o in (False, True) for s in ("static", "dynamic")),
}
FORWARD: dict[int, tuple[Tile, ...]] = {
    64: ((64, 64, 4, 3, True), (128, 64, 4, 3, True), (128, 128, 8, 2, True)),
    128: ((128, 64, 8, 3, True), (128, 128, 8, 2, True), (64, 64, 4, 2, True)),
    256: ((128, 64, 8, 2, True), (64, 64, 8, 2, True), (64, 32, 4, 2, True)),
}
BACKWARD: dict[int, tuple[Tile, ...]] = {  # of dk and dv, and of dq
    64: (((64, 64, 4, 2, True), (64, 64, 4, 3, True)), ((64, 128, 8, 2, True), (128, 64, 8, 3, True))),
    128: (((64, 64, 4, 2, True), (128, 64, 8, 3, True)), ((32, 128, 8, 2, True), (128, 64, 8, 2, True))),
    256: (((32, 64, 8, 1, True), (64, 32, 8, 1, True)), ((32, 32, 4, 1, True), (64, 32, 8, 1, True))),
}


def candidates(which: Pass, width: int) -> Iterator[Choice]:
    """Every engine and tile that is tried; the default of each first."""
    tiles = {"forward": FORWARD, "backward": BACKWARD}[which][width]
    for engine in engines.ENGINES[which]:
        yield Choice(engine, None, "")
        own = tiles if engine == "triton" else HOPPER.get(width, ()) if (engine, which) == ("hopper", "forward") else ()
        yield from (Choice(engine, tile, "") for tile in own)


class Trial:
    """One problem on the device: what is asked of a candidate, and what is right."""

    def __init__(self, width: int, length: int, causal: bool) -> None:  # noqa: D107
        heads = max(1, ELEMENTS // (length * width))
        self.problem = Problem(
            framework="torch", device="cuda", dtype="bfloat16", batch=(1,), query_heads=heads, key_value_heads=heads,
            query_length=length, key_length=length, head_dim=width, value_dim=width, scale=width**-0.5,
            causal="top_left" if causal else None, gradient=False,
        )  # fmt: skip
        torch.manual_seed(0)
        q, k, v, self.do = torch.randn(4, 1, heads, length, width, device="cuda", dtype=torch.bfloat16)
        self.inputs = Inputs(q, k, v, None, None, None, None, None)
        self.call = prepare(self.problem, self.inputs)
        self.rows = torch.randint(length, (ROWS,), device="cuda")
        s = (q[0, -1, self.rows].double() @ k[0, -1].double().T) * self.problem.scale
        if causal:
            s = s.masked_fill(torch.arange(length, device="cuda") > self.rows[:, None], -math.inf)
        log_p, values = s.log_softmax(-1)[..., None], v[0, -1].double()
        self.o = (log_p + values).logsumexp(1)
        w = (log_p + values - self.o[:, None]).exp() - log_p.exp()
        ds = torch.einsum("ie,ije->ij", self.do[0, -1, self.rows].double(), w)
        self.dq = self.problem.scale * ds @ k[0, -1].double()

    def run(self, which: Pass, choice: Choice) -> Callable[[], Tensor]:
        """The pass by a candidate, as a function that returns what is compared: o or dq."""
        if which == "forward":
            return lambda: fused.run(self.call, choice)[0]
        out, l, rest, values = fused.run(self.call, Choice("triton", None, ""))
        done = Forward(out, l, (rest, values.c, values.flags))

        def backward() -> Tensor:
            values = fused_backward.known(self.call, done, choice)
            side = fused_backward.prepare_rows(self.call, values, done, self.do, None)
            return fused_backward.run(self.call, values, side, choice)[0]

        return backward

    def wrong(self, which: Pass, found: Tensor) -> str | None:
        """What is wrong with a result; None where it is right."""
        rows = found[0, -1, self.rows].double()
        if which == "forward":
            error = float(((rows - self.o).abs() / (2.0**-8 * (self.o.abs() + 3))).max())
            return None if error <= 1 else f"error {error:.2g} of the bound"
        error = float((rows - self.dq).norm() / self.dq.norm())
        return None if error <= 0.02 else f"relative error {error:.2g} of dq"


def milliseconds(call: Callable[[], Any], turns: int) -> float:
    """The median on the device, the host's part hidden behind other work."""
    taken: list[float] = []
    for turn in range(turns + 2):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda._sleep(BUSY)  # type: ignore[no-untyped-call]
        begin.record()
        call()
        end.record()
        end.synchronize()
        if turn >= 2:
            taken.append(begin.elapsed_time(end))
    return statistics.median(taken)


def measure(widths: tuple[int, ...], lengths: tuple[int, ...], turns: int) -> Iterator[dict[str, Any]]:
    """The rows of a table: every candidate at every problem, or why it was not timed."""
    for width in widths:
        for length in lengths:
            for causal in (True, False):
                trial = Trial(width, length, causal)
                for which in engines.ENGINES:
                    for choice in candidates(which, width):
                        row: dict[str, Any] = {"pass": which, "width": width, "length": length, "causal": causal}
                        row |= {"engine": choice.engine, "tile": choice.tile}
                        yield row | _timed(trial, which, choice, turns)


def _timed(trial: Trial, which: Pass, choice: Choice, turns: int) -> dict[str, Any]:
    reason = engines.why_not(choice.engine, trial.problem, trial.call.q.device)
    if reason is not None:
        return {"not timed": reason}
    try:
        call = trial.run(which, choice)
        reason = trial.wrong(which, call())
        return {"not timed": reason} if reason else {"ms": milliseconds(call, turns)}
    except Exception as error:  # a tile that does not fit this device
        return {"not timed": f"{type(error).__name__}: {error}"[:200]}


def main() -> int:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(prog="python -m laser_torch.tune", description=__doc__)
    parser.add_argument("--out", type=Path, help="the table to write (default: where the automatic choice looks)")
    parser.add_argument("--turns", type=int, default=5, help="timings of each (default: %(default)s)")
    parser.add_argument("--widths", type=int, nargs="+", default=_tables.WIDTHS, choices=_tables.WIDTHS)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("laser_torch.tune: needs a GPU that torch can use", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    out = options.out or _tables.own("laser_torch", name)
    rows = measure(tuple(options.widths), tuple(options.lengths), options.turns)
    _tables.write(out, name, torch.cuda.get_device_capability(), ("torch", "triton"), rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
