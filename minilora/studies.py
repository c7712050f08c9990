"""Your data: pictures and a spreadsheet become a study file; and a look at what a study file holds.

    python -m minilora.studies from-csv studies.csv --images pictures --out my.npz
    python -m minilora.studies from-covid-chestxray covid-chestxray-dataset --out covid.npz
    python -m minilora.studies inspect my.npz

Pictures are read by Pillow (`pictures` extra), DICOM files by pydicom (`dicom` extra). The same pictures and the same
spreadsheet give the same arrays on every machine, as far as their decoders do: PNG and uncompressed DICOM always do,
JPEG up to the version of its library. Skip this file when you read for the methods.
"""

import csv
import io
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from minilora import data
from minilora.data import Refused

MISSING = {"", "na", "n/a", "nan", "null"}  # cells that say nothing, in any case of letters


@dataclass
class FromCsv:
    """Turn a spreadsheet, one row a study, and the pictures it names into a study file."""

    csv: Path  # The spreadsheet: comma, semicolon or tab; its first line names the columns.
    images: Path | None = None  # Folder of the pictures that the image column names; default: the spreadsheet's own.
    out: Path | None = None  # Study file to write; default: the spreadsheet's name with .npz.
    size: int = 64  # Height and width of the stored images, pixels.
    fit: Literal["squeeze", "crop", "pad"] = "squeeze"  # What makes a picture square; serving does the same.
    rgb: bool = False  # Keep colours; default: grey.
    image_column: str = "image"  # File names; .png, .jpg, .jpeg and .dcm may be left out in them.
    note_column: str = "note"  # Reports, in words.
    label_column: str = "label"  # Class names; several columns, with commas: findings of 0, 1 or empty; '' = no labels.
    patient_column: str = "patient"  # Whose samples stay in one split.
    numeric: tuple[str, ...] = ()  # Columns of numbers: age,temperature; more modalities: vitals=pulse labs=age,crp
    mask_words: str = ""  # Words to hide in the notes, with commas; covid hides COVID-19 and Covid19 too.
    encoding: str = ""  # Of the spreadsheet; default: UTF-8, else Windows-1252, and it says which.


@dataclass
class FromCovidChestxray:
    """Turn a clone of the public covid-chestxray-dataset (ieee8023) into a study file: X-rays, clinical notes with the
    words that name a finding hidden, age, sex, day, temperature and saturation; COVID-19 against other findings."""

    folder: Path  # Holds metadata.csv and images/.
    out: Path = Path("covid.npz")  # Study file to write.
    size: int = 64  # Height and width of the stored images, pixels.
    fit: Literal["squeeze", "crop", "pad"] = "squeeze"  # What makes a picture square; serving does the same.
    mask_words: str = ("covid,ncov,sars,mers,coronavirus,corona,pneumonia,ards,pneumocystis,streptococc,klebsiella,"
                       "legionella,mycoplasma,varicella,influenza,lipoid,tuberculosis,wuhan,pandemic,outbreak")


@dataclass
class Inspect:
    """Say what a study file holds, and draw a sheet of its samples."""

    file: Path  # Study file (.npz), or one of MedMNIST's own.
    out: Path | None = None  # The sheet; default: the study's name with .png.


# ------------------------------------------------------------------------------------------------------------- pictures


def read_picture(path, rgb=False):
    """uint8 [H,W], or [H,W,3] with rgb, of one picture file; an .npy array as it is stored. `Refused` says why not.

    Palettes and colour become grey by ITU-R 601, alpha lies over black, EXIF rotation is applied. More than 8 bits a
    pixel are stretched from the picture's lowest to its highest value; a DICOM file's by its rescale and its window.
    Pillow's limit against decompression bombs (89 megapixels) stays on."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    try:
        with open(path, "rb") as f:
            dicom = f.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom")
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an archive, not an array")
            return array
        return _dicom(path, rgb) if dicom else _pillow(path, rgb)
    except ImportError as error:
        name = (error.name or "").split(".")[0]
        extra = {"PIL": "pictures", "pydicom": "dicom"}.get(name)
        if extra is None:
            raise Refused(f"{path}: not readable ({error})") from None
        raise Refused(f"{path}: reading it needs {name}: pip install 'minilora[{extra}]'") from None
    except Refused:
        raise
    except Exception as error:  # the libraries raise many types for a file that is no picture
        raise Refused(f"{path}: not a readable {'DICOM file' if dicom else 'picture'} "
                      f"({' '.join(str(error).split())[:160] or type(error).__name__})") from None


def _pillow(path, rgb):
    from PIL import Image, ImageOps

    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    with Image.open(path) as picture:
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":  # a phone's JPEG carries a preview
            raise Refused(f"{path}: has {picture.n_frames} frames; need one")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            return _coloured(_stretched(np.asarray(picture)), rgb)
        if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        return np.asarray(picture.convert("RGB" if rgb else "L"))


def _dicom(path, rgb):
    import pydicom
    from pydicom.pixels import apply_color_lut, apply_modality_lut, apply_voi_lut

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of values that break the standard in ways that do not matter here
        file = pydicom.dcmread(path)
        frames, area = int(file.get("NumberOfFrames") or 1), int(file.get("Rows", 0)) * int(file.get("Columns", 0))
        if frames != 1:
            raise Refused(f"{path}: has {frames} frames; need one")
        if area > 2**30 // 12:  # Pillow's limit
            raise Refused(f"{path}: has {area} pixels; the limit is {2**30 // 12}")
        stored, kind = file.pixel_array, file.PhotometricInterpretation
        if kind == "PALETTE COLOR":
            stored = apply_color_lut(stored, file)
        if stored.ndim == 3:  # colours come as RGB
            stored = stored if stored.dtype == np.uint8 else _stretched(stored)
            return stored if rgb else grey(stored)
        padding = stored == file.PixelPaddingValue if "PixelPaddingValue" in file else np.zeros(stored.shape, bool)
        values = apply_modality_lut(stored, file)
        if None not in (file.get("WindowWidth"), file.get("WindowCenter")) or "VOILUTSequence" in file:
            lowest, highest = apply_voi_lut(np.array([-(2**31), 2**31 - 1]), file)  # what the window maps to
            pixels = _stretched(apply_voi_lut(values, file), float(lowest), float(highest))
        else:
            inside = values[~padding] if not padding.all() else values
            pixels = _stretched(values, float(inside.min()), float(inside.max()))
    pixels = 255 - pixels if kind == "MONOCHROME1" else pixels  # there the lowest value is white
    pixels[padding] = 0
    return _coloured(pixels, rgb)


def _stretched(values, lowest=None, highest=None):
    """uint8 of numbers, from 0 at the lowest (default: of these) to 255 at the highest; not numbers become 0."""
    known = values[np.isfinite(values)] if values.dtype.kind == "f" else values
    if not known.size:
        return np.zeros(values.shape, np.uint8)
    lowest = float(known.min() if lowest is None else lowest)
    highest = float(known.max() if highest is None else highest)
    scaled = (np.nan_to_num(values.astype(np.float64), nan=lowest) - lowest) * (255 / max(highest - lowest, 1e-12))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


def _coloured(picture, rgb):
    return np.repeat(picture[..., None], 3, 2) if rgb and picture.ndim == 2 else picture


def grey(picture):
    """uint8 [H,W] of [H,W,3] by ITU-R 601 in Pillow's integers; whatever else it gets comes back as it is."""
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        return picture
    return ((picture @ np.array([19595, 38470, 7471]) + 2**15) >> 16).astype(np.uint8)


def find_picture(folder, cell):
    """The file that a cell names: as it is written, or with a usual suffix; None if there is none."""
    for suffix in ("", ".png", ".jpg", ".jpeg", ".dcm"):
        path = folder / (cell + suffix)
        if path.is_file():
            return path
    return None


def read_pictures(paths, size, fit, rgb):
    """({path: uint8 [size,size] or [size,size,3]}, {path: its stored (height, width)}, {path: why it is not readable})
    of distinct files, on all cores."""

    def read(path):
        try:
            picture = read_picture(path, rgb)
            if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,)) or not picture.size:
                raise Refused(f"{path}: is {picture.dtype} {list(picture.shape)}; need uint8 [H,W] or [H,W,3]")
            picture = _coloured(picture, rgb) if rgb else grey(picture)  # an .npy array comes as it is
            if picture.min() == picture.max():
                raise Refused(f"{path}: one grey level throughout")
            return data.resize(data.square(picture[None], fit), size)[0], picture.shape[:2]
        except Refused as error:
            return str(error), None

    images, shapes, faults, shown = {}, {}, {}, time.monotonic()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        try:
            for done, (path, (image, shape)) in enumerate(zip(paths, pool.map(read, paths)), 1):
                if shape is None:
                    if "pip install" in image:
                        raise Refused(image)
                    faults[path] = image
                else:
                    images[path], shapes[path] = image, shape
                if time.monotonic() - shown > 5:
                    shown = time.monotonic()
                    print(f"{done} of {len(paths)} pictures read", flush=True)
        except BaseException:  # Ctrl-C must not wait for what is queued
            pool.shutdown(cancel_futures=True)
            raise
    return images, shapes, faults


# ---------------------------------------------------------------------------------------------------------- spreadsheet


def read_table(path, encoding=""):
    """[{column: cell, stripped}] of a spreadsheet, and a line that says how it was read; each row keeps its line number
    under ''. `Refused` if it has no rows, a column twice, or a line longer than its header."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    content = path.read_bytes()
    try:
        how = encoding or ("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
        text = content.decode(how)
    except UnicodeDecodeError as error:
        if encoding:
            raise Refused(f"{path}: byte {error.start} is not {encoding}") from None
        how, text = "windows-1252", content.decode("windows-1252", "replace")
    except LookupError:
        raise Refused(f"{path}: encoding '{encoding}' is not known; try utf-8, windows-1252 or shift-jis") from None
    text = text.removeprefix("\ufeff")  # a byte order mark, where the encoding was given
    first = text.split("\n", 1)[0]
    delimiter = max(",;\t", key=first.count)
    before = csv.field_size_limit(2**30)  # a note may be long
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        lines = [(reader.line_num, cells) for cells in reader if any(c.strip() for c in cells)]
    except csv.Error as error:
        raise Refused(f"{path}: line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(before)
    if len(lines) < 2:
        raise Refused(f"{path}: has no rows; the first line names the columns, each further line is a study")
    header = [c.strip() for c in lines[0][1]]
    twice = [c for c, k in Counter(header).items() if k > 1 and c]
    if twice:
        raise Refused(f"{path}: column '{twice[0]}' stands there twice")
    for line, cells in lines[1:]:
        if len(cells) > len(header):
            raise Refused(f"{path}: line {line} has {len(cells)} cells; the header has {len(header)}")
    rows = [dict(zip(header, map(str.strip, cells + [""] * len(header)))) | {"": line} for line, cells in lines[1:]]
    separated = {",": "", ";": ", semicolons", "\t": ", tabs"}[delimiter]
    return rows, f"{path}: {len(rows)} rows, {how.removesuffix('-sig')}{separated}"


def from_rows(rows, folder, columns, size=64, fit="squeeze", rgb=False, mask_words=(), name="study"):
    """(Study, report lines) of spreadsheet rows.

    columns: {'image'|'note'|'patient': column or None, 'labels': names, 'numeric': {modality: column names}}. Cells
    that say nothing and pictures that are not there or not readable are missing; rows that repeat an earlier one, and
    rows with nothing at all, are left out. `Refused` if no picture is readable or a label is not one."""
    used = [columns[k] for k in ("image", "note", "patient") if columns[k]]
    used += [*columns["labels"], *(c for group in columns["numeric"].values() for c in group)]
    said, distinct, report = {}, [], []
    for row in rows:
        if said.setdefault(tuple(row.get(c, "") for c in used), row[""]) == row[""]:
            distinct.append(row)
    if len(distinct) < len(rows):
        report.append(f"left out   {len(rows) - len(distinct)} rows that repeat an earlier one")
    rows, images, notes, numeric = distinct, None, None, {}
    cell = lambda row, column: "" if row.get(column, "").lower() in MISSING else row[column]

    if columns["image"]:
        named = [cell(row, columns["image"]) for row in rows]
        found = {c: find_picture(folder, c) for c in dict.fromkeys(named) if c}
        pictures, shapes, faults = read_pictures([*dict.fromkeys(p for p in found.values() if p)], size, fit, rgb)
        absent = [c for c, p in found.items() if p is None]
        if found and not pictures:
            why = next(iter(faults.values()), f"{folder / absent[0]}: no such file" if absent else "")
            raise Refused(f"none of {len(found)} pictures is readable; the first: {why}")
        images = np.zeros((len(rows), size, size) + (3,) * rgb, np.uint8)
        for i, c in enumerate(named):
            if c and found[c] in pictures:
                images[i] = pictures[found[c]]
        sides = sorted(shapes.values(), key=lambda s: s[0] * s[1])
        span = [f"{wide}x{high}" for high, wide in (sides[:1] + sides[-1:])]
        report.append(f"pictures   {len(pictures)} read, {' to '.join(span)} pixels; missing: {named.count('')} cells "
                      f"empty, {len(absent)} files not there{_some(absent)}, {len(faults)} not readable")
        report += [f"           {fault}" for fault in [*faults.values()][:5]]
    hidden = 0
    if columns["note"]:
        notes = [cell(row, columns["note"]) for row in rows]
        masked = [mask(note, mask_words) for note in notes]
        hidden, notes = sum(a != b for a, b in zip(notes, masked)), np.array(masked, np.str_)
        if mask_words:
            report.append(f"masked     words in {hidden} notes")
    for modality, names in columns["numeric"].items():
        numeric[modality], wrong = np.full((len(rows), len(names)), np.nan, np.float32), []
        for i, row in enumerate(rows):
            for j, column in enumerate(names):
                value, fine = _number(cell(row, column))
                numeric[modality][i, j] = value
                if not fine:
                    wrong.append(f"{column} '{row[column]}' in line {row['']}")
        if wrong:
            report.append(f"{modality:10s} {len(wrong)} cells are not numbers and count as missing{_some(wrong)}")
    labels, classes = read_labels([[cell(row, c) for c in columns["labels"]] for row in rows], columns["labels"], rows)
    patients = np.array([cell(row, columns["patient"]) for row in rows]) if columns["patient"] else None
    study = data.Study(name=name, labels=labels, class_names=classes, images=images, notes=notes, numeric=numeric,
                       columns=columns["numeric"], patients=patients, fit=fit)
    if not study.modalities:
        raise Refused("no modality: name a column of pictures, notes or numbers")
    something = study.have().any(1)
    if not something.all():
        lines = [str(row[""]) for row, s in zip(rows, something) if not s]
        report.append(f"left out   {len(lines)} rows without a picture, words or numbers, in lines{_some(lines)}")
    if not something.any():
        raise Refused("no row has a picture, words or a number")
    return data.checked(study.take(something), training=False), report


def _some(values, n=3):
    """' (a, b, c, ...)' or '' of none."""
    return f" ({', '.join(values[:n])}{', ...' * (len(values) > n)})" if values else ""


def _number(cell):
    """(the number of a cell, whether it is one or says nothing)."""
    try:
        value = float(cell) if cell else np.nan
    except ValueError:
        return np.nan, False
    return (value, True) if not np.isinf(value) and abs(value) < 3e38 else (np.nan, not cell)


def read_labels(cells, names, rows):
    """(labels [N] or [N,C], class names) of the label cells of each row; an empty one is -1, unlabelled.

    One column holds class names; of several, each is a finding of 0 or 1. `Refused` on numbers that are not whole (a
    measurement is not a class) and on a column of more classes than half of its rows."""
    if not names:
        return np.full(len(cells), -1), ["class 0", "class 1"]
    if len(names) > 1:
        values = {"": -1, "-1": -1, "0": 0, "1": 1, "-1.0": -1, "0.0": 0, "1.0": 1}
        for row, line in zip(cells, rows):
            for name, c in zip(names, row):
                if c not in values:
                    raise Refused(f"label column '{name}' is '{c}' in line {line['']}; a finding is 0, 1 or empty")
        return np.array([[values[c] for c in row] for row in cells], np.int64), list(names)
    found = [row[0] for row in cells]
    numbers = {c: _number(c) for c in found if c}
    if numbers and all(fine for _, fine in numbers.values()):  # 0, 1, 2 or 0.0, 1.0, as pandas writes them
        for c, line in zip(found, rows):
            if c and numbers[c][0] % 1:
                raise Refused(f"label column '{names[0]}' is '{c}' in line {line['']}; labels are class names or whole "
                              "numbers, not measurements")
        found = [str(int(numbers[c][0])) if c else "" for c in found]
        classes = [str(v) for v in sorted({int(c) for c in found if c})]
    else:
        classes = sorted({c for c in found if c})
    if len(classes) > max(20, len(found) // 2):
        raise Refused(f"label column '{names[0]}' has {len(classes)} different values in {len(found)} rows; is it one?")
    if len(classes) < 2:
        raise Refused(f"label column '{names[0]}' has {len(classes)} classes{_some(classes)}; need two or more, or "
                      "--label-column '' for a file to predict on")
    place = {c: i for i, c in enumerate(classes)} | {"": -1}
    return np.array([place[c] for c in found], np.int64), classes


def mask(note, words):
    """The note with [MASK] in place of each of the words, in any case, with whatever is written on to it."""
    words = [re.escape(w) for w in words if w]
    return re.sub(rf"(?<!\w)(?:{'|'.join(words)})[\w-]*", "[MASK]", note, flags=re.I) if words else note


def from_csv(args):
    """The (study, report lines) of `from-csv`; `Refused` if a column that was named is not there."""
    rows, how = read_table(args.csv, args.encoding)
    groups = {}
    for text in args.numeric:
        modality, _, names = text.rpartition("=")
        modality = modality or "tabular"
        if not modality.isidentifier() or modality in data.RESERVED:
            raise Refused(f"--numeric {text}: '{modality}' cannot be a modality's name")
        groups[modality] = [*groups.get(modality, []), *_listed(names)]
        if not groups[modality] or len(set(groups[modality])) < len(groups[modality]):
            raise Refused(f"--numeric {text}: must name at least one column, none twice")
    columns = {k: getattr(args, f"{k}_column") for k in ("image", "note", "patient")}
    columns |= {"labels": _listed(args.label_column), "numeric": groups}
    header = [c for c in rows[0] if c]
    for flag, named in {"--image-column": [columns["image"]], "--note-column": [columns["note"]],
                        "--patient-column": [columns["patient"]], "--label-column": columns["labels"],
                        "--numeric": [c for names in groups.values() for c in names]}.items():
        for column in named:
            if column and column not in header:
                default = getattr(FromCsv, flag[2:].replace("-", "_"), None) == column
                if not default or flag == "--label-column":
                    raise Refused(f"{args.csv}: has no column '{column}' ({flag}); it has {', '.join(header)[:200]}")
                columns[flag[2:].split("-")[0]] = None  # a default that is not there: no such modality
                how += f"; no column '{column}' ({flag})"
    study, report = from_rows(rows, args.images or args.csv.parent, columns, args.size, args.fit, args.rgb,
                              _listed(args.mask_words), args.csv.stem)
    return study, [how, *report]


def _listed(text):
    return [part.strip() for part in text.split(",") if part.strip()]


def from_covid_chestxray(args):
    """The (study, report lines) of the public collection's layout: metadata.csv beside images/."""
    rows, how = read_table(args.folder / "metadata.csv")
    spelled = lambda row: {re.sub(r"\W+", "_", k.strip().lower()): v for k, v in row.items()}
    kept, skipped = [], Counter()
    for row in map(spelled, rows):
        kind, view = row.get("modality", "X-ray") or "X-ray", row.get("view", "")
        if kind.lower() != "x-ray" or view.lower() in ("axial", "coronal", "ct"):
            skipped[f"{kind} {view}".strip()] += 1
            continue
        finding, sex = row.get("finding", ""), row.get("sex", "").upper()
        label = "" if finding.lower() in ("", "todo", "unknown") else "COVID-19" if "COVID-19" in finding else "other"
        kept.append({"": row[""], "image": row.get("filename", ""), "label": label,
                     "note": row.get("clinical_notes") or row.get("notes", ""), "patient": row.get("patientid", ""),
                     "age": row.get("age", ""), "sex_male": {"M": "1", "F": "0"}.get(sex, ""),
                     "offset_days": row.get("offset", ""), "temperature": row.get("temperature", ""),
                     "pO2_saturation": row.get("po2_saturation", "")})
    if not kept:
        raise Refused(f"{args.folder / 'metadata.csv'}: has no X-ray")
    kinds = ", ".join(f"{k} {n}" for k, n in skipped.items())
    left = [f"left out   {sum(skipped.values())} that are no X-rays: {kinds}"]
    columns = {"image": "image", "note": "note", "patient": "patient", "labels": ["label"],
               "numeric": {"tabular": ["age", "sex_male", "offset_days", "temperature", "pO2_saturation"]}}
    study, report = from_rows(kept, args.folder / "images", columns, args.size, args.fit, False,
                              _listed(args.mask_words), "covid-chestxray")
    return study, [how, *left * bool(skipped), *report]


# -------------------------------------------------------------------------------------------------------------- looking


def leaks(study):
    """{class name: (notes that contain it, of which its own class's)} of the names that stand in any note."""
    if study.notes is None:
        return {}
    names = [c for c in study.class_names if re.search(r"[^\W\d]", c) and not re.fullmatch(r"class \d+", c)]
    patterns = [re.compile(rf"(?<!\w){re.escape(c)}(?!\w)", re.I) for c in names]
    result = {}
    for c, pattern in zip(names, patterns):
        named, i = np.array([bool(pattern.search(str(t))) for t in study.notes]), study.class_names.index(c)
        own = study.labels[:, i] == 1 if study.multilabel else study.labels == i
        if named.any():
            result[c] = (int(named.sum()), int((named & own).sum()))
    return result


def describe(study):
    """What a study holds, as lines."""
    have, n = study.have(), len(study)
    about = ", synthetic" * study.synthetic + ", synthetic notes" * study.synthetic_notes
    lines = [f"samples    {n}{about}"]
    if study.images is not None:
        seen = study.images[have[:, 0]]
        twins = len(seen) - len({im.tobytes() for im in seen})
        lines.append(f"images     {len(seen)} of {'x'.join(map(str, study.images.shape[1:]))}, mean grey level "
                     f"{seen.mean() if seen.size else 0:.0f}" + f", {twins} repeat another" * bool(twins)
                     + f"; {n - len(seen)} missing" * (len(seen) < n))
    if study.notes is not None:
        words = [len(data.words_of(t)) for t in study.notes if str(t).strip()]
        middle, longest = int(np.median(words or [0])), max(words, default=0)
        lines.append(f"notes      {len(words)}, of {middle} words (longest {longest})"
                     + f"; {n - len(words)} missing" * (len(words) < n))
    for m, values in study.numeric.items():
        for column, v in zip(study.columns[m], values.T):
            known = v[~np.isnan(v)]
            spread = f", {known.min():g} to {known.max():g}, mean {known.mean():.4g}" if known.size else ""
            lines.append(f"{m:10s} {column}: {known.size} of {n}{spread}")
    if study.patients is not None:
        known = [p for p in map(str, study.patients) if p not in ("", "nan")]
        lines.append(f"patients   {len(set(known))}" + f"; {n - len(known)} samples name none" * (len(known) < n))
    if study.multilabel:
        each = zip(study.class_names, study.labels.T)
        counts = [f"{c[:40]} {int((v == 1).sum())} of {int((v >= 0).sum())}" for c, v in each]
    else:
        counts = [f"{c[:40]} {int((study.labels == i).sum())}" for i, c in enumerate(study.class_names)]
    bare = n - int(study.labelled.sum())
    lines.append("labels     " + (", ".join(counts) if bare < n else "none: a file to predict on")
                 + f"; {bare} unlabelled" * (0 < bare < n))
    found = leaks(study)
    if found:
        each = ", ".join(f"'{c[:40]}' in {k} notes ({own} of that class)" for c, (k, own) in found.items())
        lines.append(f"leakage    {each}: a model can read the answer there; from-csv --mask-words hides words")
    patterns = Counter(data.pattern_name(row, study.modalities) or "nothing" for row in have)
    lines.append("present    " + ", ".join(f"{p} {k}" for p, k in patterns.most_common()))
    if 0 < study.labelled.sum():
        try:
            parts = data.split(study, 0)
            lines.append("split      " + ", ".join(f"{k} {len(v)}" for k, v in parts.items()) + " at seed 0"
                         + " (the file's own)" * (study.fixed_split is not None))
        except Refused as error:
            lines.append(f"split      none: {error}")
    return lines


def draw_sheet(study, path, columns=8):
    """A sheet of samples, a row for each class, with the first words of their notes; `Refused` without matplotlib."""
    try:
        import matplotlib
        matplotlib.use("Agg")
        import matplotlib.pyplot as plt
    except ImportError:
        raise Refused(f"{path}: drawing needs matplotlib: pip install 'minilora[pictures]'") from None
    seen = np.flatnonzero(study.have()[:, 0])
    of = lambda i: study.labels[:, i] == 1 if study.multilabel else study.labels == i
    groups = {c: seen[of(i)[seen]] for i, c in enumerate(study.class_names)}
    groups["unlabelled"] = seen[~study.labelled[seen]]
    groups = {c: rows for c, rows in [*groups.items()][:12] if len(rows)}
    size = (1.6 * columns, 1.95 * len(groups) + 0.5)
    figure, axes = plt.subplots(len(groups), columns, figsize=size, squeeze=False)
    for line, (c, rows) in zip(axes, groups.items()):
        rows = rows[np.linspace(0, len(rows) - 1, min(columns, len(rows))).astype(int)]  # spread over the file
        for axis in line:
            axis.axis("off")
        for axis, row in zip(line, rows):
            axis.imshow(study.images[row], cmap="gray", vmin=0, vmax=255)
            words = "" if study.notes is None else str(study.notes[row]).replace("$", r"\$")
            axis.set_title(words[:24] + "..." * (len(words) > 24), fontsize=6)
        line[0].text(-0.06, 0.5, c[:24], transform=line[0].transAxes, rotation=90, va="center", ha="right", fontsize=8)
    kind = "synthetic data" if study.synthetic else "synthetic notes" if study.synthetic_notes else ""
    figure.suptitle(f"{study.name}: {len(study)} samples" + f" ({kind})" * bool(kind), fontsize=9)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    plt.close(figure)
    data.write_atomic(path, content.getvalue())


def write_study(args, read):
    """Read, say what was read, and write the study file; nothing is written over."""
    if not args.out and not args.csv.is_file():
        raise Refused(f"{args.csv}: no such file")
    out = args.out or args.csv.with_suffix(".npz")
    if not 4 <= args.size <= 4096:
        raise Refused(f"--size is {args.size}; must be in 4..4096")
    if out.suffix != ".npz":
        raise Refused(f"--out {out}: must end in .npz")
    if out.exists():
        raise Refused(f"--out {out}: is there already; choose another name, or remove it")
    study, report = read(args)
    print("\n".join([*report, *describe(study)]))
    data.save_study(out, study)
    print(f"{out}: written; look at it with: python -m minilora.studies inspect {out}")


def main(argv=None):
    import tyro

    with data.one_line_errors():
        args = tyro.cli(FromCsv | FromCovidChestxray | Inspect, args=argv, prog="minilora.studies",
                        description=__doc__.splitlines()[0], config=(tyro.conf.PositionalRequiredArgs,))
        if not isinstance(args, Inspect):
            return write_study(args, from_csv if isinstance(args, FromCsv) else from_covid_chestxray)
        study = data.load_study(args.file, training=False)
        print("\n".join([f"{args.file}", *describe(study)]))
        if study.images is not None:
            sheet = args.out or args.file.with_suffix(".png")
            draw_sheet(study, sheet)
            print(f"sheet: {sheet}")


if __name__ == "__main__":
    main()
