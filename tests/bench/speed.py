"""Speed as ratios: each pair is interleaved in one process, after a warm-up; the median of 30 rounds.

    make bench        # prints one table, writes runs/bench/speed.json

Always ours over the other, so smaller is faster. The sizes are those of the paper's ViLT-B/32 and of this project's default.
"""

import copy
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
import export
import train_mora
import train_selora
from minilora import checkpoint, data, diffusion, selora, serve
from minilora.mora import MoRA, attach, gates
from minilora.unet import Denoiser
from minilora.vae import VAE
from minilora.vit import ViT

ROOT, ROUNDS, WARM = Path(__file__).parents[2], 30, 3


def compare(ours, peer, rounds=None):
    """(median ms of ours, of the peer), measured in turn: the machine's drift hits both."""
    times = ([], [])
    for i in range(WARM + (rounds or ROUNDS)):
        for call, kept in zip((ours, peer), times):
            began = time.perf_counter()
            call()
            if i >= WARM:
                kept.append((time.perf_counter() - began) * 1e3)
    return tuple(float(np.median(t)) for t in times)


def mora_vs_sample_loop(B, T, D, r):
    """Forward and backward of the branch against a loop over samples."""
    torch.manual_seed(0)
    mora, x = MoRA(D, 2, r), torch.randn(B, T, D, requires_grad=True)
    torch.nn.init.normal_(mora.up)
    present = torch.tensor([[1.0, 1], [1, 0], [0, 1]])[torch.arange(B) % 3]
    where = [[m for m in range(2) if row[m]] for row in present]

    def loop():
        rows = [sum((x[b] @ mora.down) @ mora.up[m] for m in where[b]) for b in range(B)]
        torch.stack(rows).sum().backward()

    return compare(lambda: mora(x, present).sum().backward(), loop)


def mora_step_overhead():
    """A training step with MoRA against the same step of the head alone where gradients reach the input."""
    study = data.phantoms(64, 0).select(("image", "note"))
    inputs = train_mora.on("cpu", data.model_inputs(study, 32, 1, 2048, 12, {}))
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

    return compare(step_of("mora"), step_of("head"))


def denoising(batch=32):
    """The default denoiser's size as a fresh model with its step's inputs: (make, inputs of diffusion.denoising_loss)."""
    torch.manual_seed(0)
    make = lambda: Denoiser(text_depth=1, positions=16)
    z, noise = torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 8, 8)
    ids, t = torch.randint(3, 2048, (batch, 16)), torch.randint(0, 1000, (batch,))
    return make, (z, ids, t, noise, diffusion.alphas_cumprod())


def in_peft(model, rank):
    """The same layers adapted by PEFT, at the same rank and scale."""
    import peft

    names = [n for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d))]
    return peft.inject_adapter_in_model(peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)


def probe_steps(batch):
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
    found = {name: compare(call, step, 8 if name in ("vmap", "sample_loop") else ROUNDS) for name, call in others.items()}
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
            step_of(model, selora.adapter_groups(model, 0.01)), peer)
    models = iter([make() for _ in range(2 * (WARM + ROUNDS))])
    found["inject_vs_peft"] = compare(lambda: selora.inject(next(models), None, rank, rank), lambda: in_peft(next(models), rank))
    return found


def growth_compile(growths=6):
    """Graphs compiled over some growths, by a mask and by concatenation: ((graphs, seconds to the first), the same)."""
    from torch._dynamo.testing import CompileCounter

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
    times = ([], [])
    for _ in range(3):
        for module, kept in zip(("minilora.selora", "peft"), times):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", f"import {module}"], check=True, cwd=ROOT)
            kept.append((time.perf_counter() - began) * 1e3)
    return tuple(float(np.median(t)) for t in times)


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
        adapter = {"method": name, "rule": "fixed", "seed": 0, "state": selora.adapter_state(model), "base_hash": "", "ranks": {}}
        checkpoint.save(folder / name / "model.pt", {
            "format": 1, "kind": "selora", "config": model.config, "base": base.state_dict(), "base_hash": "", "targets": "",
            "vae_config": vae.config, "vae": vae.state_dict(), "schedule": "cosine", "capacity": 8, "adapter": adapter, "data": "",
            "study": "", "synthetic": True, "synthetic_notes": False})  # fmt: skip
        served[name] = serve.Synthesizer(export.export_selora(folder / name), "cpu")
    step = {name: serve.open_session(s.folder / "denoise.onnx", "cpu") for name, s in served.items()}
    walk, words, found = serve.walk(20, 1000), ids.numpy(), {}
    for B in (1, 8):
        feed = {"z": z[:B].numpy(), "t": t[:B].numpy(), "ids": words[:B]}
        call = {name: partial(s.run, ["eps"], feed) for name, s in step.items()}
        found[f"ort_merged_vs_base, denoise, batch {B}"] = compare(call["merged"], call["base"])
        eager = partial(torch.no_grad()(model.forward), z[:B], t[:B], ids[:B])
        found[f"ort_vs_eager, denoise, batch {B}"] = compare(call["merged"], eager)

        def python_loop(B=B):
            x, a, pair = noise[:B].numpy(), alphas.numpy(), np.concatenate([words[:B], data.tokenize([""] * B, 2048, 16)])
            signal = [*a[walk].astype(np.float32), np.float32(1)]
            for time_, now, then in zip(walk, signal, signal[1:]):
                both = step["merged"].run(["eps"], {"z": np.concatenate([x, x]), "t": np.full(2 * B, time_), "ids": pair})[0]
                eps = both[B:] + np.float32(2) * (both[:B] - both[B:])
                x = np.sqrt(then) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now) + np.sqrt(1 - then) * eps
            return x

        whole = partial(served["merged"].run, noise[:B].numpy(), words[:B], 2.0, walk)
        found[f"sampler_graph_vs_python_loop, batch {B}"] = compare(whole, python_loop)
    return found


def exported(folder, **sizes):
    """An exported model with a random branch, of the default size but for `sizes`."""
    build = lambda: ViT(("image", "note"), 4, **sizes)
    model = attach(build(), "mora")
    torch.nn.init.normal_(model.blocks[0].mora.up)
    adapter = {"method": "mora", "seed": 0, "rank": 4, "state": model.state_dict(), "scales": {}}
    base = {k: v for k, v in build().state_dict().items() if not k.startswith("head.")}
    checkpoint.save(folder / "model.pt", {
        "format": 1, "kind": "mora", "config": model.config, "base": base, "base_hash": "", "class_names": ["a", "b", "c", "d"],
        "multilabel": False, "columns": {}, "data": "", "synthetic": True, "synthetic_notes": False, "patterns": [[1, 1]],
        "adapter": adapter})  # fmt: skip
    served = serve.Diagnoser(export.export_mora(folder), "cpu")
    for graph in served.manifest["graphs"]:  # the folder is gone before the measurement
        served.session(graph)
    return served, model.eval()


def main():
    results = {}

    def add(name, times):
        results[name] = {"ratio": times[0] / times[1], "ours_ms": times[0], "peer_ms": times[1], "device": "cpu"}
        print(f"{name:44s} {times[0]:9.3f} ms {times[1]:9.3f} ms  ratio {times[0] / times[1]:.3f}", flush=True)

    print(f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, {torch.get_num_threads()} threads; ours, other, ours/other")
    add("mora_vs_sample_loop (64,145,768,4)", mora_vs_sample_loop(64, 145, 768, 4))
    add("mora_vs_sample_loop (32,29,64,4)", mora_vs_sample_loop(32, 29, 64, 4))
    add("mora_step_overhead", mora_step_overhead())
    for batch in (32, 16):
        for name, times in probe_steps(batch).items():
            add(f"{name}, batch {batch}", times)
    cfg = train_selora.Config()
    probes = len(train_selora.probe_steps(cfg, "ratio", cfg.rank))
    plain, probed = results["probe_step, batch 32"]["peer_ms"], results["probe_step, batch 32"]["ours_ms"]
    add(f"default schedule, {probes} probes in {cfg.steps} steps",
        (plain * cfg.steps + probes * (probed - plain), plain * cfg.steps))
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
        study = data.phantoms(64, 0).select(("image", "note"))
        inputs = data.model_inputs(study, 32, 1, 2048, 12, {})
        for B in (1, 8, 64) if patch == 8 else (1,):
            feed = {k: v[:B] for k, v in inputs.items()}
            words, whole = partial(served.run, "note", feed), partial(served.run, "image+note", feed)
            eager = partial(torch.no_grad()(model.forward), train_mora.on("cpu", feed), torch.ones(B, 2))
            size = f"{(32 // patch) ** 2} patches, batch {B}"
            add(f"text_only_vs_complete, {size}", compare(words, whole))
            add(f"ort_vs_eager, image+note, {size}", compare(whole, eager))
    checkpoint.write_json("runs/bench/speed.json", results)
    print("runs/bench/speed.json")


if __name__ == "__main__":
    main()
