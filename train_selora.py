"""Teach a frozen latent diffusion model new images by words, with adapters whose ranks grow by Fisher information.

    python train_selora.py --out runs/selora                    # phantoms (synthetic), 3 seeds
    python train_selora.py --data study.npz --out runs/mine     # your images and notes
    python train_selora.py --rules-table --out runs/rules       # every rule and control at equal parameters

The script reads downward. The lesson is `adapt`: zero_grad, forward, loss, backward, Fisher, grow, step, around
`minilora/selora.py`. The base is `minilora/vae.py` and `minilora/unet.py`, trained here once on the source domain.
"""

import copy
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro

from minilora import checkpoint, data, diffusion, selora
from minilora.checkpoint import finite, restore, resume_state, rows_at, warm_cosine
from minilora.data import Refused
from minilora.unet import Denoiser
from minilora.vae import VAE, augment, vae_loss

RULES = (*selora.GROWTH, *selora.PLANS, "fixed", "replay")
REFERENCES = ("unadapted", "full")
SAVE_EVERY, LOG_EVERY = 100, 20  # steps


@dataclass
class Config:
    """Adapt a frozen latent diffusion model to new images and words; each layer's rank grows where it pays."""

    out: Path = Path("runs/selora")  # Run folder: config, splits, log, metrics, adapters, model.
    data: Path | None = None  # Study file (.npz) with images and notes; default: phantoms of the target domain.
    source: Path | None = None  # Study file that the base is pretrained on; default: phantoms of the source domain.
    synthetic_notes: bool = False  # Attach templated notes to files that have none.
    seeds: int = 3  # Runs per rule; a seed sets split, initial adapter and batches.
    # How ranks are found: ratio (the paper's), gain, neyman, fixed (uniform LoRA), replay, or the controls random,
    # cheapest, inverse-cost.
    rule: str = "ratio"
    lam: float = 1.3  # `ratio`: a layer grows where its FI-Ratio is at least this.
    every: int = 40  # Steps between two probes.
    ratio_of: str = "sampled"  # `ratio` of the sampled next column, or of its expectation: sampled or expected.
    fisher: str = "probe"  # probe (one ordinary backward) or loop (a backward per sample, to read and compare).
    rank: int = 1  # Rank of every layer at the start.
    capacity: int = 8  # Highest rank of a layer.
    # Adapter parameters that gain, neyman, random, cheapest and inverse-cost may spend; 0: what uniform rank 2 costs.
    budget: int = 0
    replay: Path | None = None  # Run folder whose final ranks `--rule replay` starts from, seed by seed.
    targets: str = ""  # Regular expression over full layer names; empty: every Linear and Conv2d.
    rules_table: bool = False  # Run every rule at the budgets of uniform rank 1 and 2, and print the comparison.
    steps: int = 800  # Adaptation steps.
    batch: int = 32  # Samples per step.
    lr: float = 3e-3  # Peak learning rate of adapters; full fine-tuning gets a tenth.
    image_size: int = 32  # Images are resized to this.
    factor: int = 4  # Image size over latent size, a power of two.
    latent: int = 4  # Latent channels.
    vae_width: int = 16  # Width of the autoencoder.
    width: int = 32  # Width of the UNet.
    text_width: int = 32  # Width of the text encoder.
    text_depth: int = 1  # Blocks of the text encoder.
    heads: int = 2  # Attention heads.
    buckets: int = 2048  # Hash buckets for words.
    positions: int = 16  # Word positions of a note; longer notes are cut.
    vae_steps: int = 400  # Steps of pretraining the autoencoder.
    pretrain_steps: int = 1200  # Steps of pretraining the denoiser.
    phantoms: int = 4000  # Phantoms to draw of a domain where no file is given.
    schedule: str = "cosine"  # Noise schedule: cosine or linear.
    guidance: float = 2.0  # Classifier-free guidance of the sample sheet.
    sample_steps: int = 20  # DDIM steps of the sample sheet.
    device: str = "auto"  # auto, cpu, cuda or cuda:N.
    resume: bool = False  # Go on with the run in --out, or show it again if it is finished.
    dry_run: bool = False  # Print layers, parameters and an estimate of time, and stop.


# ------------------------------------------------------------------------------------------------------------- the base


def train_vae(cfg, images, device, path, stop):
    """The autoencoder, trained on the source's images with random contrast, so that it can decode another scanner."""
    channels = images.shape[1]
    vae = VAE(cfg.image_size, channels, cfg.latent, cfg.factor, cfg.vae_width)
    if path.exists():
        vae.load_state_dict(checkpoint.load(path, "vae")["state"])
        return vae.to(device).requires_grad_(False)
    torch.manual_seed(0)
    vae = VAE(**vae.config).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.vae_steps))
    last, losses = path.with_suffix(".last.pt"), torch.zeros(cfg.vae_steps, device=device)
    start = restore(checkpoint.load(last, "resume"), vae, optimizer, schedule) if last.exists() else 0
    progress = checkpoint.Progress("autoencoder", cfg.vae_steps, start)
    rows_of = lambda step: rows_at(1, step, len(images), 64)
    for step in range(start, cfg.vae_steps):
        generator = torch.Generator(device).manual_seed(step)
        x = augment(images[torch.from_numpy(rows_of(step)).to(device)], generator)
        noise = torch.randn(len(x), cfg.latent, vae.size, vae.size, generator=generator, device=device)
        optimizer.zero_grad()
        reconstruction, _, loss = vae_loss(vae, x, noise, kl=1e-4)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses[step] = reconstruction.detach()
        if progress.due(step + 1):
            progress.show(step + 1, f"error {finite(losses[start : step + 1], start, 'autoencoder', rows_of)[-1]:.4f}")
        stop.after(step + 1, SAVE_EVERY, lambda done: checkpoint.save(
            last, resume_state(vae, optimizer, schedule, done)))
    vae.measure(images[:2000])
    checkpoint.save(path, {"format": 1, "kind": "vae", "config": vae.config, "state": vae.state_dict()})
    last.unlink(missing_ok=True)
    return vae.requires_grad_(False)


def pretrain(cfg, config, z, ids, alphas, device, path, stop):
    """The state of the denoiser's running average after training on the source's latents and words."""
    if path.exists():
        return checkpoint.load(path, "denoiser")["state"]
    torch.manual_seed(0)
    model = Denoiser(**config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    both = torch.nn.ModuleDict({"model": model, "average": average})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.pretrain_steps))
    last, losses = path.with_suffix(".last.pt"), torch.zeros(cfg.pretrain_steps, device=device)
    start = 0
    if last.exists():
        saved = checkpoint.load(last, "resume")
        start = restore(saved, both, optimizer, schedule)
        average.load_state_dict(saved["average"])
    progress = checkpoint.Progress("denoiser", cfg.pretrain_steps, start)
    for step in range(start, cfg.pretrain_steps):
        rows, t, noise, words = drawn_at(2, step, len(z), cfg, z, ids, alphas)
        optimizer.zero_grad()
        loss = diffusion.denoising_loss(model, z[rows], words, t, noise, alphas)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        diffusion.ema_update(average, model, min(0.99, (step + 1) / (step + 10)))
        losses[step] = loss.detach()
        if progress.due(step + 1):
            rows_of = lambda s: rows_at(2, s, len(z), cfg.batch)
            progress.show(step + 1, f"loss {finite(losses[start : step + 1], start, 'denoiser', rows_of)[-1]:.3f}")
        stop.after(step + 1, SAVE_EVERY, lambda done: checkpoint.save(
            last, resume_state(both, optimizer, schedule, done) | {"average": average.state_dict()}))
    checkpoint.save(path, {"format": 1, "kind": "denoiser", "config": config, "state": average.state_dict()})
    last.unlink(missing_ok=True)
    return checkpoint.load(path, "denoiser")["state"]


# ----------------------------------------------------------------------------------------------------------- the lesson


def adapt(cfg, model, rule, seed, budget, task, device, log, last, stop):
    """Train what is not frozen and grow the ranks; returns (seconds, [[step, {layer: rank}], ...])."""
    z, ids, alphas = task["z"], task["ids"], task["alphas"]
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = selora.adapter_groups(model, 0.01) if selora.adapters(model) else trainable
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr / 10 if rule == "full" else cfg.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.steps))
    job, start, began = f"{rule}-{budget}-s{seed}", 0, time.monotonic()
    losses, history = torch.zeros(cfg.steps, device=device), [[0, ranks_of(model)]]
    saved = checkpoint.load(last, "resume") if last.exists() else {}
    if saved.get("job") == job:
        start, began, history = restore(saved, model, optimizer, schedule), began - saved["seconds"], saved["history"]
        for name, layer in selora.adapters(model).items():
            layer.rank = history[-1][1][name]
        losses[:start] = saved["losses"]
        log.cut(saved["log"])
    keep = lambda done: checkpoint.save(last, resume_state(model, optimizer, schedule, done) | {
        "job": job, "seconds": time.monotonic() - began, "log": log.size, "losses": losses[:done], "history": history})
    if not start:
        keep(0)  # from here on a killed run knows where its log ends
    rows_of = lambda step: task["train"][rows_at(seed, step, len(task["train"]), cfg.batch)]
    progress, probes = checkpoint.Progress(f"{rule} s{seed}", cfg.steps, start), probe_steps(cfg, rule)
    floor = sum(selora.adapter_cost(layer) * history[0][1][n] for n, layer in selora.adapters(model).items())
    for step in range(start, cfg.steps):
        rows, t, noise, words = drawn_at(seed, step, len(task["train"]), cfg, z, ids, alphas, task["train"])
        optimizer.zero_grad()
        with selora.FisherProbe(model) if step in probes and cfg.fisher == "probe" else nullcontext() as probe:
            each = diffusion.denoising_loss(model, z[rows], words, t, noise, alphas, per_sample=True)
            scores = selora.fisher_loop(model, each) if step in probes and cfg.fisher == "loop" else None
            loss = each.mean()
            loss.backward()  # one backward: gradients and Fisher information
        if step in probes:
            scores = probe.scores() if probe else scores
            share = (probes.index(step) + 1) / len(probes)  # the budget is opened step by step
            allowed = None if rule == "ratio" else round(floor + share * (budget - floor))
            generator = torch.Generator().manual_seed(1000 * seed + step)
            if selora.grow(model, scores, rule, cfg.lam, cfg.ratio_of, allowed, generator):
                history.append([step, ranks_of(model)])  # nothing else changes: same tensors, same output
        optimizer.step()
        schedule.step()
        losses[step], done = loss.detach(), step + 1
        if done % LOG_EVERY == 0 or done == cfg.steps:
            first = max(0, done - LOG_EVERY)
            mean = float(finite(losses[first:done], first, job, rows_of).mean())
            log.write(rule=rule, budget=budget, seed=seed, step=done, loss=round(mean, 6),
                      adapter_params=selora.adapter_parameters(model))
        if progress.due(done):
            text = f"loss {finite(losses[start:done], start, job, rows_of)[-1]:.3f}"
            progress.show(done, f"{text}  adapter parameters {selora.adapter_parameters(model):,}")
        stop.after(done, SAVE_EVERY, keep)
    return time.monotonic() - began, history


# --------------------------------------------------------------------------------------------------- steps of the loops


def drawn_at(seed, step, n, cfg, z, ids, alphas, train=None):
    """(rows, timesteps, noise, words with 10% dropped) of a step, drawn from (seed, step) alone."""
    rows = rows_at(seed, step, n, cfg.batch)
    rows = torch.from_numpy(rows if train is None else train[rows]).to(z.device)
    generator = torch.Generator(z.device).manual_seed((seed + 1) * 1_000_003 + step)
    t = torch.randint(0, len(alphas), (cfg.batch,), generator=generator, device=z.device)
    noise = torch.randn(cfg.batch, *z.shape[1:], generator=generator, device=z.device)
    return rows, t, noise, diffusion.drop_words(ids[rows], generator)


def probe_steps(cfg, rule):
    """Steps at which a rule looks: `ratio` all along, budgeted rules in the first quarter (late ranks learn less)."""
    end = cfg.steps if rule == "ratio" else max(cfg.steps // 4, cfg.every + 1)
    return list(range(cfg.every, end, cfg.every)) if rule in selora.GROWTH else []


def ranks_of(model):
    """{layer: rank} of the adapters."""
    return {name: layer.rank for name, layer in selora.adapters(model).items()}


@torch.no_grad()
def heldout_loss(model, task, rows, draws=8):
    """Mean denoising loss over the rows with fixed timesteps (stratified) and noise: differences are the model's."""
    z, ids, alphas, total = task["z"], task["ids"], task["alphas"], 0.0
    rows = torch.from_numpy(rows).to(z.device)
    for k in range(draws):
        generator = torch.Generator().manual_seed(10_000 + k)
        t = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows) * len(alphas)
        t = t[torch.randperm(len(rows), generator=generator)].long().to(z.device)
        noise = torch.randn(len(rows), *z.shape[1:], generator=generator).to(z.device)
        for part in torch.arange(len(rows), device=z.device).split(256):
            r = rows[part]
            total += diffusion.denoising_loss(model, z[r], ids[r], t[part], noise[part], alphas, True).sum().item()
    return total / draws / len(rows)


# ---------------------------------------------------------------------------------------------------------------- a job


def inject(cfg, model, rule, rank, budget, seed, task):
    """Freeze the base and put adapters on it, with the ranks that the rule gives them before the first step."""
    torch.manual_seed(seed)
    planned = rule in (*selora.PLANS, "replay")
    try:
        selora.inject(model, cfg.targets or None, 0 if planned else rank, cfg.capacity)
        if rule == "replay":
            selora.set_ranks(model, replayed_ranks(cfg.replay, seed))
        elif planned:
            gradients = neyman_gradients(model, cfg, seed, task) if rule == "neyman" else None
            selora.set_ranks(model, selora.plan(model, rule, budget, gradients))
    except ValueError as error:
        raise Refused(str(error)) from None


def neyman_gradients(model, cfg, seed, task):
    """Full-weight gradients of 8 batches with stratified timesteps, at B = 0."""
    z, ids, alphas, train = task["z"], task["ids"], task["alphas"], task["train"]
    for k in range(8):
        rows, _, noise, words = drawn_at(seed, 10**6 + k, len(train), cfg, z, ids, alphas, train)
        t = ((torch.arange(cfg.batch, device=z.device) + 0.5) / cfg.batch * len(alphas)).long()
        batch = (z[rows], words, t, noise, alphas)
        yield selora.full_gradients(model, lambda batch=batch: diffusion.denoising_loss(model, *batch))


def replayed_ranks(run, seed):
    """{layer: rank} that another run ended with at this seed."""
    report = checkpoint.read_json(Path(run) / "metrics.json")
    if not report or report.get("kind") != "selora":
        raise Refused(f"{run}: not a finished run of train_selora.py")
    ranks = next(m["ranks"] for name, m in report["methods"].items() if name not in REFERENCES)
    if seed >= len(ranks):
        raise Refused(f"{run}: has {len(ranks)} seeds; seed {seed} has no ranks to replay")
    return ranks[seed]


def run_job(cfg, ctx, job, seed):
    """Adapt and evaluate one (rule, budget, seed), or read its finished file; returns the file's content."""
    path = cfg.out / f"adapters/{job['name'].replace(' ', '-')}-s{seed}.pt"
    if path.exists():
        return checkpoint.load(path, "selora adapter")
    task, rule = ctx["tasks"][seed], job["rule"]
    model = Denoiser(**ctx["config"])
    model.load_state_dict(ctx["base"])
    model.to(ctx["device"])
    seconds, history = 0.0, [[0, {}]]
    if rule not in REFERENCES:
        inject(cfg, model, rule, job["rank"], job["budget"], seed, task)
    if rule != "unadapted":
        seconds, history = adapt(cfg, model, rule, seed, job["budget"], task, ctx["device"], ctx["log"],
                                 cfg.out / "last.pt", ctx["stop"])
    model.eval()
    parts = {"heldout_loss": "test", "val_loss": "val"}
    result = {name: heldout_loss(model, task, task["parts"][part]) for name, part in parts.items()}
    state = selora.adapter_state(model) if rule not in REFERENCES else model.state_dict() if rule == "full" else {}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) * (rule != "unadapted")
    content = {"format": 1, "kind": "selora adapter", "rule": rule, "seed": seed, "state": state,
               "ranks": history[-1][1], "history": history, "result": result, "trainable_params": trainable,
               "adapter_params": selora.adapter_parameters(model)}
    timings = checkpoint.read_json(cfg.out / "timings.json", {})
    checkpoint.write_json(cfg.out / "timings.json", timings | {f"{job['name']}-s{seed}": round(seconds, 3)})
    checkpoint.save(path, content)
    (cfg.out / "last.pt").unlink(missing_ok=True)
    return content


def jobs_of(cfg, ctx):
    """What to run: the rule between its references, or every rule at the budgets of uniform rank 1 and 2."""
    cost = uniform_cost(cfg, ctx)
    job = lambda name, rule, budget=0, rank=cfg.rank: {"name": name, "rule": rule, "budget": budget, "rank": rank}
    if not cfg.rules_table:
        return [job("unadapted", "unadapted"), job(cfg.rule, cfg.rule, cfg.budget or 2 * cost), job("full", "full")]
    jobs = [job("unadapted", "unadapted"), job("full", "full"), job("ratio", "ratio", rank=1)]
    for r in (1, 2):
        jobs.append(job(f"fixed r{r}", "fixed", r * cost, r))
        rules = ("neyman", "inverse-cost") if r == 1 else ("neyman", "inverse-cost", "gain", "cheapest", "random")
        jobs += [job(f"{rule} r{r}", rule, r * cost, 1) for rule in rules]
    return jobs


def uniform_cost(cfg, ctx):
    """Adapter parameters of rank 1 in every layer."""
    model = Denoiser(**ctx["config"])
    try:
        selora.inject(model, cfg.targets or None, 0, cfg.capacity)
    except ValueError as error:
        raise Refused(str(error)) from None
    return sum(selora.adapter_cost(layer) for layer in selora.adapters(model).values())


# -------------------------------------------------------------------------------------------------------- what is shown


def table(report, timings):
    """Held-out denoising loss per method, x 1e5, mean ± standard deviation over seeds, and the gap that is closed."""
    title = f"{report['data']}, {data.origin(report)}; held-out denoising loss x 1e5, seeds: {len(report['seeds'])}"
    lines = ["", title,
             f"{'method':18s}{'held-out':>14s}{'adapter':>10s}{'gap closed':>12s}{'seconds':>9s}"]
    none, full = (np.array(report["methods"][k]["heldout_loss"]) for k in REFERENCES)
    for name, m in report["methods"].items():
        loss, seconds = np.array(m["heldout_loss"]), [timings.get(f"{name}-s{s}", 0.0) for s in report["seeds"]]
        closed = (none - loss) / (none - full)
        lines.append(f"{name:18s}{loss.mean() * 1e5:9.0f} ±{loss.std() * 1e5:3.0f}{np.mean(m['adapter_params']):10,.0f}"
                     f"{closed.mean():11.0%} {np.mean(seconds):9.1f}")
    return "\n".join(lines)


def rank_bars(report):
    """Final ranks by layer kind, as text: mean rank over the layers of a kind and the seeds."""
    for name, m in report["methods"].items():
        kinds = {}
        for ranks in m["ranks"]:
            for layer, rank in ranks.items():
                kinds.setdefault(".".join(p for p in layer.split(".") if not p.isdigit()), []).append(rank)
        if kinds:
            yield f"{name}: mean rank by kind of layer"
            yield from (f"  {kind:34s} {np.mean(r):4.1f} {'█' * round(4 * np.mean(r))}" for kind, r in kinds.items())


def figures(cfg, report, sheet):
    """Rank per layer over steps, and samples beside real images; without matplotlib, ranks as text bars."""
    try:
        import matplotlib
    except ImportError:
        print(*rank_bars(report), sep="\n")
        return print("no figures: pip install 'minilora[pictures]' draws them")
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    name = next((n for n in report["methods"] if n not in REFERENCES), None)
    history = report["methods"][name]["history"][0]
    steps = [h[0] for h in history] + [cfg.steps]
    fig, ax = plt.subplots(figsize=(7, 4), dpi=120)
    for i, layer in enumerate(history[0][1]):
        ranks = [h[1][layer] for h in history]
        colour = plt.cm.viridis(i / len(history[0][1]))
        ax.step(steps, [*ranks, ranks[-1]], where="post", lw=1, alpha=0.6, color=colour)
    ax.set(xlabel="step", ylabel="rank", title=f"{report['data']}, rule {name}, seed 0: rank of each layer")
    fig.tight_layout()
    fig.savefig(cfg.out / "ranks.png")
    plt.close(fig)
    real, drawn, notes = sheet
    fig, axes = plt.subplots(2, len(notes), figsize=(1.7 * len(notes), 4), dpi=120)
    for column, (a, b, note) in enumerate(zip(real, drawn, notes)):
        for row, image in enumerate((a, b)):
            axes[row, column].imshow(image, cmap="gray", vmin=0, vmax=255)
            axes[row, column].axis("off")
        axes[0, column].set_title("\n".join(note[:60].split(", ")), fontsize=5)
    fig.suptitle(f"{report['data']}: real (top) and sampled from the same words (bottom), rule {name}", fontsize=8)
    fig.savefig(cfg.out / "samples.png")
    plt.close(fig)
    print(f"figures: {cfg.out / 'ranks.png'}, {cfg.out / 'samples.png'}")


@torch.no_grad()
def sample_images(model, vae, ids, alphas, cfg, seed=0):
    """uint8 images [B,S,S] or [B,S,S,3] drawn from words: noise by (seed, row), so that row b depends on row b only."""
    generators = [torch.Generator().manual_seed(1000 * seed + b) for b in range(len(ids))]
    noise = torch.stack([torch.randn(vae.latent, vae.size, vae.size, generator=g) for g in generators]).to(ids.device)
    x = vae.decode(diffusion.sample(model, noise, ids, cfg.sample_steps, cfg.guidance, alphas))
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte().cpu().numpy()
    return x[:, 0] if x.shape[1] == 1 else np.moveaxis(x, 1, 3)


# ---------------------------------------------------------------------------------------------------------------- main


def check(cfg):
    """Refuse what cannot be run, before data is read."""
    if cfg.rule not in RULES:
        raise Refused(f"rule '{cfg.rule}' is not known; use {', '.join(RULES)}")
    if cfg.ratio_of not in ("sampled", "expected") or cfg.fisher not in ("probe", "loop"):
        raise Refused(f"--ratio-of '{cfg.ratio_of}' must be sampled or expected, --fisher '{cfg.fisher}' probe or loop")
    if (cfg.rule == "replay") != (cfg.replay is not None):
        raise Refused("--rule replay and --replay RUN go together")
    for name in ("seeds", "capacity", "every", "steps", "batch", "vae_steps", "pretrain_steps", "phantoms",
                 "sample_steps"):
        if getattr(cfg, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; must be at least 1")
    if not 0 <= cfg.rank <= cfg.capacity:
        raise Refused(f"--rank {cfg.rank} is outside 0..{cfg.capacity}, the capacity")
    if cfg.buckets < 16 or cfg.positions < 2 or cfg.guidance < 0 or cfg.budget < 0 or cfg.lr <= 0:
        raise Refused("--buckets must be at least 16, --positions 2, --guidance and --budget 0, --lr above 0")
    try:
        vae = VAE(cfg.image_size, 1, cfg.latent, cfg.factor, cfg.vae_width)
        config = dict(latent=cfg.latent, size=vae.size, width=cfg.width, heads=cfg.heads, buckets=cfg.buckets,
                      positions=cfg.positions, text_width=cfg.text_width, text_depth=cfg.text_depth)
        Denoiser(**config)
        diffusion.alphas_cumprod(kind=cfg.schedule)
    except ValueError as error:  # sizes that do not fit together
        raise Refused(str(error)) from None
    return config


def read_study(cfg, path, domain, seed):
    """A study with images and words."""
    if path is None:
        return data.phantoms(cfg.phantoms, seed, domain, cfg.image_size).select(("image", "note"))
    study = data.load_study(path)
    study = data.attach_notes(study) if cfg.synthetic_notes and study.notes is None else study
    return study.select(("image", "note"))


@torch.no_grad()
def latents(vae, images):
    """Posterior means [N,L,s,s] of images [N,ch,S,S]."""
    return torch.cat([vae.encode(part)[0] for part in images.split(256)])


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=Config.__doc__)
    checkpoint.guarded(run, cfg)


def run(cfg, stop):
    config = check(cfg)
    device = checkpoint.pick_device(cfg.device)
    target, source = read_study(cfg, cfg.data, "target", 2), read_study(cfg, cfg.source, "source", 1)
    channels = 3 if 4 in (target.images.ndim, source.images.ndim) else 1
    about = lambda s: " (synthetic)" if s.synthetic else " (synthetic notes)" if s.synthetic_notes else ""
    for what, study in (("source", source), ("target", target)):
        print(f"{what}: {study.name}{about(study)}, {len(study)} samples")
    drawn = {seed: data.split(target, seed) for seed in range(cfg.seeds)}
    if cfg.dry_run:
        cost = uniform_cost(cfg, {"config": config})
        total = sum(p.numel() for p in Denoiser(**config).parameters())
        print(f"denoiser {total:,} parameters; uniform rank 1 costs {cost:,}, rank {cfg.capacity} "
              f"{cfg.capacity * cost:,}")
        return

    identity = checkpoint.open_run(cfg)
    for seed, parts in drawn.items():
        data.write_atomic(cfg.out / f"split-s{seed}.npz", data.npz_bytes(parts))

    images = {k: torch.from_numpy(data.prepare_images(s.images, cfg.image_size, channels)).to(device)
              for k, s in (("source", source), ("target", target))}
    words = {k: torch.from_numpy(data.tokenize(s.notes, cfg.buckets, cfg.positions)).to(device)
             for k, s in (("source", source), ("target", target))}
    fixed = [identity["source"] or source.name, len(source), channels, cfg.synthetic_notes, cfg.image_size, cfg.latent,
             cfg.factor, cfg.vae_width, cfg.vae_steps]
    vae = train_vae(cfg, images["source"], device, Path(f"runs/base/vae-{data.digest(fixed)[:16]}.pt"), stop)
    z = {k: latents(vae, x) for k, x in images.items()}
    for k, x in images.items():
        error = torch.cat([vae.decode(part) for part in z[k].split(256)]).sub(x).square().mean().item()
        print(f"autoencoder: mean squared error {error:.4f} on the {k}")
    alphas = diffusion.alphas_cumprod(kind=cfg.schedule, device=device)
    base_hash = data.digest([*fixed, config, cfg.schedule, cfg.pretrain_steps, cfg.batch])[:16]
    path = Path(f"runs/base/unet-{base_hash}.pt")
    base = pretrain(cfg, config, z["source"], words["source"], alphas, device, path, stop)

    tasks = {seed: {"z": z["target"], "ids": words["target"], "alphas": alphas, "train": parts["train"], "parts": parts}
             for seed, parts in drawn.items()}
    ctx = {"config": config, "base": base, "device": device, "tasks": tasks, "stop": stop,
           "log": checkpoint.Log(cfg.out / "log.jsonl")}
    jobs = jobs_of(cfg, ctx)
    results = {job["name"]: [run_job(cfg, ctx, job, seed) for seed in range(cfg.seeds)] for job in jobs}

    methods = {name: {k: [r["result"][k] for r in runs] for k in ("heldout_loss", "val_loss")}
               | {k: [r[k] for r in runs] for k in ("adapter_params", "trainable_params", "ranks", "history")}
               for name, runs in results.items()}
    report = {"format": 1, "kind": "selora", "data": target.name, "synthetic": target.synthetic,
              "synthetic_notes": target.synthetic_notes, "seeds": list(range(cfg.seeds)), "methods": methods}
    kept = next(job["name"] for job in jobs if job["rule"] not in REFERENCES)
    checkpoint.save(cfg.out / "model.pt", {
        "format": 1, "kind": "selora", "config": config, "base": base, "base_hash": base_hash, "vae_config": vae.config,
        "vae": vae.state_dict(), "schedule": cfg.schedule, "capacity": cfg.capacity, "adapter": results[kept][0]})
    checkpoint.write_json(cfg.out / "metrics.json", report)
    print(table(report, checkpoint.read_json(cfg.out / "timings.json", {})))
    model = Denoiser(**config)
    model.load_state_dict(base)
    selora.inject(model, cfg.targets or None, 0, cfg.capacity)
    selora.load_adapter(model, results[kept][0]["state"])
    rows = drawn[0]["test"][:8]
    drawn_images = sample_images(model.to(device).eval(), vae, words["target"][rows], alphas, cfg)
    real, notes = data.resize(target.images[rows], cfg.image_size), [str(n) for n in target.notes[rows]]
    figures(cfg, report, (real, drawn_images, notes))
    print(f"run folder: {cfg.out}")


if __name__ == "__main__":
    main()
