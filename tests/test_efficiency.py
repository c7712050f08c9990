"""tests/bench/efficiency.py at a tiny size: the sizes it measures at, its rows, and what it says that a run keeps."""

import argparse
import json
import sys

import pytest
import torch
from conftest import ROOT

sys.path.insert(0, str(ROOT / "tests/bench"))
import efficiency
import train_mora
from minilora import checkpoint, pretrained
from minilora.models import count, make_vit
from minilora.phantoms import phantoms
from minilora.task import vit_sizes

POOLER_AND_HEAD = 768 * 769 + 769 * 1536 + 2 * 1536 + 1537 * 4  # at B/32: linear; linear, norm, linear
THEIRS = {"image_size": "image_size", "channels": "num_channels", "patch": "patch_size", "width": "hidden_size", "depth": "num_hidden_layers",
          "heads": "num_attention_heads", "buckets": "vocab_size"}  # fmt: skip


def counts(method):
    with torch.device("meta"):
        return count(efficiency.adapted("base32", method))


def test_mora_trains_less_than_the_papers_share():
    mora = counts("mora")
    assert mora["adapter_params"] == 9216 and mora["trainable_params"] == 9216 + POOLER_AND_HEAD
    assert mora["trainable_params"] / mora["total_params"] < 0.016
    assert counts("prompt") == counts("lora") == mora and counts("head")["trainable_params"] == POOLER_AND_HEAD
    full = counts("full")
    assert full["trainable_params"] == full["total_params"] == mora["total_params"] - 9216


def test_the_sizes_are_those_of_the_published_model_and_of_the_script():
    large = efficiency.config_of("base32")
    assert {ours: large[ours] for ours in THEIRS} == {ours: pretrained.SIZES[theirs] for ours, theirs in THEIRS.items()}
    assert large["positions"] == pretrained.SIZES["max_position_embeddings"] - 1 and large["image_token"] and large["eps"] == 1e-12
    cfg = train_mora.Config(image_size=32, buckets=2048)
    study = phantoms(500, 2, "target", 32).select(("image", "note"))
    default = make_vit(efficiency.config_of("default")).config
    wanted = vit_sizes(cfg, study, study) | {"classes": len(study.class_names), "modalities": [*study.modalities]}
    assert {name: default[name] for name in wanted} == wanted


def test_every_method_is_a_row_and_is_kept_as_a_run_keeps_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minilora.report.pyplot", lambda: None)
    # A process each takes seconds: here the parts run in this one.
    monkeypatch.setattr(efficiency, "apart", lambda *part: json.loads(json.dumps(efficiency.run_part(*part))))
    efficiency.main(["--size", "tiny", "--threads", "1", "--out", "found/figures.json"])
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads((tmp_path / "found/figures.json").read_text())["sizes"]["tiny"]
    costs = json.loads((tmp_path / "found/figures.json").read_text())["exports"]["tiny"]
    assert 0 < costs["before"] <= costs["whole"] and costs["weights"] > 4 * figures["mora"]["stored"]
    assert [*figures] == ["head", "mora", "prompt", "lora", "full"] == [line.split()[1] for line in lines[-5:]]
    assert len({line.count("|") for line in lines[-7:]}) == 1
    assert all(len(figure["rounds"]) == 2 and figure["seconds"] > 0 for figure in figures.values()) and figures["full"]["seconds_over_full"] == 1

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in efficiency.SIZES["tiny"].items()]
    flags += ["--phantoms=200", "--steps=1", "--pretrain-steps=1", "--batch=4", "--seeds=1", "--lr=0.01", "--device=cpu", "--out=run"]
    train_mora.main([*flags, "--methods", *figures])
    for method, figure in figures.items():
        path = tmp_path / f"run/adapters/{method}-s0.pt"
        content = checkpoint.load(path, "mora adapter")
        assert figure["stored"] == sum(value.numel() for value in content["state"].values()) == content["counts"]["trainable_params"]
        assert {name: figure[name] for name in content["counts"]} == content["counts"]
        # The run's file also says how the method did.
        assert 4 * figure["stored"] < figure["file"] <= path.stat().st_size < figure["file"] + 4096


def test_a_part_is_measured_in_a_process_of_its_own():
    options = argparse.Namespace(batch=2, threads=1, rounds=1, device=torch.device("cpu"), folder="")
    there = efficiency.apart("mora", "tiny", options)
    here = efficiency.run_part("mora", "tiny", options)
    assert all(there[name] == here[name] for name in ("adapter_params", "trainable_params", "total_params", "stored", "file"))
    assert 0 <= there["memory"] < there["whole"]


@pytest.mark.parametrize("flag,value", [("batch", "0"), ("threads", "0"), ("rounds", "-1"), ("device", "tpu"), ("device", "cuda:99")])
def test_what_cannot_be_measured_is_refused(refused, flag, value):
    line = refused(efficiency.main, "--size", "tiny", f"--{flag}", value, "--out", "figures.json")
    assert value in line and flag in line
