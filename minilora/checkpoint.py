"""Run folders and what every training loop shares: atomic save, checked load, log, progress, stopping without loss,
several processes.

Plumbing that both training scripts share; skip it when you read for the method.
"""

import io
import json
import math
import os
import platform
import shutil
import signal
import sys
import time
import zipfile
from contextlib import contextmanager, nullcontext, redirect_stdout
from dataclasses import asdict, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from minilora.data import Refused, one_line_errors, sha256, write_atomic


def _canonical(value):
    """A copy without shared objects: pickle writes two equal strings or dicts otherwise if they are one object."""
    if isinstance(value, dict):
        return {_canonical(k): _canonical(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_canonical(v) for v in value)
    if isinstance(value, torch.Tensor):
        return value.detach().cpu().clone()
    return sys.intern(value) if type(value) is str else value


def save(path, content):
    """Write tensors and plain values atomically. Equal content gives equal bytes (torch.save to a path would store the
    file's name).
    """
    if leader():
        buffer = io.BytesIO()
        torch.save(_canonical(content), buffer)
        write_atomic(path, buffer.getvalue())


def load(path, kind=None, of=None):
    """Read what `save` wrote, to the CPU. `Refused` if it is missing, cut, has a flipped bit, holds code, is not of
    `kind`, or its own 'of' says that it belongs elsewhere: files that changed places.
    """
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    try:
        with zipfile.ZipFile(path) as z:
            parts = z.infolist()
            if any(f.compress_type for f in parts) or sum(f.file_size for f in parts) > path.stat().st_size:
                raise Refused(f"{path}: not a checkpoint: its parts are compressed and may be larger than they look")
            if any(f.external_attr for f in parts):  # torch takes what is marked a folder for zeros, and says nothing
                raise Refused(f"{path}: damaged in its table of contents")
            damaged = z.testzip()  # torch.load checks no checksum
        if damaged:
            raise Refused(f"{path}: damaged at {damaged}")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Refused:
        raise
    except Exception as error:  # zip and pickle errors come as many types, all of which mean the same here
        reason = (str(error).splitlines() or [""])[0].split(". This file can")[0]
        raise Refused(f"{path}: not a readable checkpoint ({type(error).__name__}: {reason})") from None
    if kind and (not isinstance(content, dict) or content.get("kind") != kind or content.get("format") != 1):
        found = content.get("kind") if isinstance(content, dict) else type(content).__name__
        raise Refused(f"{path}: holds '{found}', not a '{kind}' of format 1")
    if of and content.get("of") != of:
        raise Refused(f"{path}: holds '{content.get('of')}', not '{of}'; it was changed, or made by another version")
    return content


def write_json(path, value):
    """Write a value as JSON, atomically; NaN becomes null, since JSON has no NaN."""

    def clean(v):
        if isinstance(v, dict):
            return {k: clean(x) for k, x in v.items()}
        if isinstance(v, (list, tuple)):
            return [clean(x) for x in v]
        return None if isinstance(v, float) and not math.isfinite(v) else v

    if leader():
        write_atomic(path, json.dumps(clean(value), indent=1, allow_nan=False) + "\n")


def read_json(path, default=None):
    """The value of a JSON file, or `default` where there is none; `Refused` if it cannot be read."""
    if not Path(path).exists():
        return default
    try:
        return json.loads(Path(path).read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path}: not readable as JSON ({error})") from None


def open_run(cfg):
    """Make the run folder `cfg.out`, or go on in it; returns what config.json holds, the run's identity.

    `Refused` if the folder holds another configuration, or the same one and `cfg.resume` is off."""
    identity = {k: v for k, v in asdict(cfg).items() if k not in ("out", "resume", "dry_run", "device", "tensorboard")}
    for key in ("data", "source"):  # a run belongs to its files' content, not to their place
        path = identity[key]
        identity[key] = {"name": path.name, "sha256": sha256(path)} if path else None
    for key, file in (("judge", "model.pt"), ("replay", "metrics.json"), ("augment", "model.pt")):  # and to other runs'
        run = str(identity.get(key) or "").rpartition(":")[0] if key == "augment" else identity.get(key)
        if run:
            identity[key] = {"run": identity[key], "sha256": sha256(Path(run) / file)}
    identity = json.loads(json.dumps(identity, default=str))
    path = cfg.out / "config.json"
    if leader():
        hold(cfg.out)
    there = read_json(path)
    if there is not None and not isinstance(there, dict):
        raise Refused(f"{path}: not the configuration of a run")
    wait()  # before rank 0 writes what the others would find
    if there is not None and there != identity:
        keys = [k for k in {**identity, **there} if identity.get(k) != there.get(k)]
        differs = ", ".join(f"{k} {there.get(k)} there, {identity.get(k)} here" for k in keys[:3])
        raise Refused(f"{cfg.out} holds a run of another configuration ({differs}, says {path}); choose another --out")
    if there is not None and not cfg.resume:
        raise Refused(f"{cfg.out} holds this run already; go on with --resume, or choose another --out")
    if there is None:
        write_json(path, identity)
    return identity


HELD = []  # the lock of the run folder in use; the system drops it however the process ends


def hold(folder):
    """Lock a run folder until `guarded` is through; `Refused` with who holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = open(folder / ".lock", "a+")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.seek(0)
        with lock:
            raise Refused(f"{folder}: in use by {lock.read().strip() or 'another process'}; wait until it ends, or "
                          "choose another --out") from None
    except OSError:  # a file system without locks
        pass
    lock.truncate(0)
    lock.write(f"process {os.getpid()} on {platform.node()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    lock.flush()
    HELD.append(lock)
    for left in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:  # by a process that was killed while it wrote
        if left.is_file():
            left.unlink(missing_ok=True)


def with_preset(cfg, presets):
    """The configuration with its preset's sizes where the command line left the default."""
    if cfg.preset not in presets:
        raise Refused(f"--preset '{cfg.preset}' is not known; use {', '.join(presets)}")
    default = type(cfg)()
    for name, value in vars(cfg).items():
        if type(value) is int and abs(value) > 10**8:
            raise Refused(f"--{name.replace('_', '-')} is {value}; the limit is {10**8}")
    return replace(cfg, **{k: v for k, v in presets[cfg.preset].items() if getattr(cfg, k) == getattr(default, k)})


def guarded(run, cfg, presets):
    """Call run(cfg, stop): bad input ends in one line and code 2, an interrupt in a saved state and how to go on."""
    with one_line_errors():
        stop = Stopper()
        try:
            cfg = with_preset(cfg, presets)
            if cfg.tensorboard and not find_spec("tensorboard"):
                raise Refused("--tensorboard needs a package that is not here: pip install tensorboard")
            with stop, processes(pick_device(cfg.device)):
                own_part([], cfg.batch)  # refused now rather than after the base is pretrained
                run(cfg, stop)
        except Stopped as stopped:
            print(f"\nstopped; everything is saved. Go on with the same command and --resume (run folder {cfg.out})")
            raise SystemExit(stopped.code) from None
        except KeyboardInterrupt:
            print(f"\nstopped at once; the last save stands. Go on with --resume (run folder {cfg.out})")
            raise SystemExit(stop.code or 130) from None
        except (MemoryError, RuntimeError) as error:  # torch has no type of its own for it on the CPU
            if "memory" not in str(error).lower():
                raise
            raise Refused(f"out of memory ({str(error).splitlines()[0]}); use a smaller --batch or model") from None
        finally:
            while HELD:
                with HELD.pop() as lock:
                    lock.truncate(0)


def pick_device(name):
    """'auto', 'cpu', 'cuda' or 'cuda:N' -> torch.device; `Refused` where it is not there."""
    if "LOCAL_RANK" in os.environ and torch.cuda.is_available() and name.startswith(("auto", "cuda")):
        if ":" in name:
            raise Refused(f"device '{name}': torchrun gives each process its own GPU; use auto, cuda or cpu")
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise Refused(f"device '{name}' is not known; use auto, cpu or cuda")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise Refused(f"device '{name}': torch {torch.__version__} sees {torch.cuda.device_count()} CUDA devices")
    return device


class Log:
    """log.jsonl: one JSON object a line. `size` goes into a checkpoint; `cut` takes the file back to it on resume.

    tensorboard: a folder that shows the same numbers as TensorBoard events, made anew from the file at the first write.
    """

    def __init__(self, path, tensorboard=None):
        self.path, self.tensorboard, self.events = Path(path), tensorboard, None
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
            if self.tensorboard:
                self.show(entry)

    def show(self, entry):
        entries = [entry]
        if self.events is None:
            from torch.utils.tensorboard import SummaryWriter

            shutil.rmtree(self.tensorboard, ignore_errors=True)  # it only repeats what log.jsonl says
            self.events = SummaryWriter(self.tensorboard)
            entries = [json.loads(line) for line in self.path.read_text().splitlines()]
        for e in entries:
            for key in {*e} - {"method", "rule", "seed", "step"}:
                self.events.add_scalar(f"{key}/{e['method']}-s{e['seed']}", e[key], e["step"])
        self.events.flush()


class Progress:
    """One line: step of steps, what happens, rate and time left. In place on a terminal, else every 10 seconds."""

    def __init__(self, name, steps, start=0):
        self.name, self.steps, self.start, self.began, self.shown = name, steps, start, time.monotonic(), 0.0

    def due(self, step):
        """Whether a line is to be shown after `step` steps: the script reads the loss only then."""
        return step == self.steps or time.monotonic() - self.shown > (0.5 if sys.stdout.isatty() else 10)

    def show(self, step, text):
        self.shown = time.monotonic()
        rate = (step - self.start) / max(self.shown - self.began, 1e-9)
        left = (self.steps - step) / rate if rate else 0
        line = f"{self.name:16s} step {step}/{self.steps}  {text}  {rate:.1f} steps/s  {left:.0f} s left"
        in_place = sys.stdout.isatty()
        print(("\r\033[K" if in_place else "") + line, end="" if in_place and step < self.steps else "\n", flush=True)


class Stopped(Exception):
    """Raised between two steps, after the state was saved, when a stop was asked for; `.code` is the exit code."""

    def __init__(self, code):
        self.code = code


class Stopper:
    """Context in which Ctrl-C and SIGTERM only set `.code`: the loop finishes its step, saves and raises `Stopped`. A
    second one stops at once.
    """

    code = 0

    def __enter__(self):
        self.before = {s: signal.signal(s, self.ask) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def after(self, done, every, keep):
        """Call keep(done) every so many steps and when a stop was asked for; then raise `Stopped`."""
        if self.code or done % every == 0:
            keep(done)
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


# ---- several processes: torchrun sets RANK, LOCAL_RANK and WORLD_SIZE; without it there is one, and all this is idle


def leader():
    """Whether this process writes, logs and saves: rank 0, or the only one."""
    return int(os.environ.get("RANK", 0)) == 0


@contextmanager
def processes(device):
    """Join torchrun's processes, by NCCL on GPUs, by gloo on CPUs. Those that are not rank 0 print nothing."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # the others wait for as long as rank 0 pretrains
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(days=1))
    try:
        with open(os.devnull, "w") as nowhere, nullcontext() if leader() else redirect_stdout(nowhere):
            yield
    finally:
        dist.destroy_process_group()


def world():
    """(rank, number of processes)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def wait():
    """Until every process is here."""
    if dist.is_initialized():
        dist.barrier()


def first(make):
    """make() in rank 0, then, when its file is there, in the others: for a pretraining that is cached."""
    made = make() if leader() else None
    wait()
    return make() if made is None else made


def finished(out, path, content, seconds):
    """Save what a job of the run folder `out` came to, with its time, and drop its resume state; returns the content
    as rank 0 found it, which decides for all.
    """
    write_json(out / "timings.json", read_json(out / "timings.json", {}) | seconds)
    wait()  # all have found that the file is not there
    save(path, content)
    if leader():
        (out / "last.pt").unlink(missing_ok=True)
    wait()
    return content if leader() else load(path)


def own_part(rows, batch):
    """This process's part of a batch, which --batch counts over all processes: every n-th, from its rank on."""
    rank, n = world()
    if batch % n:
        raise Refused(f"--batch {batch} cannot be divided among {n} processes")
    return rows[rank::n]


@torch.no_grad()
def average(tensors):
    """Replace each tensor by its mean over the processes, in one all-reduce; returns the bytes that went through it."""
    if not dist.is_initialized():
        return 0
    flat = torch.cat([t.flatten() for t in tensors])
    dist.all_reduce(flat)
    for t, mean in zip(tensors, (flat / dist.get_world_size()).split([t.numel() for t in tensors])):
        t.copy_(mean.view_as(t))
    return flat.numel() * flat.element_size()


# ---- small parts of a loop


def warm_cosine(steps):
    """Learning-rate factor by step: up over the first tenth, then down a cosine to 0."""
    warm = max(1, steps // 10)
    through = lambda step: min(1.0, max(0, step - warm) / max(1, steps - warm))
    return lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * through(step)))


def rows_at(seed, step, n, batch):
    """The batch of a step, [batch] positions in n: drawn from (seed, step) alone."""
    return np.random.default_rng((seed, step)).integers(0, n, batch)


def on(device, arrays):
    """{name: array} -> {name: tensor on the device}."""
    return {k: torch.from_numpy(np.ascontiguousarray(v)).to(device) for k, v in arrays.items()}


class Watch:
    """Losses and gradients of a loop, looked at on the device: no step waits until somebody asks.

    `note(step, loss)` after each backward; `checked(done)` then gives the losses up to there, or `Refused` with the
    first step whose loss or gradient is not finite, the parameter, and the samples of that step."""

    def __init__(self, what, steps, start, model, rows_of, device):
        self.what, self.start, self.rows_of = what, start, rows_of
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.losses = torch.zeros(steps, device=device)
        self.wrong = torch.full((steps,), -1, device=device)  # which parameter's gradient, -1 = none
        self.zero = torch.zeros(1, device=device)

    @torch.no_grad()
    def note(self, step, loss):
        gradients = [self.zero if p.grad is None else p.grad for p in self.parameters.values()]
        wrong = ~torch.stack(torch._foreach_norm(gradients)).isfinite()  # [parameters]
        self.losses[step] = loss.detach()
        self.wrong[step] = torch.where(wrong.any(), wrong.int().argmax(), -1)

    def checked(self, done, first=None):
        """Losses [n] of the steps from `first` (default: where the loop began) up to `done`, on the CPU."""
        first = self.start if first is None else first
        losses, wrong = self.losses[first:done].cpu(), self.wrong[first:done].cpu()
        bad = (~losses.isfinite() | (wrong >= 0)).nonzero()
        if len(bad):
            k = int(bad[0])
            name = [*self.parameters][int(wrong[k])]
            self.refuse(first + k, f"the gradient of {name} is not finite" if losses[k].isfinite()
                        else f"the loss is {losses[k]:g}")
        return losses

    def scores(self, step, scores):
        """The Fisher scores {layer: Score} of a step, or `Refused` with the layer whose information is not finite."""
        for layer, score in scores.items():
            if not math.isfinite(score.current + score.candidate):
                self.refuse(step, f"the Fisher information of layer {layer} is {score.current + score.candidate:g}")
        return scores

    def refuse(self, step, fault):
        raise Refused(f"{self.what}: {fault} at step {step}, samples {self.rows_of(step).tolist()}; lower --lr or look "
                      "at these samples (what was saved before stands)")


def resume_state(model, optimizer, schedule, step):
    """What a loop needs to go on after `step` steps: only what trains, its optimizer, its schedule."""
    state = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    return {"format": 1, "kind": "resume", "step": step, "state": state, "optimizer": optimizer.state_dict(),
            "schedule": schedule.state_dict()}


def restore(saved, model, optimizer, schedule):
    """Undo `resume_state`; returns the step to go on with."""
    model.load_state_dict(saved["state"], strict=False)
    optimizer.load_state_dict(saved["optimizer"])
    schedule.load_state_dict(saved["schedule"])
    return saved["step"]
