"""Write the tables of docs/performance.md and README.md from the result files: ``python benchmarks/report.py``.

Numbers in documents come from here and are never typed. ``--check`` writes nothing, and fails where one is out of date.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PEERS = {
    "numpy": "softmax attention in plain NumPy, scores materialised",
    "torch": "`scaled_dot_product_attention` (softmax)",
    "jax": "`jax.nn.dot_product_attention` (softmax), jitted",
}
GOALS = {  # issue and contract: times of the peer that LASER may take at the most, from which length on
    ("numpy", "forward", False): (1.0, 2048, 2048),
    ("numpy", "forward", True): (1 / 1.6, 2048, 2048),
    ("torch", "forward", False): (1.15, 2048, 10**9),
    ("torch", "forward", True): (1.15, 2048, 10**9),
    ("torch", "forward and backward", False): (1.2, 2048, 10**9),
    ("torch", "forward and backward", True): (1.2, 2048, 10**9),
    **{("jax", p, c): (1.0, 0, 10**9) for p in ("forward", "forward and backward") for c in (False, True)},
}
MEBI = 2**20
SANITIZERS = ("memcheck", "racecheck", "initcheck")


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def goal(record: dict[str, Any]) -> float | None:
    """The ratio that was asked of this record, or None."""
    limit, first, last = GOALS.get((record["framework"], record["pass"], record["causal"]), (None, 0, 0))
    return limit if limit is not None and first <= record["length"] <= last else None


def verdict(record: dict[str, Any]) -> str:
    """The goal, and whether it was reached."""
    limit = goal(record)
    if limit is None:
        return "–"
    return f"≤ {limit:.3g}: " + ("reached" if record["ratio"] <= limit else f"missed by {record['ratio'] - limit:.2f}")


def provenance(result: dict[str, Any]) -> str:
    """Where the numbers come from."""
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"Python {result['python']}, {versions}; {result['device']}"
    return f"{result['date']}, commit `{result['commit'][:12]}`, {where}."


def latest(kind: str) -> dict[str, Any]:
    """The latest result file of a kind, such as ``gpu``."""
    found = (json.loads(path.read_text()) for path in RESULTS.glob(f"*-{kind}.json"))
    return max(found, key=lambda result: str(result["date"]))


def newest(results: list[dict[str, Any]], framework: str) -> dict[str, Any]:
    """The latest result file that has a framework."""
    return max((r for r in results if framework in r["backends"]), key=lambda r: r["date"])


def cpu_page(results: list[dict[str, Any]]) -> str:
    """All records, a table for each framework."""
    b, h, _, d = results[0]["shape"]
    parts = [
        f"B = {b}, H = {h}, D = E = {d}, {results[0]['dtype']}. Ratios are times of the peer, the median over turns "
        "taken with it, of which there were as many as *turns* says; below 1 LASER is faster. Memory is the peak "
        "beside inputs and results. Error is the worst of sampled rows over the bound of [numerics](numerics.md), in "
        "the process that was timed.",
    ]
    for framework, peer in PEERS.items():
        result = newest(results, framework)
        records = [r for r in result["records"] if r["framework"] == framework]
        softmax = {(r["length"], r["causal"], r["pass"]): r for r in records if r["candidate"] == "softmax"}
        recipe = {(r["length"], r["causal"], r["pass"]): r for r in records if r["candidate"] == "recipe"}
        rows = []
        for r in records:
            if r["candidate"] != "laser":
                continue
            key = (r["length"], r["causal"], r["pass"])
            row = [
                str(r["length"]),
                "yes" if r["causal"] else "no",
                r["pass"],
                f"{softmax[key]['seconds'] * 1e3:.1f}",
                f"{r['seconds'] * 1e3:.1f}",
                f"{r['ratio']:.2f}",
                str(r["rounds"]),
            ]
            if recipe:
                row.append(f"{recipe[key]['ratio']:.2f}")
            else:
                row += [f"{x['memory'] / MEBI:.0f}" for x in (softmax[key], r)]
            rows.append([*row, f"{r['error_over_bound']:.2f}", verdict(r)])
        extra = ["recipe, ratio"] if recipe else ["softmax, MiB", "LASER, MiB"]
        header = ["L", "causal", "pass", "softmax, ms", "LASER, ms", "ratio", "turns", *extra, "error / bound", "goal"]
        parts += [
            f"### {framework}: beside {peer}",
            f"Backend: `{result['backends'][framework]}`. {provenance(result)}",
            table(header, rows),
        ]
    result = newest(results, "numpy")
    extra_import = result["import"]["laser_core"] - result["import"]["numpy"]
    parts += [
        "### Import",
        f"`import laser_core` takes {extra_import * 1e3:.0f} ms more than `import numpy` "
        f"({result['import']['numpy'] * 1e3:.0f} ms).",
    ]
    return "\n\n".join(parts)


def summary(results: list[dict[str, Any]]) -> str:
    """One line per framework: the ratios at the middle length."""
    rows = []
    for framework, peer in PEERS.items():
        result = newest(results, framework)
        own = [r for r in result["records"] if r["framework"] == framework and r["candidate"] == "laser"]
        at = {(r["causal"], r["pass"]): f"{r['ratio']:.2f}" for r in own if r["length"] == 2048}
        if at:
            passes = ("forward", "forward and backward")
            rows.append([framework, peer, *(at[(c, p)] for p in passes for c in (False, True))])
    header = ["arrays", "peer", "forward", "forward, causal", "with backward", "with backward, causal"]
    devices = "; ".join(sorted({r["device"] for r in results}))
    note = f"Times of the peer at L = 2048 on {devices}. Dates, versions and all lengths: "
    return table(header, rows) + "\n\n" + note + "[performance](docs/performance.md)."


def gpu_page(result: dict[str, Any]) -> str:
    """Speed beside cuDNN's softmax attention, memory, and accuracy, from a run of gpu.py or one of its kind."""
    timed = [r for r in result["records"] if "candidate" in r]
    names = list(dict.fromkeys(r["candidate"] for r in timed))
    others = [name for name in names if name != "softmax"]
    engines = any("engine" in r for r in timed)
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for r in timed:
        groups.setdefault((tuple(r["shape"]), r["dtype"], r["causal"], r["pass"]), {})[r["candidate"]] = r
    rows = []
    for (shape, dtype, causal, what), own in groups.items():
        laser = own["laser"]
        rows.append(
            [
                ",".join(map(str, shape)),
                dtype,
                "yes" if causal else "no",
                what,
                *(_cell(own, name, lambda r: f"{r['TFLOP/s']:.0f}") for name in names),
                *(_cell(own, name, lambda r: f"{r['speed']:.2f}") for name in others),
                *(
                    [_cell(own, "example", lambda r, ms=laser["ms"]: f"{r['ms'] / ms:.2f}")]
                    if "example" in names
                    else []
                ),
                f"{laser['TFLOP/s'] / result['product']:.0%}",
                " / ".join(_cell(own, name, lambda r: f"{r['host ms']:.2f}") for name in names),
                " / ".join(_cell(own, name, lambda r: f"{r['memory']['peak'] / MEBI:.0f}") for name in names),
                f"{laser['error']:.2f}",
                *([str(laser.get("engine", "–")).removeprefix("jax-")] if engines else []),
            ]
        )
    header = ["B,H,L,D", "dtype", "causal", "pass", *(f"{x}, TFLOP/s" for x in names)]
    header += [*(f"{x} ÷ softmax" for x in others), *(["laser ÷ example"] if "example" in names else [])]
    header += ["of the product's rate", "host, ms", "peak, MiB", "error / bound", *(["engine"] if engines else [])]
    widths = sorted({r["sigma"] for r in result.get("accuracy", [])})
    accuracy = []
    for dtype in dict.fromkeys(r["dtype"] for r in result.get("accuracy", [])):
        for name in dict.fromkeys(r["candidate"] for r in result.get("accuracy", [])):
            own = {r["sigma"]: r for r in result.get("accuracy", []) if (r["dtype"], r["candidate"]) == (dtype, name)}
            cells = [f"{own[s]['lost']} lost" if own[s]["lost"] else f"{own[s]['error']:.2f}" for s in widths]
            accuracy.append([dtype, name, *cells])
    order = " / ".join(names)
    about = (
        f"Backend: `{result.get('chosen', 'cupy-cuda')}`. Speeds are ratios to cuDNN's softmax attention in the same "
        "run, in turns; above 1 LASER is faster. TFLOP/s = 4·B·H·L²·D, half if causal, ×2.5 for the backward pass; a "
        f"product of 8192³ ran at {result['product']:.0f}. The device is kept busy while the host launches, "
        f"whose time is in a column of its own ({order}). Peak: of a forward and a backward pass, beside the inputs "
        "(the same order). *recipe* is log(softmax(QKᵀ)·exp(V − max V)) + max V on cuDNN, unguarded; *flash* is "
        "torch's FlashAttention-2, *portable* our kernel for any card, *kernel* the Hopper kernel without "
        "what is around it, *example* JAX's own Pallas kernel of softmax attention, in float16."
    )
    parts = [provenance(result), about, table(header, rows)]
    wrong = [f"{r['shape']}, {'causal' if r['causal'] else 'full'}" for r in result["records"] if "not timed" in r]
    if wrong:
        parts.append(f"Wrong, and so not timed: {'; '.join(wrong)}.")
    if accuracy:
        parts += [
            "Worst error of sampled rows over the bound of [numerics](numerics.md) by the standard deviation of the "
            "values, causal, (2,4,1024,128); *lost* counts outputs that are not finite.",
            table(["dtype", "", *(f"σ = {s}" for s in widths)], accuracy),
        ]
    return "\n\n".join(parts)


def gpu_summary(results: dict[str, dict[str, Any]]) -> str:
    """One line per shape: the speeds of the kernels of each framework beside cuDNN's softmax attention."""
    speeds: dict[tuple[str, bool], dict[tuple[str, str], str]] = {}
    for framework, result in results.items():
        for r in result["records"]:
            if r.get("candidate") == "laser" and r["dtype"] == "bfloat16":
                shape = ",".join(map(str, r["shape"]))
                speeds.setdefault((shape, r["causal"]), {})[framework, r["pass"]] = f"{r['speed']:.2f}"
    columns = [(framework, what) for framework in results for what in ("forward", "backward")]
    rows = [
        [shape, "yes" if causal else "no", *(own.get(column, "–") for column in columns)]
        for (shape, causal), own in speeds.items()
    ]
    devices = "; ".join(sorted({r["device"] for r in results.values()}))
    note = (
        f"Speed over that of cuDNN's softmax attention in the same run, bfloat16, on {devices}; above 1 LASER is "
        "faster. The recipe on cuDNN, memory, accuracy, dates and versions: [performance](docs/performance.md)."
    )
    return table(["B,H,L,D", "causal", *(f"{f}, {w}" for f, w in columns)], rows) + "\n\n" + note


def _cell(records: dict[str, dict[str, Any]], name: str, shown: Callable[[dict[str, Any]], str]) -> str:
    """A field of a candidate's record; a dash where it was not measured."""
    try:
        return shown(records[name])
    except KeyError:
        return "–"


def decode_page(result: dict[str, Any]) -> str:
    """One query against a long cache, from a run of decode.py."""
    rows = [
        [r["shape"], r["who"], f"{r['us']:.0f}", f"{r['TB/s']:.2f}", f"{r['of copy']:.2f}", f"{r['error']:.2f}"]
        for r in result["records"]
        if "TB/s" in r
    ]
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    where = f"{result['date']}, commit `{result['commit'][:12]}`, {versions}; {result['device']}"
    note = (
        f"{result['problem']}. A copy of 1 GiB in the same run: {result['copy TB/s']:.2f} TB/s, bytes read and written."
    )
    return f"{where}.\n\n{note}\n\n" + table(["cache", "who", "µs", "TB/s", "of the copy", "error / bound"], rows)


def start_page(result: dict[str, Any]) -> str:
    """The first calls of a process, from a run of start.py."""
    rows = [
        [r["kernels"], r["cache"], *(f"{r['seconds'][what]:.2f}" for what in ("import", "forward", "backward"))]
        for r in result["records"]
    ]
    note = (
        f"A process's first calls in CuPy, of a problem of {','.join(map(str, result['shape']))} in bfloat16, until "
        "the device is done; NVRTC compiles the kernels where CuPy's cache has none. *portable*: without Hopper's."
    )
    header = ["kernels", "cache", "import, s", "first forward, s", "first backward, s"]
    return f"{provenance(result)}\n\n{note}\n\n{table(header, rows)}"


def sanitize_page(results: list[dict[str, Any]]) -> str:
    """What compute-sanitizer found in small problems, from runs of sanitize.py."""
    parts = []
    for result in results:
        groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for r in result["records"]:
            groups.setdefault((r["backend"], r["kernels"], r["dtype"]), []).append(r)
        rows = []
        for (backend, kernels, dtype), records in groups.items():
            told = [[r["outcome"] for r in records if r["tool"] == tool] for tool in SANITIZERS]
            problems = {problem for r in records for problem in r["run"]}
            rows.append([f"`{backend}`", kernels, dtype, str(len(problems)), *(_told(outcomes) for outcomes in told)])
        where = f"{result['date']}, commit `{result['commit'][:12]}`; {result['card']}."
        parts += [where, table(["backend", "kernels", "dtype", "problems", *SANITIZERS], rows)]
    return "\n\n".join(parts)


def _told(outcomes: list[str]) -> str:
    """The outcomes of a tool on several sets of problems, in a cell."""
    found = [o for o in outcomes if o != "clean"]
    return "not run" if not outcomes else "**reports**" if found else "clean"


def filled(path: Path, name: str, text: str) -> str:
    """The file's text with the block of that name replaced."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    whole = path.read_text()
    if begin not in whole or end not in whole:
        raise SystemExit(f"{path.relative_to(ROOT)}: has no block {begin} … {end}")
    head, rest = whole.split(begin)
    return f"{head}{begin}\n\n{text}\n\n{end}{rest.split(end)[1]}"


def main() -> int:
    """Fill the blocks, or with --check compare them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where a file is out of date")
    check = parser.parse_args().check
    results = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("cpu*.json"))]
    gpu, gpu_jax, gpu_cupy = (latest(name) for name in ("gpu", "gpu-jax", "gpu-cupy"))
    sanitized = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*-sanitize-*.json"))]
    stale = False
    for path, name, text in (
        (ROOT / "docs" / "performance.md", "gpu", gpu_page(gpu)),
        (ROOT / "docs" / "performance.md", "gpu-jax", gpu_page(gpu_jax)),
        (ROOT / "docs" / "performance.md", "gpu-cupy", gpu_page(gpu_cupy)),
        (ROOT / "docs" / "performance.md", "cupy-start", start_page(latest("cupy-start"))),
        (ROOT / "docs" / "performance.md", "sanitize", sanitize_page(sanitized)),
        (ROOT / "docs" / "performance.md", "decode", decode_page(latest("decode"))),
        (ROOT / "docs" / "performance.md", "cpu", cpu_page(results)),
        (ROOT / "README.md", "gpu", gpu_summary({"torch": gpu, "JAX": gpu_jax, "CuPy": gpu_cupy})),
        (ROOT / "README.md", "benchmarks", summary(results)),
    ):
        new = filled(path, name, text)
        if new != path.read_text():
            stale = True
            if check:
                print(f"{path.relative_to(ROOT)}: out of date; run python benchmarks/report.py", file=sys.stderr)
            else:
                path.write_text(new)
    return int(check and stale)


if __name__ == "__main__":
    sys.exit(main())
