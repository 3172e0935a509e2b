"""What must be present: LASER_REQUIRE="torch,jax,array_api_strict,chromium" turns its absence into an error."""

from __future__ import annotations

import importlib
import os

import browser
import pytest


def required() -> list[str]:
    """What LASER_REQUIRE names: modules, and ``chromium``."""
    return [name.strip() for name in os.environ.get("LASER_REQUIRE", "").split(",") if name.strip()]


def pytest_collection(session: pytest.Session) -> None:
    """Look for what is required before anything is collected: a skip for want of it would look like success."""
    for name in required():
        if name == "chromium":
            if browser.find() is None:
                raise pytest.UsageError(f"LASER_REQUIRE names chromium; found none of {', '.join(browser.NAMES)}")
            continue
        try:
            importlib.import_module(name)
        except Exception as error:
            raise pytest.UsageError(f"LASER_REQUIRE names {name}, which does not import: {error!r}") from error


def pytest_report_header(config: pytest.Config) -> str:
    """Say what is required, or that nothing is."""
    return f"required: {', '.join(required()) or 'nothing (LASER_REQUIRE names frameworks, or chromium)'}"
