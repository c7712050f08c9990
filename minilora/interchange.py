"""Adapters in other people's files: PEFT folders and diffusers weight files.

Skip this file when you want to learn SeLoRA: it renames and transposes. Ours is A [d_in,C] and
B [C,d_out] (a convolution's A [C,c_in,k,k]); theirs is lora_A [r,d_in] (or [r,c_in,k,k]) and
lora_B [d_out,r] (or [d_out,r,1,1]). Our scale goes into B, and alpha = r makes theirs 1 in every
reader, whatever ranks the layers have.
"""

import json
import re
from pathlib import Path

import torch

from minilora import selora

# Settings of a PEFT adapter_config.json that change what the weights mean, and the only value that
# each can have here.
PLAIN = {
    "peft_type": "LORA",
    "use_dora": False,
    "use_rslora": False,
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "use_qalora": False,
    "layer_replication": None,
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "alora_invocation_tokens": None,
}


def lora_pairs(model):
    """{name: (lora_A, lora_B)} of the layers that have a rank: contiguous CPU tensors, the scale in
    lora_B. ValueError if no layer has one."""
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
    return pairs


def weights_of(pairs, prefix):
    """{key: tensor} of `lora_pairs`, under the keys of PEFT and diffusers."""
    weights = {}
    for name, (A, B) in pairs.items():
        weights[f"{prefix}.{name}.lora_A.weight"] = A
        weights[f"{prefix}.{name}.lora_B.weight"] = B
    return weights


def save_peft(model, folder):
    """Write the active ranks as a PEFT LoRA folder: adapter_config.json, adapter_model.safetensors
    (.bin without the safetensors package). ValueError if no layer has a rank."""
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
    loads them into the model that goes by the prefix. ValueError as in `save_peft`."""
    weights = weights_of(lora_pairs(model), prefix)
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
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:
        # Errors of header, zip and pickle come as many types, all of which mean the same here.
        raise ValueError(f"{path}: not readable ({type(error).__name__})") from None


def load_peft(model, folder, capacity=8):
    """Adapt a plain model with what a PEFT LoRA folder holds; returns the layers' names. They grow
    up to `capacity`.

    ValueError, before the model is changed: not a LoRA folder, or one with DoRA, rsLoRA, biases or
    other settings that mean something else; a key that fits no layer, a layer without its other
    half, other shapes, a rank above the capacity; a model with adapters."""
    present = selora.adapters(model)
    if present:
        name = next(iter(present))
        raise ValueError(f"the model has adapters already ({name}, ...): merge it first")
    config = read_config(folder)
    layers = dict(model.named_modules())
    pairs = {}  # {layer: {"A": tensor, "B": tensor}}
    for key, value in read_weights(folder).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match or not isinstance(layers.get(match[1]), selora.KINDS):
            raise ValueError(f"{folder}: key '{key}' fits no Linear or Conv2d of the model")
        pairs.setdefault(match[1], {})[match[2]] = value
    state = {}
    for name, pair in pairs.items():
        A, B = our_pair(pair, layers[name].weight, capacity, f"{folder}: layer '{name}'")
        state[name] = {"A": A, "B": B, "scale": alpha(config, name) / len(B)}
    names = selora.inject(model, "|".join(map(re.escape, state)), 0, capacity)
    selora.load_adapter(model, {name: state[name] for name in names})
    return names


def read_config(folder):
    """The settings of a PEFT folder. ValueError if they cannot be read or mean more than LoRA."""
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({type(error).__name__})") from None
    for key, only in PLAIN.items():
        value = config.get(key, only)
        if value not in (only, None, False, [], {}):
            raise ValueError(f"{folder}: {key} is {value!r}; only plain LoRA can be read "
                             f"({key} {only!r})")
    return config


def our_pair(pair, weight, capacity, where):
    """(A, B) as `selora` has them, of the {"A": lora_A, "B": lora_B} of a layer with this weight.

    ValueError, which says where, if one is missing or of another shape, or the rank is above the
    capacity."""
    if set(pair) != {"A", "B"} or pair["A"].dim() != weight.dim() or not len(pair["A"]):
        raise ValueError(f"{where} needs lora_A and lora_B with the dimensions of its weight")
    A = pair["A"]  # [r,d_in] or [r,c_in,k,k]
    B = pair["B"].flatten(1)  # [d_out,r]
    rank = len(A)
    shape_A = [rank, *weight.shape[1:]]
    shape_B = [weight.shape[0], rank]
    if list(A.shape) != shape_A or list(B.shape) != shape_B or rank > capacity:
        raise ValueError(f"{where} has lora_A {list(A.shape)} and lora_B {list(B.shape)}; need "
                         f"{shape_A} and {shape_B}, r up to the capacity {capacity}")
    if A.dim() == 2:
        A = A.T
    return A, B.T


def alpha(config, name):
    """The alpha of a layer. PEFT looks it up by the end of the layer's name, among patterns that
    are regular expressions."""
    default = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default
