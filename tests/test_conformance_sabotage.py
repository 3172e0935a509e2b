"""The suite can fail: every sabotaged implementation is rejected, by the level that its flaw belongs to."""

from collections.abc import Iterator

import numpy as np
import pytest
from laser_conformance.arrays import Library, open_library
from laser_conformance.cases import choose
from laser_conformance.checks import forward
from laser_conformance.judge import judge
from laser_conformance.problems import Spec, build
from laser_conformance.sabotage import FLAWS, Honest
from laser_conformance.subject import Subject

import laser_core


@pytest.fixture
def register() -> Iterator[object]:
    added = []

    def register(cls: type[Honest]) -> Subject:
        record = cls.backend()
        laser_core.backends()[record.name] = record
        added.append(record.name)
        return Subject(record.name, open_library("numpy"))

    yield register
    for name in dict.fromkeys(added):
        del laser_core.backends()[name]


def test_enough_flaws():
    assert len(FLAWS) >= 25
    assert all(cls.__doc__ for cls in FLAWS.values())


def test_honest_passes(register):
    subject = register(Honest)
    failed = [v for case in choose(quick=True) for v in judge(subject, case) if v.status in ("failed", "refused")]
    assert not failed, failed[0]


@pytest.mark.parametrize("name", FLAWS)
def test_rejected(name, register):
    cls = FLAWS[name]
    subject = register(cls)
    addresses = cls.caught_by == "scale"  # the other long problems need a backend that does not materialise
    cases = choose((cls.caught_by,), only=("scale/beyond",) if addresses else (), quick=not addresses)
    assert any(v.status == "failed" for case in cases for v in judge(subject, case))


LAWS_BROKEN = {
    "shift": "soft-clamp",
    "scaling": "beta-ignored",
    "between": "groups-by-modulo",
    "monotone": "mask-after-softmax",
    "lipschitz": "mask-after-softmax",
    "sum-of-value-gradients": "group-not-summed",
    "sum-of-score-gradients": "lse-gradient-dropped",
    "permutation": "linear-merge",
    "duplication": "lse-in-base-two",
    "merging": "linear-merge",
    "merging-of-sets": "linear-merge",
    "small-beta": "naive-small-beta",
    "large-beta": "linear-merge",
    "groups": "groups-by-modulo",
    "prefix": "linear-merge",
    "padding": "key-lengths-ignored",
    "invisible": "reference-moves-bits",
}


def test_each_law_can_be_broken(register):
    """By an implementation that is wrong in what the law is about."""
    assert {f"laws/{law}" for law in LAWS_BROKEN} == {case.id for case in choose(("laws",))}
    for law, name in LAWS_BROKEN.items():
        (case,) = (case for case in choose(("laws",)) if case.id == f"laws/{law}")
        (verdict,) = judge(register(FLAWS[name]), case, ("float32",))
        assert verdict.status == "failed", law
        assert "raised" not in verdict.message, law


@pytest.mark.parametrize("name", ["plain", "keys", "queries"])
def test_heads_side_by_side(name, register):
    """A tile that reaches into a neighbour of another kind is noticed, at every size."""
    (case,) = choose(only=(f"isolation/heads-{name}",))
    (passed,) = judge(register(Honest), case, ("bfloat16",))
    assert passed.status == "passed", passed.message
    (verdict,) = judge(register(FLAWS["tile-reaches-next-head"]), case, ("bfloat16",))
    assert verdict.status == "failed"
    assert "raised" not in verdict.message


def test_another_device():
    """A result on another device of the same namespace is rejected, whatever its values."""
    strict = pytest.importorskip("array_api_strict")

    class AnotherDevice(Honest):
        """The output is on another device."""

        def frameworks(self):
            return ("array_api_strict",)

        def forward(self, problem, inputs):
            inputs = type(inputs)(*(None if x is None else np.asarray(x._array) for x in inputs))
            result = super().forward(problem, inputs)
            return result._replace(out=strict.asarray(result.out, device=strict.Device("device1")))

    record = AnotherDevice.backend()
    laser_core.backends()[record.name] = record
    try:
        library: Library = open_library("array_api_strict")
        found = forward(Subject(record.name, library), build(Spec(seed="device"), "float32"))
    finally:
        del laser_core.backends()[record.name]
    (problem,) = [f.problem for f in found if f.problem]
    assert problem.startswith("out is on device")
    assert "device1" in problem
