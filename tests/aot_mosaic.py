"""Compile Mosaic kernels for an H200 that is not here and print, as JSON, what came out. Run by test_mosaic."""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugin then does without a driver
DUMP = tempfile.TemporaryDirectory()
os.environ |= {"MOSAIC_GPU_DUMP_TO": DUMP.name, "MOSAIC_GPU_DUMP_PTX": "1", "MOSAIC_GPU_DUMP_PTXAS": "1"}

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import Mesh, NamedSharding, PartitionSpec  # noqa: E402
from laser_jax import mosaic_exact, mosaic_exact_backward, mosaic_forward, mosaic_rows, mosaic_values  # noqa: E402

H200 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 233472
  threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98 device_memory_size: 150000000000
  shared_memory_per_block_optin: 232448 cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 20 }
runtime_version { major: 13 }
device_description_str: "NVIDIA H200"
"""
B, H, L = 2, 4, 1024


def compiled(run: Callable[..., Any], *arrays: tuple[tuple[int, ...], Any]) -> list[dict[str, Any]]:
    """What ptxas says of the kernels of ``run``, and which of the instructions that tell are in them."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=H200, topology="1x1x1")
    place = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())
    shapes = [jax.ShapeDtypeStruct(shape, dtype, sharding=place) for shape, dtype in arrays]
    jitted = jax.jit(run, in_shardings=(place,) * len(shapes), out_shardings=place)
    jitted.trace(*shapes).lower(lowering_platforms=("cuda",)).compile()
    found = []
    for report in sorted(Path(DUMP.name).glob("*.ptxas")):
        told, ptx = report.read_text(), report.with_suffix(".ptx").read_text()
        shared = re.search(r"smem_scratch_bytes=(\d+)", report.with_suffix(".resources.txt").read_text())
        registers, spilled = re.search(r"Used (\d+) registers", told), re.search(r"(\d+) bytes spill stores", told)
        threads = re.search(r"\.(?:req|max)ntid (\d+)", ptx)
        assert shared
        assert registers
        assert spilled
        assert threads
        tiles = r"cp\.async\.bulk\.tensor\S*"
        found.append({
            "registers": int(registers[1]), "threads": int(threads[1]), "spilled": int(spilled[1]),
            "shared": int(shared[1]), "serialized": "C7510" in told or "C7513" in told or "serialized" in told,
            "wgmma": ptx.count("wgmma.mma_async"), "load": len(re.findall(tiles + r"global\.mbar", ptx)),
            "store": len(re.findall(tiles + r"global\.shared", ptx)),
        })  # fmt: skip
    return found


def main(name: str, dtype_name: str, width: int, causal: bool) -> list[dict[str, Any]]:
    """One of the kernels, in a form."""
    dtype = jnp.dtype(dtype_name)
    channels, most = ((B, H, width), jnp.float32), ((B, H, 3, width), jnp.float32)
    array, heads, few = ((B, H, L, width), dtype), (B, H), (0, 15, 15)
    numbers, rest = ((*heads, L), jnp.float32), ((B, H, L, width), jnp.int8)
    offset, shift = 0 if causal else None, 15 if dtype == jnp.float16 else 0
    if name == "forward":
        cut = mosaic_forward.tiles(causal, width)
        form = mosaic_forward.Form(cut, L, L, offset, 0.1, 1.0, shift, 132, True, 16, False)
        return compiled(lambda *a: mosaic_forward.forward(form, *a), *(array,) * 4, channels, most)
    if name == "values":

        def values(v: jax.Array, most: jax.Array, sums: jax.Array) -> Any:
            x, known = mosaic_values.measure(v, L, 1.0, dtype == jnp.float16, False)
            return mosaic_values.settle(x, v, most, sums if dtype == jnp.float16 else None, L, 1.0, 64, False), known

        return compiled(values, array, most, channels)
    if name == "rows":
        return compiled(
            lambda *a: mosaic_rows.prepare(*a[:5], None, a[5], 1.0, shift, False),
            array, array, rest, array, numbers, channels,
        )  # fmt: skip
    if name == "exact_backward":
        backward = mosaic_exact_backward.Form(L, offset, 0.1, 1.0, shift, False)
        rows = mosaic_exact_backward.Rows(*(array,) * 3, numbers, numbers)
        return compiled(
            lambda a, b, *c: mosaic_exact_backward.rewrite(backward, a, b, mosaic_exact_backward.Rows(*c[:5]), *c[5:]),
            *((heads, jnp.int32),) * 2, *rows, *(array,) * 5,
        )  # fmt: skip
    exact = mosaic_exact.Form(L, L, offset, 0.1, 1.0, few, False)
    results = (((B, H, 128), jnp.float32), (heads, jnp.int32), array, numbers, rest)
    return compiled(lambda *a: mosaic_exact.rewrite(exact, *a), *(array,) * 3, *results)


if __name__ == "__main__":
    name, dtype_name, width, causal = sys.argv[1:]
    print(json.dumps(main(name, dtype_name, int(width), causal == "causal")))
