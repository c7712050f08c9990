"""A tiny ViLT-style transformer encoder over any set of modalities: the frozen backbone of MoRA.

Image patches, words and numeric columns become tokens of one width; a classification token that
belongs to no modality reads them; a pooler and a head follow. With the weights of a ViLT (Kim et
al., arXiv 2102.03334), which `pretrained.py` reads, it computes what ViLT does. How presence becomes
an attention mask is in `ViT.embed`; skip the rest if you know transformers.

Letters: B batch, T tokens, D width, M modalities, H heads, d = D / H, F numeric columns, P word
positions, ch image channels, S image size, p patch size, t tokens of one modality.
"""

import torch
import torch.nn.functional as F
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V. It is written out, which keeps the
    exported graph small and readable."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, bias):
        """x [B,T,D]; bias [B,1,1,T], 0 for the tokens to attend and -inf for the others."""
        T, D = map(int, x.shape[1:])  # plain numbers, so that a traced graph has fixed shapes
        d = D // self.heads
        qkv = self.qkv(x).reshape(-1, T, 3 * self.heads, d).transpose(1, 2)  # [B,3H,T,d]
        q, k, v = qkv.split(self.heads, 1)  # each [B,H,T,d]
        scores = (q * d**-0.5) @ k.transpose(2, 3) + bias  # [B,H,T,T]
        x = scores.softmax(-1) @ v  # [B,H,T,d]
        return self.out(x.transpose(1, 2).reshape(-1, T, D))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads, eps=1e-5):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x, bias, present=None):
        """[B,T,D] -> [B,T,D]. `present` [B,M] is for an adapter that stands around the block; the
        block itself has no use for it."""
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


def parameter(*shape):
    """A parameter drawn from normal(0, 0.02)."""
    return nn.Parameter(torch.randn(*shape) * 0.02)


class ViT(nn.Module):
    """Encoder, pooler and head.

    modalities: names; 'image' and 'note' are what they say, any other is numeric and needs
    `columns[name]`, the word ids of its F column names. The tokens of an absent modality are hidden
    from attention, which equals dropping them. image_token: the image has one more token, without a
    patch. `ViT(**model.config)` rebuilds a model. ValueError if a size does not divide."""

    def __init__(
        self, modalities=("image", "note"), classes=2, columns=None, image_size=32, channels=1,
        patch=8, width=64, depth=4, heads=4, buckets=2048, positions=12, eps=1e-5,
        image_token=False,
    ):
        columns = {name: list(ids) for name, ids in (columns or {}).items()}
        modalities = list(modalities)
        # The arguments by name, before any other local variable is made.
        self.config = dict(locals())
        del self.config["self"]
        del self.config["__class__"]
        super().__init__()
        if image_size % patch:
            raise ValueError(f"image size {image_size} is not divisible by the patch size {patch}")
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.modalities = tuple(modalities)
        numeric = set(modalities) - {"image", "note"}
        self.cls = parameter(1, 1, width)
        self.kind = parameter(len(modalities), 1, width)  # tells the modalities' tokens apart
        if "image" in modalities:
            self.patches = nn.Conv2d(channels, width, patch, patch)
            self.place = parameter(1, (image_size // patch) ** 2 + image_token, width)
        if numeric or "note" in modalities:
            # Column names are words too, so a numeric column needs no table of its own.
            self.words = nn.Embedding(buckets, width)
            nn.init.normal_(self.words.weight, std=0.02 if "note" in modalities else 0.3)
        if "note" in modalities:
            self.position = parameter(1, positions, width)
            self.word_norm = nn.LayerNorm(width, eps)
        if numeric:
            self.value = parameter(1, 1, width)
        for name in numeric:
            self.register_buffer(f"columns_{name}", torch.tensor(columns[name]), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps)
        self.pooler = nn.Linear(width, width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, classes),
        )
        self.dummies = None  # `models.Dummies` goes here, to show what is absent instead
        self.prompts = None  # `mora.Prompts`, a baseline, goes here

    def tokens(self, name, value):
        """One modality's tokens [B,t,D], and which of them are to be attended, [B,t] bool."""
        if name == "image":  # [B,ch,S,S] -> [B,(S/p)^2,D]
            t = self.patches(value).flatten(2).transpose(1, 2)
            if self.config["image_token"]:
                t = F.pad(t, (0, 0, 1, 0))  # a token without a patch: its row of `place` is all
            return t + self.place, torch.ones_like(t[..., 0], dtype=torch.bool)
        if name == "note":  # ids [B,P] -> [B,P,D]; 0 is padding
            words = self.words(value) + self.position[:, : int(value.shape[1])]
            return self.word_norm(words), value != 0
        known = ~value.isnan()  # [B,F]; NaN masks that column's token
        value = torch.where(known, value, torch.zeros_like(value))
        columns = self.words(getattr(self, f"columns_{name}"))  # [F,D]
        return columns + value.unsqueeze(2) * self.value, known

    def embed(self, batch, present=None):
        """Tokens [B,T,D], the classification token first, and the attention bias [B,1,1,T].

        batch: {modality: tensor}, as `task.batch_at` makes it. present [B,M]: 1 where the sample
        has the modality; its absent content is never read. Without `present`, what is in `batch` is
        present and the rest is absent (an exported pattern)."""
        if self.dummies:  # from here on nothing is absent
            batch, present = self.dummies(batch, present, self.cls)
        # Any modality of the batch tells how many samples there are.
        B = next(iter(batch.values())).shape[0]
        if present is None:
            present = self.cls.new_ones(1, len(self.modalities)).expand(B, -1)
        tokens = [self.cls.expand(B, -1, -1)]  # [B,1,D]
        attended = [torch.ones_like(tokens[0][..., 0], dtype=torch.bool)]  # [B,1]
        for m, name in enumerate(self.modalities):
            have = present[:, m] > 0  # [B], the samples that have the modality
            if name not in batch:
                continue  # leaving its tokens out equals hiding them
            t, attend = self.tokens(name, batch[name])
            tokens.append(t + self.kind[m])
            attended.append(attend & have[:, None])
        bias = torch.where(torch.cat(attended, 1), 0.0, float("-inf")).to(self.cls)
        return torch.cat(tokens, 1), bias[:, None, None]

    def features(self, batch, present=None, gates=None):
        """Pooled classification token [B,D]. gates [B,M]: the presence that adapters get; where it
        is None, `present`."""
        if gates is None:
            gates = present
        x, bias = self.embed(batch, present)
        if self.prompts:
            x, bias = self.prompts(x, bias, gates)
        for block in self.blocks:
            x = block(x, bias, present=gates)
        return self.pooler(self.norm(x[:, 0])).tanh()

    def forward(self, batch, present=None, gates=None):
        """Logits [B,classes]."""
        return self.head(self.features(batch, present, gates))
