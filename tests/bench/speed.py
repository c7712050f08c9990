"""Speed as ratios: each pair is interleaved in one process, after a warm-up; the median of 30 rounds (slow peers 8).

    make bench        # prints one table, writes runs/bench/speed.json

Always ours over the other, so smaller is faster; wall time, and CPU time beside it. Where both are torch, the floor is
printed too: arithmetic (as torch counts it: matrix products and convolutions) and bytes that operators read and write,
ours over the other. The sizes are those of the paper's ViLT-B/32 and of this project's defaults.
"""

import copy
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
import torch._inductor.config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[2]))
import train_mora
import train_selora
from minilora import checkpoint, data, diffusion, export_mora, export_selora, selora, serve
from minilora.mora import MoRA, attach, gates
from minilora.phantoms import phantoms
from minilora.task import batch_at, on
from minilora.unet import Denoiser
from minilora.vae import VAE
from minilora.vit import ViT
from minilora.words import tokenize

ROOT, ROUNDS, WARM = Path(__file__).parents[2], 30, 3


def compare(ours, peer, rounds=None, floor=False):
    """Median ms of ours and of the peer, measured in turn: the machine's drift hits both. With `floor`, the ratios of
    arithmetic and of bytes moved."""
    wall, cpu = ([], []), ([], [])
    for i in range(WARM + (rounds or ROUNDS)):
        for call, walls, cpus in zip((ours, peer), wall, cpu):
            began, busy = time.perf_counter(), time.process_time()
            call()
            if i >= WARM:
                walls.append((time.perf_counter() - began) * 1e3)
                cpus.append((time.process_time() - busy) * 1e3)
    found = {"ours_ms": float(np.median(wall[0])), "peer_ms": float(np.median(wall[1])),
             "cpu_ratio": float(np.median(cpu[0]) / max(np.median(cpu[1]), 1e-9))}
    if floor:
        (flops, moved), (other_flops, other_moved) = work(ours), work(peer)
        found |= {"arithmetic": flops / other_flops, "bytes": moved / other_moved}
    return found


class Traffic(TorchDispatchMode):
    """Adds up the bytes of all tensors that operators take and give."""

    moved = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            self.moved += x.numel() * x.element_size() if isinstance(x, torch.Tensor) else 0
        return result


def work(call):
    """(arithmetic, bytes moved) of a call."""
    with FlopCounterMode(display=False) as flops:
        call()
    with Traffic() as traffic:
        call()
    return flops.get_total_flops(), traffic.moved


def mora_vs_sample_loop(B, T, D, r, M=2, rounds=None):
    """Forward and backward of the branch against a loop over samples."""
    torch.manual_seed(0)
    mora, x = MoRA(D, M, r), torch.randn(B, T, D, requires_grad=True)
    torch.nn.init.normal_(mora.up)
    present = (torch.rand(B, M) < 0.6).float()
    present[torch.arange(B), torch.arange(B) % M] = 1
    where = [[m for m in range(M) if row[m]] for row in present]

    def loop():
        rows = [sum((x[b] @ mora.down) @ mora.up[m] for m in where[b]) for b in range(B)]
        torch.stack(rows).sum().backward()

    return compare(lambda: mora(x, present).sum().backward(), loop, rounds, floor=True)


def inputs_of(study):
    """{modality: tensor} of all samples of a study, as a `ViT` of the default size takes them."""
    encode = partial(tokenize, buckets=2048, positions=12)
    return batch_at(on("cpu", data.model_inputs(study, 32, 1, encode, {})), slice(None))


def mora_step_overhead():
    """A training step with MoRA against the same step of the head alone where gradients reach the input."""
    study = phantoms(64, 0).select(("image", "note"))
    inputs = inputs_of(study)
    present = torch.from_numpy(data.missing_table(study.have(), study.modalities, "any:0.7", 0).astype(np.float32))
    labels = torch.from_numpy(study.labels)

    def step_of(method):
        torch.manual_seed(0)
        model = attach(ViT(("image", "note"), 4), method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        if method == "head":  # the backward pass then runs through the same blocks
            model.cls.requires_grad_(True)

        def step():
            optimizer.zero_grad()
            train_mora.diagnosis_loss(model(inputs, present, gates(method, present)), labels).backward()
            optimizer.step()

        return step

    return compare(step_of("mora"), step_of("head"), floor=True)


def denoising(batch=32):
    """The default denoiser's size as a fresh model with its step's inputs: (make, inputs of diffusion.denoising_loss)."""
    torch.manual_seed(0)
    make = lambda: Denoiser(text_depth=1, positions=16)
    z, noise = torch.randn(batch, 4, 16, 16), torch.randn(batch, 4, 16, 16)
    ids, t = torch.randint(3, 2048, (batch, 16)), torch.randint(0, 1000, (batch,))
    return make, (z, ids, t, noise, diffusion.alphas_cumprod())


def in_peft(model, rank):
    """The same layers adapted by PEFT, at the same rank and scale."""
    import peft

    names = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    return peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def probe_steps(batch, names=None, rounds=None):
    """A training step of the default denoiser with the Fisher probe, and what else gives per-sample Fisher information,
    each against the plain step: {name: compare(...)}."""
    make, (z, ids, t, noise, alphas) = denoising(batch)
    model = make()
    selora.inject(model)
    optimizer = torch.optim.AdamW(selora.adapter_groups(model, 0.01), lr=1e-3)
    losses = lambda: diffusion.denoising_loss(model, z, ids, t, noise, alphas, per_sample=True)
    train = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def single(parameters, noisy, t, ids, noise):
        return (torch.func.functional_call(model, parameters, (noisy[None], t[None], ids[None])) - noise).square().mean()

    per_sample = torch.func.vmap(torch.func.grad(single), in_dims=(None, 0, 0, 0, 0))
    noisy = diffusion.add_noise(z, noise, alphas[t])

    def step(before=None, probe=None):
        optimizer.zero_grad()
        if before:
            before()
        if probe is None:
            losses().mean().backward()
        else:
            with selora.FisherProbe(model, probe) as watched:
                losses().mean().backward()
            watched.scores()
        optimizer.step()

    others = {"probe_step": partial(step, probe=False), "probe_step_expected": partial(step, probe=True),
              "shadow_pass": partial(step, lambda: losses().mean().backward()),
              "vmap": partial(step, lambda: per_sample(train, noisy, t, ids, noise)),
              "sample_loop": partial(step, lambda: selora.fisher_loop(model, losses()))}
    found = {name: compare(call, step, rounds or (8 if name in ("vmap", "sample_loop") else ROUNDS), name.startswith("probe"))
             for name, call in others.items() if names is None or name in names}
    if names:
        return found
    try:  # Opacus knows modules, not bare parameters: PEFT's layers, against PEFT's own step
        from opacus import GradSampleModule
    except ImportError:
        return found
    plain, watched = in_peft(make(), 1), in_peft(make(), 1)
    watched.text.words.requires_grad_(False)
    watched = GradSampleModule(watched, strict=False)

    def peft_step(model):
        model.zero_grad(set_to_none=True)
        diffusion.denoising_loss(model, z, ids, t, noise, alphas).backward()

    return found | {"opacus (PEFT's layers)": compare(lambda: peft_step(watched), lambda: peft_step(plain))}


def lora_steps(rank=4):
    """Injecting, and a training step, against PEFT on the same layers at the same rank; ours at capacities r and 8."""
    make, batch = denoising()

    def step_of(model, parameters):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)

        def step():
            optimizer.zero_grad()
            diffusion.denoising_loss(model, *batch).backward()
            optimizer.step()

        return step

    peer = in_peft(make(), rank)
    peer = step_of(peer, [p for p in peer.parameters() if p.requires_grad])
    found = {}
    for capacity in (rank, 8):
        model = make()
        selora.inject(model, None, rank, capacity)
        found[f"lora_step_vs_peft, rank {rank} of capacity {capacity}"] = compare(
            step_of(model, selora.adapter_groups(model, 0.01)), peer, floor=True)
    models = iter([make() for _ in range(2 * (WARM + ROUNDS))])
    found["inject_vs_peft"] = compare(lambda: selora.inject(next(models), None, rank, rank), lambda: in_peft(next(models), rank))
    return found


def growth_compile(growths=6):
    """Graphs compiled over some growths, by a mask and by concatenation: ((graphs, seconds to the first), the same)."""
    from torch._dynamo.testing import CompileCounter

    torch._inductor.config.force_disable_caches = True  # kernels of an earlier benchmark would make a start look free

    def count(grow, make_model, x):
        counter = CompileCounter()
        model, seconds = make_model(), []
        for backend in ("inductor", counter):
            torch._dynamo.reset()
            compiled = torch.compile(model, backend=backend, dynamic=False)
            began = time.perf_counter()
            compiled(x).sum().backward()
            seconds.append(time.perf_counter() - began)
        for _ in range(growths):
            grow(model)
            compiled(x).sum().backward()
        return counter.frame_count, seconds[0]

    def masked():
        model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 64))
        selora.inject(model)
        return model

    class Concatenated(torch.nn.Module):
        """The published way: A and B get a new column and row at each growth."""

        def __init__(self):
            super().__init__()
            self.base = torch.nn.Linear(64, 64).requires_grad_(False)
            self.A, self.B = torch.nn.Parameter(torch.randn(64, 1)), torch.nn.Parameter(torch.zeros(1, 64))

        def forward(self, x):
            return self.base(x) + (x @ self.A) @ self.B

    def concatenate(model):
        for layer in (model[0], model[2]):
            layer.A = torch.nn.Parameter(torch.cat([layer.A.data, torch.randn(64, 1)], 1))
            layer.B = torch.nn.Parameter(torch.cat([layer.B.data, torch.zeros(1, 64)]))

    x = torch.randn(32, 64)
    torch.compile(torch.nn.Linear(64, 64))(x).sum().backward()  # the compiler's own start is nobody's
    ours = count(lambda model: selora.grow(model, None, "cheapest", budget=10**9), masked, x)
    return ours, count(concatenate, lambda: torch.nn.Sequential(Concatenated(), torch.nn.GELU(), Concatenated()), x)


def import_times():
    """Seconds of `import minilora.selora` and `import peft`, each in a process of its own; medians of 3, in turn."""
    start = lambda module: subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT)
    return compare(partial(start, "minilora.selora"), partial(start, "peft"), 3)


def first_seconds(folder):
    """Seconds from command to the first training step of each script, with everything cached, and to the first
    prediction of an exported folder."""
    found, command = {}, lambda *argv: [sys.executable, *map(str, argv)]
    for script, sizes in (("train_mora.py", ["--methods", "head"]), ("train_selora.py", ["--vae-steps", 2, "--rule", "fixed", "--lr", 0.01])):
        argv = command(ROOT / script, "--seeds", 1, "--phantoms", 400, "--pretrain-steps", 2, "--steps", 1, *sizes)
        for turn in ("first", "again"):  # the second finds the base in its cache
            began = time.perf_counter()
            with subprocess.Popen([*argv, "--out", turn + script], cwd=folder, stdout=subprocess.PIPE, text=True) as run:
                for line in run.stdout:
                    if " s0 " in line and "step 1/1" in line:
                        found[script] = time.perf_counter() - began
                        break
                run.communicate()
    began = time.perf_counter()
    subprocess.run(command("-m", "minilora.serve", "predict", folder / "onnx", "--note", "fever"), check=True, cwd=ROOT,
                   stdout=subprocess.DEVNULL)
    return found | {"serve predict": time.perf_counter() - began}


def curves():
    """{name: [(x, value), ...]}: what drives the cost. Ratios to the sample loop and to the plain step, or ms a step."""
    make, batch = denoising()

    def step_of(model, inputs):
        def step():
            model.zero_grad()
            diffusion.denoising_loss(model, *inputs).backward()

        return step

    def adapted(inputs, targets=None, capacity=8):
        model = make()
        names = selora.inject(model, targets, 1, capacity)
        return step_of(model, inputs), len(names)

    modalities = [(M, mora_vs_sample_loop(32, 29, 64, 4, M, 10)) for M in (1, 2, 4, 8)]
    found = {"mora over the sample loop, by modalities": [(M, t["ours_ms"] / t["peer_ms"]) for M, t in modalities]}
    whole = adapted(batch)[0]
    layers = [adapted(batch, targets) for targets in ("text.*(query|out|mlp.*|key_value)", ".*(query|key_value|out)", ".*to_.*|.*mlp.*", None)]
    found["step of some layers over that of all 50, by layers"] = [
        (n, (lambda t: t["ours_ms"] / t["peer_ms"])(compare(step, whole, 10))) for step, n in layers]
    ones = adapted(batch, None, 1)[0]
    found["step over that of capacity 1, by capacity"] = [
        (C, (lambda t: t["ours_ms"] / t["peer_ms"])(compare(adapted(batch, None, C)[0], ones, 10))) for C in (1, 2, 4, 8, 16, 32)]
    found["probe over plain step, by batch"] = [
        (B, (lambda t: t["ours_ms"] / t["peer_ms"])(probe_steps(B, ("probe_step",), 10)["probe_step"])) for B in (4, 16, 64)]
    return found


def synthesis(folder):
    """Graphs of SeLoRA: merged against base, against eager, and the sampler against a Python loop over the step graph."""
    make, (z, ids, t, noise, alphas) = denoising()
    vae, base, served = VAE(width=16), make(), {}
    torch.nn.init.normal_(base.unet.last.weight, std=0.05)
    for name, rank in (("base", 0), ("merged", 4)):
        model = copy.deepcopy(base)
        selora.inject(model, None, rank)
        for layer in selora.adapters(model).values():
            torch.nn.init.normal_(layer.B, std=0.05)
        adapter = {"method": name, "rule": "fixed", "seed": 0, "state": selora.adapter_state(model), "base_hash": "", "ranks": {},
                   "words": {"ids": torch.zeros(0, dtype=torch.int64), "vectors": torch.zeros(0, 64)}}
        checkpoint.save(folder / name / "model.pt", {
            "format": 1, "kind": "selora", "config": model.config, "base": base.state_dict(), "base_hash": "", "targets": "",
            "vae_config": vae.config, "vae": vae.state_dict(), "noisier": 9.0, "capacity": 8, "adapter": adapter, "data": "",
            "study": "", "synthetic": True, "synthetic_notes": False})  # fmt: skip
        served[name] = serve.Synthesizer(export_selora.export_selora(folder / name), "cpu")
    step = {name: serve.open_session(s.folder / "denoise.onnx", "cpu", s.manifest) for name, s in served.items()}
    walk, words, found = serve.walk(20, 1000), ids.numpy(), {}
    for B in (1, 8):
        feed = {"z": z[:B].numpy(), "t": t[:B].numpy(), "ids": words[:B]}
        call = {name: partial(s.run, ["velocity"], feed) for name, s in step.items()}
        found[f"ort_merged_vs_base, denoise, batch {B}"] = compare(call["merged"], call["base"])
        eager = partial(torch.no_grad()(model.forward), z[:B], t[:B], ids[:B])
        found[f"ort_vs_eager, denoise, batch {B}"] = compare(call["merged"], eager)

        def python_loop(B=B):
            x, a, pair = noise[:B].numpy(), alphas.numpy(), np.concatenate([words[:B], tokenize([""] * B, 2048, 16)])
            signal = [*a[walk].astype(np.float32), np.float32(1)]
            for time_, now, then in zip(walk, signal, signal[1:]):
                both = step["merged"].run(["velocity"], {"z": np.concatenate([x, x]), "t": np.full(2 * B, time_), "ids": pair})[0]
                v = both[B:] + np.float32(3) * (both[:B] - both[B:])
                z0, rest = np.sqrt(now) * x - np.sqrt(1 - now) * v, np.sqrt(1 - now) * x + np.sqrt(now) * v
                x = np.sqrt(then) * z0 + np.sqrt(1 - then) * rest
            return x

        grain = np.zeros((B, *vae.image_shape), np.float32)
        whole = partial(served["merged"].run, noise[:B].numpy(), grain, words[:B], 3.0, walk)
        found[f"sampler_graph_vs_python_loop, batch {B}"] = compare(whole, python_loop)
    return found


def exported(folder, **sizes):
    """An exported model with a random branch, of the default size but for `sizes`."""
    build = lambda: ViT(("image", "note"), 4, **sizes)
    model = attach(build(), "mora")
    torch.nn.init.normal_(model.blocks[0].mora.up)
    adapter = {"method": "mora", "seed": 0, "rank": 4, "state": {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}, "scales": {}}
    base = {k: v for k, v in build().state_dict().items() if not k.startswith("head.")}
    checkpoint.save(folder / "model.pt", {
        "format": 1, "kind": "mora", "config": model.config | {"absent": "mask"}, "base": base, "base_hash": "", "class_names": ["a", "b", "c", "d"],
        "multilabel": False, "columns": {}, "data": "", "synthetic": True, "synthetic_notes": False, "patterns": [[1, 1]],
        "adapter": adapter})  # fmt: skip
    served = serve.Diagnoser(export_mora.export_mora(folder), "cpu")
    for graph in served.manifest["graphs"]:  # the folder is gone before the measurement
        served.session(graph)
    return served, model.eval()


def main():
    results = {}

    def add(name, times):
        ours, peer = times["ours_ms"], times["peer_ms"]
        results[name] = {"ratio": ours / peer, **times, "device": "cpu"}
        floor = f"   arithmetic {times['arithmetic']:.3f}, bytes {times['bytes']:.3f}" if "arithmetic" in times else ""
        cpu = f" (CPU {times['cpu_ratio']:.3f})" if "cpu_ratio" in times else ""
        print(f"{name:44s} {ours:9.3f} ms {peer:9.3f} ms  ratio {ours / peer:.3f}{cpu}{floor}", flush=True)

    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {torch.get_num_threads()} threads; ours, other, ours/other")
    warnings.filterwarnings("ignore", "Full backward hook|dynamo_pgo")  # of Opacus, of the compiler without its cache
    add("mora_vs_sample_loop (64,145,768,4)", mora_vs_sample_loop(64, 145, 768, 4))
    add("mora_vs_sample_loop (32,29,64,4)", mora_vs_sample_loop(32, 29, 64, 4))
    add("mora_step_overhead", mora_step_overhead())
    for batch in (32, 16):
        for name, times in probe_steps(batch).items():
            add(f"{name}, batch {batch}", times)
    cfg = train_selora.Config()
    probes = len(range(cfg.every, cfg.steps, cfg.every))
    plain, probed = results["probe_step, batch 32"]["peer_ms"], results["probe_step, batch 32"]["ours_ms"]
    add(f"default schedule, {probes} probes in {cfg.steps} steps",
        {"ours_ms": plain * cfg.steps + probes * (probed - plain), "peer_ms": plain * cfg.steps})
    try:
        for name, times in lora_steps().items():
            add(name, times)
        add("import_time, selora vs peft", import_times())
    except ImportError as error:
        print(f"no comparison with PEFT: {error}; pip install -c constraints.txt -e '.[bench]'")
    (ours, first), (theirs, other) = growth_compile()
    results["growth_compile"] = {"ratio": ours / theirs, "ours_graphs": ours, "peer_graphs": theirs, "device": "cpu"}
    print(f"growth_compile: {ours} graph over 6 growths, by concatenation {theirs}; seconds to the first compiled step "
          f"{first:.1f} and {other:.1f}")
    with tempfile.TemporaryDirectory() as folder:
        for name, times in synthesis(Path(folder)).items():
            add(name, times)
    for patch in (8, 4, 2):  # 16, 64 and 256 image tokens beside 12 words
        with tempfile.TemporaryDirectory() as folder:
            served, model = exported(Path(folder), patch=patch)
        study = phantoms(64, 0).select(("image", "note"))
        inputs = {name: x.numpy() for name, x in inputs_of(study).items()}
        for B in (1, 8, 64) if patch == 8 else (1,):
            feed = {k: v[:B] for k, v in inputs.items()}
            words, whole = partial(served.run, "note", feed), partial(served.run, "image+note", feed)
            eager = partial(torch.no_grad()(model.forward), on("cpu", feed), torch.ones(B, 2))
            size = f"{(32 // patch) ** 2} patches, batch {B}"
            add(f"text_only_vs_complete, {size}", compare(words, whole))
            add(f"ort_vs_eager, image+note, {size}", compare(whole, eager))
        if patch == 8:
            with tempfile.TemporaryDirectory() as folder:
                exported(Path(folder))
                seconds = first_seconds(Path(folder))
            results["first_seconds"] = seconds
            print("seconds from command to first step or prediction: " + ", ".join(f"{k} {v:.1f}" for k, v in seconds.items()))
    results["curves"] = curves()
    for name, points in results["curves"].items():
        print(f"{name}: " + ", ".join(f"{x}: {y:.2f}" for x, y in points))
    checkpoint.write_json("runs/bench/speed.json", results)
    print("runs/bench/speed.json")


if __name__ == "__main__":
    main()
