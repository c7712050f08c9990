"""A tiny KL autoencoder (Kingma and Welling, arXiv 1312.6114): image <-> latent, so that diffusion
works on 16x16x4 numbers instead of 32x32 pixels (Rombach et al., arXiv 2112.10752). It is trained
once, on the source domain, and then frozen.

Skip this file when you want to learn SeLoRA: nothing in it is adapted.

Letters: B batch, ch image channels, S image size, L latent channels, s latent size S / factor.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def _norm(width):
    return nn.GroupNorm(math.gcd(8, width), width)


class ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), all of one width."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            _norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1),
            _norm(width), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.layers(x)


class VAE(nn.Module):
    """Encoder and decoder. By default 32x32x1 -> 16x16x4.

    factor: image size over latent size, a power of two. The first and the last halving are one
    convolution each (stride 2; four outputs per pixel, shuffled): blocks at full image size would
    take most of the time. Outside this class a latent has zero mean and unit variance per channel
    once `measure` has run; `shift` and `scale` are the buffers that do it. `grain` is what the
    decoder leaves out, see `measure_grain`. The keyword arguments are kept in `.config`, from which
    `VAE(**config)` rebuilds the model."""

    def __init__(self, image_size=32, channels=1, latent=4, factor=2, width=32):
        super().__init__()
        if factor < 2 or factor & (factor - 1):
            raise ValueError(f"latent factor {factor} is not a power of two of at least 2")
        if image_size % factor:
            raise ValueError(f"image size {image_size} is not divisible by the latent factor {factor}")
        self.config = dict(image_size=image_size, channels=channels, latent=latent, factor=factor,
                           width=width)
        self.latent = latent
        self.size = image_size // factor
        self.latent_shape = (latent, self.size, self.size)
        self.image_shape = (channels, image_size, image_size)
        widths = [width] + [2 * width] * (factor.bit_length() - 2)  # one per halving, finest first
        down = [nn.Conv2d(channels, width, 3, stride=2, padding=1), ResBlock(width)]
        up = []
        for fine, coarse in zip(widths, widths[1:]):
            down += [nn.Conv2d(fine, coarse, 3, stride=2, padding=1), ResBlock(coarse)]
            up = [nn.Upsample(scale_factor=2), nn.Conv2d(coarse, fine, 3, padding=1), ResBlock(fine), *up]
        coarsest = widths[-1]
        self.encoder = nn.Sequential(
            *down, _norm(coarsest), nn.SiLU(), nn.Conv2d(coarsest, 2 * latent, 1))  # [B,2L,s,s]
        self.decoder = nn.Sequential(
            nn.Conv2d(latent, coarsest, 3, padding=1), ResBlock(coarsest), *up,
            _norm(width), nn.SiLU(), nn.Conv2d(width, 4 * channels, 3, padding=1),
            nn.PixelShuffle(2))  # [B,4ch,S/2,S/2] -> [B,ch,S,S]
        self.register_buffer("shift", torch.zeros(1, latent, 1, 1))
        self.register_buffer("scale", torch.ones(1, latent, 1, 1))
        self.register_buffer("grain", torch.zeros(1, channels, 1, 1))

    def encode(self, x):
        """Posterior mean and log-variance, each [B,L,s,s], of images [B,ch,S,S] in [-1,1]."""
        mean, log_variance = self.encoder(x).split(self.latent, 1)
        mean = (mean - self.shift) * self.scale
        log_variance = log_variance + 2 * self.scale.log()
        return mean, log_variance.clamp(-30, 20)  # exp of anything else is 0 or overflows

    def decode(self, z, noise=None):
        """Images [B,ch,S,S] of latents [B,L,s,s]; about [-1,1], not clamped. Without noise [B,ch,S,S]
        ~ normal(0, 1) it is the mean of the images that have this latent, with it one of them."""
        mean = self.decoder(z / self.scale + self.shift)
        return mean if noise is None else mean + self.grain * noise

    @torch.no_grad()
    def measure(self, x):
        """Set `shift` and `scale` from images [N,ch,S,S], so that their latents have zero mean and
        unit variance per channel: the noise schedule assumes it. Latent diffusion (section D.1)
        uses one scale and no shift."""
        z = torch.cat([self.encoder(part)[:, : self.latent] for part in x.split(256)])
        variance, mean = torch.var_mean(z, (0, 2, 3), keepdim=True)
        self.shift.copy_(mean)
        self.scale.copy_(variance.clamp_min(1e-12) ** -0.5)

    @torch.no_grad()
    def measure_grain(self, x):
        """Set `grain`, the standard deviation of a pixel per channel about what is decoded, from
        images [N,ch,S,S]: the decoder's distribution is normal(decode(z), grain^2).

        The squared error teaches a decoder the mean, without the noise of the scanner. Drawing that
        noise back is right where what is left out is noise, and wrong where it is structure."""
        error = torch.cat([part - self.decode(self.encode(part)[0]) for part in x.split(256)])
        self.grain.copy_(error.square().mean((0, 2, 3), keepdim=True).sqrt())


def vae_loss(model, x, noise, kl=1e-5):
    """(reconstruction, divergence, total = reconstruction + kl . divergence), scalars.

    Reconstruction is the mean squared error per pixel of a decoded posterior sample
    mean + exp(log-variance / 2) . noise, noise [B,L,s,s] ~ normal(0, 1); divergence is
    KL(posterior || normal(0, 1)) per latent number. `kl` is small: the prior is diffusion's task,
    and more would wash out small lesions (1e-5 to 1e-3 give the same images, 1e-2 loses detail)."""
    mean, log_variance = model.encode(x)
    z = mean + (log_variance / 2).exp() * noise
    reconstruction = F.mse_loss(model.decode(z), x)
    divergence = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
    return reconstruction, divergence, reconstruction + kl * divergence


def augment(x, generator):
    """Images [B,ch,S,S] in [-1,1] with random contrast, for pretraining: half of them inverted,
    gamma in [0.67, 1.5], normal noise of standard deviation up to 0.2.

    An autoencoder that saw only one scanner cannot decode another. `generator` is seeded by the
    caller per step, so that a resumed run draws the same; drawing happens on the generator's
    device, so that a GPU run does too."""
    device = generator.device

    def uniform():
        """One number in [0, 1) per image, [B,1,1,1]."""
        return torch.rand(len(x), 1, 1, 1, generator=generator, device=device).to(x)

    gamma = 1.5 ** (2 * uniform() - 1)
    grey = ((x + 1) / 2).clamp(0, 1) ** gamma
    grey = torch.where(uniform() < 0.5, 1 - grey, grey)
    level = 0.2 * uniform()
    noise = torch.randn(x.shape, generator=generator, device=device).to(x)
    return (2 * grey - 1 + level * noise).clamp(-1, 1)
