"""Freeze a run of train_selora.py into ONNX graphs, the whole sampler in one.

SeLoRA's expanded ranks are merged into the weights, so its graphs are those of the base. For
hot-swapping the adapters are inputs instead: one base, and one adapter file per run. Skip this file
when you read for the method.

Letters: B batch, L latent channels, s latent size, P word positions, ch image channels, S image size,
K steps, r rank.
"""

import copy
import re
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from onnx import TensorProto, load
from onnx.helper import make_graph, make_model, make_node, make_opsetid, make_tensor_value_info
from onnx.numpy_helper import from_array
from torch import nn

from minilora import data, diffusion, selora, serve
from minilora.data import Refused
from minilora.graphs import OPSET, Weights, finish, new_folder, pad, to_half, trace, write_graph
from minilora.models import WORDS, load_selora


def export_selora(run, out=None, method=None, seed=None, fp16=False, hot_swap=None, name=None):
    """Write RUN/onnx: sampler.onnx (words to image in one run), denoise.onnx (one prediction of the
    velocity), golden outputs, manifest; the adapter is merged. With `hot_swap`, a folder, add this
    run's adapter to it as a file, and the base sampler if it is not there yet. Returns the folder.
    """
    saved, model, vae = load_selora(run, method, seed)
    if hot_swap:
        return add_adapter(Path(hot_swap), name or Path(run).name, saved, model, vae)
    out = Path(out or Path(run) / "onnx")
    adapter = saved["adapter"]
    alphas = diffusion.alphas_cumprod(noisier=saved["noisier"])
    golden = golden_sampler(saved, len(alphas))
    selora.merge(model)
    with new_folder(out) as work:
        weights = Weights(work)
        parts = traced_parts(saved, model, vae, {})
        inputs = {name: torch.from_numpy(golden[name]) for name in ("z", "t", "ids")}
        axes = {name: {0: "batch"} for name in ("z", "t", "ids", "velocity")}
        axes["ids"][1] = "words"
        denoise = trace(model, inputs, ["velocity"], axes)
        if fp16:
            # The DDIM step stays in float32. In float16 the latent, whose values are about 1, would
            # be rounded at every step, which adds up to .005 in 50 steps and .08 in 1000. The parts
            # are converted one by one, since the converter would break a Loop that stands.
            for part in ("text", "unet", "decoder"):
                parts[part] = to_half(parts[part])
            denoise = to_half(denoise)
        metadata = {"kind": "selora", "method": adapter["method"]}
        sampler = sampler_model(parts, saved, alphas, {})
        write_graph(sampler, work / "sampler.onnx", metadata)
        weights.lend(work / "sampler.onnx", sampler)
        write_graph(denoise, work / "denoise.onnx", metadata, weights)
        golden |= torch_answers(model, vae, alphas, golden)
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        manifest = described(saved, len(alphas), "float16" if fp16 else "float32") | {
            "method": adapter["method"],
            "seed": adapter["seed"],
            "ranks": adapter["ranks"],
            "adapters": {},
            "weights": weights.table,
            "graphs": {"sampler": "sampler.onnx", "denoise": "denoise.onnx"},
        }
        finish(work, out, manifest)
    return out


def described(saved, timesteps, precision):
    """What the manifest says of a run and its base; the schedule has `timesteps`."""
    config = saved["config"]
    return {
        "format": max(serve.FORMATS["selora"]),
        "kind": "selora",
        "image_size": saved["vae_config"]["image_size"],
        "channels": saved["vae_config"]["channels"],
        "latent": config["latent"],
        "latent_size": config["size"],
        "buckets": config["buckets"],
        "positions": config["positions"],
        "tokenizer": saved.get("tokenizer", "crc32"),
        "prepared": saved.get("prepared", {}),
        "prediction": "velocity",
        "noisier": saved["noisier"],
        "timesteps": timesteps,
        "precision": precision,
        "base": saved["base_hash"],
        "data": saved["data"],
        "synthetic": saved["synthetic"],
        "synthetic_notes": saved["synthetic_notes"],
    }


# ---- golden outputs


def golden_sampler(saved, schedule, n=3):
    """Inputs of the golden runs of a run's sampler: numpy, from a fixed seed; `schedule` timesteps."""
    rng = np.random.default_rng(16)
    config = saved["config"]
    size = saved["vae_config"]["image_size"]
    images = (n, saved["vae_config"]["channels"], size, size)
    latents = (n, config["latent"], config["size"], config["size"])
    ids = rng.integers(3, config["buckets"], (n, config["positions"]))
    pad(ids, np.arange(1, n + 1) * config["positions"] // n)
    return {
        "noise": rng.standard_normal(latents).astype(np.float32),
        "grain": rng.standard_normal(images).astype(np.float32),
        "ids": ids,
        "guidance": np.float32(3),
        "timesteps": serve.walk(10, schedule),
        "z": rng.standard_normal(latents).astype(np.float32),
        "t": rng.integers(0, schedule, n),
    }


@torch.no_grad()
def torch_answers(model, vae, alphas, golden):
    """{"images" [n,ch,S,S], "velocity" [n,L,s,s]}: what torch makes of golden inputs."""
    names = ("noise", "grain", "ids", "z", "t")
    noise, grain, ids, z, t = (torch.from_numpy(golden[name]) for name in names)
    steps = len(golden["timesteps"])
    latents = diffusion.sample(model, noise, ids, steps, float(golden["guidance"]), alphas)
    return {
        "images": vae.decode(latents, grain).clamp(-1, 1).numpy(),
        "velocity": model(z, t, ids).numpy(),
    }


# ---- the sampler's graph


class Part(nn.Module):
    """A function of tensors that calls a module, a part of the model. The model's weights of these
    names come as inputs behind the others.
    """

    def __init__(self, module, function, model, names):
        super().__init__()
        self.module = module
        self.function = function
        self.weights = []  # [(layer, attribute)]
        for name in names:  # torch.func.functional_call does not trace
            path, _, attribute = name.rpartition(".")
            layer = model.get_submodule(path)
            del layer._parameters[attribute]
            self.weights.append((layer, attribute))

    def forward(self, *inputs):
        own = len(inputs) - len(self.weights)
        for (layer, attribute), value in zip(self.weights, inputs[own:]):
            setattr(layer, attribute, value)
        return self.function(*inputs[:own])


def traced_parts(saved, model, vae, swapped):
    """The four traced graphs of `sampler_model`; with `swapped`, A and B of the adapters are inputs
    of theirs.
    """
    L = saved["config"]["latent"]
    s = saved["config"]["size"]
    P = saved["config"]["positions"]
    axes = {
        "ids": {0: "batch", 1: "length"},
        "words": {0: "two", 1: "length"},
        "bias": {0: "two", 3: "length"},
        "z": {0: "batch"},
        "both": {0: "two"},
        "next": {0: "batch"},
        "latents": {0: "batch"},
        "grain": {0: "batch"},
        "images": {0: "batch"},
    }
    for name, value in swapped.items():
        axis = rank_axis(name, value)
        axes[name] = {} if axis is None else {axis: f"rank {name[:-2]}"}

    def encode(ids):
        return model.text(torch.cat([ids, diffusion.null_prompt(ids)]))  # [2B,P,Dt], [2B,1,1,P]

    def predict(z, t, tokens, bias):
        return model.unet(torch.cat([z, z]), t, tokens, bias)  # [2B,L,s,s]

    def step(z, both, alpha, previous, guidance):
        return diffusion.ddim_step(z, diffusion.guide(both, guidance, alpha), alpha, previous)

    def decode(latents, grain):
        return vae.decode(latents, grain).clamp(-1, 1)  # [B,ch,S,S]

    def traced(part, module, function, inputs, outputs):
        own = {name: value for name, value in swapped.items() if name.startswith(f"{part}.")}
        return trace(Part(module, function, model, own), inputs | own, outputs, axes)

    z = torch.randn(2, L, s, s)
    both = torch.cat([z, z])
    number = torch.tensor(0.5)
    ids = torch.full((2, P), 3)
    denoised = {
        "z": z,
        "t": torch.tensor([500]),
        "words": torch.randn(4, P, saved["config"]["text_width"]),
        "bias": torch.zeros(4, 1, 1, P),
    }
    stepped = {"z": z, "both": both, "alpha": number, "previous": number, "guidance": number}
    decoded = {"latents": z, "grain": torch.randn(2, *vae.image_shape)}
    return {
        "text": traced("text", model.text, encode, {"ids": ids}, ["words", "bias"]),
        "unet": traced("unet", model.unet, predict, denoised, ["both"]),
        "step": traced("step", nn.Identity(), step, stepped, ["next"]),
        "decoder": traced("decoder", vae, decode, decoded, ["images"]),
    }


def rank_axis(name, value):
    """Which axis of an input counts ranks: A of a Linear is [d_in,r]; A of a convolution [r,...] and
    B [r,d_out]; the words' vectors have none.
    """
    if name == WORDS:
        return None
    return 1 if name.endswith(".A") and value.ndim == 2 else 0


def renamed(graph, prefix):
    """(nodes, initializers) of a copy of a traced graph, every name prefixed but for those of its
    inputs and outputs.
    """
    graph = copy.deepcopy(graph)
    kept = {"", *(value.name for value in [*graph.input, *graph.output])}

    def new(name):
        return name if name in kept else prefix + name

    for node in graph.node:
        node.name = prefix + node.name
        node.input[:] = map(new, node.input)
        node.output[:] = map(new, node.output)
    for weight in graph.initializer:
        weight.name = new(weight.name)
    return graph.node, graph.initializer


def real(name, shape):
    """A float32 input or output of a graph."""
    return make_tensor_value_info(name, TensorProto.FLOAT, shape)


def whole(name, shape):
    """An int64 input or output of a graph."""
    return make_tensor_value_info(name, TensorProto.INT64, shape)


def sampler_model(parts, saved, alphas, swapped):
    """One ONNX model: noise [B,L,s,s], grain [B,ch,S,S], ids [B,P], guidance [], timesteps [K] ->
    images [B,ch,S,S].

    `parts` are the traced prompt encoder, UNet, guided DDIM step and decoder. Noise and grain are
    normal(0, 1); the decoder multiplies the grain by its standard deviation per channel. The steps
    are an ONNX Loop; its body holds the UNet's weights, so that the CPU kernels fuse as in a plain
    graph: with weights of the graph around it, a step takes 1.4 times as long. `swapped` {name: A, B or the words' vectors} become inputs whose default is the base: one
    rank of zeros (onnxruntime's Gemm refuses rank 0 itself), and the base's words.
    """
    encode, weights = renamed(parts["text"].graph, "prompt/")
    decode, decoder_weights = renamed(parts["decoder"].graph, "decoder/")
    size = saved["config"]["size"]
    latents = ["batch", saved["config"]["latent"], size, size]  # [B,L,s,s]
    size = saved["vae_config"]["image_size"]
    pixels = ["batch", saved["vae_config"]["channels"], size, size]  # [B,ch,S,S]
    body = loop_body(parts, latents)
    nodes = [
        *encode,
        make_node("Gather", ["alphas", "timesteps"], ["noisy"]),
        make_node("Concat", ["noisy", "clean"], ["signal"], axis=0),
        make_node("Shape", ["timesteps"], ["length"]),
        make_node("Squeeze", ["length"], ["count"]),
        make_node("Loop", ["count", "", "noise"], ["latents"], body=body),
        *decode,
    ]
    weights = [
        *weights,
        *decoder_weights,
        from_array(alphas.numpy().astype(np.float32), "alphas"),
        from_array(np.ones(1, np.float32), "clean"),  # after the last step nothing is noise: a = 1
    ]
    inputs = [
        real("noise", latents),
        real("grain", pixels),
        whole("ids", ["batch", "words"]),
        real("guidance", []),
        whole("timesteps", ["steps"]),
    ]
    for name, example in swapped.items():
        shape = list(example.shape)
        default = example.numpy()
        axis = rank_axis(name, example)
        if axis is not None:
            shape[axis] = 1
            default = np.zeros(shape, np.float32)
            shape[axis] = f"rank {name[:-2]}"
        weights.append(from_array(default, name))
        inputs.append(real(name, shape))
    graph = make_graph(nodes, "sampler", inputs, [real("images", pixels)], weights)
    opset = make_opsetid("", OPSET)
    return make_model(graph, opset_imports=[opset], ir_version=parts["text"].ir_version)


def loop_body(parts, latents):
    """One DDIM step as the body of an ONNX Loop: (i, go, z [B,L,s,s]) -> (on, next [B,L,s,s])."""
    predict, unet_weights = renamed(parts["unet"].graph, "unet/")
    step, step_weights = renamed(parts["step"].graph, "step/")
    nodes = [
        make_node("Unsqueeze", ["i", "zero"], ["place"]),
        make_node("Gather", ["timesteps", "place"], ["t"]),
        make_node("Gather", ["signal", "i"], ["alpha"]),
        make_node("Add", ["i", "one"], ["j"]),
        make_node("Gather", ["signal", "j"], ["previous"]),
        *predict,
        *step,
        make_node("Identity", ["go"], ["on"]),
    ]
    go = make_tensor_value_info("go", TensorProto.BOOL, [])
    on = make_tensor_value_info("on", TensorProto.BOOL, [])
    weights = [
        *unet_weights,
        *step_weights,
        from_array(np.zeros(1, np.int64), "zero"),
        from_array(np.array(1, np.int64), "one"),
    ]
    inputs = [whole("i", []), go, real("z", latents)]
    return make_graph(nodes, "ddim", inputs, [on, real("next", latents)], weights)


# ---- hot-swapping


def add_adapter(folder, name, saved, model, vae):
    """Put NAME.onnx_adapter into a hot-swap folder, which is made with the base's sampler if it is
    not there.
    """
    alphas = diffusion.alphas_cumprod(noisier=saved["noisier"])
    manifest = swap_manifest(folder, name, saved)
    file = f"{name}.onnx_adapter"
    with new_folder(folder) as work:
        if manifest is None:
            manifest = described(saved, len(alphas), "float32") | {
                "graphs": {"sampler": "sampler.onnx"},
                "adapters": {"base": None},
                "ranks": {},
            }
            golden = golden_sampler(saved, len(alphas))
            golden["images base"] = write_base(
                work / "sampler.onnx", saved, copy.deepcopy(model), vae, alphas, golden
            )
        else:
            for copied in manifest["files"]:
                shutil.copyfile(folder / copied, work / copied)
            del manifest["sha256"]
            golden = data.read_npz(work / "golden.npz")
        values = adapter_inputs(model)
        sampler = load(work / "sampler.onnx", load_external_data=False)
        foreign = values.keys() - {value.name for value in sampler.graph.input}
        if foreign:
            raise Refused(f"{folder}: its sampler has no adapter on layer '{min(foreign)[:-2]}'; "
                          "the run used other --targets, so give it a folder of its own")
        adapter = onnxruntime.AdapterFormat()
        adapter.set_adapter_version(1)
        adapter.set_model_version(1)
        adapter.set_parameters(values)
        adapter.export_adapter(str(work / file))
        golden[f"images {name}"] = torch_answers(model, vae, alphas, golden)["images"]
        manifest["adapters"][name] = {
            "file": file,
            "method": saved["adapter"]["method"],
            "seed": saved["adapter"]["seed"],
            "ranks": saved["adapter"]["ranks"],
        }
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        finish(work, folder, manifest)
    return folder


def swap_manifest(folder, name, saved):
    """The manifest of a hot-swap folder that can take an adapter of this name of a saved run, or
    None if there is no folder yet; `Refused` if it cannot.
    """
    base = saved["base_hash"]
    if not re.fullmatch(r"[\w.+-]+", name) or name in (".", "..", "base"):
        raise Refused(f"adapter name '{name}' must be of letters, digits and _.+-, and not 'base'; "
                      "use --name")
    if not (folder / "manifest.json").is_file():
        return None
    manifest = serve.read_manifest(folder, "selora")
    if "sampler" not in manifest["graphs"] or "base" not in manifest["adapters"]:
        raise Refused(f"{folder}: holds a merged export, not a hot-swap folder; choose another")
    if manifest["base"] != base:
        raise Refused(f"{folder}: holds base {manifest['base']}; "
                      f"the run's adapter is for base {base}")
    words = {"prepared": saved.get("prepared", {}), "tokenizer": saved.get("tokenizer", "crc32")}
    for key, value in words.items():
        if manifest.get(key, {} if key == "prepared" else "crc32") != value:
            raise Refused(f"{folder}: its adapters were trained on notes that were prepared "
                          f"otherwise ('{key}' differs); give this run a folder of its own")
    if name in manifest["adapters"]:
        raise Refused(f"{folder}: has an adapter '{name}' already; name this one with --name")
    return manifest


def write_base(path, saved, model, vae, alphas, golden):
    """Write the base's sampler, with A and B of every adapted layer and the words' vectors as
    inputs; returns what torch draws with it. The model is taken apart.
    """
    model.load_state_dict({WORDS: saved["base"][WORDS]}, strict=False)
    swapped = {WORDS: model.text.words.weight.detach()}
    for name, layer in selora.adapters(model).items():
        layer.B.data.zero_()
        layer.active = torch.ones(1, 1)  # fits any rank
        layer.scale = 1.0  # the file of an adapter holds scale . B
        swapped[f"{name}.A"] = layer.A.detach().narrow(layer.axis, 0, 2)
        swapped[f"{name}.B"] = layer.B.detach().narrow(0, 0, 2)
    images = torch_answers(model, vae, alphas, golden)["images"]
    parts = traced_parts(saved, model, vae, swapped)
    sampler = sampler_model(parts, saved, alphas, swapped)
    write_graph(sampler, path, {"kind": "selora", "method": "base"})
    return images


def adapter_inputs(model):
    """{name: A or scale . B} of every layer and the words' vectors, as the sampler takes them in
    onnxruntime."""
    words = model.text.words.weight.detach().numpy()
    values = {WORDS: onnxruntime.OrtValue.ortvalue_from_numpy(words)}
    for name, state in selora.adapter_state(model).items():
        A = state["A"]
        B = state["scale"] * state["B"]
        if not len(B):  # a layer of rank 0 gets one rank of zeros, which Gemm takes
            A = torch.zeros([size or 1 for size in A.shape])
            B = torch.zeros(1, B.shape[1])
        for part, value in (("A", A), ("B", B)):
            array = value.contiguous().numpy()
            values[f"{name}.{part}"] = onnxruntime.OrtValue.ortvalue_from_numpy(array)
    return values
