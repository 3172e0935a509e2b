"""``laser-attention doctor``: what is installed here, and what each backend can do with it."""

from __future__ import annotations

import argparse
import importlib
import json
import platform
import sys
from collections.abc import Callable
from importlib.metadata import packages_distributions, version
from typing import Any

import laser_core

from ._common import table

PACKAGES = ("numpy", "array_api_compat", "array_api_strict", "torch", "jax", "cupy", "triton")


def _torch(torch: Any) -> list[str]:
    found = [f"cuda:{n} {torch.cuda.get_device_name(n)}" for n in range(torch.cuda.device_count())]
    return ["cpu", *found, *(["mps"] if torch.backends.mps.is_available() else [])]


def _jax(jax: Any) -> list[str]:
    return [f"{device.platform}:{device.id} {device.device_kind}" for device in jax.devices()]


def _cupy(cupy: Any) -> list[str]:
    if not cupy.cuda.is_available():  # no driver, or no device: nothing is broken
        return []
    runtime = cupy.cuda.runtime
    names = (runtime.getDeviceProperties(n)["name"].decode() for n in range(runtime.getDeviceCount()))
    return [f"cuda:{n} {name}" for n, name in enumerate(names)]


DEVICES: dict[str, Callable[[Any], list[str]]] = {
    "numpy": lambda numpy: ["cpu"],
    "torch": _torch,
    "jax": _jax,
    "cupy": _cupy,
}


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the options of the subcommand."""
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print what is here; 1 where something that is installed is broken."""
    document = examine()
    print(json.dumps(document, indent=2) if options.json else _text(document))
    broken = document["error"] or any(package["error"] for package in document["packages"])
    return 1 if broken else 0


def examine() -> dict[str, Any]:
    """Versions, devices and backends; what fails is reported in ``error`` fields, and nothing is raised."""
    backends, error = _backends()
    return {
        "laser_attention": version("laser-attention"),
        "python": f"{platform.python_version()} ({sys.implementation.name})",
        "platform": platform.platform(),
        "packages": [_package(name) for name in PACKAGES],
        "backends": backends,
        "error": error,
    }


def _package(module: str) -> dict[str, Any]:
    """The version of a package, and the devices that it sees; only for these is it imported."""
    distributions = packages_distributions().get(module, [])
    found: dict[str, Any] = {"name": module, "version": None, "devices": [], "error": None}
    if distributions:
        found["version"] = version(distributions[0])
        if module in DEVICES:
            try:
                found["devices"] = DEVICES[module](importlib.import_module(module))
            except Exception as error:  # a broken installation can raise anything, and that is what we are here for
                found["error"] = _line(error)
    return found


def _backends() -> tuple[list[dict[str, Any]], str | None]:
    try:
        known = laser_core.backends()
    except Exception as error:  # one broken registration, ours or a stranger's, hides all: say which
        return [], _line(error)
    return [
        {
            "name": backend.name,
            "available": (missing := backend.missing()) is None,
            "reason": missing,
            "summary": backend.summary,
            "frameworks": list(backend.frameworks),
            "devices": list(backend.devices),
            "dtypes": list(backend.dtypes),
        }
        for backend in known.values()
    ], None


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _text(document: dict[str, Any]) -> str:
    versions = [["laser-attention", document["laser_attention"], ""]]
    versions.append(["python", document["python"], document["platform"]])
    for package in document["packages"]:
        devices = f"broken: {package['error']}" if package["error"] else ", ".join(package["devices"])
        versions.append([package["name"], package["version"] or "not installed", devices])
    parts = [table(versions, header=["package", "version", "devices"])]
    if document["error"]:
        parts.append(f"backends: broken: {document['error']}")
    else:
        parts.append(table([_row(backend) for backend in document["backends"]], header=["backend", "serves", "what"]))
    return "\n\n".join(parts)


def _row(backend: dict[str, Any]) -> list[str]:
    if not backend["available"]:
        return [backend["name"], "–", f"not available: {backend['reason']}"]
    serves = f"{', '.join(backend['frameworks']) or 'any array'} on {', '.join(backend['devices']) or 'any device'}"
    return [backend["name"], serves, backend["summary"]]
