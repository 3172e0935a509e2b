"""JAX: calls that are split over devices, exported, donated to, and compiled once."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from laser_core import _problem, backends, laser_attention

jax = pytest.importorskip("jax")
jnp = jax.numpy

from laser_jax import partition  # noqa: E402

CASES = {  # what the devices may tell each other: sums of the gradients of what they share, and nothing else
    "shard_map": "all-reduce",
    "automatic": "all-reduce",
    "heads of a group": "all-reduce",
    "explicit": "all-reduce",
    "too few heads": "all-gather all-reduce",  # two key/value heads on four devices: query is brought together first
}


@pytest.fixture(scope="module")
def devices():
    """Each case on eight virtual devices, in a process of its own."""

    def run(case: str) -> subprocess.CompletedProcess[str]:
        script = Path(__file__).with_name("jax_devices.py")
        return subprocess.run([sys.executable, script, case], capture_output=True, text=True, timeout=300, check=False)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(run, CASES), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_split_over_batch_and_heads(devices, case):
    assert devices[case].returncode == 0, devices[case].stderr
    assert devices[case].stdout.strip() == CASES[case]


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), "float32")


def attend(q, k, v):
    return laser_attention(q, k, v, is_causal=True, backend="jax-xla")


def test_export_round_trip():
    pytest.importorskip("flatbuffers")
    q = normal(2, 2, 9, 4)
    exported = jax.export.export(jax.jit(attend))(q, q, q)
    again = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert np.array_equal(again.call(q, q, q), attend(q, q, q))
    got = jax.grad(lambda q: (again.call(q, q, q) ** 2).sum())(q)
    want = jax.grad(lambda q: (attend(q, q, q) ** 2).sum())(q)
    assert np.linalg.norm(got - want) <= 1e-6 * np.linalg.norm(want)


def test_export_for_any_batch():
    shape = jax.ShapeDtypeStruct((*jax.export.symbolic_shape("batch"), 2, 9, 4), "float32")
    exported = jax.export.export(jax.jit(lambda q: laser_attention(q, q, q, is_causal=True)))(shape)
    for batch in (1, 3):
        q = normal(batch, 2, 9, 4)
        assert np.allclose(exported.call(q), attend(q, q, q), rtol=0, atol=1e-6)


def test_donated_arguments_are_reused():
    q, k, v = (normal(2, 2, 9, 4, seed=i) for i in range(3))
    want = attend(q, k, v)
    step = jax.jit(attend, donate_argnums=0)
    assert "input_output_alias" in step.lower(q, k, v).compile().as_text()
    assert np.array_equal(step(q, k, v), want)
    assert q.is_deleted()
    assert not k.is_deleted()


def test_equal_options_are_compiled_once():
    """Options are static and hashed; the numbers in arrays, β among them, are not part of them."""
    traces = []

    def forward(problem, inputs):
        traces.append(problem)
        return backends()["jax-xla"].forward(problem, inputs)

    counting = dataclasses.replace(backends()["jax-xla"], forward=forward)

    def call(beta, scale=0.5, q=normal(1, 2, 9, 4)):  # noqa: B008
        problem, inputs = _problem.describe(q, q, q, beta=jnp.asarray(beta), scale=scale, window_size=(4, 1))
        return partition.run(partition.Step(problem, counting), partition.Operands(inputs)).out

    call(1.0)
    call(1.0)
    before = len(traces)
    for _ in range(3):
        call(2.0)
    assert len(traces) == before
    call(2.0, scale=0.25)
    assert len(traces) > before


def test_vmap_makes_a_batch_axis_and_no_loop():
    problems = []

    def forward(problem, inputs):
        problems.append(problem)
        return backends()["jax-xla"].forward(problem, inputs)

    counting = dataclasses.replace(backends()["jax-xla"], forward=forward)
    q, k = normal(3, 5, 2, 9, 4), normal(2, 9, 4, seed=1)

    def call(q, n):
        problem, inputs = _problem.describe(q, k, k, key_value_seq_lengths=n)
        return partition.run(partition.Step(problem, counting), partition.Operands(inputs)).out

    got = jax.vmap(jax.vmap(call, (0, None)), (0, 0))(q, jnp.asarray([9, 4, 1]))
    assert problems[-1].batch == (3, 5)
    for i, n in enumerate((9, 4, 1)):
        want = laser_attention(*(np.asarray(x, np.float64) for x in (q[i, 1], k[:, :n], k[:, :n])))
        assert np.max(np.abs(got[i, 1] - want)) <= 1e-5


def test_x64_leaves_the_dtypes_of_the_arguments_alone():
    with jax.enable_x64(True):
        q = normal(1, 2, 9, 4)
        out, pull = jax.vjp(lambda q: laser_attention(q, q, q, return_lse=True, backend="jax-xla"), q)
        assert [x.dtype for x in (*out, *pull(out))] == ["float32"] * 3
        out = attend(*(q.astype("float64"),) * 3)
        assert out.dtype == "float64"
