"""What MoRA saves, measured: parameters, the file that a run keeps, time and memory of a training
step, for a head alone, MoRA, prompts, a plain LoRA branch and full fine-tuning, side by side.

    python tests/bench/efficiency.py    # ViLT-B/32 and the default size: 2 minutes on 2 idle cores
    python tests/bench/efficiency.py --size default --batch 64 --out runs/efficiency.json

Random weights and random inputs. Every method's memory is that of a process of its own. For the
time the methods take turns in one process: what else the machine does slows all of them, and ratios
over full fine-tuning are taken within a round. docs/speed.md shows the tables.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
if importlib.util.find_spec("tyro") is None:
    sys.modules["tyro"] = types.ModuleType("tyro")  # train_mora needs it for its command line alone

from minilora import checkpoint, data  # noqa: E402
from minilora.models import count, kept_weights, make_vit, without_head  # noqa: E402
from minilora.mora import attach, gates  # noqa: E402
from minilora.processes import pick_device  # noqa: E402
from minilora.task import batch_at  # noqa: E402
from train_mora import PRESETS, Config, diagnosis_loss  # noqa: E402

METHODS = ("head", "mora", "prompt", "lora", "full")
# Sizes of a `ViT`; what is not said is the default of train_mora.py.
SIZES = {
    # As `pretrained.read_vilt` gives them.
    "base32": PRESETS["large"] | dict(channels=3, positions=39, eps=1e-12, image_token=True),
    "default": {},
    "tiny": dict(image_size=16, width=8, depth=2, heads=2, buckets=64),
}
# Rounds, and steps in a row of a method in each: the clock of CPU time has ticks of milliseconds.
ROUNDS = {"base32": (10, 1), "default": (20, 20), "tiny": (2, 1)}


def config_of(size):
    """The configuration of a `ViT` of a size; the four classes are those of the phantoms."""
    return {"modalities": ("image", "note"), "classes": 4, "absent": "mask"} | SIZES[size]


def adapted(size, method):
    """A model with random weights and a method's adapter."""
    return attach(make_vit(config_of(size)), method, Config.rank)


class Training:
    """A method's model, optimizer and random data, and the training step of `train_mora.adapt`."""

    def __init__(self, size, method, batch, device):
        torch.manual_seed(0)
        self.method = method
        self.batch = batch
        self.device = device
        self.model = adapted(size, method).to(device)
        config = self.model.config
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        fused = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.01, fused=fused)
        N = 2 * batch
        side = config["image_size"]
        image = torch.randint(256, (N, config["channels"], side, side), dtype=torch.uint8)
        note = torch.randint(1, config["buckets"], (N, config["positions"]))
        self.inputs = {"image": image.to(device), "note": note.to(device)}
        patterns = torch.tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 1.0]])  # both, image, note
        self.present = patterns[torch.randint(3, (N,))].to(device)  # [N,M]
        self.labels = torch.randint(config["classes"], (N,)).to(device)  # [N]

    def step(self):
        """One training step."""
        rows = torch.randint(len(self.labels), (self.batch,)).to(self.device)
        batch = batch_at(self.inputs, rows)
        present = self.present[rows]  # [B,M]
        gate = gates(self.method, present)
        self.optimizer.zero_grad()
        logits = self.model(batch, present, gate)  # [B,C]
        loss = diagnosis_loss(logits, self.labels[rows])
        loss.backward()
        self.optimizer.step()

    def timed(self, steps):
        """[seconds on the wall, CPU seconds of all threads] of a step, the mean of some."""
        began = self.now()
        for _ in range(steps):
            self.step()
        return [(after - before) / steps for after, before in zip(self.now(), began)]

    def now(self):
        """The clocks, once the GPU is through."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter(), time.process_time()


def peak(device):
    """The most memory so far, bytes: of the process, or of the GPU's allocator."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


# ---- what a process of its own measures


def holdings(size, method, batch, device):
    """What a method holds: `models.count`; numbers and bytes of the file that a run keeps; bytes of
    memory at the peak of two steps, of which `whole` is the process, where that can be told."""
    # The first step of all loads some 100 MB of torch's code, whatever the model.
    Training("tiny", method, 1, device).step()
    before = peak(device)
    training = Training(size, method, batch, device)
    for _ in range(2):  # the optimizer has its state in the second
        training.step()
    after = peak(device)
    if device.type == "cuda":
        memory = {"memory": after}
    else:
        memory = {"memory": after - before, "whole": after}
    state = {name: p.detach().cpu() for name, p in kept_weights(training.model).items()}
    stored = sum(value.numel() for value in state.values())
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "adapter.pt"
        checkpoint.save(path, {"state": state})
        file = path.stat().st_size
    return count(training.model) | {"stored": stored, "file": file} | memory


def random_run(size, folder):
    """A run folder with random weights, as `export.py mora` takes one."""
    model = adapted(size, "mora")
    torch.nn.init.normal_(model.blocks[0].mora.up)
    config = config_of(size)
    base = without_head(make_vit(config))
    state = {name: p.detach() for name, p in kept_weights(model).items()}
    adapter = {"method": "mora", "seed": 0, "rank": Config.rank, "state": state, "scales": {}}
    content = {
        "format": 1,
        "kind": "mora",
        "config": model.config | {"absent": "mask"},
        "base": base,
        "base_hash": "",
        "adapter": adapter,
        "patterns": [[1, 1]],
        "class_names": ["a", "b", "c", "d"],
        "multilabel": False,
        "columns": {},
        "data": "",
        "synthetic": True,
        "synthetic_notes": False,
    }
    checkpoint.save(folder / "model.pt", content)


def export_costs(folder):
    """Bytes of an export's weights and graphs, and of memory at its peak and before."""
    from minilora.export_mora import export_mora

    before = peak(torch.device("cpu"))
    with contextlib.redirect_stdout(sys.stderr):
        out = export_mora(folder)
    return {
        "weights": (out / "weights.bin").stat().st_size,
        "graphs": sum(path.stat().st_size for path in out.glob("*.onnx")),
        "whole": peak(torch.device("cpu")),
        "before": before,
    }


def times(size, batch, device, rounds):
    """{method: [[seconds on the wall, CPU seconds] of a step in each round]}."""
    usual, steps = ROUNDS[size]
    rounds = rounds or usual
    trainings = {method: Training(size, method, batch, device) for method in METHODS}
    taken = {method: [] for method in METHODS}
    for k in range(rounds + 1):
        for method, training in trainings.items():
            pair = training.timed(steps)
            if k:  # the first warms up
                taken[method].append(pair)
        each = ", ".join(f"{method} {duration(t[-1][0])}" for method, t in taken.items() if t)
        note(f"{size}: round {k} of {rounds}: {each or 'warm-up'}")
    return taken


# ---- the table


def note(text):
    """A line of progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


def apart(part, size, options):
    """What one part finds, in a process of its own: a method's memory, or 'times'. Its ru_maxrss
    starts from what this process holds, in which nothing but imports may have run."""
    command = [sys.executable, __file__, "--part", part, "--size", size]
    for name in ("batch", "threads", "rounds", "device", "folder"):
        command += [f"--{name}", str(getattr(options, name))]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout.splitlines()[-1])


def measured(size, options):
    """{method: its figures} of a size; seconds and bytes."""
    figures = {}
    for method in METHODS:
        figures[method] = apart(method, size, options)
        note(f"{size}: memory of {method} {megabytes(figures[method]['memory'])}")
    taken = apart("times", size, options)
    for method, figure in figures.items():
        walls, cpus = zip(*taken[method])
        figure["seconds"] = statistics.median(walls)
        figure["cpu_seconds"] = statistics.median(cpus)
        pairs = zip(taken[method], taken["full"])
        over = [ours[0] / full[0] for ours, full in pairs]
        figure["seconds_over_full"] = statistics.median(over)
        figure["memory_over_full"] = figure["memory"] / max(1, figures["full"]["memory"])
        figure["rounds"] = taken[method]
    return figures


def exported(size, options):
    """A line on the export of a run of this size, and its figures in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        options.folder = Path(folder)
        apart("run", size, options)
        figures = apart("export", size, options)
    took = figures["whole"] - figures["before"]
    line = (
        f"export of four graphs: {megabytes(figures['weights'])} of weights and "
        f"{megabytes(figures['graphs'])} of graphs; peak memory {megabytes(figures['whole'])}, of "
        f"which imports {megabytes(figures['before'])}: the rest is "
        f"{took / figures['weights']:.2f} times the weights"
    )
    return line, figures


def cells(method, figure):
    """{column: text} of a method's row."""
    trainable = figure["trainable_params"]
    row = {
        "method": method,
        "adapter": f"{figure['adapter_params']:,}",
        "trainable": f"{trainable:,}",
        "share": f"{trainable / figure['total_params']:.2%}",
        "a run keeps": f"{figure['stored']:,} in {megabytes(figure['file'])}",
        "step": duration(figure["seconds"]),
        "step, over full": f"{figure['seconds_over_full']:.2f}",
        "CPU time": duration(figure["cpu_seconds"]),
        "memory": megabytes(figure["memory"]),
        "memory, over full": f"{figure['memory_over_full']:.2f}",
    }
    if "whole" in figure:
        row["whole process"] = megabytes(figure["whole"])
    return row


def table(figures):
    """The lines of the table of a size."""
    rows = [cells(method, figure) for method, figure in figures.items()]
    yield "| " + " | ".join(rows[0]) + " |"
    yield "|---" + "|---:" * (len(rows[0]) - 1) + "|"
    for row in rows:
        yield "| " + " | ".join(row.values()) + " |"


def megabytes(size):
    """Bytes as text: three digits, or whole MB."""
    size /= 1e6
    return f"{size:,.0f} MB" if size >= 100 else f"{size:.3g} MB"


def duration(seconds):
    """Seconds as text."""
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


def machine(device, threads):
    """What the figures depend on."""
    facts = {"torch": torch.__version__, "python": platform.python_version()}
    if device.type == "cuda":
        return facts | {"device": torch.cuda.get_device_name(device)}
    load = round(os.getloadavg()[0], 1)  # of the last minute
    return facts | {"cores": os.cpu_count(), "threads": threads, "load before": load}


def parsed(argv):
    """The options of the command line; `Refused` if one is out of its bounds."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--size", nargs="+", choices=SIZES, default=["base32", "default"])
    parser.add_argument("--batch", type=int, default=4, help="samples per step")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU")
    parser.add_argument("--rounds", type=int, default=0, help="0: 10 at base32, 20 at default")
    parser.add_argument("--device", default="cpu", help="auto, cpu, cuda or cuda:N")
    parser.add_argument("--out", type=Path, help="file (.json) for all figures")
    parts = (*METHODS, "times", "run", "export")
    parser.add_argument("--part", choices=parts, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    for name, low in (("batch", 1), ("threads", 1), ("rounds", 0)):
        value = getattr(options, name)
        if value < low:
            raise data.Refused(f"--{name} is {value}; must be at least {low}")
    options.device = pick_device(options.device)
    return options


def run_part(part, size, options):
    """What a process of its own finds of a part."""
    if part == "run":
        return random_run(size, options.folder)
    if part == "export":
        return export_costs(options.folder)
    if part != "times":
        return holdings(size, part, options.batch, options.device)
    return times(size, options.batch, options.device, options.rounds)


def main(argv=None):
    with data.one_line_errors():
        options = parsed(argv)
        torch.set_num_threads(options.threads)
        torch.backends.cudnn.allow_tf32 = False
        if options.part:
            print(json.dumps(run_part(options.part, options.size[0], options)))
            return
        facts = machine(options.device, options.threads)
        sizes = {}
        exports = {}
        for size in options.size:
            sizes[size] = measured(size, options)
            where = ", ".join(f"{name} {value}" for name, value in facts.items())
            print(f"\n{size}, batch {options.batch}, float32, {where}\n")
            line, exports[size] = exported(size, options)
            print(f"{line}\n", *table(sizes[size]), sep="\n", flush=True)
        if options.out:
            content = {"machine": facts, "batch": options.batch, "sizes": sizes}
            content["exports"] = exports
            checkpoint.write_json(options.out, content)


if __name__ == "__main__":
    main()
