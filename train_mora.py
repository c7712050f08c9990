"""Diagnose with a modality missing: pretrain or load a tiny ViLT, freeze it, adapt it with MoRA and its controls,
compare.

    python train_mora.py --out runs/mora                     # phantoms (synthetic), 3 seeds
    python train_mora.py --data study.npz --out runs/mine    # your images, notes and numbers

The script reads downward. The lesson is `adapt`: zero_grad, forward, loss, backward, step, around `minilora/mora.py`.
"""

import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from minilora import checkpoint, data, metrics
from minilora.checkpoint import Watch, on, restore, resume_state, rows_at, warm_cosine
from minilora.data import Refused
from minilora.mora import METHODS, adapter_parameters, attach, branch_ranks, gates
from minilora.vit import ViT

LR_GRID = (3e-3, 1e-2, 3e-2)  # every method's learning rate comes from here: one shared rate would favour some of them
SAVE_EVERY, LOG_EVERY = 200, 50  # steps
PRESETS = {"small": {}, "base": dict(image_size=64, width=256, depth=6, heads=8, buckets=8192),
           "large": dict(image_size=384, patch=32, width=768, depth=12, heads=12, buckets=30522, positions=40)}


@dataclass
class Config:
    """Adapt a frozen multimodal transformer to diagnose with missing modalities; compare MoRA with its controls."""

    out: Path = Path("runs/mora")  # Run folder: config, splits, log, metrics, adapters, model.
    # Study file (.npz) or a MedMNIST file; default: phantoms of the target domain, which are synthetic.
    data: Path | None = None
    source: Path | None = None  # Study file that the base is pretrained on; default: phantoms of the source domain.
    # Which to use; default: all that the file has; of the phantoms image and note (they have vitals and labs too).
    modalities: tuple[str, ...] = ()
    synthetic_notes: bool = False  # Attach templated notes, right 80% of the time, to a file that has none.
    # Of head (the baseline of every difference), lora, mora, mora-open, mora-shuffled, mora-all, prompt, full.
    methods: tuple[str, ...] = ("head", "lora", "mora", "mora-open", "full")
    seeds: int = 3  # Runs per method; a seed sets split, missing table, initial adapter and batches.
    # TYPE:RATE for training and validation; TYPE is a modality that is lost, `any`, or `both` (any of two).
    missing: str = "any:0.7"
    test_missing: tuple[str, ...] = ()  # TYPE:RATE of each test row; default: as in training.
    # `mask` hides an absent modality from attention; `dummy` shows an all-ones image, an empty note (the paper's way).
    absent: str = "mask"
    # `trained` with the adapter, or `locked`: the head that method `head` trained, frozen, so the adapter alone adapts.
    head: str = "trained"
    rank: int = 4  # Rank of the MoRA branch; the other adapters get as many parameters.
    steps: int = 600  # Adaptation steps.
    batch: int = 64  # Samples per step.
    # A learning rate for all methods, or METHOD:RATE for some; default: the best of 0.003, 0.01, 0.03 on seed 0's
    # validation split.
    lr: tuple[str, ...] = ()
    keep: str = "mora:0"  # METHOD:SEED that goes into model.pt, which export.py takes.
    image_size: int = 32  # Images are resized to this.
    patch: int = 8  # Side of an image patch; must divide the image size.
    width: int = 64  # Width of the transformer.
    depth: int = 4  # Blocks of the transformer.
    heads: int = 4  # Attention heads.
    buckets: int = 2048  # Hash buckets for words.
    positions: int = 0  # Word positions of a note; 0: what the longest note needs, at most 64. Longer notes are cut.
    pretrain_steps: int = 1200  # Steps of pretraining on the source, once; the base is cached under runs/base.
    phantoms: int = 8000  # Phantoms to draw of a domain where no file is given.
    train_share: float = 1.0  # Share of the training split that is used, for scarce data; small shares lie in large.
    # SELORA_RUN:COUNT adds COUNT synthetic studies to the training split: a training sample's facts, and an image drawn
    # from its words by that run of train_selora.py, whose training split must lie within this one.
    augment: str = ""
    # Replaces sizes left at their defaults: small (none), base (7M parameters) or large (ViLT-B/32, 111M, for a GPU).
    preset: str = "small"
    device: str = "auto"  # auto, cpu, cuda or cuda:N.
    amp: bool = False  # Forward passes of the adaptation in bfloat16; weights and optimizer stay float32.
    compile: bool = False  # torch.compile the adaptation step.
    resume: bool = False  # Go on with the run in --out, or show it again if it is finished.
    dry_run: bool = False  # Print counts, parameters, memory and an estimate of time, and stop.
    tensorboard: bool = False  # Show log.jsonl as TensorBoard events too, in the run folder (pip install tensorboard).


# -------------------------------------------------------------------------------------------------------- the two loops


def pretrain(cfg, source, vit_config, device, path, stop):
    """Train encoder and pooler on the source's attributes, a linear reader each, complete samples only.

    Returns what is cached in `path`: the state without head, and the readers, which can judge images later. An
    interrupted pretraining goes on from its .last.pt.
    """
    if path.exists():
        return checkpoint.load(path, "base", path.stem)
    scales = numeric_scales(source, np.arange(len(source)))
    inputs = on(device, data.model_inputs(source, *input_sizes(vit_config), scales))
    targets = on(device, source.attributes)
    torch.manual_seed(0)
    vit = ViT(**vit_config)
    readers = torch.nn.ModuleDict({k: torch.nn.Linear(cfg.width, int(v.max()) + 1) for k, v in targets.items()})
    model = torch.nn.ModuleDict({"vit": vit, "readers": readers}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.pretrain_steps))
    last, start = path.with_suffix(".last.pt"), 0
    if last.exists():
        start = restore(checkpoint.load(last, "resume", path.stem), model, optimizer, schedule)
    rows_of = lambda step: rows_at(0, step, len(source), cfg.batch)
    progress = checkpoint.Progress("pretrain", cfg.pretrain_steps, start)

    def keep(done):
        watch.checked(done)  # weights that are NaN are not kept
        checkpoint.save(last, resume_state(model, optimizer, schedule, done) | {"of": path.stem})

    watch = Watch("pretraining", cfg.pretrain_steps, start, model, rows_of, device)
    present = torch.ones(cfg.batch, len(vit.modalities), device=device)
    for step in range(start, cfg.pretrain_steps):
        rows = torch.from_numpy(rows_of(step)).to(device)
        optimizer.zero_grad()
        features = vit.features({m: x[rows] for m, x in inputs.items()}, present)
        loss = sum(known_loss(reader(features), targets[k][rows]) for k, reader in readers.items())
        loss.backward()
        watch.note(step, loss)
        optimizer.step()
        schedule.step()
        if progress.due(step + 1):
            progress.show(step + 1, f"loss {watch.checked(step + 1)[-1]:.3f}")
        stop.after(step + 1, SAVE_EVERY, keep)
    watch.checked(cfg.pretrain_steps)
    state = {k: v.cpu() for k, v in vit.state_dict().items() if not k.startswith("head.")}
    content = {"format": 1, "kind": "base", "of": path.stem, "config": vit_config, "state": state,
               "readers": readers.state_dict()}
    checkpoint.save(path, content)
    last.unlink(missing_ok=True)
    return checkpoint.load(path, "base", path.stem)


def adapt(cfg, model, method, seed, lr, task, device, log, last, stop):
    """Train what `attach` left trainable; returns seconds. `task` is what `load_task` makes."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.steps))
    compiled = torch.compile(model) if cfg.compile else model
    job, start, began = f"{method}-s{seed}-{lr:g}", 0, time.monotonic()
    saved = checkpoint.load(last, "resume") if last.exists() else {}
    if saved.get("job") == job:
        start, began = restore(saved, model, optimizer, schedule), began - saved["seconds"]
        log.cut(saved["log"])
    rows_of = lambda step: task["train"][rows_at(seed, step, len(task["train"]), cfg.batch)]
    progress = checkpoint.Progress(f"{method} s{seed} lr {lr:g}", cfg.steps, start)
    watch = Watch(job, cfg.steps, start, model, rows_of, device)
    if start:
        watch.losses[:start] = saved["losses"]

    def keep(done):
        watch.checked(done)
        checkpoint.save(last, resume_state(model, optimizer, schedule, done) | {
            "job": job, "seconds": time.monotonic() - began, "log": log.size, "losses": watch.losses[:done]})

    if not start:
        keep(0)  # from here on a killed run knows where its log ends
    half = torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp)
    for step in range(start, cfg.steps):
        # indexed by step: a resumed run draws the same, and several processes each take a part of it
        rows = torch.from_numpy(checkpoint.own_part(rows_of(step), cfg.batch)).to(device)
        batch, present = {m: x[rows] for m, x in task["inputs"].items()}, task["present"][rows]
        optimizer.zero_grad()
        with half:  # block 0 is a MoRABlock: it adds the sum over the present m of (x . down) . up_m
            logits = compiled(batch, present, gates(method, present, task["shuffled"][rows]))
            loss = diagnosis_loss(logits, task["labels"][rows])
        loss.backward()
        sent = checkpoint.average([p.grad for p in trainable if p.grad is not None])
        watch.note(step, loss)
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % LOG_EVERY == 0 or done == cfg.steps:
            first = max(0, done - LOG_EVERY)
            checkpoint.average([watch.losses[first:done]])
            mean = float(watch.checked(done, first).mean())
            log.write(method=method, seed=seed, lr=lr, step=done, loss=round(mean, 6))
        if progress.due(done):
            text = f"loss {watch.checked(done)[-1]:.3f}"
            progress.show(done, text + f"  {sent:,} bytes sent" * bool(sent))
        stop.after(done, SAVE_EVERY, keep)
    return time.monotonic() - began


def known_loss(logits, labels):
    """Mean cross-entropy over the labels [B] that are not -1; 0, not NaN, where none is known."""
    return F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum") / (labels >= 0).sum().clamp(min=1)


def diagnosis_loss(logits, labels):
    """Cross-entropy for labels [B]; for findings [B,C] binary cross-entropy over the labelled (not -1)."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    known = (labels >= 0).float()
    each = F.binary_cross_entropy_with_logits(logits, labels.clamp(min=0).float(), reduction="none")
    return (each * known).sum() / known.sum().clamp(min=1)


@torch.no_grad()
def predict(model, method, task, rows, present, shuffled):
    """Probabilities [n,C] float64 of the rows under a presence table [N,M]."""
    out = []
    for part in torch.from_numpy(rows).split(512):
        batch = {m: x[part] for m, x in task["inputs"].items()}
        logits = model(batch, present[part], gates(method, present[part], shuffled[part])).double()
        out.append(logits.sigmoid() if task["labels"].ndim == 2 else logits.softmax(1))
    return torch.cat(out).cpu().numpy()


# ------------------------------------------------------------------------------------------------------ data and models


def read_target(cfg):
    """The study to adapt to, with the modalities that are asked for."""
    if cfg.data is None and cfg.synthetic_notes:
        raise Refused("--synthetic-notes is for a --data file without notes; the phantoms have reports")
    target = (data.load_study(cfg.data, cfg.synthetic_notes) if cfg.data
              else data.phantoms(cfg.phantoms, 2, "target", cfg.image_size))
    wanted = cfg.modalities or (() if cfg.data else ("image", "note"))
    return target.select(wanted) if wanted else target


def read_source(cfg, target):
    """The study to pretrain on, with the target's modalities; the phantoms' numbers take the names of the target's."""
    if cfg.source:
        if cfg.data and data.sha256(cfg.source) == data.sha256(cfg.data):
            raise Refused(f"--source {cfg.source} is the --data file: the base would see the test labels")
        source = data.load_study(cfg.source)
        if cfg.synthetic_notes and source.notes is None:
            source = data.attach_notes(source)
        source = source.select([m for m in target.modalities if m in source.modalities])
        if set(source.modalities) != set(target.modalities):
            raise Refused(f"{cfg.source} has {', '.join(source.modalities) or 'none'} of the target's modalities "
                          f"{', '.join(target.modalities)}; needs all")
        source.numeric = {m: source.numeric[m] for m in target.numeric}  # in the target's order
        source = source.take(source.labelled & source.have().all(1))
        if not len(source):
            raise Refused(f"{cfg.source}: no labelled sample has all of {', '.join(target.modalities)}")
        labels = np.atleast_2d(source.labels.T)
        source.attributes = {f"label {i}": c for i, c in enumerate(labels) if c.max() > 0}
    else:
        source = data.phantoms(cfg.phantoms, 1, "source", cfg.image_size)
        spare = itertools.cycle(source.numeric)
        groups = {m: m if m in source.numeric else next(spare) for m in target.numeric}  # target's: the phantoms'
        source.numeric = {m: source.numeric[g] for m, g in groups.items()}
        source.columns = {m: source.columns[g] for m, g in groups.items()}
        source = source.select(target.modalities)
        image, note = (m in target.modalities for m in ("image", "note"))
        readable = ["kind", "side"] * image + ["symptom", "history"] * (note or not image) + ["agree"] * (image * note)
        source.attributes = {k: source.attributes[k] for k in readable}
    return source


def vit_sizes(cfg, target, source):
    """The keyword arguments of the `ViT` that is pretrained: the source's columns, and a head that nobody uses."""
    positions = cfg.positions
    if not positions and "note" in target.modalities:
        longest = max(len(data.words_of(n)) for study in (target, source) for n in study.notes)
        positions = min(64, -(-(1 + longest) // 4) * 4)  # next multiple of 4, so that near lengths share a base
    colour = any(s.images is not None and s.images.ndim == 4 for s in (target, source))
    return dict(modalities=target.modalities, classes=2, columns=column_ids(source, cfg.buckets),
                image_size=cfg.image_size, channels=3 if colour else 1, patch=cfg.patch, width=cfg.width,
                depth=cfg.depth, heads=cfg.heads, buckets=cfg.buckets, positions=positions or 1)


def column_ids(study, buckets):
    """{numeric modality: word id of each column's name}."""
    return {m: [data.word_id(c.lower(), buckets) for c in names] for m, names in study.columns.items()}


def input_sizes(vit_config):
    """The arguments of `data.model_inputs` that a ViT's configuration knows."""
    return [vit_config[k] for k in ("image_size", "channels", "buckets", "positions")]


def numeric_scales(study, rows):
    """{numeric modality: (mean [F], scale [F])} over the given rows."""
    return {m: data.numeric_scale(v[rows]) for m, v in study.numeric.items()}


def draw_task(cfg, study, seed):
    """Split, missing tables and scales of one seed, shared by all methods: numpy, as stored in split-sN.npz."""
    parts = data.split(study, seed, cfg.train_share)
    have, order = study.have(), np.random.default_rng((seed, 14)).permutation(len(study))
    tables = {text: data.missing_table(have, study.modalities, text, seed)
              for text in dict.fromkeys((cfg.missing, *tests_of(cfg)))}
    return {"parts": parts, "tables": tables, "order": order, "scales": numeric_scales(study, parts["train"])}


def tests_of(cfg):
    """The test rows, each a TYPE:RATE."""
    return list(dict.fromkeys(cfg.test_missing or (cfg.missing,)))


def load_task(study, drawn, missing, vit_config, device):
    """The tensors of one seed, on the device; synthetic studies stand behind the others, in the training split only."""
    train, tables = drawn["parts"]["train"], drawn["tables"]
    if "source" in drawn:
        real, source = len(study), drawn["source"]
        study = study.take(np.concatenate([np.arange(real), source]))
        study.images = np.concatenate([data.resize(study.images[:real], drawn["images"].shape[1]), drawn["images"]])
        train = np.concatenate([train, np.arange(real, len(study))])
        tables = {k: np.concatenate([v, drawn["present"]]) for k, v in tables.items()}
        others = np.random.default_rng(22).permutation(len(source))
        order = np.concatenate([drawn["order"], real + others])  # synthetic rows are shuffled among themselves
    else:
        order = drawn["order"]
    inputs = on(device, data.model_inputs(study, *input_sizes(vit_config), drawn["scales"]))
    tables = {k: torch.from_numpy(v.astype(np.float32)).to(device) for k, v in tables.items()}
    present = tables[missing]
    return {"inputs": inputs, "labels": torch.from_numpy(study.labels).to(device), "train": train,
            "present": present, "shuffled": present[order], "order": order, "tables": tables}


def draw_studies(cfg, study, drawn, seed, device):
    """Synthetic studies for --augment: which sample each takes words, numbers and label from, its image, its presence.

    The images come from the run's adapter of this seed. `Refused` if that run saw a sample that this seed does not
    train on, or another study."""
    from export import load_selora
    from minilora import diffusion

    run, _, count = cfg.augment.rpartition(":")
    if not {"image", "note"} <= set(study.modalities):
        raise Refused(f"--augment draws images from notes; the modalities are {', '.join(study.modalities)}")
    saved, model, vae = load_selora(run, None, seed)
    if saved.get("study") != data.fingerprint(study.select(("image", "note"), False)):
        raise Refused(f"--augment {run}: was trained on {saved['data']}, another study than this run's {study.name}")
    seen = data.read_npz(Path(run) / f"split-s{seed}.npz")["train"]
    if not np.isin(seen, drawn["parts"]["train"]).all():
        raise Refused(f"--augment {run}: at seed {seed} it saw {int((~np.isin(seen, drawn['parts']['train'])).sum())} "
                      "samples outside this run's training split; train it with the same --train-share")
    told = drawn["parts"]["train"][study.have()[drawn["parts"]["train"]][:, study.modalities.index("note")]]
    if not len(told):
        raise Refused("--augment draws from words, and no training sample has any")
    source = told[np.random.default_rng((seed, 18)).integers(0, len(told), int(count))]
    config = saved["config"]
    ids = torch.from_numpy(data.tokenize(study.notes[source], config["buckets"], config["positions"])).to(device)
    alphas = diffusion.alphas_cumprod(kind=saved["schedule"], device=device)
    seeds = 10**6 * (seed + 1) + np.arange(len(source))
    images = diffusion.draw_images(model.to(device), vae.to(device), ids, seeds, alphas=alphas)
    if images.ndim != study.images.ndim:
        raise Refused(f"--augment {run}: draws images {list(images.shape[1:])}; {study.name} has "
                      f"{list(study.images.shape[1:])}")
    have = study.have()[source]
    have[:, study.modalities.index("image")] = True
    return {"source": source, "images": data.resize(images, cfg.image_size),
            "present": data.missing_table(have, study.modalities, cfg.missing, seed + 10**6)}


def build(vit_config, base, method, rank, seed, state=None):
    """The frozen base with a method's adapter on it, fresh from `seed` or with a trained `state`."""
    torch.manual_seed(seed)
    model = ViT(**vit_config)
    lacking = model.load_state_dict(base, strict=False)
    if lacking.unexpected_keys or any(not k.startswith("head.") for k in lacking.missing_keys):
        raise Refused(f"the base does not fit the model: {(lacking.unexpected_keys + lacking.missing_keys)[0]}")
    attach(model, method, rank)
    if state is not None:
        model.load_state_dict(state, strict=False)
    return model


def count(model):
    """Parameters that a method adds, that train, and in all."""
    everything = list(model.parameters())
    return {"adapter_params": sum(p.numel() for p in adapter_parameters(model).values()),
            "trainable_params": sum(p.numel() for p in everything if p.requires_grad),
            "total_params": sum(p.numel() for p in everything)}


# ---------------------------------------------------------------------------------------------------------------- a job


def run_job(cfg, ctx, method, seed, lr, path):
    """Adapt and evaluate one (method, seed, lr), or read its finished file; returns the file's content."""
    checkpoint.wait()
    if path.exists():
        return checkpoint.load(path, "mora adapter", f"{method}-s{seed}-{lr:g}")
    device, study, drawn = ctx["device"], ctx["study"], ctx["drawn"][seed]
    if ctx.get("task_seed") != seed:  # one seed's tensors at a time
        ctx.update(task=load_task(study, drawn, cfg.missing, ctx["vit"], device), task_seed=seed)
    task = ctx["task"]
    model = build(ctx["vit"], ctx["base"], method, cfg.rank, seed)
    if cfg.head == "locked" and method != "head":
        trained = checkpoint.load(cfg.out / f"adapters/head-s{seed}.pt", "mora adapter")["state"]
        model.load_state_dict(trained, strict=False)
        model.pooler.requires_grad_(False)
        model.head.requires_grad_(False)
    model.to(device)
    seconds = adapt(cfg, model, method, seed, lr, task, device, ctx["log"], cfg.out / "last.pt", ctx["stop"])
    labels, result = study.labels, {"by_test": {}}
    val = drawn["parts"]["val"]
    result["val"] = metrics.scores(labels[val], predict(model, method, task, val, task["present"], task["shuffled"]))
    rows = drawn["parts"]["test"]
    for text in tests_of(cfg):
        present, table = task["tables"][text], drawn["tables"][text]
        p = predict(model, method, task, rows, present, present[task["order"]])
        names = np.array([data.pattern_name(r, study.modalities) for r in table[rows]])
        patterns = {}
        for name in np.unique(names).tolist():
            here = names == name
            patterns[name] = {"n": int(here.sum()), "accuracy": metrics.scores(labels[rows][here], p[here])["accuracy"]}
        result["by_test"][text] = metrics.scores(labels[rows], p) | {"by_pattern": patterns}
    keep = {n for n, p in model.named_parameters() if p.requires_grad or n.startswith(("pooler.", "head."))}
    content = {"format": 1, "kind": "mora adapter", "of": f"{method}-s{seed}-{lr:g}", "method": method, "seed": seed,
               "lr": lr, "rank": cfg.rank, "counts": count(model), "result": result,
               "state": {n: p.detach().cpu() for n, p in model.named_parameters() if n in keep},
               "scales": {m: [s.tolist() for s in pair] for m, pair in drawn["scales"].items()}}
    return checkpoint.finished(cfg.out, path, content, {f"{method}-s{seed}-{lr:g}": round(seconds, 3)})


def pick_rate(cfg, ctx, method, given):
    """(learning rate, {rate: validation macro-F1}): as given, or the best of the grid on seed 0's validation split.

    The winner's run is seed 0's run: it is not trained again.
    """
    if method in given or "" in given:
        return given.get(method, given.get("")), {}
    tried = {lr: run_job(cfg, ctx, method, 0, lr, cfg.out / f"picks/{method}-{lr:g}.pt") for lr in LR_GRID}
    found = {lr: content["result"]["val"]["macro_f1"] for lr, content in tried.items()}
    best = max(found, key=found.get)
    if not (cfg.out / f"adapters/{method}-s0.pt").exists():
        checkpoint.save(cfg.out / f"adapters/{method}-s0.pt", tried[best])
    tries = ", ".join(f"{lr:g}: {v:.3f}" for lr, v in found.items())
    print(f"{method}: learning rate {best:g}, picked on seed 0's validation split (macro-F1 {tries})")
    return best, found


# -------------------------------------------------------------------------------------------------------- what is shown


def collect(cfg, study, results, picked):
    """The content of metrics.json from {method: [content per seed]}."""
    methods = {}
    for method, runs in results.items():
        tests = {}
        for text in tests_of(cfg):
            rows = [r["result"]["by_test"][text] for r in runs]
            tests[text] = {k: [r[k] for r in rows] for k in ("macro_f1", "auroc", "accuracy")} | {"by_pattern": {}}
            for name in sorted({n for r in rows for n in r["by_pattern"]}):
                found = [r["by_pattern"].get(name, {"n": 0, "accuracy": None}) for r in rows]
                tests[text]["by_pattern"][name] = {k: [f[k] for f in found] for k in ("n", "accuracy")}
        lr, tried = picked[method]
        methods[method] = {k: v for k, v in tests[tests_of(cfg)[0]].items() if k != "by_pattern"}
        methods[method] |= {k: [r["counts"][k] for r in runs] for k in runs[0]["counts"]}
        methods[method] |= {"val_macro_f1": [r["result"]["val"]["macro_f1"] for r in runs], "lr": lr,
                            "lr_grid": {f"{k:g}": v for k, v in tried.items()},
                            "ranks": [branch_ranks(r["state"]) for r in runs], "by_test": tests}
    return {"format": 1, "kind": "mora", "data": study.name, "synthetic": study.synthetic,
            "synthetic_notes": study.synthetic_notes, "absent": cfg.absent, "head": cfg.head, "missing": cfg.missing,
            "seeds": list(range(cfg.seeds)), "train_share": cfg.train_share,
            "augment": cfg.augment, "methods": methods}


def table(report, timings):
    """The comparison as text, a block per test row: mean ± standard deviation over seeds, differences per seed."""
    lines, methods = [], report["methods"]
    show = lambda v: (f"{np.mean(v):.3f}" + f"±{np.std(v):.3f}" * (len(v) > 1)) if not np.isnan(v).any() else "-"
    for text in next(iter(methods.values()))["by_test"]:
        blocks = {name: m["by_test"][text] for name, m in methods.items()}
        patterns = next(iter(blocks.values()))["by_pattern"]
        head = f"{'method':14s}{'macro-F1':>12s}{'AUROC':>12s}  accuracy with"
        head += "".join(f" {p:>7s}" for p in patterns) + f"{'adapter':>9s}{'trainable':>11s}{'lr':>7s}{'seconds':>9s}"
        title = (f"{report['data']}, {data.origin(report)}: trained with {report['missing']} missing, "
                 f"tested with {text}; absent: {report['absent']}; head: {report['head']}; "
                 f"seeds: {len(report['seeds'])}" + f"; {report['train_share']:.0%} of the training split"
                 * (report["train_share"] < 1) + f"; synthetic studies {report['augment']}" * bool(report["augment"]))
        lines += ["", title, head + "  macro-F1 minus head's, per seed" * ("head" in blocks)]
        for name, m in methods.items():
            block = blocks[name]
            line = f"{name:14s}{show(block['macro_f1']):>12s}{show(block['auroc']):>12s}{'':15s}"
            for p in patterns:
                known = [a for a in block["by_pattern"].get(p, {"accuracy": []})["accuracy"] if a is not None]
                line += f" {np.mean(known):{max(7, len(p))}.3f}" if known else " " + "-".rjust(max(7, len(p)))
            seconds = [timings.get(f"{name}-s{s}-{m['lr']:g}", 0.0) for s in report["seeds"]]
            line += f"{m['adapter_params'][0]:9,d}{m['trainable_params'][0]:11,d}{m['lr']:7g}{np.mean(seconds):9.1f}  "
            if "head" in blocks and name != "head":
                line += " ".join(f"{a - b:+.3f}" for a, b in zip(block["macro_f1"], blocks["head"]["macro_f1"]))
            lines.append(line.rstrip())
    return "\n".join([*lines, "", *conclusion(report)])


def conclusion(report):
    """Sentences computed from the first test row: what adapting gains, and whether knowing the pattern does."""
    f1s = {k: np.array(m["macro_f1"]) for k, m in report["methods"].items()}
    seeds, said = len(report["seeds"]), []
    against = {"head": "head-only", "lora": "lora, the plain branch of as many parameters",
               "mora-open": "mora-open, which is told that all is present",
               "mora-shuffled": "mora-shuffled, which is told another sample's pattern", "full": "full fine-tuning"}
    for other, what in against.items():
        if "mora" in f1s and other in f1s:
            d = f1s["mora"] - f1s[other]
            verdict = "beats" if (d > 0).all() else "does NOT beat" if d.mean() <= 0 else "does NOT reliably beat"
            if seeds == 1:
                verdict = "is above" if d[0] > 0 else "is NOT above"
            wins = "one seed" if seeds == 1 else f"{int((d > 0).sum())} of {seeds} seeds, mean"
            said.append(f"MoRA {verdict} {what} ({wins} {d.mean():+.3f} macro-F1).")
    if seeds == 1:
        said.append("One seed: an illustration, not evidence.")
    if report["synthetic_notes"]:
        said.append("The notes are synthetic notes, made from the labels: this says nothing about real reports.")
    return said


def figure(report, path):
    """Macro-F1 per method, each seed a dot; with several test rows a line per method, banded from seed to seed."""
    try:
        import matplotlib
    except ImportError:
        return print(f"no figure: pip install 'minilora[pictures]' draws {path.name}")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    methods = report["methods"]
    rate = lambda text: (text.partition(":")[0], float(text.partition(":")[2]))
    tests = sorted(next(iter(methods.values()))["by_test"], key=rate)
    fig, ax = plt.subplots(figsize=(6.4, 3.8), dpi=120)
    for i, (name, m) in enumerate(methods.items()):
        values = np.array([m["by_test"][t]["macro_f1"] for t in tests])  # [tests, seeds]
        if len(tests) > 1:
            ax.plot(tests, values.mean(1), marker="o", color=f"C{i}", label=name)
            ax.fill_between(tests, values.min(1), values.max(1), color=f"C{i}", alpha=0.15, lw=0)
        else:
            ax.plot(i, values.mean(), "_", ms=34, color=f"C{i}")  # no bars: they would have to start at 0
            ax.plot([i] * values.shape[1], values[0], "o", ms=5, color=f"C{i}")
    if len(tests) > 1:
        ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
        ax.set_xlabel("missing at test time")
    else:
        ax.set_xticks(range(len(methods)), list(methods), rotation=20)
        ax.set_xlim(-0.6, len(methods) - 0.4)
    ax.set_ylabel("macro-F1 on the test split")
    ax.set_title(f"{report['data']}, {data.origin(report)}; trained with {report['missing']} missing; "
                 f"{len(report['seeds'])} seed(s)", fontsize=9)
    ax.grid(axis="y", alpha=0.3)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    print(f"figure: {path}")


# ----------------------------------------------------------------------------------------------------------------- main


def check(cfg):
    """Refuse what cannot be run, before data is read; returns ({method or '': lr}, (kept method, seed))."""
    for method in cfg.methods:
        if method not in METHODS:
            raise Refused(f"method '{method}' is not known; use {', '.join(METHODS)}")
    if not cfg.methods or len(set(cfg.methods)) < len(cfg.methods):
        raise Refused(f"--methods '{' '.join(cfg.methods)}' must name at least one method, none twice")
    if cfg.head not in ("trained", "locked"):
        raise Refused(f"--head '{cfg.head}' is not known; use trained or locked")
    if cfg.head == "locked" and cfg.methods[0] != "head":
        raise Refused(f"--head locked takes the head that method 'head' trained: name it first, before "
                      f"{cfg.methods[0]}")
    for name in ("seeds", "rank", "steps", "batch", "patch", "width", "depth", "heads", "image_size", "pretrain_steps",
                 "phantoms"):
        if getattr(cfg, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; must be at least 1")
    if not 0 < cfg.train_share <= 1:
        raise Refused(f"--train-share is {cfg.train_share}; must be in (0,1]")
    run, _, count = cfg.augment.rpartition(":")
    if cfg.augment and not (run and count.isdecimal() and int(count)):
        raise Refused(f"--augment '{cfg.augment}' must be SELORA_RUN:COUNT with a count of at least 1")
    if cfg.buckets < 16 or cfg.positions < 0 or cfg.positions == 1:
        raise Refused(f"--buckets {cfg.buckets} must be at least 16 and --positions {cfg.positions} 0 or at least 2")
    try:
        ViT(("image",), image_size=cfg.image_size, patch=cfg.patch, width=cfg.width, depth=1, heads=cfg.heads,
            absent=cfg.absent)
    except ValueError as error:  # sizes that do not fit together
        raise Refused(str(error)) from None
    rates = {}
    for text in cfg.lr:
        method, _, rate = text.rpartition(":")
        try:
            rates[method] = float(rate)
        except ValueError:
            rates[method] = -1.0
        if not 0 < rates[method] < 10 or (method and method not in METHODS):
            raise Refused(f"learning rate '{text}' must be RATE or METHOD:RATE with a rate in (0,10)")
    method, _, seed = cfg.keep.rpartition(":")
    if cfg.keep == "mora:0" and "mora" not in cfg.methods:
        method = cfg.methods[-1]
    if method not in cfg.methods or not seed.isdecimal() or int(seed) >= cfg.seeds:
        raise Refused(f"--keep '{cfg.keep}' must be METHOD:SEED of this run: {', '.join(cfg.methods)}; "
                      f"0..{cfg.seeds - 1}")
    return rates, (method, int(seed))


def describe(study, drawn):
    """What the run works on, in lines."""
    notes = " with synthetic notes" if study.synthetic_notes else ", synthetic" if study.synthetic else ""
    unlabelled = int((~study.labelled).sum())
    yield (f"{study.name}{notes}: {len(study)} samples ({unlabelled} unlabelled, left out); "
           f"{', '.join(study.modalities)}; classes {', '.join(study.class_names)}")
    for seed, d in drawn.items():
        yield f"seed {seed}: " + ", ".join(f"{k} {len(v)}" for k, v in d["parts"].items())
        for text, present in d["tables"].items():
            names, counts = np.unique([data.pattern_name(r, study.modalities) for r in present], return_counts=True)
            yield f"  {text}: " + ", ".join(f"{n} {c}" for n, c in zip(names, counts))


def dry_run(cfg, study, vit_config, drawn, device, rates):
    """Print parameters, memory and an estimate of time from three timed steps per method."""
    task, total = load_task(study, drawn[0], cfg.missing, vit_config, device), 0.0
    base = {k: v for k, v in ViT(**vit_config).state_dict().items() if not k.startswith("head.")}
    for method in cfg.methods:
        model = build(vit_config, base, method, cfg.rank, 0).to(device)
        optimizer, times = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]), []
        for step in range(4):
            began = time.monotonic()
            rows = torch.from_numpy(task["train"][rows_at(0, step, len(task["train"]), cfg.batch)]).to(device)
            present = task["present"][rows]
            optimizer.zero_grad()
            logits = model({m: x[rows] for m, x in task["inputs"].items()}, present, gates(method, present, present))
            loss = diagnosis_loss(logits, task["labels"][rows])
            loss.backward()
            optimizer.step()
            loss.item()  # waits for a GPU
            times.append(time.monotonic() - began)
        runs = cfg.seeds + (0 if method in rates or "" in rates else len(LR_GRID) - 1)
        each = float(np.median(times[1:]))
        total += each * cfg.steps * runs
        c = count(model)
        print(f"{method:14s} adapter {c['adapter_params']:,}, trainable {c['trainable_params']:,} of "
              f"{c['total_params']:,} ({c['trainable_params'] / c['total_params']:.2%}); "
              f"{each * 1e3:.0f} ms a step, {runs} runs of {cfg.steps} steps")
    held = sum(x.element_size() * x.numel() for x in task["inputs"].values())
    tokens = int(model.embed({m: x[:1] for m, x in task["inputs"].items()})[0].shape[1])
    step_bytes = 4 * cfg.batch * cfg.depth * tokens * (18 * cfg.width + 3 * cfg.heads * tokens)
    print(f"memory: data {held / 2**20:.0f} MiB, weights {4 * c['total_params'] / 2**20:.1f} MiB, "
          f"about {step_bytes / 2**20:.0f} MiB for the activations of a step")
    print(f"time: about {total / 60:.1f} min on {device}, and pretraining if no base is cached")


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=Config.__doc__)
    checkpoint.guarded(run, cfg, PRESETS)


def run(cfg, stop):
    device = checkpoint.pick_device(cfg.device)
    torch.backends.cudnn.allow_tf32 = False  # convolutions as exact as the matrix products, and as the exported graphs
    rates, kept = check(cfg)
    study = read_target(cfg)
    for text in (cfg.missing, *cfg.test_missing):
        data.parse_missing(text, study.modalities)
    source = read_source(cfg, study)
    base_config = vit_sizes(cfg, study, source)
    vit_config = base_config | {"classes": len(study.class_names), "columns": column_ids(study, cfg.buckets),
                                "absent": cfg.absent}
    drawn = {seed: draw_task(cfg, study, seed) for seed in range(cfg.seeds)}
    print(*describe(study, drawn), sep="\n")
    if cfg.dry_run:
        return dry_run(cfg, study, vit_config, drawn, device, rates)

    for seed, d in drawn.items() if cfg.augment else ():
        d |= draw_studies(cfg, study, d, seed, device)
        print(f"seed {seed}: {len(d['source'])} synthetic studies beside {len(d['parts']['train'])} real ones")
    identity = checkpoint.open_run(cfg)
    base_hash = data.digest({"format": 3, "vit": base_config, "source": data.fingerprint(source), "batch": cfg.batch,
                             "steps": cfg.pretrain_steps})[:16]
    path = Path(f"runs/base/vit-{base_hash}.pt")
    base = checkpoint.first(partial(pretrain, cfg, source, base_config, device, path, stop))
    for seed, d in drawn.items() if checkpoint.leader() else ():
        arrays = {"modalities": np.array(study.modalities), **d["parts"]}
        arrays |= {f"present {text}": present for text, present in d["tables"].items()}
        arrays |= {f"synthetic {k}": d[k] for k in ("source", "images", "present") if k in d}
        data.write_atomic(cfg.out / f"split-s{seed}.npz", data.npz_bytes(arrays))
    if study.synthetic and not cfg.data and checkpoint.leader():  # a file for `export.py predict --data`
        data.save_study(cfg.out / "phantoms.npz", study)
    ctx = {"device": device, "study": study, "drawn": drawn, "vit": vit_config, "base": base["state"], "stop": stop,
           "log": checkpoint.Log(cfg.out / "log.jsonl", cfg.tensorboard and cfg.out / "tensorboard")}
    picked, results = {}, {method: [] for method in cfg.methods}
    for seed in range(cfg.seeds):  # seed by seed: the first whole comparison is there early
        for method in cfg.methods:
            if seed == 0:
                picked[method] = pick_rate(cfg, ctx, method, rates)
            path = cfg.out / f"adapters/{method}-s{seed}.pt"
            results[method].append(run_job(cfg, ctx, method, seed, picked[method][0], path))

    if not checkpoint.leader():
        return
    method, seed = kept
    seen = np.concatenate([d["tables"][cfg.missing][d["parts"]["train"]] for d in drawn.values()])
    patterns, counts = np.unique(seen, axis=0, return_counts=True)
    patterns = patterns[np.argsort(-counts, kind="stable")].astype(int).tolist()  # of training, frequent first
    checkpoint.save(cfg.out / "model.pt", {
        "format": 1, "kind": "mora",
        "config": vit_config, "base": base["state"], "base_hash": base_hash, "readers": base["readers"],
        "adapter": results[method][seed], "patterns": patterns,
        "class_names": study.class_names, "multilabel": study.multilabel, "columns": study.columns,
        "data": identity["data"] or study.name, "synthetic": study.synthetic,
        "synthetic_notes": study.synthetic_notes, "fit": study.fit})
    report = collect(cfg, study, results, picked)
    checkpoint.write_json(cfg.out / "metrics.json", report)
    print(table(report, checkpoint.read_json(cfg.out / "timings.json", {})))
    figure(report, cfg.out / "macro_f1.png")
    print(f"run folder: {cfg.out}; export {method}, seed {seed}, with: python export.py mora {cfg.out}")


if __name__ == "__main__":
    main()
