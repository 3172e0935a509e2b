"""Compile the decode kernels for a target that need not be there: ``decode_compile.py cuda 90``. Prints JSON."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
import triton.backends.nvidia
from laser_torch import decode, decode_kernels
from triton.backends.compiler import GPUTarget

from laser_core._problem import describe

kind, arch = sys.argv[1], sys.argv[2]
TARGET = GPUTarget(kind, int(arch) if kind == "cuda" else arch, 32 if kind == "cuda" else 64)
TOOLS = Path(triton.backends.nvidia.__file__).parent / "bin"


class Driver:
    """As much of a driver as compiling asks for."""

    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)


class Compiled:
    """A kernel that is compiled instead of launched."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(*args: Any, **options: Any) -> None:
            found = self.kernel.warmup(*args, grid=grid, **options)
            report = {"kernel": self.kernel.__name__, "shared": found.metadata.shared}
            if kind == "cuda":
                with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
                    file.write(found.asm["cubin"])
                    file.flush()
                    usage, code = (
                        subprocess.run([TOOLS / tool, flag, file.name], capture_output=True, text=True, check=True)
                        for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
                    )
                report |= {n: int(x) for n, x in re.findall(r"(REG|STACK):(\d+)", usage.stdout)}
                report["products"] = len(re.findall("HG?MMA|UTCHMMA", code.stdout))
            else:
                report["products"] = found.asm["amdgcn"].count("v_mfma")
            print(json.dumps(report))

        return run


triton.runtime.driver.set_active(Driver())  # type: ignore[no-untyped-call]
torch.cuda.device = lambda device: contextlib.nullcontext()  # type: ignore[assignment,misc]
decode_kernels.decode_kernel, decode_kernels.merge_kernel = (
    Compiled(k) for k in (decode_kernels.decode_kernel, decode_kernels.merge_kernel)
)
q, k = torch.empty(2, 32, 1, 128, dtype=torch.bfloat16), torch.empty(2, 8, 8192, 128, dtype=torch.bfloat16)
problem, inputs = describe(q, k, k)
sizes = decode.Device(
    132, 166912 if arch == "80" else 232448, decode.warps_on(int(arch) // 10 if kind == "cuda" else 0)
)
cut = decode.tiles(problem, sizes)
decode.launch(problem, inputs, None, cut, residual=False)
lengths = torch.empty(2, dtype=torch.int32)
problem, inputs = describe(q, k, k, key_value_seq_lengths=lengths)
for size in (64, 16):
    cache = torch.empty(2 * 8192 // size, size, 8, 128, dtype=torch.bfloat16)
    pages = decode.Pages(torch.empty(2, 8192 // size, dtype=torch.int32), size)
    decode.launch(problem, inputs._replace(key=cache, value=cache), pages, cut, residual=False)
