"""Rows that stand below every comparison of train_mora.py: what needs no transformer.

The larger class, and linear models on words, numbers and small pictures. Skip this file when you
read for a method.

Letters: N samples, M modalities, C classes or findings, V inputs of a linear model.
"""

import numpy as np
import torch
import torch.nn.functional as F

from minilora import data, metrics
from minilora.words import words_of

DECAYS = (1e-1, 1e-2, 1e-3, 1e-4)  # the best on seed 0's validation rows is taken for every seed
WORDS = 5000  # the most frequent ones of the training notes
PIXELS = 16  # side of the pictures


def rows(study, draws, missing, tests):
    """{name: [result per seed]}, each result as `task.evaluate` gives it; draws {seed: what
    `task.draw_task` gives}, missing: the training table, tests: those of the test rows."""
    shares = [class_shares(study, draw["parts"]["train"]) for draw in draws.values()]
    results = {"larger class": []}
    for share, draw in zip(shares, draws.values()):
        constant = dict.fromkeys({missing, *tests}, np.tile(share, (len(study), 1)))
        results["larger class"].append(scored(study, draw, missing, tests, constant))
    filled = any("donors" in draw for draw in draws.values())
    linear = {}  # {name: (with pictures, with what is absent filled as for the transformer)}
    if study.notes is not None or study.numeric:
        linear["linear: words, numbers"] = (False, filled)
    if study.images is not None:
        linear["linear: and pixels"] = (True, filled)
        if filled:
            linear["linear: absent left out"] = (True, False)
    for name, kind in linear.items():
        results[name] = linear_row(study, draws, missing, tests, *kind)
    return results


def class_shares(study, train):
    """[C] share of the training samples that have each class or finding."""
    labels = study.labels[train]
    if study.multilabel:
        known = labels >= 0
        return (labels * known).sum(0) / np.maximum(known.sum(0), 1)
    return np.bincount(labels, minlength=len(study.class_names)) / len(labels)


def linear_row(study, draws, missing, tests, pictures, filled):
    """[result per seed] of logistic regressions, all with the decay that is best at seed 0."""
    picked = None
    results = []
    for draw in draws.values():
        x = {text: inputs(study, draw, missing, text, pictures, filled) for text in {missing, *tests}}
        train = draw["parts"]["train"]
        best = None
        for decay in DECAYS if picked is None else [picked]:
            model = logistic(x[missing][train], study.labels[train], len(study.class_names), decay)
            probabilities = {text: model(values) for text, values in x.items()}
            result = scored(study, draw, missing, tests, probabilities)
            if best is None or result["val"]["macro_f1"] > best["val"]["macro_f1"]:
                best = result
                chosen = decay
        picked = chosen
        results.append(best)
    return results


def inputs(study, draw, missing, text, pictures, filled):
    """[N,V] float32 under the missing table `text`; words are those of the training notes under
    `missing`. filled: what is absent is another sample's, as the transformer sees it; else it is 0,
    and a bit for each note, number and picture says that it is there."""
    present = draw["tables"][text]  # [N,M]
    train = draw["parts"]["train"]
    columns = []

    def add(name, values):
        """Columns [N,F] of a modality; NaN becomes 0."""
        m = study.modalities.index(name)
        have = present[:, [m]]
        known = ~np.isnan(values)
        if filled:
            source = np.where(present[:, m], np.arange(len(study)), draw["donors"][:, m])
            values = values[source]
            known = known[source]
            have = np.ones_like(have)
        bits = known & have if name not in ("image", "note") else have
        columns.extend([np.where(known & have, values, 0), bits])

    if study.notes is not None:
        seen = train[draw["tables"][missing][train, study.modalities.index("note")]]
        add("note", bag_of_words(study.notes, seen))
    for name, (mean, scale) in draw["scales"].items():
        add(name, (study.numeric[name] - mean) / scale)
    if pictures:
        small = data.resize(study.images, PIXELS).reshape(len(study), -1)  # [N,pixels]
        add("image", small / 127.5 - 1)
    return torch.from_numpy(np.concatenate(columns, 1).astype(np.float32))


def bag_of_words(notes, train):
    """[N,V] of 0 and 1: which of the most frequent words of the training notes a note has."""
    sets = [{*words_of(note)} for note in notes]
    counts = {}
    for row in train:
        for word in sets[row]:
            counts[word] = counts.get(word, 0) + 1
    vocabulary = sorted(counts, key=lambda word: (-counts[word], word))[:WORDS]
    place = {word: i for i, word in enumerate(vocabulary)}
    bag = np.zeros((len(notes), len(vocabulary)), np.float32)
    for row, words in zip(bag, sets):
        row[[place[word] for word in words if word in place]] = 1
    return bag


def logistic(x, labels, classes, decay):
    """The function inputs [n,V] -> probabilities [n,C] of least cross-entropy plus decay times the
    sum of squared weights, on x [N,V] and labels [N] or [N,C]."""
    w = torch.zeros(x.shape[1], classes, requires_grad=True)
    b = torch.zeros(classes, requires_grad=True)
    labels = torch.from_numpy(labels)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        logits = x @ w + b
        if labels.ndim == 1:
            loss = F.cross_entropy(logits, labels)
        else:
            known = (labels >= 0).float()
            targets = labels.clamp(min=0).float()
            each = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
            loss = (each * known).sum() / known.sum()
        loss = loss + decay * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)

    @torch.no_grad()
    def probabilities(x):
        logits = (x @ w + b).double()
        return (logits.softmax(1) if labels.ndim == 1 else logits.sigmoid()).numpy()

    return probabilities


def scored(study, draw, missing, tests, probabilities):
    """{'val': scores, 'by_test': {TYPE:RATE: scores, with accuracy by pattern}} of probabilities
    {TYPE:RATE: [N,C]}."""
    val = draw["parts"]["val"]
    test = draw["parts"]["test"]
    by_test = {}
    for text in tests:
        p = probabilities[text][test]
        by_test[text] = scores_of(study, draw, text, p)
    return {
        "val": metrics.scores(study.labels[val], probabilities[missing][val]),
        "by_test": by_test,
    }


def scores_of(study, draw, text, p):
    """Scores of the test rows' probabilities [n,C] under a missing table, accuracy by pattern, and
    the probabilities themselves, as a list."""
    test = draw["parts"]["test"]
    labels = study.labels[test]
    table = draw["tables"][text][test]
    names = np.array([data.pattern_name(row, study.modalities) for row in table])
    by_pattern = {}
    for name in np.unique(names).tolist():
        here = names == name
        accuracy = metrics.scores(labels[here], p[here])["accuracy"]
        by_pattern[name] = {"n": int(here.sum()), "accuracy": accuracy}
    return metrics.scores(labels, p) | {"by_pattern": by_pattern, "probabilities": p.tolist()}
