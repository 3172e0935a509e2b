"""The kernels on a CPU, from the same source: to read, to debug and to test them without a GPU. Slow.

Needs g++ and an x86-64 processor. ``EMULATED`` is a record like any other, and not registered: the conformance suite
takes it with ``--load laser_cupy.emulated:EMULATED``. ``LASER_EMULATOR_SEED`` chooses the order in which threads run.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laser_core import Forward, Gradients, Inputs, Problem
from laser_core._array import Array

from . import CUDA, host

_LAUNCHER = """
extern "C" int emulator_launch(const char* name, unsigned grid, unsigned threads, size_t bytes, unsigned seed, void** a) {
%s  return 1;
}
"""


@functools.cache
def library(build: host.Build) -> ctypes.CDLL:
    """The kernels, compiled by g++; kept in the folder that ``LASER_EMULATOR_CACHE`` names, or a temporary one."""
    text = host.source(hardware="emulator.h")
    cases = "".join(
        f'  if (!strcmp(name, "{kernel}")) return emulator::launch({kernel}, grid, threads, bytes, seed, a), 0;\n'
        for kernel in host.KERNELS
    )
    text += _LAUNCHER % cases
    command = ["g++", "-std=c++17", "-O2", "-march=native", "-Wall", "-Wno-unknown-pragmas", "-shared", "-fPIC"]
    command += ["-Wno-unused", "-x", "c++", *build.definitions]
    name = hashlib.sha256("\n".join([*command, text]).encode()).hexdigest()[:24]
    folder = Path(os.environ.get("LASER_EMULATOR_CACHE") or tempfile.mkdtemp(prefix="laser-emulator-"))
    path = folder / f"{name}.so"
    if not path.exists():
        made = folder / f"{name}.{os.getpid()}.so"
        result = subprocess.run([*command, "-", "-o", str(made)], input=text, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"g++ could not compile the kernels:\n{result.stderr}")
        made.replace(path)
    return ctypes.CDLL(str(path))


class _Machine:
    """g++ and NumPy."""

    xp = np

    def launch(self, build: host.Build, kernel: str, grid: int, arguments: Sequence[Any]) -> None:
        held = [np.uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
        places = [x.reshape(1) if isinstance(x, np.ndarray) else np.asarray([x]) for x in held]
        pointers = (ctypes.c_void_p * len(places))(*[x.ctypes.data for x in places])
        seed = int(os.environ.get("LASER_EMULATOR_SEED", "0"))
        sizes = (ctypes.c_uint(grid), ctypes.c_uint(host.THREADS), ctypes.c_size_t(build.shared(kernel)))
        if library(build).emulator_launch(kernel.encode(), *sizes, ctypes.c_uint(seed), pointers):
            raise ValueError(f"kernel: got {kernel!r}; allowed: {', '.join(host.KERNELS)}")

    def aligned(self, x: Array) -> bool:
        return True


def _forward(problem: Problem, inputs: Inputs) -> Forward:
    return host.forward(_Machine(), problem, inputs)


def _backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    return host.backward(_Machine(), problem, inputs, forward, d_out, d_lse)


EMULATED = dataclasses.replace(
    CUDA,
    name="cupy-cuda-emulated",
    summary="the CUDA kernels on a CPU: a fiber for each thread",
    forward=_forward,
    backward=_backward,
    frameworks=("numpy",),
    devices=("cpu",),
    requires=("ml_dtypes",),
    priority=lambda problem: -1,
)
