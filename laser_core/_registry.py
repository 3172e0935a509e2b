"""Backends: frozen records, found through the entry-point group ``laser_core.backends``."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from ._array import FLOATING, Array
from ._problem import Inputs, Problem

GROUP = "laser_core.backends"


class Unsupported(NotImplementedError):
    """A backend that was asked for cannot run the problem, or none of those asked for can."""


class Forward(NamedTuple):
    """What a forward pass returns and a backward pass gets back.

    Attributes:
        out: ``(..., Hq, Lq, E)`` in the dtype of the query.
        lse: ``(..., Hq, Lq)``, natural log, in the compute dtype of the problem.
        residual: What else the backward pass needs: None, an array or a tuple of arrays, as the record's ``residual``
            describes it. Where ``problem.gradient`` is false it may be left out, and is ignored.
    """

    out: Array
    lse: Array
    residual: Any = None


class Gradients(NamedTuple):
    """Cotangents of the arguments, each in the shape and dtype of its argument; None where that is no array."""

    query: Array
    key: Array
    value: Array
    bias: Array | None = None
    beta: Array | None = None


Kept = tuple[tuple[tuple[int, ...], str], ...]  # shapes and dtypes


def _nothing(problem: Problem) -> None:
    return None


def nothing_kept(problem: Problem) -> Kept:
    """The ``residual`` of a backend that keeps the output and the log-sum-exp alone."""
    return ()


def unrounded_output(problem: Problem) -> Kept:
    """The ``residual`` of a backend that keeps its output in the compute dtype where that is the wider one.

    The backward pass normalises its weights by the output: rounded, they would not sum to one.
    """
    return () if problem.dtype == problem.compute_dtype else ((problem.out_shape, problem.compute_dtype),)


def deferred(where: str) -> Callable[..., Any]:
    """The function that ``"package.module:name"`` names, imported when it is first called.

    For the passes of a record: listing backends must not import a framework.
    """
    module, _, name = where.partition(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


@dataclass(frozen=True, kw_only=True, eq=False)  # one is another only if it is the same: cheap keys
class Backend:
    """An implementation of LASER attention: what it serves, and its two functions.

    Attributes:
        name: How users ask for it. Unique.
        summary: What it is, in one sentence.
        forward: ``forward(problem, inputs) -> Forward``.
        backward: ``backward(problem, inputs, forward, d_out, d_lse) -> Gradients``; ``d_lse`` may be None.
        frameworks: Whose arrays it takes; empty means every one that speaks the array API standard.
        devices: The kinds of device that it runs on; empty means every one.
        dtypes: The dtypes of query, key and value that it takes.
        requires: Modules without which it cannot run.
        why_not: The reason why it cannot run a problem, or None. It sees shapes, dtypes, options and the device
            kind alone, so it can be asked anywhere. What the fields above say need not be said again.
        priority: Among the backends that can run a problem, the automatic choice takes the highest.
        how: For :func:`laser_core.explain`: which of its kernels would run a problem, and why, or None where it has
            but one way.
        residual: The shapes and dtypes of the arrays in ``Forward.residual`` for a problem, so that a tracer knows them
            without running anything; none where it is None. Each shape begins with the batch of the problem.
        native: The framework itself differentiates through ``forward``, to any order; ``backward`` then serves
            :func:`laser_core.laser_attention_vjp` alone.
    """

    name: str
    summary: str
    forward: Callable[[Problem, Inputs], Forward]
    backward: Callable[[Problem, Inputs, Forward, Array, Array | None], Gradients]
    frameworks: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = FLOATING
    requires: tuple[str, ...] = ()
    why_not: Callable[[Problem], str | None] = _nothing
    priority: Callable[[Problem], int] = lambda problem: 0
    how: Callable[[Problem], str | None] = _nothing
    residual: Callable[[Problem], Kept] = nothing_kept
    native: bool = False

    def missing(self) -> str | None:
        """Why the backend cannot run on this installation at all, or None."""
        for module in self.requires:
            if importlib.util.find_spec(module) is None:
                return f"needs {module}, which is not installed"
        return None

    def refuses(self, problem: Problem) -> str | None:
        """Why the backend cannot run ``problem``, or None."""
        for what, got, allowed in (
            ("arrays of", problem.framework, self.frameworks),
            ("device", problem.device, self.devices),
            ("dtype", problem.dtype, self.dtypes),
        ):
            if allowed and got not in allowed:
                return f"{what} {got} (supported: {', '.join(allowed)})"
        return self.missing() or self.why_not(problem)


@functools.cache
def backends() -> dict[str, Backend]:
    """The registered backends by name, found once per process.

    A backend whose framework is not installed is listed too, and says so in :meth:`Backend.missing`.

    Raises:
        RuntimeError: Two distributions register the same name.
        Exception: Whatever importing a broken backend raised; only an absent framework is forgiven.
    """
    found: dict[str, Backend] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda point: point.name):
        backend = _load(point)
        if backend.name in found:
            raise RuntimeError(f"two backends are registered under the name {backend.name!r}; uninstall one of them")
        found[backend.name] = backend
    return found


def _load(point: EntryPoint) -> Backend:
    try:
        backend = point.load()
    except ModuleNotFoundError as error:
        own = point.module.partition(".")[0]
        if error.name is None or error.name.partition(".")[0] == own:
            raise  # the backend's own module is missing: a broken installation
        return _absent(point.name, error.name)
    if not isinstance(backend, Backend):
        raise TypeError(f"entry point {point.name!r} = {point.value!r}: got {type(backend).__name__}; allowed: Backend")
    if backend.name != point.name:
        raise RuntimeError(f"entry point {point.name!r} = {point.value!r} holds a backend named {backend.name!r}")
    return backend


def _absent(name: str, module: str) -> Backend:
    def refuse(*_: object) -> Forward:
        raise Unsupported(f"backend {name!r} needs {module}, which is not installed")

    return Backend(name=name, summary="", forward=refuse, backward=refuse, requires=(module,))  # type: ignore[arg-type]


def named(names: str | Sequence[str]) -> list[Backend]:
    """The backends of these names; ``ValueError`` lists the known ones for a name that is not among them."""
    known = backends()
    allowed = f"allowed: None, {', '.join(map(repr, known))}, or a sequence of these"
    if not isinstance(names, str | Sequence):
        raise TypeError(f"backend: got {names!r}; {allowed}")
    asked = [names] if isinstance(names, str) else list(names)
    for name in asked:
        if name not in known:
            raise ValueError(f"backend: got {name!r}; {allowed}")
    if not asked:
        raise ValueError(f"backend: got an empty sequence; {allowed}")
    return [known[name] for name in asked]


def select(problem: Problem, backend: str | Sequence[str] | None = None) -> Backend:
    """The backend that runs ``problem``: the best that can, the one named, or the first of a sequence that can.

    Raises:
        ValueError: An unknown name, or an empty sequence.
        Unsupported: None of the backends asked for can run the problem; says why, for each.
    """
    asked = tuple(backends().values() if backend is None else named(backend))
    try:
        return _known(problem, asked, backend is None)
    except TypeError:  # sizes that are being traced have no hash
        return _select(problem, asked, backend is None)


def _select(problem: Problem, asked: tuple[Backend, ...], best: bool) -> Backend:
    able = [candidate for candidate in asked if candidate.refuses(problem) is None]
    if not able:
        reasons = "; ".join(f"backend {b.name!r} cannot run this: {b.refuses(problem)}" for b in asked)
        raise Unsupported(reasons)
    return max(able, key=lambda candidate: candidate.priority(problem)) if best else able[0]


_known = functools.lru_cache(maxsize=4096)(_select)  # what it asks is pure
