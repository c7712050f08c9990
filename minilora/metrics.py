"""Scores, in numpy: macro-F1, AUROC, accuracy, Frechet distance.

Letters: N samples, C classes or findings.
"""

import numpy as np


def f1(truth, predicted):
    """F1 of one class, from two [N] bool arrays: 2 TP / (2 TP + FP + FN); 0 where the class is neither there nor
    predicted.
    """
    both = (truth & predicted).sum()
    total = truth.sum() + predicted.sum()
    return float(2 * both / total) if total else 0.0


def auroc(truth, score):
    """Area under the ROC curve of [N] bool and [N] scores, by ranks, ties shared; NaN if only one class is there."""
    positive = int(truth.sum())
    if positive in (0, len(truth)):
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[place]  # mean rank of each tie, from 1
    return float((rank[truth].sum() - positive * (positive + 1) / 2) / (positive * (len(truth) - positive)))


def scores(labels, probabilities):
    """{'macro_f1', 'auroc', 'accuracy'} of probabilities [N,C] against labels [N] or several findings [N,C] (-1 =
    unlabelled).

    One label: the predicted class is the most probable; macro-F1 is the mean over the classes that occur in labels or
    predictions, AUROC one against the rest, averaged over the classes that occur (for two classes: of class 1).
    Several findings: each at 0.5, over its labelled samples, then the mean over findings."""
    probabilities = np.asarray(probabilities)
    if labels.ndim == 2:
        known = [labels[:, c] >= 0 for c in range(labels.shape[1])]
        pairs = [(labels[k, c] == 1, probabilities[k, c]) for c, k in enumerate(known) if k.any()]
        f1s = [f1(t, p >= 0.5) for t, p in pairs]
        aucs, hits = [auroc(t, p) for t, p in pairs], [((p >= 0.5) == t).mean() for t, p in pairs]
    else:
        predicted = probabilities.argmax(1)
        classes = [1] if probabilities.shape[1] == 2 else np.unique(labels)
        f1s = [f1(labels == c, predicted == c) for c in np.union1d(labels, predicted)]
        aucs, hits = [auroc(labels == c, probabilities[:, c]) for c in classes], [predicted == labels]
    aucs = [a for a in aucs if not np.isnan(a)]
    mean = lambda x: float(np.mean(x)) if len(x) else float("nan")
    return {"macro_f1": mean(f1s), "auroc": mean(aucs), "accuracy": mean(hits)}


def frechet(a, b):
    """Frechet distance of two sets of features [N,D] and [M,D], each taken for a normal distribution:
    |mean_a - mean_b|^2 + trace(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al., arXiv 1706.08500, eq. 6). Features of
    an Inception network make it the FID; others do not. It shrinks as N grows: compare equal N, with a floor.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features {list(a.shape)} and {list(b.shape)}: need [N,D] and [M,D], at least 2 each")
    cov_a, cov_b = np.atleast_2d(np.cov(a.T)), np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    # trace of (S_a S_b)^(1/2) from the symmetric S_a^(1/2) S_b S_a^(1/2), which has the same eigenvalues
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    return float(max(0.0, ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))
