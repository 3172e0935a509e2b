"""laser_cupy's kernels for Hopper without a GPU: what they serve, their tiles, and what NVRTC makes of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
from laser_cupy import build, emulated, hopper, host
from test_cupy import PROBLEM, _tool, needs_emulator

import laser_core


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"beta": -3.0, "causal": "bottom_right", "window": (5, None), "key_value_lengths": True}, None),
        ({"head_dim": 33, "value_dim": 128}, None),
        ({"head_dim": 32}, "head dim D = 32"),
        ({"value_dim": 136}, "value dim E = 136"),
        ({"value_dim": 60}, "value dim E = 60"),
        ({"dtype": "float32"}, "dtype float32"),
        ({"beta": None, "beta_shape": (64,)}, "beta"),
        ({"beta": 0.5}, "beta"),
        ({"bias_shape": (100, 90)}, "bias"),
        ({"mask_shape": (100, 90)}, "mask"),
        ({"logits_soft_cap": 2.0}, "logits_soft_cap"),
        ({"scale": 0.0}, "scale = 0.0"),
    ],
)
def test_what_they_serve(change: dict[str, object], reason: str | None) -> None:
    told = hopper.why_not(dataclasses.replace(PROBLEM, **change))  # type: ignore[arg-type]
    assert told is None if reason is None else told is not None and told.startswith(reason)


def test_tiles_are_validated() -> None:
    for wrong, told in (
        ({"columns": 100}, "columns: got 100"),
        ({"consumers": 4}, "consumers: got 4"),
        ({"stages": 1}, "stages: got 1"),
        ({"stages": 4}, "shared memory of a block: got "),
        ({"half": True, "lazy": 8}, "lazy: got 8"),
    ):
        with pytest.raises(ValueError, match=told):
            hopper.ForwardTiles(**({"half": False, "columns": 128, "value_dim": 128} | wrong))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="value_dim: got 136"):
        hopper.BackwardTiles(False, 128, 136)


def test_registers_fit_what_a_block_is_launched_with() -> None:
    """A warpgroup that asks for more than there were at launch would wait for ever."""
    for consumers, (producer, consumer) in hopper.ForwardTiles.REGISTERS.items():
        launched = 65536 // (hopper.WARPGROUP * (1 + consumers)) // 8 * 8
        assert producer + consumers * consumer <= launched * (1 + consumers)


@needs_emulator
@pytest.mark.parametrize("length", [100, 300])
def test_rows_that_are_left_to_the_portable_kernel(
    length: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LASER_EMULATOR_CACHE", str(tmp_path))
    x = np.random.default_rng(0).standard_normal((1, 2, length, 16)).astype(np.float16)
    problem, inputs = laser_core._problem.describe(x, x, x, is_causal=True)
    whole = emulated.EMULATED.forward(problem, inputs)
    rows = (np.random.default_rng(1).random((2, length)) < 0.3) & (np.arange(length) < 80)
    words = np.zeros((2, -(-length // 16)), dtype=np.uint32)
    for head, i in np.argwhere(rows):
        words[head, i // 16] |= np.uint32(1 << (i % 8 * 4 + i % 16 // 8))

    def special(self: object, x: host.Call, out: object, residual: np.ndarray, lse: np.ndarray) -> object:
        residual[...] = 7.0
        lse[...] = 7.0
        v = host.values(x)
        v.rest[:, 128:] = np.nan  # hopper_forward.cu asks for the first 128 keys: no others may be looked at
        return v, words

    monkeypatch.setattr(emulated._Machine, "special_forward", special)
    some = emulated.EMULATED.forward(problem, inputs)
    np.testing.assert_array_equal(some.residual[0][0], np.where(rows[..., None], whole.residual[0], 7.0))
    np.testing.assert_array_equal(some.lse[0], np.where(rows, whole.lse[0], 7.0))


BUILDS = (
    hopper.Operands(False, 128, 128),
    hopper.ForwardTiles(True, 128, 128, turns=True),
    hopper.ForwardTiles(False, 64, 64, consumers=3, stages=4, turns=True, lazy=8),
    hopper.BackwardTiles(False, 128, 128),
    hopper.BackwardTiles(True, 64, 64),
)
STACK = {False: 32, True: 80}  # bytes, forward and backward: what is needed once per tile of keys can wait there
WAITS = {False: 4, True: 7}  # for products: one for each that is written; short of registers, the compiler waits for every one
RELOADS = 12  # from the stack, between the backward loop's first wait and its last


@pytest.mark.parametrize("tiles", BUILDS, ids=str)
def test_they_compile(tiles: hopper.Operands, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="CuPy compiles the kernels")
    from cupy.cuda import compiler, nvrtc

    try:
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(  # there is no device to ask
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: ("-arch=sm_90", "cubin")
    )
    cubin, _ = compiler.compile_using_nvrtc(
        build.joined(tiles.SOURCES), (*hopper.OPTIONS, *tiles.definitions), arch="90"
    )
    report, disassemble = _tool("cuobjdump"), _tool("nvdisasm")
    if report is None or disassemble is None:
        pytest.skip("compiled; cuobjdump and nvdisasm, to look at registers and instructions, are not installed")
    path = tmp_path / "kernels.cubin"
    path.write_bytes(cubin + bytes(8))  # CuPy cuts trailing zeros
    usage = subprocess.run([report, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    backward = isinstance(tiles, hopper.BackwardTiles)
    for stack in re.findall(r"STACK:(\d+)", usage):
        assert int(stack) <= STACK[backward], usage
    code = subprocess.run([disassemble, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    if not tiles.shared:
        return
    for instruction in ("HGMMA", "UTMALDG.3D", "SYNCS", "USETMAXREG", *(("UBLKRED", "STSM") if backward else ())):
        assert instruction in code
    between = code.split("WARPGROUP.DEPBAR")
    assert len(between) - 1 <= WAITS[backward]
    if backward:
        assert len(re.findall(r"\b(?:LDL|STL)\b", "".join(between[2:-2]))) <= RELOADS
