"""What ``pytest --pyargs laser_conformance`` collects: one test, once for each case."""

from __future__ import annotations

import pytest

from .case import Case
from .judge import judge
from .subject import Subject


def test_conforms(laser_subject: Subject, laser_case: Case, request: pytest.FixtureRequest) -> None:
    """The case passes in every dtype that it is tried in."""
    verdicts = judge(laser_subject, laser_case, quick=request.config.getoption("--laser-quick"))
    failed = [v for v in verdicts if v.status == "failed"]
    if failed:
        pytest.fail("\n\n".join(f"{v.dtype}: {v.message}\n{v.reproduce}" for v in failed), pytrace=False)
    if not any(v.status == "passed" for v in verdicts):
        pytest.skip("; ".join(dict.fromkeys(v.message for v in verdicts)))
