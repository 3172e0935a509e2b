"""The decode backend for any number of queries, so that all of the conformance suite's masks meet its kernels."""

import dataclasses

from laser_torch import DECODE

from laser_core import Problem


def _why_not(problem: Problem) -> str | None:
    return DECODE.why_not(dataclasses.replace(problem, query_length=1))


ANY = dataclasses.replace(DECODE, name="torch-decode-any", why_not=_why_not)
