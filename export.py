"""Freeze a trained run into ONNX graphs, check them, and predict with them.

    python export.py mora runs/mora                  # -> runs/mora/onnx
    python export.py selora runs/selora              # -> runs/selora/onnx: the whole sampler in one graph
    python export.py selora runs/selora --hot-swap runs/swap   # the base once, and one adapter file per run
    python export.py check runs/mora/onnx            # parity with torch, provider
    python export.py predict runs/mora/onnx --image chest.png --note "fever, recent cold"
    python export.py sample runs/selora/onnx --note "coin lesion sinistral, febrile" --out sheet.png

A MoRA branch stands beside a nonlinear block, so it cannot be merged into the weights. It is frozen per presence
pattern instead: the ups of the present modalities fold into one matrix, and the tokens of absent modalities leave the
graph. One more graph, `mask.onnx`, takes the presence as an input. SeLoRA's expanded ranks are merged into the weights,
so its graphs are those of the base; for hot-swapping they are inputs instead. `predict`, `sample` and `check` are
`minilora/serve.py` and import no torch. """

import argparse
import copy
import io
import itertools
import json
import os
import re
import shutil
import sys
import time
import warnings
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np

from minilora import __version__, data, serve
from minilora.data import Refused

OPSET = 17


def trace(module, inputs, outputs, dynamic):
    """The ONNX model of a module traced with named example inputs; `dynamic` {name: {axis: symbol}}."""
    import onnx
    import torch

    buffer = io.BytesIO()
    with warnings.catch_warnings():  # the dynamo exporter would need onnxscript; the tracer's shape warnings are meant
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", UserWarning)
        torch.onnx.export(module.eval(), tuple(inputs.values()), buffer, input_names=list(inputs), output_names=outputs,
                          opset_version=OPSET, dynamo=False, dynamic_axes=dynamic)
    return onnx.load_from_string(buffer.getvalue())


def to_half(model):
    """Weights and arithmetic in float16, inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # values below float16's smallest become that
        model = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    model.topological_sort()  # the converter puts its casts last
    return model.model


def write_graph(model, path, metadata):
    """Check an ONNX model whole and write it atomically."""
    import onnx

    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    data.write_atomic(path, model.SerializeToString(deterministic=True))
    print(f"{path.name:32s} {path.stat().st_size / 1024:8.0f} KiB", flush=True)


@contextmanager
def new_folder(out):
    """A folder to write into, which takes the place of `out` only when the block ended well: of an exported folder with
    nothing of anybody else's in it, or of an empty one.
    """
    out = Path(out).resolve()
    for left in out.parent.glob(f".{out.name}.*.old"):  # of a process that was killed between the two renames
        if not out.exists():
            os.replace(left, out)
    before = own_files(out)
    work, old = (out.with_name(f".{out.name}.{os.getpid()}.{end}") for end in ("tmp", "old"))
    work.mkdir(parents=True)
    try:
        yield work
        if own_files(out) != before:
            raise Refused(f"{out}: changed while this was written; run it again")
        if out.exists():  # renamed, not removed: the old export is never gone before the new one is there
            os.replace(out, old)
        try:
            os.replace(work, out)
        except OSError:
            if old.exists():
                os.replace(old, out)
            raise
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def own_files(out):
    """The manifest of an exported folder, or None of one that is empty or not there; `Refused` if it is another's."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "manifest.json").is_file():
        raise Refused(f"{out}: exists and is not an exported folder; choose another --out")
    manifest = serve.own_manifest(out)
    if others := {p.name for p in out.iterdir()} - {"manifest.json", *manifest["files"]}:
        raise Refused(f"{out}: holds {min(others)}, which no export wrote; move it, or choose another --out")
    return manifest


def write_manifest(folder, manifest):
    """manifest.json: what is given, the hash of every file beside it, the versions, and its own hash."""
    import onnx
    import torch

    manifest |= {"files": {p.name: data.sha256(p) for p in sorted(folder.iterdir()) if p.name != "manifest.json"},
                 "opset": OPSET, "versions": {"minilora": __version__, "torch": torch.__version__,
                                              "onnx": onnx.__version__, "numpy": np.__version__}}
    manifest["sha256"] = data.digest({k: v for k, v in manifest.items() if k != "sha256"})
    data.write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def finish(work, out, manifest):
    """Write the manifest, compare with torch, and state the parity in it; `Refused` if it is above the limit."""
    write_manifest(work, manifest)
    worst = serve.check(work, "cpu")
    if worst > serve.tolerance(manifest):
        raise Refused(f"{out}: not written, the graphs differ from torch by {worst:.1e}")
    write_manifest(work, manifest | {"parity": float(f"{worst:.1e}")})


def chosen_adapter(run, saved, method, seed):
    """The adapter that the run kept, or the one that --method and --seed name."""
    from minilora import checkpoint

    if method is None and seed is None:
        return saved["adapter"]
    method, seed = method or saved["adapter"]["method"], saved["adapter"]["seed"] if seed is None else seed
    path = Path(run) / f"adapters/{method.replace(' ', '-')}-s{seed}.pt"
    if not path.is_file():
        there = sorted(p.stem for p in path.parent.glob("*.pt"))
        raise Refused(f"{path}: no such adapter; this run has {', '.join(there)}")
    adapter = checkpoint.load(path, f"{saved['kind']} adapter")
    if (adapter["method"], adapter["seed"]) != (method, seed):
        raise Refused(f"{path}: holds '{adapter['method']}' of seed {adapter['seed']}; its file was changed")
    return adapter


# ----------------------------------------------------------------------------------------------------------------- MoRA


def diagnosis_graph(model, modalities, multilabel, row=None):
    """A module of positional inputs -> (logits, probabilities): one pattern (`row` [M] given), or presence as last
    input.
    """
    import torch

    class Graph(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, *inputs):
            present = None if row is not None else inputs[-1]
            logits = self.model(dict(zip(modalities, inputs)), present, gates=row if row is not None else present)
            return logits, logits.sigmoid() if multilabel else logits.softmax(1)

    return Graph().eval()


def load_run(run, method, seed):
    """(content of RUN/model.pt with the chosen adapter, rebuilt model)."""
    from minilora import checkpoint
    from train_mora import build

    saved = checkpoint.load(Path(run) / "model.pt", "mora")
    saved["adapter"] = adapter = chosen_adapter(run, saved, method, seed)
    if adapter["method"] == "mora-shuffled":
        raise Refused("mora-shuffled is a control that needs other samples' patterns; it cannot be served")
    return saved, build(saved["config"], saved["base"], adapter["method"], adapter["rank"], 0, adapter["state"])


def export_mora(run, out=None, method=None, seed=None, fp16=False):
    """Write RUN/onnx: a graph per presence pattern, the mask graph, golden outputs, manifest. Returns the folder."""
    import torch

    from minilora.mora import branch_ranks, fold, gates

    saved, model = load_run(run, method, seed)
    config, adapter = saved["config"], saved["adapter"]
    modalities, method = list(config["modalities"]), adapter["method"]
    if len(modalities) <= 4:
        patterns = [p for p in itertools.product((1, 0), repeat=len(modalities)) if any(p)]
    else:  # the patterns seen in training; any other goes through the mask graph
        patterns = [tuple(p) for p in saved["patterns"][:16]]
    example, present = golden_inputs(config, patterns)
    golden = {k: v.numpy() for k, v in example.items()} | {"present": present.numpy()}
    graphs, classes, outputs = {}, "|".join(saved["class_names"]), ["logits", "probabilities"]
    about = {"kind": "mora", "method": method, "modalities": ",".join(modalities), "classes": classes}
    out = Path(out or Path(run) / "onnx")
    with new_folder(out) as work:
        for row in [*patterns, None]:
            name = "mask" if row is None else data.pattern_name(row, modalities)
            frozen, inputs = copy.deepcopy(model), dict(example)
            if row is None:
                inputs["present"] = present
                if method in ("lora", "mora-open"):  # their gates do not depend on presence
                    fold(frozen, gates(method, torch.ones(1, len(modalities)))[0])
                graph = diagnosis_graph(frozen, modalities, saved["multilabel"])
            else:
                told = gates(method, torch.tensor([row], dtype=torch.float32))  # [1,M]
                inputs = {m: v for m, v in example.items() if row[modalities.index(m)]}
                graph = diagnosis_graph(fold(frozen, told[0]), list(inputs), saved["multilabel"], told)
            graphs[name] = re.sub(r"[^\w+-]", "_", name) + ".onnx"
            with torch.no_grad():
                logits, probabilities = graph(*inputs.values())
            golden |= {f"logits {name}": logits.numpy(), f"probabilities {name}": probabilities.numpy()}
            traced = trace(graph, inputs, outputs, {n: {0: "batch"} for n in [*inputs, *outputs]})
            write_graph(to_half(traced) if fp16 else traced, work / graphs[name], about | {"pattern": name})
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        scales = adapter["scales"].items()
        numeric = {m: {"columns": saved["columns"][m], "mean": mean, "scale": scale} for m, (mean, scale) in scales}
        manifest = {"format": 1, "kind": "mora", "method": method, "seed": adapter["seed"], "modalities": modalities,
                    "classes": saved["class_names"], "multilabel": saved["multilabel"], "absent": config["absent"],
                    "image_size": config["image_size"], "channels": config["channels"], "buckets": config["buckets"],
                    "positions": config["positions"], "tokenizer": "crc32", "ranks": branch_ranks(adapter["state"]),
                    "numeric": numeric, "graphs": graphs, "precision": "float16" if fp16 else "float32",
                    "base": saved["base_hash"], "data": saved["data"], "synthetic": saved["synthetic"],
                    "synthetic_notes": saved["synthetic_notes"], "fit": saved.get("fit", "squeeze")}
        finish(work, out, manifest)
    return out


def golden_inputs(config, patterns, n=5):
    """({modality: tensor}, presence [n,M]) drawn from a fixed seed: an exported folder must not carry patients' data.
    """
    import torch

    rng = np.random.default_rng(15)
    drawn = {}
    for m in config["modalities"]:
        if m == "image":
            shape = (n, config["channels"], config["image_size"], config["image_size"])
            drawn[m] = rng.uniform(-1, 1, shape).astype(np.float32)
        elif m == "note":
            drawn[m] = rng.integers(3, config["buckets"], (n, config["positions"]))
            drawn[m][:, 0] = data.CLS
            drawn[m][np.arange(config["positions"]) >= rng.integers(2, config["positions"] + 1, n)[:, None]] = data.PAD
        else:
            drawn[m] = rng.normal(size=(n, len(config["columns"][m]))).astype(np.float32)
            drawn[m][1, 0] = np.nan
    present = torch.tensor([patterns[i % len(patterns)] for i in range(n)], dtype=torch.float32)
    return {k: torch.from_numpy(v) for k, v in drawn.items()}, present


# --------------------------------------------------------------------------------------------------------------- SeLoRA


def renamed(graph, prefix):
    """(nodes, initializers) of a traced graph, every name prefixed but for those of its inputs and outputs."""
    keep = {"", *(v.name for v in [*graph.input, *graph.output])}
    new = lambda name: name if name in keep else prefix + name
    nodes, weights = [], []
    for node in graph.node:
        copied = type(node)()
        copied.CopyFrom(node)
        copied.name = prefix + node.name
        copied.input[:], copied.output[:] = map(new, node.input), map(new, node.output)
        nodes.append(copied)
    for weight in graph.initializer:
        copied = type(weight)()
        copied.CopyFrom(weight)
        copied.name = new(weight.name)
        weights.append(copied)
    return nodes, weights


def sampler_model(parts, alphas, config, vae_config, swapped):
    """One ONNX model: noise [B,L,s,s], ids [B,P], guidance [], timesteps [K] -> images [B,ch,S,S].

    `parts` are the traced prompt encoder, noise predictor, guided DDIM step and decoder. The steps are an ONNX Loop;
    its body holds the UNet's weights, so that the CPU kernels fuse as in a plain graph. `swapped` {name: A or B} become
    inputs whose default, one rank of zeros, is the base (onnxruntime's Gemm refuses rank 0 itself)."""
    from onnx import TensorProto, helper, numpy_helper

    real, whole = TensorProto.FLOAT, TensorProto.INT64
    number = lambda name, value: numpy_helper.from_array(np.asarray(value), name)
    value = helper.make_tensor_value_info
    prompt, weights = renamed(parts["prompt"].graph, "prompt/")
    unet, inner = renamed(parts["unet"].graph, "unet/")
    step, more = renamed(parts["step"].graph, "step/")
    decode, last = renamed(parts["decoder"].graph, "decoder/")
    node = helper.make_node
    shape = ["batch", config["latent"], config["size"], config["size"]]
    body = helper.make_graph(
        [node("Unsqueeze", ["i", "zero"], ["place"]), node("Gather", ["timesteps", "place"], ["t"]),
         node("Gather", ["signal", "i"], ["alpha"]), node("Add", ["i", "one"], ["j"]),
         node("Gather", ["signal", "j"], ["previous"]), *unet, *step, node("Identity", ["go"], ["on"])],
        "ddim", [value("i", whole, []), value("go", TensorProto.BOOL, []), value("z", real, shape)],
        [value("on", TensorProto.BOOL, []), value("next", real, shape)],
        [*inner, *more, number("zero", np.zeros(1, np.int64)), number("one", np.int64(1))])
    outer = [*prompt, node("Gather", ["alphas", "timesteps"], ["noisy"]),
             node("Concat", ["noisy", "clean"], ["signal"], axis=0), node("Shape", ["timesteps"], ["length"]),
             node("Squeeze", ["length"], ["count"]),
             node("Loop", ["count", "", "noise"], ["latents"], body=body), *decode]
    # after the last step nothing is noise: a = 1
    weights += [*last, number("alphas", alphas.numpy().astype(np.float32)), number("clean", np.ones(1, np.float32))]
    inputs = [value("noise", real, shape), value("ids", whole, ["batch", "words"]), value("guidance", real, []),
              value("timesteps", whole, ["steps"])]
    for name, example in swapped.items():
        symbolic = list(example.shape)
        symbolic[rank_axis(name, example)] = f"rank {name[:-2]}"
        inputs.append(value(name, real, symbolic))
        weights.append(number(name, np.zeros([1 if isinstance(n, str) else n for n in symbolic], np.float32)))
    size, channels = vae_config["image_size"], vae_config["channels"]
    images = [value("images", real, ["batch", channels, size, size])]
    graph = helper.make_graph(outer, "sampler", inputs, images, weights)
    opset = [helper.make_opsetid("", OPSET)]
    return helper.make_model(graph, opset_imports=opset, ir_version=parts["prompt"].ir_version)


def rank_axis(name, value):
    """Which axis of an A or B counts ranks: A of a Linear is [d_in,r]; A of a convolution [r,...] and B [r,d_out]."""
    return 1 if name.endswith(".A") and value.ndim == 2 else 0


def traced_parts(model, vae, config, swapped):
    """The four traced graphs of `sampler_model`; with `swapped`, A and B of the adapters are inputs of theirs."""
    import torch

    from minilora import diffusion

    L, s, P = config["latent"], config["size"], config["positions"]

    class Part(torch.nn.Module):
        """A function of a module, whose named weights come as inputs behind the others."""

        def __init__(self, module, function, names=()):
            super().__init__()
            self.module, self.function, self.names = module, function, names
            for name in names:  # torch.func.functional_call does not trace
                layer, _, weight = name.rpartition(".")
                del module.get_submodule(layer)._parameters[weight]

        def forward(self, *inputs):
            plain = inputs[: len(inputs) - len(self.names)]
            for name, value in zip(self.names, inputs[len(plain):]):
                layer, _, weight = name.rpartition(".")
                setattr(self.module.get_submodule(layer), weight, value)
            return self.function(self.module, *plain)

    def prompt(text, ids):
        return text(torch.cat([ids, diffusion.null_prompt(ids)]))  # [2B,P,Dt], [2B,1,1,P]

    def unet(predict, z, t, words, bias):
        return predict(torch.cat([z, z]), t, words, bias)  # [2B,L,s,s]

    def step(_, z, both, alpha, previous, guidance):
        conditional, null = both.reshape(2, -1, L, s, s).unbind(0)
        return diffusion.ddim_step(z, null + guidance * (conditional - null), alpha, previous)

    z, ids = torch.randn(2, L, s, s), torch.full((2, P), 3)
    words, bias = torch.randn(4, P, model.text.config["width"]), torch.zeros(4, 1, 1, P)
    one, batch = torch.tensor(0.5), {0: "batch"}
    own = {part: {n: v for n, v in swapped.items() if n.startswith(part + ".")} for part in ("text", "unet")}
    names = {part: [n.removeprefix(part + ".") for n in values] for part, values in own.items()}
    ranks = {n: {rank_axis(n, v): f"rank {n[:-2]}"} for n, v in swapped.items()}
    two = {"words": {0: "two", 1: "length"}, "bias": {0: "two", 3: "length"}}
    return {
        "prompt": trace(Part(model.text, prompt, names["text"]), {"ids": ids} | own["text"], ["words", "bias"],
                        {"ids": {0: "batch", 1: "length"}, **two, **ranks}),
        "unet": trace(Part(model.unet, unet, names["unet"]),
                      {"z": z, "t": torch.tensor([500]), "words": words, "bias": bias} | own["unet"], ["both"],
                      {"z": batch, "both": {0: "two"}, **two, **ranks}),
        "step": trace(Part(torch.nn.Identity(), step), {
            "z": z, "both": torch.cat([z, z]), "alpha": one, "previous": one, "guidance": one}, ["next"],
            {"z": batch, "both": {0: "two"}, "next": batch}),
        "decoder": trace(Part(vae.decoder, lambda _, z: vae.decode(z).clamp(-1, 1)), {"latents": z}, ["images"],
                         {"latents": batch, "images": batch})}


def load_selora(run, method=None, seed=None):
    """(content of RUN/model.pt with the chosen adapter, the base with that adapter in place, its autoencoder)."""
    from minilora import checkpoint, selora
    from minilora.unet import Denoiser
    from minilora.vae import VAE

    saved = checkpoint.load(Path(run) / "model.pt", "selora")
    adapter = saved["adapter"] = chosen_adapter(run, saved, method, seed)
    if adapter["base_hash"] != saved["base_hash"]:
        raise Refused(f"{run}: the adapter is for base {adapter['base_hash']}, the run has {saved['base_hash']}")
    if adapter["rule"] in ("unadapted", "full"):
        raise Refused(f"{run}: '{adapter['method']}' is a reference without an adapter; name another --method")
    model, vae = Denoiser(**saved["config"]), VAE(**saved["vae_config"])
    model.load_state_dict(saved["base"])
    vae.load_state_dict(saved["vae"])
    selora.inject(model, saved["targets"] or None, 0, saved["capacity"])
    selora.load_adapter(model, adapter["state"])
    return saved, model.eval(), vae.eval()


def export_selora(run, out=None, method=None, seed=None, fp16=False, hot_swap=None, name=None):
    """Write RUN/onnx: sampler.onnx (words to image in one run), denoise.onnx (one prediction of the noise), golden
    outputs, manifest; the adapter is merged. With `hot_swap`, a folder, add this run's adapter to it as a file, and the
    base sampler if it is not there yet. Returns the folder."""
    import torch

    from minilora import diffusion, selora

    saved, model, vae = load_selora(run, method, seed)
    config, adapter = saved["config"], saved["adapter"]
    alphas = diffusion.alphas_cumprod(kind=saved["schedule"])
    manifest = {"format": 1, "kind": "selora", "image_size": saved["vae_config"]["image_size"],
                "channels": saved["vae_config"]["channels"], "latent": config["latent"], "latent_size": config["size"],
                "buckets": config["buckets"], "positions": config["positions"], "tokenizer": "crc32",
                "schedule": saved["schedule"], "timesteps": len(alphas), "precision": "float16" if fp16 else "float32",
                "base": saved["base_hash"], "data": saved["data"], "synthetic": saved["synthetic"],
                "synthetic_notes": saved["synthetic_notes"]}
    if hot_swap:
        return add_adapter(Path(hot_swap), name or Path(run).name, manifest, model, vae, alphas, config, saved)
    rng, n, out = np.random.default_rng(16), 3, Path(out or Path(run) / "onnx")
    golden = golden_sampler(rng, n, config, alphas)
    selora.merge(model)
    with new_folder(out) as work:
        half = to_half if fp16 else lambda graph: graph
        parts = traced_parts(model, vae, config, {})
        # the DDIM step stays in float32: it divides by sqrt(a); and the converter would break a Loop that stands
        parts |= {k: half(parts[k]) for k in ("prompt", "unet", "decoder")}
        about = {"kind": "selora", "method": adapter["method"]}
        write_graph(sampler_model(parts, alphas, config, saved["vae_config"], {}), work / "sampler.onnx", about)
        inputs = {k: torch.from_numpy(golden[k]) for k in ("z", "t", "ids")}
        symbols = {"z": {0: "batch"}, "t": {0: "batch"}, "ids": {0: "batch", 1: "words"}, "eps": {0: "batch"}}
        write_graph(half(trace(model, inputs, ["eps"], symbols)), work / "denoise.onnx", about)
        golden |= torch_answers(model, vae, alphas, golden)
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        manifest |= {"method": adapter["method"], "seed": adapter["seed"], "ranks": adapter["ranks"], "adapters": {},
                     "graphs": {"sampler": "sampler.onnx", "denoise": "denoise.onnx"}}
        finish(work, out, manifest)
    return out


def golden_sampler(rng, n, config, alphas):
    """Inputs of the golden runs of a sampler: numpy, from a fixed seed."""
    ids = rng.integers(3, config["buckets"], (n, config["positions"]))
    ids[:, 0] = data.CLS
    ids[np.arange(config["positions"]) >= np.arange(1, n + 1)[:, None] * config["positions"] // n] = data.PAD
    draw = lambda: rng.standard_normal((n, config["latent"], config["size"], config["size"])).astype(np.float32)
    return {"noise": draw(), "ids": ids, "guidance": np.float32(2), "timesteps": serve.walk(10, len(alphas)),
            "z": draw(), "t": rng.integers(0, len(alphas), n)}


def torch_answers(model, vae, alphas, golden, name=""):
    """{'images NAME', 'eps NAME'}: what torch makes of golden inputs."""
    import torch

    from minilora import diffusion

    given = {k: torch.from_numpy(np.asarray(v)) for k, v in golden.items() if " " not in k}
    with torch.no_grad():
        steps, guidance = len(given["timesteps"]), float(given["guidance"])
        z = diffusion.sample(model, given["noise"], given["ids"], steps, guidance, alphas)
        return {f"images {name}".strip(): vae.decode(z).clamp(-1, 1).numpy(),
                f"eps {name}".strip(): model(given["z"], given["t"], given["ids"]).numpy()}


def add_adapter(folder, name, manifest, model, vae, alphas, config, saved):
    """Put NAME.onnx_adapter into a hot-swap folder, which is made with the base's sampler if it is not there."""
    import onnx
    import onnxruntime
    import torch

    from minilora import selora

    if not re.fullmatch(r"[\w.+-]+", name) or name in ("", ".", "..", "base"):
        raise Refused(f"adapter name '{name}' must be of letters, digits and _.+-, and not 'base'; use --name")
    there = None
    if (folder / "manifest.json").is_file():
        there = serve.read_manifest(folder, "selora")
        if "sampler" not in there["graphs"] or "base" not in there["adapters"]:
            raise Refused(f"{folder}: holds a merged export, not a hot-swap folder; choose another")
        if there["base"] != manifest["base"]:
            raise Refused(f"{folder}: holds base {there['base']}; the run's adapter is for base {manifest['base']}")
        if name in there["adapters"]:
            raise Refused(f"{folder}: has an adapter '{name}' already; name this one with --name")
    with new_folder(folder) as work:
        if there:
            for file in there["files"]:
                shutil.copyfile(folder / file, work / file)
            manifest, golden = {k: v for k, v in there.items() if k != "sha256"}, data.read_npz(work / "golden.npz")
        else:
            golden = golden_sampler(np.random.default_rng(16), 3, config, alphas)
            plain = copy.deepcopy(model)
            for layer in selora.adapters(plain).values():  # an `active` that fits any rank; the scale goes into B
                layer.active, layer.scale = torch.ones(1, 1), 1.0
            swapped = {f"{n}.{p}": getattr(layer, p).detach().narrow(layer.axis if p == "A" else 0, 0, 2)
                       for n, layer in selora.adapters(plain).items() for p in "AB"}
            about = {"kind": "selora", "method": "base"}
            parts = traced_parts(plain, vae, config, swapped)
            sampler = sampler_model(parts, alphas, config, saved["vae_config"], swapped)
            write_graph(sampler, work / "sampler.onnx", about)
            base = copy.deepcopy(model)
            for layer in selora.adapters(base).values():
                layer.B.data.zero_()
            golden |= {"images base": torch_answers(base, vae, alphas, golden)["images"]}
            manifest |= {"graphs": {"sampler": "sampler.onnx"}, "adapters": {"base": None}, "ranks": {}}
        arrays = {}
        for n, state in selora.adapter_state(model).items():
            A, B = state["A"], state["scale"] * state["B"]
            if not len(B):  # a layer of rank 0
                shape = [size or 1 for size in A.shape]
                A, B = torch.zeros(shape), torch.zeros(1, B.shape[1])
            arrays |= {f"{n}.A": A.numpy(), f"{n}.B": B.numpy()}
        model_inputs = {i.name for i in onnx.load(work / "sampler.onnx").graph.input}
        if foreign := arrays.keys() - model_inputs:
            raise Refused(f"{folder}: its sampler has no adapter on layer '{min(foreign)[:-2]}'; the run used other "
                          "--targets, so give it a folder of its own")
        file = onnxruntime.AdapterFormat()
        file.set_adapter_version(1)
        file.set_model_version(1)
        values = {k: onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v)) for k, v in arrays.items()}
        file.set_parameters(values)
        file.export_adapter(str(work / f"{name}.onnx_adapter"))
        golden |= {f"images {name}": torch_answers(model, vae, alphas, golden)["images"]}
        manifest["adapters"][name] = {"file": f"{name}.onnx_adapter", "method": saved["adapter"]["method"],
                                      "seed": saved["adapter"]["seed"], "ranks": saved["adapter"]["ranks"]}
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        finish(work, folder, manifest)
    return folder


FORMATS = ("peft", "diffusers", "kohya")


def export_adapter(run, out, format="peft", method=None, seed=None):
    """Write a run's SeLoRA adapter for other tools into a new folder: `minilora/interchange.py`. Returns the folder."""
    from minilora import interchange

    _, model, _ = load_selora(run, method, seed)
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"--out {out}: exists and is not an empty folder")
    with new_folder(out) as work:
        try:
            getattr(interchange, f"save_{format}")(model, work)
        except ValueError as error:
            raise Refused(str(error)) from None
    return out


# ---------------------------------------------------------------------------------------------------------------- speed


def bench(folder, device="auto", rounds=20):
    """Print latency and throughput of every graph at batch 1, 8 and 64, beside torch eager where torch and the run's
    checkpoint (FOLDER/../model.pt) are there; medians of interleaved rounds. Writes nothing."""
    served = {"mora": serve.Diagnoser, "selora": serve.Synthesizer}[serve.own_manifest(folder)["kind"]](folder, device)
    golden, m = data.read_npz(Path(folder) / "golden.npz"), served.manifest
    peers = eager(Path(folder), served)
    print(f"{folder}: provider {served.provider}, {m['precision']}; torch eager beside it: "
          f"{'yes' if peers else 'no (needs torch and the model.pt of the run beside the folder)'}")
    print(f"{'graph':24s}{'batch':>6s}{'ms':>10s}{'samples/s':>12s}" + f"{'eager ms':>12s}{'ratio':>8s}" * bool(peers))
    for name, run in graph_runs(served, golden, device):
        for B in (1, 8, 64):
            rows, times = np.arange(B) % 3, ([], [])
            calls = [lambda run=run, rows=rows: run(rows)]
            if name in peers:
                calls.append(lambda name=name, rows=rows: peers[name](golden, rows))
            for i in range(rounds + 2):
                for call, kept in zip(calls, times):
                    began = time.perf_counter()
                    call()
                    if i > 1:
                        kept.append((time.perf_counter() - began) * 1e3)
            ours, theirs = np.median(times[0]), np.median(times[1]) if times[1] else None
            line = f"{name:24s}{B:6d}{ours:10.2f}{B / ours * 1e3:12.0f}"
            print(line + (f"{theirs:12.2f}{ours / theirs:8.2f}" if theirs else ""), flush=True)


def graph_runs(served, golden, device):
    """(graph, a function of rows of the golden inputs) for each graph of a folder."""
    golden_of = serve.golden_mora if served.manifest["kind"] == "mora" else serve.golden_selora
    return [(name, run) for name, run, _ in golden_of(served, golden, device)]


def eager(folder, served):
    """{graph: function (golden inputs, rows)} of the unmerged model in torch, on the CPU; {} where it is not there."""
    try:
        import torch
    except ImportError:
        return {}
    run, m = folder.resolve().parent, served.manifest
    if served.provider != "CPUExecutionProvider" or not (run / "model.pt").is_file():
        return {}
    tensors = lambda golden, rows, names: [torch.from_numpy(golden[n][rows]) for n in names]
    if m["kind"] == "mora":
        from minilora.mora import gates

        saved, model = load_run(run, m["method"], m["seed"])
        model.eval()

        def diagnose(row, golden, rows):
            present = tensors(golden, rows, ["present"])[0] if row is None else torch.tensor([row] * len(rows)).float()
            with torch.no_grad():
                return model(dict(zip(m["modalities"], tensors(golden, rows, m["modalities"]))), present,
                             gates(m["method"], present))

        patterns = {data.pattern_name(p, m["modalities"]): p
                    for p in itertools.product((1, 0), repeat=len(m["modalities"])) if any(p)}
        return {name: partial(diagnose, patterns.get(name)) for name in m["graphs"]}
    from minilora import diffusion

    saved, model, vae = load_selora(run, m["method"], m["seed"]) if not m["adapters"] else (None, None, None)
    if model is None:
        return {}
    alphas = diffusion.alphas_cumprod(kind=m["schedule"])

    def draw(golden, rows):
        with torch.no_grad():
            noise, ids = tensors(golden, rows, ["noise", "ids"])
            steps, guidance = len(golden["timesteps"]), float(golden["guidance"])
            return vae.decode(diffusion.sample(model, noise, ids, steps, guidance, alphas)).clamp(-1, 1)

    def denoise(golden, rows):
        with torch.no_grad():
            return model(*tensors(golden, rows, ["z", "t", "ids"]))

    return {"sampler": draw, "denoise": denoise}


# ------------------------------------------------------------------------------------------------------------- commands


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in ([name] for name in serve.COMMANDS):
        return serve.main(argv)
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for kind in ("mora", "selora"):
        p = commands.add_parser(kind, help=f"freeze a run of train_{kind}.py")
        p.add_argument("run", type=Path, help="run folder")
        p.add_argument("--method", help="instead of the method that the run kept")
        p.add_argument("--seed", type=int, help="instead of the seed that the run kept")
        p.add_argument("--out", type=Path, help="folder to write (default: RUN/onnx)")
        p.add_argument("--fp16", action="store_true", help="float16 inside; inputs and outputs stay float32")
    p.add_argument("--hot-swap", type=Path, metavar="FOLDER", help="add the adapter to FOLDER, beside its base")
    p.add_argument("--name", help="with --hot-swap: the adapter's name (default: the run folder's)")
    p = commands.add_parser("peft", help="write a run's SeLoRA adapter for PEFT, diffusers or kohya")
    p.add_argument("run", type=Path, help="run folder of train_selora.py")
    p.add_argument("--out", type=Path, required=True, help="new folder to write")
    p.add_argument("--format", choices=FORMATS, default="peft", help="whose file (default: peft)")
    p.add_argument("--method", help="instead of the method that the run kept")
    p.add_argument("--seed", type=int, help="instead of the seed that the run kept")
    p = commands.add_parser("bench", help="latency and throughput of every graph, beside torch eager where it is there")
    p.add_argument("folder", type=Path, help="what this script wrote, for example runs/mora/onnx")
    p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    for name, what in serve.COMMANDS.items():
        commands.add_parser(name, help=f"{what}; see `export.py {name} --help`")
    args = parser.parse_args(argv)
    with data.one_line_errors():
        if args.command == "bench":
            return bench(args.folder, args.device)
        if args.command == "peft":
            out = export_adapter(args.run, args.out, args.format, args.method, args.seed)
            return print(f"{args.format} adapter: {out}")
        if args.command == "mora":
            out = export_mora(args.run, args.out, args.method, args.seed, args.fp16)
        else:
            if args.name and not args.hot_swap:
                raise Refused("--name is the name of an adapter in a --hot-swap FOLDER: give the folder too")
            if args.hot_swap and (args.fp16 or args.out):
                raise Refused("--hot-swap FOLDER is where the files go, in float32: leave out --out and --fp16")
            out = export_selora(args.run, args.out, args.method, args.seed, args.fp16, args.hot_swap, args.name)
        then = "predict" if args.command == "mora" else "sample"
        print(f"exported to {out}; try: python export.py {then} {out} --help")


if __name__ == "__main__":
    main()
