"""What the documentation shows is run: the examples, and the README's blocks of Python."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "docs" / "examples").glob("with_*.py"))
BLOCKS = re.findall(
    r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
)
FRAMEWORKS = ("torch", "jax", "flax", "array_api_strict", "cupy")


def execute(program: str) -> str:
    """The output of a program, or a skip where it imports a framework that is not installed."""
    for framework in FRAMEWORKS:
        needed = re.search(rf"^(import|from) {framework}\b", program, re.MULTILINE)
        if needed and importlib.util.find_spec(framework) is None:
            pytest.skip(f"needs {framework}, which is not installed")
    ran = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path: Path) -> None:
    assert execute(path.read_text(encoding="utf-8")) != ""


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_block_runs(number: int) -> None:
    execute(BLOCKS[number])


def test_there_is_something_to_run() -> None:
    assert len(EXAMPLES) >= 4
    assert len(BLOCKS) >= 3
