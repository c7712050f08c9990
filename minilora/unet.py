"""A tiny conditional UNet and its text encoder: the frozen base that SeLoRA adapts.

The UNet predicts the velocity of a noisy latent from the latent, the timestep and the words (Ho et
al., arXiv 2006.11239; Rombach et al., arXiv 2112.10752). Every weight matrix is a plain nn.Linear or
nn.Conv2d that runs once per forward, which is what an adapter with a Fisher probe wants to wrap.
Skip this file if you know latent diffusion: SeLoRA needs no more of it than those plain layers.

Letters: B batch, L latent channels, S latent size, C channels, T tokens (pixels or words), P words,
Dt width of the text, Dtime width of the timestep, H heads, d = C / H.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """softmax(Q K^T / sqrt(d)) V, queries from x, keys and values from a context."""

    def __init__(self, width, context, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} attention heads")
        self.heads = heads
        self.head_width = width // heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(context, 2 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, context, bias=None):
        """x [B,T,C], context [B,P,Dt] -> [B,T,C]; bias [B,1,1,P], 0 or -inf per key, or None."""
        k, v = self.key_value(context).chunk(2, 2)  # each [B,P,C]
        q = self.split_heads(self.query(x))  # [B,H,T,d]
        k = self.split_heads(k)  # [B,H,P,d]
        v = self.split_heads(v)  # [B,H,P,d]
        # Written out, as in `vit.py`.
        scores = q @ k.transpose(2, 3) * self.head_width**-0.5  # [B,H,T,P]
        if bias is not None:
            scores = scores + bias
        h = scores.softmax(-1) @ v  # [B,H,T,d]
        return self.out(h.transpose(1, 2).flatten(2))

    def split_heads(self, x):
        """[B,T,C] -> [B,H,T,d]."""
        return x.reshape(-1, x.shape[1], self.heads, self.head_width).transpose(1, 2)


class Block(nn.Module):
    """Pre-norm transformer block: tokens look at each other, then, where there is a `context` width,
    at the words; then each passes an MLP."""

    def __init__(self, width, heads, context=None):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.to_tokens = Attention(width, width, heads)
        # Text blocks have no second context to look at.
        self.norm2 = nn.LayerNorm(width) if context else None
        self.to_words = Attention(width, context, heads) if context else None
        self.norm3 = nn.LayerNorm(width)
        wide = 2 * width
        self.mlp = nn.Sequential(
            nn.Linear(width, wide),
            nn.GELU(),
            nn.Linear(wide, width),
        )

    def forward(self, x, bias=None, words=None, words_bias=None):
        """x [B,T,C], words [B,P,Dt] -> [B,T,C]; bias [B,1,1,T] and words_bias [B,1,1,P], 0 or -inf."""
        h = self.norm1(x)
        x = x + self.to_tokens(h, h, bias)
        if self.to_words:
            x = x + self.to_words(self.norm2(x), words, words_bias)
        return x + self.mlp(self.norm3(x))


class TextEncoder(nn.Module):
    """Word ids -> one vector per word. Ids are hashed words in [0, buckets): 0 is padding, 1 the
    classification token that starts every prompt."""

    def __init__(self, buckets, positions, width, depth, heads):
        super().__init__()
        self.positions = positions
        self.words = nn.Embedding(buckets, width)
        self.position = nn.Parameter(torch.randn(1, positions, width) * 0.02)
        # Words start well above the positions: a word matters more than its place.
        nn.init.normal_(self.words.weight, std=0.3)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, ids):
        """ids [B,P] int64, P up to `positions`, no row all padding -> tokens [B,P,Dt], bias
        [B,1,1,P]: -inf where the id is padding, so that padding reaches nothing. ValueError if P is
        too large."""
        P = int(ids.shape[1])  # a number: in a traced graph it would fix the length of the prompts
        if P > self.positions:
            raise ValueError(f"prompts of {P} word ids; the text encoder takes {self.positions}")
        x = self.words(ids) + self.position[:, : ids.shape[1]]
        bias = torch.where(ids == 0, float("-inf"), 0.0).to(x)[:, None, None]  # [B,1,1,P]
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x), bias


class ResBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x))) + linear(time)))); skip is a 1x1 convolution
    where the widths differ."""

    def __init__(self, c_in, c_out, time):
        super().__init__()
        self.norm1 = nn.GroupNorm(4, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(4, c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.time = nn.Linear(time, c_out)
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, time):
        """x [B,c_in,S,S], time [B,Dtime] -> [B,c_out,S,S]."""
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(time)[:, :, None, None]  # one shift per channel
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class UNet(nn.Module):
    """Prediction of the velocity, on two levels: the first convolution halves the latent, another
    one halves it again, and the last one shuffles it back. Each level has a residual and an
    attention block; the finer one has them on the way up too, where it also sees what went down.
    ValueError if a size does not divide."""

    def __init__(self, latent, size, width, text_width, heads):
        super().__init__()
        if size % 4 or width % 4:
            raise ValueError(f"latent size {size} and UNet width {width} must be multiples of 4")
        wide = 2 * width  # channels of the coarse level, and width of the timestep
        # The timestep and the prompt become one vector of Dtime numbers.
        frequencies = 1e4 ** (torch.arange(0, width, 2) / -width)
        self.register_buffer("frequencies", frequencies, persistent=False)
        self.time = nn.Sequential(
            nn.Linear(width, wide),
            nn.SiLU(),
            nn.Linear(wide, wide),
        )
        self.prompt = nn.Linear(text_width, wide)
        self.first = nn.Conv2d(latent, width, 4, stride=2, padding=1)
        self.place = nn.Parameter(torch.zeros(1, width, size // 2, size // 2))
        # The way down and the coarse level, then the way up.
        self.down_res = ResBlock(width, width, wide)
        self.down_attention = Block(width, heads, text_width)
        self.downsample = nn.Conv2d(width, wide, 3, stride=2, padding=1)
        self.coarse_res = ResBlock(wide, wide, wide)
        self.coarse_attention = Block(wide, heads, text_width)
        self.middle = ResBlock(wide, wide, wide)
        self.upsample = nn.Conv2d(wide, width, 3, padding=1)
        self.up_res = ResBlock(2 * width, width, wide)
        self.up_attention = Block(width, heads, text_width)
        self.last_norm = nn.GroupNorm(4, width)
        self.last = nn.Conv2d(width, 4 * latent, 3, padding=1)
        self.gate = nn.Linear(wide, latent)
        # A fresh model predicts 0: the loss starts at the velocity's variance, 1.
        for layer in (self.last, self.gate):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z, t, words, bias):
        """z [B,L,S,S], t [B] int64, words [B,P,Dt] and bias [B,1,1,P] of the text encoder ->
        velocity [B,L,S,S]."""
        # The timestep becomes sines and cosines of falling frequency, then a vector.
        angle = t[:, None] * self.frequencies  # [B,C/2]
        time = self.time(torch.cat([angle.sin(), angle.cos()], 1).to(z))  # [B,Dtime]
        # A short cut: how much of the noisy latent itself is part of the answer.
        gate = self.gate(time)[:, :, None, None]  # [B,L,1,1]
        # CLS, the first token, has read the whole prompt: a small model then learns in minutes.
        time = F.silu(time + self.prompt(words[:, 0]))
        # Down to the coarse level,
        x = self.first(z) + self.place  # [B,C,S/2,S/2]
        x = self.down_res(x, time)
        skip = attend(self.down_attention, x, words, bias)
        x = self.downsample(skip)  # [B,2C,S/4,S/4]
        x = self.coarse_res(x, time)
        x = attend(self.coarse_attention, x, words, bias)
        x = self.middle(x, time)
        # and up again, joined by what the finer level had.
        x = F.interpolate(x, scale_factor=2.0)  # each pixel four times, [B,2C,S/2,S/2]
        x = torch.cat([self.upsample(x), skip], 1)  # [B,2C,S/2,S/2]
        x = self.up_res(x, time)  # [B,C,S/2,S/2]
        x = attend(self.up_attention, x, words, bias)
        # Four times the channels become twice the size.
        x = self.last(F.silu(self.last_norm(x)))  # [B,4L,S/2,S/2]
        return F.pixel_shuffle(x, 2) + gate * z


def attend(block, x, words, bias):
    """A transformer block over the pixels of x [B,C,S,S] as tokens."""
    tokens = x.flatten(2).transpose(1, 2)  # [B,S^2,C]
    tokens = block(tokens, None, words, bias)
    return tokens.transpose(1, 2).reshape(-1, *x.shape[1:])


class Denoiser(nn.Module):
    """Text encoder and UNet: the model that is pretrained, adapted and sampled from. The keyword
    arguments are kept in `.config`, from which `Denoiser(**config)` rebuilds it."""

    def __init__(self, latent=4, size=16, width=48, heads=4, buckets=2048, positions=12,
                 text_width=64, text_depth=2):
        super().__init__()
        self.config = dict(latent=latent, size=size, width=width, heads=heads, buckets=buckets,
                           positions=positions, text_width=text_width, text_depth=text_depth)
        self.text = TextEncoder(buckets, positions, text_width, text_depth, heads)
        self.unet = UNet(latent, size, width, text_width, heads)

    def forward(self, z, t, ids):
        """Noisy latents z [B,L,S,S], timesteps t [B] int64, word ids [B,P] int64 -> predicted
        velocity [B,L,S,S]."""
        return self.unet(z, t, *self.text(ids))
