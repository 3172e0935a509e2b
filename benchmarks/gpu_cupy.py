"""CuPy's kernels beside cuDNN's and FlashAttention's softmax attention, in one process: ``--help``.

Each time is one of a result that is right, and a ratio to a peer that was measured in the same turns; inputs are shared
by DLPack. ``laser`` is the public call, with the value pass, the exact path and what is kept for the backward pass;
``kernel`` is the Hopper kernel alone; ``portable`` is the call without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import torch
from bench import environment
from gpu import SHAPES, ceiling, errors, inputs, softmax, times
from laser_cupy import CUDA, cuda, hopper, host
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laser_core import _problem

DTYPES = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype(np.float16)}
LARGEST_ERROR = 0.02  # of a gradient, relative, in norm


class Portable(cuda._Machine):
    """The device without the kernels for Hopper."""

    def _hopper_serves(self, problem: Any) -> bool:
        return False


def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """Softmax attention by FlashAttention-2."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return scaled_dot_product_attention(q, k, v, is_causal=causal)


def to_cupy(x: Tensor) -> Any:
    """The same memory, for CuPy."""
    return cupy.from_dlpack(x.detach().contiguous().view(torch.int16)).view(DTYPES[x.dtype])


def to_torch(x: Any, dtype: torch.dtype) -> Tensor:
    """The same memory, for torch."""
    return torch.from_dlpack(x.view(np.int16)).view(dtype)


def _spied(name: str, run: Callable[[], Any]) -> Callable[[], Any]:
    """The launches of the Hopper kernels of one call, as a function to be called again."""
    inner = getattr(hopper, name)
    found: list[tuple[Any, ...]] = []

    def spy(*arguments: Any) -> Any:
        found.append(arguments)
        return inner(*arguments)

    setattr(hopper, name, spy)
    try:
        run()
    finally:
        setattr(hopper, name, inner)
    return lambda: inner(*found[0])


def measure(shape: tuple[int, ...], causal: bool, dtype: torch.dtype, turns: int) -> list[dict[str, Any]]:
    """Records of every candidate, forward and backward, at one shape."""
    x = inputs(shape, dtype)
    leaves = [a.clone().requires_grad_() for a in x[:3]]
    arrays = [to_cupy(a) for a in x]
    problem, operands = _problem.describe(*arrays[:3], is_causal=causal)
    result = CUDA.forward(problem, operands)
    gradients = CUDA.backward(problem, operands, result, arrays[3], None)
    error, dq_error = errors(x, causal, to_torch(result.out, dtype), to_torch(gradients.query, dtype))
    again = CUDA.backward(problem, operands, result, arrays[3], None)
    same = all(
        bool((a.view(np.int16) == b.view(np.int16)).all()) for a, b in zip(gradients[:3], again[:3], strict=True)
    )
    record = {"shape": shape, "causal": causal, "dtype": str(dtype)[6:], "error": error, "dq error": dq_error}
    if not (error <= 1 and dq_error is not None and dq_error <= LARGEST_ERROR and same):
        return [record | {"same bits": same, "not timed": "wrong"}]
    machine, alone = Portable(0), dataclasses.replace(problem, gradient=False)
    softmax_out, flash_out = softmax(*leaves, causal), flash(*leaves, causal)
    forward = {
        "softmax": lambda: softmax(*x[:3], causal),
        "flash": lambda: flash(*x[:3], causal),
        "laser": lambda: CUDA.forward(alone, operands),
        "laser, for gradients": lambda: CUDA.forward(problem, operands),
        "portable": lambda: host.forward(machine, alone, operands),
        "kernel": _spied("forward_alone", lambda: CUDA.forward(alone, operands)),
    }
    backward = {
        "softmax": lambda: torch.autograd.grad(softmax_out, leaves, x[3], retain_graph=True),
        "flash": lambda: torch.autograd.grad(flash_out, leaves, x[3], retain_graph=True),
        "laser": lambda: CUDA.backward(problem, operands, result, arrays[3], None),
        "portable": lambda: host.backward(machine, problem, operands, result, arrays[3], None),
        "kernel": _spied("backward_alone", lambda: CUDA.backward(problem, operands, result, arrays[3], None)),
    }
    work = 4 * math.prod(shape) * shape[2] / (2 if causal else 1)
    records = []
    for what, calls, factor in (("forward", forward, 1.0), ("backward", backward, 2.5)):
        seconds, launched = times(calls, turns)
        for name, taken in seconds.items():
            ratio = statistics.median(a / b for a, b in zip(seconds["softmax"], taken, strict=True))
            figures = {"ms": statistics.median(taken) * 1e3, "host ms": launched[name] * 1e3, "speed": ratio}
            figures["TFLOP/s"] = factor * work / statistics.median(taken) / 1e12
            records.append(record | {"pass": what, "candidate": name} | figures)
    return records


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--turns", type=int, default=5, help="timings of each, in turns (default: %(default)s)")
    parser.add_argument("--float16", action="store_true", help="the first two shapes in float16 too")
    parser.add_argument("--out", type=Path, help="result file to write, after every shape (default: none)")
    options = parser.parse_args()
    versions = {"cupy": cupy.__version__, "nvrtc": cupy.cuda.nvrtc.getVersion()}
    result = environment() | versions | {"device": torch.cuda.get_device_name(), "product": ceiling(), "records": []}
    runs = [(shape, causal, torch.bfloat16) for shape in SHAPES for causal in (True, False)]
    runs += [(SHAPES[0], causal, torch.float16) for causal in (True, False) if options.float16]
    for shape, causal, dtype in runs:
        result["records"] += measure(shape, causal, dtype, options.turns)
        for record in result["records"][-11:]:
            print(json.dumps(record), flush=True)
        if options.out:
            options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
