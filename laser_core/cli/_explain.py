"""``laser-attention explain``: which backend would run a problem, from its shapes and options alone."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re

import numpy as np
from numpy.typing import NDArray

from laser_core import Problem, Report
from laser_core._array import FLOATING
from laser_core._attention import explain_problem
from laser_core._problem import describe

from ._common import Usage, table

FRAMEWORKS = {  # what the command line calls them, what a problem does, and where their arrays can be
    "numpy": ("numpy", ("cpu",)),
    "torch": ("torch", ()),
    "jax": ("jax", ()),
    "cupy": ("cupy", ("cuda",)),
    "array-api-strict": ("array_api_strict", ("cpu",)),
}
LENGTHS = ("query", "key_value", "both")
OPTIONS = {  # what the library calls an argument, and what the command line does
    "query": "--shape",
    "key": "--key-shape",
    "value": "--value-shape",
    "attn_mask": "--mask",
    "bias": "--bias",
    "is_causal": "--causal",
    "window_size": "--window",
    "logits_soft_cap": "--soft-cap",
    "backend": "--backend",
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    arrays = parser.add_argument_group("arrays")
    for name, required, meaning in (
        ("--shape", True, "of the query: any leading dimensions, heads, length, dim"),
        ("--key-shape", False, "default: that of the query"),
        ("--value-shape", False, "default: that of the key"),
    ):
        arrays.add_argument(name, type=_array_shape, metavar="B,H,L,D", required=required, help=meaning)
    arrays.add_argument("--dtype", choices=FLOATING, default="float32", help="default: %(default)s")
    arrays.add_argument("--framework", choices=FRAMEWORKS, default="numpy", help="default: %(default)s")
    arrays.add_argument("--device", metavar="KIND", help="cpu, cuda, … (default: cpu; cuda for cupy)")
    arrays.add_argument(
        "--mask", type=_shape, nargs="?", const=(), metavar="SHAPE", help="with a boolean mask (default: Lq,Lk)"
    )
    arrays.add_argument(
        "--bias", type=_shape, nargs="?", const=(), metavar="SHAPE", help="with an additive bias (default: Lq,Lk)"
    )
    arrays.add_argument(
        "--lengths", choices=LENGTHS, nargs="?", const="key_value", help="with sequence lengths (default: %(const)s)"
    )
    options = parser.add_argument_group("options")
    options.add_argument(
        "--causal", choices=("top_left", "bottom_right"), nargs="?", const="top_left", help="default: %(const)s"
    )
    options.add_argument("--window", type=_window, metavar="L,R", help="keys to the left and right; none is unbounded")
    options.add_argument("--scale", type=float, metavar="X", help="default: 1/√D")
    options.add_argument("--beta", type=_beta, default=1.0, metavar="X", help="a number, or array (default: 1)")
    options.add_argument("--soft-cap", type=float, metavar="X", help="bound of the scores")
    options.add_argument("--return-lse", action="store_true", help="with the log-sum-exp")
    options.add_argument("--no-gradient", action="store_true", help="of a call that no backward pass will follow")
    options.add_argument("--backend", nargs="+", metavar="NAME", help="ask for this one, or try these in order")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the backend chosen and the reason against each of the others; 1 where none can run the problem."""
    try:
        problem = _problem(options)
        report = explain_problem(problem, options.backend)
    except (TypeError, ValueError) as error:
        name, _, rest = str(error).partition(":")
        raise Usage(f"{OPTIONS.get(name, f'--{name}')}:{rest}") from None
    print(json.dumps(_document(report), indent=2) if options.json else _text(report))
    return 0 if report.chosen else 1


def _problem(options: argparse.Namespace) -> Problem:
    """The problem, checked as a call would be: on stand-ins that have a shape and hold a single number."""
    query, key = options.shape, options.key_shape or options.shape
    value = options.value_shape or key
    batch, scores = query[:-3], (query[-2], key[-2])
    framework, places = FRAMEWORKS[options.framework]
    device = options.device or (places[0] if places else "cpu")
    if places and device not in places:
        raise ValueError(f"device: got {device}; allowed: {places[0]}, the place of {options.framework} arrays")
    problem, _ = describe(
        _stand_in("query", query),
        _stand_in("key", key),
        _stand_in("value", value),
        None if options.mask is None else _stand_in("attn_mask", options.mask or scores, bool),
        None if options.bias is None else _stand_in("bias", options.bias or scores),
        scale=options.scale,
        beta=_stand_in("beta", (query[-3], value[-1])) if options.beta == "array" else options.beta,
        is_causal=options.causal or False,
        window_size=options.window,
        query_seq_lengths=_stand_in("lengths", batch, int) if options.lengths in ("query", "both") else None,
        key_value_seq_lengths=_stand_in("lengths", batch, int) if options.lengths in ("key_value", "both") else None,
        logits_soft_cap=options.soft_cap,
        return_lse=options.return_lse,
    )
    gradient = not options.no_gradient
    return dataclasses.replace(problem, framework=framework, device=device, dtype=options.dtype, gradient=gradient)


def _stand_in(name: str, shape: tuple[int, ...], kind: type = float) -> NDArray[np.generic]:
    """An array of that shape that takes the memory of one number."""
    try:
        return np.broadcast_to(np.zeros((), np.float32 if kind is float else kind), shape)
    except ValueError:
        raise ValueError(f"{name}: got shape {shape}; allowed: one that an array can have") from None


def _text(report: Report) -> str:
    problem = report.problem
    shown = [
        f"{problem.framework} {problem.dtype} on {problem.device}",
        f"query {_by(*problem.batch, problem.query_heads, problem.query_length, problem.head_dim)}",
        f"key {_by(*problem.batch, problem.key_value_heads, problem.key_length, problem.head_dim)}",
        f"value {_by(*problem.batch, problem.key_value_heads, problem.key_length, problem.value_dim)}",
    ]
    rows = [[report.chosen, "chosen"]] if report.chosen else []
    rows += [[name, f"can run this; {report.chosen} comes first"] for name in report.passed_over]
    rows += [[name, f"cannot: {reason}"] for name, reason in report.refused.items()]
    answer = f"backend: {report.chosen or 'none can run this'}"
    if report.how:
        answer += f"\n{report.how}"
    return f"{', '.join(shown)}\n{answer}\n\n{table(rows, header=['backend', 'verdict'])}"


def _document(report: Report) -> dict[str, object]:
    return {
        "problem": dataclasses.asdict(report.problem),
        "chosen": report.chosen,
        "how": report.how,
        "passed_over": list(report.passed_over),
        "refused": report.refused,
    }


def _by(*sizes: int) -> str:
    return " × ".join(map(str, sizes))


def _shape(text: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d{1,18}(,\d{1,18})*", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: sizes with commas between them, such as 2,8,1024,64")
    return tuple(map(int, text.split(",")))


def _array_shape(text: str) -> tuple[int, ...]:
    shape = _shape(text)
    if len(shape) < 3:
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: three sizes or more: heads, length, dim")
    return shape


def _window(text: str) -> tuple[int | None, int | None]:
    sides = text.split(",")
    if len(sides) != 2 or not all(re.fullmatch(r"\d{1,18}|none", side, re.ASCII) for side in sides):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: L,R, each a size or none, such as 128,none")
    left, right = (None if side == "none" else int(side) for side in sides)
    return left, right


def _beta(text: str) -> float | str:
    if text == "array":
        return text
    try:
        beta = float(text)
    except ValueError:
        beta = math.nan
    if not math.isfinite(beta):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed: a finite number, or array")
    return beta
