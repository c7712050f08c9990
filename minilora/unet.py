"""A tiny conditional UNet and its text encoder: the frozen base that SeLoRA adapts.

The UNet predicts the noise in a latent from the latent, the timestep and the words (Ho et al., arXiv 2006.11239;
Rombach et al., arXiv 2112.10752): residual blocks that are told the timestep, self-attention between pixels,
cross-attention to words. Every weight matrix is a plain nn.Linear or nn.Conv2d that runs once per forward, which is
what an adapter with a Fisher probe wants to wrap.

Letters: B batch, L latent channels, S latent size, C channels, T tokens (pixels or words), P words, H heads, d = C / H.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def _heads(x, heads, tokens=None):
    """[B,T,C] -> [B,H,T,d]. `tokens` is T where it is fixed; else it stays dynamic in a traced graph."""
    shape = (x.shape[0], -1) if tokens is None else (-1, tokens)
    return x.reshape(*shape, heads, int(x.shape[2]) // heads).transpose(1, 2)


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, queries from x, keys and values from a context; written out, as in `vit.py`."""

    def __init__(self, width, context, heads, tokens=None):
        super().__init__()
        self.width, self.heads, self.tokens, self.scale = width, heads, tokens, (width // heads) ** -0.5
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(context, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context, bias=None):
        """x [B,T,C], context [B,P,Dt] -> [B,T,C]; bias [B,1,1,P], 0 or -inf per key, or None."""
        own = self.tokens if context is x else None  # how many keys, where that is fixed
        key, value = self.key_value(context).split(self.width, 2)  # each [B,P,C]
        q = _heads(self.query(x), self.heads, self.tokens)
        k, v = _heads(key, self.heads, own), _heads(value, self.heads, own)
        scores = (q * self.scale) @ k.transpose(2, 3)  # [B,H,T,P]
        weights = (scores if bias is None else scores + bias).softmax(-1)
        x, shape = (weights @ v).transpose(1, 2), (x.shape[0], -1) if self.tokens is None else (-1, self.tokens)
        return self.out(x.reshape(*shape, self.width))


def _mlp(width):
    return nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))


class TextBlock(nn.Module):
    """Pre-norm transformer block over words: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), _mlp(width)

    def forward(self, x, bias):
        h = self.norm1(x)
        x = x + self.attention(h, h, bias)
        return x + self.mlp(self.norm2(x))


class TextEncoder(nn.Module):
    """Word ids -> one vector per word. Ids are hashed words in [0, buckets): 0 is padding, 1 the classification
    token that starts every prompt; the null prompt is that token alone.
    """

    def __init__(self, buckets=2048, positions=12, width=64, depth=1, heads=4):
        super().__init__()
        if width % heads:
            raise ValueError(f"text width {width} is not divisible by {heads} heads")
        self.config = dict(buckets=buckets, positions=positions, width=width, depth=depth, heads=heads)
        self.positions = positions
        self.words = nn.Embedding(buckets, width)
        self.position = nn.Parameter(torch.randn(1, positions, width) * 0.02)
        nn.init.normal_(self.words.weight, std=0.3)  # well above the positions: a word matters more than its place
        self.blocks = nn.ModuleList(TextBlock(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        """ids [B,P] int64, P up to `positions`, no row all padding -> tokens [B,P,Dt], bias [B,1,1,P]: -inf where
        the id is padding, so that padding reaches nothing. ValueError if P is too large.
        """
        if int(ids.shape[1]) > self.positions:
            raise ValueError(f"prompts of {int(ids.shape[1])} word ids; the text encoder takes {self.positions}")
        x = self.words(ids) + self.position[:, : ids.shape[1]]
        bias = torch.where(ids == 0, float("-inf"), 0.0).to(x.dtype).unsqueeze(1).unsqueeze(1)
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x), bias


def _norm(width):
    return nn.GroupNorm(math.gcd(8, width), width)


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(time)))); skip is a 1x1 convolution where widths differ."""

    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.norm1, self.conv1 = _norm(c_in), nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2, self.conv2 = _norm(c_out), nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        """x [B,c_in,S,S], time [B,Dtime] -> [B,c_out,S,S]."""
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time).unsqueeze(2).unsqueeze(3)
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class AttentionBlock(nn.Module):
    """Pixels look at each other, then at the words, then an MLP; pre-norm, residual."""

    def __init__(self, width, size, text_width, heads):
        super().__init__()
        self.width, self.size = width, size
        self.norm1, self.to_pixels = nn.LayerNorm(width), Attention(width, width, heads, size * size)
        self.norm2, self.to_words = nn.LayerNorm(width), Attention(width, text_width, heads, size * size)
        self.norm3, self.mlp = nn.LayerNorm(width), _mlp(width)

    def forward(self, x, words, bias):
        """x [B,C,S,S], words [B,P,Dt], bias [B,1,1,P] -> [B,C,S,S]."""
        x = x.reshape(-1, self.width, self.size**2).transpose(1, 2)
        h = self.norm1(x)  # [B,S^2,C]
        x = x + self.to_pixels(h, h)
        x = x + self.to_words(self.norm2(x), words, bias)
        x = x + self.mlp(self.norm3(x))
        return x.transpose(1, 2).reshape(-1, self.width, self.size, self.size)


class UNet(nn.Module):
    """Noise prediction. Level i has size S / 2^i and (i + 1) . width channels; every level has a residual and an
    attention block on the way down and, but for the last, on the way up, where it also sees what went down.

    Two short cuts make a small model learn in minutes: the prompt's first token joins the timestep, and the noisy
    latent itself, gated per channel by the timestep, is part of the answer (at the last timesteps it is the answer).
    ValueError if a size does not divide."""

    def __init__(self, latent=4, size=8, width=48, levels=2, text_width=64, heads=4):
        super().__init__()
        if levels < 1 or size % 2 ** (levels - 1):
            raise ValueError(f"latent size {size} cannot be halved {levels - 1} times ({levels} levels)")
        if width % heads or width % 2:
            raise ValueError(f"UNet width {width} must be even and divisible by {heads} heads")
        self.config = dict(latent=latent, size=size, width=width, levels=levels, text_width=text_width, heads=heads)
        widths, sizes = [width * (i + 1) for i in range(levels)], [size >> i for i in range(levels)]
        time, pairs = 2 * width, list(zip(widths, widths[1:]))
        attention = lambda i: AttentionBlock(widths[i], sizes[i], text_width, heads)
        self.register_buffer("frequencies", 1e4 ** (-torch.arange(width // 2) / (width // 2)), persistent=False)
        self.time = nn.Sequential(nn.Linear(width, time), nn.SiLU(), nn.Linear(time, time))
        self.prompt = nn.Linear(text_width, time)
        self.first, self.place = nn.Conv2d(latent, width, 3, padding=1), nn.Parameter(torch.zeros(1, width, size, size))
        self.down_res = nn.ModuleList(ResBlock(c, c, time) for c in widths)
        self.down_attention = nn.ModuleList(attention(i) for i in range(levels))
        self.downsample = nn.ModuleList(nn.Conv2d(c, below, 3, stride=2, padding=1) for c, below in pairs)
        self.middle = ResBlock(widths[-1], widths[-1], time)
        self.upsample = nn.ModuleList(nn.Conv2d(below, c, 3, padding=1) for c, below in pairs)
        self.up_res = nn.ModuleList(ResBlock(2 * c, c, time) for c, _ in pairs)
        self.up_attention = nn.ModuleList(attention(i) for i in range(levels - 1))
        self.last_norm, self.last = _norm(width), nn.Conv2d(width, latent, 3, padding=1)
        self.gate = nn.Linear(time, latent)
        for layer in (self.last, self.gate):  # a fresh model predicts no noise: the loss starts at 1
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, words, bias):
        """z [B,L,S,S], t [B] int64, words [B,P,Dt] and bias [B,1,1,P] of the text encoder -> noise [B,L,S,S]."""
        angle = t.to(self.frequencies.dtype).unsqueeze(1) * self.frequencies  # [B,width/2]
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(z.dtype))  # [B,Dtime]
        gate = self.gate(time).unsqueeze(2).unsqueeze(3)  # [B,L,1,1]
        time = F.silu(time + self.prompt(words[:, 0]))  # CLS has read the whole prompt
        x, passed = self.first(z) + self.place, []
        for i, (res, attention) in enumerate(zip(self.down_res, self.down_attention)):
            if i:
                passed.append(x)
                x = self.downsample[i - 1](x)
            x = attention(res(x, time), words, bias)
        x = self.middle(x, time)
        for i in reversed(range(len(self.upsample))):
            x = self.upsample[i](F.interpolate(x, scale_factor=2.0, mode="nearest"))
            x = self.up_attention[i](self.up_res[i](torch.cat([x, passed[i]], 1), time), words, bias)
        return self.last(F.silu(self.last_norm(x))) + gate * z


class Denoiser(nn.Module):
    """Text encoder and UNet: the model that is pretrained, adapted and sampled from.

    By default 945,272 parameters: 746,360 in the UNet, 198,912 in the text encoder, of which 131,072 are word vectors;
    42 Linear and 13 Conv2d layers can be adapted. At demo size, `Denoiser(width=28, text_width=32, text_depth=1,
    heads=2)`, 330,148: 255,620 and 74,528, 65,536 of them word vectors. The keyword arguments are kept in `.config`,
    from which `Denoiser(**config)` rebuilds it."""

    def __init__(self, latent=4, size=8, width=48, levels=2, heads=4, buckets=2048, positions=12, text_width=64,
                 text_depth=2):
        super().__init__()
        self.config = dict(latent=latent, size=size, width=width, levels=levels, heads=heads, buckets=buckets,
                           positions=positions, text_width=text_width, text_depth=text_depth)
        self.text = TextEncoder(buckets, positions, text_width, text_depth, heads)
        self.unet = UNet(latent, size, width, levels, text_width, heads)

    def forward(self, z, t, ids):
        """Noisy latents [B,L,S,S], timesteps [B] int64, word ids [B,P] int64 -> predicted noise [B,L,S,S]."""
        return self.unet(z, t, *self.text(ids))
