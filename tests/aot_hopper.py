"""Compile a form of a Hopper kernel for sm_90a and print, as JSON, what came out. Run by test_hopper_aot."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from laser_torch import hopper, hopper_backward, hopper_forward, hopper_gradient
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16}


def _descriptor(dtype: str, rows: int, width: int) -> str:
    block = [1, 1, rows, width]
    return f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])!r}>"


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any]) -> Any:
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs={})
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def backward(form: dict[str, Any]) -> Any:
    """The compiled backward kernel of a form: dtype, width, causal."""
    dtype, width = form["dtype"], form["width"]

    def tile(block: list[int], swizzle: int, dtype: str = dtype) -> str:
        layout = hopper_gradient.tile_layout(block, 4 if dtype == "fp32" else 2, swizzle)
        return f"tensordesc<{dtype}{block},{layout!r}>"

    cut = hopper_gradient.tiles(width)
    queries, keys = [1, 1, cut.queries, width], [1, 1, hopper.ROWS, width]
    halves = cut.queries == hopper.ROWS  # of columns, not of queries
    types = dict.fromkeys(("x_ptr", "dk_ptr", "dv_ptr"), f"*{dtype}")
    types |= dict.fromkeys(("flags_ptr", "counter_ptr", "turns_ptr"), "*i32")
    types |= dict.fromkeys(("scale", "scale2", "to_row", "beta", "unit"), "fp32")
    types |= {"q_desc": tile(queries, 128), "g_desc": tile(queries, 128), "x_desc": tile(keys, 128)}
    types["k_desc"] = tile(keys, width if halves else 128)
    types["rows_desc"] = tile([2, 1, cut.queries], 0, "fp32")
    types["dq_desc"] = tile([1, hopper.ROWS, width // 2 if halves else width], 128, "fp32")
    constants = hopper_gradient.constants(cut, form["causal"], dtype == "fp16")
    return _compile(hopper_backward.backward_kernel, types, constants)


def forward(form: dict[str, Any]) -> Any:
    """The compiled forward kernel of a form: dtype, width, causal, residual, reference, factor."""
    dtype, width, causal = form["dtype"], form["width"], form["causal"]
    cut = hopper.tiles(width, causal)
    constants = hopper.constants(
        cut,
        causal,
        dtype == "fp16",
        form.get("residual", False),
        form.get("reference", False),
        form.get("factor", False),
    )
    types = {
        "lse_ptr": "*fp32",
        "residual_ptr": "*fp32",
        "c_ptr": "*i32",
        "factor_ptr": "*fp32",
        "scale2": "fp32",
        "counter_ptr": "*i32",
    }
    types |= {name: _descriptor(dtype, hopper.ROWS, width) for name in ("q_desc", "o_desc")}
    types |= {name: _descriptor(dtype, cut.block_k, width) for name in ("k_desc", "x_desc")}
    return _compile(hopper_forward.forward_kernel, types, constants)


def report(kernel: Any) -> dict[str, Any]:
    """Registers at launch, threads, shared memory and the instructions that tell."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True)
        sass = subprocess.run([BIN / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout
    registers = re.search(r"REG:(\d+)", usage.stdout + usage.stderr)
    threads = re.search(r"\.reqntid (\d+)", kernel.asm["ptx"]) or re.search(r"\.maxntid (\d+)", kernel.asm["ptx"])
    assert registers
    assert threads
    counts = {
        name: len(re.findall(rf"\b{name}", sass))
        for name in ("HGMMA", "UTMALDG", "UTMASTG", "UTMAREDG", "STL", "LDL", "WARPGROUP")
    }
    return {"registers": int(registers[1]), "threads": int(threads[1]), "shared": kernel.metadata.shared, **counts}


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(report(backward(asked) if asked.get("backward") else forward(asked))))
