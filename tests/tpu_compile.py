"""Compile the kernels of ``jax-tpu`` with the TPU compiler, without a TPU: ``tpu_compile.py v5e "v4, all options" …``.

Prints, as JSON by argument, for the forward and the backward pass: the VMEM that each kernel takes, and XLA's FLOPs.
"""

from __future__ import annotations

import json
import os
import re
import sys
from importlib.metadata import version
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"  # the process that started this one may have looked for a TPU

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from laser_jax import tpu
from laser_jax.guard import Call, State, Totals

from laser_core import Inputs, Problem

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
PLAIN = Problem(
    framework="jax", device="tpu", dtype="bfloat16", batch=(1,), query_heads=4, key_value_heads=2, query_length=2048,
    key_length=2048, head_dim=128, value_dim=128, scale=0.1, causal="top_left",
)  # fmt: skip
OPTIONS = Problem(
    framework="jax", device="tpu", dtype="float32", batch=(1,), query_heads=2, key_value_heads=1, query_length=500,
    key_length=600, head_dim=256, value_dim=256, scale=0.1, beta=None, beta_shape=(2, 256), causal="bottom_right",
    window=(300, None), mask_shape=(500, 600), query_lengths=True, key_value_lengths=True, logits_soft_cap=2.0,
)  # fmt: skip


def compiled(name: str) -> dict[str, Any]:
    """The fast path alone: what ``guard`` adds is XLA's own and takes longer to compile."""
    problem = OPTIONS if "options" in name else PLAIN
    topology = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[name.split(",")[0]])
    place = NamedSharding(Mesh(np.array(topology.devices[:1]), ("x",)), PartitionSpec())

    def array(*shape: int, dtype: str = problem.dtype) -> Any:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    b, hq, hkv, e = problem.batch, problem.query_heads, problem.key_value_heads, problem.value_dim
    inputs = Inputs(
        query=array(*b, hq, problem.query_length, problem.head_dim),
        key=array(*b, hkv, problem.key_length, problem.head_dim),
        value=array(*b, hkv, problem.key_length, e),
        attn_mask=None if problem.mask_shape is None else array(*problem.mask_shape, dtype="bool"),
        bias=None,
        beta=None if problem.beta_shape is None else array(*problem.beta_shape, dtype="float32"),
        query_seq_lengths=array(*b, dtype="int32") if problem.query_lengths else None,
        key_value_seq_lengths=array(*b, dtype="int32") if problem.key_value_lengths else None,
    )

    def forward(inputs: Inputs) -> Any:
        return tpu.fast_forward(Call.of(problem, inputs), False)

    def backward(inputs: Inputs, state: State) -> Any:
        call = Call.of(problem, inputs)
        q, k, v = (jnp.zeros_like(x) for x in (call.ops.q, call.ops.k, call.ops.v))
        beta = jnp.zeros((*q.shape[:-2], 1, e))
        return tpu.fast_backward(call, state, Totals(q, k, v, None, beta), False)

    o, l = (array(*x.shape, dtype="float32") for x in jax.eval_shape(forward, inputs))
    told = {}
    for function, arguments in ((forward, (inputs,)), (backward, (inputs, State(o, l, o, l)))):
        done = jax.jit(function).lower(*arguments).compile()
        vmem = {}
        for line in done.as_text().splitlines():
            if '"tpu_custom_call"' in line:
                used = re.search(r'"used_scoped_memory_configs":\[(.*?)\]', line).group(1)
                kernel = re.search(r"%laser_(\w+)", line).group(1)
                vmem[kernel] = sum(map(int, re.findall(r'"memory_space":"1","offset":"\d+","size":"(\d+)"', used)))
        told[function.__name__] = (vmem, done.cost_analysis()["flops"])
    return told


if __name__ == "__main__":
    versions = {"jax": jax.__version__, "libtpu": version("libtpu")}
    print(json.dumps({"versions": versions} | {name: compiled(name) for name in sys.argv[1:]}, indent=1))
