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
DTYPES = {"bf16": gl.bfloat16, "fp16": gl.float16, "i16": gl.int16}


def _descriptor(dtype: str, rows: int, width: int) -> str:
    block = [1, 1, rows, width]
    return f"tensordesc<{dtype}{block},{gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])!r}>"


def _compile(kernel: Any, types: dict[str, str], constants: dict[str, Any], aligned: tuple[str, ...] = ()) -> Any:
    types = types | dict.fromkeys(constants, "constexpr")
    signature = {name: types.get(name, "i32") for name in kernel.arg_names}
    attrs = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = GluonASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})


def backward(form: dict[str, Any]) -> Any:
    """The compiled backward kernel of a form: dtype, width, causal."""
    dtype, width = form["dtype"], form["width"]
    types = dict.fromkeys(("c_ptr", "flags_ptr", "turns_ptr"), "*i32")
    types |= dict.fromkeys(("scale", "scale2", "unit", "y_scale"), "fp32")
    for name, (block, swizzled) in hopper_gradient.blocks(width).items():
        wide = name in ("rows_desc", "sums_desc")
        layout = hopper_gradient.lies(block, swizzled, 4 if wide else 2)
        types[name] = f"tensordesc<{'fp32' if wide else dtype}{block},{layout!r}>"
    shape = (4, 16, 4096, width)
    cut = hopper_gradient.tiles(shape, shape, form["causal"])
    constants = hopper_gradient.constants(cut, form["causal"], dtype == "fp16")
    return _compile(hopper_backward.backward_kernel, types, constants)


def forward(form: dict[str, Any]) -> Any:
    """The compiled forward kernel of a form: dtype, width, causal, keeps, values."""
    dtype, width, causal = form["dtype"], form["width"], form["causal"]
    cut = hopper.tiles(width, causal)
    keeps, half = form["keeps"], dtype == "fp16"
    values = None
    if form["values"]:
        limits = (28.0, 29.0, -14.0, 15.0, 15, 2.0**-9) if half else (99.5, 117.0, -49.0, 49.0, 0, 2.0**-6)
        values = hopper.Values((0, 0, 0), 1.0, half, limits)
        cut = cut._replace(schedule="dynamic")
    constants = hopper.constants(cut, causal, half, keeps, values) | form.get("constants", {})
    types = {"lse_ptr": "*fp32", "scale2": "fp32", "o_scale": "fp32", "y_scale": "fp32"}
    types |= dict.fromkeys(("c_ptr", "counter_ptr", "flags_ptr", "partial_ptr"), "*i32")
    types |= dict.fromkeys(("q_ptr", "v_ptr", "x_ptr"), f"*{dtype}")
    types |= {name: _descriptor(dtype, hopper.ROWS, width) for name in ("q_desc", "o_desc", "rest_desc")}
    if keeps:
        types["rest_desc"] = _descriptor("i16", hopper.ROWS, width)
    types |= {name: _descriptor(dtype, cut.block_k, width) for name in ("k_desc", "x_desc")}
    pointers = ("lse_ptr", "c_ptr", "counter_ptr", "q_ptr", "v_ptr", "x_ptr", "flags_ptr", "partial_ptr")
    return _compile(hopper_forward.forward_kernel, types, constants, pointers)


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
    counts["SPILLS_IN_LOOPS"] = sum(len(re.findall(r"\b(?:STL|LDL)", body)) for body in _loops(sass))
    return {"registers": int(registers[1]), "threads": int(threads[1]), "shared": kernel.metadata.shared, **counts}


def _loops(sass: str) -> list[str]:
    """The innermost loops that multiply. A jump back from behind the end is one out of line, and makes no loop."""
    lines = sass.splitlines()
    places = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*\.(L_x_\d+):", line))}
    jumps = [
        (places.get(m[1], i), i) for i, line in enumerate(lines) if (m := re.search(r"BRA.*`\(\.(L_x_\d+)\)", line))
    ]
    bodies = ["\n".join(lines[start:end]) for start, end in jumps if start < end]
    loops = [b for b in bodies if "HGMMA" in b and not re.search(r"\bEXIT\b", b)]
    return [b for b in loops if not any(other != b and other in b for other in loops)]


if __name__ == "__main__":
    asked = json.loads(sys.argv[1])
    print(json.dumps(report(backward(asked) if asked.get("backward") else forward(asked))))
