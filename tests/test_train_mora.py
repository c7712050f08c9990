"""The training script: what a run leaves behind, that it repeats and resumes to the byte, and what it refuses."""

import json
import math
import os
import signal
import sys
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import DATA, TINY
from test_export import copied, only_refused

import export
import train_mora
from minilora import baselines, checkpoint, data, loop, metrics, rates, selora, serve_cli
from minilora.loop import NotFinite
from minilora.models import build, image_digests, load_head, make_vit
from minilora.mora import METHODS, attach
from minilora.phantoms import LABS, phantoms
from minilora.report import mora_conclusion
from minilora.task import batch_at, draw_task, finished_job, input_sizes, load_task, on, predict
from minilora.vit import ViT
from minilora.data import Refused

SHORT = [*TINY, "--methods", "head", "mora"]


def files(folder, *names):
    return {n: (folder / n).read_bytes() for n in names}


def test_a_run_folder_holds_what_the_design_says(tiny):
    folder, run = tiny
    report = json.loads((run / "metrics.json").read_text())
    assert report["format"] == 1 and report["kind"] == "mora" and report["synthetic"] and report["seeds"] == [0]
    assert set(report["methods"]) == set(METHODS)
    for m in report["methods"].values():
        assert set(m["by_test"]) == {"any:0.7", "image:0.5"} and len(m["macro_f1"]) == 1 and 0 <= m["macro_f1"][0] <= 1
        rows = m["by_test"]["any:0.7"]["by_pattern"]
        assert sum(p["n"][0] for p in rows.values()) == 24
    mora = report["methods"]["mora"]
    assert mora["adapter_params"] == [16 * 4 * 4] == report["methods"]["lora"]["adapter_params"]
    assert mora["ranks"] == [{"blocks.0": 4}] and report["methods"]["mora-all"]["ranks"] == [{"blocks.0": 4, "blocks.1": 4}]
    drawn = data.read_npz(run / "split-s0.npz")
    assert sorted(np.concatenate([drawn[k] for k in ("train", "val", "test")])) == list(range(240))
    assert drawn["present image:0.5"].shape == (240, 3)
    steps = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    assert {s["method"] for s in steps} == set(METHODS) and steps[-1]["step"] == 12
    assert json.loads((run / "timings.json").read_text()) and not (run / "last.pt").exists()
    assert json.loads((run / "config.json").read_text())["steps"] == 12
    assert (run / "macro_f1.png").stat().st_size > 5000


def test_model_pt_rebuilds_the_model_alone(tiny):
    folder, run = tiny
    saved = checkpoint.load(run / "model.pt", "mora")
    adapter = saved["adapter"]
    assert "result" not in adapter and "result" in checkpoint.load(run / "adapters/mora-s0.pt")  # a model says nothing of the test samples
    model = build(saved["config"], saved["base"], adapter["method"], adapter["rank"], 0, adapter["state"])
    study = data.load_study(run / "phantoms.npz").select(("image", "note", "vitals"))
    scales = {k: [np.array(x, np.float32) for x in v] for k, v in adapter["scales"].items()}
    inputs = on("cpu", data.model_inputs(study, *input_sizes(saved["config"]), scales))
    drawn = data.read_npz(run / "split-s0.npz")
    present = torch.from_numpy(drawn["present any:0.7"].astype(np.float32))
    task = {"inputs": inputs, "labels": torch.from_numpy(study.labels), "order": np.arange(240)}
    task |= {"tables": {"any:0.7": present}, "content": {"any:0.7": None}}
    p = predict(model, "mora", task, drawn["test"], "any:0.7")
    report = json.loads((run / "metrics.json").read_text())
    assert (p.argmax(1) == study.labels[drawn["test"]]).mean() == report["methods"]["mora"]["accuracy"][0]


def test_same_seed_same_bytes_and_resume_shows_it_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_mora.main([*SHORT, "--out", "one"])
    train_mora.main([*SHORT, "--out", "two"])
    names = ("metrics.json", "model.pt", "log.jsonl", "split-s0.npz", "config.json", "adapters/mora-s0.pt")
    assert files(tmp_path / "one", *names) == files(tmp_path / "two", *names)
    capsys.readouterr()
    train_mora.main([*SHORT, "--out", "one", "--resume"])
    assert "MoRA" in capsys.readouterr().out and files(tmp_path / "one", *names) == files(tmp_path / "two", *names)


def test_seeds_can_be_added_to_a_finished_run(tmp_path, monkeypatch, refused):
    argv = [arg for arg in SHORT if arg not in ("--seeds", "1")]
    train_mora.main([*argv, "--seeds", "2", "--out", "whole"])
    train_mora.main([*argv, "--seeds", "1", "--out", "r"])
    said = refused(train_mora.main, *argv, "--seeds", "2", "--rank", "3", "--out", "r", "--resume")
    assert "rank 4 there, 3 here" in said and "seeds 1 there, 2 here" in said
    train_mora.main([*argv, "--seeds", "2", "--out", "r", "--resume"])
    names = ("metrics.json", "config.json", "adapters/mora-s0.pt", "adapters/mora-s1.pt", "model.pt")
    assert files(tmp_path / "whole", *names) == files(tmp_path / "r", *names)
    said = refused(train_mora.main, *argv, "--seeds", "1", "--out", "r", "--resume")
    assert "seeds 2 there, 1 here" in said  # fewer would hide what is there


def test_scores_of_fewer_seeds_never_stand_beside_a_configuration_of_more(tmp_path, monkeypatch):
    """Wherever it stops: before config.json is written anew, or in the first training after it."""
    monkeypatch.chdir(tmp_path)
    argv = [arg for arg in SHORT if arg not in ("--seeds", "1")]
    train_mora.main([*argv, "--seeds", "2", "--out", "whole"])
    train_mora.main([*argv, "--seeds", "1", "--out", "r"])
    before = files(tmp_path / "r", "metrics.json", "config.json")
    run, more = tmp_path / "r", [*argv, "--seeds", "2", "--out", "r", "--resume"]

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint, "write_json", stop)
        with pytest.raises(SystemExit):
            train_mora.main(more)
    assert not (run / "metrics.json").exists() and files(run, "config.json")["config.json"] == before["config.json"]
    train_mora.main([*argv, "--seeds", "1", "--out", "r", "--resume"])
    assert files(run, "metrics.json", "config.json") == before
    with monkeypatch.context() as patched:
        patched.setattr(train_mora, "adapt", stop)
        with pytest.raises(SystemExit):
            train_mora.main(more)
    assert json.loads((run / "config.json").read_text())["seeds"] == 2 and not (run / "metrics.json").exists()
    train_mora.main(more)
    names = ("metrics.json", "config.json", "adapters/mora-s1.pt", "model.pt")
    assert files(run, *names) == files(tmp_path / "whole", *names)


def test_a_file_that_changed_is_named_without_its_hash(tmp_path, refused):
    data.save_study(tmp_path / "d.npz", phantoms(240, 2).select(("image", "note")))
    argv = [arg for arg in SHORT if arg not in ("--seeds", "1")] + ["--data", "d.npz", "--out", "r"]
    train_mora.main([*argv, "--seeds", "1"])
    data.save_study(tmp_path / "d.npz", phantoms(240, 5).select(("image", "note")))
    for seeds in ("1", "2"):
        said = refused(train_mora.main, *argv, "--seeds", seeds, "--resume")
        assert "(data d.npz: the file has changed" in said and "sha256" not in said
    assert "seeds 1 there, 2 here" in said
    data.save_study(tmp_path / "e.npz", phantoms(240, 2).select(("image", "note")))
    assert "(data d.npz there, e.npz here" in refused(train_mora.main, *argv, "--seeds", "1", "--data", "e.npz", "--resume")
    assert "(data d.npz there, None here" in refused(train_mora.main, *SHORT, "--out", "r", "--resume")


@pytest.mark.parametrize("stop_at", [3, 17, 31])  # in pretraining, in `head`, in `mora`
def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, capsys, stop_at):
    monkeypatch.chdir(tmp_path)
    argv = [a if a != "12" else "14" for a in SHORT]
    monkeypatch.setattr(train_mora, "LOG_EVERY", 5)  # a window of the log spans the stop
    train_mora.main([*argv, "--out", "whole"])
    (tmp_path / "runs").rename(tmp_path / "aside")
    draw, calls = train_mora.rows_at, []

    def rows_at(*args):
        calls.append(args)
        if len(calls) == stop_at:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(*args)

    monkeypatch.setattr(train_mora, "rows_at", rows_at)
    with pytest.raises(SystemExit) as stopped:
        train_mora.main([*argv, "--out", "cut"])
    assert stopped.value.code == 130 and "--resume" in capsys.readouterr().out
    assert len(calls) == stop_at  # it finished the step and stopped
    train_mora.main([*argv, "--out", "cut", "--resume"])
    assert len(calls) == 10 + 14 + 14  # no step was done twice
    names = ("metrics.json", "model.pt", "log.jsonl", "adapters/head-s0.pt", "adapters/mora-s0.pt")
    assert files(tmp_path / "cut", *names) == files(tmp_path / "whole", *names)


def test_a_second_interrupt_stops_at_once():
    with pytest.raises(KeyboardInterrupt), loop.Stopper() as stop:
        timer = threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT))
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.code == 143
        timer.start()
        time.sleep(5)


def test_rates_are_picked_on_validation_and_the_winner_is_not_trained_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = SHORT[: SHORT.index("--lr")] + ["--methods", "head", "mora"]
    trained = []
    adapt = train_mora.adapt
    monkeypatch.setattr(train_mora, "adapt", lambda cfg, model, *a: (trained.append(a[:3]), adapt(cfg, model, *a))[1])
    train_mora.main([*argv, "--out", "r", "--seeds", "2"])
    report, said = json.loads((tmp_path / "r/metrics.json").read_text()), capsys.readouterr().out
    assert len(trained) == sum(len(m["lr_grid"]) + 1 for m in report["methods"].values())
    fewest = min(len(data.read_npz(tmp_path / f"r/split-s{seed}.npz")["test"]) for seed in range(2))
    assert f"few test samples: {fewest}, each answer changes accuracy by {1 / fewest:.3f}" in said
    for name, m in report["methods"].items():
        grid = {float(rate): score for rate, score in m["lr_grid"].items()}
        assert grid[m["lr"]] == max(grid.values()) and {*train_mora.LR_GRID} <= {*grid}
        inside = min(grid) < m["lr"] < max(grid)
        assert inside or len(grid) == 3 + rates.WIDEST  # widened until the best is inside, or given up
        assert f"{name}: learning rate by macro-F1 on the validation rows at seed 0: {m['lr']:g} (" in said
        kept = checkpoint.load(tmp_path / f"r/adapters/{name}-s0.pt")
        assert kept["lr"] == m["lr"] and kept["seed"] == 0


def test_a_grid_is_widened_until_its_best_rate_is_inside(capsys):
    grid = (0.003, 0.01, 0.03)
    best, scores = rates.pick(grid, lambda rate: -abs(rate - 0.3))
    assert best == 0.3 and [*scores] == [0.003, 0.01, 0.03, 0.1, 0.3, 1.0]
    best, scores = rates.pick(grid, lambda rate: -abs(rate - 0.01))
    assert best == 0.01 and [*scores] == [*grid]
    best, scores = rates.pick(grid, lambda rate: -rate)  # lower is better for ever: it ends
    assert len(scores) == 3 + rates.WIDEST and best == min(scores) and "at the edge" in rates.described(best, scores)

    def diverges(rate):
        if rate > 0.03:
            raise NotFinite("the loss is nan at step 3")
        return rate

    best, scores = rates.pick(grid, diverges)
    assert rates.pick(grid, lambda rate: 0.5) == (0.01, dict.fromkeys(grid, 0.5))  # ties widen nothing
    with pytest.raises(NotFinite, match="no learning rate of 0.003, 0.01, 0.03 gives a finite score"):
        rates.pick(grid, lambda rate: math.nan)
    assert best == 0.03 and scores[0.1] == -math.inf and "0.1 is left out: the loss is nan at step 3" in capsys.readouterr().out


def test_a_locked_head_is_the_one_that_head_trained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_mora.main([*SHORT, "--out", "r", "--head", "locked"])
    head, mora = (checkpoint.load(tmp_path / f"r/adapters/{m}-s0.pt")["state"] for m in ("head", "mora"))
    assert head.keys() < mora.keys() and all(torch.equal(head[k], mora[k]) for k in head)
    assert mora["blocks.0.mora.up"].abs().max() > 0


def test_several_findings_with_unlabelled_ones(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    s = phantoms(240, 4)
    s.labels = np.stack([s.labels == c for c in range(4)], 1).astype(np.int64)
    s.labels[:5] = -1
    s.labels[5:50, 2] = -1
    data.save_study("several.npz", s)
    train_mora.main([*SHORT, "--out", "r", "--data", "several.npz", "--test-missing", "any:0.3", "vitals:1"])
    assert "5 unlabelled" in capsys.readouterr().out
    report = json.loads((tmp_path / "r/metrics.json").read_text())
    assert 0 < report["methods"]["mora"]["auroc"][0] < 1 and report["synthetic"]  # the file says that it is drawn


def test_findings_without_a_positive_are_left_out_of_macro_f1_and_counted(tmp_path, monkeypatch, capsys):
    labels = np.array([[1, 0, -1, 0], [0, 0, -1, 1], [1, 0, -1, -1]])
    perfect = np.where(labels == 1, 0.9, 0.1)
    scores = metrics.scores(labels, perfect)
    assert scores["macro_f1"] == scores["accuracy"] == scores["auroc"] == 1 and scores["without_positive"] == 2
    wrong = perfect.copy()
    wrong[0] = 0.9  # finding 0: right; 1: a false alarm, which F1 cannot grade; 3: one of its two labelled samples wrong
    assert metrics.scores(labels, wrong)["macro_f1"] == pytest.approx((1 + 2 / 3) / 2)
    assert math.isnan(metrics.scores(labels[:, 1:3], perfect[:, 1:3])["macro_f1"])
    assert "without_positive" not in metrics.scores(labels[:, ::3], perfect[:, ::3])
    assert metrics.scores(np.array([0, 0]), np.array([[0.9, 0.1], [0.9, 0.1]])).keys() == {"macro_f1", "auroc", "accuracy"}
    monkeypatch.chdir(tmp_path)
    s = phantoms(240, 4).select(("note",))
    s.labels = np.stack([s.labels == 1, np.arange(240) == 0], 1).astype(np.int64)  # one sample has the second finding
    s.class_names = ["frequent", "rare"]
    data.save_study("rare.npz", s)
    train_mora.main([*SHORT, "--out", "r", "--data", "rare.npz", "--keep", "head:0", "--seeds", "2"])
    said = capsys.readouterr().out
    report = json.loads((tmp_path / "r/metrics.json").read_text())["methods"]["mora"]
    tests = [data.read_npz(tmp_path / f"r/split-s{seed}.npz")["test"] for seed in (0, 1)]
    assert report["without_positive"] == [int(0 not in rows) for rows in tests] and max(report["without_positive"]) == 1
    assert said.count("Macro-F1 leaves out the findings without a positive in the test split") == 1 and "nan" not in said
    export.main(["mora", "r"])
    capsys.readouterr()
    seed = report["without_positive"].index(1)
    serve_cli.main(["predict", "r/onnx", "--data", "rare.npz", "--split", f"r/split-s{seed}.npz", "--device", "cpu"])
    assert "without" in capsys.readouterr().out


def test_colour_images_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = phantoms(240, 4).select(("image",))
    s.images = np.stack([s.images] * 3, 3)
    data.save_study("rgb.npz", s)
    train_mora.main([*SHORT, "--out", "r", "--data", "rgb.npz"])
    saved = checkpoint.load(tmp_path / "r/model.pt", "mora")
    assert saved["config"]["channels"] == 3 and saved["config"]["modalities"] == ("image",)


def test_a_base_can_be_pretrained_on_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data.save_study("source.npz", phantoms(100, 5, "source").select(("image", "note")))
    train_mora.main([*SHORT, "--out", "r", "--source", "source.npz"])
    (base,) = (tmp_path / "runs/base").glob("vit-*.pt")
    assert set(checkpoint.load(base)["readers"]) == {"label 0.weight", "label 0.bias"}


def test_a_source_that_would_leak_or_lacks_samples_is_refused(refused, tmp_path):
    data.save_study(tmp_path / "s.npz", phantoms(100, 5).select(("image", "note")))
    assert "would see the test labels" in refused(train_mora.main, "--source", "s.npz", "--data", "s.npz")
    hollow = phantoms(100, 5).select(("image", "note"))
    hollow.notes[:] = ""
    data.save_study(tmp_path / "h.npz", hollow)
    assert "no labelled sample has all of image, note" in refused(train_mora.main, *TINY, "--source", "h.npz")


def test_a_source_that_holds_samples_of_the_data_is_refused_by_content(refused, tmp_path):
    whole = phantoms(100, 5)
    pictures, words = whole.select(("image", "note")), whole.select(("note", "labs"))
    fresh, turned = phantoms(60, 9).select(("image", "note")), np.arange(100)[::-1]
    data.save_study(tmp_path / "data.npz", pictures)
    data.save_study(tmp_path / "words.npz", words)

    def shared(study, against, *argv):
        data.save_study(tmp_path / "s.npz", study)
        return refused(train_mora.main, *TINY, "--source", "s.npz", "--data", against, *argv)

    arrays = data.read_npz(tmp_path / "data.npz")
    np.savez_compressed(tmp_path / "again.npz", **arrays)
    line = "error: --source again.npz: 100 of its 100 samples are in --data data.npz: the base would see the test labels"
    assert refused(train_mora.main, *TINY, "--source", "again.npz", "--data", "data.npz") == line
    assert "100 of its 100 samples" in shared(pictures.take(turned), "data.npz")
    assert "100 of its 100 samples" in shared(words.take(turned), "words.npz")  # no image: words and numbers
    assert "30 of its 30 samples" in shared(words.take(turned[:30]), "words.npz")
    colour = replace(pictures.take(turned[:40]), images=np.stack([pictures.images[turned[:40]]] * 3, 3))
    assert "40 of its 40 samples" in shared(colour, "data.npz")
    some = pictures.take(np.arange(60))
    for key in ("images", "notes"):
        setattr(some, key, np.concatenate([getattr(some, key)[:7], getattr(fresh, key)[7:]]))
    assert "7 of its 60 samples" in shared(some, "data.npz") and "7 of its 60" in shared(some, "data.npz", "--modalities", "note")
    assert "7 of its 60 samples" in shared(replace(some, notes=fresh.notes), "data.npz")  # other words, the same pictures
    target = phantoms(240, 2)  # what a run with TINY draws, and keeps as phantoms.npz
    data.save_study(tmp_path / "drawn.npz", target)
    assert "--source drawn.npz: 240 of its 240 samples are in --data phantoms (target)" in refused(train_mora.main, *TINY, "--source", "drawn.npz")
    data.save_study(tmp_path / "drawn.npz", phantoms(240, 1, "source"))
    assert "--source phantoms (source): 240 of its 240" in refused(train_mora.main, *TINY, "--data", "drawn.npz")


def test_sources_that_only_say_the_same_are_read(tmp_path):
    whole, other = phantoms(100, 5), phantoms(100, 6)
    other.notes = whole.notes.copy()
    other.images[:5], whole.images[:5] = 255, 255  # white: a missing picture of somebody's program
    words = replace(whole.select(("note",)), notes=whole.notes.copy())
    words.notes[:2] = "words that", "nobody wrote"
    for name, study in (("a", whole.select(("image", "note"))), ("b", other.select(("image", "note"))), ("c", whole.select(("note",))), ("d", words)):
        data.save_study(tmp_path / f"{name}.npz", study)
    for source, target in ("ab", "dc"):
        cfg = train_mora.Config(source=tmp_path / f"{source}.npz", data=tmp_path / f"{target}.npz")
        assert len(train_mora.read_source(cfg, train_mora.read_target(cfg))) == 100


def test_a_model_keeps_what_its_base_has_seen(tiny):
    source = phantoms(240, 1, "source")
    kept = checkpoint.load(tiny[1] / "model.pt")["source_images"].numpy()
    assert kept.shape == (240,) and set(kept) == set(image_digests(source)) and (kept[1:] > kept[:-1]).all()


def test_phantoms_numbers_pretrain_the_modality_of_their_name():
    cfg = train_mora.Config(phantoms=60, modalities=("labs",))
    source = train_mora.read_source(cfg, train_mora.read_target(cfg))
    assert source.columns == {"labs": LABS} and source.numeric["labs"].shape == (60, 2)


def test_a_batch_without_known_labels_gives_no_nan():
    assert train_mora.known_loss(torch.zeros(2, 3), torch.tensor([-1, -1])) == 0
    logits, labels = torch.randn(4, 3), torch.tensor([0, -1, 2, 1])
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=-1)
    torch.testing.assert_close(train_mora.known_loss(logits, labels), expected)


def test_bad_files_are_refused_before_anything_is_written(refused, tiny, tmp_path):
    good = (tiny[1] / "phantoms.npz").read_bytes()
    for name, content in (("text", b"hello"), ("cut", good[: len(good) // 2]), ("flipped", good[:9999] + bytes([good[9999] ^ 4]) + good[10000:])):
        (tmp_path / f"{name}.npz").write_bytes(content)
        assert f"{name}.npz" in refused(train_mora.main, *TINY, "--data", f"{name}.npz")
    data.save_study(tmp_path / "one.npz", data.Study("one", np.array([0, 1]), ["a", "b"], notes=np.array(["x", "y"])))
    assert "need more samples" in refused(train_mora.main, *TINY, "--data", "one.npz")
    findings = np.stack([np.arange(60) % 2, np.arange(60) % 3 // 2], 1)
    data.save_study(tmp_path / "f.npz", data.replace(phantoms(60, 4).select(("image", "note")), labels=findings, class_names=["a", "b"]))
    for flag in ("--missing", "--test-missing"):
        said = refused(train_mora.main, *TINY, "--data", "f.npz", flag, "label:0.5")
        assert "missing type 'label' in 'label:0.5' needs one label a sample; these are several findings" in said


def test_a_run_says_first_what_trains_and_how_much_work_is_ahead(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(checkpoint, "open_run", lambda cfg: sys.exit(0))  # the first thing that writes
    with pytest.raises(SystemExit):
        train_mora.main([*SHORT, "--seeds", "2", "--lr", "mora:0.01"])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    model = attach(ViT(width=16, depth=2, heads=2, classes=4), "mora", 4)
    trains = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert f"adapter 192 parameters, trainable {trains:,} of " in lines["mora"] and lines["mora"].endswith("2 runs of 12 steps")  # 4 x 16 x (1 + 2)
    assert "adapter 0 parameters, " in lines["head"] and lines["head"].endswith("4 runs of 12 steps")  # seed 0 picks one of three rates
    assert list(tmp_path.iterdir()) == []


def test_a_nan_loss_stops_with_step_and_samples(tmp_path, monkeypatch, capsys):
    loss, calls = train_mora.diagnosis_loss, []

    def broken(logits, labels):
        calls.append(0)
        return loss(logits, labels) * (float("nan") if len(calls) == 7 else 1)

    monkeypatch.setattr(train_mora, "diagnosis_loss", broken)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        train_mora.main([*SHORT, "--out", "r"])
    said = capsys.readouterr().err.strip()
    assert stopped.value.code == 2 and "\n" not in said and "nan at step 6, samples [" in said


def test_the_loss_check_names_step_and_samples():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 1)})
    watch = lambda: loop.Watch("job", 20, 10, model, lambda step: np.array([step, 2 * step]), "cpu")
    good = watch()
    for step, loss in enumerate([1.0, 2.0, 3.0], 10):
        good.note(step, torch.tensor(loss))
    assert good.checked(13).tolist() == [1.0, 2.0, 3.0] and good.checked(13, 12).tolist() == [3.0]
    good.note(13, torch.tensor(float("nan")))
    good.note(14, torch.tensor(float("inf")))
    with pytest.raises(Refused, match=r"job: the loss is nan at step 13, samples \[13, 26\].*what was saved before stands"):
        good.checked(15)
    bad = watch()
    bad.note(10, torch.tensor(1.0))
    model["b"].weight.grad = torch.full((1, 2), float("inf"))
    bad.note(11, torch.tensor(1.0))
    with pytest.raises(Refused, match=r"the gradient of b.weight is not finite at step 11, samples \[11, 22\]"):
        bad.checked(12)
    scores = {"a": selora.Score(1.0, 2.0, math.nan, 3.0), "b": selora.Score(1.0, math.inf, math.nan, math.inf)}
    with pytest.raises(Refused, match=r"the Fisher information of layer b is inf at step 10, samples \[10, 20\]"):
        watch().scores(10, scores)


def test_conclusion_is_computed_and_admits_defeat():
    method = lambda *v: {"macro_f1": list(v)}
    six = np.arange(6) / 100
    report = {"seeds": [*range(6)], "synthetic": True, "synthetic_notes": True, "methods": {
        "head": method(*(0.4 + six)), "lora": method(*(0.6 + six)), "mora": method(*(0.5 + 2 * six)),
        "mora-open": method(*(0.5 + 2 * six[::-1]))}}
    said = mora_conclusion(report)
    assert any(s.startswith("MoRA beats head-only: mean +0.125 macro-F1, 95% interval +0.099 to +0.151, above on 6 of 6 seeds, p = 0.031") for s in said)
    assert any(s.startswith("MoRA is beaten by lora") and "mean -0.075" in s for s in said)
    assert any(s.startswith("No difference that 6 seeds can show between MoRA and mora-open") and "p = 1" in s for s in said)
    assert any("synthetic notes" in s for s in said)
    for m in report["methods"].values():
        m["macro_f1"] = m["macro_f1"][:3]
    report["seeds"] = [0, 1, 2]
    assert not any("beat" in s for s in mora_conclusion(report))  # three of three is chance one time in four
    report["seeds"], report["methods"] = [0], {k: method(m["macro_f1"][0]) for k, m in report["methods"].items()}
    said = mora_conclusion(report)
    assert any("One seed: an illustration" in s for s in said) and not any("beat" in s for s in said)
    report["methods"] = {k: method(math.nan) | {"without_positive": [4]} for k in report["methods"]}  # nothing to compare
    said = mora_conclusion(report)
    assert not any("MoRA" in s for s in said) and "Macro-F1 leaves out the findings without a positive in the test split (4 by seed)." in said


BAD = [(["--data", "absent.npz"], "absent.npz: no such file"), (["--methods", "dora"], "'dora' is not known"),
       (["--missing", "image:2"], "outside"), (["--missing", "sound:0.1"], "'sound'"), (["--missing", "label:1.1"], "outside"), (["--test-missing", "any:0.1", "both:7"], "outside"),
       (["--modalities", "image", "sound"], "'sound' is not in"), (["--image-size", "30"], "30 is not divisible by the patch size 8"),
       (["--width", "30", "--heads", "4"], "30 is not divisible by 4 heads"), (["--absent", "gone"], "'gone'"), (["--head", "off"], "'off'"),
       (["--head", "locked", "--methods", "mora", "head"], "head"), (["--keep", "mora:7"], "mora:7"), (["--lr", "fast"], "'fast'"), (["--lr", "dora:0.1"], "dora"),
       (["--lr", "0.003", "0.01"], "--lr gives two rates for all: 0.003 and 0.01"), (["--lr", "mora:0.003", "0.1", "mora:0.003"], "--lr gives two rates for mora: 0.003 and 0.003"),
       (["--lr", "prompt:0.1"], "'prompt:0.1': prompt does not run here, only head, lora, mora, mora-open, full"), (["--lr", "mora:10"], "a rate in (0,10)"),
       (["--seeds", "0"], "--seeds is 0"), (["--device", "tpu9"], "tpu9"), (["--synthetic-notes"], "phantoms have reports"),
       (["--methods", "mora", "mora"], "none twice"), (["--phantoms", "0"], "--phantoms is 0"),
       (["--augment", "random:0"], "must be SELORA_RUN:COUNT, random:COUNT, class:COUNT or own:COUNT"), (["--augment", "own"], "own:COUNT"),
       (["--augment", "own:5", "--modalities", "note", "vitals"], "--augment needs image and note; the modalities are note, vitals"),
       (["--augment", "own:5", "--missing", "any:1"], "--augment own:5: --missing any:1 leaves no training sample of seed 0 its note and image"),
       (["--augment", "random:5", "--missing", "image:1"], "--augment random, seed 0: no training sample of another patient than sample"),
       (["--augment", "class:5", "--missing", "image:1"], "--augment class, seed 0: no training sample of the class, but not the patient, of sample"),
       (["--augment", "./own:5"], "model.pt: no such file")]  # fmt: skip


@pytest.mark.parametrize("argv,words", BAD, ids=[" ".join(a) for a, _ in BAD])
def test_bad_arguments_are_refused_in_one_line(refused, argv, words):
    few = [] if "--phantoms" in argv else ["--phantoms", "240"]
    assert words in refused(train_mora.main, "--out", "r", *few, *argv)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_without_cuda_is_refused(refused):
    assert "device 'cuda'" in refused(train_mora.main, "--device", "cuda")


def test_a_folder_of_another_run_is_refused(tiny, refused, tmp_path):
    _, run = tiny
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    assert "another configuration (" in refused(train_mora.main, *SHORT, "--out", run)
    same = [*TINY, "--out", run, "--modalities", "image", "note", "vitals", "--test-missing", "any:0.7", "image:0.5", "--methods", *METHODS]
    assert "--resume" in refused(train_mora.main, *same)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_damaged_checkpoints_are_refused(tiny, tmp_path):
    good = (tiny[1] / "model.pt").read_bytes()
    checkpoint.save(tmp_path / "other.pt", {"format": 1, "kind": "base"})

    class Attack:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "attacked"),))

    torch.save({"kind": "mora", "format": 1, "x": Attack()}, tmp_path / "attack.pt")
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for name, content in (("cut", good[:-100]), ("half", good[: len(good) // 2]), ("flipped", bytes(flipped)), ("empty", b""), ("text", b"x" * 99)):
        (tmp_path / f"{name}.pt").write_bytes(content)
    for name in ("cut", "half", "flipped", "empty", "text", "other", "attack", "absent"):
        with pytest.raises(Refused, match=f"{name}.pt"):
            checkpoint.load(tmp_path / f"{name}.pt", "mora")
    assert not (tmp_path / "attacked").exists()


@pytest.mark.skipif(not DATA.exists(), reason="the real X-rays are not at hand")
@pytest.mark.parametrize("argv", [["--data", str(DATA / "covid_cxr.npz"), "--positions", "12"],
                                  ["--data", str(DATA / "pneumoniamnist.npz"), "--synthetic-notes"]], ids=["covid", "pneumonia"])
def test_real_files_run_to_the_end(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    train_mora.main([*SHORT, "--out", "r", *argv])
    said = capsys.readouterr().out
    assert ("synthetic notes" in said) == ("--synthetic-notes" in argv) and "MoRA" in said
    assert (tmp_path / "r/model.pt").exists() and not (tmp_path / "r/phantoms.npz").exists()


def test_the_log_opens_in_pandas(tmp_path, monkeypatch):
    pandas = pytest.importorskip("pandas", reason="pandas is in the bench extra")
    monkeypatch.chdir(tmp_path)
    log = loop.Log(tmp_path / "log.jsonl")
    for step in (10, 20, 30):
        log.write(method="mora", seed=0, lr=0.01, step=step, loss=1 / step)
    resumed = loop.Log(tmp_path / "log.jsonl")
    resumed.cut(sum(map(len, log.path.read_bytes().splitlines(keepends=True)[:2])))  # as a run that goes on after step 20
    resumed.write(method="mora", seed=0, lr=0.01, step=30, loss=2.0)
    frame = pandas.read_json("log.jsonl", lines=True)
    assert list(frame.step) == [10, 20, 30] and list(frame.loss) == [0.1, 0.05, 2.0] and list(frame.columns) == ["method", "seed", "lr", "step", "loss"]


def test_every_entry_of_a_finished_job_counts(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny[0])
    seen = []
    monkeypatch.setattr(train_mora, "finish", lambda cfg, ctx, *rest: seen.extend([cfg, ctx]))
    argv = json.loads((tiny[1] / "config.json").read_text())
    train_mora.main([*TINY, "--out", "run", "--modalities", "image", "note", "vitals", "--test-missing", *argv["test_missing"],
                     "--methods", *argv["methods"], "--resume"])
    path = copied(tiny, tmp_path) / "adapters/mora-all-s0.pt"
    read = lambda: finished_job(*seen, "mora-all", 0, path, "mora-all-s0-0.01")
    assert only_refused(path, checkpoint.FORMS["mora adapter"], read, fewer=["base_hash delete", "base_hash rename"]) > 400


def test_weights_of_another_training_are_refused_before_they_are_trained_on(tmp_path, monkeypatch, capsys):
    """A base, a locked head, a finished job: each in a file of the right kind whose weights fit nothing."""
    monkeypatch.chdir(tmp_path)
    argv = [*SHORT, "--out", "r", "--head", "locked"]
    train_mora.main(argv)
    (base,) = (tmp_path / "runs/base").glob("vit-*.pt")
    places = {base.relative_to(tmp_path): "cls", "r/adapters/head-s0.pt": "pooler.weight", "r/adapters/mora-s0.pt": "blocks.0.mora.up"}
    for i, (path, name) in enumerate(places.items()):
        content = checkpoint.load(path)
        wrong = {**content["state"], f"{name}x": content["state"][name]}
        del wrong[name]
        checkpoint.save(path, content | {"state": wrong})
        before = files(tmp_path, "r/model.pt", "r/metrics.json")
        for out in ["r", "other"][: 2 - bool(i)]:
            capsys.readouterr()
            with pytest.raises(SystemExit) as stopped:
                train_mora.main([*argv, "--out", out, "--resume"])
            said = capsys.readouterr().err
            assert stopped.value.code == 2 and said.startswith(f"error: {path}") and said.count("\n") == 1, said
            assert f"weight '{name}x' fits nothing; expected here: {name}" in said
        checkpoint.save(path, content)
        assert files(tmp_path, "r/model.pt", "r/metrics.json") == before
    head = tmp_path / "r/adapters/head-s0.pt"
    model = attach(make_vit(checkpoint.load("r/model.pt")["config"]), "mora", 4)
    base_hash = checkpoint.load(head)["base_hash"]

    def read():
        load_head(model, head, 0, base_hash)
        return model.state_dict()

    form = {key: checkpoint.FORMS["mora adapter"][key] for key in ("method", "seed", "state", "base_hash?")}
    assert only_refused(head, form, read, fewer=["base_hash delete", "base_hash rename"]) > 60
    with pytest.raises(Refused, match="head-s0.pt: an adapter for base"):
        load_head(model, head, 0, "another")
    with pytest.raises(Refused, match="mora-s0.pt: holds 'mora' of seed 0, not 'head' of seed 0"):
        load_head(model, tmp_path / "r/adapters/mora-s0.pt", 0, base_hash)


def test_every_entry_of_a_stopped_training_counts(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_mora, "SAVE_EVERY", 4)
    note = loop.Loop.note
    monkeypatch.setattr(loop.Loop, "note", lambda self, loss: (note(self, loss), os.kill(os.getpid(), signal.SIGINT) if self.name.startswith("mora") else 0))
    with pytest.raises(SystemExit):
        train_mora.main([*SHORT, "--out", "r"])
    path = tmp_path / "r/last.pt"
    model = attach(ViT(("image", "note"), 4, **{k: v for k, v in checkpoint.load(next((tmp_path / "runs/base").glob("vit-*.pt")))["config"].items()
                                                if k not in ("modalities", "classes")}), "mora", 4)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    def read():
        saved = checkpoint.load(path, "resume")
        checkpoint.check_resume(path, saved, model, optimizer)
        return saved

    fewer = [f"optimizer.state.{i} delete" for i in range(20)]  # what got no gradient has no moments
    assert only_refused(path, checkpoint.FORMS["resume"], read, fewer) > 300


def test_filled_inputs_are_other_training_samples_and_tell_nothing():
    study = phantoms(240, 2).select(("image", "note", "vitals"))
    cfg = train_mora.Config(absent="fill", missing="any:0.7", test_missing=("any:0.3",))
    draw = draw_task(cfg, study, 0)
    train, donors, table = draw["parts"]["train"], draw["donors"], draw["tables"]["any:0.7"]
    assert donors.shape == (240, 3) and np.isin(donors, train).all()
    for m in range(3):  # what the table withheld of a donor is not used
        assert table[donors[:, m], m].all()
    config = {"image_size": 32, "channels": 1, "buckets": 2048, "positions": 12, "absent": "fill"}
    task = load_task(study, draw, "any:0.7", config, "cpu")
    for text in ("any:0.7", "any:0.3"):
        batch = batch_at(task["inputs"], torch.arange(240), task["content"][text])
        own = batch_at(task["inputs"], torch.arange(240))
        for m, name in enumerate(study.modalities):
            given = batch_at(task["inputs"], torch.from_numpy(donors[:, m]))[name]
            have = torch.from_numpy(draw["tables"][text][:, m])
            for row in range(240):
                wanted = own if have[row] else {name: given}
                assert torch.equal(batch[name][row].nan_to_num(9), wanted[name][row].nan_to_num(9))
    vit = make_vit({"modalities": ["image", "note"], "classes": 2, "width": 16, "heads": 2, "depth": 1, "absent": "fill"})
    batch = {name: batch[name] for name in ("image", "note")}
    with torch.no_grad():  # presence changes nothing but what the adapter is told
        assert torch.equal(vit(batch, torch.ones(240, 2)), vit(batch, torch.zeros(240, 2)))
    with pytest.raises(Refused, match="leaves no training sample of seed 0 its image"):
        draw_task(replace(cfg, missing="image:1"), study, 0)


def test_mora_is_told_what_was_filled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_mora.main([*SHORT, "--out", "r", "--absent", "fill"])
    saved = checkpoint.load(tmp_path / "r/model.pt", "mora")
    split = data.read_npz(tmp_path / "r/split-s0.npz")
    assert saved["config"]["absent"] == "fill" and split["donors"].shape == (240, 2)
    model = build(saved["config"], saved["base"], "mora", 4, 0, saved["adapter"]["state"])
    batch = {"image": torch.zeros(2, 1, 32, 32), "note": torch.ones(2, 12, dtype=torch.long)}
    told = model(batch, None, torch.tensor([[1.0, 1.0], [0.0, 1.0]]))
    assert not torch.allclose(told[0], told[1])


def test_baselines_are_what_their_names_say():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 400) | (rng.random(400) < 0.4)  # the larger class is 1
    notes = np.array([f"w{y} filler{i % 7}" for i, y in enumerate(labels)])
    images = rng.integers(1, 200, (400, 32, 32)).astype(np.uint8)
    study = data.Study("s", labels, ["a", "b"], images=images, notes=notes)
    cfg = train_mora.Config(missing="note:0.5", test_missing=("any:0", "note:1"))
    draws = {seed: draw_task(cfg, study, seed) for seed in range(2)}
    rows = baselines.rows(study, draws, cfg.missing, ["any:0", "note:1"])
    assert [*rows] == ["larger class", "linear: words, numbers", "linear: and pixels"]
    for result, draw in zip(rows["larger class"], draws.values()):
        assert result["by_test"]["any:0"]["accuracy"] == labels[draw["parts"]["test"]].mean()
        assert result["by_test"]["any:0"]["auroc"] == 0.5
    for result in rows["linear: words, numbers"]:
        assert result["by_test"]["any:0"]["macro_f1"] == 1  # a word tells the label
        assert result["by_test"]["note:1"]["auroc"] == 0.5  # and without notes nothing does
    # Filled with other samples', nothing says that a note is foreign; left out, it misleads nobody.
    filled = {seed: draw_task(replace(cfg, absent="fill"), study, seed) for seed in range(2)}
    rows = baselines.rows(study, filled, cfg.missing, ["note:1"])
    assert 0.3 < rows["linear: and pixels"][0]["by_test"]["note:1"]["auroc"] < 0.7
    assert [*rows][-1] == "linear: absent left out"
    x = baselines.inputs(study, filled[0], cfg.missing, "note:1", False, True)
    bag = baselines.bag_of_words(study.notes, filled[0]["parts"]["train"])
    assert torch.equal(x[:, -1], torch.ones(400)) and x[:, :-1].sum() == 2 * 400 and bag.sum() == 2 * 400
    study.notes = np.array([f"x{i}" for i in range(400)])
    study.images = (images // 4 + 100 * labels[:, None, None]).astype(np.uint8)
    rows = baselines.rows(study, draws, cfg.missing, ["any:0"])
    assert rows["linear: and pixels"][0]["by_test"]["any:0"]["macro_f1"] == 1
    assert rows["linear: words, numbers"][0]["by_test"]["any:0"]["auroc"] == 0.5


def test_a_linear_baseline_of_several_findings_and_words_of_training_notes_alone():
    rng = np.random.default_rng(1)
    findings = rng.integers(0, 2, (300, 2))
    notes = np.array([" ".join(f"f{c}" for c in range(2) if row[c]) or "none" for row in findings])
    findings[rng.random((300, 2)) < 0.2] = -1
    model = baselines.logistic(torch.from_numpy(baselines.bag_of_words(notes, range(200))), findings, 2, 1e-3)
    p = model(torch.from_numpy(baselines.bag_of_words(notes, range(200))))
    known = findings >= 0
    assert (((p > 0.5) == (findings == 1))[known]).all()
    bag = baselines.bag_of_words(["a b", "b c", "d"], [0, 1])
    assert bag.shape == (3, 3) and not bag[2].any()  # d is in no training note


def test_paired_scores_against_known_values():
    found = metrics.paired([1, 2, 3, 4, 5], [0, 0, 0, 0, 6])
    assert found["mean"] == 1.8 and found["wins"] == 4 and found["losses"] == 1
    assert found["p"] == pytest.approx(2 * (1 + 5) / 32)
    # Student's t of 4 degrees of freedom, for splits whose test rows are an eighth of their training rows.
    half = 2.776445 * np.std([1, 2, 3, 4, -1], ddof=1) * np.sqrt(1 / 5 + 1 / 8)
    assert found["high"] - found["mean"] == pytest.approx(half, rel=1e-4)
    assert metrics.sign_test(9, 1) == pytest.approx(22 / 1024) and metrics.sign_test(0, 0) == 1
    assert math.isnan(metrics.paired([1], [0])["low"])
    assert metrics.verdict([1.0] * 6, [2.0] * 6, ("a", "b"), less=True).startswith("a beats b: mean -1.000")
    said = metrics.verdict([0] * 10, [-0.001] * 9 + [0.5], ("a", "b"))  # nine of ten signs, but the mean says otherwise
    assert said.startswith("No difference that 10 seeds can show between a and b: mean -0.049")
    assert metrics.by_chance(10) == pytest.approx(22 / 1024) and metrics.by_chance(3) == 0
    assert metrics.verdict([1.0, math.nan], [2.0] * 2, ("a", "b")) == "a against b: a seed has no score, so there is no comparison."
