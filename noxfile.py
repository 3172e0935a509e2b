# /// script
# requires-python = ">=3.11"
# dependencies = ["nox>=2025.2.9"]
# ///
"""Every task of the project: ``nox -l`` lists them, ``nox -s lint`` runs one, ``nox -t quick`` the short ones."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import nox
from nox.command import CommandFailed

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.reuse_existing_virtualenvs = True
nox.options.tags = ["quick"]

PYTHONS = ("3.11", "3.12", "3.13")
FRAMEWORKS = {  # what a test session installs, and what must then be there
    "numpy": ("test,demo", "array_api_strict,chromium"),
    "torch": ("test,demo,torch,triton", "array_api_strict,torch"),
    "jax": ("test,demo,jax,flax", "array_api_strict,jax,flax"),
}
JUDGED = {  # what a conformance session installs, and what it judges: backend, arrays, device
    "numpy": ("conformance", (("reference", "numpy", ""), ("streaming", "numpy", ""))),
    "strict": (
        "conformance,test",
        (("streaming", "array_api_strict", ""), ("streaming", "array_api_strict", "no_float64")),
    ),
    "torch": ("conformance,torch", (("torch-sdpa", "torch", ""), ("streaming", "torch", ""))),
    "jax": ("conformance,jax", (("jax-xla", "jax", ""), ("jax-dpa", "jax", ""))),
}
GPUS = {"torch": "cuda", "jax": "gpu", "cupy": ""}  # what each framework calls the device
SERVING = """
import sys, laser_core
for b in laser_core.backends().values():
    if (not b.frameworks or sys.argv[1] in b.frameworks) and (not b.devices or set(b.devices) - {"cpu"}):
        print(b.name)
"""
COMPILER = (  # JAX's CUDA plugin as a compiler: what it needs where there is no GPU
    *("jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc", "nvidia-nvvm"),
    *("nvidia-cuda-runtime", "nvidia-cuda-crt", "absl-py"),
)
CONSTRAINED = ("--constraint", ".ci/constraints.txt")

if "PIP_FIND_LINKS" in os.environ:  # uv has its own name for it
    os.environ.setdefault("UV_FIND_LINKS", os.environ["PIP_FIND_LINKS"])
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # without bytecode every import of torch takes twice as long


@nox.session(python=PYTHONS)
@nox.parametrize("framework", [nox.param(name, id=name) for name in FRAMEWORKS])
def tests(session: nox.Session, framework: str) -> None:
    """The tests with one framework beside NumPy and array-api-strict; its absence is an error."""
    extras, required = FRAMEWORKS[framework]
    session.install(*CONSTRAINED, f".[{extras}]")
    session.run("pytest", *session.posargs, env={"LASER_REQUIRE": required})


@nox.session(python="3.12")
def mosaic(session: nox.Session) -> None:
    """The Pallas kernels for GPUs, in JAX's interpreter and compiled for an H200; they need JAX 0.11."""
    session.install(*CONSTRAINED, ".[conformance,jax]")
    session.install(*CONSTRAINED, "--no-deps", *COMPILER)
    tests = ("tests/test_mosaic.py", "tests/test_mosaic_backward.py")
    session.run("pytest", *tests, *session.posargs, env={"LASER_REQUIRE": "jax,jax_cuda13_plugin"})


@nox.session(tags=["quick"])
def lint(session: nox.Session) -> None:
    """Style and spelling: ruff check, ruff format --check, typos."""
    session.install(*CONSTRAINED, "ruff", "typos")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("typos")


@nox.session(tags=["quick"])
def types(session: nox.Session) -> None:
    """mypy --strict, with every framework there to be checked against."""
    session.install(*CONSTRAINED, ".[types,test,demo,torch,jax]")
    session.run("mypy")


@nox.session(tags=["quick"])
def generated(session: nox.Session) -> None:
    """Whether the tables that are made from result files are up to date; -- --write brings them up to date."""
    session.install(*CONSTRAINED, ".[conformance]")
    for script in ("conformance/support.py", "benchmarks/report.py"):
        session.run("python", script, *([] if "--write" in session.posargs else ["--check"]))


@nox.session(tags=["quick"])
def docs(session: nox.Session) -> None:
    """The documentation with warnings as errors, and its examples executed."""
    session.install(*CONSTRAINED, ".[docs,test,torch,jax,flax]")
    session.run("sphinx-build", "--fail-on-warning", "--keep-going", "--quiet", "docs", "docs/_build/html")
    required = "array_api_strict,torch,jax,flax"
    session.run("pytest", "-q", "tests/test_examples.py", env={"LASER_REQUIRE": required})


def judge(session: nox.Session, subjects: Iterable[tuple[str, str, str]], options: list[str]) -> None:
    """Judge backends on arrays and devices, each into conformance-….json and .html; fails in the end where one does."""
    told = session.run("git", "describe", "--always", "--dirty", "--abbrev=12", silent=True, external=True)
    failed = []
    for backend, library, device in subjects:
        name = "-".join(filter(None, (backend, library, device)))
        place = ["--device", device] if device else []
        files = ["--json", f"conformance-{name}.json", "--html", f"conformance-{name}.html", "--force"]
        command = ["laser-conformance", "run", "--backend", backend, "--arrays", library, *place, *files, *options]
        try:
            session.run(*command, env={"LASER_COMMIT": str(told).strip()}, external=True)
        except CommandFailed:
            failed.append(name)
    if failed:
        session.error(f"not conforming, or not there: {', '.join(failed)}")


@nox.session
@nox.parametrize("arrays", [nox.param(name, id=name) for name in JUDGED])
def conformance(session: nox.Session, arrays: str) -> None:
    """The conformance suite, its quick subset, on this Python: every backend of an array library; -- more options."""
    extras, subjects = JUDGED[arrays]
    session.install(*CONSTRAINED, f".[{extras}]")
    judge(session, subjects, ["--quick", *session.posargs])


@nox.session(python=PYTHONS)
@nox.parametrize("arrays", [nox.param(name, id=name) for name in JUDGED])
def conformance_matrix(session: nox.Session, arrays: str) -> None:
    """The same on each Python, and all cases; -- --quick for the subset."""
    extras, subjects = JUDGED[arrays]
    session.install(*CONSTRAINED, f".[{extras}]")
    judge(session, subjects, list(session.posargs))


@nox.session(venv_backend="none")
@nox.parametrize("arrays", [nox.param(name, id=name) for name in GPUS])
def gpu(session: nox.Session, arrays: str) -> None:
    """On a machine with a GPU, its frameworks and .[conformance]: every backend that may run there; -- more options."""
    serving = session.run("python", "-c", SERVING, arrays, silent=True, external=True)
    names = str(serving).split()
    if not names:
        session.error(f"no registered backend serves arrays of {arrays} on a GPU")
    judge(session, ((name, arrays, GPUS[arrays]) for name in names), list(session.posargs))


@nox.session
def demo(session: nox.Session) -> None:
    """The demo on NumPy alone, as the README has it; arguments after -- are passed on."""
    session.install(*CONSTRAINED, ".[demo]")
    session.run("laser-attention", "demo", *session.posargs)


@nox.session
def tpu(session: nox.Session) -> None:
    """The TPU kernels, compiled by the TPU compiler without a TPU, and interpreted."""
    session.install(*CONSTRAINED, ".[test,jax]", "libtpu")
    session.run("pytest", "tests/test_jax_tpu.py", env={"LASER_REQUIRE": "jax,libtpu", "JAX_PLATFORMS": "cpu"})


@nox.session
def bench(session: nox.Session) -> None:
    """The benchmarks side by side on this machine; they write a result file."""
    session.install(*CONSTRAINED, ".[torch,jax]")
    session.run("python", "benchmarks/bench.py", *session.posargs)


@nox.session
def build(session: nox.Session) -> None:
    """An sdist, the wheel from it, and a smoke test of the wheel in an environment with nothing else."""
    session.install("build")
    dist = Path(session.create_tmp()) / "dist"
    session.run("python", "-m", "build", "--outdir", str(dist))
    clean = Path(session.create_tmp()) / "clean"
    session.run("python", "-m", "venv", "--clear", str(clean))
    commands = clean / ("Scripts" if os.name == "nt" else "bin")
    wheel = max(dist.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    session.run(str(commands / "python"), "-m", "pip", "install", "--quiet", str(wheel), external=True)
    for arguments in (["--version"], ["doctor"], ["explain", "--shape", "2,8,4096,64", "--causal"]):
        session.run(str(commands / "laser-attention"), *arguments, external=True)


if __name__ == "__main__":
    nox.main()
