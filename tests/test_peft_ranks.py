"""tests/bench/peft_ranks.py at a tiny size: every row adapts the same layers at the same scale, and ours are those of
train_selora.py."""

import json
import math
import sys

import pytest
import torch
from conftest import ROOT

pytest.importorskip("peft", reason="peft is in the bench extra")
sys.path.insert(0, str(ROOT / "tests/bench"))
import peft_ranks
import train_selora
from minilora import selora
from minilora.loop import NotFinite, Stopper
from minilora.metrics import verdict

SIZES = {"pretrain_steps": 6, "vae_steps": 4, "phantoms": 120, "width": 8, "text_width": 8, "vae_width": 8, "heads": 2, "buckets": 64}
ROWS = [*peft_ranks.ROWS]
STEPS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")  # the base is pretrained there once


@pytest.fixture
def setting(folder, monkeypatch, request):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(peft_ranks, "SIZES", SIZES)
    cfg = peft_ranks.Config(out=folder / request.node.name, seeds=2, steps=STEPS, batch=4, device="cpu")
    return peft_ranks.prepared(cfg, Stopper())


@pytest.mark.parametrize("row", ROWS)
def test_a_row_adapts_the_linear_layers_and_nothing_else(setting, row):
    rank = 2
    model, plain = setting.model(), setting.model()
    z, t, ids = torch.randn(3, *setting.pairs.z.shape[1:]), torch.tensor([5, 500, 900]), setting.pairs.ids[:3]
    adapted = peft_ranks.ROWS[row](setting, model, rank, 0.01, 0)
    assert torch.equal(model(z, t, ids), plain(z, t, ids))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    steps = STEPS - adapted.spent
    assert adapted.spent == {"neyman": 2, "probe-svd": 1 + 2}.get(row, 0)  # batches that are looked at count as steps
    peft_ranks.optimize(setting, model, adapted, 0.01, 0, steps)
    moved = {name for name, layer in model.named_modules()
             if isinstance(layer, torch.nn.Conv2d | torch.nn.Embedding) and not torch.equal(layer.weight, plain.get_submodule(name).weight)}  # fmt: skip
    assert not moved and (model(z, t, ids) - plain(z, t, ids)).abs().max() > 1e-4
    linear = {name: sum(layer.weight.shape) for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    uniform = rank * sum(linear.values())
    parameters = peft_ranks.parameters_of(setting.names, model, adapted)
    if row in ("uniform", "peft-lora"):
        assert set(adapted.ranks().values()) == {rank} and parameters == uniform
        assert row == "uniform" or trained == uniform
    elif row == "adalora":
        kept = adapted.ranks()
        assert sum(kept.values()) <= rank * len(linear) and parameters == sum(r * (linear[name] + 1) for name, r in kept.items())
        entries = {name: layer.lora_E["default"].count_nonzero().item() for name, layer in peft_ranks.foreign(model)}
        assert all(entries[name] <= kept[name] for name in kept) and trained == 3 * sum(n + 1 for n in linear.values())
    else:
        assert uniform * 0.9 < parameters <= uniform and len(set(adapted.ranks().values())) > 1


def test_pefts_layers_have_our_scale(setting):
    ours, lora, ada = setting.model(), setting.model(), setting.model()
    peft_ranks.uniform(setting, ours, 3, 0.01, 0)
    peft_ranks.peft_lora(setting, lora, 3, 0.01, 0)
    peft_ranks.adalora(setting, ada, 2, 0.01, 0)  # 3 triplets at the start
    layers = selora.adapters(ours)
    for (name, plain), (same, svd) in zip(peft_ranks.foreign(lora), peft_ranks.foreign(ada)):
        layer = layers[name]
        assert name == same
        A, B = torch.randn(3, layer.fan_in), torch.randn(layer.d_out, 3)
        layer.A.data[:, :3], layer.B.data[:3] = A.T, B.T
        plain.lora_A["default"].weight.data, plain.lora_B["default"].weight.data = A, B
        svd.lora_A["default"].data, svd.lora_B["default"].data, svd.lora_E["default"].data = A, B, torch.ones(3, 1)
        x = torch.randn(4, layer.fan_in)
        torch.testing.assert_close(plain(x), layer(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(svd(x), layer(x), rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("row,rule", [("uniform", "fixed"), ("neyman", "neyman"), ("probe-svd", "probe-svd")])
def test_our_rows_are_rules_of_the_training_script(setting, monkeypatch, tmp_path, row, rule):
    monkeypatch.setattr("minilora.report.pyplot", lambda: None)
    ours = peft_ranks.trained_row(setting, row, 2, 0.01, 0)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]
    flags += [f"--rule={rule}", "--lr=0.01", f"--steps={STEPS}", "--batch=4", "--word-notes=0", "--seeds=1", "--device=cpu", "--sample-steps=2"]
    if rule == "fixed":
        flags.append("--rank=2")
    else:
        linear = [layer.weight.shape for layer in setting.model().modules() if isinstance(layer, torch.nn.Linear)]
        flags.append(f"--budget={2 * sum(map(sum, linear))}")
    train_selora.main([*flags, "--targets=" + "|".join(setting.names).replace(".", "[.]"), f"--out={tmp_path}"])
    theirs = json.loads((tmp_path / "metrics.json").read_text())["methods"][rule]
    assert ours["test"] == pytest.approx(theirs["heldout_loss"][0], rel=1e-6)
    assert ours["val"] == pytest.approx(theirs["val_loss"][0], rel=1e-6)
    assert ours["parameters"] == theirs["adapter_params"][0] and ours["ranks"] == theirs["ranks"][0]


def test_the_comparison_is_printed_kept_and_gone_on_with(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(peft_ranks, "SIZES", SIZES)
    monkeypatch.setattr(peft_ranks, "GRID", (1e-2, 3e-2))
    monkeypatch.setattr("minilora.rates.WIDEST", 1)
    flags = ["--out=run", f"--steps={STEPS}", "--batch=4", "--device=cpu", "--ranks", "1"]
    peft_ranks.main([*flags, "--seeds=1", "--rows", "uniform"])
    capsys.readouterr()
    kept = {path.name: path.read_bytes() for path in (folder / "run/rows").iterdir()}
    peft_ranks.main([*flags, "--seeds=2", "--resume"])
    out = capsys.readouterr().out
    assert {name: (folder / "run/rows" / name).read_bytes() for name in kept} == kept
    assert "uniform r1, rate 0.01, seed 0" not in out  # trained before
    results = json.loads((folder / "run/results.json").read_text())
    rows = results["budgets"]["1"]
    assert [*rows] == ROWS and all(len(row["test"]) == 2 and math.isfinite(sum(row["test"])) for row in rows.values())
    assert all(row["tried"][f"{row['rate']:g}"] == row["val"][0] == min(row["tried"].values()) for row in rows.values())
    lines = out.splitlines()
    table = [line for line in lines if line.startswith("|")]
    assert len(table) == 3 + len(ROWS) and len({line.count("|") for line in table}) == 1
    losses = [[1e5 * loss for loss in rows[row]["test"]] for row in ("adalora", "uniform")]
    sentence = verdict(*losses, ("PEFT AdaLoRA r1", "uniform LoRA r1"), less=True, digits=0)
    assert sentence == lines[-1] == results["sentences"][-1]


def test_a_stop_keeps_the_finished_rows_and_nan_is_no_result(setting):
    peft_ranks.trained_row(setting, "uniform", 1, 0.01, 0)
    setting.stop.code = 143
    with pytest.raises(peft_ranks.Stopped):
        peft_ranks.trained_row(setting, "uniform", 1, 0.01, 1)
    setting.stop.code = 0
    assert len(list((setting.base.out / "rows").iterdir())) == 1
    setting.pairs.z[setting.parts[1]["train"]] = math.nan
    with pytest.raises(NotFinite, match="not finite from step 0 on"):
        peft_ranks.trained_row(setting, "uniform", 1, 0.01, 1)


@pytest.mark.parametrize("flags,words", [(["--rows", "dora"], "--rows 'dora' is not known"), (["--ranks", "0"], "--ranks 0 must be from 1 to 8"),
                                         (["--ranks", "9"], "--ranks 9"), (["--steps=5"], "--steps 5 must be at least 10"), (["--ranks"], "at least one"),
                                         (["--seeds=0"], "--seeds is 0")])  # fmt: skip
def test_what_cannot_be_run_is_refused(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        peft_ranks.main(["--out=run", *flags])
    assert stopped.value.code == 2 and words in "".join(capsys.readouterr()) and not (tmp_path / "run").exists()
