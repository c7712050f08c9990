"""What filling in a missing image gains, beside the controls that a claim about it has to beat: images
of other patients, images of one class, and the true image.

`serve_cli.py` prints it. Skip this file when you read for a method.

Letters: N samples of a study file, n those that are compared, M modalities, C classes, P training
images.
"""

from dataclasses import dataclass
from itertools import compress

import numpy as np

from minilora import data, metrics

SHOWN = (1, 4, 16)  # images that probabilities are averaged over, a row each
MOST = max(SHOWN)
WORDLESS = f"{MOST} images drawn without words"
# The row before anything is drawn, of models that were trained with absent inputs filled and others.
BEFORE = {True: "donor's image", False: "words only"}


@dataclass
class Cases:
    """n samples as a `Diagnoser` takes them. values {modality: n values, None for none}; filled: n
    sets of the modalities whose content is not the sample's own."""

    values: dict
    filled: list

    def take(self, which):
        """Those of a mask [n] bool."""
        values = {name: list(compress(column, which)) for name, column in self.values.items()}
        return Cases(values, list(compress(self.filled, which)))

    def with_images(self, images, own=False):
        """The same samples with other images [n]; own: the samples' own ones."""
        if own:
            filled = [names - {"image"} for names in self.filled]
        else:
            filled = [names | {"image"} for names in self.filled]
        return Cases(self.values | {"image": list(images)}, filled)

    def told(self, diagnoser):
        """What a `Diagnoser` is told of whose content it is: nothing, unless it was trained with
        absent inputs filled. The others take all content for the sample's own."""
        return self.filled if diagnoser.fills else None

    def predict(self, diagnoser):
        """Probabilities [n,C]."""
        values = dict(self.values)
        images = values.pop("image", None)
        notes = values.pop("note", None)
        return diagnoser.predict(images, notes, self.told(diagnoser), **values)


def compare(diagnoser, cases, study, rows, split, drawn, wordless, without):
    """({row of the table: probabilities [n,C]}, [why a row is missing, ...]) for n samples whose
    images were withheld.

    rows [n]: which they are of the study; split: what a run's split-sN.npz holds; drawn [16 or
    more,n,C]: with each drawn image; wordless [16,n,C]: with each that was drawn by guidance 0, so
    that what the words add is told from averaging over drawn images; without [n,C]: before anything
    is drawn."""
    answers = {BEFORE[diagnoser.fills]: without}
    reasons = []
    pool = training_images(study, split)  # [P]
    first = study.labels[pool, 0] == 1 if study.multilabel else study.labels[pool] == 0
    groups = data.groups(study)
    one_class = class_row(study)
    for kind, members, counts in (("random", pool, SHOWN), (one_class, pool[first], (MOST,))):
        try:
            chosen = data.others(groups, members, rows, 0, MOST)  # [n,16]
        except data.Refused:
            what = "image" if kind == "random" else f"image of {one_class}"
            reasons.append(f"no training {what} of another patient is left by the missing table")
            continue
        each = []
        for column in chosen.T:
            each.append(cases.with_images(study.images[column]).predict(diagnoser))
        answers |= averaged(kind, each, counts)
    answers |= averaged("drawn", drawn, SHOWN)
    answers[WORDLESS] = np.mean(wordless, 0)
    answers["true image"] = cases.with_images(study.images[rows], own=True).predict(diagnoser)
    return answers, reasons


def class_row(study):
    """The kind of images of the study's first class; of phantoms, clear lungs."""
    return f"'{study.class_names[0]}'"


def averaged(kind, each, counts):
    """{row: probabilities [n,C]} of the first `counts` of `each` [k,n,C], averaged."""
    rows = {}
    for count in counts:
        name = f"{count} {kind} image" + "s" * (count > 1)
        rows[name] = np.mean(each[:count], 0)
    return rows


def training_images(study, split):
    """[P] rows of a split's training part whose image its first table, that of training, left."""
    left = ~data.blank(study.images)
    tables = [key for key in split if key.startswith("present ")]
    names = list(split["modalities"])
    if tables and "image" in names:
        left &= split[tables[0]][:, names.index("image")].astype(bool)
    train = split["train"]
    return train[left[train]]


def conclusions(study, rows, answers):
    """What the n samples can show, {'ours', 'theirs', 'sentence', and what `metrics.paired_samples`
    gives} for each comparison: drawn images against what they have to beat."""
    labels = study.labels[rows]
    groups = data.groups(study)[rows]
    drawn = f"{MOST} drawn images"
    others = [*BEFORE.values(), WORDLESS, f"{MOST} random images", f"{MOST} {class_row(study)} images"]
    pairs = [(drawn, other) for other in others]
    pairs += [("true image", other) for other in BEFORE.values()]
    results = []
    for names in pairs:
        if {*names} <= {*answers}:
            both = [answers[name] for name in names]
            result = metrics.paired_samples(labels, *both, groups=groups)
            sentence = metrics.verdict_samples(result, names)
            results.append({"ours": names[0], "theirs": names[1], **result, "sentence": sentence})
    return results


def in_words(scores):
    """Each score of `metrics.scores`, in words."""
    scores = dict(scores)
    without = scores.pop("without_positive", 0)
    words = [f"{name.replace('_', '-')} {value:.3f}" for name, value in scores.items()]
    if without:
        words.append(f"{without} findings without a positive, left out of macro-F1")
    return words
