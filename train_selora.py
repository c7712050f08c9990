"""Teach a frozen latent diffusion model new images by words, with adapters whose ranks grow by Fisher information.

    python train_selora.py --out runs/selora                    # phantoms (synthetic), 3 seeds
    python train_selora.py --data study.npz --out runs/mine     # your images and notes
    python train_selora.py --rules-table --out runs/rules       # every rule and control at equal parameters

The script reads downward. The lesson is `adapt`: zero_grad, forward, loss, backward, Fisher, grow, step, around
`minilora/selora.py`. The base is `minilora/vae.py` and `minilora/unet.py`, trained here once on the source domain.
"""

import copy
import io
import textwrap
import time
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import tyro

from minilora import checkpoint, data, diffusion, metrics, selora
from minilora.checkpoint import Watch, restore, resume_state, rows_at, warm_cosine
from minilora.data import Refused
from minilora.unet import Denoiser
from minilora.vae import VAE, augment, vae_loss
from minilora.vit import ViT

RULES = (*selora.GROWTH, *selora.PLANS, "fixed", "replay")
REFERENCES = ("unadapted", "full")
COMPARED = ("fixed", "neyman", "inverse-cost", "gain", "cheapest", "random")  # rows of --rules-table at each budget
SAVE_EVERY, LOG_EVERY = 100, 20  # steps
PRESETS = {"small": {}, "base": dict(width=128, text_width=256, text_depth=2, heads=8, vae_width=32, buckets=8192),
           "large": dict(image_size=64, width=416, text_width=256, text_depth=2, heads=8, vae_width=64, buckets=8192,
                         positions=32)}


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
    # Run folder of train_mora.py: its frozen ViT measures the samples by Frechet distance and, on phantoms, agreement.
    judge: Path | None = None
    targets: str = ""  # Regular expression over full layer names; empty: every Linear and Conv2d.
    rules_table: bool = False  # Run every rule at the budgets of uniform rank 1 and 2, and print the comparison.
    steps: int = 800  # Adaptation steps.
    batch: int = 32  # Samples per step.
    lr: float = 1e-2  # Peak learning rate of adapters; full fine-tuning gets a tenth.
    image_size: int = 32  # Images are resized to this.
    factor: int = 4  # Image size over latent size, a power of two.
    latent: int = 4  # Latent channels.
    vae_width: int = 16  # Width of the autoencoder.
    width: int = 48  # Width of the UNet.
    text_width: int = 64  # Width of the text encoder.
    text_depth: int = 1  # Blocks of the text encoder.
    heads: int = 4  # Attention heads.
    buckets: int = 2048  # Hash buckets for words.
    positions: int = 16  # Word positions of a note; longer notes are cut.
    vae_steps: int = 400  # Steps of pretraining the autoencoder.
    pretrain_steps: int = 1200  # Steps of pretraining the denoiser.
    phantoms: int = 4000  # Phantoms to draw of a domain where no file is given.
    train_share: float = 1.0  # Share of the training split to adapt with, for scarce data; as in train_mora.py.
    schedule: str = "cosine"  # Noise schedule: cosine or linear.
    guidance: float = 2.0  # Classifier-free guidance of the samples.
    sample_steps: int = 20  # DDIM steps of the samples.
    sample_every: int = 0  # Draw a sheet of samples every so many steps too; 0: only at the end.
    # Replaces sizes left at their defaults: small (none), base (8M parameters) or large (57M, 64x64, for a GPU).
    preset: str = "small"
    device: str = "auto"  # auto, cpu, cuda or cuda:N.
    amp: bool = False  # Forward passes of the adaptation in bfloat16; weights, optimizer and Fisher stay float32.
    compile: bool = False  # torch.compile the adaptation step, once: growth does not compile again.
    resume: bool = False  # Go on with the run in --out, or show it again if it is finished.
    dry_run: bool = False  # Print counts, parameters, memory and an estimate of time, and stop.
    tensorboard: bool = False  # Show log.jsonl as TensorBoard events too, in the run folder (pip install tensorboard).


# ------------------------------------------------------------------------------------------------------------- the base


def train_vae(cfg, images, device, path, stop):
    """The autoencoder, trained on the source's images with random contrast, so that it can decode another scanner."""
    channels = images.shape[1]
    vae = VAE(cfg.image_size, channels, cfg.latent, cfg.factor, cfg.vae_width)
    if path.exists():
        vae.load_state_dict(checkpoint.load(path, "vae", path.stem)["state"])
        return vae.to(device).requires_grad_(False)
    torch.manual_seed(0)
    vae = VAE(**vae.config).to(device)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=4e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.vae_steps))
    last = path.with_suffix(".last.pt")
    start = restore(checkpoint.load(last, "resume", path.stem), vae, optimizer, schedule) if last.exists() else 0
    progress = checkpoint.Progress("autoencoder", cfg.vae_steps, start)
    rows_of = lambda step: rows_at(1, step, len(images), 64)
    watch = Watch("autoencoder", cfg.vae_steps, start, vae, rows_of, device)

    def keep(done):
        watch.checked(done)  # weights that are NaN are not kept
        checkpoint.save(last, resume_state(vae, optimizer, schedule, done) | {"of": path.stem})

    for step in range(start, cfg.vae_steps):
        generator = torch.Generator(device).manual_seed(step)
        x = augment(images[torch.from_numpy(rows_of(step)).to(device)], generator)
        noise = torch.randn(len(x), cfg.latent, vae.size, vae.size, generator=generator, device=device)
        optimizer.zero_grad()
        reconstruction, _, loss = vae_loss(vae, x, noise, kl=1e-4)
        loss.backward()
        watch.note(step, reconstruction)
        optimizer.step()
        schedule.step()
        if progress.due(step + 1):
            progress.show(step + 1, f"error {watch.checked(step + 1)[-1]:.4f}")
        stop.after(step + 1, SAVE_EVERY, keep)
    watch.checked(cfg.vae_steps)
    vae.measure(images[:2000])
    checkpoint.save(path, {"format": 1, "kind": "vae", "of": path.stem, "config": vae.config,
                           "state": vae.state_dict()})
    last.unlink(missing_ok=True)
    return vae.requires_grad_(False)


def pretrain(cfg, config, z, ids, alphas, device, path, stop):
    """The state of the denoiser's running average after training on the source's latents and words."""
    if path.exists():
        return checkpoint.load(path, "denoiser", path.stem)["state"]
    torch.manual_seed(0)
    model = Denoiser(**config).to(device)
    average = copy.deepcopy(model).requires_grad_(False)
    both = torch.nn.ModuleDict({"model": model, "average": average})
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.pretrain_steps))
    last, start = path.with_suffix(".last.pt"), 0
    if last.exists():
        saved = checkpoint.load(last, "resume", path.stem)
        start = restore(saved, both, optimizer, schedule)
        average.load_state_dict(saved["average"])
    progress = checkpoint.Progress("denoiser", cfg.pretrain_steps, start)
    rows_of = lambda step: rows_at(2, step, len(z), cfg.batch)
    watch = Watch("denoiser", cfg.pretrain_steps, start, model, rows_of, device)

    def keep(done):
        watch.checked(done)
        checkpoint.save(last, resume_state(both, optimizer, schedule, done) | {
            "of": path.stem, "average": average.state_dict()})

    for step in range(start, cfg.pretrain_steps):
        rows, t, noise, words = drawn_at(2, step, cfg, z, ids, alphas, np.arange(len(z)))
        optimizer.zero_grad()
        loss = diffusion.denoising_loss(model, z[rows], words, t, noise, alphas)
        loss.backward()
        watch.note(step, loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        diffusion.ema_update(average, model, min(0.99, (step + 1) / (step + 10)))
        if progress.due(step + 1):
            progress.show(step + 1, f"loss {watch.checked(step + 1)[-1]:.3f}")
        stop.after(step + 1, SAVE_EVERY, keep)
    watch.checked(cfg.pretrain_steps)
    checkpoint.save(path, {"format": 1, "kind": "denoiser", "of": path.stem, "config": config,
                           "state": average.state_dict()})
    last.unlink(missing_ok=True)
    return checkpoint.load(path, "denoiser", path.stem)["state"]


# ----------------------------------------------------------------------------------------------------------- the lesson


def adapt(cfg, ctx, model, job, seed):
    """Train what is not frozen and grow the ranks; returns (seconds, [[step, {layer: rank}], ...])."""
    z, ids, alphas, train = ctx["z"], ctx["ids"], ctx["alphas"], ctx["parts"][seed]["train"]
    rule, budget, log, last = job["rule"], job["budget"], ctx["log"], cfg.out / "last.pt"
    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = selora.adapter_groups(model, 0.01) if selora.adapters(model) else trainable
    optimizer = torch.optim.AdamW(groups, lr=cfg.lr / 10 if rule == "full" else cfg.lr, weight_decay=0.01,
                                  fused=z.is_cuda)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_cosine(cfg.steps))
    compiled = torch.compile(model) if cfg.compile else model
    name, start, began = f"{job['name']} s{seed}", 0, time.monotonic()
    history = [[0, ranks_of(model)]]
    saved = checkpoint.load(last, "resume") if last.exists() else {}
    if saved.get("job") == name:
        start, began, history = restore(saved, model, optimizer, schedule), began - saved["seconds"], saved["history"]
        for path, layer in selora.adapters(model).items():
            layer.rank = history[-1][1][path]
        log.cut(saved["log"])
    rows_of = lambda step: train[rows_at(seed, step, len(train), cfg.batch)]
    progress, probes = checkpoint.Progress(name, cfg.steps, start), probe_steps(cfg, rule, job["rank"])
    floor = sum(selora.adapter_cost(layer) * history[0][1][n] for n, layer in selora.adapters(model).items())
    fisher = cfg.fisher if rule in ("ratio", "gain") else ""  # the other rules read no scores
    expected = rule == "gain" or cfg.ratio_of == "expected"
    half = torch.autocast(z.device.type, torch.bfloat16, enabled=cfg.amp)
    watch = Watch(name, cfg.steps, start, model, rows_of, z.device)
    if start:
        watch.losses[:start] = saved["losses"]

    def keep(done):
        watch.checked(done)
        checkpoint.save(last, resume_state(model, optimizer, schedule, done) | {
            "job": name, "seconds": time.monotonic() - began, "log": log.size, "losses": watch.losses[:done],
            "history": history})

    if not start:
        keep(0)  # from here on a killed run knows where its log ends
    for step in range(start, cfg.steps):
        drawn = drawn_at(seed, step, cfg, z, ids, alphas, train)
        rows, t, noise, words = (checkpoint.own_part(x, cfg.batch) for x in drawn)  # this process's part
        optimizer.zero_grad()
        with selora.FisherProbe(model, expected) if step in probes and fisher == "probe" else nullcontext() as probe:
            with half:  # a probe's hooks stay outside the compiled graph
                predict = model if step in probes else compiled
                each = diffusion.denoising_loss(predict, z[rows], words, t, noise, alphas, per_sample=True)
            scores = selora.fisher_loop(model, each) if step in probes and fisher == "loop" else None
            loss = each.mean()
            loss.backward()  # one backward: gradients and Fisher information
        sent = checkpoint.average([p.grad for p in trainable if p.grad is not None])
        watch.note(step, loss)
        if step in probes:
            watch.checked(step + 1, step)  # before a rule reads NaN
            scores = watch.scores(step, averaged(probe.scores() if probe else scores or {}, z.device))
            share = (probes.index(step) + 1) / len(probes)  # the budget is opened step by step
            allowed = None if rule == "ratio" else round(floor + share * (budget - floor))
            generator = torch.Generator().manual_seed(1000 * seed + step)
            if selora.grow(model, scores, rule, cfg.lam, cfg.ratio_of, allowed, generator):
                history.append([step, ranks_of(model)])  # nothing else changes: same tensors, same output
        optimizer.step()
        schedule.step()
        done = step + 1
        if done % LOG_EVERY == 0 or done == cfg.steps:
            first = max(0, done - LOG_EVERY)
            checkpoint.average([watch.losses[first:done]])
            mean = float(watch.checked(done, first).mean())
            log.write(method=job["name"], rule=rule, seed=seed, step=done, loss=round(mean, 6),
                      adapter_params=selora.adapter_parameters(model))
        if progress.due(done):
            text = f"loss {watch.checked(done)[-1]:.3f}"
            text += f"  adapter parameters {selora.adapter_parameters(model):,}" + f"  {sent:,} bytes sent" * bool(sent)
            progress.show(done, text)
        if cfg.sample_every and done % cfg.sample_every == 0 and done < cfg.steps and checkpoint.leader():
            sheet(cfg, ctx, model, f"samples/{job['name'].replace(' ', '-')}-s{seed}-step{done:06d}.png")
        ctx["stop"].after(done, SAVE_EVERY, keep)
    return time.monotonic() - began, history


# --------------------------------------------------------------------------------------------------- steps of the loops


def drawn_at(seed, step, cfg, z, ids, alphas, train):
    """(rows of `train`, timesteps, noise, words with 10% dropped) of a step, drawn from (seed, step) alone."""
    rows = torch.from_numpy(train[rows_at(seed, step, len(train), cfg.batch)]).to(z.device)
    generator = torch.Generator(z.device).manual_seed((seed + 1) * 1_000_003 + step)
    t = torch.randint(0, len(alphas), (cfg.batch,), generator=generator, device=z.device)
    noise = torch.randn(cfg.batch, *z.shape[1:], generator=generator, device=z.device, dtype=z.dtype)
    return rows, t, noise, diffusion.drop_words(ids[rows], generator)


def averaged(scores, device):
    """The scores {layer: Score} over the samples of all processes, equal in each of them."""
    if not scores or checkpoint.world()[1] == 1:
        return scores
    sums = torch.tensor([score[:3] for score in scores.values()], dtype=torch.float64, device=device)
    checkpoint.average([sums])
    return {name: selora.Score(*row, selora.ratio(*row[:2])) for name, row in zip(scores, sums.tolist())}


def probe_steps(cfg, rule, rank):
    """Steps at which a rule looks: `ratio` all along, budgeted rules in the first quarter (late ranks learn less);
    from rank 0, with which nothing trains, at once.
    """
    end = cfg.steps if rule == "ratio" else max(cfg.steps // 4, cfg.every + 1)
    return list(range(cfg.every if rank else 0, end, cfg.every)) if rule in selora.GROWTH else []


def ranks_of(model):
    """{layer: rank} of the adapters."""
    return {name: layer.rank for name, layer in selora.adapters(model).items()}


@torch.no_grad()
def heldout_loss(model, ctx, rows, draws=8):
    """Mean denoising loss over the rows with fixed timesteps (stratified) and noise: differences are the model's. Of
    several processes each takes a part of the rows.
    """
    z, ids, alphas, total = ctx["z"], ctx["ids"], ctx["alphas"], torch.zeros(1, dtype=torch.float64)
    rank, processes = checkpoint.world()
    rows = torch.from_numpy(rows).to(z.device)
    for k in range(draws):
        generator = torch.Generator().manual_seed(10_000 + k)
        t = (torch.arange(len(rows)) + torch.rand(len(rows), generator=generator)) / len(rows) * len(alphas)
        # float32 rounds the last one up now and then
        t = t[torch.randperm(len(rows), generator=generator)].long().clamp(max=len(alphas) - 1).to(z.device)
        noise = torch.randn(len(rows), *z.shape[1:], generator=generator).to(z.device)
        for part in torch.arange(rank, len(rows), processes, device=z.device).split(256):
            r = rows[part]
            total += diffusion.denoising_loss(model, z[r], ids[r], t[part], noise[part], alphas, True).sum().item()
    total = total.to(z.device)
    checkpoint.average([total])
    return total.item() * processes / draws / len(rows)


# ---------------------------------------------------------------------------------------------------------------- a job


def jobs_of(cfg, cost):
    """What to run at each seed: the rule between its references, or for --rules-table every rule at the budgets of
    uniform rank 1 and 2 (`cost`: rank 1 in every layer), and the controls again at what `ratio` came to cost.
    """
    job = lambda name, rule, budget=0, rank=0: {"name": name, "rule": rule, "budget": budget, "rank": rank}
    if not cfg.rules_table:
        return [job("unadapted", "unadapted"), job(cfg.rule, cfg.rule, cfg.budget or 2 * cost, cfg.rank),
                job("full", "full")]
    jobs = [job("unadapted", "unadapted"), job("full", "full"), job("ratio", "ratio", rank=1)]
    for r in (1, 2):  # what grows starts a rank below, so that there is something to choose
        jobs += [job(f"{rule} r{r}", rule, r * cost, r if rule == "fixed" else r - 1) for rule in COMPARED]
    return jobs + [job(f"{rule} as ratio", rule, "ratio", 1) for rule in ("replay", *COMPARED) if rule != "fixed"]


def inject(cfg, model, job, seed, ctx, ranks=None):
    """Freeze the base and put adapters on it, with the ranks that the rule gives them before the first step; `ranks`
    are what `replay` starts from.
    """
    torch.manual_seed(seed)
    rule, planned = job["rule"], job["rule"] in (*selora.PLANS, "replay")
    selora.inject(model, cfg.targets or None, 0 if planned else job["rank"], cfg.capacity)
    if planned:
        gradients = neyman_gradients(model, cfg, seed, ctx) if rule == "neyman" else None
        selora.set_ranks(model, ranks if rule == "replay" else selora.plan(model, rule, job["budget"], gradients))


def neyman_gradients(model, cfg, seed, ctx):
    """Full-weight gradients of 8 batches with stratified timesteps, at B = 0."""
    z, ids, alphas, train = ctx["z"], ctx["ids"], ctx["alphas"], ctx["parts"][seed]["train"]
    for k in range(8):
        rows, _, noise, words = drawn_at(seed, 10**6 + k, cfg, z, ids, alphas, train)
        t = ((torch.arange(cfg.batch, device=z.device) + 0.5) / cfg.batch * len(alphas)).long()
        batch = (z[rows], words, t, noise, alphas)
        yield selora.full_gradients(model, lambda batch=batch: diffusion.denoising_loss(model, *batch))


def run_job(cfg, ctx, job, seed):
    """Adapt and evaluate one job at one seed, or read its finished file; returns the file's content."""
    path = cfg.out / f"adapters/{job['name'].replace(' ', '-')}-s{seed}.pt"
    checkpoint.wait()
    if path.exists():
        content = checkpoint.load(path, "selora adapter", f"{job['name']} s{seed}")
        if content["base_hash"] != ctx["base_hash"]:
            raise Refused(f"{path}: an adapter for base {content['base_hash']}, not {ctx['base_hash']}")
        return content
    rule, model = job["rule"], base_model(ctx)
    seconds, history, ranks = 0.0, [[0, {}]], ctx["replay"].get(seed)
    if job["budget"] == "ratio":
        reached = checkpoint.load(cfg.out / f"adapters/ratio-s{seed}.pt", "selora adapter")
        job, ranks = job | {"budget": reached["adapter_params"]}, reached["ranks"]
    if rule not in REFERENCES:
        inject(cfg, model, job, seed, ctx, ranks)
    if rule != "unadapted":
        seconds, history = adapt(cfg, ctx, model, job, seed)
    model.eval()
    halves = {"heldout_loss": "test", "val_loss": "val"}
    result = {name: heldout_loss(model, ctx, ctx["parts"][seed][half]) for name, half in halves.items()}
    if ctx["judge"]:
        result |= judged(cfg, ctx, model, seed)
    state = selora.adapter_state(model) if rule not in REFERENCES else model.state_dict() if rule == "full" else {}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) * (rule != "unadapted")
    content = {"format": 1, "kind": "selora adapter", "of": f"{job['name']} s{seed}", "method": job["name"],
               "rule": rule, "seed": seed, "state": state, "ranks": history[-1][1], "history": history,
               "result": result, "trainable_params": trainable,
               "adapter_params": selora.adapter_parameters(model), "base_hash": ctx["base_hash"]}
    return checkpoint.finished(cfg.out, path, content, {f"{job['name']}-s{seed}": round(seconds, 3)})


def base_model(ctx):
    """A fresh copy of the pretrained denoiser, on the device."""
    model = Denoiser(**ctx["config"])
    model.load_state_dict(ctx["base"])
    return model.to(ctx["z"].device)


# ------------------------------------------------------------------------------------------------------------ the judge


def sample_images(cfg, ctx, model, rows):
    """uint8 images [B,S,S] or [B,S,S,3] from the words of the rows; noise by row, so that an image is the row's own."""
    ids = ctx["ids"][torch.from_numpy(rows).to(ctx["ids"].device)]
    return diffusion.draw_images(model, ctx["vae"], ids, rows, cfg.sample_steps, cfg.guidance, ctx["alphas"])


def load_judge(run, device, study_file):
    """The frozen ViT that a run of train_mora.py was built on; it looks at images alone. `Refused` if it was pretrained
    on the study whose held-out images it is to judge.
    """
    saved = checkpoint.load(Path(run) / "model.pt", "mora")
    config = checkpoint.read_json(Path(run) / "config.json", {})
    source = config.get("source") if isinstance(config, dict) else None
    if source and study_file and source["sha256"] == data.sha256(study_file):
        raise Refused(f"--judge {run}: was pretrained on {study_file}, whose held-out images it would judge")
    if "image" not in saved["config"]["modalities"]:
        raise Refused(f"--judge {run}: its model has no image modality")
    vit = ViT(**saved["config"] | {"absent": "mask"})
    vit.load_state_dict(saved["base"], strict=False)
    return vit.to(device).requires_grad_(False).eval()


@torch.no_grad()
def judge_tokens(vit, images):
    """The ViT's normalised last tokens [N,T,D] of uint8 images [N,H,W] or [N,H,W,3]."""
    x, out = data.prepare_images(images, vit.config["image_size"], vit.config["channels"]), []
    for part in torch.from_numpy(x).to(vit.cls.device).split(500):
        tokens, bias = vit.embed({"image": part})
        for block in vit.blocks:
            tokens = block(tokens, bias)
        out.append(vit.norm(tokens))
    return torch.cat(out)


def linear_reader(x, labels):
    """Logistic regression of labels [N] (-1 = unknown) on features [N,D]: a function features -> class [N]."""
    mean, std, known = x.mean(0), x.std(0) + 1e-6, labels >= 0
    x, labels = ((x - mean) / std)[known], labels[known]
    linear = torch.nn.Linear(x.shape[1], int(labels.max()) + 1).to(x.device)
    torch.nn.init.zeros_(linear.weight)
    optimizer = torch.optim.LBFGS(linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(linear(x), labels) + 1e-3 * linear.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return lambda features: linear((features - mean) / std).argmax(1)


def prepare_judge(ctx, seed):
    """What `judged` compares with at a seed: real held-out features, readers of finding and side, floor and ceiling.

    Nothing here has seen a held-out image: the readers are fitted on the training split. Rows: held-out, test first."""
    parts, vit, target = ctx["parts"][seed], ctx["judge"]["vit"], ctx["target"]
    rows = np.concatenate([parts["test"], parts["val"]])[:min(400, len(parts["train"]))]  # as many as for the floor
    if len(rows) < 2:
        raise Refused(f"--judge needs 2 samples to train on or more; seed {seed} has {len(parts['train'])}")
    train = np.random.default_rng((seed, 21)).permutation(parts["train"])
    tokens, known = judge_tokens(vit, target.images[rows]), judge_tokens(vit, target.images[train])
    n = len(rows)
    floor = metrics.frechet(tokens.mean(1).cpu().numpy(), known[:n].mean(1).cpu().numpy())
    readers, truths, ceiling = {}, {}, {}
    for name in ("kind", "side") if "agree" in target.attributes else ():
        true = target.attributes[name]
        told = np.where(target.attributes["agree"] == 1, true, -1)  # -1: the words do not say, or say something else
        readers[name] = linear_reader(known.flatten(1), torch.from_numpy(true[train]).to(known.device))
        truths[name] = torch.from_numpy(told[rows]).to(known.device)
        ceiling[name] = agreement(readers[name], tokens, truths[name])
    return {"rows": rows, "real": tokens.mean(1).cpu().numpy(), "readers": readers, "truths": truths, "n": n,
            "floor": floor, "ceiling": ceiling}


@torch.no_grad()
def agreement(reader, tokens, truth):
    """Share of the images whose attribute the reader finds, of those whose words state it."""
    return float((reader(tokens.flatten(1)) == truth)[truth >= 0].float().mean())


def judged(cfg, ctx, model, seed):
    """{'frechet', 'agreement_kind', 'agreement_side'} of images sampled from the words of held-out rows."""
    known = ctx["judge"][seed]
    tokens = judge_tokens(ctx["judge"]["vit"], sample_images(cfg, ctx, model, known["rows"]))
    found = {f"agreement_{k}": agreement(known["readers"][k], tokens, truth) for k, truth in known["truths"].items()}
    return {"frechet": metrics.frechet(known["real"], tokens.mean(1).cpu().numpy())} | found


# -------------------------------------------------------------------------------------------------------- what is shown


def table(report, timings):
    """Held-out denoising loss per method, x 1e5, mean ± standard deviation over seeds; the gap closed between the
    unadapted base and full fine-tuning; and what the judge found.
    """
    title = f"{report['data']}, {data.origin(report)}; held-out denoising loss x 1e5, seeds: {len(report['seeds'])}"
    judge = report["judge"] or {"floor": [], "ceiling": {}}
    shown = ["frechet"] * bool(judge["floor"]) + [f"agreement_{k}" for k in judge["ceiling"]]
    lines = ["", title, f"{'method':22s}{'held-out':>14s}{'adapter':>10s}{'gap closed':>12s}{'seconds':>9s}"
             + "".join(f"{k.replace('_', ' '):>16s}" for k in shown)]
    none, full = (np.array(report["methods"][k]["heldout_loss"]) for k in REFERENCES)
    for name, m in report["methods"].items():
        loss, seconds = np.array(m["heldout_loss"]), [timings.get(f"{name}-s{s}", 0.0) for s in report["seeds"]]
        closed = f"{(none - loss).mean() / (none - full).mean():.0%}" if (full < none).all() else "-"
        line = (f"{name:22s}{loss.mean() * 1e5:9.0f} ±{loss.std() * 1e5:3.0f}{np.mean(m['adapter_params']):10,.0f}"
                f"{closed:>11s} {np.mean(seconds):9.1f}")
        lines.append(line + "".join(f"{np.mean(m[k]):16.3f}" for k in shown))
    if shown:
        real = [np.mean(judge["floor"]), *(np.mean(v) for v in judge["ceiling"].values())]
        lines += [f"{'real images':67s}" + "".join(f"{v:16.3f}" for v in real),
                  f"judge: {judge['features']}; {judge['n']} held-out rows. Not Inception FID: compare rows here"]
    return "\n".join([*lines, "", *conclusion(report)])


def conclusion(report):
    """Sentences computed from the table: what adapting and growing gained, paired by seed."""
    methods, seeds = report["methods"], len(report["seeds"])
    loss = {k: np.array(m["heldout_loss"]) * 1e5 for k, m in methods.items()}
    mean = lambda k, part: np.mean(methods[k][part])
    budgets = [b for b in ("r1", "r2", "as ratio") if f"neyman {b}" in methods]
    for b in budgets:
        names = [f"{rule} {b}" for rule in ("replay", *COMPARED) if f"{rule} {b}" in methods]
        best = min(names, key=lambda k: mean(k, "val_loss"))
        yield (f"At {mean(f'neyman {b}', 'adapter_params'):,.0f} parameters the validation half chooses {best} "
               f"({loss[best].mean():.0f} on the test half; least there: {min(loss[k].mean() for k in names):.0f})")
        pairs = [("neyman", k) for k in ("fixed", "cheapest", "inverse-cost")]
        pairs += [("gain", "fixed"), ("gain", "cheapest"), ("gain", "neyman")] if b != "as ratio" else []
        for ours, other in pairs + [("ratio", k) for k in ("replay", "neyman", "random")] * (b == "as ratio"):
            ours, other = "ratio" if ours == "ratio" else f"{ours} {b}", f"{other} {b}"
            if other in methods:
                d = loss[ours] - loss[other]
                yield (f"  {ours} minus {other}: {' '.join(f'{x:+.0f}' for x in d)}, mean {d.mean():+.0f}, "
                       f"better on {int((d < 0).sum())} of {seeds} seeds")
    if budgets:
        return
    name = next(k for k in methods if k not in REFERENCES)
    gap, closed = loss["unadapted"] - loss["full"], loss["unadapted"] - loss[name]
    if (gap > 0).all():
        everything = methods["full"]["trainable_params"][0]
        yield (f"{name} closes {closed.mean() / gap.mean():.0%} of the gap between the frozen base and full "
               f"fine-tuning with {mean(name, 'adapter_params'):,.0f} parameters instead of {everything:,}.")
    else:
        yield "Full fine-tuning does not beat the frozen base on every seed: there is no gap to close."
    if name in selora.GROWTH:
        yield "Whether growing was worth it, only a comparison at equal parameters can say: --rules-table."
    if seeds == 1:
        yield "One seed: an illustration, not evidence."


def kind_of(layer):
    """What sort of layer a name belongs to."""
    sorts = {"text.": "text encoder", "to_pixels": "attention, pixels", "to_words": "attention, words", "mlp": "MLP",
             "time": "timestep", "prompt": "timestep", "gate": "timestep", "skip": "convolution 1x1"}
    return next((sort for part, sort in sorts.items() if part in layer), "convolution 3x3")


def rank_bars(report):
    """{method: {kind of layer: mean final rank over layers and seeds}}."""
    bars = {}
    for name, m in report["methods"].items():
        for layer, rank in ((layer, rank) for ranks in m["ranks"] for layer, rank in ranks.items()):
            bars.setdefault(name, {}).setdefault(kind_of(layer), []).append(rank)
    return {name: {kind: float(np.mean(r)) for kind, r in kinds.items()} for name, kinds in bars.items()}


def pyplot():
    """matplotlib's, or None where the `pictures` extra is not installed."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt


def rank_figure(cfg, report):
    """ranks.png: rank per layer over steps of the first rule at seed 0, and final ranks by kind of layer; without
    matplotlib the latter as text.
    """
    bars, plt = rank_bars(report), pyplot()
    if plt is None:
        for name, kinds in bars.items():
            print(f"{name}: mean rank by kind of layer")
            print(*(f"  {kind:20s} {rank:4.1f} {'█' * round(4 * rank)}" for kind, rank in kinds.items()), sep="\n")
        return print("no figures: pip install 'minilora[pictures]' draws them")
    name = next(iter(bars))
    history = report["methods"][name]["history"][0]
    layers = list(history[0][1])
    over = np.zeros((len(layers), cfg.steps), int)  # rank of each layer at each step
    for step, ranks in history:
        over[:, step:] = np.array([ranks[layer] for layer in layers])[:, None]
    fig, (left, right) = plt.subplots(1, 2, figsize=(12, 6.2), dpi=120, width_ratios=(1.5, 1))
    shown = left.imshow(over, aspect="auto", interpolation="nearest", cmap="viridis", vmin=0, vmax=max(2, over.max()))
    left.set_yticks(range(len(layers)), [layer.replace("unet.", "") for layer in layers], fontsize=5)
    left.set(xlabel="step", title=f"{name}, seed 0: rank of each layer")
    fig.colorbar(shown, ax=left, ticks=range(max(2, over.max()) + 1))
    kinds, some = list(bars[name]), list(bars)[:7]
    for i, method in enumerate(some):
        place = np.arange(len(kinds)) + (i - (len(some) - 1) / 2) * 0.8 / len(some)
        right.barh(place, [bars[method][k] for k in kinds], 0.8 / len(some), label=method)
    right.set_yticks(range(len(kinds)), kinds, fontsize=8)
    right.invert_yaxis()
    right.set(xlabel="rank, mean over layers and seeds", title="final ranks by kind of layer")
    if len(some) > 1:
        right.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    fig.suptitle(f"{report['data']}, {data.origin(report)}", fontsize=9)
    fig.tight_layout()
    fig.savefig(cfg.out / "ranks.png")
    plt.close(fig)
    print(f"figure: {cfg.out / 'ranks.png'}")


def sheet(cfg, ctx, model, name):
    """A sheet of samples beside the real images of the same words (seed 0's test split); without matplotlib an .npy of
    the samples.
    """
    rows, target, plt = ctx["parts"][0]["test"][:8], ctx["target"], pyplot()
    drawn, path = sample_images(cfg, ctx, model, rows), cfg.out / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if plt is None:
        buffer = io.BytesIO()
        np.save(buffer, drawn)
        data.write_atomic(path.with_suffix(".npy"), buffer.getvalue())
        return print(f"samples: {path.with_suffix('.npy')}")
    real = data.resize(target.images[rows], cfg.image_size)
    fig, axes = plt.subplots(2, len(rows), figsize=(1.7 * len(rows), 4.4), dpi=120, squeeze=False)
    for column, row in enumerate(rows):
        for ax, image in zip(axes[:, column], (real[column], drawn[column])):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255)
            ax.axis("off")
        axes[0, column].set_title(textwrap.fill(str(target.notes[row])[:90] or "(no words)", 24), fontsize=5)
    fig.suptitle(f"{target.name}: real (top), sampled from the same words (bottom)", fontsize=9)
    fig.tight_layout()
    fig.savefig(path)
    plt.close(fig)
    print(f"figure: {path}")


# ---------------------------------------------------------------------------------------------------------------- main


def check(cfg):
    """Refuse what cannot be run, before data is read; returns the denoiser's configuration."""
    if cfg.rule not in RULES:
        raise Refused(f"rule '{cfg.rule}' is not known; use {', '.join(RULES)}")
    if cfg.ratio_of not in ("sampled", "expected") or cfg.fisher not in ("probe", "loop"):
        raise Refused(f"--ratio-of '{cfg.ratio_of}' must be sampled or expected, --fisher '{cfg.fisher}' probe or loop")
    if (cfg.rule == "replay") != (cfg.replay is not None):
        raise Refused("--rule replay and --replay RUN go together")
    for name in ("seeds", "capacity", "every", "steps", "batch", "vae_steps", "pretrain_steps", "phantoms",
                 "sample_steps", "image_size", "factor", "latent", "vae_width", "width", "text_width", "heads"):
        if getattr(cfg, name) < 1:
            raise Refused(f"--{name.replace('_', '-')} is {getattr(cfg, name)}; must be at least 1")
    if cfg.rules_table and cfg.capacity < 2:
        raise Refused(f"--rules-table compares ranks 1 and 2; --capacity is {cfg.capacity}")
    if cfg.rule in selora.GROWTH and not probe_steps(cfg, cfg.rule, cfg.rank):
        raise Refused(f"--steps {cfg.steps} ends before the first probe, --every {cfg.every}: nothing would grow")
    if not 0 <= cfg.rank <= cfg.capacity:
        raise Refused(f"--rank {cfg.rank} is outside 0..{cfg.capacity}, the capacity")
    if cfg.rank == 0 and cfg.rule == "fixed":
        raise Refused("--rank 0 with --rule fixed would train nothing; use --rank 1 or more")
    if cfg.buckets < 16 or cfg.positions < 2 or not 0 <= cfg.guidance < 1e6 or not 0 < cfg.lr < 10:
        raise Refused("--buckets must be at least 16, --positions 2, --guidance 0, --lr in (0,10)")
    if not 0 < cfg.train_share <= 1:
        raise Refused(f"--train-share is {cfg.train_share}; must be in (0,1]")
    if cfg.budget < 0 or cfg.sample_every < 0 or cfg.text_depth < 0 or not 0 <= cfg.lam < 1e9:
        raise Refused(f"--budget {cfg.budget}, --sample-every {cfg.sample_every}, --text-depth {cfg.text_depth} and "
                      f"--lam {cfg.lam} must be numbers of at least 0")
    try:
        vae = VAE(cfg.image_size, 1, cfg.latent, cfg.factor, cfg.vae_width)
        config = dict(latent=cfg.latent, size=vae.size, width=cfg.width, heads=cfg.heads, buckets=cfg.buckets,
                      positions=cfg.positions, text_width=cfg.text_width, text_depth=cfg.text_depth)
        Denoiser(**config)
        diffusion.alphas_cumprod(kind=cfg.schedule)
        diffusion.timesteps(cfg.sample_steps)
    except ValueError as error:  # sizes that do not fit together
        raise Refused(str(error)) from None
    return config


def check_adapters(cfg, config):
    """Refuse targets, budget and ranks to replay that do not fit the denoiser; returns (what rank 1 everywhere costs,
    {seed: ranks to replay}).
    """
    model, ranks = Denoiser(**config), {}
    try:
        selora.inject(model, cfg.targets or None, 0, cfg.capacity)
    except ValueError as error:
        raise Refused(str(error)) from None
    cost = sum(selora.adapter_cost(layer) for layer in selora.adapters(model).values())
    if cfg.budget and cfg.budget < cost:
        raise Refused(f"--budget {cfg.budget:,} is below the {cost:,} parameters that rank 1 in every layer costs")
    budget = cfg.budget or 2 * cost
    if cfg.rule in ("gain", "random", "cheapest") and not cfg.rules_table and budget <= cfg.rank * cost:
        raise Refused(f"--rank {cfg.rank} in every layer costs {cfg.rank * cost:,}, and rule '{cfg.rule}' may spend "
                      f"{budget:,}: nothing is left to grow; lower --rank or raise --budget")
    if cfg.replay:
        report = checkpoint.read_json(cfg.replay / "metrics.json")
        try:
            if report["kind"] != "selora":
                raise KeyError
            runs = next(m["ranks"] for name, m in report["methods"].items() if name not in REFERENCES)
        except (AttributeError, KeyError, StopIteration, TypeError):
            raise Refused(f"--replay {cfg.replay}: not a finished run of train_selora.py") from None
        if len(runs) < cfg.seeds:
            raise Refused(f"--replay {cfg.replay}: has {len(runs)} seeds; --seeds {cfg.seeds} need as many")
        ranks = dict(enumerate(runs[:cfg.seeds]))
        for seed in ranks:
            try:
                selora.set_ranks(copy.deepcopy(model), ranks[seed])
            except ValueError as error:
                raise Refused(f"--replay {cfg.replay}: a run of another model: {error}") from None
    return cost, ranks


def read_study(cfg, path, domain, seed):
    """A study with images and words."""
    if path is None:
        return data.phantoms(cfg.phantoms, seed, domain, cfg.image_size).select(("image", "note"))
    study = data.load_study(path)
    study = data.attach_notes(study) if cfg.synthetic_notes and study.notes is None else study
    return study.select(("image", "note"), need_every_sample=False)


@torch.no_grad()
def latents(vae, images):
    """Posterior means [N,L,s,s] of images [N,ch,S,S]."""
    return torch.cat([vae.encode(part)[0] for part in images.split(256)])


def dry_run(cfg, config, cost, jobs, device):
    """Print counts, parameters, memory and an estimate of time from three timed steps."""
    held, draw = [0], torch.Generator().manual_seed(0)
    z = torch.randn(cfg.batch, cfg.latent, config["size"], config["size"], generator=draw).to(device)
    ids = torch.randint(3, cfg.buckets, (cfg.batch, cfg.positions), generator=draw).to(device)
    t = torch.randint(0, 1000, (cfg.batch,), generator=draw).to(device)

    def pack(tensor):  # what autograd keeps for the backward
        held[0] += tensor.element_size() * tensor.numel()
        return tensor

    model, times = Denoiser(**config).to(device), []
    total = sum(p.numel() for p in model.parameters())
    layers = len(selora.inject(model, cfg.targets or None, 1, cfg.capacity))
    for _ in range(4):
        began, held[0] = time.monotonic(), 0
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = diffusion.denoising_loss(model, z, ids, t, z)
        loss.backward()
        loss.item()  # waits for a GPU
        times.append(time.monotonic() - began)
    each, runs = float(np.median(times[1:])), sum(job["rule"] != "unadapted" for job in jobs) * cfg.seeds
    print(f"denoiser {total:,} parameters, {layers} layers adapted; an adapter of rank 1 has {cost:,}, of rank "
          f"{cfg.capacity} {cfg.capacity * cost:,}")
    print(f"memory: weights {4 * total / 2**20:.1f} MiB, about {held[0] / 2**20:.0f} MiB for the activations of a step")
    print(f"time: {each * 1e3:.0f} ms a step, {runs} runs of {cfg.steps} steps: about "
          f"{each * cfg.steps * runs / 60:.1f} min on {device}; about {each * cfg.pretrain_steps / 60:.1f} min before "
          "that if no base is cached")


def main(argv=None):
    cfg = tyro.cli(Config, args=argv, description=Config.__doc__)
    checkpoint.guarded(run, cfg, PRESETS)


def prepare(cfg, config, source, target, device, stop):
    """Images -> latents, words -> ids, and the base: autoencoder and denoiser, pretrained on the source or cached."""
    channels = 3 if 4 in (target.images.ndim, source.images.ndim) else 1
    images = {k: torch.from_numpy(data.prepare_images(s.images, cfg.image_size, channels)).to(device)
              for k, s in (("source", source), ("target", target))}
    words = {k: torch.from_numpy(data.tokenize(s.notes, cfg.buckets, cfg.positions)).to(device)
             for k, s in (("source", source), ("target", target))}
    fixed = [2, data.fingerprint(source), channels, cfg.image_size, cfg.latent, cfg.factor, cfg.vae_width,
             cfg.vae_steps]
    path = Path(f"runs/base/vae-{data.digest(fixed)[:16]}.pt")
    vae = checkpoint.first(partial(train_vae, cfg, images["source"], device, path, stop))
    z = {k: latents(vae, x) for k, x in images.items()}
    for k, x in images.items():
        error = torch.cat([vae.decode(part) for part in z[k].split(256)]).sub(x).square().mean().item()
        print(f"autoencoder: mean squared error {error:.4f} on the {k}, images in [-1,1]")
    alphas = diffusion.alphas_cumprod(kind=cfg.schedule, device=device)
    base_hash = data.digest([*fixed, config, cfg.schedule, cfg.pretrain_steps, cfg.batch])[:16]
    path = Path(f"runs/base/unet-{base_hash}.pt")
    base = checkpoint.first(partial(pretrain, cfg, config, z["source"], words["source"], alphas, device, path, stop))
    return {"config": config, "base": base, "base_hash": base_hash, "vae": vae, "z": z["target"],
            "ids": words["target"], "alphas": alphas}


def collect(cfg, target, judge, results):
    """The content of metrics.json from {method: [content per seed]}."""
    methods = {name: {k: [r["result"][k] for r in runs] for k in runs[0]["result"]}
               | {k: [r[k] for r in runs] for k in ("adapter_params", "trainable_params", "ranks", "history")}
               for name, runs in results.items()}
    known = [judge[seed] for seed in range(cfg.seeds)] if judge else []
    verdict = {"run": str(cfg.judge), "features": "mean last token of the frozen ViT of train_mora.py",
               "n": known[0]["n"], "floor": [j["floor"] for j in known],
               "ceiling": {k: [j["ceiling"][k] for j in known] for k in known[0]["ceiling"]}} if judge else None
    return {"format": 1, "kind": "selora", "data": target.name, "synthetic": target.synthetic,
            "synthetic_notes": target.synthetic_notes, "seeds": list(range(cfg.seeds)), "methods": methods,
            "judge": verdict}


def run(cfg, stop):
    config, device = check(cfg), checkpoint.pick_device(cfg.device)
    torch.backends.cudnn.allow_tf32 = False  # as in train_mora.py: as exact as the exported graphs
    cost, replay = check_adapters(cfg, config)
    vit = load_judge(cfg.judge, device, cfg.data) if cfg.judge else None
    if cfg.source and cfg.data and data.sha256(cfg.source) == data.sha256(cfg.data):
        raise Refused(f"--source {cfg.source} is the --data file: the base would see the held-out images")
    target, source = read_study(cfg, cfg.data, "target", 2), read_study(cfg, cfg.source, "source", 1)
    source = source.take(source.have()[:, 0])
    drawable = np.flatnonzero(target.have()[:, 0])  # a sample without its image teaches nothing here
    if not len(source) or not len(drawable):
        raise Refused(f"{cfg.data if len(source) else cfg.source}: every image is missing (all black)")
    for what, study in (("source", source), ("target", target)):
        about = " (synthetic)" * study.synthetic + " (synthetic notes)" * study.synthetic_notes
        print(f"{what}: {study.name}{about}, {len(study)} samples, {int(study.have()[:, 1].sum())} with words")
    if len(drawable) < len(target):
        print(f"left out: {len(target) - len(drawable)} samples of the target that lack their image")
    parts, jobs = {seed: data.split(target, seed, cfg.train_share) for seed in range(cfg.seeds)}, jobs_of(cfg, cost)
    parts = {seed: data.none_empty(target, {k: np.intersect1d(rows, drawable) for k, rows in part.items()})
             for seed, part in parts.items()}
    if cfg.dry_run:
        return dry_run(cfg, config, cost, jobs, device)

    identity = checkpoint.open_run(cfg)
    for seed, rows in parts.items() if checkpoint.leader() else ():
        data.write_atomic(cfg.out / f"split-s{seed}.npz", data.npz_bytes(rows))
    ctx = prepare(cfg, config, source, target, device, stop) | {
        "target": target, "parts": parts, "replay": replay, "judge": {}, "stop": stop,
        "log": checkpoint.Log(cfg.out / "log.jsonl", cfg.tensorboard and cfg.out / "tensorboard")}
    results = {job["name"]: [] for job in jobs}
    for seed in range(cfg.seeds):  # seed by seed: the first whole comparison is there early
        if vit:
            ctx["judge"]["vit"] = vit
            ctx["judge"][seed] = prepare_judge(ctx, seed)
        for job in jobs:
            results[job["name"]].append(run_job(cfg, ctx, job, seed))

    if not checkpoint.leader():
        return
    kept, vae = next(job["name"] for job in jobs if job["rule"] not in REFERENCES), ctx["vae"]
    checkpoint.save(cfg.out / "model.pt", {
        "format": 1, "kind": "selora", "config": config, "base": ctx["base"], "base_hash": ctx["base_hash"],
        "vae_config": vae.config, "vae": vae.state_dict(), "schedule": cfg.schedule, "targets": cfg.targets,
        "capacity": cfg.capacity, "adapter": results[kept][0], "data": identity["data"] or target.name,
        "study": data.fingerprint(target), "synthetic": target.synthetic, "synthetic_notes": target.synthetic_notes})
    report = collect(cfg, target, ctx["judge"], results)
    checkpoint.write_json(cfg.out / "metrics.json", report)
    print(table(report, checkpoint.read_json(cfg.out / "timings.json", {})))
    rank_figure(cfg, report)
    model = base_model(ctx)
    selora.inject(model, cfg.targets or None, 0, cfg.capacity)
    selora.load_adapter(model, results[kept][0]["state"])
    sheet(cfg, ctx, model.eval(), "samples.png")
    print(f"run folder: {cfg.out}; export {kept}, seed 0, with: python export.py selora {cfg.out}")


if __name__ == "__main__":
    main()
