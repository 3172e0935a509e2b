"""How long the first calls take in CuPy, without and with compiled kernels on disk: ``start.py --help``.

Each figure is of a process of its own: the import, and then the first forward and the first backward pass of a small
problem, until the device is done. The first process finds an empty cache folder, the second what that has left.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

KERNELS = ("laser", "portable")
SHAPE = (1, 1, 256, 128)


def measure(kernels: str) -> dict[str, float]:
    """Seconds of the first import and calls in this process."""
    start = time.perf_counter()
    import cupy
    import ml_dtypes
    from laser_cupy import CUDA, cuda, host

    from laser_core import _problem

    imported = time.perf_counter()
    random = cupy.random.RandomState(0)
    arrays = [random.standard_normal(SHAPE, dtype=cupy.float32).astype(ml_dtypes.bfloat16) for _ in range(4)]
    cupy.cuda.get_current_stream().synchronize()
    problem, operands = _problem.describe(*arrays[:3])
    machine = cuda._Machine(0)
    if kernels == "portable":
        setattr(machine, "_hopper_serves", lambda problem: False)  # noqa: B010
    forward: Any = CUDA.forward if kernels == "laser" else lambda *a: host.forward(machine, *a)
    backward: Any = CUDA.backward if kernels == "laser" else lambda *a: host.backward(machine, *a)
    taken = {"import": imported - start}
    begin = time.perf_counter()
    result = forward(problem, operands)
    cupy.cuda.get_current_stream().synchronize()
    taken["forward"] = time.perf_counter() - begin
    begin = time.perf_counter()
    backward(problem, operands, result, arrays[3], None)
    cupy.cuda.get_current_stream().synchronize()
    return taken | {"backward": time.perf_counter() - begin}


def main() -> None:
    """Measure and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="result file to write (default: none)")
    parser.add_argument("--one", choices=KERNELS, help="measure here, with the cache as it is")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    import cupy
    from bench import environment

    result: dict[str, Any] = environment() | {"shape": SHAPE, "records": []}
    result["versions"] |= {"cupy": cupy.__version__, "nvrtc": ".".join(map(str, cupy.cuda.nvrtc.getVersion()))}
    result["device"] = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    for kernels in KERNELS:
        with tempfile.TemporaryDirectory() as folder:
            for cache in ("empty", "filled"):
                run = subprocess.run(
                    [sys.executable, __file__, "--one", kernels],
                    env=os.environ | {"CUPY_CACHE_DIR": folder},
                    stdout=subprocess.PIPE,
                    check=True,
                    text=True,
                )
                record = {"kernels": kernels, "cache": cache, "seconds": json.loads(run.stdout)}
                print(json.dumps(record), flush=True)
                result["records"].append(record)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
