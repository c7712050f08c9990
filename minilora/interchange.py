"""Adapters in other people's files: PEFT folders and diffusers weight files.

Skip this file when you want to learn SeLoRA: it renames and transposes. Ours is A [d_in,C] and
B [C,d_out] (a convolution's A [C,c_in,k,k]); theirs is lora_A [r,d_in] (or [r,c_in,k,k]) and
lora_B [d_out,r] (or [d_out,r,1,1]). Our scale goes into B, and alpha = r makes theirs 1 in every
reader, whatever ranks the layers have.
"""

import json
import re
from pathlib import Path
from reprlib import repr as short

import torch
import torch.nn.functional as F

from minilora import selora

# What an adapter_config.json may say. Settings that change what the weights mean, and the values
# with which they mean LoRA as it is here. These initialisations leave the base's weights alone;
# PiSSA, OLoRA, CorDA, LoRA-GA and LoftQ do not, and their weights mean nothing on the plain base.
GOOD = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "mica", "eva"),
}
# Every other setting, of today or of tomorrow, has to be off ...
OFF = (None, False, "", [], {})
# ... but for those that say which layers have weights, where the base is from or how training goes.
# PEFT reads the last line's for the initialisations of their names alone, and the last never.
HARMLESS = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "megatron_config", "megatron_core", "qalora_group_size", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "runtime_config",
}  # fmt: skip
# The numbers that are read, and the dictionaries that have others for some layers.
NUMBERS = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}
# A layer's name, or its end after a dot, as in an expression: a character may be escaped, a dot is
# any character, as PEFT has it. Without repetition or choice, matching takes no time.
NAME = re.compile(r"\^?(?:[^\\^$*+?{}\[\]|()]|\\\W)+\$?")


def lora_pairs(model):
    """{name: (lora_A, lora_B)} of the layers that have a rank: contiguous CPU tensors, the scale in
    lora_B. ValueError if no layer has one, or PEFT would apply one otherwise."""
    pairs = {}
    for name, state in selora.adapter_state(model).items():
        A = state["A"]  # [d_in,r], or [r,c_in,k,k] of a convolution
        B = (state["scale"] * state["B"]).T  # [d_out,r]
        if not B.shape[1]:
            continue
        if A.dim() == 4:
            B = B[:, :, None, None]
        else:
            A = A.T
        pairs[name] = (A.contiguous(), B.contiguous())
    if not pairs:
        raise ValueError("the model has no adapter of rank 1 or more: nothing to write")
    check_places(model, pairs)
    return pairs


def check_places(model, names):
    """ValueError for a layer that PEFT, and so diffusers, would apply otherwise than here."""
    layers = dict(model.named_modules())
    children = [child for module in model.modules() for child in module._modules.values()]
    for name in names:
        layer = layers[name]
        if children.count(layer) > 1:
            raise ValueError(f"layer '{name}' has several names in the model, and PEFT adapts the "
                             "first alone: give each name a layer of its own")
        base = getattr(layer, "base", layer)
        if getattr(base, "dilation", 1) not in (1, (1, 1)) and base.kernel_size != (1, 1):
            raise ValueError(f"layer '{name}' has dilation {base.dilation}, and PEFT's lora_A has "
                             "none: hand on the merged model (selora.merge)")


def weights_of(pairs, prefix):
    """{key: tensor} of `lora_pairs`, under the keys of PEFT and diffusers."""
    weights = {}
    for name, (A, B) in pairs.items():
        weights[f"{prefix}.{name}.lora_A.weight"] = A
        weights[f"{prefix}.{name}.lora_B.weight"] = B
    return weights


def save_peft(model, folder):
    """Write the active ranks as a PEFT LoRA folder: adapter_config.json, adapter_model.safetensors
    (.bin without the safetensors package). ValueError as in `lora_pairs`."""
    pairs = lora_pairs(model)
    ranks = {name: len(A) for name, (A, B) in pairs.items()}
    # PEFT matches bare names by their end
    exact = {"^" + re.escape(name): rank for name, rank in ranks.items()}
    config = {
        "peft_type": "LORA",
        "r": max(ranks.values()),
        "lora_alpha": max(ranks.values()),
        "bias": "none",
        "target_modules": sorted(ranks),
        "rank_pattern": exact,
        "alpha_pattern": exact,
        "task_type": None,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights_of(pairs, "base_model.model"), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def save_diffusers(model, folder, prefix="unet"):
    """Write pytorch_lora_weights.safetensors with keys PREFIX.<layer>.lora_A.weight, as diffusers
    loads them into the model that goes by the prefix. ValueError as in `save_peft`.

    The file has no place for alpha: diffusers before 0.40 takes the first layer's rank for the alpha
    of all. So zeros fill every layer up to the largest rank, and the scale is 1 in any version."""
    pairs = lora_pairs(model)
    largest = max(len(A) for A, B in pairs.values())
    for name, (A, B) in pairs.items():
        rank = largest - len(A)  # of zeros
        A = F.pad(A, [0, 0] * (A.dim() - 1) + [0, rank])
        B = F.pad(B, [0, 0] * (B.dim() - 2) + [0, rank])
        pairs[name] = (A, B)
    weights = weights_of(pairs, prefix)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder / "pytorch_lora_weights.safetensors")


def write_weights(weights, path):
    """A .safetensors file, or a .bin file of torch where the package is missing."""
    try:
        from safetensors.torch import save_file
    except ImportError:
        return torch.save(weights, path.with_suffix(".bin"))
    save_file(weights, path, metadata={"format": "pt"})


def read_weights(folder):
    """{key: tensor} of a PEFT folder. ValueError if it has no weights or they cannot be read."""
    path = Path(folder) / "adapter_model.safetensors"
    if path.exists():
        try:
            from safetensors.torch import load_file
        except ImportError:
            message = f"{path}: reading it needs safetensors: pip install safetensors"
            raise ValueError(message) from None
    else:
        path = path.with_suffix(".bin")
        if not path.exists():
            raise ValueError(f"{folder}: has no adapter_model.safetensors or adapter_model.bin")
    try:
        if path.suffix == ".bin":
            weights = torch.load(path, map_location="cpu", weights_only=True)
        else:
            weights = load_file(path)
    except Exception as error:
        # Errors of header, zip and pickle come as many types, all of which mean the same here.
        raise ValueError(f"{path}: not readable ({type(error).__name__})") from None
    if not isinstance(weights, dict):
        raise ValueError(f"{path}: holds a {type(weights).__name__}; needs a dictionary of tensors")
    return weights


def load_peft(model, folder, capacity=8):
    """Adapt a plain model with what a PEFT LoRA folder holds; returns the layers' names. They grow
    up to `capacity`.

    ValueError, before the model is changed: not a LoRA folder, or one with a setting that is not
    known to mean the same here (DoRA, rsLoRA, biases, PiSSA, ...); a key that fits no layer, a
    layer without its other half, other shapes or ranks than the settings say, a rank above the
    capacity, weights that are no finite floats; a layer that PEFT would apply otherwise; a model
    with adapters."""
    present = selora.adapters(model)
    if present:
        name = next(iter(present))
        raise ValueError(f"the model has adapters already ({name}, ...): merge it first")
    config = read_config(folder)
    layers = dict(model.named_modules())
    pairs = {}  # {layer: {"A": tensor, "B": tensor}}
    for key, value in read_weights(folder).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", str(key))
        if not match or type(layers.get(match[1])) not in selora.KINDS:
            raise ValueError(f"{folder}: key {key!r} fits no Linear or Conv2d of the model "
                             "(a layer of a class derived from them is none)")
        check_tensor(f"{folder}: {key!r}", value)
        pairs.setdefault(match[1], {})[match[2]] = value
    if not pairs:
        raise ValueError(f"{folder}: has no weights")
    check_places(model, pairs)
    state = {}
    for name, pair in pairs.items():
        rank = number_of("r", config, name)
        A, B = our_pair(pair, layers[name].weight, rank, capacity, f"{folder}: layer '{name}'")
        state[name] = {"A": A, "B": B, "scale": number_of("lora_alpha", config, name) / rank}
    names = selora.inject(model, "|".join(map(re.escape, state)), 0, capacity)
    selora.load_adapter(model, {name: state[name] for name in names})
    return names


def read_config(folder):
    """The settings of a PEFT folder, the keys of patterns compiled. ValueError if they cannot be
    read, or are not known to mean LoRA as it is here."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({type(error).__name__})") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path}: holds {short(config)}; needs a dictionary of settings")
    for key, value in ({"peft_type": None} | config).items():
        # As text, for 1 == True.
        good = [repr(value) for value in GOOD.get(key, OFF)]
        if key not in {*HARMLESS, *NUMBERS, *NUMBERS.values()} and short(value) not in good:
            raise ValueError(f"{folder}: {key} is {short(value)}; only plain LoRA can be read "
                             f"({key} {', '.join(good)})")
    for key, patterns in NUMBERS.items():
        check_number(f"{folder}: {key}", key, config.get(key))
        config[patterns] = compiled(f"{folder}: {patterns}", key, config.get(patterns))
    return config


def check_number(where, key, value):
    """ValueError unless `value` can be an r or a lora_alpha, whichever the key is."""
    largest = torch.finfo(torch.float32).max
    if key == "r":
        good = type(value) is int and 1 <= value <= largest
        need = "a whole number of 1 or more"
    else:
        good = type(value) in (int, float) and abs(value) <= largest
        need = "a finite number"
    if not good:
        raise ValueError(f"{where} is {short(value)}; needs {need}")


def compiled(where, key, patterns):
    """[(expression, number)] of a rank_pattern or alpha_pattern; the first that matches counts.

    ValueError if it is no dictionary, or has a key that is more than a name, or other numbers."""
    if patterns is None:
        return []
    if not isinstance(patterns, dict):
        raise ValueError(f"{where} is {short(patterns)}; needs a dictionary of layers' names")
    for name, value in patterns.items():
        if not NAME.fullmatch(name):
            raise ValueError(f"{where} has the key {name!r}; only a layer's name or its end can be "
                             "read, no expression: write one key per layer")
        check_number(f"{where}[{name!r}]", key, value)
    return [(re.compile(rf"(.*\.)?({name})$"), value) for name, value in patterns.items()]


def number_of(key, config, name):
    """The r or lora_alpha of a layer, found as PEFT finds it."""
    for expression, value in config[NUMBERS[key]]:
        if expression.match(name):
            return value
    return config[key]


def check_tensor(where, value):
    """ValueError unless `value` is a plain tensor of finite floats."""
    kind = getattr(value, "dtype", type(value).__name__)
    floats = isinstance(value, torch.Tensor) and value.is_floating_point() and not value.is_meta
    # An entry of torch.float4_e2m1fn_x2 is two numbers.
    if not floats or value.layout != torch.strided or "float4" in str(kind):
        raise ValueError(f"{where} is of {kind}; needs a plain tensor of floats")
    if not value.float().isfinite().all():
        raise ValueError(f"{where} has entries that are not finite in float32: it cannot be used")


def our_pair(pair, weight, rank, capacity, where):
    """(A, B) as `selora` has them, of the {"A": lora_A, "B": lora_B} of a layer with this weight.

    ValueError, which says where, if one is missing or of another shape, or the rank is above the
    capacity."""
    if set(pair) != {"A", "B"}:
        raise ValueError(f"{where} needs lora_A and lora_B, and has lora_{', '.join(pair)} alone")
    A = pair["A"]  # [r,d_in] or [r,c_in,k,k]
    B = pair["B"]  # [d_out,r] or [d_out,r,1,1]
    shape_A = [rank, *weight.shape[1:]]
    shape_B = [weight.shape[0], rank]
    if weight.dim() == 4:
        shape_B += [1, 1]
    if list(A.shape) != shape_A or list(B.shape) != shape_B or rank > capacity:
        raise ValueError(f"{where} has lora_A {list(A.shape)} and lora_B {list(B.shape)}; need "
                         f"{shape_A} and {shape_B}, r up to the capacity {capacity}")
    if A.dim() == 2:
        A = A.T
    return A, B.flatten(1).T
