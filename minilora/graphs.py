"""ONNX plumbing that both exports share: tracing, float16, a folder that is written whole or not at
all, and its manifest. Skip it when you read for a method.
"""

import io
import json
import os
import shutil
import warnings
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch

from minilora import __version__, data, serve, words
from minilora.data import Refused

OPSET = 17


def trace(module, inputs, outputs, dynamic):
    """The ONNX model of a module, traced with example inputs {name: tensor}; outputs: their names;
    dynamic: {name: {axis: symbol}}.
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
        )
    return onnx.load_from_string(buffer.getvalue())


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


def write_graph(model, path, metadata):
    """Check an ONNX model whole and write it atomically."""
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    data.write_atomic(path, model.SerializeToString(deterministic=True))
    print(f"{path.name:32s} {path.stat().st_size / 1024:8.0f} KiB", flush=True)


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
    worst = serve.check(work, "cpu")
    if worst > serve.tolerance(manifest):
        raise Refused(f"{out}: not written, the graphs differ from torch by {worst:.1e}")
    write_manifest(work, manifest | {"parity": float(f"{worst:.1e}")})
