"""Freeze a trained run into ONNX graphs, check them, and predict with them.

    python export.py mora runs/mora                  # -> runs/mora/onnx
    python export.py check runs/mora/onnx            # parity with torch, provider
    python export.py predict runs/mora/onnx --image chest.png --note "fever, recent cold"

A MoRA branch stands beside a nonlinear block, so it cannot be merged into the weights. It is frozen per presence
pattern instead: the ups of the present modalities fold into one matrix, and the tokens of absent modalities leave the
graph. One more graph, `mask.onnx`, takes the presence as an input. `predict` and `check` are `minilora/serve.py` and
import no torch. """

import argparse
import copy
import itertools
import json
import os
import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np

from minilora import __version__, data, serve
from minilora.data import Refused

OPSET = 17


def to_onnx(module, inputs, path, metadata):
    """Trace a module with named example inputs into a checked ONNX file: batch dynamic, all other sizes fixed."""
    import onnx
    import torch

    names, outputs = list(inputs), ["logits", "probabilities"]
    with warnings.catch_warnings():  # the dynamo exporter would need onnxscript; the tracer's shape warnings are meant
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", torch.jit.TracerWarning)
        warnings.simplefilter("ignore", UserWarning)
        torch.onnx.export(module, tuple(inputs.values()), str(path), input_names=names, output_names=outputs,
                          opset_version=OPSET, dynamo=False, dynamic_axes={n: {0: "batch"} for n in names + outputs})
    model = onnx.load(path)
    onnx.helper.set_model_props(model, metadata)
    onnx.checker.check_model(model, full_check=True)
    data.write_atomic(path, model.SerializeToString(deterministic=True))


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
    if method is not None or seed is not None:
        method, seed = method or saved["adapter"]["method"], saved["adapter"]["seed"] if seed is None else seed
        path = Path(run) / f"adapters/{method}-s{seed}.pt"
        if not path.is_file():
            there = sorted(p.stem for p in path.parent.glob("*.pt"))
            raise Refused(f"{path}: no such adapter; this run has {', '.join(there)}")
        saved["adapter"] = checkpoint.load(path, "mora adapter")
    adapter = saved["adapter"]
    if adapter["method"] == "mora-shuffled":
        raise Refused("mora-shuffled is a control that needs other samples' patterns; it cannot be served")
    return saved, build(saved["config"], saved["base"], adapter["method"], adapter["rank"], 0, adapter["state"])


def export_mora(run, out=None, method=None, seed=None):
    """Write RUN/onnx: a graph per presence pattern, the mask graph, golden outputs, manifest. Returns the folder."""
    import onnx
    import torch

    from minilora.mora import branch_ranks, fold, gates

    saved, model = load_run(run, method, seed)
    config, adapter = saved["config"], saved["adapter"]
    modalities, method = list(config["modalities"]), adapter["method"]
    out = Path(out or Path(run) / "onnx").resolve()
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise Refused(f"{out}: exists and is not an exported folder; choose another --out")
    work = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    work.mkdir(parents=True)
    if len(modalities) <= 4:
        patterns = [p for p in itertools.product((1, 0), repeat=len(modalities)) if any(p)]
    else:  # the patterns seen in training; any other goes through the mask graph
        patterns = [tuple(p) for p in saved["patterns"][:16]]
    example, present = golden_inputs(config, patterns)
    golden = {k: v.numpy() for k, v in example.items()} | {"present": present.numpy()}
    graphs, classes = {}, "|".join(saved["class_names"])
    about = {"kind": "mora", "method": method, "modalities": ",".join(modalities), "classes": classes}
    try:
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
            to_onnx(graph, inputs, work / graphs[name], about | {"pattern": name})
            print(f"{name:32s} {(work / graphs[name]).stat().st_size / 1024:8.0f} KiB", flush=True)
        data.write_atomic(work / "golden.npz", data.npz_bytes(golden))
        scales = adapter["scales"].items()
        numeric = {m: {"columns": saved["columns"][m], "mean": mean, "scale": scale} for m, (mean, scale) in scales}
        manifest = {"format": 1, "kind": "mora", "method": method, "seed": adapter["seed"], "modalities": modalities,
                    "classes": saved["class_names"], "multilabel": saved["multilabel"], "absent": config["absent"],
                    "image_size": config["image_size"], "channels": config["channels"], "buckets": config["buckets"],
                    "positions": config["positions"], "tokenizer": "crc32", "ranks": branch_ranks(adapter["state"]),
                    "numeric": numeric, "graphs": graphs,
                    "files": {p.name: data.sha256(p) for p in sorted(work.iterdir())}, "opset": OPSET,
                    "base": saved["base_hash"], "data": saved["data"], "synthetic": saved["synthetic"],
                    "synthetic_notes": saved["synthetic_notes"],
                    "versions": {"minilora": __version__, "torch": torch.__version__, "onnx": onnx.__version__,
                                 "numpy": np.__version__}}
        manifest["sha256"] = data.digest(manifest)
        data.write_atomic(work / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        if serve.check(work, "cpu") > serve.TOLERANCE:
            raise Refused(f"{out}: not written, the graphs differ from torch by more than {serve.TOLERANCE:.0e}")
        old = out.with_name(f".{out.name}.{os.getpid()}.old")
        if out.exists():  # renamed, not removed: the old export is never gone before the new one is there
            os.replace(out, old)
        os.replace(work, out)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
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


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["predict"], ["check"]):
        return serve.main(argv)
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    mora = commands.add_parser("mora", help="freeze a run of train_mora.py")
    mora.add_argument("run", type=Path, help="run folder")
    mora.add_argument("--method", help="instead of the method that the run kept")
    mora.add_argument("--seed", type=int, help="instead of the seed that the run kept")
    mora.add_argument("--out", type=Path, help="folder to write (default: RUN/onnx)")
    for name, what in (("check", "rerun the golden inputs"), ("predict", "diagnose; see `export.py predict --help`")):
        commands.add_parser(name, help=what)
    args = parser.parse_args(argv)
    with data.one_line_errors():
        out = export_mora(args.run, args.out, args.method, args.seed)
        print(f"exported to {out}; try: python export.py predict {out} --help")


if __name__ == "__main__":
    main()
