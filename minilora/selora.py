"""SeLoRA, self-expanding low-rank adaptation (Mao et al., arXiv 2408.07196), whole, in one file.

    y = base(x) + s (x A) (active * B)   A random, B zero, `active` opens the first `rank` of C rows

Every layer starts at a small rank and grows where Fisher information says that another rank would
be worth it. Plain LoRA is this file without `grow`. The method ends with part 1: skip 2, merging
and saving, 3, the products behind the probe, and 4, what is refused. The file needs torch alone:
copy it as it stands.
Letters: N samples, T tokens or pixels, C capacity, r rank, d_in and d_out widths, k kernel, s
scale, K the next waiting column of A, G_n sample n's gradient by the full weight of a layer.
"""

import copy
import math
import re
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear as AttentionOutput

# ==== 1. THE METHOD ===============================================================================

KINDS = (nn.Linear, nn.Conv2d)
GROWTH = ("ratio", "gain", "random", "cheapest")  # rules of `grow`, asked again and again


def cast(weight, dtype):
    """The weight in a dtype; where it has that, without a call of torch in every forward."""
    return weight if weight.dtype == dtype else weight.to(dtype)


class LoRALayer(nn.Module):
    """What both layers share. Growing is `layer.rank += 1`: row `rank` of the 0/1 buffer `active`
    opens.

    A waiting row of B is zero and gets no gradient, so growth changes the output by exactly 0, no
    shape changes, and the optimizer keeps its state. The scale is constant: an alpha / r would move
    the output at each growth. Adam counts steps per tensor, so the first step of a row that opens
    late is up to .1 / sqrt(.001) = 3.2 learning rates long. With B = 0 the first step of a layer changes
    its output in proportion to rank times scale times learning rate."""

    def __init__(self, base, rank=1, capacity=8, scale=2.0):
        super().__init__()
        if problem := refusal(base, rank, capacity, (self.kind,)):
            raise ValueError(problem)
        self.base = base.requires_grad_(False)
        self.capacity = capacity
        self.scale = float(scale)
        self.d_out, self.fan_in = base.weight.flatten(1).shape
        shape = list(base.weight.shape[1:])
        shape.insert(self.axis, capacity)  # [d_in,C] or [C,c_in,k,k]
        # Kaiming; nn.init.kaiming_uniform_ would take C for the fan-in of [d_in,C].
        bound = math.sqrt(6 / self.fan_in)
        # In bfloat16 most steps of Adam would round to nothing: a half-precision base gets float32.
        like = base.weight.new_empty(0, dtype=torch.promote_types(base.weight.dtype, torch.float32))
        self.A = nn.Parameter(like.new_empty(shape).uniform_(-bound, bound))
        self.B = nn.Parameter(like.new_zeros(capacity, self.d_out))
        self.register_buffer("active", like.new_zeros(capacity, 1))
        self.weight_was_read = False
        self._seen = None
        self.open(rank)

    @property
    def rank(self):
        """How many rows are open, an int. `active` is the truth and travels with the weights; it is
        read from the device only after it changed."""
        self.look()
        if self._rank is None:
            self._rank = int(self.active.count_nonzero())
            if not self.active[: self._rank].all():
                raise ValueError(f"the open rows {self.active.flatten().tolist()} are not the first ones")
        return self._rank

    @rank.setter
    def rank(self, rank):
        if not self.rank <= rank <= self.capacity:
            raise ValueError(f"rank {self.rank} can be raised up to the capacity {self.capacity}, not set to {rank}")
        self.open(rank)

    def open(self, rank):
        """Open the first rows, and no others."""
        self.active.zero_()[:rank] = 1
        self.look()
        self._rank = int(rank)

    def look(self):
        """Make `mask` again where `active` was written: an average of models leaves fractions in
        it, and a row that any of them opened is open."""
        active = self.active
        if self._seen != (id(active), active._version):
            self._seen = (id(active), active._version)
            self._rank = None
            self.mask = (active > 0).to(active.dtype)

    def open_B(self):
        """active * B, [C,d_out]: the waiting rows are zero and get no gradient."""
        if torch.compiler.is_compiling():  # versions cannot be read there
            return (self.active > 0) * self.B
        self.look()
        return self.mask * self.B

    @property
    def weight(self):
        """Merged, for code that reads `layer.weight`, as nn.TransformerEncoderLayer in
        inference."""
        self.weight_was_read = True
        return (self.base.weight + self.delta()).to(self.base.weight.dtype)

    bias = property(lambda self: self.base.bias)

    def extra_repr(self):
        return f"rank={self.rank}, capacity={self.capacity}, scale={self.scale}"


class LoRALinear(LoRALayer):
    """y = base(x) + s (x A) (active * B), x [...,d_in] -> [...,d_out]; A [d_in,C], B [C,d_out].

    Freezes `base`. ValueError: rank above capacity, or a base that is not a plain nn.Linear."""

    kind = nn.Linear
    axis = 1  # the dimension of A that counts its columns

    def forward(self, x):
        y = self.base(x)
        h = x @ cast(self.A, x.dtype)  # [...,C]
        rows = y.reshape(-1, self.d_out)  # addmm adds them, without a pass over y of its own
        h = h.reshape(-1, h.shape[-1])
        return torch.addmm(rows, h, cast(self.open_B(), h.dtype), alpha=self.scale).view_as(y)

    def delta(self):
        """The change of the base's weight, [d_out,d_in]."""
        return self.scale * (self.A @ self.open_B()).T


class LoRAConv2d(LoRALayer):
    """y = base(x) + s conv(conv(x, A), active * B), x [N,c_in,H,W] -> [N,c_out,H',W'].

    A [C,c_in,k,k] convolves as the base does (stride, padding, dilation), B [C,c_out] is a 1x1 one.
    Freezes `base`. ValueError: rank above capacity, groups > 1, a padding mode other than zeros."""

    kind = nn.Conv2d
    axis = 0

    def forward(self, x):
        if x.dim() == 3:  # an image without a batch, which the plain layer takes as well
            return self.forward(x.unsqueeze(0)).squeeze(0)
        y = self.base(x)
        h = self.down(x, cast(self.A, x.dtype)).flatten(2)  # [N,C,H'W']
        up = self.open_B().T.expand(x.shape[0], -1, -1)  # [N,c_out,C], the 1x1 convolution
        # Cast only now: the gradient of B is summed over samples in float32.
        return torch.baddbmm(y.flatten(2), cast(up, h.dtype), h, alpha=self.scale).view_as(y)

    def down(self, x, A):
        """x [N,c_in,H,W] convolved with filters A [j,c_in,k,k], as the base does -> [N,j,H',W']."""
        return F.conv2d(x, A, None, self.base.stride, self.base.padding, self.base.dilation)

    def delta(self):
        """The change of the base's weight, [c_out,c_in,k,k]."""
        return self.scale * torch.einsum("ro,rcij->ocij", self.open_B(), self.A)


def inject(model, targets=None, rank=1, capacity=8, scale=2.0):
    """Freeze the model, put an adapter in place of layers, and return their names; only A and B
    train.

    targets: a regular expression that has to match the WHOLE name of a layer (re.fullmatch); None
    is every Linear and Conv2d, without the out_proj of nn.MultiheadAttention. A layer that stands
    under several names matches by any of them, becomes one adapter under all of them, and is
    returned by its first. A is drawn from torch's global generator, in the order of the names.
    ValueError, before anything is changed: the model has adapters, ours or PEFT's; targets are no
    expression, or match nothing or a layer with weights that cannot be adapted (see `refusal`);
    rank above capacity."""
    if adapters(model):
        raise ValueError(f"the model has adapters already ({next(iter(adapters(model)))}, ...): merge it first")
    if foreign := [name for name, layer in model.named_modules() if hasattr(layer, "lora_A")]:
        raise ValueError(f"layer '{foreign[0]}' has an adapter of another library: merge or unload it first")
    if any(nn.parameter.is_lazy(p) for p in model.parameters()):
        raise ValueError("the model has parameters that are not initialized yet: run a batch first")
    try:
        re.compile(targets or "")
    except re.error as error:
        raise ValueError(f"targets {targets!r} is not a regular expression: {error}") from None
    names = {layer: name for name, layer in model.named_modules()}  # the first of each layer
    chosen = {}  # {layer: the class of its adapter}
    for name, layer in model.named_modules(remove_duplicate=False):
        if targets is None:
            wanted = isinstance(layer, KINDS) and not isinstance(layer, AttentionOutput)
        else:  # a container has no weights of its own: what matters is what is in it
            wanted = re.fullmatch(targets, name) and list(layer.parameters(recurse=False))
        if wanted:
            if problem := refusal(layer, rank, capacity):
                raise ValueError(f"layer '{name}': {problem} (which layers are adapted is chosen by `targets`)")
            chosen[layer] = LoRAConv2d if isinstance(layer, nn.Conv2d) else LoRALinear
    if not chosen:
        raise ValueError(f"targets {targets!r} match no layer; names are like {list(names.values())[-3:]}")
    if model in chosen:
        raise ValueError("the model is itself the layer to replace: put it into an nn.Sequential first")
    model.requires_grad_(False)
    replace(model, {layer: kind(layer, rank, capacity, scale) for layer, kind in chosen.items()})
    return [names[layer] for layer in chosen]


def replace(model, new):
    """Put new[child] in place of each child that is a key of `new`, under every name it has."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child in new:
                setattr(parent, name, new[child])


def adapters(model):
    """{name: layer} of the model's adapters."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LoRALayer)}


def adapter_groups(model, weight_decay):
    """Parameter groups for AdamW: decay for B, none for A: it would shrink the waiting columns."""
    layers = adapters(model).values()
    return [dict(params=[layer.A for layer in layers], weight_decay=0.0),
            dict(params=[layer.B for layer in layers], weight_decay=weight_decay)]


class Score(NamedTuple):
    """Fisher information of a layer, I = mean over samples of the squared per-sample gradient,
    summed over entries.

    Growth leaves every output, and so every other gradient, as it is, and K's
    is 0 while its row of B is: `ratio` is the paper's FI-Ratio, FI-Score after growth / before."""

    current: float  # of A's open columns and B's open rows, the paper's FI-Score
    candidate: float  # of the row of B that would open next, over A's next waiting column K
    expected: float  # E_K[candidate] over columns K as they are drawn
    ratio: float  # 1 + candidate / current


def ratio(current, candidate):
    """1 + candidate / current; inf at rank 0, 1 where both are 0 (an unused layer), nan of nan."""
    if current:
        return 1 + candidate / current
    return candidate * math.inf if candidate else 1.0


def fisher_loop(model, losses):
    """{name: Score}, the explicit way: one backward per sample. For reading and testing;
    `FisherProbe` is the fast way.

    losses [N], each sample's own, with the graph, which is kept; no `.grad` is touched, so
    `losses.mean().backward()` can follow. expected is estimated by the mean over all waiting
    columns, which is unbiased. At capacity candidate and expected are 0 and the ratio is 1. Of
    several processes each gives its part. ValueError: losses that are not [N] or have no graph."""
    if losses.dim() != 1 or not len(losses) or not losses.requires_grad:
        raise ValueError(f"losses {list(losses.shape)} must be one loss per sample, [N], with its graph")
    layers = adapters(model)
    parameters = [p for layer in layers.values() for p in (layer.A, layer.B)]
    ranks = [layer.rank for layer in layers.values()]
    sums = {name: [0.0, 0.0, 0.0] for name in layers}  # current, candidate, expected
    for layer in layers.values():
        # Open the waiting rows for the backward only. B is zero there, so active * B is what it was,
        # and their gradient is what the first step after growth would see.
        layer.mask.data.fill_(1)  # `.data`, for autograd guards its inputs
    try:
        for loss in losses:
            grads = torch.autograd.grad(loss, parameters, retain_graph=True, materialize_grads=True)
            for r, total, A, B in zip(ranks, sums.values(), grads[::2], grads[1::2]):
                rows = B.square().sum(1)  # [C]
                total[0] += float(A.square().sum() + rows[:r].sum())  # 0 in waiting columns of A
                if r < len(rows):
                    total[1] += float(rows[r])
                    total[2] += float(rows[r:].mean())
    finally:
        for r, layer in zip(ranks, layers.values()):
            layer.mask.data[r:] = 0
    check_opened(layers, ranks, sums)
    means = torch.tensor(list(sums.values()), dtype=torch.float64, device=losses.device) / len(losses)
    rows = over_processes(means).tolist()
    return {name: Score(*mean, ratio(*mean[:2])) for name, mean in zip(layers, rows)}


class FisherProbe:
    """The same from one ordinary backward: a context manager around forward AND backward of a MEAN
    loss over N samples.

        with FisherProbe(model) as probe:
            loss = criterion(model(x), y)
            loss.backward()
        ranks = grow(model, probe.scores(), "ratio")

    Hooks keep each layer's input x and the gradient g of its output; the per-sample gradients of A
    and B are small products of the two. A layer that is called more than once in the forward gets
    the sum over its calls, as in the ordinary gradient. Inputs and gradients are held until the
    probe is dropped. With expected=False `Score.expected` is nan, and the probe cheaper. A loss
    scaled by S (GradScaler) scales all but the ratio by S^2. Of several processes each gives its
    part of the batch, and `scores` is their mean, equal in all.

    samples: how many the loss is the mean of, where a batch is a part of them: a probe for each
    part, then `add_scores`. dim: which dimension of inputs counts samples, 1 in sequence-first
    models. reduction: "sum" for a loss that is one. ValueError, RuntimeError: what would be wrong
    in silence, with what to do (see `check_runs`, `watched`, `check_reads`)."""

    def __init__(self, model, expected=True, samples=None, dim=0, reduction="mean"):
        check_probe(model, reduction)
        self.model = model
        self.layers = adapters(model)
        self.expected = expected
        self.samples = samples
        self.dim = dim
        self.reduction = reduction

    def __enter__(self):
        self.calls = {name: [] for name in self.layers}  # {name: [(x, g), ...]}
        self.runs = 0  # forwards of the model
        self.count = None  # samples in the inputs of its layers
        self.backward = False  # whether one has begun
        # Prepended: another forward hook may replace the output, and g has to be that of our own.
        self.handles = [layer.register_forward_hook(partial(self._watch, name), prepend=True)
                        for name, layer in self.layers.items()]
        self.handles.append(self.model.register_forward_pre_hook(self._run, with_kwargs=True))
        return self

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()

    def _run(self, model, args, kwargs):
        if torch.is_grad_enabled() and not in_backward():  # else: an evaluation, or a recomputation
            self.runs += 1
            self.sizes = sizes_of([args, kwargs], self.dim)
            check_runs(self)

    def _watch(self, name, layer, inputs, y):
        if y.requires_grad:  # else: an evaluation, or the first pass of a checkpointed block
            x = watched(self, name, layer, inputs[0].detach())
            y.register_hook(partial(self._keep, name, x))

    def _keep(self, name, x, g):
        self.backward = True
        self.calls[name].append((x, g.detach().movedim(self.dim, 0)))

    @torch.no_grad()
    def scores(self):
        """{name: Score}; one transfer from the device. RuntimeError: no backward in the probe."""
        used = [name for name, calls in self.calls.items() if calls]
        check_reads(self, used)
        with torch.autocast(self.layers[used[0]].A.device.type, enabled=False):
            sums = [fisher(self.layers[name], self.calls[name], self.expected) for name in used]
        # Of a mean loss, sample n's own gradient is N g_n: 1/N sum |N g_n|^2 = N sum |g_n|^2.
        N = self.samples or self.count
        parts = over_processes(torch.stack(sums) * (N if self.reduction == "mean" else 1 / N))
        means = {name: [0.0, 0.0, 0.0 if self.expected else math.nan] for name in self.layers}
        means.update(zip(used, parts.tolist()))
        return {name: Score(*mean, ratio(*mean[:2])) for name, mean in means.items()}


def adapter_cost(layer):
    """Parameters of one rank of a layer: a column of A and a row of B."""
    return layer.fan_in + layer.d_out


def adapter_parameters(model):
    """Active adapter parameters of the model: the sum of rank times cost."""
    return sum(layer.rank * adapter_cost(layer) for layer in adapters(model).values())


def merit(score, cost, rule, ratio_of):
    """What a rule that reads scores ranks the layers by."""
    if rule == "gain":
        return score.expected / cost
    if ratio_of == "expected":
        return ratio(score.current, score.expected)
    return score.ratio


def grow(model, scores=None, rule="ratio", lam=1.3, ratio_of="sampled", budget=None, generator=None):
    """Raise ranks by one where the rule says so; returns {name: new rank} of the layers that grew.

    ratio     FI-Ratio at least lam, the largest first; ratio_of="expected": 1 + expected / current
    gain      the most expected Fisher information per parameter first
    random    in an order drawn from `generator` (default: torch's global one)
    cheapest  the cheapest layers first

    At most one rank per layer and call, none above the capacity; where all are at capacity, the
    answer is {}. budget: adapter parameters of the
    whole model, never exceeded: in order, layers that do not fit are passed over. Only `ratio` can
    do without. Raise it from call to call: where it allows every layer its next rank, all rules do
    the same. ValueError: unknown rule, missing or nan scores, a budget below what is in use."""
    layers = adapters(model)
    spent = adapter_parameters(model)
    if rule not in GROWTH or ratio_of not in ("sampled", "expected"):
        raise ValueError(f"rule '{rule}', ratio_of '{ratio_of}': use {', '.join(GROWTH)}, sampled or expected")
    if budget is None and rule != "ratio":
        raise ValueError(f"rule '{rule}' needs a budget: without one it would grow every layer")
    if budget is not None and budget < spent:
        raise ValueError(f"a budget of {budget} parameters is below the {spent} that the adapters have already")
    costs = {name: adapter_cost(layer) for name, layer in layers.items() if layer.rank < layer.capacity}
    if rule == "random":
        order = [list(costs)[i] for i in torch.randperm(len(costs), generator=generator)]
    elif rule == "cheapest":
        order = sorted(costs, key=costs.get)
    else:
        if missing := [name for name in costs if scores is None or name not in scores]:
            raise ValueError(f"rule '{rule}' has no score for layer '{missing[0]}'")
        merits = {name: merit(scores[name], costs[name], rule, ratio_of) for name in costs}
        if unknown := [name for name in costs if math.isnan(merits[name])]:
            raise ValueError(f"layer '{unknown[0]}': {scores[unknown[0]]} has nan where rule '{rule}' reads; "
                             "use FisherProbe(model, expected=True), and look for nan in the loss")
        if rule == "gain":
            worthy = [name for name in merits if merits[name] > 0]
        else:
            worthy = [name for name in merits if merits[name] >= lam]
        order = sorted(worthy, key=merits.get, reverse=True)
    grown = {}
    for name in order:
        if budget is None or spent + costs[name] <= budget:
            spent += costs[name]
            layers[name].rank += 1
            grown[name] = layers[name].rank
    return grown


# ==== 2. MERGING AND SAVING =======================================================================


@torch.no_grad()
def merge(model):
    """Replace every adapter, in place, by its base with the weight W + delta; returns the model,
    free of adapters.

    The sum is made in float64 on the CPU: no TF32, no autocast. A weight that was tied to another
    is untied. All sums are made before the first is written. ValueError, before that: a base that
    is not plain any more, as `refusal` says."""
    layers = adapters(model)
    weights = {}
    for name, layer in layers.items():
        if problem := refusal(layer.base, layer.rank, layer.capacity):
            raise ValueError(f"layer '{name}': {problem}")
        exact = copy.deepcopy(layer).cpu().double()
        weights[layer] = exact.weight.to(layer.base.weight)
    for layer, weight in weights.items():
        layer.base.weight = nn.Parameter(weight, requires_grad=False)
    replace(model, {layer: layer.base for layer in weights})
    return model


def adapter_state(model):
    """{name: {"A", "B", "scale"}}: the active rows only, as CPU tensors and a float; what is shared
    or deployed.

    To resume a training, keep the model's state_dict, which also holds the waiting columns."""
    state = {}
    for name, layer in adapters(model).items():
        A = layer.A.detach().narrow(layer.axis, 0, layer.rank)
        B = layer.B.detach()[:layer.rank]
        # Cloned, because torch.save would write the waiting rows behind a view too.
        state[name] = dict(A=A.cpu().clone(), B=B.cpu().clone(), scale=layer.scale)
    return state


def check_names(layers, given):
    """ValueError unless `given` has the layers of the model's adapters as keys."""
    if given and not layers:
        raise ValueError("the model has no adapters: call inject first, with the same targets")
    if alone := sorted(layers.keys() ^ given.keys()):
        place = "the model" if alone[0] in layers else "what was given"
        raise ValueError(f"layer '{alone[0]}' is in {place} only")


@torch.no_grad()
def load_adapter(model, state):
    """Put what `adapter_state` gave into a model with adapters on the same layers, whatever their
    ranks are now.

    Ranks and scales become the state's, rows beyond are closed and zero, and the layers can grow
    on, up to their own capacity. ValueError, before anything is changed: other layers, other
    shapes, ranks above the capacity."""
    layers = adapters(model)
    check_names(layers, state)
    for name, layer in layers.items():
        check_fit(name, layer, state[name])
    for name, layer in layers.items():
        new = state[name]
        r = len(new["B"])
        layer.A.narrow(layer.axis, 0, r).copy_(new["A"])
        layer.B.zero_()[:r].copy_(new["B"])
        layer.scale = float(new["scale"])
        layer.open(r)


def check_fit(name, layer, state):
    """ValueError unless a layer can take its part of an adapter's state."""
    if set(state) != {"A", "B", "scale"}:
        raise ValueError(f"layer '{name}': the state needs A, B and scale, and has {sorted(state)}")
    A = list(state["A"].shape)
    B = list(state["B"].shape)
    r = state["B"].shape[0]
    fitting_A = list(layer.A.shape)
    fitting_A[layer.axis] = r
    fitting_B = [r, layer.d_out]
    if A != fitting_A or B != fitting_B:
        raise ValueError(f"layer '{name}': A {A} and B {B} do not fit: at rank {r} they must be "
                         f"{fitting_A} and {fitting_B}")
    if r > layer.capacity:
        raise ValueError(f"layer '{name}': rank {r} is above the capacity {layer.capacity}; "
                         "inject with more")


# ==== 3. THE PRODUCTS BEHIND THE PROBE ============================================================


def add_scores(*parts):
    """The scores {name: Score} of a whole batch from those of its micro-batches, each probed with
    `samples` of the whole: Fisher information is a mean over samples, so its parts add up."""
    result = {}
    for name in parts[0]:
        sums = [sum(part[name][i] for part in parts) for i in range(3)]
        result[name] = Score(*sums, ratio(*sums[:2]))
    return result


def over_processes(values):
    """The mean of a tensor over the processes of torch.distributed, where there are any."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
        values /= dist.get_world_size()
    return values


def fisher(layer, calls, expected):
    """[current, candidate, expected], each summed over samples instead of averaged, from the (x, g)
    of each call.

    Everything is a product over positions, X_n U_n^T with X [N,a,T] and U [N,b,T], so the calls of
    a shared layer are put behind each other along T."""
    r = layer.rank
    dtype = torch.promote_types(layer.A.dtype, torch.float32)
    # A's open columns and K; B's open rows, or at rank 0 a waiting one, which counts as zeros.
    A = layer.A.narrow(layer.axis, 0, min(r + 1, layer.capacity)).to(dtype)
    B = layer.open_B()[:max(r, 1)].to(dtype)
    calls = [(x.to(dtype), g.to(dtype)) for x, g in calls]
    parts = zip(*(factors(layer, x, g, A, B) for x, g in calls))
    h, g, x, u = (join(part) for part in parts)
    # A sample's gradient of B, / s, is [r+1,d_out].
    rows = (h @ g.mT).square().sum((0, 2))  # [r+1]
    current = squared_norm(x, u) + rows[:r].sum()
    candidate = rows[r:].sum()
    mean = rows.new_full((), 0.0 if expected else math.nan)
    if expected and r < layer.capacity:
        # E |K^T G_n|^2 = (2 / fan_in) |G_n|^2, as K's entries have variance 2 / fan_in.
        mean = 2 / layer.fan_in * full_norm(layer, calls, x, g)
    return layer.scale**2 * torch.stack([current, candidate, mean])


def full_norm(layer, calls, x, g):
    """sum_n |G_n|^2 from the (x, g) of each call, and x and g as `factors` gives them, joined."""
    if isinstance(layer, LoRALinear):
        return squared_norm(x, g)
    if len(calls) == 1:
        return conv_norm(layer.base, *calls[0])
    patches = [unfold(layer.base, pad(layer.base, x)) for x, _ in calls]
    return squared_norm(join(patches), g)


def join(parts):
    """Tensors [N,*,T] of several calls, behind each other along T."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts, 2)


def factors(layer, x, g, A, B):
    """One call's h, g, x, u, each [N,*,T]: a sample's gradient of B is s h g^T, that of A the
    entries of s x u^T."""
    if isinstance(layer, LoRALinear):
        x = x.unsqueeze(1).flatten(1, -2)  # [N,T,d_in]
        g = g.unsqueeze(1).flatten(1, -2)  # [N,T,d_out]
        h = x @ A  # [N,T,r+1]
        u = g @ B.T  # [N,T,r]
        return h.mT, g.mT, x.mT, u.mT
    base = layer.base
    padding = base.padding
    kh, kw = base.kernel_size
    h = layer.down(x, A).flatten(2)  # [N,r+1,T]
    u = torch.einsum("ro,nohw->nrhw", B, g)  # [N,r,H',W']
    g = g.flatten(2)  # [N,c_out,T]
    # Patches of x, or the cheaper way below, where the padding and the dilation allow it.
    by_patch = isinstance(padding, str) or base.dilation != (1, 1)
    if by_patch or padding[0] >= kh or padding[1] >= kw:
        patches = unfold(base, pad(base, x))  # [N,c_in k k,T]
        return h, g, patches, u.flatten(2)
    # A's gradient pairs each output pixel with the k x k inputs below it, which is each input pixel
    # with the k x k outputs above it: unfold u, of r channels, not x, of c_in. Padding k - 1 - p,
    # zeros between outputs of a stride.
    wide = u.new_zeros(*u.shape[:2], x.shape[2] + kh - 1, x.shape[3] + kw - 1)
    top = kh - 1 - padding[0]
    left = kw - 1 - padding[1]
    outputs = wide[:, :, top::base.stride[0], left::base.stride[1]]
    outputs[:, :, :u.shape[2], :u.shape[3]] = u
    u = F.unfold(wide, (kh, kw))  # [N,r k k,HW]
    return h, g, x.flatten(2), u


def pad(base, x):
    """x with the zeros that a convolution puts around it; 'same' puts the odd one to the right and
    the bottom."""
    if base.padding == "same":
        h, w = (d * (k - 1) for d, k in zip(base.dilation, base.kernel_size))
        return F.pad(x, (w // 2, w - w // 2, h // 2, h - h // 2))
    h, w = (0, 0) if base.padding == "valid" else base.padding
    return F.pad(x, (w, w, h, h))


def unfold(base, padded):
    """The input patch below each output pixel of a convolution, from an input that is padded
    already: [N,c_in,H,W] -> [N,c_in k k,T]."""
    return F.unfold(padded, base.kernel_size, base.dilation, 0, base.stride)


def squared_norm(x, u):
    """sum_n ||X_n U_n^T||_F^2 for x [N,a,T], u [N,b,T], by the cheaper of the product and the Gram
    identity ||sum_t x_t u_t^T||^2 = sum_tt' (x_t . x_t') (u_t . u_t')."""
    a, T = x.shape[1:]
    b = u.shape[1]
    if T * (a + b) < a * b:
        return dot(x.mT @ x, u.mT @ u)  # [N,T,T]
    product = x @ u.mT  # [N,a,b]
    return dot(product, product)


def conv_norm(base, x, g):
    """squared_norm of the patches of x [N,c_in k k,T] and g [N,c_out,T]. Below some 100 pixels the
    Gram matrix wins, and that of the patches needs no patches: it is that of the pixels, summed
    over k x k shifts."""
    x = pad(base, x)
    N, c_in, H, W = x.shape
    _, c_out, height, width = g.shape
    pixels = H * W
    T = height * width
    k = math.prod(base.kernel_size)
    g = g.flatten(2)
    # Multiplications: two Gram matrices and the shifts, against the product.
    if pixels**2 * c_in + T**2 * (k + c_out) > T * k * c_in * c_out:
        return squared_norm(unfold(base, x), g)
    x = x.flatten(2)
    gram = (x.mT @ x).reshape(N, H, W, H, W)
    gram = sum(gram[:, :, j, :, j] for j in shifts(base, 1, width))  # [N,H,W',H,W']
    gram = sum(gram[:, i, :, i] for i in shifts(base, 0, height))  # [N,H',W',H',W']
    return dot(gram.reshape(N, T, T), g.mT @ g)


def shifts(base, axis, outputs):
    """For each place in the kernel along an axis, the padded pixels below the outputs, a slice."""
    dilation = base.dilation[axis]
    stride = base.stride[axis]
    extent = (outputs - 1) * stride + 1
    starts = [i * dilation for i in range(base.kernel_size[axis])]
    return [slice(start, start + extent, stride) for start in starts]


def dot(a, b):
    """sum of a * b, without the product in memory."""
    return a.flatten().dot(b.flatten())


# ==== 4. WHAT IS REFUSED, BECAUSE IT WOULD BE WRONG IN SILENCE ====================================

TRAINABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def refusal(layer, rank, capacity, kinds=KINDS):
    """Why a layer cannot be adapted so, or ''. Its weight and its forward have to be the plain
    ones: a merged weight would not do what the adapter did."""
    kind = type(layer).__name__
    weight = getattr(layer, "_parameters", {}).get("weight")
    if isinstance(layer, AttentionOutput):
        return f"{kind}: nn.MultiheadAttention reads its weight without calling it, so its Fisher is out of reach"
    if not isinstance(layer, kinds):
        return f"{kind} is not supported, only {' and '.join(k.__name__ for k in kinds)}"
    if type(layer) not in kinds or "forward" in vars(layer):
        return f"{kind} is a subclass or parametrized: its weight or forward is not the plain one"
    if type(weight) is not nn.Parameter:
        return f"{kind}: its weight is computed (weight_norm, spectral_norm, pruning) or quantized"
    if weight.dtype not in TRAINABLE:
        return f"{kind}: a weight of {weight.dtype} cannot train, only {TRAINABLE}"
    if layer._forward_pre_hooks or layer._forward_hooks:
        return f"{kind} has forward hooks, which would miss the adapter: register them after inject"
    if getattr(layer, "groups", 1) > 1 or getattr(layer, "padding_mode", "zeros") != "zeros":
        return f"{kind} with groups={layer.groups} and padding_mode='{layer.padding_mode}': only 1 and 'zeros' will do"
    if not 0 <= rank <= capacity or capacity < 1:
        return f"rank {rank} with capacity {capacity}: rank must be 0 to capacity, capacity at least 1"
    return ""


def check_probe(model, reduction):
    """RuntimeError for a compiled model, ValueError for another reduction than mean and sum."""
    if hasattr(model, "_orig_mod"):
        raise RuntimeError("a compiled model skips the probe's hooks: probe and call the model itself")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction '{reduction}' is not known; use mean or sum")


def check_runs(probe):
    """RuntimeError where a probe sees a second batch. Several runs of the model on the same samples
    are allowed where the caller says how many samples there are."""
    if probe.backward or (probe.runs > 1 and probe.samples is None):
        raise RuntimeError("a second batch in one probe: use a probe for each and add_scores; or, "
                           "where all runs are of the same N samples, FisherProbe(model, samples=N)")


def watched(probe, name, layer, x):
    """The input x of a layer with its samples as the first dimension. ValueError unless these are
    as many as in the layers before and in an input of the model; RuntimeError where hooks cannot
    see every call."""
    dim = probe.dim
    shape = list(x.shape)
    advice = f"leave the layer out by `targets`, or say which dimension counts samples (dim={1 - dim})"
    if torch.compiler.is_compiling():
        raise RuntimeError("a compiled model skips the probe's hooks: in the probe, call the model itself")
    if probe.backward and not in_backward():
        raise RuntimeError(f"layer '{name}' is called after a backward: use a probe for each batch")
    if x.dim() < max(layer.base.weight.dim(), dim + 2):
        raise ValueError(f"layer '{name}': input {shape} has no dimension for the samples")
    count = shape[dim]
    if probe.count and count != probe.count:
        raise ValueError(f"layer '{name}': input {shape} has not the {probe.count} samples of the "
                         f"other layers as its dimension {dim}; {advice}")
    if probe.runs and probe.sizes and count not in probe.sizes:
        raise ValueError(f"layer '{name}': input {shape} has {count} rows at dimension {dim}, as no "
                         f"input of the model has (tokens flattened into the batch?); {advice}")
    if probe.samples and (count > probe.samples or (probe.runs > 1 and count < probe.samples)):
        raise ValueError(f"layer '{name}': input {shape} has {count} samples, and the loss is said to "
                         f"be of {probe.samples}; {advice}")
    probe.count = count
    return x.movedim(dim, 0)


def check_reads(probe, used):
    """RuntimeError where a probe has missed something: no backward, or a layer whose weight was
    read by other code while nobody called it, so that its information would come out as 0."""
    if not used:
        raise RuntimeError("the probe saw no backward: run forward and backward inside `with FisherProbe(model):`, "
                           "and not of a compiled model")
    for name, layer in probe.layers.items():
        if layer.weight_was_read and name not in used:
            raise RuntimeError(f"layer '{name}' was not called, but its weight was read (a fused "
                               "projection, an attention that computes with it): leave it out by "
                               "`targets`")


def check_opened(layers, ranks, sums):
    """RuntimeError where no waiting row of a layer got a gradient, though its open rows did."""
    for (name, layer), r, (current, candidate, expected) in zip(layers.items(), ranks, sums.values()):
        if r < layer.capacity and current and not candidate and not expected:
            raise RuntimeError(f"layer '{name}': its waiting rows got no gradient: losses of a compiled "
                               "model, which has masks of its own? Compute them with the model itself")


def in_backward():
    """Whether autograd is running a backward: a forward is then the second pass of a checkpoint."""
    return torch._C._current_graph_task_id() != -1


def sizes_of(value, dim):
    """The sizes at dimension `dim` of all tensors in nested lists, tuples and dicts: a set."""
    if isinstance(value, torch.Tensor):
        return {value.shape[dim]} if value.dim() > dim else set()
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return set()
    return set().union(*(sizes_of(item, dim) for item in value))
