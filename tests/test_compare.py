"""What paired differences over the test samples can show, and the images that filling in is compared with."""

import math

import numpy as np
import pytest

from minilora import compare, data, metrics
from minilora.phantoms import phantoms


def draws(shape, rng):
    """Probabilities [S,n,C] of a method."""
    p = rng.random(shape)
    return p / p.sum(-1, keepdims=True)


@pytest.mark.parametrize("several", [False, True], ids=["one label", "findings"])
def test_paired_samples_is_a_bootstrap_over_the_samples(several):
    """Against the same resamples, each scored by `metrics.scores`; over seeds the mean."""
    rng, n, C = np.random.default_rng(5), 60, 4
    labels = rng.integers(-1, 2, (n, C)) if several else rng.integers(0, C, n)
    ours, theirs = draws((2, n, C), rng), draws((2, n, C), rng)
    score = lambda p, rows: metrics.scores(labels[rows], p[rows])["macro_f1"]
    gap = lambda rows: np.mean([score(a, rows) - score(b, rows) for a, b in zip(ours, theirs)])
    generator = np.random.default_rng(3)
    resampled = [gap(generator.integers(0, n, n)) for _ in range(200)]
    result = metrics.paired_samples(labels, ours, theirs, 3, 200)
    assert result["n"] == n and abs(result["mean"] - gap(np.arange(n))) < 1e-9
    np.testing.assert_allclose((result["low"], result["high"]), np.percentile(resampled, (2.5, 97.5)), atol=1e-9)
    if several:
        answers = lambda p: (((p >= 0.5) == (labels == 1)) & (labels >= 0)).sum((0, 2))
    else:
        answers = lambda p: (p.argmax(2) == labels).sum(0)
    more, fewer = (answers(ours) > answers(theirs)).sum(), (answers(ours) < answers(theirs)).sum()
    assert (result["wins"], result["losses"], result["p"]) == (more, fewer, metrics.sign_test(more, fewer))
    one = metrics.paired_samples(labels, ours[0], theirs[0])
    assert one == metrics.paired_samples(labels, ours[:1], theirs[:1]) and one["mean"] != result["mean"]


def test_samples_of_one_group_are_resampled_and_vote_together():
    rng, n, C = np.random.default_rng(6), 60, 4
    labels, groups = rng.integers(0, C, n), rng.integers(0, 20, n) * 7
    ours, theirs = draws((2, n, C), rng), draws((2, n, C), rng)
    score = lambda p, rows: metrics.scores(labels[rows], p[rows])["macro_f1"]
    gap = lambda rows: np.mean([score(a, rows) - score(b, rows) for a, b in zip(ours, theirs)])
    names, generator = np.unique(groups), np.random.default_rng(3)
    members = [np.flatnonzero(groups == name) for name in names]
    resampled = [gap(np.concatenate([members[g] for g in generator.integers(0, len(names), len(names))])) for _ in range(200)]
    result = metrics.paired_samples(labels, ours, theirs, 3, 200, groups)
    assert result["n"] == n and result["groups"] == len(names) == 19 and abs(result["mean"] - gap(np.arange(n))) < 1e-9
    np.testing.assert_allclose((result["low"], result["high"]), np.percentile(resampled, (2.5, 97.5)), atol=1e-9)
    more = (ours.argmax(2) == labels).sum(0) - (theirs.argmax(2) == labels).sum(0)
    votes = [more[rows].sum() for rows in members]
    wins, losses = sum(vote > 0 for vote in votes), sum(vote < 0 for vote in votes)
    assert (result["wins"], result["losses"], result["p"]) == (wins, losses, metrics.sign_test(wins, losses)) and wins + losses < 19
    single = metrics.paired_samples(labels, ours, theirs, 3, 200, np.arange(n)[::-1] * 3)
    plain = metrics.paired_samples(labels, ours, theirs, 3, 200)
    assert single["groups"] == n and all(single[key] == plain[key] for key in ("mean", "wins", "losses", "p"))


def test_copies_of_samples_show_no_more_than_the_samples():
    """Ten patients of whom each is ten samples: as independent samples they would show a difference."""
    labels, patients = np.repeat(np.arange(10) % 2, 10), np.repeat(np.arange(10), 10)
    right = np.eye(2)[labels]
    mixed = np.where((patients < 4)[:, None], 1 - right, right)
    assert metrics.verdict_samples(metrics.paired_samples(labels, right, mixed), ("a", "b")).startswith("a beats b")
    result = metrics.paired_samples(labels, right, mixed, groups=patients)
    assert (result["wins"], result["losses"], result["p"]) == (4, 0, 0.125)
    said = metrics.verdict_samples(result, ("a", "b"))
    assert said.startswith("No difference that 100 samples of 10 patients can show between a and b: ") and "better on 4 patients, worse on 0" in said
    study = phantoms(100, 3)
    study.patients = np.array([f"p{i // 10}" for i in range(100)])
    study.labels[:] = labels
    p, q = (np.pad(each, ((0, 0), (0, 2))) for each in (right, mixed))
    rows = np.arange(20, 60)
    found = compare.conclusions(study, rows, {"16 drawn images": p[rows], compare.WORDLESS: q[rows], "words only": q[rows]})
    assert [each["theirs"] for each in found] == ["words only", "16 images drawn without words"] and all(each["groups"] == 4 for each in found)


def test_the_interval_covers_no_difference_as_often_as_it_says():
    rng, covered = np.random.default_rng(1), 0
    for k in range(100):
        labels = rng.integers(0, 3, 150)
        right = [np.where(rng.random(150) < 0.7, labels, rng.integers(0, 3, 150)) for _ in range(2)]
        result = metrics.paired_samples(labels, *(np.eye(3)[answers] for answers in right), seed=k)
        covered += result["low"] <= 0 <= result["high"]
    assert 88 <= covered <= 100  # of 95 a binomial count leaves this once in a thousand times


def test_a_sentence_claims_what_both_the_interval_and_the_sign_test_show():
    labels = np.arange(60) % 3
    right, wrong = np.eye(3)[labels], np.eye(3)[(labels + 1) % 3]
    mixed = np.where((np.arange(60) < 20)[:, None], wrong, right)
    better = metrics.paired_samples(labels, right, mixed)
    assert (better["wins"], better["losses"]) == (20, 0) and better["low"] > 0.2
    sentence = metrics.verdict_samples(better, ("a", "b"))
    assert sentence.startswith("a beats b: mean +0.333 macro-F1, 95% interval +0.2") and sentence.endswith("better on 20 samples, worse on 0, p = 1.9e-06.")
    assert metrics.verdict_samples(metrics.paired_samples(labels, mixed, right), ("b", "a")).startswith("b is beaten by a: mean -0.333")
    few = np.where((np.arange(60) < 3)[:, None], wrong, right)
    assert metrics.verdict_samples(metrics.paired_samples(labels, right, few), ("a", "b")).startswith("No difference that 60 samples can show between a and b: mean +0.0")
    for odd in (dict(low=-0.1), dict(p=0.06), dict(wins=1, losses=20), dict(low=-0.3, high=-0.1)):
        assert "No difference that 60 samples can show" in metrics.verdict_samples(better | odd, ("a", "b"))
    same = metrics.paired_samples(labels, right, right)
    assert [same[k] for k in ("mean", "low", "high", "p")] == [0, 0, 0, 1] and "No difference" in metrics.verdict_samples(same, ("a", "b"))


def test_findings_without_a_positive_are_no_comparison():
    labels = np.zeros((20, 2), int)
    result = metrics.paired_samples(labels, np.full((20, 2), 0.9), np.full((20, 2), 0.1))
    assert math.isnan(result["mean"]) and (result["wins"], result["losses"]) == (0, 20)
    assert metrics.verdict_samples(result, ("a", "b")) == "a against b: one has no score, so there is no comparison."


def test_random_images_are_of_other_patients_that_the_table_left():
    s = phantoms(60, 3)
    s.patients = np.array([f"p{i % 20}" for i in range(60)])  # 3 samples each
    s.images[5] = 0
    table = np.ones((60, 2), bool)
    table[10:20, 1] = False
    split = {"train": np.arange(40), "test": np.arange(40, 60), "modalities": np.array(["note", "image"]), "present any:0.7": table, "present any:0": np.ones((60, 2), bool)}
    pool = compare.training_images(s, split)
    assert [*pool] == [i for i in range(40) if i != 5 and not 10 <= i < 20]
    rows, groups = np.arange(40, 60), data.groups(s)
    chosen = data.others(groups, pool, rows, 0, 16)
    assert chosen.shape == (20, 16) and np.isin(chosen, pool).all() and (chosen % 20 != (rows % 20)[:, None]).all()
    assert all(len({*row}) == 16 for row in chosen) and (data.others(groups, pool, rows, 0, 16) == chosen).all() and len(np.unique(chosen)) > 20
    assert data.others(groups, pool[:1], rows[1:], 0, 16).shape == (19, 16)
    for members in (pool[:1], pool[:0]):
        with pytest.raises(data.Refused, match="no training sample of another patient than sample 40 is left its image"):
            data.others(groups, members, rows, 0, 16)
    one = data.others(groups, pool, rows, 1, labels=s.labels)
    assert one.shape == (20,) and (s.labels[one] == s.labels[rows]).all() and (one % 20 != rows % 20).all()


def test_other_images_are_not_the_samples_own():
    cases = compare.Cases({"image": [1, 2], "note": ["a", "b"]}, [set(), {"note"}])
    assert cases.with_images(np.array([3, 4])) == compare.Cases({"image": [3, 4], "note": ["a", "b"]}, [{"image"}, {"note", "image"}])
    assert cases.with_images([3, 4]).with_images([1, 2], own=True) == cases
    assert cases.take(np.array([False, True])) == compare.Cases({"image": [2], "note": ["b"]}, [{"note"}])
