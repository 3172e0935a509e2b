"""The report as one self-contained page: matrix, drill-down, and error against the range of the values."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from . import report
from .case import LEVELS
from .generate import DTYPES
from .judge import Verdict, from_json
from .recipe import recipe_shares, sweep

COLOURS = (
    *("#2563eb", "#0d9488", "#c026d3", "#ea580c", "#65a30d", "#7c3aed"),
    *("#0891b2", "#a16207", "#db2777", "#475569", "#15803d", "#818cf8"),
)
RECIPE = "#dc2626"

Run = tuple[str, dict[str, Any], list[Verdict]]


def page(records: Sequence[dict[str, Any]]) -> str:
    """The page for the records of one or more runs; those of one backend on the same arrays are put together."""
    runs: dict[str, tuple[dict[str, Any], list[Verdict]]] = {}
    for record in records:
        for verdict in map(from_json, record["verdicts"]):
            name = f"{verdict.backend} on {verdict.arrays}"
            runs.setdefault(name, (record, []))[1].append(verdict)
    listed = [(name, record, verdicts) for name, (record, verdicts) in runs.items()]
    failed = sum(v.status == "failed" for _, _, verdicts in listed for v in verdicts)
    passed = sum(v.status == "passed" for _, _, verdicts in listed for v in verdicts)
    summary = f"{passed} cases passed, {failed} failed" if listed else "nothing was run"
    body = [
        f"<header><h1>LASER attention: conformance</h1><p class={'bad' if failed else 'good'}>{summary}</p></header>",
        _matrix(listed),
        _plots(listed),
        "<h2>Cases</h2>",
        *(_cases(run) for run in listed),
        _footer(listed),
        _SCRIPT,
    ]
    head = "<!doctype html><html lang=en><meta charset=utf-8><title>LASER conformance</title>"
    return head + _STYLE + "\n".join(body)


def _matrix(runs: list[Run]) -> str:
    """Backends × levels: outcome and worst error as a share of what is allowed."""
    head = "".join(f'<th scope=col title="{_text(sentence)}">{level}</th>' for level, sentence in LEVELS.items())
    rows = []
    for name, _, verdicts in runs:
        levels = report.by_level(verdicts)
        cells = [_cell(levels.get(level, []), f"{_anchor(name)}-{level}") for level in LEVELS]
        rows.append(f"<tr><th scope=row>{_text(name)}</th>{''.join(cells)}</tr>")
    return (
        "<h2>Levels</h2><div class=scroll><table class=matrix><thead><tr><td></td>"
        f"{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        "<p class=note>Percentages: the worst error as a share of what is allowed. Refused: the backend itself says, "
        "before anything is computed, that it does not run these problems.</p>"
    )


def _cell(verdicts: list[Verdict], anchor: str) -> str:
    if not verdicts:
        return "<td class=none>–</td>"
    outcome = report.outcome(verdicts)
    ratio = report.worst([v for v in verdicts if v.status == "passed"] or verdicts)
    refused = sum(v.status == "refused" for v in verdicts)
    failed = sum(v.status == "failed" for v in verdicts)
    ran = failed + sum(v.status == "passed" for v in verdicts)
    lines = {"pass": f"{ran} passed", "FAIL": f"{failed} of {ran} failed"}.get(outcome, "")
    more = f"<small>{refused} refused</small>" if refused and ran else ""
    share = f"<small>{_share(ratio)}</small>" if ratio is not None and outcome == "pass" else ""
    why = "\n".join(report.reasons(verdicts, "refused") + report.reasons(verdicts, "skipped"))
    word = {"pass": "pass", "FAIL": "fail"}.get(outcome, outcome)
    link = f'<a href="#{anchor}">{word}</a>'
    return f'<td class="{word}" title="{_text(why)}">{link}<small>{lines}</small>{share}{more}</td>'


def _share(ratio: float) -> str:
    if ratio < 10:
        return f"{ratio:.0%}"
    return "∞" if math.isinf(ratio) else (f"{ratio:.0f}×" if ratio < 1e5 else f"{ratio:.0e}×")


def _anchor(name: str) -> str:
    return _text(name.replace(" ", "-"))


def _text(text: str) -> str:
    return html.escape(text, quote=True)


# -------------------------------------------------------------------------------------------------------------- cases


def _cases(run: Run) -> str:
    name, _, verdicts = run
    parts = []
    for level, own in report.by_level(verdicts).items():
        failed = [v for v in own if v.status == "failed"]
        rows = "".join(_row(v, _anchor(name)) for v in sorted(own, key=lambda v: v.status != "failed"))
        state = report.outcome(own).lower()
        parts.append(
            f'<details id="{_anchor(name)}-{level}"{" open" if failed else ""}>'
            f"<summary><b class={state}>{state}</b> {level} <span>{_text(LEVELS[level])}</span></summary>"
            f"<div class=scroll><table class=cases><thead><tr><th>case<th>dtype<th>result<th>error / allowed<th>seconds"
            f"<th>message<tbody>{rows}</table></div></details>"
        )
    return f"<h3>{_text(name)}</h3>{''.join(parts)}"


def _row(v: Verdict, run: str) -> str:
    """A case: what became of it, and the command that runs it alone."""
    share = "" if v.ratio is None else _share(v.ratio)
    bar = "" if v.ratio is None else f'<i style="width:{min(v.ratio, 1) * 60:.0f}px"></i>'
    message = "".join(f"<p>{_text(line)}</p>" for line in v.message.splitlines())
    return (
        f'<tr class={v.status} id="{_case_anchor(run, v.case, v.dtype)}"><td>{_text(v.case)}<td>{v.dtype}<td>{v.status}'
        f"<td class=share>{bar}{share}<td>{v.seconds:.2f}<td>{message}<code>{_text(v.reproduce)}</code>"
    )


def _case_anchor(run: str, case: str, dtype: str) -> str:
    return _text(f"{run}-{case}-{dtype}")


# -------------------------------------------------------------------------------------------------------------- plots


Line = tuple[str, str, list[tuple[float, float, str]]]  # a name, a colour, and σ, share and link of each point


def _plots(runs: list[Run]) -> str:
    """Worst error against the range of the values, for each dtype, with the published recipe beside it."""
    plots = []
    for dtype in DTYPES:
        lines: list[Line] = []
        for index, (name, _, verdicts) in enumerate(runs):
            by_case = {v.case: v for v in verdicts if v.dtype == dtype and v.status in ("passed", "failed")}
            points = []
            for sigma, case in sweep():
                if (v := by_case.get(case.id)) is not None:
                    link = _case_anchor(_anchor(name), v.case, v.dtype)
                    points.append((sigma, math.inf if v.ratio is None else v.ratio, link))
            if points:
                lines.append((name, COLOURS[index % len(COLOURS)], points))
        if lines:
            recipe = [(sigma, ratio, "") for sigma, ratio in recipe_shares(dtype)]
            plots.append(_plot(dtype, [*lines, ("published recipe", RECIPE, recipe)]))
    if not plots:
        return ""
    return (
        "<h2>Error against the range of the values</h2><p class=note>value ~ N(0, σ²), causal, β = 1: the worst error "
        "as a share of what is allowed. Above the line is wrong; a point at the top edge is not finite, or more than "
        f"100 times off.</p><div class=plots>{''.join(plots)}</div>"
    )


_WIDTH, _HEIGHT, _LEFT, _TOP, _BOTTOM = 430, 260, 46, 26, 34


def _plot(dtype: str, lines: list[Line]) -> str:
    sigmas = [s for s, _ in sweep()]
    low, high = math.log10(min(sigmas)), math.log10(max(sigmas))
    bottom, top = -3.0, 2.0

    def x(sigma: float) -> float:
        return _LEFT + (math.log10(sigma) - low) / (high - low) * (_WIDTH - _LEFT - 14)

    def y(share: float) -> float:
        at = min(max(math.log10(share) if share > 0 else bottom, bottom), top)
        return _TOP + (top - at) / (top - bottom) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [f'<text class=title x="{_LEFT}" y="16">{dtype}</text>']
    for power in range(int(bottom), int(top) + 1):
        at = y(10.0**power)
        label = {2: "100×", 1: "10×", 0: "allowed", -1: "10 %", -2: "1 %", -3: "0.1 %"}[power]
        parts.append(f'<path class="{"limit" if power == 0 else "grid"}" d="M{_LEFT} {at:.1f}H{_WIDTH - 14}"/>')
        parts.append(f'<text class=tick text-anchor=end x="{_LEFT - 5}" y="{at + 3:.1f}">{label}</text>')
    for sigma in sigmas:
        parts.append(
            f'<text class=tick text-anchor=middle x="{x(sigma):.1f}" y="{_HEIGHT - _BOTTOM + 14}">{sigma:g}</text>'
        )
    parts.append(
        f'<text class=tick text-anchor=middle x="{(_LEFT + _WIDTH) / 2}" y="{_HEIGHT - 4}">σ of the values</text>'
    )
    legend = []
    for name, colour, points in lines:
        dash = " stroke-dasharray='5 3'" if colour == RECIPE else ""
        path = "M" + "L".join(f"{x(s):.1f} {y(r):.1f}" for s, r, _ in points)
        parts.append(f'<path d="{path}" fill=none stroke="{colour}" stroke-width=1.8{dash} />')
        for s, r, link in points:
            title = f"{_text(name)}, σ = {s:g}: {_share(r)} of what is allowed"
            dot = f'<circle cx="{x(s):.1f}" cy="{y(r):.1f}" r=3 fill="{colour}"><title>{title}</title></circle>'
            parts.append(f'<a href="#{link}">{dot}</a>' if link else dot)
        legend.append(f'<span><i style="background:{colour}"></i>{_text(name)}</span>')
    label = f"error against range, {dtype}"
    svg = f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role=img aria-label="{label}">{"".join(parts)}</svg>'
    return f"<figure>{svg}<figcaption>{''.join(legend)}</figcaption></figure>"


def _footer(runs: list[Run]) -> str:
    """Where and with what."""
    lines = []
    for name, record, _ in runs:
        versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
        commit = f", commit {record['commit']}" if record.get("commit") else ""
        device = f", {record['device']}" if record.get("device") else ""
        cases = f"; cases: {record['cases']}" if record.get("cases") else ""
        where = f"Python {record['python']}, {record['machine']}{device}; {versions}{cases}"
        lines.append(f"<li>{_text(name)}: {_text(record['date'] + commit)}, {_text(where)}")
    return f"<footer><ul>{''.join(lines)}</ul></footer>"


_STYLE = """<style>
:root{color-scheme:light dark;--line:#8884;--good:#15803d;--bad:#dc2626;--dim:#777}
body{font:15px/1.45 system-ui,"DejaVu Sans",sans-serif;max-width:1180px;margin:2rem auto;padding:0 1.2rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.15rem;margin:2.2rem 0 .6rem}h3{font-size:1rem;margin:1.4rem 0 .4rem}
header{display:flex;align-items:baseline;gap:1rem;flex-wrap:wrap}header p{margin:0;font-weight:600}
.good{color:var(--good)}.bad{color:var(--bad)}.note{color:var(--dim);font-size:.87rem;max-width:62rem}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.86rem}
.matrix td,.matrix th{border:1px solid var(--line);padding:.35rem .5rem;text-align:center;font-weight:500}
.matrix tbody th{text-align:left;white-space:nowrap}
.matrix small{display:block;white-space:nowrap;color:var(--dim);font-size:.74rem}
td.pass{background:#16a34a22}td.fail{background:#dc262633}td.refused,td.skipped{background:#a1a1aa22}
.matrix a{color:inherit;font-weight:650;text-decoration:none}
.pass>a{color:var(--good)}.fail>a{color:var(--bad)}.none{color:var(--dim)}
details{border-top:1px solid var(--line);padding:.35rem 0}summary{cursor:pointer}summary span{color:var(--dim)}
summary b{display:inline-block;min-width:4.2rem}b.pass{color:var(--good)}b.fail{color:var(--bad)}
.cases{margin:.5rem 0 .8rem;width:100%}.cases th{text-align:left;color:var(--dim);font-weight:500}
.cases td,.cases th{padding:.16rem .7rem .16rem 0;border-bottom:1px solid var(--line);vertical-align:top}
.cases tr.failed td:nth-child(3){color:var(--bad);font-weight:650}.cases .share{white-space:nowrap;min-width:7rem}
.cases .share i{display:inline-block;height:.55rem;background:#2563eb88;margin-right:.4rem;border-radius:2px}
.cases td:first-child{white-space:nowrap}.cases tr.failed .share i{background:#dc262688}
.cases tr.refused,.cases tr.skipped{color:var(--dim)}code{display:block;font-size:.8rem;color:var(--dim)}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(440px,1fr));gap:1rem}
figure{margin:0;border:1px solid var(--line);border-radius:8px;padding:.5rem}svg{width:100%;height:auto;display:block}
svg text{font-size:10px;fill:currentColor}svg .title{font-size:13px;font-weight:650}svg .tick{opacity:.65}
.grid{stroke:var(--line);fill:none}.limit{stroke:currentColor;stroke-width:1.2;fill:none;opacity:.7}
figcaption{font-size:.78rem;display:flex;flex-wrap:wrap;gap:.2rem .9rem}figcaption i{display:inline-block;width:.7rem;
height:.7rem;border-radius:2px;margin-right:.3rem}footer{color:var(--dim);font-size:.78rem;margin-top:2rem}
.cases p{margin:0}:target{outline:2px solid #2563eb66;outline-offset:2px}
</style>"""

# A link to a level or a case opens what it is in: browsers do that for a link into a closed <details>, not to one.
_SCRIPT = """<script>
function reveal(){
  const target=document.getElementById(decodeURIComponent(location.hash.slice(1)));
  const details=target&&target.closest("details");
  if(details){details.open=true;target.scrollIntoView()}
}
addEventListener("hashchange",reveal);reveal();
</script>"""
