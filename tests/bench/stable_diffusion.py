"""What SeLoRA costs under a UNet of Stable Diffusion 1.5's size: the table of docs/stable_diffusion.md.

    OMP_NUM_THREADS=1 python tests/bench/stable_diffusion.py    # some 20 minutes, 8 GB of memory
    python tests/bench/stable_diffusion.py --device cuda

Random weights in the published layout (860M parameters, float32), batch 1. Steps of each kind take
turns in one process; seconds are CPU time, which other programs disturb least with one thread, and
time on the wall on a GPU. Peak memory is that of a process of its own, or of the GPU's allocator.
Needs the `bench` extra.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
import tyro

sys.path.insert(0, str(Path(__file__).parents[2]))
from minilora import interchange, selora

SIZES = dict(
    sample_size=64,
    block_out_channels=(320, 640, 1280, 1280),
    layers_per_block=2,
    cross_attention_dim=768,
    attention_head_dim=8,
)
TARGETS = r".*\.(to_[qkv]|to_out\.0|net\.0\.proj|net\.2|time_emb_proj|linear_[12])"  # every Linear
STEPS = {"plain": None, "sampled": False, "expected": True}  # what FisherProbe gets as `expected`


def note(text):
    """A line of progress, beside the table."""
    print(text, file=sys.stderr, flush=True)


class Bench:
    """A UNet with adapters, an optimizer and a batch."""

    def __init__(self, device, latent):
        from diffusers import UNet2DConditionModel

        torch.manual_seed(0)
        self.device = torch.device(device)
        self.unet = UNet2DConditionModel(**SIZES).to(self.device)
        self.noisy = torch.randn(1, 4, latent, latent, device=self.device)
        self.noise = torch.randn(1, 4, latent, latent, device=self.device)
        self.t = torch.tensor([500], device=self.device)
        self.words = torch.randn(1, 77, 768, device=self.device)

    def inject(self):
        """Put adapters of rank 1 on every Linear; returns seconds."""
        start = self.now()
        selora.inject(self.unet, TARGETS)
        seconds = self.now() - start
        groups = selora.adapter_groups(self.unet, 0.01)
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4)
        return seconds

    def predict(self):
        """The UNet's output, [1,4,s,s]."""
        return self.unet(self.noisy, self.t, self.words).sample

    def step(self, expected):
        """Seconds of one training step, with a probe unless `expected` is None."""
        start = self.now()
        self.optimizer.zero_grad()
        probing = expected is not None
        with selora.FisherProbe(self.unet, expected) if probing else nullcontext() as probe:
            loss = F.mse_loss(self.predict(), self.noise)
            loss.backward()
        if probing:
            probe.scores()
        self.optimizer.step()
        return self.now() - start

    def now(self):
        """Seconds of CPU time, or on the wall once the GPU is through."""
        if self.device.type != "cuda":
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak(self):
        """The most memory so far, bytes: of the process, or of the GPU's allocator."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated()
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def times(bench, rounds):
    """Seconds to inject, the change of the output by it, and seconds of each kind of step."""
    with torch.no_grad():
        before = bench.predict()
        inject = bench.inject()
        change = (bench.predict() - before).abs().max().item()
    seconds = {kind: [] for kind in STEPS}
    for k in range(rounds + 1):
        for kind, expected in STEPS.items():
            taken = bench.step(expected)
            note(f"  round {k} of {rounds}, {kind}: {taken:.2f} s")
            if k:  # the first warms up
                seconds[kind].append(taken)
    layers = selora.adapters(bench.unet)
    waiting = sum(layer.capacity * selora.adapter_cost(layer) for layer in layers.values())
    return dict(
        inject=inject,
        change=change,
        layers=len(layers),
        parameters=selora.adapter_parameters(bench.unet),
        whole=sum(p.numel() for p in bench.unet.parameters()) - waiting,
        seconds=seconds,
    )


def memory(bench, kind, checkpointing):
    """Peak memory of two steps of a kind."""
    bench.inject()
    if checkpointing:
        bench.unet.enable_gradient_checkpointing()
    for _ in range(2):  # the optimizer has its state in the second
        bench.step(STEPS[kind])
    return bench.peak()


def sizes(unet):
    """{format: [bytes, bytes]} of the folders that hold the adapters, at rank 1 and at rank 8."""
    found = {"PEFT": [], "diffusers": []}
    with tempfile.TemporaryDirectory() as folder:
        for rank in (1, 8):
            for layer in selora.adapters(unet).values():
                layer.rank = rank
            for form in found:
                path = Path(folder) / f"{form}{rank}"
                getattr(interchange, f"save_{form.lower()}")(unet, path)
                found[form].append(sum(file.stat().st_size for file in path.iterdir()))
    return found


def merging(bench, rounds):
    """Seconds to merge, by how much that raises the peak, and the sizes of the folders."""
    bench.inject()
    found = dict(sizes=sizes(bench.unet))
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    before = bench.peak()
    for _ in range(rounds):
        start = bench.now()
        selora.merge(bench.unet)
        seconds.append(bench.now() - start)
        found.setdefault("growth", bench.peak() - before)  # that of the first
        bench.inject()
    return found | dict(seconds=seconds)


def accuracy(bench):
    """The largest difference between the outputs of the adapted and the merged UNet, over the largest
    change of the output by the adapters."""
    with torch.no_grad():
        base = bench.predict()
        bench.inject()
        for layer in selora.adapters(bench.unet).values():
            layer.rank = 8
            torch.nn.init.normal_(layer.B, std=0.02)
        adapted = bench.predict()
        selora.merge(bench.unet)
        merged = bench.predict()
    return ((merged - adapted).abs().max() / (adapted - base).abs().max()).item()


def measured(part, device, latent, rounds):
    """What one part finds, in a process of its own."""
    note(f"{latent}x{latent}, {part} ...")
    command = [sys.executable, __file__, "--part", part, "--device", device]
    command += ["--latents", str(latent), "--rounds", str(rounds)]
    result = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    note(f"{latent}x{latent}, {part}: {found}")
    return found


def main(device: str = "cpu", latents: tuple[int, ...] = (32, 64), rounds: int = 4, part: str = ""):
    """Print the table, a column for each size of latents. `part` is for the processes that measure."""
    if part:
        bench = Bench(device, latents[0])
        kind, _, checkpointing = part.partition("+")
        if kind in STEPS:
            found = memory(bench, kind, bool(checkpointing))
        elif kind == "accuracy":
            found = accuracy(bench)
        else:
            found = {"times": times, "merging": merging}[kind](bench, rounds)
        print(json.dumps(found))
        return
    parts = ["times", *STEPS, "plain+checkpointing", "sampled+checkpointing", "merging", "accuracy"]
    columns = []
    for latent in latents:
        found = {name: measured(name, device, latent, rounds) for name in parts}
        columns.append(dict(rows(found)))
    where = f"CPU time, threads: {torch.get_num_threads()}"
    if device != "cpu":
        where = torch.cuda.get_device_name(device)
    print(f"| batch 1, float32, {where} |", *(f"{latent}x{latent} latents |" for latent in latents))
    print("|---" * (len(latents) + 1) + "|")
    for name in columns[0]:
        print(f"| {name} |", *(f"{column[name]} |" for column in columns))


def rows(found):
    """The (name, value) of each row of the table, from what the parts found."""
    timed = found["times"]
    merged = found["merging"]
    best = {kind: min(seconds) for kind, seconds in timed["seconds"].items()}
    whole = f"Linears; their parameters at rank 1, of {timed['whole']:,}"
    yield whole, f"{timed['layers']}; {timed['parameters']:,}"
    yield "`inject`; largest change of the output", f"{timed['inject']:.2f} s; {timed['change']:g}"
    yield f"plain LoRA step, fastest of {len(timed['seconds']['plain'])}", f"{best['plain']:.2f} s"
    ratios = [f"{best[kind] / best['plain']:.3f}" for kind in ("sampled", "expected")]
    yield "step with `FisherProbe(unet, expected=False)`; `True`, over plain step", "; ".join(ratios)
    yield "peak memory of plain steps", f"{found['plain'] / 1e9:.2f} GB"
    added = [f"{(found[kind] - found['plain']) / 1e9:+.2f} GB" for kind in ("sampled", "expected")]
    yield "the same with the probe, `False`; `True`", "; ".join(added)
    plain = found["plain+checkpointing"]
    added = found["sampled+checkpointing"] - plain
    name = "peak memory of plain steps with checkpointing; with the probe, `False`"
    yield name, f"{plain / 1e9:.2f} GB; {added / 1e9:+.2f} GB"
    name = f"`merge`, fastest of {len(merged['seconds'])}; rise of peak memory meanwhile"
    yield name, f"{min(merged['seconds']):.1f} s; {merged['growth'] / 1e9:+.2f} GB"
    name = "merged output minus adapted output, over the effect of the adapters"
    yield name, f"{found['accuracy']:.0e}"
    for form, (low, high) in merged["sizes"].items():
        yield f"{form} folder at rank 1; rank 8", f"{low / 1e6:.1f} MB; {high / 1e6:.1f} MB"


if __name__ == "__main__":
    tyro.cli(main)
