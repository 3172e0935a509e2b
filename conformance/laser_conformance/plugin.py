"""The suite in pytest: ``pytest --pyargs laser_conformance --laser-backend NAME``, with pytest's own selection.

Loaded in every pytest run of an installation, so nothing heavy is imported before it is asked for.
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the suite."""
    group = parser.getgroup("laser", "conformance of LASER attention")
    group.addoption("--laser-backend", metavar="NAME", help="the registered backend to judge")
    group.addoption("--laser-arrays", metavar="LIBRARY", default="", help="on whose arrays")
    group.addoption("--laser-device", metavar="DEVICE", default="", help="on which device of that library")
    group.addoption("--laser-load", metavar="MODULE:NAME", default="", help="a record that no entry point names")
    group.addoption("--laser-quick", action="store_true", help="the quick subset")


def pytest_configure(config: pytest.Config) -> None:
    """Name the marks."""
    config.addinivalue_line("markers", "laser_level(name): the level of a conformance case")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test for each case."""
    if "laser_case" not in metafunc.fixturenames:
        return
    if not metafunc.config.getoption("--laser-backend"):
        import laser_core

        raise pytest.UsageError(f"--laser-backend is missing; allowed: {', '.join(laser_core.backends())}")
    from .cases import choose

    cases = choose(quick=metafunc.config.getoption("--laser-quick"))
    marked = [pytest.param(case, id=case.id, marks=pytest.mark.laser_level(case.level)) for case in cases]
    metafunc.parametrize("laser_case", marked)


@pytest.fixture(scope="session")
def laser_subject(request: pytest.FixtureRequest) -> object:
    """The backend that ``--laser-backend`` names; one that is absent is an error, never a skip."""
    from .run import CannotRun, Setup

    option = request.config.getoption
    names = ("--laser-backend", "--laser-arrays", "--laser-device", "--laser-load")
    try:
        return Setup(*(option(name) for name in names)).subject()
    except CannotRun as error:
        pytest.fail(str(error), pytrace=False)
