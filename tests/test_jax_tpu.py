"""``jax-tpu`` without a TPU: its kernels in Pallas' TPU interpreter, and compiled by the TPU compiler."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import laser_jax
import numpy as np
import pytest
from problems import error

from laser_core import Problem, laser_attention_vjp

jax = pytest.importorskip("jax")
jnp = jax.numpy

from laser_jax import tpu  # noqa: E402

from laser_core import _registry  # noqa: E402

TPUS = ("v4", "v5e", "v5p", "v6e", "tpu7x")
VMEM = 8 * 2**20  # what a kernel may take of it: half of what the smallest TPU has for one


@pytest.fixture(autouse=True, scope="module")
def _interpreted():
    """Uninitialised memory is NaN, and a block out of bounds an error."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    _registry.backends()[tpu.INTERPRETED.name] = tpu.INTERPRETED
    yield
    del _registry.backends()[tpu.INTERPRETED.name]
    jax.config.update("jax_disable_most_optimizations", before)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


CASES = {  # dtype, Lq, Lk, options: lengths that are no multiple of a tile, several tiles, and tiles that are skipped
    "all options": (
        "float32",
        300,
        290,
        {
            "is_causal": "bottom_right",
            "window_size": (150, None),
            "attn_mask": normal(2, 300, 290, seed=5) < 1,
            "query_seq_lengths": np.asarray([300, 40]),
            "key_value_seq_lengths": np.asarray([70, 290]),
            "logits_soft_cap": 3.0,
            "beta": np.linspace(-1.5, 2, 2 * 24).reshape(2, 24),
            "scale": 0.3,
        },
    ),
    "causal": ("bfloat16", 600, 520, {"is_causal": True}),
    "beyond the fast range": ("float32", 20, 30, {"beta": 60.0}),
}


@pytest.mark.parametrize("name", CASES)
def test_agrees_with_the_definition(name):
    dtype, lq, lk, options = CASES[name]
    b = 2 if "query_seq_lengths" in options else 1
    arrays = [normal(b, 2, lq, 16), normal(b, 1, lk, 16, seed=1), normal(b, 1, lk, 24, seed=2)]
    arrays = [jnp.asarray(x, dtype) for x in arrays]
    given = {n: jnp.asarray(x) if isinstance(x, np.ndarray) else x for n, x in options.items()}
    d_out, d_lse = jnp.asarray(normal(b, 2, lq, 24, seed=3), dtype), jnp.asarray(normal(b, 2, lq, seed=4), "float32")
    backend = tpu.INTERPRETED.name
    (out, lse), pullback = laser_attention_vjp(*arrays, **given, return_lse=True, backend=backend)
    exact = [np.asarray(x, np.float64) for x in (*arrays, d_out, d_lse)]
    (want, want_lse), want_pullback = laser_attention_vjp(*exact[:3], **options, return_lse=True, backend="reference")
    unit = 2.0**-8 if dtype == "bfloat16" else 1e-5
    assert np.max(np.abs(np.asarray(out, np.float64) - want) - unit * (np.abs(want) + 3)) <= 1e-5
    assert error(np.asarray(lse, np.float64), want_lse) <= 1e-5
    for got, expected in zip(pullback(d_out, d_lse), want_pullback(*exact[3:]), strict=True):
        if expected is not None:
            assert np.linalg.norm(got - expected) <= 2 * unit * np.linalg.norm(expected)


def test_the_conformance_suite():
    """One case of it, for time: what a query cannot see changes no bit, NaN and infinities included."""
    command = [sys.executable, "-m", "laser_conformance", "run", "--backend", tpu.INTERPRETED.name, "--arrays", "jax"]
    command += ["--load", "laser_jax.tpu:INTERPRETED", "--only", "isolation/causal-top"]
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ------------------------------------------------------------------------------------------------------------- record

PROBLEM = Problem(
    framework="jax",
    device="tpu",
    dtype="bfloat16",
    batch=(2,),
    query_heads=4,
    key_value_heads=2,
    query_length=1000,
    key_length=900,
    head_dim=64,
    value_dim=64,
    scale=0.125,
)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"beta": None, "beta_shape": (4, 64), "causal": "bottom_right", "mask_shape": (1000, 900)}, None),
        ({"window": (5, 0), "logits_soft_cap": 2.0, "query_lengths": True, "key_value_lengths": True}, None),
        ({"head_dim": 256, "value_dim": 256, "dtype": "float32"}, None),
        ({"dtype": "float16"}, "dtype float16"),
        ({"device": "cpu"}, "device cpu"),
        ({"bias_shape": (1000, 900)}, "bias: its gradient"),
        ({"value_dim": 257}, "head dim E = 257"),
    ],
)
def test_what_it_takes(change, reason):
    told = laser_jax.TPU.refuses(dataclasses.replace(PROBLEM, **change))
    assert told is None if reason is None else reason in str(told)


# ------------------------------------------------------------------------------------------------------------ compiler


@pytest.fixture(scope="module")
def compiled():
    """What the TPU compiler says of the kernels, by TPU; in a process of its own, for libtpu lives as long as one."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, which is not installed")
    script = Path(__file__).with_name("tpu_compile.py")
    done = subprocess.run(
        [sys.executable, script, *TPUS, "v4, all options"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", TPUS)
def test_compiles_for(compiled, name):
    """VMEM stays within its bound, and the work is that of the tiles that causality leaves, 10 of 16."""
    pairs = 4 * 10 * 512 * 512
    for kind, depth in (("forward", 2 * 128), ("backward", 7 * 128)):
        vmem, flops = compiled[name][kind]
        assert sorted(vmem) == (["forward"] if kind == "forward" else ["backward_keys", "backward_queries"])
        assert max(vmem.values()) <= VMEM, vmem
        assert 2 * depth * pairs <= flops <= 1.1 * 2 * depth * pairs, kind


def test_all_options_compile(compiled):
    for kind in ("forward", "backward"):
        assert max(compiled["v4, all options"][kind][0].values()) <= VMEM
