"""Which frameworks must be present: LASER_REQUIRE="torch,jax,array_api_strict" turns their absence into an error."""

from __future__ import annotations

import importlib
import os

import pytest


def required() -> list[str]:
    """The modules that LASER_REQUIRE names."""
    return [name.strip() for name in os.environ.get("LASER_REQUIRE", "").split(",") if name.strip()]


def pytest_collection(session: pytest.Session) -> None:
    """Import what is required before anything is collected: a skip for want of it would look like success."""
    for name in required():
        try:
            importlib.import_module(name)
        except Exception as error:
            raise pytest.UsageError(f"LASER_REQUIRE names {name}, which does not import: {error!r}") from error


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is required, or that nothing is."""
    return f"required frameworks: {', '.join(required()) or 'none (set LASER_REQUIRE to require some)'}"
