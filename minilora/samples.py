"""What is measured, drawn, judged and shown of a run of train_selora.py. Skip it when you read for
the method.

Letters: n images or rows, N samples, S image size, P word positions.
"""

from dataclasses import replace

import numpy as np
import torch

from minilora import data, diffusion, judge, report, report_selora
from minilora.processes import average, world


def stratified(part, within, steps):
    """Timesteps [n] int64, each from its part [n] of n equal parts of a schedule, at `within`, in
    [0, 1], of that part."""
    t = (part + within) / len(part) * steps
    return t.long().clamp(max=steps - 1)  # rounding reaches the end now and then


@torch.no_grad()
def heldout_loss(model, pairs, rows, draws=8):
    """Mean denoising loss over the rows with fixed timesteps (stratified) and noise: differences
    are the model's. Of several processes each takes a part of the rows."""
    device = pairs.z.device
    steps = len(pairs.alphas)
    n = len(rows)
    rank, processes = world()
    rows = torch.from_numpy(rows).to(device)
    total = torch.zeros(1, dtype=torch.float64)
    for k in range(draws):
        generator = torch.Generator().manual_seed(10_000 + k)
        t = stratified(torch.arange(n), torch.rand(n, generator=generator), steps)  # [n]
        t = t[torch.randperm(n, generator=generator)].to(device)
        noise = torch.randn(n, *pairs.z.shape[1:], generator=generator).to(device)
        for part in torch.arange(rank, n, processes, device=device).split(256):
            z = pairs.z[rows[part]]
            ids = pairs.ids[rows[part]]
            losses = diffusion.denoising_loss(
                model, z, ids, t[part], noise[part], pairs.alphas, per_sample=True
            )
            total += losses.sum().item()
    total = total.to(device)
    average([total])
    return total.item() * processes / draws / n


def evaluate(cfg, judging, model, vae, pairs, parts):
    """Held-out losses on both halves, and what the judge, if there is one, finds in images drawn
    from the held-out words."""
    result = {
        "heldout_loss": heldout_loss(model, pairs, parts["test"]),
        "val_loss": heldout_loss(model, pairs, parts["val"]),
    }
    if judging:
        result |= judged(cfg, judging, model, vae, pairs, control=not cfg.rules_table)
    return result


def notes_with(ids, buckets):
    """How many of the notes, word ids [n,P], have each word, [buckets]."""
    ids = ids.sort(1).values
    is_first = torch.ones_like(ids, dtype=torch.bool)
    is_first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return ids[is_first].bincount(minlength=buckets)


def draw(cfg, model, vae, pairs, rows, seeds):
    """uint8 images [n,S,S] or [n,S,S,3] from the words of the rows, as the configuration of
    train_selora.py samples them; seeds [n] draw their noise."""
    ids = pairs.ids[rows]
    steps = cfg.sample_steps
    return diffusion.draw_images(model, vae, ids, seeds, steps, cfg.guidance, pairs.alphas)


def pixels(study, vae, rows=slice(None)):
    """Images [n,ch,S,S] in [-1,1] of the rows of a study, as the autoencoder takes them, where it
    is."""
    channels, size, _ = vae.image_shape
    x = data.prepare_images(study.images[rows], size, channels)
    return torch.from_numpy(x).to(vae.shift.device)


def look(study, vae, rows):
    """uint8 images of the rows, in the size and the channels of drawn ones."""
    return diffusion.pictures(pixels(study, vae, rows))


@torch.no_grad()
def through(vae, study, rows):
    """uint8 images of the rows, encoded and decoded, with the autoencoder's grain: the best that
    anything drawn in its latents can be."""
    generator = torch.Generator().manual_seed(0)
    images = []
    for part in pixels(study, vae, rows).split(256):
        mean, _ = vae.encode(part)
        noise = torch.randn(part.shape, generator=generator).to(part)
        images.append(vae.decode(mean, noise))
    return diffusion.pictures(torch.cat(images))


def set_grain(cfg, vae, study, train):
    """Measure the noise that the autoencoder leaves out, on training rows; 0 with --no-grain."""
    if cfg.grain:
        vae.measure_grain(pixels(study, vae, train[:2000]))


def judge_of(vit, study, vae, train, rows, seed, new=None):
    """The judge of the rows, and what it says of their real images through the autoencoder."""
    training = look(study, vae, train)
    own = look(study, vae, rows)
    judging = judge.prepare(vit, study, train, rows, seed, (training, own), new)
    judging.autoencoder = judge.verdict(judging, through(vae, study, judging.rows))
    return judging


def judged(cfg, judging, model, vae, pairs, control=True):
    """What the judge says of images drawn from the words of its rows, and, as a control, of images
    from the same noise with guidance 0, which ignores the words."""
    rows = judging.rows
    result = judge.verdict(judging, draw(cfg, model, vae, pairs, rows, rows))
    if not control:
        return result
    wordless = replace(cfg, guidance=0.0)
    control = judge.verdict(judging, draw(wordless, model, vae, pairs, rows, rows))
    for fact in judging.facts():
        result[f"{fact}, words ignored"] = control[fact]
    return result


def judge_base(cfg, vit, source, pairs, heldout, model, vae):
    """What the judge says of the source's held-out images and of those that the base draws from
    their words, printed: where quality is lost before anything is adapted."""
    train = np.setdiff1d(np.arange(len(source)), heldout)
    set_grain(cfg, vae, source, train)
    judging = judge_of(vit, source, vae, train, heldout, 0)
    result = judge.described(judging)
    result["base"] = judged(cfg, judging, model, vae, pairs)
    print(report_selora.base_table(result))
    return result


def show(cfg, target, split, pairs, vae, models):
    """Draw samples.png, from the first words of the held-out split, and strip.png, from noise to
    image; models {label: denoiser}, the base and the adapted one."""
    rows = split["test"][:6]
    (before, base), (after, adapted) = models.items()
    drawn = []
    for k in range(3):
        seeds = 10**6 * k + rows
        drawn.append(draw(cfg, adapted, vae, pairs, rows, seeds))
    real = look(target, vae, rows)
    training = look(target, vae, split["train"])
    which, distance = judge.nearest(drawn[0], training)
    _, usual = judge.nearest(real, training)
    distances = []
    for drawn_one, real_one in zip(distance, usual):
        distances.append(f"distance {drawn_one:.0f}; real: {real_one:.0f}")
    lines = [
        ("real", real, None),
        (before, draw(cfg, base, vae, pairs, rows, rows), None),
        (after, drawn[0], None),
        ("other noise", drawn[1], None),
        ("other noise", drawn[2], None),
        ("training image nearest to row 3", training[which], distances),
    ]
    title = f"{target.name}: the first {len(rows)} held-out samples, guidance {cfg.guidance:g}"
    report.grid(cfg.out / "samples.png", title, notes_of(target, rows), lines)
    strip(cfg, target, rows[:3], pairs, vae, adapted)


def notes_of(study, rows):
    """The words of the rows, as a picture shows them."""
    return [str(note) or "(no words)" for note in study.notes[rows]]


def strip(cfg, target, rows, pairs, vae, model):
    """Draw strip.png: what the latents decode to, from noise to image."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(len(rows), *vae.latent_shape, generator=generator).to(pairs.z.device)
    trail = [z]
    ids = pairs.ids[rows]
    diffusion.sample(model, z, ids, cfg.sample_steps, cfg.guidance, pairs.alphas, trail)
    shown = np.linspace(0, len(trail) - 1, min(10, len(trail)))
    shown = shown.round().astype(int)
    columns = []
    for k in shown:
        with torch.no_grad():
            decoded = vae.decode(trail[k])
        columns.append(diffusion.pictures(decoded))
    images = np.stack(columns, 1)  # [n,10,S,S]
    notes = notes_of(target, rows)
    lines = [(note, row, None) for note, row in zip(notes, images)]
    title = f"{target.name}: from noise to image"
    report.grid(cfg.out / "strip.png", title, [f"step {k}" for k in shown], lines)
