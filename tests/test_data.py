"""Phantoms, study files, missing tables, splits, tokenizer, resize, and the refusal of files that are not what they should be."""

import hashlib
import itertools

import numpy as np
import pytest

from minilora import data, metrics
from minilora.data import Refused
from minilora.phantoms import FACTS, ODDS, WORDS, phantoms
from minilora.words import CLS, UNK, tokenize, words_of


def study(**changes):
    rng = np.random.default_rng(0)
    arrays = {"images": rng.integers(0, 256, (40, 8, 8), dtype=np.uint8), "notes": np.array(["a cough", ""] * 20),
              "labels": np.arange(40) % 2, "lab": rng.normal(size=(40, 2)).astype(np.float32),
              "lab_names": np.array(["age", "crp"])}
    return {k: v for k, v in (arrays | changes).items() if v is not None}


def write(path, arrays):
    np.savez(path, **arrays)
    return path


def test_phantoms_are_the_same_bytes_for_the_same_arguments():
    def content(*given):
        s = phantoms(*given)
        arrays = {"images": s.images, "labels": s.labels, **s.numeric, **s.attributes}
        return [s.name, *s.notes], {name: x.tobytes() for name, x in arrays.items()}

    once = {given: content(*given) for given in ((50, 3), (50, 3, "source"), (50, 4), (50, 3, "target", 24))}
    np.random.seed(7)  # nobody's state but the arguments
    for given, first in reversed(once.items()):
        assert content(*given) == first
    assert content(50, 3, "target", 32) == content(50, 3, "target", 32, 0.6, 0.8, ODDS) == once[50, 3]
    one = phantoms(50, 3)  # reports and diagnoses are whole numbers' draws: the same on every machine, in every version
    assert data.digest([*one.notes.tolist(), *one.labels.tolist()])[:16] == "168965d3fcc18559"
    assert len({arrays["images"] for _, arrays in once.values()}) == len(once)
    one = phantoms(50, 3)
    assert one.modalities == ("image", "note", "vitals", "labs") and np.isnan(one.numeric["vitals"]).any()
    assert one.have().all() and set(one.attributes) == {"kind", "symptom", "history", "side", "agree"}


def test_the_source_never_shows_or_states_what_the_target_brings():
    """No patchy opacity, no pneumonia and none of the other hospital's words; the target has all four, and some known words."""
    source, target = phantoms(2000, 3, "source"), phantoms(2000, 3)
    words = lambda s: {w for note in s.notes for w in words_of(note)}
    for s, kinds in ((source, {0, 2, 3}), (target, {0, 1, 2, 3})):
        assert {*s.labels.tolist()} == {*s.attributes["kind"].tolist()} == kinds
        assert s.class_names == ["healthy", "pneumonia", "tumour", "tuberculosis"]
        for fact in ("symptom", "history"):  # they are not of the lesion: both have all
            assert {*s.attributes[fact].tolist()} == {0, 1, 2, 3}
    new, known = ({w for values in WORDS.values() for phrases in values for w in words_of(" ".join(phrases[part]))} for part in (slice(2, 4), slice(0, 2)))
    lesion = {w for phrase in WORDS["kind"][1] for w in words_of(phrase)} - {w for i in (0, 2, 3) for w in words_of(" ".join(WORDS["kind"][i]))}
    assert len(lesion) > 4 and not words(source) & (lesion | (new - known)) and words(target) >= lesion
    unseen = np.mean([any(w in new - known for w in words_of(note)) for note in target.notes])
    assert 0.65 < unseen < 0.85


@pytest.mark.parametrize("domain", ["source", "target"])
def test_reports_state_the_lesion_in_three_of_five_and_rightly_in_four_of_five_of_those(domain):
    """`agree` says which: 1 where the words are those of the lesion in the image, 0 where of another one, -1 where of none."""
    s = phantoms(4000, 5, domain)
    kind_of = {phrase: kind for kind, phrases in enumerate(WORDS["kind"]) for phrase in phrases}
    side_of = {phrase: side for side, phrases in enumerate(WORDS["side"]) for phrase in phrases}
    for note, kind, side, agree in zip(s.notes, s.attributes["kind"], s.attributes["side"], s.attributes["agree"]):
        parts = str(note).split(", ")
        stated = [(phrase, of) for phrase, of in kind_of.items() if parts[0].startswith(phrase)]
        assert len(stated) == (len(parts) == 3) == (agree >= 0)
        for phrase, of in stated:
            assert (of == kind) == agree
            beside = parts[0][len(phrase) + 1 :]
            assert (beside == "") == (of == 0) and (of == 0 or kind == 0 or side_of[beside] == side)
        assert (side == -1) == (kind == 0)
    agree = s.attributes["agree"]
    assert abs((agree >= 0).mean() - 0.6) < 0.03 and abs((agree == 1).sum() / (agree >= 0).sum() - 0.8) < 0.03


def stated_lesion(note):
    """The kind of lesion that a report states, and the rest of it; (None, note) where it states none."""
    first, *rest = note.split(", ")
    for kind, phrases in enumerate(WORDS["kind"]):
        if any(first.startswith(phrase) for phrase in phrases):
            return kind, ", ".join(rest)
    return None, note


def likely(notes, labels, train, test):
    """Labels of the test notes by naive Bayes over the words of the training ones, with classes as frequent as there."""
    said = [{*words_of(note)} for note in notes]
    words = sorted(set().union(*said))
    bag = np.array([[w in each for w in words] for each in said])  # [N,V]
    share = np.array([(bag[train][labels[train] == c].sum(0) + 1) / ((labels[train] == c).sum() + 2) for c in range(4)])  # [C,V]
    prior = np.log([(labels[train] == c).mean() for c in range(4)])
    return (bag[test] @ np.log(share).T + ~bag[test] @ np.log(1 - share).T + prior).argmax(1)


def test_a_fact_that_only_the_image_shows_and_one_that_both_show():
    """The two studies differ in the words of the lesion alone; in one words and diagnosis are independent, in the other the words name it."""
    n = 4000
    image, both = (phantoms(n, 2, **FACTS[fact]) for fact in ("image", "both"))
    assert (image.images == both.images).all() and (image.labels == both.labels).all()
    assert (image.attributes["kind"] == image.labels).all(), "the lesion decides"
    stated, rest = zip(*map(stated_lesion, both.notes))
    assert (np.array(stated) == both.labels).all() and list(rest) == list(image.notes)
    assert {stated_lesion(note)[0] for note in image.notes} == {None}
    # Counts of each phrase in each class, against those of independence: 4 sigma.
    for phrase in {phrase for note in image.notes for phrase in note.split(", ")}:
        says = np.array([phrase in note.split(", ") for note in image.notes])
        for c in range(4):
            expected = n * says.mean() * (image.labels == c).mean()
            assert abs((says & (image.labels == c)).sum() - expected) < 4 * expected**0.5, phrase
    train, test = np.arange(0, n, 2), np.arange(1, n, 2)
    right = {s: (likely(notes, image.labels, train, test) == image.labels[test]).mean()
             for s, notes in (("image", image.notes), ("both", both.notes), ("usual", phantoms(n, 2).notes))}
    assert abs(right["image"] - 0.25) < 0.04 and right["both"] > 0.99 and 0.6 < right["usual"] < 0.9, right


def test_each_scanner_keeps_its_noise_and_its_light():
    """Noise by second differences between the lungs; light by the mean image's halves. Neither domain has the other's."""
    noise, slopes = {}, {}
    for domain in ("source", "target"):
        spine = phantoms(60, 1, domain, 96).images[:, 12:84, 46:51] / 255
        bend = 2 * spine[:, 1:-1] - spine[:, 2:] - spine[:, :-2]
        noise[domain] = bend.std() / 6**0.5
        mean = phantoms(400, 2, domain).images.mean(0)
        slopes[domain] = (mean[:, 16:].mean() - mean[:, :16].mean(), mean[:16].mean() - mean[16:].mean())
    assert noise["source"] == pytest.approx(0.04, rel=0.05) and noise["target"] > 1.5 * noise["source"]
    assert max(map(abs, slopes["source"])) < 2 and min(slopes["target"]) > 10  # brighter up on the right


def test_study_round_trip_keeps_every_field(tmp_path):
    s = phantoms(30, 1)
    data.save_study(tmp_path / "s.npz", s)
    back = data.load_study(tmp_path / "s.npz")
    assert np.array_equal(back.images, s.images) and list(back.notes) == list(s.notes)
    assert np.array_equal(back.labels, s.labels) and back.class_names == s.class_names and back.columns == s.columns
    for k in s.numeric:
        np.testing.assert_array_equal(back.numeric[k], s.numeric[k])
    first = (tmp_path / "s.npz").read_bytes()
    data.save_study(tmp_path / "t.npz", s)
    assert (tmp_path / "t.npz").read_bytes() == first


def test_what_the_file_lacks_is_absent(tmp_path):
    lab = study()["lab"].copy()
    lab[3], lab[4, 0] = np.nan, np.nan
    s = data.load_study(write(tmp_path / "a.npz", study(lab=lab)))
    have = s.have()
    assert have[:, 0].all() and list(have[:4, 1]) == [True, False, True, False]
    assert not have[3, 2] and have[4, 2]


@pytest.mark.parametrize("shape,labels", [((9, 28, 28), (9, 1)), ((9, 28, 28, 3), (9, 5))])
def test_medmnist_files_load_unchanged_with_their_splits(tmp_path, shape, labels):
    rng, arrays = np.random.default_rng(0), {}
    for part, n in (("train", 9), ("val", 4), ("test", 5)):
        arrays[f"{part}_images"] = rng.integers(0, 256, (n, *shape[1:]), dtype=np.uint8)
        arrays[f"{part}_labels"] = np.arange(n * labels[1]).reshape(n, labels[1]) % 2
    s = data.load_study(write(tmp_path / "m.npz", arrays))
    assert s.multilabel == (labels[1] > 1)
    assert {k: len(v) for k, v in data.split(s, 0).items()} == {"train": 9, "val": 4, "test": 5}
    assert np.array_equal(s.images[data.split(s, 1)["test"]], arrays["test_images"])


def test_medmnist_parts_must_fit(tmp_path):
    arrays = {f"{p}_{w}": np.zeros((5, 4, 4) if w == "images" else (5, 1), np.uint8) for p in ("train", "val", "test") for w in ("images", "labels")}
    for key, value in (("train_labels", np.zeros((4, 1), np.uint8)), ("val_images", np.zeros((0, 4, 4), np.uint8)), ("test_labels", np.uint8(3))):
        with pytest.raises(Refused, match=f"{key.split('_')[0]}_images .* need the same length"):
            data.load_study(write(tmp_path / "m.npz", arrays | {key: value}))
    with pytest.raises(Refused, match="'test_labels' is missing"):
        data.load_study(write(tmp_path / "m.npz", {k: v for k, v in arrays.items() if k != "test_labels"}))


def test_synthetic_notes_tell_the_right_symptom_four_times_in_five(tmp_path):
    s = data.load_study(write(tmp_path / "a.npz", study(images=np.zeros((4000, 4, 4), np.uint8), notes=None, lab=None, lab_names=None,
                                                       labels=np.arange(4000) % 3)), synthetic_notes=True)
    right = np.mean([data.SYMPTOMS[c] in n for c, n in zip(s.labels, s.notes)])
    assert s.synthetic_notes and abs(right - 0.8) < 0.02
    with pytest.raises(Refused, match="has notes of its own"):
        data.load_study(write(tmp_path / "b.npz", study()), synthetic_notes=True)


def test_missing_tables():
    mods = ("image", "note", "vitals")
    have = np.ones((1000, 3), bool)
    have[:100, 1:] = False  # only an image
    table = data.missing_table(have, mods, "any:0.7", 5)
    assert np.array_equal(table, data.missing_table(have, mods, "any:0.7", 5))
    assert not np.array_equal(table, data.missing_table(have, mods, "any:0.7", 6))
    assert table.any(1).all() and (table <= have).all() and table[:100, 0].all()
    full = table[100:]
    assert abs((~full.all(1)).mean() - 0.7) < 0.04
    patterns, counts = np.unique(full[~full.all(1)], axis=0, return_counts=True)
    assert len(patterns) == 6 and counts.min() > 0.6 * counts.mean()  # uniform over non-empty proper subsets
    lower = data.missing_table(have, mods, "any:0.3", 5)
    assert (table <= lower).all()  # nested over rates
    image = data.missing_table(np.ones((100, 2), bool), ("image", "note"), "image:0.4", 0)
    assert (~image[:, 0]).sum() == 40 and image[:, 1].all()
    for rate, left in (("both:0", 200), ("both:1", 100)):
        assert data.missing_table(np.ones((100, 2), bool), ("image", "note"), rate, 0).sum() == left


def test_a_missing_type_that_follows_the_label():
    mods, rng = ("image", "note", "vitals"), np.random.default_rng(1)
    have, labels = np.ones((2000, 3), bool), rng.integers(0, 4, 2000)
    have[:300, 0], have[300:500, :2] = False, False  # two modalities, one
    labels[1500:] = -1
    whole, known = have.all(1), labels >= 0
    table = data.missing_table(have, mods, "label:0.7", 5, labels)
    assert np.array_equal(table, data.missing_table(have, mods, "label:0.7", 5, labels))
    assert (table <= have).all() and table.any(1).all() and (table[300:500] == have[300:500]).all()
    lost = have & ~table
    assert (lost.sum(1) <= 1).all() and abs(lost[have.sum(1) > 1].any(1).mean() - 0.7) < 0.03
    rows = lost.any(1) & known
    for i in np.flatnonzero(rows):
        assert lost[i].argmax() == np.flatnonzero(have[i])[labels[i] % have[i].sum()]
    assert {*lost[rows & whole].argmax(1)} == {0, 1, 2} and {*lost[:300][rows[:300]].argmax(1)} == {1, 2}
    counts = lost[whole & ~known].sum(0)  # without a label, any of them
    assert counts.min() > 0.8 * counts.mean() > 80
    lower = data.missing_table(have, mods, "label:0.3", 5, labels)
    assert (table <= lower).all() and not np.array_equal(table, lower)  # nested over rates
    assert (data.missing_table(have, mods, "label:0", 5, labels) == have).all()
    assert np.array_equal(lost.any(1), (have & ~data.missing_table(have, mods, "any:0.7", 5)).any(1))  # the same samples lose
    with pytest.raises(Refused, match="missing type 'label' in 'label:0.7' needs one label a sample; none is known here"):
        data.missing_table(have, mods, "label:0.7", 5)
    with pytest.raises(Refused, match="these are several findings"):
        data.missing_table(have, mods, "label:0.7", 5, np.zeros((2000, 2), int))


@pytest.mark.parametrize("text,words", [("sound:0.5", "'sound'.*image, note, any, both, label"), ("label:1.5", "1.5.*outside"), ("image:1.5", "1.5.*outside"),
                                        ("image:-0.1", "outside"), ("image:x", "'x'.*not a number"), ("0.5", "''"),
                                        ("any:nan", "outside")])
def test_missing_specifications_are_checked(text, words):
    with pytest.raises(Refused, match=words):
        data.parse_missing(text, ("image", "note"))


def test_split_keeps_groups_together_and_stratifies():
    rng = np.random.default_rng(0)
    n = 600
    images = rng.integers(0, 256, (n, 4, 4), dtype=np.uint8)
    patients = np.array([f"p{i // 3}" for i in range(n)])
    labels = (np.arange(n) // 3 % 4 == 0).astype(np.int64)
    images[599] = images[0]  # joins the first and the last patient
    labels[10] = -1
    s = data.Study("s", labels, ["no", "yes"], images=images, patients=patients)
    parts = data.split(s, 0)
    where = np.full(n, -1)
    for i, rows in enumerate(parts.values()):
        where[rows] = i
    assert where[10] == -1 and (where == -1).sum() == 1
    for p in set(patients):
        assert len(set(where[(patients == p) & (labels >= 0)])) == 1
    assert where[0] == where[599]
    for i, share in enumerate((0.8, 0.1, 0.1)):
        assert abs((where == i).mean() - share) < 0.02
        assert abs(labels[where == i].mean() - 0.25) < 0.06
    assert all(np.array_equal(parts[k], data.split(s, 0)[k]) for k in parts)
    assert any(not np.array_equal(parts[k], data.split(s, 1)[k]) for k in parts)


def test_a_study_too_small_to_split_is_refused():
    with pytest.raises(Refused, match="leave the (val|test) split empty; need more"):
        data.split(data.Study("s", np.array([0, 1]), ["a", "b"], notes=np.array(["a", "b"])), 0)


def test_tokenizer():
    ids = tokenize(["Fever, [MASK]  fever!", "", "a b c d e f"], 100, 4)
    assert ids.shape == (3, 4) and ids[0, 0] == CLS and ids[0, 1] == ids[0, 3] and ids[0, 2] == UNK
    assert list(ids[1]) == [CLS, 0, 0, 0] and (ids[2] > 0).all() and ids.max() < 100 and ids.min() >= 0
    assert hashlib.sha256(tokenize(["a routine chest film"], 2048, 8).tobytes()).hexdigest()[:8] == "d5a79011"


def test_resize_keeps_constants_means_and_identity():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 30, 20), dtype=np.uint8)
    assert np.array_equal(data.resize(image[:, :20], 20), image[:, :20])
    assert (data.resize(np.full((1, 17, 33), 77, np.uint8), 32) == 77).all()
    assert abs(data.resize(image, 8).mean() - image.mean()) < 2
    checker = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[None]
    assert abs(data.resize(checker, 16).astype(int) - 127.5).max() < 6  # antialiased: no moire
    rgb = np.stack([image] * 3, 3)
    assert np.array_equal(data.resize(rgb, 16)[..., 0], data.resize(image, 16))
    assert data.prepare_images(image, 16, 3).shape == (2, 3, 16, 16)


def test_numeric_scale_ignores_nan():
    mean, scale = data.numeric_scale(np.array([[1, np.nan, 5], [3, np.nan, 5]], np.float32))
    assert list(mean) == [2, 0, 5] and list(scale) == [1, 1, 1]


def test_scores_against_definitions():
    rng = np.random.default_rng(0)
    labels, p = rng.integers(0, 3, 200), rng.dirichlet(np.ones(3), 200).round(1)
    said = p.argmax(1)
    f1 = [2 * ((said == c) & (labels == c)).sum() / ((said == c).sum() + (labels == c).sum()) for c in range(3)]
    pairs = lambda t, s: np.mean([(a > b) + 0.5 * (a == b) for a, b in itertools.product(s[t], s[~t])])
    auc = [pairs(labels == c, p[:, c]) for c in range(3)]
    got = metrics.scores(labels, p)
    assert got["macro_f1"] == pytest.approx(np.mean(f1)) and got["auroc"] == pytest.approx(np.mean(auc))
    assert got["accuracy"] == pytest.approx((said == labels).mean())
    both = np.stack([labels == 0, np.where(np.arange(200) < 50, -1, labels == 1)], 1).astype(int)
    several = metrics.scores(both, p[:, :2])
    assert several["auroc"] == pytest.approx((auc[0] + pairs(labels[50:] == 1, p[50:, 1])) / 2)
    assert np.isnan(metrics.auroc(np.ones(3, bool), np.arange(3)))


BAD = {
    "key 'labels' is missing": {"labels": None}, "no modality": {"images": None, "notes": None, "lab": None, "lab_names": None},
    r"images are float32": {"images": np.zeros((40, 8, 8), np.float32)}, r"images are uint8 \[40, 8, 8, 4\]": {"images": np.zeros((40, 8, 8, 4), np.uint8)},
    "lengths differ: labels 40, images 39": {"images": np.zeros((39, 8, 8), np.uint8)}, "labels are float64": {"labels": np.zeros(40)},
    "labels are -2": {"labels": np.arange(40) % 2 - 2}, "labels are 0..2.* 2 classes": {"labels": np.arange(40) % 3, "class_names": np.array(["a", "b"])},
    "one class only": {"labels": np.zeros(40, int)}, "finding 'class 1' never varies": {"labels": np.stack([np.arange(40) % 2, np.zeros(40, int)], 1)},
    "'lab' is float32": {"lab_names": np.array(["age"])},
    "'lab' is infinite in row 0": {"lab": np.full((40, 2), np.inf, np.float32)}, "notes are int64": {"notes": np.arange(40)},
    "'any' cannot be a modality's name": {"any": np.zeros((40, 1), np.float32), "any_names": np.array(["x"])},
    "'label' cannot be a modality's name": {"label": np.zeros((40, 1), np.float32), "label_names": np.array(["x"])},
    "'a b' cannot be": {"a b": np.zeros((40, 1), np.float32), "a b_names": np.array(["x"])},
    r"'patients' \[\] must be a list": {"patients": np.array("p")}, "none twice": {"lab_names": np.array(["age", "age"])},
    "labels reach 30000000": {"labels": np.arange(40) % 2 * 30_000_000},
    "format 2 is not known": {"format": np.int64(2)}, "lines are float64": {"lines": np.zeros(40)}, "lines 39": {"lines": np.arange(39)},
}  # fmt: skip


@pytest.mark.parametrize("words", BAD)
def test_bad_study_files_are_refused_by_name(tmp_path, words):
    path = write(tmp_path / "bad.npz", study(**BAD[words]))
    with pytest.raises(Refused, match=words) as error:
        data.load_study(path)
    assert "bad.npz" in str(error.value)


def test_files_that_are_no_npz_are_refused(tmp_path):
    good = write(tmp_path / "good.npz", study()).read_bytes()
    objects = tmp_path / "objects.npz"
    np.savez(objects, labels=np.array([{"a": 1}], dtype=object), images=study()["images"])
    flipped = bytearray(good)
    flipped[len(good) // 3] ^= 16
    for name, content in (("text", b"hello"), ("empty", b""), ("cut", good[: len(good) // 2]), ("flipped", bytes(flipped))):
        (tmp_path / f"{name}.npz").write_bytes(content)
    np.save(tmp_path / "array.npy", np.zeros(3))
    for name in ("text.npz", "empty.npz", "cut.npz", "flipped.npz", "objects.npz", "array.npy", "absent.npz"):
        with pytest.raises(Refused, match=name):
            data.load_study(tmp_path / name)


def test_write_atomic_keeps_the_old_file_when_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "a"
    data.write_atomic(path, "old")
    monkeypatch.setattr(data.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError):
        data.write_atomic(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_samples_with_nothing_are_left_out_and_counted(tmp_path, capsys):
    """One black picture does not refuse a file; what is left keeps its rows in it."""
    whole = phantoms(30, 0).select(("image",))
    whole.images[[4, 9, 20, 21]] = 0
    data.save_study(tmp_path / "s.npz", whole)
    read = data.load_study(tmp_path / "s.npz")
    kept = np.setdiff1d(np.arange(30), [4, 9, 20, 21])
    assert "s: 4 samples have nothing and are left out (rows 4, 9, 20, ...)" in capsys.readouterr().out
    assert (read.rows == kept).all() and (read.images == whole.images[kept]).all() and (read.labels == whole.labels[kept]).all()
    assert (read.take(np.array([5, 0])).rows == kept[[5, 0]]).all()
    whole.images[:] = 0
    data.save_study(tmp_path / "none.npz", whole)
    with pytest.raises(Refused, match="sample 0 has nothing present in image"):
        data.load_study(tmp_path / "none.npz")
