"""The public functions: describe the call, choose a backend, run it. Nothing is computed here."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, Unpack

from . import _array, _problem, _registry
from ._array import Array
from ._problem import Alignment, Inputs, Options, Problem
from ._registry import Backend, Forward, Gradients

Backends = str | Sequence[str] | None
Pullback = Callable[..., Gradients]


def laser_attention(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    bias: Array | None = None,
    *,
    scale: float | None = None,
    beta: float | Array = 1.0,
    is_causal: bool | Alignment = False,
    window_size: tuple[int | None, int | None] | None = None,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    logits_soft_cap: float | None = None,
    return_lse: bool = False,
    backend: Backends = None,
) -> Array | tuple[Array, Array]:
    r"""LASER attention: attention that averages exponentials of the values (arXiv 2411.03493, section 3).

    .. math::
        s_{ij} &= \operatorname{cap}(\mathrm{scale} \cdot \langle q_i, k_j \rangle) + \mathrm{bias}_{ij}, \qquad
        l_i = \log \sum_j e^{s_{ij}} \\
        o_{ie} &= \frac{1}{\beta_e} \log \sum_j e^{s_{ij} - l_i}\, e^{\beta_e v_{je}}

    over the keys j that query i sees: mask AND causal AND window AND inside the sequence lengths. At β = 1 this is
    LASER as published; β = 0 is softmax attention, and β → ∞ tends to the maximum. A query that sees no key has
    output 0 and log-sum-exp −∞, and no gradient flows through it.

    Args:
        query: ``(..., Hq, Lq, D)``. NumPy, CuPy, torch, JAX or any namespace of the array API standard; float16,
            bfloat16, float32 or float64, the same for query, key and value.
        key: ``(..., Hkv, Lk, D)``, where Hkv divides Hq: query head h reads key/value head h // (Hq/Hkv).
        value: ``(..., Hkv, Lk, E)``.
        attn_mask: Boolean, broadcastable to ``(..., Hq, Lq, Lk)``; True = may attend.
        bias: Floating, broadcastable to ``(..., Hq, Lq, Lk)``; added to the scores after the cap. −∞ hides a key.
        scale: Factor of the scores; default 1/√D. Zero is legal.
        beta: Inverse temperature: a finite number, or a floating array that broadcasts to ``(Hq, E)``.
        is_causal: True or ``"top_left"``: query i sees keys ≤ i, as in torch and JAX. ``"bottom_right"``: keys
            ≤ i + Lk − Lq, as in FlashAttention. Lk and Lq are the sizes of the arrays, whatever the lengths below.
        window_size: ``(left, right)``: query i sees keys from i − left to i + right, relative to the diagonal in use;
            None is unbounded on that side.
        query_seq_lengths: Integers, broadcastable to the leading dimensions; queries from there on see nothing.
        key_value_seq_lengths: Integers, broadcastable to the leading dimensions; keys from there on are not seen.
        logits_soft_cap: c > 0: scores pass through c·tanh(·/c) before the bias.
        return_lse: Whether to return ``(out, lse)`` with the log-sum-exp l of the scores.
        backend: None for the best that can, a name, or names to try in order; see :func:`laser_core.backends`.

    Returns:
        ``out (..., Hq, Lq, E)`` in query's namespace, dtype and device, computed with float32 accumulation or wider;
        with ``return_lse`` also ``lse (..., Hq, Lq)``, natural log, float32 or float64. torch tensors carry autograd
        and JAX arrays a ``custom_vjp``, of first order; ``backend="reference"`` is differentiable to any order.

    Raises:
        TypeError: An argument of the wrong kind or dtype, or arrays of different namespaces.
        ValueError: A shape, device, option or backend name that does not fit.
        Unsupported: No backend asked for can run this; says why.
    """
    problem, inputs = _problem.describe(
        query,
        key,
        value,
        attn_mask,
        bias,
        scale=scale,
        beta=beta,
        is_causal=is_causal,
        window_size=window_size,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        logits_soft_cap=logits_soft_cap,
        return_lse=return_lse,
    )
    binding = _binding(problem.framework)
    if binding is not None:
        out, lse = binding.attention(problem, inputs, backend)
    else:
        problem = dataclasses.replace(problem, gradient=False)  # nothing records it
        out, lse, _ = _run(_registry.select(problem, backend), problem, inputs)
    return (out, lse) if return_lse else out


def laser_attention_vjp(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    bias: Array | None = None,
    *,
    backend: Backends = None,
    **options: Unpack[Options],
) -> tuple[Array | tuple[Array, Array], Pullback]:
    """LASER attention and its analytic gradient, for arrays of any namespace.

    Args:
        query: As in :func:`laser_attention`, and so are all other arguments.
        key: See there.
        value: See there.
        attn_mask: See there.
        bias: See there.
        backend: See there.
        **options: The keyword options of :func:`laser_attention`.

    Returns:
        ``(out, pullback)``, where out is ``(out, lse)`` with ``return_lse=True``. ``pullback(d_out, d_lse=None)``
        returns :class:`Gradients` ``(query, key, value, bias, beta)``, each in the shape and dtype of its argument;
        bias and beta are None where they were not given as arrays. It may be called more than once. The gradient is
        of first order: what it returns does not remember how it was computed.

    Raises:
        TypeError: As :func:`laser_attention`; from ``pullback`` for a cotangent of another namespace or dtype.
        ValueError: As :func:`laser_attention`; from ``pullback`` for a cotangent of another shape.
        Unsupported: No backend asked for can run this; says why.
    """
    problem, inputs = _problem.describe(query, key, value, attn_mask, bias, **options)
    chosen = _registry.select(problem, backend)
    forward = _run(chosen, problem, inputs)

    def pullback(d_out: Array, d_lse: Array | None = None) -> Gradients:
        """Gradients of all arguments from the cotangents of the output and of the log-sum-exp."""
        _problem.check_cotangent("d_out", d_out, forward.out)
        if d_lse is not None:
            _problem.check_cotangent("d_lse", d_lse, forward.lse)
        with _quiet(problem.framework):
            return chosen.backward(problem, inputs, forward, d_out, d_lse)

    return ((forward.out, forward.lse) if problem.return_lse else forward.out), pullback


@dataclass(frozen=True)
class Report:
    """Which backend runs a problem, and why each of the others does not.

    Attributes:
        problem: What was asked.
        chosen: The name of the backend that runs it, or None.
        how: Which of its kernels would run it, and why; None where it has but one way.
        refused: Reasons by name, for those that cannot.
        passed_over: Those that could, but rank behind the one chosen.
    """

    problem: Problem
    chosen: str | None
    how: str | None
    refused: dict[str, str]
    passed_over: tuple[str, ...]

    def __str__(self) -> str:
        """The backend chosen, then one line for each of the others."""
        lines = [f"backend: {self.chosen or 'none can run this'}"]
        lines += [f"    {line}" for line in (self.how or "").splitlines()]
        lines += [f"  {name}: could run this, and ranks behind" for name in self.passed_over]
        lines += [f"  {name}: {reason}" for name, reason in self.refused.items()]
        return "\n".join(lines)


def explain(
    query: Array,
    key: Array,
    value: Array,
    attn_mask: Array | None = None,
    bias: Array | None = None,
    *,
    backend: Backends = None,
    **options: Unpack[Options],
) -> Report:
    """Which backend would run this call, and why the others would not. Computes nothing.

    Args:
        query: As in :func:`laser_attention`, and so are all other arguments.
        key: See there.
        value: See there.
        attn_mask: See there.
        bias: See there.
        backend: See there.
        **options: The keyword options of :func:`laser_attention`.

    Returns:
        A report whose ``str`` has one line for each backend.

    Raises:
        TypeError: As :func:`laser_attention`.
        ValueError: As :func:`laser_attention`.
    """
    problem, _ = _problem.describe(query, key, value, attn_mask, bias, **options)
    return explain_problem(problem, backend)


def explain_problem(problem: Problem, backend: Backends = None) -> Report:
    """:func:`explain` for a problem that is described without arrays."""
    asked = list(_registry.backends().values()) if backend is None else _registry.named(backend)
    refused = {b.name: reason for b in asked if (reason := b.refuses(problem)) is not None}
    able = [b.name for b in asked if b.name not in refused]
    chosen = _registry.select(problem, able).name if able and backend is not None else None
    if able and backend is None:
        chosen = _registry.select(problem).name
    how = None if chosen is None else _registry.backends()[chosen].how(problem)
    return Report(problem, chosen, how, refused, tuple(name for name in able if name != chosen))


def _run(backend: Backend, problem: Problem, inputs: Inputs) -> Forward:
    with _quiet(problem.framework):
        return backend.forward(problem, inputs)


def _quiet(framework: str) -> AbstractContextManager[object]:
    binding = _binding(framework)
    return _array.quiet(framework) if binding is None else binding.quiet()


class _Binding(Protocol):
    """What a framework with automatic differentiation supplies: its module ``binding``."""

    def attention(self, problem: Problem, inputs: Inputs, backend: Backends) -> tuple[Array, Array]:
        """Output and log-sum-exp, differentiable by the framework."""

    def quiet(self) -> AbstractContextManager[object]:
        """A context in which the framework records nothing and warns of nothing."""


def _binding(framework: str) -> _Binding | None:
    """Where a framework with automatic differentiation learns the gradient; None for those without.

    Imported when the first array of that framework arrives, by a plain import statement: torch.compile traces it.
    """
    if framework == "torch":
        import laser_torch.binding

        return laser_torch.binding
    if framework == "jax":
        import laser_jax.binding

        return laser_jax.binding
    return None
