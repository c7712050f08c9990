"""Data without torch: study files, phantoms, missing tables, splits, tokenizer, resize, and the checked files they
come from.

Training and serving share every function that touches an input, so that a served model sees what the trained one saw.
Skip this file when you want to learn the method: read `mora.py`, `vit.py` and `train_mora.py`, in that order.

Letters: N samples, M modalities, C classes, F numeric columns, P word positions, S image size.
"""

import hashlib
import json
import os
import re
import sys
import zipfile
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

PAD, CLS, UNK = 0, 1, 2  # reserved word ids; hashed words start at 3
# names that a numeric modality cannot take: they mean something in files, graphs or missing tables
RESERVED = ("image", "images", "note", "notes", "present", "mask", "any", "both", "logits", "probabilities", "labels")


class Refused(ValueError):
    """Input that cannot be used. The message is one line: the thing, its value, the limit."""


@contextmanager
def one_line_errors():
    """Turn `Refused` into one line on stderr and exit code 2; every command line runs inside."""
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
    except OSError as error:  # disk full, read-only folder: still one line, with the path that failed
        raise SystemExit(_complain(f"{error.filename or 'file system'}: {error.strerror or error}")) from None


def _complain(message):
    print("error: " + " ".join(message.split()), file=sys.stderr)
    return 2


# ---------------------------------------------------------------------------------------------------------------- files


def write_atomic(path, content):
    """Write bytes or str so that `path` holds either its old content or all of the new, also after a power cut."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # in the same folder: os.replace is atomic only within a file system
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(beside, "wb") as f:
            f.write(content.encode() if isinstance(content, str) else content)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except OSError as error:  # a full disk does not say which file it was
        error.filename = str(path)
        raise
    finally:
        beside.unlink(missing_ok=True)


def npz_bytes(arrays):
    """The bytes of an .npz of {name: array}; equal arrays give equal bytes."""
    import io

    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def read_npz(path):
    """{name: array} of an .npz file, never unpickling; `Refused` if it is missing, damaged or holds Python objects."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    with open(path, "rb") as f:
        if f.read(6) != b"\x93NUMPY" and not zipfile.is_zipfile(path):
            raise Refused(f"{path}: not an .npz archive")
    try:
        with np.load(path, allow_pickle=False) as z:
            if not isinstance(z, np.lib.npyio.NpzFile):
                raise Refused(f"{path}: an .npy array, not an .npz archive")
            held, packed = sum(f.file_size for f in z.zip.infolist()), path.stat().st_size
            if held > 100 * packed + 2**26:  # images shrink to a half, blank columns to a hundredth
                raise Refused(f"{path}: {packed:,} bytes would unpack to {held:,}; the limit is 100 times as many")
            return {k: z[k] for k in z.files}
    except Refused:
        raise
    except Exception as error:  # zip, header and checksum errors come as many types, all of which mean the same here
        reason = str(error).split(". If you")[0]  # numpy goes on to recommend unpickling it
        raise Refused(f"{path}: not a readable .npz archive ({type(error).__name__}: {reason})") from None


def origin(report):
    """How far the numbers of a report are about anything real."""
    return "synthetic data" if report["synthetic"] else "synthetic notes" if report["synthetic_notes"] else "real data"


def fingerprint(study):
    """Hex digest of what a study holds: equal studies have equal ones, whatever their files."""
    held = {"labels": study.labels, "images": study.images, "notes": study.notes, **study.numeric, **study.attributes}
    return hashlib.sha256(npz_bytes({k: v for k, v in held.items() if v is not None})).hexdigest()


def sha256(path):
    """Hex digest of a file's bytes."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def digest(value):
    """Hex digest of a JSON-able value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -------------------------------------------------------------------------------------------------------------- studies


@dataclass
class Study:
    """Samples of up to M modalities. A modality that the file lacks is None (image, note) or not in `numeric`.

    images [N,H,W] or [N,H,W,3] uint8, all black = missing; notes [N] str, '' = missing; numeric {name: [N,F] float32},
    NaN = missing; columns {name: F column names}; labels [N] int64 in [-1,C) or [N,C] in {-1,0,1} (several findings; -1
    = unlabelled); patients [N] str or None; fixed_split [N] of 0 train, 1 val, 2 test, or None; attributes {name: [N]
    int64}: what a backbone can be pretrained on, -1 = ignore; fit: how the images became square (see `square`).
    """

    name: str
    labels: np.ndarray
    class_names: list
    images: np.ndarray | None = None
    notes: np.ndarray | None = None
    numeric: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)
    patients: np.ndarray | None = None
    fixed_split: np.ndarray | None = None
    attributes: dict = field(default_factory=dict)
    synthetic: bool = False  # drawn, not measured
    synthetic_notes: bool = False  # real images, templated notes
    fit: str = "squeeze"

    def __len__(self):
        return len(self.labels)

    @property
    def multilabel(self):
        return self.labels.ndim == 2

    @property
    def modalities(self):
        """Names in canonical order: image, note, then the numeric ones as the file has them."""
        return (*(["image"] if self.images is not None else []), *(["note"] if self.notes is not None else []),
                *self.numeric)

    @property
    def labelled(self):
        """[N] bool: has at least one label."""
        return (self.labels >= 0).any(1) if self.multilabel else self.labels >= 0

    def have(self):
        """[N,M] bool: what each sample has by itself, before any missing table is drawn."""
        columns = []
        for m in self.modalities:
            if m == "image":
                columns.append(~blank(self.images))
            elif m == "note":
                columns.append(np.array([bool(str(t).strip()) for t in self.notes]))
            else:
                columns.append(~np.isnan(self.numeric[m]).all(1))
        return np.stack(columns, 1)

    def select(self, modalities, need_every_sample=True):
        """The same samples with only the named modalities; `Refused` on a name that the study lacks, and on a sample
        that is left with nothing unless need_every_sample is off."""
        for m in modalities:
            if m not in self.modalities:
                raise Refused(f"modality '{m}' is not in {self.name}; it has {', '.join(self.modalities)}")
        kept = {k: v for k, v in self.numeric.items() if k in modalities}
        fields = {**self.__dict__, "numeric": kept, "columns": {k: self.columns[k] for k in kept}}
        fields["images"] = self.images if "image" in modalities else None
        fields["notes"] = self.notes if "note" in modalities else None
        return checked(Study(**fields), need_every_sample)

    def take(self, rows):
        """The study of the given rows (indices or a bool mask), in that order."""
        cut = lambda v: v[rows] if isinstance(v, np.ndarray) else {k: x[rows] for k, x in v.items()}
        perrow = ("labels", "images", "notes", "numeric", "patients", "fixed_split", "attributes")
        return Study(**self.__dict__ | {k: cut(v) for k, v in self.__dict__.items() if k in perrow and v is not None})


def load_study(path, synthetic_notes=False, classes=None, training=True):
    """Read a study file (design of the fields: `Study`) or one of MedMNIST's own files, whose splits are kept.

    Any float array `<name>` [N,F] that comes with `<name>_names` is a numeric modality. Raises `Refused` naming the
    file and the fault. `synthetic_notes` attaches templated reports to a file without notes (see `attach_notes`).
    `classes`: of the model that is to predict on it. training=False: labels may be missing."""
    z = read_npz(path)
    fixed_split = None
    squeezed = lambda labels: labels[:, 0] if labels.ndim == 2 and labels.shape[1] == 1 else labels
    if "train_images" in z:  # MedMNIST: three parts, concatenated; `fixed_split` remembers them
        for key in [f"{part}_{what}" for part in ("train", "val", "test") for what in ("images", "labels")]:
            if key not in z:
                raise Refused(f"{path}: key '{key}' is missing")
        for part in ("train", "val", "test"):
            im, lab = z[f"{part}_images"], z[f"{part}_labels"]
            if 0 in (im.ndim, lab.ndim) or len(im) != len(lab) or not len(im):
                raise Refused(f"{path}: {part}_images {list(im.shape)} and {part}_labels {list(lab.shape)} "
                              "need the same length, at least 1")
        fixed_split = np.repeat(np.arange(3), [len(z[f"{p}_labels"]) for p in ("train", "val", "test")])
        for what in ("images", "labels"):
            parts = [z[f"{p}_{what}"] for p in ("train", "val", "test")]
            if len({p.shape[1:] for p in parts}) > 1:
                raise Refused(f"{path}: the {what} of the parts differ in shape: "
                              f"{', '.join(str(p.shape) for p in parts)}")
            z[what] = np.concatenate(parts)
        z = {"images": z["images"], "labels": z["labels"]}
    if "labels" not in z and training:
        raise Refused(f"{path}: key 'labels' is missing")
    if "format" in z and (z["format"].size != 1 or str(z["format"].item()) != "1"):
        raise Refused(f"{path}: format {z['format']} is not known; this version reads format 1")
    numeric = {k: z[k] for k in z if f"{k}_names" in z and k != "class"}
    for k in numeric:
        if not k.isidentifier() or k in RESERVED:
            raise Refused(f"{path}: '{k}' cannot be a modality's name; use letters, digits, _, none of {RESERVED}")
    for k in ("class_names", "patients", *(f"{m}_names" for m in numeric)):
        if k in z and (z[k].ndim != 1 or not z[k].size or (k != "patients" and len(set(z[k].tolist())) < z[k].size)):
            raise Refused(f"{path}: '{k}' {list(z[k].shape)} must be a list{', none twice' * (k != 'patients')}")
    first = next((z[k] for k in ("images", "notes", *numeric) if k in z and z[k].ndim), np.zeros(0))
    labels = squeezed(z["labels"]) if "labels" in z else np.full(len(first), -1)
    if labels.dtype.kind not in "iu" or labels.ndim not in (1, 2):
        raise Refused(f"{path}: labels are {labels.dtype} {list(labels.shape)}; need integers [N] or 0/1 [N,C]")
    top = labels.shape[1] if labels.ndim == 2 else int(labels.max(initial=0)) + 1
    if labels.ndim == 1 and top > max(len(labels), 2):
        raise Refused(f"{path}: labels reach {top - 1} with {len(labels)} samples; they must number the classes from 0")
    names = [str(c) for c in z["class_names"]] if "class_names" in z else classes or [f"class {i}" for i in range(top)]
    if classes is not None and names != classes:
        raise Refused(f"{path}: classes are {', '.join(names)}; the model has {', '.join(classes)}")
    columns = {k: [str(c) for c in z[f"{k}_names"]] for k in numeric}
    flag = lambda k: bool(z[k].any()) if k in z else False
    fit = str(z["fit"]) if "fit" in z else "squeeze"
    if fit not in FITS:
        raise Refused(f"{path}: fit '{fit}' is not known; use {', '.join(FITS)}")
    study = Study(name=str(Path(path).stem), labels=labels.astype(np.int64), class_names=names,
                  images=z.get("images"), notes=z.get("notes"), numeric=numeric, columns=columns,
                  patients=z.get("patients"), fixed_split=fixed_split, synthetic=flag("synthetic"),
                  synthetic_notes=flag("synthetic_notes"), fit=fit)
    try:
        checked(study, need_every_sample=not synthetic_notes, training=training)
    except Refused as error:
        raise Refused(f"{path}: {error}") from None
    study.images = None if study.images is None else square(study.images, fit)
    return attach_notes(study) if synthetic_notes else study


def save_study(path, study):
    """Write a study file that `load_study` reads back; equal studies give equal bytes. Without any label, none are
    kept: such a file is to predict on."""
    arrays = {"format": np.int64(1)}
    if study.labelled.any():
        arrays |= {"labels": study.labels, "class_names": np.array(study.class_names)}
    arrays |= {k: np.int64(1) for k in ("synthetic", "synthetic_notes") if getattr(study, k)}
    arrays |= {"fit": np.array(study.fit)} if study.fit != "squeeze" else {}
    arrays |= {k: v for k, v in (("images", study.images), ("notes", study.notes), ("patients", study.patients))
               if v is not None}
    for name, values in study.numeric.items():
        arrays |= {name: values, f"{name}_names": np.array(study.columns[name])}
    write_atomic(path, npz_bytes(arrays))


def checked(study, need_every_sample=True, training=True):
    """The study itself, or `Refused` with its first fault."""
    n, labels, classes = len(study), study.labels, len(study.class_names)
    if not study.modalities:
        raise Refused("no modality: needs 'images', 'notes', or a float array with a '_names' companion")
    if study.images is not None:
        im = study.images
        if im.dtype != np.uint8 or im.ndim not in (3, 4) or (im.ndim == 4 and im.shape[3] != 3) or 0 in im.shape:
            raise Refused(f"images are {im.dtype} {list(im.shape)}; need uint8 [N,H,W] or [N,H,W,3]")
    if study.notes is not None and (study.notes.dtype.kind != "U" or study.notes.ndim != 1):
        raise Refused(f"notes are {study.notes.dtype} {list(study.notes.shape)}; need strings [N]")
    for k, v in study.numeric.items():
        if v.dtype.kind != "f" or v.ndim != 2 or v.shape[1] != len(study.columns[k]):
            raise Refused(f"'{k}' is {v.dtype} {list(v.shape)}; need floats [N,{len(study.columns[k])}], one column "
                          "per name")
        if np.isinf(v).any():
            raise Refused(f"'{k}' is infinite in row {int(np.isinf(v).any(1).argmax())}; use NaN for a missing value")
        study.numeric[k] = v.astype(np.float32)
    lengths = {"labels": n, **{k: len(v) for k, v in (("images", study.images), ("notes", study.notes),
                                                      ("patients", study.patients), *study.numeric.items())
                               if v is not None}}
    if len(set(lengths.values())) > 1:
        raise Refused("lengths differ: " + ", ".join(f"{k} {v}" for k, v in lengths.items()))
    high = 1 if study.multilabel else classes - 1
    wide = study.multilabel and labels.shape[1] != classes
    if labels.size == 0 or labels.min() < -1 or labels.max() > high or wide:
        span = f"{labels.min()}..{labels.max()}" if labels.size else "empty"
        raise Refused(f"labels are {span}, shape {list(labels.shape)}; need -1..{high} for {classes} classes")
    seen = labels[study.labelled]
    if study.multilabel:
        flat = [study.class_names[c] for c in range(classes) if len(set(labels[:, c]) - {-1}) < 2]
        if flat and training:
            raise Refused(f"finding '{flat[0]}' never varies; every finding needs both 0 and 1")
    elif len(set(seen)) < 2 and training:
        raise Refused(f"labels hold one class only ({study.class_names[seen[0]] if len(seen) else 'none labelled'}); "
                      "need two or more")
    if need_every_sample and not study.have().any(1).all():
        raise Refused(f"sample {int((~study.have().any(1)).argmax())} has nothing present in "
                      f"{', '.join(study.modalities)}")
    return study


SYMPTOMS = ("no complaints", "cough with fever", "weight loss", "night sweats", "chest pain", "short breath",
            "swollen legs", "fatigue")


def attach_notes(study, right=0.8, seed=0):
    """Give a study without notes a templated report: it names the label's symptom with probability `right`, else
    another's.

    These notes are synthetic and made from the labels: results with them say what fusing a noisy text can add, nothing
    about the real disease. Every output that uses them says "synthetic notes".
    """
    if study.notes is not None:
        raise Refused(f"{study.name} has notes of its own; --synthetic-notes is for a file without them")
    rng = np.random.default_rng((seed, 11))
    classes = len(study.class_names)
    truth = study.labels.argmax(1) if study.multilabel else np.maximum(study.labels, 0)
    told = (truth + np.where(rng.random(len(study)) < right, 0, rng.integers(1, classes, len(study)))) % classes
    phrases = [SYMPTOMS[c] if c < len(SYMPTOMS) else f"sign {c}" for c in range(classes)]
    openings = np.array(["patient reports", "presents with", "history notes", "complains of"])
    openings = openings[rng.integers(0, 4, len(study))]
    notes = np.array([f"{o} {phrases[c]}" for o, c in zip(openings, told)])
    return checked(Study(**{**study.__dict__, "notes": notes, "synthetic_notes": True}))


# ------------------------------------------------------------------------------------------------------------- phantoms

KINDS = ("clear", "patch", "nodule", "ring")
SIDES = ("left", "right")
DIAGNOSES = ["healthy", "pneumonia", "tumour", "tuberculosis"]
# One entry per fact value: the words of the source domain, then the unseen synonyms of the target domain.
WORDS = {"kind": [("clear lungs|normal lungs", "unremarkable|aerated"),
                  ("patchy opacity|hazy patch", "consolidation|infiltrate"),
                  ("round nodule|small mass", "coin lesion|focal density"),
                  ("ring shadow|cavity", "hollow lesion|annular shadow")],
         "side": [("left side|on the left", "sinistral|left hemithorax"),
                  ("right side|on the right", "dextral|right hemithorax")],
         "symptom": [("feels well|no complaints", "asymptomatic|no ailment"),
                     ("fever|high temperature", "pyrexia|febrile"), ("weight loss|lost weight", "cachexia|wasting"),
                     ("night sweats|long cough", "hyperhidrosis|chronic tussis")],
         "history": [("no history|nothing known", "unknown|none stated"),
                     ("recent cold|had influenza", "viral prodrome|coryza"),
                     ("smoker|smokes daily", "tobacco use|pack years"),
                     ("travelled abroad|sick contact", "exposure|endemic stay")]}
VITALS, LABS = ["temperature", "saturation", "pulse"], ["age", "crp"]


def phantoms(n, seed, domain="target", size=32):
    """Draw n synthetic chest studies: uint8 images [n,size,size], reports, `vitals` [n,3], `labs` [n,2], 4 diagnoses.

    The diagnosis sets the odds of the lesion (image; in 60% of the reports too, a fifth of those wrong), the symptom
    and the history (words only) and shifts the numbers (10% NaN). Lesion size and haze are in the image only. The
    `target` domain is another scanner and another hospital: inverted contrast, more noise, and mostly synonyms the
    source never uses. `attributes` are the facts themselves, for pretraining: kind, side, symptom, history, agree
    (report and image state the same lesion). Same arguments, same bytes."""
    rng = np.random.default_rng((seed, size, domain == "target"))
    truth = rng.integers(0, 4, n)
    odds = {"kind": 0.95, "symptom": 0.7, "history": 0.4}  # how often a fact is the one its diagnosis goes with
    facts = {name: np.where(rng.random(n) < p, truth, rng.integers(0, 4, n)) for name, p in odds.items()}
    facts["side"] = rng.integers(0, 2, n)
    told = np.where(rng.random(n) < 0.8, facts["kind"], (facts["kind"] + rng.integers(1, 4, n)) % 4)
    states = rng.random(n) < 0.6  # the report names a lesion at all
    haze = np.clip(0.5 * rng.random(n) + 0.4 * (truth == 1), 0, 1)

    fever = np.array([0.0, 1.6, 0.2, 0.6])[facts["symptom"]]
    vitals = np.stack([36.7 + fever + 0.4 * rng.normal(size=n), 97 - 6 * haze + rng.normal(size=n),
                       72 + 8 * fever + 9 * rng.normal(size=n)], 1)
    labs = np.stack([40 + 15 * (facts["history"] == 2) + 12 * rng.normal(size=n),
                     np.exp(1 + fever + 0.5 * rng.normal(size=n))], 1)
    numeric = {"vitals": vitals, "labs": labs}
    for k, v in numeric.items():
        v[rng.random(v.shape) < 0.1] = np.nan
        v[np.isnan(v).all(1), 0] = 37.0 if k == "vitals" else 40.0
        numeric[k] = v.astype(np.float32)

    pick = rng.random((n, 5))
    phrase = {}
    for name, value in (("kind", told), ("side", facts["side"]), ("symptom", facts["symptom"]),
                        ("history", facts["history"])):
        table = np.array([[p.split("|") for p in entry] for entry in WORDS[name]])  # [values, 2 domains, 2 synonyms]
        unseen = (pick[:, 4] < 0.75) if domain == "target" else np.zeros(n, bool)
        phrase[name] = table[value, unseen.astype(int), (pick[:, len(phrase)] < 0.5).astype(int)]
    lesion = [(f"{k} {s}, " if d and t else f"{k}, " if d else "")
              for k, s, t, d in zip(phrase["kind"], phrase["side"], told, states)]
    rest = zip(lesion, phrase["symptom"], phrase["history"])
    notes = np.array([f"{found}{symptom}, {history}" for found, symptom, history in rest])

    attributes = {**facts, "side": np.where(facts["kind"] > 0, facts["side"], -1),
                  "agree": np.where(states, told == facts["kind"], -1)}
    attributes = {k: v.astype(np.int64) for k, v in attributes.items()}
    images = _draw_chests(rng, facts["kind"], facts["side"], haze, size, inverted=domain == "target")
    return Study(name=f"phantoms ({domain})", labels=truth, class_names=list(DIAGNOSES), images=images,
                          notes=notes, numeric=numeric, columns={"vitals": VITALS, "labs": LABS}, attributes=attributes,
                          synthetic=True)


def _draw_chests(rng, kind, side, haze, size, inverted):
    """uint8 [n,size,size]: soft ellipses for thorax and lungs, one lesion, noise; all samples at once."""
    n = len(kind)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1) * 2 - 1  # [S,S] in [-1,1]
    between = lambda low, high: rng.uniform(low, high, n).astype(np.float32)[:, None, None]
    soft = lambda inside: 1 / (1 + np.exp(-np.clip(inside * 14, -30, 30)))  # 1 inside, 0 outside
    cx, cy = between(-0.06, 0.06), between(-0.06, 0.06)
    ellipse = lambda ox, oy, rx, ry: soft(1 - np.hypot((x - cx - ox) / rx, (y - cy - oy) / ry))
    wide, tall, apart = between(0.28, 0.36), between(0.55, 0.68), between(0.38, 0.44)
    thorax = ellipse(0, 0, between(0.88, 0.97), between(0.9, 1.0))
    lungs = np.maximum(ellipse(-apart, 0, wide, tall), ellipse(apart, 0, wide, tall))
    lx = cx + np.where(side == 0, -1, 1)[:, None, None] * (apart + between(-0.06, 0.06))
    ly = cy + between(-0.35, 0.35)
    far = np.hypot(x - lx, y - ly)
    grow = between(0.9, 1.25)
    shape = np.stack([0 * far, 0.75 * np.exp(-((far / (0.24 * grow)) ** 2)), soft((0.15 * grow - far) * 2),
                      soft((0.06 - abs(far - 0.22 * grow)) * 3)])
    lesion = shape[kind, np.arange(n)]
    image = 0.12 + 0.6 * thorax - 0.45 * lungs * (1 - 0.35 * haze[:, None, None]) + 0.45 * lesion
    image = np.clip(image, 0, 1) ** between(0.85, 1.15)
    image = (1 - image if inverted else image) + rng.normal(0, 0.09 if inverted else 0.04, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


# ------------------------------------------------------------------------------------------------ missing tables,
# splits


def parse_missing(text, modalities):
    """('any' or a modality's name, rate) of TYPE:RATE; 'both' is 'any' for two modalities."""
    kind, _, rate = text.rpartition(":")
    types = [*modalities, "any", *(["both"] if len(modalities) == 2 else [])]
    if kind not in types:
        raise Refused(f"missing type '{kind}' in '{text}' is not known; write TYPE:RATE with TYPE one of "
                      f"{', '.join(types)}")
    try:
        rate = float(rate)
    except ValueError:
        raise Refused(f"missing rate '{rate}' in '{text}' is not a number in [0,1]") from None
    if not 0 <= rate <= 1:
        raise Refused(f"missing rate {rate:g} in '{text}' is outside [0,1]")
    return ("any" if kind == "both" else kind), rate


def missing_table(have, modalities, text, seed):
    """Presence [N,M] after RATE of the samples lose modalities, drawn from (type, rate, seed).

    `have` [N,M] is what the samples have by themselves. A draw never takes a sample's last modality. At one seed, the
    samples that lose something at a lower rate are among those that do at a higher one, so rows of different rates
    compare."""
    kind, rate = parse_missing(text, modalities)
    have = np.asarray(have, bool)
    n, m = have.shape
    rng = np.random.default_rng((seed, 12))
    loses = rng.random(n).argsort().argsort() < round(rate * n)
    draw, count = rng.random(n), have.sum(1)
    loses &= count > 1
    drop = np.zeros_like(have)
    if kind == "any":  # the drawn number's bits say which of the modalities that the sample has are dropped
        subset = 1 + np.floor(draw * (2.0**count - 2)).astype(np.int64)  # 1 .. 2^count - 2: non-empty, proper
        place = np.cumsum(have, 1) - 1
        drop = have & ((subset[:, None] >> np.maximum(place, 0)) & 1 > 0)
    else:
        drop[:, modalities.index(kind)] = True
    return have & ~(drop & loses[:, None])


def pattern_name(present_row, modalities):
    """'image+note' for a row of presence."""
    return "+".join(m for m, p in zip(modalities, present_row) if p)


def split(study, seed, share=1.0):
    """{'train'|'val'|'test': sorted indices}, 80/10/10, stratified by label, whole groups; unlabelled samples are
    left out. `share`: how much of the training split is used; a smaller share is part of a larger one.

    A group is what shares a patient or an identical image, transitively. MedMNIST's own split is kept as it is.
    """
    parts = _split(study, seed)
    if share < 1:
        order = np.random.default_rng((seed, 17)).permutation(parts["train"])
        parts["train"] = np.sort(order[: max(1, round(share * len(order)))])
    return parts


def _split(study, seed):
    names, labelled = ("train", "val", "test"), study.labelled
    if study.fixed_split is not None:
        result = {k: np.flatnonzero((study.fixed_split == i) & labelled) for i, k in enumerate(names)}
        return none_empty(study, result)
    group = _groups(study)
    group[~labelled] = -1
    kept = np.flatnonzero(labelled)
    onehot = (np.maximum(study.labels, 0) if study.multilabel
              else np.eye(len(study.class_names), dtype=np.int64)[study.labels.clip(0)])
    # the last column balances plain size
    onehot = np.concatenate([onehot, np.ones((len(study), 1), np.int64)], 1)[kept]
    ids, member = np.unique(group[kept], return_inverse=True)
    counts = np.zeros((len(ids), onehot.shape[1]))
    np.add.at(counts, member, onehot)
    order = np.random.default_rng((seed, 13)).permutation(len(ids))
    order = order[np.argsort(-counts[order, -1], kind="stable")]  # large groups first, while there is room everywhere
    want = np.outer([0.8, 0.1, 0.1], counts.sum(0)) + 1e-9
    filled, part = np.zeros_like(want), np.zeros(len(ids), int)
    for g in order:  # greedy: to the split that lacks the most of what this group brings
        part[g] = ((want - filled) / want @ counts[g]).argmax()
        filled[part[g]] += counts[g]
    return none_empty(study, {k: kept[part[member] == i] for i, k in enumerate(names)})


def none_empty(study, parts):
    """The parts of a split; `Refused` if one is empty."""
    for name, rows in parts.items():
        if not len(rows):
            raise Refused(f"{study.name}: {sum(map(len, parts.values()))} labelled samples leave the {name} split "
                          "empty; need more samples or groups")
    return parts


def _groups(study):
    """[N] group numbers: the smallest index that is reachable over shared patients and identical images."""
    parent = np.arange(len(study))

    def root(i):
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    keys = [[str(p) for p in study.patients]] if study.patients is not None else []
    keys += [[im.tobytes() if im.any() else "" for im in study.images]] if study.images is not None else []
    for column in keys:
        first = {}
        for i, key in enumerate(column):
            if key in ("", "nan"):  # an unknown patient is nobody's sibling, and a missing image nobody's twin
                continue
            a, b = root(first.setdefault(key, i)), root(i)
            parent[max(a, b)] = min(a, b)
    return np.array([root(i) for i in range(len(study))])


# --------------------------------------------------------------------------------------------------------- model inputs


def word_id(word, buckets):
    """A word's id in [3, buckets): crc32, so there is no vocabulary to ship."""
    return UNK if word == "[mask]" else 3 + zlib.crc32(word.encode("utf-8", "replace")) % (buckets - 3)


def tokenize(notes, buckets, positions):
    """Word ids [N,P] int64 of N strings: CLS, lower-cased words and numbers, PAD; what is past P positions is cut.

    An empty note is [CLS, PAD, ...], never all padding: a softmax over nothing is NaN.
    """
    known = {}
    ids = np.full((len(notes), positions), PAD, np.int64)
    ids[:, 0] = CLS
    for row, note in zip(ids, notes):
        words = words_of(note)[: positions - 1]
        row[1 : 1 + len(words)] = [known[w] if w in known else known.setdefault(w, word_id(w, buckets)) for w in words]
    return ids


def words_of(note):
    """The lower-cased words of a note; `[MASK]` is one word."""
    return re.findall(r"\[mask\]|\w+", str(note).lower())


def resize(images, size):
    """uint8 [N,H,W] or [N,H,W,3] -> [N,size,size] or [N,size,size,3]: bilinear, antialiased where it shrinks.

    The one resize of training and serving. Each axis is scaled to `size`, whatever the aspect ratio.
    """
    images = np.asarray(images)
    colour = images.ndim == 4
    planes = np.moveaxis(images, 3, 1) if colour else images  # [...,H,W]
    if planes.shape[-2:] != (size, size):
        down, across = _resample(planes.shape[-2], size), _resample(planes.shape[-1], size).T
        parts = np.split(planes, range(256, len(planes), 256))  # float64 of a whole large study may not fit
        planes = np.concatenate([np.rint(np.clip(down @ p.astype(np.float64) @ across, 0, 255)) for p in parts])
        planes = planes.astype(np.uint8)
    return np.moveaxis(planes, 1, 3) if colour else planes


def _resample(old, new):
    """[new,old] weights of a triangle filter, widened by the shrink factor; rows sum to 1.

    They are multiples of 2^-16, so that float64 sums of products with bytes are exact: in any order, on any machine,
    the same pixel."""
    scale = old / new
    centre = (np.arange(new) + 0.5) * scale - 0.5
    weights = np.maximum(0, 1 - np.abs(np.arange(old) - centre[:, None]) / max(scale, 1))
    weights = np.rint(weights / weights.sum(1, keepdims=True) * 2**16)
    weights[np.arange(new), weights.argmax(1)] += 2**16 - weights.sum(1)
    return weights / 2**16


FITS = ("squeeze", "crop", "pad")


def square(images, fit):
    """uint8 [N,H,W] or [N,H,W,3] made square: its centre (`crop`), black beside it (`pad`), or as it is (`squeeze`:
    `resize` will scale each axis)."""
    high, wide = images.shape[1:3]
    if fit == "squeeze" or high == wide:
        return images
    side = min(high, wide) if fit == "crop" else max(high, wide)
    top, left = (high - side) // 2, (wide - side) // 2
    if fit == "crop":
        return images[:, top : top + side, left : left + side]
    result = np.zeros((len(images), side, side, *images.shape[3:]), np.uint8)
    result[:, -top : high - top, -left : wide - left] = images
    return result


def blank(images):
    """[N] bool: the image is all black, which stands for a missing one."""
    return ~images.reshape(len(images), -1).any(1)


def prepare_images(images, size, channels):
    """uint8 [N,H,W] or [N,H,W,3] -> float32 [N,channels,size,size] in [-1,1]; grey is repeated for 3 channels."""
    images = resize(images, size)
    if images.ndim == 3:
        images = np.repeat(images[:, None], channels, 1)  # [N,ch,S,S]
    elif channels == 3:
        images = np.moveaxis(images, 3, 1)
    else:
        raise Refused(f"images are RGB {list(images.shape)}; the model takes {channels} channel")
    return np.ascontiguousarray(images, np.float32) / 127.5 - 1


def numeric_scale(values):
    """(mean, scale) [F] over the rows of [N,F], NaN left out; a column without spread gets scale 1."""
    known = ~np.isnan(values)
    count = np.maximum(known.sum(0), 1)
    mean = np.where(known, values, 0).sum(0, dtype=np.float64) / count
    spread = np.sqrt((np.where(known, values - mean, 0) ** 2).sum(0) / count)
    return mean.astype(np.float32), np.where(spread > 1e-6, spread, 1).astype(np.float32)


def model_inputs(study, size, channels, buckets, positions, scales):
    """{modality: array} as the encoder takes them: images float32 [N,ch,S,S], ids int64 [N,P], numeric float32 [N,F]
    standardised.
    """
    inputs = {}
    for m in study.modalities:
        if m == "image":
            inputs[m] = prepare_images(study.images, size, channels)
        elif m == "note":
            inputs[m] = tokenize(study.notes, buckets, positions)
        else:
            mean, scale = scales[m]
            inputs[m] = (study.numeric[m] - mean) / scale
    return inputs
