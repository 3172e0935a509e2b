"""Write the support table of README.md from the result files: ``python conformance/support.py``.

``--check`` writes nothing, and fails where the table is out of date.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from pathlib import Path

from laser_conformance import markdown, report

import laser_core

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "conformance" / "results"
BEGIN, END = "<!-- support:begin -->", "<!-- support:end -->"


def table() -> str:
    """What README.md says of the backends of this distribution."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = project["entry-points"]["laser_core.backends"]
    summaries = {name: laser_core.backends()[name].summary for name in own}
    return markdown.support(map(report.read, sorted(RESULTS.glob("*.json"))), summaries)


def main() -> int:
    """Fill the block, or with --check compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where README.md is out of date")
    path = ROOT / "README.md"
    text = path.read_text(encoding="utf-8")
    if BEGIN not in text or END not in text:
        raise SystemExit(f"{path}: has no block {BEGIN} … {END}")
    new = f"{text.split(BEGIN)[0]}{BEGIN}\n\n{table()}\n\n{END}{text.split(END)[1]}"
    if parser.parse_args().check:
        if new != text:
            print("README.md: the support table is out of date; run python conformance/support.py", file=sys.stderr)
        return int(new != text)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
