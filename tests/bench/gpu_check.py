"""What only a GPU can show, in one command: the CUDA tests, step times and memory, Fisher scores and
growth, whether the host ever waits, the exports on CUDA, two processes.

    make gpu-check               # in the project's own environment
    PY=python3 make gpu-check    # in another, with torch, onnx, onnxruntime-gpu and pytest

Prints one table and writes runs/gpu-check.json. Exit code 1: something failed, and is named; 2: there
is no GPU to check, and nothing was written. A part is a function (device, sizes) that yields rows, so
that tests/test_gpu_check.py can rehearse it on the CPU. One GPU of an H100's class takes some minutes.
"""

import argparse
import contextlib
import dataclasses
import gc
import importlib.util
import io
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import traceback
import types
import warnings
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the package of this checkout, installed or not


def command_line(config, args=None, description=None):
    """What `tyro.cli` makes of a command line, by argparse: enough for the flags of small runs."""
    parser = argparse.ArgumentParser(description=description)
    for setting in dataclasses.fields(config):
        default = setting.default
        how = {"default": default}
        if isinstance(default, bool):
            how["action"] = argparse.BooleanOptionalAction
        elif isinstance(default, tuple):
            how["nargs"] = "*"
        else:
            how["type"] = Path if default is None else type(default)
        parser.add_argument(f"--{setting.name.replace('_', '-')}", **how)
    settings = vars(parser.parse_args(args)).items()
    return config(**{name: tuple(v) if isinstance(v, list) else v for name, v in settings})


if importlib.util.find_spec("tyro") is None:
    # The scripts import tyro for their command line alone, and a machine with a GPU may have no way
    # to install it. Here only, and only where it is missing, argparse reads the same settings.
    sys.modules["tyro"] = types.ModuleType("tyro")
    sys.modules["tyro"].cli = command_line

import onnxruntime  # noqa: E402

import train_mora  # noqa: E402
import train_selora  # noqa: E402
from minilora import checkpoint, diffusion, loop, selora, serve  # noqa: E402
from minilora.cli import with_preset  # noqa: E402
from minilora.export_mora import export_mora  # noqa: E402
from minilora.export_selora import export_selora  # noqa: E402
from minilora.models import make_vit  # noqa: E402
from minilora.mora import attach  # noqa: E402
from minilora.phantoms import phantoms  # noqa: E402
from minilora.ranks import Job  # noqa: E402
from minilora.task import draw_task, load_task, vit_sizes  # noqa: E402
from minilora.unet import Denoiser  # noqa: E402

MODES = {
    "float32": {},
    "amp": {"amp": True},
    "compile": {"compile": True},
    "amp and compile": {"amp": True, "compile": True},
}
WAITS = "called a synchronizing CUDA operation"  # torch's warning where the host waits
# So high a lambda that nothing grows: the ranks are the same in all steps.
PROBING = {"rule": "ratio", "every": 1, "lam": 1e8}
HERE = ROOT / "tests/bench/gpu_check.py"


def base_preset(script):
    """The configuration of a script at --preset base."""
    return with_preset(script.Config(preset="base"), script.PRESETS)


def large_preset():
    """That of train_mora.py at ViLT-B/32's sizes."""
    return with_preset(train_mora.Config(preset="large"), train_mora.PRESETS)


@dataclass(frozen=True)
class Sizes:
    """How much of everything. The number of steps is bounded, whatever a step takes."""

    mora: train_mora.Config = field(default_factory=partial(base_preset, train_mora))
    selora: train_selora.Config = field(default_factory=partial(base_preset, train_selora))
    vilt: train_mora.Config = field(default_factory=large_preset)
    vilt_methods: tuple = ("head", "mora", "prompt", "full")
    vilt_batches: tuple = (16, 64)
    studies: int = 256  # phantoms, or latents, to train on
    warm: int = 10  # steps before the first that counts
    block: int = 5  # steps between two readings of the clock
    blocks: int = 8
    waits: int = 40  # steps in which the host must not wait
    probes: int = 4  # probes of the run that grows
    requests: tuple = (1, 64)  # samples of a request to an exported folder
    repeats: int = 10
    cpu_repeats: int = 3
    # Flags of the runs that are exported.
    exported_mora: tuple = ("--preset", "base", "--phantoms", "300", "--pretrain-steps", "10",
                            "--steps", "10", "--methods", "head", "mora", "--lr", "0.01")
    exported_selora: tuple = ("--preset", "base", "--phantoms", "300", "--pretrain-steps", "10",
                              "--vae-steps", "10", "--steps", "10", "--every", "4", "--lr", "0.01", "full:0.001")
    tests: Path = ROOT / "tests"

    @property
    def steps(self):
        """Steps of a training that is timed."""
        return self.warm + self.block * self.blocks


@dataclass
class Row:
    """One line of the table; `passed` is None where nothing is claimed."""

    part: str
    what: str
    figures: dict  # {name: number or text}
    passed: bool | None = None

    def shown(self):
        """The figures in one line."""
        texts = []
        for name, value in self.figures.items():
            texts.append(f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}")
        return ", ".join(texts).replace("\n", " ")

    def __str__(self):
        verdict = {None: "", True: "pass", False: "FAILED"}[self.passed]
        return f"| {self.part} | {self.what} | {self.shown()} | {verdict} |"


def failed(part, what, error, output=""):
    """The row of something that ended in an error, with its reason in one line. A script that
    refuses has printed its reason."""
    reason = (str(error).strip().splitlines() or [""])[0]
    if isinstance(error, SystemExit):
        reason = (output.strip().splitlines() or [""])[-1]
    return Row(part, what, {"reason": f"{type(error).__name__}: {reason:.200}"}, False)


def attempt(part, what, measure):
    """measure() -> a row; where it fails, the row that says so: the measurements after it go on."""
    try:
        return measure()
    except Exception as error:
        return failed(part, what, error)


# ---- trainings with the scripts' own `adapt`


class Meter:
    """Stands where a run has its `Stopper`, which every step ends with. After `warm` steps it reads
    the clock at the borders of blocks of steps, and only there waits for the device. It saves
    nothing."""

    code = 0

    def __init__(self, device, sizes):
        self.device = device
        self.sizes = sizes
        self.block_ms = []  # milliseconds per step, of each block
        free(device)

    def after(self, done, every, save):
        counted = done - self.sizes.warm
        if counted < 0 or counted % self.sizes.block:
            return
        synchronize(self.device)
        now = time.perf_counter()
        if counted:
            self.block_ms.append((now - self.began) / self.sizes.block * 1e3)
        self.began = now

    def figures(self):
        """Milliseconds of a step, the median over blocks, and the highest memory in use."""
        figures = {"ms": float(np.median(self.block_ms))}
        if self.device.type == "cuda":
            figures["MiB"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20)
        return figures


class WaitCounter:
    """Stands there too, and counts the operators that make the host wait for the device in the
    steps after `warm`: torch warns of each, and `places` says where it was called."""

    code = 0

    def __init__(self, device, sizes):
        self.device = device
        self.first = sizes.warm
        self.last = sizes.warm + sizes.waits
        self.places = []
        self.counting = False

    def after(self, done, every, save):
        if done not in (self.first, self.last):
            return
        self.counting = done == self.first
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("warn" if self.counting else "default")

    def show(self, message, category, filename, line, file=None, text=None):
        """In the place of warnings.showwarning."""
        if not self.counting or WAITS not in str(message):
            return
        own = [f for f in traceback.extract_stack() if Path(f.filename).is_relative_to(ROOT)]
        own = [f for f in own if not Path(f.filename).is_relative_to(ROOT / "tests")]
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else f"{filename}:{line}"
        self.places.append(place)

    @contextlib.contextmanager
    def watching(self):
        with warnings.catch_warnings(), mock.patch.object(warnings, "showwarning", self.show):
            warnings.simplefilter("always")
            try:
                yield
            finally:
                if self.device.type == "cuda":
                    torch.cuda.set_sync_debug_mode("default")


def synchronize(device):
    """Wait for all that the device was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free(device):
    """Drop what earlier measurements left, and count the memory anew."""
    if device.type == "cuda":
        torch.compiler.reset()  # compiled graphs hold their models
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)


def without_progress():
    """No progress line, which comes by the clock and reads the loss from the device."""
    return mock.patch.object(loop.Progress, "due", lambda progress, step: False)


def mora_task(cfg, count, device, modalities=("image", "note"), channels=1):
    """(the tensors of a task, the configuration of its ViT) of phantoms, as a run makes them."""
    study = phantoms(count, 2, "target", cfg.image_size or 32).select(modalities)
    config = vit_sizes(cfg, study, study) | {"absent": cfg.absent, "channels": channels}
    config["classes"] = len(study.class_names)
    task = load_task(study, draw_task(cfg, study, 0), cfg.missing, config, device)
    return task, config


def adapt_mora(cfg, method, task, config, meter, dtype=torch.float32):
    """Adapt a ViT of random weights; returns it."""
    device = task["labels"].device
    torch.manual_seed(0)
    with device:  # weights are drawn where they are used: at ViLT's size the CPU takes long
        model = attach(make_vit(config), method, cfg.rank)
    model.to(dtype)
    with without_progress():
        train_mora.adapt(cfg, model, method, 0, 0.01, task, None, meter)
    return model


def selora_case(cfg, count, device, dtype=torch.float32):
    """(a denoiser of random weights, pairs to adapt it to). Its last layer, which is zero in a fresh
    one, is drawn too: behind zeros no layer has a gradient. All is drawn on the CPU, so that it is
    the same on every device."""
    config = train_selora.check(cfg)
    config |= {"buckets": cfg.buckets or 2048, "positions": cfg.positions or 16}
    torch.manual_seed(0)
    model = Denoiser(**config)
    torch.nn.init.normal_(model.unet.last.weight, std=0.1)
    z = torch.randn(count, config["latent"], config["size"], config["size"], dtype=dtype)
    ids = torch.randint(3, config["buckets"], (count, config["positions"]))  # [N,P]
    alphas = diffusion.alphas_cumprod(noisier=cfg.noisier, device=device)
    pairs = train_selora.Pairs(z.to(device), ids.to(device), alphas)
    return model.to(device, dtype), pairs


def adapt_selora(cfg, count, device, meter, dtype=torch.float32):
    """Adapt a denoiser of random weights by the rule of the configuration; returns it and the
    history of its ranks."""
    model, pairs = selora_case(cfg, count, device, dtype)
    job = Job(cfg.rule, cfg.rule, 0, cfg.rank)
    train = np.arange(count)
    train_selora.inject(cfg, pairs, model, job, 0, train, None)
    with without_progress():
        _, history = train_selora.adapt(cfg, pairs, model, job, 0, 0.01, train, None, meter)
    return model, history


# ---- the parts


def suite(device, sizes):
    """The tests of the suite that are about CUDA, which have it in their names."""
    files = sorted(sizes.tests.glob("test_*.py"))
    files = [p for p in files if re.search(r"def test_\w*cuda", p.read_text())]
    # As a plugin this file gives tyro's stand-in to the tests too.
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "gpu_check"]
    command += ["-k", "cuda"]
    paths = [str(HERE.parent), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([*command, *map(str, files)], cwd=ROOT, env=env, capture_output=True,
                          text=True, timeout=300)
    lines = (done.stdout + done.stderr).strip().splitlines()
    failures = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    figures = {"result": lines[-1].strip("= ")} | {"first": each[:200] for each in failures[:1]}
    yield Row("CUDA tests", "pytest -k cuda", figures, done.returncode == 0)


def step_times(device, sizes):
    """Time and memory of both scripts' adaptation step in every mode, and of a step with a probe."""
    task, config = mora_task(sizes.mora, sizes.studies, device)

    def mora_step(flags, meter):
        cfg = replace(sizes.mora, steps=sizes.steps, **flags)
        adapt_mora(cfg, "mora", task, config, meter)

    def selora_step(flags, meter):
        # The rule `fixed` takes the same steps, without the probes, which have a row of their own.
        cfg = replace(sizes.selora, steps=sizes.steps, **{"rule": "fixed"} | flags)
        adapt_selora(cfg, sizes.studies, device, meter)

    def measure(what, train, flags, eager):
        meter = Meter(device, sizes)
        train(flags, meter)
        figures = meter.figures()
        if not flags:
            eager.append(figures["ms"])
        if eager:
            figures["over float32"] = figures["ms"] / eager[0]
        return Row("step", what, figures)

    probing = {"probe in every step": PROBING}
    for name, train, modes in (("MoRA", mora_step, MODES), ("SeLoRA", selora_step, MODES | probing)):
        eager = []  # the milliseconds in float32, once they are known
        for mode, flags in modes.items():
            what = f"{name}, {mode}"
            yield attempt("step", what, partial(measure, what, train, flags, eager))


def fisher(device, sizes):
    """The probe's scores against those on the CPU, what growth does to the output, and a run that
    grows."""
    cfg = replace(sizes.selora, rank=2)
    model, pairs = selora_case(cfg, cfg.batch, torch.device("cpu"))
    selora.inject(model, None, cfg.rank, cfg.capacity)
    for layer in selora.adapters(model).values():
        layer.B.data[: cfg.rank].normal_(std=0.05)
    rows, t, noise, ids = pairs.batch_at(0, 0, np.arange(cfg.batch), cfg.batch)
    batch = [pairs.z[rows], ids, t, noise, pairs.alphas]

    def scores(batch):
        with selora.FisherProbe(model) as probe:
            diffusion.denoising_loss(model, *batch).backward()
        model.zero_grad()
        return probe.scores()

    wanted = scores(batch)
    model.to(device)
    batch = [x.to(device) for x in batch]
    found = scores(batch)
    names = selora.Score._fields
    for i, name in enumerate(names):
        error = max(abs(found[k][i] - wanted[k][i]) / abs(wanted[k][i] or 1) for k in wanted)
        figures = {"largest relative difference": error, "layers": len(wanted)}
        yield Row("Fisher", f"{name}, against the CPU", figures, error <= 1e-4)

    noisy, _ = diffusion.diffuse(batch[0], batch[3], batch[4][batch[2]])
    with torch.no_grad():
        before = model(noisy, batch[2], batch[1])
        grown = selora.grow(model, found, "cheapest", budget=10**12)
        change = float((model(noisy, batch[2], batch[1]) - before).abs().max())
    figures = {"layers grown": len(grown), "largest change of the output": change}
    yield Row("growth", "every layer by a rank", figures, len(grown) == len(found) and change <= 1e-6)

    steps = 10 * (sizes.probes + 1)
    cfg = replace(sizes.selora, rule="ratio", every=10, steps=steps)
    _, history = adapt_selora(cfg, sizes.studies, device, Meter(device, sizes))
    ranks = [sum(each.values()) for _, each in history]
    figures = {"probes": sizes.probes, "ranks before": ranks[0], "after": ranks[-1]}
    yield Row("growth", "a run with rule ratio", figures, ranks[-1] > ranks[0])


def waits(device, sizes):
    """How often the host waits for the device in steps without a log or progress line: never."""
    steps = sizes.warm + sizes.waits + 1

    def mora(flags, counter):
        cfg = replace(sizes.mora, steps=steps, **flags)
        adapt_mora(cfg, "mora", *mora_task(cfg, sizes.studies, device), counter)

    def selora_step(flags, counter):
        cfg = replace(sizes.selora, steps=steps, **{"rule": "fixed"} | flags)
        adapt_selora(cfg, sizes.studies, device, counter)

    def count(what, train, flags, claimed):
        counter = WaitCounter(device, sizes)
        with counter.watching():
            train(flags, counter)
        figures = {"steps": sizes.waits, "waits": len(counter.places)}
        figures |= {"first": place for place in counter.places[:1]}
        return Row("host waits", what, figures, not counter.places if claimed else None)

    for what, train, flags, claimed in (
        ("MoRA", mora, {}, True),
        ("MoRA, amp", mora, {"amp": True}, True),
        ("MoRA, absent dummy", mora, {"absent": "dummy"}, True),
        ("SeLoRA", selora_step, {}, True),
        ("SeLoRA, amp", selora_step, {"amp": True}, True),
        # Scores are read to decide who grows.
        ("SeLoRA, a probe in every step", selora_step, PROBING, False),
    ):
        yield attempt("host waits", what, partial(count, what, train, flags, claimed))


def vilt(device, sizes):
    """Time and memory of a step at ViLT-B/32's size, random weights."""
    task, config = mora_task(sizes.vilt, 64, device, channels=3)

    def measure(what, method, settings):
        meter = Meter(device, sizes)
        cfg = replace(sizes.vilt, steps=sizes.steps, **settings)
        adapt_mora(cfg, method, task, config, meter)
        return Row("ViLT-B/32", what, meter.figures())

    for batch in sizes.vilt_batches:
        for mode in ("float32", "amp"):
            for method in sizes.vilt_methods:
                what = f"{method}, batch {batch}, {mode}"
                settings = {"batch": batch} | MODES[mode]
                yield attempt("ViLT-B/32", what, partial(measure, what, method, settings))


def mora_export(device, sizes):
    """A small run of train_mora.py on the device, exported: parity and the time of a request."""

    def requests(folder, on):
        served = serve.Diagnoser(folder, on)
        size = served.manifest["image_size"]
        image = np.random.default_rng(0).integers(1, 255, (size, size), np.uint8)
        return served, lambda n: served.predict(images=[image] * n, notes=["fever, recent cold"] * n)

    train_mora.main(["--seeds", "1", "--device", device.type, "--out", "mora", *sizes.exported_mora])
    yield from served_rows("MoRA", export_mora("mora"), requests, device, sizes)


def selora_export(device, sizes):
    """The same of train_selora.py."""

    def requests(folder, on):
        served = serve.Synthesizer(folder, on)
        return served, lambda n: served.sample(["coin lesion sinistral, febrile"] * n)

    flags = ["--seeds", "1", "--device", device.type, "--out", "selora", *sizes.exported_selora]
    train_selora.main(flags)
    yield from served_rows("SeLoRA", export_selora("selora"), requests, device, sizes)


def served_rows(name, folder, requests, device, sizes):
    """Parity of an exported folder with torch on the device's provider, and the time of a request
    beside the CPU provider's. requests(folder, device) -> (what serves, a function of the number of
    samples)."""
    provider = "CUDAExecutionProvider" if device.type == "cuda" else "CPUExecutionProvider"
    served, ours = requests(folder, device.type)
    _, cpu = requests(folder, "cpu")
    error = serve.check(folder, device.type)
    limit = serve.tolerance(served.manifest)
    figures = {"largest difference": error, "limit": limit, "provider": served.provider}
    right = error <= limit and served.provider == provider
    yield Row("export", f"{name}, parity with torch", figures, right)
    for n in sizes.requests:
        figures = {"ms": milliseconds(partial(ours, n), sizes.repeats)}
        figures["ms on the CPU provider"] = milliseconds(partial(cpu, n), sizes.cpu_repeats)
        yield Row("export", f"{name}, request of {n}", figures)


def milliseconds(call, repeats):
    """Median milliseconds of a call, after one to warm up."""
    call()
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        call()
        times.append((time.perf_counter() - began) * 1e3)
    return float(np.median(times))


def processes(device, sizes):
    """Two processes on the one device, each with half of every batch, end where one with the whole
    batch does. NCCL refuses two on one GPU, and then gloo carries the sums."""
    one = trained(device)
    backends = ("nccl", "gloo") if device.type == "cuda" else ("gloo",)
    for backend in backends:
        folder = Path(f"processes-{backend}").resolve()
        reason = two_processes(device, backend, folder)
        if not reason or backend == "gloo":
            break
        yield Row("two processes", backend, {"refused": reason})
    if reason:
        raise RuntimeError(f"{backend}: {reason}")
    states = [torch.load(folder / f"{rank}.pt", map_location="cpu") for rank in range(2)]
    error = max(float((state[k] - one[k]).abs().max()) for state in states for k in one)
    figures = {"largest difference from one process": error, "weights": len(one)}
    yield Row("two processes", backend, figures, error <= 1e-5)


def trained(device):
    """{name: value} of both adaptations after some steps with small sizes, on the CPU.

    In float64: Adam makes a step out of a gradient that is nothing but rounding, and in float32
    that step would be larger than the limit."""
    size = dict(batch=8, width=8, heads=2, buckets=64)
    cfg = train_mora.Config(steps=6, depth=2, **size)
    task, config = mora_task(cfg, 60, device, ("note",))
    stop = loop.Stopper()  # after so few steps it has nothing to save
    model = adapt_mora(cfg, "mora", task, config, stop, torch.float64)
    cfg = train_selora.Config(steps=6, every=2, lam=1.2, image_size=16, text_width=8, **size)
    denoiser, _ = adapt_selora(cfg, 40, device, stop, torch.float64)
    both = torch.nn.ModuleDict({"mora": model, "selora": denoiser})
    return {name: value.cpu() for name, value in both.state_dict().items()}


def two_processes(device, backend, folder, seconds=120):
    """Run `worker` in two processes that write into a new folder; returns why that failed, in one
    line, or ''."""
    folder.mkdir()
    workers = []
    for rank in range(2):
        env = os.environ | {"RANK": str(rank), "WORLD_SIZE": "2"}
        command = [sys.executable, str(HERE), "worker", str(device), backend, str(folder)]
        with open(folder / f"{rank}.txt", "w") as output:
            workers.append(subprocess.Popen(command, env=env, stdout=output, stderr=output))
    end = time.monotonic() + seconds
    codes = [None, None]
    # Where one fails, the other would wait for it for ever.
    while None in codes and not any(codes) and time.monotonic() < end:
        time.sleep(0.05)
        codes = [worker.poll() for worker in workers]
    for worker in workers:
        worker.kill()
        worker.wait()
    if codes == [0, 0]:
        return ""
    bad = next((rank for rank in range(2) if codes[rank]), None)
    if bad is None:
        return f"not done after {seconds} seconds"
    lines = (folder / f"{bad}.txt").read_text().strip().splitlines() or [""]
    errors = [line for line in lines if re.match(r"\w*(\.\w+)*Error\b", line)]
    return f"exit code {codes[bad]}: {(errors or lines)[-1]:.200}"


def worker(device, backend, folder):
    """One of the two processes. They meet in a file, so that no port and no host name is needed."""
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
    rank = int(os.environ["RANK"])
    dist.init_process_group(backend, f"file://{folder}/meeting", world_size=2, rank=rank)
    exact_products()
    torch.save(trained(device), f"{folder}/{rank}.pt")
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads abort now and then where a process ends while they do


PARTS = {
    "CUDA tests": suite,
    "step times": step_times,
    "Fisher and growth": fisher,
    "host waits": waits,
    "ViLT-B/32": vilt,
    "MoRA's export": mora_export,
    "SeLoRA's export": selora_export,
    "two processes": processes,
}


# ---- the whole


def exact_products():
    """float32 as float32: without TF32, as the training scripts and the exported graphs."""
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")


def run_part(name, part, device, sizes):
    """The rows of a part, with one line before and one after it. What it prints is left out, and an
    error that ends it is a row."""
    print(f"{name} ...", flush=True)
    began = time.monotonic()
    rows = []
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            for row in part(device, sizes):
                rows.append(row)
    except (Exception, SystemExit) as error:
        rows.append(failed(name, "the part", error, output.getvalue()))
    wrong = [row for row in rows if row.passed is False]
    verdict = f"{len(wrong)} FAILED, first {wrong[0].what}: {wrong[0].shown()}" if wrong else "done"
    print(f"{name}: {verdict}, {time.monotonic() - began:.0f} s", flush=True)
    return rows


def why_no_gpu():
    """Why no CUDA device can be used, in one line, or '' if one can."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch says the same in more lines
        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no CUDA device"
        try:
            (torch.ones(2, device="cuda") + 1).sum().item()
        except RuntimeError as error:
            return f"the CUDA device cannot be used ({str(error).splitlines()[0]})"
    return ""


def machine():
    """What the figures were measured with."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "GiB": round(properties.total_memory / 2**30),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "onnxruntime": onnxruntime.__version__,
        "cpus": os.cpu_count(),
    }


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=__doc__, formatter_class=how).parse_args(argv)
    if reason := why_no_gpu():
        print(f"error: gpu-check needs an NVIDIA GPU: {reason}", file=sys.stderr)
        raise SystemExit(2)
    exact_products()
    device = torch.device("cuda", 0)
    about = machine()
    print(", ".join(f"{key} {value}" for key, value in about.items()), flush=True)
    path = Path("runs/gpu-check.json").resolve()
    rows = []
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        for name, part in PARTS.items():
            rows += run_part(name, part, device, Sizes())
    print("\n| part | what | figures | claim |\n|---|---|---|---|", *rows, sep="\n")
    checkpoint.write_json(path, about | {"rows": [asdict(row) for row in rows]})
    print(path)
    raise SystemExit(int(any(row.passed is False for row in rows)))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(*sys.argv[2:])
    else:
        main()
