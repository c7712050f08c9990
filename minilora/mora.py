"""MoRA, modality-aware low-rank adaptation (Shi et al., arXiv 2408.09064), whole, in one file.

    h = Block_0(x) + sum over the modalities m that are PRESENT of (x . down) . up_m

One down-projection [D,r] is shared, each modality has an up-projection [r,D], and the branch stands beside the first
block of a frozen transformer. Everything of the method is here: the branch, the wrapper, folding a presence pattern
into two matrices, and the controls that a claim about it has to beat.

Letters: B batch, T tokens, D width, M modalities, r rank.
"""

import torch
from torch import nn

METHODS = ("head", "lora", "mora", "mora-open", "mora-shuffled", "mora-all", "prompt", "full")


class MoRA(nn.Module):
    """The branch: sum_m present_m (x . down) . up_m.

    down [D,r] ~ normal(0, 1/r), up [M,r,D] = 0: a fresh branch adds exactly nothing. modalities: a tuple of names or
    a count. With one modality and presence 1 it is the plain low-rank branch."""

    def __init__(self, dim, modalities, rank=4):
        super().__init__()
        self.modalities = (tuple(modalities) if not isinstance(modalities, int)
                           else tuple(f"modality {m}" for m in range(modalities)))
        if rank < 1 or not self.modalities:
            raise ValueError(f"rank {rank} with {len(self.modalities)} modalities: both must be at least 1")
        self.down = nn.Parameter(torch.randn(dim, rank) / rank)
        self.up = nn.Parameter(torch.zeros(len(self.modalities), rank, dim))

    def fold(self, present):
        """One up-projection per row of presence: [..., M] -> [..., r, D], sum_m present_m up_m."""
        M, r, D = self.up.shape
        return (present.to(self.up) @ self.up.reshape(M, r * D)).unflatten(-1, (r, D))

    def forward(self, x, present):
        """x [B,T,D], present [B,M] of 0/1 -> [B,T,D]. Linear in presence, so the sum over m comes first: one bmm, no
        loop over samples.
        """
        return (x @ self.down) @ self.fold(present)  # [B,T,r] @ [B,r,D]


class FoldedMoRA(nn.Module):
    """A MoRA whose presence pattern is fixed: two matrices, what an exported graph holds."""

    def __init__(self, mora, present):
        super().__init__()
        self.register_buffer("down", mora.down.detach().clone())
        self.register_buffer("up", mora.fold(torch.as_tensor(present)).detach())

    def forward(self, x, present=None):
        return (x @ self.down) @ self.up


class MoRABlock(nn.Module):
    """A transformer block with the branch beside it: block(x, ...) + mora(x, present).

    Whatever else the block takes or returns is passed on; of a tuple, the first item is the hidden state. A model
    that cannot hand `present` down to its blocks sets `.present` [B,M] before the call."""

    def __init__(self, block, mora):
        super().__init__()
        self.block, self.mora, self.present = block, mora, None

    def forward(self, x, *args, present=None, **kwargs):
        present = self.present if present is None else present
        if present is None and isinstance(self.mora, MoRA):
            raise ValueError("which modalities are present? pass present [B,M], or set MoRABlock.present first")
        out, branch = self.block(x, *args, **kwargs), self.mora(x, present)
        return (out[0] + branch, *out[1:]) if isinstance(out, tuple) else out + branch


class Prompts(nn.Module):
    """Baseline: missing-aware prompts (Lee et al., arXiv 2303.03369), L learned tokens per presence pattern, put at the
    end of the input.
    """

    def __init__(self, dim, modalities, length):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 ** len(modalities), length, dim) * 0.02)
        self.register_buffer("bits", 2.0 ** torch.arange(len(modalities)), persistent=False)

    def forward(self, x, bias, present):
        """x [B,T,D] -> [B,T+L,D]; the attention bias grows by L zeros."""
        prompt = self.table[(present.to(self.bits) @ self.bits).long()].to(x.dtype)  # [B,L,D]
        if bias is not None:
            bias = torch.cat([bias, bias.new_zeros(1, 1, 1, 1).expand(bias.shape[0], 1, 1, int(prompt.shape[1]))], 3)
        return torch.cat([x, prompt.expand(x.shape[0], -1, -1)], 1), bias


def attach(model, method, rank=4):
    """Put a method's fresh adapter on a `ViT`-like model (`.modalities`, `.blocks`, `.prompts`) and say what trains;
    returns the model.

    head: nothing is added. lora: one up-projection for all, its rank raised until it has MoRA's parameters. mora.
    mora-open: all gates 1. mora-shuffled: gates of another sample. mora-all: a branch beside every block. prompt: as
    many parameters as MoRA or slightly more. full: everything trains. Pooler and head train in every method. Which
    gates a method gets is `gates`."""
    if method not in METHODS:
        raise ValueError(f"method '{method}' is not known; use {', '.join(METHODS)}")
    dim, modalities, count = model.pooler.in_features, model.modalities, len(model.modalities)
    model.requires_grad_(method == "full")
    model.pooler.requires_grad_(True)
    model.head.requires_grad_(True)
    if method == "lora":  # 2 r' D = (1 + M) r D
        model.blocks[0] = MoRABlock(model.blocks[0], MoRA(dim, 1, max(1, round(rank * (1 + count) / 2))))
    elif method == "prompt":
        model.prompts = Prompts(dim, modalities, max(1, round(rank * (1 + count) / 2**count)))
    elif method.startswith("mora"):
        for i in range(len(model.blocks) if method == "mora-all" else 1):
            model.blocks[i] = MoRABlock(model.blocks[i], MoRA(dim, modalities, rank))
    return model


def gates(method, present, shuffled=None):
    """The presence [B,M] that the adapter of a method is told; attention always gets the true one.

    `shuffled` [B,M] are other samples' rows, for the mora-shuffled control. The plain branch has one gate [B,1],
    always 1."""
    if method == "lora":
        return torch.ones_like(present[:, :1])
    if method == "mora-open":
        return torch.ones_like(present)
    return shuffled if method == "mora-shuffled" else present


def adapter_parameters(model):
    """{name: parameter} of what a method adds to the backbone: branches and prompts, without pooler and head."""
    return {n: p for n, p in model.named_parameters() if ".mora." in n or n.startswith("prompts.")}


def branch_ranks(state):
    """{layer: rank} of the branches in a state dict."""
    return {n.removesuffix(".mora.down"): t.shape[1] for n, t in state.items() if n.endswith(".mora.down")}


def fold(model, present):
    """Replace every branch of the model, in place, by its folded form for one presence row [M]; returns the model.

    A branch that was trained with other gates (lora, mora-open) is folded with the row it was trained with.
    """
    for block in model.blocks:
        if isinstance(block, MoRABlock) and isinstance(block.mora, MoRA):
            block.mora = FoldedMoRA(block.mora, present)
    return model
