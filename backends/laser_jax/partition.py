"""How a call is split over the devices of a mesh, and over the axis of a ``vmap``.

Batch and heads are independent of each other, so a call whose arrays are sharded along them runs where its parts are,
without communication, but for one sum over devices of the gradients of what those share. Three callers ask for it:

    automatic axes   a Shardy rule tells the partitioner so, and each device runs the engine on its part
    explicit axes    the types of the arrays say where they are: a ``shard_map`` over the batch and the heads of query
    vmap             the mapped axis becomes one more batch axis of the problem, for the engine's grid to cover
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from laser_core import Backend, Forward, Inputs, Problem

Array: TypeAlias = jax.Array
Attend: TypeAlias = Callable[[Problem, Inputs], tuple[Array, Array]]

AXES = {  # of all arrays by name; batch axes are further on the left. Arrays may have fewer, or 1 where they broadcast
    "query": ("heads", "rows", "dims"),
    "key": ("kv", "columns", "dims"),
    "value": ("kv", "columns", "values"),
    "attn_mask": ("heads", "rows", "columns"),
    "bias": ("heads", "rows", "columns"),
    "beta": ("heads", "values"),
    "query_seq_lengths": (),
    "key_value_seq_lengths": (),
    "out": ("heads", "rows", "values"),
    "residual": ("heads", "rows", "values"),
    "rest": ("heads", "rows", "values"),
    "c": ("kv", "values"),
    "flags": ("heads",),
    "d_out": ("heads", "rows", "values"),
    "lse": ("heads", "rows"),
    "d_lse": ("heads", "rows"),
}
BROADCAST = ("attn_mask", "bias", "beta", "query_seq_lengths", "key_value_seq_lengths")


class Operands(NamedTuple):
    """What a pass takes: the inputs, and backward the result of the forward pass and the cotangents."""

    inputs: Inputs
    done: Forward | None = None
    d_out: Array | None = None
    d_lse: Array | None = None


@dataclasses.dataclass(frozen=True)
class Step:
    """The forward or the backward pass of a backend for a problem, as a function of arrays alone."""

    problem: Problem
    backend: Backend

    def run(self, operands: Operands) -> Any:
        """The pass on one device: a ``Forward``, or ``Gradients``."""
        inputs, done, d_out, d_lse = operands
        if done is None:
            return self.backend.forward(self.problem, inputs)
        return self.backend.backward(self.problem, inputs, done, d_out, d_lse)

    def of(self, inputs: Inputs) -> Step:
        """The same pass for arrays of another batch and other heads."""
        return dataclasses.replace(self, problem=resized(self.problem, inputs))


def run(step: Step, operands: Operands) -> Any:
    """The pass under vmap, and on whatever devices its operands are."""
    mapped = jax.custom_batching.custom_vmap(functools.partial(_placed, step))
    mapped.def_vmap(functools.partial(_batched, step))
    return mapped(operands)


def resized(problem: Problem, inputs: Inputs) -> Problem:
    """The problem of these arrays, whose batch and heads may be others."""
    mask, bias, beta = (None if x is None else tuple(x.shape) for x in (inputs.attn_mask, inputs.bias, inputs.beta))
    *batch, heads, _, _ = inputs.query.shape
    return dataclasses.replace(
        problem,
        batch=tuple(batch),
        query_heads=heads,
        key_value_heads=inputs.key.shape[-3],
        mask_shape=mask,
        bias_shape=bias,
        beta_shape=beta,
    )


def axes_of(problem: Problem, name: str, x: Any) -> tuple[str, ...]:
    """What each axis of an array is; "" where it broadcasts."""
    batch = () if name == "beta" else tuple(f"batch{i}" for i in range(len(problem.batch)))
    named = (*batch, *AXES[name])
    return tuple("" if n == 1 else axis for n, axis in zip(x.shape, named[len(named) - x.ndim :], strict=True))


def named_map(function: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """``function(name, leaf, …)`` of all arrays of a tree; several arrays of one field have its name."""

    def name(path: Any) -> str:
        found: str = next(key.name for key in reversed(path) if hasattr(key, "name"))
        return found

    return jax.tree_util.tree_map_with_path(lambda path, *leaves: function(name(path), *leaves), tree, *rest)


# ------------------------------------------------------------------------------------------------------------- vmap


def _batched(step: Step, size: int, batched: list[Operands], operands: Operands) -> tuple[Any, Any]:
    """The pass with one more batch axis; or the engine's own code mapped, where each example has its own β or dβ."""
    reverse, beta = operands.done is not None, operands.inputs.beta is not None
    result = None
    if not (beta and (reverse or batched[0].inputs.beta)):

        def widen(name: str, x: Array, mapped: bool) -> Array:
            if not mapped:
                if name in BROADCAST and not (reverse and name == "bias"):  # dbias is one for each example
                    return x
                x = jnp.broadcast_to(x, (size, *x.shape))
            missing = len(step.problem.batch) + len(AXES[name]) + 1 - x.ndim
            return jnp.reshape(x, (size, *(1,) * missing, *x.shape[1:]))

        wide = named_map(widen, operands, batched[0])
        other = step.of(wide.inputs)
        if other.backend.refuses(other.problem) is None:
            result = run(other, wide)
            if reverse and result.bias is not None:
                result = result._replace(bias=jnp.reshape(result.bias, (size, *(step.problem.bias_shape or ()))))
    if result is None:
        result = jax.vmap(step.run, (jax.tree.map(lambda mapped: 0 if mapped else None, batched[0]),))(operands)
    return result, jax.tree.map(lambda _: True, result)


# ---------------------------------------------------------------------------------------------------------- devices


@functools.partial(jax.jit, static_argnums=0)
def _placed(step: Step, operands: Operands) -> Any:
    """The pass with the rule of how to split it, unless it is being split by hand already."""
    mesh = jax.sharding.get_abstract_mesh()
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        return step.run(operands)
    traced, shapes = jax.make_jaxpr(step.run, return_shape=True)(operands)
    if traced.effects:  # the callbacks of an interpreter: custom_partitioning has no tokens to order them by
        return step.run(operands)
    split = custom_partitioning(step.run)
    split.def_partition(
        partition=functools.partial(_partition, step),
        decode_shardings=False,  # JAX fails on what a mesh cannot say, such as heads over half of an axis
        sharding_rule=_rule(step, operands, shapes),
    )
    return split(operands)


class Split(NamedTuple):
    """Over which axes of a mesh each axis of a problem is split."""

    problem: Problem
    parts: dict[str, tuple[str, ...]]

    @classmethod
    def like_query(cls, problem: Problem, sizes: Mapping[str, int], spec: PartitionSpec) -> Split:
        """As query is split, as far as that goes evenly: key/value heads first, then the heads of a group."""
        axes = [() if part is None else (part,) if isinstance(part, str) else tuple(part) for part in spec]
        axes += [()] * (len(problem.batch) + 1 - len(axes))

        def evenly(over: tuple[str, ...], length: int) -> tuple[str, ...]:
            count = 0
            while count < len(over) and over[count] in sizes and length % _product(sizes, over[: count + 1]) == 0:
                count += 1
            return over[:count]

        parts = {f"batch{i}": evenly(axes[i], length) for i, length in enumerate(problem.batch)}
        heads = axes[len(problem.batch)]
        kv = evenly(heads, problem.key_value_heads)
        group = evenly(heads[len(kv) :], problem.group) if _product(sizes, kv) == problem.key_value_heads else ()
        return cls(problem, parts | {"kv": kv, "heads": kv + group})

    def spec(self, name: str, x: Any) -> PartitionSpec:
        """Where the parts of an array are."""
        return PartitionSpec(*(self.parts.get(axis) or None for axis in axes_of(self.problem, name, x)))

    def summed(self, name: str, x: Any) -> tuple[str, ...]:
        """The axes of the mesh over which the gradient ``x`` of what all devices there share is a sum."""
        own = {axis for named in axes_of(self.problem, name, x) for axis in self.parts.get(named, ())}
        used = (axis for named, axes in self.parts.items() if named != "kv" for axis in axes)
        return tuple(axis for axis in used if axis not in own)


def _product(sizes: Mapping[str, int], axes: tuple[str, ...]) -> int:
    return math.prod(sizes[axis] for axis in axes)


def _rule(step: Step, operands: Operands, results: Any) -> SdyShardingRule:
    """Batch axes and heads pass through; all others must be whole on every device."""
    problem = step.problem
    heads: Any = CompoundFactor("kv", "group")
    if problem.group == 1:
        heads = "kv"
    elif problem.key_value_heads == 1:
        heads = "group"
    whole: list[str] = []
    alone = iter(range(10**6))

    def factors(name: str, x: Any) -> ArrayMapping:
        found = []
        for axis in axes_of(step.problem, name, x):
            if axis == "":  # a factor of its own
                axis = f"one{next(alone)}"
            elif axis == "heads":
                axis = heads
            elif axis in ("rows", "columns", "dims", "values") and axis not in whole:
                whole.append(axis)
            found.append(axis)
        return ArrayMapping(*found)

    is_mapping = lambda x: isinstance(x, ArrayMapping)  # noqa: E731
    taken, given = (
        tuple(jax.tree.leaves(named_map(factors, tree), is_leaf=is_mapping)) for tree in (operands, results)
    )
    sizes: dict[str, Any] = {"group": problem.group} if isinstance(heads, CompoundFactor) else {}
    return SdyShardingRule(taken, given, need_replication_factors=tuple(whole), **sizes)


def _partition(step: Step, mesh: Mesh, shapes: tuple[Operands], results: Any) -> Any:
    """What each device computes, and where its operands and results are."""
    (operands,) = shapes
    split = Split.like_query(step.problem, mesh.shape, _spec(mesh, operands.inputs.query))

    def place(name: str, x: Any) -> NamedSharding:
        return NamedSharding(mesh, split.spec(name, x))

    def part(operands: Operands) -> Any:
        result = step.of(operands.inputs).run(operands)
        if operands.done is None:
            return result
        over = named_map(split.summed, results)
        return jax.tree.map(lambda x, axes: lax.psum(x, axes) if axes else x, result, over)

    return mesh, part, named_map(place, results), (named_map(place, operands),)


def _spec(mesh: Mesh, x: Any) -> PartitionSpec:
    """How an array is sharded, in the words of a mesh; whole where it has none for it."""
    names = [name for name, size in mesh.shape.items() if size > 1]
    orders = [axes for count in range(len(names) + 1) for axes in itertools.permutations(names, count)]
    parts = [n // part for n, part in zip(x.shape, x.sharding.shard_shape(x.shape), strict=True)]
    for axes in itertools.product(*([o for o in orders if _product(mesh.shape, o) == n] for n in parts)):
        used = [name for axis in axes for name in axis]
        spec = PartitionSpec(*axes)
        if len(used) == len(set(used)) and NamedSharding(mesh, spec).is_equivalent_to(x.sharding, x.ndim):
            return spec
    return PartitionSpec()


def by_types(problem: Problem, inputs: Inputs, attend: Attend) -> tuple[Array, Array] | None:
    """``attend`` in a ``shard_map`` as the type of query says; None where it says nothing."""
    kind = jax.typeof(inputs.query).sharding
    mesh = kind.mesh
    explicit = {
        n: mesh.shape[n] for n, t in zip(mesh.axis_names, mesh.axis_types, strict=True) if t == AxisType.Explicit
    }
    if not explicit:
        return None
    split = Split.like_query(problem, explicit, kind.spec)
    specs = named_map(split.spec, inputs)
    inputs = jax.tree.map(lambda x, spec: jax.sharding.reshard(x, NamedSharding(mesh, spec)), inputs, specs)
    results = tuple(
        split.spec(name, jax.ShapeDtypeStruct(shape, problem.dtype))
        for name, shape in (("out", problem.out_shape), ("lse", problem.lse_shape))
    )
    mapped = jax.shard_map(
        lambda inputs: attend(resized(problem, inputs), inputs),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=results,
        axis_names=set(explicit),
    )
    return mapped(inputs)
