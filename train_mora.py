"""Diagnose with a modality missing: pretrain or load a tiny ViLT, freeze it, adapt it with MoRA and
its controls, compare.

    python train_mora.py --out runs/mora                     # phantoms (synthetic), 3 seeds
    python train_mora.py --data study.npz --out runs/mine    # your images, notes and numbers
    python train_mora.py --data study.npz --out runs/vilt --base vilt-b32-mlm    # a pretrained ViLT

The lesson is `adapt`: zero_grad, forward, loss, backward, step, around `minilora/mora.py`. What
surrounds it stands in `minilora/loop.py` (going on after a stop, log, progress), `task.py` (data),
`models.py` and `report.py`."""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from minilora import baselines, checkpoint, data, rates, report
from minilora.cli import Bounds, Natural, Positive, Share, guarded
from minilora.loop import Log, Loop, rows_at, warm_cosine
from minilora.models import base_file, build, count, image_digests, kept_weights, load_head
from minilora.mora import branch_ranks, gates
from minilora.processes import average, leader, own_part, pick_device, wait, world
from minilora.task import Context, batch_at, buckets, check, column_ids, draw_studies, draw_task, evaluate
from minilora.task import finished_job, hash_of_base, image_size, input_sizes, listed
from minilora.task import numeric_scales, on
from minilora.task import pretrained_base, read_source, read_target, split_arrays, tests_of
from minilora.task import vit_sizes, work_ahead
from minilora.vit import ViT
from minilora.words import TOKENIZER

# Every method's learning rate comes from here: one shared rate would favour some of them.
LR_GRID = (3e-3, 1e-2, 3e-2)
LR_GRID_LARGE = (3e-4, 1e-3, 3e-3)  # with --base
SAVE_EVERY = 200  # steps
LOG_EVERY = 50  # steps
PRESETS = {
    "small": {},
    "base": dict(image_size=64, width=256, depth=6, heads=8, buckets=8192),
    "large": dict(image_size=384, patch=32, width=768, depth=12, heads=12, buckets=30522,
                  positions=40),
}


@dataclass
class Config:
    """Adapt a multimodal transformer to diagnose with missing modalities; compare methods."""

    out: Path = Path("runs/mora")  # Run folder: config, splits, log, metrics, adapters, model.
    # Study file (.npz) or a MedMNIST file; default: phantoms of the target domain, which are
    # synthetic.
    data: Path | None = None
    # Study file that the base is pretrained on; default: phantoms of the source domain.
    source: Path | None = None
    # Folder of a pretrained ViLT in the layout of transformers (config.json, model.safetensors or
    # pytorch_model.bin, vocab.txt), for example a download of dandelin/vilt-b32-mlm from the
    # Hugging Face hub (112M parameters, a file of about 450 MB). It is the base instead of one
    # pretrained here, brings its sizes, and reads images and notes alone.
    base: Path | None = None
    # Which to use; default: all that the file has; of the phantoms image and note (they have vitals
    # and labs too).
    modalities: tuple[str, ...] = ()
    # Attach templated notes, right 80% of the time, to a file that has none.
    synthetic_notes: bool = False
    # head: nothing is added, the baseline of every difference. lora: a plain LoRA branch with as many
    # parameters as MoRA's. mora: the method. mora-open, mora-shuffled: MoRA told that all is present,
    # or another sample's pattern. mora-all: a branch beside every block. prompt: learned tokens for
    # each pattern. full: everything trains.
    methods: tuple[str, ...] = ("head", "lora", "mora", "mora-open", "full")
    # Runs per method; a seed sets split, missing table, initial adapter and batches. --resume may
    # add seeds.
    seeds: Positive = 3
    # What is withheld in training and validation, TYPE:RATE. The rate is the share of samples that
    # lose something; the type a modality, `any`, `both` (any of two), or `label`: the label says
    # which is lost, on which no model should come to rely.
    missing: str = "any:0.7"
    test_missing: tuple[str, ...] = ()  # TYPE:RATE of each test row; default: as in training.
    # What stands for an absent modality: `mask` hides it from attention; `dummy` shows an all-ones
    # image, an empty note (the paper's way); `fill` shows another training sample's, which
    # the input itself hardly gives away. MoRA's branch is told in every case.
    absent: str = "mask"
    # `trained` with the adapter, or `locked`: the head that method `head` trained, frozen, so the
    # adapter alone adapts.
    head: str = "trained"
    # Rank of the MoRA branch; the other adapters get as many parameters.
    rank: Positive = 4
    steps: Positive = 600  # Adaptation steps.
    batch: Positive = 64  # Samples per step.
    # A learning rate for all methods, or METHOD:RATE for some; default: the best of 0.003, 0.01,
    # 0.03 (with --base of 0.0003, 0.001, 0.003) on the validation rows at seed 0, and of the next
    # rates beyond these while the best lies at an edge.
    lr: tuple[str, ...] = ()
    keep: str = "mora:0"  # METHOD:SEED that goes into model.pt, which export.py takes.
    # Images are resized to this; 0: 32, or with --base the size that it was pretrained at. The
    # positions of its patches are interpolated to another one.
    image_size: Natural = 0
    patch: Positive = 8  # Side of an image patch; must divide the image size.
    width: Positive = 64  # Width of the transformer.
    depth: Positive = 4  # Blocks of the transformer.
    heads: Positive = 4  # Attention heads.
    # Hash buckets for words; 0: 2048, or with --data 16 for each distinct word as a power of two
    # from 2048 to 65536.
    buckets: Natural = 0
    # Word positions of a note; 0: what the longest note needs, at most 128. Longer notes are cut.
    positions: Natural = 0
    # Steps of pretraining on the source, once; the base is cached under runs/base.
    pretrain_steps: Positive = 1200
    # Phantoms to draw for a domain whose file is not given.
    phantoms: Positive = 8000
    # Share of the training split that is used, for scarce data; small shares lie in large.
    train_share: Share = 1.0
    # SELORA_RUN:COUNT adds COUNT synthetic studies to the training split: a training sample's words,
    # numbers and label, and an image drawn from its words by that run of train_selora.py, which
    # must have seen only samples of this training split whose image and note --missing left (its
    # own --table). Three controls take a real image: random:COUNT another patient's, class:COUNT
    # another's of the same class (the same findings), own:COUNT the sample's own. A folder of such a
    # name is written ./random, ./class or ./own.
    augment: str = ""
    # Replaces sizes left at their defaults: small (none), base (7M parameters) or large (ViLT-B/32,
    # 111M, for a GPU).
    preset: str = "small"
    device: str = "auto"  # auto, cpu, cuda or cuda:N.
    # Forward passes of the adaptation in bfloat16; weights and optimizer stay float32.
    amp: bool = False
    compile: bool = False  # torch.compile the adaptation step.
    # Go on with the run in --out, or show it again if it is finished.
    resume: bool = False


# ---- the lesson


def adapt(cfg, model, method, seed, lr, task, log, stop):
    """Train what `attach` left trainable; returns seconds. `task` is what `load_task` gives."""
    device = task["labels"].device
    train = task["train"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01, fused=device.type == "cuda")
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.steps))
    compiled = torch.compile(model) if cfg.compile else model
    half = torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp)

    def rows_of(step):  # indexed by step: a resumed run draws the same
        return train[rows_at(seed, step, len(train), cfg.batch)]

    loop = Loop(f"{method} s{seed} lr {lr:g}", cfg.steps, model, rows_of, cfg.out / "last.pt", stop,
                optimizer=optimizer, schedule=schedule, save_every=SAVE_EVERY, together=True,
                log=log, log_every=LOG_EVERY, fields={"method": method, "seed": seed, "lr": lr})
    for step in loop:  # goes on where a stopped run was
        rows = torch.from_numpy(own_part(rows_of(step), cfg.batch))
        rows = rows.to(device, non_blocking=True)  # the host does not wait
        batch = batch_at(task["inputs"], rows, task["content"][cfg.missing])  # {modality: [B,...]}
        present = task["present"][rows]  # [B,M]
        gate = gates(method, present, task["shuffled"][rows])  # [B,M], or [B,1] for lora
        optimizer.zero_grad()
        with half:  # block 0 is a MoRABlock: it adds sum over the present m of (x . down) . up_m
            logits = compiled(batch, present, gate)  # [B,C]
            loss = diagnosis_loss(logits, task["labels"][rows])
        loss.backward()
        loop.note(loss)  # averages over processes; a NaN stops the run
        optimizer.step()
        schedule.step()
    return loop.seconds


def diagnosis_loss(logits, labels):
    """Cross-entropy for labels [B]; for findings [B,C] binary cross-entropy over those not -1."""
    if labels.ndim == 1:
        return F.cross_entropy(logits, labels)
    known = (labels >= 0).float()
    targets = labels.clamp(min=0).float()
    losses = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    count = known.sum()
    average([count])  # over processes, as the gradients will be: together they are one mean
    return (losses * known).sum() / count.clamp(min=1 / world()[1])


# ---- the base


def pretrain(cfg, source, vit_config, device, stop, last):
    """Train encoder and pooler on the source's attributes, a linear reader each, complete samples
    only.

    Returns what is cached: the state without head, and the readers, which can judge images
    later."""
    scales = numeric_scales(source, np.arange(len(source)))
    inputs = on(device, data.model_inputs(source, *input_sizes(vit_config), scales))
    targets = on(device, source.attributes)  # {attribute: [N]}
    torch.manual_seed(0)
    vit = ViT(**vit_config)
    readers = torch.nn.ModuleDict(
        {k: torch.nn.Linear(cfg.width, int(v.max()) + 1) for k, v in source.attributes.items()}
    )
    model = torch.nn.ModuleDict({"vit": vit, "readers": readers}).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.pretrain_steps))
    present = torch.ones(cfg.batch, len(vit.modalities), device=device)

    def rows_of(step):
        return rows_at(0, step, len(source), cfg.batch)

    loop = Loop("pretraining", cfg.pretrain_steps, model, rows_of, last, stop, of=last.name,
                optimizer=optimizer, schedule=schedule, save_every=SAVE_EVERY, together=False)
    for step in loop:
        rows = torch.from_numpy(rows_of(step)).to(device, non_blocking=True)
        optimizer.zero_grad()
        features = vit.features(batch_at(inputs, rows), present)  # [B,D]
        loss = sum(known_loss(reader(features), targets[k][rows]) for k, reader in readers.items())
        loss.backward()
        loop.note(loss)
        optimizer.step()
        schedule.step()
    state = {k: v.cpu() for k, v in vit.state_dict().items() if not k.startswith("head.")}
    return {"config": vit_config, "state": state, "readers": readers.state_dict()}


def known_loss(logits, labels):
    """Mean cross-entropy over the labels [B] that are not -1; 0, not NaN, where none is known."""
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / (labels >= 0).sum().clamp(min=1)


# ---- a job


def run_job(cfg, ctx, method, seed, lr, path):
    """Adapt and evaluate one (method, seed, lr), or read its finished file; returns the file's
    content."""
    name = f"{method}-s{seed}-{lr:g}"
    wait()
    if path.exists():
        return finished_job(cfg, ctx, method, seed, path, name)
    task = ctx.task_of(cfg, seed)
    draw = ctx.draws[seed]
    model = build(ctx.vit, ctx.base, method, cfg.rank, seed, places=[ctx.base_place] * 2)
    if cfg.head == "locked" and method != "head":
        load_head(model, cfg.out / f"adapters/head-s{seed}.pt", seed, ctx.base_hash)
    model.to(ctx.device)
    seconds = adapt(cfg, model, method, seed, lr, task, ctx.log, ctx.stop)
    content = {
        "format": 1,
        "kind": "mora adapter",
        "of": name,
        "method": method,
        "seed": seed,
        "lr": lr,
        "rank": cfg.rank,
        "counts": count(model),
        "result": evaluate(cfg, ctx, model, method, task, draw),
        "state": {name: p.detach().cpu() for name, p in kept_weights(model).items()},
        "scales": listed(draw["scales"]),
        "base_hash": ctx.base_hash,
    }
    return checkpoint.finished(cfg.out, path, content, {name: round(seconds, 3)})


def grid(cfg):
    """The learning rates to choose from."""
    return LR_GRID_LARGE if cfg.base else LR_GRID


def pick_rate(cfg, ctx, method, given):
    """(learning rate, {rate: validation macro-F1}): as given, or the best of the grid on the
    validation rows, at seed 0.

    The winner's run is seed 0's run: it is not trained again. Of the others the scores are kept."""
    if method in given:
        return given[method], {}

    def score_of(lr, path):
        return run_job(cfg, ctx, method, 0, lr, path)["result"]["val"]["macro_f1"]

    best, scores = rates.chosen(cfg.out, method, grid(cfg), score_of)
    print(f"{method}: learning rate by macro-F1 on the validation rows at seed 0: "
          f"{rates.described(best, scores)}")
    return best, scores


# ---- main


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=Config.__doc__)
    guarded(run, cfg, PRESETS)


def run(cfg, stop):
    device = pick_device(cfg.device)
    # Convolutions as exact as the matrix products, and as the exported graphs.
    torch.backends.cudnn.allow_tf32 = False
    cfg = replace(cfg, image_size=image_size(cfg))
    kept = check(cfg)
    given = rates.given(cfg.lr, cfg.methods, "METHOD")
    study = read_target(cfg)
    cfg = replace(cfg, buckets=buckets(cfg, study))
    for text in (cfg.missing, *cfg.test_missing):
        data.parse_missing(text, study.modalities)
    if cfg.base:
        source = None
        base_config, base = pretrained_base(cfg, study)
    else:
        source = read_source(cfg, study)
        base_config = vit_sizes(cfg, study, source)
    vit_config = base_config | {
        "classes": len(study.class_names),
        "columns": column_ids(study, base_config["buckets"]),
        "absent": cfg.absent,
    }
    draws = {seed: draw_task(cfg, study, seed) for seed in range(cfg.seeds)}
    print(*report.describe(study, draws, vit_config), sep="\n")
    print(*work_ahead(cfg, vit_config, given, grid(cfg)), sep="\n")
    if cfg.augment:
        for seed, draw in draws.items():
            draw |= draw_studies(cfg, study, draw, seed, device)


    identity = checkpoint.open_run(cfg)
    base_hash = hash_of_base(cfg, study, source, base_config, identity)
    base_place = cfg.base or base_file(base_hash)
    if not cfg.base:
        train_base = partial(pretrain, cfg, source, base_config, device, stop)
        base = checkpoint.cached(base_place, "base", train_base)
    if leader():
        for seed, draw in draws.items():
            arrays = split_arrays(study, draw)
            data.write_atomic(cfg.out / f"split-s{seed}.npz", data.npz_bytes(arrays))
        if study.synthetic and not cfg.data:  # a file for `export.py predict --data`
            data.save_study(cfg.out / "phantoms.npz", study)
    log = Log(cfg.out / "log.jsonl")
    ctx = Context(study, draws, vit_config, base["state"], base_hash, base_place, device, log, stop)
    picked = {}
    results = {method: [] for method in cfg.methods}
    for seed in range(cfg.seeds):  # seed by seed: the first whole comparison is there early
        for method in cfg.methods:
            if seed == 0:
                picked[method] = pick_rate(cfg, ctx, method, given)
            path = cfg.out / f"adapters/{method}-s{seed}.pt"
            content = run_job(cfg, ctx, method, seed, picked[method][0], path)
            # The file keeps the weights; all runs' together may not fit into memory.
            content["branches"] = branch_ranks(content.pop("state"))
            results[method].append(content)
    if leader():
        finish(cfg, ctx, source, base["readers"], identity, kept, results, picked)


def finish(cfg, ctx, source, readers, identity, kept, results, picked):
    """Write model.pt, metrics.json and the figure, and print the comparison."""
    study = ctx.study
    method, seed = kept
    adapter = checkpoint.load(cfg.out / f"adapters/{method}-s{seed}.pt", "mora adapter")
    del adapter["result"]  # its scores stand in metrics.json
    seen = image_digests(source) if source else np.empty(0, np.int64)
    tables = [draw["tables"][cfg.missing][draw["parts"]["train"]] for draw in ctx.draws.values()]
    patterns, counts = np.unique(np.concatenate(tables), axis=0, return_counts=True)
    frequent_first = np.argsort(-counts, kind="stable")
    content = {
        "format": 2,
        "kind": "mora",
        "config": ctx.vit,
        "base": ctx.base,
        "base_hash": ctx.base_hash,
        # A judge must not have seen what it judges.
        "source_images": torch.from_numpy(np.unique(seen)),
        "readers": readers,
        "adapter": adapter,
        "patterns": patterns[frequent_first].astype(int).tolist(),
        "class_names": study.class_names,
        "multilabel": study.multilabel,
        "columns": study.columns,
        "data": identity["data"] or study.name,
        "synthetic": study.synthetic,
        "synthetic_notes": study.synthetic_notes,
        "fit": study.fit,
        "prepared": study.prepared,
        "tokenizer": TOKENIZER,
    }
    checkpoint.save(cfg.out / "model.pt", content)
    ranks = {m: [r["branches"] for r in runs] for m, runs in results.items()}
    simple = baselines.rows(study, ctx.draws, cfg.missing, tests_of(cfg))
    metrics_json = report.mora_metrics(cfg, study, results, picked, ranks, simple)
    checkpoint.write_json(cfg.out / "metrics.json", metrics_json)
    print(report.mora_table(metrics_json, checkpoint.read_json(cfg.out / "timings.json", {})))
    report.mora_figure(metrics_json, cfg.out / "macro_f1.png")
    export = f"python export.py mora {cfg.out}"
    print(f"run folder: {cfg.out}; export {method}, seed {seed}, with: {export}")


if __name__ == "__main__":
    main()
