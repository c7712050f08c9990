"""Other people's files: PEFT and diffusers read what was written here, and PEFT's folders load here and grow on."""

import copy
import json
import math
import re
import time

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


def test_a_diffusers_file_has_one_rank(tmp_path):
    """It has no place for alpha, and diffusers before 0.40 takes the first layer's rank for the alpha of all layers."""
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is in the pretrained extra")
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Conv2d(3, 6, 3), torch.nn.Linear(4, 4))
    selora.inject(model, ".*")
    for rank, layer in zip((3, 1, 2), selora.adapters(model).values()):
        layer.rank = rank
        torch.nn.init.normal_(layer.B)
    interchange.save_diffusers(model, tmp_path, "unet")
    weights = safetensors.load_file(tmp_path / "pytorch_lora_weights.safetensors")
    for name, (A, B) in interchange.lora_pairs(model).items():
        theirs = weights[f"unet.{name}.lora_A.weight"], weights[f"unet.{name}.lora_B.weight"]
        assert len(theirs[0]) == theirs[1].shape[1] == 3
        assert torch.allclose(theirs[1].flatten(1) @ theirs[0].flatten(1), B.flatten(1) @ A.flatten(1), atol=1e-6)


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
    present = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    model.register_forward_pre_hook(lambda *_: setattr(block, "present", present))
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
    model.register_forward_pre_hook(lambda *_: setattr(blocks[0], "present", torch.ones(6, 1)))
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
    torch.backends.mha.set_fastpath_enabled(False)  # its fused attention has no ONNX operator
    try:
        torch.onnx.export(model, (x,), tmp_path / "vit.onnx", input_names=["image"], dynamo=False, opset_version=17)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    assert abs(session.run(None, {"image": x.numpy()})[0] - wanted.numpy()).max() < 1e-5


def written(tmp_path):
    interchange.save_peft(grown(), tmp_path)
    return json.loads((tmp_path / "adapter_config.json").read_text())


def refused(folder, *words, model=None, capacity=8):
    """load_peft raises one line that has these words, at once, and the model is what it was."""
    model = model or plain()
    before, trains = copy.deepcopy(model.state_dict()), [p.requires_grad for p in model.parameters()]
    start = time.process_time()
    with pytest.raises(ValueError) as error:
        interchange.load_peft(model, folder, capacity)
    assert time.process_time() - start < 1
    message = str(error.value)
    assert "\n" not in message and all(word in message for word in words), message
    assert list(before) == list(model.state_dict()) and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert trains == [p.requires_grad for p in model.parameters()]


NUMBER, WHOLE, NAMES = "needs a finite number", "needs a whole number of 1 or more", "needs a dictionary of layers' names"
BAD = [({"peft_type": "LOHA"}, "peft_type is 'LOHA'"), ({"peft_type": None}, "peft_type is None"), ({"peft_type": 5}, "peft_type is 5"), ({"use_dora": True}, "use_dora is True"), ({"use_rslora": True}, "use_rslora is True"),
       ({"bias": "all"}, "bias is 'all'"), ({"bias": 5}, "bias is 5"), ({"modules_to_save": ["a"]}, "modules_to_save is ['a']"), ({"fan_in_fan_out": True}, "fan_in_fan_out is True"), ({"lora_bias": True}, "lora_bias is True"),
       *[({"init_lora_weights": init}, f"init_lora_weights is {init!r}") for init in ("pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq", "of tomorrow", "", 1, ["gaussian"], {"a": 1})],
       *[({f"{name}_config": {"a": 1}}, f"{name}_config is {{'a': 1}}; only plain LoRA") for name in ("velora", "monteclora", "kasa", "arrow")], ({"use_bdlora": {"nblocks": 2}}, "use_bdlora is {'nblocks': 2}"),
       ({"of_tomorrow": 3}, "of_tomorrow is 3"), ({"of_tomorrow": "x" * 10**5}, "of_tomorrow is 'xxx"), ({"trainable_token_indices": [1]}, "trainable_token_indices is [1]"), ({"layer_replication": [[0, 2]]}, "layer_replication is [[0, 2]]"),
       *[({"lora_alpha": x}, f"lora_alpha is {x}; {NUMBER}") for x in (math.nan, math.inf, -math.inf, 1e300, True, None, [1])], ({"lora_alpha": "7"}, f"lora_alpha is '7'; {NUMBER}"), ({"lora_alpha": 10**400}, NUMBER),
       *[({"r": x}, f"r is {x}; {WHOLE}") for x in (math.nan, math.inf, 0, -1, 3.0, True, None, [3])], ({"r": "3"}, f"r is '3'; {WHOLE}"), ({"r": 10**400}, WHOLE),
       *[({key: x}, f"{key} is {x!r}; {NAMES}") for key in ("alpha_pattern", "rank_pattern") for x in ([], [1], "a", 3, True)],
       ({"alpha_pattern": {"a": math.nan}}, f"alpha_pattern['a'] is nan; {NUMBER}"), ({"alpha_pattern": {"of no layer": "3"}}, f"alpha_pattern['of no layer'] is '3'; {NUMBER}"), ({"rank_pattern": {"a": 1.0}}, f"rank_pattern['a'] is 1.0; {WHOLE}"),
       *[({pattern: {key: 1}}, f"{pattern} has the key {key!r}; only a layer's name") for pattern in ("alpha_pattern", "rank_pattern")
         for key in ("a|ba", "(", "[a-", "*", ".*a", "a+", "a{2}", "(a)", r"strided\.\d", "(a+)+", "^^a", "a$$", "\\", "(?i)A", "", r"(.)\1")],
       ({"alpha_pattern": {"(.*.*)*(.*.*)*(.*.*)*x": 1}}, "no expression"), ({"rank_pattern": {"a": 2}}, "layer 'a' has lora_A [1, 6]", "need [2, 6]"), ({"r": 9, "rank_pattern": {}}, "; need [9, ")]  # fmt: skip


@pytest.mark.parametrize("change,words", [(change, words) for change, *words in BAD], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_a_setting_that_means_something_else_is_named_and_refused(tmp_path, change, words):
    (tmp_path / "adapter_config.json").write_text(json.dumps(written(tmp_path) | change))
    refused(tmp_path, str(tmp_path), *words)


@pytest.mark.parametrize("text,words", [("[]", "holds []"), ("null", "holds None"), ('"LORA"', "holds 'LORA'"), ("{", "not readable"), ("[" * 10**5, "not readable (RecursionError)"), ("\xff", "not readable (UnicodeDecodeError)"), ("{}", "peft_type is None"),
                                        ('{"peft_type": "LORA", "r": 1}', "lora_alpha is None"), ('{"peft_type": "LORA", "lora_alpha": 1}', "r is None")])  # fmt: skip
def test_settings_that_are_none(tmp_path, text, words):
    written(tmp_path)
    (tmp_path / "adapter_config.json").write_text(text, "latin1")
    refused(tmp_path, words)


def test_settings_that_leave_the_meaning_of_weights_are_read(tmp_path):
    config = written(tmp_path)
    harmless = {"task_type": "CAUSAL_LM", "revision": "main", "peft_version": "0.21", "inference_mode": False, "base_model_name_or_path": "somewhere/model", "lora_dropout": 0.1, "megatron_core": "megatron.core", "auto_mapping": {"base_model_class": "M"},
                "megatron_config": {"a": 1}, "target_modules": "all-linear", "exclude_modules": ["x"], "layers_to_transform": [1], "layers_pattern": "h", "qalora_group_size": 16, "corda_config": {"corda_method": "kpm"}, "use_dora": None, "bias": "none",
                "use_qalora": False, "of_tomorrow": None, "tomorrow_too": {}, "modules_to_save": [], "runtime_config": {"a": 1}}  # fmt: skip
    for init in (True, False, None, "gaussian", "orthogonal", "mica", "eva"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | harmless | {"init_lora_weights": init}))
        model = plain()
        interchange.load_peft(model, tmp_path)
        assert near(outputs(model), outputs(grown()))


@pytest.mark.parametrize("pattern", [{}, {"a": 3, "three": 0, "0": -2.5}, {"strided.0": 5, "0": 9, "^one": 4}, {"0": 9, "strided.0": 5, "^0": 7}, {"strided.0$": 5, "^ba": 2, "tridedX0": 1}, {"stridedX0": 3, "strided..": 5, "...": 2, "none": 7}])
def test_patterns_are_read_as_peft_reads_them(tmp_path, pattern):
    peft = pytest.importorskip("peft", reason="peft is in the bench extra")
    (tmp_path / "adapter_config.json").write_text(json.dumps(written(tmp_path) | {"lora_alpha": 6, "alpha_pattern": pattern}))
    model = plain()
    interchange.load_peft(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path)
    assert near(outputs(model), outputs(theirs.base_model.model)) and not near(outputs(model), outputs(grown()))


def test_many_patterns_take_no_time(tmp_path):
    model = nn.ModuleList(nn.Linear(2, 2) for _ in range(600))
    selora.inject(model, None, 1)
    interchange.save_peft(model, tmp_path)
    again = nn.ModuleList(nn.Linear(2, 2) for _ in range(600))
    start = time.process_time()
    assert len(interchange.load_peft(again, tmp_path)) == 600 and time.process_time() - start < 10


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "orthogonal", "mica", "eva", "pissa", "pissa_niter_4", "olora"])
def test_initialisations_of_peft_itself(tmp_path, init):
    """Weights after training are those of LoRA, or the base was changed with them: then the folder is refused."""
    peft = pytest.importorskip("peft", reason="peft is in the bench extra")
    linears = lambda: nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6))
    torch.manual_seed(0)
    base, x = linears(), torch.randn(5, 8)
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0", "2"], init_lora_weights=init))
    if init in ("pissa", "olora"):  # what PEFT's own conversion needs
        theirs.peft_config["default"].init_lora_weights = True
        theirs.save_pretrained(tmp_path / "start")
        theirs.peft_config["default"].init_lora_weights = init
    with torch.no_grad():
        for name, p in theirs.named_parameters():
            if "lora_" in name:
                p.add_(0.1 * torch.randn_like(p))
        wanted = [theirs.eval()(x)]
    theirs.save_pretrained(tmp_path)
    model = copy.deepcopy(base)
    if init in (True, False, None, "gaussian", "orthogonal", "mica", "eva"):
        interchange.load_peft(model, tmp_path)
        assert near([model(x)], wanted) and near([peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)(x)], wanted)
        return
    refused(tmp_path, f"init_lora_weights is {init!r}", model=model)
    if (tmp_path / "start").exists():  # converted, it is plain LoRA of twice the rank
        theirs.save_pretrained(tmp_path / "plain", path_initial_model_for_weight_conversion=str(tmp_path / "start"))
        assert interchange.load_peft(model, tmp_path / "plain") == ["0", "2"] and near([model(x)], wanted)


def test_layers_that_peft_applies_otherwise_are_neither_read_nor_written(tmp_path):
    """A module of two names gets PEFT's adapter under the first, and PEFT's lora_A has no dilation."""

    def shared():
        model = nn.ModuleDict({"a": nn.Linear(6, 6)})
        model["again"] = model["a"]
        return model

    def dilated():
        return nn.ModuleDict({"a": nn.Conv2d(6, 6, 3, dilation=2, padding="same")})

    for build, word, kernel in ((shared, "several names", ()), (dilated, "dilation (2, 2)", (3, 3))):
        model = build()
        selora.inject(model, None, 1)
        for save in (interchange.save_peft, interchange.save_diffusers):
            with pytest.raises(ValueError, match=re.escape(f"layer 'a' has {word}")):
                save(model, tmp_path)
        assert not list(tmp_path.iterdir())
        ones = (1,) * len(kernel)
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
        torch.save({"base_model.model.a.lora_A.weight": torch.ones(1, 6, *kernel), "base_model.model.a.lora_B.weight": torch.ones(6, 1, *ones)}, tmp_path / "adapter_model.bin")
        refused(tmp_path, f"layer 'a' has {word}", model=build())
        for file in tmp_path.iterdir():
            file.unlink()
    # a block of two names, and a dilation without effect, are what they are in PEFT
    block = nn.Sequential(nn.Linear(6, 6))
    model = nn.ModuleDict({"a": block, "b": block, "c": nn.Conv2d(6, 6, 1, dilation=2)})
    selora.inject(model, None, 1)
    interchange.save_peft(model, tmp_path)


@pytest.mark.parametrize("package", ["transformers", "diffusers"])
def test_a_model_is_merged_before_somebody_elses_save_pretrained(tmp_path, package):
    """With adapters in it, its layers have other keys, which the package's own loader does not find."""
    module = pytest.importorskip(package, reason=f"{package} is in the bench extra")
    from safetensors.torch import load_file

    torch.manual_seed(0)
    if package == "transformers":
        config = module.BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=10)
        model, targets, x = module.BertModel(config).eval(), r".*\.(query|value)", torch.randint(0, 50, (3, 9))
        run = lambda m: m(x).last_hidden_state.detach()
    else:
        sizes = dict(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16), norm_num_groups=4, attention_head_dim=4)
        model = module.UNet2DModel(**sizes, down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()
        targets, x = r".*\.to_[qv]", torch.randn(2, 1, 8, 8)
        run = lambda m: m(x, 3).sample.detach()
    before = set(model.state_dict())
    names = selora.inject(model, targets)
    for layer in selora.adapters(model).values():
        nn.init.normal_(layer.B)
    wanted = run(model)
    model.save_pretrained(tmp_path / "adapted")
    keys = set(load_file(next((tmp_path / "adapted").glob("*.safetensors"))))
    assert {f"{name}.base.weight" for name in names} <= keys and not {f"{name}.weight" for name in names} & keys
    selora.merge(model).save_pretrained(tmp_path / "merged")
    assert set(model.state_dict()) == before
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    assert torch.allclose(run(loaded), wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_what_fits_nothing_is_refused(tmp_path):
    pytest.importorskip("safetensors")
    from safetensors.torch import load_file, save_file

    written(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)

    def changed(weights, words, **given):
        save_file(weights, file)
        refused(tmp_path, words, **given)

    a, b, one = "base_model.model.a.lora_A.weight", "base_model.model.a.lora_B.weight", "base_model.model.one.lora_B.weight"
    changed({k.replace(".a.", ".c."): v for k, v in weights.items()}, "key 'base_model.model.c.lora_A.weight' fits no Linear or Conv2d")
    changed({k.replace("base_model.model.", ""): v for k, v in weights.items()}, "fits no Linear or Conv2d")
    changed({k: v for k, v in weights.items() if k != b}, "layer 'a' needs lora_A and lora_B, and has lora_A alone")
    changed(weights | {a: torch.zeros(1, 9)}, "layer 'a' has lora_A [1, 9]")
    changed(weights | {"base_model.model.a.lora_A.default.weight": torch.zeros(1, 6)}, "lora_A.default.weight' fits no Linear")  # a key twice, in two spellings
    changed({}, "has no weights")
    changed(weights, "r up to the capacity 4", capacity=4)
    changed(weights, "the model has adapters already", model=grown())
    for shape in ((), (5,), (1, 5), (5, 1, 1), (5, 2)):
        changed(weights | {b: torch.zeros(shape)}, f"layer 'a' has lora_A [1, 6] and lora_B {list(shape)}; need [1, 6] and [5, 1]")
    for shape in ((4, 2), (8,), (4, 1, 1, 2), (4, 2, 1)):
        changed(weights | {one: torch.zeros(shape)}, f"and lora_B {list(shape)}; need [2, 3, 1, 1] and [4, 2, 1, 1]")
    changed({k: torch.zeros(()) for k in weights}, " has lora_A [] and lora_B []")
    changed({k: v[:0] if "lora_A" in k else v[:, :0] for k, v in weights.items()}, " has lora_A [0, ")
    for dtype in (torch.int8, torch.uint8, torch.int64, torch.bool):
        changed(weights | {a: weights[a].to(dtype)}, f"'{a}' is of {dtype}; needs a plain tensor of floats")
    for bad in (math.nan, math.inf, -math.inf):
        changed(weights | {b: weights[b].clone().fill_(bad)}, f"'{b}' has entries that are not finite in float32")
    changed(weights | {b: weights[b].double().fill_(1e300)}, "not finite in float32")
    for dtype in (torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64):  # as in PEFT, which copies them
        save_file({k: v.to(dtype) for k, v in weights.items()}, file)
        model = plain()
        interchange.load_peft(model, tmp_path)
        assert torch.equal(selora.adapters(model)["a"].A[:, 0], weights[a].to(dtype).float()[0])
    if hasattr(torch, "float4_e2m1fn_x2"):
        changed(weights | {a: torch.zeros(1, 6, dtype=torch.float4_e2m1fn_x2)}, f"'{a}' is of torch.float4_e2m1fn_x2")

    class Derived(nn.Linear):
        """A layer that may compute something else."""

    model = plain()
    model["a"] = Derived(6, 5)
    changed(weights, f"key '{a}' fits no Linear or Conv2d of the model (a layer of a class derived", model=model)
    model = plain()
    model["a"] = nn.Embedding(5, 6)
    changed(weights, f"key '{a}' fits no Linear", model=model)
    entries = (f'"{key}":{{"dtype":"F32","shape":[1],"data_offsets":[{i},{i + 4}]}}' for i, key in ((0, a), (4, a)))
    header = f"{{{','.join(entries)}}}".encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    refused(tmp_path, "adapter_model.safetensors: not readable")  # a key twice
    save_file(weights, file)
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="adapter_model.safetensors: not readable"):
        interchange.load_peft(plain(), tmp_path)
    file.unlink()
    for saved, words in (([1], "holds a list"), (torch.ones(2), "holds a Tensor"), ({a: [1.0]}, "is of list"), ({5: torch.ones(2)}, "key 5 fits no"), ({a: weights[a].to_sparse()}, "needs a plain tensor of floats"), ({a: weights[a].to("meta")}, "needs a plain tensor"), ({a: None}, "is of NoneType")):
        torch.save(saved, file.with_suffix(".bin"))
        refused(tmp_path, words)
    file.with_suffix(".bin").unlink()
    with pytest.raises(ValueError, match="has no adapter_model"):
        interchange.load_peft(plain(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json: not readable"):
        interchange.load_peft(plain(), tmp_path)
    model = plain()
    selora.inject(model, None, 0)
    with pytest.raises(ValueError, match="no adapter of rank 1 or more"):
        interchange.save_peft(model, tmp_path)
