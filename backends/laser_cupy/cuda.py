"""The kernels on a GPU: compiled by NVRTC and launched through CuPy, on CuPy's current device and stream."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import cupy

from laser_core import Forward, Gradients, Inputs, Problem, Unsupported
from laser_core._array import Array

from . import decode, hopper, host
from .build import KERNELS, THREADS, Build, source

OLDEST = 80  # compute capability: cp.async and mma.sync of bfloat16
OPTIONS = ("-std=c++17",)


@functools.cache
def capability(device: int) -> int:
    """The compute capability of a device: 90 for 9.0."""
    return int(cupy.cuda.Device(device).compute_capability)


@functools.cache
def kernel(build: Build, name: str, device: int) -> Any:
    """A kernel, compiled for a device; CuPy keeps the machine code on disk.

    Raises:
        Unsupported: The device is too old.
    """
    with cupy.cuda.Device(device):
        if capability(device) < OLDEST:
            raise Unsupported(f"device: got compute capability {capability(device)}; allowed: {OLDEST} or later")
        function = _module(build, KERNELS[name], device).get_function(name)
        if build.shared(name) > 48 << 10:
            function.max_dynamic_shared_size_bytes = build.shared(name)
    return function


@functools.cache
def _module(build: Build, part: str, device: int) -> Any:
    return cupy.RawModule(code=source(part), options=(*OPTIONS, *build.definitions))


@functools.cache
def _processors(device: int) -> int:
    return int(cupy.cuda.Device(device).attributes["MultiProcessorCount"])


class _Machine:
    """CuPy's current device and stream."""

    xp: Any = cupy

    def __init__(self, device: int) -> None:
        self.device = device

    @property
    def processors(self) -> int:
        return _processors(self.device)

    def launch(self, build: Build, name: str, grid: int, arguments: Sequence[Any]) -> None:
        """Launch a kernel; CuPy raises where the launch fails."""
        kernel(build, name, self.device)((grid,), (THREADS,), tuple(arguments), shared_mem=build.shared(name))

    def aligned(self, x: Array) -> bool:
        return bool(x.data.ptr % 16 == 0)

    def special_forward(self, x: host.Call, out: Array, lse: Array, keep: bool) -> tuple[host.Values, Array] | None:
        return hopper.forward(x, out, lse, keep) if self._hopper_serves(x.problem) else None

    def special_backward(
        self, x: host.Call, forward: Forward, d_out: Array, d_lse: Array | None, dq: Array, dk: Array, dv: Array
    ) -> tuple[host.Values, host.Rows] | None:
        return hopper.backward(x, forward, d_out, d_lse, dq, dk, dv) if self._hopper_serves(x.problem) else None

    def _hopper_serves(self, problem: Problem) -> bool:
        return capability(self.device) == hopper.CAPABILITY and hopper.why_not(problem) is None


def forward(problem: Problem, inputs: Inputs) -> Forward:
    """The output, on the device of the query."""
    device = inputs.query.device.id
    run = decode.forward if decode.fits(problem) else host.forward
    with cupy.cuda.Device(device):
        return run(_Machine(device), problem, inputs)


def backward(problem: Problem, inputs: Inputs, forward: Forward, d_out: Array, d_lse: Array | None) -> Gradients:
    """The gradients, on the device of the query."""
    device = inputs.query.device.id
    with cupy.cuda.Device(device):
        return host.backward(_Machine(device), problem, inputs, forward, d_out, d_lse)
