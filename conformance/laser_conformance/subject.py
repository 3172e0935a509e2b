"""What is judged: a registered backend by name, on the arrays of one library; called as a user would call it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

import laser_core

from .arrays import Library, poisoned
from .compare import Finding, like, same_bits
from .generate import Floats
from .problems import GRADIENTS, Data

Array = Any


class Refused(Exception):
    """The backend says, before anything is computed, that it cannot run a problem."""


class NotThere(Refused):
    """The array library, not the backend, lacks what a problem needs."""


@dataclass(frozen=True)
class Results:
    """What came back, as NumPy arrays; and what was found out about the arrays themselves."""

    values: dict[str, Floats]  # out, lse, d_query, …
    findings: list[Finding]


@dataclass(frozen=True)
class Subject:
    """A backend and the arrays that it is given."""

    backend: str
    library: Library

    def why_not(self, data: Data) -> str | None:
        """The reason of the backend's record for not running a problem, or None."""
        library = self.library
        if data.dtype not in library.dtypes:
            raise NotThere(f"{library.name} has no {data.dtype}" + (f" on {library.device}" if library.device else ""))
        with self.library.context(data.dtype):
            arguments = {n: self.library.put(x) for n, x in data.arrays.items()}
            report = laser_core.explain(**arguments, **data.options(), backend=self.backend)
        return report.refused.get(self.backend)

    def forward(self, data: Data) -> Results:
        """``laser_attention``."""
        return self._call(data, gradients=False)

    def gradients(self, data: Data) -> Results:
        """``laser_attention_vjp`` and its pullback."""
        return self._call(data, gradients=True)

    def _call(self, data: Data, gradients: bool) -> Results:
        library = self.library
        if (reason := self.why_not(data)) is not None:
            raise Refused(reason)
        with library.context(data.dtype), poisoned(library.name):
            given = dict(data.arrays)
            cotangents = {"d_out": data.d_out} | ({"d_lse": data.d_lse} if data.d_lse is not None else {})
            before = {n: np.array(x) for n, x in (given | cotangents).items()}
            arguments = {n: library.put(x) for n, x in given.items()}
            options = data.options()
            pulled = {n: library.put(x) for n, x in cotangents.items()} if gradients else {}
            if gradients:
                result, pullback = laser_core.laser_attention_vjp(**arguments, **options, backend=self.backend)
            else:
                result = laser_core.laser_attention(**arguments, **options, backend=self.backend)
            got: dict[str, Array] = {"out": result}
            if data.spec.lse:
                if not isinstance(result, tuple) or len(result) != 2:
                    raise TypeError(f"return_lse=True gave a {type(result).__name__}; it should be (out, lse)")
                got["out"], got["lse"] = result
            findings = [f for f in self._kinds(data, arguments["query"], got) if f.problem]
            if findings:
                return Results({}, findings)  # nothing that can be pulled back through, or compared
            if gradients:
                try:
                    grads = pullback(**pulled)
                except laser_core.Unsupported as error:
                    raise Refused(f"no gradient: {error}") from error
                own = {f"d_{n}": getattr(grads, n, None) for n in GRADIENTS if n in arguments}
                for name in GRADIENTS:
                    if name not in arguments and getattr(grads, name, None) is not None:
                        raise TypeError(
                            f"the gradient of {name} is {type(getattr(grads, name)).__name__}; it should be None"
                        )
                findings = [f for f in self._kinds(data, arguments["query"], own) if f.problem]
                if findings:
                    return Results({}, findings)
                got |= own
            values = {n: library.get(a) for n, a in got.items()}
            for name, array in {**arguments, **pulled}.items():
                finding = same_bits(name, library.get(array), before[name], "the call has changed it")
                if finding.problem:
                    findings.append(finding)
        return Results(values, findings)

    def _kinds(self, data: Data, query: Array, got: dict[str, Array]) -> list[Finding]:
        shapes = {"out": data.spec.out_shape, "lse": data.spec.out_shape[:-1]}
        dtypes = {"out": data.dtype, "lse": data.compute_dtype}
        found = []
        for name, array in got.items():
            argument = data.arrays.get(name.removeprefix("d_"))
            shape = shapes[name] if argument is None else argument.shape
            dtype = dtypes[name] if argument is None else argument.dtype.name
            found.append(like(name, array, query, shape, dtype))
        return found
