"""Inference from an exported folder, and its command line: numpy and onnxruntime, never torch.

    from minilora.serve import Diagnoser
    d = Diagnoser("runs/mora/onnx")
    d.predict(images=[image, None], notes=["fever", "weight loss"])   # [2,C] probabilities

    python -m minilora.serve predict runs/mora/onnx --image chest.png --note "fever, recent cold"
    python -m minilora.serve check runs/mora/onnx
"""

import argparse
import csv
import ctypes
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import onnxruntime

from minilora import data, metrics
from minilora.data import Refused

TOLERANCE = 1e-5  # parity with torch: of a probability or a logit, relative to max(1, |value|)


def read_manifest(folder, kind=None):
    """The manifest of an exported folder, after its own hash and the hash of every file in it were checked."""
    manifest, folder, path = own_manifest(folder), Path(folder), Path(folder) / "manifest.json"
    if not {*manifest.get("graphs", {}).values()} <= {*manifest["files"]}:
        raise Refused(f"{path}: names a graph whose hash it does not hold")
    for name, wanted in manifest["files"].items():
        if Path(name).name != name:  # a manifest must not reach outside its folder
            raise Refused(f"{path}: file name '{name}' is not a plain name")
        if not (folder / name).is_file():
            raise Refused(f"{folder / name}: missing, but the manifest names it")
        if data.sha256(folder / name) != wanted:
            raise Refused(f"{folder / name}: changed or damaged (sha256 is not the manifest's)")
    if kind and manifest["kind"] != kind:
        raise Refused(f"{folder}: holds a '{manifest['kind']}' export; this needs '{kind}'")
    return manifest


def own_manifest(folder):
    """manifest.json, checked against its own hash only: no other file is read."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise Refused(f"{folder}: not an exported folder (no manifest.json); export.py makes one")
    try:
        manifest = json.loads(path.read_bytes())
        body = {k: v for k, v in manifest.items() if k != "sha256"}
        good = manifest["sha256"] == data.digest(body) and manifest["format"] == 1
    except (ValueError, KeyError, TypeError, AttributeError):
        good = False
    if not good:
        raise Refused(f"{path}: changed or damaged (its hash does not fit its content)")
    return manifest


def providers(device):
    """onnxruntime providers to ask for. 'auto' asks for CUDA only where an NVIDIA driver is loaded, to spare the CPU
    user two lines of warnings."""
    if device not in ("auto", "cpu", "cuda"):
        raise Refused(f"device '{device}' is not known; use auto, cpu or cuda")
    if device == "auto":
        try:
            ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
            device = "cuda"
        except OSError:
            device = "cpu"
    if device == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA libraries of the [gpu] extra, or of torch where it is installed
    available = onnxruntime.get_available_providers()
    # TF32, the default there, has 10 bits of mantissa: parity with torch would be 1e-3 instead of 1e-5
    cuda = [("CUDAExecutionProvider", {"use_tf32": 0})] if "CUDAExecutionProvider" in available else []
    return (cuda if device == "cuda" else []) + ["CPUExecutionProvider"]


def open_session(path, device):
    """An onnxruntime session on the device; `Refused` if CUDA was asked for by name and did not load."""
    wanted = providers(device)
    try:
        session = onnxruntime.InferenceSession(str(path), providers=wanted)
    except Exception as error:  # onnxruntime raises its own family of exceptions
        raise Refused(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0]})") from None
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":  # only this list is true
        raise Refused(f"device 'cuda': CUDA did not load in onnxruntime {onnxruntime.__version__}; "
                      "it runs on CPU. pip install 'minilora[gpu]' brings the libraries, --device cpu goes without")
    return session


class Diagnoser:
    """A diagnosis model from a folder that `export.py mora` wrote.

    `.provider` is what onnxruntime really uses, `.manifest` what the folder says of itself (classes, modalities, ...).
    """

    def __init__(self, folder, device="auto"):
        self.folder, self.device = Path(folder), device
        self.manifest = m = read_manifest(folder, "mora")
        self.modalities, self.classes, self.numeric = tuple(m["modalities"]), m["classes"], m["numeric"]
        self.sessions = {}
        self.provider = self.session("mask").get_providers()[0]

    def session(self, graph):
        """The session of a graph ('mask' or a pattern such as 'image+note'), made at first use."""
        if graph not in self.sessions:
            self.sessions[graph] = open_session(self.folder / self.manifest["graphs"][graph], self.device)
        return self.sessions[graph]

    def run(self, graph, inputs):
        """(logits, probabilities) [B,C] of one graph from its own inputs, whose ids and shapes are checked."""
        session = self.session(graph)
        for spec in session.get_inputs():
            if spec.name not in inputs:
                raise Refused(f"graph '{graph}' needs input '{spec.name}'")
            value = inputs[spec.name]
            if list(value.shape[1:]) != spec.shape[1:]:
                raise Refused(f"'{spec.name}' has shape {list(value.shape)}; graph '{graph}' takes "
                              f"{['batch', *spec.shape[1:]]}")
            if spec.name == "note" and value.size and not 0 <= value.min() <= value.max() < self.manifest["buckets"]:
                raise Refused(f"word ids are {value.min()}..{value.max()}; must be in [0,{self.manifest['buckets']})")
        return session.run(["logits", "probabilities"], {s.name: inputs[s.name] for s in session.get_inputs()})

    def predict(self, images=None, notes=None, **numeric):
        """Probabilities [B,C] float32, whatever each of the B samples has.

        images: B of uint8 [H,W] or [H,W,3] of any size, or None. notes: B of str, or None. numeric: by modality name,
        B rows [F] in the order of `manifest['numeric'][name]['columns']`, or {column: value}, or None; NaN = that
        value is missing. Samples are grouped by what is present, and each group runs its own graph. Raises `Refused`,
        a ValueError, that says which sample is wrong and how. """
        inputs, present = self.inputs(images, notes, numeric)
        result = np.zeros((len(present), len(self.classes)), np.float32)
        for pattern in np.unique(present, axis=0):
            rows = np.flatnonzero((present == pattern).all(1))
            name = data.pattern_name(pattern, self.modalities)
            graph = name if name in self.manifest["graphs"] else "mask"
            for part in np.split(rows, range(256, len(rows), 256)):
                feed = {k: v[part] for k, v in inputs.items()} | {"present": present[part].astype(np.float32)}
                result[part] = self.run(graph, feed)[1]
        return result

    def inputs(self, images, notes, numeric):
        """({modality: array} with zeros for what is absent, presence [B,M] bool) of a request."""
        given = {"image": images, "note": notes, **numeric}
        for name, values in given.items():
            if isinstance(values, (str, bytes, dict)):
                raise Refused(f"{name} is one {type(values).__name__}; give a list, one item per sample")
        given = {k: list(v) for k, v in given.items() if v is not None}
        for name in given:
            if name not in self.modalities:
                raise Refused(f"modality '{name}' is not of this model; it has {', '.join(self.modalities)}")
        lengths = {k: len(v) for k, v in given.items()}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            said = ", ".join(f"{k} {n}" for k, n in lengths.items()) or "no modality"
            raise Refused(f"every modality needs a list of the same length, at least 1: {said}")
        n, m = next(iter(lengths.values())), self.manifest
        present, inputs = np.zeros((n, len(self.modalities)), bool), {}
        for column, name in enumerate(self.modalities):
            values = given.get(name, [None] * n)
            if name == "image":
                inputs[name] = np.zeros((n, m["channels"], m["image_size"], m["image_size"]), np.float32)
                read = self.image
            elif name == "note":
                inputs[name] = np.zeros((n, m["positions"]), np.int64)
                read = self.note
            else:
                inputs[name] = np.full((n, len(m["numeric"][name]["columns"])), np.nan, np.float32)
                read = lambda value, where, name=name: self.row(value, where, name)
            for i, value in enumerate(values):
                encoded = None if value is None else read(value, f"{name} of sample {i}")
                if encoded is not None:
                    inputs[name][i], present[i, column] = encoded, True
            if name in m["numeric"]:  # what is absent is zero: NaN leaks through a mask
                inputs[name][~present[:, column]] = 0
        if not present.any(1).all():
            raise Refused(f"sample {int((~present.any(1)).argmax())} has nothing: no {', no '.join(self.modalities)}")
        return inputs, present

    def image(self, value, where):
        value = np.asarray(value)
        shaped = value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)
        if value.dtype != np.uint8 or not shaped or 0 in value.shape:
            nan = ", with NaN" if value.dtype.kind == "f" and np.isnan(value).any() else ""
            raise Refused(f"{where} is {value.dtype} {list(value.shape)}{nan}; need uint8 [H,W] or [H,W,3]")
        return data.prepare_images(value[None], self.manifest["image_size"], self.manifest["channels"])[0]

    def note(self, value, where):
        if not isinstance(value, str):
            raise Refused(f"{where} is {type(value).__name__}; need a string, or None if it is missing")
        if not value.strip():
            return None
        return data.tokenize([value], self.manifest["buckets"], self.manifest["positions"])[0]

    def row(self, value, where, name):
        columns, spec = self.manifest["numeric"][name]["columns"], self.manifest["numeric"][name]
        if isinstance(value, dict):
            unknown = [k for k in value if k not in columns]
            if unknown:
                raise Refused(f"{where}: column '{unknown[0]}' is not known; columns are {', '.join(columns)}")
            value = [value.get(c) for c in columns]
        try:
            value = np.array([np.nan if v is None else v for v in value], np.float32)
        except (TypeError, ValueError):
            raise Refused(f"{where} is not a row of numbers") from None
        if value.shape != (len(columns),) or np.isinf(value).any():
            raise Refused(f"{where} is {value.tolist()}; need {len(columns)} finite numbers or NaN: "
                          f"{', '.join(columns)}")
        standard = (value - np.array(spec["mean"], np.float32)) / np.array(spec["scale"], np.float32)
        return None if np.isnan(standard).all() else standard


def check(folder, device="auto"):
    """Rerun the golden inputs at batch sizes all and 1; prints parity with torch and the provider. Returns the largest
    difference over all graphs: of probabilities, and of logits relative to max(1, |logit|)."""
    diagnoser = Diagnoser(folder, device)
    golden, worst = data.read_npz(Path(folder) / "golden.npz"), 0.0
    inputs = {k: v for k, v in golden.items() if " " not in k}
    print(f"{len(diagnoser.manifest['files'])} files are what the manifest says; provider {diagnoser.provider}")
    for graph in diagnoser.manifest["graphs"]:
        wanted, error = (golden[f"logits {graph}"], golden[f"probabilities {graph}"]), 0.0
        n = len(wanted[0])
        for rows in [list(range(n)), *[[i] for i in range(n)]]:
            got = diagnoser.run(graph, {k: v[rows] for k, v in inputs.items()})
            for g, w in zip(got, wanted):
                difference = float(np.max(abs(g - w[rows]) / np.maximum(1, abs(w[rows]))))
                error = max(error, difference if np.isfinite(difference) else np.inf)
        worst = max(worst, error)
        print(f"  {graph:32s} parity with torch {error:.1e} at batch {n} and 1")
    print(f"{'passed' if worst <= TOLERANCE else 'FAILED'}: largest difference {worst:.1e}, limit {TOLERANCE:.0e}")
    return worst


def read_image(path):
    """uint8 [H,W] or [H,W,3] of a picture (through the `pictures` extra) or of an .npy array."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    if path.suffix == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
            if isinstance(array, np.ndarray):
                return array
            raise ValueError("an archive, not an array")
        except (ValueError, EOFError, OSError) as error:
            raise Refused(f"{path}: not a readable .npy array ({error})") from None
    try:
        from PIL import Image
    except ImportError:
        raise Refused(f"{path}: reading pictures needs Pillow: pip install 'minilora[pictures]' "
                      "(or give an .npy array)") from None
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):  # Pillow would clip it to 8 bits, not scale it
                raise ValueError(f"mode {picture.mode}: more than 8 bits a pixel; convert it to 8-bit grey first")
            return np.asarray(picture.convert("L" if picture.mode in ("1", "L") else "RGB"))
    except Exception as error:  # Pillow raises many types for a file that is no picture
        raise Refused(f"{path}: not a readable picture ({error})") from None


def chosen_rows(study, args):
    """(row indices, presence [n,M]) of a study file: all of it, or the test part of a run's split with its table."""
    have = study.have()
    if not args.split:
        if args.missing:
            raise Refused(f"--missing {args.missing} names a table of a split file; give --split RUN/split-s0.npz too")
        return np.arange(len(study)), have
    drawn = data.read_npz(args.split)
    if "test" not in drawn or drawn["test"].max(initial=0) >= len(study):
        raise Refused(f"{args.split}: not a split of the {len(study)} samples of {args.data}")
    rows, key = drawn["test"], f"present {args.missing}"
    if args.missing:
        if key not in drawn or len(drawn[key]) != len(study):
            tables = [k.removeprefix("present ") for k in drawn if k.startswith("present ")]
            raise Refused(f"{args.split}: no table '{args.missing}' for this file; it holds {', '.join(tables)}")
        for j, name in enumerate(drawn["modalities"]):
            if name in study.modalities:
                have[:, study.modalities.index(name)] = drawn[key][:, j]
    return rows, have[rows]


def predict_file(diagnoser, args):
    """Probabilities of a study file's rows: metrics to stdout, one line per sample to --out."""
    classes = diagnoser.classes
    study = data.load_study(args.data, args.synthetic_notes, classes)
    names = [m for m in study.modalities if m in diagnoser.modalities]
    for name in names:
        if study.columns.get(name, []) != diagnoser.numeric.get(name, {"columns": []})["columns"]:
            raise Refused(f"{args.data}: columns of '{name}' are {', '.join(study.columns[name])}; "
                          f"the model has {', '.join(diagnoser.numeric[name]['columns'])}")
    if not names:
        raise Refused(f"{args.data}: has {', '.join(study.modalities)}; "
                      f"the model has {', '.join(diagnoser.modalities)}")
    if study.labelled.any() and study.multilabel != diagnoser.manifest["multilabel"]:
        raise Refused(f"{args.data}: labels {list(study.labels.shape)} are not of the model's kind")
    if not args.split and diagnoser.manifest["data"] == {"name": args.data.name, "sha256": data.sha256(args.data)}:
        print("the model was trained on part of this file; --split RUN/split-s0.npz keeps to the test part")
    rows, present = chosen_rows(study, args)
    present = present[:, [study.modalities.index(m) for m in names]]
    values = {"image": study.images, "note": study.notes, **study.numeric}
    request = {m: [values[m][r] if p else None for r, p in zip(rows, present[:, j])] for j, m in enumerate(names)}
    request["note"] = [None if t is None else str(t) for t in request["note"]] if "note" in request else None
    probabilities = diagnoser.predict(request.pop("image", None), request.pop("note"), **request)

    known, labels = study.labelled[rows], study.labels[rows]
    found = metrics.scores(labels[known], probabilities[known]) if known.any() else {}
    of = lambda kind: study.__dict__[kind] or diagnoser.manifest[kind]
    about = " (synthetic notes)" if of("synthetic_notes") else " (synthetic data)" if of("synthetic") else ""
    print(f"{args.data}{about}: {len(rows)} samples, {int(known.sum())} labelled; "
          + ", ".join(f"{k.replace('_', '-')} {v:.3f}" for k, v in found.items()))
    patterns = [data.pattern_name(p, names) for p in present]
    print("present: " + ", ".join(f"{p} {c}" for p, c in zip(*np.unique(patterns, return_counts=True))))
    if args.out:
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["row", "present", "label", "predicted", *[f"p({c})" for c in classes]])
        for row, pattern, label, p in zip(rows, patterns, labels, probabilities):
            true = label == 1 if study.multilabel else np.arange(len(classes)) == label  # none of an unlabelled file
            said = p >= 0.5 if diagnoser.manifest["multilabel"] else p == p.max()
            names_of = lambda mask: "|".join(c for c, m in zip(classes, mask) if m)
            table.writerow([row, pattern, names_of(true), names_of(said), *[f"{v:.6f}" for v in p]])
        data.write_atomic(args.out, text.getvalue())
        print(f"probabilities: {args.out}")


def command_line(argv):
    """The parsed command. `predict` has a flag per numeric column of its folder, so the folder is read first."""
    parser = argparse.ArgumentParser(prog="minilora.serve", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    checks = commands.add_parser("check", help="rerun the golden inputs and compare with torch's outputs")
    predicts = commands.add_parser("predict", help="diagnose one sample, or a file with --data", allow_abbrev=False)
    for p in (checks, predicts):
        p.add_argument("folder", type=Path, help="what export.py wrote, for example runs/mora/onnx")
        p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    predicts.add_argument("--image", type=Path, help="picture (pictures extra) or .npy array; leave out if missing")
    predicts.add_argument("--note", help="report in words; leave out if missing")
    predicts.add_argument("--data", type=Path, help="study file: predict all of it and print metrics")
    predicts.add_argument("--synthetic-notes", action="store_true", help="with --data: as in training")
    predicts.add_argument("--split", type=Path, help="with --data: keep to the test rows of this split-sN.npz")
    predicts.add_argument("--missing", help="with --split: apply its stored missing table, TYPE:RATE")
    predicts.add_argument("--out", type=Path, help="with --data: CSV of probabilities")
    folder = next((a for a in argv[1:] if os.path.isfile(os.path.join(a, "manifest.json"))), None)
    columns = {}
    if argv[:1] == ["predict"] and folder:
        for name, spec in own_manifest(folder).get("numeric", {}).items():
            for c in spec["columns"]:
                flag = re.sub(r"\W+", "-", c.strip())
                flag = f"{name}-{flag}" if f"--{flag}" in predicts._option_string_actions else flag
                columns[flag] = (name, c)
                about = f"{name}: {c}".replace("%", "%%")
                predicts.add_argument(f"--{flag}", type=float, dest=f"column {flag}", help=about)
    return parser.parse_args(argv), columns


def predict_one(diagnoser, args, columns):
    """Probabilities of the one sample on the command line, as bars."""
    numeric = {}
    for flag, (name, column) in columns.items():
        if getattr(args, f"column {flag}") is not None:
            numeric.setdefault(name, {})[column] = getattr(args, f"column {flag}")
    request = {name: [row] for name, row in numeric.items()}
    if args.note is not None:
        request["notes"] = [args.note]
    if args.image:
        image = read_image(args.image)
        if image.dtype == np.uint8 and image.shape[2:] == (3,) and diagnoser.manifest["channels"] == 1:
            image = np.rint(image @ np.array([0.299, 0.587, 0.114])).astype(np.uint8)  # ITU-R 601, as Pillow's "L"
        request["images"] = [image]
    if not request:
        flags = ", ".join(f"--{f}" for f in ("image", "note", *columns))
        raise Refused(f"nothing to diagnose: give --data FILE.npz, or any of {flags}")
    p = diagnoser.predict(**request)[0]
    present = diagnoser.inputs(request.pop("images", None), request.pop("notes", None), request)[1][0]
    print(f"present: {', '.join(m for m, here in zip(diagnoser.modalities, present) if here)}")
    for i in np.argsort(-p):
        print(f"{diagnoser.classes[i]:20s} {p[i]:.3f} {'█' * round(30 * float(p[i]))}")
    if diagnoser.manifest["synthetic"] or diagnoser.manifest["synthetic_notes"]:
        kind = "data" if diagnoser.manifest["synthetic"] else "notes"
        print(f"trained on synthetic {kind}: not a diagnosis of anybody")


def main(argv=None):
    with data.one_line_errors():
        args, columns = command_line(sys.argv[1:] if argv is None else argv)
        if args.command == "check":
            raise SystemExit(0 if check(args.folder, args.device) <= TOLERANCE else 1)
        diagnoser = Diagnoser(args.folder, args.device)
        print(f"provider {diagnoser.provider}")
        predict_file(diagnoser, args) if args.data else predict_one(diagnoser, args, columns)


if __name__ == "__main__":
    main()
