"""Other people's files: PEFT and diffusers read what was written here, and PEFT's folders load here and grow on."""

import copy
import json
import re

import pytest
import torch
from torch import nn

from minilora import interchange, selora
from minilora.ranks import set_ranks


def plain():
    """Linear, 1x1, 3x3 and strided convolution, one with a name that ends like another's."""
    torch.manual_seed(0)
    return nn.ModuleDict({"a": nn.Linear(6, 5), "ba": nn.Linear(5, 7, bias=False), "one": nn.Conv2d(3, 4, 1), "three": nn.Conv2d(4, 6, 3, padding=1),
                          "strided": nn.Sequential(nn.Conv2d(6, 5, 3, stride=2, padding=1)), "none": nn.Linear(7, 7)})  # fmt: skip


def inputs(model):
    x, image = torch.randn(4, 6), torch.randn(4, 3, 8, 8)
    y = model["none"](model["ba"](model["a"](x)))
    return y, model["strided"](model["three"](model["one"](image)))


def outputs(model):
    torch.manual_seed(1)
    with torch.no_grad():
        return inputs(model)


RANKS = {"a": 1, "ba": 8, "one": 2, "three": 3, "strided.0": 5, "none": 0}


def grown():
    model = plain()
    selora.inject(model, None, 0, 8, 1.7)
    set_ranks(model, RANKS)
    for layer in selora.adapters(model).values():
        nn.init.normal_(layer.B, std=0.3)
    return model


def near(found, wanted):
    return all(torch.allclose(f, w, rtol=1e-6, atol=1e-6 * float(w.abs().max())) for f, w in zip(found, wanted))


@pytest.mark.parametrize("package", [True, False], ids=["safetensors", "bin"])
def test_a_round_trip_keeps_outputs_layers_and_growth(tmp_path, monkeypatch, package):
    if package:
        pytest.importorskip("safetensors")
    else:
        monkeypatch.setitem(__import__("sys").modules, "safetensors.torch", None)
    model = grown()
    interchange.save_peft(model, tmp_path / "p")
    assert (tmp_path / "p" / f"adapter_model.{'safetensors' if package else 'bin'}").exists()
    again = plain()
    assert interchange.load_peft(again, tmp_path / "p") == [n for n, r in RANKS.items() if r]
    assert near(outputs(again), outputs(model)) and not near(outputs(again), outputs(plain()))
    for name, layer in selora.adapters(again).items():
        wanted = selora.adapters(model)[name]
        assert layer.rank == RANKS[name] and torch.allclose(layer.delta(), wanted.delta(), rtol=1e-6, atol=1e-7)
    before = outputs(again)
    assert "a" in selora.grow(again, None, "cheapest", budget=10**6) and near(outputs(again), before)


def test_peft_reads_ours(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is in the bench extra")
    model = grown()
    interchange.save_peft(model, tmp_path)
    loaded = peft.PeftModel.from_pretrained(plain(), tmp_path)
    assert near(outputs(loaded.base_model.model), outputs(model))
    merged = loaded.merge_and_unload()
    assert near(outputs(merged), outputs(selora.merge(copy.deepcopy(model))))


@pytest.mark.parametrize("patterns", [{}, {"rank_pattern": {"a": 2, "three": 4}, "alpha_pattern": {"a": 3, r"strided\.0": 1}}], ids=["plain", "patterns"])
def test_ours_reads_peft_and_grows_on(tmp_path, patterns):
    peft = pytest.importorskip("peft", reason="peft is in the bench extra")
    names = [n for n in RANKS if n != "none"]
    theirs = peft.get_peft_model(plain(), peft.LoraConfig(r=3, lora_alpha=7, target_modules=names, **patterns))
    for name, p in theirs.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    theirs.save_pretrained(tmp_path)
    model = plain()
    interchange.load_peft(model, tmp_path)
    wanted = outputs(theirs.base_model.model)
    assert near(outputs(model), wanted)
    selora.grow(model, None, "cheapest", budget=10**6)
    assert near(outputs(model), wanted) and all(layer.rank > 2 for layer in selora.adapters(model).values())


def test_diffusers_loads_what_was_grown_here(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the bench extra")
    pytest.importorskip("peft", reason="peft is in the bench extra")
    from safetensors.torch import load_file

    sizes = dict(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4,
                 down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
    torch.manual_seed(0)
    base = diffusers.UNet2DConditionModel(**sizes).eval()
    model = copy.deepcopy(base)
    x, t, words = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 5, 8)
    selora.inject(model, r".*attentions.*to_(q|k|v|out\.0)|.*resnets.*conv[12]")
    for _ in range(3):  # a little training, so that layers differ, and growth by information
        with selora.FisherProbe(model) as probe:
            (model(x, t, words).sample - x).square().mean().backward()
        for layer in selora.adapters(model).values():
            layer.B.data -= 0.05 * layer.B.grad.sign() * layer.active
        selora.grow(model, probe.scores(), "ratio", lam=1.5)
    assert len({layer.rank for layer in selora.adapters(model).values()}) > 1
    run = lambda unet: unet(x, t, words).sample.detach()
    wanted = run(model)
    interchange.save_diffusers(model, tmp_path)
    loaded = copy.deepcopy(base)
    loaded.load_lora_adapter(load_file(tmp_path / "pytorch_lora_weights.safetensors"), prefix="unet")
    scale = float(wanted.abs().max())
    assert (run(loaded) - wanted).abs().max() < 1e-5 * scale < (run(base) - wanted).abs().max()
    assert (run(selora.merge(copy.deepcopy(model))) - wanted).abs().max() < 1e-5 * scale


def test_mora_around_block_0_of_transformers_vilt(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is in the bench extra")
    import onnxruntime

    from minilora.mora import FoldedMoRA, MoRA, MoRABlock

    torch.manual_seed(0)
    model = transformers.ViltModel(transformers.ViltConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32, image_size=16, patch_size=8, max_position_embeddings=10,
        num_channels=1, hidden_dropout_prob=0.0)).eval()  # fmt: skip
    given = dict(input_ids=torch.randint(3, 50, (4, 6)), pixel_values=torch.randn(4, 1, 16, 16), pixel_mask=torch.ones(4, 16, 16, dtype=torch.long))
    before = model(**given).pooler_output.detach()
    model.requires_grad_(False)
    block = model.encoder.layer[0] = MoRABlock(model.encoder.layer[0], MoRA(16, ("image", "note"), rank=2))
    block.present = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert torch.equal(model(**given).pooler_output, before)  # ups are zero
    head = nn.Linear(16, 2)
    optimizer = torch.optim.AdamW([*block.mora.parameters(), *head.parameters()], lr=0.05)
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(head(model(**given).pooler_output), torch.tensor([0, 1, 0, 1]))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and {n for n, p in model.named_parameters() if p.grad is not None} == {"encoder.layer.0.mora.down", "encoder.layer.0.mora.up"}
    trained = model(**given).pooler_output.detach()
    block.mora = FoldedMoRA(block.mora, torch.tensor([1.0, 0.0]))  # freeze "image only"
    assert torch.allclose(model(**given).pooler_output[1], trained[1], atol=1e-6)

    x = torch.randn(3, 11, 16)
    torch.onnx.export(block.mora, (x,), tmp_path / "branch.onnx", input_names=["x"], output_names=["y"], dynamo=False, opset_version=17, dynamic_axes={"x": {0: "batch", 1: "tokens"}})
    session = onnxruntime.InferenceSession(tmp_path / "branch.onnx", providers=["CPUExecutionProvider"])
    for shape in ((3, 11, 16), (1, 7, 16)):
        x = torch.randn(shape)
        assert abs(session.run(None, {"x": x.numpy()})[0] - block.mora(x).detach().numpy()).max() < 1e-5


def test_mora_in_a_torchvision_vit_with_images_alone(tmp_path):
    try:  # no extra brings it: a build for CUDA beside torch's CPU build breaks the import of transformers too
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"torchvision is not here, or not of torch's build ({error})")
    import onnxruntime

    from minilora.mora import FoldedMoRA, MoRA, MoRABlock

    torch.manual_seed(0)
    model = torchvision.models.VisionTransformer(image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=2).eval()
    x, labels = torch.randn(6, 3, 16, 16), torch.tensor([0, 1] * 3)
    before = model(x).detach()
    model.requires_grad_(False)
    blocks = model.encoder.layers
    blocks[0] = MoRABlock(blocks[0], MoRA(16, ("image",), rank=2))
    blocks[0].present = torch.ones(6, 1)
    model.heads.requires_grad_(True)
    assert torch.equal(model(x), before)  # the up is zero
    optimizer, losses = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0] and blocks[0].mora.up.abs().max() > 0
    wanted = model(x).detach()
    blocks[0].mora = FoldedMoRA(blocks[0].mora, torch.ones(1))
    assert torch.allclose(model(x), wanted, atol=1e-6)
    torch.onnx.export(model, (x,), tmp_path / "vit.onnx", input_names=["image"], dynamo=False, opset_version=17)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    assert abs(session.run(None, {"image": x.numpy()})[0] - wanted.numpy()).max() < 1e-5


def written(tmp_path):
    interchange.save_peft(grown(), tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


@pytest.mark.parametrize("change,words", [({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"use_dora": True}, "use_dora is True"), ({"use_rslora": True}, "use_rslora is True"),
                                          ({"bias": "all"}, "bias is 'all'"), ({"modules_to_save": ["a"]}, "modules_to_save is ['a']"), ({"fan_in_fan_out": True}, "fan_in_fan_out")],
                         ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")  # fmt: skip
def test_another_method_is_named_and_refused(tmp_path, change, words):
    (tmp_path / "adapter_config.json").write_text(json.dumps(written(tmp_path) | change))
    model = plain()
    with pytest.raises(ValueError, match=re.escape(words)):
        interchange.load_peft(model, tmp_path)
    assert not selora.adapters(model)


def test_what_fits_nothing_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    written(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)

    def refused(changed, words, capacity=8, model=None):
        save_file(changed, file)
        with pytest.raises(ValueError, match=re.escape(words)):
            interchange.load_peft(model or plain(), tmp_path, capacity)

    a, b = "base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight"
    refused({k.replace(".a.", ".c."): v for k, v in weights.items()}, "key 'base_model.model.c.lora_A.weight' fits no Linear or Conv2d")
    refused({k.replace("base_model.model.", ""): v for k, v in weights.items()}, "fits no Linear or Conv2d")
    refused({k: v for k, v in weights.items() if k != b}, "layer 'a' needs lora_A and lora_B")
    refused(weights | {a: torch.zeros(1, 9)}, "layer 'a' has lora_A [1, 9]")
    refused(weights, "r up to the capacity 4", capacity=4)
    refused(weights, "the model has adapters already", model=grown())
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="adapter_model.safetensors: not readable"):
        interchange.load_peft(plain(), tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="has no adapter_model"):
        interchange.load_peft(plain(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: not readable"):
        interchange.load_peft(plain(), tmp_path)
    model = plain()
    selora.inject(model, None, 0)
    with pytest.raises(ValueError, match="no adapter of rank 1 or more"):
        interchange.save_peft(model, tmp_path)
