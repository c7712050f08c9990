"""A tiny ViLT-style transformer encoder over any set of modalities: the frozen backbone of MoRA.

Image patches, words and numeric columns become tokens of one width; a classification token that
belongs to no modality reads them; a pooler and a head follow. At ViLT-B/32 size (Kim et al., arXiv
2102.03334) it has ViLT's layer shapes. How presence becomes an attention mask is in `ViT.tokens`
and `ViT.embed`; skip the rest if you know transformers.

Letters: B batch, T tokens, D width, M modalities, H heads, d = D / H, F numeric columns, P word
positions, ch image channels, S image size, p patch size, t tokens of one modality.
"""

import torch
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V. It is written out, which keeps the
    exported graph small and readable."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, bias=None):
        """x [B,T,D]; bias [B,1,1,T], 0 or -inf per key, or None where every token is attended."""
        T, D = map(int, x.shape[1:])  # plain numbers, so that a traced graph has fixed shapes
        d = D // self.heads
        qkv = self.qkv(x).reshape(-1, T, 3 * self.heads, d).transpose(1, 2)  # [B,3H,T,d]
        q, k, v = qkv.split(self.heads, 1)  # each [B,H,T,d]
        scores = (q * d**-0.5) @ k.transpose(2, 3)  # [B,H,T,T]
        if bias is not None:
            scores = scores + bias
        x = scores.softmax(-1) @ v  # [B,H,T,d]
        return self.out(x.transpose(1, 2).reshape(-1, T, D))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, width),
        )

    def forward(self, x, bias=None, present=None):
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
    `columns[name]`, the word ids of its F column names. absent: 'mask' hides the tokens of an
    absent modality from attention, which equals dropping them; 'dummy' is the MoRA paper's way: an
    all-ones image, an empty note, the mean of each column, attended like any other. The keyword
    arguments are kept in `.config`, from which `ViT(**config)` rebuilds the model. ValueError if a
    size does not divide."""

    def __init__(self, modalities=("image", "note"), classes=2, columns=None, image_size=32,
                 channels=1, patch=8, width=64, depth=4, heads=4, buckets=2048, positions=12,
                 absent="mask"):
        super().__init__()
        columns = {name: list(ids) for name, ids in (columns or {}).items()}
        if image_size % patch:
            raise ValueError(f"image size {image_size} is not divisible by the patch size {patch}")
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if absent not in ("mask", "dummy"):
            raise ValueError(f"absent '{absent}' is not known; use mask or dummy")
        self.config = dict(modalities=list(modalities), classes=classes, columns=columns,
                           image_size=image_size, channels=channels, patch=patch, width=width,
                           depth=depth, heads=heads, buckets=buckets, positions=positions,
                           absent=absent)
        self.modalities = tuple(modalities)
        self.absent = absent
        numeric = set(modalities) - {"image", "note"}
        self.cls = parameter(1, 1, width)
        self.kind = parameter(len(modalities), 1, width)  # tells the modalities' tokens apart
        if "image" in modalities:
            self.patches = nn.Conv2d(channels, width, patch, patch)
            self.place = parameter(1, (image_size // patch) ** 2, width)
        if numeric or "note" in modalities:
            # Column names are words too, so a numeric column needs no table of its own.
            self.words = nn.Embedding(buckets, width)
            nn.init.normal_(self.words.weight, std=0.02 if "note" in modalities else 0.3)
        if "note" in modalities:
            self.position = parameter(1, positions, width)
            self.word_norm = nn.LayerNorm(width)
        if numeric:
            self.value = parameter(1, 1, width)
        for name in numeric:
            self.register_buffer(f"columns_{name}", torch.tensor(columns[name]), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.pooler = nn.Linear(width, width)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.LayerNorm(2 * width),
            nn.GELU(),
            nn.Linear(2 * width, classes),
        )
        self.prompts = None  # `mora.Prompts`, the baseline that adds tokens, goes here

    def dummy(self, name, like):
        """What stands for an absent modality under 'dummy', [1,...]."""
        config = self.config
        if name == "image":
            return like.new_ones(1, config["channels"], config["image_size"], config["image_size"])
        if name == "note":
            return torch.tensor([[1] + [0] * (config["positions"] - 1)], device=like.device)
        return like.new_zeros(1, len(config["columns"][name]))

    def tokens(self, name, value, present=None):
        """One modality's ([B,t,D] tokens, [B,t] bool of those to attend, or None for all). present
        [B] bool: the samples that have the modality, or None for all; what `value` holds of the
        others is never read."""
        if present is not None and self.absent == "dummy":
            dummy = self.dummy(name, self.cls).to(value)
            value = torch.where(present.reshape(-1, *[1] * (value.dim() - 1)), value, dummy)
            present = None  # a dummy is attended like any other
        attend = None
        if name == "image":  # [B,ch,S,S] -> [B,(S/p)^2,D]
            t = self.patches(value).flatten(2).transpose(1, 2) + self.place
        elif name == "note":  # ids [B,P] -> [B,P,D]; 0 is padding
            t = self.word_norm(self.words(value) + self.position[:, : int(value.shape[1])])
            attend = value != 0
        else:  # [B,F] -> [B,F,D]; NaN masks that column's token
            attend = ~value.isnan()
            value = torch.where(attend, value, torch.zeros_like(value))
            t = self.words(getattr(self, f"columns_{name}")) + value.unsqueeze(2) * self.value
        if present is not None:
            present = present.unsqueeze(1).expand(-1, int(t.shape[1]))  # [B,t]
            attend = present if attend is None else attend & present
        return t, attend

    def embed(self, batch, present=None):
        """Tokens [B,T,D], the classification token first, and the attention bias [B,1,1,T] or None.

        batch: {modality: tensor}, as `data.model_inputs` makes them. present [B,M]: 1 where the
        sample has the modality; its absent content is never read. Without `present`, what is in
        `batch` is present and the rest is absent (an exported pattern)."""
        # Any modality of the batch tells how many samples there are.
        cls = self.cls.expand(next(iter(batch.values())).shape[0], -1, -1)  # [B,1,D]
        tokens = [cls]
        attended = [None]  # for each of `tokens`
        for m, name in enumerate(self.modalities):
            if name in batch:
                samples = None if present is None else present[:, m] > 0  # [B], those that have it
                t, attend = self.tokens(name, batch[name], samples)
            elif self.absent == "dummy":
                t, attend = self.tokens(name, self.dummy(name, self.cls))
                t = t.expand(cls.shape[0], -1, -1)  # [1,t,D] -> [B,t,D]
                if attend is not None:
                    attend = attend.expand(cls.shape[0], -1)
            else:
                continue  # leaving its tokens out equals hiding them
            tokens.append(t + self.kind[m])
            attended.append(attend)
        bias = None
        if any(attend is not None for attend in attended):
            rows = []
            for t, attend in zip(tokens, attended):
                if attend is None:
                    rows.append(cls.new_zeros(1, 1).expand(cls.shape[0], int(t.shape[1])))
                else:
                    rows.append(torch.where(attend, 0.0, float("-inf")).to(t))
            bias = torch.cat(rows, 1).unsqueeze(1).unsqueeze(1)
        return torch.cat(tokens, 1), bias

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
