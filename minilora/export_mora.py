"""Freeze a run of train_mora.py into ONNX graphs, one per presence pattern.

A MoRA branch stands beside a nonlinear block, so it cannot be merged into the weights. It is frozen
per presence pattern instead: the ups of the present modalities fold into one matrix, and the tokens
of absent modalities leave the graph; where absent inputs are filled, all stay. One more graph,
`mask.onnx`, takes the presence as an input.
Skip this file when you read for the method.

Letters: B batch, M modalities, C classes.
"""

import copy
import itertools
import re
from pathlib import Path

import numpy as np
import torch
from torch import nn

from minilora import data, serve
from minilora.graphs import Weights, finish, new_folder, pad, to_half, trace, write_graph
from minilora.models import Filled, load_mora
from minilora.mora import branch_ranks, fold, gates


class DiagnosisGraph(nn.Module):
    """Positional inputs -> (logits, probabilities) [B,C]: a copy of a model, folded for one
    presence pattern, a tuple of M 0/1. If `pattern` is None, the presence [B,M] is the last input.
    """

    def __init__(self, model, method, multilabel, pattern):
        super().__init__()
        # A copy whose weights are the model's own.
        shared = {id(value): value for value in [*model.parameters(), *model.buffers()]}
        self.model = copy.deepcopy(model, shared)
        self.multilabel = multilabel
        self.modalities = model.modalities
        self.row = None
        if pattern is not None:
            if not isinstance(model.dummies, Filled):  # which attends to what is absent
                self.modalities = tuple(itertools.compress(model.modalities, pattern))
            self.row = gates(method, torch.tensor([pattern], dtype=torch.float32))  # [1,M]
            fold(self.model, self.row[0])
        elif method in ("lora", "mora-open"):  # their gates do not depend on presence
            fold(self.model, gates(method, torch.ones(1, len(model.modalities)))[0])

    def forward(self, *inputs):
        batch = dict(zip(self.modalities, inputs))
        present = inputs[-1] if self.row is None else None
        logits = self.model(batch, present, self.row)  # without a row, the gates are the presence
        return logits, logits.sigmoid() if self.multilabel else logits.softmax(1)


def export_mora(run, out=None, method=None, seed=None, fp16=False):
    """Write RUN/onnx: a graph per presence pattern, the mask graph, golden outputs, manifest.
    Returns the folder.
    """
    saved, model = load_mora(run, method, seed)
    model.requires_grad_(False)  # tracing must not keep what a backward would need
    method = saved["adapter"]["method"]
    modalities = model.modalities
    if len(modalities) <= 4:
        patterns = [p for p in itertools.product((1, 0), repeat=len(modalities)) if any(p)]
    else:  # the patterns seen in training; any other goes through the mask graph
        patterns = [tuple(p) for p in saved["patterns"][:16]]
    example, present = golden_inputs(saved["config"], patterns)
    golden = {name: value.numpy() for name, value in example.items()}
    golden["present"] = present.numpy()
    metadata = {
        "kind": "mora",
        "method": method,
        "modalities": ",".join(modalities),
        "classes": "|".join(saved["class_names"]),
    }
    outputs = ["logits", "probabilities"]
    files = {}
    out = Path(out or Path(run) / "onnx")
    with new_folder(out) as work:
        weights = Weights(work)
        for pattern in [*patterns, None]:
            graph = DiagnosisGraph(model, method, saved["multilabel"], pattern)
            inputs = {name: example[name] for name in graph.modalities}
            if pattern is None:
                name = "mask"
                inputs["present"] = present
            else:
                name = data.pattern_name(pattern, modalities)
            with torch.no_grad():
                answers = graph(*inputs.values())
            for output, answer in zip(outputs, answers):
                golden[f"{output} {name}"] = answer.numpy()
            axes = {n: {0: "batch"} for n in [*inputs, *outputs]}
            if fp16:
                traced = to_half(trace(graph, inputs, outputs, axes))
            else:
                traced = trace(graph, inputs, outputs, axes, weights)
            files[name] = re.sub(r"[^\w+-]", "_", name) + ".onnx"
            write_graph(traced, work / files[name], metadata | {"pattern": name}, weights)
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        if "vocabulary" in saved["config"]:
            data.write_atomic(work / serve.VOCABULARY, saved["config"]["vocabulary"])
        manifest = described(saved, files, "float16" if fp16 else "float32")
        del saved, model, graph  # a large model does not stand in memory beside its graphs
        finish(work, out, manifest | {"weights": weights.table})
    return out


def described(saved, files, precision):
    """What the manifest says of a run; `files` {graph: file name}."""
    config = saved["config"]
    adapter = saved["adapter"]
    numeric = {}
    for name, (mean, scale) in adapter["scales"].items():
        numeric[name] = {"columns": saved["columns"][name], "mean": mean, "scale": scale}
    return {
        "format": 3 if config["absent"] == "fill" else 2,
        "kind": "mora",
        "method": adapter["method"],
        "seed": adapter["seed"],
        "modalities": list(config["modalities"]),
        "classes": saved["class_names"],
        "multilabel": saved["multilabel"],
        "absent": config["absent"],
        "image_size": config["image_size"],
        "channels": config["channels"],
        "buckets": config["buckets"],
        "positions": config["positions"],
        "tokenizer": "wordpiece" if "vocabulary" in config else saved.get("tokenizer", "crc32"),
        "ranks": branch_ranks(adapter["state"]),
        "numeric": numeric,
        "graphs": files,
        "precision": precision,
        "base": saved["base_hash"],
        "data": saved["data"],
        "synthetic": saved["synthetic"],
        "synthetic_notes": saved["synthetic_notes"],
        "fit": saved.get("fit", "squeeze"),
        "prepared": saved.get("prepared", {}),
    }


def golden_inputs(config, patterns, n=5):
    """({modality: tensor}, presence [n,M]) drawn from a fixed seed: an exported folder must not
    carry patients' data.
    """
    rng = np.random.default_rng(15)
    inputs = {}
    for name in config["modalities"]:
        if name == "image":
            shape = (n, config["channels"], config["image_size"], config["image_size"])
            values = rng.uniform(-1, 1, shape).astype(np.float32)
        elif name == "note":
            values = rng.integers(3, config["buckets"], (n, config["positions"]))
            pad(values, rng.integers(2, config["positions"] + 1, n))
        else:
            values = rng.normal(size=(n, len(config["columns"][name]))).astype(np.float32)
            values[1, 0] = np.nan
        inputs[name] = torch.from_numpy(values)
    rows = [patterns[i % len(patterns)] for i in range(n)]
    return inputs, torch.tensor(rows, dtype=torch.float32)
