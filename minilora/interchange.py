"""Adapters in other people's files: PEFT folders, diffusers and kohya weight files.

Skip this file when you want to learn SeLoRA: it renames and transposes. Ours is A [d_in,C] and B [C,d_out] (a
convolution's A [C,c_in,k,k]); theirs is lora_A [r,d_in] (or [r,c_in,k,k]) and lora_B [d_out,r] (or [d_out,r,1,1]). Our
scale goes into B, and alpha = r makes theirs 1 in every reader, whatever ranks the layers have.
"""

import json
import re
from pathlib import Path

import torch

from minilora import selora

# settings of a PEFT adapter_config.json that change what the weights mean, and the only value each can have here
PLAIN = {"peft_type": "LORA", "use_dora": False, "use_rslora": False, "bias": "none", "lora_bias": False,
         "fan_in_fan_out": False, "modules_to_save": None, "use_qalora": False, "layer_replication": None,
         "target_parameters": None, "trainable_token_indices": None, "use_bdlora": None,
         "alora_invocation_tokens": None}


def theirs(model):
    """{name: (lora_A, lora_B)} of the layers that have a rank, contiguous CPU tensors, the scale in lora_B."""
    pairs = {}
    for name, state in selora.adapter_state(model).items():
        A, B = state["A"], (state["scale"] * state["B"]).T  # [..], [d_out,r]
        if B.shape[1]:
            conv = A.dim() == 4
            pairs[name] = ((A if conv else A.T).contiguous(), (B[:, :, None, None] if conv else B).contiguous())
    if not pairs:
        raise ValueError("the model has no adapter of rank 1 or more: nothing to write")
    return pairs


def save_peft(model, folder):
    """Write the active ranks as a PEFT LoRA folder: adapter_config.json, adapter_model.safetensors (.bin without the
    safetensors package). ValueError if no layer has a rank."""
    pairs, folder = theirs(model), Path(folder)
    ranks = {name: len(A) for name, (A, B) in pairs.items()}
    exact = {"^" + re.escape(name): r for name, r in ranks.items()}  # bare names would match by their end
    config = {"peft_type": "LORA", "r": max(ranks.values()), "lora_alpha": max(ranks.values()), "bias": "none",
              "target_modules": sorted(ranks), "rank_pattern": exact, "alpha_pattern": exact, "task_type": None,
              "lora_dropout": 0.0, "inference_mode": True}
    weights = {f"base_model.model.{name}.lora_{part}.weight": v for name, pair in pairs.items()
               for part, v in zip("AB", pair)}
    folder.mkdir(parents=True, exist_ok=True)
    write_weights(weights, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")


def save_diffusers(model, folder, prefix="unet"):
    """Write pytorch_lora_weights.safetensors with keys PREFIX.<layer>.lora_A.weight, as diffusers loads them into the
    model that goes by the prefix. ValueError as in `save_peft`."""
    weights = {f"{prefix}.{name}.lora_{part}.weight": v for name, pair in theirs(model).items()
               for part, v in zip("AB", pair)}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_weights(weights, Path(folder) / "pytorch_lora_weights.safetensors")


def save_kohya(model, folder, prefix="lora_unet"):
    """Write kohya.safetensors: PREFIX_<layer with _ for .>.lora_down.weight, .lora_up.weight and .alpha = rank.
    ValueError as in `save_peft`, or if two layers' names become one."""
    weights = {}
    for name, (A, B) in theirs(model).items():
        key = f"{prefix}_{name.replace('.', '_')}"
        if f"{key}.alpha" in weights:
            raise ValueError(f"layer '{name}': another layer has the name '{key}' too")
        weights |= {f"{key}.lora_down.weight": A, f"{key}.lora_up.weight": B,
                    f"{key}.alpha": torch.tensor(float(len(A)))}
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_weights(weights, Path(folder) / "kohya.safetensors")


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
            raise ValueError(f"{path}: reading it needs safetensors: pip install safetensors") from None
        read = load_file
    else:
        path = path.with_suffix(".bin")
        read = lambda path: torch.load(path, map_location="cpu", weights_only=True)
    if not path.exists():
        raise ValueError(f"{folder}: has no adapter_model.safetensors or adapter_model.bin")
    try:
        return read(path)
    except Exception as error:  # header, zip and pickle errors come as many types, all of which mean the same here
        raise ValueError(f"{path}: not readable ({type(error).__name__})") from None


def load_peft(model, folder, capacity=8):
    """Adapt a plain model with what a PEFT LoRA folder holds; returns the layers' names. They grow up to `capacity`.

    ValueError, before the model is changed: not a LoRA folder, or one with DoRA, rsLoRA, biases or other settings that
    mean something else; a key that fits no layer, a layer without its other half, other shapes, a rank above the
    capacity; a model with adapters."""
    if selora.adapters(model):
        raise ValueError(f"the model has adapters already ({next(iter(selora.adapters(model)))}, ...): merge it first")
    path = Path(folder) / "adapter_config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable ({type(error).__name__})") from None
    for key, only in PLAIN.items():
        if config.get(key, only) not in (only, None, False, [], {}):
            raise ValueError(f"{folder}: {key} is {config[key]!r}; only plain LoRA can be read ({key} {only!r})")
    layers, found = dict(model.named_modules()), {}
    for key, value in read_weights(folder).items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", key)
        if not match or not isinstance(layers.get(match[1]), selora.KINDS):
            raise ValueError(f"{folder}: key '{key}' fits no Linear or Conv2d of the model")
        found.setdefault(match[1], {})[match[2]] = value
    state = {}
    for name, pair in found.items():
        if set(pair) != {"A", "B"} or pair["A"].dim() != layers[name].weight.dim() or not len(pair["A"]):
            raise ValueError(f"{folder}: layer '{name}' needs lora_A and lora_B with the dimensions of its weight")
        A, B, r = pair["A"], pair["B"].flatten(1), len(pair["A"])
        wanted = [r, *layers[name].weight.shape[1:]], [layers[name].weight.shape[0], r]
        if [list(A.shape), list(B.shape)] != [*wanted] or r > capacity:
            raise ValueError(f"{folder}: layer '{name}' has lora_A {list(A.shape)} and lora_B {list(B.shape)}; need "
                             f"{wanted[0]} and {wanted[1]}, r up to the capacity {capacity}")
        # PEFT looks a layer up by the end of its name, among patterns that are regular expressions
        patterns = config.get("alpha_pattern") or {}
        alpha = next((a for p, a in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), config["lora_alpha"])
        state[name] = {"A": A if A.dim() == 4 else A.T, "B": B.T, "scale": alpha / r}
    names = selora.inject(model, "|".join(map(re.escape, state)), 0, capacity)
    selora.load_adapter(model, {name: state[name] for name in names})
    return names
