"""Scores, in numpy: macro-F1, AUROC, accuracy, Frechet distance; and what paired scores of several
seeds can show.

Skip it when you read for a method. Letters: N samples, C classes or findings, D features.
"""

import math

import numpy as np


def f1(truth, predicted):
    """F1 of one class, from two [N] bool arrays: 2 TP / (2 TP + FP + FN); 0 where the class neither
    occurs nor is predicted."""
    both = (truth & predicted).sum()
    total = truth.sum() + predicted.sum()
    return float(2 * both / total) if total else 0.0


def auroc(truth, score):
    """Area under the ROC curve of [N] bool and [N] scores, by ranks, ties shared; NaN if only one
    class occurs."""
    positive = int(truth.sum())
    negative = len(truth) - positive
    if positive == 0 or negative == 0:
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    rank = np.cumsum(count) - (count - 1) / 2  # mean rank of each tie, from 1
    rank_sum = rank[place][truth].sum()
    lowest = positive * (positive + 1) / 2  # the rank sum where every positive is below the rest
    return float((rank_sum - lowest) / (positive * negative))


def scores(labels, probabilities):
    """{'macro_f1', 'auroc', 'accuracy'} of probabilities [N,C] against labels [N] or several
    findings [N,C] (-1 = unlabelled); where there are any, 'without_positive': how many findings no
    labelled sample has.

    One label: the predicted class is the most probable; macro-F1 is the mean over the classes that
    occur in labels or predictions, AUROC one against the rest, averaged over the classes that occur
    (for two classes: of class 1). Several findings: each at 0.5, over its labelled samples, then
    the mean over findings; macro-F1 over those that have a positive, since F1 says nothing of the
    others: it is 0 even of perfect predictions."""
    probabilities = np.asarray(probabilities)
    f1s = []
    aurocs = []
    accuracies = []
    if labels.ndim == 2:
        for c in range(labels.shape[1]):
            labelled = labels[:, c] >= 0
            if labelled.any():
                truth = labels[labelled, c] == 1
                score = probabilities[labelled, c]
                if truth.any():
                    f1s.append(f1(truth, score >= 0.5))
                aurocs.append(auroc(truth, score))
                accuracies.append(((score >= 0.5) == truth).mean())
    else:
        predicted = probabilities.argmax(1)
        for c in np.union1d(labels, predicted):
            f1s.append(f1(labels == c, predicted == c))
        for c in [1] if probabilities.shape[1] == 2 else np.unique(labels):
            aurocs.append(auroc(labels == c, probabilities[:, c]))
        accuracies.append(np.mean(predicted == labels))
    result = {"macro_f1": _mean(f1s), "auroc": _mean(aurocs), "accuracy": _mean(accuracies)}
    if labels.ndim == 2 and len(f1s) < labels.shape[1]:
        result["without_positive"] = labels.shape[1] - len(f1s)
    return result


def _mean(values):
    """Mean of those values that are not NaN; NaN if there are none."""
    values = [value for value in values if not np.isnan(value)]
    return float(np.mean(values)) if values else float("nan")


def frechet(a, b):
    """Frechet distance of two sets of features [N,D] and [M,D], each taken for a normal
    distribution: |mean_a - mean_b|^2 + trace(S_a + S_b - 2 (S_a S_b)^(1/2)) (Heusel et al.,
    arXiv 1706.08500, eq. 6). Features of an Inception network make it the FID; others do not. It
    shrinks as N grows: compare equal N, with a floor.
    """
    a = np.asarray(a, np.float64)
    b = np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(
            f"features {list(a.shape)} and {list(b.shape)}: need [N,D] and [M,D], at least 2 each"
        )
    cov_a = np.atleast_2d(np.cov(a.T))
    cov_b = np.atleast_2d(np.cov(b.T))
    values, vectors = np.linalg.eigh(cov_a)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T  # S_a^(1/2)
    # The trace of (S_a S_b)^(1/2), from a symmetric matrix that has the same eigenvalues.
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_b @ root).clip(0)).sum()
    apart = ((a.mean(0) - b.mean(0)) ** 2).sum()
    return float(max(0.0, apart + np.trace(cov_a) + np.trace(cov_b) - 2 * cross))


# ---- comparisons


# Test rows over training rows of a split, 10% to 80%.
OVERLAP = 1 / 8


def paired(ours, theirs):
    """What paired scores [n] of n seeds can show of their differences, ours minus theirs.

    {'n', 'mean', 'low', 'high': 95% interval of the mean by Student's t, 'wins', 'losses': how many
    are above and below 0, 'p': of the exact two-sided sign test, which leaves ties out}. The
    interval is NaN for one seed. Splits of several seeds share samples, so the variance of the mean
    is that of independent ones, s^2 / n, plus s^2 times `OVERLAP` (Nadeau and Bengio, Machine
    Learning 52, 2003); the sign test has no such correction, and speaks of these data.
    """
    difference = np.asarray(ours, float) - np.asarray(theirs, float)
    n = len(difference)
    mean = difference.mean()
    half = math.nan
    if n > 1:
        half = student(n - 1) * difference.std(ddof=1) * math.sqrt(1 / n + OVERLAP)
    wins = int((difference > 0).sum())
    losses = int((difference < 0).sum())
    return {
        "n": n,
        "mean": float(mean),
        "low": float(mean - half),
        "high": float(mean + half),
        "wins": wins,
        "losses": losses,
        "p": sign_test(wins, losses),
    }


def sign_test(wins, losses):
    """Two-sided p of so many wins and losses, if either were as likely."""
    n = wins + losses
    tail = sum(math.comb(n, k) for k in range(min(wins, losses) + 1)) / 2**n
    return min(1.0, 2 * tail)


def student(df):
    """The 97.5% quantile of Student's t with df degrees of freedom, from its density's integral."""
    x = np.linspace(0, 13, 130_001)  # the largest, of df 1, is 12.7
    density = (1 + x**2 / df) ** (-(df + 1) / 2)
    factor = math.lgamma((df + 1) / 2) - math.lgamma(df / 2) - math.log(df * math.pi) / 2
    density *= math.exp(factor)
    area = np.cumsum(density[1:] + density[:-1]) / 2 * 1e-4
    return float(x[1:][np.searchsorted(area, 0.475)])


def paired_samples(labels, ours, theirs, seed=0, resamples=1000, groups=None):
    """What the n test samples of one split can show of two methods, from their probabilities [n,C],
    or [S,n,C] of S seeds: of the macro-F1 of ours minus theirs, averaged over the seeds.

    The same keys as `paired` gives: 'low' and 'high' are a 95% interval by bootstrap over the
    samples; 'wins' and 'losses' count samples on which one is right and the other wrong (over seeds
    and findings: right more often), and 'p' is of their sign test. labels: as in `scores`.

    groups [n], such as patients, whose samples say the same more than once: then whole groups are
    resampled, each has one vote, by its right answers in all, and 'groups' says how many there are."""
    methods = [_each_seed(probabilities) for probabilities in (ours, theirs)]
    n = len(labels)
    _, group = np.unique(np.arange(n) if groups is None else groups, return_inverse=True)  # [n]
    G = group.max() + 1
    rng = np.random.default_rng(seed)
    # How often each sample is in a resample; the first row is the test samples as they are.
    times = np.ones((resamples + 1, n), np.float32)
    for row in times[1:]:
        row[:] = np.bincount(rng.integers(0, G, G), minlength=G)[group]
    f1s = []  # of each method, [resamples + 1]
    right = []  # of each method, [n]
    for seeds in methods:
        counted = [_counted(labels, probabilities) for probabilities in seeds]
        f1s.append(np.mean([_macro_f1(times, *counts) for *counts, _ in counted], 0))
        right.append(np.sum([answers for *_, answers in counted], 0))
    difference = f1s[0] - f1s[1]
    known = difference[1:][~np.isnan(difference[1:])]
    low, high = np.percentile(known, (2.5, 97.5)) if len(known) else (math.nan, math.nan)
    votes = np.bincount(group, right[0] - right[1])  # [G]
    wins = int((votes > 0).sum())
    losses = int((votes < 0).sum())
    result = {
        "n": n,
        "mean": float(difference[0]),
        "low": float(low),
        "high": float(high),
        "wins": wins,
        "losses": losses,
        "p": sign_test(wins, losses),
    }
    return result if groups is None else result | {"groups": int(G)}


def _each_seed(probabilities):
    """Probabilities [S,n,C] of [n,C] or [S,n,C]."""
    probabilities = np.asarray(probabilities)
    return probabilities if probabilities.ndim == 3 else probabilities[None]


def _counted(labels, probabilities):
    """What F1 is counted from, each [n,C] bool: true, predicted, and which classes it is the mean
    of, those that occur; and how many answers of each sample are right, [n]."""
    if labels.ndim == 2:
        known = labels >= 0
        truth = labels == 1
        predicted = (probabilities >= 0.5) & known
        return truth, predicted, truth, ((truth == predicted) & known).sum(1)
    classes = np.arange(probabilities.shape[1])
    truth = labels[:, None] == classes
    chosen = probabilities.argmax(1)
    predicted = chosen[:, None] == classes
    return truth, predicted, truth | predicted, (chosen == labels).astype(int)


def _macro_f1(times, truth, predicted, occurs):
    """Macro-F1 [R], as in `scores`, of R resamples: `times` [R,n], how often each has a sample."""
    both = times @ (truth & predicted)  # [R,C]
    total = times @ (truth.astype(np.float32) + predicted)
    counts = times @ occurs > 0
    f1s = 2 * both.astype(float) / np.maximum(total, 1)
    number = counts.sum(1)
    return np.where(number > 0, (f1s * counts).sum(1) / np.maximum(number, 1), np.nan)


def verdict(ours, theirs, names, unit="", less=False, digits=3):
    """A sentence on paired scores [n] of two methods, `names`: "beats" needs a sign test below .05
    and an interval on the same side of 0, else it is no difference that so many seeds can show.
    less: lower scores are better."""
    result = paired(ours, theirs)
    n = result["n"]
    if math.isnan(result["mean"]):
        return f"{names[0]} against {names[1]}: a seed has no score, so there is no comparison."
    if n == 1:
        mean = f"{result['mean']:+.{digits}f}{unit}"
        return f"One seed, an illustration and no evidence: {names[0]} minus {names[1]} is {mean}."
    above = shown(result)
    better = above if above is None else above != less
    wins = f"above on {result['wins']} of {n} seeds"
    return _sentence(result, names, better, f"{n} seeds", wins, unit, digits)


def verdict_samples(result, names, digits=3):
    """The same of what `paired_samples` gives."""
    if math.isnan(result["mean"]):
        return f"{names[0]} against {names[1]}: one has no score, so there is no comparison."
    number = f"{result['n']} samples"
    voters = "samples"
    if result.get("groups", result["n"]) < result["n"]:
        number += f" of {result['groups']} patients"
        voters = "patients"
    wins = f"better on {result['wins']} {voters}, worse on {result['losses']}"
    return _sentence(result, names, shown(result), number, wins, " macro-F1", digits)


def shown(result):
    """Whether a paired result shows that ours is above (True) or below (False), or neither (None):
    its sign test is below .05, and its interval is on the same side of 0."""
    if result["p"] < 0.05 and result["low"] > 0 and result["wins"] > result["losses"]:
        return True
    if result["p"] < 0.05 and result["high"] < 0 and result["wins"] < result["losses"]:
        return False
    return None


def by_chance(n):
    """The share of comparisons over n seeds whose sign test is below .05 where nothing differs."""
    return sum(math.comb(n, k) for k in range(n + 1) if sign_test(k, n - k) < 0.05) / 2**n


def _sentence(result, names, better, number, wins, unit, digits):
    """The sentence on a paired result; better: None where nothing is shown."""
    one, other = names
    interval = f"95% interval {result['low']:+.{digits}f} to {result['high']:+.{digits}f}"
    p = f"p = {result['p']:.2g}"
    numbers = f"mean {result['mean']:+.{digits}f}{unit}, {interval}, {wins}, {p}"
    if better is None:
        return f"No difference that {number} can show between {one} and {other}: {numbers}."
    return f"{one} {'beats' if better else 'is beaten by'} {other}: {numbers}."


def spread(values, digits=3):
    """'mean ± sample standard deviation' of scores over seeds, without the latter for one seed; '-'
    where a score is NaN."""
    if np.isnan(values).any():
        return "-"
    text = f"{np.mean(values):.{digits}f}"
    return f"{text} ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else text
