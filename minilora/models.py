"""A saved run -> a model: the frozen base with the adapter that a run kept, or one that is named.

Shared by the training scripts and the export; skip it when you read for a method.
"""

import hashlib
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from minilora import checkpoint, diffusion, selora
from minilora.data import Refused, refusing, sha256
from minilora.mora import adapter_parameters, attach
from minilora.prepare import check_record
from minilora.unet import Denoiser
from minilora.vae import VAE
from minilora.vit import ViT
from minilora.wordpiece import WordPiece
from minilora.words import CUTS, tokenize

HEAD = ("pooler.", "head.")  # what trains in every method, unless the head is locked
RUN_SETTINGS = ("absent", "vocabulary")  # of a ViT's configuration, beside its arguments
WORDS = "text.words.weight"  # the vectors of a denoiser's words [buckets,Dt]


def build(vit_config, base, method, rank, seed, state=None, places=("the base", "the adapter")):
    """The frozen base with a method's adapter, fresh from `seed` or with a trained `state`. What is
    frozen is `base` itself, not a copy. `Refused` unless base and state fit exactly; `places`:
    where they come from."""
    torch.manual_seed(seed)
    model = based(vit_config, base, places[0], empty=state is not None)
    with refusing(places[1]):
        attach(model, method, rank)
    if state is None:
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()  # what trains must not change the base
    else:
        checkpoint.check_weights(f"{places[1]}, method '{method}'", state, kept_weights(model))
        model.load_state_dict(state, strict=False, assign=True)
    return model


def base_file(base_hash):
    """The file of a base that runs of train_mora.py share."""
    return Path(f"runs/base/vit-{base_hash}.pt")


def based(vit_config, base, place, empty=False):
    """A `ViT` whose weights, all but the head's, are those of `base` and no copies. empty: the head
    is still to be loaded, and nothing is drawn for it."""
    with refusing(place), torch.device("meta" if empty else "cpu"):
        vit = make_vit(vit_config)
    checkpoint.check_weights(place, base, without_head(vit))
    vit.load_state_dict(base, strict=False, assign=True)
    if empty:  # what is no weight was made on the meta device too
        for name, ids in vit.config["columns"].items():
            setattr(vit, f"columns_{name}", torch.tensor(ids))
    return vit


class Dummies(nn.Module):
    """The paper's way to show an absent modality: an all-ones image, an empty note, the mean of
    each numeric column, attended like any other. It stands in a `ViT` at `.dummies`.

    config: the ViT's; first_id: the word id that an empty note starts with."""

    def __init__(self, config, first_id=1):
        super().__init__()
        self.config = config
        self.first_id = first_id

    def dummy(self, name, like):
        """What stands for an absent modality, [1,...], of the device and type of `like`."""
        config = self.config
        if name == "image":
            return like.new_ones(1, config["channels"], *[config["image_size"]] * 2)
        if name == "note":
            first = like.new_full((1, 1), self.first_id, dtype=torch.long)
            return F.pad(first, (0, config["positions"] - 1))
        return like.new_zeros(1, len(config["columns"][name]))

    def forward(self, batch, present, like):
        """(a batch without gaps, None: all of it is present) of a batch and its presence [B,M]."""
        B = next(iter(batch.values())).shape[0]
        filled = {}
        for m, name in enumerate(self.config["modalities"]):
            dummy = self.dummy(name, like)
            if name not in batch:
                filled[name] = dummy.expand(B, *dummy.shape[1:])
            elif present is None:
                filled[name] = batch[name]
            else:
                have = present[:, m] > 0
                have = have.reshape(-1, *[1] * (dummy.dim() - 1))  # [B,1,...]
                filled[name] = torch.where(have, batch[name], dummy.to(batch[name]))
        return filled, None


class Filled(nn.Module):
    """Nothing to show: an absent modality has the content of another sample, which was put into the
    batch before, and all of the batch is attended. It stands in a `ViT` at `.dummies`."""

    def forward(self, batch, present, like):
        """(the batch, None: all of it is present), whatever its presence [B,M]."""
        return batch, None


def make_vit(config):
    """A `ViT` of a run's configuration: its keyword arguments; `absent`, how it shows a modality
    that is absent (`mask`, `dummy` or `fill`); and, where words are pieces of a vocabulary, that.
    ValueError if they do not fit together."""
    arguments = {key: value for key, value in config.items() if key not in RUN_SETTINGS}
    vit = ViT(**arguments)
    if config["absent"] == "dummy":
        empty = note_encoder(config | vit.config)([""])  # [1,P]
        first_id = int(empty[0, 0])
        vit.dummies = Dummies(vit.config, first_id)
    elif config["absent"] == "fill":
        vit.dummies = Filled()
    elif config["absent"] != "mask":
        raise ValueError(f"absent '{config['absent']}' is not known; use mask, dummy or fill")
    return vit


def note_encoder(config):
    """The function notes -> word ids [N,P] of a run's configuration of a `ViT`."""
    if "vocabulary" in config:
        encode = WordPiece(config["vocabulary"]).tokenize
        return partial(encode, positions=config["positions"])
    return partial(tokenize, buckets=config["buckets"], positions=config["positions"])


def without_head(vit):
    """{name: tensor} of what is pretrained of a `ViT`."""
    return {name: value for name, value in vit.state_dict().items() if not name.startswith("head.")}


def kept_weights(model):
    """{name: parameter} of what a run keeps of an adapted model: what trains, pooler and head."""
    named = model.named_parameters()
    return {n: p for n, p in named if p.requires_grad or n.startswith(HEAD)}


def count(model):
    """Parameters that a method adds, that train, and in all."""
    parameters = list(model.parameters())
    return {
        "adapter_params": sum(p.numel() for p in adapter_parameters(model).values()),
        "trainable_params": sum(p.numel() for p in parameters if p.requires_grad),
        "total_params": sum(p.numel() for p in parameters),
    }


def chosen_adapter(run, saved, method, seed):
    """(its file, the adapter that the run kept, or the one that --method and --seed name)."""
    kept = saved["adapter"]
    if method is None and seed is None:
        path = Path(run) / "model.pt"
        check_base(path, kept, saved["base_hash"])
        return path, kept
    method = method or kept["method"]
    if seed is None:
        seed = kept["seed"]
    path = Path(run) / f"adapters/{method.replace(' ', '-')}-s{seed}.pt"
    if not path.is_file():
        names = sorted(p.stem for p in path.parent.glob("*.pt"))
        raise Refused(f"{path}: no such adapter; this run has {', '.join(names)}")
    return path, read_adapter(path, f"{saved['kind']} adapter", method, seed, saved["base_hash"])


def read_adapter(path, kind, method, seed, base_hash):
    """The content of an adapter's file; `Refused` if it is another's or was trained on another
    base."""
    adapter = checkpoint.load(path, kind)
    if (adapter["method"], adapter["seed"]) != (method, seed):
        content = f"'{adapter['method']}' of seed {adapter['seed']}"
        raise Refused(f"{path}: holds {content}, not '{method}' of seed {seed}; its file was changed")
    check_base(path, adapter, base_hash)
    return adapter


def check_base(path, adapter, base_hash):
    """`Refused` if an adapter was trained on another base. Earlier files of MoRA do not say."""
    of = adapter.get("base_hash", base_hash)
    if of != base_hash:
        raise Refused(f"{path}: an adapter for base {of}, not for base {base_hash}")


def load_head(model, path, seed, base_hash):
    """Put the head that method `head` trained at this seed into a model, and freeze it."""
    head = read_adapter(path, "mora adapter", "head", seed, base_hash)
    expected = {n: p for n, p in model.named_parameters() if n.startswith(HEAD)}
    checkpoint.check_weights(f"{path}: entry 'state'", head["state"], expected)
    model.load_state_dict(head["state"], strict=False)
    model.pooler.requires_grad_(False)
    model.head.requires_grad_(False)


def load_mora(run, method=None, seed=None):
    """(content of RUN/model.pt with the chosen adapter, rebuilt model)."""
    path = Path(run) / "model.pt"
    saved = checkpoint.load(path, "mora")
    check_tokenizer(path, saved)
    file, adapter = chosen_adapter(run, saved, method, seed)
    if adapter["method"] == "mora-shuffled":
        raise Refused("mora-shuffled is a control that needs the presence of other samples; "
                      "it cannot be served")
    saved["adapter"] = adapter
    check_sizes(path, saved)
    scales = {name: [*map(len, pair)] for name, pair in adapter["scales"].items()}
    columns = saved["config"]["columns"].items()
    check_entries(file, {"scales": (scales, {name: [len(ids)] * 2 for name, ids in columns})})
    places = (f"{path}: entry 'base'", f"{file}: the adapter")
    model = build(saved["config"], saved["base"], adapter["method"], adapter["rank"], 0,
                  adapter["state"], places)
    return saved, model


def check_tokenizer(path, saved):
    """`Refused` unless a run says how its words became ids as this version knows it."""
    tokenizer = saved.get("tokenizer", "crc32")
    if tokenizer not in CUTS:
        raise Refused(f"{path}: entry 'tokenizer' is '{tokenizer:.40}'; use {', '.join(CUTS)}")
    with refusing(f"{path}: entry 'prepared'"):
        check_record(saved.get("prepared", {}))


def check_sizes(path, saved):
    """`Refused` if an entry of a model.pt of train_mora.py has another size than `config` says."""
    config = saved["config"]
    columns = {name: len(ids) for name, ids in config["columns"].items()}
    check_entries(path, {
        "config.columns": ({*columns}, {*config["modalities"]} - {"image", "note"}),
        "columns": ({name: len(names) for name, names in saved["columns"].items()}, columns),
        "class_names": (len(saved["class_names"]), config["classes"]),
        "patterns": ({len(row) for row in saved["patterns"]}, {len(config["modalities"])}),
    })


def check_entries(path, entries):
    """`Refused` with the file and the first of {entry: (what it is, what it has to be)} that
    differs."""
    for entry, (value, needed) in entries.items():
        if value != needed:
            raise Refused(f"{path}: entry '{entry}' does not fit: {value!s:.80}, not {needed!s:.80}")


def load_selora(run, method=None, seed=None):
    """(content of RUN/model.pt with the chosen adapter, the base with that adapter in place, its
    autoencoder).
    """
    path = Path(run) / "model.pt"
    saved = checkpoint.load(path, "selora")
    check_tokenizer(path, saved)
    file, adapter = chosen_adapter(run, saved, method, seed)
    if adapter["rule"] in ("unadapted", "full"):
        raise Refused(f"{run}: '{adapter['method']}' is a reference without an adapter; "
                      "name another --method")
    saved["adapter"] = adapter
    adapter["ranks"] = ranks_in(file, adapter["state"])
    with refusing(path):
        diffusion.alphas_cumprod(noisier=saved["noisier"])
        model = Denoiser(**saved["config"])
        vae = VAE(**saved["vae_config"])
    latents = (saved["config"]["latent"], saved["config"]["size"])
    check_entries(path, {"vae_config": ((vae.latent, vae.size), latents)})
    checkpoint.check_weights(f"{path}: entry 'base'", saved["base"], model.state_dict())
    checkpoint.check_weights(f"{path}: entry 'vae'", saved["vae"], vae.state_dict())
    model.load_state_dict(saved["base"])
    vae.load_state_dict(saved["vae"])
    with refusing(path):
        selora.inject(model, saved["targets"] or None, 0, saved["capacity"])
    with refusing(file):
        selora.load_adapter(model, adapter["state"])
        put_words(model, adapter["words"])
    return saved, model.eval(), vae.eval()


def changed_words(model, base):
    """{'ids' [n] ascending, 'vectors' [n,Dt]}: the word vectors of a denoiser that are not those of
    `base`, a state."""
    table = model.text.words.weight.detach().cpu()  # [buckets,Dt]
    ids = (table != base[WORDS].cpu()).any(1).nonzero()[:, 0]
    return {"ids": ids, "vectors": table[ids]}


def put_words(model, words):
    """Give a denoiser the word vectors of an adapter's file; ValueError if they do not fit."""
    table = model.text.words.weight  # [buckets,Dt]
    ids = words["ids"]
    vectors = words["vectors"]
    if ids.dtype != torch.int64 or ids.dim() != 1 or vectors.dtype != table.dtype:
        raise ValueError(f"word ids are {ids.dtype} {[*ids.shape]}, their vectors {vectors.dtype}; "
                         f"must be torch.int64 [n] and {table.dtype}")
    if vectors.shape != (len(ids), table.shape[1]) or not vectors.isfinite().all():
        shape = [*vectors.shape]
        raise ValueError(f"word vectors {shape} for {len(ids)} ids must be finite, of width "
                         f"{table.shape[1]}")
    if len(ids) and (ids[0] < 0 or ids[-1] >= len(table) or (ids.diff() < 1).any()):
        raise ValueError(f"word ids must ascend from 0 to {len(table) - 1}")
    table.data[ids] = vectors.to(table)


def ranks_in(path, state):
    """{layer: rank} of the state of an adapter in a file; `Refused` if it is not one."""
    checkpoint.check_form(path, {"state": state}, {"state": checkpoint.LAYERS})
    for name, layer in state.items():
        for part in "AB":
            value = layer[part]
            if value.dim() < 2 or not value.is_floating_point() or not value.isfinite().all():
                kind = checkpoint.described(value)
                raise Refused(f"{path}: weight '{name}.{part}' is {kind}; must be a matrix of "
                              "finite floats")
    return {name: len(layer["B"]) for name, layer in state.items()}


def load_judge(run, device, target, study_file):
    """The frozen ViT that a run of train_mora.py was built on; it looks at images alone. `Refused`
    if it was pretrained on images of the study whose held-out images it is to judge, or on the
    file that they are in.
    """
    path = Path(run) / "model.pt"
    saved = checkpoint.load(path, "mora")
    check_sizes(path, saved)
    if "image" not in saved["config"]["modalities"]:
        raise Refused(f"--judge {run}: its model has no image modality")
    seen = saved.get("source_images", torch.empty(0, dtype=torch.int64))  # earlier runs lack it
    check_entries(path, {"source_images": (seen.dtype, torch.int64)})
    shared = int(np.isin(image_digests(target), seen.numpy()).sum())
    if shared:
        raise Refused(f"--judge {run}: was pretrained on {shared} images of {target.name}, "
                      "whose held-out images it would judge")
    file = Path(run) / "config.json"
    run_config = checkpoint.read_json(file, {})
    checkpoint.check_form(file, run_config, {"source?": (checkpoint.DATA[0], type(None))})
    source = run_config.get("source")
    if source and study_file and source["sha256"] == sha256(study_file):
        raise Refused(f"--judge {run}: was pretrained on {study_file}, "
                      "whose held-out images it would judge")
    vit = based(saved["config"] | {"absent": "mask"}, saved["base"], f"{path}: entry 'base'")
    return vit.to(device).requires_grad_(False).eval()


def image_digests(study):
    """int64 [n], a hash of each of a study's images that is not of one colour: equal pictures have
    equal ones, whatever file they are in."""
    if study.images is None:
        return np.empty(0, np.int64)
    images = study.images  # [N,H,W] or [N,H,W,3]
    if images.ndim == 4 and (images == images[..., :1]).all():
        images = images[..., 0]  # grey, in three channels
    flat = np.ascontiguousarray(images.reshape(len(images), -1))
    shown = np.flatnonzero(flat.min(1) < flat.max(1))
    hashes = b"".join(hashlib.blake2b(flat[i], digest_size=8).digest() for i in shown)
    return np.frombuffer(hashes, np.int64)
