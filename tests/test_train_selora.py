"""The second training script: what a run leaves, that it resumes in the middle of growth, and what it refuses."""

import builtins
import itertools
import json
import os
import re
import shutil
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_export import only_refused

import export
import train_mora
import train_selora
from minilora import checkpoint, data, diffusion, export_selora, judge, metrics, report_selora, samples, selora
from minilora.judge import agreement, facts_of, linear_reader, nearest
from minilora.models import load_judge, load_selora, put_words
from minilora.phantoms import phantoms
from minilora.ranks import PLANNED
from minilora.report_selora import selora_table
from minilora.task import draw_studies, finished_rule
from minilora.words import tokenize
from minilora.unet import Denoiser
from minilora.vae import VAE
from minilora.vit import ViT

TINY = ["--seeds", "1", "--steps", "14", "--every", "4", "--pretrain-steps", "6", "--vae-steps", "4", "--phantoms", "120", "--batch", "8",
        "--width", "8", "--text-width", "8", "--vae-width", "8", "--heads", "2", "--sample-steps", "2", "--buckets", "64", "--positions", "10", "--device", "cpu", "--lr", "0.01", "full:0.001"]  # fmt: skip

TINY_UNET = Denoiser(size=16, width=8, text_width=8, text_depth=1, heads=2, buckets=64, positions=10)
selora.inject(TINY_UNET, None, 0)
COSTS = [selora.adapter_cost(layer) for layer in selora.adapters(TINY_UNET).values()]  # of one rank


@pytest.fixture(autouse=True)
def no_pictures(request, monkeypatch):
    """Pictures take longer than these trainings; the tests that look at them say so."""
    if "pictures" not in request.keywords:
        monkeypatch.setattr("minilora.report.pyplot", lambda: None)


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
        if len(calls) in (6, 10):  # the base is cached: steps 5 and 9 of 14, between two growths
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(train_selora, "rows_at", rows_at)
    for resume in ([], ["--resume"]):
        with pytest.raises(SystemExit) as stopped:
            train_selora.main([*TINY, "--out", "cut", "--lam", "1.01", *resume])
        assert stopped.value.code == 143 and "--resume" in capsys.readouterr().out
    train_selora.main([*TINY, "--out", "cut", "--lam", "1.01", "--resume"])
    assert len(calls) == 14 + 14  # ratio and full, no step twice
    names = ("metrics.json", "model.pt", "log.jsonl", "adapters/ratio-s0.pt", "split-s0.npz", "config.json")
    assert files(tmp_path / "cut", *names) == files(tmp_path / "whole", *names)


@pytest.mark.parametrize("rule", ["gain", "random-grown", "cheapest", "fixed", "uniform", "random", "inverse-cost", "neyman", "probe-svd"])
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
    if rule == "neyman":
        train_selora.main([*TINY, "--out", "again", "--rule", "replay", "--replay", "r"])
        assert checkpoint.load(tmp_path / "again/model.pt")["adapter"]["ranks"] == saved["adapter"]["ranks"]


def test_the_loop_gives_the_probes_growth(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for fisher in ("probe", "loop"):
        train_selora.main([*TINY, "--out", fisher, "--fisher", fisher, "--lam", "1.9"])
    ranks = [checkpoint.load(tmp_path / f"{f}/adapters/ratio-s0.pt")["ranks"] for f in ("probe", "loop")]
    assert ranks[0] == ranks[1] and len(set(ranks[0].values())) > 1


BAD = [(["--rule", "best"], "'best' is not known"), (["--rank", "9"], "--rank 9 is outside 0..8"), (["--image-size", "31"], "31 is not divisible by the latent factor 2"),
       (["--rule", "replay"], "go together"), (["--every", "0"], "--every is 0"), (["--data", "absent.npz"], "absent.npz: no such file"),
       (["--image-size", "30"], "latent size 15 and UNet width 8 must be multiples of 4"), (["--width", "10"], "UNet width 10"), (["--heads", "3"], "width 8 is not divisible by 3"),
       (["--noisier", "0"], "--noisier is 0.0; must be in (0,10000)"), (["--noisier", "-9"], "--noisier is -9"), (["--noisier", "nan"], "--noisier is nan"),
       (["--guidance", "-1"], "--guidance is -1"), (["--guidance", "inf"], "--guidance is inf"), (["--fisher", "magic"], "'magic'"), (["--device", "tpu9"], "tpu9"),
       (["--factor", "3"], "latent factor 3 is not a power of two"), (["--targets", "nothing"], "targets 'nothing' match no layer"),
       (["--targets", "text.words"], "layer 'text.words': Embedding is not supported"), (["--targets", "("], "targets '(' is not a regular expression"),
       (["--rule", "neyman", "--budget", "100"], f"--budget 100 is below the {sum(COSTS):,} parameters that rank 1 in every layer costs"),
       (["--rule", "replay", "--replay", "absent"], "absent: not a finished run"), (["--judge", "absent"], "absent/model.pt: no such file"),
       (["--rank", "0", "--rule", "fixed"], "would train nothing"), (["--rule", "oracle"], "control of --rules-table"), (["--lr", "fast"], "learning rate 'fast'"), (["--lr", "dora:0.1"], "'dora:0.1'"),
       (["--rules-table", "--budgets", "2", "2"], "none twice"), (["--rules-table", "--budgets", "9"], "--budgets has rank 9; the limit is --capacity 8"), (["--rules-table", "--rows", "best"], "--rows 'best' is not known"),
       (["--rows", "neyman"], "--rows ('neyman',): --rule ratio has no use for it"), (["--rule", "fixed", "--budget", "99999"], "--budget 99999: --rule fixed has no use for it"),
       (["--rules-table", "--rule", "neyman"], "--rule neyman: --rules-table has no use for it"), (["--rule", "probe-svd", "--capacity", "2"], "fills the --capacity 2 of every layer"),
       (["--rules-table", "--rows", "shuffled"], "--rows shuffled needs the row of probe-svd too"), (["--rule", "ratio", "--budget", str(sum(COSTS))], "nothing is left to grow"), (["--sample-steps", "1001"], "1001"), (["--latent", "0"], "--latent is 0"), (["--heads", "-4"], "--heads is -4"),
       (["--rule", "gain", "--rank", "3"], f"costs {3 * sum(COSTS):,}, and rule 'gain' may spend {2 * sum(COSTS):,}: nothing is left to grow"), (["--rules-table", "--capacity", "1"], "--budgets has rank 3; the limit is --capacity 1"),
       (["--steps", "4"], "--steps 4 ends before the first probe, --every 4"), (["--lam", "nan"], "--lam nan")]  # fmt: skip


@pytest.mark.parametrize("argv,words", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments_are_refused_in_one_line(refused, argv, words):
    assert words in refused(train_selora.main, *TINY, "--out", "r", *argv)


def test_heldout_loss_is_the_same_twice_and_orders_models(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r"])
    report = json.loads((tmp_path / "r/metrics.json").read_text())
    none, ratio = (report["methods"][k]["heldout_loss"][0] for k in ("unadapted", "ratio"))
    assert ratio < none and torch.tensor([none, ratio]).isfinite().all()


def test_a_replay_of_another_model_and_an_adapter_of_another_base_are_refused(refused, tmp_path, capsys):
    os.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r", "--rule", "fixed"])
    said = refused(train_selora.main, *TINY, "--out", "again", "--rule", "replay", "--replay", "r", "--seeds", "2")
    assert "has 1 seeds; --seeds 2 needs 2" in said
    said = refused(train_selora.main, *TINY, "--out", "again", "--rule", "replay", "--replay", "r", "--text-depth", "2")
    assert "a run of another model: layer 'text.blocks.1" in said
    train_selora.main([*TINY, "--out", "other", "--rule", "fixed", "--pretrain-steps", "7"])
    foreign = (tmp_path / "other/adapters/fixed-s0.pt").read_bytes()
    (tmp_path / "r/adapters/fixed-s0.pt").write_bytes(foreign)
    capsys.readouterr()
    assert "r/adapters/fixed-s0.pt: an adapter for base" in refused(train_selora.main, *TINY, "--out", "r", "--rule", "fixed", "--resume")


def test_source_and_target_must_be_two_files(refused, tmp_path):
    for name in ("a.npz", "b.npz"):
        data.save_study(tmp_path / name, phantoms(60, 3).select(("image", "note")))
    said = refused(train_selora.main, *TINY, "--out", "r", "--data", "a.npz", "--source", "b.npz")
    assert "--source b.npz: 60 of its 60 samples are in --data a.npz: the base would see the held-out images" in said


FEW = "unet.*(mlp|to_words).*|unet.first|unet.time.0"  # layers enough
TABLE = ["--rules-table", "--every", "2", "--capacity", "6", "--steps", "20", "--phantoms", "80", "--targets", FEW]
FEW_COSTS = [selora.adapter_cost(layer) for name, layer in selora.adapters(TINY_UNET).items() if re.fullmatch(FEW, name)]


def test_the_rules_table_compares_at_equal_parameters(tmp_path, monkeypatch, capsys):
    """Plans spend a budget to within the cheapest layer; growth never exceeds it; controls open what their row opened, at its steps."""
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, *TABLE, "--budgets", "1", "3", "0", "--out", "r"])
    content = json.loads((tmp_path / "r/metrics.json").read_text())
    methods = content["methods"]
    params = {name: m["adapter_params"][0] for name, m in methods.items()}
    cost = sum(FEW_COSTS)
    for r in (1, 3):
        assert params[f"uniform r{r}"] <= r * cost
        for rule in PLANNED:
            assert 0 <= r * cost - params[f"{rule} r{r}"] < min(FEW_COSTS), rule
        wide = [rank for rank in methods[f"random r{r}"]["ranks"][0].values()]
        assert max(wide) > r and min(wide) < r
        assert max(methods[f"probe-svd r{r}"]["ranks"][0].values()) <= 4
        mine, theirs = (methods[f"{rule} r{r}"]["ranks"][0] for rule in ("probe-svd", "shuffled"))
        assert mine != theirs and len(methods[f"shuffled r{r}"]["history"][0]) == 1
        assert of_cost(mine) == of_cost(theirs)  # as many layers of each rank among those of a cost
    assert not {"ratio r1", "replay r1", "random-grown r1"} & methods.keys()
    for name, of in (("r3", "ratio r3"), ("as ratio", "ratio")):
        history, other = methods[of]["history"][0], methods[f"random-grown {name}"]["history"][0]
        assert [step for step, _ in history] == [step for step, _ in other] and len(history) > 3
        for (_, ours), (_, theirs) in zip(history, other):
            assert 0 <= spent(ours) - spent(theirs) < max(FEW_COSTS)  # what is left over buys no layer that could grow
        assert other[-1][1] != history[-1][1]
        assert methods[f"replay {name}"]["ranks"] == methods[of]["ranks"] and len(methods[f"replay {name}"]["history"][0]) == 1
    history = methods["ratio r3"]["history"][0]
    assert params["ratio r3"] <= 3 * cost and history[-1][0] < 20 / 4 and {*history[0][1].values()} == {1}
    for rule in ("uniform", "probe-svd"):
        assert 0 <= params["ratio"] - params[f"{rule} as ratio"] < min(FEW_COSTS)
    said = capsys.readouterr().out
    loss = {k: m["heldout_loss"][0] * 1e5 for k, m in methods.items()}
    assert f"neyman r1 minus uniform r1 is {loss['neyman r1'] - loss['uniform r1']:+.0f}" in said
    assert "at that budget it is uniform: it has no row" in said
    assert {path.stem for path in (tmp_path / "r/plans").iterdir()} == {"probe-svd-probe-r4-s0-0.01", "oracle-probe-r4-s0-0.01"}  # one for all budgets
    log = [json.loads(line) for line in (tmp_path / "r/log.jsonl").read_text().splitlines()]
    last = {entry["method"]: entry["step"] for entry in log}
    assert last["probe-svd probe r4"] == 2 and last["oracle probe r4"] == 20
    # The probe's two steps are charged, and each batch that a plan looks at.
    assert last["probe-svd r3"] == last["shuffled r3"] == 16 and last["neyman r3"] == 18
    assert last["uniform r3"] == last["oracle r3"] == 20


def spent(ranks):
    return sum(rank * cost for rank, cost in zip(ranks.values(), FEW_COSTS))


def of_cost(ranks):
    return Counter(zip(FEW_COSTS, ranks.values()))


def test_a_run_stopped_in_its_probe_and_in_its_training_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--rule", "probe-svd", "--steps", "60"]
    train_selora.main([*argv, "--out", "whole"])
    draw, calls, stops = train_selora.rows_at, [], {4: "plans/last.pt", 10 + 26: "last.pt"}  # step 3 of the probe's 6, a step of the 51 others

    def rows_at(*args):
        calls.append(args)
        if len(calls) in stops:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(train_selora, "rows_at", rows_at)
    for k, last in enumerate(stops.values()):
        with pytest.raises(SystemExit):
            train_selora.main([*argv, "--out", "cut", *["--resume"][:k]])
        assert (tmp_path / "cut" / last).exists() and (tmp_path / "cut/plans/probe-svd-probe-r4-s0-0.01.json").exists() == bool(k)
    train_selora.main([*argv, "--out", "cut", "--resume"])
    batches = [args for args in calls if args[1] < 10**6]
    assert len(batches) == 6 + 51 + 60  # probe, training and full, no step twice; three looks of the plan are charged
    names = ("metrics.json", "model.pt", "log.jsonl", "adapters/probe-svd-s0.pt", "plans/probe-svd-probe-r4-s0-0.01.json", "config.json")
    assert files(tmp_path / "cut", *names) == files(tmp_path / "whole", *names)
    plan = tmp_path / "cut/plans/probe-svd-probe-r4-s0-0.01.json"
    values = json.loads(plan.read_text())
    first = next(iter(values))
    (tmp_path / "cut/adapters/probe-svd-s0.pt").unlink()
    for damaged in ({}, [], values | {first: ["x"]}, values | {"other": [1.0]}, {k: v for k, v in values.items() if k != first}):
        plan.write_text(json.dumps(damaged))
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            train_selora.main([*argv, "--out", "cut", "--resume"])
        assert stopped.value.code == 2 and plan.name in capsys.readouterr().err


def test_rates_are_picked_on_validation_rows_and_widened(tmp_path, monkeypatch, capsys):
    """Each rule's own, on seed 0; the best trial is seed 0's run, of the others the scores are kept; a stop changes nothing."""
    monkeypatch.chdir(tmp_path)
    argv = [arg for arg in TINY if arg not in ("--lr", "0.01", "full:0.001")]
    argv = [*argv, "--seeds", "2", "--rule", "fixed"]

    def evaluated(cfg, judging, model, *rest):
        """Losses by the rate of the trial, which the test half contradicts: the best is at the edge of the grid, then inside."""
        lr = trials[-1]
        away = float(abs(np.log(lr / 0.1)))
        return {"val_loss": 1 + away, "heldout_loss": 5 - away}

    adapt, trials = train_selora.adapt, []

    def adapted(*args):
        trials.append(args[5])
        return adapt(*args)

    monkeypatch.setattr(train_selora, "evaluate", evaluated)
    monkeypatch.setattr(train_selora, "adapt", adapted)
    trials.append(1.0)  # unadapted is evaluated first
    train_selora.main([*argv, "--out", "r"])
    methods = json.loads((tmp_path / "r/metrics.json").read_text())["methods"]
    assert methods["fixed"]["lr"] == 0.1 and [*methods["fixed"]["lr_grid"]] == ["0.003", "0.01", "0.03", "0.1", "0.3"]
    assert methods["full"]["lr"] == 0.1 and len(methods["full"]["lr_grid"]) == 7 and methods["unadapted"]["lr"] == 0  # three, and four more
    assert methods["fixed"]["lr_grid"]["0.03"] == pytest.approx(np.log(10 / 3) + 1)
    assert trials.count(0.1) == 4 and trials.count(0.003) == 2  # of both: seed 0's trial and seed 1's run; a rate that lost: seed 0's alone
    picks = {path.name: checkpoint.load(path) for path in (tmp_path / "r/picks").glob("fixed-*.pt")}
    assert {name for name, content in picks.items() if content["state"]} == {"fixed-0.1.pt"}
    assert (tmp_path / "r/picks/fixed-0.1.pt").read_bytes() == (tmp_path / "r/adapters/fixed-s0.pt").read_bytes()
    before = files(tmp_path / "r", "metrics.json", "model.pt")
    count = len(trials)
    train_selora.main([*argv, "--out", "r", "--resume"])
    assert len(trials) == count and files(tmp_path / "r", "metrics.json", "model.pt") == before
    assert "fixed: learning rate by the loss on the validation rows at seed 0: 0.1 (" in capsys.readouterr().out


def test_the_table_has_one_rate_a_row(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [arg for arg in TINY if arg not in ("0.01", "full:0.001")]
    argv.insert(argv.index("--lr") + 1, "full:0.001")
    monkeypatch.setattr(train_selora.ranks, "GRID", (0.01,))
    train_selora.main([*argv, *TABLE, "--rows", "uniform", "ratio", "probe-svd", "shuffled", "--budgets", "1", "2", "0", "--out", "r"])
    methods = json.loads((tmp_path / "r/metrics.json").read_text())["methods"]
    rows = {name: m for name, m in methods.items() if m["rule"] not in ("unadapted", "full")}
    assert {path.name.rpartition("-")[0] for path in (tmp_path / "r/picks").iterdir()} == {name.replace(" ", "-") for name in rows}
    for m in rows.values():
        grid = {float(rate): loss for rate, loss in m["lr_grid"].items()}
        assert len(grid) > 1 and grid[m["lr"]] == min(grid.values())
    assert methods["full"]["lr"] == 0.001 and methods["full"]["lr_grid"] == {}


@pytest.mark.parametrize("rule", ["neyman", "uniform", "ratio"])
def test_only_neyman_takes_gradients_before_the_first_step(tmp_path, monkeypatch, rule):
    monkeypatch.chdir(tmp_path)
    asked, gradients = [], train_selora.neyman_gradients
    monkeypatch.setattr(train_selora, "neyman_gradients", lambda *args: asked.append(args) or gradients(*args))
    train_selora.main([*TINY, "--out", "r", "--rule", rule])
    assert len(asked) == (rule == "neyman")


def test_one_rate_for_all_is_a_tenth_for_full(tmp_path, monkeypatch, refused):
    argv = TINY[: TINY.index("--lr")]
    for name, given in (("one", ["0.02"]), ("each", ["ratio:0.02", "full:0.002"]), ("both", ["0.5", "ratio:0.02", "full:0.002"])):
        train_selora.main([*argv, "--out", name, "--lr", *given])
        methods = json.loads((tmp_path / name / "metrics.json").read_text())["methods"]
        assert {rule: m["lr"] for rule, m in methods.items()} == {"unadapted": 0, "ratio": 0.02, "full": 0.002}
        assert all(m["lr_grid"] == {} for m in methods.values())
    assert files(tmp_path / "one", "metrics.json", "model.pt") == files(tmp_path / "each", "metrics.json", "model.pt") == files(tmp_path / "both", "metrics.json", "model.pt")
    ask = lambda *rates: refused(train_selora.main, *argv, "--out", "r", "--lr", *rates)
    assert "learning rate 'neyman:0.1': neyman does not run here, only ratio, full" in ask("neyman:0.1")
    assert "unadapted does not run here" in ask("unadapted:0.1")
    assert "--lr gives two rates for all: 0.003 and 0.01" in ask("0.003", "0.01")
    assert "--lr gives two rates for full: 0.003 and 0.01" in ask("full:0.003", "0.1", "full:0.01")
    table = ["--out", "r", "--rules-table", "--rows", "uniform", "--budgets", "2"]
    assert "full does not run here, only uniform" in refused(train_selora.main, *argv, *table, "--lr", "0.01", "full:0.001")


MORA = ["--seeds", "2", "--phantoms", "120", "--steps", "2", "--pretrain-steps", "2", "--width", "16", "--depth", "1", "--heads", "2", "--device", "cpu", "--lr", "0.01",
        "--methods", "head", "--out", "m"]  # fmt: skip


def test_a_table_restricts_the_training_rows(tmp_path, monkeypatch, refused):
    """To those that the run of train_mora.py trained on and whose image and note its table left."""
    train_mora.main([*MORA, "--missing", "any:0.6", "--train-share", "0.8"])
    train_selora.main([*TINY, "--out", "r", "--rule", "fixed", "--table", "m", "--seeds", "2"])
    plain = [data.split(phantoms(120, 2).select(("image", "note")), seed) for seed in (0, 1)]
    for seed in (0, 1):
        run, own = (np.load(tmp_path / f"{name}/split-s{seed}.npz") for name in "mr")
        left = [row for row in run["train"] if run["present any:0.6"][row].all()]
        assert own["train"].tolist() == left and 10 < len(left) < 0.7 * len(run["train"])
        # Validation pairs pick rates, so the table holds for them too; it tests on all.
        assert own["val"].tolist() == [row for row in plain[seed]["val"] if run["present any:0.6"][row].all()]
        assert own["test"].tolist() == plain[seed]["test"].tolist()
    identity = json.loads((tmp_path / "r/config.json").read_text())["table"]
    assert identity == {"run": "m", "missing": "any:0.6", "sha256": {f"split-s{seed}.npz": data.sha256(tmp_path / f"m/split-s{seed}.npz") for seed in (0, 1)}}
    shutil.rmtree("r")
    ask = lambda *argv: refused(train_selora.main, *TINY, "--out", "r", "--rule", "fixed", "--table", *argv)
    assert "--table m: has no seed 2" in ask("m", "--seeds", "3")
    assert "--table absent: not a run of train_mora.py" in ask("absent")
    assert "--table m: splits another study of 120 samples than this run's phantoms (target) of 130" in ask("m", "--phantoms", "130")
    data.save_study("d.npz", phantoms(120, 9).select(("image", "note")))
    assert "--table m: splits another study of 120 samples" in ask("m", "--data", "d.npz")
    arrays = dict(np.load("m/split-s0.npz"))
    np.savez("m/split-s0.npz", **arrays | {"present any:0.6": arrays["present any:0.6"] * False})
    assert "leaves no training sample of seed 0 both image and note" in ask("m")
    del arrays["present any:0.6"]
    np.savez("m/split-s0.npz", **arrays)
    assert "m/split-s0.npz: has no missing table 'any:0.6'" in ask("m")


def test_seeds_can_be_added_to_a_run_with_a_table_and_to_the_table_s_run(tmp_path, monkeypatch, refused):
    argv = [arg for arg in TINY if arg not in ("--seeds", "1")] + ["--rule", "fixed", "--table", "m"]
    train_mora.main([*MORA, "--missing", "any:0.6"])
    train_selora.main([*argv, "--seeds", "1", "--out", "r"])
    train_mora.main([*MORA, "--missing", "any:0.6", "--seeds", "3", "--resume"])  # its config.json is another now
    train_selora.main([*argv, "--seeds", "1", "--out", "r", "--resume"])
    train_selora.main([*argv, "--seeds", "3", "--out", "r", "--resume"])
    train_selora.main([*argv, "--seeds", "3", "--out", "whole"])
    names = ("metrics.json", "config.json", "model.pt", "split-s2.npz", "adapters/fixed-s2.pt")
    assert files(tmp_path / "r", *names) == files(tmp_path / "whole", *names)
    train_selora.main([*argv, "--seeds", "1", "--out", "few"])
    path = tmp_path / "m/split-s0.npz"
    kept = path.read_bytes()
    np.savez(path, **dict(np.load(path)) | {"more": np.zeros(1)})
    for seeds, out in (("3", "r"), ("2", "few"), ("1", "few")):
        said = refused(train_selora.main, *argv, "--seeds", seeds, "--out", out, "--resume")
        assert "(table m any:0.6: split-s0.npz has changed" in said and "sha256" not in said
    path.write_bytes(kept)
    shutil.rmtree("m")
    train_mora.main([*MORA, "--missing", "any:0.5"])
    said = refused(train_selora.main, *argv, "--seeds", "2", "--out", "few", "--resume")
    assert "(table m any:0.6 there, m any:0.5 here, seeds 1 there, 2 here" in said


def test_the_judge_of_the_table_draws_once(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [arg for arg in TINY if arg != "full:0.001"]  # which does not run
    argv += ["--rules-table", "--budgets", "1", "--rows", "uniform", "probe-svd", "--steps", "10", "--phantoms", "300", "--targets", FEW, "--out", "r", "--judge", str(tiny[1])]
    train_selora.main(argv)
    methods = json.loads((tmp_path / "r/metrics.json").read_text())["methods"]
    assert all("frechet" in m and "kind" in m and not [k for k in m if "ignored" in k] for m in methods.values())
    train_selora.main([*argv, "--resume"])  # a finished file without the control is whole


def printed_table(said, title, rows):
    """(names of the columns, {row: its last values}) of the table that is printed below a title."""
    header, *lines = said[said.index(title) :].splitlines()[1 : 2 + rows]
    table = {}
    for line in lines:
        name, *values = re.split(r"  +", line.strip())
        table[name] = values
    return re.split(r"  +", header.strip()), table


def test_the_judge_reads_samples_and_what_bounds_them(tiny, tmp_path, monkeypatch, capsys):
    """The base on its own domain and every method on the target, each beside real images, autoencoder and most common answer."""
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r", "--judge", str(tiny[1]), "--phantoms", "300"])
    content = json.loads((tmp_path / "r/metrics.json").read_text())
    verdict, said = content["judge"], capsys.readouterr().out
    held = np.load(tmp_path / "r/split-s0.npz")
    facts = {"kind", "side"}
    measures = {f"{fact}{words}" for fact in facts for words in ("", ", new words", ", known words")}
    ignored = {f"{fact}, words ignored" for fact in facts}
    assert verdict["n"] == len(held["test"]) and 0 < verdict["floor"][0] and 0.5 <= verdict["ceiling"]["side"][0] <= 1
    assert {*verdict["ceiling"]} == {*verdict["chance"]} == measures and {*verdict["autoencoder"]} == measures | {"frechet", "nearest"}
    for method in content["methods"].values():
        assert method["frechet"][0] > verdict["floor"][0]  # a handful of steps draws no chest
        assert method["nearest"][0] > 0 and all(0 <= method[name][0] <= 1 for name in measures | ignored)
    header, rows = printed_table(said, "phantoms (target), synthetic data; held-out denoising loss", 6)
    columns = ["frechet", "nearest", "kind", "side"]
    assert header[-4:] == columns
    real = {**verdict["ceiling"], "frechet": verdict["floor"], "nearest": verdict["nearest"]}
    expected = {**content["methods"], "through the autoencoder": verdict["autoencoder"], "real images": real, "most common answer": verdict["chance"]}
    for name, values in expected.items():
        assert rows[name][-4:] == [f"{values[column][0]:.3f}" if column in values else "-" for column in columns], name
    assert "not Inception FID" in said and "kind, new words: unadapted " in said and "side, words ignored: unadapted " in said

    source = verdict["base on its source"]
    heldout = data.split(phantoms(300, 3, "source"), 0)["test"]  # the rows that the base has not seen
    assert source["n"] == len(heldout) and {*source["ceiling"]} == {*source["chance"]} == facts
    assert {*source["base"]} - ignored == {*source["autoencoder"]} == facts | {"frechet", "nearest"}
    header, rows = printed_table(said, f"the base on its own domain, {len(heldout)} held-out images", 5)
    assert header == ["frechet", *source["ceiling"]]
    expected = {"real images": {**source["ceiling"], "frechet": source["floor"]}, "through the autoencoder": source["autoencoder"],
                "drawn by the base": source["base"], "the same, words ignored": {fact: source["base"][f"{fact}, words ignored"] for fact in facts}, "most common answer": source["chance"]}  # fmt: skip
    for name, values in expected.items():
        assert rows[name] == [f"{values[column]:.3f}" if column in values else "-" for column in header], name


def test_words_ignored_is_the_same_noise_without_the_words(monkeypatch):
    """The control draws with guidance 0, every row from the noise that its judged image came from."""
    images = np.random.default_rng(0).integers(0, 256, (9, 8, 8), dtype=np.uint8)
    drawn = []

    def spied_draw(cfg, model, vae, pairs, rows, seeds):
        drawn.append((cfg.guidance, rows.tolist(), seeds.tolist()))
        return images[::-1] if cfg.guidance == 0 else images

    monkeypatch.setattr(samples, "draw", spied_draw)
    monkeypatch.setattr(judge, "verdict", lambda judging, given: {"frechet": 1.0, "kind": float(given is images)})
    judging = SimpleNamespace(rows=np.arange(3, 12), facts=lambda: ["kind"])
    assert samples.judged(train_selora.Config(), judging, None, None, None) == {"frechet": 1.0, "kind": 1.0, "kind, words ignored": 0.0}
    assert drawn == [(3.0, [*range(3, 12)], [*range(3, 12)]), (0.0, [*range(3, 12)], [*range(3, 12)])]


def test_the_base_never_sees_the_held_out_rows_of_its_source(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = {"rows": set()}
    train_vae, pretrain, batch_at = train_selora.train_vae, train_selora.pretrain, train_selora.Pairs.batch_at

    def spied_vae(sizes, steps, images, *rest):
        seen["images"] = images
        return train_vae(sizes, steps, images, *rest)

    def spied_pretrain(cfg, config, pairs, train, *rest):
        seen["train"] = train
        with monkeypatch.context() as patch:
            patch.setattr(train_selora.Pairs, "batch_at", spied_batch)
            return pretrain(cfg, config, pairs, train, *rest)

    def spied_batch(*given):
        batch = batch_at(*given)
        seen["rows"] |= {*batch[0].tolist()}
        return batch

    monkeypatch.setattr(train_selora, "train_vae", spied_vae)
    monkeypatch.setattr(train_selora, "pretrain", spied_pretrain)
    train_selora.main([*TINY, "--out", "r", "--pretrain-steps", "40"])
    source = phantoms(120, 3, "source")
    heldout = {*data.split(source, 0)["test"].tolist()}
    assert len(heldout) == 13 and {*seen["train"].tolist()} == {*range(120)} - heldout
    assert len(seen["rows"]) > 90 and not seen["rows"] & heldout
    content = lambda images: {image.tobytes() for image in diffusion.pictures(images)}
    assert content(seen["images"]) == {source.images[row].tobytes() for row in {*range(120)} - heldout}


def test_grain_is_measured_on_training_rows_and_can_be_left_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, argv in (("on", []), ("off", ["--no-grain"])):
        train_selora.main([*TINY, "--out", name, "--rule", "fixed", *argv])
    on, off = (checkpoint.load(tmp_path / name / "model.pt", "selora") for name in ("on", "off"))
    assert not off["vae"]["grain"].any() and on["vae"]["grain"].min() > 0
    for path in (tmp_path / "runs/base").glob("vae-*.pt"):  # it is the target's, not the base's
        assert not checkpoint.load(path)["state"]["grain"].any()
    vae = VAE(**on["vae_config"])
    vae.load_state_dict(off["vae"])
    train = np.load(tmp_path / "on/split-s0.npz")["train"]
    vae.measure_grain(samples.pixels(phantoms(120, 2), vae, train))
    assert torch.equal(vae.grain, on["vae"]["grain"])
    ours, theirs = (np.load(tmp_path / name / "samples.npy") for name in ("on", "off"))
    assert (ours[0] == theirs[0]).all() and (ours[2] != theirs[2]).any()  # real images; those of the adapted model


def test_one_timestep_from_each_part_of_the_schedule():
    alphas = diffusion.alphas_cumprod(100)
    pairs = train_selora.Pairs(torch.arange(50.0).reshape(50, 1, 1, 1).expand(50, 4, 8, 8), torch.arange(2, 52)[:, None].repeat(1, 3), alphas)
    train = np.arange(0, 50, 2)
    batches = {(seed, step): pairs.batch_at(seed, step, train, 8) for seed, step in itertools.product((0, 1), (0, 7))}
    for rows, t, noise, words in batches.values():
        assert ((t.sort().values * 8) // 100).tolist() == list(range(8))  # 12 or 13 of 100 in each
        assert {*rows.tolist()} <= {*train.tolist()} and noise.shape == (8, 4, 8, 8) and len(words) == 8
        assert all(id == row + 2 or id == 1 for row, id in zip(rows.tolist(), words[:, 0].tolist()))  # the row's words, or none
    for given, batch in batches.items():
        assert all(map(torch.equal, batch, pairs.batch_at(*given, train, 8)))
    assert len({tuple(t.tolist()) for _, t, _, _ in batches.values()}) == len({noise.numpy().tobytes() for _, _, noise, _ in batches.values()}) == 4
    seen = torch.cat([pairs.batch_at(0, step, train, 3)[1] for step in range(400)])
    assert seen.min() == 0 and seen.max() == 99 and abs(seen.float().mean() - 49.5) < 2
    for batch in (1, 1000):  # larger than the schedule too
        assert pairs.batch_at(0, 0, train, batch)[1].max() <= 99


# ---- the judge


def judged(study, train, rows, seed=0, new=None):
    """The judge of rows of a study of small images, by a ViT of random weights."""
    torch.manual_seed(5)
    vit = ViT(("image",), 2, image_size=16, patch=4, width=16, depth=1, heads=2).eval()
    return judge.prepare(vit, study, train, rows, seed, (study.images[train], study.images[rows]), new)


def test_the_nearest_training_image_is_found():
    """As a plain loop finds it; a planted copy at distance 0, whatever the brightness and in colour."""
    rng = np.random.default_rng(0)
    for shape, low in (((5, 5), 0), ((32, 32), 200), ((20, 20, 3), 0)):
        training = rng.integers(low, 256, (1300, *shape), dtype=np.uint8)  # more than one part
        images = rng.integers(low, 256, (40, *shape), dtype=np.uint8)
        images[3], images[7] = training[1250], training[0]
        which, distance = nearest(images, training)
        apart = [[np.sqrt(np.mean((image.astype(float) - other) ** 2)) for other in training] for image in images]
        assert which.tolist() == np.argmin(apart, 1).tolist() and which[[3, 7]].tolist() == [1250, 0]
        np.testing.assert_allclose(distance, np.min(apart, 1), rtol=1e-5, atol=0)
        assert distance[[3, 7]].tolist() == [0, 0]


def test_facts_are_what_the_words_rightly_state():
    study = phantoms(300, 1).select(("image", "note"))
    facts = facts_of(study)
    assert [*facts] == ["kind", "side"]
    for name, (value, stated) in facts.items():
        assert value.tolist() == study.attributes[name].tolist()
        right = study.attributes["agree"] == 1
        assert (stated[right] == value[right]).all() and (stated[~right] == -1).all() and 0.3 < right.mean() < 0.6
    study.attributes = {}
    study.labels[:9] = -1
    (value, stated), = facts_of(study).values()
    assert [*facts_of(study)] == ["label"] and value.tolist() == stated.tolist() == study.labels.tolist()
    several = data.Study("s", np.stack([study.labels == 1, study.labels == 2], 1).astype(int), ["a", "b"], images=study.images)
    assert facts_of(several) == {}


def test_a_judge_is_told_what_to_expect():
    """Chance is the share of the most common class; new and known words split the rows that state a fact; images judge as themselves."""
    study = phantoms(300, 1, size=16).select(("image", "note"))
    train, rows = np.arange(200), np.arange(200, 300)
    new = np.random.default_rng(0).random(300) < 0.7
    judging = judged(study, train, rows, new=new)
    right, counted = study.attributes["agree"][rows] == 1, {}
    for fact in ("kind", "side"):
        value = study.attributes[fact][rows]
        for name, part in ((fact, right), (f"{fact}, new words", right & new[rows]), (f"{fact}, known words", right & ~new[rows])):
            stated = value[part & (value >= 0)]
            assert judging.truths[name][0] == fact and judging.truths[name][1][part].tolist() == value[part].tolist()
            assert (judging.truths[name][1][~part] == -1).all()
            assert judging.chance[name] == pytest.approx(max(np.bincount(stated)) / len(stated))
            counted[name] = len(stated)
        parts = [name for name in counted if name.startswith(f"{fact},")]
        assert sum(counted[name] for name in parts) == counted[fact] > min(counted[name] for name in parts) > 0
        assert sum(counted[name] * judging.ceiling[name] for name in parts) == pytest.approx(counted[fact] * judging.ceiling[fact], rel=1e-5)
    verdict = judge.verdict(judging, study.images[rows])
    assert abs(verdict.pop("frechet")) < 1e-6 < judging.floor and verdict.pop("nearest") == judging.nearest > 0
    assert verdict == judging.ceiling
    described = judge.described(judging)
    assert described["n"] == 100 and described["chance"] == judging.chance and described["autoencoder"] is None
    everything = judged(study, train, rows, new=np.ones(300, bool))
    assert "kind, known words" not in everything.ceiling and everything.ceiling["kind, new words"] == everything.ceiling["kind"]
    with pytest.raises(data.Refused, match="--judge needs 2 samples"):
        judged(study, train[:1], rows)


def test_a_judge_of_labelled_studies_and_of_several_findings():
    study = phantoms(300, 1, size=16).select(("image", "note"))
    study.attributes = {}
    train, rows = np.arange(200), np.arange(200, 300)
    study.labels[190:210] = -1
    judging = judged(study, train, rows)
    assert [*judging.ceiling] == ["label"] and judging.truths["label"][1].tolist() == study.labels[rows].tolist()
    known = study.labels[210:]
    assert judging.chance == {"label": pytest.approx(max(np.bincount(known)) / len(known))}
    several = data.Study("s", np.stack([study.labels == 1, study.labels == 2], 1).astype(int), ["a", "b"], images=study.images, notes=study.notes)
    judging = judged(several, train, rows)
    assert judging.ceiling == judging.chance == {} and {*judge.verdict(judging, several.images[rows])} == {"frechet", "nearest"}


def test_a_judge_depends_on_its_rows_and_seed_alone():
    """Not on torch's generator, and its readers not on anything of the held-out rows."""
    study = phantoms(300, 1, size=16).select(("image", "note"))
    train, rows = np.arange(200), np.arange(200, 300)
    first = judged(study, train, rows)

    def again():
        torch.manual_seed(99)
        torch.rand(7)
        vit = first.vit
        return judge.prepare(vit, study, train, rows, 0, (study.images[train], study.images[rows]))

    assert judge.described(again()) == judge.described(first)
    tokens = judge.last_tokens(first.vit, study.images[rows]).flatten(1)
    answers = {fact: reader(tokens).tolist() for fact, reader in first.readers.items()}
    for name in ("kind", "side", "agree"):
        study.attributes[name][rows] = study.attributes[name][rows][::-1]
    other = again()
    assert {fact: reader(tokens).tolist() for fact, reader in other.readers.items()} == answers and other.ceiling != first.ceiling


def test_a_resumed_run_shows_the_judges_table_again(tiny, tmp_path, monkeypatch, capsys):
    """Stopped between two methods and gone on with, or finished and shown again: the same tables and the same bytes."""
    monkeypatch.chdir(tmp_path)
    table = report_selora.selora_table
    monkeypatch.setattr(report_selora, "selora_table", lambda content, timings: table(content, {}))  # seconds differ
    argv = [*TINY, "--judge", str(tiny[1]), "--rule", "fixed"]
    tables = lambda: [part for part in re.findall(r"the base on its own domain.*?(?=\n[a-z ]+ s0 |\nConv|\nno fig|\n\n)|\nphantoms \(target\).*?(?=\nranks|\nno fig)", capsys.readouterr().out, re.S)]
    train_selora.main([*argv, "--out", "whole"])
    first = tables()
    assert len(first) == 2 and "drawn by the base" in first[0] and "most common answer" in first[1]
    train_selora.main([*argv, "--out", "whole", "--resume"])
    assert tables() == first
    draw, calls = train_selora.rows_at, []

    def rows_at(*args):
        calls.append(args)
        if len(calls) == 20:  # step 5 of the second training, the first one's adapter is there
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(*args)

    monkeypatch.setattr(train_selora, "rows_at", rows_at)
    with pytest.raises(SystemExit) as stopped:
        train_selora.main([*argv, "--out", "cut"])
    assert stopped.value.code == 143 and (tmp_path / "cut/adapters/fixed-s0.pt").exists() and not (tmp_path / "cut/adapters/full-s0.pt").exists()
    capsys.readouterr()
    train_selora.main([*argv, "--out", "cut", "--resume"])
    assert tables() == first
    names = ("metrics.json", "model.pt", "adapters/fixed-s0.pt", "adapters/full-s0.pt")
    assert files(tmp_path / "cut", *names) == files(tmp_path / "whole", *names)


def test_linear_reader_and_agreement():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 6, generator=generator)
    labels = (x[:, 2] > 0).long() + 2 * (x[:, 4] > 0).long()
    reader = linear_reader(x[:200], torch.where(torch.arange(200) % 3 > 0, labels[:200], -1))
    held, truth = x[200:].unsqueeze(1), labels[200:].clone()
    assert agreement(reader, held, truth) > 0.93
    truth[:50] = -1  # what the words do not state does not count
    truth[50:] = 3 - labels[250:]
    assert agreement(reader, held, truth) < 0.07


def test_frechet_distance():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(500, 3)), 2 * rng.normal(size=(400, 3)) + 1
    # diagonal covariances: the square root is elementwise
    a, b = a - a.mean(0), b - b.mean(0)
    a, b = a @ np.linalg.inv(np.linalg.cholesky(np.cov(a.T))).T, 2 * b @ np.linalg.inv(np.linalg.cholesky(np.cov(b.T))).T + [3, 0, 0]
    assert metrics.frechet(a, b) == pytest.approx(9 + 3 * (2 - 1) ** 2, rel=1e-9)
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-9) and metrics.frechet(a, b) == pytest.approx(metrics.frechet(b, a))
    assert metrics.frechet(a[:2], b[:2]) >= 0  # fewer samples than features
    with pytest.raises(ValueError, match="500, 3.*400, 2"):
        metrics.frechet(a, b[:, :2])


def test_merged_and_unmerged_models_sample_the_same_image(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r", "--rule", "fixed", "--lr", "0.05"])
    saved, model, vae = load_selora(tmp_path / "r")
    alphas = diffusion.alphas_cumprod(noisier=saved["noisier"])
    ids = torch.from_numpy(tokenize(["coin lesion sinistral, pyrexia", ""], 64, 10))
    noise = torch.randn(2, *vae.latent_shape, generator=torch.Generator().manual_seed(0))
    base = Denoiser(**model.config)
    base.load_state_dict(checkpoint.load(tmp_path / "r/model.pt")["base"])
    draw = lambda model: vae.decode(diffusion.sample(model, noise, ids, 10, 2.0, alphas))
    before, unadapted = draw(model), draw(base)
    merged = draw(selora.merge(model))
    assert not selora.adapters(model)
    assert (merged - before).abs().max() < 1e-4 < (merged - unadapted).abs().max()


@pytest.mark.pictures
def test_pictures_and_no_matplotlib(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("minilora.report.pyplot", lambda: None)
        train_selora.main([*TINY, "--out", "plain"])
    train_selora.main([*TINY, "--out", "shown"])
    assert all((tmp_path / "shown" / name).stat().st_size > 5000 for name in ("ranks.png", "samples.png", "strip.png"))
    same = "adapters/ratio-s0.pt"  # looking changes nothing
    assert (tmp_path / "plain" / same).read_bytes() == (tmp_path / "shown" / same).read_bytes()
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: real(name, *a, **k) if not name.startswith("matplotlib") else missing())
    capsys.readouterr()
    train_selora.main([*TINY, "--out", "plain", "--resume"])
    said = capsys.readouterr().out
    assert "minilora[pictures]" in said and "convolution 3x3" in said and "█" in said
    assert not [*(tmp_path / "plain").glob("*.png")]
    photo, before, after, other, third, near = np.load(tmp_path / "plain/samples.npy")
    parts = np.load(tmp_path / "plain/split-s0.npz")
    study = phantoms(120, 2)
    assert photo.shape == (6, 32, 32) and (photo == study.images[parts["test"][:6]]).all()
    assert all((one != two).any() for one, two in itertools.combinations((before, after, other, third), 2))
    which, _ = nearest(after, study.images[parts["train"]])
    assert (near == study.images[parts["train"]][which]).all()
    assert np.load(tmp_path / "plain/strip.npy").shape == (3, 3, 32, 32)  # pure noise and two steps


def missing():
    raise ImportError("no matplotlib here")


def test_a_run_says_first_what_it_adapts_and_how_much_work_is_ahead(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "open_run", lambda cfg: sys.exit(0))  # the first thing that writes
    with pytest.raises(SystemExit):
        train_selora.main([*TINY, "--out", "r", "--rules-table", "--seeds", "2"])
    said = capsys.readouterr().out
    assert f"{len(COSTS)} layers adapted; an adapter of rank 1 has {sum(COSTS):,} parameters, one of rank 8 has {8 * sum(COSTS):,}" in said
    assert "at least 66 runs of 14 steps" in said and not list(tmp_path.iterdir())


def test_heldout_timesteps_stay_inside_the_schedule():
    """In float32 (n - 1 + u) / n can round up to 1: of 1079 rows one would ask for timestep 1000 of 1000."""
    pairs = train_selora.Pairs(torch.zeros(1079, 4, 8, 8), torch.ones(1079, 2, dtype=torch.int64), diffusion.alphas_cumprod())
    seen = []
    samples.heldout_loss(lambda z, t, ids: (seen.append(t), z)[1], pairs, np.arange(1079))
    assert torch.cat(seen).max() == 999


def test_no_gap_to_close_is_said(capsys):
    report = {"data": "x", "synthetic": False, "synthetic_notes": False, "seeds": [0], "judge": None, "budgets": [], "methods": {
        name: {"lr": 0.01, "heldout_loss": [loss], "adapter_params": [5], "word_params": [2], "trainable_params": [9]} for name, loss in (("unadapted", 1.0), ("fixed", 0.9), ("full", 1.2))}}
    said = selora_table(report, {})
    assert "there is no gap to close" in said and "%" not in said


def test_words_of_the_training_notes_are_trained_and_kept(tmp_path, monkeypatch):
    """Of words that five notes have, no others; what is kept is the difference to the base; with --word-notes 0 nothing changes."""
    monkeypatch.chdir(tmp_path)
    for out, argv in (("on", ["--word-notes", "5"]), ("off", ["--word-notes", "0"])):
        train_selora.main([*TINY, "--out", out, "--steps", "20", *argv])
    on, off = (load_selora(tmp_path / out) for out in ("on", "off"))
    base, words = on[0]["base"]["text.words.weight"], on[0]["adapter"]["words"]
    notes = phantoms(120, 2).notes[np.load(tmp_path / "on/split-s0.npz")["train"]]
    ids = tokenize(notes, *(on[0]["config"][name] for name in ("buckets", "positions")))
    counts = Counter(word for row in ids.tolist() for word in {*row})
    assert samples.notes_with(torch.from_numpy(ids), 64).tolist() == [counts[word] for word in range(64)]
    changed = words["ids"].tolist()
    assert {*changed} == {word for word, count in counts.items() if count >= 5} - {0} and 20 < len(changed) < len(counts) - 5
    table = on[1].text.words.weight
    assert torch.equal(table[changed], words["vectors"]) and (table != base).any(1).sum() == len(changed)
    assert on[0]["adapter"]["word_params"] == words["vectors"].numel() == len(changed) * base.shape[1]
    assert on[0]["adapter"]["trainable_params"] == on[0]["adapter"]["adapter_params"] + on[0]["adapter"]["word_params"]
    assert len(off[0]["adapter"]["words"]["ids"]) == off[0]["adapter"]["word_params"] == 0 and torch.equal(off[1].text.words.weight, base)


WORDS = {"ids": torch.tensor([3, 5]), "vectors": torch.ones(2, 8)}


@pytest.mark.parametrize("words,said", [
    ({"ids": torch.tensor([3.0, 5.0])}, "word ids are torch.float32"), ({"ids": torch.tensor([[3], [5]])}, "word ids are"),
    ({"vectors": torch.ones(2, 8).half()}, "their vectors torch.float16"), ({"vectors": torch.ones(3, 8)}, r"\[3, 8\] for 2 ids"),
    ({"vectors": torch.ones(2, 7)}, "of width 8"), ({"vectors": torch.tensor([[torch.nan] * 8] * 2)}, "must be finite"),
    ({"ids": torch.tensor([5, 3])}, "ascend"), ({"ids": torch.tensor([3, 3])}, "ascend"), ({"ids": torch.tensor([-1, 3])}, "from 0 to 63"),
    ({"ids": torch.tensor([3, 64])}, "from 0 to 63")])  # fmt: skip
def test_words_that_do_not_fit_are_refused(words, said):
    model = Denoiser(4, 8, 8, 2, 64, 6, 8, 1)
    before = model.text.words.weight.clone()
    with pytest.raises(ValueError, match=said):
        put_words(model, WORDS | words)
    assert torch.equal(model.text.words.weight, before)
    put_words(model, WORDS)
    assert torch.equal(model.text.words.weight[[3, 5]], WORDS["vectors"]) and torch.equal(model.text.words.weight[6:], before[6:])


def test_every_entry_of_a_model_and_of_an_adapter_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "6", "--rule", "ratio", "--text-depth", "0", "--targets", "unet.first|unet.last|unet.time.0", "--out", "r"]
    train_selora.main([*TINY, *small])
    run = tmp_path / "r"

    def exported(method=None):
        """All that an export rests on: what the manifest says, the golden inputs, the weights."""
        saved, model, vae = load_selora(run, method)
        said = export_selora.described(saved, 1000, "float32"), saved["adapter"]["method"], saved["adapter"]["seed"], saved["adapter"]["ranks"]
        return said, export_selora.golden_sampler(saved, 1000), selora.merge(model).state_dict(), vae.state_dict()

    assert only_refused(run / "model.pt", checkpoint.FORMS["selora"], exported) > 400
    form = checkpoint.FORMS["selora adapter"]
    assert only_refused(run / "adapters/ratio-s0.pt", form, lambda: exported("ratio")) > 100
    study = phantoms(120, 2).select(("image", "note"))
    cfg = SimpleNamespace(augment=f"{run}:2", missing="any:0", image_size=32)
    augmented = lambda: draw_studies(cfg, study, {"parts": data.split(study, 0), "tables": {"any:0": study.have()}}, 0, "cpu")
    assert only_refused(run / "model.pt", {"study": str, "noisier": float, "vae_config": checkpoint.VAE}, augmented) > 40
    split = (run / "split-s0.npz").read_bytes()
    for arrays in ({}, {"train": np.zeros((2, 2), int)}, {"train": np.array(["x"])}):
        np.savez(run / "split-s0.npz", **arrays)
        with pytest.raises(data.Refused, match="split-s0.npz: entry 'train' is missing or not a list of rows"):
            augmented()
    (run / "split-s0.npz").write_bytes(split)
    seen = []
    monkeypatch.setattr(train_selora, "finish", lambda cfg, ctx, *rest: seen.extend([cfg, ctx]))
    train_selora.main([*TINY, *small, "--resume"])
    rates = {"unadapted": 0.0, "ratio": 0.01, "full": 0.001}
    for job in sorted(train_selora.ranks.jobs_of(seen[0], 0), key=lambda job: job.rule != "ratio"):
        path = run / f"adapters/{job.name}-s0.pt"
        if job.rule in train_selora.REFERENCES:
            form = {k: v for k, v in form.items() if k != "state"}  # which nobody reads
        assert only_refused(path, form, lambda: finished_rule(seen[0], seen[1], job, 0, rates[job.rule], path, f"{job.name} s0 lr {rates[job.rule]:g}")) > 50


def test_a_source_or_a_judge_that_has_seen_the_data_is_refused_by_content(tiny, refused, tmp_path):
    whole = phantoms(80, 5).select(("image", "note"))
    data.save_study(tmp_path / "data.npz", whole)
    np.savez_compressed(tmp_path / "again.npz", **data.read_npz(tmp_path / "data.npz"))
    some = phantoms(60, 6).select(("image", "note"))
    some.images[:9] = whole.images[-9:]
    data.save_study(tmp_path / "some.npz", some)
    pair = lambda source: refused(train_selora.main, *TINY, "--out", "r", "--source", source, "--data", "data.npz")
    assert "--source again.npz: 80 of its 80 samples are in --data data.npz: the base would see the held-out images" in pair("again.npz")
    assert "--source some.npz: 9 of its 60 samples are in --data data.npz" in pair("some.npz")
    judged = lambda *argv: refused(train_selora.main, *TINY, "--out", "r", "--judge", tiny[1], *argv)
    seen = phantoms(240, 1, "source").select(("image", "note"))  # what the base of the tiny run was pretrained on
    data.save_study(tmp_path / "seen.npz", seen.take(np.arange(240)[::-1]))
    part = phantoms(50, 6).select(("image", "note"))
    part.images[5:9] = seen.images[:4]
    data.save_study(tmp_path / "part.npz", part)
    assert "was pretrained on 240 images of seen, whose held-out images it would judge" in judged("--data", "seen.npz", "--source", "data.npz")
    assert "was pretrained on 4 images of part, whose held-out images it would judge" in judged("--data", "part.npz", "--source", "data.npz")


def test_a_judge_of_an_earlier_version_is_read(tiny, tmp_path):
    saved = checkpoint.load(tiny[1] / "model.pt")
    del saved["source_images"]
    checkpoint.save(tmp_path / "model.pt", saved)
    data.save_study(tmp_path / "data.npz", phantoms(30, 5))
    target = data.load_study(tmp_path / "data.npz")
    assert load_judge(tmp_path, "cpu", target, None).config["modalities"] == ["image", "note", "vitals"]
    source = {"name": "data.npz", "sha256": data.sha256(tmp_path / "data.npz")}
    (tmp_path / "config.json").write_text(json.dumps({"source": source}))
    with pytest.raises(data.Refused, match="data.npz, whose held-out images it would judge"):
        load_judge(tmp_path, "cpu", target, tmp_path / "data.npz")


def test_a_base_or_a_kept_adapter_that_fits_nothing_ends_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--steps", "6", "--rule", "fixed", "--out", "r"]
    train_selora.main(argv)
    for path in (*sorted((tmp_path / "runs/base").iterdir()), tmp_path / "r/adapters/fixed-s0.pt"):
        content, before = checkpoint.load(path), files(tmp_path, "r/model.pt", "r/metrics.json")
        name = next(iter(content["state"]))
        odd = [{k: v for k, v in content["state"].items() if k != name}, {**content["state"], name: torch.zeros(7, 3)},
               {f"{k}x" if k == name else k: v for k, v in content["state"].items()}]  # fmt: skip
        if path.stem == "fixed-s0":
            odd.append({**content["state"], name: content["state"][name] | {"A": torch.zeros(7, 3)}})
        for state in odd:
            checkpoint.save(path, content | {"state": state})
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                train_selora.main([*argv, "--resume"])
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and path.name in said and name in said and said.count("\n") == 1, said
        checkpoint.save(path, content)
        assert files(tmp_path, "r/model.pt", "r/metrics.json") == before
    train_selora.main([*argv, "--resume"])
    saved = checkpoint.load(tmp_path / "r/model.pt")
    del saved["adapter"]["state"][next(iter(saved["adapter"]["state"]))]["scale"]
    checkpoint.save(tmp_path / "r/model.pt", saved)
    tiny_mora = ["--phantoms", "120", "--steps", "2", "--pretrain-steps", "2", "--device", "cpu", "--out", "m"]
    for main, line in ((export.main, ["selora", "r"]), (export.main, ["selora", "r", "--hot-swap", "swap"]), (export.main, ["peft", "r", "--out", "p"]),
                       (train_mora.main, [*tiny_mora, "--augment", "r:5"])):  # fmt: skip
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main(line)
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.startswith("error: r/model.pt: entry 'adapter.state.") and said.count("\n") == 1, said
        assert ".scale' is missing" in said


def test_runs_of_an_earlier_version_are_refused_by_name(tmp_path, refused, monkeypatch, capsys):
    """model.pt with a kind of schedule instead of its noise, an autoencoder without grain or a UNet of levels; and a run folder."""
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--steps", "6", "--rule", "fixed", "--out", "r"]
    train_selora.main(argv)
    saved = checkpoint.load("r/model.pt")
    tiny_mora = ["--phantoms", "120", "--steps", "2", "--pretrain-steps", "2", "--device", "cpu", "--out", "m", "--augment", "r:5"]
    old = {k: v for k, v in saved.items() if k != "noisier"} | {"schedule": "cosine"}
    grainless = saved | {"vae": {k: v for k, v in saved["vae"].items() if k != "grain"}}
    levels = saved | {"config": saved["config"] | {"levels": 2}}
    for content, words in ((old, "entry 'noisier' is missing; the file was changed, or is of another version"), (grainless, "entry 'vae': weight 'grain' is missing"), (levels, "levels")):
        checkpoint.save("r/model.pt", content)
        capsys.readouterr()
        for main, line in ((export.main, ["selora", "r"]), (export.main, ["selora", "r", "--hot-swap", "swap"]), (export.main, ["peft", "r", "--out", "p"]), (train_mora.main, tiny_mora)):
            said = refused(main, *line)
            assert said.startswith("error: r/model.pt: ") and words in said, said
    config = json.loads((tmp_path / "r/config.json").read_text())
    shutil.copytree("r", "old")
    del config["noisier"]
    (tmp_path / "old/config.json").write_text(json.dumps(config | {"schedule": "cosine"}))
    said = refused(train_selora.main, *argv[:-1], "old", "--resume")
    assert "old holds a run of another configuration (" in said and "schedule cosine there, None here" in said


@pytest.mark.parametrize("seeds,losses,said", [(10, 0, "passed"), (10, 1, "passed"), (10, 2, "not passed"), (6, 1, "not decided"), (6, 2, "not passed")])
def test_the_criterion_for_planned_ranks(seeds, losses, said):
    probe = np.where(np.arange(seeds) < losses, 0.5, 0.3)
    methods = {"probe-svd": {"heldout_loss": probe}} | {name: {"heldout_loss": np.full(seeds, 0.4)} for name in ("uniform", "shuffled")}
    line = report_selora.confirmation({"methods": methods}, {name: name for name in methods})
    assert f"{seeds - losses} and {seeds - losses} of {seeds}, {said}" in line
