"""Teach a frozen latent diffusion model new images by words, with adapters whose ranks grow by
Fisher information.

    python train_selora.py --out runs/selora                    # phantoms (synthetic), 3 seeds
    python train_selora.py --data study.npz --out runs/mine     # your images and notes
    python train_selora.py --rules-table --out runs/rules       # every rule at equal parameters

The lesson is `adapt`: zero_grad, forward, loss, backward, Fisher, grow, step, around
`minilora/selora.py`. The base is `minilora/vae.py` and `minilora/unet.py`, trained here once on the
source domain. What surrounds it stands in `minilora/loop.py` (going on after a stop, log,
progress), `ranks.py` (rules and budgets), `judge.py` and `report_selora.py`.

Letters: B batch, N samples, L latent channels, s latent size, P word positions.
"""

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro

from minilora import checkpoint, data, diffusion, judge, ranks, report_selora, samples, selora
from minilora.allocate import neyman_gradients, read_values, values_of
from minilora.cli import Bounds, Natural, Positive, Share, guarded
from minilora.data import refusing
from minilora.loop import Log, Loop, rows_at, warm_cosine
from minilora.models import changed_words, load_judge, put_words
from minilora.processes import leader, own_part, pick_device, wait
from minilora.ranks import ranks_of
from minilora.report_selora import REFERENCES
from minilora.samples import evaluate, judge_of, notes_with, pixels, set_grain, stratified
from minilora.task import buckets, check_words, finished_rule, latents, left_by_table, read_studies
from minilora.task import reconstruction_error
from minilora.unet import Denoiser
from minilora.vae import VAE, augment, vae_loss
from minilora.words import TOKENIZER, positions_for, tokenize

SAVE_EVERY = 100  # steps
LOG_EVERY = 20  # steps
PRESETS = {
    "small": {},
    "base": dict(image_size=64, width=128, text_width=256, text_depth=2, heads=8, vae_width=32,
                 buckets=8192, positions=32, pretrain_steps=10000, steps=2000),
    "large": dict(image_size=64, width=416, text_width=256, text_depth=2, heads=8, vae_width=64,
                  buckets=8192, positions=32, pretrain_steps=30000, steps=4000, batch=64),
}


@dataclass
class Config:
    """Adapt a frozen latent diffusion model to new images and words by adapters whose ranks grow."""

    out: Path = Path("runs/selora")  # Run folder: config, splits, log, metrics, adapters, model.
    # Study file (.npz) with images and notes; default: phantoms of the target domain.
    data: Path | None = None
    # Study file that the base is pretrained on; default: phantoms of the source domain.
    source: Path | None = None
    synthetic_notes: bool = False  # Attach templated notes to files that have none.
    # Runs of each rule, one per seed, which sets split, initial adapter and batches. --resume may
    # add seeds.
    seeds: Positive = 3
    # How each layer gets its rank: how many columns of A and rows of B of its adapter are in use.
    # Ranks grow by `ratio` (the paper's rule) or `gain`; `neyman` and `probe-svd` plan them before
    # training; `fixed` (--rank in every layer) and `uniform` (equal ranks at --budget) are plain
    # LoRA; `replay` takes the ranks of another run. Controls are inverse-cost, random, random-grown
    # and cheapest.
    rule: str = "ratio"
    lam: float = 1.3  # With `ratio`, a layer grows where its FI-Ratio is at least this.
    every: Positive = 40  # Steps between two probes, at which ranks may grow.
    # Whether `ratio` tests the next column of A as it was drawn (sampled), or the average over such
    # draws (expected).
    ratio_of: str = "sampled"
    # How Fisher information is computed: `probe`, from the ordinary backward, or `loop`, with one
    # backward for each sample, which is slow and easy to read.
    fisher: str = "probe"
    rank: int = 1  # Rank of every layer at the start.
    capacity: Positive = 8  # Highest rank of a layer.
    # Adapter parameters that a rule may spend; 0: what rank 2 in every layer costs, and for `ratio`
    # no limit.
    budget: Natural = 0
    # Run folder whose final ranks `--rule replay` starts from, seed by seed.
    replay: Path | None = None
    # Run folder of train_mora.py: its frozen ViT measures the drawn images by Frechet distance and
    # by agreement with the words.
    judge: Path | None = None
    # Regular expression for the full names of the layers to adapt; empty: every Linear and Conv2d.
    targets: str = ""
    # Also train the vectors of words that are in at least this many training notes, since adapters
    # of low rank cannot tell new words apart; the vectors of rarer words would learn single images
    # by heart. 0: train no vectors of words.
    word_notes: Natural = 20
    # Run folder of train_mora.py whose missing table holds here too: of its training and validation
    # rows, only those are used of which the table withholds neither image nor note.
    table: Path | None = None
    # Run every rule at each of --budgets and compare them; the judge then leaves out its control,
    # images drawn without words.
    rules_table: bool = False
    # Budgets of --rules-table, each as the uniform rank that costs as much; 0: what `ratio` costs
    # without a budget.
    budgets: tuple[int, ...] = (1, 2, 3, 0)
    rows: tuple[str, ...] = ()  # Rules that --rules-table is restricted to; default: all.
    steps: Positive = 900  # Adaptation steps.
    batch: Positive = 32  # Samples per step.
    # RATE, a peak learning rate for all rules, of which `full` gets a tenth, or RULE:RATE for some.
    # Default: the best of 0.003, 0.01, 0.03 (`full`: a tenth of these) by the loss on the
    # validation rows at seed 0, and of the next rates beyond these while the best lies at an edge.
    # With B = 0 a layer's first step of Adam is proportional to rank x scale x rate, so the best
    # rate depends on the ranks.
    lr: tuple[str, ...] = ()
    image_size: Positive = 32  # Images are resized to this.
    factor: Positive = 2  # Image size divided by latent size, a power of two.
    latent: Positive = 4  # Latent channels.
    vae_width: Positive = 16  # Width of the autoencoder.
    width: Positive = 48  # Width of the UNet.
    text_width: Positive = 64  # Width of the text encoder.
    text_depth: Natural = 1  # Blocks of the text encoder.
    heads: Positive = 4  # Attention heads.
    # Hash buckets for words; 0: 2048, or with --data 16 for each distinct word as a power of two
    # from 2048 to 65536.
    buckets: Natural = 0
    # Word positions of a note; 0: 16, or with --data what the longest note needs, at most 128.
    # Longer notes are cut.
    positions: Natural = 0
    vae_steps: Positive = 500  # Steps of pretraining the autoencoder.
    pretrain_steps: Positive = 2000  # Steps of pretraining the denoiser.
    # Phantoms to draw for a domain whose file is not given.
    phantoms: Positive = 4000
    # Share of the training split to adapt with, for scarce data; as in train_mora.py.
    train_share: Share = 1.0
    # Ratio of the variances of noise and signal at every timestep, as a multiple of the cosine
    # schedule's.
    noisier: Annotated[float, Bounds(above=0, below=1e4)] = 9.0
    # Classifier-free guidance of the drawn images: 0 ignores the words, 1 is the model itself.
    guidance: Annotated[float, Bounds(low=0, below=1e6)] = 3.0
    # Add to drawn images the pixel noise that the autoencoder leaves out; give --no-grain where
    # what it leaves out is not noise.
    grain: bool = True
    sample_steps: Positive = 10  # DDIM (denoising) steps of a drawn image.
    # Replaces sizes that are left at their defaults: small (none), base (9M parameters) or large (57M,
    # 64x64, for a GPU).
    preset: str = "small"
    device: str = "auto"  # Device to run on: auto, cpu, cuda or cuda:N.
    # Compute the forward passes of the adaptation in bfloat16; weights, optimizer and Fisher
    # information stay in float32.
    amp: bool = False
    # Compile the adaptation step with torch.compile, once: growing ranks does not compile it again.
    compile: bool = False
    # Go on with the run in --out, or print its results again if it is finished.
    resume: bool = False


# ---- the lesson


@dataclass
class Pairs:
    """What a denoiser learns from."""

    z: torch.Tensor  # [N,L,s,s] latents of the images
    ids: torch.Tensor  # [N,P] word ids of their notes
    alphas: torch.Tensor  # [timesteps] the noise schedule

    def batch_at(self, seed, step, train, batch):
        """(rows of `train` [B], timesteps [B], noise [B,L,s,s], words [B,P], 10% of them dropped),
        drawn from (seed, step) alone. One timestep from each B-th part of the schedule: gradients
        then vary less than with independent ones."""
        device = self.z.device
        rows = torch.from_numpy(train[rows_at(seed, step, len(train), batch)])
        rows = rows.to(device, non_blocking=True)  # else the host would wait for the step before
        generator = torch.Generator(device).manual_seed((seed + 1) * 1_000_003 + step)
        steps = len(self.alphas)
        part = torch.randperm(batch, generator=generator, device=device)
        within = torch.rand(batch, generator=generator, device=device)
        t = stratified(part, within, steps)
        shape = (batch, *self.z.shape[1:])
        noise = torch.randn(shape, generator=generator, device=device, dtype=self.z.dtype)
        return rows, t, noise, diffusion.drop_words(self.ids[rows], generator)


def adapt(cfg, pairs, model, job, seed, lr, train, log, stop):
    """Train what is not frozen and grow the ranks; returns seconds and [[step, {layer: rank}], ...]."""
    device = pairs.z.device
    trainable = [p for p in model.parameters() if p.requires_grad]
    if selora.adapters(model):
        trainable = selora.adapter_groups(model, 0.01)
        if cfg.word_notes:  # without decay, which would change words that get no gradient
            words = [model.text.words.weight]
            trainable.append({"params": words, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=0.01, fused=pairs.z.is_cuda)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.steps))
    compiled = torch.compile(model) if cfg.compile else model
    half = torch.autocast(device.type, torch.bfloat16, enabled=cfg.amp)
    fisher = cfg.fisher if job.rule in ("ratio", "gain") else ""  # the others read no scores
    expected = job.rule == "gain" or cfg.ratio_of == "expected"

    def rows_of(step):
        return train[rows_at(seed, step, len(train), cfg.batch)]

    loop = Loop(f"{job.name} s{seed} lr {lr:g}", cfg.steps, model, rows_of, cfg.out / "last.pt", stop,
                optimizer=optimizer, schedule=schedule, save_every=SAVE_EVERY, together=True,
                log=log, log_every=LOG_EVERY,
                fields={"method": job.name, "rule": job.rule, "seed": seed, "lr": lr},
                counts=lambda: {"adapter_params": selora.adapter_parameters(model)})
    history = loop.kept.setdefault("history", [[0, ranks_of(model)]])
    openings = ranks.openings(cfg, job, model, history[0][1])  # {step: parameters allowed}
    rule = job.rule.removesuffix("-grown")  # as `grow` calls it
    for step in loop:  # goes on where a stopped run was
        batch = pairs.batch_at(seed, step, train, cfg.batch)
        rows, t, noise, words = (own_part(x, cfg.batch) for x in batch)  # this process's part
        probing = step in openings
        use_probe = probing and fisher == "probe"
        optimizer.zero_grad()
        with selora.FisherProbe(model, expected) if use_probe else nullcontext() as probe:
            with half:
                predict = model if probing else compiled  # a probe's hooks stay outside the graph
                losses = diffusion.denoising_loss(
                    predict, pairs.z[rows], words, t, noise, pairs.alphas, per_sample=True
                )  # [B]
            scores = selora.fisher_loop(model, losses) if probing and fisher == "loop" else {}
            loss = losses.mean()
            loss.backward()  # one backward: gradients and Fisher information
        loop.note(loss)  # averages over processes; a NaN stops the run
        if probing:
            scores = loop.finite(probe.scores() if probe else scores)
            chance = torch.Generator().manual_seed(1000 * seed + step)
            if selora.grow(model, scores, rule, cfg.lam, cfg.ratio_of, openings[step], chance):
                history.append([step, ranks_of(model)])  # same tensors, same output as before
        optimizer.step()
        schedule.step()
    return loop.seconds, history


# ---- the base


def train_vae(config, steps, images, stop, last):
    """The autoencoder, trained on the source's images with random contrast, so that it can decode
    another scanner."""
    device = images.device
    torch.manual_seed(0)
    vae = VAE(**config).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(steps))

    def rows_of(step):
        return rows_at(1, step, len(images), 64)

    loop = Loop("autoencoder", steps, vae, rows_of, last, stop, of=last.name,
                optimizer=optimizer, schedule=schedule, save_every=SAVE_EVERY, together=False)
    for step in loop:
        generator = torch.Generator(device).manual_seed(step)
        rows = torch.from_numpy(rows_of(step)).to(device, non_blocking=True)
        x = augment(images[rows], generator)  # [64,ch,S,S]
        shape = (len(x), vae.latent, vae.size, vae.size)
        noise = torch.randn(shape, generator=generator, device=device)
        optimizer.zero_grad()
        error, _, loss = vae_loss(vae, x, noise)
        loss.backward()
        loop.note(error)
        optimizer.step()
        schedule.step()
    vae.measure(images[:2000])
    return {"config": vae.config, "state": vae.state_dict()}


def pretrain(cfg, config, pairs, train, stop, last):
    """The denoiser, trained on the latents and words of the source's rows `train`; what is kept is
    its running average."""
    torch.manual_seed(0)
    model = Denoiser(**config).to(pairs.z.device)
    # The average gets no gradient, but it is saved and comes back with the model.
    average = copy.deepcopy(model)
    both = torch.nn.ModuleDict({"model": model, "average": average})
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.pretrain_steps))

    def rows_of(step):
        return train[rows_at(2, step, len(train), cfg.batch)]

    loop = Loop("denoiser", cfg.pretrain_steps, both, rows_of, last, stop, of=last.name,
                optimizer=optimizer, schedule=schedule, save_every=SAVE_EVERY, together=False)
    for step in loop:
        rows, t, noise, words = pairs.batch_at(2, step, train, cfg.batch)
        optimizer.zero_grad()
        loss = diffusion.denoising_loss(model, pairs.z[rows], words, t, noise, pairs.alphas)
        loss.backward()
        loop.note(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        diffusion.ema_update(average, model, min(0.99, (step + 1) / (step + 10)))
    return {"config": config, "state": average.state_dict()}


# ---- a job


@dataclass
class Context:
    """What the jobs of a run share."""

    target: data.Study
    parts: dict  # {seed: split}
    pairs: Pairs
    config: dict  # keyword arguments of the `Denoiser`
    base: dict  # its pretrained state
    base_hash: str
    vae: VAE
    log: Log
    stop: object
    costs: dict  # {layer: parameters of one rank}
    replay: dict  # {seed: ranks that --rule replay starts from}
    rates: dict = field(default_factory=dict)  # {row: (learning rate, {rate: validation loss})}
    judges: dict = field(default_factory=dict)  # {seed: its `Judge`}, empty without --judge

    def model(self):
        """A fresh copy of the pretrained denoiser, on the device."""
        model = Denoiser(**self.config)
        model.load_state_dict(self.base)
        return model.to(self.pairs.z.device)


def run_job(cfg, ctx, job, seed, lr, path):
    """Adapt and evaluate one job at one seed, or read its finished file; returns the file's
    content."""
    name = f"{job.name} s{seed} lr {lr:g}"
    wait()
    if path.exists():
        return finished_rule(cfg, ctx, job, seed, lr, path, name)
    job = ranks.completed(cfg, job, seed, ctx.replay)
    model = ctx.model()
    train = ctx.parts[seed]["train"]
    if job.rule not in REFERENCES:
        values = component_values(cfg, ctx, job, seed, lr, train)
        inject(cfg, ctx.pairs, model, job, seed, train, values)
    seconds = 0.0
    history = [[0, {}]]
    if job.rule != "unadapted":
        charged = replace(cfg, steps=ranks.steps_of(cfg, job))
        seconds, history = adapt(charged, ctx.pairs, model, job, seed, lr, train, ctx.log, ctx.stop)
    judging = ctx.judges.get(seed)
    result = evaluate(cfg, judging, model.eval(), ctx.vae, ctx.pairs, ctx.parts[seed])
    # The state of full fine-tuning has all words.
    words = changed_words(model, model.state_dict() if job.rule == "full" else ctx.base)
    word_params = words["vectors"].numel()
    adapter_params = selora.adapter_parameters(model)
    trainable = adapter_params + word_params
    if job.rule == "full":
        trainable = sum(p.numel() for p in model.parameters())
    content = {
        "format": 1,
        "kind": "selora adapter",
        "of": name,
        "method": job.name,
        "rule": job.rule,
        "seed": seed,
        "lr": lr,
        "state": model.state_dict() if job.rule == "full" else selora.adapter_state(model),
        "ranks": history[-1][1],
        "history": history,
        "result": result,
        "words": words,
        "trainable_params": trainable,
        "adapter_params": adapter_params,
        "word_params": word_params,
        "base_hash": ctx.base_hash,
    }
    time = {f"{job.name}-s{seed}-{lr:g}": round(seconds, 3)}
    return checkpoint.finished(cfg.out, path, content, time)


def inject(cfg, pairs, model, job, seed, train, values=None):
    """Freeze the base and put adapters on it, with the ranks that the rule starts from."""
    torch.manual_seed(seed)
    selora.inject(model, cfg.targets or None, 0, cfg.capacity)
    gradients = None
    if job.rule == "neyman":
        gradients = neyman_gradients(cfg, pairs, model, seed, train)
    ranks.set_ranks(model, ranks.start_of(model, job, seed, gradients, values))
    if cfg.word_notes:
        words = model.text.words.weight.requires_grad_(True)  # [buckets,Dt]
        often = notes_with(pairs.ids[train], len(words)) >= cfg.word_notes  # [buckets]
        words.register_hook(lambda gradient: gradient * often[:, None])


def component_values(cfg, ctx, job, seed, lr, train):
    """{layer: [value of each component]} that the job's plan weighs, of an adapter that is trained
    for it and thrown away; the values stay in the run folder, for all budgets."""
    if job.rule not in ranks.VALUED:
        return None
    if job.rule == "shuffled":
        lr = ctx.rates[job.name.replace("shuffled", "probe-svd")][0]
    probe, steps = ranks.probe_of(cfg, job, sum(ctx.costs.values()))
    path = cfg.out / f"plans/{probe.name.replace(' ', '-')}-s{seed}-{lr:g}.json"
    if not path.exists():
        trial = replace(cfg, out=path.parent, steps=steps)  # with a last.pt of its own
        model = ctx.model()
        inject(cfg, ctx.pairs, model, probe, seed, train)
        adapt(trial, ctx.pairs, model, probe, seed, lr, train, ctx.log, ctx.stop)
        checkpoint.write_json(path, values_of(job.rule, cfg, ctx.pairs, model, seed, train))
        if leader():
            (path.parent / "last.pt").unlink(missing_ok=True)
        wait()
    return read_values(path, ctx.costs)


# ---- main


def check(cfg):
    """Refuse what cannot be run, before data is read; returns the denoiser's keyword arguments."""
    check_words(cfg)
    with refusing():  # rules and sizes that do not fit together
        ranks.check_rules(cfg)
        vae = VAE(cfg.image_size, 1, cfg.latent, cfg.factor, cfg.vae_width)
        config = dict(latent=cfg.latent, size=vae.size)
        for name in ("width", "heads", "text_width", "text_depth"):
            config[name] = getattr(cfg, name)
        Denoiser(**config)
        diffusion.alphas_cumprod(noisier=cfg.noisier)
        diffusion.timesteps(cfg.sample_steps)
    return config


def prepare(cfg, config, studies, device, stop):
    """Images -> latents, words -> ids, and the base, pretrained on the source or cached: ({role:
    pairs}, autoencoder, the denoiser's state, its hash, held-out rows of the source)."""
    source = studies["source"]
    channels = 3 if any(study.images.ndim == 4 for study in studies.values()) else 1
    fixed = [3, data.fingerprint(source), channels]
    if cfg.source:
        fixed += [TOKENIZER]  # ids of a file's words; those of phantoms are as before
    fixed += [cfg.image_size, cfg.latent, cfg.factor, cfg.vae_width, cfg.vae_steps]
    heldout = data.split(source, 0)["test"]  # the base is judged by images that it has not seen
    train = np.setdiff1d(np.arange(len(source)), heldout)
    sizes = dict(
        image_size=cfg.image_size,
        channels=channels,
        latent=cfg.latent,
        factor=cfg.factor,
        width=cfg.vae_width,
    )
    vae = VAE(**sizes).to(device).requires_grad_(False)
    images = {role: pixels(study, vae) for role, study in studies.items()}  # [N,ch,S,S]
    # The autoencoder,
    path = Path(f"runs/base/vae-{data.digest(fixed)[:16]}.pt")
    pretrained = partial(train_vae, sizes, cfg.vae_steps, images["source"][train], stop)
    content = checkpoint.cached(path, "vae", pretrained)
    checkpoint.check_weights(path, content["state"], vae.state_dict())
    vae.load_state_dict(content["state"])
    # what it makes of both studies,
    alphas = diffusion.alphas_cumprod(noisier=cfg.noisier, device=device)
    pairs = {}
    for role, study in studies.items():
        z = latents(vae, images[role])
        ids = torch.from_numpy(tokenize(study.notes, config["buckets"], config["positions"])).to(device)
        pairs[role] = Pairs(z, ids, alphas)
        error = reconstruction_error(vae, z, images[role])
        print(f"autoencoder: mean squared error {error:.4f} on the {role}, images in [-1,1]")
    # and the denoiser.
    base_hash = data.digest([*fixed, config, cfg.noisier, cfg.pretrain_steps, cfg.batch])[:16]
    pretrained = partial(pretrain, cfg, config, pairs["source"], train, stop)
    path = Path(f"runs/base/unet-{base_hash}.pt")
    content = checkpoint.cached(path, "denoiser", pretrained)
    with torch.device("meta"):  # names and shapes only: nothing is allocated or drawn
        checkpoint.check_weights(path, content["state"], Denoiser(**config).state_dict())
    return pairs, vae, content["state"], base_hash, heldout


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=Config.__doc__)
    guarded(run, cfg, PRESETS)


def run(cfg, stop):
    config = check(cfg)
    device = pick_device(cfg.device)
    # As in train_mora.py: as exact as the exported graphs.
    torch.backends.cudnn.allow_tf32 = False
    costs, replay, adapted = ranks.check_adapters(cfg, Denoiser(**config))
    studies, drawable = read_studies(cfg)
    target = studies["target"]
    vit = load_judge(cfg.judge, device, target, cfg.data) if cfg.judge else None
    positions = cfg.positions or (positions_for(target.notes, 16) if cfg.data else 16)
    cfg = replace(cfg, buckets=buckets(cfg, target), positions=positions)
    config |= {"buckets": cfg.buckets, "positions": cfg.positions}
    adapted = ranks.check_adapters(cfg, Denoiser(**config))[2]  # with the words' vectors
    parts = {}
    for seed in range(cfg.seeds):
        split = data.split(target, seed, cfg.train_share)
        split = {name: np.intersect1d(rows, drawable) for name, rows in split.items()}
        if cfg.table:
            split |= left_by_table(cfg.table, target, seed, split)
        parts[seed] = data.none_empty(target, split)
    lines = report_selora.describe_pairs(studies, drawable, parts, config, cfg.image_size)
    print(*lines, sep="\n")
    jobs = ranks.jobs_of(cfg, sum(costs.values()))
    print(f"{adapted}; {ranks.work_ahead(cfg, jobs)}")

    identity = checkpoint.open_run(cfg)
    if leader():
        for seed, split in parts.items():
            data.write_atomic(cfg.out / f"split-s{seed}.npz", data.npz_bytes(split))
    pairs, vae, base, base_hash, heldout = prepare(cfg, config, studies, device, stop)
    log = Log(cfg.out / "log.jsonl")
    ctx = Context(target, parts, pairs["target"], config, base, base_hash, vae, log, stop, costs, replay)
    on_source = {}
    if vit:
        source = (studies["source"], pairs["source"], heldout)
        on_source = samples.judge_base(cfg, vit, *source, ctx.model().eval(), vae)
    # Notes that have a word which the base was not pretrained on, [N].
    known = torch.isin(pairs["target"].ids, pairs["source"].ids)  # [N,P]
    new = ~known.all(1).cpu().numpy()
    results = {job.name: [] for job in jobs}
    for seed in range(cfg.seeds):  # seed by seed: the first whole comparison is there early
        split = parts[seed]
        set_grain(cfg, vae, target, split["train"])
        if vit:
            judged = (split["train"], split["test"], seed, new)
            ctx.judges[seed] = judge_of(vit, target, vae, *judged)
        for job in jobs:
            if job.name not in ctx.rates:
                trial = partial(run_job, cfg, ctx)
                ctx.rates[job.name] = ranks.pick_rate(cfg, job, trial)
            lr = ctx.rates[job.name][0]
            content = run_job(cfg, ctx, job, seed, lr, ranks.file_of(cfg, job, seed))
            results[job.name].append(content)
    if leader():
        finish(cfg, ctx, identity, results, on_source)


def finish(cfg, ctx, identity, results, on_source):
    """Write model.pt, metrics.json and the figures, and print the comparison."""
    target = ctx.target
    set_grain(cfg, ctx.vae, target, ctx.parts[0]["train"])  # that of seed 0, as the adapter
    kept = next(name for name in results if name not in REFERENCES)
    model = ctx.model()
    selora.inject(model, cfg.targets or None, 0, cfg.capacity)
    with refusing(f"{cfg.out}/adapters/{kept.replace(' ', '-')}-s0.pt"):
        selora.load_adapter(model, results[kept][0]["state"])
        put_words(model, results[kept][0]["words"])
    content = {
        "format": 2,
        "kind": "selora",
        "config": ctx.config,
        "base": ctx.base,
        "base_hash": ctx.base_hash,
        "vae_config": ctx.vae.config,
        "vae": ctx.vae.state_dict(),
        "noisier": cfg.noisier,
        "targets": cfg.targets,
        "capacity": cfg.capacity,
        "adapter": results[kept][0],
        "data": identity["data"] or target.name,
        "study": data.fingerprint(target),
        "synthetic": target.synthetic,
        "synthetic_notes": target.synthetic_notes,
        "prepared": target.prepared,
        "tokenizer": TOKENIZER,
    }
    checkpoint.save(cfg.out / "model.pt", content)
    judges = {seed: judge.described(judging) for seed, judging in ctx.judges.items()}
    metrics = report_selora.selora_metrics(cfg, ctx, judges, results, on_source)
    checkpoint.write_json(cfg.out / "metrics.json", metrics)
    print(report_selora.selora_table(metrics, checkpoint.read_json(cfg.out / "timings.json", {})))
    report_selora.rank_figure(metrics, cfg.steps, cfg.out / "ranks.png")
    after = "after SeLoRA" if kept == "ratio" else f"after {kept}"
    models = {"base, before": ctx.model().eval(), after: model.eval()}
    samples.show(cfg, target, ctx.parts[0], ctx.pairs, ctx.vae, models)
    print(f"run folder: {cfg.out}; export {kept}, seed 0, with: python export.py selora {cfg.out}")


if __name__ == "__main__":
    main()
