"""ONNX plumbing that both exports share: tracing, float16, weights that are stored once for all graphs
of a folder, a folder that is written whole or not at all, and its manifest. Skip it when you read
for a method.
"""

import hashlib
import io
import json
import os
import shutil
import warnings
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

from minilora import __version__, data, serve, words
from minilora.data import Refused

OPSET = 17
SMALL = 1024  # bytes; a smaller constant stays in its graph


class Weights:
    """The weights of a folder that is being written. Each array stands in it once, under a name made
    of what it holds, so that all graphs share it: in the file weights.bin, or in a graph that lends
    it. `.table` {name: {dtype, shape, file, offset}} goes into the manifest.

    A graph says of such a weight that it is elsewhere, but not where: the reader of the folder
    hands it to onnxruntime, after it has checked the file's hash."""

    def __init__(self, folder):
        self.path = folder / serve.WEIGHTS
        self.table = {}
        self.size = 0

    def form_of(self, array):
        """(name, {dtype, shape}) of a contiguous array."""
        form = {"dtype": str(array.dtype), "shape": list(array.shape)}
        content = hashlib.sha256(json.dumps(form).encode())
        content.update(array.tobytes() if array.ndim == 0 else array)
        return f"weight-{content.hexdigest()[:24]}", form

    def lend(self, path, model):
        """Let other graphs use the large weights that a written model holds itself."""
        content = path.read_bytes()
        for graph in graphs_in(model.graph):
            for weight in graph.initializer:
                if len(weight.raw_data) >= SMALL:
                    name, form = self.form_of(onnx.numpy_helper.to_array(weight))
                    offset = content.index(weight.raw_data)
                    self.table[name] = form | {"file": path.name, "offset": offset}

    def add(self, array):
        """The name of an array, which is written to the file unless the folder has it."""
        array = np.ascontiguousarray(array)
        name, form = self.form_of(array)
        if name not in self.table:
            self.table[name] = form | {"file": self.path.name, "offset": self.size}
            padded = -(-array.nbytes // 64) * 64  # every weight starts at a multiple of 64 bytes
            with open(self.path, "ab") as f:
                f.write(array.data)
                f.write(bytes(padded - array.nbytes))
            self.size += padded
        return name

    def move(self, model):
        """Move the large initializers of a model into the file."""
        graph = model.graph
        own = {value.name for value in graph.input}  # a default that a caller can replace stays
        arrays = {}
        for weight in graph.initializer:
            if weight.name not in own and len(weight.raw_data) >= SMALL:
                arrays[weight.name] = onnx.numpy_helper.to_array(weight)
        self.put(graph, arrays)

    def put(self, graph, arrays):
        """Let a graph use arrays {name: array} from the file, in place of what has these names."""
        new = {name: self.add(array) for name, array in arrays.items()}
        kept = [weight for weight in graph.initializer if weight.name not in arrays]
        there = {weight.name for weight in kept}
        del graph.initializer[:]
        graph.initializer.extend(kept)
        for name in sorted({*new.values()} - there):
            form = self.table[name]
            kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(form["dtype"]))
            elsewhere = onnx.TensorProto.EXTERNAL
            graph.initializer.add(name=name, data_type=kind, dims=form["shape"],
                                  data_location=elsewhere)
        rename(graph, new)


def graphs_in(graph):
    """A graph and those inside of it, the bodies of its loops."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs_in(attribute.g)


def rename(graph, new):
    """Give the inputs of a graph's nodes, and of the graphs inside of it, new names {old: new}."""
    for part in graphs_in(graph):
        for node in part.node:
            node.input[:] = [new.get(name, name) for name in node.input]


def trace(module, inputs, outputs, dynamic, weights=None):
    """The ONNX model of a module, traced with example inputs {name: tensor}; outputs: their names;
    dynamic: {name: {axis: symbol}}. With `weights`, a `Weights`, the module's own go there one by
    one: a large model does not stand in memory a second time.
    """
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # The dynamo exporter would need onnxscript; the tracer's shape warnings are meant.
        for category in (DeprecationWarning, torch.jit.TracerWarning, UserWarning):
            warnings.simplefilter("ignore", category)
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            buffer,
            input_names=list(inputs),
            output_names=outputs,
            opset_version=OPSET,
            dynamo=False,
            dynamic_axes=dynamic,
            export_params=False,  # the module's weights become inputs
            do_constant_folding=False,
        )
    model = onnx.load_from_string(buffer.getvalue())
    arrays = taken_weights(model.graph, module, inputs)
    if weights:
        weights.put(model.graph, arrays)
    else:
        for name, array in arrays.items():
            model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    return model


def taken_weights(graph, module, inputs):
    """{name: array} of a module's weights, which are inputs of a traced graph and are so no more. A
    Linear uses its weight transposed: that is done here, once.
    """
    own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    arrays = {}
    for value in list(graph.input):
        if value.name in own and value.name not in inputs:
            arrays[value.name] = own[value.name].detach().numpy()
            graph.input.remove(value)
    uses = Counter(name for node in graph.node for name in node.input)
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.input[0] not in arrays:
            continue
        name = node.input[0]
        axes = onnx.helper.get_node_attr_value(node, "perm")
        arrays[node.output[0]] = arrays[name].transpose(axes)  # a view, until it is written
        graph.node.remove(node)
        uses[name] -= 1
        if not uses[name]:
            del arrays[name]
    return arrays


def to_half(model):
    """Weights and arithmetic in float16, inputs and outputs as they were."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with warnings.catch_warnings():
        # Values below float16's smallest become that.
        warnings.simplefilter("ignore", UserWarning)
        model = OnnxModel(convert_float_to_float16(model, keep_io_types=True))
    model.topological_sort()  # the converter puts its casts last
    return model.model


def pad(ids, lengths):
    """Make word ids [N,P], in place, notes of these lengths [N], as `words.tokenize` makes them."""
    ids[:, 0] = words.CLS
    ids[np.arange(ids.shape[1]) >= lengths[:, None]] = words.PAD


def write_graph(model, path, metadata, weights=None):
    """Check an ONNX model whole and write it atomically; with `weights`, the folder's, its large
    initializers stand there."""
    if weights:
        weights.move(model)
    onnx.helper.set_model_props(model, metadata)
    check_whole(model)
    data.write_atomic(path, model.SerializeToString(deterministic=True))
    print(f"{path.name:32s} {path.stat().st_size / 1024:8.0f} KiB", flush=True)


def check_whole(model):
    """onnx's full check of a model. What is stored elsewhere counts as an input of its shape: the
    check would look for a file."""
    light = onnx.ModelProto()
    light.CopyFrom(model)
    elsewhere = [w for w in light.graph.initializer if w.data_location == onnx.TensorProto.EXTERNAL]
    for weight in elsewhere:
        value = onnx.helper.make_tensor_value_info(weight.name, weight.data_type, weight.dims)
        light.graph.input.append(value)
        light.graph.initializer.remove(weight)
    onnx.checker.check_model(light, full_check=True)


@contextmanager
def new_folder(out):
    """A folder to write into, which takes the place of `out` only when the block ended well: of an
    exported folder with nothing of anybody else's in it, or of an empty one.
    """
    out = Path(out).resolve()
    # What a process left that was killed between the two renames below.
    for kept in out.parent.glob(f".{out.name}.*.old"):
        if not out.exists():
            os.replace(kept, out)
    before = own_files(out)
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    work.mkdir(parents=True)
    try:
        yield work
        if own_files(out) != before:
            raise Refused(f"{out}: changed while this was written; run it again")
        # Renamed, not removed: the old export is never gone before the new one is there.
        if out.exists():
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
    """The manifest of an exported folder, or None of one that is empty or not there; `Refused` if
    it is another's.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return None
    if not (out / "manifest.json").is_file():
        raise Refused(f"{out}: exists and is not an exported folder; choose another --out")
    manifest = serve.own_manifest(out)
    others = {p.name for p in out.iterdir()} - {"manifest.json", *manifest["files"]}
    if others:
        raise Refused(f"{out}: holds {min(others)}, which no export wrote; "
                      "move it, or choose another --out")
    return manifest


def write_manifest(folder, manifest):
    """Write manifest.json: what is given, the hash of every file beside it, the versions, and its
    own hash.
    """
    if (folder / serve.WEIGHTS).exists():
        with open(folder / serve.WEIGHTS, "rb+") as f:
            os.fsync(f.fileno())  # every other file is written through as a whole
    names = sorted(p.name for p in folder.iterdir() if p.name != "manifest.json")
    versions = {
        "minilora": __version__,
        "torch": torch.__version__,
        "onnx": onnx.__version__,
        "numpy": np.__version__,
    }
    manifest |= {
        "files": {name: data.sha256(folder / name) for name in names},
        "opset": OPSET,
        "versions": versions,
    }
    manifest["sha256"] = data.digest({k: v for k, v in manifest.items() if k != "sha256"})
    data.write_atomic(folder / "manifest.json", json.dumps(manifest, indent=1) + "\n")


def finish(work, out, manifest):
    """Write the manifest, compare with torch, and state the parity in it; `Refused` if it is above
    the limit.
    """
    write_manifest(work, manifest)
    worst = serve.check(work, "cpu", spare=True)
    if worst > serve.tolerance(manifest):
        raise Refused(f"{out}: not written, the graphs differ from torch by {worst:.1e}")
    write_manifest(work, manifest | {"parity": float(f"{worst:.1e}")})
