"""laser_cupy without a GPU: its record, its kernels on a CPU by the emulator, and its kernels compiled by NVRTC."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import laser_cupy
import numpy as np
import pytest
from laser_cupy import build, decode, dlpack, emulated
from laser_cupy.build import Build
from problems import on_gpu

import laser_core

PROBLEM = on_gpu("cupy")
needs_emulator = pytest.mark.skipif(
    shutil.which("g++") is None or platform.machine() not in ("x86_64", "AMD64"),
    reason="the emulator needs g++ and an x86-64 processor",
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("emulator")


# ------------------------------------------------------------------------------------------------------------- record


def test_import_needs_neither_cupy_nor_a_driver() -> None:
    program = """
import sys
import laser_cupy
assert "cupy" not in sys.modules
sys.modules["cupy"] = None
print(laser_cupy.CUDA.missing())
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "needs cupy, which is not installed"


def test_it_is_registered() -> None:
    assert laser_core.backends()["cupy-cuda"] is laser_cupy.CUDA


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"beta": -3.0, "causal": "bottom_right", "window": (5, None), "logits_soft_cap": 2.0}, None),
        ({"mask_shape": (100, 90), "query_lengths": True, "key_value_lengths": True, "return_lse": True}, None),
        ({"beta": 0.5, "bias_shape": (100, 90)}, None),
        ({"beta": None, "beta_shape": (4, 64)}, None),
        ({"head_dim": 80, "value_dim": 256}, None),
        ({"dtype": "float32", "head_dim": 128, "value_dim": 128}, None),
        ({"head_dim": 257}, "head dim D = 257"),
        ({"value_dim": 257}, "value dim E = 257"),
        ({"beta": 0.5, "value_dim": 136}, "value dim E = 136 with |beta| < 1"),
        ({"dtype": "float32", "head_dim": 256, "value_dim": 256}, "head dim D = 256 and value dim E = 256 of float32"),
        ({"key_length": 2**30}, "Lk = 1073741824"),
    ],
)
def test_what_it_refuses(change: dict[str, object], reason: str | None) -> None:
    told = laser_cupy.why_not(dataclasses.replace(PROBLEM, **change))  # type: ignore[arg-type]
    assert told is None if reason is None else told is not None and told.startswith(reason)


def test_a_build_is_validated() -> None:
    with pytest.raises(ValueError, match="value_dim: got 40; allowed: 16, 32"):
        Build("bfloat16", 40, 40)
    assert Build.of(dataclasses.replace(PROBLEM, head_dim=33, value_dim=1)) == Build(
        "bfloat16", 40, 32, strips=2, keys=128, owned=2
    )


def test_tile_sizes_are_those_of_the_kernels() -> None:
    text = build.source()
    for name in ("THREADS", "BLOCK", "ROWS"):
        found = re.search(rf"^#define {name} (\d+)", text, re.MULTILINE)
        assert found
        assert int(found[1]) == getattr(decode if name == "ROWS" else build, name)


# ----------------------------------------------------------------------------------------------------------- emulator

CASES = (  # of D and E up to 32, so that few builds do
    ("0", ("masks/", "precision/range-", "isolation/", "determinism/", "laws/", "hostile/", "gradients/plain")),
    ("1", ("options/lse-causal", "options/soft-cap", "options/scale", "options/beta-2", "layout/sizes-129x127")),
    ("2", ("masks/causal-tiles+grad", "masks/all+grad", "isolation/rows-tiles", "hostile/spikes+grad")),
)


@needs_emulator
@pytest.mark.parametrize(("seed", "cases"), CASES, ids=[f"seed{seed}" for seed, _ in CASES])
def test_conformance_of_the_kernels_on_a_cpu(cache: Path, tmp_path: Path, seed: str, cases: tuple[str, ...]) -> None:
    report = tmp_path / "run.json"
    command = [sys.executable, "-m", "laser_conformance", "run", "--backend", emulated.EMULATED.name]
    command += ["--load", "laser_cupy.emulated:EMULATED", "--dtype", "bfloat16", "--dtype", "float16"]
    command += [f"--only={case}" for case in cases] + ["--json", str(report)]
    environment = os.environ | {"LASER_EMULATOR_CACHE": str(cache), "LASER_EMULATOR_SEED": seed}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    verdicts = json.loads(report.read_text())["verdicts"]
    passed = {v["case"] for v in verdicts if v["status"] == "passed"}
    assert all(any(case.startswith(prefix) for case in passed) for prefix in cases)


@needs_emulator
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int64", "uint64"])
def test_lengths_of_every_integer_dtype(dtype: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LASER_EMULATOR_CACHE", str(cache))
    x = np.random.default_rng(0).standard_normal((2, 1, 300, 16)).astype(np.float16)
    lengths = np.asarray([7, 100], dtype=dtype)
    problem, inputs = laser_core._problem.describe(x, x, x, key_value_seq_lengths=lengths)
    out = emulated.EMULATED.forward(problem, inputs).out
    for b, n in enumerate(lengths):
        few = x[b : b + 1, :, : int(n)]
        alone = emulated.EMULATED.forward(*laser_core._problem.describe(x[b : b + 1], few, few)).out
        np.testing.assert_array_equal(out[b : b + 1], alone)


@needs_emulator
@pytest.mark.parametrize(("strips", "keys"), [(1, 32), (2, 128)])
def test_tile_sizes_do_not_matter(strips: int, keys: int, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LASER_EMULATOR_CACHE", str(cache))
    x = np.random.default_rng(0).standard_normal((1, 1, 200, 16)).astype(np.float16)
    problem, inputs = laser_core._problem.describe(x, x, x, is_causal=True, window_size=(90, None))
    one = emulated.EMULATED.forward(problem, inputs)
    other_build = dataclasses.replace(Build.of(problem), strips=strips, keys=keys)
    monkeypatch.setattr(Build, "of", lambda problem: other_build)
    two = emulated.EMULATED.forward(problem, inputs)
    np.testing.assert_allclose(two.residual, one.residual, atol=2**-10)
    np.testing.assert_allclose(two.lse, one.lse, atol=1e-5)


SABOTAGE = {
    "barrier before the weights": "      __syncthreads();  // x is there, and nobody reads k any more\n",
    "barrier after a tile": "      __syncthreads();  // k of the next tile is there, and nobody reads x any more\n",
}


@needs_emulator
@pytest.mark.parametrize("name", SABOTAGE)
def test_the_emulator_notices_a_missing_barrier(
    name: str, cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 for NumPy is in ml_dtypes")
    monkeypatch.setenv("LASER_EMULATOR_CACHE", str(cache))
    text = build.source(hardware="emulator.h")
    assert text.count(SABOTAGE[name]) == 1
    x = np.random.default_rng(0).standard_normal((1, 1, 200, 16)).astype(ml_dtypes.bfloat16)
    problem, inputs = laser_core._problem.describe(x, x, x)

    def out() -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
        return np.asarray(emulated.EMULATED.forward(problem, inputs).residual)

    right = out()
    monkeypatch.setattr(emulated, "source", lambda hardware: text.replace(SABOTAGE[name], ""))
    wrong = []
    for seed in range(4):
        monkeypatch.setenv("LASER_EMULATOR_SEED", str(seed))
        wrong.append(not np.allclose(out(), right, atol=1e-6))
    assert any(wrong)


# ------------------------------------------------------------------------------------------------------------- decode


@needs_emulator
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    ("value", "options"),
    [
        ("normal", {"is_causal": "bottom_right", "window_size": (250, None)}),
        ("normal", {"beta": -2.5, "logits_soft_cap": 3.0, "attn_mask": (2, 1, 3, 300), "bias": (4, 1, 300)}),
        ("normal", {"beta": 0, "key_value_seq_lengths": [300, 11], "query_seq_lengths": [3, 1]}),
        ("wide", {}),  # beyond what can be exponentiated on the fly
        ("odd", {"is_causal": "top_left", "beta": -1.0}),  # NaN and infinite values, most of them hidden
        ("odd", {"beta": 2.0}),
    ],
)
def test_decode(dtype: str, value: str, options: dict[str, Any], cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys in several runs, against the definition in float64."""
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 for NumPy is in ml_dtypes")
    monkeypatch.setenv("LASER_EMULATOR_CACHE", str(cache))
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(shape).astype(kind) for shape in ((2, 4, 3, 16), (2, 2, 300, 16), (2, 2, 300, 24)))
    if value == "wide":
        v = (v.astype(np.float32) * 100).astype(kind)
    if value == "odd":
        v[0, 0, 1, 0], v[0, 1, 200, 1], v[1, 0, 2, 2], v[1, 1, 150, 3] = np.inf, np.nan, -np.inf, np.inf
    options = dict(options)
    if "attn_mask" in options:
        options["attn_mask"] = rng.random(options["attn_mask"]) < 0.5
        options["bias"] = rng.standard_normal(options["bias"]).astype(kind)
    options |= {n: np.asarray(x) for n, x in options.items() if n.endswith("lengths")}
    problem, inputs = laser_core._problem.describe(q, k, v, **options)
    assert decode.fits(problem)
    found = emulated.EMULATED.forward(problem, inputs)
    wide = {n: x.astype(np.float64) if n == "bias" else x for n, x in options.items()}
    arrays = [x.astype(np.float64) for x in (q, k, v)]
    o, l = laser_core.laser_attention(*arrays, **wide, return_lse=True, backend="reference")
    np.testing.assert_allclose(found.lse, l, atol=1e-4, rtol=1e-4)
    unit = 2.0**-8 if dtype == "bfloat16" else 2.0**-11
    np.testing.assert_allclose(found.out.astype(np.float64), o, atol=3 * unit, rtol=unit)


def test_runs_of_keys_fill_the_device() -> None:
    assert decode.splits(1, 131072, 1584) == 512
    assert decode.splits(1584, 8192, 1584) == 1
    assert decode.splits(8, 100, 1584) == 1


# ------------------------------------------------------------------------------------------------------------- DLPack


def test_bfloat16_goes_through_dlpack_without_a_copy() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="bfloat16 for NumPy is in ml_dtypes")
    torch = pytest.importorskip("torch", reason="needs another library with bfloat16")
    x = torch.arange(6.0).reshape(2, 3).bfloat16()
    taken = dlpack.take(x, np)
    assert taken.dtype == ml_dtypes.bfloat16
    assert taken.ctypes.data == x.data_ptr()
    back = torch.from_dlpack(dlpack.Renamed(taken))
    assert back.dtype == torch.bfloat16
    assert back.data_ptr() == x.data_ptr()
    assert dlpack.take(torch.tensor([True, False]), np).dtype == np.bool_


def test_arrays_that_cannot_be_exchanged_are_refused() -> None:
    torch = pytest.importorskip("torch", reason="needs two kinds of arrays")
    x = torch.zeros(1, 1, 2, 4)
    with pytest.raises(ValueError, match="query: got an array that is not on a CUDA device"):
        laser_cupy.laser_attention(x, x, x)
    with pytest.raises(ValueError, match="query: got a tensor that requires a gradient"):
        laser_cupy.laser_attention(x.clone().requires_grad_(), x, x)
    with pytest.raises(TypeError, match="query: got list; allowed: an array that speaks DLPack"):
        laser_cupy.laser_attention([1.0], x, x)


# -------------------------------------------------------------------------------------------------------------- NVRTC

BUILDS = (
    (80, "80", Build("bfloat16", 128, 128, strips=2, stages=3)),
    (80, "80", Build("float32", 64, 64, expm1=True, cap=True, keys=32, inner=16)),
    (90, "90a", Build("float16", 64, 64, strips=2, keys=128, owned=2)),
    (100, "100", Build("bfloat16", 64, 64, strips=2, keys=128, owned=2)),
)
REGISTERS = 255
STACK = 256  # bytes: at 128, 128 forward has a third of the registers, and keeps addresses of what is rare there


def _tool(name: str) -> str | None:
    """One of NVIDIA's binary utilities; triton brings them."""
    found = shutil.which(name)
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        brought = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / name
        found = str(brought) if brought.exists() else None
    return found


@pytest.mark.parametrize(("capability", "arch", "compiled"), BUILDS, ids=[f"sm_{arch}-{b}" for _, arch, b in BUILDS])
def test_every_kernel_compiles(
    capability: int, arch: str, compiled: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("cupy", reason="CuPy compiles the kernels")
    from cupy.cuda import compiler, nvrtc
    from laser_cupy import cuda

    try:
        nvrtc.getVersion()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"NVRTC is not installed: {error}")
    monkeypatch.setenv("CUPY_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(  # there is no device to ask
        compiler, "_get_arch_for_options_for_nvrtc", lambda arch=None: (f"-arch=sm_{capability}", "cubin")
    )
    options = (*cuda.OPTIONS, *compiled.definitions, f"-arch=sm_{arch}")
    cubin, _ = compiler.compile_using_nvrtc(build.source(), options, arch=str(capability))
    for kernel in build.KERNELS:
        assert kernel.encode() in cubin
        assert compiled.shared(kernel) <= build.SHARED

    report, disassemble = _tool("cuobjdump"), _tool("nvdisasm")
    if report is None or disassemble is None:
        pytest.skip("compiled; cuobjdump and nvdisasm, to look at registers and instructions, are not installed")
    path = tmp_path / "kernels.cubin"
    path.write_bytes(cubin + bytes(8))  # CuPy cuts trailing zeros
    usage = subprocess.run([report, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"Function (\w+):\s*\n\s*(REG:\d+ STACK:\d+)", usage))
    assert set(found) == set(build.KERNELS)
    for kernel, used in found.items():
        registers, stack = (int(n) for n in re.findall(r"\d+", used))
        assert registers <= REGISTERS, kernel
        assert stack <= STACK, f"{kernel} spills"
    code = subprocess.run([disassemble, "-c", str(path)], capture_output=True, text=True, check=True).stdout
    half = compiled.dtype != "float32"  # which is not for the matrix units: they would round it
    for instruction in ("HMMA.16816.F32", "LDSM.16.MT88.4", "LDGSTS") if half else ("FFMA", "LDGSTS"):
        assert instruction in code
    assert ("HMMA" in code) == half
