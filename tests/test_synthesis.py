"""The sampler without torch: merged and hot-swapped graphs against torch, what is refused, filling in, scarce data."""

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT

import export
import train_mora
import train_selora
from minilora import checkpoint, compare, data, diffusion, export_selora, metrics, report, selora, serve, serve_cli, task
from minilora.graphs import check_whole, graphs_in
from minilora.models import put_words
from minilora.phantoms import phantoms
from minilora.task import batch_at, draw_studies, draw_task, load_task
from minilora.words import tokenize
from minilora.serve import Diagnoser, Refused, Synthesizer
from minilora.unet import Denoiser
from minilora.vae import VAE

TINY = ["--seeds", "1", "--steps", "20", "--pretrain-steps", "20", "--vae-steps", "30", "--phantoms", "240", "--batch", "8", "--width", "8", "--text-width", "8",
        "--vae-width", "8", "--heads", "2", "--buckets", "128", "--positions", "10", "--sample-steps", "2", "--lr", "0.05", "full:0.005", "--device", "cpu"]  # fmt: skip
NOTES = ["coin lesion sinistral, pyrexia", "", "unremarkable, asymptomatic, none stated"]
GRAIN = 0.1  # what a barely trained autoencoder leaves out is wider, and would be clipped at black and white


@pytest.fixture(scope="session")
def drawn(tmp_path_factory):
    """Runs `neyman` (ranks 0 to 8, mixed), `uniform` (whose words are the base's) and `ones` of one base, exported merged and into one hot-swap folder."""
    folder = tmp_path_factory.mktemp("drawn")
    before, pyplot = os.getcwd(), report.pyplot
    os.chdir(folder)
    report.pyplot = lambda: None  # pictures take longer than these trainings
    try:
        for name, rule, rank in (("neyman", "neyman", "1"), ("uniform", "fixed", "3"), ("ones", "fixed", "1")):
            budget = ["--budget", "2600"] * (rule == "neyman")  # what leaves some layers without an adapter
            words = ["--word-notes", "0"] * (rule == "fixed" and rank == "3")
            train_selora.main([*TINY, "--out", name, "--rule", rule, "--rank", rank, *budget, *words])
            saved = checkpoint.load(f"{name}/model.pt", "selora")
            saved["vae"]["grain"].fill_(GRAIN)
            checkpoint.save(f"{name}/model.pt", saved)
            export.main(["selora", name])
            export.main(["selora", name, "--hot-swap", "swap"])
    finally:
        os.chdir(before)
        report.pyplot = pyplot
    return folder


def loaded(run, base=False):
    """(the adapted denoiser, its autoencoder, its schedule) of a finished run."""
    saved = checkpoint.load(run / "model.pt", "selora")
    model, vae = Denoiser(**saved["config"]), VAE(**saved["vae_config"])
    model.load_state_dict(saved["base"])
    vae.load_state_dict(saved["vae"])
    if not base:
        selora.inject(model, None, 0, saved["capacity"])
        selora.load_adapter(model, saved["adapter"]["state"])
        put_words(model, saved["adapter"]["words"])
    return model.eval(), vae.eval(), diffusion.alphas_cumprod(noisier=saved["noisier"])


def request(n, positions=10, grain=True, shapes=((4, 16, 16), (1, 32, 32))):
    """(noise, grain, ids) of n samples, of prompts of so many words; without grain it is zeros."""
    rng = np.random.default_rng(3)
    noise, pixels = (rng.standard_normal((n, *shape)).astype(np.float32) for shape in shapes)
    return noise, pixels * np.float32(grain), tokenize((NOTES * n)[:n], 128, positions)


def by_torch(model, vae, alphas, noise, grain, ids, guidance, walk):
    with torch.no_grad():
        z = diffusion.sample(model, torch.from_numpy(noise), torch.from_numpy(ids), len(walk), guidance, alphas)
        return vae.decode(z, torch.from_numpy(grain) if grain.any() else None).clamp(-1, 1).numpy()


@pytest.mark.parametrize("run", ["neyman", "uniform"])
@pytest.mark.parametrize("steps,guidance", [(50, 3.0), (7, 0.0), (1, 5.0)])
def test_the_one_graph_sampler_is_the_torch_sampler(drawn, run, steps, guidance):
    """Merged, and hot-swapped from the base's graph; batch, number of words and of steps are dynamic, the grain can be off."""
    merged, swap, parts = Synthesizer(drawn / run / "onnx", "cpu"), Synthesizer(drawn / "swap", "cpu"), loaded(drawn / run)
    for n, positions, grain in ((1, 10, True), (3, 6, True), (2, 10, False), (5, 2, False)):
        given = (*request(n, positions, grain), guidance, serve.walk(steps, 1000))
        wanted = by_torch(*parts, *given)
        for got in (merged.run(*given), swap.run(*given, run)):
            assert got.shape == (n, 1, 32, 32) and abs(got - wanted).max() < 1e-5


@pytest.mark.parametrize("sizes", [dict(channels=3, factor=4), dict(image_size=24, latent=2)], ids=str)
def test_other_sizes_are_sampled_as_in_torch(drawn, tmp_path, sizes):
    """Colour, other latents; the weights are drawn, and the answer's too: fresh ones predict zeros."""
    torch.manual_seed(0)
    vae, saved = VAE(width=8, **sizes), checkpoint.load(drawn / "ones/model.pt")
    vae.grain.uniform_(0.05, 0.2)
    model = Denoiser(**saved["config"] | {"latent": vae.latent, "size": vae.size})
    for layer in (model.unet.last, model.unet.gate):
        torch.nn.init.normal_(layer.weight, std=0.2)
    saved |= {"config": model.config, "base": copy.deepcopy(model.state_dict()), "vae_config": vae.config, "vae": vae.state_dict()}
    selora.inject(model, None, 2)
    for layer in selora.adapters(model).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    saved["adapter"]["state"] = selora.adapter_state(model)
    checkpoint.save(tmp_path / "run/model.pt", saved)
    put_words(model, saved["adapter"]["words"])
    merged = Synthesizer(export_selora.export_selora(tmp_path / "run"), "cpu")
    swap = Synthesizer(export_selora.export_selora(tmp_path / "run", hot_swap=tmp_path / "swap"), "cpu")
    alphas = diffusion.alphas_cumprod(noisier=saved["noisier"])
    for n, positions in ((1, 10), (3, 4)):
        given = (*request(n, positions, True, (vae.latent_shape, vae.image_shape)), 3.0, serve.walk(50, 1000))
        wanted = by_torch(model.eval(), vae.eval(), alphas, *given)
        assert wanted.std() > 0.05
        for got in (merged.run(*given), swap.run(*given, "run")):
            assert got.shape == (n, *vae.image_shape) and abs(got - wanted).max() < 1e-5
    shape = vae.image_shape[1:] + vae.image_shape[:1] * (vae.image_shape[0] > 1)
    assert merged.sample(NOTES, 2).shape == (3, *shape)


def test_grain_is_noise_of_the_stated_deviation_and_can_be_left_out(drawn):
    served = Synthesizer(drawn / "neyman/onnx", "cpu")
    noise, grain, ids = request(3)
    walk = serve.walk(5, 1000)
    on, off = served.run(noise, grain, ids, 3.0, walk), served.run(noise, 0 * grain, ids, 3.0, walk)
    grey = (abs(on) < 1) & (abs(off) < 1)  # what is clipped to black or white loses some
    assert grey.mean() > 0.8 and abs(on - off - GRAIN * grain)[grey].max() < 1e-6
    drawn_images, smooth = (served.sample(NOTES * 4, 5, grain=value).astype(float) / 127.5 for value in (True, False))
    difference = (drawn_images - smooth)[(abs(drawn_images - 1) < 1) & (abs(smooth - 1) < 1)]
    assert len(difference) > 5000 and abs(difference.std() / GRAIN - 1) < 0.1 and abs(difference.mean()) < 0.01
    assert (served.sample(NOTES, 5, grain=False) == served.sample(NOTES, 5, grain=False)).all()


def test_each_image_has_its_own_noise_then_its_own_grain(drawn):
    """`sample` against `run` on what the documented generators give."""
    served, seed = Synthesizer(drawn / "neyman/onnx", "cpu"), 7
    generators = [np.random.default_rng((seed, b)) for b in range(3)]
    noise = np.stack([rng.standard_normal((4, 16, 16), np.float32) for rng in generators])
    grain = np.stack([rng.standard_normal((1, 32, 32), np.float32) for rng in generators])
    images = served.run(noise, grain, tokenize(NOTES, 128, 10), 3.0, serve.walk(10, 1000))
    assert (served.sample(NOTES, seed=seed) == np.rint((images[:, 0] + 1) * 127.5)).all()  # 10 steps, guidance 3 by default


def test_walk_is_the_timesteps_of_training():
    for steps in (1, 2, 3, 7, 20, 50, 333, 999, 1000):
        assert (serve.walk(steps, 1000) == diffusion.timesteps(steps).numpy()).all()


def nodes(path):
    """{op: count} of a model, the bodies of loops included."""
    return Counter(node.op_type for graph in graphs_in(onnx.load(path, load_external_data=False).graph) for node in graph.node)


def weight_bytes(folder):
    """How large the weights of a folder are, which stand in it once; in a tiny one the names of nodes are larger."""
    table = json.loads((folder / "manifest.json").read_text())["weights"]
    return sum(int(np.prod(w["shape"])) * np.dtype(w["dtype"]).itemsize for w in table.values())


def test_a_folder_of_selora_holds_its_weights_once(drawn):
    """The step's graph takes its weights out of the sampler's: it has none of its own, and is as near to torch (in `check`)."""
    folder = drawn / "neyman/onnx"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert {place["file"] for place in manifest["weights"].values()} == {"sampler.onnx"} and not (folder / "weights.bin").exists()
    denoise = onnx.load(folder / "denoise.onnx", load_external_data=False).graph
    assert max(len(w.raw_data) for w in denoise.initializer) < 1024 < weight_bytes(folder)
    unet = {w.name for w in denoise.initializer if w.data_location == onnx.TensorProto.EXTERNAL}
    assert len(unet) > 20 and unet <= {*manifest["weights"]}


def test_the_merged_graph_has_the_nodes_of_the_base(drawn, tmp_path):
    saved = checkpoint.load(drawn / "neyman/model.pt")
    for state in saved["adapter"]["state"].values():  # rank 0 everywhere is the base
        state |= {"B": state["B"][:0], "A": state["A"].narrow(int(state["A"].dim() == 2), 0, 0)}
    saved["adapter"]["words"] = {"ids": torch.zeros(0, dtype=torch.int64), "vectors": torch.zeros(0, 8)}
    (tmp_path / "base").mkdir()
    checkpoint.save(tmp_path / "base/model.pt", saved)
    export_selora.export_selora(tmp_path / "base")
    model, vae, alphas = loaded(drawn / "neyman", base=True)
    given = (*request(2), 2.0, serve.walk(5, 1000))
    served = Synthesizer(tmp_path / "base/onnx", "cpu").run(*given)
    assert abs(served - by_torch(model, vae, alphas, *given)).max() < 1e-5
    for graph in ("sampler.onnx", "denoise.onnx"):
        assert nodes(drawn / "neyman/onnx" / graph) == nodes(tmp_path / "base/onnx" / graph)
        check_whole(onnx.load(drawn / "neyman/onnx" / graph, load_external_data=False))


def test_hot_swapping_equals_merging_and_leaks_nothing(drawn):
    ranks = json.loads((drawn / "neyman/onnx/manifest.json").read_text())["ranks"]
    assert {0, 1} < set(ranks.values()) and max(ranks.values()) > 2
    swap = Synthesizer(drawn / "swap", "cpu")
    assert swap.adapters == ("base", "neyman", "uniform", "ones")
    given = (*request(3), 2.0, serve.walk(10, 1000))
    merged = {name: Synthesizer(drawn / name / "onnx", "cpu").run(*given) for name in swap.adapters[1:]}
    merged["base"] = by_torch(*loaded(drawn / "neyman", base=True), *given)
    assert abs(merged["neyman"] - merged["uniform"]).max() > 1e-2
    first = {}
    for name in ["base", "neyman", "uniform", "neyman", "ones", "base", "uniform", "neyman"]:  # back and forth, one session
        got = swap.run(*given, name)
        assert abs(got - merged[name]).max() < 1e-5
        assert (got == first.setdefault(name, got)).all()
    assert (swap.run(*given) == first["base"]).all()


def test_sample_depends_on_note_seed_and_place_alone(drawn):
    served = Synthesizer(drawn / "neyman/onnx", "cpu")
    all_of = served.sample(NOTES, steps=4, seed=5)
    assert all_of.dtype == np.uint8 and all_of.shape == (3, 32, 32)
    near = lambda a, b: abs(a.astype(int) - b).max() <= 1  # sums are ordered by batch
    assert near(served.sample(NOTES[:1], steps=4, seed=5), all_of[:1])
    assert near(served.sample(["x", *NOTES[1:], *["y"] * 70], steps=4, seed=5)[1:3], all_of[1:])
    assert (served.sample(NOTES, steps=4, seed=5) == all_of).all()
    assert not near(served.sample(NOTES, steps=4, seed=6), all_of)


BAD = [(dict(notes="one string"), "list of at least one string"), (dict(notes=[]), "list of at least one string"), (dict(notes=["a", None]), "note of sample 1 is NoneType"),
       (dict(steps=0), "steps is 0"), (dict(steps=1001), "from 1 to 1000"), (dict(steps=2.5), "steps is 2.5"), (dict(steps=True), "steps is True"),
       (dict(guidance=-1), "guidance is -1"), (dict(guidance=float("nan")), "guidance is nan"), (dict(guidance="much"), "guidance is 'much'"),
       (dict(grain=1), "grain is 1; need True or False"), (dict(grain=None), "grain is None"), (dict(grain="no"), "grain is 'no'"), (dict(seed=-1), "seed is -1"), (dict(adapter="none"), "adapter 'none' is not in"), (dict(adapter="base"), "adapter 'base' is not in")]  # fmt: skip


@pytest.mark.parametrize("given,words", BAD, ids=[str(g) for g, _ in BAD])
def test_bad_requests_are_refused(drawn, given, words):
    with pytest.raises(Refused, match=words):
        Synthesizer(drawn / "neyman/onnx", "cpu").sample(**{"notes": NOTES, "steps": 2} | given)


@pytest.mark.parametrize("file", ["sampler.onnx", "denoise.onnx", "golden.npz", "manifest.json"])
def test_a_flipped_byte_is_refused_before_a_session_is_made(drawn, tmp_path, monkeypatch, file):
    shutil.copytree(drawn / "neyman/onnx", tmp_path / "x")
    content = bytearray((tmp_path / "x" / file).read_bytes())
    content[len(content) // 2] ^= 1
    (tmp_path / "x" / file).write_bytes(content)
    monkeypatch.setattr(serve, "open_session", lambda *a, **k: pytest.fail("a session was made"))
    with pytest.raises(Refused, match=file):
        Synthesizer(tmp_path / "x", "cpu")


def test_sample_and_filled_predict_work_where_torch_cannot_be_imported(drawn, tiny, tmp_path):
    blocker = tmp_path / "torch.py"
    blocker.write_text("raise ImportError('no torch here')")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    call = lambda *argv: subprocess.run([sys.executable, *map(str, argv)], env=env, cwd=tmp_path, capture_output=True, text=True)
    done = call(ROOT / "export.py", "sample", drawn / "swap", "--note", NOTES[0], "--n", 2, "--steps", 2, "--adapter", "ones", "--out", "s.npy")
    assert done.returncode == 0 and "of no patient" in done.stdout, done.stderr
    assert np.load(tmp_path / "s.npy").shape == (1, 2, 32, 32)
    done = call("-m", "minilora.serve", "predict", tiny[1] / "onnx", "--note", NOTES[0], "--synthesizer", drawn / "neyman/onnx", "--steps", 2)
    assert done.returncode == 0 and "4 are drawn from the words" in done.stdout, done.stderr
    assert "NVIDIA" not in done.stderr and done.stderr.count("\n") == 0
    done = call("-m", "minilora.serve", "check", drawn / "swap")
    assert done.returncode == 0 and "sampler neyman" in done.stdout


def test_sample_writes_a_sheet(drawn, tmp_path, monkeypatch, capsys):
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    serve_cli.main(["sample", str(drawn / "neyman/onnx"), "--note", NOTES[0], "--note", NOTES[2], "--n", "3", "--steps", "2"])
    serve_cli.main(["sample", str(drawn / "neyman/onnx"), "--note", NOTES[0], "--note", NOTES[2], "--n", "3", "--steps", "2", "--out", "s.npy"])
    sheet, images = np.asarray(Image.open("sheet.png")), np.load("s.npy")
    assert sheet.shape == (2 * 128, 3 * 128) and (sheet[::4, ::4][32:, 64:] == images[1, 2]).all()
    assert "trained on synthetic data" in capsys.readouterr().out
    serve_cli.main(["sample", str(drawn / "neyman/onnx"), "--note", NOTES[0], "--n", "2", "--steps", "2", "--no-grain", "--out", "smooth.npy"])
    smooth = Synthesizer(drawn / "neyman/onnx", "cpu").sample([NOTES[0]] * 2, 2, grain=False)
    assert (np.load("smooth.npy")[0] == smooth).all() and abs(smooth - images[0, :2].astype(float)).mean() > 1
    capsys.readouterr()
    serve_cli.main(["sample", str(drawn / "neyman/onnx"), "--note", "word " * 30, "--n", "1", "--steps", "1", "--out", "s.npy"])
    assert "cut to its first 9 of 30 words" in capsys.readouterr().out


def test_filling_in_averages_over_drawn_images(drawn, tiny):
    diagnoser, synthesizer = Diagnoser(tiny[1] / "onnx", "cpu"), Synthesizer(drawn / "neyman/onnx", "cpu")
    vitals = [{"temperature": 38.0}, None, None]
    notes = [NOTES[0], "cough", NOTES[2]]
    each = serve.fill_in(diagnoser, synthesizer, notes, {"vitals": vitals}, 3, 2, 2.0)
    assert each.shape == (3, 3, 4)
    for k in range(3):
        images = synthesizer.sample(notes, 2, 2.0, seed=k)
        assert np.allclose(each[k], diagnoser.predict(list(images), notes, vitals=vitals), atol=1e-6)
    assert (serve.fill_in(diagnoser, synthesizer, notes, {"vitals": vitals}, 2, 2, 2.0) == each[:2]).all()
    smooth = serve.fill_in(diagnoser, synthesizer, notes, {"vitals": vitals}, 1, 2, 2.0, grain=False)[0]
    wanted = diagnoser.predict(list(synthesizer.sample(notes, 2, 2.0, grain=False)), notes, vitals=vitals)
    assert np.allclose(smooth, wanted, atol=1e-6) and not np.allclose(smooth, each[0], atol=1e-6)


def test_predict_file_fills_in_marks_the_rows_and_compares(drawn, tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run, n = tiny[1], 3
    common = [str(run / "onnx"), "--data", str(run / "phantoms.npz"), "--split", str(run / "split-s0.npz"), "--missing", "image:0.5"]
    serve_cli.main(["predict", *common, "--out", "plain.csv"])
    serve_cli.main(["predict", *common, "--out", "filled.csv", "--synthesizer", str(drawn / "neyman/onnx"), "--draws", str(n), "--steps", "2"])
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in ("words only", "1 drawn", "4 drawn", "16 drawn", "true image", "1 random", "4 random", "16 random", "16 'healthy'", "16 images drawn without words"))
    plain, filled = ([line.split(",") for line in open(f).read().splitlines()] for f in ("plain.csv", "filled.csv"))
    study, present = data.load_study(run / "phantoms.npz"), np.load(run / "split-s0.npz")["present image:0.5"]
    diagnoser, synthesizer = Diagnoser(run / "onnx", "cpu"), Synthesizer(drawn / "neyman/onnx", "cpu")
    without = [row for row in plain[1:] if not present[int(row[0])][0]]
    assert len(without) > 5
    notes = [str(study.notes[int(row[0])]) for row in without]
    vitals = [study.numeric["vitals"][int(row[0])] if present[int(row[0])][2] else None for row in without]
    wanted = serve.fill_in(diagnoser, synthesizer, notes, {"vitals": vitals}, n, 2, 3.0).mean(0)
    for row, before in zip(filled[1:], plain[1:]):
        if present[int(row[0])][0]:
            assert row == before
        else:
            assert row[1] == before[1] + "+drawn image"
            assert np.allclose(np.array(row[4:], float), wanted[[w[0] for w in without].index(row[0])], atol=2e-6)
    serve_cli.main(["predict", *common, "--out", "smooth.csv", "--synthesizer", str(drawn / "neyman/onnx"), "--draws", str(n), "--steps", "2", "--no-grain"])
    assert "(2 steps, guidance 3, no grain)" in capsys.readouterr().out and open("smooth.csv").read() != open("filled.csv").read()


def filling(tiny, folder):
    """The tiny run as if its absent inputs had been filled, with a branch that counts and donors in its split file, exported."""
    shutil.copytree(tiny[1], folder, ignore=shutil.ignore_patterns("onnx"))
    saved = checkpoint.load(folder / "model.pt")
    saved["config"]["absent"] = "fill"
    g = torch.Generator().manual_seed(0)
    state = saved["adapter"]["state"]
    saved["adapter"]["state"] = {k: v + 0.3 * torch.randn(v.shape, generator=g) if ".mora." in k else v for k, v in state.items()}
    checkpoint.save(folder / "model.pt", saved)
    split = data.read_npz(folder / "split-s0.npz")
    np.savez(folder / "split-s0.npz", **split | {"donors": np.random.default_rng(1).choice(split["train"], (240, 3))})
    export.main(["mora", str(folder)])
    return folder


@pytest.mark.parametrize("absent", ["mask", "fill"])
def test_filling_in_stands_beside_its_controls(drawn, tiny, tmp_path, monkeypatch, capsys, absent):
    """Every row of the comparison is what the named images give: a model whose absent inputs are filled is told whose they are."""
    run = filling(tiny, tmp_path / "run") if absent == "fill" else tiny[1]
    monkeypatch.chdir(tmp_path)
    argv = ["predict", run / "onnx", "--data", run / "phantoms.npz", "--split", run / "split-s0.npz", "--missing", "any:0.7", "--scores", "s.json", "--out", "p.csv",
            "--synthesizer", drawn / "neyman/onnx", "--steps", "2", "--draws", "2"]
    guidances = []
    monkeypatch.setattr(serve_cli, "fill_in", lambda *a: guidances.append((a[4], a[6])) or serve.fill_in(*a))
    serve_cli.main([str(a) for a in argv])
    assert guidances == [(16, 3.0), (16, 0.0)]  # with the words, and without
    said, content = capsys.readouterr().out, json.loads(open("s.json").read())["filled_in"]
    study, split = data.load_study(run / "phantoms.npz"), data.read_npz(run / "split-s0.npz")
    present = split["present any:0.7"]
    rows = np.array([row for row in split["test"] if not present[row, 0] and present[row, 1]])
    notes, labels = [str(study.notes[row]) for row in rows], study.labels[rows]
    have = present[rows, 2]
    vitals, filled = [study.numeric["vitals"][row] if p else None for row, p in zip(rows, have)], None
    before = "words only"
    if absent == "fill":
        vitals = [study.numeric["vitals"][row if p else split["donors"][row, 2]] for row, p in zip(rows, have)]
        filled = [set() if p else {"vitals"} for p in have]
        before = "donor's image"
    d, synthesizer = Diagnoser(run / "onnx", "cpu"), Synthesizer(drawn / "neyman/onnx", "cpu")

    def told(images, own=False):
        names = filled and [each if own else each | {"image"} for each in filled]
        return d.predict(None if images is None else list(images), notes, names, vitals=vitals)

    images = [synthesizer.sample(notes, 2, 3.0, seed=k) for k in range(16)]
    wanted = {f"{k} drawn image{'s' * (k > 1)}": np.mean([told(one) for one in images[:k]], 0) for k in (1, 4, 16)}
    wanted["16 images drawn without words"] = np.mean([told(synthesizer.sample([""] * len(rows), 2, 1.0, seed=k)) for k in range(16)], 0)
    wanted["true image"] = told(study.images[rows], own=True)
    wanted[before] = told(study.images[split["donors"][rows, 0]]) if filled else told(None)
    pool = split["train"][present[split["train"], 0]]
    assert 0 < len(pool) < len(split["train"])
    for kind, members in (("random", pool), ("'healthy'", pool[study.labels[pool] == 0])):
        chosen = data.others(data.groups(study), members, rows, 0, 16)
        assert chosen.shape == (len(rows), 16) and np.isin(chosen, members).all() and not np.isin(chosen, rows).any()
        each = [told(study.images[column]) for column in chosen.T]
        wanted |= {f"{k} {kind} image{'s' * (k > 1)}": np.mean(each[:k], 0) for k in ((1, 4, 16) if kind == "random" else (16,))}
    assert {*content["rows"]} == {*wanted} and content["samples"] == len(rows) > 3
    for name, p in wanted.items():
        for k, value in metrics.scores(labels, p).items():
            assert abs(content["rows"][name][k] - value) < 1e-6, name
    pairs = [("16 drawn images", other) for other in (before, "16 images drawn without words", "16 random images", "16 'healthy' images")] + [("true image", before)]
    assert [(c["ours"], c["theirs"]) for c in content["comparisons"]] == pairs and content["left_out"] == []
    for c in content["comparisons"]:
        again = metrics.paired_samples(labels, wanted[c["ours"]], wanted[c["theirs"]])
        assert all(abs(c[k] - value) < 1e-6 for k, value in again.items()) and c["sentence"] in said.splitlines()
    for row in open("p.csv").read().splitlines()[1:]:
        row = row.split(",")
        if int(row[0]) in rows:
            p = np.mean([told(one)[[*rows].index(int(row[0]))] for one in images[:2]], 0)
            assert row[1].endswith("+drawn image") and np.allclose(np.array(row[4:], float), p, atol=2e-6)


def test_rows_that_cannot_be_compared_are_said(drawn, tiny, tmp_path, monkeypatch, capsys):
    """Without a split, and where the missing table left no training image."""
    monkeypatch.chdir(tmp_path)
    run, s = tiny[1], data.load_study(tiny[1] / "phantoms.npz")
    s.images[:20] = 0
    s.labels[20:] = -1  # then nothing is compared
    data.save_study("s.npz", s)
    common = ["predict", str(run / "onnx"), "--synthesizer", str(drawn / "neyman/onnx"), "--steps", "1", "--draws", "1", "--scores", "s.json"]
    serve_cli.main([*common, "--data", "s.npz"])
    said = capsys.readouterr().out
    assert "no labelled sample's image was withheld, so drawn images are compared with none; --split" in said and "drawn image 20" in said and json.loads(open("s.json").read())["filled_in"] is None
    split = data.read_npz(run / "split-s0.npz")
    key = next(k for k in split if k.startswith("present "))
    split[key][split["train"][s.labels[split["train"]] != 2], 0] = False
    left = data.load_study(run / "phantoms.npz").labels[split["train"]]
    split[key][split["train"], 0] = left == 2
    np.savez("left.npz", **split)
    argv = [*common, "--data", str(run / "phantoms.npz"), "--missing", "image:0.5"]
    serve_cli.main([*argv, "--split", "left.npz"])
    assert "no training image of 'healthy' of another patient is left by the missing table" in capsys.readouterr().out
    content = json.loads(open("s.json").read())["filled_in"]
    assert "16 random images" in content["rows"] and not any("healthy" in name for name in content["rows"]) and len(content["comparisons"]) == 4
    split[key][split["train"], 0] = False
    np.savez("left.npz", **split)
    serve_cli.main([*argv, "--split", "left.npz"])
    assert "no training image of another patient is left by the missing table" in capsys.readouterr().out
    assert len(json.loads(open("s.json").read())["filled_in"]["comparisons"]) == 3


def test_a_folder_whose_absent_inputs_are_filled_is_served_with_drawn_images(drawn, tiny, tmp_path, monkeypatch, capsys):
    """One sample, and a file without donors: what is drawn is told; what else is missing is refused."""
    run = filling(tiny, tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    d, synthesizer = Diagnoser(run / "onnx", "cpu"), Synthesizer(drawn / "neyman/onnx", "cpu")
    common = ["predict", "run/onnx", "--synthesizer", str(drawn / "neyman/onnx"), "--steps", "2", "--draws", "2", "--device", "cpu"]
    serve_cli.main([*common, "--note", NOTES[0], "--temperature", "39"])
    said = capsys.readouterr().out
    each = [d.predict(list(synthesizer.sample(NOTES[:1], 2, 3.0, seed=k)), NOTES[:1], [{"image"}], vitals=[{"temperature": 39}]) for k in range(2)]
    assert all(f"{name:20s} {p:.3f}" in said for name, p in zip(d.classes, np.mean(each, 0)[0]))
    assert "sample 0 has no vitals" in refused_in(tmp_path, serve_cli.main, *common, "--note", NOTES[0])
    s = data.load_study(run / "phantoms.npz").take(np.arange(12))
    s.images[3:5] = 0
    data.save_study("s.npz", s)
    serve_cli.main([*common, "--data", "s.npz", "--out", "p.csv"])
    assert "image+note+vitals 10, note+vitals+drawn image 2" in capsys.readouterr().out
    rows = np.array([line.split(",")[4:] for line in open("p.csv").read().splitlines()[1:]], float)
    notes, vitals = [str(note) for note in s.notes], list(s.numeric["vitals"])
    assert np.allclose(np.delete(rows, [3, 4], 0), np.delete(d.predict(list(phantoms(240, 2).images[:12]), notes, vitals=vitals), [3, 4], 0), atol=2e-6)
    each = [d.predict(list(synthesizer.sample(notes[3:5], 2, 3.0, seed=k)), notes[3:5], [{"image"}] * 2, vitals=vitals[3:5]) for k in range(2)]
    assert np.allclose(rows[3:5], np.mean(each, 0), atol=2e-6)
    s.numeric["vitals"][4] = np.nan
    data.save_study("s.npz", s)
    assert "s.npz: row 4 has no vitals, and run/onnx was trained with absent inputs filled: give --split" in refused_in(tmp_path, serve_cli.main, *common, "--data", "s.npz")


def test_fp16_keeps_inputs_outputs_and_states_its_parity(drawn, tiny, tmp_path, capsys):
    export.main(["selora", str(drawn / "neyman"), "--fp16", "--out", str(tmp_path / "half")])
    export.main(["mora", str(tiny[1]), "--fp16", "--out", str(tmp_path / "mora")])
    for folder, full in ((tmp_path / "half", drawn / "neyman/onnx"), (tmp_path / "mora", tiny[1] / "onnx")):
        manifest = json.loads((folder / "manifest.json").read_text())
        assert manifest["precision"] == "float16" and 1e-5 < manifest["parity"] < serve.tolerance(manifest)
        assert json.loads((full / "manifest.json").read_text())["parity"] < 1e-5
        assert weight_bytes(folder) < 0.55 * weight_bytes(full)
        for graph in manifest["graphs"].values():
            a, b = (onnx.load(where / graph, load_external_data=False).graph for where in (folder, full))
            kinds = lambda values: [(v.name, v.type.tensor_type.elem_type) for v in values]
            assert kinds(a.input) == kinds(b.input) and kinds(a.output) == kinds(b.output)
    for steps, grain in ((20, True), (50, False)):
        given = (*request(2, grain=grain), 3.0, serve.walk(steps, 1000))
        half, full = (Synthesizer(folder, "cpu").run(*given) for folder in (tmp_path / "half", drawn / "neyman/onnx"))
        assert 0 < abs(half - full).max() < 0.05


def test_hot_swap_refuses_what_does_not_belong(drawn, refused, tmp_path):
    os.chdir(drawn)
    said = lambda *argv: refused_in(drawn, export.main, *argv)
    assert "has an adapter 'ones' already" in said("selora", "ones", "--hot-swap", "swap")
    assert "holds a merged export" in said("selora", "ones", "--hot-swap", "ones/onnx")
    assert "leave out --out and --fp16" in said("selora", "ones", "--hot-swap", "swap", "--fp16")
    assert "adapter name '../x'" in said("selora", "ones", "--hot-swap", "swap", "--name", "../x")
    assert "'full' is a reference without an adapter" in said("selora", "ones", "--method", "full")
    assert "ones/adapters/gain-s0.pt: no such adapter" in said("selora", "ones", "--method", "gain")
    os.chdir(tmp_path)
    train_selora.main([*TINY, "--out", "other", "--rule", "fixed", "--pretrain-steps", "21"])
    assert "the run's adapter is for base" in refused_in(tmp_path, export.main, "selora", "other", "--hot-swap", str(drawn / "swap"))


def refused_in(folder, main, *argv):
    """As the fixture `refused`, in a folder that holds runs: one line, code 2, no file more than before."""
    import contextlib
    import io

    before, error = sorted(folder.rglob("*")), io.StringIO()
    with contextlib.redirect_stderr(error), pytest.raises(SystemExit) as stopped:
        main(list(argv))
    assert stopped.value.code == 2 and error.getvalue().count("\n") == 1 and sorted(folder.rglob("*")) == before
    return error.getvalue()


def test_export_replaces_nothing_that_it_did_not_write(drawn, tmp_path):
    for name, content in (("other", '{"name": "an app"}'), ("export", (drawn / "ones/onnx/manifest.json").read_text())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(content)
        (tmp_path / name / "thesis.txt").write_text("mine")
    said = lambda name: refused_in(tmp_path, export.main, "selora", str(drawn / "ones"), "--out", str(tmp_path / name))
    assert "changed or damaged" in said("other") and "holds thesis.txt, which no export wrote" in said("export")
    assert "give --hot-swap too" in refused_in(tmp_path, export.main, "selora", str(drawn / "ones"), "--name", "x")


def test_an_adapter_on_other_layers_is_refused(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(drawn)
    train_selora.main([*TINY, "--out", str(tmp_path / "few"), "--rule", "fixed", "--targets", "unet.*to_tokens.*", "--steps", "4"])
    export.main(["selora", str(tmp_path / "few"), "--hot-swap", str(tmp_path / "swap")])
    said = refused_in(tmp_path, export.main, "selora", "ones", "--hot-swap", str(tmp_path / "swap"))
    assert "its sampler has no adapter on layer 'text.blocks.0.mlp.0'" in said


def rewritten(folder, **entries):
    """Change entries of a manifest and give it its fitting hash again."""
    manifest = json.loads((folder / "manifest.json").read_text()) | entries
    manifest["sha256"] = data.digest({k: v for k, v in manifest.items() if k != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_what_earlier_versions_wrote_is_refused_by_name_and_can_be_exported_over(drawn, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    manifest = json.loads((drawn / "ones/onnx/manifest.json").read_text())
    assert (manifest["format"], manifest["prediction"], manifest["noisier"]) == (3, "velocity", 9.0) and "schedule" not in manifest
    for name, source in (("merged", "ones/onnx"), ("swap", "swap")):
        shutil.copytree(drawn / source, name)
        rewritten(tmp_path / name, format=1)
        monkeypatch.setattr(serve, "open_session", lambda *a, **k: pytest.fail("a session was made"))
        words = f"{name}: exported by an earlier version of minilora (format 1; this one reads 2 and 3); train its run with this version and export again"
        assert words in refused_in(tmp_path, serve_cli.main, "sample", name, "--note", "a")
        assert words in refused_in(tmp_path, export.main, "check", name)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)
        assert words in refused_in(tmp_path, serve_cli.main, "predict", str(tiny[1] / "onnx"), "--note", "a", "--synthesizer", name)
    assert words in refused_in(tmp_path, export.main, "selora", str(drawn / "ones"), "--hot-swap", "swap", "--name", "more")
    export.main(["selora", str(drawn / "ones"), "--out", "merged"])
    assert Synthesizer("merged", "cpu").sample(["a"], 1).shape == (1, 32, 32)
    saved = checkpoint.load(drawn / "ones/model.pt")
    del saved["noisier"]
    checkpoint.save(tmp_path / "old/model.pt", saved | {"schedule": "cosine"})
    assert "old/model.pt: entry 'noisier' is missing; the file was changed, or is of another version" in refused_in(tmp_path, export.main, "selora", "old")


def test_a_graph_that_changed_under_a_server_is_refused(drawn, tiny, tmp_path):
    shutil.copytree(tiny[1] / "onnx", tmp_path / "d")
    shutil.copytree(drawn / "swap", tmp_path / "s")
    diagnoser, synthesizer = Diagnoser(tmp_path / "d", "cpu"), Synthesizer(tmp_path / "s", "cpu")
    for file in ("d/note.onnx", "s/ones.onnx_adapter"):
        (tmp_path / file).write_bytes((tmp_path / file).read_bytes() + b"x")
    with pytest.raises(Refused, match="note.onnx: was changed since the folder was opened"):
        diagnoser.predict(notes=["fever"])
    for _ in range(2):  # not only the first time: the base alone must not answer in its name
        with pytest.raises(Refused, match="ones.onnx_adapter: was changed since"):
            synthesizer.sample(["fever"], steps=1, adapter="ones")
    assert synthesizer.sample(["fever"], steps=1, adapter="neyman").shape == (1, 32, 32)


def test_command_lines_that_cannot_be_served(drawn, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = lambda *argv: refused_in(tmp_path, serve_cli.main, *map(str, argv))
    merged = drawn / "neyman/onnx"
    assert "must end in .png or .npy" in said("sample", merged, "--note", "a", "--out", "s.jpg")
    assert "--n is 0" in said("sample", merged, "--note", "a", "--n", 0)
    assert re.search(r"--n 99999999999: 99999999999 images need about \d+\.\d GiB; \d+\.\d GiB are free", said("sample", merged, "--note", "a", "--n", 99999999999))
    assert "steps is 1001; need an integer from 1 to 1000" in said("sample", merged, "--note", "a", "--steps", 1001)
    assert "guidance is -1.0" in said("sample", merged, "--note", "a", "--guidance", -1)
    assert "adapter 'x' is not in" in said("sample", drawn / "swap", "--note", "a", "--adapter", "x")
    shutil.copytree(merged, tmp_path / "gone")
    (tmp_path / "gone/sampler.onnx").unlink()
    assert "sampler.onnx: missing, but gone/manifest.json names it" in said("sample", "gone", "--note", "a")
    for key, value, words in (("image_size", 64, "draws images of size 64"), ("channels", 3, "draws image channels: 3")):
        shutil.copytree(merged, tmp_path / key)
        rewritten(tmp_path / key, **{key: value})
        assert words in said("predict", tiny[1] / "onnx", "--note", "a", "--synthesizer", key)
    assert "holds a 'mora' export; this needs 'selora'" in said("sample", tiny[1] / "onnx", "--note", "a")
    assert "holds a 'selora' export; this needs 'mora'" in said("predict", merged, "--note", "a")
    assert "--draws is 0" in said("predict", tiny[1] / "onnx", "--note", "a", "--synthesizer", merged, "--draws", 0)


def test_a_run_is_written_for_peft(drawn, tmp_path):
    pytest.importorskip("safetensors", reason="safetensors is in the bench extra")
    from minilora import interchange

    for form, file in (("peft", "adapter_model"), ("diffusers", "pytorch_lora_weights")):
        export.main(["peft", str(drawn / "neyman"), "--out", str(tmp_path / form), "--format", form])
        assert (tmp_path / form / f"{file}.safetensors").stat().st_size > 1000
    model, _, _ = loaded(drawn / "neyman")
    again, _, _ = loaded(drawn / "neyman", base=True)
    interchange.load_peft(again, tmp_path / "peft")
    words = np.load(tmp_path / "peft/words.npz")  # which PEFT's file does not hold
    assert 10 < len(words["ids"]) < 128
    again.text.words.weight.data[words["ids"]] = torch.from_numpy(words["vectors"])
    noise, _, ids = request(2)
    given = torch.from_numpy(noise), torch.tensor([5, 900]), torch.from_numpy(ids)
    with torch.no_grad():
        assert torch.allclose(model(*given), again(*given), atol=1e-6)
    assert "exists and is not an empty folder" in refused_in(tmp_path, export.main, "peft", str(drawn / "neyman"), "--out", str(tmp_path / "peft"))


SCARCE = ["--seeds", "1", "--steps", "6", "--pretrain-steps", "6", "--phantoms", "240", "--width", "16", "--depth", "1", "--heads", "2", "--batch", "16", "--buckets", "128",
          "--device", "cpu", "--lr", "0.01", "--methods", "head", "mora"]  # fmt: skip


def test_synthetic_studies_join_the_training_split_only(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(drawn)
    train_mora.main([*SCARCE, "--out", str(tmp_path / "plain")])
    plain = np.load(tmp_path / "plain/split-s0.npz")
    run = tmp_path / "draw"  # trained on what the missing table of that run leaves
    train_selora.main([*TINY, "--out", str(run), "--rule", "fixed", "--steps", "4", "--table", str(tmp_path / "plain")])
    whole = plain["train"][plain["present any:0.7"][plain["train"]].all(1)]
    assert (data.read_npz(run / "split-s0.npz")["train"] == whole).all() and len(whole) < 0.5 * len(plain["train"])
    train_mora.main([*SCARCE, "--out", str(tmp_path / "more"), "--augment", f"{run}:30"])
    more = np.load(tmp_path / "more/split-s0.npz")
    assert all((plain[k] == more[k]).all() for k in plain.files)
    source = more["synthetic source"]
    assert np.isin(source, plain["train"]).all() and plain["present any:0.7"][source, 1].all() and more["synthetic images"].shape == (30, 32, 32)
    study = phantoms(240, 2).select(("image", "note"))
    cut = draw_task(train_mora.Config(phantoms=240, seeds=1), study, 0)
    cut |= {k: more[f"synthetic {k}"] for k in ("source", "images", "present")}
    vit = dict(image_size=32, channels=1, buckets=128, positions=12)
    tensors = load_task(study, cut, "any:0.7", vit, "cpu")
    assert (tensors["train"] == [*plain["train"], *range(240, 270)]).all() and len(tensors["labels"]) == 270
    assert (tensors["labels"][240:].numpy() == study.labels[source]).all()
    assert (tensors["inputs"]["note"][240:] == tensors["inputs"]["note"][source]).all()
    assert torch.equal(batch_at(tensors["inputs"], slice(240, None))["image"][:, 0], torch.from_numpy(more["synthetic images"] / np.float32(127.5) - 1))
    assert 0.2 < tensors["present"][240:, 0].mean() < 0.95  # the missing table is drawn for them too
    reports = {name: json.loads((tmp_path / f"{name}/metrics.json").read_text()) for name in ("plain", "more")}
    assert reports["more"]["augment"] == f"{run}:30" and reports["more"]["methods"]["mora"]["macro_f1"] != reports["plain"]["methods"]["mora"]["macro_f1"]
    config = json.loads((tmp_path / "more/config.json").read_text())
    adapters = sorted((run / "adapters").glob("*-s0.pt"))
    assert adapters and config["augment"] == {"run": f"{run}:30", "sha256": {p.name: data.sha256(p) for p in (run / "model.pt", *adapters)}}


def test_controls_of_synthetic_studies_need_no_run_and_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "random").mkdir()  # the name of a control wins over a folder
    (tmp_path / "class").mkdir()
    for control in ("random", "class", "own"):
        argv = [*SCARCE, "--out", f"r-{control}", "--augment", f"{control}:30"]
        train_mora.main(argv)
        real = len(np.load(f"r-{control}/split-s0.npz")["train"])
        assert f"seed 0: 30 studies added by --augment {control}:30 to {real} real ones" in capsys.readouterr().out
        assert json.loads((tmp_path / f"r-{control}/config.json").read_text())["augment"] == f"{control}:30"
        train_mora.main([*argv, "--resume"])
    said = refused_in(tmp_path, train_mora.main, *SCARCE, "--out", "r-own", "--augment", "own:31", "--resume")
    assert "augment own:30 there, own:31 here" in said
    random, alike, own = (np.load(tmp_path / f"r-{control}/split-s0.npz") for control in ("random", "class", "own"))
    assert (random["train"] == own["train"]).all() and not np.array_equal(random["synthetic images"], own["synthetic images"])
    assert (random["synthetic source"] == alike["synthetic source"]).all() and not np.array_equal(random["synthetic images"], alike["synthetic images"])


def withheld_study(seed, content):
    """(study of 3 modalities and patients, its draw): what the table of 0.7 withholds is marked, and otherwise `content`'s."""
    study = data.replace(phantoms(150, 7).select(("image", "note", "vitals")), patients=np.array([f"p{i // 3}" for i in range(150)]))
    study.images[:, :4, :4] = 9
    draw = draw_task(train_mora.Config(missing="any:0.7", seeds=1), study, seed)
    image, note, vitals = ~draw["tables"]["any:0.7"].T
    rng = np.random.default_rng(content)
    study.images[image] = rng.integers(1, 256, (image.sum(), 32, 32))
    study.images[image, :4, :4] = 255
    study.notes = study.notes.astype("U60")
    study.notes[note] = [f"withheld {i}" for i in rng.integers(0, 99, note.sum())]
    study.numeric["vitals"][vitals] = 1e6 + content
    return study, draw


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", ["random", "class", "own", "run"])
def test_what_the_table_withheld_is_not_in_added_studies(kind, seed, tmp_path, monkeypatch):
    """Neither a word, nor an image, nor a number of it; and other content in its place changes nothing."""
    notes, results = [], []
    cfg = train_mora.Config(augment=f"{kind if kind != 'run' else tmp_path}:200", image_size=32)
    for content in (1, 2):
        study, draw = withheld_study(seed, content)
        table, train = draw["tables"]["any:0.7"], draw["parts"]["train"]
        saved = {"study": data.fingerprint(study.select(("image", "note"))), "config": dict(buckets=4096, positions=16), "noisier": 9.0}
        monkeypatch.setattr(task, "load_selora", lambda run, method, seed: (saved, torch.nn.Identity(), torch.nn.Identity()))
        monkeypatch.setattr(task, "tokenize", lambda texts, *sizes: notes.append(list(texts)) or tokenize(texts, *sizes))
        monkeypatch.setattr(task.diffusion, "draw_images", lambda model, vae, ids, seeds, **more: np.repeat(ids[:, :1, None].numpy() % 200 + 1, 32, 1).repeat(32, 2).astype(np.uint8))
        np.savez(tmp_path / f"split-s{seed}.npz", train=train[table[train][:, :2].all(1)])
        added = draw_studies(cfg, study, draw, seed, "cpu")
        source = added["source"]
        assert len(source) == 200 and np.isin(source, train).all() and table[source, 1].all()
        assert not any("withheld" in note for note in study.notes[source]) and (added["images"][:, :4, :4] != 255).all()
        assert (added["present"][:, 2] <= table[source, 2]).all() and not (study.numeric["vitals"][source][added["present"][:, 2]] > 1e5).any()
        assert added["present"].any(1).all() and 0.2 < added["present"][:, 0].mean() < 0.95
        results.append(added)
    assert all(np.array_equal(results[0][name], results[1][name]) for name in ("source", "images", "present"))
    assert len(notes) == 2 * (kind == "run") and not any("withheld" in note for texts in notes for note in texts)


@pytest.mark.parametrize("several", [False, True], ids=["classes", "findings"])
def test_controls_take_another_patient_s_image_or_the_sample_s_own(several):
    study, draw = withheld_study(3, 1)
    table, train = draw["tables"]["any:0.7"], draw["parts"]["train"]
    study.images[train[5]] = study.images[train[60]]  # patients who share a picture are one group
    if several:  # two findings, the second often unlabelled: the whole row counts
        study.labels = np.stack([study.labels // 2, np.where(np.arange(150) % 3, study.labels % 2, -1)], 1)
    group = data.groups(study)
    row_of = {image.tobytes(): i for i, image in enumerate(study.images)}
    added = {}
    for control in ("random", "class", "own"):
        cfg = train_mora.Config(augment=f"{control}:200", image_size=32)
        added[control] = draw_studies(cfg, study, draw, 3, "cpu")
        again = draw_studies(cfg, study, draw, 3, "cpu")
        assert all(np.array_equal(added[control][k], again[k]) for k in again)
    source, own = added["random"]["source"], added["own"]["source"]
    assert (added["class"]["source"] == source).all()
    labels = study.labels.reshape(150, -1)
    for control in ("random", "class"):
        donors = np.array([row_of[image.tobytes()] for image in added[control]["images"]])
        assert np.isin(donors, train).all() and table[donors, 0].all() and (group[donors] != group[source]).all()
        assert len({*donors}) > 0.7 * table[train, 0].sum()
        same = (labels[donors] == labels[source]).all(1).mean()
        assert same == 1 if control == "class" else same < 0.4, "a random image says nothing about the label"
    assert (added["own"]["images"] == study.images[own]).all() and table[own][:, :2].all()
    both = source[table[source, 0]]  # the rows of the two controls are the same, as far as they can be
    assert 10 < len(both) < 200 and (own[: len(both)] == both).all()
    first = source[0]
    alike = (labels == labels[first]).all(1)
    study.patients[alike] = "one"  # each of the label is the same patient, others are not
    with pytest.raises(Refused, match=r"--augment class, seed 3: no training sample of the class, but not the patient, of sample \d+ is left its image"):
        draw_studies(train_mora.Config(augment="class:200", image_size=32), study, draw, 3, "cpu")
    draw_studies(train_mora.Config(augment="random:200", image_size=32), study, draw, 3, "cpu")
    study.patients[:] = "one"
    with pytest.raises(Refused, match=f"--augment random, seed 3: no training sample of another patient than sample {first} is left its image"):
        draw_studies(train_mora.Config(augment="random:9", image_size=32), study, draw, 3, "cpu")


def test_a_smaller_share_lies_in_a_larger_and_leaves_the_test_split_alone():
    study = phantoms(300, 2)
    whole, third, tenth = (data.split(study, 1, share) for share in (1.0, 0.3, 0.1))
    assert (len(third["train"]), len(tenth["train"])) == (round(0.3 * len(whole["train"])), round(0.1 * len(whole["train"])))
    assert set(tenth["train"]) < set(third["train"]) < set(whole["train"]) and (third["test"] == whole["test"]).all()


def test_augmenting_with_a_run_that_saw_more_is_refused(drawn, monkeypatch):
    """More samples, or of these samples more than the missing table left."""
    monkeypatch.chdir(drawn)
    said = lambda *argv: refused_in(drawn, train_mora.main, *SCARCE, "--out", "x", *argv)
    assert "samples outside this run's training split; train it with the same --train-share" in said("--augment", "neyman:30", "--train-share", "0.3")
    split = data.read_npz("neyman/split-s0.npz")
    table = draw_task(train_mora.Config(missing="any:0.7", seeds=1), phantoms(240, 2).select(("image", "note")), 0)["tables"]["any:0.7"]
    count = (~table[split["train"]].all(1)).sum()
    assert f"neyman: at seed 0 it saw {count} samples of which --missing any:0.7 withholds the image or the note here; train it with --table RUN" in said("--augment", "neyman:30")
    assert "was trained on phantoms (target), another study" in said("--augment", "neyman:30", "--phantoms", "250")
    assert "must be SELORA_RUN:COUNT" in said("--augment", "neyman:0")
    assert "must be SELORA_RUN:COUNT" in said("--augment", "neyman")
    assert "--augment needs image and note; the modalities are image" in said("--augment", "neyman:9", "--modalities", "image")
    assert "absent/model.pt: no such file" in said("--augment", "absent:9")
    assert "--train-share is 0.0" in said("--train-share", "0")
