"""Small problems of every option of a backend under NVIDIA's compute-sanitizer: memcheck, racecheck, initcheck.

``python benchmarks/sanitize.py`` runs them first without it, which compiles the kernels, then under each tool, and ends
with 1 where one has found something. Allocations are not pooled, so that each array has its own. What a backend
refuses is said.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from typing import Any

TOOLS = ("memcheck", "racecheck", "initcheck")
PLAIN: dict[str, Any] = {"hq": 4, "hkv": 2, "lq": 70, "lk": 90, "d": 16, "e": 16}
PROBLEMS: tuple[dict[str, Any], ...] = (
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
)


def run(backend: str, dtype: str, **given: Any) -> None:
    """One problem, forward and backward."""
    import ml_dtypes
    import numpy

    import laser_core

    options = {**PLAIN, **given}
    hq, hkv, lq, lk, d, e = (options.pop(n) for n in PLAIN)
    kind = numpy.dtype(getattr(ml_dtypes, dtype, dtype))
    random = numpy.random.default_rng(0)
    shapes = ((2, hq, lq, d), (2, hkv, lk, d), (2, hkv, lk, e), (2, hq, lq, e))
    query, key, value, d_out = (random.standard_normal(shape, dtype="float32") for shape in shapes)
    value *= options.pop("sigma", 1.0)
    if options.pop("odd", False):
        value[0, 0, lk // 2], value[1, 0, 1, 0], key[0, 1, lk - 1] = numpy.nan, numpy.inf, numpy.nan
    arrays = [x.astype(kind) for x in (query, key, value)]
    mask = options.pop("mask", None)
    arrays.append(None if mask is None else random.random(mask) < 0.7)
    bias = options.pop("bias", None)
    arrays.append(None if bias is None else random.standard_normal(bias, dtype="float32").astype(kind))
    if isinstance(options.get("beta"), tuple):
        options["beta"] = random.standard_normal(options["beta"], dtype="float32").astype(kind)
    options |= {n: numpy.asarray(x) for n, x in options.items() if n.endswith("lengths")}
    frameworks = laser_core.backends()[backend].frameworks
    give = _to_cupy if "cupy" in frameworks else _to_torch
    options = {n: give(x) if isinstance(x, numpy.ndarray) else x for n, x in options.items()}
    try:
        _, pullback = laser_core.laser_attention_vjp(*map(give, arrays), backend=backend, **options)
    except laser_core.Unsupported as refused:
        print(dtype, given, refused, flush=True)
        return
    pullback(give(d_out.astype(kind)))
    if give is _to_torch:
        import torch

        torch.cuda.synchronize()
    else:
        import cupy

        cupy.cuda.get_current_stream().synchronize()


def _to_cupy(x: Any) -> Any:
    import cupy

    cupy.cuda.set_allocator(None)
    return None if x is None else cupy.asarray(x)


def _to_torch(x: Any) -> Any:
    import torch

    if x is None:
        return None
    if x.dtype.name == "bfloat16":
        return torch.from_numpy(x.view("int16")).view(torch.bfloat16).cuda()
    return torch.from_numpy(x).cuda()


def main() -> int:
    """All problems, under all tools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cupy-cuda")
    parser.add_argument("--dtype", action="append", help="bfloat16, float16, float32; default: all")
    parser.add_argument("--tool", action="append", help=f"{', '.join(TOOLS)}; default: all")
    parser.add_argument("--problem", action="append", type=int, help=f"0 to {len(PROBLEMS) - 1}; default: all")
    parser.add_argument("--portable", action="store_true", help="without the kernels for Hopper")
    parser.add_argument("--bare", action="store_true", help="run the problems here, under no tool")
    parser.add_argument("--every-lane", action="store_true", help="barriers that racecheck follows")
    arguments = parser.parse_args()
    dtypes = arguments.dtype or ["bfloat16", "float16", "float32"]
    problems = arguments.problem or range(len(PROBLEMS))
    if arguments.bare:
        if arguments.backend == "cupy-cuda":
            import cupy
            from laser_cupy import cuda, hopper

            if arguments.every_lane:
                hopper.OPTIONS = (*hopper.OPTIONS, "-DEVERY_LANE=1")
            if arguments.portable:
                setattr(cuda._Machine, "_hopper_serves", lambda self, problem: False)  # noqa: B010
            cupy.cuda.set_allocator(None)
        else:
            os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
        for dtype in dtypes:
            for number in problems:
                run(arguments.backend, dtype, **PROBLEMS[number])
        return 0
    bare = [sys.executable, __file__, "--bare", "--backend", arguments.backend]
    bare += [*(f"--dtype={t}" for t in dtypes), *(f"--problem={n}" for n in problems)]
    bare += ["--portable"] * arguments.portable
    subprocess.run(bare, check=True)
    found = 0
    for tool in arguments.tool or TOOLS:
        every = ["--every-lane"] if tool == "racecheck" else []  # it does not follow what __syncwarp orders
        done = subprocess.run(
            ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--print-limit=3", *bare, *every],
            capture_output=True,
            text=True,
        )
        print(f"{tool}: {'clean' if done.returncode == 0 else f'exit status {done.returncode}'}", flush=True)
        if done.returncode:
            print(done.stdout[-3000:], done.stderr[-1000:], sep="\n", flush=True)
        found |= done.returncode
    return int(found != 0)


if __name__ == "__main__":
    sys.exit(main())
