"""The second training script: what a run leaves, that it resumes in the middle of growth, and what it refuses."""

import builtins
import json
import os
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_export import only_refused

import export
import train_mora
import train_selora
from minilora import checkpoint, data, diffusion, export_selora, metrics, selora
from minilora.judge import agreement, linear_reader
from minilora.models import load_judge, load_selora
from minilora.phantoms import phantoms
from minilora.ranks import COMPARED
from minilora.report import selora_table
from minilora.task import draw_studies, finished_rule
from minilora.words import tokenize
from minilora.unet import Denoiser

TINY = ["--seeds", "1", "--steps", "14", "--every", "4", "--pretrain-steps", "6", "--vae-steps", "4", "--phantoms", "120", "--batch", "8",
        "--width", "8", "--text-width", "8", "--vae-width", "8", "--heads", "2", "--sample-steps", "2", "--buckets", "64", "--positions", "10", "--device", "cpu"]  # fmt: skip


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
    assert np.load(tmp_path / "r/samples.npy").shape == (8, 32, 32)
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
       (["--schedule", "flat"], "'flat' is not known"), (["--fisher", "magic"], "'magic'"), (["--device", "tpu9"], "tpu9"), (["--width", "9"], "9"),
       (["--factor", "3"], "latent factor 3 is not a power of two"), (["--targets", "nothing"], "targets 'nothing' match no layer"),
       (["--targets", "text.words"], "layer 'text.words': Embedding is not supported"), (["--targets", "("], "targets '(' is not a regular expression"),
       (["--rule", "neyman", "--budget", "100"], "--budget 100 is below the 2,364 parameters that rank 1 in every layer costs"),
       (["--rule", "replay", "--replay", "absent"], "absent: not a finished run"), (["--judge", "absent"], "absent/model.pt: no such file"),
       (["--rank", "0", "--rule", "fixed"], "would train nothing"), (["--sample-steps", "1001"], "1001"), (["--latent", "0"], "--latent is 0"), (["--heads", "-4"], "--heads is -4"),
       (["--rule", "gain", "--rank", "3"], "costs 7,092, and rule 'gain' may spend 4,728: nothing is left to grow"), (["--rules-table", "--capacity", "1"], "--capacity is 1"),
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
    assert "has 1 seeds; --seeds 2 need as many" in said
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


def test_the_rules_table_compares_at_equal_parameters(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r", "--rules-table", "--every", "2", "--capacity", "4", "--steps", "8", "--phantoms", "80"])
    methods = json.loads((tmp_path / "r/metrics.json").read_text())["methods"]
    params = {name: m["adapter_params"][0] for name, m in methods.items()}
    cost = params["fixed r1"]
    for rule in COMPARED:
        for r in (1, 2):
            assert 0.97 * r * cost <= params[f"{rule} r{r}"] <= r * cost
    for rule in ("neyman", "inverse-cost", "replay"):
        assert 0.97 * params["ratio"] <= params[f"{rule} as ratio"] <= params["ratio"]
    assert methods["replay as ratio"]["ranks"] == methods["ratio"]["ranks"] and "fixed as ratio" not in methods
    said = capsys.readouterr().out
    loss = {k: m["heldout_loss"][0] * 1e5 for k, m in methods.items()}
    assert f"neyman r1 minus fixed r1: {loss['neyman r1'] - loss['fixed r1']:+.0f}" in said
    names = [f"{rule} r2" for rule in COMPARED]
    best = min(names, key=lambda k: methods[k]["val_loss"][0])  # chosen on one half of the held-out samples
    assert f"the validation half chooses {best} ({loss[best]:.0f} on the test half" in said


def test_the_judge_reads_samples_and_real_images(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "r", "--judge", str(tiny[1]), "--phantoms", "300"])
    report = json.loads((tmp_path / "r/metrics.json").read_text())
    judge = report["judge"]
    held = np.load(tmp_path / "r/split-s0.npz")
    assert judge["n"] == len(held["val"]) + len(held["test"]) and 0 < judge["floor"][0] and 0.5 <= judge["ceiling"]["side"][0] <= 1
    for m in report["methods"].values():
        assert m["frechet"][0] > judge["floor"][0]  # a handful of steps draws no chest
        assert 0 <= m["agreement_kind"][0] <= 1 and 0 <= m["agreement_side"][0] <= 1
    assert "Not Inception FID" in capsys.readouterr().out


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
    alphas = diffusion.alphas_cumprod(kind=saved["schedule"])
    ids = torch.from_numpy(tokenize(["coin lesion sinistral, pyrexia", ""], 64, 10))
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
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
    assert all((tmp_path / "shown" / name).stat().st_size > 5000 for name in ("ranks.png", "samples.png"))
    same = "adapters/ratio-s0.pt"  # looking changes nothing
    assert (tmp_path / "plain" / same).read_bytes() == (tmp_path / "shown" / same).read_bytes()
    real = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *a, **k: real(name, *a, **k) if not name.startswith("matplotlib") else missing())
    capsys.readouterr()
    train_selora.main([*TINY, "--out", "plain", "--resume"])
    said = capsys.readouterr().out
    assert "minilora[pictures]" in said and "convolution 3x3" in said and "█" in said
    assert np.load(tmp_path / "plain/samples.npy").shape == (8, 32, 32)


def missing():
    raise ImportError("no matplotlib here")


def test_a_run_says_first_what_it_adapts_and_how_much_work_is_ahead(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "open_run", lambda cfg: sys.exit(0))  # the first thing that writes
    with pytest.raises(SystemExit):
        train_selora.main([*TINY, "--out", "r", "--rules-table", "--seeds", "2"])
    said = capsys.readouterr().out
    assert "50 layers adapted; an adapter of rank 1 has 2,364, of rank 8 18,912" in said
    assert "40 runs of 14 steps" in said and not list(tmp_path.iterdir())


def test_heldout_timesteps_stay_inside_the_schedule():
    """In float32 (n - 1 + u) / n can round up to 1: of 1079 rows one would ask for timestep 1000 of 1000."""
    pairs = train_selora.Pairs(torch.zeros(1079, 4, 8, 8), torch.ones(1079, 2, dtype=torch.int64), diffusion.alphas_cumprod())
    seen = []
    train_selora.heldout_loss(lambda z, t, ids: (seen.append(t), z)[1], pairs, np.arange(1079))
    assert torch.cat(seen).max() == 999


def test_no_gap_to_close_is_said(capsys):
    report = {"data": "x", "synthetic": False, "synthetic_notes": False, "seeds": [0], "judge": None, "methods": {
        name: {"heldout_loss": [loss], "adapter_params": [5], "trainable_params": [9]} for name, loss in (("unadapted", 1.0), ("fixed", 0.9), ("full", 1.2))}}
    said = selora_table(report, {})
    assert "there is no gap to close" in said and "%" not in said


def test_every_entry_of_a_model_and_of_an_adapter_counts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--steps", "6", "--rule", "ratio", "--text-depth", "0", "--targets", "unet.first|unet.last|unet.time.0", "--out", "r"]
    train_selora.main([*TINY, *small])
    run = tmp_path / "r"

    def exported(method=None):
        """All that an export rests on: what the manifest says, the golden inputs, the weights."""
        saved, model, vae = load_selora(run, method)
        said = export_selora.described(saved, 1000, "float32"), saved["adapter"]["method"], saved["adapter"]["seed"], saved["adapter"]["ranks"]
        return said, export_selora.golden_sampler(saved["config"], 1000), selora.merge(model).state_dict(), vae.state_dict()

    assert only_refused(run / "model.pt", checkpoint.FORMS["selora"], exported) > 400
    form = checkpoint.FORMS["selora adapter"]
    assert only_refused(run / "adapters/ratio-s0.pt", form, lambda: exported("ratio")) > 100
    study = phantoms(120, 2).select(("image", "note"))
    cfg = SimpleNamespace(augment=f"{run}:2", missing="any:0.5", image_size=32)
    augmented = lambda: draw_studies(cfg, study, {"parts": data.split(study, 0)}, 0, "cpu")
    assert only_refused(run / "model.pt", {"study": str, "schedule": str, "vae_config": checkpoint.VAE}, augmented) > 40
    split = (run / "split-s0.npz").read_bytes()
    for arrays in ({}, {"train": np.zeros((2, 2), int)}, {"train": np.array(["x"])}):
        np.savez(run / "split-s0.npz", **arrays)
        with pytest.raises(data.Refused, match="split-s0.npz: entry 'train' is missing or not a list of rows"):
            augmented()
    (run / "split-s0.npz").write_bytes(split)
    seen = []
    monkeypatch.setattr(train_selora, "finish", lambda cfg, ctx, *rest: seen.extend([cfg, ctx]))
    train_selora.main([*TINY, *small, "--resume"])
    for job in sorted(train_selora.ranks.jobs_of(seen[0], 0), key=lambda job: job.rule != "ratio"):
        path = run / f"adapters/{job.name}-s0.pt"
        if job.rule in train_selora.REFERENCES:
            form = {k: v for k, v in form.items() if k != "state"}  # which nobody reads
        assert only_refused(path, form, lambda: finished_rule(seen[1], job, 0, path, f"{job.name} s0")) > 50


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
