"""A saved run -> a model: the frozen base with the adapter that a run kept, or one that is named.

Shared by the training scripts and the export; skip it when you read for a method.
"""

from pathlib import Path

import torch

from minilora import checkpoint, selora
from minilora.data import Refused, sha256
from minilora.mora import adapter_parameters, attach
from minilora.unet import Denoiser
from minilora.vae import VAE
from minilora.vit import ViT


def build(vit_config, base, method, rank, seed, state=None):
    """The frozen base with a method's adapter, fresh from `seed` or with a trained `state`."""
    torch.manual_seed(seed)
    model = ViT(**vit_config)
    missing, unexpected = model.load_state_dict(base, strict=False)
    if unexpected or not all(name.startswith("head.") for name in missing):
        raise Refused(f"the base does not fit the model: {(unexpected + missing)[0]}")
    attach(model, method, rank)
    if state is not None:
        model.load_state_dict(state, strict=False)
    return model


def count(model):
    """Parameters that a method adds, that train, and in all."""
    parameters = list(model.parameters())
    return {
        "adapter_params": sum(p.numel() for p in adapter_parameters(model).values()),
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "total_params": sum(p.numel() for p in parameters),
    }


def chosen_adapter(run, saved, method, seed):
    """The adapter that the run kept, or the one that --method and --seed name."""
    if method is None and seed is None:
        return saved["adapter"]
    method = method or saved["adapter"]["method"]
    if seed is None:
        seed = saved["adapter"]["seed"]
    path = Path(run) / f"adapters/{method.replace(' ', '-')}-s{seed}.pt"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.pt"))
        raise Refused(f"{path}: no such adapter; this run has {', '.join(names)}")
    adapter = checkpoint.load(path, f"{saved['kind']} adapter")
    if (adapter["method"], adapter["seed"]) != (method, seed):
        content = f"'{adapter['method']}' of seed {adapter['seed']}"
        raise Refused(f"{path}: holds {content}; its file was changed")
    return adapter


def load_mora(run, method=None, seed=None):
    """(content of RUN/model.pt with the chosen adapter, rebuilt model)."""
    saved = checkpoint.load(Path(run) / "model.pt", "mora")
    adapter = chosen_adapter(run, saved, method, seed)
    if adapter["method"] == "mora-shuffled":
        raise Refused("mora-shuffled is a control that needs other samples' patterns; "
                      "it cannot be served")
    saved["adapter"] = adapter
    model = build(
        saved["config"], saved["base"], adapter["method"], adapter["rank"], 0, adapter["state"]
    )
    return saved, model


def load_selora(run, method=None, seed=None):
    """(content of RUN/model.pt with the chosen adapter, the base with that adapter in place, its
    autoencoder).
    """
    saved = checkpoint.load(Path(run) / "model.pt", "selora")
    adapter = chosen_adapter(run, saved, method, seed)
    if adapter["base_hash"] != saved["base_hash"]:
        raise Refused(f"{run}: the adapter is for base {adapter['base_hash']}, "
                      f"the run has {saved['base_hash']}")
    if adapter["rule"] in ("unadapted", "full"):
        raise Refused(f"{run}: '{adapter['method']}' is a reference without an adapter; "
                      "name another --method")
    saved["adapter"] = adapter
    model = Denoiser(**saved["config"])
    vae = VAE(**saved["vae_config"])
    model.load_state_dict(saved["base"])
    vae.load_state_dict(saved["vae"])
    selora.inject(model, saved["targets"] or None, 0, saved["capacity"])
    selora.load_adapter(model, adapter["state"])
    return saved, model.eval(), vae.eval()


def load_judge(run, device, study_file):
    """The frozen ViT that a run of train_mora.py was built on; it looks at images alone. `Refused`
    if it was pretrained on the study whose held-out images it is to judge.
    """
    saved = checkpoint.load(Path(run) / "model.pt", "mora")
    run_config = checkpoint.read_json(Path(run) / "config.json", {})
    source = run_config.get("source") if isinstance(run_config, dict) else None
    if source and study_file and source["sha256"] == sha256(study_file):
        raise Refused(f"--judge {run}: was pretrained on {study_file}, "
                      "whose held-out images it would judge")
    if "image" not in saved["config"]["modalities"]:
        raise Refused(f"--judge {run}: its model has no image modality")
    vit = ViT(**saved["config"] | {"absent": "mask"})
    vit.load_state_dict(saved["base"], strict=False)
    return vit.to(device).requires_grad_(False).eval()
