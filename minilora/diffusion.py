"""Noise schedule, training loss and sampler: they turn a network into a generator of images.

    z_t = sqrt(a_t) z_0 + sqrt(1 - a_t) noise,  a_t = alphas_cumprod[t]
    v_t = sqrt(a_t) noise - sqrt(1 - a_t) z_0

Training predicts the velocity v_t (Salimans and Ho, arXiv 2202.00512). (z_t, v_t) is (z_0, noise)
rotated, so both can be read off by rotating back, at any a_t, 0 included. Sampling walks back from
pure noise by DDIM (Song et al., arXiv 2010.02502), which is deterministic: the same noise and words
give the same image. A `model` is any callable (z_t, t, ids) -> v_t.

Skip this file if you know DDIM, velocity and classifier-free guidance: nothing in it is adapted.

Letters: B batch, L latent channels, S latent size, P word positions.
"""

import math

import torch
import torch.nn.functional as F

PAD = 0  # word ids, as `words.tokenize` writes them: padding, and
CLS = 1  # the classification token that starts every prompt


def alphas_cumprod(steps=1000, noisier=9.0, device=None):
    """Share of signal a_t [steps], float64, falling, in [0, 1): a_t = 1 / (1 + noisier . tan^2 of an
    angle that grows linearly with t to 90 degrees).

    noisier = 1 is the cosine schedule (Nichol and Dhariwal, arXiv 2102.09672). More multiplies the
    variance of the noise over that of the signal (Hoogeboom et al., arXiv 2301.11093): more of the
    timesteps then decide what is drawn, where the words matter. It ends at no signal, which is what
    sampling starts from (Lin et al., arXiv 2305.08891). ValueError for what gives no schedule."""
    if steps < 1:
        raise ValueError(f"a schedule of {steps} steps; need at least 1")
    if not 0 < noisier < math.inf:
        raise ValueError(f"a schedule {noisier} times as noisy; need a number above 0")
    angle = torch.linspace(0, math.pi / 2, steps + 1, dtype=torch.float64, device=device)[1:]
    return angle.cos() ** 2 / (angle.cos() ** 2 + noisier * angle.sin() ** 2)


def diffuse(z, noise, alpha):
    """(z_t, v_t), each [B,L,S,S], of latents and noise of that shape; alpha [B] or a number is a_t."""
    alpha = alpha.to(z).reshape(-1, *[1] * (z.dim() - 1))  # [B,1,1,1]
    signal = alpha.sqrt()
    rest = (1 - alpha).sqrt()
    return signal * z + rest * noise, signal * noise - rest * z


def denoising_loss(model, z, ids, t, noise, alphas=None, per_sample=False):
    """Mean squared error of the predicted velocity: a scalar, or [B] with `per_sample`.

    z [B,L,S,S] clean latents, ids [B,P], t [B] int64 in [0, steps), noise [B,L,S,S]: all drawn
    outside, so that a held-out loss can fix them. `alphas` is the schedule, by default
    `alphas_cumprod()`."""
    if alphas is None:
        alphas = alphas_cumprod(device=z.device)
    noisy, velocity = diffuse(z, noise, alphas[t])
    error = F.mse_loss(model(noisy, t, ids), velocity, reduction="none")  # [B,L,S,S]
    return error.flatten(1).mean(1) if per_sample else error.mean()


def null_prompt(ids):
    """The prompt that says nothing, for each row of ids [B,P]: the classification token, then
    padding. Never all padding, over which a softmax is NaN."""
    return torch.cat([torch.full_like(ids[:, :1], CLS), torch.full_like(ids[:, 1:], PAD)], 1)


def drop_words(ids, generator, p=0.1):
    """ids [B,P] in which each row became the null prompt with probability p: one network then
    learns the conditional and the unconditional model (Ho and Salimans, arXiv 2207.12598).
    `generator` is seeded by the caller per step."""
    drop = torch.rand(ids.shape[0], 1, generator=generator, device=generator.device) < p  # [B,1]
    return torch.where(drop.to(ids.device), null_prompt(ids), ids)


def timesteps(steps, schedule=1000):
    """`steps` timesteps, int64, falling and evenly spaced, from the last of the schedule on.

    20 of 1000 are 999, 949, ..., 49 ("trailing", Lin et al., arXiv 2305.08891: pure noise is what
    the network expects at the first one). ValueError unless 1 <= steps <= schedule."""
    if not 1 <= steps <= schedule:
        raise ValueError(f"{steps} sampling steps; need 1 to {schedule}, the length of the schedule")
    return (torch.arange(steps, 0, -1, dtype=torch.float64) * schedule / steps).round().long() - 1


def ddim_step(z, v, alpha_t, alpha_prev):
    """z at the next, less noisy timestep: read z_0 and the noise off the predicted velocity, then
    mix them as `alpha_prev` asks for (arXiv 2010.02502, eq. 12 with sigma = 0). alpha_prev = 1 gives
    z_0. A pure function of tensors [B,L,S,S] and numbers [], so that a graph's loop can hold it."""
    z0 = alpha_t.sqrt() * z - (1 - alpha_t).sqrt() * v
    noise = (1 - alpha_t).sqrt() * z + alpha_t.sqrt() * v
    return alpha_prev.sqrt() * z0 + (1 - alpha_prev).sqrt() * noise


def guide(both, guidance, alpha):
    """Classifier-free guidance of both predictions, [2B,L,S,S]: 0 ignores the words, 1 takes the
    conditional one, more exaggerates what they say; but not while nearly all is noise, where it
    would exaggerate the mean image (Kynkäänniemi et al., arXiv 2404.07724)."""
    conditional, null = both.unflatten(0, (2, -1)).unbind(0)  # each [B,L,S,S]
    guidance = torch.where(alpha < 0.005, guidance.clamp(max=1), guidance)
    return null + guidance * (conditional - null)


@torch.no_grad()
def sample(model, noise, ids, steps=10, guidance=3.0, alphas=None, trail=None):
    """Latents [B,L,S,S] from noise [B,L,S,S] ~ normal(0, 1) and word ids [B,P], by `steps`
    deterministic DDIM steps at the `timesteps`. Sample b depends on row b only. `trail`, a list,
    gets the latents after every step. ValueError if steps is outside [1, schedule] or guidance is
    negative."""
    if alphas is None:
        alphas = alphas_cumprod(device=noise.device)
    if not 0 <= guidance < math.inf:
        raise ValueError(f"guidance {guidance} is not a number of at least 0")
    walk = timesteps(steps, len(alphas)).tolist()
    # Shares of signal along the walk, [steps + 1]: after the last step nothing is noise.
    signal = torch.cat([alphas[walk], alphas.new_ones(1)]).to(noise)
    guidance = signal.new_tensor(guidance)
    words = torch.cat([ids, null_prompt(ids)])  # [2B,P]
    z = noise
    for t, alpha_t, alpha_prev in zip(walk, signal, signal[1:]):
        both = model(torch.cat([z, z]), torch.full_like(words[:, 0], t), words)  # [2B,L,S,S]
        z = ddim_step(z, guide(both, guidance, alpha_t), alpha_t, alpha_prev)
        if trail is not None:
            trail.append(z)
    return z


@torch.no_grad()
def draw_images(model, vae, ids, seeds, steps=10, guidance=3.0, alphas=None):
    """uint8 images [B,S,S] or [B,S,S,3] from word ids [B,P], decoded by `vae`, in parts of 200;
    seeds[b] draws the noise of image b, then its grain."""
    images = []
    for start in range(0, len(ids), 200):
        rows = slice(start, start + 200)
        generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds[rows]]
        noise = [torch.randn(vae.latent_shape, generator=g) for g in generators]
        grain = [torch.randn(vae.image_shape, generator=g) for g in generators]
        z = sample(model, torch.stack(noise).to(ids.device), ids[rows], steps, guidance, alphas)
        images.append(vae.decode(z, torch.stack(grain).to(z)))  # [200,ch,S,S]
    return pictures(torch.cat(images))


def pictures(images):
    """uint8 [B,S,S] or [B,S,S,3] for numpy of images [B,ch,S,S], which are about [-1,1]."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    return (pixels[:, 0] if pixels.shape[1] == 1 else pixels.movedim(1, 3)).numpy()


@torch.no_grad()
def ema_update(average, model, decay):
    """Move `average`, a copy of the model, towards it in place: average = decay . average +
    (1 - decay) . model. Its samples are better than the model's own. Buffers and whatever is not a
    float are copied. ValueError if decay is outside [0, 1]."""
    if not 0 <= decay <= 1:
        raise ValueError(f"EMA decay {decay} is outside [0, 1]")
    for a, m in zip(average.parameters(), model.parameters()):
        a.lerp_(m.to(a), 1 - decay)
    for a, m in zip(average.buffers(), model.buffers()):
        a.copy_(m)
