"""CuPy's kernels beside cuDNN's and FlashAttention's softmax attention, in one process: ``--help``.

Each time is one of a result that is right, and a ratio to a peer that was measured in the same turns; inputs are shared
by DLPack. ``laser`` is the public call, with the value pass, the exact path and what is kept for the backward pass;
``kernel`` is the Hopper kernel alone, forward with the making of X; ``portable`` is the call without it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import cupy
import ml_dtypes
import numpy as np
import torch
from gpu import ceiling, errors, inputs, memory, softmax, times
from gpu_common import Case, Record, main
from laser_cupy import CUDA, cuda, hopper, host
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from laser_core import _problem

DTYPES = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype(np.float16)}


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


class Live(cupy.cuda.MemoryHook):  # type: ignore[misc]  # CuPy has no types
    """Bytes of the arrays that live, since the beginning of a ``with`` block, and the most there were."""

    now = peak = 0

    def malloc_postprocess(self, **made: int) -> None:
        """An array was made."""
        self.now += made["mem_size"]
        self.peak = max(self.peak, self.now)

    def free_postprocess(self, **freed: int) -> None:
        """An array was given back."""
        self.now -= freed["mem_size"]


def own_memory(machine: Any, problem: Any, operands: Any, d_out: Any) -> dict[str, int]:
    """What ``gpu.memory`` says of torch's: bytes beside inputs, held between the passes and at the peak of both."""
    with Live() as live:
        result = host.forward(machine, problem, operands)
        held = live.now
        host.backward(machine, problem, operands, result, d_out, None)
    return {"held": held, "peak": live.peak}


def measure(cases: list[Case], options: argparse.Namespace) -> Iterator[list[Record]]:
    """Records of every candidate, forward and backward, case by case."""
    for case in cases:
        yield _measured(case, options.turns)


def _measured(case: Case, turns: int) -> list[Record]:
    causal, dtype = case.causal, getattr(torch, case.dtype)
    x = inputs(case.shape, dtype)
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
    if (wrong := case.wrong(error if same else math.inf, dq_error)) is not None:
        return wrong
    machine, alone = Portable(0), dataclasses.replace(problem, gradient=False)
    softmax_out, flash_out = softmax(*leaves, causal), flash(*leaves, causal)
    kept = host.forward(machine, problem, operands)  # not what Hopper's kernels keep, which is less
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
        "portable": lambda: host.backward(machine, problem, operands, kept, arrays[3], None),
        "kernel": _spied("backward_alone", lambda: CUDA.backward(problem, operands, result, arrays[3], None)),
    }
    more: dict[str, Record] = {name: {"error": error, "dq error": dq_error} for name in forward}
    for name, run in {"softmax": softmax, "flash": flash}.items():
        more[name]["memory"] = memory(run, x, causal)
    for name, where in {"laser": cuda._Machine(0), "portable": machine}.items():
        more[name]["memory"] = own_memory(where, problem, operands, arrays[3])
    return [
        record
        for what, calls in (("forward", forward), ("backward", backward))
        for record in case.compared(what, *times(calls, turns), more)
    ]


def about(options: argparse.Namespace) -> Record:
    """The device, and the versions that count."""
    versions = {"cupy": cupy.__version__, "nvrtc": cupy.cuda.nvrtc.getVersion()}
    return versions | {"device": torch.cuda.get_device_name(), "product": ceiling(), "chosen": CUDA.name}


if __name__ == "__main__":
    main(str(__doc__), about, measure)
