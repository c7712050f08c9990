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
from minilora import checkpoint, data, diffusion, export_selora, report, selora, serve, serve_cli
from minilora.graphs import check_whole, graphs_in
from minilora.models import put_words
from minilora.phantoms import phantoms
from minilora.task import batch_at, draw_task, load_task
from minilora.words import tokenize
from minilora.serve import Diagnoser, Refused, Synthesizer
from minilora.unet import Denoiser
from minilora.vae import VAE

TINY = ["--seeds", "1", "--steps", "20", "--pretrain-steps", "20", "--vae-steps", "30", "--phantoms", "240", "--batch", "8", "--width", "8", "--text-width", "8",
        "--vae-width", "8", "--heads", "2", "--buckets", "128", "--positions", "10", "--sample-steps", "2", "--lr", "0.05", "--device", "cpu"]  # fmt: skip
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
    assert done.returncode == 0 and "4 drawn from the words" in done.stdout, done.stderr
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
    assert all(f"  {name} " in said for name in ("words only", "1 drawn", "4 drawn", "16 drawn", "true image"))
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
    assert "give the folder too" in refused_in(tmp_path, export.main, "selora", str(drawn / "ones"), "--name", "x")


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
    assert re.search(r"--n 99999999999: 99999999999 images need about \d+\.\d GiB; \d+\.\d are free", said("sample", merged, "--note", "a", "--n", 99999999999))
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
    train_mora.main([*SCARCE, "--out", str(tmp_path / "more"), "--augment", "neyman:30"])
    plain, more = (np.load(tmp_path / f"{name}/split-s0.npz") for name in ("plain", "more"))
    assert all((plain[k] == more[k]).all() for k in plain.files)
    assert np.isin(more["synthetic source"], plain["train"]).all() and more["synthetic images"].shape == (30, 32, 32)
    study = phantoms(240, 2).select(("image", "note"))
    cut = draw_task(train_mora.Config(phantoms=240, seeds=1), study, 0)
    cut |= {k: more[f"synthetic {k}"] for k in ("source", "images", "present")}
    vit = dict(image_size=32, channels=1, buckets=128, positions=12)
    task = load_task(study, cut, "any:0.7", vit, "cpu")
    assert (task["train"] == [*plain["train"], *range(240, 270)]).all() and len(task["labels"]) == 270
    assert (task["labels"][240:].numpy() == study.labels[more["synthetic source"]]).all()
    assert (task["inputs"]["note"][240:] == task["inputs"]["note"][more["synthetic source"]]).all()
    assert torch.equal(batch_at(task["inputs"], slice(240, None))["image"][:, 0], torch.from_numpy(more["synthetic images"] / np.float32(127.5) - 1))
    assert 0.2 < task["present"][240:, 0].mean() < 0.95  # the missing table is drawn for them too
    report = json.loads((tmp_path / "more/metrics.json").read_text())
    assert report["augment"] == "neyman:30" and report["methods"]["mora"]["macro_f1"] != json.loads(
        (tmp_path / "plain/metrics.json").read_text())["methods"]["mora"]["macro_f1"]


def test_a_smaller_share_lies_in_a_larger_and_leaves_the_test_split_alone():
    study = phantoms(300, 2)
    whole, third, tenth = (data.split(study, 1, share) for share in (1.0, 0.3, 0.1))
    assert (len(third["train"]), len(tenth["train"])) == (round(0.3 * len(whole["train"])), round(0.1 * len(whole["train"])))
    assert set(tenth["train"]) < set(third["train"]) < set(whole["train"]) and (third["test"] == whole["test"]).all()


def test_augmenting_with_a_run_that_saw_more_is_refused(drawn, monkeypatch):
    monkeypatch.chdir(drawn)
    said = lambda *argv: refused_in(drawn, train_mora.main, *SCARCE, "--out", "x", *argv)
    assert "samples outside this run's training split; train it with the same --train-share" in said("--augment", "neyman:30", "--train-share", "0.3")
    assert "was trained on phantoms (target), another study" in said("--augment", "neyman:30", "--phantoms", "250")
    assert "must be SELORA_RUN:COUNT" in said("--augment", "neyman:0")
    assert "must be SELORA_RUN:COUNT" in said("--augment", "neyman")
    assert "--augment draws images from notes; the modalities are image" in said("--augment", "neyman:9", "--modalities", "image")
    assert "absent/model.pt: no such file" in said("--augment", "absent:9")
    assert "--train-share is 0.0" in said("--train-share", "0")
