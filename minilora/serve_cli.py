"""The command line of `serve.py`: check an exported folder, predict, draw. No torch either.

    python -m minilora.serve predict runs/mora/onnx --image chest.png --note "fever, recent cold"
    python -m minilora.serve sample runs/selora/onnx --note "coin lesion sinistral" --out sheet.png
    python -m minilora.serve check runs/mora/onnx

`export.py predict` and so on are the same. Skip this file when you read for a method.

Letters: N samples of a study file, n those that are predicted, M modalities, C classes, S image
size.
"""

import argparse
import csv
import io
import json
import os
import re
import sys
import unicodedata
from collections import Counter
from dataclasses import dataclass
from itertools import compress
from pathlib import Path

import numpy as np

from minilora import data, metrics, words
from minilora.compare import MOST, Cases, compare, conclusions, in_words
from minilora.data import Refused
from minilora.serve import Diagnoser, Synthesizer, check, fill_in, own_manifest, tolerance

COMMANDS = {
    "check": "run the stored golden inputs again and compare the outputs with torch's",
    "predict": "diagnose one sample, or all samples of a study file with --data",
    "sample": "draw images from words",
}


# -------------------------------------------------------------------------------------- arguments


def command_line(argv):
    """(the parsed command, {flag: (modality, column)}): `predict` has a flag for each numeric
    column of its folder."""
    parser = argparse.ArgumentParser(
        prog="minilora.serve",
        description="Check an exported folder, predict with it, or draw images with it. "
        "It needs numpy and onnxruntime, and no torch.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        p = commands.add_parser(name, help=what, allow_abbrev=False)
        p.add_argument("folder", type=Path, help="folder that export.py wrote, e.g. runs/mora/onnx")
        p.add_argument("--device", default="auto", help="device: auto, cpu or cuda (default: auto)")
    add_sample(commands.choices["sample"])
    add_predict(commands.choices["predict"])
    columns = {}
    # The folder is read before the arguments are parsed: its columns are flags among them.
    folder = exported_folder(argv)
    if argv[:1] == ["predict"] and folder:
        columns = add_columns(commands.choices["predict"], folder)
    return parser.parse_args(argv), columns


def add_sample(p):
    """The arguments of `sample` alone."""
    p.add_argument(
        "--note", action="append", required=True, help="words to draw; may be given several times"
    )
    p.add_argument("--n", type=int, default=8, help="images to draw for each note (default: 8)")
    p.add_argument("--seed", type=int, default=0,
                   help="the same seed gives the same images (default: 0)")
    p.add_argument(
        "--adapter",
        help="for a hot-swap folder: name of the adapter (default: none, the base draws alone)",
    )
    p.add_argument(
        "--out",
        type=Path,
        default=Path("sheet.png"),
        help="file to write or replace: a .png sheet (pictures extra) or an .npy array "
        "(default: sheet.png)",
    )
    add_sampling(p)


def add_predict(p):
    """The arguments of `predict` alone, but for the numeric columns."""
    p.add_argument(
        "--image",
        type=Path,
        help="the sample's image: a picture (needs the pictures extra) or an .npy array; leave it "
        "out if it is missing",
    )
    p.add_argument("--note", help="the sample's report, in words; leave it out if it is missing")
    p.add_argument("--data", type=Path, help="study file: predict all its samples and print scores")
    p.add_argument("--synthetic-notes", action="store_true",
                   help="with --data: attach templated notes to a file without any, as in training")
    p.add_argument(
        "--split",
        type=Path,
        help="with --data: predict only the test rows of this split-sN.npz",
    )
    p.add_argument("--missing", metavar="TYPE:RATE",
                   help="with --split: withhold what this missing table of that file withholds")
    p.add_argument("--out", type=Path, help="with --data: CSV file for the probabilities")
    p.add_argument("--scores", type=Path, help="with --data: JSON file for all that is printed")
    p.add_argument(
        "--filled",
        action="append",
        metavar="MODALITY",
        help="for a model that was trained with --absent fill: what is given for this modality is "
        "another patient's, or was drawn; may be given several times",
    )
    p.add_argument(
        "--batch", type=int, default=64, help="samples that the model takes at once (default: 64)"
    )
    p.add_argument(
        "--synthesizer",
        type=Path,
        metavar="FOLDER",
        help="folder that export.py selora wrote: it draws the image of a sample that has words "
        "and lacks its image",
    )
    p.add_argument("--draws", type=int, default=4,
                   help="with --synthesizer: images to draw for each such sample (default: 4)")
    add_sampling(p)


def add_sampling(p):
    """The arguments of whatever draws images."""
    p.add_argument(
        "--steps", type=int, default=10, help="DDIM (denoising) steps of an image (default: 10)"
    )
    p.add_argument(
        "--guidance", type=float, default=3.0,
        help="weight of the words: 0 ignores them, 1 is the model itself (default: 3)",
    )
    p.add_argument(
        "--no-grain",
        dest="grain",
        action="store_false",
        help="leave out grain: pixel noise that the autoencoder loses, and that is added back from "
        "its decoder's normal distribution",
    )


def exported_folder(argv):
    """The first exported folder among the arguments that is not --synthesizer's, or None."""
    for before, argument in zip(argv, argv[1:]):
        path = os.path.join(argument, "manifest.json")
        if before != "--synthesizer" and os.path.isfile(path):
            return argument
    return None


def add_columns(p, folder):
    """An argument for each numeric column of a folder; returns {flag: (modality, column)}."""
    columns = []
    for name, spec in own_manifest(folder).get("numeric", {}).items():
        columns += [(name, column) for column in spec["columns"]]
    flags = column_flags(columns, p._option_string_actions)
    for flag, (name, column) in flags.items():
        about = f"{name}: {column}".replace("%", "%%")
        p.add_argument(f"--{flag}", dest=f"column {flag}", metavar="NUMBER", help=about)
    return flags


def column_flags(columns, taken):
    """{flag: (modality, column)} of (modality, column) pairs, in their order, a flag for each;
    taken: the command's own, with their dashes.

    A flag is the name of the column, with - for whatever is no letter, digit or _. Where two names
    would share it, or nothing is left, signs are written out: `WBC %` is WBC-percent-sign beside
    `WBC #`. Where the flag is taken the modality stands before it, and at need a number behind."""
    taken = {"--", *taken}
    flags = {}  # {(modality, column): flag}
    for pair in columns:
        flag = pair[1]  # names that are flags as they stand come first: no other may take them
        if flag == fold(flag) and flag.strip("-") and f"--{flag}" not in taken:
            flags[pair] = flag
            taken.add(f"--{flag}")
    sharing = Counter(fold(column) for column in {column for _, column in columns})
    for name, column in columns:
        if (name, column) in flags:
            continue
        plain = fold(column)
        if not plain.strip("-") or (plain != column and sharing[plain] > 1):
            plain = fold(re.sub(r"[^\w\s]", sign_name, column))
        flag = plain
        number = 1
        while f"--{flag}" in taken:
            flag = f"{name}-{plain}" if number == 1 else f"{name}-{plain}-{number}"
            number += 1
        flags[name, column] = flag
        taken.add(f"--{flag}")
    return {flags[pair]: pair for pair in columns}


def fold(column):
    """The name of a column with - for whatever is no letter, digit or _."""
    return re.sub(r"\W+", "-", column.strip())


def sign_name(match):
    """' percent sign ' of a match of %: the sign's name in Unicode."""
    sign = match[0]
    return f" {unicodedata.name(sign, f'u{ord(sign):x}').lower()} "


# ------------------------------------------------------------------------------------- one sample


def predict_one(diagnoser, args, columns):
    """Probabilities of the one sample on the command line, as bars."""
    if args.scores:
        raise Refused(f"--scores {args.scores} is for --data FILE.npz; one sample has no score")
    filled = [set(args.filled or ())]
    imputed = diagnoser.imputed(filled, 1)  # [1,M]
    numeric = {}  # {modality: [{column: value}]}
    for flag, (name, column) in columns.items():
        value = getattr(args, f"column {flag}")
        if value is not None:
            numeric.setdefault(name, [{}])[0][column] = value
    notes = None if args.note is None else [args.note]
    images = None
    if args.image:
        # Imported only here: most requests have no file to read.
        from minilora.pictures import read_picture

        colour = diagnoser.manifest["channels"] == 3
        image = read_picture(args.image, colour)
        images = [image if colour else data.grey(image)]
    if args.synthesizer and not args.image and (args.note or "").strip():
        print(
            f"image: {args.draws} are drawn from the words by {args.synthesizer}, "
            "and the probabilities are averaged"
        )
        synthesizer = Synthesizer(args.synthesizer, args.device)
        drawing = (args.draws, args.steps, args.guidance, args.grain, filled)
        each = fill_in(diagnoser, synthesizer, notes, numeric, *drawing)  # [draws,1,C]
        return show(diagnoser, each.mean(0)[0])
    if images is None and notes is None and not numeric:
        flags = ", ".join(f"--{flag}" for flag in ("image", "note", *columns))
        raise Refused(f"nothing to diagnose: give --data FILE.npz, or any of {flags}")
    probabilities = diagnoser.predict(images, notes, filled, **numeric)[0]
    given, _ = diagnoser.request(images, notes, numeric)
    _, present = diagnoser.inputs(given, range(1), imputed)
    own = ", ".join(compress(diagnoser.modalities, present[0]))
    others = ", ".join(compress(diagnoser.modalities, imputed[0]))
    print(f"present: {own}" + (f"; filled: {others}" if others else ""))
    show(diagnoser, probabilities)


def show(diagnoser, probabilities):
    """Probabilities [C] as bars, the most probable first."""
    for i in np.argsort(-probabilities):
        p = probabilities[i]
        print(f"{diagnoser.classes[i]:20s} {p:.3f} {'█' * round(30 * float(p))}")
    origin = data.origin(diagnoser.manifest)
    if origin != "real data":
        print(f"trained on {origin}: not a diagnosis of anybody")


# ------------------------------------------------------------------------------------- study files


def predict_file(diagnoser, args):
    """Probabilities of a study file's rows: metrics to stdout, one line per sample to --out."""
    manifest = diagnoser.manifest
    study = data.load_study(args.data, args.synthetic_notes, diagnoser.classes, training=False)
    names = shared_modalities(study, diagnoser, args.data)
    compare_studies(study, diagnoser, names, args)
    split = read_split(study, args) if args.split else None
    rows, present = chosen_rows(study, split, args)
    # [n, modalities in names]
    present = present[:, [study.modalities.index(name) for name in names]]
    gaps = drawable(present, names, args)  # [n]
    whose = None
    if diagnoser.fills:
        whose = donors(diagnoser, study, names, rows, present, gaps, split, args)
    cases = cases_of(study, names, rows, present, whose)
    # Without a donor, what is to be drawn cannot be diagnosed before.
    before = ~gaps if diagnoser.fills and split is None else np.ones(len(rows), bool)
    probabilities = np.zeros((len(rows), len(diagnoser.classes)), np.float32)
    if before.any():
        probabilities[before] = cases.take(before).predict(diagnoser)
    patterns = [data.pattern_name(row, names) for row in present]
    comparison = None
    if gaps.any():
        drawing = Drawing(diagnoser, study, split, args)
        without = probabilities[gaps] if before.all() else None
        probabilities[gaps], comparison = drawing.fill(cases.take(gaps), rows[gaps], without)
        for i in np.flatnonzero(gaps):
            patterns[i] += "+drawn image"

    labelled = study.labelled[rows]
    about = ""
    if study.synthetic or manifest["synthetic"]:
        about = " (synthetic data)"
    if study.synthetic_notes or manifest["synthetic_notes"]:
        about = " (synthetic notes)"
    scores = {}
    if labelled.any():
        scores = metrics.scores(study.labels[rows][labelled], probabilities[labelled])
    results = "".join(f", {text}" for text in in_words(scores))
    print(f"{args.data}{about}: {len(rows)} samples, {labelled.sum()} labelled{results}")
    counts = dict(zip(*np.unique(patterns, return_counts=True)))
    print("present: " + ", ".join(f"{pattern} {count}" for pattern, count in counts.items()))
    if args.out:
        write_table(args.out, diagnoser, study, rows, patterns, probabilities)
        print(f"probabilities: {args.out}")
    if args.scores:
        content = {"data": args.data.name, "missing": args.missing, "samples": len(rows)}
        content |= {"labelled": labelled.sum(), "present": counts, "scores": scores}
        content = data.as_json(content | {"filled_in": comparison})
        data.write_atomic(args.scores, json.dumps(content, indent=1, allow_nan=False) + "\n")
        print(f"scores: {args.scores}")


def compare_studies(study, diagnoser, names, args):
    """Say where the pictures of a file were made otherwise than those of training, or the model was
    trained on the file; `Refused` if the labels are of another kind, or a flag is for one sample."""
    if args.filled:
        raise Refused(f"--filled {args.filled[0]} is for one sample; with --data, the donors of "
                      "--split RUN/split-sN.npz fill in what is absent")
    manifest = diagnoser.manifest
    pictures = [(p.get("size"), p.get("fit")) for p in (study.prepared, diagnoser.prepared)]
    if "image" in names and all(pictures[0]) and pictures[0] != pictures[1]:
        size, fit = pictures[1]
        print(f"{args.data}: its pictures were imported with --size {pictures[0][0]} --fit "
              f"{pictures[0][1]}; those of training with --size {size} --fit {fit}: use the latter")
    if study.labelled.any() and study.multilabel != manifest["multilabel"]:
        kinds = ("one class for each sample", "several findings")
        raise Refused(f"{args.data}: its labels {list(study.labels.shape)} are "
                      f"{kinds[study.multilabel]}; the model predicts {kinds[not study.multilabel]}")
    if not args.split:
        if manifest["data"] == {"name": args.data.name, "sha256": data.sha256(args.data)}:
            print(
                "the model was trained on part of this file; "
                "--split RUN/split-s0.npz predicts only its test part"
            )


def cases_of(study, names, rows, present, whose):
    """The n rows of a study as a `Diagnoser` takes them. present [n, modalities in names]; whose:
    the same of row numbers, whose content stands for what is absent, or None for none."""
    columns = {"image": study.images, "note": study.notes, **study.numeric}
    values = {}
    for j, name in enumerate(names):
        have = present[:, j]
        if whose is None:
            values[name] = [columns[name][row] if p else None for row, p in zip(rows, have)]
        else:
            values[name] = [columns[name][row] for row in np.where(have, rows, whose[:, j])]
    return Cases(values, [set(compress(names, ~row)) for row in present])


def donors(diagnoser, study, names, rows, present, gaps, split, args):
    """[n, modalities in names] of whose content stands for what the rows lack, or None without a
    split: then `Refused` if a row lacks anything but an image that is to be drawn."""
    for name in diagnoser.modalities:
        if name not in names:
            raise Refused(f"{args.data}: has no {name}, and {diagnoser.folder} was trained with "
                          f"absent inputs filled: it needs content for {name} in every row")
    lacks = ~present
    if split is None:
        if "image" in names:
            lacks[gaps, names.index("image")] = False
        if lacks.any():
            i, j = np.argwhere(lacks)[0]
            raise Refused(
                f"{args.data}: row {shown_row(study, rows[i])} has no {names[j]}, and "
                f"{diagnoser.folder} was trained with absent inputs filled: give --split "
                "RUN/split-sN.npz, which names donors, or for images --synthesizer FOLDER"
            )
        return None
    if "donors" not in split:
        raise Refused(f"{args.split}: names no donors; {diagnoser.folder} was trained with absent "
                      "inputs filled and needs them: give a split file of its own run")
    order = list(split["modalities"])
    whose = split["donors"]
    fits = whose.shape == (len(study), len(order)) and whose.dtype.kind in "iu"
    if not fits or not {*names} <= {*order} or not np.isin(whose, np.arange(len(study))).all():
        raise Refused(f"{args.split}: donors {data.form(whose)} of {', '.join(order)} are not rows "
                      f"of the {len(study)} samples of {args.data}")
    whose = whose[rows][:, [order.index(name) for name in names]]
    have = study.have()[:, [study.modalities.index(name) for name in names]]
    for j, name in enumerate(names):
        empty = lacks[:, j] & ~have[whose[:, j], j]
        if empty.any():
            row = shown_row(study, whose[empty, j][0])
            raise Refused(f"{args.split}: row {row} is a donor of its {name}, and has none")
    return whose


def shown_row(study, row):
    """The number of a study's row in its file."""
    return row if study.rows is None else study.rows[row]


def shared_modalities(study, diagnoser, path):
    """Names of the modalities that study and model have; `Refused` if there are none, or if the
    columns of one differ."""
    names = [name for name in study.modalities if name in diagnoser.modalities]
    for name, columns in study.columns.items():
        if name in diagnoser.numeric:
            wanted = diagnoser.numeric[name]["columns"]
            if columns != wanted:
                raise Refused(
                    f"{path}: columns of '{name}' are {', '.join(columns)}; "
                    f"the model has {', '.join(wanted)}"
                )
    if not names:
        raise Refused(
            f"{path}: has {', '.join(study.modalities)}; the model has "
            f"{', '.join(diagnoser.modalities)}: none in common"
        )
    return names


def read_split(study, args):
    """{name: array} of --split; `Refused` if it is not one of this study."""
    split = {"modalities": np.empty(0, str), "train": np.empty(0, int)} | data.read_npz(args.split)
    fits = "test" in split
    for part in {"train", "test"} & {*split}:
        whole = split[part].ndim == 1 and split[part].dtype.kind in "iu"
        fits &= bool(whole and np.isin(split[part], np.arange(len(study))).all())
    for key, table in split.items():
        if key.startswith("present "):
            fits &= table.shape == (len(study), split["modalities"].size)
    if not fits:
        raise Refused(f"{args.split}: not a split of the {len(study)} samples of {args.data}")
    return split


def chosen_rows(study, split, args):
    """(row indices [n], presence [n,M]) of a study file: all of it, or the test part of a run's
    split with its table."""
    have = study.have()  # [N,M]
    if split is None:
        if args.missing:
            raise Refused(
                f"--missing {args.missing} names a missing table of a split file; "
                "give --split RUN/split-s0.npz too"
            )
        return np.arange(len(study)), have
    rows = split["test"]
    if args.missing:
        key = f"present {args.missing}"
        if key not in split:
            tables = [k.removeprefix("present ") for k in split if k.startswith("present ")]
            raise Refused(
                f"{args.split}: has no missing table '{args.missing}'; "
                f"it has {', '.join(tables)}"
            )
        for j, name in enumerate(split["modalities"]):
            if name in study.modalities:
                have[:, study.modalities.index(name)] = split[key][:, j]
    return rows, have[rows]


def drawable(present, names, args):
    """[n] bool: rows that have words and lack their image, if there is a --synthesizer."""
    gaps = np.zeros(len(present), bool)
    if not args.synthesizer:
        return gaps
    if not {"image", "note"} <= {*names}:
        raise Refused("--synthesizer draws images from words, and needs image and note; "
                      f"{args.data} has {', '.join(names)}")
    gaps |= ~present[:, names.index("image")] & present[:, names.index("note")]
    if not gaps.any():
        print("no sample has words and lacks its image: no image is drawn")
    return gaps


@dataclass
class Drawing:
    """Images that are drawn where a study's are missing."""

    diagnoser: Diagnoser
    study: data.Study
    split: dict | None
    args: argparse.Namespace

    def fill(self, cases, rows, without):
        """(probabilities [n,C] with drawn images, what the comparison with other images gave or
        None) of n rows that have words and lack their image; without [n,C]: as they are, None
        without a split. Where the file has images that were withheld, the comparison is printed."""
        args = self.args
        synthesizer = Synthesizer(args.synthesizer, args.device)
        compare_origins(synthesizer.manifest, self.diagnoser.manifest)
        # These images are in the file: they were withheld, and are not missing.
        withheld = self.study.labelled[rows] & ~data.blank(self.study.images[rows])
        draws = args.draws
        if withheld.any():
            draws = max(MOST, draws)
        each = self.drawn(synthesizer, cases, draws, args.guidance)  # [draws,n,C]
        comparison = None
        if withheld.any():
            part = cases.take(withheld)
            wordless = self.drawn(synthesizer, part, MOST, 0.0)
            answers = (each[:, withheld], wordless, without[withheld])
            comparison = self.compare(part, rows[withheld], *answers)
        else:
            print("no labelled sample's image was withheld, so drawn images are compared with none; "
                  "--split RUN/split-sN.npz --missing TYPE:RATE withholds images")
        return each[: args.draws].mean(0), comparison

    def drawn(self, synthesizer, cases, draws, guidance):
        """Probabilities [draws,n,C] of n cases, with each image that is drawn for them."""
        args = self.args
        values = dict(cases.values)
        del values["image"]
        notes = values.pop("note")
        drawing = (draws, args.steps, guidance, args.grain, cases.told(self.diagnoser))
        return fill_in(self.diagnoser, synthesizer, notes, values, *drawing)

    def compare(self, cases, rows, each, wordless, without):
        """What is printed, and written with --scores, of n labelled samples whose image was
        withheld; each [draws,n,C]: with each drawn image; wordless: of those by guidance 0."""
        args = self.args
        study = self.study
        drawn = (each, wordless, without)
        answers, reasons = compare(self.diagnoser, cases, study, rows, self.split, *drawn)
        labels = study.labels[rows]
        scores = {name: metrics.scores(labels, p) for name, p in answers.items()}
        found = conclusions(study, rows, answers)
        print(
            f"{len(rows)} labelled samples whose image was withheld: without it, with random "
            "training images of other patients, with drawn ones "
            f"({args.steps} steps, guidance {args.guidance:g}"
            f"{'' if args.grain else ', no grain'}), and with the true image; probabilities are "
            "averaged:"
        )
        width = max(map(len, answers))
        for name, values in scores.items():
            print(f"  {name:{width}s}  " + "  ".join(in_words(values)))
        for line in (*reasons, *(result["sentence"] for result in found)):
            print(line)
        return {
            "samples": len(rows),
            "steps": args.steps,
            "guidance": args.guidance,
            "grain": args.grain,
            "rows": scores,
            "comparisons": found,
            "left_out": reasons,
        }


def compare_origins(synthesizer, diagnoser):
    """Say where the manifests of the two models name other data or another split."""
    if synthesizer["data"] != diagnoser["data"]:
        print(
            f"the synthesizer was trained on {synthesizer['data']}, "
            f"the diagnoser on {diagnoser['data']}: drawn images may be of another kind"
        )
    seed = synthesizer.get("seed")
    if seed != diagnoser["seed"]:
        print(
            f"the synthesizer has the split of seed {seed}, the diagnoser that of seed "
            f"{diagnoser['seed']}: the synthesizer may have been trained on some of these samples"
        )


def write_table(path, diagnoser, study, rows, patterns, probabilities):
    """A CSV file with a line per row: its number in the study file, and in the spreadsheet that this
    was made of; what was present, true and predicted classes, and the probability of each class."""
    classes = diagnoser.classes
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    origin = ["row"] if study.lines is None else ["row", "line"]
    table.writerow([*origin, "present", "label", "predicted", *[f"p({name})" for name in classes]])
    for row, pattern, label, p in zip(rows, patterns, study.labels[rows], probabilities):
        # An unlabelled row has no true class.
        true = label == 1 if study.multilabel else np.arange(len(classes)) == label
        predicted = p >= 0.5 if diagnoser.manifest["multilabel"] else p == p.max()
        table.writerow(
            [
                shown_row(study, row),
                *([] if study.lines is None else [study.lines[row]]),
                pattern,
                "|".join(compress(classes, true)),
                "|".join(compress(classes, predicted)),
                *[f"{value:.6f}" for value in p],
            ]
        )
    data.write_atomic(path, text.getvalue())


# ----------------------------------------------------------------------------------- drawn images


def sample_sheet(args):
    """Draw --n images of each note into a .png sheet, one row per note, or an .npy array
    [notes,n,S,S]."""
    if args.n < 1:
        raise Refused(f"--n is {args.n}; must be at least 1")
    if args.out.suffix not in (".png", ".npy"):
        raise Refused(f"--out {args.out}: must end in .png or .npy")
    synthesizer = Synthesizer(args.folder, args.device)
    m = synthesizer.manifest
    total = len(args.note) * args.n
    # Ten bytes a value: pixels as float32 and as bytes, before and after they are put together.
    # The rest is a batch of 64: the noise, the feature maps, and twice the attention scores of 8
    # heads between the pixels of the UNet, of which there are a quarter of the latent's.
    area = m["image_size"] ** 2
    tokens = (m["latent_size"] // 2) ** 2
    needed = total * m["channels"] * area * 10 + 64 * (512 * area + 128 * tokens**2)
    free = free_memory()
    if needed > free:
        raise Refused(
            f"--n {args.n}: {total} images need about {needed / 2**30:.1f} GiB; "
            f"{free / 2**30:.1f} GiB are free"
        )
    print(f"provider {synthesizer.provider}")
    for note in args.note:
        count = len(words.words_of(note))
        if count >= m["positions"]:
            print(f"a note is cut to its first {m['positions'] - 1} of {count} words: "
                  f"{note[:60]}...")
    notes = [note for note in args.note for _ in range(args.n)]
    images = synthesizer.sample(
        notes, args.steps, args.guidance, args.seed, args.adapter, args.grain
    )
    images = images.reshape(-1, args.n, *images.shape[1:])  # [notes,n,S,S]
    content = io.BytesIO()
    if args.out.suffix == ".npy":
        np.save(content, images)
    else:
        write_png(content, images, args.out)
    data.write_atomic(args.out, content.getvalue())
    origin = data.origin(m)
    about = "" if origin == "real data" else f"; the model was trained on {origin}"
    print(f"{args.out}: {total} images drawn, of no patient{about}")


def write_png(file, images, name):
    """Write images [notes,n,S,S] as one sheet, small ones enlarged to 128 pixels."""
    try:
        from PIL import Image
    except ImportError:
        raise Refused(
            f"{name}: writing pictures needs Pillow: pip install 'minilora[pictures]' "
            "(or give an .npy name)"
        ) from None
    sheet = np.vstack([np.hstack(row) for row in images])  # [notes S, n S]
    zoom = max(1, 128 // images.shape[2])
    Image.fromarray(sheet.repeat(zoom, 0).repeat(zoom, 1)).save(file, "PNG")


def free_memory():
    """Bytes of memory that are free, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")


def main(argv=None):
    with data.one_line_errors():
        args, columns = command_line(sys.argv[1:] if argv is None else argv)
        if args.command == "check":
            worst = check(args.folder, args.device)
            raise SystemExit(0 if worst <= tolerance(own_manifest(args.folder)) else 1)
        if args.command == "sample":
            return sample_sheet(args)
        if args.draws < 1:
            raise Refused(f"--draws is {args.draws}; must be at least 1")
        if not 1 <= args.batch <= 4096:
            raise Refused(f"--batch is {args.batch}; must be from 1 to 4096")
        diagnoser = Diagnoser(args.folder, args.device, args.batch)
        print(f"provider {diagnoser.provider}")
        if args.data:
            predict_file(diagnoser, args)
        else:
            predict_one(diagnoser, args, columns)


if __name__ == "__main__":
    main()
