"""MoRA, modality-aware low-rank adaptation (Shi et al., arXiv 2408.09064), whole, in one file.

    h = Block_0(x) + sum over the modalities m that are PRESENT of (x . down) . up_m

One down-projection [D,r] is shared, each modality has an up-projection [r,D], and the branch stands
beside the first block of a frozen transformer. Everything of the method is here: the branch, the
wrapper, folding a presence pattern into two matrices, and the controls that a claim about it has to
beat. Skip part 2, and the whole file only if you came for SeLoRA.

Letters: B batch, T tokens, D width, M modalities, L prompt tokens, r rank.
"""

import threading
import weakref

import torch
from torch import nn

# ==== 1. THE METHOD ===============================================================================

METHODS = ("head", "lora", "mora", "mora-open", "mora-shuffled", "mora-all", "prompt", "full")


def cast(weight, x):
    """The weight in the dtype of x; where it has that, a traced graph gets no node."""
    return weight if weight.dtype == x.dtype else weight.to(x.dtype)


class MoRA(nn.Module):
    """The branch: sum_m present_m (x . down) . up_m.

    down [D,r] ~ normal(0, 1/r), up [M,r,D] = 0: a fresh branch adds exactly nothing. modalities: a
    tuple of names or a count. With one modality and presence 1 it is the plain low-rank branch."""

    def __init__(self, dim, modalities, rank=4):
        super().__init__()
        if isinstance(modalities, int):
            modalities = (f"modality {m}" for m in range(modalities))
        self.modalities = tuple(modalities)
        M = len(self.modalities)
        if isinstance(modalities, str) or len(set(self.modalities)) < M:
            raise ValueError(f"modalities {modalities!r}: write each name once, as in ('image',)")
        if rank < 1 or M < 1:
            raise ValueError(f"rank {rank} with {M} modalities: both must be at least 1")
        # In half precision most of Adam's steps would round to nothing; the forward casts instead.
        dtype = torch.promote_types(torch.get_default_dtype(), torch.float32)
        self.down = nn.Parameter(torch.randn(dim, rank, dtype=dtype) / rank)
        self.up = nn.Parameter(torch.zeros(M, rank, dim, dtype=dtype))

    def fold(self, present):
        """One up-projection per row of presence: [..., M] -> [..., r, D], sum_m present_m up_m."""
        M, r, D = self.up.shape
        return (present.to(self.up) @ self.up.reshape(M, r * D)).unflatten(-1, (r, D))

    def forward(self, x, present):
        """x [B,T,D], present [B,M] of 0/1 -> [B,T,D]. The branch is linear in presence, so the sum
        over m comes first: one bmm, no loop over samples. ValueError if presence is not x's."""
        shape = [*x.shape[:-2], len(self.modalities)]
        if not torch.jit.is_tracing() and list(present.shape) != shape:
            raise ValueError(f"presence {list(present.shape)} for x [B,T,D] = {list(x.shape)}: has "
                             f"to be [B,M] = {shape}; if x is [T,B,D], pass MoRABlock batch_dim=1")
        return (x @ cast(self.down, x)) @ cast(self.fold(present), x)  # [B,T,r] @ [B,r,D]


class FoldedMoRA(nn.Module):
    """A MoRA whose presence pattern is fixed: two matrices, what an exported graph holds."""

    def __init__(self, mora, present):
        super().__init__()
        self.register_buffer("down", mora.down.detach().clone())
        self.register_buffer("up", mora.fold(torch.as_tensor(present)).detach())

    def forward(self, x, present=None):
        return (x @ cast(self.down, x)) @ cast(self.up, x)


class MoRABlock(nn.Module):
    """A transformer block with the branch beside it: block(x, ...) + mora(x, present).

    Whatever else the block takes or returns is passed on; of a tuple, the first item is the hidden
    state. A model that cannot hand `present` [B,M] down to its blocks sets `.present` before each
    call, which uses it up. batch_dim: 1 for a block whose x is [T,B,D]."""

    def __init__(self, block, mora, batch_dim=None):
        super().__init__()
        self.block = block
        self.mora = mora
        self.batch_dim = batch_dim or 0
        self.next_presence = {}  # {`caller`: [B,M]}
        if batch_dim is None and not all(getattr(m, "batch_first", True) for m in self.modules()):
            raise ValueError("block with batch_first=False: pass batch_dim=1, or 0 for x [B,T,D]")

    @property
    def present(self):
        return self.next_presence.get(caller(self))

    @present.setter
    def present(self, present):
        self.next_presence[caller(self)] = present

    def forward(self, x, *args, present=None, **kwargs):
        tokens = x.transpose(0, self.batch_dim) if self.batch_dim else x  # [B,T,D]
        if present is None and isinstance(self.mora, MoRA):
            present = presence_of(self, tokens)
        elif self.next_presence:
            self.next_presence.pop(caller(self), None)  # the argument goes first
        out = self.block(x, *args, **kwargs)
        branch = self.mora(tokens, present)
        if self.batch_dim:
            branch = branch.transpose(0, self.batch_dim)
        return (out[0] + branch, *out[1:]) if isinstance(out, tuple) else out + branch


class Prompts(nn.Module):
    """Baseline: missing-aware prompts (Lee et al., arXiv 2303.03369), L tokens for each pattern."""

    def __init__(self, dim, modalities, length):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 ** len(modalities), length, dim) * 0.02)
        self.register_buffer("bits", 2.0 ** torch.arange(len(modalities)), persistent=False)

    def forward(self, x, bias, present):
        """x [B,T,D] -> [B,T+L,D], prompt last; the attention bias [B,1,1,T] grows by L zeros."""
        prompt = self.table[(present.to(self.bits) @ self.bits).long()].to(x.dtype)  # [B,L,D]
        zeros = bias.new_zeros(1, 1, 1, 1).expand(bias.shape[0], 1, 1, int(prompt.shape[1]))
        bias = torch.cat([bias, zeros], 3)
        return torch.cat([x, prompt.expand(x.shape[0], -1, -1)], 1), bias


def attach(model, method, rank=4):
    """Put a method's fresh adapter on a `ViT`-like model (`.modalities`, `.blocks`, `.prompts`) and
    choose what trains; returns the model.

    head: nothing is added. lora: plain LoRA branch with the same number of parameters: one
    up-projection, a higher rank. mora: the method. mora-open: all `gates` are 1. mora-shuffled: the
    gates of another sample. mora-all: a branch beside every block. prompt: as many parameters as
    MoRA or slightly more. full: everything trains. Pooler and head train in every method."""
    if method not in METHODS:
        raise ValueError(f"method '{method}' is not known; use {', '.join(METHODS)}")
    dim = model.pooler.in_features
    M = len(model.modalities)
    model.requires_grad_(method == "full")
    model.pooler.requires_grad_(True)
    model.head.requires_grad_(True)
    if method == "lora":  # 2 r' D = (1 + M) r D
        model.blocks[0] = MoRABlock(model.blocks[0], MoRA(dim, 1, max(1, round(rank * (1 + M) / 2))))
    elif method == "prompt":  # 2^M L D = (1 + M) r D
        model.prompts = Prompts(dim, model.modalities, max(1, round(rank * (1 + M) / 2**M)))
    elif method.startswith("mora"):
        for i in range(len(model.blocks) if method == "mora-all" else 1):
            model.blocks[i] = MoRABlock(model.blocks[i], MoRA(dim, model.modalities, rank))
    return model


def gates(method, present, shuffled=None):
    """The presence [B,M] that a method's adapter gets; attention always gets the true one. For lora
    it is one gate [B,1], always 1; for mora-shuffled, `shuffled` [B,M]: other samples' rows."""
    if method == "lora":
        return torch.ones_like(present[:, :1])
    if method == "mora-open":
        return torch.ones_like(present)
    return shuffled if method == "mora-shuffled" else present


def adapter_parameters(model):
    """{name: parameter} that a method adds: branches and prompts, without pooler and head."""
    return {n: p for n, p in model.named_parameters() if ".mora." in n or n.startswith("prompts.")}


def branch_ranks(state):
    """{layer: rank} of the branches in a state dict."""
    end = ".mora.down"
    return {n.removesuffix(end): down.shape[1] for n, down in state.items() if n.endswith(end)}


def fold(model, present):
    """Fold every branch of the model, in place, for one presence row [M]; returns the model. Those
    trained with other gates (lora, mora-open) are folded with the row they were trained with."""
    for block in model.blocks:
        if isinstance(block, MoRABlock) and isinstance(block.mora, MoRA):
            block.mora = FoldedMoRA(block.mora, present)
    return model


# ==== 2. PRESENCE THAT WAS SET, NOT PASSED ========================================================

# {memory of x: {(block, place of x in it): [B,M]}}; an entry goes when that memory does.
PAST = weakref.WeakKeyDictionary()


def caller(block):
    """Whose calls a presence is for that is set now: (block, thread, backward or -1). Copies of the
    block, other threads, and a backward that recomputes must not take it."""
    # torch.utils.checkpoint asks this private function too. Should it go, no caller equals another:
    # presence that was set is refused, and presence that is passed still works.
    backward = getattr(torch._C, "_current_graph_task_id", object)()
    return id(block), threading.get_ident(), backward


def presence_of(block, x):
    """The presence [B,M] that was set for this call of a block, gone after it. Activation
    checkpointing calls again in the backward: then it is what the same x [B,T,D], known by its
    memory, was given in the forward. ValueError if none was set; RuntimeError if that x is not
    known, or was given two presences."""
    if torch.compiler.is_compiling():  # breaks the graph: a compiler would lose what PAST holds
        raise RuntimeError("MoRABlock.present cannot be compiled: pass present as an argument")
    try:
        past = PAST.setdefault(x.untyped_storage(), {})
    except RuntimeError:  # a tensor of torch.func, which has no memory of its own
        past = {}
    place = (weakref.ref(block), x.storage_offset(), x.shape, x.stride())
    call = caller(block)
    present = block.next_presence.pop(call, None)
    if present is None:
        if call[-1] == -1:
            raise ValueError("which modalities are present? pass present [B,M], or set "
                             "MoRABlock.present before each call, in the thread that calls")
        if place not in past or past[place].isnan().any():
            raise RuntimeError("MoRABlock is recomputed and cannot tell which presence x had: "
                               "hand present [B,M] down as an argument of what is checkpointed")
        return past[place]
    frozen = not present.requires_grad
    present = present.to(block.mora.up)
    fits = list(present.shape) == [x.shape[0], len(block.mora.modalities)]
    if fits and not torch.is_inference_mode_enabled():
        # NaN where x was given another presence too, or one whose gradient would be lost.
        same = past.get(place, present) == present
        past[place] = torch.where(same & frozen, present.detach(), torch.nan)
    return present
