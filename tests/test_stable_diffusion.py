"""The page docs/stable_diffusion.md: its listings are run on a tiny pipeline in the published layout, and its claims are checked."""

import ast
import importlib
import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT

from minilora import data, selora
from minilora.phantoms import phantoms

PAGE = (ROOT / "docs/stable_diffusion.md").read_text()
TRAIN, USE = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
TARGETS = re.search(r'^TARGETS = r"(.*)"', TRAIN, re.MULTILINE)[1]


def test_the_listings_name_only_what_minilora_has():
    named = set()
    for node in ast.walk(ast.parse(TRAIN + USE)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ("data", "interchange", "selora"):
            named.add((node.value.id, node.attr))
    assert {module for module, _ in named} == {"data", "interchange", "selora"}
    for module, name in named:
        assert hasattr(importlib.import_module(f"minilora.{module}"), name), f"{module}.{name}"


def packages():
    pytest.importorskip("peft", reason="peft is in the bench extra")
    pytest.importorskip("transformers", reason="transformers is in the bench extra")
    return pytest.importorskip("diffusers", reason="diffusers is in the bench extra")


def tiny_unet():
    down, up = ("CrossAttnDownBlock2D", "DownBlock2D"), ("UpBlock2D", "CrossAttnUpBlock2D")
    return packages().UNet2DConditionModel(sample_size=8, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, cross_attention_dim=16, attention_head_dim=2, down_block_types=down, up_block_types=up)


def pipeline(folder, prediction):
    """Save a pipeline of random weights as Stable Diffusion 1.5 is published, but tiny and without the safety checker."""
    diffusers = packages()
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(block_out_channels=(4, 8), norm_num_groups=2, latent_channels=4, sample_size=16, down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    text = CLIPTextModel(CLIPTextConfig(vocab_size=100, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=77, bos_token_id=0, eos_token_id=1, pad_token_id=1))
    scheduler = diffusers.PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction)
    words = ["<|startoftext|>", "<|endoftext|>", *(letter + end for letter in "abcdefghijklmnopqrstuvwxyz,." for end in ("", "</w>"))]
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=77)
    diffusers.StableDiffusionPipeline(vae, text, tokenizer, tiny_unet(), scheduler, None, None, requires_safety_checker=False).save_pretrained(folder)
    (folder / "tokenizer/tokenizer.json").unlink(missing_ok=True)  # the published folder has the two files
    for name in ("vocab.json", "merges.txt"):
        (folder / name).rename(folder / "tokenizer" / name)


def listing(tmp_path, prediction="epsilon", dtype=None, **given):
    """Run the first listing with other values at its top; returns its names."""
    pipeline(tmp_path / "sd", prediction)
    study = phantoms(12, 0).select(("image", "note"))
    study.images[3], study.notes[5] = 0, ""
    data.save_study(tmp_path / "study.npz", study)
    top, rest = TRAIN.split("\n# Pairs", 1)
    names = {}
    exec(top, names)
    given = dict(FOLDER=tmp_path / "sd", STUDY=tmp_path / "study.npz", OUT=tmp_path / "out", SIZE=16, STEPS=13, BATCH=3, RATE=2e-2, EVERY=2, DEVICE="cpu") | given
    assert set(given) <= set(names)
    names.update(given)
    if dtype:
        rest = rest.replace("from_pretrained(FOLDER)", f"from_pretrained(FOLDER, torch_dtype=torch.{dtype})")
        assert dtype in rest
    exec("# Pairs" + rest, names)
    return names


def run(unet):
    generator = torch.Generator().manual_seed(7)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(unet.dtype)
    with torch.no_grad():
        return unet(draw(2, 4, 8, 8), torch.tensor([3, 700]), draw(2, 77, 16)).sample.float()


def unchanged(pipe, fresh):
    """Whether all weights of a fresh pipeline are in the other, bit for bit."""
    for part in ("unet", "vae", "text_encoder"):
        state = {key.replace(".base.", "."): value for key, value in getattr(pipe, part).state_dict().items()}
        for key, value in getattr(fresh, part).state_dict().items():
            if not torch.equal(state[key], value):
                return False
    return True


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_listings_train_grow_save_and_load(tmp_path, capsys, prediction):
    diffusers = packages()
    names = listing(tmp_path, prediction)
    pipe, unet = names["pipe"], names["unet"]
    base = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    assert unchanged(pipe, base) and {n.rsplit(".", 1)[1] for n, p in unet.named_parameters() if p.requires_grad} == {"A", "B"}

    # Both samples that lack something are left out; the other pairs stand in their order.
    kept = [row for row in range(12) if row not in (3, 5)]
    study = data.load_study(tmp_path / "study.npz", training=False)
    assert names["study"].notes.tolist() == study.notes[kept].tolist() and len(names["z"]) == len(names["words"]) == 10
    with torch.no_grad():
        image = torch.from_numpy(data.prepare_images(study.images[[4]], 16, 3))
        z = base.vae.encode(image).latent_dist.mean * base.vae.config.scaling_factor
        words, _ = base.encode_prompt(str(study.notes[4]), "cpu", 1, False)
    assert torch.allclose(names["z"][3], z[0], atol=1e-5) and torch.allclose(names["words"][3], words[0], atol=1e-5)

    # The last step's loss, from the schedule written out.
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha = (1 - betas).cumprod(0)[names["t"]][:, None, None, None]
    z, noise = names["z"][names["rows"]], names["noise"]
    goal = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * z
    assert torch.allclose(names["noisy"], alpha.sqrt() * z + (1 - alpha).sqrt() * noise, atol=1e-5)
    assert names["loss"].isfinite() and torch.allclose(names["loss"], (names["predicted"] - goal).square().mean(), rtol=1e-5)

    layers = selora.adapters(unet)
    linears = [name for name, layer in base.unet.named_modules() if isinstance(layer, torch.nn.Linear)]
    assert list(layers) == linears and all(name.endswith((".proj_in", ".proj_out")) for name, layer in base.unet.named_modules() if isinstance(layer, torch.nn.Conv2d) and "attentions" in name)
    ranks = [layer.rank for layer in layers.values()]
    assert min(ranks) >= 1 and len(set(ranks)) > 1 and max(ranks) > 2
    # A row that opened late trains too: it was in the optimizer from the start.
    deepest = max(layers.values(), key=lambda layer: layer.rank)
    assert deepest.B[: deepest.rank].abs().sum(1).all() and not deepest.B[deepest.rank :].any()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6 and printed[-1].endswith(f"{selora.adapter_parameters(unet):,} parameters")

    wanted = run(unet)
    scale = float(wanted.abs().max())
    exec(USE, names)
    merged = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out/merged")
    for found in (names["fresh"].unet, unet, merged.unet):
        assert (run(found) - wanted).abs().max() < 1e-5 * scale
    assert (run(base.unet) - wanted).abs().max() > 1e-2 * scale
    assert not selora.adapters(unet) and (tmp_path / "out/sample.png").stat().st_size
    assert set(merged.unet.state_dict()) == set(base.unet.state_dict())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_base_in_half_precision_gets_adapters_in_float32(tmp_path, dtype):
    diffusers = packages()
    names = listing(tmp_path, dtype=dtype)
    half = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd", torch_dtype=getattr(torch, dtype))
    assert names["predicted"].dtype == half.unet.dtype == getattr(torch, dtype)
    assert unchanged(names["pipe"], half) and all(p.dtype == torch.float32 for p in names["unet"].parameters() if p.requires_grad)
    assert names["loss"].isfinite() and max(layer.rank for layer in selora.adapters(names["unet"]).values()) > 2
    # The step from the base, as the same adapters on it in float32 take it.
    full = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "sd").unet
    base = run(full)
    selora.inject(full, TARGETS, 0)
    selora.load_adapter(full, selora.adapter_state(names["unet"]))
    step = run(full) - base
    assert (run(names["unet"]) - run(half.unet) - step).norm() < 0.2 * step.norm()


@pytest.mark.parametrize("targets,layers,parameters", [(TARGETS, 184, 426496), (r".*\.(to_[qkv]|to_out\.0)", 128, 199296), (None, 282, 1058216)])
def test_what_is_adapted_at_full_size(targets, layers, parameters):
    """In the published layout of Stable Diffusion 1.5, without weights; the page holds these figures."""
    with torch.device("meta"):
        unet = packages().UNet2DConditionModel(sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, cross_attention_dim=768, attention_head_dim=8)
        assert sum(p.numel() for p in unet.parameters()) == 859520964
        names = selora.inject(unet, targets)
    assert len(names) == layers and selora.adapter_parameters(unet) == parameters
    kinds = {type(layer.base) for layer in selora.adapters(unet).values()}
    assert kinds == ({torch.nn.Linear} if targets else set(selora.KINDS))
    attention = [layer for name, layer in selora.adapters(unet).items() if re.fullmatch(r".*\.to_[qkv]", name)]
    assert all(layer.bias is None for layer in attention) and len(attention) == 96
    places = [layer for name, layer in unet.named_modules() if name.endswith((".proj_in", ".proj_out"))]
    assert len(places) == 32 and all(getattr(layer, "base", layer).kernel_size == (1, 1) for layer in places)
    assert f"{layers} " in PAGE and f"{parameters:,}" in PAGE


def test_adapters_of_two_libraries_are_refused(tmp_path):
    names = listing(tmp_path, STEPS=1)
    with pytest.raises(ValueError, match="LoRALinear"):
        names["pipe"].load_lora_weights(tmp_path / "out")
    loaded = packages().StableDiffusionPipeline.from_pretrained(tmp_path / "sd")
    loaded.load_lora_weights(tmp_path / "out")
    with pytest.raises(ValueError, match="has an adapter of another library: merge or unload it first"):
        selora.inject(loaded.unet, TARGETS)
    loaded.unload_lora_weights()
    assert len(selora.inject(loaded.unet, TARGETS)) == 50


def adapted():
    """A tiny UNet with trained adapters, and a function that gives its losses of a batch."""
    torch.manual_seed(0)
    unet = tiny_unet().eval()
    selora.inject(unet, TARGETS, 2)
    for layer in selora.adapters(unet).values():
        torch.nn.init.normal_(layer.B, std=0.1)
    z, noise, words = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8), torch.randn(3, 77, 16)

    def losses(unet):
        predicted = unet(z.to(unet.dtype), torch.tensor([3, 500, 900]), words.to(unet.dtype)).sample
        return (predicted.float() - noise).square().mean((1, 2, 3))  # [B]

    return unet, losses


def near(scores, wanted):
    return list(scores) == list(wanted) and all(np.allclose(scores[name], wanted[name], rtol=1e-4) for name in wanted)


def test_the_probe_under_gradient_checkpointing_finds_the_same():
    unet, losses = adapted()
    wanted = selora.fisher_loop(unet, losses(unet))
    layer = selora.adapters(unet)["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"]
    calls = []
    layer.base.register_forward_hook(lambda *_: calls.append(1))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            unet.enable_gradient_checkpointing()
        calls.clear()
        unet.zero_grad()
        with selora.FisherProbe(unet) as probe:
            losses(unet).mean().backward()
        assert len(calls) == 1 + checkpointing  # the block runs again in the backward
        assert near({name: score[:2] for name, score in probe.scores().items()}, {name: score[:2] for name, score in wanted.items()})
        gradients.append(layer.B.grad.clone())
    assert torch.allclose(*gradients, rtol=1e-5)


@pytest.mark.parametrize("dtype,error", [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_the_probe_of_a_base_in_half_precision_is_near(dtype, error):
    unet, losses = adapted()
    wanted = selora.fisher_loop(unet, losses(unet))
    for name, module in unet.named_modules():  # as such a base is loaded: A and B stay in float32
        if not isinstance(module, selora.LoRALayer):
            for p in module.parameters(recurse=False):
                p.data = p.data.to(dtype)
    assert unet.dtype == dtype
    with selora.FisherProbe(unet, expected=False) as probe:
        losses(unet).mean().backward()
    for name, score in probe.scores().items():
        assert np.allclose(score[:2], wanted[name][:2], rtol=error), name


def test_fused_projections_are_refused_by_the_layers_name():
    unet, losses = adapted()
    unet.fuse_qkv_projections()
    with selora.FisherProbe(unet) as probe:
        losses(unet).mean().backward()
    with pytest.raises(RuntimeError, match=r"layer 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q' was not called"):
        probe.scores()
