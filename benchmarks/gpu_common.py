"""What the GPU benchmarks share: the problems, the form of a record, and the run that writes a result file."""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from bench import environment

SHAPES = ((4, 16, 4096, 128), (4, 32, 4096, 64), (1, 16, 16384, 128), (16, 16, 1024, 128))  # B, H, L, D
RANGES = (1, 3, 5, 10, 20, 50, 100, 400)  # standard deviations of the values
ACCURACY_SHAPE = (2, 4, 1024, 128)
ROWS = 8  # queries of a head that are compared with float64
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
LARGEST_ERROR = 0.02  # of a gradient, relative, in norm

Record = dict[str, Any]
Seconds = dict[str, list[float]]  # of each candidate, taken in turns


class Case(NamedTuple):
    """A problem of softmax attention's usual kind: as many queries as keys, heads not grouped."""

    shape: tuple[int, ...]
    causal: bool
    dtype: str = "bfloat16"

    def wrong(self, error: float, dq_error: float | None) -> list[Record] | None:
        """The record of a result that is not right, for which no time is reported; None where it is."""
        if error <= 1 and dq_error is not None and dq_error <= LARGEST_ERROR:
            return None
        return [self._asdict() | {"error": error, "dq error": dq_error, "not timed": "wrong"}]

    def compared(self, what: str, seconds: Seconds, host: dict[str, float], more: dict[str, Record]) -> list[Record]:
        """Records of one pass of all candidates, beside ``softmax``; ``more`` is what else is known of each."""
        work = 4 * math.prod(self.shape) * self.shape[2] / (2 if self.causal else 1)
        records = []
        for name, taken in seconds.items():
            middle = statistics.median(taken)
            records.append(
                self._asdict()
                | {
                    "pass": what,
                    "candidate": name,
                    "ms": middle * 1e3,
                    "host ms": host[name] * 1e3,
                    "TFLOP/s": work * {"forward": 1.0, "backward": 2.5}[what] / middle / 1e12,
                    "speed": statistics.median(a / b for a, b in zip(seconds["softmax"], taken, strict=True)),
                }
                | more.get(name, {})
            )
        return records


def main(
    doc: str,
    about: Callable[[argparse.Namespace], Record],
    measure: Callable[[list[Case], argparse.Namespace], Iterator[list[Record]]],
    accuracy: Callable[[str, argparse.Namespace], list[Record]] | None = None,
    **options: dict[str, Any],
) -> None:
    """Measure and write the result file.

    Args:
        doc: The description of the command.
        about: What the result file says of device and backend.
        measure: The records of each case in turn.
        accuracy: Those of growing ranges of values in a dtype.
        **options: Further options of the command line, as ``add_argument`` takes them.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--turns", type=int, default=5, help="timings of each, in turns (default: %(default)s)")
    parser.add_argument("--float16", action="store_true", help="the first shape in float16 too")
    parser.add_argument("--cases", type=int, nargs="*", metavar="N", help="only these, counted from 0")
    parser.add_argument("--no-accuracy", action="store_true", help="without the table of growing ranges")
    parser.add_argument("--out", type=Path, help="result file to write, after every shape (default: none)")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    chosen = parser.parse_args()
    cases = [Case(shape, causal) for shape in SHAPES for causal in (True, False)]
    cases += [Case(SHAPES[0], causal, "float16") for causal in (True, False) if chosen.float16]
    cases = [cases[i] for i in (range(len(cases)) if chosen.cases is None else chosen.cases)]
    result: Record = environment() | about(chosen) | {"records": [], "accuracy": []}

    def keep(kind: str, records: list[Record]) -> None:
        result[kind] += records
        for record in records:
            print(json.dumps(record), flush=True)
        if chosen.out:
            chosen.out.write_text(json.dumps(result, indent=1) + "\n")

    for records in measure(cases, chosen):
        keep("records", records)
    if accuracy is not None and not chosen.no_accuracy:
        for dtype in UNIT:
            keep("accuracy", accuracy(dtype, chosen))
