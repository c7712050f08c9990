"""Inference from an exported folder, and its command line: numpy and onnxruntime, never torch.

    from minilora.serve import Diagnoser
    d = Diagnoser("runs/mora/onnx")
    d.predict(images=[image, None], notes=["fever", "weight loss"])   # [2,C] probabilities
    Synthesizer("runs/selora/onnx").sample(["coin lesion sinistral"])  # uint8 [1,S,S]

    python -m minilora.serve predict runs/mora/onnx --image chest.png --note "fever, recent cold"
    python -m minilora.serve sample runs/selora/onnx --note "coin lesion sinistral" --out sheet.png
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

COMMANDS = {"check": "rerun the golden inputs and compare with torch's outputs",
            "predict": "diagnose one sample, or a file with --data", "sample": "draw images from words"}
# parity with torch, relative to max(1, |value|): of a probability or a logit; of a pixel in [-1,1] or a noise
TOLERANCES = {("mora", "float32"): 1e-5, ("selora", "float32"): 1e-4,
              ("mora", "float16"): 2e-2, ("selora", "float16"): 1e-1}
# the entry of a TensorProto that names a file of weights, however long its length is written
EXTERNAL = re.compile(rb"\x0a(?:\x08|\x88\x80*\x00)location")


def tolerance(manifest):
    """How far an exported folder may be from torch."""
    return TOLERANCES[manifest["kind"], manifest["precision"]]


def read_manifest(folder, kind=None):
    """The manifest of an exported folder, after its own hash and the hash of every file in it were checked."""
    manifest, folder, path = own_manifest(folder), Path(folder), Path(folder) / "manifest.json"
    adapters = {a["file"] for a in manifest.get("adapters", {}).values() if a}  # the base has no file of its own
    if not {*manifest.get("graphs", {}).values(), *adapters} <= {*manifest["files"]}:
        raise Refused(f"{path}: names a graph or an adapter whose hash it does not hold")
    for name, wanted in manifest["files"].items():
        if not (folder / name).is_file():
            raise Refused(f"{folder / name}: missing, but {path} names it")
        if data.sha256(folder / name) != wanted:
            raise Refused(f"{folder / name}: changed or damaged: its sha256 is not that of {path}")
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        good = False
    if not good:
        raise Refused(f"{path}: changed or damaged (its hash does not fit its content)")
    for key, fits in entries(manifest).items():  # a stranger's manifest can have a hash that fits
        if key not in manifest or not fits(manifest[key]):
            raise Refused(f"{path}: '{key}' is {str(manifest.get(key, 'missing'))[:60]}; export.py does not write that")
    return manifest


def entries(manifest):
    """{key: whether a value can stand there} of what is read from a manifest of its kind."""
    number = lambda low, high: lambda v: type(v) is int and low <= v <= high
    one_of = lambda *values: lambda v: any(type(v) is type(x) and v == x for x in values)
    texts = lambda v: isinstance(v, list) and len(v) > 0 and all(isinstance(x, str) and x for x in v)
    names = lambda v: texts(v) and len(set(v)) == len(v)
    table = lambda fits: lambda v: isinstance(v, dict) and all(fits(x) for x in v.values())
    file = lambda v: isinstance(v, str) and Path(v).name == v  # a manifest must not reach outside its folder
    files = lambda v: table(lambda x: isinstance(x, str))(v) and "golden.npz" in v and all(map(file, v))
    numbers = lambda v, n: isinstance(v, list) and len(v) == n and all(isinstance(x, (int, float)) for x in v)
    columns = lambda v: (isinstance(v, dict) and {"columns", "mean", "scale"} <= {*v} and names(v["columns"])
                         and all(numbers(v[k], len(v["columns"])) for k in ("mean", "scale")))
    has = lambda key, fits: lambda v: fits(v) and key in v
    common = {"kind": one_of("mora", "selora"), "files": files, "precision": one_of("float32", "float16"),
              "image_size": number(1, 2**14), "channels": one_of(1, 3), "buckets": number(4, 2**31),
              "positions": number(1, 2**14), "synthetic": one_of(True, False), "synthetic_notes": one_of(True, False)}
    common |= {"fit": one_of(*data.FITS)} if "fit" in manifest else {}
    return common | {
        "mora": {"numeric": table(columns), "classes": names, "multilabel": one_of(True, False),
                 "modalities": lambda v: names(v) and {*v} - {"image", "note"} == {*manifest["numeric"]},
                 "graphs": has("mask", table(file)), "seed": number(0, 2**31),
                 "data": lambda v: isinstance(v, (str, dict))},
        "selora": {"latent": number(1, 2**10), "latent_size": number(1, 2**12), "timesteps": number(1, 2**20),
                   "graphs": has("sampler", table(file)), "data": lambda v: isinstance(v, (str, dict)),
                   "adapters": table(lambda v: v is None or (isinstance(v, dict) and file(v.get("file"))))},
    }.get(str(manifest.get("kind")), {})


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


def open_session(path, device, quiet=False):
    """An onnxruntime session on the device; `Refused` if CUDA was asked for by name and did not load. quiet: no line of
    warning for each weight that can be overridden."""
    content, wanted, options = Path(path).read_bytes(), providers(device), onnxruntime.SessionOptions()
    if EXTERNAL.search(content):
        raise Refused(f"{path}: keeps weights in another file; export.py writes none that do")
    options.log_severity_level = 3 if quiet else 2
    try:
        session = onnxruntime.InferenceSession(content, options, providers=wanted)
    except Exception as error:  # onnxruntime raises its own family of exceptions
        raise Refused(f"{path}: onnxruntime cannot load it ({str(error).splitlines()[0]})") from None
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":  # only this list is true
        raise Refused(f"device 'cuda': CUDA did not load in onnxruntime {onnxruntime.__version__}; "
                      "it runs on CPU. pip install 'minilora[gpu]' brings the libraries, --device cpu goes without")
    return session


def unchanged(served, name):
    """The path of a file of a served folder, which is opened at its first use; `Refused` if it is another by then."""
    path = served.folder / name
    if not path.is_file() or data.sha256(path) != served.manifest["files"][name]:
        raise Refused(f"{path}: was changed since the folder was opened; open it again")
    return path


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
            self.sessions[graph] = open_session(unchanged(self, self.manifest["graphs"][graph]), self.device)
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
            if values is not None and (isinstance(values, (str, bytes, dict)) or not hasattr(values, "__len__")):
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
        try:
            value = np.asarray(value)
        except (TypeError, ValueError):  # rows of different lengths
            raise Refused(f"{where} is no array; need uint8 [H,W] or [H,W,3]") from None
        shaped = value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)
        if value.dtype != np.uint8 or not shaped or 0 in value.shape:
            nan = ", with NaN" if value.dtype.kind == "f" and np.isnan(value).any() else ""
            raise Refused(f"{where} is {value.dtype} {list(value.shape)}{nan}; need uint8 [H,W] or [H,W,3]")
        squared = data.square(value[None], self.manifest.get("fit", "squeeze"))
        prepared = data.prepare_images(squared, self.manifest["image_size"], self.manifest["channels"])[0]
        return prepared if value.any() else None  # all black: missing, as in a study file

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
            with np.errstate(over="ignore"):  # inf is refused below
                value = np.array([np.nan if v is None else v for v in value], np.float32)
        except (TypeError, ValueError):
            raise Refused(f"{where} is not a row of numbers") from None
        if value.shape != (len(columns),) or np.isinf(value).any():
            raise Refused(f"{where} is {value.tolist()}; need {len(columns)} finite numbers or NaN: "
                          f"{', '.join(columns)}")
        standard = (value - np.array(spec["mean"], np.float32)) / np.array(spec["scale"], np.float32)
        if (abs(standard) > 1e6).any():
            raise Refused(f"{where} is {value.tolist()}: more than a million standard deviations from training's mean")
        return None if np.isnan(standard).all() else standard


class Synthesizer:
    """Images from words, by a folder that `export.py selora` wrote: one `session.run` from noise to image.

    `.adapters` are the names that `sample` can take: of a merged export none, of a hot-swap folder 'base' and one for
    each run. `.provider` is what onnxruntime really uses, `.manifest` what the folder says of itself."""

    def __init__(self, folder, device="auto"):
        self.folder, self.manifest, self.loaded = Path(folder), read_manifest(folder, "selora"), {}
        self.adapters = tuple(self.manifest["adapters"])
        path = self.folder / self.manifest["graphs"]["sampler"]
        self.session = open_session(path, device, quiet=bool(self.adapters))
        self.provider = self.session.get_providers()[0]

    def options(self, adapter):
        """RunOptions with the named adapter active, or None for the model as it is; `Refused` if there is none."""
        if adapter is None or (adapter == "base" and adapter in self.adapters):
            return None
        if adapter not in self.adapters:
            raise Refused(f"adapter '{adapter}' is not in {self.folder}; it has {', '.join(self.adapters) or 'none'}")
        if adapter not in self.loaded:
            self.loaded[adapter] = onnxruntime.LoraAdapter()
            self.loaded[adapter].Load(str(unchanged(self, self.manifest["adapters"][adapter]["file"])))
        options = onnxruntime.RunOptions()  # one of its own for each run: nothing of another adapter is left in it
        options.add_active_adapter(self.loaded[adapter])
        return options

    def run(self, noise, ids, guidance, timesteps, adapter=None):
        """Images [B,ch,S,S] float32 in [-1,1] from noise [B,L,s,s], ids [B,P], a number and falling timesteps [K]."""
        feed = {"noise": noise, "ids": ids, "guidance": np.array(guidance, np.float32), "timesteps": timesteps}
        return self.session.run(["images"], feed, self.options(adapter))[0]

    def sample(self, notes, steps=20, guidance=2.0, seed=0, adapter=None):
        """uint8 [B,S,S] or [B,S,S,3], an image for each of B notes ('' draws without words).

        steps: DDIM steps; guidance: 0 ignores the words, 1 is the model itself, more exaggerates what they say. Image b
        depends on note b, seed and b alone (to a grey level: sums are ordered by batch). Raises `Refused`, a
        ValueError, that says which argument is wrong and how."""
        if isinstance(notes, (str, bytes)) or not hasattr(notes, "__len__") or not len(notes):
            raise Refused("notes must be a list of at least one string")
        for i, note in enumerate(notes):
            if not isinstance(note, str):
                raise Refused(f"note of sample {i} is {type(note).__name__}; need a string")
        m = self.manifest
        number = lambda v, kinds: isinstance(v, kinds) and not isinstance(v, bool)
        if not number(steps, (int, np.integer)) or not 1 <= steps <= m["timesteps"]:
            raise Refused(f"steps is {steps!r}; need an integer from 1 to {m['timesteps']}")
        if not number(guidance, (int, float, np.number)) or not 0 <= guidance <= 100:
            raise Refused(f"guidance is {guidance!r}; need a number from 0 to 100")
        if not number(seed, (int, np.integer)) or not 0 <= seed < 2**63:
            raise Refused(f"seed is {seed!r}; need an integer of at least 0")
        ids, images = data.tokenize(notes, m["buckets"], m["positions"]), []
        shape = (m["latent"], m["latent_size"], m["latent_size"])
        for rows in np.split(np.arange(len(notes)), range(64, len(notes), 64)):
            noise = np.stack([np.random.default_rng((seed, b)).standard_normal(shape, np.float32) for b in rows])
            images.append(self.run(noise, ids[rows], guidance, walk(steps, m["timesteps"]), adapter))
        images = np.rint((np.concatenate(images) + 1) * 127.5).astype(np.uint8)
        return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, 3)


def walk(steps, schedule):
    """`steps` falling timesteps [steps] int64, evenly spaced, from the last of the schedule on."""
    return np.rint(np.arange(steps, 0, -1) * schedule / steps).astype(np.int64) - 1


def check(folder, device="auto"):
    """Rerun the golden inputs at batch sizes all and 1; prints parity with torch and the provider. Returns the largest
    difference over all graphs, relative to max(1, |value|): of probabilities and logits, of pixels in [-1,1]."""
    manifest, worst = read_manifest(folder), 0.0
    served = {"mora": Diagnoser, "selora": Synthesizer}[manifest["kind"]](folder, device)
    golden = data.read_npz(Path(folder) / "golden.npz")
    print(f"{len(manifest['files'])} files are what the manifest says; provider {served.provider}")
    for name, run, wanted in (golden_mora if manifest["kind"] == "mora" else golden_selora)(served, golden, device):
        error, n = 0.0, len(wanted[0])
        for rows in [list(range(n)), *[[i] for i in range(n)]]:
            for g, w in zip(run(rows), wanted):
                difference = float(np.max(abs(g - w[rows]) / np.maximum(1, abs(w[rows]))))
                error = max(error, difference if np.isfinite(difference) else np.inf)
        worst = max(worst, error)
        print(f"  {name:32s} parity with torch {error:.1e} at batch {n} and 1")
    limit = tolerance(manifest)
    print(f"{'passed' if worst <= limit else 'FAILED'}: largest difference {worst:.1e}, limit {limit:.0e}")
    return worst


def golden_mora(diagnoser, golden, device):
    """(graph, a function rows -> outputs, what torch gave) for each graph."""
    inputs = {k: v for k, v in golden.items() if " " not in k}
    for graph in diagnoser.manifest["graphs"]:
        run = lambda rows, graph=graph: diagnoser.run(graph, {k: v[rows] for k, v in inputs.items()})
        yield graph, run, (golden[f"logits {graph}"], golden[f"probabilities {graph}"])


def golden_selora(synthesizer, golden, device):
    """The same of the sampler, with each adapter, and of the step graph."""
    g, walked = golden, (golden["guidance"], golden["timesteps"])
    for name in synthesizer.adapters or [None]:
        run = lambda rows, name=name: [synthesizer.run(g["noise"][rows], g["ids"][rows], *walked, name)]
        yield f"sampler {name or ''}".strip(), run, [g[f"images {name or ''}".strip()]]
    if "denoise" in synthesizer.manifest["graphs"]:
        session = open_session(synthesizer.folder / synthesizer.manifest["graphs"]["denoise"], device)
        yield "denoise", lambda rows: session.run(["eps"], {k: g[k][rows] for k in ("z", "t", "ids")}), [g["eps"]]


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


def fill_in(diagnoser, synthesizer, notes, numeric, draws, steps, guidance):
    """Probabilities [draws,B,C] of samples that have words but no image: for each draw an image from the words, then
    the diagnosis of the complete sample. The mean over draws marginalises the missing image.

    notes: B of str; numeric: {modality: B rows or None}. Draw k is that of seed k, so fewer draws are the first of
    more. `Refused` if the two models do not fit: no image modality, other image sizes or channels."""
    if not {"image", "note"} <= set(diagnoser.modalities):
        raise Refused(f"{diagnoser.folder}: has {', '.join(diagnoser.modalities)}; filling in needs image and note")
    for key, what in (("image_size", "images of size"), ("channels", "image channels:")):
        if synthesizer.manifest[key] != diagnoser.manifest[key]:
            raise Refused(f"{synthesizer.folder}: draws {what} {synthesizer.manifest[key]}; {diagnoser.folder} was "
                          f"trained on {diagnoser.manifest[key]}")
    drawn = (synthesizer.sample(notes, steps, guidance, seed=k) for k in range(draws))
    return np.stack([diagnoser.predict(list(images), notes, **numeric) for images in drawn])


def fill_file(diagnoser, args, study, rows, request, probabilities):
    """Diagnose again the rows that have words and lack their image, with drawn images, in place in `probabilities`
    [n,C]; returns those rows, [n] bool. Where the file has the images that were withheld, a comparison is printed."""
    if not {"image", "note"} <= set(request):
        raise Refused(f"--synthesizer fills in images from words; {args.data} has {', '.join(request)}")
    pairs = zip(request["image"], request["note"])
    filled = np.array([image is None and note is not None for image, note in pairs])
    if not filled.any():
        print("no sample has words without an image: nothing to fill in")
        return filled
    synthesizer, cut = Synthesizer(args.synthesizer, args.device), lambda v: [v[i] for i in np.flatnonzero(filled)]
    if synthesizer.manifest["data"] != diagnoser.manifest["data"]:
        print(f"the synthesizer was trained on {synthesizer.manifest['data']}, the diagnoser on "
              f"{diagnoser.manifest['data']}: drawn images may be of another kind")
    notes, numeric = cut(request["note"]), {m: cut(v) for m, v in request.items() if m not in ("image", "note")}
    if synthesizer.manifest.get("seed") != diagnoser.manifest["seed"]:
        print(f"the synthesizer's split is that of seed {synthesizer.manifest.get('seed')}, the diagnoser's of "
              f"{diagnoser.manifest['seed']}: it may have been trained on some of these samples")
    known = study.labelled[rows][filled] & ~data.blank(study.images[rows][filled])  # withheld here, not missing
    labels = study.labels[rows][filled]
    draws = max(16, args.draws) if known.any() else args.draws  # the comparison wants 16
    each = fill_in(diagnoser, synthesizer, notes, numeric, draws, args.steps, args.guidance)
    if known.any():
        images = [im if k else None for im, k in zip(study.images[rows][filled], known)]
        true = diagnoser.predict(images, notes, **numeric)
        print(f"{int(known.sum())} labelled samples whose image was withheld, by words alone, by drawn images "
              f"({args.steps} steps, guidance {args.guidance:g}), and by the true image:")
        compared = {"words only": probabilities[filled], **{f"{k} drawn": each[:k].mean(0) for k in (1, 4, 16)},
                    "true image": true}
        for name, p in compared.items():
            found = metrics.scores(labels[known], p[known])
            print(f"  {name:12s}" + "".join(f"  {k.replace('_', '-')} {v:.3f}" for k, v in found.items()))
    probabilities[filled] = each[:args.draws].mean(0)
    return filled


def predict_file(diagnoser, args):
    """Probabilities of a study file's rows: metrics to stdout, one line per sample to --out."""
    classes = diagnoser.classes
    study = data.load_study(args.data, args.synthetic_notes, classes, training=False)
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
    if "note" in request:
        request["note"] = [None if t is None else str(t) for t in request["note"]]
    numeric = {m: v for m, v in request.items() if m not in ("image", "note")}
    probabilities = diagnoser.predict(request.get("image"), request.get("note"), **numeric)
    known, labels, filled = study.labelled[rows], study.labels[rows], np.zeros(len(rows), bool)
    if args.synthesizer:
        filled = fill_file(diagnoser, args, study, rows, request, probabilities)
    found = metrics.scores(labels[known], probabilities[known]) if known.any() else {}
    of = lambda kind: study.__dict__[kind] or diagnoser.manifest[kind]
    about = " (synthetic notes)" if of("synthetic_notes") else " (synthetic data)" if of("synthetic") else ""
    print(f"{args.data}{about}: {len(rows)} samples, {int(known.sum())} labelled; "
          + ", ".join(f"{k.replace('_', '-')} {v:.3f}" for k, v in found.items()))
    patterns = [data.pattern_name(p, names) + "+drawn image" * drawn for p, drawn in zip(present, filled.tolist())]
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
    parsers = {name: commands.add_parser(name, help=what, allow_abbrev=False) for name, what in COMMANDS.items()}
    for p in parsers.values():
        p.add_argument("folder", type=Path, help="what export.py wrote, for example runs/mora/onnx")
        p.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    samples, predicts = parsers["sample"], parsers["predict"]
    samples.add_argument("--note", action="append", required=True, help="words to draw; may be given several times")
    samples.add_argument("--n", type=int, default=8, help="images of each note (default: 8)")
    samples.add_argument("--seed", type=int, default=0, help="same seed, same images (default: 0)")
    samples.add_argument("--adapter", help="of a hot-swap folder: the adapter's name (default: its base alone)")
    samples.add_argument("--out", type=Path, default=Path("sheet.png"),
                         help="a .png sheet (pictures extra) or an .npy array (default: sheet.png)")
    predicts.add_argument("--image", type=Path, help="picture (pictures extra) or .npy array; leave out if missing")
    predicts.add_argument("--note", help="report in words; leave out if missing")
    predicts.add_argument("--data", type=Path, help="study file: predict all of it and print metrics")
    predicts.add_argument("--synthetic-notes", action="store_true", help="with --data: as in training")
    predicts.add_argument("--split", type=Path, help="with --data: keep to the test rows of this split-sN.npz")
    predicts.add_argument("--missing", help="with --split: apply its stored missing table, TYPE:RATE")
    predicts.add_argument("--out", type=Path, help="with --data: CSV of probabilities")
    predicts.add_argument("--synthesizer", type=Path, metavar="FOLDER",
                          help="what export.py selora wrote: draws the images of samples that have only words")
    predicts.add_argument("--draws", type=int, default=4, help="images drawn per sample (default: 4)")
    for p in (samples, predicts):
        p.add_argument("--steps", type=int, default=20, help="DDIM steps of a drawn image (default: 20)")
        p.add_argument("--guidance", type=float, default=2.0, help="weight of the words in it (default: 2)")
    pairs = zip(argv, argv[1:])  # of the arguments, the first folder that is not --synthesizer's
    folder = next((a for before, a in pairs if before != "--synthesizer"
                   and os.path.isfile(os.path.join(a, "manifest.json"))), None)
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
        from minilora.studies import grey, read_picture  # only here: most requests have no file to read

        colour = diagnoser.manifest["channels"] == 3
        image = read_picture(args.image, colour)
        request["images"] = [image if colour else grey(image)]
    if args.synthesizer and not args.image and (args.note or "").strip():
        print(f"image: {args.draws} drawn from the words by {args.synthesizer}, probabilities averaged")
        synthesizer = Synthesizer(args.synthesizer, args.device)
        rows = {name: v for name, v in request.items() if name != "notes"}
        p = fill_in(diagnoser, synthesizer, [args.note], rows, args.draws, args.steps, args.guidance).mean(0)[0]
        return show(diagnoser, p)
    if not request:
        flags = ", ".join(f"--{f}" for f in ("image", "note", *columns))
        raise Refused(f"nothing to diagnose: give --data FILE.npz, or any of {flags}")
    p = diagnoser.predict(**request)[0]
    present = diagnoser.inputs(request.pop("images", None), request.pop("notes", None), request)[1][0]
    print(f"present: {', '.join(m for m, here in zip(diagnoser.modalities, present) if here)}")
    show(diagnoser, p)


def show(diagnoser, p):
    """Probabilities [C] as bars."""
    for i in np.argsort(-p):
        print(f"{diagnoser.classes[i]:20s} {p[i]:.3f} {'█' * round(30 * float(p[i]))}")
    if diagnoser.manifest["synthetic"] or diagnoser.manifest["synthetic_notes"]:
        kind = "data" if diagnoser.manifest["synthetic"] else "notes"
        print(f"trained on synthetic {kind}: not a diagnosis of anybody")


def free_memory():
    """Bytes of memory that are free, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def sample_sheet(args):
    """Draw --n images of each note into a .png sheet, one row per note, or an .npy array [notes,n,S,S]."""
    if args.n < 1:
        raise Refused(f"--n is {args.n}; must be at least 1")
    if args.out.suffix not in (".png", ".npy"):
        raise Refused(f"--out {args.out}: must end in .png or .npy")
    synthesizer = Synthesizer(args.folder, args.device)
    m, total = synthesizer.manifest, len(args.note) * args.n
    # pixels as float32 and as bytes, before and after they are put together, and the noise and feature maps of a batch
    needed = total * m["channels"] * m["image_size"] ** 2 * 10 + 64 * 512 * m["image_size"] ** 2
    if needed > (free := free_memory()):
        raise Refused(f"--n {args.n}: {total} images need about {needed / 2**30:.1f} GiB; {free / 2**30:.1f} are free")
    print(f"provider {synthesizer.provider}")
    for note in args.note:
        if (words := len(data.words_of(note))) >= m["positions"]:
            print(f"cut to its first {m['positions'] - 1} of {words} words: {note[:60]}...")
    notes = [note for note in args.note for _ in range(args.n)]
    images = synthesizer.sample(notes, args.steps, args.guidance, args.seed, args.adapter)
    images = images.reshape(len(args.note), args.n, *images.shape[1:])
    content = io.BytesIO()
    if args.out.suffix == ".npy":
        np.save(content, images)
    else:
        try:
            from PIL import Image
        except ImportError:
            raise Refused(f"{args.out}: writing pictures needs Pillow: pip install 'minilora[pictures]' "
                          "(or give an .npy name)") from None
        sheet = np.concatenate([np.concatenate(list(row), 1) for row in images])  # [notes S, n S]
        zoom = max(1, 128 // images.shape[2])
        Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(content, "PNG")
    data.write_atomic(args.out, content.getvalue())
    about = "data" if synthesizer.manifest["synthetic"] else "notes" if synthesizer.manifest["synthetic_notes"] else ""
    print(f"{args.out}: {len(notes)} images drawn, of no patient" + f"; trained on synthetic {about}" * bool(about))


def main(argv=None):
    with data.one_line_errors():
        args, columns = command_line(sys.argv[1:] if argv is None else argv)
        if args.command == "check":
            raise SystemExit(0 if check(args.folder, args.device) <= tolerance(own_manifest(args.folder)) else 1)
        if args.command == "sample":
            return sample_sheet(args)
        if args.draws < 1:
            raise Refused(f"--draws is {args.draws}; must be at least 1")
        diagnoser = Diagnoser(args.folder, args.device)
        print(f"provider {diagnoser.provider}")
        predict_file(diagnoser, args) if args.data else predict_one(diagnoser, args, columns)


if __name__ == "__main__":
    main()
