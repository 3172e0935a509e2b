"""The Mosaic backend without a GPU: what it refuses, its kernels interpreted, and compiled for a card not here."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import laser_jax
import numpy as np
import pytest
from laser_jax import cudnn, mosaic_order, served

from laser_core._problem import Problem

SHARED, REGISTERS = 227 << 10, 65536  # what a block may have on sm_90
FORMS = (
    ("forward", "bfloat16", 128, "causal"),
    ("forward", "bfloat16", 64, "full"),
    ("values", "float16", 128, "full"),
    ("exact", "bfloat16", 128, "causal"),
    ("rows", "bfloat16", 128, "causal"),
    ("exact_backward", "float16", 128, "causal"),
)
FINE = Problem(
    framework="jax", device="cuda", dtype="bfloat16", batch=(2,), query_heads=4, key_value_heads=2,
    query_length=100, key_length=70, head_dim=128, value_dim=64, scale=0.1,
)  # fmt: skip


def run(script: str, *arguments: str, **environment: str) -> str:
    """A script beside this one, in a process of its own: it sets up JAX in its own way."""
    path = Path(__file__).with_name(script)
    done = subprocess.run(
        [sys.executable, str(path), *arguments], capture_output=True, text=True, env=os.environ | environment
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "RACE DETECTED" not in done.stdout, done.stdout[-4000:]
    return done.stdout


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"beta": None, "beta_shape": (4, 64)}, "beta is an array"),
        ({"beta": 0.5}, "expm1"),
        ({"head_dim": 256}, "head dim D = 256"),
        ({"scale": 0.0}, "scale"),
        ({"mask_shape": (100, 70)}, "mask: the kernel has none"),
        ({"bias_shape": (100, 70)}, "bias: the kernel has none"),
        ({"logits_soft_cap": 3.0}, "logits_soft_cap: the kernel has none"),
        ({"key_value_lengths": True}, "sequence lengths"),
        ({"window": (3, None)}, "left bound"),
        ({"key_length": 2**24}, "2^24"),
    ],
)
def test_says_what_it_leaves_to_others(change: dict[str, Any], reason: str) -> None:
    assert served.why_not(FINE) is None
    assert reason in str(served.why_not(dataclasses.replace(FINE, **change)))


def test_says_which_jax_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "version", lambda name: "0.10.2")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert "0.10.2 is installed" in str(laser_jax.MOSAIC.refuses(FINE))
    assert "device cpu" in str(laser_jax.MOSAIC.refuses(dataclasses.replace(FINE, device="cpu")))


def test_says_which_gpu_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(capability: str) -> SimpleNamespace:
        devices = [SimpleNamespace(compute_capability=capability)]
        return SimpleNamespace(default_backend=lambda: "gpu", devices=lambda: devices)

    for capability, reason in (("9.0", None), ("8.0", "GPU of compute capability 8.0 (supported: 9.0, Hopper)")):
        monkeypatch.setitem(sys.modules, "jax", found(capability))
        assert served.wrong_device() == reason


def test_causal_offset() -> None:
    aligned = dataclasses.replace(FINE, causal="bottom_right", query_length=30)
    assert served.causal_offset(FINE) is None
    assert served.causal_offset(aligned) == 40
    assert served.causal_offset(dataclasses.replace(aligned, causal="top_left", window=(None, 5))) == 0


@pytest.mark.parametrize("offset", [None, 0, -50, 300])
@pytest.mark.parametrize(("batch", "heads", "q_tiles"), [(4, 16, 32), (1, 16, 128), (5, 7, 8), (1, 3, 2), (2, 40, 3)])
def test_every_tile_is_worked_on_once(batch: int, heads: int, q_tiles: int, offset: int | None) -> None:
    everything, most = batch * heads, 132
    work = mosaic_order.Work(most, 128, 128, 128 * q_tiles, offset, everything, heads, 1, q_tiles)

    def of_block(_: jax.Array) -> Any:
        turns = jnp.arange(-(-everything * q_tiles // work.blocks) + everything)  # as many as any block may have
        place = jax.vmap(work.place)(turns)
        return turns < work.turns(), place.batch * heads + place.head, place.first // 128, place.total

    blocks = jnp.arange(work.blocks)
    real, head, tile, total = (np.asarray(x) for x in jax.vmap(of_block, axis_name="block")(blocks))
    found = (head * q_tiles + tile)[real]
    assert sorted(found.tolist()) == list(range(everything * q_tiles))
    if offset is not None and everything * q_tiles > 10 * most:  # and no block has much more to do than others
        steps = np.where(real, total, 0).sum(axis=1)
        assert steps.max() <= 1.03 * steps.mean()


needs_jax = pytest.mark.skipif(served.missing() is not None, reason=f"laser_jax: {served.missing()}")


@needs_jax
def test_interpreted() -> None:
    # XLA runs the interpreter's warpgroups, which wait for one another, in a pool of NPROC threads
    told = run("interpret_mosaic.py", "causal", "odd", "hidden", "large", LASER_MOSAIC_INTERPRET="1", NPROC="16")
    assert told.count("right") == 4


@needs_jax
@pytest.mark.parametrize("form", FORMS, ids=lambda form: "-".join(map(str, form)))
def test_fits_the_hardware(form: tuple[Any, ...]) -> None:
    pytest.importorskip("jax_cuda13_plugin", reason="JAX's CUDA plugin, which compiles, is not installed")
    kernels = json.loads(run("aot_mosaic.py", *map(str, form)).splitlines()[-1])
    assert kernels
    for kernel in kernels:
        assert kernel["shared"] <= SHARED
        assert kernel["threads"] * kernel["registers"] <= REGISTERS
        assert kernel["spilled"] <= (256 if form[0] == "exact_backward" else 64)  # that is slow in any case
        assert not kernel["serialized"]
        assert kernel["load"] > 0
        assert kernel["store"] > 0
        assert kernel["wgmma"] > 0 or form[0] in ("values", "rows")


@needs_jax
@pytest.mark.parametrize("causal", [None, "top_left"])
def test_mends_what_cudnn_leaves(causal: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served, "wrong_device", lambda: None)
    problem = dataclasses.replace(FINE, causal=causal)
    q, k, v = (jnp.zeros((2, *shape), jnp.bfloat16) for shape in ((4, 100, 128), (2, 70, 128), (2, 70, 64)))
    heads = jnp.zeros((2, 2), bool)
    low = jnp.zeros((2, 2, 64))
    call = cudnn.Call(problem, q, k, v, v, low, (low, low), heads, heads)

    def mend(o: jax.Array, l: jax.Array) -> Any:
        return cudnn._mended(call, o, l)

    traced = jax.jit(mend).trace(jnp.zeros((2, 4, 100, 64), jnp.bfloat16), jnp.zeros((2, 4, 100)))
    told = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "laser_exact" in told


@needs_jax
def test_lowered_under_shard_map() -> None:
    assert "(2, 2, 128, 64)" in run("lower_mosaic.py")
