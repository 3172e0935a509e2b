"""Small problems of every option of a CuPy backend under NVIDIA's compute-sanitizer: memcheck, racecheck, initcheck.

``python benchmarks/sanitize.py`` runs them first without it, which compiles the kernels, then under each tool, and ends
with 1 where one has found something. Allocations are not pooled, so that each array has its own.
"""

from __future__ import annotations

import argparse
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
)


def run(backend: str, dtype: str, **given: Any) -> None:
    """One problem, forward and backward."""
    import cupy
    import ml_dtypes

    import laser_core

    options = {**PLAIN, **given}
    hq, hkv, lq, lk, d, e = (options.pop(n) for n in PLAIN)
    kind = cupy.dtype(getattr(ml_dtypes, dtype, dtype))
    random = cupy.random.RandomState(0)
    shapes = ((2, hq, lq, d), (2, hkv, lk, d), (2, hkv, lk, e), (2, hq, lq, e))
    query, key, value, d_out = (random.standard_normal(shape, dtype=cupy.float32) for shape in shapes)
    value *= options.pop("sigma", 1.0)
    if options.pop("odd", False):
        value[0, 0, lk // 2], value[1, 0, 1, 0], key[0, 1, lk - 1] = cupy.nan, cupy.inf, cupy.nan
    query, key, value, d_out = (x.astype(kind) for x in (query, key, value, d_out))
    mask = options.pop("mask", None)
    mask = None if mask is None else random.random_sample(mask) < 0.7
    bias = options.pop("bias", None)
    bias = None if bias is None else random.standard_normal(bias, dtype=cupy.float32).astype(kind)
    if isinstance(options.get("beta"), tuple):
        options["beta"] = random.standard_normal(options["beta"], dtype=cupy.float32).astype(kind)
    options |= {n: cupy.asarray(x) for n, x in options.items() if n.endswith("lengths")}
    _, pullback = laser_core.laser_attention_vjp(query, key, value, mask, bias, backend=backend, **options)
    pullback(d_out)
    cupy.cuda.get_current_stream().synchronize()


def main() -> int:
    """All problems, under all tools."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--backend", default="cupy-cuda")
    parser.add_argument("--dtype", action="append", help="bfloat16, float16, float32; default: all")
    parser.add_argument("--tool", action="append", help=f"{', '.join(TOOLS)}; default: all")
    parser.add_argument("--portable", action="store_true", help="without the kernels for Hopper")
    parser.add_argument("--bare", action="store_true", help="run the problems here, under no tool")
    arguments = parser.parse_args()
    dtypes = arguments.dtype or ["bfloat16", "float16", "float32"]
    if arguments.bare:
        import cupy

        cupy.cuda.set_allocator(None)
        if arguments.portable:
            from laser_cupy import cuda

            setattr(cuda._Machine, "_hopper_serves", lambda self, problem: False)  # noqa: B010
        for dtype in dtypes:
            for problem in PROBLEMS:
                run(arguments.backend, dtype, **problem)
        return 0
    bare = [sys.executable, __file__, "--bare", "--backend", arguments.backend, *(f"--dtype={t}" for t in dtypes)]
    bare += ["--portable"] * arguments.portable
    subprocess.run(bare, check=True)
    found = 0
    for tool in arguments.tool or TOOLS:
        done = subprocess.run(
            ["compute-sanitizer", f"--tool={tool}", "--error-exitcode=9", "--print-limit=3", *bare],
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
