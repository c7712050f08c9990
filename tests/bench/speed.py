"""Speed as ratios: each pair is interleaved in one process, after a warm-up; the median of 30 rounds.

    make bench        # prints one table, writes runs/bench/speed.json

Always ours over the other, so smaller is faster. The sizes are those of the paper's ViLT-B/32 and of this project's default.
"""

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
from minilora.vit import ViT

ROUNDS, WARM = 30, 3


def compare(ours, peer, rounds=ROUNDS):
    """(median ms of ours, of the peer), measured in turn: the machine's drift hits both."""
    times = ([], [])
    for i in range(WARM + rounds):
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


def probe_steps(batch):
    """A training step of the default denoiser with the Fisher probe, and what else gives per-sample Fisher information,
    each against the plain step: {name: compare(...)}."""
    torch.manual_seed(0)
    model = Denoiser(text_depth=1, positions=16)
    selora.inject(model)
    optimizer = torch.optim.AdamW(selora.adapter_groups(model, 0.01), lr=1e-3)
    z, noise, alphas = torch.randn(batch, 4, 8, 8), torch.randn(batch, 4, 8, 8), diffusion.alphas_cumprod()
    ids, t = torch.randint(3, 2048, (batch, 16)), torch.randint(0, 1000, (batch,))
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

    def loop():
        selora.fisher_loop(model, losses())

    others = {"probe_step": partial(step, probe=False), "probe_step_expected": partial(step, probe=True),
              "shadow_pass": partial(step, lambda: losses().mean().backward()),
              "vmap": partial(step, lambda: per_sample(train, noisy, t, ids, noise)), "sample_loop": partial(step, loop)}
    return {name: compare(call, step, 8 if name in ("vmap", "sample_loop") else ROUNDS) for name, call in others.items()}


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
