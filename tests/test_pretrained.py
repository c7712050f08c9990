"""A ViLT in the layout of transformers: the same hidden states as theirs, the whole way to serving, and what is refused."""

import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import export
import train_mora
from minilora import checkpoint, data, serve
from minilora.models import load_mora, make_vit
from minilora.phantoms import phantoms
from minilora.pretrained import read_vilt, read_vocabulary
from minilora.vit import ViT
from minilora.words import words_of

SIZES = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8,
             vocab_size=90, max_position_embeddings=12)
B32 = dict(num_hidden_layers=12)  # the defaults of a ViltConfig are those of ViLT-B/32


def pieces(size):
    """The text of a vocabulary: special pieces, single characters, and words that the phantoms' notes have."""
    words = sorted({w for note in phantoms(50, 0, "target").notes for w in words_of(note)})
    letters = "abcdefghijklmnopqrstuvwxyz0123456789,."
    found = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters, *(f"##{c}" for c in letters[:26]), *words]
    return "\n".join((found + [f"[unused{i}]" for i in range(size)])[:size]) + "\n"


def weights(s, seed=0):
    """Random weights of a ViltModel of these settings, in their names and shapes."""
    D, patch, H = s["hidden_size"], s["patch_size"], s["intermediate_size"]
    text = "embeddings.text_embeddings"
    shapes = {"embeddings.cls_token": (1, 1, D), "embeddings.position_embeddings": (1, 1 + (s["image_size"] // patch) ** 2, D),
              f"{text}.word_embeddings.weight": (s["vocab_size"], D), f"{text}.position_embeddings.weight": (s["max_position_embeddings"], D),
              f"{text}.token_type_embeddings.weight": (2, D), f"{text}.LayerNorm.weight": (D,), f"{text}.LayerNorm.bias": (D,),
              "embeddings.patch_embeddings.projection.weight": (D, 3, patch, patch), "embeddings.patch_embeddings.projection.bias": (D,),
              "embeddings.token_type_embeddings.weight": (2, D), "layernorm.weight": (D,), "layernorm.bias": (D,),
              "pooler.dense.weight": (D, D), "pooler.dense.bias": (D,)}
    for i in range(s["num_hidden_layers"]):
        layers = {"attention.attention.query": (D, D), "attention.attention.key": (D, D), "attention.attention.value": (D, D),
                  "attention.output.dense": (D, D), "intermediate.dense": (H, D), "output.dense": (D, H), "layernorm_before": (D,), "layernorm_after": (D,)}
        for name, shape in layers.items():
            shapes |= {f"encoder.layer.{i}.{name}.weight": shape, f"encoder.layer.{i}.{name}.bias": shape[:1]}
    g = torch.Generator().manual_seed(seed)
    return {k: 0.2 * torch.randn(shape, generator=g) + (k.endswith(("norm.weight", "Norm.weight", "before.weight", "after.weight")))
            for k, shape in shapes.items()}


@pytest.fixture
def vilt(tmp_path):
    """A folder with a small random ViLT, as .bin and under the prefix of a model that holds one."""
    folder = tmp_path / "vilt"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(SIZES | {"model_type": "vilt", "architectures": ["ViltForMaskedLM"]}))
    (folder / "vocab.txt").write_text(pieces(SIZES["vocab_size"]))
    inside = {f"vilt.{k}": v for k, v in weights(SIZES).items()}
    torch.save(inside | {"mlm_score.transform.dense.bias": torch.zeros(32), "vilt.embeddings.text_embeddings.position_ids":
                         torch.arange(12)[None]}, folder / "pytorch_model.bin")
    return folder


def theirs(folder, sizes, kind, form):
    """A random ViltModel of transformers, or a model that holds one, every parameter perturbed, saved in the folder."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    model = getattr(transformers, kind)(transformers.ViltConfig(**sizes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    model.save_pretrained(folder)
    if form == "pytorch_model.bin":
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / form)
    (folder / "vocab.txt").write_text(pieces(model.config.vocab_size))
    return getattr(model, "vilt", model)


@pytest.mark.parametrize("sizes,kind,form,image_size", [
    (SIZES, "ViltModel", "model.safetensors", None), (SIZES, "ViltModel", "pytorch_model.bin", None),
    (SIZES, "ViltForMaskedLM", "model.safetensors", None), (SIZES, "ViltForMaskedLM", "pytorch_model.bin", 48),
    (SIZES, "ViltModel", "model.safetensors", 16), (B32, "ViltForMaskedLM", "model.safetensors", None)])
def test_hidden_states_are_those_of_transformers(tmp_path, monkeypatch, sizes, kind, form, image_size):
    """Padded notes of every length, an empty one among them; patches in order, which transformers shuffles."""
    model = theirs(tmp_path, sizes, kind, form)
    monkeypatch.setattr(torch, "multinomial", lambda p, n, *a, **k: torch.arange(n))
    arguments, state = read_vilt(tmp_path, image_size=image_size)
    vit = ViT(**arguments).eval()
    assert not vit.load_state_dict(state, strict=False).unexpected_keys
    assert all(k.startswith("head.") for k in vit.load_state_dict(state, strict=False).missing_keys)
    B, P = 4, arguments["positions"]
    ids = torch.randint(5, arguments["buckets"], (B, P))
    lengths = torch.tensor([P, 1, P // 2, 3])
    ids[torch.arange(B), lengths - 1] = 3  # [SEP]
    ids[torch.arange(P) >= lengths[:, None]] = 0
    S = arguments["image_size"]
    images = torch.rand(B, 3, S, S) * 2 - 1
    whole = torch.cat([torch.full((B, 1), 2), ids], 1)  # [CLS] in front
    with torch.no_grad():
        out = model(input_ids=whole, attention_mask=(whole != 0).long(), pixel_values=images, pixel_mask=torch.ones(B, S, S, dtype=torch.long))
        batch = {"image": images, "note": ids}
        x, bias = vit.embed(batch)
        for block in vit.blocks:
            x = block(x, bias)
        hidden, pooled = vit.norm(x), vit.features(batch)
    patches = x.shape[1] - 1 - P
    order = [0, *range(1 + patches, 1 + patches + P), *range(1, 1 + patches)]  # theirs: words, then the image
    attended = torch.cat([whole != 0, torch.ones(B, patches, dtype=torch.bool)], 1)
    error = (hidden[:, order] - out.last_hidden_state).abs()[attended].max() / out.last_hidden_state.abs().max()
    assert error < 1e-5
    assert (pooled - out.pooler_output).abs().max() < 1e-5


def test_one_modality_and_positions_at_another_size(vilt):
    """What is left out of the arguments is left out of the state; positions of a grid of 4 become those of a grid of 6 by
    bilinear interpolation, corners kept."""
    whole, state = read_vilt(vilt)
    for modalities, lacking in ((("image",), {"words.weight", "position", "word_norm.weight", "word_norm.bias"}),
                                (("note",), {"place", "patches.weight", "patches.bias"})):
        arguments, part = read_vilt(vilt, modalities)
        assert {*state} - {*part} == lacking and torch.equal(part["kind"], state["kind"][[["image", "note"].index(modalities[0])]])
        assert not ViT(**arguments).load_state_dict(part, strict=False).unexpected_keys
    inside = torch.load(vilt / "pytorch_model.bin")
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in inside.items()}, vilt / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    early = read_vilt(vilt)[1]  # as torch wrote files before 1.6, in half precision
    assert all(v.dtype == torch.float32 and torch.allclose(v, state[k], atol=2e-3) for k, v in early.items())
    torch.save(inside, vilt / "pytorch_model.bin")
    larger, other = read_vilt(vilt, image_size=48)
    assert larger["image_size"] == 48 and other["place"].shape == (1, 37, 32)
    old, new = state["place"][0, 1:].reshape(4, 4, 32), other["place"][0, 1:].reshape(6, 6, 32)
    assert torch.equal(other["place"][0, 0], state["place"][0, 0])
    assert torch.allclose(new[0, 0], old[0, 0]) and torch.allclose(new[5, 0], old[3, 0], atol=1e-6)
    middle = old[1, 0] * 0.8 + old[2, 0] * 0.2  # row 2 of 0..5 lies at 1.2 of 0..3
    assert torch.allclose(new[2, 0], middle, atol=1e-6)


QUICK = ("--base", "vilt", "--phantoms", "60")
RUN = ["--seeds", "1", "--steps", "6", "--phantoms", "120", "--batch", "8", "--device", "cpu"]


@pytest.mark.parametrize("absent", ["mask", "dummy"])
def test_a_small_checkpoint_goes_the_whole_way(vilt, tmp_path, monkeypatch, capsys, absent):
    """--base, rates picked, export, check, and served without torch: what the run itself says of its samples."""
    monkeypatch.chdir(tmp_path)
    study = phantoms(120, 2, "target", 32).select(("image", "note"))
    data.save_study(tmp_path / "study.npz", study)
    argv = [*RUN, "--base", "vilt", "--data", "study.npz", "--methods", "head", "mora", "full", "--absent", absent, "--out", "r"]
    train_mora.main(argv)
    said = capsys.readouterr().out
    assert "0.0003: " in said and "0.003: " in said and "notes are longer than the base's 11 word positions and are cut" in said
    saved, model = load_mora("r")
    assert model.config["image_size"] == 32 and model.config["channels"] == 3 and saved["config"]["vocabulary"] == pieces(90)
    assert torch.equal(model.blocks[1].norm1.weight, read_vilt(vilt)[1]["blocks.1.norm1.weight"]), "the base is not frozen"
    for method in ("head", "mora", "full"):  # of three rates the weights are kept once, of the one that was picked
        picks = sorted((tmp_path / "r/picks").glob(f"{method}-*.pt"))
        kept = [p for p in picks if checkpoint.load(p)["state"]]
        assert len(picks) >= 3 and len(kept) == 1 and kept[0].samefile(tmp_path / f"r/adapters/{method}-s0.pt")
    before = {p: p.read_bytes() for p in (tmp_path / "r").rglob("*") if p.name in ("model.pt", "metrics.json")}
    train_mora.main([*argv, "--resume"])
    assert all(p.read_bytes() == content for p, content in before.items())
    export.main(["mora", "r"])
    assert serve.check("r/onnx", "cpu") <= 1e-5
    manifest = serve.own_manifest("r/onnx")
    assert manifest["tokenizer"] == "wordpiece" and (tmp_path / "r/onnx/vocab.txt").read_text() == pieces(90)

    rows = np.array([3, 4, 5, 6])
    notes = [*study.notes[rows[:3]].tolist(), ""]
    ids = read_vocabulary(vilt).tokenize(notes, 11)
    images = torch.from_numpy(data.prepare_images(study.images[rows], 32, 3))
    present = torch.tensor([[1.0, 1], [0, 1], [1, 1], [1, 0]])
    with torch.no_grad():
        wanted = model({"image": images, "note": torch.from_numpy(ids)}, present).softmax(1)
    code = """
import sys, numpy as np
from minilora.serve import Diagnoser
images, notes = np.load("images.npy"), sys.argv[1:]
found = Diagnoser("r/onnx", "cpu").predict([images[0], None, images[2], images[3]], [*notes, None])
assert "torch" not in sys.modules
np.save("found.npy", found)
"""
    np.save("images.npy", study.images[rows])
    subprocess.run([sys.executable, "-c", code, *notes[:3]], check=True, env={"PYTHONPATH": str(ROOT), "PATH": ""})
    assert np.abs(np.load("found.npy") - wanted.numpy()).max() < 1e-5


def test_a_changed_checkpoint_or_size_is_another_run(vilt, tmp_path, monkeypatch, refused):
    argv = [*RUN, "--base", "vilt", "--methods", "head", "--lr", "0.01", "--out", "r"]
    train_mora.main(argv)
    monkeypatch.chdir(tmp_path)
    assert "holds a run of another configuration (image_size 32 there, 48 here" in refused(train_mora.main, *argv, "--image-size", "48", "--resume")
    inside = torch.load(vilt / "pytorch_model.bin")
    inside["vilt.layernorm.bias"][0] += 1
    torch.save(inside, vilt / "pytorch_model.bin")
    assert "holds a run of another configuration (base " in refused(train_mora.main, *argv, "--resume")


def test_numbers_have_no_place_in_a_vilt(vilt, refused):
    assert "it has no place for vitals" in refused(train_mora.main, *QUICK, "--modalities", "image", "vitals")


@pytest.mark.parametrize("argv,words", [
    (("--width", "32"), "--width 32: --base vilt is pretrained and has sizes of its own"), (("--source", "s.npz"), "--source s.npz"),
    (("--preset", "base"), "--preset base"), (("--positions", "8"), "--positions 8"), (("--image-size", "30"), "30 is not divisible by the patch size 8"),
    (("--base", "nowhere"), "nowhere/config.json: no such file; --base takes a folder with config.json, model.safetensors or pytorch_model.bin, and vocab.txt")])
def test_settings_without_use_are_refused(vilt, refused, argv, words):
    assert words in refused(train_mora.main, *QUICK, *argv)


SETTINGS = [("hidden_act", "relu", "hidden_act is 'relu'; only a ViLT with hidden_act 'gelu'"), ("qkv_bias", False, "qkv_bias is False"),
            ("model_type", "bert", "model_type is 'bert'"), ("intermediate_size", 96, "intermediate_size is 96; must be 4 times hidden_size, 128"),
            ("hidden_size", 32.0, "hidden_size is 32.0"), ("num_attention_heads", 5, "not divisible by num_attention_heads 5"),
            ("max_image_length", 20, "max_image_length is 20"), ("pad_token_id", 1, "pad_token_id is 1"), ("rotary", True, "rotary is True"),
            ("layer_norm_eps", 0, "layer_norm_eps is 0"), ("num_hidden_layers", 3, "weight 'vilt.encoder.layer.2.layernorm_before.weight' is missing"),
            ("num_hidden_layers", 1, "fits nothing; config.json is of another model"), ("vocab_size", 91, "vocab.txt: has 90 pieces; config.json says 91"),
            ("image_size", 40, "weight 'vilt.embeddings.position_embeddings' is [1, 17, 32]"), ("image_size", 30, "is not divisible by the patch size 8")]


@pytest.mark.parametrize("key,value,words", SETTINGS)
def test_settings_that_mean_another_model_are_refused_by_name(vilt, refused, key, value, words):
    config = json.loads((vilt / "config.json").read_text())
    (vilt / "config.json").write_text(json.dumps(config | {key: value}))
    assert words in refused(train_mora.main, *QUICK)


def damage(vilt, how):
    """Damage a checkpoint in one way."""
    path = vilt / "pytorch_model.bin"
    inside = torch.load(path)
    if how == "cut":
        path.write_bytes(path.read_bytes()[:-2000])
    elif how == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 64
        path.write_bytes(content)
    elif how == "code":
        torch.save({"vilt.layernorm.bias": ROOT}, path)
    elif how == "list":
        torch.save([torch.zeros(2)], path)
    elif how == "foreign":
        torch.save({"lstm.weight": torch.zeros(2)}, path)
    elif how == "nan":
        inside["vilt.pooler.dense.bias"][3] = float("nan")
        torch.save(inside, path)
    elif how == "kinds":
        torch.save(inside | {"vilt.embeddings.token_type_embeddings.weight": torch.zeros(1, 32)}, path)
    elif how == "compressed":
        parts = zipfile.ZipFile(path)
        content = {part.filename: parts.read(part) for part in parts.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, part in content.items():
                archive.writestr(name, part)
    elif how == "pixels":
        (vilt / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.5, 0.5], "image_std": [0.229, 0.224, 0.225]}))
    elif how == "cased":
        (vilt / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    elif how == "ints":
        torch.save(inside | {"vilt.pooler.dense.bias": torch.zeros(32, dtype=torch.long)}, path)
    elif how == "gone":
        path.unlink()
    elif how == "safetensors":
        (vilt / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    elif how == "json":
        (vilt / "config.json").write_text("{")
    elif how == "words":
        (vilt / "vocab.txt").write_text(pieces(90).replace("[MASK]", "[HIDE]"))
    elif how == "bytes":
        (vilt / "vocab.txt").write_bytes(b"\xff\xfe")


@pytest.mark.parametrize("how,words", [
    ("cut", "pytorch_model.bin: not readable"), ("flipped", "pytorch_model.bin: damaged at"), ("code", "pytorch_model.bin: not readable"),
    ("list", "holds no dictionary of tensors"), ("foreign", "is missing; a ViltModel has it"), ("nan", "weight 'vilt.pooler.dense.bias' holds numbers that are not finite"),
    ("kinds", "has 1 kinds of tokens"), ("compressed", "its parts are compressed"), ("pixels", "preprocessor_config.json: image_std is [0.229"),
    ("cased", "tokenizer_config.json: do_lower_case is False; only True can be read"), ("ints", "weight 'vilt.pooler.dense.bias' is [32] of torch.int64"), ("gone", "vilt: has no model.safetensors or pytorch_model.bin"),
    ("safetensors", "model.safetensors: "), ("json", "config.json: not readable as JSON"), ("words", "vocab.txt: the vocabulary lacks [MASK]"),
    ("bytes", "vocab.txt: not readable")])
def test_a_damaged_or_foreign_checkpoint_is_one_line(vilt, refused, how, words):
    damage(vilt, how)
    assert words in refused(train_mora.main, *QUICK)
