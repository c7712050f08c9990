"""SeLoRA's claims: the probe is the loop, growth changes nothing, what waits stays put, merging is exact."""

import copy
import inspect
import io
import math
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from minilora import selora
from minilora.allocate import multiplier_scores, rises, to_components
from minilora.ranks import PLANS, Job, apportion, full_gradients, highest, openings, plan, probe_of, savings, set_ranks, start_of
from minilora.selora import FisherProbe, LoRAConv2d, LoRALinear, Score, adapters, fisher_loop, grow, inject

LAYERS = {  # name: (layer, shape of the input, samples first)
    "linear [N,d]": (lambda: nn.Linear(6, 5), (4, 6)),
    "linear [N,T,d]": (lambda: nn.Linear(6, 5), (4, 7, 6)),
    "linear few tokens, no bias": (lambda: nn.Linear(16, 12, bias=False), (4, 2, 16)),
    "linear [N,S,T,d]": (lambda: nn.Linear(6, 5), (4, 2, 3, 6)),
    "conv 1x1": (lambda: nn.Conv2d(3, 5, 1), (4, 3, 6, 5)),
    "conv 1x1 stride 2": (lambda: nn.Conv2d(3, 5, 1, stride=2), (4, 3, 6, 5)),
    "conv 3x3": (lambda: nn.Conv2d(3, 5, 3, padding=1), (4, 3, 6, 5)),
    "conv 3x3 few pixels": (lambda: nn.Conv2d(8, 9, 3, padding=1), (4, 8, 3, 2)),
    "conv padding 0, no bias": (lambda: nn.Conv2d(3, 5, 3, bias=False), (4, 3, 6, 5)),
    "conv stride 2": (lambda: nn.Conv2d(3, 5, 3, stride=2, padding=1), (4, 3, 7, 6)),
    "conv stride 2 few pixels": (lambda: nn.Conv2d(8, 40, 3, stride=2, padding=1), (4, 8, 4, 5)),
    "conv stride 3, kernel (2,3)": (lambda: nn.Conv2d(3, 5, (2, 3), stride=(3, 2), padding=(0, 2)), (4, 3, 8, 7)),
    "conv stride above kernel": (lambda: nn.Conv2d(3, 5, 2, stride=3, padding=1), (4, 3, 9, 7)),
    "conv padding above k-1": (lambda: nn.Conv2d(3, 5, 3, padding=4), (4, 3, 4, 5)),
    "conv 1x1 padding 1": (lambda: nn.Conv2d(3, 5, 1, padding=1), (4, 3, 4, 5)),
    "conv dilation 2": (lambda: nn.Conv2d(3, 5, 3, padding=2, dilation=2), (4, 3, 6, 5)),
    "conv dilation 2 few pixels": (lambda: nn.Conv2d(8, 100, 3, (1, 2), 2, 2), (4, 8, 3, 4)),
    "conv same, even kernel": (lambda: nn.Conv2d(3, 5, (4, 2), padding="same"), (4, 3, 6, 5)),
    "conv valid": (lambda: nn.Conv2d(3, 5, 3, padding="valid"), (4, 3, 6, 5)),
}


pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")


@pytest.fixture(autouse=True)
def one_thread_seeded():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def stirred(model, rank=None):
    """The model with its active rows of B away from zero, as after some training."""
    for layer in adapters(model).values():
        layer.rank = layer.rank if rank is None else rank
        with torch.no_grad():
            layer.B[:layer.rank].normal_()
    return model


def single(kind, rank=2, capacity=4):
    make, shape = LAYERS[kind]
    model = nn.Sequential(make().double())
    inject(model, rank=rank, capacity=capacity, scale=1.7)
    return stirred(model), torch.randn(shape, dtype=torch.float64)


def per_sample(y):
    """A loss per sample [N] in which positions and channels matter differently."""
    y = y.flatten(1)
    return (y * torch.linspace(-1, 2, y.shape[1], dtype=y.dtype)).tanh().sum(1) + 0.1 * y.square().sum(1)


def probed(model, x, expected=True):
    with FisherProbe(model, expected) as probe:
        per_sample(model(x)).mean().backward()
    return probe.scores()


def close(a, b, tolerance=1e-9):
    return a == b or abs(a - b) <= tolerance * max(abs(a), abs(b))


def small():
    """A model with a convolution, tokens and a vector, all adapted."""
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(2, 8)
            self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 3, bias=False)

        def forward(self, x):
            h = self.norm(self.conv(x)).tanh().flatten(2).transpose(1, 2)  # [N,T,8]
            return self.head(self.mix(h).tanh().mean(1))

    return Small().double()


def batch(n=5):
    return torch.randn(n, 2, 4, 4, dtype=torch.float64)


# ---- Fisher information


@pytest.mark.parametrize("rank", [0, 1, 2, 4])
@pytest.mark.parametrize("kind", LAYERS)
def test_probe_is_the_loop(kind, rank):
    model, x = single(kind, rank)
    slow, fast = fisher_loop(model, per_sample(model(x)))["0"], probed(model, x)["0"]
    assert close(slow.current, fast.current) and close(slow.candidate, fast.candidate) and close(slow.ratio, fast.ratio)
    if rank == 0:
        assert fast.current == slow.current == 0 and fast.ratio == slow.ratio == math.inf and fast.candidate > 0
    elif rank == 4:
        assert fast[1:] == slow[1:] == (0.0, 0.0, 1.0) and fast.current > 0
    else:
        assert fast.current > 0 and fast.candidate > 0 and close(fast.ratio, 1 + fast.candidate / fast.current)
        assert probed(model, x, expected=False)["0"][:2] == fast[:2]


@pytest.mark.parametrize("kind", LAYERS)
def test_expected_is_the_squared_full_gradient_of_each_sample(kind):
    model, x = single(kind)
    layer = model[0]
    norms = [full_gradients(model, lambda n=n: per_sample(model(x[n:n + 1])).sum())["0"].square().sum().item()
             for n in range(len(x))]
    exact = layer.scale**2 * 2 / layer.fan_in * sum(norms) / len(norms)
    assert close(probed(model, x)["0"].expected, exact)


@pytest.mark.parametrize("kind", ["linear [N,T,d]", "conv 3x3", "conv stride 2 few pixels"])
def test_expected_is_the_mean_over_drawn_columns(kind):
    model, x = single(kind, rank=1, capacity=2)
    layer, drawn = model[0], []
    closed = probed(model, x, True)["0"].expected
    bound = math.sqrt(6 / layer.fan_in)
    for _ in range(600):
        with torch.no_grad():
            layer.A.narrow(layer.axis, 1, 1).uniform_(-bound, bound)
        drawn.append(probed(model, x, False)["0"].candidate)
    drawn = torch.tensor(drawn)
    error = drawn.std().item() / math.sqrt(len(drawn))
    assert abs(drawn.mean().item() - closed) < 4 * error and error < 0.1 * closed


def test_the_loops_expected_is_the_mean_over_waiting_columns():
    model, x = single("linear [N,T,d]", rank=1, capacity=4)
    seen = []
    for k in range(1, 4):
        other = copy.deepcopy(model)
        with torch.no_grad():
            other[0].A[:, 1] = model[0].A[:, k]
        seen.append(fisher_loop(other, per_sample(other(x)))["0"].candidate)
    assert close(fisher_loop(model, per_sample(model(x)))["0"].expected, sum(seen) / 3)


@pytest.mark.parametrize("rank", [0, 2])
def test_loop_is_torch_func(rank):
    model, x = stirred(inject_into(small(), rank=rank, capacity=3), rank), batch()
    layers = adapters(model)
    parameters = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    opened = {f"{n}.active": torch.ones_like(layer.active) for n, layer in layers.items()}

    def loss(p, sample):
        return per_sample(torch.func.functional_call(model, {**p, **opened}, (sample[None],)))[0]

    G = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    scores = fisher_loop(model, per_sample(model(x)))
    for name, layer in layers.items():
        A, B = G[f"{name}.A"].square().mean(0), G[f"{name}.B"].square().mean(0).sum(1)
        current = (A.sum() + B[:layer.rank].sum()).item()  # also shows that waiting columns have none
        assert close(scores[name].current, current, 1e-12)
        assert close(scores[name].candidate, B[layer.rank].item(), 1e-12)


def inject_into(model, **kwargs):
    inject(model, **kwargs)
    return model


def test_candidate_is_the_gradient_after_growth():
    model, x = single("conv 3x3", rank=1)
    before = probed(model, x)["0"]
    model[0].rank = 2
    after = probed(model, x)["0"]
    assert close(after.current, before.current + before.candidate)  # the paper's numerator, measured after the growth
    assert close(before.ratio, after.current / before.current)


def test_loop_and_probe_leave_no_trace():
    model, x = single("linear [N,T,d]")
    parameter = model[0].B
    losses, state = per_sample(model(x)), copy.deepcopy(model.state_dict())
    fisher_loop(model, losses)
    assert parameter.grad is None and all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    losses.mean().backward()  # the graph is still there, and the mask closed again
    loop = parameter.grad.clone()
    assert loop[2:].abs().max() == 0 and loop[:2].abs().max() > 0
    parameter.grad = None
    probed(model, x)
    assert torch.equal(parameter.grad, loop) and not model[0]._forward_hooks
    with pytest.raises(ZeroDivisionError), FisherProbe(model):
        raise ZeroDivisionError
    assert not model[0]._forward_hooks
    with pytest.raises(RuntimeError, match="boom"):  # a backward that fails closes the rows again, too
        losses = per_sample(model(x))
        losses.register_hook(lambda g: (_ for _ in ()).throw(RuntimeError("boom")))
        fisher_loop(model, losses)
    assert model[0].active.sum() == 2


@pytest.mark.parametrize("kind", ["linear [N,T,d]", "conv 3x3", "conv stride 2", "conv dilation 2"])
def test_a_layer_called_twice_sums_its_calls(kind):
    class Twice(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x):  # the second call sees another number of positions, and what the first gave
            first = self.layer(x).tanh().flatten(1)  # [N,*]
            second = x.narrow(x.dim() - 2, 0, 4) * first.mean(1).reshape(-1, *[1] * (x.dim() - 1))
            return torch.cat([first, self.layer(second).flatten(1)], 1)

    make, shape = LAYERS[kind]
    model, x = stirred(inject_into(Twice(make().double()), rank=2, capacity=4)), torch.randn(shape, dtype=torch.float64)
    slow, fast, layer = fisher_loop(model, per_sample(model(x)))["layer"], probed(model, x)["layer"], model.layer
    assert close(slow.current, fast.current) and close(slow.candidate, fast.candidate)
    exact = [full_gradients(model, lambda n=n: per_sample(model(x[n:n + 1])).sum())["layer"].square().sum()
             for n in range(len(x))]
    assert close(fast.expected, layer.scale**2 * 2 / layer.fan_in * sum(exact).item() / len(exact))


def test_probe_beside_other_hooks_evaluation_and_checkpointing():
    plain = stirred(inject_into(small(), rank=1))
    x = batch()
    hooked = copy.deepcopy(plain)
    hooked.mix.register_forward_hook(lambda module, inputs, y: 3 * y)
    hooked.conv.register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    slow, fast = fisher_loop(hooked, per_sample(hooked(x))), probed(hooked, x)
    assert all(close(slow[n].current, fast[n].current) for n in slow)
    reference = probed(plain, x)
    assert not close(reference["mix"].current, fast["mix"].current, 1e-3)
    with FisherProbe(plain) as probe:
        with torch.no_grad():
            plain(batch(2))  # an evaluation in between, of another batch size
        y = torch.utils.checkpoint.checkpoint(plain, x, use_reentrant=False)
        per_sample(y).mean().backward()
    again = probe.scores()
    assert all(close(a, b) for n in again for a, b in zip(again[n], reference[n]))


def test_probe_under_autocast_is_float32():
    model = stirred(inject_into(small().float(), rank=1))
    x, found = batch().float(), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            with FisherProbe(model) as probe:
                per_sample(model(x).float()).mean().backward()
            assert not enabled or probe.calls["mix"][0][1].dtype == torch.bfloat16
            found.append(probe.scores())
    for name, (x, g) in ((n, calls[0]) for n, calls in probe.calls.items()):  # nothing was rounded after the capture
        exact = (5 * selora.fisher(adapters(model)[name].double(), [(x.double(), g.double())], True)).tolist()
        assert all(close(a, b, 1e-5) for a, b in zip(exact, found[1][name]))
    assert all(close(a, b, 0.1) and a != b for n in ("mix", "conv") for a, b in zip(found[0][n][:3], found[1][n][:3]))


def test_probe_can_be_used_again():
    model, x = single("linear [N,d]")
    probe, seen = FisherProbe(model), []
    for n in (4, 3):
        with probe:
            per_sample(model(x[:n])).mean().backward()
        seen.append(probe.scores())
    assert seen[0] == probed(model, x) and seen[1] == probed(model, x[:3]) != seen[0]


def test_nan_is_not_taken_for_no_information():
    model, x = single("linear [N,d]")
    x[0, 0] = math.nan
    for found in (probed(model, x), fisher_loop(model, per_sample(model(x)))):
        assert all(math.isnan(v) for v in found["0"])
        with pytest.raises(ValueError, match="layer '0'.*nan"):
            grow(model, found)


def test_unused_layer_and_no_information():
    model = nn.ModuleDict(dict(used=nn.Linear(3, 2), unused=nn.Linear(3, 2))).double()
    inject(model)
    x = torch.randn(4, 3, dtype=torch.float64)
    slow = fisher_loop(model, per_sample(model["used"](x)))
    with FisherProbe(model) as probe:
        per_sample(model["used"](x)).mean().backward()
    assert probe.scores()["unused"] == slow["unused"] == Score(0.0, 0.0, 0.0, 1.0)
    full = full_gradients(model, lambda: per_sample(model["used"](x)).mean())
    assert full["used"].abs().max() > 0 and torch.equal(full["unused"], torch.zeros(2, 3, dtype=torch.float64))


def test_at_the_start_the_ratio_is_about_two():
    """B = 0: only the open row has information, and a waiting row has as much, on average: lambda caps the rank."""
    model, x = single("linear [N,T,d]", rank=1, capacity=2)
    found = []
    for _ in range(200):
        with torch.no_grad():
            model[0].B.zero_()
            model[0].A.uniform_(-1, 1)
        found.append(probed(model, x, False)["0"])
    assert abs(sum(s.candidate for s in found) / sum(s.current for s in found) - 1) < 0.2


def test_probe_refuses_what_is_not_per_sample():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.place = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.first(x) + self.place(x[:1])

    model = inject_into(Positions())
    with pytest.raises(ValueError, match=r"layer 'place': input \[1, 3\] has not the 4 samples"), FisherProbe(model):
        model(torch.randn(4, 3))
    assert not model.first._forward_hooks
    with pytest.raises(ValueError, match="no dimension for the samples"), FisherProbe(model):
        model.first(torch.randn(3))
    with FisherProbe(model) as probe:
        pass
    with pytest.raises(RuntimeError, match="no backward"):
        probe.scores()
    for losses in (torch.zeros(4), model.first(torch.randn(4, 3)), model.first(torch.randn(4, 3)).sum()):
        with pytest.raises(ValueError, match="one loss per sample"):
            fisher_loop(model, losses)


# ---- growth without surgery


def optimizers(model):
    groups = selora.adapter_groups(model, 0.3)
    return dict(adam=torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.05),
                adamw=torch.optim.AdamW(groups, 0.05), sgd=torch.optim.SGD(groups, 0.05, momentum=0.9))


@pytest.mark.parametrize("kind", ["adam", "adamw", "sgd"])
def test_training_and_growth(kind):
    model = inject_into(small(), rank=1, capacity=4)
    layers, optimizer = adapters(model), optimizers(model)[kind]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    start = {n: layer.A.detach().clone() for n, layer in layers.items()}
    for step in range(8):
        x = batch()
        optimizer.zero_grad()
        per_sample(model(x)).mean().backward()
        for layer in layers.values():
            assert layer.B.grad[:layer.rank].abs().sum(1).min() > 0  # a grown row learns at once
            assert layer.B.grad[layer.rank:].abs().sum() == 0
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        for name, layer in layers.items():
            r, moved = layer.rank, (layer.A.detach() - start[name]).narrow(layer.axis, 0, layer.rank)
            waiting = lambda A, layer=layer, r=r: A.detach().narrow(layer.axis, r, layer.capacity - r)
            assert (layer.B[r:] == 0).all() and layer.B[:r].abs().sum(1).min() > 0
            assert torch.equal(waiting(layer.A), waiting(start[name])) and (step == 0 or moved.abs().max() > 0)
        if step % 2:
            before, grown = model(x), grow(model, probed(model, x), lam=0.0)
            assert torch.equal(model(x), before)
            assert grown == ({n: layer.rank for n, layer in layers.items()} if step < 7 else {})  # at capacity: nothing
        assert held == {id(p) for p in model.parameters() if p.requires_grad}
    assert all(layer.rank == 4 for layer in layers.values())


def test_weight_decay_without_the_groups_would_shrink_waiting_columns():
    model = inject_into(small())
    before = model.mix.A.detach().clone()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.05, weight_decay=0.3)
    per_sample(model(batch())).mean().backward()
    optimizer.step()
    assert (model.mix.A[:, 1:].abs() < before[:, 1:].abs()).all()


def test_rank_zero_is_the_base_and_rank_only_rises():
    model, x = inject_into(small(), rank=0), batch()
    layers = adapters(model)
    for layer in layers.values():
        with torch.no_grad():
            layer.B.normal_()  # even rows that were not zero would be masked
    adapted = model(x)
    selora.replace(model, {layer: layer.base for layer in layers.values()})
    base = model(x)
    assert torch.equal(adapted, base) and not adapters(model)
    selora.replace(model, {layer.base: layer for layer in layers.values()})
    assert selora.adapter_parameters(model) == 0
    model.mix.rank += 3
    assert model.mix.rank == 3 and model.mix.active.sum() == 3 and not torch.allclose(model(x), base)
    for rank in (2, 9):
        with pytest.raises(ValueError, match=f"rank 3 can be raised up to the capacity 8, not set to {rank}"):
            model.mix.rank = rank
    assert model.mix.rank == 3


def test_initialisation():
    torch.manual_seed(3)
    linear, conv = LoRALinear(nn.Linear(600, 20), capacity=50), LoRAConv2d(nn.Conv2d(60, 20, 3), capacity=50)
    for layer, fan_in in ((linear, 600), (conv, 540)):
        assert layer.fan_in == fan_in and (layer.B == 0).all() and layer.A.abs().max() <= math.sqrt(6 / fan_in)
        assert abs(layer.A.var().item() * fan_in / 2 - 1) < 0.03  # the variance that `expected` counts on
    torch.manual_seed(5)
    first = inject_into(small())  # draws the base, then the adapters
    torch.manual_seed(5)
    again = inject_into(small())
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), again.state_dict().values()))
    assert list(inspect.signature(LoRALinear).parameters.values())[2].default == 8


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "state_dict"])
def test_copies_keep_rank_mask_and_growth(how):
    model, x = stirred(inject_into(small(), rank=1, capacity=4), 2), batch()
    model.mix.rank = 3
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":  # of the layers: the class of the model is local to a function
        other = small()
        for name in adapters(model):
            setattr(other, name, pickle.loads(pickle.dumps(getattr(model, name))))
        other.norm = model.norm
    else:
        buffer = io.BytesIO()
        torch.save(model.state_dict(), buffer)
        buffer.seek(0)
        other = inject_into(small(), rank=1, capacity=4)
        other.load_state_dict(torch.load(buffer, weights_only=True))
    assert torch.equal(other(x), model(x))
    assert {n: v.rank for n, v in adapters(other).items()} == {"conv": 2, "mix": 3, "head": 2}
    assert probed(other, x) == probed(model, x)
    per_sample(other(x)).mean().backward()
    assert all((v.B.grad[v.rank:] == 0).all() for v in adapters(other).values())
    other.conv.rank += 1
    assert other.conv.rank == 3 and model.conv.rank == 2 and model.conv.active.sum() == 2


# ---- inject, merge, save


def test_inject_names_freezes_and_targets():
    model = small()
    assert inject(model) == ["conv", "mix", "head"] == list(adapters(model))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        f"{layer}.{p}" for layer in ("conv", "mix", "head") for p in "AB"}
    model = small()
    assert inject(model, "mix|head", rank=2, capacity=5, scale=3.0) == ["mix", "head"]
    assert (model.mix.rank, model.mix.capacity, model.mix.scale) == (2, 5, 3.0) and type(model.conv) is nn.Conv2d
    assert not model.conv.weight.requires_grad and not model.norm.weight.requires_grad
    for part in ("mi", "ix"):
        with pytest.raises(ValueError, match="match no layer"):
            inject(small(), part)  # the whole name, or nothing
    assert inject(nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.ReLU()), "0.*") == ["0.0"]  # containers do not count


def test_a_layer_under_two_names_is_one_adapter():
    shared = nn.Linear(3, 3).double()
    model, x = nn.Sequential(shared, nn.Tanh(), shared, nn.Sequential(shared)), torch.randn(4, 3, dtype=torch.float64)
    assert inject(model, "2") == ["0"] and model[0] is model[2] is model[3][0] and len(adapters(model)) == 1
    stirred(model)
    before = model(x)
    selora.merge(model)
    assert model[0] is model[2] is model[3][0] is shared and (model(x) - before).abs().max() < 1e-12


def test_attention_of_torch():
    """out_proj is read, not called: left out. The encoder layer's inference path reads weights, and sees the merged."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    x = torch.randn(2, 3, 8)
    assert inject(model) == ["linear1", "linear2"]
    stirred(model)
    trained = model(x)
    with torch.no_grad():
        assert (model.eval()(x) - trained).abs().max() < 1e-5
    with pytest.raises(ValueError, match="layer 'self_attn.out_proj': .*MultiheadAttention"):
        inject(nn.TransformerEncoderLayer(8, 2, 16), ".*out_proj")
    with pytest.raises(ValueError, match="layer 'self_attn': MultiheadAttention is not supported"):
        inject(nn.TransformerEncoderLayer(8, 2, 16), "self_attn")


def refused_models():
    linear = lambda: nn.Linear(4, 4)
    return {
        "targets 'encoder.*' match no layer": (nn.Sequential(linear()), dict(targets="encoder.*")),
        "layer '1': Embedding is not supported": (nn.Sequential(linear(), nn.Embedding(3, 4)), dict(targets="[01]")),
        "layer '1': LayerNorm is not supported": (nn.Sequential(linear(), nn.LayerNorm(4)), dict(targets=".*")),
        "layer '1': Conv2d with groups=2": (nn.Sequential(linear(), nn.Conv2d(4, 4, 3, groups=2)), {}),
        "layer '1': Conv2d with groups=1 and padding_mode='circular'": (
            nn.Sequential(linear(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")), {}),
        "layer '0': rank 9 with capacity 8": (nn.Sequential(linear()), dict(rank=9)),
        "rank -1 with capacity 8": (nn.Sequential(linear()), dict(rank=-1)),
        "rank 0 with capacity 0": (nn.Sequential(linear()), dict(rank=0, capacity=0)),
        "targets None match no layer": (nn.Sequential(nn.ReLU()), {}),
        "put it into an nn.Sequential": (linear(), {}),
    }


@pytest.mark.parametrize("message", refused_models())
def test_inject_refuses_and_changes_nothing(message):
    model, options = refused_models()[message]
    before, drawn = list(model.modules()), torch.get_rng_state()
    with pytest.raises(ValueError) as error:
        inject(model, **options)
    assert message in str(error.value)
    assert list(model.modules()) == before and all(p.requires_grad for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), drawn)


def test_layers_refuse():
    for make, base, message in [(LoRALinear, nn.Conv2d(2, 2, 3), "Conv2d is not supported"),
                                (LoRAConv2d, nn.Linear(2, 2), "Linear is not supported"),
                                (LoRALinear, nn.Embedding(2, 2), "Embedding is not supported"),
                                (LoRAConv2d, nn.Conv2d(2, 2, 3, groups=2), "groups=2")]:
        with pytest.raises(ValueError, match=message):
            make(base)
    with pytest.raises(ValueError, match="rank 9 with capacity 8"):
        LoRALinear(nn.Linear(2, 2), rank=9)
    with pytest.raises(ValueError, match="has adapters already"):
        inject(inject_into(small()))


@pytest.mark.parametrize("dtype,tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("kind", LAYERS)
def test_merge(kind, dtype, tolerance):
    model, x = single(kind)
    model, x = model.to(dtype), x.to(dtype)
    before, delta, weight = model(x), model[0].delta(), model[0].base.weight.clone()
    assert delta.shape == weight.shape and delta.abs().max() > 0.1
    assert selora.merge(model) is model and type(model[0]) in (nn.Linear, nn.Conv2d) and not adapters(model)
    assert (model(x) - before).abs().max() <= tolerance * max(1, before.abs().max())
    assert model[0].weight.dtype == dtype and torch.allclose(model[0].weight - weight, delta, atol=1e-5)
    assert all(p.is_leaf and not p.requires_grad for p in model.parameters())


def test_merge_in_bfloat16_rounds_once_and_unties():
    embedding, head = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head).bfloat16()
    tied = embedding.weight.detach().clone()
    stirred(inject_into(model))
    exact = copy.deepcopy(model[1]).double()
    selora.merge(model)
    assert torch.equal(model[1].weight, (exact.base.weight + exact.delta()).bfloat16())
    assert torch.equal(embedding.weight, tied)


def test_adapter_state_round_trip_in_a_fresh_process(tmp_path):
    model, x = stirred(inject_into(nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double())), batch()
    model[2].rank = 4
    stirred(model)
    state = selora.adapter_state(model)
    assert {n: (list(v["A"].shape), list(v["B"].shape)) for n, v in state.items()} == {
        "0": ([1, 2, 3, 3], [1, 4]), "2": ([16, 4], [4, 3])}
    assert all(type(v) in (torch.Tensor, float) and not getattr(v, "requires_grad", False)
               for layer in state.values() for v in layer.values())
    base = {k.replace("base.", ""): v for k, v in model.state_dict().items() if "base." in k}
    torch.save(dict(state=state, base=base, x=x, y=model(x).detach()), tmp_path / "adapter.pt")
    code = textwrap.dedent(f"""
        import torch
        from torch import nn
        from minilora import selora
        kept = torch.load({str(tmp_path / "adapter.pt")!r}, weights_only=True)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(16, 3)).double()
        model.load_state_dict(kept["base"])
        selora.inject(model, rank=0, capacity=6)
        selora.load_adapter(model, kept["state"])
        assert [layer.rank for layer in selora.adapters(model).values()] == [1, 4]
        assert torch.equal(model(kept["x"]), kept["y"])
        model[2].rank = 6  # and on
        assert torch.equal(model(kept["x"]), kept["y"])
        model(kept["x"]).square().sum().backward()
        assert model[2].B.grad.abs().sum(1).min() > 0
        print("same")""")
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path,
                         env={"PYTHONPATH": inspect.getfile(selora).rsplit("/minilora/", 1)[0]})
    assert run.stdout == "same\n", run.stderr


def test_load_adapter_into_lower_and_higher_ranks():
    source, x = stirred(inject_into(small(), rank=2, scale=0.7)), batch()
    state = selora.adapter_state(source)
    for rank in (0, 3):
        other = small()
        other.load_state_dict({k.replace("base.", ""): v for k, v in source.state_dict().items()
                               if k.rsplit(".", 1)[1] not in ("A", "B", "active")})
        stirred(inject_into(other, rank=rank))
        selora.load_adapter(other, state)
        y = other(x)
        assert (y - source(x)).abs().max() < 1e-14 and other.mix.rank == other.mix.active.sum() == 2
        assert (other.mix.B[2:] == 0).all()
        other.mix.rank = 5
        assert torch.equal(other(x), y)


def test_load_adapter_refuses_and_changes_nothing():
    model = inject_into(small(), rank=1, capacity=2)
    before, good = copy.deepcopy(model.state_dict()), selora.adapter_state(stirred(inject_into(small(), rank=2)))
    missing = {k: v for k, v in good.items() if k != "mix"}
    wide = {**good, "head": dict(good["head"], A=torch.zeros(9, 2), B=torch.zeros(2, 3))}
    mixed = {**good, "head": dict(good["head"], B=torch.zeros(1, 3))}
    high = selora.adapter_state(stirred(inject_into(small(), rank=3)))
    with pytest.raises(ValueError, match="the model has no adapters: call inject first, with the same targets"):
        selora.load_adapter(nn.Linear(3, 3), good)
    for state, message in [(missing, "layer 'mix' is in the model only"),
                           ({**good, "extra": good["mix"]}, "layer 'extra' is in what was given only"),
                           (wide, r"layer 'head': A \[9, 2\]"), (mixed, "layer 'head': A .* do not fit"),
                           ({**good, "head": {"A": good["head"]["A"]}}, "layer 'head': the state needs A, B and scale"),
                           (high, "layer 'conv': rank 3 is above the capacity 2")]:
        with pytest.raises(ValueError, match=message):
            selora.load_adapter(model, state)
        assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


# ---- rules and budgets


def scored(model, **fields):
    """Scores of the layers in order, from lists of fields."""
    rows = [dict(current=1.0, candidate=0.0, expected=0.0, ratio=1.0) for _ in adapters(model)]
    for field, values in fields.items():
        for row, value in zip(rows, values):
            row[field] = value
    return {name: Score(**row) for name, row in zip(adapters(model), rows)}


def test_ratio_rule():
    model = inject_into(small(), capacity=2)
    scores = scored(model, ratio=[1.29, 1.3, math.inf], expected=[0.5, 0.29, 0.31])
    assert grow(model, scores) == {"head": 2, "mix": 2} and model.conv.rank == 1
    assert grow(model, scores) == {}  # the rest is at capacity
    assert grow(model, scores, ratio_of="expected", lam=1.5) == {"conv": 2}


def test_gain_cheapest_random_and_budgets():
    # costs: conv 18 + 8 = 26, mix 16, head 11; rank 1 everywhere is 53
    names = ["conv", "mix", "head"]
    model = inject_into(small())
    assert [selora.adapter_cost(v) for v in adapters(model).values()] == [26, 16, 11]
    assert selora.adapter_parameters(model) == 53
    gain = scored(model, expected=[27.0, 16.0, 1.0])  # 1.04, 1, .09 per parameter
    for budget, grown in [(53, []), (63, []), (64, ["head"]), (69, ["mix"]), (79, ["conv"]), (94, ["conv", "head"]),
                          (95, ["conv", "mix"]), (106, names)]:
        model = inject_into(small())
        assert list(grow(model, gain, "gain", budget=budget)) == grown and selora.adapter_parameters(model) <= budget
    model = inject_into(small())
    assert list(grow(model, None, "cheapest", budget=80)) == ["head", "mix"]
    assert list(grow(model, gain, "gain", budget=10**6)) == names
    assert grow(model, scored(model), "gain", budget=10**6) == {}  # no information, no rank
    orders = set()
    for seed in range(20):
        model = inject_into(small())
        grown = grow(model, None, "random", budget=90, generator=torch.Generator().manual_seed(seed))
        orders.add(tuple(grown))
        again = inject_into(small())
        assert grow(again, None, "random", budget=90, generator=torch.Generator().manual_seed(seed)) == grown
        assert selora.adapter_parameters(model) == 53 + sum({"conv": 26, "mix": 16, "head": 11}[n] for n in grown) <= 90
    assert orders == {("conv", "head"), ("head", "conv"), ("mix", "head"), ("head", "mix")}
    model = inject_into(small(), capacity=3)
    for _ in range(5):
        grow(model, None, "cheapest", budget=10**6)
    assert all(v.rank == 3 for v in adapters(model).values()) and grow(model, None, "cheapest", budget=10**6) == {}
    model = inject_into(small())
    grow(model, scored(model, ratio=[5.0, 9.0, 4.0]), "ratio", budget=53 + 27)  # the largest ratio first
    assert [v.rank for v in adapters(model).values()] == [1, 2, 2]


def test_grow_refuses():
    model = inject_into(small())
    nan = scored(model, expected=[math.nan] * 3)
    for arguments, message in [((nan, "gain", 1.3, "sampled", 60), "layer 'conv': .* use FisherProbe"),
                               ((nan, "ratio", 1.3, "expected"), "layer 'conv': .* use FisherProbe"),
                               ((nan, "best"), "rule 'best'"), ((nan, "ratio", 1.3, "exact"), "ratio_of 'exact'"),
                               ((nan, "random"), "needs a budget"), ((None, "ratio"), "no score for layer 'conv'"),
                               (({"conv": nan["conv"]}, "ratio"), "no score for layer 'mix'"),
                               ((nan, "ratio", 1.3, "sampled", 52), "52 parameters is below the 53 that the adapters have")]:
        with pytest.raises(ValueError, match=message):
            grow(model, *arguments)
    assert selora.adapter_parameters(model) == 53


def batches(model, count):
    data = [batch(8) for _ in range(count)]
    return [full_gradients(model, lambda x=x: per_sample(model(x)).mean()) for x in data]


def test_full_gradients_are_the_gradients_of_an_unfrozen_model():
    base, x = small(), batch()
    model = inject_into(copy.deepcopy(base), rank=0)
    found = full_gradients(model, lambda: per_sample(model(x)).mean())
    per_sample(base(x)).mean().backward()
    for name, layer in adapters(model).items():
        assert torch.allclose(found[name], getattr(base, name).weight.grad.flatten(1), rtol=1e-12, atol=0)
        assert not layer.base.weight.requires_grad and layer.base.weight.grad is None and layer.B.grad is None


def test_neyman_by_hand():
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(9, 7, bias=False), nn.Linear(1, 1, bias=False))
    inject(model, rank=0, capacity=10**4)
    a, b = torch.tensor([[1.0, 0, 0, 0], [2, 0, 0, 0]]), torch.tensor([[2.0, 1, 0, 0], [-1, 0, 0, 0]])
    c, none = torch.ones(7, 9), torch.zeros(1, 1)
    two = [{"0": a, "1": c, "2": none}, {"0": b, "1": c, "2": none}]
    D = {"0": math.sqrt(2 / 4) * 2 / math.sqrt((1 + 5) / 2), "1": math.sqrt(2 / 9) * 7 * 9 / 3, "2": 0}  # row 1 of '0' disagrees: 0
    assert savings(adapters(model), iter(two)) == pytest.approx(D)
    three = [*two, {"0": 3 * a, "1": c, "2": none}]  # G_a is now 2a: m 4, v (1 + 5 + 9) / 3
    assert savings(adapters(model), three) == pytest.approx(D | {"0": math.sqrt(2 / 4) * 4 / math.sqrt(5)})
    weights = {name: math.sqrt(D[name] / cost) for name, cost in (("0", 6), ("1", 16), ("2", 2))}
    for budget in (16, 60, 100):
        assert plan(model, "neyman", budget, two) == apportion(weights, {"0": 6, "1": 16, "2": 2}, budget, {"0": 2, "1": 7, "2": 1})
    fine = apportion(weights, {"0": 6, "1": 16, "2": 2}, 60000, dict.fromkeys("012", 10**4))
    assert abs(fine["0"] / fine["1"] - weights["0"] / weights["1"]) < 1e-3 and fine["2"] == 0
    assert 59984 < 6 * fine["0"] + 16 * fine["1"] <= 60000


VALUES = {"conv": [3.0, 1.0, 2.0, 0.5], "mix": [4.0, 0.1, 0.2, 0.0], "head": [0.3, 0.2, 0.1]}


@pytest.mark.parametrize("rule", PLANS)
def test_plans_respect_budget_and_capacity(rule):
    model = inject_into(small(), rank=0, capacity=4)
    gradients = batches(model, 4)
    previous = 0
    for budget in (11, 27, 53, 80, 100, 150, 200, 201, 500):
        ranks = plan(model, rule, budget, gradients, VALUES)
        spent = sum(selora.adapter_cost(v) * ranks[n] for n, v in adapters(model).items())
        assert spent <= budget and all(0 <= ranks[n] <= highest(v) for n, v in adapters(model).items())
        assert spent >= previous or rule in ("random", "shuffled")
        previous = spent
    assert ranks == dict(conv=4, mix=4, head=3) and min(plan(model, rule, 11, gradients, VALUES).values()) == 0  # no change of 8 by 3 has rank 4
    set_ranks(model, plan(model, rule, 100, gradients, VALUES))
    assert 74 < selora.adapter_parameters(model) <= 100  # nothing that still fits is left over
    with pytest.raises(ValueError, match="10 parameters buys no rank: the cheapest costs 11"):
        plan(model, rule, 10, gradients, VALUES)


def wide(count=12):
    """Layers of three costs, [count] in all, at rank 0."""
    layers = [nn.Linear(8, 8 + 4 * (k % 3)) for k in range(count)]
    return inject_into(nn.ModuleList(layers), rank=0, capacity=6)


def test_uniform_is_equal_ranks_and_a_draw_for_the_rest():
    model = wide()
    costs = {name: selora.adapter_cost(v) for name, v in adapters(model).items()}
    assert {*plan(model, "uniform", 2 * sum(costs.values())).values()} == {2}
    drawn = [plan(model, "uniform", 2 * sum(costs.values()) + 75, seed=seed) for seed in (0, 0, 1, 2)]
    assert drawn[0] == drawn[1] and len({str(ranks) for ranks in drawn}) > 1
    for ranks in drawn:
        spent = sum(costs[name] * rank for name, rank in ranks.items())
        assert {*ranks.values()} == {2, 3} and 0 <= 2 * sum(costs.values()) + 75 - spent < min(costs.values())
    uneven = [plan(model, "random", 2 * sum(costs.values()), seed=seed) for seed in (0, 0, 1)]
    assert uneven[0] == uneven[1] != uneven[2] and max(uneven[0].values()) - min(uneven[0].values()) > 2


def test_the_most_valued_components_by_parameter_are_taken_first():
    # costs: conv 26, mix 16, head 11; worth: mix .25, conv .115 .077 .038 .019, head .027 .018 .009, mix .0125 .00625
    model = inject_into(small(), rank=0, capacity=4)
    ask = lambda budget, rule="probe-svd": list(plan(model, rule, budget, values=VALUES).values())
    assert ask(16) == [0, 1, 0] and ask(42) == [1, 1, 0] and ask(68) == [2, 1, 0] and ask(94) == [3, 1, 0]
    assert ask(79) == [2, 1, 1]  # conv's third does not fit and is passed over
    assert ask(25) == [0, 1, 0] and ask(15) == [0, 0, 1]
    assert ask(105, "oracle") == [3, 1, 1]
    with pytest.raises(ValueError, match="layer 'mix' is in the model only"):
        plan(model, "probe-svd", 50, values={"conv": [1.0], "head": [1.0]})


def test_shuffled_keeps_the_ranks_of_each_cost():
    model = wide()
    values = {name: torch.rand(6).tolist() for name in adapters(model)}
    budget = 700
    ranks = plan(model, "probe-svd", budget, values=values)
    others = [plan(model, "shuffled", budget, values=values, seed=seed) for seed in (0, 0, 1)]
    assert others[0] == others[1] and len({str(each) for each in [ranks, *others]}) == 3
    kinds = lambda ranks: sorted((selora.adapter_cost(v), ranks[name]) for name, v in adapters(model).items())
    assert kinds(others[0]) == kinds(others[2]) == kinds(ranks) and len({*ranks.values()}) > 2


def test_looks_open_a_budget_evenly_in_the_first_quarter():
    class cfg:
        steps, every, capacity = 300, 40, 8

    model = wide()
    for layer in adapters(model).values():
        layer.rank = 1
    ones = dict.fromkeys(adapters(model), 1)
    cost = selora.adapter_parameters(model)
    assert openings(cfg, Job("ratio", "ratio", 0, 1), model, ones) == dict.fromkeys(range(40, 300, 40))
    for budget, looks in ((2 * cost, 4), (3 * cost, 8)):
        found = openings(cfg, Job("r", "ratio", budget, 1), model, ones)
        steps = list(found)
        assert len(steps) >= looks and steps[-1] < 75 and len({b - a for a, b in zip(steps, steps[1:])}) == 1
        share = [(allowed - cost) / (budget - cost) for allowed in found.values()]
        assert share == pytest.approx([(k + 1) / len(steps) for k in range(len(steps))], abs=1e-2) and share[-1] == 1
    history = [[0, ones], [7, ones | {"0": 2}], [30, ones | {"0": 2, "1": 3}]]
    assert openings(cfg, Job("c", "random-grown", 0, 1, "r", history), model, ones) == {7: cost + 16, 30: cost + 16 + 2 * 20}
    assert openings(cfg, Job("u", "uniform", cost), model, ones) == {}


def test_a_probe_has_a_rank_to_spare():
    class cfg:
        steps, capacity = 300, 8

    for budget, rank in ((100, 4), (300, 4), (420, 5), (700, 8), (10**6, 8)):
        probe, steps = probe_of(cfg, Job("p", "probe-svd", budget), 100)
        assert (probe.rank, steps, probe.rule) == (rank, 30, "probe")
    assert probe_of(cfg, Job("o", "oracle", 100), 100)[1] == 300
    model = inject_into(small(), rank=0)
    assert start_of(model, Job("p", "probe", rank=4), 0) == dict(conv=4, mix=4, head=3)


def trained(rank=3):
    """A model whose adapters are away from zero, and losses of some batches of it."""
    model = stirred(inject_into(small(), rank=0, capacity=4), rank)
    data = [batch(6) for _ in range(4)]
    return model, [lambda x=x: per_sample(model(x)).mean() for x in data]


def test_components_are_the_singular_vectors_of_the_change():
    """The rows, one by one, add up to what the adapter changed; they are orthogonal and fall in size."""
    model, losses = trained()
    before = {name: (layer.delta().detach().clone(), losses[0]().item()) for name, layer in adapters(model).items()}
    waiting = {name: layer.A.detach().narrow(layer.axis, 3, 1).clone() for name, layer in adapters(model).items()}
    to_components(model)
    for name, layer in adapters(model).items():
        delta, loss = before[name]
        A = layer.A.detach().movedim(layer.axis, 0).flatten(1)  # [C,fan_in]
        rows = [layer.scale * torch.outer(layer.B[j], A[j]) for j in range(3)]
        assert torch.allclose(sum(rows), delta.flatten(1), atol=1e-12) and torch.allclose(layer.delta(), delta, atol=1e-12)
        sigma = layer.scale * layer.B[:3].norm(dim=1)
        assert torch.allclose(sigma, torch.linalg.svdvals(delta.flatten(1))[:3], atol=1e-10)
        assert torch.allclose(A[:3] @ A[:3].T, torch.eye(3, dtype=A.dtype), atol=1e-12)
        assert torch.equal(layer.A.narrow(layer.axis, 3, 1), waiting[name]) and layer.rank == 3 and not layer.B[3:].any()
        assert abs(losses[0]().item() - loss) < 1e-12


def multiplied(model, loss):
    """{layer: [r]} the gradient by a multiplier of each row, 1 now, by autograd."""
    ones = {name: torch.ones(len(layer.B), 1, dtype=torch.float64, requires_grad=True) for name, layer in adapters(model).items()}
    for name, layer in adapters(model).items():
        layer.open_B = lambda layer=layer, m=ones[name]: m * layer.mask * layer.B
    value = loss()
    for layer in adapters(model).values():
        del layer.open_B
    found = torch.autograd.grad(value, [*ones.values()])
    return {name: g.flatten() for name, g in zip(ones, found)}


def test_scores_of_multipliers_are_mean_squares_of_their_gradients():
    model, losses = trained()
    found = multiplier_scores(model, losses)
    each = [multiplied(model, loss) for loss in losses]
    for name, layer in adapters(model).items():
        expected = sum(gradients[name] ** 2 for gradients in each) / len(each)
        assert found[name] == pytest.approx(expected[:3].tolist(), rel=1e-9) and len(found[name]) == 3
    assert len({round(value, 12) for values in found.values() for value in values}) == 9
    with torch.no_grad():  # the same model in other words: A larger, B smaller
        for k, layer in enumerate(adapters(model).values()):
            factor = torch.linspace(0.1, 9, 4, dtype=torch.float64) * (k + 1)
            layer.A.mul_(factor.reshape([-1 if d == layer.axis else 1 for d in range(layer.A.dim())]))
            layer.B.div_(factor[:, None])
    again = multiplier_scores(model, losses)
    assert all(again[name] == pytest.approx(found[name], rel=1e-9) for name in found)
    assert not any(p.grad is not None for p in model.parameters())


def test_rises_are_differences_of_cut_models():
    model, losses = trained()
    to_components(model)
    before = copy.deepcopy(model.state_dict())
    found = rises(model, iter(losses))
    mean = lambda: sum(loss().item() for loss in losses) / len(losses)
    for name, layer in adapters(model).items():
        kept, at = layer.B.detach().clone(), [mean()]
        for rank in (2, 1, 0):
            with torch.no_grad():
                layer.B[rank:] = 0
            at.insert(0, mean())
        with torch.no_grad():
            layer.B.copy_(kept)
        assert found[name] == pytest.approx([at[j] - at[j + 1] for j in range(3)], abs=1e-12)
        assert sum(found[name]) == pytest.approx(at[0] - at[3], abs=1e-12)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_apportion():
    numbered = lambda values: dict(enumerate(values))
    ask = lambda weights, costs, budget, caps: list(
        apportion(numbered(weights), numbered(costs), budget, numbered(caps)).values())
    assert ask([1, 1, 1], [5, 5, 5], 15, [8] * 3) == [1, 1, 1]
    assert ask([1, 1, 1], [5, 5, 5], 14, [8] * 3) == [1, 1, 0]  # all round up at once: what fits, in order
    assert ask([3, 2, 1], [1, 1, 1], 6, [8] * 3) == [3, 2, 1]
    assert ask([100, 1, 1], [1, 1, 1], 10, [4] * 3) == [4, 3, 3]  # capped, the rest is shared
    assert ask([1, 0, 0], [1, 1, 1], 10, [4] * 3) == [4, 0, 0]  # no weight, no rank
    assert ask([0, 0], [1, 1], 10, [4] * 2) == [0, 0]


def test_plans_refuse():
    model = inject_into(small(), rank=0)
    with pytest.raises(ValueError, match="rule 'gain' is not known"):
        plan(model, "gain", 100)
    for gradients in (None, [], batches(model, 1)):
        with pytest.raises(ValueError, match="two or more"):
            plan(model, "neyman", 100, gradients)
    with pytest.raises(ValueError, match="layer 'mix' is in the model only"):
        set_ranks(model, dict(conv=1, head=1))
    with pytest.raises(ValueError, match="layer 'head': rank 0 can be raised up to the capacity 8, not set to 9"):
        set_ranks(model, dict(conv=1, mix=1, head=9))
    assert selora.adapter_parameters(model) == 0


# ---- never wrong in silence


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(x, w, self.bias, self.stride, self.padding)


class Equalised(nn.Linear):
    def forward(self, x):
        return nn.functional.linear(x, 0.5 * self.weight, self.bias)


def with_forward_of_its_own():
    layer = nn.Linear(4, 4)
    layer.forward = lambda x: nn.functional.linear(x, layer.weight.tanh())
    return layer


def with_hook(kind):
    layer = nn.Linear(4, 4)
    getattr(layer, f"register_forward_{kind}")(lambda module, *args: None)
    return layer


def of_dtype(dtype):
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().to(dtype), requires_grad=False)
    return layer


class Packed(torch.Tensor):
    """Stands for the tensor subclasses of quantization libraries."""


def packed():
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    return layer


NOT_PLAIN = {
    "weight-standardised convolution": (lambda: Standardised(4, 4, 3), "Standardised is a subclass"),
    "equalised learning rate": (lambda: Equalised(4, 4), "Equalised is a subclass"),
    "weight_norm, parametrized": (lambda: torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), "ParametrizedLinear is a subclass or parametrized"),
    "spectral_norm, parametrized": (lambda: torch.nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)), "ParametrizedConv2d is a subclass or parametrized"),
    "bias parametrized": (lambda: torch.nn.utils.parametrize.register_parametrization(nn.Linear(4, 4), "bias", nn.Tanh()) or 0, "parametrized"),
    "weight_norm by a hook": (lambda: torch.nn.utils.weight_norm(nn.Linear(4, 4)), "its weight is computed"),
    "spectral_norm by a hook": (lambda: torch.nn.utils.spectral_norm(nn.Conv2d(4, 4, 3)), "its weight is computed"),
    "pruned": (lambda: torch.nn.utils.prune.l1_unstructured(nn.Linear(4, 4), "weight", 0.5), "its weight is computed"),
    "a forward of its own": (with_forward_of_its_own, "its weight or forward is not the plain one"),
    "pre-forward hook": (lambda: with_hook("pre_hook"), "has forward hooks"),
    "forward hook": (lambda: with_hook("hook"), "has forward hooks"),
    "int8": (lambda: of_dtype(torch.int8), "a weight of torch.int8 cannot train"),
    "float8": (lambda: of_dtype(torch.float8_e4m3fn), "a weight of torch.float8_e4m3fn cannot train"),
    "complex": (lambda: of_dtype(torch.complex64), "a weight of torch.complex64 cannot train"),
    "tensor subclass": (packed, "quantized"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("targets", [None, "bad", "plain|bad"])
@pytest.mark.parametrize("kind", NOT_PLAIN)
def test_a_layer_that_is_not_what_it_looks_like_is_refused_and_nothing_changes(kind, targets):
    make, message = NOT_PLAIN[kind]
    model = nn.ModuleDict(dict(plain=nn.Linear(4, 4), bad=make()))
    modules, trains = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(ValueError, match="layer 'bad': ") as error:
        inject(model, targets)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == trains
    assert inject(model, "plain") == ["plain"]  # the way round it that the message names


def test_merge_computes_every_sum_before_it_writes_the_first():
    """n plain layers with whatever else between them: the merged model is the unmerged one to 1e-12."""
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 1)), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 3, padding=1),
                          nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)), nn.Flatten(), nn.Linear(4 * 16, 5)).double().eval()  # fmt: skip
    inject(model, "0|3|6", rank=2, capacity=3)
    stirred(model)
    x = torch.randn(3, 2, 6, 6, dtype=torch.float64)
    before = model(x)
    late = copy.deepcopy(model)
    nn.utils.parametrizations.weight_norm(late[6].base)  # the last layer is not plain any more
    weight = late[0].base.weight.clone()
    with pytest.raises(ValueError, match="layer '6': ParametrizedLinear"):
        selora.merge(late)
    assert len(adapters(late)) == 3 and torch.equal(late[0].base.weight, weight)
    assert (selora.merge(model)(x) - before).abs().max() < 1e-12 * before.abs().max()


def test_inject_refuses_a_model_that_has_another_librarys_adapters():
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)))
    model[1].lora_A = nn.ModuleDict({"default": nn.Linear(2, 1)})
    with pytest.raises(ValueError, match="layer '1' has an adapter of another library"):
        inject(model)
    assert not adapters(model)


def test_inject_refuses_a_model_with_parameters_to_come():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="parameters that are not initialized yet"):
        inject(model, "0")
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("how", ["AveragedModel", "AveragedModel with buffers", "swa", "every entry of the state dict"])
def test_an_averaged_copy_has_the_ranks_of_its_model(how):
    base = small().float()
    model = inject_into(copy.deepcopy(base), rank=1, capacity=4)
    if how == "every entry of the state dict":
        average = copy.deepcopy(model)
    else:
        rule = {} if how == "swa" else dict(multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
        average = torch.optim.swa_utils.AveragedModel(model, use_buffers=how != "AveragedModel", **rule)
    optimizer = torch.optim.AdamW(selora.adapter_groups(model, 0.01), 0.03)
    for step in range(30):
        optimizer.zero_grad()
        model(batch().float()).square().mean().backward()
        optimizer.step()
        if step in (5, 10):
            grow(model, None, "cheapest", budget=10**6)
        if how == "every entry of the state dict":
            with torch.no_grad():
                for ours, theirs in zip(average.state_dict().values(), model.state_dict().values()):
                    ours.copy_(0.9 * ours + 0.1 * theirs)
        else:
            average.update_parameters(model)
    copied = average.module if hasattr(average, "module") else average
    x = batch().float()
    y = copied(x)
    ranks = {name: layer.rank for name, layer in adapters(copied).items()}
    assert ranks == {name: layer.rank for name, layer in adapters(model).items()} == dict(conv=3, mix=3, head=3)
    state = selora.adapter_state(copied)
    assert {name: len(part["B"]) for name, part in state.items()} == ranks
    fresh = inject_into(copy.deepcopy(base), rank=0, capacity=4)
    selora.load_adapter(fresh, state)
    loaded = inject_into(copy.deepcopy(base), rank=0, capacity=4)
    loaded.load_state_dict(copied.state_dict())
    for other in (fresh, loaded, selora.merge(copy.deepcopy(copied))):
        torch.testing.assert_close(other(x), y, rtol=1e-5, atol=1e-6)
    assert (y - base(x)).abs().max() > 1e-3
    assert {name: layer.rank for name, layer in adapters(loaded).items()} == ranks
    per_sample(copied(x)).mean().backward()  # a copy can be trained on: what waits, waits
    assert all((layer.B.grad[3:] == 0).all() and (layer.B.grad[:3] != 0).any() for layer in adapters(copied).values())


def test_ranks_are_exact_in_half_precision_and_a_mask_with_holes_is_refused():
    layer = LoRALinear(nn.Linear(400, 400), rank=301, capacity=400).bfloat16()
    again = LoRALinear(nn.Linear(400, 400), rank=0, capacity=400).bfloat16()
    again.load_state_dict(layer.state_dict())
    assert again.rank == layer.rank == 301
    with torch.no_grad():
        again.active[5] = 0
    with pytest.raises(ValueError, match="the open rows .* are not the first ones"):
        again.rank


def test_ranks_without_a_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(3, 3))
        inject(model, rank=2)
    model[0].rank += 1
    assert model[0].rank == 3 and selora.adapter_parameters(model) == 18


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adapters_of_a_half_precision_base_are_float32_and_learn(dtype):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 16, 4)).to(dtype)
    inject(model, rank=2, capacity=4)
    stirred(model)
    assert all(p.dtype == torch.float32 for layer in adapters(model).values() for p in (layer.A, layer.B))
    before = {name: layer.A.detach().clone() for name, layer in adapters(model).items()}
    optimizer = torch.optim.AdamW(selora.adapter_groups(model, 0.01), 1e-4)
    x = torch.randn(16, 2, 4, 4, dtype=dtype)
    for _ in range(10):
        optimizer.zero_grad()
        with FisherProbe(model) as probe:
            y = model(x)
            y.float().square().mean().backward()
        optimizer.step()
    assert y.dtype == dtype and all(math.isfinite(v) for score in probe.scores().values() for v in score)
    for name, layer in adapters(model).items():  # of a bfloat16 A 81% of the entries would not have moved
        moved = (layer.A != before[name]).narrow(layer.axis, 0, 2).float().mean()
        assert moved > 0.99
        assert layer.weight.dtype == dtype
    y = model(x)
    for layer in adapters(model).values():
        layer.to(dtype)  # cast by hand: works as before
    torch.testing.assert_close(model(x), y, rtol=0, atol=0.03 * y.abs().max().item())
    merged = selora.merge(model)
    assert merged[0].weight.dtype == dtype
    torch.testing.assert_close(merged(x), y, rtol=0, atol=0.03 * y.abs().max().item())


def mean_loss(model, x):
    return per_sample(model(x)).mean()


def same(scores, wanted, tolerance=1e-9):
    return all(close(a, b, tolerance) for name in wanted for a, b in zip(scores[name], wanted[name]))


@pytest.mark.parametrize("sizes", [(4, 4, 4, 4), (6, 6, 4), (16,), (1, 15)])
def test_micro_batches_with_a_probe_each_add_up_to_the_whole_batch(sizes):
    model = stirred(inject_into(small(), rank=1))
    x = batch(16)
    whole = probed(model, x)
    assert same(whole, {n: s._replace(expected=whole[n].expected) for n, s in fisher_loop(model, per_sample(model(x))).items()})
    parts = []
    for part in x.split(sizes):
        with FisherProbe(model, samples=16) as probe:
            (mean_loss(model, part) * len(part) / 16).backward()  # the loss that gradients are accumulated of
        parts.append(probe.scores())
    assert same(selora.add_scores(*parts), whole)


def test_a_second_batch_in_one_probe_is_refused():
    model = stirred(inject_into(small(), rank=1))
    x = batch(16)
    with pytest.raises(RuntimeError, match="a second batch in one probe: use a probe for each and add_scores"), FisherProbe(model):
        for part in x.split(4):
            (mean_loss(model, part) / 4).backward()
    with pytest.raises(RuntimeError, match="a second batch in one probe"), FisherProbe(model):
        (mean_loss(model, x[:8]) + mean_loss(model, x[8:])).backward()  # two forwards, one backward
    with pytest.raises(ValueError, match="has 8 samples, and the loss is said to be of 16"), FisherProbe(model, samples=16):
        (mean_loss(model, x[:8]) + mean_loss(model, x[8:])).backward()
    with pytest.raises(RuntimeError, match="layer 'head' is called after a backward"), FisherProbe(model):
        per_sample(model.head(torch.randn(4, 8).double())).mean().backward()  # a part of the model, called by itself
        model.head(torch.randn(4, 8).double())
    with FisherProbe(model, samples=16) as probe:  # two runs on the same samples are further calls
        per_sample(model(x) + model(2 * x)).mean().backward()
    assert same(probe.scores(), {n: s._replace(expected=probe.scores()[n].expected) for n, s in fisher_loop(model, per_sample(model(x) + model(2 * x))).items()})


class Tokens(nn.Module):
    """Tokens [N,T,d], sequence first or flattened into the batch on the way."""

    def __init__(self, layout):
        super().__init__()
        self.layout, self.mix, self.head = layout, nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x):
        if self.layout == "flattened":
            return self.head(self.mix(x.flatten(0, 1)).tanh()).unflatten(0, x.shape[:2])
        if self.layout == "sequence first inside":
            return self.head(self.mix(x.transpose(0, 1)).tanh()).transpose(0, 1)
        return self.head(self.mix(x).tanh())


def test_inputs_that_do_not_count_samples_first():
    torch.manual_seed(2)
    models = {layout: stirred(inject_into(Tokens(layout).double(), rank=1)) for layout in ("plain", "flattened", "sequence first inside")}
    for model in models.values():
        model.load_state_dict(models["plain"].state_dict())
    x = torch.randn(5, 3, 6, dtype=torch.float64)
    wanted = probed(models["plain"], x)
    for layout, shape in (("flattened", r"\[15, 6\] has 15 rows"), ("sequence first inside", r"\[3, 5, 6\]")):
        if layout == "sequence first inside":  # an input of the model has 3 at that place too, but as its second dimension
            shape = r"\[3, 5, 6\] has 3 rows at dimension 0, as no input of the model has"
        with pytest.raises(ValueError, match=f"layer 'mix': input {shape}"), FisherProbe(models[layout]):
            mean_loss(models[layout], x)
    with FisherProbe(models["sequence first inside"], dim=1) as probe:
        probe.sizes = set()
        per_sample(Tokens.forward(models["sequence first inside"], x)).mean().backward()
    assert same(probe.scores(), wanted)
    first = x.transpose(0, 1).contiguous()  # a model that is sequence first from its input on
    with FisherProbe(models["plain"], dim=1) as probe:
        per_sample(models["plain"](first).transpose(0, 1)).mean().backward()
    assert same(probe.scores(), wanted)
    with pytest.raises(ValueError, match="has 15 samples, and the loss is said to be of 5"), FisherProbe(models["flattened"], samples=5):
        Tokens.forward(models["flattened"], x)


def test_a_loss_that_is_a_sum():
    model, x = single("linear [N,T,d]")
    with FisherProbe(model, reduction="sum") as probe:
        per_sample(model(x)).sum().backward()
    assert same(probe.scores(), probed(model, x))
    with pytest.raises(ValueError, match="reduction 'max' is not known; use mean or sum"):
        FisherProbe(model, reduction="max")


def test_a_weight_that_is_read_instead_of_called_is_refused():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.read = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return nn.functional.linear(self.first(x), self.read.weight, self.read.bias)

    model = inject_into(Reads().double())
    x = torch.randn(5, 4, dtype=torch.float64)
    with FisherProbe(model) as probe:
        mean_loss(model, x).backward()
    with pytest.raises(RuntimeError, match="layer 'read' was not called, but its weight was read"):
        probe.scores()
    fused = inject_into(small())
    fused.fused = nn.Linear(8, 8)
    fused.fused.weight.data = fused.mix.weight.data  # as projections are fused after inject
    fused.mix_before, fused.mix = fused.mix, fused.fused
    with FisherProbe(fused) as probe:
        mean_loss(fused.double(), batch()).backward()
    with pytest.raises(RuntimeError, match="layer 'mix_before' was not called, but its weight was read"):
        probe.scores()


def test_a_compiled_model_is_refused_in_a_probe():
    model = stirred(inject_into(small(), rank=1))
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="compiled model"):
        FisherProbe(compiled)
    torch._dynamo.reset()
    mean_loss(compiled, batch()).backward()
    with FisherProbe(model) as probe, pytest.raises(Exception, match="compiled"):
        mean_loss(compiled, batch()).backward()
        probe.scores()
    with pytest.raises(RuntimeError, match="waiting rows got no gradient: losses of a compiled model"):
        fisher_loop(model, per_sample(compiled(batch())))
    assert all(layer.mask.sum() == layer.rank for layer in adapters(model).values())


def test_one_image_without_a_batch():
    model, x = single("conv 3x3")
    torch.testing.assert_close(model(x[0]), model(x)[0], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="no dimension for the samples"), FisherProbe(model):
        model(x[0])


@pytest.mark.filterwarnings("ignore")
def test_a_bfloat16_base_with_float32_adapters_ends_where_a_float32_base_does():
    """100 steps on a small UNet of diffusers, losses within .1%; with adapters cast to bfloat16 by hand they are not."""
    diffusers = pytest.importorskip("diffusers", reason="diffusers is in the bench extra")

    def final(dtype, cast=False):
        torch.manual_seed(0)
        unet = diffusers.UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32), cross_attention_dim=16, attention_head_dim=8,
                                              norm_num_groups=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))  # fmt: skip
        unet = unet.to(dtype)
        torch.manual_seed(1)
        inject(unet, ".*(to_q|to_k|to_v|to_out.0|conv1|conv2)", rank=2, capacity=4)
        for layer in adapters(unet).values() if cast else ():
            layer.to(dtype)
        optimizer = torch.optim.AdamW(selora.adapter_groups(unet, 0.01), 3e-4)
        z, noise, words, t = torch.randn(8, 4, 8, 8), torch.randn(8, 4, 8, 8), torch.randn(8, 5, 16), torch.randint(0, 1000, (8,))
        for _ in range(100):
            optimizer.zero_grad()
            loss = (unet(z.to(dtype), t, words.to(dtype)).sample.float() - noise).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    exact = final(torch.float32)
    assert abs(final(torch.bfloat16) / exact - 1) < 1e-3 < abs(final(torch.bfloat16, cast=True) / exact - 1)


DDP = """
import torch
from torch import nn
from minilora import selora

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2)).double()
selora.inject(model, rank=1, capacity=12)
parallel = nn.parallel.DistributedDataParallel(model)
optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
torch.manual_seed(1)
x, y = torch.randn(10, 32, 8).double(), torch.randn(32, 2).double()
x[:, 1::2] *= 4  # what the processes see differs
scores = []
for step in range(10):
    own = slice(rank, 32, 2)
    optimizer.zero_grad()
    with selora.FisherProbe(model) as probe:
        (parallel(x[step, own]) - y[own]).square().mean().backward()
    scores.append(probe.scores())
    loop = selora.fisher_loop(model, (model(x[step, own]) - y[own]).square().mean(1))
    assert all(abs(loop[n][0] / scores[-1][n][0] - 1) < 1e-9 for n in loop)
    if step == 0:  # as one process with the whole batch sees it
        whole = selora.fisher_loop(model, (model(x[step]) - y).square().mean(1))
        assert all(abs(whole[n][i] / scores[-1][n][i] - 1) < 1e-9 for n in whole for i in (0, 1))
    optimizer.step()
    selora.grow(model, scores[-1], "ratio", lam=1.1)
parallel(x[0])
layers = selora.adapters(model).values()
torch.save([scores, [v.rank for v in layers], [int(v.active.sum()) for v in layers], [len(s["B"]) for s in selora.adapter_state(model).values()]], f"rank{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_ranks_grow_alike_in_a_ddp_loop_of_ones_own(tmp_path):
    from test_processes import launch

    (tmp_path / "worker.py").write_text(DDP)
    launch(2, "worker.py", cwd=tmp_path)
    (scores, ranks, rows, saved), other = (torch.load(tmp_path / f"rank{k}.pt", weights_only=False) for k in range(2))
    assert other == [scores, ranks, rows, saved]  # to the bit
    assert ranks == rows == saved and min(ranks) > 3
