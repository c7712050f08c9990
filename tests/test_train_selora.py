"""The second training script: what a run leaves, that it resumes in the middle of growth, and what it refuses."""

import json
import os
import signal

import pytest
import torch

import train_selora
from minilora import checkpoint, selora
from minilora.unet import Denoiser

TINY = ["--seeds", "1", "--steps", "14", "--every", "4", "--pretrain-steps", "6", "--vae-steps", "4", "--phantoms", "120", "--batch", "8",
        "--width", "8", "--text-width", "8", "--vae-width", "8", "--buckets", "64", "--positions", "10", "--device", "cpu"]  # fmt: skip


def files(folder, *names):
    return {n: (folder / n).read_bytes() for n in names}


def test_a_run_stopped_in_the_middle_of_growth_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "whole", "--lam", "1.01"])
    report = json.loads((tmp_path / "whole/metrics.json").read_text())
    history = report["methods"]["ratio"]["history"][0]
    assert [h[0] for h in history] == [0, 4, 8, 12]  # ranks grew at every probe
    draw, calls = train_selora.rows_at, []

    def rows_at(*args):
        calls.append(args)
        if len(calls) == 10:  # the base is cached: step 9 of 14, between the second and the third growth
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(train_selora, "rows_at", rows_at)
    with pytest.raises(SystemExit) as stopped:
        train_selora.main([*TINY, "--out", "cut", "--lam", "1.01"])
    assert stopped.value.code == 143 and "--resume" in capsys.readouterr().out
    train_selora.main([*TINY, "--out", "cut", "--lam", "1.01", "--resume"])
    assert len(calls) == 14 + 14  # ratio and full, no step twice
    names = ("metrics.json", "model.pt", "log.jsonl", "adapters/ratio-s0.pt", "split-s0.npz", "config.json")
    assert files(tmp_path / "cut", *names) == files(tmp_path / "whole", *names)


@pytest.mark.parametrize("rule", ["gain", "neyman", "fixed", "random", "cheapest", "inverse-cost"])
def test_every_rule_runs_and_its_adapter_reloads(tmp_path, monkeypatch, rule):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r", "--rule", rule])
    saved = checkpoint.load(tmp_path / "r/model.pt", "selora")
    model = Denoiser(**saved["config"])
    model.load_state_dict(saved["base"])
    selora.inject(model, None, 0, saved["capacity"])
    selora.load_adapter(model, saved["adapter"]["state"])
    assert train_selora.ranks_of(model) == saved["adapter"]["ranks"]
    costs = sum(selora.adapter_cost(layer) for layer in selora.adapters(model).values())
    assert 0 < selora.adapter_parameters(model) == saved["adapter"]["adapter_params"] <= 2 * costs
    assert (tmp_path / "r/samples.png").exists()
    if rule == "neyman":
        train_selora.main([*TINY, "--out", "again", "--rule", "replay", "--replay", "r"])
        assert checkpoint.load(tmp_path / "again/model.pt")["adapter"]["ranks"] == saved["adapter"]["ranks"]


def test_the_loop_gives_the_probes_growth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fisher in ("probe", "loop"):
        train_selora.main([*TINY, "--out", fisher, "--fisher", fisher, "--lam", "1.9"])
    ranks = [checkpoint.load(tmp_path / f"{f}/adapters/ratio-s0.pt")["ranks"] for f in ("probe", "loop")]
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 1


BAD = [(["--rule", "best"], "'best' is not known"), (["--rank", "9"], "--rank 9 is outside 0..8"), (["--image-size", "30"], "30 is not divisible by the latent factor 4"),
       (["--rule", "replay"], "go together"), (["--every", "0"], "--every is 0"), (["--data", "absent.npz"], "absent.npz: no such file"),
       (["--schedule", "flat"], "'flat' is not known"), (["--fisher", "magic"], "'magic'"), (["--device", "tpu9"], "tpu9"), (["--width", "9"], "9")]  # fmt: skip


@pytest.mark.parametrize("argv,words", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments_are_refused_in_one_line(refused, argv, words):
    assert words in refused(train_selora.main, *TINY, "--out", "r", *argv)


def test_heldout_loss_is_the_same_twice_and_orders_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r"])
    report = json.loads((tmp_path / "r/metrics.json").read_text())
    none, ratio = (report["methods"][k]["heldout_loss"][0] for k in ("unadapted", "ratio"))
    assert ratio < none and torch.tensor([none, ratio]).isfinite().all()
