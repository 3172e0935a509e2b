"""Small problems of every option of a backend under NVIDIA's compute-sanitizer: memcheck, racecheck, initcheck.

``python benchmarks/sanitize.py --backend torch-triton`` runs them first without it, which compiles the kernels, then
under each tool, and ends with 1 where one has found something. Allocations are not pooled, so that each array has its
own. ``--out`` writes what came of it: what was run, what a backend refuses, and what the tool said.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench import environment

TOOLS: dict[str, tuple[str, ...]] = {  # and what the kernels for Hopper of cupy-cuda are compiled with for each
    "memcheck": (),
    "racecheck": ("EVERY_LANE",),  # it does not follow what __syncwarp orders
    "initcheck": ("PLAIN_SUMS",),  # it does not see what the copy engine writes
}
DTYPES = ("bfloat16", "float16", "float32")
FOUND = 9  # exit status of a tool that has found something
SUBJECT = ("backend", "kernels", "tool", "dtype")  # of a record: a new one takes the place of an older one
PLAIN: dict[str, Any] = {"hq": 4, "hkv": 2, "lq": 70, "lk": 90, "d": 16, "e": 16}
Problems = tuple[dict[str, Any], ...]
PROBLEMS: Problems = (
    {},
    {"is_causal": "bottom_right", "window_size": (40, None), "return_lse": True},
    {"mask": (2, 1, 70, 90), "bias": (4, 1, 90), "scale": -0.3},
    {"bias": (2, 1, 70, 90), "key_value_seq_lengths": (90, 11), "query_seq_lengths": (70, 0)},
    {"bias": (70, 1), "is_causal": True, "odd": True},
    {"beta": 0.25, "bias": (4, 70, 90)},
    {"beta": (4, 16), "logits_soft_cap": 2.0},
    {"beta": 0.0, "lq": 3},
    {"lq": 2, "lk": 300, "is_causal": "bottom_right", "odd": True},
    {"sigma": 100.0, "bias": (90,)},
    {"d": 24, "e": 40, "lq": 65, "lk": 129, "is_causal": True},
    {"d": 64, "e": 64, "lq": 300, "lk": 300, "is_causal": True},
    {"d": 128, "e": 128, "lq": 200, "lk": 333},
    {"d": 128, "e": 128, "lq": 150, "lk": 260, "is_causal": "bottom_right", "odd": True},  # from here on: Hopper's
    {"d": 64, "e": 64, "lq": 200, "lk": 300, "key_value_seq_lengths": (300, 0)},
    {"d": 64, "e": 128, "lq": 140, "lk": 70, "sigma": 100.0},
    {"d": 128, "e": 128, "lq": 140, "lk": 200, "window_size": (30, 9), "beta": -2.0, "return_lse": True},
    {"d": 128, "e": 128, "lq": 130, "lk": 150, "sigma": 100.0},
)
PACKED: Problems = (  # lengths of the sequences are those of PACKED_LENGTHS
    {},
    {"is_causal": "bottom_right", "odd": True},
    {"d": 64, "e": 64, "is_causal": True, "window_size": (30, None)},
    {"d": 128, "e": 128, "sigma": 100.0},
)
PACKED_LENGTHS = ((0, 130, 1, 70), (40, 200, 9, 0))  # of queries and keys
PAGED: Problems = (
    {"lq": 1, "lk": 300},
    {"lq": 3, "lk": 300, "is_causal": "bottom_right", "odd": True},
    {"lq": 1, "lk": 600, "hq": 8, "d": 128, "e": 128},
)
PAGE = 16  # keys
FUNCTIONS: dict[str, Problems] = {"laser_attention_varlen": PACKED, "laser_attention_paged": PAGED}  # of laser_torch


def drawn(dtype: str, given: dict[str, Any]) -> tuple[list[Any], dict[str, Any], Any]:
    """Query, key, value and cotangent as NumPy arrays, the other options, and where further numbers come from."""
    import ml_dtypes
    import numpy

    options = {**PLAIN, **given}
    hq, hkv, lq, lk, d, e = (options.pop(n) for n in PLAIN)
    random = numpy.random.default_rng(0)
    shapes = ((2, hq, lq, d), (2, hkv, lk, d), (2, hkv, lk, e), (2, hq, lq, e))
    query, key, value, d_out = (random.standard_normal(shape, dtype="float32") for shape in shapes)
    value *= options.pop("sigma", 1.0)
    if options.pop("odd", False):
        value[0, 0, lk // 2], value[1, 0, 1, 0], key[0, 1, lk - 1] = numpy.nan, numpy.inf, numpy.nan
    kind = numpy.dtype(getattr(ml_dtypes, dtype, dtype))
    return [x.astype(kind) for x in (query, key, value, d_out)], options, random


def attention(backend: str, dtype: str, given: dict[str, Any]) -> str | None:
    """One problem, forward and backward; returns which engines that is, where a backend has several."""
    import numpy

    import laser_core

    (*arrays, d_out), options, random = drawn(dtype, given)
    mask = options.pop("mask", None)
    arrays.append(None if mask is None else random.random(mask) < 0.7)
    bias = options.pop("bias", None)
    arrays.append(None if bias is None else random.standard_normal(bias, dtype="float32").astype(d_out.dtype))
    if isinstance(options.get("beta"), tuple):
        options["beta"] = random.standard_normal(options["beta"], dtype="float32").astype(d_out.dtype)
    options |= {n: numpy.asarray(x) for n, x in options.items() if n.endswith("lengths")}
    give = GIVE[laser_core.backends()[backend].frameworks[0]]
    options = {n: give(x) if isinstance(x, numpy.ndarray) else x for n, x in options.items()}
    given_arrays = [give(x) for x in arrays]
    _, pullback = laser_core.laser_attention_vjp(*given_arrays, backend=backend, **options)
    d_lse = random.standard_normal(d_out.shape[:-1], dtype="float32") if options.get("return_lse") else None
    found = pullback(give(d_out), give(d_lse))
    if give is _to_jax:
        import jax

        wait: Callable[[Any], Any] = jax.block_until_ready
        wait(tuple(found))
    how: str | None = laser_core.explain(*given_arrays, backend=backend, **options).how
    return how


def packed(dtype: str, given: dict[str, Any]) -> str:
    """``laser_attention_varlen``, forward and backward."""
    import torch
    from laser_torch import laser_attention_varlen

    queries, keys = map(sum, PACKED_LENGTHS)
    (q, k, v, do), options, _ = drawn(dtype, {**given, "lq": queries, "lk": keys})
    query, key, value, d_out = (_to_torch(x[0].swapaxes(0, 1).copy()) for x in (q, k, v, do))
    inputs = [x.requires_grad_() for x in (query, key, value)]
    starts = [torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32) for lengths in PACKED_LENGTHS]
    out = laser_attention_varlen(*inputs, *starts, *map(max, PACKED_LENGTHS), **options)
    torch.autograd.grad(out, inputs, d_out)
    return "forward and backward"


def paged(dtype: str, given: dict[str, Any]) -> str:
    """``laser_attention_paged``, whose sequences have their blocks in any order."""
    import torch
    from laser_torch import laser_attention_paged

    (q, k, v, _), options, random = drawn(dtype, given)
    blocks = -(-k.shape[2] // PAGE)
    table = random.permutation(2 * blocks).reshape(2, blocks)
    caches = []
    for x in (k, v):
        cache = random.standard_normal((2 * blocks, PAGE, *x.shape[1::2]), dtype="float32").astype(x.dtype)
        for b in range(2):
            rows = cache[table[b]].reshape(-1, *cache.shape[2:])
            rows[: x.shape[2]] = x[b].swapaxes(0, 1)
            cache[table[b]] = rows.reshape(blocks, *cache.shape[1:])
        caches.append(_to_torch(cache))
    lengths = torch.tensor([k.shape[2], 7], device="cuda", dtype=torch.int32)
    laser_attention_paged(_to_torch(q), caches[0], caches[1], _to_torch(table), lengths, **options)
    return "forward"


def _to_cupy(x: Any) -> Any:
    import cupy

    return None if x is None else cupy.asarray(x)


def _to_torch(x: Any) -> Any:
    import torch

    if x is None:
        return None
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16).cuda()
    return torch.from_numpy(x).cuda()


def _to_jax(x: Any) -> Any:
    import jax.numpy as jnp

    return None if x is None else jnp.asarray(x)


GIVE: dict[str, Callable[[Any], Any]] = {"cupy": _to_cupy, "torch": _to_torch, "jax": _to_jax}


CALLS: dict[str, Callable[[str, dict[str, Any]], str | None]] = dict(zip(FUNCTIONS, (packed, paged), strict=True))


def run(options: argparse.Namespace) -> None:
    """The problems, in this process; a line of JSON for each."""
    import laser_core
    from laser_core import _tables

    setattr(_tables, "find", lambda *_: None)  # noqa: B010  # no times: Hopper's kernels come first
    if options.backend == "cupy-cuda":
        import cupy
        from laser_cupy import cuda, hopper

        hopper.OPTIONS = (*hopper.OPTIONS, *(f"-D{name}=1" for name in options.define))
        if options.portable:
            setattr(cuda._Machine, "_hopper_serves", lambda self, problem: False)  # noqa: B010
        cupy.cuda.set_allocator(None)
    elif options.portable:
        import laser_torch.hopper

        setattr(laser_torch.hopper, "why_not", lambda problem: "asked for the portable kernels")  # noqa: B010
    for dtype in options.dtype:
        for number in options.problem:
            given = FUNCTIONS.get(options.backend, PROBLEMS)[number]
            start = time.perf_counter()
            try:
                how = CALLS.get(options.backend, functools.partial(attention, options.backend))(dtype, given)
                _wait()
                done: dict[str, Any] = {"problem": number, "how": how}
            except laser_core.Unsupported as refused:
                done = {"problem": number, "refused": str(refused)}
            print(json.dumps(done | {"seconds": round(time.perf_counter() - start, 2)}), flush=True)


def _wait() -> None:
    """Until the device is done."""
    if "cupy" in sys.modules:
        import cupy

        cupy.cuda.get_current_stream().synchronize()
    if "torch" in sys.modules:
        import torch

        torch.cuda.synchronize()


def under(tool: str, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """The problems in a dtype under a tool ("": none), and what it said."""
    command = [sys.executable, __file__, "--bare", "--backend", options.backend, "--dtype", dtype]
    command += [*(f"--problem={n}" for n in options.problem), *["--portable"] * options.portable]
    definitions = TOOLS.get(tool, ()) if options.backend == "cupy-cuda" else ()
    command += [f"--define={name}" for name in definitions]
    if tool:
        # laser_torch asks the driver for the parameters of a kernel until it says that there is no such one
        quiet = ["--report-api-errors=no"] * (tool == "memcheck")
        quiet += [f"--error-exitcode={FOUND}", "--print-limit=3"]
        command = ["compute-sanitizer", f"--tool={tool}", *quiet, *command]
    own = {  # every array its own allocation; JAX compiles once for all tools
        "PYTORCH_NO_CUDA_MEMORY_CACHING": "1",
        "XLA_PYTHON_CLIENT_ALLOCATOR": "platform",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_COMPILATION_CACHE_DIR": os.path.join(tempfile.gettempdir(), "laser-sanitize"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=own | os.environ, start_new_session=True
        )
        try:
            code: int | None = process.wait(options.limit)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        said = output.read()
    done = [json.loads(line) for line in said.splitlines() if line.startswith('{"problem"')]
    record = {
        "backend": options.backend,
        "kernels": "portable" if options.portable else "all",
        "tool": tool,
        "dtype": dtype,
        "definitions": definitions,
        "run": {d["problem"]: d["how"] for d in done if "how" in d},
        "refused": {d["problem"]: d["refused"] for d in done if "refused" in d},
        "outcome": _outcome(code, said, any("how" in d for d in done)),
        "seconds": round(time.perf_counter() - start, 1),
    }
    if code != 0:
        record["said"] = "\n".join(line for line in said.splitlines() if not line.startswith("{"))[:4000]
    return record


def _outcome(code: int | None, said: str, ran: bool) -> str:
    """What came of it, in words."""
    if code is None:
        return "stopped"
    if code not in (0, FOUND):
        return f"exit status {code}"
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (.*)", said)
    if not (ran and summary):
        return "nothing was checked"
    return "clean" if code == 0 else str(summary[0])


def main() -> int:
    """All problems, under all tools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cupy-cuda", help=f"of laser_core.backends(), or {', '.join(FUNCTIONS)}")
    parser.add_argument("--dtype", action="append", help=f"{', '.join(DTYPES)}; default: all")
    parser.add_argument("--tool", action="append", help=f"{', '.join(TOOLS)}; default: all")
    parser.add_argument("--problem", action="append", type=int, metavar="N", help="counted from 0; default: all")
    parser.add_argument("--portable", action="store_true", help="without the kernels for Hopper")
    parser.add_argument("--compiled", action="store_true", help="not first without a tool")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (default: %(default)s)")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds for each (default: %(default)g)")
    parser.add_argument("--out", type=Path, help="result file to write, or to add to; default: none")
    parser.add_argument("--bare", action="store_true", help="run the problems here, under no tool")
    parser.add_argument("--define", action="append", default=[], help="for the kernels of cupy-cuda for Hopper")
    options = parser.parse_args()
    options.dtype = options.dtype or list(DTYPES)
    options.problem = options.problem or list(range(len(FUNCTIONS.get(options.backend, PROBLEMS))))
    if options.bare:
        run(options)
        return 0
    result = environment() | {"card": _card(), "records": []}
    if options.out and options.out.exists():
        result["records"] = json.loads(options.out.read_text())["records"]
    found = False
    with ThreadPoolExecutor(options.jobs) as pool:
        for tools in ([] if options.compiled else [""], options.tool or TOOLS):  # without a tool first: that compiles
            made = [pool.submit(under, tool, dtype, options) for tool in tools for dtype in options.dtype]
            for future in made:
                record = future.result()
                found |= bool(record["tool"]) and record["outcome"] != "clean"
                print(json.dumps(record), flush=True)
                if record["tool"]:
                    same = [r for r in result["records"] if all(r[n] == record[n] for n in SUBJECT)]
                    result["records"] = [*(r for r in result["records"] if r not in same), record]
                    if options.out:
                        options.out.write_text(json.dumps(result, indent=1) + "\n")
    return int(found)


def _card() -> str:
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
