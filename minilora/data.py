"""Data without torch: study files, missing tables, splits, resize, and the checked files they come
from.

Training and serving share every function that touches an input, so that a served model sees what
the trained one saw. Skip this file when you want to learn the method: read `mora.py`, `vit.py` and
`train_mora.py`, in that order.

Letters: N samples, M modalities, C classes, F numeric columns, P word positions, S image size.
"""

import hashlib
import io
import json
import math
import os
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from minilora import prepare

# Names that a numeric modality cannot take: they mean something in files, graphs or missing tables.
RESERVED = (
    "image", "images", "note", "notes", "present", "mask", "any", "both", "label",
    "logits", "probabilities", "labels", "lines", "prepared", "report", "filled",
)  # fmt: skip
FITS = ("squeeze", "crop", "pad")  # how an image becomes square, see `square`


class Refused(ValueError):
    """Input that cannot be used. The message is one line: the thing, its value, the limit."""


@contextmanager
def refusing(place=""):
    """Turn what a lesson file raises at names and sizes that do not fit into `Refused`. place: the
    file or flag that they come from; of a file, entries of another type count too."""
    try:
        yield
    except (TypeError, ValueError) if place else ValueError as error:
        raise Refused(f"{place}: {error}" if place else str(error)) from None


@contextmanager
def one_line_errors():
    """Turn `Refused` into one line on stderr and exit code 2; every command line runs inside it."""
    try:
        yield
    except Refused as error:
        raise SystemExit(_complain(str(error))) from None
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        # Disk full, read-only folder: still one line, with the path that failed.
        place = error.filename or "file system"
        raise SystemExit(_complain(f"{place}: {error.strerror or error}")) from None


def _complain(message):
    """Print an error as one line on stderr; returns the exit code."""
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


# ------------------------------------------------------------------------------------------ files


def write_atomic(path, content):
    """Write bytes, a buffer or str so that `path` holds either its old content or all of the new,
    also after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder: os.replace is atomic only within a file system
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(temporary, path)
    except OSError as error:
        error.filename = str(path)  # a full disk does not say which file it was
        raise
    finally:
        temporary.unlink(missing_ok=True)


def npz_bytes(arrays):
    """The bytes of an .npz of {name: array}; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def as_json(value):
    """A value as JSON can hold it: numpy's numbers as Python's, None for what is not finite."""
    if isinstance(value, dict):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_npz(path):
    """{name: array} of an .npz file, never unpickling; `Refused` if it is missing, damaged or holds
    Python objects."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    with open(path, "rb") as f:
        is_npy = f.read(6) == b"\x93NUMPY"
    if not is_npy and not zipfile.is_zipfile(path):
        raise Refused(f"{path}: not an .npz archive")
    size = path.stat().st_size
    try:
        with np.load(path, allow_pickle=False) as archive:  # a single array (.npy) fails here
            content = sum(entry.file_size for entry in archive.zip.infolist())
            # Images shrink to a half, blank columns to a hundredth.
            if content <= 100 * size + 2**26:
                return {name: archive[name] for name in archive.files}
    except Exception as error:
        # Zip, header and checksum errors come as many types, all of which mean the same here. After
        # "If you", numpy goes on to recommend unpickling the file.
        kind = type(error).__name__
        reason = str(error).split(". If you")[0]
        raise Refused(f"{path}: not a readable .npz archive ({kind}: {reason})") from None
    raise Refused(
        f"{path}: {size:,} bytes would unpack to {content:,}; the limit is 100 times as many"
    )


def origin(report):
    """How far the numbers of a report are about anything real."""
    if report["synthetic"]:
        return "synthetic data"
    if report["synthetic_notes"]:
        return "synthetic notes"
    return "real data"


def fingerprint(study):
    """Hex digest of what a study holds: equal studies have equal ones, whatever their files."""
    arrays = _arrays(study, "labels", "images", "notes") | study.numeric | study.attributes
    return hashlib.sha256(npz_bytes(arrays)).hexdigest()


def _arrays(study, *names):
    """{name: array} of the fields with these names that a study has."""
    fields = {name: getattr(study, name) for name in names}
    return {name: array for name, array in fields.items() if array is not None}


def form(array):
    """Type and shape of an array, in words: 'uint8 [40, 8, 8]'."""
    return f"{array.dtype} {list(array.shape)}"


def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value):
    """Hex digest of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------- studies


@dataclass
class Study:
    """Samples of up to M modalities. A modality that the file lacks is None (image, note) or not in
    `numeric`.

    images [N,H,W] or [N,H,W,3] uint8, all black = missing; notes [N] str, '' = missing; numeric
    {name: [N,F] float32}, NaN = missing; columns {name: F column names}; labels [N] int64 in [-1,C)
    or [N,C] in {-1,0,1} (several findings; -1 = unlabelled); patients [N] str or None; lines [N]:
    where each sample stands in its spreadsheet, or None; fixed_split [N] of 0 train, 1 val, 2 test,
    or None; attributes {name: [N] int64}: what a backbone can be pretrained on, -1 = ignore; fit: how
    the images became square (see `square`); prepared: what an import did to it (see prepare.py), or
    {}.
    """

    name: str
    labels: np.ndarray
    class_names: list
    images: np.ndarray | None = None
    notes: np.ndarray | None = None
    numeric: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)
    patients: np.ndarray | None = None
    lines: np.ndarray | None = None
    fixed_split: np.ndarray | None = None
    attributes: dict = field(default_factory=dict)
    synthetic: bool = False  # drawn, not measured
    synthetic_notes: bool = False  # real images, templated notes
    fit: str = "squeeze"
    prepared: dict = field(default_factory=dict)
    report: tuple = ()  # what an import said, in lines; it stays in the study file
    rows: np.ndarray | None = None  # of each sample in its file, where some were left out

    def __len__(self):
        return len(self.labels)

    @property
    def multilabel(self):
        return self.labels.ndim == 2

    @property
    def modalities(self):
        """Names in canonical order: image, note, then the numeric ones as the file has them."""
        names = []
        if self.images is not None:
            names.append("image")
        if self.notes is not None:
            names.append("note")
        return (*names, *self.numeric)

    @property
    def labelled(self):
        """[N] bool: has at least one label."""
        labelled = self.labels >= 0
        return labelled.any(1) if self.multilabel else labelled

    def have(self):
        """[N,M] bool: what each sample has by itself, before any missing table is drawn."""
        columns = []
        for modality in self.modalities:
            if modality == "image":
                columns.append(~blank(self.images))
            elif modality == "note":
                columns.append(np.array([bool(str(note).strip()) for note in self.notes]))
            else:
                columns.append(~np.isnan(self.numeric[modality]).all(1))
        return np.stack(columns, 1)

    def select(self, modalities, need_every_sample=True):
        """The same samples with only the named modalities; `Refused` on a name that the study
        lacks, and on a sample that is left with nothing unless need_every_sample is off."""
        for modality in modalities:
            if modality not in self.modalities:
                raise Refused(
                    f"modality '{modality}' is not in {self.name}; "
                    f"it has {', '.join(self.modalities)}"
                )
        numeric = {name: self.numeric[name] for name in self.numeric if name in modalities}
        selected = replace(
            self,
            images=self.images if "image" in modalities else None,
            notes=self.notes if "note" in modalities else None,
            numeric=numeric,
            columns={name: self.columns[name] for name in numeric},
        )
        return checked(selected, need_every_sample)

    def take(self, rows):
        """The study of the given rows (indices or a bool mask), in that order."""
        names = ("labels", "images", "notes", "patients", "lines", "fixed_split", "rows")
        arrays = _arrays(self, *names)
        fields = {name: array[rows] for name, array in arrays.items()}
        for name in ("numeric", "attributes"):
            fields[name] = {key: array[rows] for key, array in getattr(self, name).items()}
        return replace(self, **fields)


def load_study(path, synthetic_notes=False, classes=None, training=True):
    """Read a study file (design of the fields: `Study`) or one of MedMNIST's own files, whose
    splits are kept.

    Any float array `<name>` [N,F] that comes with `<name>_names` is a numeric modality. Raises
    `Refused` naming the file and the fault. `synthetic_notes` attaches templated reports to a file
    without notes (see `attach_notes`). `classes`: of the model that is to predict on it.
    training=False: labels may be missing."""
    arrays = read_npz(path)
    fixed_split = None
    try:
        if "train_images" in arrays:
            arrays, fixed_split = _join_medmnist(arrays)
        if "labels" not in arrays and training:
            raise Refused("key 'labels' is missing")
        if "format" in arrays:
            version = arrays["format"]
            if version.size != 1 or str(version.item()) != "1":
                raise Refused(f"format {version} is not known; this version reads format 1")
        numeric = _numeric_modalities(arrays)
        labels = _labels(arrays, numeric)
        class_names = _class_names(arrays, labels, classes)
        fit = str(arrays.get("fit", "squeeze"))
        if fit not in FITS:
            raise Refused(f"fit '{fit}' is not known; use {', '.join(FITS)}")
        study = Study(
            name=Path(path).stem,
            labels=labels.astype(np.int64),
            class_names=class_names,
            images=arrays.get("images"),
            notes=arrays.get("notes"),
            numeric=numeric,
            columns={name: [str(column) for column in arrays[f"{name}_names"]] for name in numeric},
            patients=arrays.get("patients"),
            lines=arrays.get("lines"),
            fixed_split=fixed_split,
            synthetic=bool(np.any(arrays.get("synthetic", 0))),
            synthetic_notes=bool(np.any(arrays.get("synthetic_notes", 0))),
            fit=fit,
            prepared=_record(arrays),
            report=tuple(map(str, arrays.get("report", np.empty(0, str)).ravel())),
        )
        checked(study, need_every_sample=False, training=False)
        study = without_placeholders(study)
        if not synthetic_notes:
            study = with_content(study)
        checked(study, need_every_sample=not synthetic_notes, training=training)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    if study.images is not None:
        study.images = square(study.images, fit)
    return attach_notes(study) if synthetic_notes else study


def _record(arrays):
    """What an import did, of a study file: {} of one that was made otherwise."""
    text = str(arrays.get("prepared", "{}"))
    try:
        record = json.loads(text)
        prepare.check_record(record)
    except (ValueError, RecursionError) as error:
        raise Refused(f"key 'prepared': {error}") from None
    return record


def without_placeholders(study):
    """The study with '' in place of each note and patient that says nothing, such as `nan`: whoever
    writes a table with numpy or pandas gets these words for a missing cell."""
    more = study.prepared.get("na", ())
    changed = {}
    for name, values in _arrays(study, "notes", "patients").items():
        if values.dtype.kind == "U" and values.ndim == 1:
            if name == "notes":  # what was hidden stays so
                empty = [not prepare.read_note(value, {"na": more}) for value in values]
            else:
                empty = [prepare.says_nothing(value, more) for value in values]
            changed[name] = np.where(empty, "", values)
    return replace(study, **changed)


def with_content(study):
    """The samples that have anything, an image, a note or a number; how many have nothing is
    printed."""
    has = study.have().any(1)  # [N]
    if has.all() or not has.any():
        return study
    empty = np.flatnonzero(~has)
    some = ", ".join(map(str, empty[:3])) + (", ..." if len(empty) > 3 else "")
    print(f"{study.name}: {len(empty)} samples have nothing and are left out (rows {some})")
    return replace(study.take(has), rows=np.flatnonzero(has))


def _join_medmnist(arrays):
    """({'images', 'labels'}, fixed_split [N]) of the three parts of a MedMNIST file, in a row."""
    parts = ("train", "val", "test")
    for part in parts:
        for key in (f"{part}_images", f"{part}_labels"):
            if key not in arrays:
                raise Refused(f"key '{key}' is missing")
    for part in parts:
        images = arrays[f"{part}_images"]
        labels = arrays[f"{part}_labels"]
        if 0 in (images.ndim, labels.ndim) or not 0 < len(images) == len(labels):
            raise Refused(
                f"{part}_images {list(images.shape)} and {part}_labels "
                f"{list(labels.shape)} need the same length, at least 1"
            )
    whole = {}
    for key in ("images", "labels"):
        pieces = [arrays[f"{part}_{key}"] for part in parts]
        if len({piece.shape[1:] for piece in pieces}) > 1:
            shapes = ", ".join(str(piece.shape) for piece in pieces)
            raise Refused(f"the {key} of the parts differ in shape: {shapes}")
        whole[key] = np.concatenate(pieces)
    sizes = [len(arrays[f"{part}_labels"]) for part in parts]
    return whole, np.repeat(np.arange(3), sizes)


def _numeric_modalities(arrays):
    """{name: array} of the arrays that come with names of their columns. Every list of names in the
    file is checked."""
    numeric = {k: v for k, v in arrays.items() if f"{k}_names" in arrays and k != "class"}
    for name in numeric:
        if not name.isidentifier() or name in RESERVED:
            raise Refused(
                f"'{name}' cannot be a modality's name; "
                f"use letters, digits, _, none of {RESERVED}"
            )
    for key in ("class_names", "patients", *(f"{name}_names" for name in numeric)):
        if key in arrays:
            names = arrays[key]
            rule = "" if key == "patients" else ", none twice"
            repeats = len({*names.ravel().tolist()}) < names.size
            if names.ndim != 1 or not names.size or (rule and repeats):
                raise Refused(f"'{key}' {list(names.shape)} must be a list{rule}")
    return numeric


def _labels(arrays, numeric):
    """Integer labels [N] or [N,C] of a file; without any, -1 for each sample."""
    if "labels" in arrays:
        labels = arrays["labels"]
        if labels.ndim == 2 and labels.shape[1] == 1:  # as MedMNIST writes [N]
            labels = labels[:, 0]
    else:
        modalities = [arrays[key] for key in ("images", "notes", *numeric) if key in arrays]
        lengths = [len(array) for array in modalities if array.ndim]
        labels = np.full(lengths[0] if lengths else 0, -1)
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2):
        raise Refused(f"labels are {form(labels)}; need integers [N] or 0/1 [N,C]")
    return labels


def _class_names(arrays, labels, classes):
    """Names of the classes of labels [N], or of the findings of labels [N,C]: those of the file,
    else `classes`, else numbers."""
    if labels.ndim == 2:
        count = labels.shape[1]
    else:
        count = int(labels.max(initial=0)) + 1
        if count > max(len(labels), 2):
            raise Refused(
                f"labels reach {count - 1} with {len(labels)} samples; "
                "they must number the classes from 0"
            )
    if "class_names" in arrays:
        names = [str(name) for name in arrays["class_names"]]
    else:
        names = classes or [f"class {i}" for i in range(count)]
    if classes is not None and names != classes:
        raise Refused(f"classes are {', '.join(names)}; the model has {', '.join(classes)}")
    return names


def save_study(path, study):
    """Write a study file that `load_study` reads back; equal studies give equal bytes. Without any
    label, none are kept: such a file is to predict on."""
    arrays = {"format": np.int64(1)}
    if study.labelled.any():
        arrays["labels"] = study.labels
        arrays["class_names"] = np.array(study.class_names)
    for flag in ("synthetic", "synthetic_notes"):
        if getattr(study, flag):
            arrays[flag] = np.int64(1)
    if study.fit != "squeeze":
        arrays["fit"] = np.array(study.fit)
    if study.prepared:
        arrays["prepared"] = np.array(json.dumps(study.prepared, sort_keys=True))
    if study.report:
        arrays["report"] = np.array(study.report)
    arrays |= _arrays(study, "images", "notes", "patients", "lines")
    for name, values in study.numeric.items():
        arrays[name] = values
        arrays[f"{name}_names"] = np.array(study.columns[name])
    write_atomic(path, npz_bytes(arrays))


def checked(study, need_every_sample=True, training=True):
    """The study itself, its numbers as float32, or `Refused` with its first fault."""
    if not study.modalities:
        raise Refused(
            "no modality: needs 'images', 'notes', or a float array with a '_names' companion"
        )
    _check_arrays(study)
    _check_labels(study, training)
    if need_every_sample:
        empty = ~study.have().any(1)
        if empty.any():
            raise Refused(
                f"sample {empty.argmax()} has nothing present in {', '.join(study.modalities)}"
            )
    return study


def _check_arrays(study):
    """Types, shapes and lengths."""
    images = study.images
    notes = study.notes
    if images is not None:
        is_picture = images.ndim >= 3 and images.shape[3:] in ((), (3,))
        if images.dtype != np.uint8 or not is_picture or 0 in images.shape:
            raise Refused(f"images are {form(images)}; need uint8 [N,H,W] or [N,H,W,3]")
    if notes is not None and (notes.dtype.kind != "U" or notes.ndim != 1):
        raise Refused(f"notes are {form(notes)}; need strings [N]")
    for name, values in study.numeric.items():
        width = len(study.columns[name])
        if values.dtype.kind != "f" or values.ndim != 2 or values.shape[1] != width:
            raise Refused(
                f"'{name}' is {form(values)}; need floats [N,{width}], one column per name"
            )
        infinite = np.isinf(values).any(1)
        if infinite.any():
            raise Refused(
                f"'{name}' is infinite in row {infinite.argmax()}; use NaN for a missing value"
            )
        study.numeric[name] = values.astype(np.float32)
    lines = study.lines
    if lines is not None and (lines.dtype.kind not in "iu" or lines.ndim != 1):
        raise Refused(f"lines are {form(lines)}; need integers [N]")
    arrays = _arrays(study, "labels", "images", "notes", "patients", "lines") | study.numeric
    if len({len(array) for array in arrays.values()}) > 1:
        lengths = ", ".join(f"{name} {len(array)}" for name, array in arrays.items())
        raise Refused(f"lengths differ: {lengths}")


def _check_labels(study, training):
    """Their range, and, to train on, that they vary."""
    labels = study.labels
    classes = len(study.class_names)
    high = 1 if study.multilabel else classes - 1
    wrong_width = study.multilabel and labels.shape[1] != classes
    if labels.size == 0 or labels.min() < -1 or labels.max() > high or wrong_width:
        span = f"{labels.min()}..{labels.max()}" if labels.size else "empty"
        raise Refused(
            f"labels are {span}, shape {list(labels.shape)}; "
            f"need -1..{high} for {classes} classes"
        )
    if not training:
        return
    if study.multilabel:
        for name, column in zip(study.class_names, labels.T):
            if len({*column} - {-1}) < 2:
                raise Refused(f"finding '{name}' never varies; every finding needs both 0 and 1")
    else:
        values = labels[study.labelled]
        if len({*values}) < 2:
            only = study.class_names[values[0]] if len(values) else "none labelled"
            raise Refused(f"labels hold one class only ({only}); need two or more")


SYMPTOMS = (
    "no complaints", "cough with fever", "weight loss", "night sweats",
    "chest pain", "short breath", "swollen legs", "fatigue",
)  # fmt: skip


def attach_notes(study, right=0.8, seed=0):
    """Give a study without notes a templated report: it names the label's symptom with probability
    `right`, else another's.

    These notes are synthetic and made from the labels: results with them say what fusing a noisy
    text can add, nothing about the real disease. Every output that uses them says "synthetic
    notes".
    """
    if study.notes is not None:
        raise Refused(
            f"{study.name} has notes of its own; --synthetic-notes is for a file without them"
        )
    n = len(study)
    rng = np.random.default_rng((seed, 11))
    classes = len(study.class_names)
    true_class = study.labels.argmax(1) if study.multilabel else np.maximum(study.labels, 0)
    away = np.where(rng.random(n) < right, 0, rng.integers(1, classes, n))
    openings = ("patient reports", "presents with", "history notes", "complains of")
    notes = []
    for c, opening in zip((true_class + away) % classes, rng.integers(0, 4, n)):
        symptom = SYMPTOMS[c] if c < len(SYMPTOMS) else f"sign {c}"
        notes.append(f"{openings[opening]} {symptom}")
    return checked(replace(study, notes=np.array(notes), synthetic_notes=True))


# ------------------------------------------------------------------------- missing tables, splits


def parse_missing(text, modalities):
    """('any', 'label' or a modality's name, rate) of TYPE:RATE; 'both' is 'any' for two
    modalities."""
    kind, _, rate = text.rpartition(":")
    types = [*modalities, "any"]
    if len(modalities) == 2:
        types.append("both")
    types.append("label")
    if kind not in types:
        raise Refused(
            f"missing type '{kind}' in '{text}' is not known; "
            f"write TYPE:RATE with TYPE one of {', '.join(types)}"
        )
    try:
        rate = float(rate)
    except ValueError:
        raise Refused(f"missing rate '{rate}' in '{text}' is not a number in [0,1]") from None
    if not 0 <= rate <= 1:
        raise Refused(f"missing rate {rate:g} in '{text}' is outside [0,1]")
    return ("any" if kind == "both" else kind), rate


def missing_table(have, modalities, text, seed, labels=None):
    """Presence [N,M] after RATE of the samples lose modalities, drawn from (type, rate, seed).

    `have` [N,M] is what the samples have by themselves. A draw never takes a sample's last
    modality. At one seed, the samples that lose something at a lower rate are among those that do
    at a higher one, so rows of different rates compare.

    Type `label`: a sample with m modalities loses number (label modulo m) of them, so that what is
    missing tells the label; without a label it loses one at random. `Refused` there unless `labels`
    are [N]: several findings are not one number."""
    kind, rate = parse_missing(text, modalities)
    have = np.asarray(have, bool)
    n = len(have)
    rng = np.random.default_rng((seed, 12))
    turn = rng.random(n).argsort().argsort()
    draw = rng.random(n)
    count = have.sum(1)
    loses = (turn < round(rate * n)) & (count > 1)  # [N]
    if kind == "any":
        # A subset's bits say which of the modalities that the sample has are dropped: from 1 to
        # 2^count - 2, so never none and never all.
        subset = 1 + np.floor(draw * (2.0**count - 2)).astype(np.int64)
        bit = np.maximum(np.cumsum(have, 1) - 1, 0)
        drop = (subset[:, None] >> bit) & 1 == 1  # [N,M]
    elif kind == "label":
        if labels is None or labels.ndim != 1:
            reason = "none is known here" if labels is None else "these are several findings"
            raise Refused(f"missing type 'label' in '{text}' needs one label a sample; {reason}")
        at_random = np.floor(draw * count)
        number = np.where(labels >= 0, labels % np.maximum(count, 1), at_random)  # [N]
        drop = np.cumsum(have, 1) - 1 == number[:, None]  # [N,M]
    else:
        drop = np.array(modalities) == kind  # [M]
    return have & ~(drop & loses[:, None])


def pattern_name(present_row, modalities):
    """'image+note' for a row of presence."""
    return "+".join(name for name, present in zip(modalities, present_row) if present)


def split(study, seed, share=1.0):
    """{'train'|'val'|'test': sorted indices}, 80/10/10, stratified by label, whole groups;
    unlabelled samples are left out. `share`: how much of the training split is used; a smaller
    share is part of a larger one.

    The validation rows are the same for every seed: what picks anything at one seed tests nothing
    at another.

    A group is what shares a patient or an identical image, transitively. MedMNIST's own split is
    kept as it is.
    """
    rows = np.flatnonzero(study.labelled)
    if study.fixed_split is None:
        part = _assign_groups(study, rows, seed)
    else:
        part = study.fixed_split[rows]
    parts = {name: rows[part == i] for i, name in enumerate(("train", "val", "test"))}
    none_empty(study, parts)
    if share < 1:
        order = np.random.default_rng((seed, 17)).permutation(parts["train"])
        parts["train"] = np.sort(order[: max(1, round(share * len(order)))])
    return parts


def _assign_groups(study, rows, seed):
    """The part of each of the labelled rows: 0 train, 1 val, 2 test."""
    labels = study.labels[rows]
    if study.multilabel:
        onehot = np.maximum(labels, 0)
    else:
        onehot = np.eye(len(study.class_names))[labels]
    # The size is balanced as if it were one more class.
    weights = np.column_stack([onehot, np.ones(len(rows))])  # [rows, C + 1]
    group, member = np.unique(groups(study)[rows], return_inverse=True)
    counts = np.zeros((len(group), weights.shape[1]))  # [groups, C + 1]
    np.add.at(counts, member, weights)

    part = np.ones(len(group), int)
    others = _fill(counts, (0.9, 0.1), np.random.default_rng(13)) == 0  # all but validation
    if others.sum() < 2:  # one group is nearly all: validation leaves the test some of the others
        others = _fill(counts, (0.8, 0.1, 0.1), np.random.default_rng(13)) != 1
    part[others] = 2 * _fill(counts[others], (8 / 9, 1 / 9), np.random.default_rng((seed, 13)))
    return part[member]


def _fill(counts, shares, rng):
    """[groups] which part each group goes to, so that each part gets its share of every column of
    `counts` [groups,C + 1]."""
    # Large groups first, while there is room everywhere; equal ones in random order.
    order = rng.permutation(len(counts))
    order = order[np.argsort(-counts[order, -1], kind="stable")]
    goal = np.outer(shares, counts.sum(0)) + 1e-9  # [parts, C + 1]
    content = np.zeros_like(goal)
    part = np.zeros(len(counts), int)
    for g in order:  # greedy: to the part that lacks the most of what this group brings
        part[g] = ((goal - content) / goal @ counts[g]).argmax()
        content[part[g]] += counts[g]
    return part


def none_empty(study, parts):
    """The parts of a split; `Refused` if one is empty."""
    for name, rows in parts.items():
        if not len(rows):
            raise Refused(
                f"{study.name}: {sum(map(len, parts.values()))} labelled samples "
                f"leave the {name} split empty; need more samples or groups"
            )
    return parts


def groups(study):
    """[N] group numbers: the smallest index that is reachable over shared patients and identical
    images."""
    parent = np.arange(len(study))

    def root(i):
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    keys = []  # (index, what is shared): a patient is a str, an image bytes
    if study.patients is not None:
        names = map(prepare.same_name, study.patients)
        keys += [(i, name) for i, name in enumerate(names) if not prepare.says_nothing(name)]
    if study.images is not None:
        keys += enumerate(image.tobytes() if image.any() else "" for image in study.images)
    first = {}
    for i, key in keys:
        # An unknown patient is nobody's sibling, and a missing image nobody's twin.
        if key:
            a = root(first.setdefault(key, i))
            b = root(i)
            parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(study))])


def others(groups, members, rows, seed, size=None, labels=None):
    """For each of the n rows a random one of `members` [P] that is of another group, [n], or so many
    of them, [n,size]; with labels [N] or [N,C], one that has the row's labels.

    groups [N]: as `groups` gives them. `Refused` where a row has no such member."""
    rng = np.random.default_rng((seed, 24))
    wanted = "another patient than" if labels is None else "the class, but not the patient, of"
    labels = np.zeros(len(groups)) if labels is None else labels
    labels = labels.reshape(len(groups), -1)  # [N,1] or [N,C]
    chosen = []
    for row in rows:
        alike = (labels[members] == labels[row]).all(1)  # [P]
        choices = members[alike & (groups[members] != groups[row])]
        if not len(choices):
            raise Refused(f"no training sample of {wanted} sample {row} is left its image")
        chosen.append(rng.choice(choices, size, replace=size is None or len(choices) < size))
    return np.array(chosen)


# ----------------------------------------------------------------------------------- model inputs


def resize(images, size):
    """uint8 [N,H,W] or [N,H,W,3] -> [N,size,size] or [N,size,size,3]: bilinear, antialiased where
    it shrinks.

    The one resize of training and serving. Each axis is scaled to `size`, whatever the aspect
    ratio.
    """
    images = np.asarray(images)
    colour = images.ndim == 4
    planes = np.moveaxis(images, 3, 1) if colour else images  # [...,H,W]
    height, width = planes.shape[-2:]
    if height != size or width != size:
        down = _resample(height, size)  # [size,H]
        across = _resample(width, size).T  # [W,size]
        result = np.empty((*planes.shape[:-2], size, size), np.uint8)
        for start in range(0, len(planes), 256):  # float64 of a whole large study may not fit
            part = down @ planes[start : start + 256].astype(np.float64) @ across
            result[start : start + 256] = np.rint(np.clip(part, 0, 255))
        planes = result
    return np.moveaxis(planes, 1, 3) if colour else planes


def _resample(old, new):
    """[new,old] weights of a triangle filter, widened by the shrink factor; rows sum to 1.

    They are multiples of 2^-16, so that float64 sums of products with bytes are exact: in any
    order, on any machine, the same pixel."""
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    distance = np.abs(np.arange(old) - centre[:, None])
    weights = np.maximum(0, 1 - distance / max(scale, 1))
    weights = np.rint(weights / weights.sum(1, keepdims=True) * 2**16)
    weights[np.arange(new), weights.argmax(1)] += 2**16 - weights.sum(1)
    return weights / 2**16


def square(images, fit):
    """uint8 [N,H,W] or [N,H,W,3] made square: its centre (`crop`), black beside it (`pad`), or as
    it is (`squeeze`: `resize` will scale each axis)."""
    height, width = images.shape[1:3]
    if fit == "squeeze" or height == width:
        return images
    side = min(height, width) if fit == "crop" else max(height, width)
    top = (height - side) // 2  # negative where black is added
    left = (width - side) // 2
    if fit == "crop":
        return images[:, top : top + side, left : left + side]
    result = np.zeros((len(images), side, side, *images.shape[3:]), np.uint8)
    result[:, -top : height - top, -left : width - left] = images
    return result


def blank(images):
    """[N] bool: the image is all black, which stands for a missing one."""
    return ~images.reshape(len(images), -1).any(1)


def prepare_images(images, size, channels):
    """uint8 [N,H,W] or [N,H,W,3] -> float32 [N,channels,size,size] in [-1,1]; grey is repeated for
    3 channels."""
    return stack_images(images, size, channels).astype(np.float32) / 127.5 - 1


def grey(picture):
    """uint8 [H,W] of [H,W,3] by ITU-R 601 in Pillow's integers; whatever else it gets comes back as
    it is."""
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        return picture
    return ((picture @ np.array([19595, 38470, 7471]) + 2**15) >> 16).astype(np.uint8)


def stack_images(images, size, channels):
    """The same as uint8: a quarter of the memory, for a study that is kept as a whole."""
    images = resize(images, size)
    if images.ndim == 3:
        images = np.repeat(images[:, None], channels, 1)  # [N,ch,S,S]
    elif channels == 3:
        images = np.moveaxis(images, 3, 1)
    else:
        raise Refused(f"images are RGB {list(images.shape)}; the model takes {channels} channel")
    return np.ascontiguousarray(images)


def numeric_scale(values):
    """(mean, scale) [F] over the rows of [N,F], NaN left out; without spread, the scale is 1."""
    count = np.maximum((~np.isnan(values)).sum(0), 1)
    mean = np.nansum(values, 0, dtype=np.float64) / count
    spread = np.sqrt(np.nansum((values - mean) ** 2, 0) / count)
    scale = np.where(spread > 1e-6, spread, 1)
    return mean.astype(np.float32), scale.astype(np.float32)


def model_inputs(study, size, channels, encode, scales):
    """{modality: array} of a study for an encoder: images uint8 [N,ch,S,S], ids int64 [N,P], numeric
    float32 [N,F] standardised. encode: notes -> ids; scales: {numeric modality: (mean, scale)}.
    """
    inputs = {}
    for modality in study.modalities:
        if modality == "image":
            inputs[modality] = stack_images(study.images, size, channels)
        elif modality == "note":
            inputs[modality] = encode(study.notes)
        else:
            mean, scale = scales[modality]
            inputs[modality] = (study.numeric[modality] - mean) / scale
    return inputs
