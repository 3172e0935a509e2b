"""Problems as files: what is exported, damaged, and computed by a program in C."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from laser_conformance.cases import choose
from laser_conformance.cli import main
from laser_conformance.generate import little_endian
from laser_conformance.problems import build
from laser_conformance.vectors import Damaged, _dtype, check, export

import laser_core

CASES = tuple(
    case
    for name in ("forward/plain", "masks/causal-see-nothing", "masks/groups", "options/lse", "hostile/future-outliers")
    for case in choose(only=(name,))
    if case.id in (name, "options/lse+grad")
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert export(tmp_path / "v", CASES, ("float32", "bfloat16")) == 12
    return tmp_path / "v"


def solve(folder: Path) -> None:
    """Write what the reference returns."""
    cases = {case.id: case for case in CASES}
    for problem in json.loads((folder / "manifest.json").read_text())["problems"]:
        data = build(cases[problem["id"]].spec, problem["dtype"])
        out, pullback = laser_core.laser_attention_vjp(**data.arrays, **data.options(), backend="reference")
        results = dict(zip(("out", "lse"), out, strict=True)) if data.spec.lse else {"out": out}
        if problem["options"]["gradients"]:
            gradients = pullback(data.d_out, data.d_lse)
            results |= {f"d_{n}": getattr(gradients, n) for n in ("query", "key", "value")}
        for name, x in results.items():
            (folder / problem["results"][name]["file"]).write_bytes(little_endian(x))


def test_reference_is_accepted(folder):
    solve(folder)
    assert {v.status for v in check(folder)} == {"passed"}


def test_inputs_read_back(folder):
    problem = json.loads((folder / "manifest.json").read_text())["problems"][1]
    assert problem["dtype"] == "bfloat16"
    query = problem["inputs"]["query"]
    data = build(CASES[0].spec, "bfloat16")
    got = np.frombuffer((folder / query["file"]).read_bytes(), _dtype(query["dtype"])).reshape(query["shape"])
    assert np.array_equal(got, data.arrays["query"])


def test_missing_short_and_wrong_results_fail(folder):
    solve(folder)
    (folder / "0001/result.out.bin").unlink()
    (folder / "0002/result.out.bin").write_bytes(b"nonsense")
    wrong = folder / "0003/result.out.bin"
    content = np.frombuffer(wrong.read_bytes(), np.float32).copy()
    content[-1] = np.nan
    wrong.write_bytes(content.tobytes())
    verdicts = check(folder)
    assert [v.status for v in verdicts[:4]] == ["failed", "failed", "failed", "passed"]
    assert verdicts[0].message == "0001/result.out.bin was not written"
    assert "8 bytes" in verdicts[1].message
    assert "1 of" in verdicts[2].message


def test_damage_is_named_file_by_file(folder):
    (folder / "0001/query.bin").unlink()
    (folder / "0002/expected.out.bin").write_bytes(b"")
    with pytest.raises(Damaged, match=r"0001/query.bin is missing; 0002/expected.out.bin is not what was exported"):
        check(folder)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("{", "no manifest"),
        ("[]", "no manifest"),
        ('{"format": "laser-conformance-vectors", "version": 7}', "version 7; allowed: .* version 1"),
        (None, "manifest.json is missing"),
    ],
)
def test_foreign_manifests(folder, text, told, capsys):
    path = folder / "manifest.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(Damaged, match=told):
        check(folder)
    assert main(["check", str(folder)]) == 2


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("problems"), "has no list of problems"),
        (lambda m: m["problems"].append(3), r"problems\[12\] is a int, not an object"),
        (lambda m: m["problems"][0].pop("inputs"), r"problems\[0\] has no inputs"),
        (lambda m: m["problems"][0].update(dtype="int8"), "has dtype 'int8'; allowed: float64, "),
        (lambda m: m["problems"][1]["inputs"]["query"].pop("sha256"), "inputs.query lacks one of file, "),
        (lambda m: m["problems"][1]["results"].clear(), "problem 2 asks for other results"),
        (lambda m: m["problems"][2]["results"]["out"].update(shape=[1]), "problem 3 asks for other results"),
    ],
)
def test_damaged_manifests(folder, change, told):
    """Nobody is asked for less than was exported."""
    solve(folder)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=told):
        check(folder)


def test_other_inputs_are_noticed(folder):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["problems"][0]["checksum"] = "0" * 64
    manifest["problems"][1]["id"] = "forward/unheard-of"
    path.write_text(json.dumps(manifest))
    with pytest.raises(Damaged, match=r"problem 1 has other inputs.*problem 2 is of an unknown case"):
        check(folder)


def test_nothing_is_overwritten(folder):
    before = sorted(folder.rglob("*"))
    assert main(["export", str(folder), "--only", "forward/plain"]) == 2
    assert sorted(folder.rglob("*")) == before


def test_export_is_reproducible(folder, tmp_path):
    export(tmp_path / "again", CASES, ("float32", "bfloat16"))
    names = sorted(p.relative_to(folder) for p in folder.rglob("*.bin"))
    assert names
    for name in names:
        if not name.name.startswith(("expected", "allowed")):
            assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler named cc")
def test_a_program_in_c_is_judged(tmp_path):
    """Another language: reads problem.txt and the arrays, computes, and is accepted; with a flaw it is not."""
    source = Path(__file__).parent / "laser_vectors.c"
    flawed = tmp_path / "flawed.c"
    flawed.write_text(source.read_text().replace("(float)((top + log(sum) - l) / beta)", "(float)(top - l)"))
    folder = tmp_path / "v"
    export(folder, [case for case in CASES if case.check == "forward"], ("float32",))
    for program, text, expected in (("right", source, {"passed"}), ("flawed", flawed, {"failed"})):
        binary = tmp_path / program
        subprocess.run(["cc", "-O1", "-o", binary, text, "-lm"], check=True)
        for place in sorted(p for p in folder.iterdir() if p.is_dir()):
            assert subprocess.run([binary, place], check=False).returncode == 0, place
        assert {v.status for v in check(folder)} == expected
    assert main(["check", os.fspath(folder)]) == 1
