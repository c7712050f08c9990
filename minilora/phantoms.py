"""Phantoms: synthetic chest studies drawn by a program, so that everything runs without a download.

Each has a picture, a report, vital signs and laboratory values that agree only in part, so that a
model has to combine them. Skip it when you read for a method.
"""

import numpy as np

from minilora.data import Study

DIAGNOSES = ["healthy", "pneumonia", "tumour", "tuberculosis"]
VITALS = ["temperature", "saturation", "pulse"]
LABS = ["age", "crp"]
# Per value of a fact: two phrases of the source domain, then two synonyms that it never uses.
WORDS = {
    "kind": [
        ("clear lungs", "normal lungs", "unremarkable", "aerated"),
        ("patchy opacity", "hazy patch", "consolidation", "infiltrate"),
        ("round nodule", "small mass", "coin lesion", "focal density"),
        ("ring shadow", "cavity", "hollow lesion", "annular shadow"),
    ],
    "side": [
        ("left side", "on the left", "sinistral", "left hemithorax"),
        ("right side", "on the right", "dextral", "right hemithorax"),
    ],
    "symptom": [
        ("feels well", "no complaints", "asymptomatic", "no ailment"),
        ("fever", "high temperature", "pyrexia", "febrile"),
        ("weight loss", "lost weight", "cachexia", "wasting"),
        ("night sweats", "long cough", "hyperhidrosis", "chronic tussis"),
    ],
    "history": [
        ("no history", "nothing known", "unknown", "none stated"),
        ("recent cold", "had influenza", "viral prodrome", "coryza"),
        ("smoker", "smokes daily", "tobacco use", "pack years"),
        ("travelled abroad", "sick contact", "exposure", "endemic stay"),
    ],
}
ODDS = {"kind": 0.95, "symptom": 0.7, "history": 0.4}  # that a fact is the diagnosis's own one
LESION_ALONE = {"kind": 1.0, "symptom": 0.0, "history": 0.0}
# Who tells the diagnosis: further arguments of `phantoms`. Studies `image` and `both` of one seed
# differ in the words of the lesion alone. In `image` words and diagnosis are independent, so that
# nothing made of the words can help; in `both` they name the lesion, and so the diagnosis. Numbers
# still hint at pneumonia, by its haze: leave them out where words alone should count.
FACTS = {
    "usual": {},
    "image": {"stated": 0.0, "odds": LESION_ALONE},
    "both": {"stated": 1.0, "right": 1.0, "odds": LESION_ALONE},
}


def phantoms(n, seed, domain="target", size=32, stated=0.6, right=0.8, odds=ODDS):
    """Draw n synthetic chest studies: images uint8 [n,size,size], reports, `vitals` [n,3], `labs`
    [n,2], 4 diagnoses.

    The diagnosis sets the odds of the lesion (image; `stated` in 60% of the reports too, and
    `right` in 80% of those), the symptom and the history (words only) and shifts the numbers (10%
    NaN). Lesion size and haze, of which pneumonia has more, are in the image only. The `target` domain is another scanner and another hospital:
    another tone curve, uneven light and more noise, narrower and taller lungs, mostly synonyms that
    the source never uses, and pneumonia with its patchy opacity, which the source never shows.
    `attributes` are the facts themselves, for pretraining: kind, side, symptom, history, agree
    (report and image state the same lesion). Same arguments, same bytes."""
    target = domain == "target"
    rng = np.random.default_rng((seed, size, target))
    kinds = np.array([0, 1, 2, 3] if target else [0, 2, 3])  # of lesion, and so of diagnosis
    diagnosis = rng.choice(kinds, n)
    facts = {}
    for name, share in odds.items():
        others = rng.choice(kinds, n) if name == "kind" else rng.integers(0, 4, n)
        facts[name] = np.where(rng.random(n) < share, diagnosis, others)
    kind = facts["kind"]
    side = rng.integers(0, 2, n)

    is_right = rng.random(n) < right
    place = np.searchsorted(kinds, kind)
    other_kind = kinds[(place + rng.integers(1, len(kinds), n)) % len(kinds)]
    stated_kind = np.where(is_right, kind, other_kind)
    states_lesion = rng.random(n) < stated
    haze = np.clip(0.5 * rng.random(n) + 0.4 * (diagnosis == 1), 0, 1)
    numeric = _numbers(rng, facts, haze)
    claims = facts | {"kind": stated_kind, "side": side}
    notes = _reports(rng, claims, states_lesion, target)
    images = _chests(rng, kind, side, haze, size, target)

    facts["side"] = np.where(kind > 0, side, -1)
    facts["agree"] = np.where(states_lesion, stated_kind == kind, -1).astype(np.int64)
    return Study(
        name=f"phantoms ({domain})",
        labels=diagnosis,
        class_names=list(DIAGNOSES),
        images=images,
        notes=notes,
        numeric=numeric,
        columns={"vitals": VITALS, "labs": LABS},
        attributes=facts,
        synthetic=True,
    )


def _numbers(rng, facts, haze):
    """{'vitals': [n,3], 'labs': [n,2]} float32. Fever raises temperature, pulse and crp; haze
    lowers the saturation; smokers are older."""
    n = len(haze)
    fever = np.array([0.0, 1.6, 0.2, 0.6])[facts["symptom"]]
    temperature = 36.7 + fever + 0.4 * rng.normal(size=n)
    saturation = 97 - 6 * haze + rng.normal(size=n)
    pulse = 72 + 8 * fever + 9 * rng.normal(size=n)
    age = 40 + 15 * (facts["history"] == 2) + 12 * rng.normal(size=n)
    crp = np.exp(1 + fever + 0.5 * rng.normal(size=n))
    vitals = np.stack([temperature, saturation, pulse], 1)
    labs = np.stack([age, crp], 1)
    return {"vitals": _with_gaps(rng, vitals, 37.0), "labs": _with_gaps(rng, labs, 40.0)}


def _with_gaps(rng, values, usual):
    """[n,F] float32 with 10% NaN; where nothing would be left, the first column is `usual`."""
    values[rng.random(values.shape) < 0.1] = np.nan
    values[np.isnan(values).all(1), 0] = usual
    return values.astype(np.float32)


def _reports(rng, claims, states_lesion, target):
    """[n] str: where the lesion is stated, it and its side; then the symptom and the history."""
    draws = rng.random((len(states_lesion), 5)).T  # four choose a phrase, the last one a domain
    unseen = (draws[4] < 0.75) & target
    phrases = []
    for name, draw in zip(WORDS, draws):
        synonym = 2 * unseen + (draw < 0.5)
        phrases.append(np.array(WORDS[name])[claims[name], synonym])

    reports = []
    rows = zip(claims["kind"], *phrases, states_lesion)
    for kind, lesion, side, symptom, history, stated in rows:
        if kind > 0:  # clear lungs have no side
            lesion = f"{lesion} {side}"
        parts = [lesion, symptom, history] if stated else [symptom, history]
        reports.append(", ".join(parts))
    return np.array(reports)


def _chests(rng, kind, side, haze, size, target):
    """uint8 [n,S,S]: soft ellipses for thorax and lungs, one lesion, then the scanner's tone, light
    and noise; all samples at once."""
    n = len(kind)
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / (size - 1) * 2 - 1  # [S,S] in [-1,1]

    def between(low, high):
        """A number for each sample, [n,1,1]."""
        return rng.uniform(low, high, n).astype(np.float32)[:, None, None]

    def ellipse(right, rx, ry):
        """[n,S,S], 1 inside and 0 outside, its centre `right` of the body's."""
        return _soft(1 - np.hypot((x - cx - right) / rx, (y - cy) / ry))

    cx = between(-0.06, 0.06)
    cy = between(-0.06, 0.06)
    wide = between(0.22, 0.285) if target else between(0.28, 0.36)
    tall = between(0.655, 0.8) if target else between(0.55, 0.68)
    apart = between(0.38, 0.44)
    thorax = ellipse(0, between(0.88, 0.97), between(0.9, 1.0))
    lungs = np.maximum(ellipse(-apart, wide, tall), ellipse(apart, wide, tall))

    direction = np.where(side == 0, -1, 1)[:, None, None]
    lesion_x = cx + direction * (apart + between(-0.06, 0.06))
    lesion_y = cy + between(-0.35, 0.35)
    far = np.hypot(x - lesion_x, y - lesion_y)  # [n,S,S] from the lesion's centre
    scale = between(0.9, 1.25)
    clear = np.zeros_like(far)
    patch = 0.75 * np.exp(-((far / (0.24 * scale)) ** 2))
    nodule = _soft((0.18 * scale - far) * 2)
    ring = _soft((0.06 - abs(far - 0.22 * scale)) * 3)
    lesion = np.choose(kind[:, None, None], [clear, patch, nodule, ring])

    air = 0.45 * lungs * (1 - 0.35 * haze[:, None, None])
    image = 0.12 + 0.6 * thorax - air + 0.45 * lesion
    image = np.clip(image, 0, 1) ** between(0.85, 1.15)
    noise = 0.04
    if target:
        light = 1 + between(0.25, 0.55) * x - between(0.2, 0.5) * y  # brighter up on the right
        image = light * image**1.6
        noise = 0.08
    image = image + rng.normal(0, noise, image.shape)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def _soft(inside):
    """1 where `inside` is positive, 0 where it is negative, with a soft edge."""
    return 1 / (1 + np.exp(-np.clip(inside * 14, -30, 30)))
