"""Problems and expected results as files, for implementations in any language.

``export`` writes ``manifest.json`` and one folder per problem with raw little-endian arrays in C order; the
implementation writes its results beside them; ``check`` judges these. The layout is version 1:

    manifest.json                      format, version, and for each problem: number, id, sentence, dtype, options,
                                       inputs, expected, results, checksum
    0001/problem.txt                   the same as lines ``name value …``, for a program without a JSON reader
    0001/query.bin …                   inputs
    0001/expected.out.bin …            expected results, float64
    0001/allowed.out.bin …             allowed errors, float64: an entry for each of out and lse; for each gradient
                                       one number, the Frobenius norm of its error
    0001/result.out.bin …              what the implementation writes, in the dtype and shape that ``results`` names

bfloat16 is stored as its 16 bits, bool as a byte. Every file that is exported has its SHA-256 in the manifest.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from . import checks
from .case import Case
from .cases import all_cases
from .generate import DTYPES, Floats, checksum, little_endian
from .judge import Verdict
from .problems import GRADIENTS, Data, build
from .tolerance import Bounds, bounds
from .truth import Truth, truth

FORMAT, VERSION = "laser-conformance-vectors", 1
_KINDS = {"forward": False, "gradients": True}
_ARRAYS = {"results": ("file", "shape", "dtype")} | dict.fromkeys(
    ("inputs", "expected", "allowed"), ("file", "shape", "dtype", "sha256")
)


class Damaged(ValueError):
    """A directory that is not, or no longer, what was exported; says which files."""


def exportable(cases: Iterable[Case]) -> list[Case]:
    """Cases that are a problem and its results, and no more."""
    return [case for case in cases if case.check in _KINDS and not case.libraries]


def export(folder: Path, cases: Iterable[Case], dtypes: tuple[str, ...]) -> int:
    """Write problems and expected results; returns how many.

    Raises:
        FileExistsError: The folder is there and not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} is there already; export writes to a new or empty folder")
    folder.mkdir(parents=True, exist_ok=True)
    problems: list[dict[str, Any]] = []
    for case in exportable(cases):
        for dtype in dtypes:
            number = len(problems) + 1
            problems.append(_problem(folder, number, case, build(case.spec, dtype)))
    manifest = {"format": FORMAT, "version": VERSION, "problems": problems}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
    return len(problems)


def _problem(folder: Path, number: int, case: Case, data: Data) -> dict[str, Any]:
    place = folder / f"{number:04d}"
    place.mkdir()
    gradients = _KINDS[case.check]
    expected = truth(data, gradients=gradients)
    allowed = bounds(data, expected)
    inputs = dict(data.arrays)
    results = _wanted(case, data)
    wanted, errors = {"out": expected.out}, {"out": allowed.out}
    if data.spec.lse:
        wanted["lse"], errors["lse"] = expected.lse, allowed.lse
    if gradients:
        inputs["d_out"] = data.d_out
        if data.d_lse is not None:
            inputs["d_lse"] = data.d_lse
        for name, gradient in expected.gradients.items():
            wanted[f"d_{name}"] = gradient
            errors[f"d_{name}"] = np.asarray(allowed.gradients[name])
    wanted |= {"low": expected.low, "high": expected.high}
    s = data.spec
    options: dict[str, Any] = {
        "scale": data.scale,
        "beta": None if "beta" in inputs else s.beta,
        "is_causal": s.causal or False,
        "window_size": list(s.window) if s.window else None,
        "logits_soft_cap": s.soft_cap,
        "return_lse": s.lse,
        "gradients": gradients,
    }
    record = {
        "number": number,
        "id": case.id,
        "sentence": case.sentence,
        "dtype": data.dtype,
        "options": options,
        "inputs": {n: _write(place / f"{n}.bin", x) for n, x in inputs.items()},
        "expected": {n: _write(place / f"expected.{n}.bin", _doubles(x)) for n, x in wanted.items()},
        "allowed": {n: _write(place / f"allowed.{n}.bin", _doubles(x)) for n, x in errors.items()},
        "results": {
            n: {"file": f"{place.name}/result.{n}.bin", "shape": list(shape), "dtype": dtype}
            for n, (shape, dtype) in results.items()
        },
        "checksum": checksum(inputs),
    }
    (place / "problem.txt").write_text(_lines(record, data))
    return record


def _wanted(case: Case, data: Data) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of each result."""
    results = {"out": (data.spec.out_shape, data.dtype)}
    if data.spec.lse:
        results["lse"] = (data.spec.out_shape[:-1], data.compute_dtype)
    if _KINDS[case.check]:
        results |= {f"d_{n}": (data.arrays[n].shape, data.arrays[n].dtype.name) for n in GRADIENTS if n in data.arrays}
    return results


def _malformed(problem: Any) -> str | None:
    """What a record of a problem lacks, or None."""
    if not isinstance(problem, dict):
        return f"is a {type(problem).__name__}, not an object"
    for field, kind in {
        "number": int,
        "id": str,
        "dtype": str,
        "checksum": str,
        **dict.fromkeys(_ARRAYS, dict),
    }.items():
        if not isinstance(problem.get(field), kind):
            return f"has no {field}"
    if problem["dtype"] not in DTYPES:
        return f"has dtype {problem['dtype']!r}; allowed: {', '.join(DTYPES)}"
    for group, fields in _ARRAYS.items():
        for name, array in problem[group].items():
            if not isinstance(array, dict) or set(fields) - set(array):
                return f"{group}.{name} lacks one of {', '.join(fields)}"
    return None


def _doubles(x: Floats) -> Floats:
    return np.asarray(x).astype(np.float64)


def _write(path: Path, x: Floats) -> dict[str, Any]:
    content = little_endian(x)
    path.write_bytes(content)
    return {
        "file": f"{path.parent.name}/{path.name}",
        "shape": list(x.shape),
        "dtype": x.dtype.name,
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _lines(record: dict[str, Any], data: Data) -> str:
    """Sizes, options and arrays as lines; what is absent has no line, an unbounded side of a window is −1."""
    s = data.spec
    (hq, hkv), (lq, lk), (d, e) = s.heads, s.lengths, s.dims
    lines = [f"id {record['id']}", f"dtype {record['dtype']}", f"batch {' '.join(map(str, s.batch))}".rstrip()]
    lines.append(f"sizes {hq} {hkv} {lq} {lk} {d} {e}")
    for name, value in record["options"].items():
        if isinstance(value, bool):
            lines.append(f"{name} {int(value)}")
        elif isinstance(value, list):
            lines.append(f"{name} {' '.join('-1' if v is None else str(v) for v in value)}")
        elif value is not None:
            lines.append(f"{name} {value!r}" if isinstance(value, float) else f"{name} {value}")
    for kind in ("inputs", "results"):
        for name, array in record[kind].items():
            shape = " ".join(map(str, array["shape"]))
            lines.append(f"{kind.removesuffix('s')} {name} {array['dtype']} {shape}".rstrip())
    return "\n".join(lines) + "\n"


def check(folder: Path, who: str = "files") -> list[Verdict]:
    """Verdicts on the results in a folder.

    Raises:
        Damaged: The folder is not what was exported; names each file. Missing results are failed cases, not damage.
    """
    manifest = _manifest(folder)
    known = {case.id: case for case in all_cases()}
    damage = []
    for place, problem in enumerate(manifest["problems"]):
        if (fault := _malformed(problem)) is not None:
            damage.append(f"manifest.json: problems[{place}] {fault}")
            continue
        for array in (*problem["inputs"].values(), *problem["expected"].values(), *problem["allowed"].values()):
            path = folder / array["file"]
            if not path.is_file():
                damage.append(f"{array['file']} is missing")
            elif hashlib.sha256(path.read_bytes()).hexdigest() != array["sha256"]:
                damage.append(f"{array['file']} is not what was exported")
        if problem["id"] not in known:
            damage.append(f"problem {problem['number']} is of an unknown case, {problem['id']}")
            continue
        case = known[problem["id"]]
        data = build(case.spec, problem["dtype"])
        if checksum(_inputs(data, problem)) != problem["checksum"]:
            damage.append(f"problem {problem['number']} has other inputs than this version of the suite generates")
        wanted = {n: {"shape": list(shape), "dtype": dtype} for n, (shape, dtype) in _wanted(case, data).items()}
        asked = {n: {k: r[k] for k in ("shape", "dtype")} for n, r in problem["results"].items()}
        if (
            asked != wanted
            or not {*wanted, "low", "high"} <= {*problem["expected"]}
            or wanted.keys() - problem["allowed"]
        ):
            damage.append(f"problem {problem['number']} asks for other results than this version of the suite")
    if damage:
        raise Damaged(f"{folder}: " + "; ".join(damage))
    return [_judge(folder, problem, known[problem["id"]], who) for problem in manifest["problems"]]


def _inputs(data: Data, problem: dict[str, Any]) -> dict[str, Floats]:
    cotangents = {n: x for n, x in (("d_out", data.d_out), ("d_lse", data.d_lse)) if n in problem["inputs"]}
    return {**data.arrays, **{n: x for n, x in cotangents.items() if x is not None}}


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / "manifest.json"
    if not path.is_file():
        raise Damaged(f"{folder}: manifest.json is missing")
    try:
        manifest: dict[str, Any] = json.loads(path.read_text())
        form, version = manifest["format"], manifest["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path}: no manifest of this suite: {error}") from error
    if (form, version) != (FORMAT, VERSION):
        raise Damaged(f"{path}: got {form!r} version {version!r}; allowed: {FORMAT!r} version {VERSION}")
    if not isinstance(manifest.get("problems"), list):
        raise Damaged(f"{path}: has no list of problems")
    return manifest


def _judge(folder: Path, problem: dict[str, Any], case: Case, who: str) -> Verdict:
    start = time.perf_counter()
    data = build(case.spec, problem["dtype"])
    got, problems = {}, []
    for name, array in problem["results"].items():
        path = folder / array["file"]
        dtype, shape = _dtype(array["dtype"]), tuple(array["shape"])
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        if not path.is_file():
            problems.append(f"{array['file']} was not written")
        elif path.stat().st_size != size:
            problems.append(f"{array['file']} has {path.stat().st_size} bytes; {array['dtype']} {shape} has {size}")
        else:
            got[name] = np.frombuffer(path.read_bytes(), dtype.newbyteorder("<")).astype(dtype).reshape(shape)

    def read(kind: str, name: str) -> Floats:
        return _read(folder, problem[kind][name])

    expected = Truth(
        out=read("expected", "out"),
        lse=read("expected", "lse") if "lse" in problem["expected"] else np.zeros(0),
        low=read("expected", "low"),
        high=read("expected", "high"),
        size=np.zeros(0),
        gradients={n[2:]: read("expected", n) for n in problem["expected"] if n.startswith("d_")},
    )
    allowed = Bounds(
        out=read("allowed", "out"),
        lse=read("allowed", "lse") if "lse" in problem["allowed"] else np.zeros(0),
        gradients={n[2:]: float(read("allowed", n)) for n in problem["allowed"] if n.startswith("d_")},
    )
    found = checks.against(data, got, expected, allowed)
    problems += [f.problem for f in found if f.problem]
    ratios = [f.ratio for f in found if f.ratio is not None]
    status: Any = "failed" if problems else "passed"
    return Verdict(
        case=case.id,
        level=case.level,
        backend=who,
        arrays="files",
        dtype=problem["dtype"],
        status=status,
        ratio=max(ratios) if ratios else None,
        message="\n".join(problems[:6]),
        seconds=time.perf_counter() - start,
    )


def _dtype(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16) if name == "bfloat16" else np.dtype(name)


def _read(folder: Path, array: dict[str, Any]) -> Floats:
    content = np.frombuffer((folder / array["file"]).read_bytes(), "<f8")
    return content.astype(np.float64).reshape(array["shape"])
