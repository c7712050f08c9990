"""`make gpu-check`, rehearsed on the CPU with tiny sizes: every part's figures and claims, and what it does without a GPU."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/bench"))
import gpu_check
import train_mora
import train_selora

CPU = torch.device("cpu")
SMALL = dict(image_size=16, width=8, heads=2, buckets=64, batch=4)
RUN = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"phantoms": 60, "pretrain_steps": 2}).items()]
TINY = gpu_check.Sizes(
    mora=train_mora.Config(depth=1, **SMALL),
    selora=train_selora.Config(text_width=8, **SMALL),
    vilt=train_mora.Config(depth=1, positions=6, **SMALL),
    vilt_methods=("head", "mora"), vilt_batches=(2, 4), studies=40, warm=1, block=1, blocks=2, waits=2, probes=1, requests=(1, 2), repeats=2,
    exported_mora=(*RUN, "--depth", "1", "--steps", "2", "--methods", "mora", "--lr", "0.01"),
    exported_selora=(*RUN, "--text-width", "8", "--vae-width", "8", "--vae-steps", "2", "--steps", "4", "--every", "2", "--sample-steps", "2", "--lr", "0.01", "full:0.001"),
)  # fmt: skip


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.report.pyplot", lambda: None)


def rehearse(name, sizes=TINY):
    """{what: figures} of a part on the CPU; no claim fails, and all can be written."""
    rows = gpu_check.run_part(name, gpu_check.PARTS[name], CPU, sizes)
    assert not [row for row in rows if row.passed is False], rows
    json.dumps([row.figures for row in rows], allow_nan=False)
    assert all(re.fullmatch(r"(\| [^|\n]+ ){3}\| (pass )?\|", str(row).replace("|  |", "| |")) for row in rows), rows
    return {row.what: row.figures for row in rows}


def test_step_times(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or model)  # that takes minutes
    rows = rehearse("step times")
    modes = ["float32", "amp", "compile", "amp and compile"]
    assert [*rows] == [f"{name}, {mode}" for name in ("MoRA", "SeLoRA") for mode in modes] + ["SeLoRA, probe in every step"]
    assert all(figures["ms"] > 0 and figures["over float32"] > 0 for figures in rows.values()) and len(compiled) == 4
    assert rows["MoRA, float32"]["over float32"] == rows["SeLoRA, float32"]["over float32"] == 1


def test_fisher_and_growth():
    rows = rehearse("Fisher and growth")
    assert [*rows] == [f"{name}, against the CPU" for name in ("current", "candidate", "expected", "ratio")] + ["every layer by a rank", "a run with rule ratio"]
    assert rows["every layer by a rank"] == {"layers grown": rows["ratio, against the CPU"]["layers"], "largest change of the output": 0.0}


def test_scores_that_differ_are_a_failure(monkeypatch):
    calls = []
    scores = gpu_check.selora.FisherProbe.scores

    def worse(probe):  # the second, on the device, is off in one layer by a thousandth
        found = scores(probe)
        calls.append(probe)
        name = [*found][3]
        return found | {name: found[name]._replace(candidate=found[name].candidate * (1 + 1e-3 * (len(calls) == 2)))}

    monkeypatch.setattr(gpu_check.selora.FisherProbe, "scores", worse)
    rows = [*gpu_check.fisher(CPU, TINY)]
    assert [row.what for row in rows if row.passed is False] == ["candidate, against the CPU"]


def test_host_waits(monkeypatch):
    rows = rehearse("host waits")
    assert len(rows) == 6 and all(figures == {"steps": 2, "waits": 0} for figures in rows.values())
    gates = train_mora.gates

    def waiting(*batch):  # as torch says it on a GPU
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another warning", stacklevel=1)
        return gates(*batch)

    monkeypatch.setattr(train_mora, "gates", waiting)
    rows = {row.what: row for row in gpu_check.waits(CPU, TINY)}
    line = next(n for n, text in enumerate((ROOT / "train_mora.py").read_text().splitlines(), 1) if "gate = gates(" in text)
    assert rows["MoRA"].figures == {"steps": 2, "waits": 2, "first": f"train_mora.py:{line}"}
    assert [row.passed for row in rows.values()] == [False, False, False, True, True, None]


def test_vilt():
    rows = rehearse("ViLT-B/32")
    assert [*rows] == [f"{method}, batch {batch}, {mode}" for batch in (2, 4) for mode in ("float32", "amp") for method in ("head", "mora")]
    large = gpu_check.Sizes().vilt
    assert (large.width, large.depth, large.patch, large.image_size, large.positions) == (768, 12, 32, 384, 40)


@pytest.mark.parametrize("name", ["MoRA", "SeLoRA"])
def test_export(name):
    rows = rehearse(f"{name}'s export")
    assert [*rows] == [f"{name}, parity with torch", f"{name}, request of 1", f"{name}, request of 2"]
    parity, one, two = rows.values()
    assert parity["largest difference"] <= parity["limit"] and parity["provider"] == "CPUExecutionProvider"
    assert all(figures["ms"] > 0 and figures["ms on the CPU provider"] > 0 for figures in (one, two))


def test_two_processes():
    figures = rehearse("two processes")["gloo"]
    assert 0 < figures["largest difference from one process"] <= 1e-5  # sums in another order: no copy of the one process


def test_the_tests_that_are_about_cuda_are_run_without_tyro(tmp_path, monkeypatch):
    sizes = replace(TINY, tests=tmp_path)
    monkeypatch.setenv("PYTEST_ADDOPTS", f"-c {os.devnull} --rootdir {tmp_path}")
    (tmp_path / "test_a.py").write_text("import tyro, train_mora\ndef test_on_cuda(): pass\ndef test_other(): assert False\n")
    (tmp_path / "test_b.py").write_text("import a_package_that_is_not_there\n")  # has no test with cuda in its name
    figures = rehearse("CUDA tests", sizes)["pytest -k cuda"]
    assert "1 passed, 1 deselected" in figures["result"]
    output = "F\nFAILED test_a.py::test_on_cuda - assert 1 == 2\n1 failed in 0.10s\n"
    monkeypatch.setattr(subprocess, "run", lambda *command, **how: subprocess.CompletedProcess(command, 1, output, ""))
    (row,) = gpu_check.suite(CPU, sizes)
    assert not row.passed and "1 failed" in row.figures["result"] and "test_on_cuda" in row.figures["first"]


def test_settings_without_tyro_are_those_with_it():
    import tyro

    flags = ["--methods", "head", "mora", "--lr", "0.01", "--out", "r", "--seeds", "2", "--amp", "--data", "x.npz", "--train-share", "0.5"]
    for config, argv in ((train_mora.Config, flags), (train_mora.Config, []), (train_selora.Config, ["--no-grain", "--rule", "gain"])):
        assert gpu_check.command_line(config, argv) == tyro.cli(config, args=argv)


# ---- the whole


def working(device, sizes):
    yield gpu_check.Row("a", "measured", {"ms": 1.0})
    print("not shown")
    yield gpu_check.Row("a", "claimed", {"ms": 2.0}, True)


def breaking(device, sizes):
    yield gpu_check.Row("b", "measured", {"ms": 3.0})
    raise RuntimeError("the reason\nand more lines")


def refusing(device, sizes):
    train_mora.main(["--methods", "unknown"])
    yield


def run(monkeypatch, capsys, **parts):
    """(exit code, stdout, what is in the file) of the command where these parts stand for its own."""
    monkeypatch.setattr(gpu_check, "why_no_gpu", lambda: "")
    monkeypatch.setattr(gpu_check, "machine", lambda: {"device": "none"})
    monkeypatch.setattr(gpu_check, "PARTS", parts)
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main([])
    return stopped.value.code, capsys.readouterr().out, json.loads(Path("runs/gpu-check.json").read_text())


def test_a_part_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys):
    code, output, written = run(monkeypatch, capsys, a=working)
    assert code == 0 and "not shown" not in output and "FAILED" not in output
    assert written["device"] == "none" and [row["passed"] for row in written["rows"]] == [None, True]
    code, output, written = run(monkeypatch, capsys, b=breaking, c=refusing, a=working)
    assert code == 1 and output.count("\n| a |") == 2
    assert "| b | the part | reason RuntimeError: the reason | FAILED |" in output and "c: 1 FAILED, first the part: reason SystemExit: error: " in output
    reasons = [row["figures"]["reason"] for row in written["rows"] if row["passed"] is False]
    assert reasons[1].startswith("SystemExit: error: method 'unknown' is not known") and len(written["rows"]) == 5
    assert [line.split(" ...")[0] for line in output.splitlines() if line.endswith(" ...")] == ["b", "c", "a"]  # a line when each starts


def test_a_mode_that_fails_leaves_the_others(monkeypatch):
    def broken(model):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    rows = [*gpu_check.step_times(CPU, TINY)]
    assert [row.what for row in rows if row.passed is False] == [f"{n}, {m}" for n in ("MoRA", "SeLoRA") for m in ("compile", "amp and compile")]
    assert all("no compiler" in row.figures["reason"] for row in rows if row.passed is False)


needs_none = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")


@needs_none
def test_without_a_gpu_and_without_tyro_one_line_says_so(tmp_path):
    start = f"import runpy, sys; sys.modules['tyro'] = None; sys.argv = ['gpu_check.py']; runpy.run_path({str(gpu_check.HERE)!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", start], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout and not [*tmp_path.iterdir()]
    assert re.fullmatch(r"error: gpu-check needs an NVIDIA GPU: torch \S+ (is built without CUDA|sees no CUDA device)\n", done.stderr), done.stderr


@needs_none
def test_without_a_gpu_nothing_is_written(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        gpu_check.main([])
    assert stopped.value.code == 2 and capsys.readouterr().err.count("\n") == 1 and not [*tmp_path.iterdir()]


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
def test_the_target_takes_the_python_that_is_named_and_no_other_target_does():
    def commands(target, **env):
        env = {key: value for key, value in os.environ.items() if key not in ("PY", "MAKEFLAGS", "MAKELEVEL")} | env
        return subprocess.run(["make", "-n", target], cwd=ROOT, env=env, capture_output=True, text=True, check=True).stdout

    assert commands("gpu-check", PY="python3") == "python3 tests/bench/gpu_check.py\n"  # nothing is installed
    assert commands("gpu-check").endswith(".venv/bin/python tests/bench/gpu_check.py\n")
    assert commands("test", PY="python3") == commands("test") and "python3 -m pytest" not in commands("test")
