"""Make a study file of pictures and a spreadsheet, or of phantoms, and see what a study file holds.

    python -m minilora.studies from-csv studies.csv --images pictures --out my.npz
    python -m minilora.studies inspect my.npz
    python -m minilora.studies phantoms --out drawn.npz --fact image    # synthetic, to experiment

Tables are read by pandas, pictures by Pillow and DICOM files by pydicom (`studies` extra). The same
pictures and the same spreadsheet give the same arrays on every machine, as far as their decoders
do: PNG and uncompressed DICOM always do, JPEG up to the version of its library. Skip this file
when you read for the methods.
"""

import io
import math
import os
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    # A thread per core reads pictures; threads of numpy's own in each would wait for one another.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from minilora import data, prepare, tables
from minilora.data import Refused
from minilora.phantoms import FACTS, phantoms
from minilora.pictures import find_picture, outside, read_picture, read_pictures  # noqa: F401
from minilora.tables import some
from minilora.words import buckets_for, coverage, positions_for, words_of

DECIMALS = {"auto": "", "point": ".", "comma": ","}


@dataclass
class FromCsv:
    """Turn a spreadsheet with a row for each study, and the pictures it names, into a study file."""

    # The spreadsheet: .xlsx, or text with commas, semicolons, tabs or bars. Its first line names
    # the columns.
    csv: Path
    # Folder that holds all pictures of the image column; default: the spreadsheet's folder.
    images: Path | None = None
    out: Path | None = None  # Study file to write; default: the spreadsheet's name with .npz.
    size: int = 64  # Height and width of the stored images, pixels.
    # How a picture becomes square: scaled on each axis (squeeze), cut to its centre (crop), or with
    # black beside it (pad). Serving does the same.
    fit: Literal["squeeze", "crop", "pad"] = "squeeze"
    rgb: bool = False  # Keep colours; default: pictures become grey.
    # Column of the pictures' file names, in which .png, .jpg, .jpeg and .dcm may be left out.
    image_column: str = "image"
    note_column: str = "note"  # Column of the reports, in words.
    # Column of the class names. Several columns, joined by commas, are findings, each 0, 1, -1 or
    # empty; '': the file has no labels.
    label_column: str = "label"
    # Sign that separates the findings in one cell, as | in A|B; '[...]': cells are lists; '': a
    # cell is one class; auto: | or lists, where cells are written so.
    label_separator: str = "auto"
    # What -1 means among findings, or labels of 0 and 1; ignore: unlabelled.
    uncertain: Literal["ignore", "positive", "negative"] = "ignore"
    # What an empty cell means among findings, or labels of 0 and 1; ignore: unlabelled.
    blank: Literal["ignore", "negative"] = "ignore"
    # Column that names the patient; all samples of a patient stay in one part of the split.
    patient_column: str = "patient"
    # Columns of numbers, such as age,temperature; for several modalities: vitals=pulse labs=age,crp
    numeric: tuple[str, ...] = ()
    # The decimal mark of the numbers; auto: the mark that each column shows.
    decimal: Literal["auto", "point", "comma"] = "auto"
    na: str = ""  # Further spellings of "missing", joined by commas: --na=-999,unbekannt
    # Words to hide in the notes, joined by commas; covid hides COVID-19 and Covid19 too.
    mask_words: str = ""
    # What stands in the place of a hidden word: [MASK] (mark) or nothing (delete).
    mask: Literal["mark", "delete"] = "mark"
    # Encoding of the spreadsheet; default: UTF-8, or UTF-16 where the file says so, else
    # Windows-1252. The import prints which it is.
    encoding: str = ""


@dataclass
class Inspect:
    """Print what a study file holds, and draw a sheet of its samples."""

    file: Path  # Study file (.npz), or a file of MedMNIST.
    out: Path | None = None  # The sheet to write; default: the study file's name with .png.


@dataclass
class Phantoms:
    """Write a study file of phantoms: synthetic chest studies, drawn by a program."""

    out: Path = Path("phantoms.npz")  # Study file to write.
    samples: int = 4000  # Number of phantoms to draw.
    size: int = 32  # Height and width of the images, pixels.
    # Bases are pretrained on source; methods adapt to target, which has another scanner, other
    # lungs and other words.
    domain: Literal["target", "source"] = "target"
    seed: int = 2  # The same settings and the same seed give the same bytes.
    # What tells the diagnosis. `usual`: image, words and numbers, each in part. `image`: the lesion
    # in the image alone; reports do not state it, and what they say is independent of it. `both`:
    # the same, but each report states its lesion correctly. `image` and `both` have no numbers.
    fact: Literal["usual", "image", "both"] = "usual"


# ------------------------------------------------------------------------------------- spreadsheet


def from_table(table, columns, args):
    """(Study, report lines) of a table.

    columns: {'image'|'note'|'patient': column or '', 'labels': names, 'numeric': {modality: column
    names}}. Cells that say nothing and pictures that are not there or not readable are missing;
    rows with nothing at all are left out. `Refused` if no picture is readable, one lies outside of
    the folder, or a label is not one."""
    na = _comma_list(args.na)
    words = _comma_list(args.mask_words)
    report = _missing_lines(table, columns, na)
    images = notes = patients = None
    if columns["image"]:
        images, lines = _read_images(table, columns["image"], na, args)
        report += lines
    if columns["note"]:
        notes, lines = _read_notes(table.column(columns["note"], na), na, words, args.mask)
        report += lines
    numeric, formats, lines = _read_numeric(table, columns["numeric"], na, args.decimal)
    report += lines
    labels, class_names, lines = tables.read_labels(table, columns["labels"], na, args.uncertain,
                                                    args.blank, args.label_separator)
    report += lines
    if columns["patient"]:
        patients = np.array(table.column(columns["patient"], na))
    study = data.Study(
        name=args.csv.stem,
        labels=labels,
        class_names=class_names,
        images=images,
        notes=notes,
        numeric=numeric,
        columns=columns["numeric"],
        patients=patients,
        lines=np.array(table.lines),
        fit=args.fit,
    )
    study.prepared = {
        "size": args.size,
        "fit": args.fit,
        "rgb": args.rgb,
        "na": na,
        "mask_words": words,
        "mask": args.mask,
        "numbers": formats,
    }
    if not study.modalities:
        raise Refused("no column of pictures, notes or numbers: name one with --image-column, "
                      "--note-column or --numeric")
    has_content = study.have().any(1)  # [N]
    empty = [line for line, content in zip(table.lines, has_content) if not content]
    if empty:
        report.append(f"left out   {len(empty)} rows without a picture, words or numbers, "
                      f"in lines{some(empty)}")
    if not has_content.any():
        raise Refused("no row has a picture, words or a number")
    return _varied(study.take(has_content)), report


def _varied(study):
    """The study itself, or `Refused` if a label that it has never varies."""
    try:
        return data.checked(study, training=study.labelled.any())
    except Refused as error:
        if "never varies" in str(error):
            raise Refused(f"{error}: leave it out of --label-column, or see --blank "
                          "and --uncertain") from None
        raise


def _missing_lines(table, columns, na):
    """Report lines: how often which spelling of "missing" stands in the columns in use."""
    names = [columns["image"], columns["note"], columns["patient"], *columns["labels"]]
    names += [name for group in columns["numeric"].values() for name in group]
    lines = []
    for name in dict.fromkeys(filter(None, names)):
        spellings = [f"{spelling} {n}" for spelling, n in table.missing(name, na).most_common()]
        if spellings:
            lines.append(f"missing    {name}: {', '.join(spellings)}")
    return lines


def _read_notes(cells, na, words, mask):
    """(str [N], report lines) of the cells of notes, with the words hidden; '' is missing."""
    for word in words:
        if not words_of(word):
            raise Refused(f"--mask-words {word!r}: holds no letter and no digit")
    record = {"na": na, "mask_words": words, "mask": mask}
    notes = np.array([prepare.read_note(cell, record) for cell in cells])
    if not words:
        return notes, []
    composed = [unicodedata.normalize("NFC", cell) for cell in cells]
    return notes, [f"masked     words in {(notes != composed).sum()} notes"]


def _read_images(table, column, na, args):
    """(uint8 [N,size,size] or [N,size,size,3], black where there is none, report lines) of the
    pictures that a column of N rows names. `Refused` if none of them is readable, or one lies
    outside of the folder."""
    folder = args.images or args.csv.parent
    cells = table.column(column, na)
    files = {}  # {cell: its file or None}
    root = Path(os.path.realpath(folder))
    for line, name, cell in zip(table.lines, table.cells[column], cells):
        if cell and cell not in files:
            files[cell] = find_picture(folder, cell)
        if name:  # .. says nothing, and yet leads out
            place = outside(root, name, files.get(cell))
            if place:
                raise Refused(f"image column '{column}' is '{name}' in line {line}: {place} is "
                              f"outside of the picture folder {folder}; put the picture into it, "
                              "or give --images a folder that holds all of them")
    absent = [cell for cell, path in files.items() if not path]
    paths = Counter(files[cell] for cell in cells if files.get(cell))
    pictures, shapes, faults = read_pictures([*paths], args.size, args.fit, args.rgb)
    if files and not pictures:
        reason = faults[0] if faults else f"{folder / absent[0]}: no such file"
        raise Refused(f"none of {len(files)} pictures is readable; the first: {reason}")
    black = np.zeros((args.size, args.size, 3) if args.rgb else (args.size, args.size), np.uint8)
    images = np.array([pictures.get(files.get(cell), black) for cell in cells])
    by_area = sorted(shapes.values(), key=math.prod)
    span = [f"{wide}x{high}" for high, wide in by_area[:1] + by_area[-1:]]
    lines = [f"pictures   {len(pictures)} read, {' to '.join(span)} pixels; "
             f"missing: {cells.count('')} cells empty, "
             f"{len(absent)} files not there{some(absent)}, {len(faults)} not readable"]
    lines += [f"           {fault}" for fault in faults[:5]]
    for path, count in paths.most_common(1):
        if count > 2:
            lines.append(f"pictures   {path.name} is the picture of {count} samples")
    return images, lines


def _read_numeric(table, groups, na, decimal):
    """({modality: float32 [N,F]}, {modality: {column: its marks}}, report lines) of the numeric
    columns {modality: names}."""
    names = [name for group in groups.values() for name in group]
    marks, examples = tables.number_formats(table, names, na, DECIMALS[decimal])
    tail = "" if DECIMALS[decimal] else "; if not, use --decimal"
    report = [f"numbers    {', '.join(examples[:8])}{tail}"] if examples else []
    numeric = {}
    formats = {}
    for modality, columns in groups.items():
        numeric[modality], wrong = tables.read_numbers(table, columns, marks, na)
        if wrong:
            report.append(f"{modality:10s} {len(wrong)} cells are not numbers and count as missing"
                          f"{some(wrong)}")
        formats[modality] = {}
        for column in columns:
            point, thousands = marks[column]
            formats[modality][column] = {"decimal": point, "thousands": thousands}
    return numeric, formats, report


def from_csv(args):
    """The (study, report lines) of `from-csv`; rows that repeat an earlier one are left out.
    `Refused` if a named column is not there."""
    table = tables.read_table(args.csv, args.encoding)
    headline = table.origin
    header = [column for column in table.cells if column]
    columns = {
        "labels": _comma_list(args.label_column),
        "numeric": _numeric_columns(args.numeric),
    }
    named = []  # (column, the flag that names it)
    for kind in ("image", "note", "patient"):
        column = getattr(args, f"{kind}_column")
        if column == getattr(FromCsv, f"{kind}_column") and column not in header:
            if kind == "image" and args.images != FromCsv.images:
                raise Refused(f"--images {args.images}: {args.csv} has no column '{column}'; name "
                              "the column of the pictures with --image-column; it has "
                              f"{', '.join(header)[:200]}")
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
    if not columns["patient"]:
        report.append("patients   no column names them: samples of one patient may be in the "
                      "training and in the test split; name one with --patient-column")
    distinct = table.distinct()
    repeats = len(table) - len(distinct)
    if repeats:
        report.append(f"left out   {repeats} rows that repeat an earlier one in every cell")
    study, lines = from_table(distinct, columns, args)
    study.report = tuple(report + lines)
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
            raise Refused(f"--numeric {option}: must name at least one column, and none twice")
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
    notes = [f" {' '.join(words_of(note))} " for note in study.notes]
    mentions = {}  # {class name: words}
    for i, name in enumerate(study.class_names):
        if not re.search(r"[^\W\d]", name) or re.fullmatch(r"class \d+", name):
            continue  # no word that a note could say
        words = f" {' '.join(words_of(name))} "
        mentioned = np.array([words in note for note in notes])  # [N]
        if mentioned.any():
            own = mentioned & _members(study, i)
            mentions[name] = (f"'{name[:40]}' in {mentioned.sum()} notes "
                              f"({own.sum()} of that class)")
    return [*mentions.values()]


def telling_words(study, most=5):
    """In words: which words, [MASK] among them, stand in notes of one class and hardly in others;
    without the names of classes, which `leaks` counts.

    Such a word is in 5 notes and in 2% of them, makes its class at least 9 times as likely (in odds)
    as it is over all notes, and more often than chance would let one of all words do."""
    if study.notes is None:
        return []
    notes = [{*words_of(note)} for note in study.notes]
    noted = np.array([bool(words) for words in notes])  # [N]
    counts = Counter(word for words in notes for word in words)
    least = max(5, 0.02 * noted.sum())
    names = {" ".join(words_of(name)) for name in study.class_names}
    words = [word for word, count in counts.items() if count >= least and word not in names]  # V
    index = {word: i for i, word in enumerate(words)}
    pairs = [(row, index[word]) for row, said in enumerate(notes) for word in said & index.keys()]
    rows, columns = np.array(pairs, np.int64).reshape(-1, 2).T
    tests = np.where(np.array(words) == "[mask]", 1, len(words)) * len(study.class_names)  # [V]
    telling = {}  # {word: (evidence, in words)}
    for name, members, known in _sides(study):
        share = (members & noted).sum() / max((known & noted).sum(), 1)
        if not 0 < share < 1:
            continue
        total = np.bincount(columns, known[rows], len(words))  # [V]
        own = np.bincount(columns, members[rows], len(words))  # [V]
        rate = own / np.maximum(total, 1)
        inside = rate * np.log(np.maximum(rate, 1e-9) / share)
        outside = (1 - rate) * np.log(np.maximum(1 - rate, 1e-9) / (1 - share))
        evidence = total * (inside + outside)  # exp(-evidence) bounds the probability of chance
        strong = (rate * (1 - share) >= 9 * (1 - rate) * share) & (evidence > np.log(20 * tests))
        for i in np.flatnonzero(strong & (total >= least)):
            text = (f"'{words[i][:40]}' in {total[i]:.0f} notes, {own[i]:.0f} of them {name[:40]} "
                    f"({share:.0%} of all notes)")
            telling[words[i]] = max(telling.get(words[i], (0, "")), (evidence[i], text))
    return [text for _, text in sorted(telling.values(), reverse=True)[:most]]


def _sides(study):
    """(name, [N] bool: has it, [N] bool: has it or not for sure) of each class, or of each finding
    and its absence."""
    for i, name in enumerate(study.class_names):
        if study.multilabel:
            labels = study.labels[:, i]
            yield name, labels == 1, labels >= 0
            yield f"no {name}", labels == 0, labels >= 0
        else:
            yield name, study.labels == i, study.labels >= 0


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
        lines += _describe_notes(study.notes)
    for modality, values in study.numeric.items():
        for column, cells in zip(study.columns[modality], values.T):
            numbers = cells[~np.isnan(cells)]
            line = f"{modality:10s} {column}: {numbers.size} of {len(study)}"
            if numbers.size:
                line += f", {numbers.min():g} to {numbers.max():g}, mean {numbers.mean():.4g}"
            lines.append(line)
    lines += _describe_codes(study)
    if study.patients is not None:
        lines.append(_describe_patients(study.patients))
    lines.append(_describe_labels(study))
    mentions = leaks(study)
    if mentions:
        lines.append(f"leakage    {', '.join(mentions)}: a model can read the answer there; "
                     "from-csv --mask-words hides words")
    words = telling_words(study)
    if words:
        lines.append(f"leakage    words of one class: {'; '.join(words)}")
    if study.prepared:
        lines.append(_describe_import(study.prepared))
    names = [data.pattern_name(row, study.modalities) or "nothing" for row in study.have()]
    counts = [f"{name} {count}" for name, count in Counter(names).most_common()]
    lines.append("present    " + ", ".join(counts))
    if study.labelled.any():
        lines.append(_describe_split(study))
    return lines


def _describe_codes(study):
    """A line of the numbers that may stand for missing ones, or none."""
    counts = []
    spellings = {}
    for modality, values in study.numeric.items():
        for column, cells in zip(study.columns[modality], values.T):
            for value, count in tables.sentinels(cells):
                counts.append(f"{column} {value:g} {count} times")
                spellings[f"{value:g}"] = None
    if not counts:
        return []
    return [f"codes?     {', '.join(counts)}: far from all other numbers; if they mean missing, "
            f"from-csv --na={','.join(spellings)} drops them"]


def _describe_import(record):
    """What an import did, as serving does it again (see prepare.py)."""
    parts = [f"{record['size']} pixels, {record['fit']}, {'colours' if record['rgb'] else 'grey'}"]
    if record["na"]:
        parts.append(f"also missing: {', '.join(record['na'])}")
    if record["mask_words"]:
        parts.append(f"hidden ({record['mask']}): {', '.join(record['mask_words'])}")
    columns = {}  # {decimal and thousands mark: columns}
    for group in record["numbers"].values():
        for column, marks in group.items():
            columns.setdefault((marks["decimal"], marks["thousands"]), []).append(column)
    for (decimal, thousands), names in columns.items():
        if (decimal, thousands) != (".", ""):
            parts.append(f"numbers as 1{thousands}000{decimal}5: {', '.join(names)}")
    return f"import     {'; '.join(parts)}"


def _if_any(text, count):
    """The text with the count in it; '' if the count is 0."""
    return text.format(count) if count else ""


def _describe_images(images):
    shape = "x".join(map(str, images.shape[1:]))
    present = images[~data.blank(images)]
    groups = Counter(image.tobytes() for image in present)
    level = present.mean() if present.size else 0
    return (f"images     {len(present)} of {shape}, mean grey level {level:.0f}"
            + _if_any(", {} repeat another", len(present) - len(groups))
            + _largest(groups)
            + _if_any("; {} missing", len(images) - len(present)))


def _largest(groups):
    """How many samples the largest of {what they share: how many} has, in words; '' of 1."""
    largest = max(groups.values(), default=1)
    return f", largest group {largest} samples" if largest > 1 else ""


def _describe_notes(notes):
    """A line on lengths, and one on the ids that training gives words by default."""
    lengths = [len(words_of(note)) for note in notes if note.strip()]
    middle = int(np.median(lengths or [0]))
    yield (f"notes      {len(lengths)}, median {middle} words, longest {max(lengths, default=0)}"
           + _if_any("; {} missing", len(notes) - len(lengths)))
    yield f"words      {coverage(notes, buckets_for(notes), positions_for(notes))}"


def _describe_patients(patients):
    names = [name for name in map(str, patients) if not prepare.says_nothing(name)]
    return (f"patients   {len(set(names))}" + _largest(Counter(names))
            + _if_any("; {} samples name no patient", len(patients) - len(names)))


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
        return f"{line} (the file's own)"
    total = sum(map(len, parts.values()))
    away = max(abs(len(parts[part]) - share * total)
               for part, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)))
    if away > max(2, 0.05 * total):
        line += "; warning: far from 80/10/10, because each patient and picture stays in one part"
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
    _check_out(out)
    study, report = from_csv(args)
    print(*report, *describe(study), sep="\n")
    data.save_study(out, study)
    print(f"{out}: written; look at it with: python -m minilora.studies inspect {out}")


def _check_out(out):
    """`Refused` unless a study file can be written there without replacing anything."""
    if out.suffix != ".npz":
        raise Refused(f"--out {out}: must end in .npz")
    if out.exists():
        raise Refused(f"--out {out}: exists already; choose another name, or remove the file")


def write_phantoms(args):
    """Draw phantoms and write their study file; nothing is written over."""
    _check_out(args.out)
    for name, value, low, high in (("samples", args.samples, 1, 10**6), ("size", args.size, 8, 256),
                                   ("seed", args.seed, 0, 2**32 - 1)):
        if not low <= value <= high:
            raise Refused(f"--{name} is {value}; must be in {low}..{high}")
    pixels = args.samples * args.size**2
    if pixels > 2**25:
        raise Refused(f"--samples {args.samples} of --size {args.size} have {pixels:,} pixels; "
                      f"at most {2**25:,} are drawn at once")
    study = phantoms(args.samples, args.seed, args.domain, args.size, **FACTS[args.fact])
    if args.fact != "usual":
        study = study.select(("image", "note"))
    study.report = (f"phantoms of the {args.domain} domain, seed {args.seed}, fact {args.fact}",)
    print(*describe(data.checked(study)), sep="\n")
    data.save_study(args.out, study)
    print(f"{args.out}: written; synthetic data, drawn by a program")


def inspect(args):
    """Say what a study file holds, and draw its sheet if it has images."""
    study = data.load_study(args.file, training=False)
    print(args.file, *describe(study), sep="\n")
    if study.report:
        print("the import said:", *study.report, sep="\n")
    if study.images is not None:
        sheet = args.out or args.file.with_suffix(".png")
        draw_sheet(study, sheet)
        print(f"sheet: {sheet}")


def main(argv=None):
    import tyro

    with data.one_line_errors():
        args = tyro.cli(
            FromCsv | Inspect | Phantoms,
            args=argv,
            prog="minilora.studies",
            description=__doc__.splitlines()[0],
            config=(tyro.conf.PositionalRequiredArgs,),
        )
        if isinstance(args, FromCsv):
            write_study(args)
        elif isinstance(args, Phantoms):
            write_phantoms(args)
        else:
            inspect(args)


if __name__ == "__main__":
    main()
