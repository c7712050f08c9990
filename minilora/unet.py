"""A tiny conditional UNet and its text encoder: the frozen base that SeLoRA adapts.

The UNet predicts the noise in a latent from the latent, the timestep and the words (Ho et al.,
arXiv 2006.11239; Rombach et al., arXiv 2112.10752): residual blocks that get the timestep,
self-attention between pixels, cross-attention to words. Every weight matrix is a plain nn.Linear or
nn.Conv2d that runs once per forward, which is what an adapter with a Fisher probe wants to wrap.

Skip this file if you know latent diffusion: SeLoRA needs no more of it than those plain layers.

Letters: B batch, L latent channels, S latent size, C channels, T tokens (pixels or words), P words,
Dt width of the text, Dtime width of the timestep, H heads, d = C / H.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def _mlp(width):
    """Two layers that treat each token on its own, with 2 . width features between them."""
    return nn.Sequential(
        nn.Linear(width, 2 * width),
        nn.GELU(),
        nn.Linear(2 * width, width),
    )


def _norm(width):
    """GroupNorm with 8 groups, or with as many as divide both 8 and the width."""
    return nn.GroupNorm(math.gcd(8, width), width)


def _rows(x, tokens):
    """First two sizes for a reshape of x [B,T,C]: T is `tokens`, or dynamic where that is None."""
    if tokens is None:
        return x.shape[0], -1
    return -1, tokens


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, queries from x, keys and values from a context; written out, as
    in `vit.py`. tokens: the T of x where it is fixed; else T stays dynamic in a traced graph."""

    def __init__(self, width, context, heads, tokens=None):
        super().__init__()
        self.width = width
        self.heads = heads
        self.head_width = width // heads
        self.tokens = tokens
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context, bias=None):
        """x [B,T,C], context [B,P,Dt] -> [B,T,C]; bias [B,1,1,P], 0 or -inf per key, or None."""
        # In self-attention the number of keys is fixed where T is; that of words never is.
        keys = self.tokens if context is x else None
        k, v = self.key_value(context).split(self.width, 2)  # each [B,P,C]
        q = self.split_heads(self.query(x), self.tokens)  # [B,H,T,d]
        k = self.split_heads(k, keys)  # [B,H,P,d]
        v = self.split_heads(v, keys)  # [B,H,P,d]
        scores = (q * self.head_width**-0.5) @ k.transpose(2, 3)  # [B,H,T,P]
        if bias is not None:
            scores = scores + bias
        h = (scores.softmax(-1) @ v).transpose(1, 2)  # [B,T,H,d]
        return self.out(h.reshape(*_rows(x, self.tokens), self.width))

    def split_heads(self, x, tokens):
        """[B,T,C] -> [B,H,T,d]."""
        return x.reshape(*_rows(x, tokens), self.heads, self.head_width).transpose(1, 2)


class TextBlock(nn.Module):
    """Pre-norm transformer block over words: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = _mlp(width)

    def forward(self, x, bias):
        """x [B,P,Dt], bias [B,1,1,P] -> [B,P,Dt]."""
        h = self.norm1(x)
        x = x + self.attention(h, h, bias)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Word ids -> one vector per word. Ids are hashed words in [0, buckets): 0 is padding, 1 the
    classification token that starts every prompt; the null prompt is that token alone."""

    def __init__(self, buckets=2048, positions=12, width=64, depth=1, heads=4):
        super().__init__()
        if width % heads:
            raise ValueError(f"text width {width} is not divisible by {heads} heads")
        self.config = dict(buckets=buckets, positions=positions, width=width, depth=depth,
                           heads=heads)
        self.positions = positions
        self.words = nn.Embedding(buckets, width)
        self.position = nn.Parameter(torch.randn(1, positions, width) * 0.02)
        # Words start well above the positions: a word matters more than its place.
        nn.init.normal_(self.words.weight, std=0.3)
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        """ids [B,P] int64, P up to `positions`, no row all padding -> tokens [B,P,Dt], bias
        [B,1,1,P]: -inf where the id is padding, so that padding reaches nothing. ValueError if P is
        too large."""
        P = int(ids.shape[1])
        if P > self.positions:
            raise ValueError(f"prompts of {P} word ids; the text encoder takes {self.positions}")
        # Not P: as a number it would fix the length of the prompts in a traced graph.
        x = self.words(ids) + self.position[:, : ids.shape[1]]
        bias = torch.where(ids == 0, float("-inf"), 0.0).to(x)  # [B,P]
        bias = bias.unsqueeze(1).unsqueeze(1)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x), bias


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(time)))); skip is a 1x1 convolution
    where the widths differ."""

    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.norm1 = _norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = _norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        """x [B,c_in,S,S], time [B,Dtime] -> [B,c_out,S,S]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time).unsqueeze(2).unsqueeze(3)  # one shift per channel
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Pixels look at each other, then at the words, then an MLP; pre-norm, residual."""

    def __init__(self, width, size, text_width, heads):
        super().__init__()
        self.width = width
        self.size = size
        self.norm1 = nn.LayerNorm(width)
        self.to_pixels = Attention(width, width, heads, size**2)
        self.norm2 = nn.LayerNorm(width)
        self.to_words = Attention(width, text_width, heads, size**2)
        self.norm3 = nn.LayerNorm(width)
        self.mlp = _mlp(width)

    def forward(self, x, words, bias):
        """x [B,C,S,S], words [B,P,Dt], bias [B,1,1,P] -> [B,C,S,S]."""
        x = x.reshape(-1, self.width, self.size**2).transpose(1, 2)  # [B,S^2,C]
        h = self.norm1(x)
        x = x + self.to_pixels(h, h)
        x = x + self.to_words(self.norm2(x), words, bias)
        x = x + self.mlp(self.norm3(x))
        return x.transpose(1, 2).reshape(-1, self.width, self.size, self.size)


class UNet(nn.Module):
    """Noise prediction. Level i has size S / 2^i and (i + 1) . width channels; every level has a
    residual and an attention block on the way down and, but for the last, on the way up, where it
    also sees what went down.

    Two short cuts make a small model learn in minutes: the prompt's first token joins the timestep,
    and the noisy latent itself, gated per channel by the timestep, is part of the answer (at the
    last timesteps it is the answer). ValueError if a size does not divide."""

    def __init__(self, latent=4, size=8, width=48, levels=2, text_width=64, heads=4):
        super().__init__()
        if levels < 1 or size % 2 ** (levels - 1):
            raise ValueError(
                f"latent size {size} cannot be halved {levels - 1} times ({levels} levels)")
        if width % heads or width % 2:
            raise ValueError(f"UNet width {width} must be even and divisible by {heads} heads")
        time = 2 * width
        widths = [width * (i + 1) for i in range(levels)]  # channels of each level
        sizes = [size >> i for i in range(levels)]
        upper = widths[:-1]  # of the levels that have another below them
        # The timestep and the prompt become one vector of Dtime numbers.
        half = width // 2
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(half) / half), persistent=False)
        self.time = nn.Sequential(
            nn.Linear(width, time),
            nn.SiLU(),
            nn.Linear(time, time),
        )
        self.prompt = nn.Linear(text_width, time)
        self.first = nn.Conv2d(latent, width, 3, padding=1)
        self.place = nn.Parameter(torch.zeros(1, width, size, size))
        # The way down: two blocks per level, then a convolution that halves the size.
        self.down_res = nn.ModuleList(ResBlock(c, c, time) for c in widths)
        self.down_attention = nn.ModuleList(
            AttentionBlock(c, s, text_width, heads) for c, s in zip(widths, sizes))
        self.downsample = nn.ModuleList(
            nn.Conv2d(c, c + width, 3, stride=2, padding=1) for c in upper)
        self.middle = ResBlock(widths[-1], widths[-1], time)
        # The way up: double the size, join what went down on that level, two blocks.
        self.upsample = nn.ModuleList(nn.Conv2d(c + width, c, 3, padding=1) for c in upper)
        self.up_res = nn.ModuleList(ResBlock(2 * c, c, time) for c in upper)
        self.up_attention = nn.ModuleList(
            AttentionBlock(c, s, text_width, heads) for c, s in zip(upper, sizes))
        # The answer: a convolution, and the noisy latent through a gate.
        self.last_norm = _norm(width)
        self.last = nn.Conv2d(width, latent, 3, padding=1)
        self.gate = nn.Linear(time, latent)
        # A fresh model predicts no noise: the loss starts at 1.
        for layer in (self.last, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, words, bias):
        """z [B,L,S,S], t [B] int64, words [B,P,Dt] and bias [B,1,1,P] of the text encoder -> noise
        [B,L,S,S]."""
        # The timestep becomes sines and cosines of falling frequency, then a vector.
        angle = t.to(self.frequencies).unsqueeze(1) * self.frequencies  # [B,width/2]
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(z))  # [B,Dtime]
        # First short cut: how much of the latent itself is part of the answer.
        gate = self.gate(time).unsqueeze(2).unsqueeze(3)  # [B,L,1,1]
        # Second short cut: the first token, CLS, has read the whole prompt.
        time = F.silu(time + self.prompt(words[:, 0]))
        x = self.first(z) + self.place  # [B,C,S,S]
        # Down: every level but the last leaves its output for the way up.
        skips = []
        for i, res in enumerate(self.down_res):
            if i:
                skips.append(x)
                x = self.downsample[i - 1](x)  # half the size
            x = res(x, time)
            x = self.down_attention[i](x, words, bias)
        x = self.middle(x, time)
        # Up: from the last level but one to the first.
        for i in reversed(range(len(skips))):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")  # twice the size
            x = self.upsample[i](x)
            x = torch.cat([x, skips[i]], 1)  # twice the channels
            x = self.up_res[i](x, time)
            x = self.up_attention[i](x, words, bias)
        return self.last(F.silu(self.last_norm(x))) + gate * z


class Denoiser(nn.Module):
    """Text encoder and UNet: the model that is pretrained, adapted and sampled from.

    By default 945,272 parameters: 746,360 in the UNet, 198,912 in the text encoder, of which
    131,072 are word vectors; 42 Linear and 13 Conv2d layers can be adapted. At demo size,
    `Denoiser(width=28, text_width=32, text_depth=1, heads=2)`, 330,148: 255,620 and 74,528, 65,536
    of them word vectors. The keyword arguments are kept in `.config`, from which
    `Denoiser(**config)` rebuilds it."""

    def __init__(self, latent=4, size=8, width=48, levels=2, heads=4, buckets=2048, positions=12,
                 text_width=64, text_depth=2):
        super().__init__()
        self.config = dict(latent=latent, size=size, width=width, levels=levels, heads=heads,
                           buckets=buckets, positions=positions, text_width=text_width,
                           text_depth=text_depth)
        self.text = TextEncoder(buckets, positions, text_width, text_depth, heads)
        self.unet = UNet(latent, size, width, levels, text_width, heads)

    def forward(self, z, t, ids):
        """Noisy latents z [B,L,S,S], timesteps t [B] int64, word ids [B,P] int64 -> predicted noise
        [B,L,S,S]."""
        return self.unet(z, t, *self.text(ids))
