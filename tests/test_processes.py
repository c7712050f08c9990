"""Two processes under torchrun do what one does with the whole batch, in both scripts; bfloat16 and compiled steps run."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY
from test_train_selora import TINY as TINY_SELORA

import train_mora
import train_selora
from minilora import checkpoint, cli, processes, selora

WORKER = """
import sys
from pathlib import Path
import numpy as np
import torch
import train_selora
from minilora import diffusion, loop, processes, samples, selora
from minilora.ranks import Job
from minilora.unet import Denoiser

torch.set_num_threads(1)
out = Path(sys.argv[1])
cfg = train_selora.Config(out=out, steps=5, every=2, batch=8, lam=1.2)
with processes.processes(torch.device("cpu")), loop.Stopper() as stop:
    torch.manual_seed(0)
    model = Denoiser(width=8, text_width=8, text_depth=1, heads=2, buckets=64, positions=6).double()
    torch.nn.init.normal_(model.unet.last.weight, std=0.1)
    selora.inject(model)
    pairs = train_selora.Pairs(torch.randn(40, 4, 16, 16).double(), torch.randint(3, 64, (40, 6)), diffusion.alphas_cumprod())
    _, history = train_selora.adapt(cfg, pairs, model, Job("ratio", "ratio", 0, 1), 0, 0.02, np.arange(40), loop.Log(out / "log.jsonl"), stop)
    heldout = samples.heldout_loss(model, pairs, np.arange(21))
    torch.save({"state": model.state_dict(), "history": history, "heldout": heldout}, out / f"rank{processes.world()[0]}.pt")
"""


def launch(n, *argv, cwd):
    """Run a script in n processes of torchrun, or alone; returns stdout."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n)] if n > 1 else []
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    for _ in range(3):
        done = subprocess.run([sys.executable, *torchrun, *map(str, argv)], env=env, cwd=cwd, capture_output=True, text=True)
        if "terminate called without an active exception" not in done.stderr:
            break  # torch's own threads abort so when a process of gloo has done all and ends, some 1 in 40 times on a busy machine
        for folder in (cwd / "runs", cwd.parent / "r2"):
            shutil.rmtree(folder, ignore_errors=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_two_processes_grow_and_train_as_one_with_the_whole_batch(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        launch(n, "worker.py", str(n), cwd=tmp_path)
    one, *two = (torch.load(tmp_path / name) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt"))
    assert len(one["history"]) == 3 and len(set(one["history"][-1][1].values())) > 1  # grew twice, not everywhere alike
    for each in two:
        assert each["history"] == one["history"] and each["heldout"] == pytest.approx(one["heldout"], rel=1e-9)
        for name, value in one["state"].items():
            assert torch.allclose(each["state"][name], value, rtol=1e-9, atol=1e-9), name  # (some gradients are 0 but for rounding)
    assert all(torch.equal(two[0]["state"][k], v) for k, v in two[1]["state"].items())  # bit for bit among themselves


FINDINGS = """
import sys
from pathlib import Path
import numpy as np
import torch
import train_mora
from minilora import loop, processes
from minilora.mora import attach
from minilora.vit import ViT

torch.set_num_threads(1)
out = Path(sys.argv[1])
with processes.processes(torch.device("cpu")), loop.Stopper() as stop:
    torch.manual_seed(0)
    model = attach(ViT(("note",), 5, width=8, depth=1, heads=2, buckets=32, positions=4), "mora", 2).double()
    present = torch.ones(40, 1).double()
    known = torch.rand(40, 5) < torch.linspace(0, 0.6, 40)[:, None]  # most unlabelled, unevenly; some batches of a process have none
    labels = torch.where(known, torch.randint(0, 2, (40, 5)), -1)
    task = {"inputs": {"note": torch.randint(3, 32, (40, 4))}, "labels": labels, "train": np.arange(40), "present": present, "shuffled": present,
            "content": {"any:0.7": None}}
    cfg = train_mora.Config(out=out, steps=60, batch=4)
    train_mora.adapt(cfg, model, "mora", 0, 0.01, task, loop.Log(out / "log.jsonl"), stop)
    torch.save(model.state_dict(), out / f"rank{processes.world()[0]}.pt")
"""


def test_two_processes_weigh_the_known_findings_as_one(tmp_path):
    (tmp_path / "worker.py").write_text(FINDINGS)
    logs = []
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        launch(n, "worker.py", str(n), cwd=tmp_path)
        logs.append([json.loads(line)["loss"] for line in (tmp_path / f"{n}/log.jsonl").read_text().splitlines()])
    one, *two = (torch.load(tmp_path / name) for name in ("1/rank0.pt", "2/rank0.pt", "2/rank1.pt"))
    for each in two:
        for name, value in one.items():
            assert torch.allclose(each[name], value, rtol=0, atol=1e-5), (name, (each[name] - value).abs().max())
    assert logs[1] == pytest.approx(logs[0], abs=1e-5)


@pytest.mark.parametrize("script,argv", [("train_selora.py", [*TINY_SELORA, "--steps", "6"]), ("train_mora.py", [*TINY, "--methods", "head", "mora"])])
def test_both_scripts_run_under_torchrun_and_rank_0_writes(tmp_path, monkeypatch, capsys, script, argv):
    reports = []
    for n in (1, 2):
        (tmp_path / str(n)).mkdir()
        monkeypatch.chdir(tmp_path / str(n))
        if n == 1:
            {"train_mora.py": train_mora, "train_selora.py": train_selora}[script].main([*argv, "--out", "../r1"])
        said = capsys.readouterr().out if n == 1 else launch(2, ROOT / script, *argv, "--out", "../r2", cwd=tmp_path / "2")
        assert said.count("run folder: ") == 1 and ("bytes sent" in said) == (n == 2)
        reports.append(json.loads((tmp_path / f"r{n}/metrics.json").read_text())["methods"])
        assert sorted(p.name for p in (tmp_path / f"r{n}").iterdir()) == sorted(p.name for p in (tmp_path / "r1").iterdir())
    for name, one in reports[0].items():
        key = "heldout_loss" if "heldout_loss" in one else "macro_f1"
        assert reports[1][name][key] == pytest.approx(one[key], rel=1e-5)
    bases = [sorted((tmp_path / f"{n}/runs/base").iterdir()) for n in (1, 2)]  # rank 0 pretrains alone, as one process does
    assert [p.read_bytes() for p in bases[0]] == [p.read_bytes() for p in bases[1]]


def test_a_batch_that_cannot_be_divided_is_refused(monkeypatch):
    monkeypatch.setattr(processes, "world", lambda: (1, 3))
    assert processes.own_part(torch.arange(6), 6).tolist() == [1, 4]
    with pytest.raises(processes.Refused, match="--batch 8 cannot be divided among 3 processes"):
        processes.own_part(torch.arange(8), 8)


def test_bfloat16_and_compiled_steps(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.report.pyplot", lambda: None)
    compiler = torch.compile  # the graph is captured as ever; generating its kernels would take minutes
    monkeypatch.setattr(torch, "compile", lambda model: compiler(model, backend="eager"))
    for name, flags in (("plain", []), ("amp", ["--amp"]), ("compiled", ["--compile"])):
        train_selora.main([*TINY_SELORA, "--out", name, "--lam", "1.05", *flags])
    loss, ranks = {}, {}
    for name in ("plain", "amp", "compiled"):
        method = json.loads((tmp_path / name / "metrics.json").read_text())["methods"]["ratio"]
        loss[name], ranks[name] = method["heldout_loss"][0], method["ranks"][0]
    assert loss["amp"] != loss["plain"] == pytest.approx(loss["amp"], rel=0.02)
    assert loss["compiled"] == pytest.approx(loss["plain"], rel=1e-4) and ranks["compiled"] == ranks["plain"]
    state = checkpoint.load(tmp_path / "amp/adapters/ratio-s0.pt")["state"]
    assert all(v[p].dtype == torch.float32 for v in state.values() for p in "AB")
    for name, flags in (("a", []), ("b", ["--amp"])):
        train_mora.main([*TINY, "--methods", "head", "mora", "--out", name, *flags])
    a, b = (checkpoint.load(tmp_path / name / "adapters/mora-s0.pt")["state"]["blocks.0.mora.down"] for name in "ab")
    assert not torch.equal(a, b) and torch.allclose(a, b, atol=0.05)


def test_growth_does_not_compile_again():
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 5))
    selora.inject(model)
    counter = CompileCounter()
    compiled, x = torch.compile(model, backend=counter), torch.randn(2, 3, 4, 4)
    for layer in selora.adapters(model).values():
        torch.nn.init.normal_(layer.B)
    for _ in range(7):
        y = compiled(x)
        y.sum().backward()
        assert torch.allclose(y, model(x), atol=1e-5)  # the new rank counts in the graph that is there
        selora.grow(model, None, "cheapest", budget=10**6)
    assert counter.frame_count == 1 and all(layer.rank == 8 for layer in selora.adapters(model).values())


def test_fisher_and_growth_under_bfloat16_and_compiled():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.Flatten(), torch.nn.Linear(4 * 16, 5))
    selora.inject(model, None, 2)
    for layer in selora.adapters(model).values():
        layer.B.data[:2].normal_()
    x = torch.randn(16, 3, 4, 4)
    each = lambda predict: predict(x).float().square().mean(1)
    exact = selora.fisher_loop(model, each(model))
    with torch.autocast("cpu", torch.bfloat16):
        with selora.FisherProbe(model) as probe:
            each(model).mean().backward()
        half, before = probe.scores(), model(x)
    for name, score in exact.items():  # bfloat16 has 8 bits: squares of gradients agree to some percent
        assert half[name][:2] == pytest.approx(score[:2], rel=0.03) and half[name].ratio == pytest.approx(score.ratio, rel=0.03)
    compiled = torch.compile(model, backend="eager")
    was = compiled(x)
    selora.grow(model, None, "cheapest", budget=10**6)
    assert torch.equal(compiled(x), was)
    with torch.autocast("cpu", torch.bfloat16):
        assert before.dtype == torch.bfloat16 and torch.equal(model(x), before)  # growth changes the output by exactly 0


def test_presets_fill_in_sizes_that_are_not_given(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cfg = cli.with_preset(train_selora.Config(preset="large", width=64), train_selora.PRESETS)
    assert cfg.width == 64 and cfg.image_size == 64 and train_selora.check(cfg)["size"] == 32
    cfg = cli.with_preset(train_mora.Config(preset="large"), train_mora.PRESETS)
    assert (cfg.width, cfg.depth, cfg.patch, cfg.image_size) == (768, 12, 32, 384)
    with pytest.raises(SystemExit):
        train_mora.main(["--preset", "huge"])
    assert capsys.readouterr().err == "error: --preset 'huge' is not known; use small, base, large\n"
