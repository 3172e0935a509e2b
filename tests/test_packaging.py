"""What an installation contains, and what importing it costs."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = sorted(
    path.parent.name
    for folder in (".", "backends", "conformance")
    for path in ROOT.glob(f"{folder}/laser_*/__init__.py")
)
FRAMEWORKS = (
    "torch",
    "jax",
    "cupy",
    "triton",
    "array_api_strict",
    "ml_dtypes",
    "matplotlib",
    "tqdm",
    "threadpoolctl",
    "scipy",
)


def run(program: str) -> str:
    """The output of a Python program in a fresh process."""
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("module", ["laser_core", "laser_core.cli"])
def test_import_imports_no_framework(module: str) -> None:
    program = f"import sys, {module}; print(*sorted(set(sys.modules) & set({FRAMEWORKS!r})))"
    assert run(program).split() == []


def test_using_numpy_imports_no_framework() -> None:
    program = f"""
import sys, numpy, laser_core
x = numpy.ones((1, 2, 3))
laser_core.laser_attention_vjp(x, x, x)[1](x)
print(*sorted(set(sys.modules) & set({FRAMEWORKS!r})))
"""
    assert run(program).split() == []


def test_import_adds_no_heavy_modules_to_numpy() -> None:
    """The cost of an import is what it executes: the module count is the same on every machine, seconds are not."""
    program = """
import numpy, sys
before = set(sys.modules)
import laser_core
print(len(set(sys.modules) - before))
"""
    assert int(run(program)) < 150


def test_every_package_is_typed() -> None:
    assert "laser_core" in PACKAGES
    for folder in (".", "backends", "conformance"):
        for package in (ROOT / folder).glob("laser_*/"):
            if package.is_dir() and not package.name.endswith(".egg-info"):
                assert (package / "py.typed").is_file(), package


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy of the sources with the setuptools at hand."""
    pytest.importorskip("setuptools", minversion="77", reason="building the wheel needs setuptools 77 or later")
    out = tmp_path_factory.mktemp("wheel")
    program = f"""
import os, shutil
unwanted = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info")
shutil.copytree({str(ROOT)!r}, {str(out / "copy")!r}, ignore=unwanted)
os.chdir({str(out / "copy")!r})
from setuptools import build_meta
build_meta.build_wheel({str(out)!r})
"""
    run(program)
    return next(out.glob("*.whl"))


def test_wheel_installs_our_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    assert "laser_core/cli/_model.py" in names
