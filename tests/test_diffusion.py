"""The frozen base of SeLoRA: autoencoder, denoiser, schedule and sampler. One thread, fixed seeds."""

import copy
import warnings

import numpy as np
import pytest
import torch

from minilora import data
from minilora.phantoms import phantoms
from minilora.words import tokenize
from minilora.diffusion import (
    add_noise,
    alphas_cumprod,
    ddim_step,
    denoising_loss,
    drop_words,
    ema_update,
    guided_noise,
    null_prompt,
    sample,
    timesteps,
)
from minilora.unet import Denoiser
from minilora.vae import VAE, augment, vae_loss

SMALL = dict(width=16, text_width=16, text_depth=1, buckets=64)


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def denoiser(**sizes):
    """A small model whose zero-initialised output is drawn, so that its inputs matter."""
    torch.manual_seed(0)
    model = Denoiser(**{**SMALL, **sizes})
    torch.nn.init.normal_(model.unet.last.weight, std=0.05)
    return model.eval()


def prompts(rows, positions=12, buckets=64):
    notes = ["ring shadow left side", "fever", "", "small mass on the right, weight loss"]
    return torch.from_numpy(tokenize([notes[i % 4] for i in range(rows)], buckets, positions))


# ------------------------------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("image_size, channels, factor, latent", [(32, 1, 4, 4), (64, 3, 4, 4), (32, 3, 2, 3),
                                                                  (48, 1, 16, 8)])
def test_vae_shapes(image_size, channels, factor, latent):
    vae, s = VAE(image_size, channels, latent, factor, width=8), image_size // factor
    x = torch.rand(2, channels, image_size, image_size) * 2 - 1
    mean, log_variance = vae.encode(x)
    assert mean.shape == log_variance.shape == (2, latent, s, s)
    assert vae.decode(mean).shape == x.shape
    assert VAE(**vae.config).config == vae.config


@pytest.mark.parametrize("size, levels, positions", [(8, 2, 12), (16, 3, 5), (8, 1, 12), (16, 2, 40)])
def test_denoiser_shapes(size, levels, positions):
    model = denoiser(size=size, levels=levels, positions=positions)
    z = torch.randn(3, 4, size, size)
    assert model(z, torch.tensor([0, 500, 999]), prompts(3, positions)).shape == z.shape


def test_a_fresh_denoiser_predicts_zero():
    model = Denoiser(**SMALL)
    assert not model(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), prompts(2)).any()


def test_stated_parameter_counts():
    count = lambda model: sum(p.numel() for p in model.parameters())
    assert count(Denoiser()) == 945_272
    assert count(Denoiser(width=28, text_width=32, text_depth=1, heads=2)) == 330_148
    assert count(VAE()) == 226_988 and count(VAE(width=16)) == 58_204


def test_the_config_rebuilds_the_model():
    model, z, ids = denoiser(levels=3, text_depth=2, positions=9), torch.randn(2, 4, 8, 8), prompts(2, 9)
    again = Denoiser(**model.config)
    again.load_state_dict(model.state_dict())
    t = torch.tensor([5, 900])
    assert torch.equal(again(z, t, ids), model(z, t, ids))
    vae = VAE(width=8)
    vae.measure(torch.rand(8, 1, 32, 32))
    other = VAE(**vae.config)
    other.load_state_dict(vae.state_dict())  # the measured scale travels with it
    assert torch.equal(other.decode(z), vae.decode(z))


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
    vae = VAE(width=8)
    vae_loss(vae, torch.rand(2, 1, 32, 32), torch.randn(2, 4, 8, 8))[2].backward()
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
    vae, x = VAE(width=8), torch.rand(2, 1, 32, 32)
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


# ------------------------------------------------------------------------------------------------ schedule and sampling


@pytest.mark.parametrize("kind", ["cosine", "linear"])
@pytest.mark.parametrize("steps", [1, 10, 1000])
def test_schedule_falls_within_0_and_1(kind, steps):
    alphas = alphas_cumprod(steps, kind)
    assert alphas.shape == (steps,) and alphas.dtype == torch.float64
    assert (alphas > 0).all() and (alphas <= 1).all() and (alphas.diff() < 0).all()


def test_timesteps_are_evenly_spaced_from_the_end():
    assert timesteps(20).tolist() == list(range(999, 0, -50))
    assert timesteps(1).tolist() == [999] and timesteps(10, 10).tolist() == list(range(9, -1, -1))
    for steps in (3, 7, 333, 999):
        walk = timesteps(steps)
        assert len(walk) == steps and walk[0] == 999 and walk[-1] >= 0 and (walk.diff() < 0).all()


@pytest.mark.parametrize("kind", ["cosine", "linear"])
def test_ddim_with_the_true_noise_recovers_the_latent(kind):
    """Exactly, in one step and along a whole chain, whose every station is the forward process's."""
    alphas, z, noise = alphas_cumprod(kind=kind), *torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    t = torch.tensor([10, 500, 900])
    noisy = add_noise(z, noise, alphas[t])
    back = torch.stack([ddim_step(noisy[b], noise[b], alphas[t[b]], one) for b in range(3)])
    torch.testing.assert_close(back, z, rtol=0, atol=1e-12)

    def oracle(z_t, t, ids):  # the two halves of a guided batch see the same latent
        torch.testing.assert_close(z_t, add_noise(z, noise, alphas[t[0]]).repeat(2, 1, 1, 1), rtol=0, atol=1e-12)
        return noise.repeat(2, 1, 1, 1)

    start = add_noise(z, noise, alphas[-1])
    for steps in (1, 7, 50):
        got = sample(oracle, start, prompts(3), steps, guidance=3.0, alphas=alphas)
        torch.testing.assert_close(got, z, rtol=0, atol=1e-12)


def test_guidance_0_is_the_null_model_and_1_the_conditional_one():
    model, z, t, ids = denoiser().double(), torch.randn(3, 4, 8, 8).double(), torch.tensor([20, 500, 999]), prompts(3)
    with torch.no_grad():
        null, conditional = model(z, t, null_prompt(ids)), model(z, t, ids)
        torch.testing.assert_close(guided_noise(model, z, t, ids, 0.0), null, rtol=0, atol=1e-12)
        torch.testing.assert_close(guided_noise(model, z, t, ids, 1.0), conditional, rtol=0, atol=1e-12)
        torch.testing.assert_close(guided_noise(model, z, t, ids, 2.5), null + 2.5 * (conditional - null))
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
    (lambda: VAE(image_size=30), "image size 30 is not divisible by the latent factor 4"),
    (lambda: VAE(factor=3), "latent factor 3"),
    (lambda: VAE(factor=1), "latent factor 1"),
    (lambda: Denoiser(size=6, levels=3), "latent size 6 cannot be halved 2 times"),
    (lambda: Denoiser(levels=0), "0 levels"),
    (lambda: Denoiser(width=30), "UNet width 30"),
    (lambda: Denoiser(text_width=30), "text width 30 is not divisible by 4 heads"),
    (lambda: denoiser()(torch.randn(1, 4, 8, 8), torch.tensor([1]), prompts(1, 13)), "prompts of 13 word ids"),
    (lambda: alphas_cumprod(0), "0 steps"),
    (lambda: alphas_cumprod(kind="square"), "schedule 'square'"),
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
            self.vae = VAE(width=8).eval()

        def forward(self, z, eps, alpha_t, alpha_prev):
            return self.vae.decode(ddim_step(z, eps, alpha_t, alpha_prev))

    module = Decode()
    module.vae.measure(torch.rand(8, 1, 32, 32))
    inputs = lambda rows: dict(z=torch.randn(rows, 4, 8, 8), eps=torch.randn(rows, 4, 8, 8),
                               alpha_t=torch.tensor(0.3), alpha_prev=torch.tensor(0.5))
    run = run_exported(module, inputs(2), tmp_path / "decode.onnx", {n: {0: "batch"} for n in ("z", "eps", "out")})
    for rows in (1, 5):
        x = inputs(rows)
        with torch.no_grad():
            np.testing.assert_allclose(run(**x), module(**x).numpy(), rtol=0, atol=1e-5)


def test_both_losses_fall_on_phantoms():
    study = phantoms(128, 0, "source")
    x, ids = torch.from_numpy(data.prepare_images(study.images, 32, 1)), prompts(128)
    vae = VAE(width=8)
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
