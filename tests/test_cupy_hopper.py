"""laser_cupy's kernels for Hopper without a GPU: what they serve, their tiles, and what NVRTC makes of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
from pathlib import Path
from typing import Any

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


@pytest.fixture
def kind(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """NumPy's dtype of that name; what the emulator compiles goes to a folder of its own."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 for NumPy is in ml_dtypes")
    monkeypatch.setenv("LASER_EMULATOR_CACHE", str(tmp_path))
    return np.dtype(getattr(ml_dtypes, dtype, dtype))


def _unrounded(forward: laser_core.Forward) -> Any:
    """The output in float32, of what is kept."""
    kept = forward.residual[0]
    bits = forward.out.astype(np.float32).view(np.int32)
    return kept if kept.dtype == np.float32 else (bits + kept).view(np.float32)


@needs_emulator
@pytest.mark.parametrize(("dtype", "options"), [("float16", {"beta": -1.5}), ("bfloat16", {"window_size": (70, 3)})])
def test_rows_that_the_hopper_kernel_leaves(
    kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are right to a rounding, in any order, whatever is beside them; others are not written."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, 300, n)).astype(kind) for h, n in ((4, 40), (2, 40), (2, 24)))
    v[:, :, 200:, 0] = 5.0
    problem, inputs = laser_core._problem.describe(q, k, v, is_causal=True, **options)
    rows = rng.random((4, 300)) < np.asarray([0.3, 0.9, 0.0, 0.05])[:, None]

    def special(self: host.Machine, x: host.Call, out: Any, lse: Any, keep: bool) -> tuple[host.Values, Any]:
        out[...], lse[...] = 7.0, 7.0
        residual = np.full(out.shape, *((7.0, np.float32) if kind.name == "float16" else (0, np.int16)))
        v, few = host.values(x), np.full((4, 300), -1, dtype=np.int32)
        for head in range(4):
            chosen = rng.permutation(np.flatnonzero(rows[head]))
            few[head, : len(chosen)] = chosen
        counts, sizes = rows.sum(axis=1).astype(np.int32), (np.int32(4), np.int32(2))
        x.run("forward_few", 2, x.q, x.k, x.v, v.c, counts, few, out, *host.unrounded(residual), lse, *sizes)
        return v, residual

    monkeypatch.setattr(emulated._Machine, "special_forward", special)
    found = emulated.EMULATED.forward(problem, inputs)
    whole = _unrounded(found)
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    o, l = laser_core.laser_attention(*arrays, is_causal=True, **options, return_lse=True, backend="reference")
    unit = 2.0**-8 if kind.name == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(whole, np.where(rows[..., None], o, 7.0), atol=2 * unit)
    np.testing.assert_allclose(found.lse, np.where(rows, l, 7.0), atol=1e-5)
    if "window_size" in options:  # these see nothing but 5
        np.testing.assert_allclose(whole[0, :, 275:, 0][rows[:, 275:]], 5.0, rtol=unit / 16)
    before = rows.copy()
    rows &= rng.random((4, 300)) < 0.5
    fewer = emulated.EMULATED.forward(problem, inputs)
    np.testing.assert_array_equal(_unrounded(fewer)[0], np.where(rows[..., None], whole[0], 7.0))
    assert before.sum() > rows.sum() > 0


@needs_emulator
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"window_size": (70, 3)},
        {"window_size": (200, None)},
        {"is_causal": "bottom_right", "query_seq_lengths": [150], "key_value_seq_lengths": [130]},
    ],
)
def test_outputs_of_narrow_heads_are_between_visible_values(
    kind: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a kernel leaves there; other heads, and what is not finite, are as they were."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((1, h, n, 24)).astype(kind) for h, n in ((4, 170), (2, 150), (2, 150)))
    v[0, 0, 60, 5] = -np.inf  # beta*v is not finite: nothing that sees it is touched, and no output is that
    options = {n: np.asarray(x) if n.endswith("lengths") else x for n, x in options.items()}
    problem, inputs = laser_core._problem.describe(q, k, v, **options)
    left = 3 * rng.standard_normal((1, 4, 170, 24)).astype(np.float32)
    left[0, 0, 100, 3] = np.nan

    def special(self: host.Machine, x: host.Call, out: Any, lse: Any, keep: bool) -> tuple[host.Values, Any]:
        out[...], lse[...] = left.astype(kind), 0.0
        rest = left.view(np.int32) - out.astype(np.float32).view(np.int32)
        residual = left.copy() if kind.name == "float16" else rest.astype(np.int16)
        made = host.values(x)
        made.flags[:] = 8, 0  # NARROW is that of the first one
        return made, residual

    monkeypatch.setattr(emulated._Machine, "special_forward", special)
    found = emulated.EMULATED.forward(problem, inputs)
    low, high = (far if n is None else n for n, far in zip(problem.band, (-(2**30), 2**30), strict=True))
    q_end, k_end = (int(options.get(f"{n}_seq_lengths", [size])[0]) for n, size in (("query", 170), ("key_value", 150)))
    expected = left.copy()
    for i in range(q_end):
        seen = v[0, 0, max(0, i + low) : max(0, min(k_end - 1, i + high) + 1)].astype(np.float32)
        if len(seen):
            ends = np.where(np.isfinite(seen).all(axis=0), [seen.min(axis=0), seen.max(axis=0)], [[-np.inf], [np.inf]])
            expected[0, :2, i] = np.clip(left[0, :2, i], *ends)
    assert (expected != left).sum() > 200
    np.testing.assert_array_equal(_unrounded(found), expected)
    np.testing.assert_array_equal(found.out.astype(np.float32), expected.astype(kind).astype(np.float32))


@needs_emulator
@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_the_portable_backward_pass_takes_what_the_hopper_kernels_keep(kind: Any) -> None:
    """What the rounding of o left gives all of its bits back."""
    rng = np.random.default_rng(0)
    q, k, v, d_out = (rng.standard_normal((1, 2, 70, 32)).astype(kind) for _ in range(4))
    problem, inputs = laser_core._problem.describe(q, k, v)
    whole = emulated.EMULATED.forward(problem, inputs)
    rest = (whole.residual.view(np.int32) - whole.out.astype(np.float32).view(np.int32)).astype(np.int16)
    two = (whole, whole._replace(residual=(rest, None, None)))
    one, other = (emulated.EMULATED.backward(problem, inputs, kept, d_out, None) for kept in two)
    for a, b in zip(one[:3], other[:3], strict=True):
        np.testing.assert_array_equal(a.view(np.int16), b.view(np.int16))


BUILDS = (
    hopper.Operands(False, 128, 128),
    hopper.ForwardTiles(True, 128, 128, turns=True),
    hopper.ForwardTiles(False, 64, 64, consumers=3, stages=4, turns=True, lazy=8),
    hopper.BackwardTiles(False, 128, 128),
    hopper.BackwardTiles(True, 64, 64),
)
STACK = {False: 112, True: 96}  # bytes, forward and backward: what is needed once per tile can wait there
WAITS = {False: 5, True: 14}  # for products, as many as are written: short of registers, the compiler waits for each
RELOADS = 10  # of the stack in a loop backward: each may miss the L1 cache, which waiting for turns empties


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
    for instruction in ("HGMMA", "UTMALDG.3D", "SYNCS", "USETMAXREG", "STSM", "UBLKRED" if backward else "UTMASTG"):
        assert instruction in code
    assert code.count("WARPGROUP.DEPBAR") <= WAITS[backward]
    if backward:
        between = code.split("WARPGROUP.DEPBAR")
        for loop in (between[1:6], between[8:13]):  # a warpgroup has seven waits: one before its loop, one after it
            assert len(re.findall(r"\b(?:LDL|STL)\b", "".join(loop))) <= RELOADS
