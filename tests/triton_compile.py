"""Compiles the Triton kernels for a target that need not be here, and prints a line of JSON per kernel.

A process of its own per target: ``python triton_compile.py sm_90``, or ``… sm_90 packed`` for packed sequences.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
LARGE = ("sm_90", "sm_100")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Driver:
    """Answers which target to compile for, and nothing else."""

    def __init__(self, target):
        self.target = target

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def facts(kernel) -> dict[str, int]:
    """Registers, bytes of stack and of shared memory, and matrix instructions."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)[-1]
        return {"stack": 4 * int(spills), "shared": kernel.metadata.shared, "products": text.count("v_mfma")}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([TOOLS / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True).stdout
        text = subprocess.run([TOOLS / "nvdisasm", "-c", file.name], capture_output=True, text=True).stdout
    registers, stack = map(int, re.findall(r"REG:(\d+) STACK:(\d+)", usage)[-1])
    products = len(re.findall(r"\b(?:HGMMA|UTCHMMA|HMMA)\b", text))
    return {"registers": registers, "stack": stack, "shared": kernel.metadata.shared, "products": products}


def main(name: str, packed: bool) -> None:
    triton.runtime.driver.set_active(Driver(TARGETS[name]))
    compile_only = JITFunction.run

    def run(self, *args, grid, warmup, **options):
        kernel = compile_only(self, *args, grid=grid, warmup=True, **options)
        print(json.dumps({"kernel": self.fn.__name__, **facts(kernel)}), flush=True)  # and no kernel to launch again

    JITFunction.run = run
    from laser_torch import call, fused, fused_backward
    from laser_torch import packed as packing

    from laser_core import Forward
    from laser_core._problem import describe

    call.is_large = lambda device: name in LARGE
    call.copies_tiles = lambda device: name in LARGE
    x = torch.zeros((1, 2, 256, 128), dtype=torch.bfloat16)
    problem, inputs = describe(x, x, x, is_causal="bottom_right" if packed else True)
    if packed:
        problem = dataclasses.replace(problem, query_lengths=True, key_value_lengths=True)
        x, starts = torch.zeros((256, 2, 128), dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int32)
        ready = packing.prepare(problem, x, x, x, starts, starts)
        packing.backward(ready, Forward(*packing.forward(ready, x.dtype)), x, torch.zeros((2, 256)))
        return
    forward = fused.forward(problem, inputs)
    fused_backward.backward(problem, inputs, forward, x, forward.lse)


if __name__ == "__main__":
    main(sys.argv[1], "packed" in sys.argv[2:])
