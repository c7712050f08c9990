"""Your data: pictures and a spreadsheet become a study file; and a look at what a study file holds.

    python -m minilora.studies from-csv studies.csv --images pictures --out my.npz
    python -m minilora.studies inspect my.npz

Pictures are read by Pillow (`pictures` extra), DICOM files by pydicom (`dicom` extra). The same
pictures and the same spreadsheet give the same arrays on every machine, as far as their decoders
do: PNG and uncompressed DICOM always do, JPEG up to the version of its library. Skip this file
when you read for the methods.
"""

import csv
import io
import math
import os
import re
import time
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Literal

import numpy as np

from minilora import data
from minilora.data import Refused
from minilora.words import words_of

MISSING = {"", "na", "n/a", "nan", "null"}  # cells that say nothing, in any case of letters
DELIMITERS = {",": "", ";": ", semicolons", "\t": ", tabs"}  # and what the report says of each
FINDINGS = {"": -1, "-1": -1, "0": 0, "1": 1, "-1.0": -1, "0.0": 0, "1.0": 1}
MOST_PIXELS = 2**30 // 12  # Pillow's limit, for DICOM files too


@dataclass
class FromCsv:
    """Turn a spreadsheet, one row a study, and the pictures it names into a study file."""

    csv: Path  # The spreadsheet: comma, semicolon or tab; its first line names the columns.
    images: Path | None = None  # Folder of the pictures that the image column names, all inside it; default: the spreadsheet's own.
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
class Inspect:
    """Say what a study file holds, and draw a sheet of its samples."""

    file: Path  # Study file (.npz), or one of MedMNIST's own.
    out: Path | None = None  # The sheet; default: the study's name with .png.


# ---------------------------------------------------------------------------------------- pictures


def read_picture(path, rgb=False):
    """uint8 [H,W], or [H,W,3] with rgb, of one picture file; an .npy array as it is stored.
    `Refused` says why not.

    Palettes and colour become grey by ITU-R 601, alpha lies over black, EXIF rotation is applied.
    More than 8 bits a pixel are stretched from the picture's lowest to its highest value; a DICOM
    file's by its rescale and its window. Pillow's limit against decompression bombs (89 megapixels)
    stays on."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    kind = "picture"
    try:
        with open(path, "rb") as f:
            if f.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom"):
                kind = "DICOM file"
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an archive, not an array")
            return array
        picture = _dicom(path) if kind == "DICOM file" else _pillow(path, rgb)
        return _channels(picture, rgb)
    except ImportError as error:
        library = (error.name or "").split(".")[0]
        extra = {"PIL": "pictures", "pydicom": "dicom"}.get(library)
        if extra is None:
            raise Refused(f"{path}: not readable ({error})") from None
        raise Refused(f"{path}: reading it needs {library}: "
                      f"pip install 'minilora[{extra}]'") from None
    except Refused:
        raise
    except Exception as error:  # the libraries raise many types for a file that is no picture
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise Refused(f"{path}: not a readable {kind} ({reason})") from None


def _pillow(path, rgb):
    from PIL import Image, ImageOps

    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    with Image.open(path) as picture:
        # A phone's JPEG (MPO) carries a preview as its second frame.
        if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
            raise Refused(f"{path}: has {picture.n_frames} frames; need one")
        picture = ImageOps.exif_transpose(picture)
        if picture.mode.startswith(("I", "F")):
            return _stretch(np.asarray(picture))
        if picture.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
        return np.asarray(picture.convert("RGB" if rgb else "L"))


def _dicom(path):
    import pydicom
    from pydicom.pixels import apply_color_lut

    with warnings.catch_warnings():
        # pydicom warns of values that break the standard in ways that do not matter here.
        warnings.simplefilter("ignore")
        file = pydicom.dcmread(path)
        frames = int(file.get("NumberOfFrames") or 1)
        area = int(file.get("Rows", 0)) * int(file.get("Columns", 0))
        if frames != 1:
            raise Refused(f"{path}: has {frames} frames; need one")
        if area > MOST_PIXELS:
            raise Refused(f"{path}: has {area} pixels; the limit is {MOST_PIXELS}")
        stored = file.pixel_array
        if file.PhotometricInterpretation == "PALETTE COLOR":
            stored = apply_color_lut(stored, file)
        if stored.ndim == 2:
            return _dicom_greys(file, stored)
        # Colours come as RGB [H,W,3].
        return stored if stored.dtype == np.uint8 else _stretch(stored)


def _dicom_greys(file, stored):
    """uint8 [H,W] of a DICOM file's stored [H,W], by its rescale and window; padding is black."""
    from pydicom.pixels import apply_modality_lut, apply_voi_lut

    padding = stored == file.get("PixelPaddingValue")  # nowhere if the file names no such value
    values = apply_modality_lut(stored, file)
    window = (file.get("WindowWidth"), file.get("WindowCenter"))
    if None not in window or "VOILUTSequence" in file:
        # The window maps to a range of its own, whatever this picture uses of it.
        lowest, highest = apply_voi_lut(np.array([-(2**31), 2**31 - 1]), file)
        values = apply_voi_lut(values, file)
    else:
        inside = values if padding.all() else values[~padding]
        lowest = inside.min()
        highest = inside.max()
    pixels = _stretch(values, lowest, highest)
    if file.PhotometricInterpretation == "MONOCHROME1":  # there the lowest value is white
        pixels = 255 - pixels
    pixels[padding] = 0
    return pixels


def _stretch(values, lowest=None, highest=None):
    """uint8 of numbers, from 0 at the lowest (default: of these) to 255 at the highest; not numbers
    become 0."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return np.zeros(values.shape, np.uint8)
    lowest = float(finite.min() if lowest is None else lowest)
    highest = float(finite.max() if highest is None else highest)
    scale = 255 / max(highest - lowest, 1e-12)
    pixels = (np.nan_to_num(values.astype(np.float64), nan=lowest) - lowest) * scale
    return np.rint(np.clip(pixels, 0, 255)).astype(np.uint8)


def _channels(picture, rgb):
    """[H,W] of a picture [H,W] or [H,W,3]; with rgb [H,W,3], to which grey is repeated."""
    if not rgb:
        return grey(picture)
    if picture.ndim == 2:
        return np.repeat(picture[..., None], 3, 2)
    return picture


def grey(picture):
    """uint8 [H,W] of [H,W,3] by ITU-R 601 in Pillow's integers; whatever else it gets comes back as
    it is."""
    if picture.dtype != np.uint8 or picture.shape[2:] != (3,):
        return picture
    return ((picture @ np.array([19595, 38470, 7471]) + 2**15) >> 16).astype(np.uint8)


def find_picture(folder, cell):
    """The file that a cell names: as it is written, or with a usual suffix; None without one."""
    for suffix in ("", ".png", ".jpg", ".jpeg", ".dcm"):
        path = folder / (cell + suffix)
        if path.is_file():
            return path
    return None


def outside(root, cell, path):
    """Where a cell leads, if that is outside of the picture folder, else None; by an absolute path,
    .., a drive or, where it names the file `path`, a link. root: the folder, its links followed."""
    if os.name != "nt" and re.match("[A-Za-z]:", cell):
        return cell
    # A table may come from Windows; and no file has a zero byte in its name.
    named = root / cell.replace("\\", "/").replace("\0", "")
    for place in (named, path or named):
        place = Path(os.path.realpath(place))
        if not place.is_relative_to(root):
            return place
    return None


def read_square(path, size, fit, rgb):
    """(uint8 [size,size] or [size,size,3], stored (height, width)) of one picture file. `Refused`
    if it is not readable, or shows nothing."""
    picture = read_picture(path, rgb)
    # An .npy array comes as it is.
    if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,)) or not picture.size:
        raise Refused(f"{path}: is {picture.dtype} {list(picture.shape)}; "
                      "need uint8 [H,W] or [H,W,3]")
    picture = _channels(picture, rgb)
    if picture.min() == picture.max():
        raise Refused(f"{path}: one grey level throughout")
    squares = data.square(picture[None], fit)  # [1,..]
    return data.resize(squares, size)[0], picture.shape[:2]


def read_pictures(paths, size, fit, rgb):
    """({path: uint8 [size,size] or [size,size,3]}, {path: its stored (height, width)}, [why a file
    is not readable]) of distinct files, on all cores."""
    images = {}
    shapes = {}
    faults = []
    last_line = time.monotonic()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = {path: pool.submit(read_square, path, size, fit, rgb) for path in paths}
        for path, future in futures.items():
            try:
                images[path], shapes[path] = future.result()
            except Refused as error:
                if "pip install" in str(error):  # a library is missing, not a picture
                    raise
                faults.append(str(error))
            if time.monotonic() - last_line > 5:
                last_line = time.monotonic()
                print(f"{len(images) + len(faults)} of {len(paths)} pictures read", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for what is queued
    return images, shapes, faults


# ------------------------------------------------------------------------------------- spreadsheet


def read_table(path, encoding=""):
    """[{column: cell, stripped}] of a spreadsheet, and a line that says how it was read; each row
    keeps its line number under ''. `Refused` if it has no rows, a column twice, or a line longer
    than its header."""
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    text, encoding = _decode(path, encoding)
    first_line = text.split("\n", 1)[0]
    delimiter = max(DELIMITERS, key=first_line.count)
    lines = []  # (line number, cells)
    limit = csv.field_size_limit(2**30)  # a note may be long
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        for cells in reader:
            cells = [cell.strip() for cell in cells]
            if any(cells):
                lines.append((reader.line_num, cells))
    except csv.Error as error:
        raise Refused(f"{path}: line {reader.line_num}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if len(lines) < 2:
        raise Refused(f"{path}: has no rows; the first line names the columns, each further line "
                      "is a study")
    _, header = lines.pop(0)
    for column in header:
        if column and header.count(column) > 1:
            raise Refused(f"{path}: column '{column}' stands there twice")
    rows = []
    for line, cells in lines:
        if len(cells) > len(header):
            raise Refused(f"{path}: line {line} has {len(cells)} cells; "
                          f"the header has {len(header)}")
        rows.append(dict(zip_longest(header, cells, fillvalue="")) | {"": line})
    return rows, f"{path}: {len(rows)} rows, {encoding}{DELIMITERS[delimiter]}"


def _decode(path, encoding):
    """(text, name of its encoding) of a file: the encoding that was asked for, or a likely one."""
    content = path.read_bytes()
    codec = encoding or "utf-8-sig"
    if not encoding and content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        codec = "utf-16"
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        if encoding:
            raise Refused(f"{path}: byte {error.start} is not {encoding}") from None
        codec = "windows-1252"
        text = content.decode(codec, "replace")
    except LookupError:
        raise Refused(f"{path}: encoding '{encoding}' is not known; try utf-8, windows-1252 or "
                      "shift-jis") from None
    # An encoding that was asked for may leave the byte order mark in the text.
    return text.removeprefix("\ufeff"), codec.removesuffix("-sig")


def from_rows(rows, folder, columns, size, fit, rgb, mask_words, name):
    """(Study, report lines) of spreadsheet rows.

    columns: {'image'|'note'|'patient': column or '', 'labels': names, 'numeric': {modality: column
    names}}. Cells that say nothing and pictures that are not there or not readable are missing;
    rows with nothing at all are left out. `Refused` if no picture is readable, one lies outside of
    the folder, or a label is not one."""
    report = []
    images = notes = patients = None
    if columns["image"]:
        images, lines = _read_images(rows, columns["image"], folder, size, fit, rgb)
        report += lines
    if columns["note"]:
        notes = np.array([_cell(row, columns["note"]) for row in rows])
        if mask_words:
            masked = np.array([mask(note, mask_words) for note in notes])
            report.append(f"masked     words in {(masked != notes).sum()} notes")
            notes = masked
    numeric = {}
    for modality, names in columns["numeric"].items():
        numeric[modality], wrong = _read_numbers(rows, names)
        if wrong:
            report.append(f"{modality:10s} {len(wrong)} cells are not numbers and count as missing"
                          f"{_some(wrong)}")
    labels, class_names = read_labels(rows, columns["labels"])
    if columns["patient"]:
        patients = np.array([_cell(row, columns["patient"]) for row in rows])
    study = data.Study(
        name=name,
        labels=labels,
        class_names=class_names,
        images=images,
        notes=notes,
        numeric=numeric,
        columns=columns["numeric"],
        patients=patients,
        fit=fit,
    )
    if not study.modalities:
        raise Refused("no modality: name a column of pictures, notes or numbers")
    has_content = study.have().any(1)  # [N]
    lines = [str(row[""]) for row, content in zip(rows, has_content) if not content]
    if lines:
        report.append(f"left out   {len(lines)} rows without a picture, words or numbers, "
                      f"in lines{_some(lines)}")
    if not has_content.any():
        raise Refused("no row has a picture, words or a number")
    return data.checked(study.take(has_content), training=False), report


def _cell(row, column):
    """The row's cell of a column, '' if it says nothing."""
    cell = row[column]
    return "" if cell.lower() in MISSING else cell


def _read_images(rows, column, folder, size, fit, rgb):
    """(uint8 [N,size,size] or [N,size,size,3], black where there is none, report lines) of the
    pictures that a column of N rows names. `Refused` if none of them is readable, or one lies
    outside of the folder."""
    cells = [_cell(row, column) for row in rows]
    files = {}  # {cell: its file or None}
    root = Path(os.path.realpath(folder))
    for row, cell in zip(rows, cells):
        if cell and cell not in files:
            files[cell] = find_picture(folder, cell)
            place = outside(root, cell, files[cell])
            if place:
                raise Refused(f"image column '{column}' is '{cell}' in line {row['']}: {place} is "
                              f"outside of the picture folder {folder}; put the picture into it, "
                              "or give --images a folder that holds all of them")
    absent = [cell for cell, path in files.items() if not path]
    paths = [*dict.fromkeys(filter(None, files.values()))]
    pictures, shapes, faults = read_pictures(paths, size, fit, rgb)
    if files and not pictures:
        reason = faults[0] if faults else f"{folder / absent[0]}: no such file"
        raise Refused(f"none of {len(files)} pictures is readable; the first: {reason}")
    black = np.zeros((size, size, 3) if rgb else (size, size), np.uint8)
    images = np.array([pictures.get(files.get(cell), black) for cell in cells])
    by_area = sorted(shapes.values(), key=math.prod)
    span = [f"{wide}x{high}" for high, wide in by_area[:1] + by_area[-1:]]
    line = (f"pictures   {len(pictures)} read, {' to '.join(span)} pixels; "
            f"missing: {cells.count('')} cells empty, "
            f"{len(absent)} files not there{_some(absent)}, {len(faults)} not readable")
    return images, [line, *(f"           {fault}" for fault in faults[:5])]


def _read_numbers(rows, names):
    """(float32 [N,F] of F columns, NaN = missing; the cells that are not numbers, in words)."""
    numbers = []
    wrong = []
    for row in rows:
        for name in names:
            cell = _cell(row, name)
            number = _number(cell)
            numbers.append(number)
            if cell and number is None:
                wrong.append(f"{name} '{cell}' in line {row['']}")
    return np.array(numbers, np.float32).reshape(-1, len(names)), wrong  # None becomes NaN


def _number(cell):
    """The number in a cell; None if it is not one that a float32 can hold."""
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if abs(value) < 3e38 else None


def _some(values):
    """' (a, b, c, ...)' of the first three, '' of none."""
    if not values:
        return ""
    if len(values) > 3:
        values = [*values[:3], "..."]
    return f" ({', '.join(values)})"


def read_labels(rows, names):
    """(labels [N] or [N,C], class names) of the label columns; an empty cell is -1, unlabelled.

    One column holds class names; of several, each is a finding of 0 or 1. `Refused` on numbers that
    are not whole (a measurement is not a class) and on a column of more classes than half of its
    rows."""
    if not names:
        return np.full(len(rows), -1), ["class 0", "class 1"]
    if len(names) > 1:
        return _read_findings(rows, names), list(names)
    column = f"label column '{names[0]}'"
    cells = [_cell(row, names[0]) for row in rows]
    numbers = {cell: _number(cell) for cell in cells if cell}
    order = None  # of letters
    if None not in numbers.values():  # 0, 1, 2 or 0.0, 1.0, as pandas writes them
        order = int
        for row, cell in zip(rows, cells):
            if cell and numbers[cell] % 1:
                raise Refused(f"{column} is '{cell}' in line {row['']}; labels are class names or "
                              "whole numbers, not measurements")
        cells = [str(int(numbers[cell])) if cell else "" for cell in cells]
    classes = sorted(set(cells) - {""}, key=order)
    if len(classes) > max(20, len(rows) // 2):
        raise Refused(f"{column} has {len(classes)} different values in {len(rows)} rows; "
                      "is it one?")
    if len(classes) < 2:
        raise Refused(f"{column} has {len(classes)} classes{_some(classes)}; need two or more, or "
                      "--label-column '' for a file to predict on")
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index.get(cell, -1) for cell in cells], np.int64), classes


def _read_findings(rows, names):
    """int64 [N,C] of C label columns: 0, 1 or -1 for an empty cell."""
    labels = []
    for row in rows:
        for name in names:
            cell = _cell(row, name)
            if cell not in FINDINGS:
                raise Refused(f"label column '{name}' is '{cell}' in line {row['']}; "
                              "a finding is 0, 1 or empty")
            labels.append(FINDINGS[cell])
    return np.array(labels, np.int64).reshape(-1, len(names))


def mask(note, words):
    """The note with [MASK] in place of each of the words (at least one), in any case, with whatever
    is written on to it."""
    pattern = "|".join(map(re.escape, words))
    return re.sub(rf"(?<!\w)(?:{pattern})[\w-]*", "[MASK]", note, flags=re.I)


def from_csv(args):
    """The (study, report lines) of `from-csv`; rows that repeat an earlier one are left out.
    `Refused` if a named column is not there."""
    rows, headline = read_table(args.csv, args.encoding)
    header = [column for column in rows[0] if column]
    columns = {
        "labels": _comma_list(args.label_column),
        "numeric": _numeric_columns(args.numeric),
    }
    named = []  # (column, the flag that names it)
    for kind in ("image", "note", "patient"):
        column = getattr(args, f"{kind}_column")
        if column == getattr(FromCsv, f"{kind}_column") and column not in header:
            headline += f"; no column '{column}' (--{kind}-column)"
            column = ""  # a default that is not there: no such modality
        columns[kind] = column
        if column:
            named.append((column, f"--{kind}-column"))
    named += [(column, "--label-column") for column in columns["labels"]]
    for group in columns["numeric"].values():
        named += [(column, "--numeric") for column in group]
    for column, flag in named:
        if column not in header:
            raise Refused(f"{args.csv}: has no column '{column}' ({flag}); "
                          f"it has {', '.join(header)[:200]}")
    report = [headline]
    distinct = {}  # {cells that are used: the first row of them}
    for row in rows:
        distinct.setdefault(tuple(row[column] for column, _ in named), row)
    repeats = len(rows) - len(distinct)
    if repeats:
        report.append(f"left out   {repeats} rows that repeat an earlier one")
    study, lines = from_rows([*distinct.values()], args.images or args.csv.parent, columns,
                             args.size, args.fit, args.rgb, _comma_list(args.mask_words),
                             args.csv.stem)
    return study, report + lines


def _numeric_columns(options):
    """{modality: columns} of the values of --numeric: age,temperature or labs=age,crp."""
    groups = {}
    for option in options:
        modality, _, names = option.rpartition("=")
        modality = modality or "tabular"
        if not modality.isidentifier() or modality in data.RESERVED:
            raise Refused(f"--numeric {option}: '{modality}' cannot be a modality's name")
        group = groups.setdefault(modality, [])
        group += _comma_list(names)
        if not group or len(set(group)) < len(group):
            raise Refused(f"--numeric {option}: must name at least one column, none twice")
    return groups


def _comma_list(text):
    """The parts of a text with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


# ----------------------------------------------------------------------------------------- looking


def leaks(study):
    """For each class name that stands in a note, in words: in how many notes, and how many of these
    are of its own class."""
    if study.notes is None:
        return []
    mentions = {}  # {class name: words}
    for i, name in enumerate(study.class_names):
        if not re.search(r"[^\W\d]", name) or re.fullmatch(r"class \d+", name):
            continue  # no word that a note could say
        pattern = re.compile(rf"(?<!\w){re.escape(name)}(?!\w)", re.I)
        mentioned = np.array([bool(pattern.search(note)) for note in study.notes])  # [N]
        if mentioned.any():
            own = mentioned & _members(study, i)
            mentions[name] = (f"'{name[:40]}' in {mentioned.sum()} notes "
                              f"({own.sum()} of that class)")
    return [*mentions.values()]


def _members(study, i):
    """[N] bool: the samples of class i."""
    if study.multilabel:
        return study.labels[:, i] == 1
    return study.labels == i


def describe(study):
    """What a study holds, as lines."""
    lines = [f"samples    {len(study)}"]
    if study.synthetic:
        lines[0] += ", synthetic"
    if study.synthetic_notes:
        lines[0] += ", synthetic notes"
    if study.images is not None:
        lines.append(_describe_images(study.images))
    if study.notes is not None:
        lines.append(_describe_notes(study.notes))
    for modality, values in study.numeric.items():
        for column, cells in zip(study.columns[modality], values.T):
            numbers = cells[~np.isnan(cells)]
            line = f"{modality:10s} {column}: {numbers.size} of {len(study)}"
            if numbers.size:
                line += f", {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():.4g}"
            lines.append(line)
    if study.patients is not None:
        lines.append(_describe_patients(study.patients))
    lines.append(_describe_labels(study))
    mentions = leaks(study)
    if mentions:
        lines.append(f"leakage    {', '.join(mentions)}: a model can read the answer there; "
                     "from-csv --mask-words hides words")
    names = [data.pattern_name(row, study.modalities) or "nothing" for row in study.have()]
    counts = [f"{name} {count}" for name, count in Counter(names).most_common()]
    lines.append("present    " + ", ".join(counts))
    if study.labelled.any():
        lines.append(_describe_split(study))
    return lines


def _if_any(text, count):
    """The text with the count in it; '' if the count is 0."""
    return text.format(count) if count else ""


def _describe_images(images):
    shape = "x".join(map(str, images.shape[1:]))
    present = images[~data.blank(images)]
    repeats = len(present) - len({image.tobytes() for image in present})
    level = present.mean() if present.size else 0
    return (f"images     {len(present)} of {shape}, mean grey level {level:.0f}"
            + _if_any(", {} repeat another", repeats)
            + _if_any("; {} missing", len(images) - len(present)))


def _describe_notes(notes):
    lengths = [len(words_of(note)) for note in notes if note.strip()]
    middle = int(np.median(lengths or [0]))
    return (f"notes      {len(lengths)}, of {middle} words (longest {max(lengths, default=0)})"
            + _if_any("; {} missing", len(notes) - len(lengths)))


def _describe_patients(patients):
    names = [name for name in map(str, patients) if name not in ("", "nan")]
    return (f"patients   {len(set(names))}"
            + _if_any("; {} samples name none", len(patients) - len(names)))


def _describe_labels(study):
    if not study.labelled.any():
        return "labels     none: a file to predict on"
    counts = []
    for i, name in enumerate(study.class_names):
        count = f"{name[:40]} {_members(study, i).sum()}"
        if study.multilabel:
            count += f" of {(study.labels[:, i] >= 0).sum()}"
        counts.append(count)
    return f"labels     {', '.join(counts)}" + _if_any("; {} unlabelled", (~study.labelled).sum())


def _describe_split(study):
    try:
        parts = data.split(study, 0)
    except Refused as error:
        return f"split      none: {error}"
    counts = [f"{part} {len(rows)}" for part, rows in parts.items()]
    line = f"split      {', '.join(counts)} at seed 0"
    if study.fixed_split is not None:
        line += " (the file's own)"
    return line


def draw_sheet(study, path, columns=8):
    """A sheet of samples, a row for each class, with the first words of their notes; `Refused`
    without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise Refused(f"{path}: drawing needs matplotlib: "
                      "pip install 'minilora[pictures]'") from None
    visible = ~data.blank(study.images)  # [N]
    groups = {}  # {class name: rows with an image}
    for i, name in enumerate(study.class_names):
        groups[name] = np.flatnonzero(visible & _members(study, i))
    groups["unlabelled"] = np.flatnonzero(visible & ~study.labelled)
    groups = {name: rows for name, rows in [*groups.items()][:12] if len(rows)}
    figure = Figure(figsize=(1.6 * columns, 1.95 * len(groups) + 0.5))
    grid = figure.subplots(len(groups), columns, squeeze=False)
    for axes, (name, rows) in zip(grid, groups.items()):
        places = np.linspace(0, len(rows) - 1, min(columns, len(rows)))  # spread over the file
        for axis in axes:
            axis.axis("off")
        for axis, row in zip(axes, rows[places.astype(int)]):
            axis.imshow(study.images[row], cmap="gray", vmin=0, vmax=255)
            note = "" if study.notes is None else study.notes[row].replace("$", r"\$")
            axis.set_title(note if len(note) <= 24 else note[:24] + "...", fontsize=6)
        axes[0].text(-0.06, 0.5, name[:24], transform=axes[0].transAxes, rotation=90, va="center",
                     ha="right", fontsize=8)
    title = f"{study.name}: {len(study)} samples"
    if study.synthetic:
        title += " (synthetic data)"
    elif study.synthetic_notes:
        title += " (synthetic notes)"
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=110)
    data.write_atomic(path, content.getvalue())


def write_study(args):
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
    study, report = from_csv(args)
    print(*report, *describe(study), sep="\n")
    data.save_study(out, study)
    print(f"{out}: written; look at it with: python -m minilora.studies inspect {out}")


def inspect(args):
    """Say what a study file holds, and draw its sheet if it has images."""
    study = data.load_study(args.file, training=False)
    print(args.file, *describe(study), sep="\n")
    if study.images is not None:
        sheet = args.out or args.file.with_suffix(".png")
        draw_sheet(study, sheet)
        print(f"sheet: {sheet}")


def main(argv=None):
    import tyro

    with data.one_line_errors():
        args = tyro.cli(
            FromCsv | Inspect,
            args=argv,
            prog="minilora.studies",
            description=__doc__.splitlines()[0],
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        if isinstance(args, FromCsv):
            write_study(args)
        else:
            inspect(args)


if __name__ == "__main__":
    main()
