"""The tasks that the two scripts adapt to: the studies, and for train_mora.py splits, missing
tables, and the tensors of a seed.

`cfg` is the configuration of the script. Skip this file when you read for a method.

Letters: N samples, M modalities, C classes, F numeric columns.
"""

import itertools
from pathlib import Path

import numpy as np
import torch

from minilora import data, diffusion
from minilora.data import Refused
from minilora.models import count, load_selora
from minilora.mora import METHODS, attach
from minilora.phantoms import phantoms
from minilora.vit import ViT
from minilora.words import tokenize, word_id, words_of

# ---- settings with a syntax of their own


def parse_rate(text):
    """(method or '', learning rate) of RATE or METHOD:RATE."""
    method, _, rate = text.rpartition(":")
    try:
        lr = float(rate)
    except ValueError:
        lr = -1.0
    if not 0 < lr < 10 or (method and method not in METHODS):
        raise Refused(
            f"learning rate '{text}' must be RATE or METHOD:RATE with a rate in (0,10)"
        )
    return method, lr


def kept_job(cfg):
    """(method, seed) of --keep; the default falls back on the last method where there is no
    mora."""
    method, _, seed = cfg.keep.rpartition(":")
    if cfg.keep == "mora:0" and "mora" not in cfg.methods:
        method = cfg.methods[-1]
    if method not in cfg.methods or not seed.isdecimal() or int(seed) >= cfg.seeds:
        raise Refused(
            f"--keep '{cfg.keep}' must be METHOD:SEED of this run: {', '.join(cfg.methods)}; "
            f"0..{cfg.seeds - 1}"
        )
    return method, int(seed)


# ---- studies


def read_target(cfg):
    """The study to adapt to, with the modalities that are asked for."""
    modalities = cfg.modalities
    if cfg.data:
        target = data.load_study(cfg.data, cfg.synthetic_notes)
    elif cfg.synthetic_notes:
        raise Refused(
            "--synthetic-notes is for a --data file without notes; the phantoms have reports"
        )
    else:
        target = phantoms(cfg.phantoms, 2, "target", cfg.image_size)
        modalities = modalities or ("image", "note")
    return target.select(modalities) if modalities else target


def read_source(cfg, target):
    """The study to pretrain on, with the target's modalities and what can be read off a sample in
    `attributes`."""
    return _source_file(cfg, target) if cfg.source else _source_phantoms(cfg, target)


def _source_file(cfg, target):
    """The complete, labelled samples of --source; each label is an attribute."""
    if cfg.data and data.sha256(cfg.source) == data.sha256(cfg.data):
        raise Refused(
            f"--source {cfg.source} is the --data file: the base would see the test labels"
        )
    source = data.load_study(cfg.source)
    if cfg.synthetic_notes and source.notes is None:
        source = data.attach_notes(source)
    source = source.select([m for m in target.modalities if m in source.modalities])
    wanted = ", ".join(target.modalities)
    if set(source.modalities) != set(target.modalities):
        modalities = ", ".join(source.modalities) or "none"
        raise Refused(
            f"{cfg.source} has {modalities} of the target's modalities {wanted}; needs all"
        )
    source.numeric = {m: source.numeric[m] for m in target.numeric}  # in the target's order
    source = source.take(source.labelled & source.have().all(1))
    if not len(source):
        raise Refused(f"{cfg.source}: no labelled sample has all of {wanted}")
    labels = np.atleast_2d(source.labels.T)  # [1 or C,N]
    source.attributes = {f"label {i}": c for i, c in enumerate(labels) if c.max() > 0}
    return source


def _source_phantoms(cfg, target):
    """Phantoms of the source domain; their numbers take the names of the target's modalities."""
    source = phantoms(cfg.phantoms, 1, "source", cfg.image_size)
    spare = itertools.cycle(source.numeric)
    groups = {m: m if m in source.numeric else next(spare) for m in target.numeric}
    source.numeric = {m: source.numeric[group] for m, group in groups.items()}
    source.columns = {m: source.columns[group] for m, group in groups.items()}
    source = source.select(target.modalities)
    image = "image" in target.modalities
    note = "note" in target.modalities
    readable = []
    if image:
        readable += ["kind", "side"]
    if note or not image:
        readable += ["symptom", "history"]
    if image and note:
        readable += ["agree"]
    source.attributes = {name: source.attributes[name] for name in readable}
    return source


# ---- sizes


def vit_sizes(cfg, target, source):
    """The keyword arguments of the `ViT` that is pretrained: the source's columns, and a head that
    nobody uses."""
    positions = cfg.positions
    if not positions and "note" in target.modalities:
        longest = max(len(words_of(note)) for study in (target, source) for note in study.notes)
        # The next multiple of 4, so that studies of about the same length share a base.
        positions = min(64, -(-(1 + longest) // 4) * 4)
    colour = any(s.images is not None and s.images.ndim == 4 for s in (target, source))
    return dict(
        modalities=target.modalities,
        classes=2,
        columns=column_ids(source, cfg.buckets),
        image_size=cfg.image_size,
        channels=3 if colour else 1,
        patch=cfg.patch,
        width=cfg.width,
        depth=cfg.depth,
        heads=cfg.heads,
        buckets=cfg.buckets,
        positions=positions or 1,
    )


def column_ids(study, buckets):
    """{numeric modality: word id of each column's name}."""
    return {m: [word_id(c.lower(), buckets) for c in names] for m, names in study.columns.items()}


def input_sizes(vit_config):
    """The arguments of `data.model_inputs` that a ViT's configuration knows."""
    return [vit_config[key] for key in ("image_size", "channels", "buckets", "positions")]


def numeric_scales(study, rows):
    """{numeric modality: (mean [F], scale [F])} over the given rows."""
    return {m: data.numeric_scale(values[rows]) for m, values in study.numeric.items()}


def tests_of(cfg):
    """The missing tables of the test rows, each a TYPE:RATE."""
    return list(dict.fromkeys(cfg.test_missing or (cfg.missing,)))


def work_ahead(cfg, vit_config, runs):
    """A line per method: what its adapter and head hold, and how many runs follow; runs {method:
    number}."""
    for method, number in runs.items():
        with torch.device("meta"):  # sizes only: nothing is allocated or drawn
            counts = count(attach(ViT(**vit_config), method, cfg.rank))
        trainable = counts["trainable_params"]
        total = counts["total_params"]
        yield (
            f"{method:14s} adapter {counts['adapter_params']:,}, trainable {trainable:,} of {total:,} "
            f"({trainable / total:.2%}); {number} runs of {cfg.steps} steps"
        )


# ---- the draws of a seed


def draw_task(cfg, study, seed):
    """Split, missing tables and scales of one seed, shared by all methods: numpy, as stored in
    split-sN.npz."""
    parts = data.split(study, seed, cfg.train_share)
    have = study.have()  # [N,M]
    texts = dict.fromkeys((cfg.missing, *tests_of(cfg)))
    return {
        "parts": parts,
        "tables": {t: data.missing_table(have, study.modalities, t, seed) for t in texts},
        "order": np.random.default_rng((seed, 14)).permutation(len(study)),
        "scales": numeric_scales(study, parts["train"]),
    }


def split_arrays(study, draw):
    """What split-sN.npz holds of a seed's draw: {name: array}."""
    arrays = {"modalities": np.array(study.modalities), **draw["parts"]}
    arrays |= {f"present {text}": present for text, present in draw["tables"].items()}
    arrays |= {f"synthetic {k}": draw[k] for k in ("source", "images", "present") if k in draw}
    return arrays


def on(device, arrays):
    """{name: array} -> {name: tensor on the device}."""
    return {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in arrays.items()}


def load_task(study, draw, missing, vit_config, device):
    """The tensors of one seed, on the device; synthetic studies stand behind the others, in the
    training split only.

    inputs {modality: [N,...]}, labels [N] or [N,C], train: row numbers, present and shuffled [N,M]
    (each sample's own presence and another's), tables {TYPE:RATE: [N,M]}, order: whose presence a
    row has in `shuffled`."""
    train = draw["parts"]["train"]
    tables = draw["tables"]
    order = draw["order"]
    if "source" in draw:
        real = len(study)
        source = draw["source"]
        images = data.resize(study.images, draw["images"].shape[1])
        study = study.take(np.concatenate([np.arange(real), source]))
        study.images = np.concatenate([images, draw["images"]])
        train = np.concatenate([train, np.arange(real, len(study))])
        tables = {k: np.concatenate([v, draw["present"]]) for k, v in tables.items()}
        # Synthetic rows are shuffled among themselves.
        others = np.random.default_rng(22).permutation(len(source))
        order = np.concatenate([order, real + others])
    inputs = data.model_inputs(study, *input_sizes(vit_config), draw["scales"])
    tables = on(device, {k: v.astype(np.float32) for k, v in tables.items()})
    present = tables[missing]
    return {
        "inputs": on(device, inputs),
        "labels": torch.from_numpy(study.labels).to(device),
        "train": train,
        "present": present,
        "shuffled": present[order],
        "order": order,
        "tables": tables,
    }


def draw_studies(cfg, study, draw, seed, device):
    """Synthetic studies for --augment: which sample each takes words, numbers and label from, its
    image, its presence.

    The images come from the run's adapter of this seed. `Refused` if that run saw a sample that
    this seed does not train on, or another study."""
    run, _, count = cfg.augment.rpartition(":")
    if not {"image", "note"} <= set(study.modalities):
        modalities = ", ".join(study.modalities)
        raise Refused(f"--augment draws images from notes; the modalities are {modalities}")
    saved, model, vae = load_selora(run, None, seed)
    if saved.get("study") != data.fingerprint(study.select(("image", "note"), False)):
        raise Refused(
            f"--augment {run}: was trained on {saved['data']}, another study than this run's "
            f"{study.name}"
        )
    train = draw["parts"]["train"]
    seen = data.read_npz(Path(run) / f"split-s{seed}.npz")["train"]
    outside = ~np.isin(seen, train)
    if outside.any():
        raise Refused(
            f"--augment {run}: at seed {seed} it saw {int(outside.sum())} samples outside this run's "
            "training split; train it with the same --train-share"
        )
    have = study.have()
    worded = train[have[train][:, study.modalities.index("note")]]
    if not len(worded):
        raise Refused("--augment draws from words, and no training sample has any")
    source = worded[np.random.default_rng((seed, 18)).integers(0, len(worded), int(count))]
    config = saved["config"]
    ids = tokenize(study.notes[source], config["buckets"], config["positions"])
    images = diffusion.draw_images(
        model.to(device),
        vae.to(device),
        torch.from_numpy(ids).to(device),
        10**6 * (seed + 1) + np.arange(len(source)),
        alphas=diffusion.alphas_cumprod(kind=saved["schedule"], device=device),
    )
    if images.ndim != study.images.ndim:
        raise Refused(
            f"--augment {run}: draws images {list(images.shape[1:])}; {study.name} has "
            f"{list(study.images.shape[1:])}"
        )
    complete = have[source]
    complete[:, study.modalities.index("image")] = True
    present = data.missing_table(complete, study.modalities, cfg.missing, seed + 10**6)
    return {
        "source": source,
        "images": data.resize(images, cfg.image_size),
        "present": present,
    }


# ---- SeLoRA's studies; `cfg` is the configuration of train_selora.py


def read_pairs(cfg, path, domain, seed):
    """A study with images and words."""
    if path is None:
        return phantoms(cfg.phantoms, seed, domain, cfg.image_size).select(("image", "note"))
    study = data.load_study(path)
    if cfg.synthetic_notes and study.notes is None:
        study = data.attach_notes(study)
    return study.select(("image", "note"), need_every_sample=False)


def read_studies(cfg):
    """({'source', 'target': study}, rows of the target that have their image)."""
    if cfg.source and cfg.data and data.sha256(cfg.source) == data.sha256(cfg.data):
        raise Refused(
            f"--source {cfg.source} is the --data file: the base would see the held-out images"
        )
    target = read_pairs(cfg, cfg.data, "target", 2)
    source = read_pairs(cfg, cfg.source, "source", 1)
    source = source.take(source.have()[:, 0])
    drawable = np.flatnonzero(target.have()[:, 0])  # a sample without its image teaches nothing
    if not len(source) or not len(drawable):
        path = cfg.data if len(source) else cfg.source
        raise Refused(f"{path}: every image is missing (all black)")
    return {"source": source, "target": target}, drawable
