"""Sphinx configuration, and what is generated for the pages: they show no result that is not in a file."""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

from laser_conformance import html, markdown, report

from laser_core.cli import COMMANDS, _parser

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

import plots  # noqa: E402

project = "laser-attention"
copyright = "the laser-attention authors"
version = release = installed_version("laser-attention")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated", "_scripts"]
nitpicky = False
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3
suppress_warnings: list[str] = []

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the signature has them, and the text says more
autodoc_type_aliases = {"Array": "Array"}
napoleon_numpy_docstring = False
napoleon_use_rtype = False

html_theme = "furo"
html_title = "laser-attention"
html_extra_path = ["_generated/pages"]


def _write_help() -> None:
    """What ``--help`` prints, for cli.md."""
    os.environ["COLUMNS"] = "90"
    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    for command in COMMANDS:
        subparsers = next(
            action for action in _parser(command)._actions if isinstance(action, argparse._SubParsersAction)
        )
        (folder / f"{command}.txt").write_text(subparsers.choices[command].format_help(), encoding="utf-8")


def _write_conformance() -> None:
    """The table of conformance.md, and the report as a page of its own, from the result files."""
    records = [report.read(path) for path in sorted((HERE.parent / "conformance" / "results").glob("*.json"))]
    pages = HERE / "_generated" / "pages"
    pages.mkdir(parents=True, exist_ok=True)
    (HERE / "_generated" / "conformance.md").write_text(markdown.matrix(records) + "\n", encoding="utf-8")
    (pages / "conformance-report.html").write_text(html.page(records), encoding="utf-8")


_write_help()
plots.draw(HERE / "_generated")
_write_conformance()
