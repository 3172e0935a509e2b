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

from . import CUDA, decode, host
from .build import KERNELS, THREADS, Build, source

_LAUNCHER = """
extern "C" int emulator_launch(
    const char* name, unsigned grid, unsigned threads, size_t bytes, unsigned seed, void** a) {
%s  return 1;
}
"""


def library(build: Build) -> ctypes.CDLL:
    """The kernels as a library, compiled by g++ unless that has been done.

    It is kept in the folder that ``LASER_EMULATOR_CACHE`` names, or a temporary one.

    Raises:
        RuntimeError: g++ could not compile them; says why.
    """
    return _compiled(build, source(hardware="emulator.h"))


@functools.cache
def _folder() -> Path:
    return Path(os.environ.get("LASER_EMULATOR_CACHE") or tempfile.mkdtemp(prefix="laser-emulator-"))


@functools.cache
def _compiled(build: Build, text: str) -> ctypes.CDLL:
    cases = "".join(
        f'  if (!strcmp(name, "{kernel}")) return emulator::launch({kernel}, grid, threads, bytes, seed, a), 0;\n'
        for kernel in KERNELS
    )
    text += _LAUNCHER % cases
    command = ["g++", "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC", "-x", "c++", *build.definitions]
    name = hashlib.sha256("\n".join([*command, text]).encode()).hexdigest()[:24]
    path = _folder() / f"{name}.so"
    if not path.exists():
        made = path.with_suffix(f".{os.getpid()}.so")
        result = subprocess.run([*command, "-", "-o", str(made)], input=text, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"g++ could not compile the kernels:\n{result.stderr}")
        made.replace(path)
    return ctypes.CDLL(str(path))


class _Machine:
    """g++ and NumPy."""

    xp: Any = np
    processors = 1

    def launch(self, build: Build, kernel: str, grid: int, arguments: Sequence[Any]) -> None:
        held = [np.uint64(x.ctypes.data) if isinstance(x, np.ndarray) else x for x in arguments]
        places = [x.reshape(1) if isinstance(x, np.ndarray) else np.asarray([x]) for x in held]
        pointers = (ctypes.c_void_p * len(places))(*[x.ctypes.data for x in places])
        seed = int(os.environ.get("LASER_EMULATOR_SEED", "0"))
        sizes = (ctypes.c_uint(grid), ctypes.c_uint(THREADS), ctypes.c_size_t(build.shared(kernel)))
        if library(build).emulator_launch(kernel.encode(), *sizes, ctypes.c_uint(seed), pointers):
            raise ValueError(f"kernel: got {kernel!r}; allowed: {', '.join(KERNELS)}")

    def aligned(self, x: Array) -> bool:
        return True

    def special_forward(self, *_: object) -> None:
        return None

    def special_backward(self, *_: object) -> None:
        return None


def _forward(problem: Problem, inputs: Inputs) -> Forward:
    run = decode.forward if decode.fits(problem) else host.forward
    return run(_Machine(), problem, inputs)


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
