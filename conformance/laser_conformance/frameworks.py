"""What an array library does with functions: automatic differentiation, compilation, vectorisation.

Each check calls :func:`laser_core.laser_attention` inside such a transformation and holds the results to the truth.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import laser_core

from . import checks
from .case import Case
from .compare import Finding
from .problems import GRADIENTS, Data, Spec
from .subject import Refused, Results, Subject

Array = Any
Function = Callable[..., Any]


class _Call:
    """``laser_attention`` as a function of its floating arguments alone, and its cotangents."""

    def __init__(self, subject: Subject, data: Data) -> None:
        if (reason := subject.why_not(data)) is not None:
            raise Refused(reason)
        self.subject, self.data = subject, data
        put = subject.library.put
        self.names = [n for n in GRADIENTS if n in data.arrays]
        self.values = [put(data.arrays[n].copy()) for n in self.names]
        self.others = {n: put(x) for n, x in data.arrays.items() if n not in GRADIENTS}
        self.cotangents = [put(x.copy()) for x in (data.d_out, data.d_lse) if x is not None]

    def __call__(self, *values: Array) -> tuple[Array, ...]:
        arguments = dict(zip(self.names, values, strict=True)) | self.others
        result = laser_core.laser_attention(**arguments, **self.data.options(), backend=self.subject.backend)
        return result if isinstance(result, tuple) else (result,)

    def judged(self, outputs: tuple[Array, ...], gradients: tuple[Array, ...]) -> list[Finding]:
        """Outputs and gradients against the truth."""
        get = self.subject.library.get
        found = dict(zip(("out", "lse"), map(get, outputs), strict=False))
        found |= {f"d_{n}": get(g) for n, g in zip(self.names, gradients, strict=True)}
        return checks.judged(self.data, Results(found, []))


def _torch() -> Any:
    return importlib.import_module("torch")


def autograd(subject: Subject, data: Data) -> list[Finding]:
    """``torch.autograd`` through the call."""
    return _by_autograd(_Call(subject, data), lambda f: f)


def compiled(subject: Subject, data: Data) -> list[Finding]:
    """``torch.compile(fullgraph=True)``, forward and backward."""
    torch = _torch()
    torch._dynamo.reset()
    return _by_autograd(_Call(subject, data), lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"))


def _by_autograd(call: _Call, transform: Callable[[Function], Function]) -> list[Finding]:
    values = [v.requires_grad_() for v in call.values]
    outputs = transform(call)(*values)
    gradients = _torch().autograd.grad(outputs, values, call.cotangents)
    return call.judged(outputs, gradients)


def torch_vmap(subject: Subject, data: Data) -> list[Finding]:
    """``torch.func.vmap`` of the call and of its gradient, over the batch."""
    func = _torch().func
    call = _Call(subject, data)

    def loss(*arguments: Array) -> Array:
        *values, d_out = arguments
        return (call(*values)[0] * d_out).sum()

    every = tuple(range(len(call.values)))
    outputs = func.vmap(lambda *values: call(*values)[0])(*call.values)
    gradients = func.vmap(func.grad(loss, argnums=every))(*call.values, call.cotangents[0])
    return call.judged((outputs,), gradients)


def jax_grad(subject: Subject, data: Data) -> list[Finding]:
    """``jax.vjp`` through the call."""
    return _by_vjp(subject, data, lambda f: f)


def jax_jit(subject: Subject, data: Data) -> list[Finding]:
    """``jax.jit`` of the call and of its gradient."""
    return _by_vjp(subject, data, importlib.import_module("jax").jit)


def jax_checkpoint(subject: Subject, data: Data) -> list[Finding]:
    """``jax.checkpoint`` inside ``jax.jit``."""
    jax: Any = importlib.import_module("jax")
    return _by_vjp(subject, data, lambda f: jax.jit(jax.checkpoint(f)))


def jax_vmap(subject: Subject, data: Data) -> list[Finding]:
    """``jax.vmap`` over the batch, inside ``jax.jit``."""
    jax: Any = importlib.import_module("jax")
    return _by_vjp(subject, data, lambda f: jax.jit(jax.vmap(f)))


def _by_vjp(subject: Subject, data: Data, transform: Callable[[Function], Function]) -> list[Finding]:
    jax: Any = importlib.import_module("jax")
    with subject.library.context(data.dtype):
        call = _Call(subject, data)
        try:
            outputs, pullback = jax.vjp(transform(call.__call__), *call.values)
            gradients = pullback(tuple(call.cotangents))
        except laser_core.Unsupported as error:  # where the call did not know that a gradient would be asked for
            raise Refused(f"no gradient: {error}") from error
        return call.judged(outputs, gradients)


CHECKS: dict[str, Callable[[Subject, Data], list[Finding]]] = {
    "autograd": autograd,
    "compile": compiled,
    "torch vmap": torch_vmap,
    "jax grad": jax_grad,
    "jit": jax_jit,
    "checkpoint": jax_checkpoint,
    "jax vmap": jax_vmap,
}


def cases() -> Iterator[Case]:
    """The cases of the level framework."""
    everything: dict[str, Any] = {"causal": "top_left", "lengths": (37, 37), "heads": (4, 2), "lse": True}
    optional: dict[str, Any] = {"bias_shape": (1, 4, 33, 40), "beta_shape": (4, 1), "heads": (4, 2), "lse": True}
    batch: dict[str, Any] = {"batch": (3,), "heads": (4, 2)}
    for library, check, sentence, spec in (
        ("torch", "autograd", "torch.autograd, log-sum-exp included.", everything),
        ("torch", "autograd", "torch.autograd to the bias and β too.", optional),
        ("torch", "compile", "torch.compile(fullgraph=True), forward and backward.", everything),
        ("torch", "torch vmap", "torch.func.vmap and grad.", batch),
        ("jax", "jax grad", "jax.vjp, log-sum-exp included.", everything),
        ("jax", "jax grad", "jax.vjp to the bias and β too.", optional),
        ("jax", "jit", "jax.jit.", everything),
        ("jax", "checkpoint", "jax.checkpoint inside jax.jit.", everything),
        ("jax", "jax vmap", "jax.vmap inside jax.jit.", batch),
    ):
        name = check.replace(" ", "-") + ("-options" if spec is optional else "")
        name = name if name.startswith(library) else f"{library}-{name}"
        yield Case(
            id=f"framework/{name}",
            sentence=sentence,
            spec=Spec(seed=f"framework/{name}", **spec),
            check=check,
            quick=check in ("compile", "jit", "torch vmap", "jax vmap"),
            libraries=(library,),
        )
