"""The frozen base of SeLoRA: autoencoder, denoiser, schedule and sampler. One thread, fixed seeds."""

import copy
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch.utils.flop_counter import FlopCounterMode

import train_selora

from minilora import data
from minilora.phantoms import phantoms
from minilora.words import tokenize
from minilora.diffusion import (
    alphas_cumprod,
    ddim_step,
    denoising_loss,
    diffuse,
    draw_images,
    drop_words,
    ema_update,
    guide,
    null_prompt,
    pictures,
    sample,
    timesteps,
)
from minilora.unet import Attention, Block, Denoiser, attend
from minilora.vae import VAE, augment, vae_loss

SMALL = dict(size=8, width=16, text_width=16, text_depth=1, buckets=64)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def denoiser(**sizes):
    """A small model whose zero-initialised outputs are drawn, so that its inputs matter."""
    torch.manual_seed(0)
    model = Denoiser(**{**SMALL, **sizes})
    for layer in (model.unet.last, model.unet.gate):
        torch.nn.init.normal_(layer.weight, std=0.05)
    return model.eval()


def prompts(rows, positions=12, buckets=64):
    notes = ["ring shadow left side", "fever", "", "small mass on the right, weight loss"]
    return torch.from_numpy(tokenize([notes[i % 4] for i in range(rows)], buckets, positions))


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("image_size, channels, factor, latent", [(32, 1, 2, 4), (32, 1, 4, 4), (64, 3, 4, 4), (32, 3, 2, 3), (48, 1, 16, 8)])
def test_vae_shapes(image_size, channels, factor, latent):
    vae, s = VAE(image_size, channels, latent, factor, width=8), image_size // factor
    x = torch.rand(2, channels, image_size, image_size) * 2 - 1
    mean, log_variance = vae.encode(x)
    assert mean.shape == log_variance.shape == (2, *vae.latent_shape) == (2, latent, s, s)
    assert vae.decode(mean).shape == x.shape == (2, *vae.image_shape)
    assert VAE(**vae.config).config == vae.config


def test_the_defaults_of_both_networks_fit_together():
    """By default 32x32x1 -> 16x16x4, as the autoencoder says, and the denoiser takes that."""
    assert VAE().image_shape == (1, 32, 32) and VAE().latent_shape == (4, 16, 16)
    z = torch.randn(1, *VAE().latent_shape)
    assert Denoiser()(z, torch.tensor([7]), prompts(1)).shape == z.shape


@pytest.mark.parametrize("latent", [1, 4])
@pytest.mark.parametrize("size", [8, 16, 32])
def test_the_denoiser_halves_the_latent_twice_and_gives_its_shape_back(size, latent):
    model, shapes = denoiser(size=size, latent=latent, positions=20), {}
    for name in ("first", "down_attention", "downsample", "middle", "upsample", "last"):
        getattr(model.unet, name).register_forward_hook(lambda *hooked, name=name: shapes.__setitem__(name, tuple(hooked[2].shape[1:])))
    z, t = torch.randn(3, latent, size, size), torch.tensor([0, 500, 999])
    for words in (20, 7, 1):
        assert model(z, t, prompts(3, 20)[:, :words]).shape == z.shape
    fine, coarse = size // 2, size // 4
    assert shapes == {"first": (16, fine, fine), "down_attention": (fine**2, 16), "downsample": (32, coarse, coarse), "middle": (32, coarse, coarse),
                      "upsample": (16, fine, fine), "last": (4 * latent, fine, fine)}  # fmt: skip


def test_the_last_convolution_gives_four_neighbours_of_each_channel():
    """Channel 4l + 2i + j of it at (y, x) is the velocity's channel l at (2y + i, 2x + j), beside a share of the noisy latent."""
    model, z, outputs = denoiser(latent=2), torch.randn(1, 2, 8, 8), {}
    for name in ("last", "gate"):
        getattr(model.unet, name).register_forward_hook(lambda *hooked, name=name: outputs.__setitem__(name, hooked[2][0]))
    v = model(z, torch.tensor([500]), prompts(1))
    assert outputs["gate"].all()
    for channel in range(2):
        for i in range(2):
            for j in range(2):
                share = outputs["gate"][channel] * z[0, channel, i::2, j::2]
                torch.testing.assert_close(v[0, channel, i::2, j::2], outputs["last"][4 * channel + 2 * i + j] + share)


def test_a_fresh_denoiser_predicts_zero():
    model = Denoiser(**SMALL)
    assert not model(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), prompts(2)).any()


def test_attention_is_torchs():
    attention, x, context = Attention(12, 10, 3), torch.randn(2, 5, 12), torch.randn(2, 7, 10)
    bias = torch.zeros(2, 1, 1, 7)
    bias[1, ..., 4:] = float("-inf")
    k, v = attention.key_value(context).split(12, 2)
    q, k, v = (part.unflatten(2, (3, 4)).transpose(1, 2) for part in (attention.query(x), k, v))
    wanted = attention.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x, context, bias), wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(attention(x, context, bias)[1:], attention(x[1:], context[1:, :4], None), rtol=0, atol=1e-6)


def test_a_text_block_reads_tokens_and_a_pixel_block_words_too():
    """The same class: with no `context` there is nothing to read words with; padding reaches nothing in either."""
    text, pixels = Block(8, 2), Block(8, 2, 6)
    assert text.to_words is None and text.norm2 is None
    extra = {name for name, _ in pixels.named_parameters()} - {name for name, _ in text.named_parameters()}
    assert {name.split(".")[0] for name in extra} == {"norm2", "to_words"}
    x, words, padding = torch.randn(2, 5, 8), torch.randn(2, 4, 6), torch.zeros(2, 1, 1, 4)
    padding[1, ..., 2:] = float("-inf")
    h = text.norm1(x)
    h = x + text.to_tokens(h, h, None)
    torch.testing.assert_close(text(x), h + text.mlp(text.norm3(h)), rtol=0, atol=0)
    shorter = torch.zeros(2, 1, 1, 5)
    shorter[..., 3:] = float("-inf")
    torch.testing.assert_close(text(x, shorter)[:, :3], text(x[:, :3]), rtol=0, atol=1e-6)
    out, changed = pixels(x, None, words, padding), words.clone()
    changed[1, 2:] += 5
    assert torch.equal(pixels(x, None, changed, padding), out)
    changed[0, 3] += 5
    assert (pixels(x, None, changed, padding) - out).abs().amax((1, 2))[0] > 1e-3


def test_pixels_are_a_blocks_tokens():
    block, x, words, bias = Block(8, 2, 6), torch.randn(2, 8, 3, 3), torch.randn(2, 4, 6), torch.zeros(2, 1, 1, 4)
    out = attend(block, x, words, bias)
    tokens = torch.stack([x[:, :, i, j] for i in range(3) for j in range(3)], 1)  # [B,9,C], row by row
    wanted = block(tokens, None, words, bias)
    for i in range(3):
        for j in range(3):
            assert torch.equal(out[:, :, i, j], wanted[:, 3 * i + j])


def test_presets_cost_what_is_said_of_them():
    """Parameters as the help says, and what pretraining the base takes as docs/data.md says: 10^15 floating point operations."""
    said = Path(train_selora.__file__).read_text() + (ROOT / "docs/data.md").read_text()
    parameters = re.search(r"base \((\d+)M parameters\) or large \((\d+)M", said).groups()
    operations = re.search(r"([\d.]+) PFLOP \(`base`\) and ([\d.]+) PFLOP \(`large`\)", said).groups()
    for name, millions, peta in zip(("base", "large"), parameters, operations):
        cfg = replace(train_selora.Config(), **train_selora.PRESETS[name])
        sizes = {key: getattr(cfg, key) for key in ("latent", "width", "heads", "buckets", "positions", "text_width", "text_depth")}
        with torch.device("meta"):  # shapes only
            model = Denoiser(size=cfg.image_size // cfg.factor, **sizes)
            z, ids = torch.empty(cfg.batch, *[4, 32, 32]), torch.empty(cfg.batch, cfg.positions, dtype=torch.int64)
            with FlopCounterMode(display=False) as counter:
                model(z, ids[:, 0], ids).sum().backward()
        assert round(sum(p.numel() for p in model.parameters()) / 1e6) == int(millions), name
        assert counter.get_total_flops() * cfg.pretrain_steps / 1e15 == pytest.approx(float(peta), rel=0.05), name


def test_the_config_rebuilds_the_model():
    model, z, ids = denoiser(text_depth=2, positions=9), torch.randn(2, 4, 8, 8), prompts(2, 9)
    again = Denoiser(**model.config)
    again.load_state_dict(model.state_dict())
    t = torch.tensor([5, 900])
    assert torch.equal(again(z, t, ids), model(z, t, ids))
    vae = VAE(16, width=8)
    vae.measure(torch.rand(8, 1, 16, 16))
    vae.measure_grain(torch.rand(8, 1, 16, 16))
    other = VAE(**vae.config)
    other.load_state_dict(vae.state_dict())  # the measured scale and grain travel with it
    noise = torch.randn(2, 1, 16, 16)
    assert torch.equal(other.decode(z), vae.decode(z)) and torch.equal(other.decode(z, noise), vae.decode(z, noise))
    assert not torch.equal(vae.decode(z, noise), vae.decode(z))


def test_only_plain_layers_each_run_once():
    """What adapters and Fisher probes assume: no matrix outside nn.Linear and nn.Conv2d, one call per forward."""
    model, calls = denoiser(text_depth=2), {}
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))}
    for n, m in layers.items():
        assert type(m) in (torch.nn.Linear, torch.nn.Conv2d)
        m.register_forward_hook(lambda *_, n=n: calls.__setitem__(n, calls.get(n, 0) + 1))
    model(torch.randn(2, 4, 8, 8), torch.tensor([1, 2]), prompts(2))
    assert calls == dict.fromkeys(layers, 1)
    owned = {f"{n}.{p}" for n in layers for p in ("weight", "bias")}
    assert {n for n, p in model.named_parameters() if p.dim() > 1} - owned == {"text.words.weight", "text.position",
                                                                                "unet.place"}


def test_gradient_reaches_every_parameter():
    model, z = denoiser(text_depth=2), torch.randn(4, 4, 8, 8)
    denoising_loss(model, z, prompts(4), torch.tensor([10, 300, 600, 990]), torch.randn_like(z)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    vae = VAE(16, width=8)
    vae_loss(vae, torch.rand(2, 1, 16, 16), torch.randn(2, 4, 8, 8))[2].backward()
    assert [n for n, p in vae.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_padding_changes_nothing_and_words_do():
    model, z, t = denoiser(), torch.randn(2, 4, 8, 8), torch.tensor([100, 800])
    ids = prompts(2)
    out = model(z, t, ids)
    with torch.no_grad():
        model.text.words.weight[0] += 5  # what stands where there is no word
        model.text.position[:, 6:] -= 3  # the longest of the two prompts has 5 words
    assert torch.equal(model(z, t, ids), out)
    torch.testing.assert_close(model(z, t, ids[:, :6]), out, rtol=0, atol=1e-5)
    changed = ids.clone()
    changed[0, 2] = 63
    diff = (model(z, t, changed) - out).abs().amax((1, 2, 3))
    assert diff[0] > 1e-4 and diff[1] == 0


# ------------------------------------------------------------------------------------------------ autoencoder's helpers


def test_latents_have_unit_variance_after_measure():
    vae = VAE(width=8)
    x = torch.from_numpy(data.prepare_images(phantoms(64, 0, "source").images, 32, 1))
    mean, log_variance = vae.encode(x)
    z = mean + torch.randn_like(mean) * (log_variance / 2).exp()
    image = vae.decode(z)
    vae.measure(x)
    scaled, scaled_log_variance = vae.encode(x)
    torch.testing.assert_close(scaled.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(scaled.var((0, 2, 3)), torch.ones(4), rtol=1e-4, atol=0)
    z = (z - vae.shift) * vae.scale  # the same latent, seen from outside, gives the same image
    torch.testing.assert_close(vae.decode(z), image, rtol=0, atol=1e-4)
    torch.testing.assert_close((scaled_log_variance / 2).exp() / vae.scale, (log_variance / 2).exp())


def test_divergence_is_the_normal_distributions():
    vae, x = VAE(16, width=8), torch.rand(2, 1, 16, 16)
    mean, log_variance = vae.encode(x)
    want = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (log_variance / 2).exp()),
                                             torch.distributions.Normal(0.0, 1.0)).mean()
    reconstruction, divergence, total = vae_loss(vae, x, torch.zeros(2, 4, 8, 8), kl=0.5)
    torch.testing.assert_close(divergence, want)
    torch.testing.assert_close(total, reconstruction + 0.5 * divergence)
    torch.testing.assert_close(reconstruction, (vae.decode(mean) - x).square().mean())


def test_augment_inverts_half_and_stays_in_range():
    x = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16).expand(200, 1, 16, 16)
    y = augment(x, seeded(3))
    rising = (y[:, 0, -1].mean(1) > y[:, 0, 0].mean(1)).float().mean()
    assert y.shape == x.shape and y.abs().max() <= 1 and 0.35 < rising < 0.65
    assert torch.equal(augment(x, seeded(3)), y) and not torch.equal(augment(x, seeded(4)), y)


@pytest.mark.parametrize("channels", [1, 3])
def test_grain_is_the_deviation_of_a_pixel_about_what_is_decoded(channels):
    vae = VAE(8, channels, width=8).double()
    x, noise = torch.rand(300, channels, 8, 8).double(), torch.randn(300, channels, 8, 8).double()  # measured in parts of 256
    x *= torch.arange(1, channels + 1).reshape(1, -1, 1, 1)  # each channel has its own
    with torch.no_grad():
        z = vae.encode(x)[0]
        mean = vae.decode(z)
        assert not vae.grain.any() and torch.equal(vae.decode(z, noise), mean)  # a fresh model leaves nothing out
        vae.measure_grain(x)
        rest = x - mean
        for channel in range(channels):
            wanted = math.sqrt((rest[:, channel] ** 2).mean())
            assert vae.grain[0, channel, 0, 0].item() == pytest.approx(wanted, rel=1e-12)
        assert len(set(vae.grain.flatten().tolist())) == channels
        assert torch.equal(vae.decode(z), mean)
        torch.testing.assert_close(vae.decode(z, noise), mean + vae.grain * noise, rtol=0, atol=0)
        torch.testing.assert_close((vae.decode(z, noise) - mean).std((0, 2, 3)), vae.grain.flatten(), rtol=0.03, atol=0)


def test_what_the_scanner_adds_is_measured_as_grain():
    """An autoencoder that reproduces clean images to the bit leaves out exactly the noise that was put on them."""
    vae, clean = VAE(8, width=8), torch.full((400, 1, 8, 8), 0.25)
    vae.decode = lambda z, noise=None: torch.full((len(z), 1, 8, 8), 0.25)
    vae.measure_grain(clean)
    assert vae.grain.item() == 0
    vae.measure_grain(clean + 0.1 * torch.randn(clean.shape, generator=seeded(2)))
    assert vae.grain.item() == pytest.approx(0.1, rel=0.02)


# ------------------------------------------------------------------------------------------------ schedule and sampling


@pytest.mark.parametrize("noisier", [0.5, 1.0, 9.0, 100.0])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_the_schedule_falls_from_below_one_to_no_signal(steps, noisier):
    alphas = alphas_cumprod(steps, noisier)
    assert alphas.shape == (steps,) and alphas.dtype == torch.float64
    assert alphas[0] < 1 and (alphas.diff() < 0).all() and 0 <= alphas[-1] < 1e-30
    assert alphas_cumprod().tolist() == alphas_cumprod(1000, 9.0).tolist()


def test_noisier_multiplies_noise_over_signal():
    """(1 - a) / a is the cosine schedule's, tan^2 of the angle, times so much, at every timestep but the last, which has no signal."""
    angle = torch.arange(1, 1000, dtype=torch.float64) / 1000 * math.pi / 2
    for noisier in (0.5, 1.0, 9.0, 100.0):
        alphas = alphas_cumprod(1000, noisier)[:-1]
        torch.testing.assert_close((1 - alphas) / alphas, noisier * angle.tan() ** 2, rtol=1e-9, atol=0)
    torch.testing.assert_close(alphas_cumprod(1000, 1.0)[:-1], angle.cos() ** 2, rtol=0, atol=1e-15)


def test_timesteps_are_evenly_spaced_from_the_end():
    assert timesteps(20).tolist() == list(range(999, 0, -50))
    assert timesteps(1).tolist() == [999] and timesteps(10, 10).tolist() == list(range(9, -1, -1))
    for steps in (3, 7, 333, 999):
        walk = timesteps(steps)
        assert len(walk) == steps and walk[0] == 999 and walk[-1] >= 0 and (walk.diff() < 0).all()


def test_noise_and_velocity_are_latent_and_noise_turned():
    """z_t = sqrt(a) z_0 + sqrt(1-a) noise and v_t = sqrt(a) noise - sqrt(1-a) z_0, sample by sample."""
    z, noise = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    alphas = torch.tensor([1.0, 0.7, 0.2, 0.0], dtype=torch.float64)
    noisy, velocity = diffuse(z, noise, alphas)
    for b, a in enumerate(alphas.tolist()):
        torch.testing.assert_close(noisy[b], math.sqrt(a) * z[b] + math.sqrt(1 - a) * noise[b], rtol=0, atol=1e-14)
        torch.testing.assert_close(velocity[b], math.sqrt(a) * noise[b] - math.sqrt(1 - a) * z[b], rtol=0, atol=1e-14)
        for whole, part in zip(diffuse(z[b : b + 1], noise[b : b + 1], alphas[b]), (noisy, velocity)):  # one number for all
            assert torch.equal(whole[0], part[b])
    assert torch.equal(noisy[0], z[0]) and torch.equal(velocity[0], noise[0])
    assert torch.equal(noisy[3], noise[3]) and torch.equal(velocity[3], -z[3])
    torch.testing.assert_close(noisy**2 + velocity**2, z**2 + noise**2)  # a rotation keeps lengths


@pytest.mark.parametrize("alpha_t", [0.0, 1e-9, 0.3, 0.999])
def test_a_step_with_the_true_velocity_gives_the_true_latent_of_the_next_level(alpha_t):
    """Exactly, also from a level that has no signal, where a predicted noise would say nothing of the image."""
    z, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    alpha_t = torch.tensor(alpha_t, dtype=torch.float64)
    noisy, velocity = diffuse(z, noise, alpha_t)
    for alpha_prev in (0.0, 0.4, 0.9999, 1.0):
        alpha_prev = torch.tensor(alpha_prev, dtype=torch.float64)
        wanted, _ = diffuse(z, noise, alpha_prev)
        torch.testing.assert_close(ddim_step(noisy, velocity, alpha_t, alpha_prev), wanted, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("noisier", [1.0, 9.0])
def test_a_model_that_knows_the_latent_samples_it_back(steps, noisier):
    """From pure noise, exactly, by any number of steps; every station is the forward process's."""
    alphas = alphas_cumprod(noisier=noisier)
    z, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)

    def oracle(z_t, t, ids):  # the two halves of a guided batch see the same latent
        station, velocity = diffuse(z, noise, alphas[t[:3]])
        torch.testing.assert_close(z_t, station.repeat(2, 1, 1, 1), rtol=0, atol=1e-12)
        return velocity.repeat(2, 1, 1, 1)

    got = sample(oracle, noise, prompts(3), steps, guidance=3.0, alphas=alphas)
    torch.testing.assert_close(got, z, rtol=0, atol=1e-12)


def test_the_loss_is_that_of_the_velocity():
    """A model that gives it has none; one that gives the noise, which is another target, has."""
    alphas = alphas_cumprod()
    z, noise = torch.randn(2, 4, 4, 8, 8, dtype=torch.float64)
    t = torch.tensor([0, 300, 700, 999])
    velocity = diffuse(z, noise, alphas[t])[1]
    assert denoising_loss(lambda *given: velocity, z, None, t, noise) == 0
    losses = denoising_loss(lambda *given: noise, z, None, t, noise, per_sample=True)
    torch.testing.assert_close(losses, ((velocity - noise) ** 2).mean((1, 2, 3)))
    assert (losses[1:] > 0.1).all()


def test_guidance_0_is_the_null_model_and_1_the_conditional_one():
    """More exaggerates the words once there is some signal; before, nothing goes beyond 1, and 0 ignores the words all along."""
    model, z, t, ids = denoiser().double(), torch.randn(3, 4, 8, 8).double(), torch.tensor([20, 500, 999]), prompts(3)
    with torch.no_grad():
        null, conditional = model(z, t, null_prompt(ids)), model(z, t, ids)
    both = torch.cat([conditional, null])
    for guidance, late, early in ((0.0, null, null), (0.5, (null + conditional) / 2, (null + conditional) / 2), (1.0, conditional, conditional),
                                  (2.5, null + 2.5 * (conditional - null), conditional)):  # fmt: skip
        for alpha, wanted in ((1.0, late), (0.006, late), (0.004, early), (0.0, early)):
            torch.testing.assert_close(guide(both, torch.tensor(guidance), torch.tensor(alpha)), wanted, rtol=0, atol=1e-12)
    assert (conditional - null).abs().amax((1, 2, 3))[[0, 1]].min() > 1e-4
    assert torch.equal(null_prompt(ids)[2], ids[2])  # an empty note already is the null prompt


def test_a_sample_depends_on_its_own_noise_and_words_only():
    model, noise, ids = denoiser(), torch.randn(5, 4, 8, 8), prompts(5)
    together = sample(model, noise, ids, steps=5)
    assert torch.equal(sample(model, noise, ids, steps=5), together)
    for b in range(5):
        alone = sample(model, noise[b : b + 1], ids[b : b + 1], steps=5)
        torch.testing.assert_close(alone[0], together[b], rtol=1e-5, atol=1e-5)
    other = sample(model, noise, ids.roll(2, 0), steps=5)
    assert (other - together).abs().amax((1, 2, 3)).min() > 1e-3


def test_the_trail_gets_every_step_and_ends_with_the_result():
    model, noise, ids = denoiser(), torch.randn(2, 4, 8, 8), prompts(2)
    for steps in (1, 5):
        trail = []
        got = sample(model, noise, ids, steps, trail=trail)
        assert len(trail) == steps and trail[-1] is got
        assert all(z.shape == noise.shape for z in trail)
        assert torch.equal(got, sample(model, noise, ids, steps))  # looking changes nothing
    signal = alphas_cumprod()[timesteps(5)].float()
    with torch.no_grad():
        v = model(noise, torch.full((2,), 999), ids)  # at no signal, the conditional prediction
        torch.testing.assert_close(trail[0], ddim_step(noise, v, signal[0], signal[1]), rtol=0, atol=1e-5)
        null, v = (model(trail[3], torch.full((2,), 199), words) for words in (null_prompt(ids), ids))
        torch.testing.assert_close(trail[4], ddim_step(trail[3], null + 3 * (v - null), signal[4], torch.tensor(1.0)), rtol=0, atol=1e-5)


def test_images_are_drawn_each_from_its_own_seed():
    """Latent noise first, then grain, from one generator per image: in parts of 200, alone, in another order, the same images."""
    vae = VAE(8, width=8).eval()
    vae.grain.fill_(0.2)
    model, ids = denoiser(size=4), prompts(203)
    seeds = np.arange(203) + 40
    images = draw_images(model, vae, ids, seeds, steps=2)
    assert images.shape == (203, 8, 8) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 203
    for b in (0, 199, 200, 202):
        generator = torch.Generator().manual_seed(int(seeds[b]))
        noise = torch.randn(1, *vae.latent_shape, generator=generator)
        grain = torch.randn(1, *vae.image_shape, generator=generator)
        with torch.no_grad():
            wanted = vae.decode(sample(model, noise, ids[b : b + 1], 2), grain)
        assert abs(pictures(wanted)[0].astype(int) - images[b]).max() <= 1
    again = draw_images(model, vae, ids[[200, 3]], seeds[[200, 3]], steps=2)
    assert abs(again.astype(int) - images[[200, 3]]).max() <= 1
    vae.grain.zero_()
    assert (draw_images(model, vae, ids[:3], seeds[:3], steps=2) != images[:3]).mean() > 0.5


def test_pictures_round_clip_and_put_colours_last():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0]).reshape(1, 1, 1, 5)
    assert pictures(x).tolist() == [[[0, 0, 128, 255, 255]]] and pictures(x).dtype == np.uint8
    colours = pictures(torch.stack([x[0, 0], -x[0, 0], 0 * x[0, 0]])[None])
    assert colours.shape == (1, 1, 5, 3) and colours[0, 0, 0].tolist() == [0, 255, 128]


def test_words_are_dropped_by_the_generator():
    ids = prompts(4).repeat(500, 1)
    dropped = drop_words(ids, seeded(1), p=0.1)
    gone = (dropped != ids).any(1)
    assert 0.05 < gone.float().mean() < 0.1  # of a tenth, a quarter was empty before
    assert torch.equal(dropped[gone], null_prompt(ids)[gone]) and (dropped[:, 0] == 1).all()
    assert torch.equal(drop_words(ids, seeded(1)), dropped) and torch.equal(drop_words(ids, seeded(1), 0.0), ids)


def test_per_sample_losses_average_to_the_loss():
    model, z, noise = denoiser(), *torch.randn(2, 4, 4, 8, 8)
    t = torch.tensor([0, 10, 500, 999])
    losses = denoising_loss(model, z, prompts(4), t, noise, per_sample=True)
    assert losses.shape == (4,)
    torch.testing.assert_close(losses.mean(), denoising_loss(model, z, prompts(4), t, noise))
    alone = denoising_loss(model, z[2:3], prompts(4)[2:3], t[2:3], noise[2:3])
    torch.testing.assert_close(losses[2], alone)


def test_ema_moves_towards_the_model():
    model, average = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    torch.nn.init.constant_(model.weight, 3.0)
    model.num_batches_tracked += 7
    ema_update(average, model, 0.75)
    assert average.weight.tolist() == [1.5, 1.5] and average.num_batches_tracked == 7
    ema_update(average, model, 0.0)
    assert torch.equal(average.weight, model.weight) and model.weight.tolist() == [3.0, 3.0]


@pytest.mark.parametrize("call, message", [
    (lambda: VAE(image_size=31), "image size 31 is not divisible by the latent factor 2"),
    (lambda: VAE(image_size=30, factor=4), "image size 30 is not divisible by the latent factor 4"),
    (lambda: VAE(factor=3), "latent factor 3"),
    (lambda: VAE(factor=1), "latent factor 1"),
    (lambda: Denoiser(size=6), "latent size 6 and UNet width 48 must be multiples of 4"),
    (lambda: Denoiser(width=30), "latent size 16 and UNet width 30 must be multiples of 4"),
    (lambda: Denoiser(width=12, heads=8), "width 12 is not divisible by 8 attention heads"),
    (lambda: Denoiser(text_width=30), "width 30 is not divisible by 4 attention heads"),
    (lambda: Attention(9, 9, 4), "width 9 is not divisible by 4 attention heads"),
    (lambda: denoiser()(torch.randn(1, 4, 8, 8), torch.tensor([1]), prompts(1, 13)), "prompts of 13 word ids"),
    (lambda: alphas_cumprod(0), "0 steps"),
    (lambda: alphas_cumprod(-3), "a schedule of -3 steps; need at least 1"),
    (lambda: alphas_cumprod(noisier=0.0), "a schedule 0.0 times as noisy; need a number above 0"),
    (lambda: alphas_cumprod(noisier=-9), "a schedule -9 times as noisy"),
    (lambda: alphas_cumprod(noisier=float("nan")), "a schedule nan times as noisy"),
    (lambda: alphas_cumprod(noisier=float("inf")), "a schedule inf times as noisy"),
    (lambda: timesteps(0), "0 sampling steps; need 1 to 1000"),
    (lambda: timesteps(11, 10), "11 sampling steps; need 1 to 10"),
    (lambda: sample(None, torch.zeros(1, 4, 8, 8), None, steps=1001), "1001 sampling steps"),
    (lambda: sample(None, torch.zeros(1, 4, 8, 8), None, guidance=-1.0), "guidance -1"),
    (lambda: sample(None, torch.zeros(1, 4, 8, 8), None, guidance=float("nan")), "guidance nan"),
    (lambda: ema_update(None, None, 1.5), "EMA decay 1.5"),
])
def test_bad_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ----------------------------------------------------------------------------------------------------- export, training


def run_exported(module, inputs, path, dynamic):
    """A function of arrays that runs the traced graph in onnxruntime; `dynamic` as torch.onnx.export takes it."""
    import onnxruntime

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module, tuple(inputs.values()), str(path), input_names=list(inputs), output_names=["out"],
                          opset_version=17, dynamo=False, dynamic_axes=dynamic)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda **arrays: session.run(None, {k: v.numpy() for k, v in arrays.items()})[0]


def test_exported_denoiser_equals_torch(tmp_path):
    """At other batch sizes and text lengths than it was traced with."""
    model = denoiser(text_depth=2)
    inputs = lambda rows, words: dict(z=torch.randn(rows, 4, 8, 8), t=torch.arange(rows) * 99,
                                      ids=prompts(rows, words))
    dynamic = {"z": {0: "batch"}, "t": {0: "batch"}, "ids": {0: "batch", 1: "words"}, "out": {0: "batch"}}
    run = run_exported(model, inputs(2, 12), tmp_path / "denoiser.onnx", dynamic)
    for rows, words in ((1, 12), (5, 12), (3, 4)):
        x = inputs(rows, words)
        with torch.no_grad():
            np.testing.assert_allclose(run(**x), model(**x).numpy(), rtol=0, atol=1e-5)


def test_exported_decoder_and_step_equal_torch(tmp_path):
    class Decode(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.vae = VAE(16, width=8).eval()

        def forward(self, z, v, noise, alpha_t, alpha_prev):
            return self.vae.decode(ddim_step(z, v, alpha_t, alpha_prev), noise)

    module = Decode()
    module.vae.measure(torch.rand(8, 1, 16, 16))
    module.vae.grain.fill_(0.1)
    inputs = lambda rows: dict(z=torch.randn(rows, 4, 8, 8), v=torch.randn(rows, 4, 8, 8), noise=torch.randn(rows, 1, 16, 16),
                               alpha_t=torch.tensor(0.3), alpha_prev=torch.tensor(0.5))
    run = run_exported(module, inputs(2), tmp_path / "decode.onnx", {n: {0: "batch"} for n in ("z", "v", "noise", "out")})
    for rows in (1, 5):
        x = inputs(rows)
        with torch.no_grad():
            np.testing.assert_allclose(run(**x), module(**x).numpy(), rtol=0, atol=1e-5)


def test_both_losses_fall_on_phantoms():
    study = phantoms(128, 0, "source", 16)
    x, ids = torch.from_numpy(data.prepare_images(study.images, 16, 1)), prompts(128)
    vae = VAE(16, width=8)
    optimizer, losses = torch.optim.Adam(vae.parameters(), 4e-3), []
    for step in range(30):
        batch = augment(x[step % 8 * 16 :][:16], seeded(step))
        reconstruction, _, loss = vae_loss(vae, batch, torch.randn(16, 4, 8, 8, generator=seeded(step)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(reconstruction.detach()))
    assert np.mean(losses[-5:]) < 0.5 * losses[0]

    vae.measure(x)
    with torch.no_grad():
        z = vae.encode(x)[0]
    model, held, losses = Denoiser(**SMALL), torch.randn(z.shape, generator=seeded(9)), []
    average, optimizer = copy.deepcopy(model), torch.optim.Adam(model.parameters(), 4e-3)
    t = (torch.arange(128) * 1000) // 128
    for step in range(50):
        rows = torch.randint(0, 128, (16,), generator=seeded(step))
        noise = torch.randn(16, 4, 8, 8, generator=seeded(step))
        loss = denoising_loss(model, z[rows], drop_words(ids[rows], seeded(step)), t[rows], noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema_update(average, model, 0.9)
    with torch.no_grad():
        for net in (Denoiser(**SMALL), model, average):
            losses.append(float(denoising_loss(net, z, ids, t, held)))
    assert losses[1] < 0.6 * losses[0] and losses[2] < 0.6 * losses[0]
