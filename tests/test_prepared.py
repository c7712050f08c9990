"""What an import did is done again by serving: the same file gives the same input, to the byte."""

import csv
import json

import numpy as np
import pytest

import export
import train_mora
import train_selora
from minilora import checkpoint, data, serve, serve_cli, studies
from minilora.data import Refused
from minilora.phantoms import phantoms
from minilora.prepare import check_record, mask, number, says_nothing
from minilora.words import buckets_for, coverage, earlier_words_of, normal_form, tokenize, words_of

TINY = ["--seeds", "1", "--steps", "6", "--width", "16", "--depth", "1", "--heads", "2", "--batch", "8", "--device", "cpu", "--lr", "0.01",
        "--pretrain-steps", "4", "--phantoms", "120", "--methods", "mora"]

DRAW = ["--data", "s.npz", "--seeds", "1", "--steps", "4", "--every", "2", "--pretrain-steps", "3", "--vae-steps", "3", "--phantoms", "120", "--width", "8", "--text-width", "8",
        "--heads", "2", "--batch", "4", "--device", "cpu", "--vae-width", "4", "--lr", "0.01", "full:0.001"]


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """A table as a hospital writes it, imported, trained and exported: (folder, rows of the table)."""
    Image = pytest.importorskip("PIL.Image")
    pytest.importorskip("pandas")
    folder = tmp_path_factory.mktemp("import")
    (folder / "pictures").mkdir()
    drawn = phantoms(60, 4, size=70)
    rows = []
    for i in range(60):
        picture = drawn.images[i][: 50 + i % 20]  # not square
        Image.fromarray(np.stack([picture] * 3, 2) if i % 3 == 0 else picture).save(folder / f"pictures/p{i}.png")
        note = ("Covid19 suspected, " if i % 2 else "") + f"cough, day {i}, pneu\u00admonie"
        rows.append({"image": f"p{i}" if i % 7 else "None", "note": "not available" if i % 11 == 5 else note, "label": ["other", "covid"][i % 2],
                     "crp": "-999" if i % 5 == 0 else f"{i % 9},{i % 10}", "patient": "unknown" if i % 6 else f"q{i}"})
    with open(folder / "t.csv", "w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0], delimiter=";")
        writer.writeheader()
        writer.writerows(rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        studies.main(["from-csv", "t.csv", "--images", "pictures", "--out", "s.npz", "--numeric", "labs=crp", "--na=-999", "--mask-words", "covid,pneumonie",
                      "--size", "48", "--fit", "pad"])
        train_mora.main([*TINY, "--data", "s.npz", "--out", "r"])
        export.main(["mora", "r"])
    return folder, rows


def test_the_record_goes_with_study_run_and_export(imported):
    folder, _ = imported
    study = data.load_study(folder / "s.npz")
    assert study.prepared == {"size": 48, "fit": "pad", "rgb": False, "na": ["-999"], "mask_words": ["covid", "pneumonie"], "mask": "mark",
                              "numbers": {"labs": {"crp": {"decimal": ",", "thousands": ""}}}}
    assert serve.own_manifest(folder / "r/onnx")["prepared"] == study.prepared
    assert len(np.unique(data.groups(study))) == 60, "placeholder patients are nobody's siblings"


def test_a_file_gives_the_input_that_training_saw(imported):
    """Pictures by their files, notes and numbers as the table wrote them, against the study's own rows, to the byte."""
    folder, rows = imported
    study = data.load_study(folder / "s.npz")
    served = serve.Diagnoser(folder / "r/onnx", "cpu")
    m = served.manifest
    scales = {name: (np.array(spec["mean"], np.float32), np.array(spec["scale"], np.float32)) for name, spec in m["numeric"].items()}
    encode = lambda notes: tokenize(notes, m["buckets"], m["positions"])
    wanted = data.model_inputs(study, m["image_size"], m["channels"], encode, scales)
    wanted["image"] = data.prepare_images(study.images, m["image_size"], m["channels"])
    raw = [studies.read_picture(folder / f"pictures/{row['image']}.png", rgb=i % 2 == 0) if row["image"] != "None" else None for i, row in enumerate(rows)]
    given, n = served.request(raw, [row["note"] for row in rows], {"labs": [[row["crp"]] for row in rows]})
    inputs, present = served.inputs(given, range(n))
    have = study.have()
    assert (present == have).all() and not have.all()
    for column, name in enumerate(study.modalities):
        assert inputs[name][have[:, column]].tobytes() == wanted[name][have[:, column]].tobytes(), name
    sentinel = served.request(None, None, {"labs": [[-999.0], [3.5]]})[0]
    with pytest.raises(Refused, match="sample 0 has nothing"):
        served.inputs(sentinel, range(2))


def test_hidden_words_are_hidden_from_a_served_model(imported, capsys):
    served = serve.Diagnoser(imported[0] / "r/onnx", "cpu")
    forms = ["covid19 suspected", "COVID-19 suspected", "Co\u00advid suspected", "[MASK] suspected"]
    answers = served.predict(notes=forms)
    assert (answers == answers[:1]).all()
    serve_cli.main(["predict", str(imported[0] / "r/onnx"), "--image", str(imported[0] / "pictures/p1.png"), "--note", "covid19"])
    said = capsys.readouterr().out
    study = data.load_study(imported[0] / "s.npz")
    p = served.predict([study.images[1]], ["[MASK]"])[0]
    assert all(f"{name:20s} {value:.3f}" in said for name, value in zip(served.classes, p))


def test_inspect_shows_what_the_import_said(imported, capsys):
    study = data.load_study(imported[0] / "s.npz")
    assert any(line.startswith("missing    note: not available 5") for line in study.report)
    studies.main(["inspect", str(imported[0] / "s.npz")])
    said = capsys.readouterr().out
    assert "the import said:" in said and all(line in said for line in study.report)
    assert b"not available" not in (imported[0] / "r/onnx/manifest.json").read_bytes()


def test_no_patient_s_data_in_an_exported_folder(imported):
    """Masked words and spellings are there; notes, patients and pictures are not."""
    folder, rows = imported
    content = b"".join(path.read_bytes() for path in (folder / "r/onnx").iterdir())
    assert b"pneumonie" in content
    for row in rows[:20]:
        assert row["note"] == "not available" or row["note"].encode() not in content
        assert row["patient"] == "unknown" or f'"{row["patient"]}"'.encode() not in content


def test_what_the_import_calls_missing_is_missing_when_served(imported):
    """Sentinels as text, notes of which nothing is left, pictures of one grey level, or black once they are small."""
    served = serve.Diagnoser(imported[0] / "r/onnx", "cpu")
    for value in ("-999", "-999,0", -999, -999.0, "-9,99e2"):
        assert served.row("labs", [value], "") is None, value
    white, corner = np.full((90, 90), 255, np.uint8), np.zeros((2000, 2000), np.uint8)
    corner[0, 0] = 1
    assert served.image(white, "") is None and served.image(corner, "") is None and served.image(corner[:8, :8], "") is not None
    served.prepared = served.prepared | {"mask": "delete"}
    assert all(served.note(text, "") is None for text in ("covid19", "covid unknown", "...!", "covid -")) and served.note("covid fever", "") is not None


def test_runs_that_prepared_notes_otherwise_share_no_hot_swap_folder(imported, monkeypatch, capsys):
    monkeypatch.chdir(imported[0])
    train_selora.main([*DRAW, "--out", "a"])
    export.main(["selora", "a", "--hot-swap", "hot"])
    saved = checkpoint.load("a/model.pt")
    for change in ({"prepared": saved["prepared"] | {"mask_words": ["fever"]}}, {"tokenizer": "crc32"}):
        checkpoint.save(imported[0] / "b/model.pt", saved | change)
        with pytest.raises(SystemExit):
            export.main(["selora", "b", "--hot-swap", "hot"])
        assert f"prepared otherwise ('{[*change][0]}' differs)" in capsys.readouterr().err


def test_a_patient_written_two_ways_is_one(tmp_path):
    study = phantoms(40, 0).select(("image", "note"))
    study.patients = np.array([*(f"{i}" for i in range(20)), *(f"{i}.0" for i in range(18)), "P7\u200b", "p7"])
    assert len(np.unique(data.groups(study))) == 21


@pytest.mark.parametrize("name,note", [("pneumonia", "pneu\u00admonia seen"), ("fibrosis", "ﬁbrosis"), ("pleural effusion", "Pleural  effusion"), ("癌", "确诊肺癌")])
def test_class_names_are_found_in_any_form(name, note):
    study = phantoms(40, 0).select(("note",))
    study.class_names = [name, *(f"c{i}" for i in range(1, len(study.class_names)))]
    study.notes = np.array([note if label == 0 else "nothing" for label in study.labels])
    assert any(name in line for line in studies.leaks(study))


def test_selora_hides_words_too(imported, monkeypatch):
    monkeypatch.chdir(imported[0])
    train_selora.main([*DRAW, "--out", "d"])
    export.main(["selora", "d"])
    s = serve.Synthesizer("d/onnx", "cpu")
    assert s.manifest["prepared"]["mask_words"] == ["covid", "pneumonie"] and s.manifest["tokenizer"] == "crc32-nfc"
    np.testing.assert_array_equal(s.sample(["covid19 fever"], 2), s.sample(["[MASK] fever"], 2))


def test_folders_of_earlier_versions_cut_notes_as_they_did(imported, tmp_path):
    """Marks apart and no normal form: what the model was trained on."""
    import shutil

    other = tmp_path / "old"
    shutil.copytree(imported[0] / "r/onnx", other)
    manifest = json.loads((other / "manifest.json").read_text())
    del manifest["sha256"], manifest["prepared"]
    manifest["tokenizer"] = "crc32"
    (other / "manifest.json").write_text(json.dumps(manifest | {"sha256": data.digest(manifest)}))
    served = serve.Diagnoser(other, "cpu")
    assert (served.note("बुखार x", "") == tokenize(["बुखार x"], manifest["buckets"], manifest["positions"], earlier_words_of)[0]).all()
    assert earlier_words_of("बुखार") != words_of("बुखार")


RECORD = {"size": 48, "fit": "pad", "rgb": False, "na": [], "mask_words": [], "mask": "mark", "numbers": {}}


@pytest.mark.parametrize("change", [{"size": 3}, {"size": True}, {"fit": "wide"}, {"rgb": 1}, {"na": [""]}, {"na": [5]}, {"mask": "hide"}, {"mask_words": "covid"}, {"more": 1},
                                    {"numbers": {"labs": 5}}, {"numbers": {"labs": {"crp": {"decimal": ","}}}}, {"numbers": {"labs": {"crp": {"decimal": ";", "thousands": ""}}}}])
def test_a_record_that_no_import_writes_is_refused(tmp_path, change):
    check_record(RECORD)
    with pytest.raises(ValueError):
        check_record(RECORD | {"mask_words": ["\u00ad"]})
    with pytest.raises(ValueError):
        check_record(RECORD | change)
    study = phantoms(20, 0).select(("image", "note"))
    study.prepared = RECORD | change
    data.save_study(tmp_path / "s.npz", study)
    with pytest.raises(Refused, match="s.npz: key 'prepared'"):
        data.load_study(tmp_path / "s.npz")


WORDS = [("बुखार और खांसी", ["बुखार", "और", "खांसी"]), ("fie\u0300vre", ["fièvre"]), ("fièvre", ["fièvre"]), ("pneu\u00admonia", ["pneumonia"]), ("Straße", ["strasse"]),
         ("胸部X線", ["胸", "部", "x", "線"]), ("ไข้สูง", ["ไข้สูง"]), ("[MASK] fever [mask]", ["[mask]", "fever", "[mask]"]), ("zero\u200bwidth", ["zerowidth"]),
         ("38.5°C", ["38", "5", "c"]), ("ﬁbrosis", ["fibrosis"]), ("İstanbul", ["i̇stanbul"]), ("a_b-c", ["a_b", "c"]), ("heart ❤️", ["heart"]), ("한국어 열", ["한국어", "열"])]


@pytest.mark.parametrize("note,wanted", WORDS)
def test_words_in_any_script_and_form(note, wanted):
    assert words_of(note) == wanted == words_of(normal_form(note))


MASKS = [("COVID-19, Covid19 and noncovid", "covid", "[MASK], [MASK] and noncovid"), ("me\u0301ningite aiguë", "méningite", "[MASK] aiguë"), ("méningite", "me\u0301ningite", "[MASK]"),
         ("बुखार और खांसी", "बुखार", "[MASK] और खांसी"), ("pneu\u00admonia x", "pneumonia", "[MASK] x"), ("Straße", "STRASSE", "[MASK]"), ("ﬁbrosis", "fibrosis", "[MASK]"),
         ("lung  mass, lung-mass, lung\u00a0mass", "lung mass", "[MASK], [MASK], [MASK]"), ("COVID\u201319 seen", "covid", "[MASK] seen"), ("SARS\u2011CoV\u20112", "sars-cov-2", "[MASK]"),
         ("确诊新冠肺炎患者", "新冠", "确诊[MASK]肺炎患者"), ("コロナ陽性", "コロナ", "[MASK]陽性"), ("ground glass opacity", "ground glass", "[MASK] opacity"), ("x covid", "covid", "x [MASK]"), ("a.c abc", "a.c", "[MASK] abc")]


@pytest.mark.parametrize("note,word,wanted", MASKS)
def test_words_are_hidden_in_any_form(note, word, wanted):
    assert mask(note, [word]) == wanted and mask(wanted, [word]) == wanted
    assert mask(note, [word], "delete") == wanted.replace("[MASK]", "") and mask(note, []) == note


@pytest.mark.parametrize("text,marks,wanted", [("36,5", (",", ""), 36.5), ("1.234,5", (",", "."), 1234.5), ("9.100", (",", "."), 9100), ("850", (",", "."), 850), ("120_80", (".", ""), None),
                                               ("1e5", (".", ""), 1e5), ("inf", (".", ""), None), ("nan", (".", ""), None), ("1 234.5", (".", " "), 1234.5), ("12.34", (",", "."), None),
                                               ("0.850", (",", "."), None), ("36.5", (",", ""), None), ("0x10", (".", ""), None), ("1e40", (".", ""), None), ("-3", (".", ""), -3), ("1'234", (".", "'"), 1234)])
def test_numbers_by_the_marks_of_their_column(text, marks, wanted):
    assert number(text, *marks) == wanted


@pytest.mark.parametrize("text", ["", " ", "NaN", "None", "<NA>", "#N/A", "NaT", "unknown", "Not Available", "-", "?", ".", "N/A", "null", "\u2013", "\u2212", "(unknown)", "n/a.", "N.A.", "Not  available",
                                  "\uff2e\uff0f\uff21", "\u200b", "\\N"])
def test_spellings_of_missing_are_missing_everywhere(imported, text):
    assert says_nothing(text)
    served = serve.Diagnoser(imported[0] / "r/onnx", "cpu")
    assert served.note(text, "") is None and served.number("labs", "crp", text, "") is None
    study = phantoms(20, 0).select(("image", "note"))
    study.notes = np.array([text, *study.notes[1:]])
    study.patients = np.array([text, text, *(f"p{i}" for i in range(18))])
    data.save_study(imported[0] / "m.npz", study)
    read = data.load_study(imported[0] / "m.npz")
    assert read.notes[0] == "" and read.patients[0] == "" and len(np.unique(data.groups(read))) == 20


def test_ids_and_positions_that_words_need():
    notes = [f"word{i} other" for i in range(500)]
    assert buckets_for(notes) == 8192 and buckets_for(["a b"]) == 2048 and buckets_for([f"w{i}" for i in range(10**4)]) == 65536
    said = coverage(notes, 16, 2)
    assert said == "501 distinct on 16 ids, 501 share an id; 500 of 1,000 are cut at 2 positions"


def test_a_table_of_predictions_names_the_rows_of_its_file(imported, monkeypatch):
    monkeypatch.chdir(imported[0])
    study = phantoms(12, 3).select(("image", "note"))
    study.images[5], study.notes[5] = 0, "unknown"
    study.labels[:] = -1  # a file to predict on
    data.save_study(imported[0] / "holes.npz", study)
    serve_cli.main(["predict", "r/onnx", "--data", "holes.npz", "--out", "holes.csv"])
    rows = [line.split(",")[0] for line in (imported[0] / "holes.csv").read_text().splitlines()[1:]]
    assert rows == [str(i) for i in range(12) if i != 5]
