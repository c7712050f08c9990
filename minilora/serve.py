"""Inference from an exported folder: numpy and onnxruntime, never torch.

    from minilora.serve import Diagnoser, Synthesizer
    d = Diagnoser("runs/mora/onnx")
    d.predict(images=[image, None], notes=["fever", "weight loss"])   # [2,C] probabilities
    Synthesizer("runs/selora/onnx").sample(["coin lesion sinistral"])  # uint8 [1,S,S]

`python -m minilora.serve predict runs/mora/onnx ...` is its command line, which stands beside it in
`serve_cli.py`. Skip both files when you read for a method.

Letters: B samples, M modalities, C classes, F numeric columns, P word positions, S image size, ch
image channels, L latent channels, s latent size, K timesteps.
"""

import ctypes
import hashlib
import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime

from minilora import data, prepare, words
from minilora.data import Refused
from minilora.wordpiece import WordPiece

# What a manifest says of the layout of its folder; an exported folder of another format is refused.
# In the first of each kind every graph holds its weights itself; in mora's third every graph takes
# all modalities, those too that the sample has not itself.
FORMATS = {"mora": (1, 2, 3), "selora": (2, 3)}
WEIGHTS = "weights.bin"  # weights that graphs of a folder share; its manifest says where each stands
VOCABULARY = "vocab.txt"  # in a folder whose words are pieces of a vocabulary
# Parity with torch, relative to max(1, |value|): of a probability or a logit; of a pixel in [-1,1]
# or a velocity.
TOLERANCES = {
    ("mora", "float32"): 1e-5,
    ("mora", "float16"): 2e-2,
    ("selora", "float32"): 1e-4,
    ("selora", "float16"): 1e-1,
}
# The entry of a TensorProto that names a file of weights, however long its length is written.
EXTERNAL = re.compile(rb"\x0a(?:\x08|\x88\x80*\x00)location")
# The name of a weight that a graph does not hold itself.
WEIGHT = re.compile(rb"weight-[0-9a-f]{24}")


def tolerance(manifest):
    """How far an exported folder may be from torch."""
    return TOLERANCES[manifest["kind"], manifest["precision"]]


# -------------------------------------------------------------------------------------- manifests


def read_manifest(folder, kind=None):
    """The manifest of an exported folder, after its own hash, its format and the hash of every file
    in it were checked."""
    manifest = own_manifest(folder)
    check_format(folder, manifest)
    folder = Path(folder)
    path = folder / "manifest.json"
    files = {*manifest["graphs"].values()}
    files |= {place["file"] for place in manifest.get("weights", {}).values()}
    if manifest.get("tokenizer") == "wordpiece":
        files.add(VOCABULARY)
    for adapter in manifest.get("adapters", {}).values():
        if adapter:  # the base has no file of its own
            files.add(adapter["file"])
    if not files <= {*manifest["files"]}:
        raise Refused(f"{path}: needs {min(files - {*manifest['files']})}, whose hash it lacks")
    for name, sha256 in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise Refused(f"{file}: missing, but {path} names it")
        if data.sha256(file) != sha256:
            raise Refused(f"{file}: changed or damaged: its sha256 is not that of {path}")
    if kind and manifest["kind"] != kind:
        raise Refused(f"{folder}: holds a '{manifest['kind']}' export; this needs '{kind}'")
    return manifest


def check_format(folder, manifest):
    """`Refused` unless the manifest of a folder is of the format that this version reads."""
    written = manifest.get("format")
    readable = FORMATS[manifest["kind"]]
    if type(written) is int and written in readable:
        return
    writer = "another version"
    if type(written) is int and 0 < written < min(readable):
        writer = "an earlier version"
    raise Refused(
        f"{folder}: exported by {writer} of minilora (format {written!s:.20}; this one reads "
        f"{' and '.join(map(str, readable))}); train its run with this version and export again"
    )


def own_manifest(folder):
    """manifest.json, checked against its own hash only: no other file is read. It may be of another
    format, so that a folder of an earlier version can be exported over."""
    path = Path(folder) / "manifest.json"
    if not path.is_file():
        raise Refused(f"{folder}: not an exported folder (no manifest.json); export.py makes one")
    try:
        manifest = json.loads(path.read_bytes())
        body = {key: value for key, value in manifest.items() if key != "sha256"}
        intact = manifest["sha256"] == data.digest(body)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise Refused(f"{path}: changed or damaged (its hash does not fit its content)")
    # A stranger's manifest can have a hash that fits.
    for key, wanted in entries(manifest).items():
        if key not in manifest or not fits(manifest[key], wanted):
            value = str(manifest.get(key, "missing"))[:60]
            raise Refused(f"{path}: '{key}' is {value}; export.py does not write that")
    return manifest


def entries(manifest):
    """{key: what `fits` compares its value with} of all that is read from a manifest of its kind.
    The order is that of the checks: a check can rely on the ones above it."""

    def are_modalities(value):
        return are_names(value) and {*value} - {"image", "note"} == {*manifest["numeric"]}

    common = {
        "kind": ("mora", "selora"),
        "files": are_files,
        "precision": ("float32", "float16"),
        "image_size": range(1, 2**14 + 1),
        "channels": (1, 3),
        "buckets": range(4, 2**31 + 1),
        "positions": range(1, 2**14 + 1),
        "synthetic": (True, False),
        "synthetic_notes": (True, False),
    }
    if "fit" in manifest:
        common["fit"] = data.FITS
    if "tokenizer" in manifest:
        common["tokenizer"] = (*words.CUTS, "wordpiece")
    if "prepared" in manifest:
        common["prepared"] = is_record
    if "weights" in manifest:
        common["weights"] = partial(is_table, test=is_weight)
    if manifest.get("kind") == "mora":
        if manifest.get("format") == 3:
            common["absent"] = ("fill",)
        elif "absent" in manifest:
            common["absent"] = ("mask", "dummy")
        return common | {
            "numeric": partial(is_table, test=are_columns),
            "classes": are_names,
            "multilabel": (True, False),
            "modalities": are_modalities,
            "graphs": lambda value: is_table(value, is_file) and "mask" in value,
            "seed": range(2**31 + 1),
            "data": is_origin,
        }
    return common | {
        "latent": range(1, 2**10 + 1),
        "latent_size": range(1, 2**12 + 1),
        "timesteps": range(1, 2**20 + 1),
        "graphs": lambda value: is_table(value, is_file) and "sampler" in value,
        "data": is_origin,
        "adapters": partial(is_table, test=is_adapter),
    }


def fits(value, wanted):
    """Whether a value passes the function `wanted`, or is one of the values in the tuple or range
    `wanted` and of their type: neither True nor 1.0 is 1."""
    if callable(wanted):
        return wanted(value)
    return type(value) is type(wanted[0]) and value in wanted


def is_table(value, test):
    """Whether a value is a dict of nothing but values that pass the test."""
    return isinstance(value, dict) and all(map(test, value.values()))


def is_file(value):
    """Whether a value is a file name: a manifest must not reach outside its folder."""
    return isinstance(value, str) and Path(value).name == value


def are_files(value):
    """Whether a value is {file name: hash}, with that of the golden outputs."""
    if not isinstance(value, dict) or "golden.npz" not in value:
        return False
    return all(is_file(name) and isinstance(sha256, str) for name, sha256 in value.items())


def is_origin(value):
    """Whether a value can say which study a model was trained on."""
    return isinstance(value, (str, dict))


def is_record(value):
    """Whether a value says what an import did."""
    try:
        prepare.check_record(value)
    except (ValueError, TypeError):
        return False
    return True


def is_weight(value):
    """Whether a value can say where an array stands in a file of weights."""
    if not isinstance(value, dict) or {*value} != {"dtype", "shape", "file", "offset"}:
        return False
    if not is_file(value["file"]):
        return False
    shape = value["shape"]
    numbers = [value["offset"], *shape] if isinstance(shape, list) else [None]
    whole = all(type(number) is int and 0 <= number < 2**40 for number in numbers)
    return whole and value["dtype"] in ("float32", "float16", "int64") and len(shape) <= 8


def is_adapter(value):
    """Whether a value names an adapter's file, or is None, which is the base."""
    return value is None or (isinstance(value, dict) and is_file(value.get("file")))


def are_names(value):
    """Whether a value is a list of texts, at least one, none empty, none twice."""
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(text, str) and text for text in value) and len(set(value)) == len(value)


def are_columns(value):
    """Whether a value is {'columns': F names, 'mean': F numbers, 'scale': F numbers}."""
    if not isinstance(value, dict) or not are_names(value.get("columns")):
        return False
    for key in ("mean", "scale"):
        row = value.get(key)
        if not isinstance(row, list) or len(row) != len(value["columns"]):
            return False
        if not all(isinstance(number, (int, float)) for number in row):
            return False
    return True


# --------------------------------------------------------------------------------------- sessions


def providers(device):
    """onnxruntime providers to ask for. 'auto' asks for CUDA only where an NVIDIA driver is loaded,
    to spare the CPU user two lines of warnings."""
    if device not in ("auto", "cpu", "cuda"):
        raise Refused(f"device '{device}' is not known; use auto, cpu or cuda")
    if device == "auto":
        try:
            ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        except OSError:
            device = "cpu"
    if device == "cpu":
        return ["CPUExecutionProvider"]
    if hasattr(onnxruntime, "preload_dlls"):
        # CUDA libraries of the [gpu] extra, or of torch where it is installed
        onnxruntime.preload_dlls()
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        return ["CPUExecutionProvider"]
    # TF32, the default there, has 10 bits of mantissa: parity with torch would be 1e-3 instead of
    # 1e-5.
    return [("CUDAExecutionProvider", {"use_tf32": 0}), "CPUExecutionProvider"]


def stored_weights(folder, manifest, names):
    """{name: OrtValue} of the weights of a folder that a graph does not hold itself. The bytes are
    hashed as they are read: what is checked is what is used. onnxruntime copies them, so nothing of
    this has to stay in memory."""
    table = manifest.get("weights", {})
    files = {}  # {file: its bytes}
    weights = {}
    for name in names:
        if name not in table:
            raise Refused(f"{folder}: a graph needs '{name}', which manifest.json lacks")
        place = table[name]
        path = folder / place["file"]
        if path.name not in files:
            content = np.fromfile(path, np.uint8)
            if hashlib.sha256(content).hexdigest() != manifest["files"][path.name]:
                raise Refused(f"{path}: was changed since the folder was opened; open it again")
            files[path.name] = content
        content = files[path.name]
        dtype = np.dtype(place["dtype"])
        end = place["offset"] + dtype.itemsize * math.prod(place["shape"])
        if end > len(content):
            raise Refused(f"{path}: weight '{name}' does not lie in it")
        array = content[place["offset"] : end].view(dtype).reshape(place["shape"])
        aligned = np.require(array, requirements="A")
        weights[name] = onnxruntime.OrtValue.ortvalue_from_numpy(aligned)
    return weights


def open_session(path, device, manifest, quiet=False, spare=False):
    """An onnxruntime session on the device, of a graph in a folder with this manifest; `Refused` if
    CUDA was asked for by name and did not load. quiet: no line of warning for each weight that can
    be overridden. spare: as in `Diagnoser`."""
    content = Path(path).read_bytes()
    wanted = providers(device)
    if EXTERNAL.search(content):
        raise Refused(f"{path}: keeps weights in another file; export.py writes none that do")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3 if quiet else 2
    if spare:
        options.enable_cpu_mem_arena = False
        options.add_session_config_entry("session.disable_prepacking", "1")
    names = sorted({name.decode() for name in WEIGHT.findall(content)})
    # As bytes that were hashed: a graph names no file, so none can be put in its place.
    weights = stored_weights(path.parent, manifest, names)
    options.add_external_initializers([*weights], [*weights.values()])
    try:
        session = onnxruntime.InferenceSession(content, options, providers=wanted)
    except Exception as error:  # onnxruntime raises its own family of exceptions
        reason = str(error).splitlines()[0]
        raise Refused(f"{path}: onnxruntime cannot load it ({reason})") from None
    # Only the session's own list of providers is true.
    if device == "cuda" and session.get_providers()[0] != "CUDAExecutionProvider":
        raise Refused(
            f"device 'cuda': CUDA did not load in onnxruntime {onnxruntime.__version__}; "
            "it runs on CPU. pip install 'minilora[gpu]' brings the libraries, "
            "--device cpu goes without"
        )
    return session


def unchanged(served, name):
    """The path of a file of a served folder, which is opened at its first use; `Refused` if it is
    another by then."""
    path = served.folder / name
    if not path.is_file() or data.sha256(path) != served.manifest["files"][name]:
        raise Refused(f"{path}: was changed since the folder was opened; open it again")
    return path


def tokenizer(served):
    """The function notes -> word ids [B,P] of a served folder: hashed words, or the pieces of its
    vocabulary."""
    m = served.manifest
    if m.get("tokenizer") != "wordpiece":
        cut = words.CUTS[m.get("tokenizer", "crc32")]
        return partial(words.tokenize, buckets=m["buckets"], positions=m["positions"], cut=cut)
    path = unchanged(served, VOCABULARY)
    with data.refusing(path):
        vocabulary = WordPiece(path.read_bytes().decode("utf-8"))
    if vocabulary.size != m["buckets"]:
        raise Refused(f"{path}: has {vocabulary.size} pieces; the manifest says {m['buckets']}")
    return partial(vocabulary.tokenize, positions=m["positions"])


# -------------------------------------------------------------------------------------- diagnosis


class Diagnoser:
    """A diagnosis model from a folder that `export.py mora` wrote.

    batch: samples that are read and run at once; spare: slower, with less memory.
    `.provider` is what onnxruntime really uses, `.manifest` what the folder says of itself (classes,
    modalities, ...), `.fills` whether it was trained with `--absent fill`: every sample then has
    content for every modality, and `predict` is told which is not the patient's own.
    """

    def __init__(self, folder, device="auto", batch=64, spare=False):
        self.folder = Path(folder)
        self.device = device
        self.spare = spare
        self.batch = batch
        self.manifest = read_manifest(folder, "mora")
        self.modalities = tuple(self.manifest["modalities"])
        self.classes = self.manifest["classes"]
        self.numeric = self.manifest["numeric"]
        self.prepared = self.manifest.get("prepared", {})
        self.fills = self.manifest.get("absent") == "fill"
        self.tokenizer = tokenizer(self)
        self.sessions = {}
        self.provider = self.session("mask").get_providers()[0]

    def session(self, graph):
        """The session of a graph ('mask' or a pattern such as 'image+note'), made at first use."""
        if graph not in self.sessions:
            path = unchanged(self, self.manifest["graphs"][graph])
            session = open_session(path, self.device, self.manifest, spare=self.spare)
            self.sessions[graph] = session
        return self.sessions[graph]

    def run(self, graph, inputs):
        """(logits, probabilities) [B,C] of one graph from its own inputs, whose ids and shapes are
        checked."""
        session = self.session(graph)
        buckets = self.manifest["buckets"]
        feed = {}
        for spec in session.get_inputs():
            name = spec.name
            if name not in inputs:
                raise Refused(f"graph '{graph}' needs input '{name}'")
            value = inputs[name]
            if list(value.shape[1:]) != spec.shape[1:]:
                raise Refused(
                    f"'{name}' has shape {list(value.shape)}; "
                    f"graph '{graph}' takes {['batch', *spec.shape[1:]]}"
                )
            if name == "note" and value.size:
                lowest = value.min()
                highest = value.max()
                if not 0 <= lowest <= highest < buckets:
                    raise Refused(f"word ids are {lowest}..{highest}; must be in [0,{buckets})")
            feed[name] = value
        return session.run(["logits", "probabilities"], feed)

    def predict(self, images=None, notes=None, filled=None, **numeric):
        """Probabilities [B,C] float32, whatever each of the B samples has.

        images: B of uint8 [H,W] or [H,W,3] of any size, or None. notes: B of str, or None.
        numeric: by modality name, B rows [F] in the order of
        `manifest['numeric'][name]['columns']`, or {column: value}, or None; NaN = that value is
        missing. filled: of a model that was trained with absent inputs filled, B collections of the
        modalities, as {'image'}, whose content is not the patient's own but another patient's, or
        drawn. Samples are grouped by what is present, and each group runs its own graph. Raises
        `Refused`, a ValueError, that says which sample is wrong and how.
        """
        given, B = self.request(images, notes, numeric)
        imputed = self.imputed(filled, B)  # [B,M]
        result = np.zeros((B, len(self.classes)), np.float32)
        for first in range(0, B, self.batch):
            samples = range(first, min(first + self.batch, B))
            inputs, present = self.inputs(given, samples, imputed)
            for pattern in np.unique(present, axis=0):  # [M]
                rows = np.flatnonzero((present == pattern).all(1))
                graph = data.pattern_name(pattern, self.modalities)
                if graph not in self.manifest["graphs"]:
                    graph = "mask"
                feed = {name: values[rows] for name, values in inputs.items()}
                feed["present"] = present[rows].astype(np.float32)
                result[first + rows] = self.run(graph, feed)[1]
        return result

    def request(self, images, notes, numeric):
        """({modality: list of B values}, B) of what `predict` was given."""
        given = {"image": images, "note": notes, **numeric}
        given = {name: values for name, values in given.items() if values is not None}
        for name, values in given.items():
            single = not hasattr(values, "__len__") or getattr(values, "ndim", 1) == 0
            if single or isinstance(values, (str, bytes, dict)):
                raise Refused(
                    f"{name} is one {type(values).__name__}; give a list, one item per sample"
                )
        given = {name: list(values) for name, values in given.items()}
        for name in given:
            if name not in self.modalities:
                choices = ", ".join(self.modalities)
                raise Refused(f"modality '{name}' is not of this model; it has {choices}")
        lengths = {len(values) for values in given.values()}
        if len(lengths) != 1 or 0 in lengths:
            counts = ", ".join(f"{name} {len(values)}" for name, values in given.items())
            raise Refused(
                "every modality needs a list of the same length, at least 1: "
                f"{counts or 'no modality'}"
            )
        return given, lengths.pop()

    def imputed(self, filled, B):
        """[B,M] bool: which content `predict` was told is not the patient's own."""
        imputed = np.zeros((B, len(self.modalities)), bool)
        if filled is None:
            return imputed
        if not isinstance(filled, (list, tuple)):
            raise Refused(f"filled is one {type(filled).__name__}; give a list, one collection of "
                          "modalities per sample")
        if len(filled) != B:
            raise Refused(f"filled has {len(filled)} items for {B} samples; give one per sample")
        for i, names in enumerate(filled):
            if not isinstance(names, (set, frozenset, list, tuple)):
                raise Refused(f"filled of sample {i} is {type(names).__name__}; need a set or a "
                              "list of modalities, empty if all is the patient's own")
            for name in names:
                if not isinstance(name, str) or name not in self.modalities:
                    choices = ", ".join(self.modalities)
                    raise Refused(f"filled of sample {i} names {name!r:.40}; this model has {choices}")
                if not self.fills:
                    raise Refused(
                        f"filled of sample {i} names '{name}', but {self.folder} was not trained "
                        "with absent inputs filled; leave filled out, and what is absent too"
                    )
                imputed[i, self.modalities.index(name)] = True
        return imputed

    def inputs(self, given, samples, imputed=None):
        """({modality: array} with zeros for what is absent, presence [b,M] bool) of b samples of a
        request, a range. What is `imputed`, [B,M] of the whole request, is not present."""
        present = np.zeros((len(samples), len(self.modalities)), bool)
        inputs = {}
        for column, name in enumerate(self.modalities):
            shape, dtype, encode = self.encoder(name)
            # What is absent stays zero: NaN leaks through a mask.
            inputs[name] = np.zeros((len(samples), *shape), dtype)
            for row, i in enumerate(samples):
                value = given[name][i] if name in given else None
                if value is None:
                    continue
                array = encode(value, f"{name} of sample {i}")
                if array is not None:
                    inputs[name][row] = array
                    present[row, column] = True
        empty = ~present.any(1)
        if empty.any():
            choices = ", no ".join(self.modalities)
            raise Refused(f"sample {samples[int(empty.argmax())]} has nothing: no {choices}")
        if self.fills:
            self.check_whole(present, samples)
        if imputed is not None:
            present &= ~imputed[samples.start : samples.stop]
        empty = ~present.any(1)
        if empty.any():
            i = samples[int(empty.argmax())]
            choices = ", ".join(self.modalities)
            raise Refused(f"sample {i}: all of {choices} is named in filled, so that nothing is the "
                          "patient's own")
        return inputs, present

    def check_whole(self, has, samples):
        """`Refused` unless each of b samples, a range, has content for every modality; has [b,M]."""
        lacks = ~has
        if lacks.any():
            row, column = np.argwhere(lacks)[0]
            name = self.modalities[column]
            raise Refused(
                f"sample {samples[row]} has no {name}: {self.folder} was trained with absent inputs "
                f"filled: give content for {name} and name it in filled"
            )

    def encoder(self, name):
        """(shape, dtype, function) of a modality: the function takes one sample's value and what to
        call it in an error, and gives the array of that shape, or None where the value says no more
        than a missing one."""
        m = self.manifest
        if name == "image":
            return (m["channels"], m["image_size"], m["image_size"]), np.float32, self.image
        if name == "note":
            return (m["positions"],), np.int64, self.note
        return (len(self.numeric[name]["columns"]),), np.float32, partial(self.row, name)

    def image(self, value, where):
        """[ch,S,S] in [-1,1] of uint8 [H,W] or [H,W,3]; None of one that is all black: missing, as
        in a study file."""
        try:
            value = np.asarray(value)
        except (TypeError, ValueError):  # rows of different lengths
            raise Refused(f"{where} is no array; need uint8 [H,W] or [H,W,3]") from None
        shaped = value.ndim == 2 or (value.ndim == 3 and value.shape[2] == 3)
        if value.dtype != np.uint8 or not shaped or 0 in value.shape:
            form = data.form(value)
            if value.dtype.kind == "f" and np.isnan(value).any():
                form += ", with NaN"
            raise Refused(f"{where} is {form}; need uint8 [H,W] or [H,W,3]")
        m = self.manifest
        if self.prepared and not self.prepared["rgb"]:
            value = data.grey(value)
        square = data.square(value[None], m.get("fit", "squeeze"))
        if self.prepared:  # the import's resize comes before that of training
            square = data.resize(square, self.prepared["size"])
            if value.min() == value.max():
                return None  # one grey level throughout: missing to the import
        pixels = data.prepare_images(square, m["image_size"], m["channels"])[0]
        return pixels if square.any() else None

    def note(self, value, where):
        """Word ids [P] of a text; None of one without a word."""
        if not isinstance(value, str):
            raise Refused(
                f"{where} is {type(value).__name__}; need a string, or None if it is missing"
            )
        text = prepare.read_note(value, self.prepared)
        return self.tokenizer([text])[0] if text else None

    def row(self, name, value, where):
        """[F] standardised numbers of a row or {column: number}; None of one that is all NaN."""
        spec = self.numeric[name]
        columns = spec["columns"]
        header = ", ".join(columns)
        if isinstance(value, dict):
            for key in value:
                if key not in columns:
                    raise Refused(f"{where}: column '{key}' is not known; columns are {header}")
            value = [value.get(column) for column in columns]
        try:
            value = list(value)
            if len(value) == len(columns):
                value = [self.number(name, *pair, where) for pair in zip(columns, value)]
            with np.errstate(over="ignore"):  # inf is refused below
                value = np.array(value, np.float32)  # None becomes NaN
        except Refused:
            raise
        except (TypeError, ValueError):
            raise Refused(f"{where} is not a row of numbers") from None
        if value.shape != (len(columns),) or np.isinf(value).any():
            raise Refused(
                f"{where} is {value.tolist()}; "
                f"need {len(columns)} finite numbers or NaN: {header}"
            )
        mean = np.array(spec["mean"], np.float32)
        standard = (value - mean) / np.array(spec["scale"], np.float32)
        if (abs(standard) > 1e6).any():
            raise Refused(
                f"{where} is {value.tolist()}: "
                "more than a million standard deviations from training's mean"
            )
        return None if np.isnan(standard).all() else standard


    def number(self, name, column, value, where):
        """The number, or None, that a value of a numeric column stands for: a number, None, or a
        text as the import's table wrote it."""
        na = self.prepared.get("na", ())
        if isinstance(value, str):
            if prepare.says_nothing(value, na):
                return None
            marks = self.prepared.get("numbers", {}).get(name, {}).get(column, {})
            number = prepare.number(value, **marks)
            if number is None:
                decimal = marks.get("decimal", ".")
                raise Refused(f"{where}: {column} is '{value:.40}', which is no number where "
                              f"'{decimal}' is the decimal mark")
            value = number
        if value is not None and value in [prepare.number(text) for text in na]:
            return None  # a sentinel
        return value


# -------------------------------------------------------------------------------------- synthesis


class Synthesizer:
    """Images from words, by a folder that `export.py selora` wrote: one `session.run` from noise to
    image.

    The autoencoder's decoder gives the mean of the images that have a latent, without the noise of
    a pixel. Grain is that noise, drawn back from the decoder's own distribution: normal, each pixel
    by itself, of one standard deviation per channel, which was measured on training images. Where
    the autoencoder leaves out structure, grain does not bring it back: it puts noise in its place.

    `.adapters` are the names that `sample` can take: of a merged export none, of a hot-swap folder
    'base' and one for each run. `.provider` is what onnxruntime really uses, `.manifest` what the
    folder says of itself."""

    def __init__(self, folder, device="auto"):
        self.folder = Path(folder)
        self.manifest = read_manifest(folder, "selora")
        self.tokenizer = tokenizer(self)
        self.adapters = tuple(self.manifest["adapters"])
        self.loaded = {}
        path = self.folder / self.manifest["graphs"]["sampler"]
        self.session = open_session(path, device, self.manifest, quiet=bool(self.adapters))
        self.provider = self.session.get_providers()[0]

    def options(self, adapter):
        """RunOptions with the named adapter active, or None for the model as it is; `Refused` if
        there is none."""
        if adapter is None or (adapter == "base" and adapter in self.adapters):
            return None
        if adapter not in self.adapters:
            choices = ", ".join(self.adapters) or "none"
            raise Refused(f"adapter '{adapter}' is not in {self.folder}; it has {choices}")
        if adapter not in self.loaded:
            path = unchanged(self, self.manifest["adapters"][adapter]["file"])
            weights = onnxruntime.LoraAdapter()
            weights.Load(str(path))
            self.loaded[adapter] = weights  # only now: an empty one would draw with the base alone
        # Options of its own for each run: nothing of another adapter is left in them.
        options = onnxruntime.RunOptions()
        options.add_active_adapter(self.loaded[adapter])
        return options

    def run(self, noise, grain, ids, guidance, timesteps, adapter=None):
        """Images [B,ch,S,S] float32 in [-1,1] from noise [B,L,s,s], grain [B,ch,S,S], ids [B,P], a
        number and falling timesteps [K]. Noise and grain are normal(0, 1); grain of zeros is none.
        """
        feed = {
            "noise": noise,
            "grain": grain,
            "ids": ids,
            "guidance": np.array(guidance, np.float32),
            "timesteps": timesteps,
        }
        return self.session.run(["images"], feed, self.options(adapter))[0]

    def sample(self, notes, steps=10, guidance=3.0, seed=0, adapter=None, grain=True):
        """uint8 [B,S,S] or [B,S,S,3], an image for each of B notes ('' draws without words).

        steps: DDIM steps; guidance: 0 ignores the words, 1 is the model itself, more exaggerates
        what they say; grain: False gives the decoder's mean, smoother than a real image. Image b
        depends on note b, seed and b alone (to a grey level: sums are ordered by batch), and is
        drawn from the same latent with and without grain. Raises `Refused`, a ValueError, that says
        which argument is wrong and how."""
        if isinstance(notes, (str, bytes)) or not hasattr(notes, "__len__") or not len(notes):
            raise Refused("notes must be a list of at least one string")
        for i, note in enumerate(notes):
            if not isinstance(note, str):
                raise Refused(f"note of sample {i} is {type(note).__name__}; need a string")
        m = self.manifest
        if not within(steps, (int, np.integer), 1, m["timesteps"]):
            raise Refused(f"steps is {steps!r}; need an integer from 1 to {m['timesteps']}")
        if not within(guidance, (int, float, np.number), 0, 100):
            raise Refused(f"guidance is {guidance!r}; need a number from 0 to 100")
        if not within(seed, (int, np.integer), 0, 2**63 - 1):
            raise Refused(f"seed is {seed!r}; need an integer of at least 0")
        if not isinstance(grain, bool):
            raise Refused(f"grain is {grain!r}; need True or False")
        timesteps = walk(steps, m["timesteps"])
        prepared = m.get("prepared", {})
        notes = [prepare.hidden(note, prepared) for note in notes]
        ids = self.tokenizer(notes)  # [B,P]
        latents = (m["latent"], m["latent_size"], m["latent_size"])
        pixels = (m["channels"], m["image_size"], m["image_size"])
        images = []
        for rows in np.split(np.arange(len(notes)), range(64, len(notes), 64)):
            noise = np.zeros((len(rows), *latents), np.float32)  # [B,L,s,s]
            pixel_noise = np.zeros((len(rows), *pixels), np.float32)  # [B,ch,S,S]
            for i, b in enumerate(rows):
                rng = np.random.default_rng((seed, b))
                noise[i] = rng.standard_normal(latents, np.float32)
                if grain:
                    pixel_noise[i] = rng.standard_normal(pixels, np.float32)
            given = (noise, pixel_noise, ids[rows], guidance, timesteps)
            images.append(self.run(*given, adapter))
        images = np.rint((np.concatenate(images) + 1) * 127.5).astype(np.uint8)  # [B,ch,S,S]
        return images[:, 0] if images.shape[1] == 1 else np.moveaxis(images, 1, 3)


def within(value, kinds, lowest, highest):
    """Whether a value is a number of these kinds in [lowest, highest]; True and False are none."""
    return isinstance(value, kinds) and not isinstance(value, bool) and lowest <= value <= highest


def walk(steps, schedule):
    """`steps` falling timesteps [steps] int64, evenly spaced, from the last of the schedule on."""
    return np.rint(np.arange(steps, 0, -1) * schedule / steps).astype(np.int64) - 1


def fill_in(
    diagnoser, synthesizer, notes, numeric, draws, steps, guidance, grain=True, filled=None
):
    """Probabilities [draws,B,C] of samples that have words but no image: for each draw an image
    from the words, then the diagnosis of the complete sample. The mean over draws marginalises the
    missing image.

    notes: B of str; numeric: {modality: B rows or None}; filled: B collections of what else is not
    the patient's own, as `Diagnoser.predict` takes them. Draw k is that of seed k, so fewer draws
    are the first of more. `Refused` if the two models do not fit: no image modality, other image
    sizes or channels."""
    if not {"image", "note"} <= set(diagnoser.modalities):
        names = ", ".join(diagnoser.modalities)
        raise Refused(f"{diagnoser.folder}: has {names}; filling in needs image and note")
    for key, what in (("image_size", "images of size"), ("channels", "image channels:")):
        size = synthesizer.manifest[key]
        wanted = diagnoser.manifest[key]
        if size != wanted:
            raise Refused(
                f"{synthesizer.folder}: draws {what} {size}; "
                f"{diagnoser.folder} was trained on {wanted}"
            )
    if diagnoser.fills:  # told that the images are drawn; any other model takes them for its own
        filled = [{*names, "image"} for names in filled or [()] * len(notes)]
    probabilities = []
    for k in range(draws):
        images = synthesizer.sample(notes, steps, guidance, seed=k, grain=grain)
        probabilities.append(diagnoser.predict(list(images), notes, filled, **numeric))
    return np.stack(probabilities)


# ----------------------------------------------------------------------------------------- parity


def check(folder, device="auto", spare=False):
    """Rerun the golden inputs at batch sizes all and 1; prints parity with torch and the provider.
    Returns the largest difference over all graphs, relative to max(1, |value|): of probabilities
    and logits, of pixels in [-1,1]. spare: as in `Diagnoser`."""
    manifest = read_manifest(folder)
    if manifest["kind"] == "mora":
        served = Diagnoser(folder, device, spare=spare)
        graphs = golden_mora
    else:
        served = Synthesizer(folder, device)
        graphs = golden_selora
    golden = data.read_npz(Path(folder) / "golden.npz")
    names = manifest["files"]
    print(f"{len(names)} files are what the manifest says; provider {served.provider}")
    worst = 0.0
    for name, run, wanted in graphs(served, golden, device):
        n = len(wanted[0])
        batches = [list(range(n)), *([i] for i in range(n))]
        error = 0.0
        for rows in batches:
            for output, expected in zip(run(rows), wanted):
                error = max(error, difference(output, expected[rows]))
        worst = max(worst, error)
        print(f"  {name:32s} parity with torch {error:.1e} at batch {n} and 1")
    limit = tolerance(manifest)
    verdict = "passed" if worst <= limit else "FAILED"
    print(f"{verdict}: largest difference {worst:.1e}, limit {limit:.0e}")
    return worst


def difference(output, expected):
    """The largest difference, relative to max(1, |value|); infinite if an output is no number."""
    largest = float(np.max(abs(output - expected) / np.maximum(1, abs(expected))))
    return largest if np.isfinite(largest) else np.inf


def give_back():
    """Return freed memory to the system; glibc may keep as much as a session's weights."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # another C library
        pass


def golden_mora(diagnoser, golden, device):
    """(graph, a function rows -> outputs, what torch gave) for each graph."""
    inputs = {name: values for name, values in golden.items() if " " not in name}

    def run(graph, rows):
        return diagnoser.run(graph, {name: values[rows] for name, values in inputs.items()})

    for graph in diagnoser.manifest["graphs"]:
        diagnoser.sessions.clear()  # one at a time: each holds the weights once more
        give_back()
        wanted = (golden[f"logits {graph}"], golden[f"probabilities {graph}"])
        yield graph, partial(run, graph), wanted


def golden_selora(synthesizer, golden, device):
    """The same of the sampler, with each adapter, and of the step graph."""

    def run(adapter, rows):
        noise, grain, ids = (golden[name][rows] for name in ("noise", "grain", "ids"))
        guidance = golden["guidance"]
        return [synthesizer.run(noise, grain, ids, guidance, golden["timesteps"], adapter)]

    for name in synthesizer.adapters or [None]:
        suffix = f" {name}" if name else ""
        yield f"sampler{suffix}", partial(run, name), [golden[f"images{suffix}"]]
    if "denoise" in synthesizer.manifest["graphs"]:
        path = synthesizer.folder / synthesizer.manifest["graphs"]["denoise"]
        session = open_session(path, device, synthesizer.manifest)

        def denoise(rows):
            return session.run(["velocity"], {name: golden[name][rows] for name in ("z", "t", "ids")})

        yield "denoise", denoise, [golden["velocity"]]


if __name__ == "__main__":
    # The command line stands beside this file and imports it, so it is started by name.
    import runpy

    runpy.run_module("minilora.serve_cli", run_name="__main__")
