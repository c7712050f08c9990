"""Exported graphs against torch, serving without torch, and the refusal of changed folders and bad requests."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from conftest import ROOT, TINY

import export
import train_mora
from minilora import checkpoint, data, export_mora, serve, serve_cli
from minilora.graphs import check_whole, rename
from minilora.models import build, load_judge, load_mora
from minilora.phantoms import phantoms
from minilora.data import Refused
from minilora.mora import gates

MODALITIES = ("image", "note", "vitals")


@pytest.fixture(scope="module")
def folder(tiny):
    return tiny[1] / "onnx"


@pytest.fixture(scope="module")
def diagnoser(folder):
    return serve.Diagnoser(folder, "cpu")


def samples(n=9, seed=8):
    """n phantoms of any size with whatever the missing table leaves them: (images, notes, vitals rows), None for missing."""
    s = phantoms(n, seed, size=40)
    present = data.missing_table(np.ones((n, 3), bool), MODALITIES, "any:0.8", seed)
    pick = lambda values, m: [v if p else None for v, p in zip(values, present[:, m])]
    return pick(s.images, 0), pick([str(t) for t in s.notes], 1), pick(s.numeric["vitals"], 2)


def test_the_folder_is_complete_and_every_graph_is_valid(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["graphs"]) == 8 and manifest["modalities"] == list(MODALITIES)
    assert set(manifest["files"]) | {"manifest.json"} == {p.name for p in folder.iterdir()}
    for name, file in manifest["graphs"].items():
        model = onnx.load(folder / file, load_external_data=False)
        check_whole(model)
        inputs = {i.name for i in model.graph.input}
        assert inputs == ({*MODALITIES, "present"} if name == "mask" else set(name.split("+")))
        assert {o.name for o in model.graph.output} == {"logits", "probabilities"}
        assert {p.key: p.value for p in model.metadata_props}["pattern"] == name


@pytest.mark.parametrize("method", ["head", "lora", "mora", "mora-open", "mora-all", "prompt", "full"])
@pytest.mark.parametrize("absent", ["mask", "dummy", "fill"])
def test_graphs_equal_torch_for_every_method_and_pattern(tmp_path, monkeypatch, tiny, method, absent):
    """Against the live model with its presence mask, not the folded one that was traced; batches of 5 and 1."""
    run = tmp_path / "r"
    shutil.copytree(tiny[1], run, ignore=shutil.ignore_patterns("onnx", "picks"))
    saved = checkpoint.load(run / "model.pt")
    saved["config"]["absent"] = absent
    adapter = checkpoint.load(run / f"adapters/{method}-s0.pt")
    g = torch.Generator().manual_seed(0)  # a barely trained branch is nearly zero: make it count
    adapter["state"] = {k: v + 0.3 * torch.randn(v.shape, generator=g) if ".mora." in k else v for k, v in adapter["state"].items()}
    checkpoint.save(run / "model.pt", saved | {"adapter": adapter})
    out = export_mora.export_mora(run)
    model = build(saved["config"], saved["base"], method, adapter["rank"], 0, adapter["state"]).eval()
    d = serve.Diagnoser(out, "cpu")
    example, _ = export_mora.golden_inputs(saved["config"], [(1, 1, 1)], n=5)
    seen = []
    for name in d.manifest["graphs"]:
        row = torch.tensor([[float(name == "mask" or m in name.split("+")) for m in MODALITIES]]).expand(5, 3)
        row = torch.tensor([[1.0, 1, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1]]) if name == "mask" else row
        with torch.no_grad():
            wanted = model(example, row, gates(method, row))
        seen.append(wanted)
        for rows in ([0, 1, 2, 3, 4], [2], [1]):
            feed = {k: v[rows].numpy() for k, v in example.items()} | {"present": row[rows].numpy()}
            logits, probabilities = d.run(name, feed)
            np.testing.assert_allclose(logits, wanted[rows], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(probabilities, wanted[rows].softmax(1), rtol=0, atol=1e-5)
    differences = [(a - b).abs().max() for i, a in enumerate(seen) for b in seen[:i]]
    if absent == "fill" and method in ("head", "lora", "mora-open", "full"):
        assert max(differences) == 0  # these see the same and are told nothing
    else:
        assert min(differences) > 1e-4  # patterns do differ


def test_served_metrics_are_the_training_tables(tiny, capsys, tmp_path):
    run = tiny[1]
    serve_cli.main(["predict", str(run / "onnx"), "--data", str(run / "phantoms.npz"), "--split", str(run / "split-s0.npz"),
                "--missing", "image:0.5", "--out", str(tmp_path / "p.csv"), "--device", "cpu"])
    said = capsys.readouterr().out
    row = json.loads((run / "metrics.json").read_text())["methods"]["mora"]["by_test"]["image:0.5"]
    for k in ("macro_f1", "auroc", "accuracy"):
        assert f"{k.replace('_', '-')} {row[k][0]:.3f}" in said
    assert "provider CPUExecutionProvider" in said and "synthetic" in said
    lines = (tmp_path / "p.csv").read_text().splitlines()
    assert len(lines) == 1 + 24 and lines[0].startswith("row,present,label,predicted,p(healthy)")


def test_mixed_batches_equal_one_sample_at_a_time_and_the_mask_graph(diagnoser):
    images, notes, vitals = samples()
    together = diagnoser.predict(images, notes, vitals=vitals)
    given, n = diagnoser.request(images, notes, {"vitals": vitals})
    inputs, present = diagnoser.inputs(given, range(n))
    diagnoser.batch = 5
    np.testing.assert_allclose(diagnoser.predict(images, notes, vitals=vitals), together, rtol=0, atol=1e-6)
    diagnoser.batch = 64
    assert len(np.unique(present, axis=0)) > 3 and not present.all()
    for i in range(len(images)):
        alone = diagnoser.predict(images[i : i + 1], notes[i : i + 1], vitals=vitals[i : i + 1])
        np.testing.assert_allclose(alone[0], together[i], rtol=0, atol=1e-6)
    masked = diagnoser.run("mask", inputs | {"present": present.astype(np.float32)})[1]
    np.testing.assert_allclose(masked, together, rtol=0, atol=1e-5)
    np.testing.assert_allclose(together.sum(1), 1, rtol=1e-5)


def test_a_request_may_name_columns_and_leave_values_out(diagnoser):
    nan = float("nan")
    by_name = diagnoser.predict(vitals=[{"pulse": 90, "temperature": 38.5}])
    np.testing.assert_array_equal(by_name, diagnoser.predict(vitals=[[38.5, nan, 90]]))
    np.testing.assert_array_equal(diagnoser.predict(notes=["fever"], vitals=[[nan, nan, nan]]), diagnoser.predict(notes=["fever"]))
    np.testing.assert_array_equal(diagnoser.predict(notes=["fever"], vitals=[None]), diagnoser.predict(notes=["fever"]))


NO_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] == 'torch': raise ImportError('torch is not here')
sys.meta_path.insert(0, Refuse())
"""


def test_prediction_and_check_where_importing_torch_raises(folder, tmp_path):
    image = tmp_path / "x.npy"
    np.save(image, phantoms(1, 3).images[0])
    for script in ("from minilora.serve_cli import main", "from export import main"):
        for argv in (["check", str(folder), "--device", "cpu"], ["predict", str(folder), "--device", "cpu", "--image", str(image), "--temperature", "39"]):
            code = f"{NO_TORCH}\n{script}\nmain({argv!r})\nassert 'torch' not in sys.modules"
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assert "CPUExecutionProvider" in done.stdout and ("passed" in done.stdout or "present: image, vitals" in done.stdout)


def test_export_is_the_same_bytes_again(tiny, tmp_path):
    again = export_mora.export_mora(tiny[1], tmp_path / "again")
    for p in (tiny[1] / "onnx").iterdir():
        assert (again / p.name).read_bytes() == p.read_bytes(), p.name


def test_check_passes_and_fails_on_other_outputs(folder, tmp_path, capsys):
    serve_check = lambda path: serve.check(path, "cpu")
    assert serve_check(folder) <= serve.TOLERANCES["mora", "float32"] and "passed" in capsys.readouterr().out
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    golden = data.read_npz(other / "golden.npz")
    golden["logits image"] = golden["logits image"] + 1e-3
    data.write_atomic(other / "golden.npz", data.npz_bytes(golden))
    rewrite(other, "files", "golden.npz", data.sha256(other / "golden.npz"))
    with pytest.raises(SystemExit) as stopped:
        serve_cli.main(["check", str(other)])
    assert stopped.value.code == 1 and "FAILED" in capsys.readouterr().out


def rewrite(folder, part, key, value):
    """Change an entry of a manifest and give the manifest its fitting hash again, as somebody who means harm would."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest[part][key] = value
    manifest["sha256"] = data.digest({k: v for k, v in manifest.items() if k != "sha256"})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def damage(path, how):
    content = bytearray(path.read_bytes())
    if how == "flip":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        content = content[: len(content) // 2]
    path.write_bytes(content)
    if how == "remove":
        path.unlink()


@pytest.mark.parametrize("how", ["flip", "cut", "remove"])
@pytest.mark.parametrize("name", ["image.onnx", "mask.onnx", "golden.npz", "manifest.json"])
def test_a_changed_folder_is_refused_before_a_session_is_made(folder, tmp_path, capsys, monkeypatch, name, how):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    damage(other / name, how)
    monkeypatch.setattr(serve.onnxruntime, "InferenceSession", lambda *a, **k: pytest.fail("a session was made"))
    for command in (["check", str(other)], ["predict", str(other), "--note", "fever"]):
        with pytest.raises(SystemExit) as stopped:
            serve_cli.main(command)
        said = capsys.readouterr().err.strip()
        assert stopped.value.code == 2 and "\n" not in said and (name in said or "manifest.json" in said)


def test_a_manifest_cannot_reach_outside_its_folder(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rewrite(other, "files", "../secret", "0")
    with pytest.raises(Refused, match="'files' is .*export.py does not write that"):
        serve.Diagnoser(other)


def inlined(folder, other):
    """A copy of an exported folder as earlier versions wrote it: format 1, each graph with its weights."""
    shutil.copytree(folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    content = (other / "weights.bin").read_bytes()
    for file in manifest["graphs"].values():
        model = onnx.load(other / file, load_external_data=False)
        for weight in model.graph.initializer:
            if weight.data_location == onnx.TensorProto.EXTERNAL:
                place = manifest["weights"][weight.name]
                array = np.frombuffer(content, place["dtype"], int(np.prod(place["shape"])), place["offset"])
                new = weight.name.removeprefix("weight-")
                rename(model.graph, {weight.name: new})
                weight.CopyFrom(onnx.numpy_helper.from_array(array.reshape(place["shape"]), new))
        onnx.checker.check_model(model, full_check=True)
        (other / file).write_bytes(model.SerializeToString())
    (other / "weights.bin").unlink()
    del manifest["weights"], manifest["sha256"], manifest["files"]["weights.bin"]
    manifest["files"] |= {file: data.sha256(other / file) for file in manifest["graphs"].values()}
    manifest["format"] = 1
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": data.digest(manifest)}))
    return other


def test_a_folder_whose_graphs_hold_their_weights_still_serves(folder, tmp_path, diagnoser):
    other = inlined(folder, tmp_path / "old")
    images, notes, vitals = samples()
    np.testing.assert_array_equal(serve.Diagnoser(other, "cpu").predict(images, notes, vitals=vitals), diagnoser.predict(images, notes, vitals=vitals))
    assert serve.check(other, "cpu") < 1e-5


def test_weights_stand_once_in_a_folder_and_no_graph_names_a_file(folder):
    """Far smaller than the same with a copy in each graph; every graph's large weights are of weights.bin."""
    manifest = json.loads((folder / "manifest.json").read_text())
    size = (folder / "weights.bin").stat().st_size
    copies = 0  # bytes that the graphs would hold
    for file in manifest["graphs"].values():
        model = onnx.load(folder / file, load_external_data=False)
        outside = [w for w in model.graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
        assert outside and not any(w.external_data for w in outside) and {w.name for w in outside} <= {*manifest["weights"]}
        assert max((len(w.raw_data) for w in model.graph.initializer), default=0) < 1024
        copies += sum(int(np.prod(manifest["weights"][w.name]["shape"])) * 4 for w in outside)
    assert copies > 5 * size


@pytest.mark.parametrize("change,words", [
    (lambda m: m["weights"][min(m["weights"])].update(offset=10**9), "does not lie in it"), (lambda m: m["weights"][min(m["weights"])].update(offset=-64), "'weights' is"),
    (lambda m: m["weights"][min(m["weights"])].update(shape=[2**39]), "does not lie in it"), (lambda m: m["weights"][min(m["weights"])].update(dtype="object"), "'weights' is"),
    (lambda m: m["weights"][min(m["weights"])].update(shape=[1, 1]), "onnxruntime cannot load it"), (lambda m: m["weights"].pop(min(m["weights"])), "which manifest.json lacks"),
    (lambda m: m["weights"][min(m["weights"])].update(file="../weights.bin"), "'weights' is"),
    (lambda m: m["files"].pop("weights.bin"), "needs weights.bin, whose hash it lacks"), (lambda m: m.pop("weights"), "which manifest.json lacks"),
    (lambda m: m.update(tokenizer="wordpiece"), "needs vocab.txt, whose hash it lacks"), (lambda m: m.update(tokenizer="bpe"), "'tokenizer' is bpe")])
def test_a_table_of_weights_that_does_not_fit_is_refused(folder, tmp_path, change, words):
    """As a stranger could sign it."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    manifest = json.loads((other / "manifest.json").read_text())
    change(manifest)
    del manifest["sha256"]
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": data.digest(manifest)}))
    with pytest.raises(Refused, match=words):
        for graph in manifest["graphs"]:
            serve.Diagnoser(other, "cpu").session(graph)


def test_weights_that_change_while_a_folder_is_open_are_never_used(folder, tmp_path, monkeypatch):
    """The bytes that are hashed are the bytes that are used."""
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    before = serve.read_manifest

    def then_changed(*args):
        manifest = before(*args)
        with open(other / "weights.bin", "r+b") as f:
            f.write(b"\x01")
        return manifest

    monkeypatch.setattr(serve, "read_manifest", then_changed)
    with pytest.raises(Refused, match="weights.bin: was changed since the folder was opened"):
        serve.Diagnoser(other, "cpu")


@pytest.mark.parametrize("value", [0, 4, True, "1", None, [1]])
def test_a_folder_of_another_format_is_refused(folder, tmp_path, value):
    assert json.loads((folder / "manifest.json").read_text())["format"] == 2
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    manifest = json.loads((other / "manifest.json").read_text()) | {"format": value}
    manifest["sha256"] = data.digest({k: v for k, v in manifest.items() if k != "sha256"})
    (other / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Refused, match="other: exported by another version of minilora .format .*; this one reads 1 and 2 and 3.; .*export again"):
        serve.Diagnoser(other, "cpu")


# ---------------------------------------------------------------------------------------------- absent inputs filled


@pytest.fixture(scope="module")
def filling(tmp_path_factory):
    """A run with --absent fill whose branch counts, exported: (run, its folder)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("filling"))
        train_mora.main([*TINY, "--out", "run", "--modalities", *MODALITIES, "--absent", "fill", "--test-missing", "any:0.7", "image:0.5",
                         "--methods", "mora", "--lr", "0.1", "--steps", "40"])
        export.main(["mora", "run"])
        yield Path.cwd() / "run", Path.cwd() / "run/onnx"


def test_every_graph_of_a_folder_whose_absent_inputs_are_filled_takes_everything(filling):
    manifest = json.loads((filling[1] / "manifest.json").read_text())
    assert (manifest["format"], manifest["absent"], len(manifest["graphs"])) == (3, "fill", 8)
    for name, file in manifest["graphs"].items():
        inputs = {i.name for i in onnx.load(filling[1] / file, load_external_data=False).graph.input}
        assert inputs == {*MODALITIES} | ({"present"} if name == "mask" else set())


@pytest.mark.parametrize("missing", ["any:0.7", "image:0.5"])
def test_filled_inputs_are_served_as_in_training(filling, tmp_path, capsys, missing):
    """The content of the donors, and whose it is: every probability that training saw, in --data with the split file."""
    run, folder = filling
    argv = ["predict", folder, "--data", run / "phantoms.npz", "--split", run / "split-s0.npz", "--missing", missing, "--device", "cpu"]
    serve_cli.main([str(a) for a in (*argv, "--out", tmp_path / "p.csv", "--scores", tmp_path / "s.json")])
    said = capsys.readouterr().out
    trained = checkpoint.load(run / "adapters/mora-s0.pt")["result"]["by_test"][missing]
    served = [line.split(",")[4:] for line in (tmp_path / "p.csv").read_text().splitlines()[1:]]
    np.testing.assert_allclose(np.array(served, float), trained["probabilities"], rtol=0, atol=1e-5)
    row = json.loads((run / "metrics.json").read_text())["methods"]["mora"]["by_test"][missing]
    written = json.loads((tmp_path / "s.json").read_text())
    for k in ("macro_f1", "auroc", "accuracy"):
        assert f"{k.replace('_', '-')} {row[k][0]:.3f}" in said and abs(written["scores"][k] - row[k][0]) < 1e-6
    assert (written["samples"], written["missing"], written["filled_in"]) == (24, missing, None)


def test_what_is_filled_is_attended_and_told(filling):
    """A mixed batch, in any order, is the mask graph's answer; content that is filled counts, and so does that it is."""
    d = serve.Diagnoser(filling[1], "cpu")
    s = phantoms(9, 8, size=40)
    images, notes, vitals = list(s.images), [str(t) for t in s.notes], list(s.numeric["vitals"])
    present = data.missing_table(np.ones((9, 3), bool), MODALITIES, "any:0.9", 5)
    filled = [[name for name, p in zip(MODALITIES, row) if not p] for row in present]
    together = d.predict(images, notes, filled, vitals=vitals)
    given, n = d.request(images, notes, {"vitals": vitals})
    inputs, all_there = d.inputs(given, range(n))
    assert all_there.all() and len(np.unique(present, axis=0)) > 3
    masked = d.run("mask", inputs | {"present": present.astype(np.float32)})[1]
    np.testing.assert_allclose(masked, together, rtol=0, atol=1e-5)
    d.batch = 4
    back = d.predict(images[::-1], notes[::-1], tuple(map(frozenset, filled[::-1])), vitals=vitals[::-1])
    np.testing.assert_allclose(back[::-1], together, rtol=0, atol=1e-6)
    own = d.predict(images, notes, vitals=vitals)
    told = abs(own - together).max(1) > 1e-3
    assert (told == ~present.all(1)).all()
    others = d.predict(images[::-1], notes, [{"image"}] * 9, vitals=vitals)
    assert (abs(others - d.predict(images, notes, [{"image"}] * 9, vitals=vitals)).max(1) > 1e-4).sum() >= 8  # the fifth is its own


ROW = [[38.0, 95.0, 90.0]]
NOISE = [np.arange(64, dtype=np.uint8).reshape(8, 8)]
UNFILLED = [({"notes": ["a"]}, "sample 0 has no image: .* was trained with absent inputs filled: give content for image and name it in filled"),
            ({"notes": ["a"], "filled": [{"image"}], "vitals": ROW}, "sample 0 has no image"),
            ({"images": NOISE * 2, "notes": ["a", " "], "vitals": ROW * 2}, "sample 1 has no note"),
            ({"filled": [{*MODALITIES}]}, "all of image, note, vitals is named in filled, so that nothing is the patient's own"),
            ({"filled": [{"sound"}]}, "filled of sample 0 names 'sound'; this model has image, note, vitals"), ({"filled": [[5]]}, "names 5; this model has"),
            ({"filled": [[["image"]]]}, "names \\['image'\\]; this model has"),
            ({"filled": ["image"]}, "filled of sample 0 is str; need a set or a list"), ({"filled": [None]}, "filled of sample 0 is NoneType"),
            ({"filled": "image"}, "filled is one str; give a list"), ({"filled": {"image"}}, "filled is one set; give a list"), ({"filled": 1}, "filled is one int"),
            ({"filled": [set(), set()]}, "filled has 2 items for 1 samples")]  # fmt: skip


@pytest.mark.parametrize("request_,words", UNFILLED, ids=[w[:50] for _, w in UNFILLED])
def test_requests_that_do_not_say_what_is_filled_are_refused(filling, request_, words):
    d = serve.Diagnoser(filling[1], "cpu")
    if "notes" not in request_:
        request_ = {"images": NOISE, "notes": ["a"], "vitals": ROW} | request_
    with pytest.raises(Refused, match=words) as said:
        d.predict(**request_)
    assert "\n" not in str(said.value)


def test_other_folders_take_nothing_that_is_filled(diagnoser, folder, refused):
    with pytest.raises(Refused, match="filled of sample 1 names 'image', but .* was not trained with absent inputs filled; leave filled out"):
        diagnoser.predict(notes=["a", "b"], filled=[[], {"image"}])
    np.testing.assert_array_equal(diagnoser.predict(notes=["a"], filled=[set()]), diagnoser.predict(notes=["a"]))
    assert "was not trained with absent inputs filled" in refused(serve_cli.main, "predict", folder, "--note", "a", "--filled", "image")


def test_a_command_line_says_what_is_filled(filling, tmp_path, capsys):
    np.save(tmp_path / "x.npy", NOISE[0])
    argv = ["predict", str(filling[1]), "--device", "cpu", "--note", "fever", "--image", str(tmp_path / "x.npy"), "--temperature", "38"]
    d, said = serve.Diagnoser(filling[1], "cpu"), []
    for flags, names, words in (([], [], "present: image, note, vitals\n"), (["--filled", "image", "--filled", "vitals"], ["image", "vitals"], "present: note; filled: image, vitals\n")):
        serve_cli.main([*argv, *flags])
        said.append(capsys.readouterr().out)
        p = d.predict(NOISE, ["fever"], [names], vitals=[{"temperature": 38}])[0]
        assert words in said[-1] and all(f"{name:20s} {value:.3f}" in said[-1] for name, value in zip(d.classes, p))
    assert said[0].splitlines()[2:] != said[1].splitlines()[2:]


def test_study_files_without_donors_are_refused(filling, folder, tiny, refused, tmp_path):
    run, out = filling
    s = data.load_study(run / "phantoms.npz")
    whole = s.images.copy()
    s.images[7] = 0
    data.save_study(run / "gap.npz", s)
    said = lambda *argv: refused(serve_cli.main, "predict", out, *argv)
    words = f"{run}/gap.npz: row 7 has no image, and {out} was trained with absent inputs filled: give --split RUN/split-sN.npz, which names donors, or for images --synthesizer"
    assert words in said("--data", run / "gap.npz")
    assert "names no donors" in said("--data", tiny[1] / "phantoms.npz", "--split", tiny[1] / "split-s0.npz")
    assert "--filled image is for one sample" in said("--data", run / "phantoms.npz", "--filled", "image")
    assert "--scores s.json is for --data" in said("--note", "a", "--scores", "s.json")
    data.save_study(run / "pair.npz", s.select(("note", "vitals"), False))
    assert "pair.npz: has no image, and" in said("--data", run / "pair.npz")
    arrays = data.read_npz(run / "split-s0.npz")
    row = arrays["test"][~arrays["present image:0.5"][arrays["test"], 0]][0]
    s.images[:] = whole
    s.images[arrays["donors"][row, 0]] = 0
    data.save_study(run / "gap.npz", s)
    donor = arrays["donors"][row, 0]
    assert f"split-s0.npz: row {donor} is a donor of its image, and has none" in said("--data", run / "gap.npz", "--split", run / "split-s0.npz", "--missing", "image:0.5")
    for odd in (arrays["donors"] + 240, -arrays["donors"] - 1, arrays["donors"][:, :2], arrays["donors"].astype(float), arrays["donors"][:9]):
        np.savez(run / "odd.npz", **arrays | {"donors": odd})
        assert "odd.npz: donors" in said("--data", run / "phantoms.npz", "--split", run / "odd.npz")
    for key, odd in (("test", arrays["test"] + 240), ("test", arrays["test"].astype(float)), ("train", arrays["train"] - 240), ("present any:0.7", arrays["present any:0.7"][:, :2])):
        np.savez(run / "odd.npz", **arrays | {key: odd})
        assert "odd.npz: not a split of the 240 samples" in said("--data", run / "phantoms.npz", "--split", run / "odd.npz")


def test_a_reader_that_knows_no_filled_inputs_refuses_the_folder(filling, folder, tmp_path, monkeypatch):
    for source, change, words in ((filling[1], {"format": 2}, "'absent' is fill"), (filling[1], {"absent": "mask"}, "'absent' is mask"), (folder, {"format": 3}, "'absent' is mask"),
                                  (folder, {"absent": "fill"}, "'absent' is fill")):
        other = tmp_path / "other"
        shutil.copytree(source, other)
        manifest = json.loads((other / "manifest.json").read_text()) | change
        del manifest["sha256"]
        (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": data.digest(manifest)}))
        with pytest.raises(Refused, match=f"{words}; export.py does not write that"):
            serve.Diagnoser(other, "cpu")
        shutil.rmtree(other)
    monkeypatch.setitem(serve.FORMATS, "mora", (1, 2))  # as earlier versions
    with pytest.raises(Refused, match="exported by another version of minilora .format 3"):
        serve.Diagnoser(filling[1], "cpu")


GREY = np.zeros((8, 8), np.uint8)
REQUESTS = [({"images": [GREY.astype(np.float32)]}, "image of sample 0 is float32"), ({"images": [np.full((4, 4), np.nan)]}, "with NaN"),
            ({"images": [np.zeros((4, 4, 4), np.uint8)]}, r"\[4, 4, 4\]"), ({"images": [np.zeros((0, 4), np.uint8)]}, r"\[0, 4\]"),
            ({"images": [np.zeros((4, 4, 3), np.uint8)]}, "takes 1 channel"), ({"notes": [5]}, "note of sample 0 is int"),
            ({"images": [GREY, None], "notes": ["a", " "]}, "sample 1 has nothing"), ({}, "no modality"), ({"notes": []}, "note 0"),
            ({"images": [GREY], "notes": ["a", "b"]}, "image 1, note 2"), ({"sound": [[1.0]]}, "'sound' is not of this model"),
            ({"vitals": [[1.0, 2.0]]}, "need 3 finite numbers"), ({"vitals": [[1, 2, float("inf")]]}, "need 3 finite"),
            ({"notes": "fever"}, "note is one str; give a list"), ({"images": np.array(5)}, "image is one ndarray; give a list"), ({"vitals": [{"fever": 1}]}, "column 'fever' is not known"), ({"vitals": [["a", "b", "c"]]}, "temperature is 'a', which is no number")]  # fmt: skip


@pytest.mark.parametrize("request_,words", REQUESTS, ids=[w for _, w in REQUESTS])
def test_bad_requests_are_refused_and_the_next_good_one_is_answered(diagnoser, request_, words):
    before = diagnoser.predict(notes=["fever"])
    with pytest.raises(ValueError, match=words):
        diagnoser.predict(**request_)
    np.testing.assert_array_equal(diagnoser.predict(notes=["fever"]), before)


def test_bad_graph_inputs_are_refused(diagnoser):
    ids = np.ones((1, diagnoser.manifest["positions"]), np.int64)
    for bad in (-1, diagnoser.manifest["buckets"], 2**40):
        with pytest.raises(Refused, match="word ids"):
            diagnoser.run("note", {"note": ids * bad})
    with pytest.raises(Refused, match="shape"):
        diagnoser.run("note", {"note": ids[:, :2]})
    with pytest.raises(Refused, match="needs input 'note'"):
        diagnoser.run("note", {})


def test_command_lines_are_refused_in_one_line(folder, tiny, refused, tmp_path, monkeypatch):
    picture = tiny[0] / "x.png"
    picture.write_bytes(b"not a picture")
    assert "no such file" in refused(serve_cli.main, "predict", folder, "--image", "absent.png")
    assert "not a readable picture" in refused(serve_cli.main, "predict", folder, "--image", picture)
    assert "nothing to diagnose" in refused(serve_cli.main, "predict", folder)
    assert "no manifest.json" in refused(serve_cli.main, "predict", tiny[0], "--note", "a")
    assert "absent.npz" in refused(serve_cli.main, "predict", folder, "--data", "absent.npz")
    assert "'tpu'" in refused(serve_cli.main, "predict", folder, "--note", "a", "--device", "tpu")
    data.save_study(tiny[0] / "other.npz", phantoms(30, 1).select(("labs",)))
    assert "other.npz: has labs" in refused(serve_cli.main, "predict", folder, "--data", tiny[0] / "other.npz")
    assert "no such file" in refused(export.main, "mora", "absent")
    assert "cannot be served" in refused(export.main, "mora", tiny[1], "--method", "mora-shuffled")
    assert "this run has full-s0" in refused(export.main, "mora", tiny[1], "--seed", "5")
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert "pip install 'minilora[pictures]'" in refused(serve_cli.main, "predict", folder, "--image", picture)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_that_does_not_load_is_refused(folder, refused):
    assert "device 'cuda'" in refused(serve_cli.main, "predict", folder, "--note", "fever", "--device", "cuda")


def test_a_picture_is_predicted_like_its_array(folder, tmp_path, capsys):
    pil = pytest.importorskip("PIL.Image")
    image = phantoms(1, 3).images[0]
    pil.fromarray(image).save(tmp_path / "x.png")
    np.save(tmp_path / "x.npy", image)
    said = []
    for name in ("x.png", "x.npy"):
        serve_cli.main(["predict", str(folder), "--image", str(tmp_path / name), "--note", "fever"])
        said.append(capsys.readouterr().out)
    assert said[0] == said[1] and "present: image, note" in said[0] and "not a diagnosis of anybody" in said[0]


def test_five_modalities_get_graphs_for_the_patterns_of_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = phantoms(240, 4)
    s.numeric["more"], s.columns["more"] = s.numeric["labs"].copy(), ["weight", "height"]
    data.save_study("five.npz", s)
    train_mora.main([*TINY, "--methods", "head", "mora", "--out", "r", "--data", "five.npz", "--missing", "image:0.5"])
    d = serve.Diagnoser(export_mora.export_mora("r"), "cpu")
    assert set(d.manifest["graphs"]) == {"mask", "image+note+vitals+labs+more", "note+vitals+labs+more"}
    assert d.predict(notes=["fever"]).shape == (1, 4)  # through the mask graph


def test_an_export_killed_between_its_two_renames_is_undone_by_the_next(tiny, tmp_path, monkeypatch):
    shutil.copytree(tiny[1], tmp_path / "run")
    os.replace(tmp_path / "run/onnx", tmp_path / "run/.onnx.123.old")
    monkeypatch.setattr(export_mora, "trace", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export.main(["mora", str(tmp_path / "run")])
    assert serve.Diagnoser(tmp_path / "run/onnx", "cpu") and not (tmp_path / "run/.onnx.123.old").exists()


def test_an_interrupted_export_leaves_the_old_folder(tiny, tmp_path, monkeypatch):
    out = tmp_path / "onnx"
    shutil.copytree(tiny[1] / "onnx", out)
    before = {p.name: p.read_bytes() for p in out.iterdir()}
    monkeypatch.setattr(export_mora, "trace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export_mora.export_mora(tiny[1], out)
    assert os.listdir(tmp_path) == ["onnx"] and {p.name: p.read_bytes() for p in out.iterdir()} == before


def test_export_never_replaces_a_folder_that_is_not_an_export(tiny, refused, tmp_path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious/thesis.txt").write_text("years")
    assert "is not an exported folder" in refused(export.main, "mora", tiny[1], "--out", "precious")
    assert "is not an exported folder" in refused(export.main, "mora", tiny[1], "--out", tiny[1])
    assert (tiny[1] / "model.pt").exists()


def test_a_flipped_model_is_refused_by_export(tiny, refused, tmp_path):
    shutil.copytree(tiny[1], tmp_path / "run", ignore=shutil.ignore_patterns("onnx"))
    damage(tmp_path / "run/model.pt", "flip")
    assert "model.pt" in refused(export.main, "mora", "run")


def test_a_graph_outside_the_hashes_is_refused(folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    rewrite(other, "graphs", "mask", "evil.onnx")
    with pytest.raises(Refused, match="whose hash it lacks"):
        serve.Diagnoser(other, "cpu")


def test_files_without_labels_or_with_one_class_are_predicted(tiny, folder, tmp_path, capsys):
    s = data.load_study(tiny[1] / "phantoms.npz").take(np.arange(6))
    s.labels[:] = 2
    data.save_study(tmp_path / "one.npz", s)
    arrays = {k: v for k, v in data.read_npz(tmp_path / "one.npz").items() if k not in ("labels", "class_names")}
    np.savez(tmp_path / "none.npz", **arrays)
    for name, labelled in (("one", 6), ("none", 0)):
        serve_cli.main(["predict", str(folder), "--data", str(tmp_path / f"{name}.npz"), "--device", "cpu", "--out", str(tmp_path / "p.csv")])
        assert f"6 samples, {labelled} labelled" in capsys.readouterr().out
        assert len((tmp_path / "p.csv").read_text().splitlines()) == 7


def test_arrays_that_are_no_pictures_are_refused(folder, tmp_path, refused):
    np.save(tmp_path / "float.npy", np.full((8, 8, 3), 0.5))
    assert "float64" in refused(serve_cli.main, "predict", folder, "--image", "float.npy")
    np.save(tmp_path / "rgba.npy", np.zeros((8, 8, 4), np.uint8))
    assert "[8, 8, 4]" in refused(serve_cli.main, "predict", folder, "--image", "rgba.npy")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_whole_way_on_cuda(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [a if a != "cpu" else "cuda" for a in TINY]
    train_mora.main([*argv, "--methods", "head", "mora", "prompt", "--out", "r"])
    out = export_mora.export_mora("r")
    assert serve.check(out, "cuda") <= serve.TOLERANCES["mora", "float32"]
    assert serve.Diagnoser(out, "cuda").provider == "CUDAExecutionProvider"


def test_an_unlabelled_file_is_predicted_by_a_model_of_several_findings(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    s = phantoms(240, 4).select(("note",))
    s.labels = np.stack([s.labels == c for c in range(4)], 1).astype(np.int64)
    data.save_study("several.npz", s)
    train_mora.main([*TINY, "--methods", "head", "mora", "--out", "r", "--data", "several.npz"])
    out = export_mora.export_mora("r")
    np.savez("none.npz", notes=s.notes[:5])
    serve_cli.main(["predict", str(out), "--data", "none.npz", "--device", "cpu", "--out", "p.csv"])
    assert "5 samples, 0 labelled" in capsys.readouterr().out
    for line in (tmp_path / "p.csv").read_text().splitlines()[1:]:
        _, _, label, said, *p = line.split(",")
        assert label == "" and (said.count("|") + 1 if said else 0) == sum(float(v) >= 0.5 for v in p)


# ---------------------------------------------------------------------------------------------- weights that fit nothing


def entries(value, form, path=()):
    """The path of every entry that is read of a file's content, at every level."""
    if isinstance(form, tuple):
        form = form[isinstance(value, form[1]) if isinstance(form[1], type) else 0]
    if isinstance(form, dict):
        anything = isinstance(next(iter(form)), type)
        for name in list(value)[:: 1 + len(value) // 20]:  # of many weights some
            each = form.get(type(name)) if anything else form.get(name, form.get(f"{name}?"))
            if each is not None:
                yield (*path, name)
                yield from entries(value[name], each, (*path, name))
    elif isinstance(form, list):
        for i, each in enumerate(value):
            yield (*path, i)
            yield from entries(each, form[i % len(form)], (*path, i))


def changes(content, form):
    """(what was done, changed content) for every entry that is read: deleted, renamed, of another type or shape."""
    for path in entries(content, form):
        name = ".".join(map(str, path))
        for odd in ("delete", "rename", None, "x", [], 7.5, torch.zeros(7, 3), torch.zeros(())):
            changed = copy.deepcopy(content)
            part = changed
            for key in path[:-1]:
                if isinstance(part[key], tuple):
                    part[key] = list(part[key])
                part = part[key]
            old = part[path[-1]]
            if odd == "delete":
                del part[path[-1]]
            elif odd == "rename" and isinstance(part, dict):
                part[f"{path[-1]}x" if isinstance(path[-1], str) else 99] = part.pop(path[-1])
            elif odd == "rename" or type(odd) is type(old) and odd != []:
                continue  # another value of the same type can be right
            else:
                part[path[-1]] = odd
            yield f"{name} {odd}", changed


def same(a, b):
    """Whether two results hold the same values."""
    if isinstance(a, dict):
        return isinstance(b, dict) and [*a] == [*b] and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, (torch.Tensor, np.ndarray)):
        a, b = np.asarray(a), np.asarray(b)
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    return type(a) is type(b) and (a == b or a != a and b != b)


def only_refused(path, form, read, fewer=()):
    """Change every entry of a file: `read()` refuses it in one line that names the file, or gives what it gave. Entries of
    `fewer` may be missing, as in files of earlier versions. Returns how often it was refused."""
    wanted, unpack, refused = read(), checkpoint.read_archive, 0
    with pytest.MonkeyPatch.context() as patch:
        for what, changed in changes(checkpoint.load(path), form):
            patch.setattr(checkpoint, "read_archive", lambda p: changed if p == path else unpack(p))  # as if the file held it
            try:
                result = read()
            except Refused as error:
                assert str(path) in str(error) and len(str(error).splitlines()) == 1, (what, error)
                refused += 1
            else:
                assert what in fewer or same(result, wanted), what
    return refused


def exported(run, method=None, seed=None):
    """All that an export of a MoRA run rests on: what the manifest says, the golden inputs, the weights."""
    saved, model = load_mora(run, method, seed)
    golden = export_mora.golden_inputs(saved["config"], [(1,) * len(model.modalities)])
    return export_mora.described(saved, {}, "float32"), golden, model.state_dict()


def copied(tiny, tmp_path):
    shutil.copytree(tiny[1], tmp_path / "run", ignore=shutil.ignore_patterns("onnx", "*.png"))
    return tmp_path / "run"


def test_every_entry_of_a_model_and_of_an_adapter_counts(tiny, tmp_path):
    run, form = copied(tiny, tmp_path), checkpoint.FORMS["mora"]
    assert only_refused(run / "model.pt", form, lambda: exported(run)) > 500
    assert only_refused(run / "adapters/lora-s0.pt", checkpoint.FORMS["mora adapter"], lambda: exported(run, "lora")) > 200
    target = phantoms(9, 7).select(("image", "note"))
    judge = lambda: {k: v for k, v in load_judge(run, "cpu", target, None).state_dict().items() if not k.startswith("head.")}
    assert only_refused(run / "model.pt", {k: form[k] for k in ("config", "base", "source_images?")}, judge) > 200


def test_an_adapter_whose_weights_are_renamed_or_of_another_base_is_refused(tiny, refused, tmp_path):
    run = copied(tiny, tmp_path)
    saved, file = checkpoint.load(run / "model.pt"), checkpoint.load(run / "adapters/lora-s0.pt")
    state = {name.replace(".mora.", ".lora."): value for name, value in saved["adapter"]["state"].items()}
    checkpoint.save(run / "model.pt", saved | {"adapter": saved["adapter"] | {"state": state}})
    said = refused(export.main, "mora", run)
    assert "run/model.pt: the adapter, method 'mora': weight 'blocks.0.lora.down' fits nothing; expected here: blocks.0.mora.down, blocks.0.mora.up (of" in said
    checkpoint.save(run / "model.pt", saved)
    checkpoint.save(run / "adapters/lora-s0.pt", file | {"state": saved["adapter"]["state"]})  # of another method
    assert "lora-s0.pt: the adapter, method 'lora': weight 'blocks.0.mora.down' is a tensor [16, 4] of torch.float32; must be a tensor [16, 8]" in refused(
        export.main, "mora", run, "--method", "lora")
    checkpoint.save(run / "adapters/lora-s0.pt", file | {"base_hash": "0" * 16})
    assert f"lora-s0.pt: an adapter for base {'0' * 16}, not for base {saved['base_hash']}" in refused(export.main, "mora", run, "--method", "lora")
    saved["base"]["cls"][0, 0, 3] = float("nan")  # nan differs from nan by no number: parity would pass
    checkpoint.save(run / "model.pt", saved)
    assert "run/model.pt: entry 'base': weight 'cls' holds numbers that are not finite" in refused(export.main, "mora", run)
    saved["base"]["cls"][0, 0, 3] = checkpoint.load(tiny[1] / "model.pt")["base"]["cls"][0, 0, 3]
    checkpoint.save(run / "model.pt", saved)
    del file["base_hash"]  # as in files of earlier versions
    checkpoint.save(run / "adapters/lora-s0.pt", file)
    assert same(exported(run, "lora"), exported(tiny[1], "lora"))
