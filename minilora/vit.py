"""A tiny ViLT-style transformer encoder over any set of modalities: the frozen backbone that MoRA adapts.

Image patches, words and numeric columns become tokens of one width; a classification token that belongs to no modality
reads them; a pooler and a head follow. At ViLT-B/32 size (Kim et al., arXiv 2102.03334) it has ViLT's layer shapes.

Letters: B batch, T tokens, D width, M modalities, H heads, F numeric columns, P word positions.
"""

import torch
from torch import nn


class Attention(nn.Module):
    """Multi-head self-attention, softmax(Q K^T / sqrt(d)) V, written out: the exported graph is then small and
    readable.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x, bias=None):
        """x [B,T,D]; bias [B,1,1,T], 0 or -inf per key, or None where every token is attended."""
        T, D = int(x.shape[1]), int(x.shape[2])
        qkv = self.qkv(x).reshape(-1, T, 3 * self.heads, D // self.heads).transpose(1, 2)  # [B,3H,T,d]
        q, k, v = qkv.split(self.heads, 1)  # each [B,H,T,d]
        scores = (q * self.scale) @ k.transpose(2, 3)  # [B,H,T,T]
        weights = (scores if bias is None else scores + bias).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(-1, T, D))


class Block(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, width, heads):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x, bias=None, present=None):
        """[B,T,D] -> [B,T,D]. `present` [B,M] is for an adapter that stands around the block; the block itself has no
        use for it.
        """
        x = x + self.attention(self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Encoder, pooler and head.

    modalities: names; 'image' and 'note' are what they say, any other is numeric and needs `columns[name]`, the word
    ids of its F column names. absent: 'mask' hides the tokens of an absent modality from attention, which equals
    dropping them; 'dummy' is the MoRA paper's way: an all-ones image, an empty note, the mean of each column,
    attended like any other. The keyword arguments are kept in `.config`, from which `ViT(**config)` rebuilds the
    model."""

    def __init__(self, modalities=("image", "note"), classes=2, columns=None, image_size=32, channels=1, patch=8,
                 width=64, depth=4, heads=4, buckets=2048, positions=12, absent="mask"):
        super().__init__()
        columns = {k: list(v) for k, v in (columns or {}).items()}
        if image_size % patch:
            raise ValueError(f"image size {image_size} is not divisible by the patch size {patch}")
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        if absent not in ("mask", "dummy"):
            raise ValueError(f"absent '{absent}' is not known; use mask or dummy")
        self.config = dict(modalities=list(modalities), classes=classes, columns=columns, image_size=image_size,
                           channels=channels, patch=patch, width=width, depth=depth, heads=heads, buckets=buckets,
                           positions=positions, absent=absent)
        self.modalities, self.absent, self.positions = tuple(modalities), absent, positions
        parameter = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.02)
        self.cls, self.kind = parameter(1, 1, width), parameter(len(modalities), 1, width)
        if "image" in modalities:
            self.patches = nn.Conv2d(channels, width, patch, patch)
            self.place = parameter(1, (image_size // patch) ** 2, width)
        if set(modalities) - {"image"}:  # words; column names are words too, so a column needs no table of its own
            self.words = nn.Embedding(buckets, width)
            nn.init.normal_(self.words.weight, std=0.02 if "note" in modalities else 0.3)
        if "note" in modalities:
            self.position, self.word_norm = parameter(1, positions, width), nn.LayerNorm(width)
        if set(modalities) - {"image", "note"}:
            self.value = parameter(1, 1, width)
            for name in set(modalities) - {"image", "note"}:
                self.register_buffer(f"columns_{name}", torch.tensor(columns[name]), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm, self.pooler = nn.LayerNorm(width), nn.Linear(width, width)
        self.head = nn.Sequential(nn.Linear(width, 2 * width), nn.LayerNorm(2 * width), nn.GELU(),
                                  nn.Linear(2 * width, classes))
        self.prompts = None  # `mora.Prompts`, the baseline that adds tokens, goes here

    def tokens(self, name, value):
        """One modality's ([B,t,D] tokens, [B,t] bool of those to attend, or None for all)."""
        if name == "image":  # [B,ch,S,S] -> [B,(S/p)^2,D]
            return self.patches(value).flatten(2).transpose(1, 2) + self.place, None
        if name == "note":  # [B,P] ids; 0 is padding
            return self.word_norm(self.words(value) + self.position[:, : int(value.shape[1])]), value != 0
        known = ~value.isnan()  # [B,F]; NaN masks that column's token
        value = torch.where(known, value, torch.zeros_like(value))
        return self.words(getattr(self, f"columns_{name}")) + value.unsqueeze(2) * self.value, known

    def dummy(self, name, like):
        """What stands for an absent modality under 'dummy', [1,...]."""
        c = self.config
        if name == "image":
            return like.new_ones(1, c["channels"], c["image_size"], c["image_size"])
        if name == "note":
            return torch.tensor([[1] + [0] * (self.positions - 1)], device=like.device)
        return like.new_zeros(1, len(c["columns"][name]))

    def embed(self, batch, present=None):
        """Tokens [B,T,D] with the classification token first, and the attention bias [B,1,1,T] or None.

        batch: {modality: tensor}, as `data.model_inputs` makes them. present [B,M]: 1 where the sample has the
        modality; its absent content is never read. Without `present`, what is in `batch` is present and the rest is
        absent (an exported pattern)."""
        x = [self.cls.expand(next(iter(batch.values())).shape[0], -1, -1)]
        attended = [None]
        for m, name in enumerate(self.modalities):
            if name not in batch and self.absent == "mask":
                continue
            if name not in batch:
                t, attend = self.tokens(name, self.dummy(name, self.cls))
                t = t.expand(x[0].shape[0], -1, -1)
                attend = attend if attend is None else attend.expand(x[0].shape[0], -1)
            else:
                value, here = batch[name], None if present is None else present[:, m] > 0
                if here is not None and self.absent == "dummy":
                    value = torch.where(here.reshape(-1, *[1] * (value.dim() - 1)), value,
                                        self.dummy(name, self.cls).to(value.dtype))
                t, attend = self.tokens(name, value)
                if here is not None and self.absent == "mask":
                    here = here.unsqueeze(1).expand(-1, int(t.shape[1]))
                    attend = here if attend is None else attend & here
            x.append(t + self.kind[m])
            attended.append(attend)
        bias = None
        if any(a is not None for a in attended):
            parts = [x[0].new_zeros(1, 1).expand(x[0].shape[0], int(t.shape[1])) if a is None
                     else torch.where(a, 0.0, float("-inf")).to(t.dtype) for a, t in zip(attended, x)]
            bias = torch.cat(parts, 1).unsqueeze(1).unsqueeze(1)  # [B,1,1,T]
        return torch.cat(x, 1), bias

    def features(self, batch, present=None, gates=None):
        """Pooled classification token [B,D]. `gates` [B,M]: the presence that adapters are told, else `present`."""
        gates = present if gates is None else gates
        x, bias = self.embed(batch, present)
        if self.prompts is not None:
            x, bias = self.prompts(x, bias, gates)
        for block in self.blocks:
            x = block(x, bias, present=gates)
        return torch.tanh(self.pooler(self.norm(x[:, 0])))

    def forward(self, batch, present=None, gates=None):
        """Logits [B,classes]."""
        return self.head(self.features(batch, present, gates))
