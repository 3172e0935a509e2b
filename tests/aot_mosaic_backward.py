"""Compile forms of the Mosaic backward kernel for sm_90a, without a device; print as JSON what came out.

Run by test_mosaic_backward, with MOSAIC_GPU_DUMP_TO a folder, MOSAIC_GPU_DUMP_PTX and MOSAIC_GPU_DUMP_PTXAS 1, and
JAX_PLATFORMS cpu.
"""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from laser_jax import mosaic_backward

HOPPER = """
platform_name: "CUDA"
device_description_str: "NVIDIA H200"
dnn_version_info { major: 9 minor: 20 }
runtime_version { major: 13 minor: 0 patch: 0 }
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132 fpus_per_core: 128 threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  registers_per_core_limit: 65536 registers_per_block_limit: 65536 shared_memory_per_core: 233472
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448 l2_cache_size: 52428800
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 device_memory_size: 150000000000 clock_rate_ghz: 1.98
}
"""


def compiled(width: int, dtype: str, causal: bool) -> dict[str, Any]:
    """What ptxas says of one form, and how often its PTX has the instructions that matter."""
    topology = topologies.get_topology_desc(platform="cuda", target_config=HOPPER, topology="1x1x1")
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("one",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    array = jax.ShapeDtypeStruct((1, 2, 1024, width), dtype, sharding=here)
    rows = jax.ShapeDtypeStruct((1, 2, 1024), jnp.float32, sharding=here)
    channels = jax.ShapeDtypeStruct((1, 2, width), jnp.float32, sharding=here)
    flags = [jax.ShapeDtypeStruct((1, 2), jnp.int32, sharding=here)] * 2

    def call(*operands: jax.Array) -> Any:
        return mosaic_backward.backward(*operands, scale=0.125, causal_offset=0 if causal else None)

    jax.jit(call).trace(*[array] * 3, channels, array, rows, rows, *flags).lower(lowering_platforms=("cuda",)).compile()
    dumped = {path.suffix: path.read_text() for path in Path(os.environ["MOSAIC_GPU_DUMP_TO"]).glob("*.ptx*")}
    report, ptx = dumped[".ptxas"], dumped[".ptx"]
    numbers = {
        name: int(re.findall(rf"(\d+) bytes {name}", report)[-1])
        for name in ("stack frame", "spill stores", "spill loads")
    }
    for name in ("wgmma.mma_async", "cp.async.bulk.tensor", "cp.reduce.async.bulk.tensor", "setmaxnreg"):
        numbers[name] = ptx.count(name)
    return numbers | {"serialised": "wgmma.mma_async instructions are serialized" in report, "report": report}


if __name__ == "__main__":
    print(json.dumps(compiled(**json.loads(sys.argv[1]))))
