"""SeLoRA, self-expanding low-rank adaptation (Mao et al., arXiv 2408.07196), whole, in one file.

    y = base(x) + s (x A) (active * B)        A random, B zero, `active` opens the first `rank` of C rows

Every layer starts at a small rank and grows where Fisher information says that another rank would be worth it. Read
in order: the layers; inject and merge; Fisher information, first as a loop, then from one ordinary backward; the
rules that spend it. Plain LoRA is this file without `grow`.

Letters: N samples, T tokens or pixels, C capacity, r rank, d_in and d_out widths, k kernel, s scale; K is the next
waiting column of A, G_n the gradient of sample n's loss with respect to the full weight of a layer.
"""

import copy
import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

KINDS = (nn.Linear, nn.Conv2d)
GROWTH = ("ratio", "gain", "random", "cheapest")  # rules of `grow`, asked again and again during training
PLANS = ("inverse-cost", "neyman")  # rules of `plan`, asked once, before the first step


# ---- the layers


class LoRALayer(nn.Module):
    """What both layers share. Growing is `layer.rank += 1`: row `rank` of the 0/1 buffer `active` opens.

    A waiting row of B is zero and gets no gradient, so growth changes the output by exactly 0, no shape changes, and
    the optimizer keeps its state. The scale is constant: an alpha / r would move the output at each growth. Adam counts
    steps per tensor, so the first step of a row that opens late is up to .1 / sqrt(.001) = 3.2 learning rates long."""

    kind, axis = nn.Module, 0  # what is adapted; which dimension of A counts its columns

    def __init__(self, base, rank=1, capacity=8, scale=2.0):
        super().__init__()
        if problem := refusal(base, rank, capacity, (self.kind,)):
            raise ValueError(problem)
        self.base, self.capacity, self.scale = base.requires_grad_(False), capacity, float(scale)
        self.d_out, self.fan_in = base.weight.flatten(1).shape
        shape, like = list(base.weight.shape[1:]), dict(dtype=base.weight.dtype, device=base.weight.device)
        shape.insert(self.axis, capacity)
        bound = math.sqrt(6 / self.fan_in)  # Kaiming; nn.init.kaiming_uniform_ would take C for the fan-in of [d_in,C]
        self.A = nn.Parameter(torch.empty(shape, **like).uniform_(-bound, bound))
        self.B = nn.Parameter(torch.zeros(capacity, self.d_out, **like))
        self.register_buffer("active", torch.zeros(capacity, 1, **like))
        self._rank, self.rank = 0, rank

    @property
    def rank(self):
        """How many rows are open. An int beside the buffer: reading it never waits for a GPU."""
        return self._rank

    @rank.setter
    def rank(self, rank):
        if not self._rank <= rank <= self.capacity:
            raise ValueError(f"rank {self._rank} can be raised up to the capacity {self.capacity}, not set to {rank}")
        self.active[:rank] = 1
        self._rank = int(rank)

    def _load_from_state_dict(self, *args, **kwargs):  # the rank travels as `active`
        super()._load_from_state_dict(*args, **kwargs)
        self._rank = int(self.active.sum())

    # Merged, for code that computes with `layer.weight` itself, as nn.TransformerEncoderLayer does in inference.
    weight = property(lambda self: self.base.weight + self.delta())
    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        return f"rank={self.rank}, capacity={self.capacity}, scale={self.scale}"


class LoRALinear(LoRALayer):
    """y = base(x) + s (x A) (active * B), x [...,d_in] -> [...,d_out]; A [d_in,C], B [C,d_out].

    Freezes `base`. ValueError: rank above capacity, or a base that is not a plain nn.Linear."""

    kind, axis = nn.Linear, 1

    def forward(self, x):
        y, h = self.base(x), x @ self.A
        rows, h = y.reshape(-1, self.d_out), h.reshape(-1, h.shape[-1])
        # addmm: the sum rides on the product, without a pass over y of its own
        return torch.addmm(rows, h, self.active * self.B, alpha=self.scale).view_as(y)

    def delta(self):
        """The change of the base's weight, [d_out,d_in]."""
        return self.scale * (self.A @ (self.active * self.B)).T


class LoRAConv2d(LoRALayer):
    """y = base(x) + s conv(conv(x, A), active * B), x [N,c_in,H,W] -> [N,c_out,H',W'].

    A [C,c_in,k,k] convolves as the base does (stride, padding, dilation), B [C,c_out] is a 1x1 convolution. Freezes
    `base`. ValueError: rank above capacity, groups > 1, a padding mode other than zeros."""

    kind, axis = nn.Conv2d, 0

    def down(self, x, A):
        """x [N,c_in,H,W] convolved with filters A [j,c_in,k,k], as the base convolves -> [N,j,H',W']."""
        return F.conv2d(x, A, None, self.base.stride, self.base.padding, self.base.dilation)

    def forward(self, x):
        y, h = self.base(x), self.down(x, self.A).flatten(2)  # [N,c_out,H',W'], [N,C,H'W']
        up = (self.active * self.B).T.expand(x.shape[0], -1, -1)  # the 1x1 convolution
        return torch.baddbmm(y.flatten(2), up, h, alpha=self.scale).view_as(y)

    def delta(self):
        """The change of the base's weight, [c_out,c_in,k,k]."""
        return self.scale * torch.einsum("ro,rcij->ocij", self.active * self.B, self.A)


def refusal(layer, rank, capacity, kinds=KINDS):
    """Why a layer cannot be adapted so, or ''."""
    kind = type(layer).__name__
    if isinstance(layer, NonDynamicallyQuantizableLinear):
        return f"{kind}: nn.MultiheadAttention reads its weight without calling it, so its Fisher is out of reach"
    if not isinstance(layer, kinds):
        return f"{kind} is not supported, only {' and '.join(k.__name__ for k in kinds)}"
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"{kind} with groups={layer.groups} and padding_mode='{layer.padding_mode}': only 1 and 'zeros' will do"
    if not 0 <= rank <= capacity or capacity < 1:
        return f"rank {rank} with capacity {capacity}: rank must be 0 to capacity, capacity at least 1"
    return ""


# ---- inject, merge, save


def inject(model, targets=None, rank=1, capacity=8, scale=2.0):
    """Freeze the model, put an adapter in place of layers, and return their names; then only A and B train.

    targets: a regular expression that has to match the WHOLE name of a layer (re.fullmatch); None is every Linear and
    Conv2d, without the out_proj of nn.MultiheadAttention. A layer that stands under several names matches by any of
    them, becomes one adapter under all of them, and is returned by its first. A is drawn from torch's global
    generator, in the order of the names. ValueError, before anything is changed: targets are no expression, match
    nothing or a layer with weights that cannot be adapted; a convolution that cannot be; rank above capacity; adapters
    are there."""
    if adapters(model):
        raise ValueError(f"the model has adapters already ({next(iter(adapters(model)))}, ...): merge it first")
    try:
        re.compile(targets or "")
    except re.error as error:
        raise ValueError(f"targets {targets!r} is not a regular expression: {error}") from None
    names, chosen = {}, {}  # layer: its first name
    for name, layer in model.named_modules(remove_duplicate=False):
        names.setdefault(layer, name)
        if targets is None:
            wanted = isinstance(layer, KINDS) and not isinstance(layer, NonDynamicallyQuantizableLinear)
        else:  # a container has no weights of its own: what matters is what is in it
            wanted = re.fullmatch(targets, name) and any(p is not None for p in layer._parameters.values())
        if wanted:
            if problem := refusal(layer, rank, capacity):
                raise ValueError(f"layer '{name}': {problem} (which layers are adapted is chosen by `targets`)")
            chosen[layer] = names[layer]
    if not chosen:
        raise ValueError(f"targets {targets!r} match no layer; names are like {list(names.values())[-3:]}")
    if model in chosen:
        raise ValueError("the model is itself the layer to replace: put it into an nn.Sequential first")
    model.requires_grad_(False)
    replace(model, {layer: (LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear)(layer, rank, capacity, scale)
                    for layer in chosen})
    return list(chosen.values())


def replace(model, new):
    """Put new[child] in place of each child of the model that is a key of `new`, under every name that it has."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


def adapters(model):
    """{name: layer} of the model's adapters."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def adapter_groups(model, weight_decay):
    """Parameter groups for AdamW: decay for B, none for A, whose waiting columns it would shrink."""
    layers = adapters(model).values()
    return [dict(params=[layer.A for layer in layers], weight_decay=0.0),
            dict(params=[layer.B for layer in layers], weight_decay=weight_decay)]


@torch.no_grad()
def merge(model):
    """Replace every adapter, in place, by its base with the weight W + delta; returns the model, free of adapters.

    The sum is made in float64 on the CPU: no TF32, no autocast. A weight that was tied to another is untied."""
    layers = adapters(model).values()
    for layer in layers:
        exact, weight = copy.deepcopy(layer).cpu().double(), layer.base.weight
        layer.base.weight = nn.Parameter(exact.weight.to(weight), requires_grad=False)
    replace(model, {layer: layer.base for layer in layers})
    return model


def adapter_state(model):
    """{name: {"A", "B", "scale"}}: the active rows only, as CPU tensors and a float; what is shared or deployed.

    To resume a training, keep the model's state_dict, which also holds the waiting columns."""
    rows = lambda p, axis, rank: p.detach().narrow(axis, 0, rank).cpu().clone()
    return {name: dict(A=rows(layer.A, layer.axis, layer.rank), B=rows(layer.B, 0, layer.rank), scale=layer.scale)
            for name, layer in adapters(model).items()}


def check_names(layers, given):
    """ValueError unless `given` has the layers of the model's adapters as keys."""
    if alone := sorted(layers.keys() ^ given.keys()):
        raise ValueError(f"layer '{alone[0]}' is in {'the model' if alone[0] in layers else 'what was given'} only")


@torch.no_grad()
def load_adapter(model, state):
    """Put what `adapter_state` gave into a model with adapters on the same layers, whatever their ranks are now.

    Ranks and scales become the state's, rows beyond are closed and zero, and the layers can grow on, up to their own
    capacity. ValueError, before anything is changed: other layers, other shapes, ranks above the capacity."""
    layers = adapters(model)
    check_names(layers, state)
    for name, layer in layers.items():
        if set(state[name]) != {"A", "B", "scale"}:
            raise ValueError(f"layer '{name}': the state needs A, B and scale, and has {sorted(state[name])}")
        A, B = state[name]["A"], state[name]["B"]
        shape = list(layer.A.shape)
        shape[layer.axis] = r = B.shape[0]
        if list(A.shape) != shape or list(B.shape) != [r, layer.d_out]:
            raise ValueError(f"layer '{name}': A {list(A.shape)} and B {list(B.shape)} do not fit: at rank {r} they "
                             f"must be {shape} and {[r, layer.d_out]}")
        if r > layer.capacity:
            raise ValueError(f"layer '{name}': rank {r} is above the capacity {layer.capacity}; inject with more")
    for name, layer in layers.items():
        A, B, r = state[name]["A"], state[name]["B"], state[name]["B"].shape[0]
        layer.A.narrow(layer.axis, 0, r).copy_(A)
        layer.B.zero_()[:r].copy_(B)
        layer.active.zero_()
        layer._rank, layer.scale = 0, float(state[name]["scale"])
        layer.rank = r


# ---- Fisher information


class Score(NamedTuple):
    """Fisher information of a layer, I = mean over samples of the squared per-sample gradient, summed over entries.

    current: of A's open columns and B's open rows, the paper's FI-Score. candidate: of the row of B that would open
    next, over A's next waiting column K. Growth leaves every output and with it every other gradient as it is, and K's
    own is zero while its row of B is, so the paper's FI-Ratio, FI-Score after growth over FI-Score before, is
    ratio = 1 + candidate / current. expected: E_K[candidate] over columns K as they are drawn."""

    current: float
    candidate: float
    expected: float
    ratio: float


def ratio(current, candidate):
    """1 + candidate / current; inf at rank 0, 1 where neither has any (a layer that was not used), nan of nan."""
    return 1 + candidate / current if current else candidate * math.inf if candidate else 1.0


def fisher_loop(model, losses):
    """{name: Score}, the explicit way: one backward per sample. `losses` [N], each sample's own loss, with the graph.

    The graph is kept and no `.grad` is touched, so `losses.mean().backward()` can follow. expected is estimated by the
    mean over all waiting columns, which is unbiased. At capacity candidate and expected are 0 and the ratio is 1.
    For reading and testing; `FisherProbe` is the fast way. ValueError: losses that are not [N] or have no graph."""
    if losses.dim() != 1 or not len(losses) or not losses.requires_grad:
        raise ValueError(f"losses {list(losses.shape)} must be one loss per sample, [N], with its graph")
    layers = adapters(model)
    parameters = [p for layer in layers.values() for p in (layer.A, layer.B)]
    sums = {name: [0.0, 0.0, 0.0] for name in layers}
    for layer in layers.values():
        # Open the waiting rows for the backward only. B is zero there, so no value changes: active * B is what it was,
        # and their gradient is what the first step after growth would see. `.data`, for autograd guards its inputs.
        layer.active.data.fill_(1)
    try:
        for loss in losses:
            gradients = iter(torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True))
            for name, layer in layers.items():
                A, B = next(gradients), next(gradients)
                if A is None:  # not used by the loss
                    continue
                r, rows = layer.rank, B.square().sum(1)  # [C]
                sums[name][0] += float(A.square().sum() + rows[:r].sum())  # a waiting column's gradient is zero
                if r < layer.capacity:
                    sums[name][1] += float(rows[r])
                    sums[name][2] += float(rows[r:].mean())
    finally:
        for layer in layers.values():
            layer.active.data[layer.rank:] = 0
    means = {name: [total / len(losses) for total in sums[name]] for name in layers}
    return {name: Score(*mean, ratio(*mean[:2])) for name, mean in means.items()}


class FisherProbe:
    """The same from one ordinary backward: a context manager around forward AND backward of a MEAN loss over N samples.

        with FisherProbe(model) as probe:
            loss = criterion(model(x), y)
            loss.backward()
        ranks = grow(model, probe.scores(), "ratio")

    Hooks keep each layer's input x and the gradient g of its output; the per-sample gradients of A and B are small
    products of the two. A layer that is called more than once in the forward gets the sum over its calls, as in the
    ordinary gradient. One forward and one backward per probe: the samples of a second batch would be taken for
    further calls on the first. Inputs and gradients are held until the probe is dropped. With expected=False
    `Score.expected` is nan, and the probe cheaper. A loss scaled by S (GradScaler) scales all but the ratio by S^2."""

    def __init__(self, model, expected=True):
        self.layers, self.expected = adapters(model), expected

    def __enter__(self):
        self.samples, self.calls = None, {name: [] for name in self.layers}  # name: [(x, g), ...]
        # prepended: a forward hook of somebody else may replace the output, and g has to be that of our own
        self.handles = [layer.register_forward_hook(lambda layer, inputs, y, name=name: self._watch(name, inputs[0], y),
                                                    prepend=True) for name, layer in self.layers.items()]
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _watch(self, name, x, y):
        if not y.requires_grad:  # an evaluation, or the first pass of a checkpointed block
            return
        if x.dim() < (4 if isinstance(self.layers[name], LoRAConv2d) else 2):
            raise ValueError(f"layer '{name}': input {list(x.shape)} has no dimension for the samples")
        self.samples = self.samples or x.shape[0]
        if x.shape[0] != self.samples:
            raise ValueError(f"layer '{name}': input {list(x.shape)} has not the {self.samples} samples of the other "
                             "layers as its first dimension; leave the layer out by `targets`")
        x = x.detach()
        y.register_hook(lambda g: self.calls[name].append((x, g.detach())))

    @torch.no_grad()
    def scores(self):
        """{name: Score}; one transfer from the device. RuntimeError if no backward ran inside the probe."""
        if not any(self.calls.values()):
            raise RuntimeError("the probe saw no backward: run forward and backward inside `with FisherProbe(model):`")
        with torch.autocast(next(iter(self.layers.values())).A.device.type, enabled=False):
            sums = {n: fisher(self.layers[n], calls, self.expected) for n, calls in self.calls.items() if calls}
        # The loss is a mean, so sample n's own gradient is N g_n: I = (1/N) sum_n |N g_n|^2 = N sum_n |g_n|^2.
        means = dict(zip(sums, (self.samples * torch.stack(list(sums.values()))).tolist()))
        unused = [0.0, 0.0, 0.0 if self.expected else math.nan]
        means = {name: means.get(name, unused) for name in self.layers}
        return {name: Score(*mean, ratio(*mean[:2])) for name, mean in means.items()}


def fisher(layer, calls, expected):
    """[current, candidate, expected], each summed over samples instead of averaged, from the (x, g) of each call.

    Everything is a product over positions, X_n U_n^T with X [N,a,T] and U [N,b,T], so the calls of a shared layer are
    put behind each other along T."""
    r, dtype = layer.rank, torch.promote_types(layer.A.dtype, torch.float32)
    A = layer.A.narrow(layer.axis, 0, min(r + 1, layer.capacity)).to(dtype)  # the open columns and K
    B = (layer.active * layer.B)[:max(r, 1)].to(dtype)
    calls = [(x.to(dtype), g.to(dtype)) for x, g in calls]
    join = lambda parts: parts[0] if len(parts) == 1 else torch.cat(parts, 2)
    h, g, x, u = (join(parts) for parts in zip(*(factors(layer, x, g, A, B) for x, g in calls)))
    rows = (h @ g.mT).square().sum((0, 2))  # per-sample gradient of B, / s: [N,r+1,d_out] -> [r+1]
    full = rows.new_full((), 0.0 if expected else math.nan)
    if expected and r < layer.capacity:  # E |K^T G_n|^2 = (2 / fan_in) |G_n|^2, as K's entries have variance 2 / fan_in
        full = 2 / layer.fan_in * (squared_norm(x, g) if isinstance(layer, LoRALinear) else
                                   conv_norm(layer.base, *calls[0]) if len(calls) == 1 else
                                   squared_norm(join([unfold(layer.base, x) for x, _ in calls]), g))
    return layer.scale**2 * torch.stack([squared_norm(x, u) + rows[:r].sum(), rows[r:].sum(), full])


def factors(layer, x, g, A, B):
    """One call's h, g, x, u, each [N,*,T]: a sample's gradient of B is s h g^T, that of A the entries of s x u^T."""
    if isinstance(layer, LoRALinear):  # [N,...,d] -> [N,T,d]; u = B^T g
        x, g = (t.reshape(len(t), -1, t.shape[-1]) for t in (x, g))
        return (x @ A).mT, g.mT, x.mT, (g @ B.T).mT
    base, h, u = layer.base, layer.down(x, A).flatten(2), torch.einsum("ro,nohw->nrhw", B, g)
    (H, W), (kh, kw), (sh, sw) = x.shape[2:], base.kernel_size, base.stride
    if isinstance(base.padding, str) or base.dilation != (1, 1) or base.padding[0] >= kh or base.padding[1] >= kw:
        return h, g.flatten(2), unfold(base, x), u.flatten(2)  # [N,c_in k k,T'], [N,r,T']
    # A's gradient pairs each output pixel with the k x k inputs below it, which is each input pixel with the k x k
    # outputs above it: unfold u, of r channels, not x, of c_in. Padding k - 1 - p, zeros between outputs of a stride.
    wide = u.new_zeros(*u.shape[:2], H + kh - 1, W + kw - 1)
    wide[:, :, kh - 1 - base.padding[0]::sh, kw - 1 - base.padding[1]::sw][:, :, :u.shape[2], :u.shape[3]] = u
    return h, g.flatten(2), x.flatten(2), F.unfold(wide, (kh, kw))  # [N,c_in,HW], [N,r k k,HW]


def pad(base, x):
    """x with the zeros that a convolution puts around it; 'same' puts the odd one to the right and the bottom."""
    if base.padding == "same":
        h, w = (d * (k - 1) for d, k in zip(base.dilation, base.kernel_size))
        return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
    h, w = (0, 0) if base.padding == "valid" else base.padding
    return F.pad(x, (w, w, h, h))


def unfold(base, x):
    """The input patch below each output pixel of a convolution: [N,c_in,H,W] -> [N,c_in k k,T]."""
    return F.unfold(pad(base, x), base.kernel_size, base.dilation, 0, base.stride)


def squared_norm(x, u):
    """sum_n ||X_n U_n^T||_F^2 for x [N,a,T], u [N,b,T], by the cheaper of the product and the Gram identity
    ||sum_t x_t u_t^T||^2 = sum_tt' (x_t . x_t') (u_t . u_t').
    """
    (_, a, T), b = x.shape, u.shape[1]
    if T * (a + b) < a * b:
        return dot(x.mT @ x, u.mT @ u)  # [N,T,T]
    product = x @ u.mT  # [N,a,b]
    return dot(product, product)


def conv_norm(base, x, g):
    """squared_norm of unfold(x) [N,c_in k k,T] and g [N,c_out,T]. Below some 100 pixels the Gram matrix wins, and that
    of the patches needs no patches: it is that of the pixels, summed over k x k shifts.
    """
    x, (N, d_out, H, W), (kh, kw) = pad(base, x), g.shape, base.kernel_size
    T, pixels, c_in = H * W, x.shape[2] * x.shape[3], x.shape[1]
    if pixels**2 * c_in + T**2 * (kh * kw + d_out) > T * kh * kw * c_in * d_out:
        return squared_norm(F.unfold(x, base.kernel_size, base.dilation, 0, base.stride), g.flatten(2))
    gram = (x.flatten(2).mT @ x.flatten(2)).reshape(N, *x.shape[2:] * 2)  # [N,H'',W'',H'',W''] of the padded pixels
    shifts = [[slice(i * d, i * d + (n - 1) * s + 1, s) for i in range(k)]
              for k, n, d, s in zip(base.kernel_size, (H, W), base.dilation, base.stride)]
    gram = sum(gram[:, :, j, :, j] for j in shifts[1])  # [N,H'',W,H'',W]
    gram = sum(gram[:, i, :, i] for i in shifts[0])  # [N,H,W,H,W]
    return dot(gram.reshape(N, T, T), g.flatten(2).mT @ g.flatten(2))


def dot(a, b):
    """sum of a * b, without the product in memory."""
    return a.flatten().dot(b.flatten())


# ---- growth: who gets the next rank


def adapter_cost(layer):
    """Parameters of one rank of a layer: a column of A and a row of B."""
    return layer.fan_in + layer.d_out


def adapter_parameters(model):
    """Active adapter parameters of the model: the sum of rank times cost."""
    return sum(layer.rank * adapter_cost(layer) for layer in adapters(model).values())


def grow(model, scores=None, rule="ratio", lam=1.3, ratio_of="sampled", budget=None, generator=None):
    """Raise ranks by one where the rule says so; returns {name: new rank} of the layers that grew.

    ratio     layers whose FI-Ratio is at least lam, the largest first; ratio_of="expected": 1 + expected / current
    gain      the most expected Fisher information per parameter first
    random    in an order drawn from `generator` (default: torch's global one)
    cheapest  the cheapest layers first

    At most one rank a layer and call; layers at capacity are passed over, and where all are, the answer is {}.
    budget: adapter parameters of the whole model, never exceeded: layers are taken in order, those that do not fit are
    passed over. Only `ratio` can do without. Raise it from call to call: where it allows every layer its next rank, all
    rules do the same. ValueError: unknown rule, missing or nan scores, a budget below what the model has already."""
    layers = adapters(model)
    if rule not in GROWTH or ratio_of not in ("sampled", "expected"):
        raise ValueError(f"rule '{rule}', ratio_of '{ratio_of}': use {', '.join(GROWTH)}, sampled or expected")
    if budget is None and rule != "ratio":
        raise ValueError(f"rule '{rule}' needs a budget: without one it would grow every layer")
    if budget is not None and budget < adapter_parameters(model):
        raise ValueError(f"a budget of {budget} parameters is below the {adapter_parameters(model)} that the adapters "
                         "have already")
    waiting = {name: adapter_cost(layer) for name, layer in layers.items() if layer.rank < layer.capacity}
    if rule == "random":
        order = [list(waiting)[i] for i in torch.randperm(len(waiting), generator=generator)]
    elif rule == "cheapest":
        order = sorted(waiting, key=waiting.get)
    else:
        if missing := [name for name in waiting if scores is None or name not in scores]:
            raise ValueError(f"rule '{rule}' has no score for layer '{missing[0]}'")
        merit = {name: scores[name].expected / waiting[name] if rule == "gain" else scores[name].ratio if
                 ratio_of == "sampled" else ratio(scores[name].current, scores[name].expected) for name in waiting}
        if unknown := [name for name in waiting if math.isnan(merit[name])]:
            raise ValueError(f"layer '{unknown[0]}': {scores[unknown[0]]} has nan where rule '{rule}' reads; "
                             "use FisherProbe(model, expected=True), and look for nan in the loss")
        order = sorted((name for name in waiting if (merit[name] > 0 if rule == "gain" else merit[name] >= lam)),
                       key=merit.get, reverse=True)
    grown, left = {}, math.inf if budget is None else budget - adapter_parameters(model)
    for name in order:
        if waiting[name] <= left:
            left -= waiting[name]
            layers[name].rank += 1
            grown[name] = layers[name].rank
    return grown


def full_gradients(model, loss):
    """{name: [d_out,fan_in]}, the gradient of `loss()`, a scalar, by the full weight of each adapted layer.

    loss: a function without arguments that does the forward, for the frozen weights have to be open while it runs. No
    `.grad` is touched, and they are frozen again after it."""
    weights = {name: layer.base.weight for name, layer in adapters(model).items()}
    for weight in weights.values():
        weight.requires_grad_(True)
    try:
        gradients = torch.autograd.grad(loss(), list(weights.values()), allow_unused=True, materialize_grads=True)
    finally:
        for weight in weights.values():
            weight.requires_grad_(False)
    return {name: g.flatten(1) for name, g in zip(weights, gradients)}


def plan(model, rule, budget, gradients=None):
    """Ranks {name: rank} for a budget of adapter parameters, chosen before the first step; `set_ranks` applies them.

    inverse-cost  r ~ 1 / cost: cheap layers get more, without looking at any data
    neyman        r ~ sqrt(D / cost), which minimises sum D / r under sum cost r = budget (Neyman allocation).
                  `gradients`: `full_gradients` of two or more batches, at B = 0. With G_a and G_b their means over odd
                  and even batches, m_o = max(0, <G_a[o], G_b[o]>) is |E G[o]|^2 of output row o, without the noise
                  that the square of one mean has; v_o is the mean over batches of |G[o]|^2; and
                  D = sqrt(2 / fan_in) sum_o m_o / sqrt(v_o) is what a rank should save in Adam's first step

    Rank 0 is allowed. ValueError: unknown rule, fewer than two batches, a budget that buys no rank."""
    layers = adapters(model)
    costs = {name: adapter_cost(layer) for name, layer in layers.items()}
    if rule not in PLANS:
        raise ValueError(f"rule '{rule}' is not known; use {', '.join(PLANS)}")
    if budget < min(costs.values()):
        raise ValueError(f"a budget of {budget} parameters buys no rank: the cheapest costs {min(costs.values())}")
    weights = {name: 1 / cost for name, cost in costs.items()}
    if rule == "neyman":
        count, means, squares = 0, [{}, {}], {}
        for batch in gradients or ():  # one at a time: a generator never holds two
            for name, G in batch.items():
                half = means[count % 2]
                half[name] = half.get(name, 0) + G
                squares[name] = squares.get(name, 0) + G.square().sum(1)  # [d_out]
            count += 1
        if count < 2:
            raise ValueError(f"rule 'neyman' compares batches: it needs the gradients of two or more, not of {count}")
        for name, layer in layers.items():
            m = (means[0][name] * means[1][name]).sum(1).clamp(min=0) / (count**2 // 4)  # [d_out]
            D = (m / (squares[name] / count).sqrt()).nan_to_num(0).sum() * math.sqrt(2 / layer.fan_in)  # 0 / 0: unused
            weights[name] = math.sqrt(float(D) / costs[name])
    return apportion(weights, costs, budget, {name: layer.capacity for name, layer in layers.items()})


def apportion(weights, costs, budget, capacities):
    """Ranks r = clip(round(c weight), 0, capacity), c bisected to sum cost r <= budget, the rest by largest remainder.

    All arguments but the budget are {name: number}. A layer of weight 0 gets rank 0."""
    ranks = lambda c: {n: min(math.floor(c * w + 0.5), capacities[n]) for n, w in weights.items()}
    spent = lambda r: sum(costs[n] * k for n, k in r.items())
    low, high = 0.0, max([capacities[n] / w for n, w in weights.items() if w > 0], default=0.0)  # `high` fills all
    for _ in range(100):
        c = (low + high) / 2
        low, high = (c, high) if spent(ranks(c)) <= budget else (low, c)
    chosen = ranks(low)
    for name in sorted(weights, key=lambda n: low * weights[n] - chosen[n], reverse=True):
        if weights[name] > 0 and chosen[name] < capacities[name] and spent(chosen) + costs[name] <= budget:
            chosen[name] += 1
    return chosen


def set_ranks(model, ranks):
    """Raise each layer to its rank: a plan, or another run's final ranks. ValueError, before anything is changed, where
    the layers are others or a rank cannot be reached.
    """
    layers = adapters(model)
    check_names(layers, ranks)
    for name, layer in layers.items():
        if not layer.rank <= ranks[name] <= layer.capacity:
            raise ValueError(f"layer '{name}': rank {layer.rank} can be raised up to the capacity {layer.capacity}, "
                             f"not set to {ranks[name]}")
    for name, layer in layers.items():
        layer.rank = ranks[name]
