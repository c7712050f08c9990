"""What surrounds the steps of every training and is no lesson: going on after a stop, `last.pt`,
the watch for NaN, progress, log lines, averages over processes, time.

    loop = Loop(name, steps, model, rows_of, last, stop, optimizer=optimizer, schedule=schedule,
                save_every=200, together=True)
    for step in loop:       # goes on where a stopped run was
        optimizer.zero_grad()
        loss = ...
        loss.backward()
        loop.note(loss)     # averages gradients over processes; a NaN stops the run
        optimizer.step()
        schedule.step()

It is no Trainer: optimizer, schedule and step stand in the script, in order. Skip this file when
you read for a method."""

import json
import math
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path

import numpy as np
import torch

from minilora import checkpoint
from minilora.data import Refused
from minilora.processes import average, leader


def warm_cosine(steps):
    """Learning-rate factor by step: up over the first tenth, then down along a cosine to 0."""
    warm = max(1, steps // 10)

    def factor(step):
        through = min(1.0, max(0, step - warm) / max(1, steps - warm))
        return min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * through))

    return factor


def rows_at(seed, step, n, batch):
    """The batch of a step, [batch] positions in n, drawn from (seed, step) alone."""
    return np.random.default_rng((seed, step)).integers(0, n, batch)


@dataclass
class Loop:
    """An iterator over the steps that are left of one training.

    What trains, all buffers, optimizer, schedule, losses, time, and the plain values in `.kept` are
    saved in `last` and come back. RuntimeError if a step did not call `note`."""

    name: str  # what progress lines and errors call the training
    steps: int
    model: torch.nn.Module
    rows_of: Callable  # step -> the samples of that step, for an error message
    last: Path  # file of the resume state
    stop: "Stopper"
    _: KW_ONLY
    optimizer: torch.optim.Optimizer
    schedule: torch.optim.lr_scheduler.LRScheduler
    save_every: int  # steps
    # Whether all processes train one model, whose gradients and losses are then averaged. Where one
    # process trains alone, averaging would wait for the others for ever.
    together: bool
    of: str = ""  # whose state `last` may hold; default: the name
    # With a log, a line every `log_every` steps holds `fields`, the step, the mean loss and counts():
    # numbers that progress lines show too. A run's trainings share one log and one `last`.
    log: "Log | None" = None
    log_every: int = 0
    fields: dict = field(default_factory=dict)
    counts: Callable = dict

    def __post_init__(self):
        self.of = self.of or self.name
        self.kept = {}
        self.start = 0
        self.began = time.monotonic()
        self.bytes_sent = 0
        device = next(self.model.parameters()).device
        self.watch = Watch(self.name, self.steps, 0, self.model, self.rows_of, device)
        if self.last.exists():
            # A run's file may be left of the training before; a base has a file of its own.
            saved = checkpoint.load(self.last, "resume", None if self.log else self.of)
            if saved["of"] == self.of:
                self.restore(saved)
        self.progress = Progress(self.name, self.steps, self.start)

    def restore(self, saved):
        """Go on from what `save` wrote; `Refused` if it does not fit."""
        checkpoint.check_resume(self.last, saved, self.model, self.optimizer)
        self.model.load_state_dict(saved["state"], strict=False)
        self.optimizer.load_state_dict(saved["optimizer"])
        self.schedule.load_state_dict(saved["schedule"])
        self.start = saved["step"]
        self.began -= saved["seconds"]
        self.kept = saved["kept"]
        self.watch.start = self.start
        self.watch.losses[: self.start] = saved["losses"]
        if self.log:
            self.log.cut(saved["log"])

    def save(self, done):
        """Write the state after `done` steps, unless a number in it is not finite."""
        self.watch.checked(done)
        content = {
            "format": 2,
            "kind": "resume",
            "of": self.of,
            "step": done,
            "state": checkpoint.trained_state(self.model),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "seconds": self.seconds,
            "losses": self.watch.losses[:done],
            "kept": self.kept,
            "log": self.log.size if self.log else 0,
        }
        checkpoint.save(self.last, content)

    @property
    def seconds(self):
        """Time spent on the training, over all sittings."""
        return time.monotonic() - self.began

    def __iter__(self):
        if self.log and not self.start:
            self.save(0)  # from here on a killed run knows where its log ends
        for step in range(self.start, self.steps):
            self.step = step
            self.noted = False
            yield step
            if not self.noted:
                raise RuntimeError(f"{self.name}: step {step} ended without loop.note(loss)")
            self.after(step + 1)
        self.watch.checked(self.steps)

    def note(self, loss):
        """Average the gradients, and look at them and at the loss; between `backward` and
        `optimizer.step`.

        No step waits for the device: what is not finite stops the run when a line is logged, shown
        or saved."""
        if self.together:
            gradients = [p.grad for p in self.watch.parameters.values() if p.grad is not None]
            self.bytes_sent = average(gradients)
        self.watch.note(self.step, loss)
        self.noted = True

    def finite(self, scores):
        """The Fisher scores {layer: Score} of this step; `Refused` if a number is not finite."""
        self.watch.checked(self.step + 1, self.step)
        return self.watch.scores(self.step, scores)

    def after(self, done):
        """Log, show and save what is due after `done` steps; `Stopped` if a stop was asked for."""
        if self.log and (done % self.log_every == 0 or done == self.steps):
            first = max(0, done - self.log_every)
            if self.together:
                average([self.watch.losses[first:done]])
            loss = float(self.watch.checked(done, first).mean())
            self.log.write(**self.fields, step=done, loss=round(loss, 6), **self.counts())
        if self.progress.due(done):
            numbers = [f"loss {self.watch.checked(done)[-1]:.4f}"]
            for key, value in self.counts().items():
                numbers.append(f"{key.replace('_', ' ')} {value:,}")
            if self.bytes_sent:
                numbers.append(f"{self.bytes_sent:,} bytes sent")
            self.progress.show(done, "  ".join(numbers))
        self.stop.after(done, self.save_every, self.save)


class NotFinite(Refused):
    """A loss, a gradient or Fisher information is NaN or infinite."""


class Watch:
    """Losses and gradients of a loop, looked at on the device: no step waits until somebody asks.

    `note(step, loss)` after each backward; `checked(done)` then gives the losses up to there, or
    `Refused` with the first step whose loss or gradient is not finite, the parameter, and the
    samples of that step."""

    def __init__(self, name, steps, start, model, rows_of, device):
        self.name = name
        self.start = start
        self.rows_of = rows_of
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.losses = torch.zeros(steps, device=device)
        # Which parameter's gradient is not finite at each step; -1 is none.
        self.wrong = torch.full((steps,), -1, device=device)
        self.zero = torch.zeros(1, device=device)

    @torch.no_grad()
    def note(self, step, loss):
        """Keep the loss of a step, and which parameter's gradient is not finite, on the device."""
        gradients = [self.zero if p.grad is None else p.grad for p in self.parameters.values()]
        wrong = ~torch.stack(torch._foreach_norm(gradients)).isfinite()  # [parameters]
        self.losses[step] = loss.detach()
        self.wrong[step] = torch.where(wrong.any(), wrong.int().argmax(), -1)

    def checked(self, done, first=None):
        """Losses [n] from step `first` (default: where the loop began) up to `done`, on the CPU."""
        first = self.start if first is None else first
        losses = self.losses[first:done].cpu()
        wrong = self.wrong[first:done].cpu()
        bad = (~losses.isfinite() | (wrong >= 0)).nonzero()
        if len(bad):
            k = int(bad[0])
            fault = f"the loss is {losses[k]:g}"
            if losses[k].isfinite():
                fault = f"the gradient of {[*self.parameters][int(wrong[k])]} is not finite"
            self.refuse(first + k, fault)
        return losses

    def scores(self, step, scores):
        """The Fisher scores {layer: Score} of a step, or `Refused` with the layer whose information
        is not finite."""
        for layer, score in scores.items():
            information = score.current + score.candidate
            if not math.isfinite(information):
                self.refuse(step, f"the Fisher information of layer {layer} is {information:g}")
        return scores

    def refuse(self, step, fault):
        samples = self.rows_of(step).tolist()
        raise NotFinite(
            f"{self.name}: {fault} at step {step}, samples {samples}; lower --lr or look at these "
            "samples (what was saved before stands)"
        )


class Log:
    """log.jsonl: one JSON object a line. A checkpoint keeps `size`, and `cut` goes back to it."""

    def __init__(self, path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()

    @property
    def size(self):
        return self.path.stat().st_size

    def cut(self, size):
        if leader():
            with open(self.path, "r+b") as f:
                f.truncate(min(size, self.size))

    def write(self, **entry):
        if leader():
            with open(self.path, "a") as f:
                f.write(json.dumps(entry) + "\n")


@dataclass
class Progress:
    """One line: step, numbers, rate, time left. In place on a terminal, else every 10 seconds."""

    name: str
    steps: int
    start: int = 0

    def __post_init__(self):
        self.began = time.monotonic()
        self.shown = 0.0
        self.in_place = sys.stdout.isatty()

    def due(self, step):
        """Whether a line is to be shown after `step` steps: the loss is read from the device only
        then."""
        return step == self.steps or time.monotonic() - self.shown > (0.5 if self.in_place else 10)

    def show(self, step, text):
        self.shown = time.monotonic()
        rate = (step - self.start) / max(self.shown - self.began, 1e-9)
        left = (self.steps - step) / rate if rate else 0
        line = f"{self.name:16s} step {step}/{self.steps}  {text}"
        line += f"  {rate:.1f} steps/s  {left:.0f} s left"
        if self.in_place:
            line = "\r\033[K" + line
        more = self.in_place and step < self.steps  # the next line takes this one's place
        print(line, end="" if more else "\n", flush=True)


class Stopped(Exception):
    """Raised between two steps when a stop was asked for and all is saved; `.code` for the exit."""

    def __init__(self, code):
        self.code = code


class Stopper:
    """Context in which Ctrl-C and SIGTERM only set `.code`: the loop finishes its step, saves and
    raises `Stopped`. A second one stops at once."""

    code = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def after(self, done, every, save):
        """Call save(done) every so many steps, and when a stop was asked for; then `Stopped`."""
        if self.code or done % every == 0:
            save(done)
        if self.code:
            raise Stopped(self.code)

    def ask(self, number, frame):
        if not leader():  # rank 0 saves and ends; torchrun then ends the others
            return
        if self.code:
            raise KeyboardInterrupt
        self.code = 128 + number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
