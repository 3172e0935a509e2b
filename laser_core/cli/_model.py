"""A small byte-level causal language model in NumPy, with its backward pass written out.

Every piece is a function that returns its result and its pullback, as :func:`laser_core.laser_attention_vjp` does:
the pullback takes the cotangent of the result and returns those of the arguments. The model is a chain of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

import laser_core

Floats: TypeAlias = NDArray[np.floating[Any]]
Integers: TypeAlias = NDArray[np.integer[Any]]
Parameters: TypeAlias = dict[str, Floats]

BYTES = 256


@dataclass(frozen=True)
class Sizes:
    """The sizes of the model: blocks, width of the residual stream, attention heads, and bytes of context."""

    layers: int = 2
    width: int = 64
    heads: int = 2
    context: int = 128


def initial(sizes: Sizes, seed: int, dtype: Any = np.float32) -> Parameters:
    """Random weights of variance 1/fan-in; those that write to the residual stream are scaled down with depth."""
    random = np.random.default_rng(seed)

    def normal(*shape: int, std: float) -> Floats:
        weights: Floats = (std * random.standard_normal(shape)).astype(dtype)
        return weights

    width = sizes.width
    into, out_of = width**-0.5, (2 * sizes.layers * width) ** -0.5
    parameters = {"embedding": normal(BYTES, width, std=0.5), "positions": normal(sizes.context, width, std=0.1)}
    for n in range(sizes.layers):
        parameters[f"{n}.attention.gain"] = np.ones(width, dtype)
        for name in ("query", "key", "value"):
            parameters[f"{n}.attention.{name}"] = normal(width, width, std=into)
        parameters[f"{n}.attention.out"] = normal(width, width, std=out_of)
        parameters[f"{n}.mlp.gain"] = np.ones(width, dtype)
        parameters[f"{n}.mlp.up"] = normal(width, 4 * width, std=into)
        parameters[f"{n}.mlp.down"] = normal(4 * width, width, std=out_of / 2)
    parameters["gain"] = np.ones(width, dtype)
    parameters["logits"] = normal(width, BYTES, std=into)
    return parameters


def linear(x: Floats, weight: Floats) -> tuple[Floats, Callable[[Floats], tuple[Floats, Floats]]]:
    """``y = x W``; dx = dy Wᵀ and dW = xᵀ dy."""

    def pullback(dy: Floats) -> tuple[Floats, Floats]:
        rows, columns = weight.shape
        return dy @ weight.T, x.reshape(-1, rows).T @ dy.reshape(-1, columns)

    return x @ weight, pullback


def rms_norm(x: Floats, gain: Floats) -> tuple[Floats, Callable[[Floats], tuple[Floats, Floats]]]:
    """``y = gain · n`` with n = x/√(mean x² + ε); dx = (dn − n · mean(dn · n))/√(mean x² + ε)."""
    inverse = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    n = x * inverse

    def pullback(dy: Floats) -> tuple[Floats, Floats]:
        dn = dy * gain
        dx = inverse * (dn - n * np.mean(dn * n, axis=-1, keepdims=True))
        return dx, np.sum(dy * n, axis=tuple(range(dy.ndim - 1)))

    return n * gain, pullback


def squared_relu(x: Floats) -> tuple[Floats, Callable[[Floats], Floats]]:
    """``y = max(x, 0)²``; dx = 2 max(x, 0) dy."""
    positive = np.maximum(x, 0)
    return positive * positive, lambda dy: 2 * positive * dy


def cross_entropy(logits: Floats, targets: Integers) -> tuple[Floats, Callable[[], Floats]]:
    """The loss in nats of every position, and the cotangent of the logits from their mean: (softmax − one-hot)/n."""
    shifted = logits - np.max(logits, axis=-1, keepdims=True)
    weights = np.exp(shifted)
    total = np.sum(weights, axis=-1)
    chosen = np.take_along_axis(shifted, targets[..., None], axis=-1)[..., 0]

    def pullback() -> Floats:
        d: Floats = weights / total[..., None]
        np.put_along_axis(d, targets[..., None], np.take_along_axis(d, targets[..., None], -1) - 1, -1)
        return d / targets.size

    return np.log(total) - chosen, pullback


Observer: TypeAlias = Callable[[Floats, Floats, Floats], None]


def attention(
    x: Floats, parameters: Parameters, name: str, heads: int, beta: float, observe: Observer | None = None
) -> tuple[Floats, Callable[[Floats], tuple[Floats, Parameters]]]:
    """Causal multi-head attention; ``laser_core`` computes the attention itself, forward and backward."""
    weights = {part: parameters[f"{name}.{part}"] for part in ("query", "key", "value", "out")}
    projected = {part: linear(x, weights[part]) for part in ("query", "key", "value")}
    q, k, v = (_split(y, heads) for y, _ in projected.values())
    (o, lse), attention_pullback = laser_core.laser_attention_vjp(q, k, v, beta=beta, is_causal=True, return_lse=True)
    if observe is not None:
        observe(q, k, lse)
    y, out_pullback = linear(_merge(o), weights["out"])

    def pullback(dy: Floats) -> tuple[Floats, Parameters]:
        do, d_out = out_pullback(dy)
        gradients = attention_pullback(_split(do, heads))
        dx = np.zeros_like(x)
        d_weights = {f"{name}.out": d_out}
        for part, (_, projection_pullback) in projected.items():
            d_part, d_weights[f"{name}.{part}"] = projection_pullback(_merge(getattr(gradients, part)))
            dx += d_part
        return dx, d_weights

    return y, pullback


def _split(x: Floats, heads: int) -> Floats:
    """(B, L, H·D) as (B, H, L, D)."""
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).swapaxes(1, 2)


def _merge(x: Floats) -> Floats:
    """(B, H, L, D) as (B, L, H·D)."""
    batch, heads, length, dim = x.shape
    return x.swapaxes(1, 2).reshape(batch, length, heads * dim)


def mlp(x: Floats, parameters: Parameters, name: str) -> tuple[Floats, Callable[[Floats], tuple[Floats, Parameters]]]:
    """Two linear maps with a squared ReLU between them."""
    hidden, up_pullback = linear(x, parameters[f"{name}.up"])
    active, relu_pullback = squared_relu(hidden)
    y, down_pullback = linear(active, parameters[f"{name}.down"])

    def pullback(dy: Floats) -> tuple[Floats, Parameters]:
        d_active, d_down = down_pullback(dy)
        dx, d_up = up_pullback(relu_pullback(d_active))
        return dx, {f"{name}.up": d_up, f"{name}.down": d_down}

    return y, pullback


def loss(
    parameters: Parameters, sizes: Sizes, text: Integers, beta: float, observe: Observer | None = None
) -> tuple[Floats, Callable[[], Parameters]]:
    """The loss of every next byte, and the gradient of its mean.

    Args:
        parameters: As :func:`initial` makes them.
        sizes: The sizes they were made for.
        text: Bytes ``(B, context + 1)``: each position predicts the one after it.
        beta: The inverse temperature of the attention: 0 is softmax attention, 1 is LASER.
        observe: Called in every block with q, k ``(B, H, L, D)`` and the log-sum-exp ``(B, H, L)``.

    Returns:
        Nats ``(B, context)`` and a function that returns the gradient by parameter.
    """
    bytes_in, targets = text[:, :-1], text[:, 1:]
    x = parameters["embedding"][bytes_in] + parameters["positions"]
    pullbacks: list[tuple[str, Any, Any]] = []
    for n in range(sizes.layers):
        for part in (f"{n}.attention", f"{n}.mlp"):
            normal, norm_pullback = rms_norm(x, parameters[f"{part}.gain"])
            if part.endswith("attention"):
                y, part_pullback = attention(normal, parameters, part, sizes.heads, beta, observe)
            else:
                y, part_pullback = mlp(normal, parameters, part)
            pullbacks.append((f"{part}.gain", norm_pullback, part_pullback))
            x = x + y
    normal, norm_pullback = rms_norm(x, parameters["gain"])
    logits, logits_pullback = linear(normal, parameters["logits"])
    nats, loss_pullback = cross_entropy(logits, targets)

    def pullback() -> Parameters:
        gradients: Parameters = {}
        d_normal, gradients["logits"] = logits_pullback(loss_pullback())
        dx, gradients["gain"] = norm_pullback(d_normal)
        for gain, before, through in reversed(pullbacks):
            d_normal, inside = through(dx)
            d_branch, gradients[gain] = before(d_normal)
            gradients |= inside
            dx = dx + d_branch
        gradients["positions"] = np.sum(dx, axis=0)
        gradients["embedding"] = np.zeros_like(parameters["embedding"])
        np.add.at(gradients["embedding"], bytes_in, dx)
        return gradients

    return nats, pullback


class Adam:
    """Adam (arXiv 1412.6980), with β₁ = 0.9 and β₂ = 0.99."""

    def __init__(self, parameters: Parameters) -> None:
        """Start with both moments at zero."""
        self._first = {name: np.zeros_like(x) for name, x in parameters.items()}
        self._second = {name: np.zeros_like(x) for name, x in parameters.items()}
        self._step = 0

    def update(self, parameters: Parameters, gradients: Parameters, rate: float) -> None:
        """Change ``parameters`` in place by one step."""
        self._step += 1
        unbias = math.sqrt(1 - 0.99**self._step) / (1 - 0.9**self._step)
        for name, gradient in gradients.items():
            first, second = self._first[name], self._second[name]
            first += 0.1 * (gradient - first)
            second += 0.01 * (gradient * gradient - second)
            parameters[name] -= rate * unbias * first / (np.sqrt(second) + 1e-8)


def rates(steps: int, peak: float) -> Iterator[float]:
    """The learning rate of each step: a linear rise over the first tenth, then a cosine down to a tenth."""
    rise = max(1, steps // 10)
    for step in range(steps):
        fall = 0.55 + 0.45 * math.cos(math.pi * max(0, step - rise) / max(1, steps - rise))
        yield peak * min((step + 1) / rise, fall)
