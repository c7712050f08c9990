"""A training step of each script on torch's meta device, where nothing has a value: whatever would make a GPU's host wait raises."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train_mora
import train_selora
from minilora import diffusion, loop, selora
from minilora.models import make_vit
from minilora.mora import METHODS, attach
from minilora.phantoms import phantoms
from minilora.ranks import Job, ranks_of
from minilora.task import draw_task, load_task, vit_sizes
from minilora.unet import Denoiser
from minilora.vae import VAE

META = torch.device("meta")
STEPS = 3
TINY = dict(steps=STEPS, pretrain_steps=STEPS, batch=4, width=8, heads=2, buckets=32)


class HostValues(TorchFunctionMode):
    """Raises where numbers of Python become a tensor on the device: the host would wait for that copy."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if MetaLoop.in_step and function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.is_meta:
            raise RuntimeError(f"{function.__name__} copies numbers of Python to the device")
        return result


class OneDevice(TorchDispatchMode):
    """Raises where an operator mixes tensors of the device and of the CPU, which meta tensors alone let pass in products and
    look-ups, and where the host would wait for a copy to the device. A number [] on the CPU goes with the operator."""

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not MetaLoop.in_step:
            return operator(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_host = [x for x in tensors if not x.is_meta]
        if len(on_host) < len(tensors) and any(x.dim() for x in on_host):
            raise RuntimeError(f"{operator} mixes tensors of the CPU and of the device")
        result = operator(*args, **kwargs)
        moved = on_host and isinstance(result, torch.Tensor) and result.is_meta
        if moved and not kwargs.get("non_blocking"):
            raise RuntimeError(f"{operator}: the host waits for a copy to the device")
        return result


class Ended(Exception):
    """All steps went through; what a script does after them, it does on the host."""


class Stop:
    """Stands for the `Stopper`: it saves nothing, for a save reads the device by design."""

    code = 0

    def after(self, done, every, save):
        if done == STEPS:
            raise Ended


class MetaLoop(loop.Loop):
    """The `Loop` with watched steps. Its look at the losses before ranks grow is left out: that reads the device by nature."""

    in_step = False

    def __iter__(self):
        for step in super().__iter__():
            MetaLoop.in_step = True
            yield step
            MetaLoop.in_step = False

    def finite(self, scores):
        return self.watch.scores(self.step, scores)


class Generator(torch.Generator):
    """The meta device has no generators of its own, and draws nothing."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made.place = torch.device(device)
        return made

    @property
    def device(self):
        return self.place


def decided(values):
    """In the place of `over_processes`: scores are read on the host by nature, so the decision is given. The first layer's
    FI-Ratio is 2, sampled and expected, that of the others is 1."""
    assert values.is_meta and values.dim() == 2
    rows = torch.tensor([1.0, 0.0, 0.0]).repeat(len(values), 1)
    rows[0] = 1.0
    return rows


@pytest.fixture(autouse=True)
def meta(monkeypatch):
    for script in (train_mora, train_selora):
        monkeypatch.setattr(script, "Loop", MetaLoop)
    monkeypatch.setattr(loop.Progress, "due", lambda self, step: False)  # a progress line reads the loss by design
    monkeypatch.setattr(torch, "autocast", lambda *device, **how: nullcontext())  # it does not know the meta device
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(selora, "over_processes", decided)
    monkeypatch.setattr(MetaLoop, "in_step", False)
    with HostValues(), OneDevice():
        yield


@pytest.fixture
def sums(monkeypatch):
    """Makes this process the first of two, whose sums are made by nobody; the tensors that were to be summed."""
    tensors = []
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "all_reduce", tensors.append)
    return tensors


STUDY = phantoms(60, 2, "target", 16).select(("image", "note", "vitals"))
FINDINGS = replace(STUDY, labels=np.stack([np.where(STUDY.labels > 2, -1, STUDY.labels == c) for c in range(3)], 1), class_names=["a", "b", "c"])


def mora_steps(method="mora", study=STUDY, absent="mask"):
    """Run the adaptation of train_mora.py, on the device from the task on; returns the model."""
    cfg = train_mora.Config(out=Path("nowhere"), image_size=16, depth=2, absent=absent, **TINY)
    config = vit_sizes(cfg, study, study) | {"classes": len(study.class_names), "absent": absent}
    with META:
        model = attach(make_vit(config), method)
    task = load_task(study, draw_task(cfg, study, 0), cfg.missing, config, META)
    with pytest.raises(Ended):
        train_mora.adapt(cfg, model, method, 0, 0.01, task, None, Stop())
    return model


def selora_case(**settings):
    """(configuration, pairs, denoiser) of train_selora.py, on the device."""
    cfg = train_selora.Config(out=Path("nowhere"), every=1, text_width=8, **TINY, **settings)
    with META:
        model = Denoiser(size=8, width=8, text_width=8, text_depth=1, heads=2, buckets=32, positions=6)
        pairs = train_selora.Pairs(torch.randn(20, 4, 8, 8), torch.randint(3, 32, (20, 6)), diffusion.alphas_cumprod(device=META))
    return cfg, pairs, model


def selora_steps(rule="ratio", **settings):
    """Inject adapters and run the adaptation of train_selora.py; returns the model."""
    cfg, pairs, model = selora_case(**settings)
    job = Job(rule, rule, 0 if rule == "ratio" else 10**6, 1)
    if rule != "full":
        train_selora.inject(cfg, pairs, model, job, 0, np.arange(20), None)
    with pytest.raises(Ended):
        train_selora.adapt(cfg, pairs, model, job, 0, 0.01, np.arange(20), None, Stop())
    return model


# ---- the steps


STUDIES = pytest.mark.parametrize("study", [STUDY, FINDINGS], ids=["classes", "findings"])


@STUDIES
@pytest.mark.parametrize("method", METHODS)
def test_a_step_of_mora_reads_nothing_from_the_device(method, study):
    model = mora_steps(method, study)
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@STUDIES
def test_a_step_of_mora_of_two_processes_reads_nothing_from_the_device(sums, study):
    mora_steps("mora", study)
    per_step = 2 if study is FINDINGS else 1  # the count of known findings, and the gradients
    assert len(sums) == per_step * STEPS and all(tensor.is_meta for tensor in sums)


def test_a_step_with_dummies_reads_nothing_from_the_device():
    mora_steps(absent="dummy")


def test_a_step_of_mora_s_pretraining_reads_nothing_from_the_device(tmp_path):
    cfg = train_mora.Config(image_size=16, depth=1, **TINY)
    source = train_mora.read_source(replace(cfg, phantoms=40), STUDY)
    with pytest.raises(Ended):
        train_mora.pretrain(cfg, source, vit_sizes(cfg, source, source), META, Stop(), tmp_path / "last.pt")


def grown(monkeypatch, **settings):
    """{layer: rank} after some steps of SeLoRA with probes, in which the words' vectors train too."""
    # Which words are frequent is read before the first step.
    monkeypatch.setattr(train_selora, "notes_with", lambda ids, buckets: torch.full((buckets,), 20, device=META))
    model = selora_steps(**settings)
    assert model.text.words.weight.grad is not None
    return ranks_of(model)


@pytest.mark.parametrize("settings", [{"ratio_of": "sampled"}, {"ratio_of": "expected"}, {"rule": "gain"}], ids=str)
def test_a_step_of_selora_reads_its_scores_and_nothing_else(monkeypatch, settings):
    first, *others = grown(monkeypatch, **settings).values()
    assert first == (2 if "rule" in settings else STEPS) and {*others} == {1}  # one rank at each probe; `gain` probes once


def test_a_step_of_selora_that_grows_at_random_reads_nothing_from_the_device(monkeypatch):
    assert max(grown(monkeypatch, rule="random-grown").values()) > 1


def test_a_step_of_selora_of_two_processes_reads_nothing_else(monkeypatch, sums):
    assert max(grown(monkeypatch).values()) == STEPS
    assert len(sums) == STEPS and all(tensor.is_meta for tensor in sums)


def test_a_step_of_full_fine_tuning_reads_nothing_from_the_device():
    selora_steps("full")


def test_a_step_of_selora_s_pretraining_reads_nothing_from_the_device(tmp_path):
    cfg, pairs, model = selora_case()
    with pytest.raises(Ended):
        train_selora.pretrain(cfg, model.config, pairs, np.arange(20), Stop(), tmp_path / "last.pt")
    with pytest.raises(Ended):
        train_selora.train_vae(VAE(16, width=8).config, STEPS, torch.empty(20, 1, 16, 16, device=META), Stop(), tmp_path / "vae.last.pt")


def twice(layer):
    """A layer that is called two times in a forward."""
    return nn.Sequential(layer, nn.GELU(), layer)


FORMS = {
    "a linear layer": (lambda: nn.Sequential(nn.Linear(6, 5)), (3, 6), {}),
    "tokens": (lambda: nn.Sequential(nn.Linear(6, 5)), (3, 7, 6), {"expected": False}),
    "many tokens": (lambda: nn.Sequential(nn.Linear(6, 5)), (3, 90, 6), {}),
    "samples second": (lambda: nn.Sequential(nn.Linear(6, 5)), (7, 3, 6), {"dim": 1}),
    "a shared layer": (lambda: twice(nn.Linear(6, 6)), (3, 7, 6), {}),
    "a convolution": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), (3, 2, 8, 8), {}),
    "with a stride": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, 2, 1)), (3, 2, 8, 8), {}),
    "by patches": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3, padding="same", dilation=2)), (3, 2, 8, 8), {}),
    "of many pixels": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3)), (3, 2, 30, 30), {}),
    "a shared convolution": (lambda: twice(nn.Conv2d(2, 2, 3, padding=1)), (3, 2, 8, 8), {}),
    "half a batch": (lambda: nn.Sequential(nn.Linear(6, 5)), (3, 6), {"samples": 6}),
    "a sum": (lambda: nn.Sequential(nn.Linear(6, 5)), (3, 6), {"reduction": "sum"}),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_of_the_probe_makes_one_transfer(monkeypatch, name):
    make, shape, settings = FORMS[name]
    transfers = []
    monkeypatch.setattr(selora, "over_processes", lambda values: transfers.append(values) or decided(values))
    with META:
        model = make()
        selora.inject(model, None, 1, 3)
        x = torch.randn(shape)
    for rank in (1, 2, 3):  # the last at capacity, where nothing can grow
        MetaLoop.in_step = True
        with selora.FisherProbe(model, **settings) as probe:
            loss = model(x).square()
            (loss.sum() if settings.get("reduction") else loss.mean()).backward()
        selora.grow(model, probe.scores(), "ratio", 1.5)
        MetaLoop.in_step = False
        assert set(ranks_of(model).values()) == {min(rank + 1, 3)}
    assert len(transfers) == 3


# ---- the test can fail

FAULTS = {
    "a number is read": (lambda loss: loss * (1 + 0 * loss.mean().item()), "item"),
    "a condition is read": (lambda loss: loss if loss.mean() > 0 else -loss, "item"),
    "a list is read": (lambda loss: loss * len(loss.flatten().tolist()), "Cannot copy out of meta"),
    "a mask selects": (lambda loss: loss.flatten()[loss.flatten() > 0], "nonzero"),
    "a tensor stayed on the CPU": (lambda loss: loss * torch.ones(2, 1).flatten(), "mixes tensors"),
    "a matrix stayed on the CPU": (lambda loss: loss.reshape(1, -1) @ torch.ones(loss.numel(), 2), "mixes tensors"),
    "a number is copied": (lambda loss: loss * torch.tensor(2.0, device=loss.device), "copies numbers of Python"),
    "numbers of numpy choose": (lambda loss: loss.flatten()[np.zeros(1, int)], "waits for a copy"),
    "the host waits for a copy": (lambda loss: loss.flatten() * torch.ones(1).to(loss.device), "waits for a copy"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_in_a_step_raises(monkeypatch, name):
    fault, reason = FAULTS[name]
    diagnosis = train_mora.diagnosis_loss
    monkeypatch.setattr(train_mora, "diagnosis_loss", lambda *batch: fault(diagnosis(*batch)).mean())
    with pytest.raises((RuntimeError, NotImplementedError), match=reason):
        mora_steps()
    MetaLoop.in_step = False
    denoising = diffusion.denoising_loss
    monkeypatch.setattr(diffusion, "denoising_loss", lambda *batch, **how: fault(denoising(*batch, **how)))
    with pytest.raises((RuntimeError, NotImplementedError), match=reason):
        selora_steps("fixed", word_notes=0)
