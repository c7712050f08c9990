"""Pictures and spreadsheets become study files: every kind of picture, what is missing, what is refused."""

import csv
import hashlib
import os
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import train_mora
import train_selora
from minilora import data, phantoms, serve, studies
from minilora.data import Refused

Image = pytest.importorskip("PIL.Image", reason="Pillow is in the pictures extra")
pytest.importorskip("pandas", reason="pandas is in the studies extra")


def drawing(high=40, wide=60):
    """uint8 [high,wide]: a ramp with a bright square in its upper left, so that turns and flips show."""
    picture = np.add.outer(np.arange(high), np.arange(wide)).astype(np.uint8)
    picture[4:14, 4:14] = 250
    return picture


def write_csv(folder, rows, header=("image", "note", "label", "patient"), name="s.csv", encoding="utf-8", delimiter=","):
    with open(folder / name, "w", newline="", encoding=encoding) as f:
        csv.writer(f, delimiter=delimiter).writerows([header, *rows])
    return folder / name


@pytest.fixture
def folder(tmp_path):
    """Twelve drawn pictures, p0.png to p11.png of two shapes, and a spreadsheet: (folder, rows)."""
    rng, rows = np.random.default_rng(0), []
    for i in range(12):
        noise = rng.integers(0, 40, (40, 60) if i % 2 else (50, 30))
        Image.fromarray((drawing(*noise.shape) // 2 + noise + i).astype(np.uint8)).save(tmp_path / f"p{i}.png")
        rows.append([f"p{i}.png", f"cough {i}", "sick" if i % 3 else "well", f"a{i // 2}"])
    return tmp_path, rows


def convert(tmp_path, *argv, out="o.npz"):
    studies.main(["from-csv", str(tmp_path / "s.csv"), "--out", str(tmp_path / out), *argv])
    return data.load_study(tmp_path / out, training=False)


# -------------------------------------------------------------------------------------------------------------- pictures


def test_every_kind_of_png_gives_the_same_picture(tmp_path):
    grey, kinds = drawing(), {}
    kinds["grey"] = Image.fromarray(grey)
    kinds["rgb"] = Image.fromarray(np.repeat(grey[..., None], 3, 2))
    kinds["palette"] = kinds["grey"].convert("P")
    kinds["alpha"] = Image.merge("LA", (kinds["grey"], Image.new("L", (60, 40), 255)))
    for name, picture in kinds.items():
        picture.save(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(studies.read_picture(tmp_path / f"{name}.png"), grey, err_msg=name)
    assert studies.read_picture(tmp_path / "rgb.png", rgb=True).shape == studies.read_picture(tmp_path / "grey.png", rgb=True).shape == (40, 60, 3)
    see_through = Image.merge("LA", (kinds["grey"], Image.fromarray(np.where(grey == 250, 0, 255).astype(np.uint8))))
    see_through.save(tmp_path / "hole.png")
    assert (studies.read_picture(tmp_path / "hole.png") == np.where(grey == 250, 0, grey)).all()  # over black


def test_16_bits_are_stretched_from_lowest_to_highest(tmp_path):
    deep = drawing().astype(np.uint16) * 16 + 1000  # 12 bits in 16, as scanners write
    Image.fromarray(deep).save(tmp_path / "deep.png")
    assert Image.open(tmp_path / "deep.png").mode.startswith("I")
    found = studies.read_picture(tmp_path / "deep.png")
    assert found.dtype == np.uint8 and (found.min(), found.max()) == (0, 255)
    np.testing.assert_array_equal(found, np.rint((deep - 1000) * (255 / 4000)).astype(np.uint8))
    assert studies.read_picture(tmp_path / "deep.png", rgb=True).shape == (40, 60, 3)


def test_exif_rotation_is_applied(tmp_path):
    picture, exif = Image.fromarray(drawing()), Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    picture.save(tmp_path / "turned.png", exif=exif)
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    np.testing.assert_array_equal(studies.read_picture(tmp_path / "turned.png"), np.rot90(drawing(), -1))
    assert abs(studies.read_picture(tmp_path / "turned.jpg").astype(int) - np.rot90(drawing(), -1)).mean() < 3


def test_what_is_no_single_picture_is_refused(tmp_path, monkeypatch):
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(Refused, match="text.png: not a readable picture"):
        studies.read_picture(tmp_path / "text.png")
    frames = [Image.fromarray(drawing() + i) for i in range(3)]
    frames[0].save(tmp_path / "three.tiff", save_all=True, append_images=frames[1:])
    with pytest.raises(Refused, match="three.tiff: has 3 frames; need one"):
        studies.read_picture(tmp_path / "three.tiff")
    Image.new("1", (10_000, 9_000)).save(tmp_path / "bomb.png")  # 90 megapixels in some kilobytes
    with pytest.raises(Refused, match="bomb.png: not a readable picture .*90000000 pixels.*limit"):
        studies.read_picture(tmp_path / "bomb.png")
    Image.new("1", (20_000, 15_000)).save(tmp_path / "bomb.png")  # 300
    with pytest.raises(Refused, match="bomb.png: not a readable picture .*300000000 pixels"):
        studies.read_picture(tmp_path / "bomb.png")
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(Refused, match=r"needs PIL: pip install 'minilora\[pictures\]'"):
        studies.read_picture(tmp_path / "three.tiff")


def write_dicom(path, values, kind="MONOCHROME2", bits=12, **tags):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    file = pydicom.Dataset()
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    file.file_meta.MediaStorageSOPClassUID = file.SOPClassUID = pydicom.uid.SecondaryCaptureImageStorage
    file.file_meta.MediaStorageSOPInstanceUID = file.SOPInstanceUID = "1.2.3"
    file.Rows, file.Columns = values.shape[-3:-1] if kind == "RGB" else values.shape[-2:]
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 3 if kind == "RGB" else 1, kind, int(values.dtype.kind == "i")
    file.BitsAllocated, file.BitsStored, file.HighBit = 8 * values.itemsize, bits, bits - 1
    if kind == "RGB":
        file.PlanarConfiguration = 0
    for name, value in tags.items():
        setattr(file, name, value)
    file.PixelData = values.tobytes()
    file.save_as(path, enforce_file_format=True)
    return path


def test_dicom_window_rescale_and_inverted_greys(tmp_path):
    stored = drawing().astype(np.uint16) * 10  # 40 .. 2500
    plain = studies.read_picture(write_dicom(tmp_path / "a.dcm", stored))
    np.testing.assert_array_equal(plain, np.rint((stored - stored.min()) * (255 / (2500 - stored.min()))).astype(np.uint8))
    inverted = studies.read_picture(write_dicom(tmp_path / "b.dcm", stored, "MONOCHROME1"))
    np.testing.assert_array_equal(inverted, 255 - plain)
    window = dict(RescaleSlope="2", RescaleIntercept="-100", WindowCenter="500", WindowWidth="401")
    found = studies.read_picture(write_dicom(tmp_path / "no suffix", stored, **window)).astype(float)
    ramp = np.clip((stored * 2.0 - 100 - 499.5) / 400 + 0.5, 0, 1) * 255  # PS3.3 C.11.2.1.2.1
    assert abs(found - ramp).max() <= 0.51 and {0.0, 255.0} <= set(found.ravel())
    several = studies.read_picture(write_dicom(tmp_path / "c.dcm", stored, **(window | {"WindowCenter": ["500", "900"], "WindowWidth": ["401", "50"]})))
    np.testing.assert_array_equal(several, found)  # the first of them
    half = studies.read_picture(write_dicom(tmp_path / "h.dcm", stored, WindowWidth="401"))  # a width without a centre is no window
    np.testing.assert_array_equal(half, plain)
    signed, edge = drawing().astype(np.int16) - 300, drawing().astype(np.int16) - 300
    edge[:, :3] = -2000  # what lies outside of the beam
    padded = studies.read_picture(write_dicom(tmp_path / "d.dcm", edge, bits=16, PixelPaddingValue=-2000))
    assert (padded[:, :3] == 0).all() and padded[:, 3:].max() == 255 and np.median(padded[:, 3:]) > 20
    assert signed[:, 3:].min() < 0
    rgb = np.stack([drawing(), drawing() // 2, drawing() // 4], 2)
    path = write_dicom(tmp_path / "e.dcm", rgb, "RGB", bits=8)
    np.testing.assert_array_equal(studies.read_picture(path, rgb=True), rgb)
    np.testing.assert_array_equal(studies.read_picture(path), np.asarray(Image.fromarray(rgb).convert("L")))


def test_dicom_of_three_frames_is_refused(tmp_path, folder):
    path = write_dicom(tmp_path / "three.dcm", np.repeat(drawing()[None].astype(np.uint16), 3, 0), NumberOfFrames=3)
    with pytest.raises(Refused, match="three.dcm: has 3 frames; need one"):
        studies.read_picture(path)
    (tmp_path / "cut.dcm").write_bytes(path.read_bytes()[:300])
    with pytest.raises(Refused, match="cut.dcm: not a readable DICOM file"):
        studies.read_picture(tmp_path / "cut.dcm")
    huge = write_dicom(tmp_path / "huge.dcm", drawing().astype(np.uint16))
    pydicom = __import__("pydicom")
    file = pydicom.dcmread(huge)
    file.Rows, file.Columns = 20_000, 15_000
    file.save_as(huge)
    with pytest.raises(Refused, match="huge.dcm: has 300000000 pixels; the limit is 89478485"):
        studies.read_picture(huge)


# ----------------------------------------------------------------------------------------------------------- spreadsheet


def test_imported_arrays_are_the_same_on_every_machine(folder):
    tmp_path, rows = folder
    write_csv(tmp_path, rows)
    for fit, wanted in (("squeeze", "dedcff9d2580de69"), ("crop", "fc402ab10f00349b"), ("pad", "0242d9c3066fea2f")):
        s = convert(tmp_path, "--size", "16", "--fit", fit, out=f"{fit}.npz")
        assert s.images.shape == (12, 16, 16) and s.fit == fit
        assert hashlib.sha256(s.images.tobytes()).hexdigest()[:16] == wanted, fit


def test_crop_and_pad_keep_proportions():
    wide = drawing(20, 40)[None]
    assert (data.square(wide, "crop") == wide[:, :, 10:30]).all()
    padded = data.square(wide, "pad")
    assert padded.shape == (1, 40, 40) and (padded[:, 10:30] == wide).all() and not padded[:, :10].any() and not padded[:, 30:].any()
    tall = drawing(41, 20)[None]
    assert (data.square(tall, "crop") == tall[:, 10:30]).all() and data.square(tall, "pad").shape == (1, 41, 41)
    assert data.square(wide, "squeeze") is wide


def test_what_is_missing_is_counted_and_left_out_of_the_images(folder, capsys):
    tmp_path, rows = folder
    (tmp_path / "broken.png").write_text("x")
    Image.new("L", (9, 9), 77).save(tmp_path / "flat.png")
    rows += [["", "only words", "sick", "b"], ["gone.png", "words", "well", "c"], ["broken.png", "words", "well", "d"], ["flat.png", "words", "well", ""],
             ["p1", "", "sick", "e"], ["p1.png", "nan", "", "e"], ["", "", "sick", "f"], rows[0]]  # fmt: skip
    write_csv(tmp_path, [[*r, i, "" if i % 4 else "37,5"] for i, r in enumerate(rows[:-1])] + [[*rows[0], 0, "37,5"]], ("image", "note", "label", "patient", "age", "temperature"))
    s = convert(tmp_path, "--numeric", "vitals=temperature", "labs=age")
    said = capsys.readouterr().out
    assert "left out   1 rows that repeat" in said
    assert "12 read, 30x50 to 60x40 pixels; missing: 2 cells empty, 1 files not there (gone.png), 2 not readable" in said
    assert "broken.png: not a readable picture" in said and "flat.png: one grey level throughout" in said
    assert "numbers    temperature '37,5' is 37.5; if not, use --decimal" in said and s.numeric["vitals"][0] == np.float32(37.5)
    assert s.modalities == ("image", "note", "vitals", "labs") and len(s) == 19 and not s.numeric["vitals"].ravel()[0] == 0
    have = s.have()
    assert have[:12, 0].all() and not have[12:16, 0].any() and have[16:18, 0].all() and not have[16:, 1].any() and have[::4, 2].all() and have[:, 2].sum() == 5 and have[:, 3].all()
    assert "labels     sick 11, well 7; 1 unlabelled" in said and "patients   11, largest group 2 samples; 1 samples name no patient" in said
    bare = convert(tmp_path, out="bare.npz")
    assert bare.lines.tolist() == [*range(2, 20)] and s.lines.tolist() == [*range(2, 21)]
    assert len(bare) == 18 and "left out   1 rows without a picture, words or numbers, in lines (20)" in capsys.readouterr().out
    s.images[12:14] = 0
    groups = data.groups(s)
    assert groups[12] != groups[13]  # two missing images are not the same image


def test_notes_are_masked_and_leakage_is_counted(folder, capsys):
    tmp_path, rows = folder
    notes = ["Sick since COVID-19; covid19 test", "well and sick", "covidien tube, not ill", "plain"]
    write_csv(tmp_path, [[r[0], notes[i % 4], r[2], r[3]] for i, r in enumerate(rows)])
    s = convert(tmp_path)
    assert "leakage    'sick' in 6 notes (4 of that class), 'well' in 3 notes (1 of that class)" in capsys.readouterr().out
    s = convert(tmp_path, "--mask-words", "covid, sick", out="m.npz")
    assert s.notes[0] == "[MASK] since [MASK]; [MASK] test" and s.notes[2] == "[MASK] tube, not ill" and s.notes[3] == "plain"
    said = capsys.readouterr().out
    assert "masked     words in 9 notes" in said and "'sick'" not in said


def test_several_label_columns_are_findings(folder, capsys):
    tmp_path, rows = folder
    write_csv(tmp_path, [[r[0], i % 2, "" if i == 3 else float(i % 3 == 0)] for i, r in enumerate(rows)], ("image", "edema", "mass"))
    s = convert(tmp_path, "--label-column", "edema,mass")
    output = capsys.readouterr().out
    assert "; no column 'note' (--note-column); no column 'patient' (--patient-column)" in output
    assert "patients   no column names them: samples of one patient may be in the training and in the test split" in output
    assert s.multilabel and s.class_names == ["edema", "mass"] and list(s.labels[3]) == [1, -1] and list(s.labels[0]) == [0, 1]


def test_labels_as_numbers_and_none_at_all(folder):
    tmp_path, rows = folder
    write_csv(tmp_path, [[r[0], f"{10 - i % 2}.0"] for i, r in enumerate(rows)], ("image", "grade"))
    s = convert(tmp_path, "--label-column", "grade")
    assert s.class_names == ["9", "10"] and list(s.labels[:2]) == [1, 0]  # in the order of numbers, not of letters
    s = convert(tmp_path, "--label-column", "", out="bare.npz")
    assert "labels" not in data.read_npz(tmp_path / "bare.npz") and not s.labelled.any()


def test_encodings_and_delimiters_are_said(folder, capsys):
    tmp_path, rows = folder
    rows[0][1] = "fièvre, toux"
    for encoding, delimiter, words in (("utf-8", ";", "utf-8, semicolons"), ("cp1252", ",", "windows-1252"), ("utf-16", "\t", "utf-16, tabs"), ("utf-8-sig", ",", "rows, utf-8")):
        write_csv(tmp_path, rows, encoding=encoding, delimiter=delimiter)
        assert convert(tmp_path, out=f"{encoding}.npz").notes[0] == "fièvre, toux"
        assert words in capsys.readouterr().out
    write_csv(tmp_path, rows, encoding="utf-8-sig")
    assert convert(tmp_path, "--encoding", "utf-8", out="bom.npz").images is not None
    write_csv(tmp_path, rows, encoding="cp1252")
    assert convert(tmp_path, "--encoding", "cp437", out="o.npz").notes[0] != "fièvre, toux"


def test_the_public_collection_by_the_page_of_the_docs(tmp_path, monkeypatch, capsys):
    clone = tmp_path / "covid-chestxray-dataset"
    (clone / "images").mkdir(parents=True)
    header = ["patientid", "offset", "sex", "age", "finding", "temperature", "pO2 saturation", "view", "modality", "filename", "clinical notes"]
    rows = []
    for i in range(14):
        Image.fromarray(drawing() + np.uint8(i)).save(clone / "images" / f"x{i}.png")
        finding = ["Pneumonia/Viral/COVID-19", "Pneumonia/Bacterial", "todo"][0 if i < 6 else 1 if i < 13 else 2]
        rows.append([i // 2, i, "MF"[i % 2], 50 + i, finding, "" if i else 38.5, "", "PA", "X-ray", f"x{i}.png", "Patient with COVID-19 pneumonia, fever"])
    rows.append([99, 0, "F", 50, "COVID-19", "", "", "Axial", "CT", "x0.png", ""])
    write_csv(clone, rows, header, "metadata.csv")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "covid_chestxray.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    words = shlex.split(re.search(r"```\n(python -m .*?)```", page, re.S)[1].replace("\\\n", " "))
    assert words[:3] == ["python", "-m", "minilora.studies"]
    studies.main([*words[3:], "--size", "16"])
    assert "left out   1 that are no X-rays: CT Axial 1" in capsys.readouterr().out
    s = data.load_study(tmp_path / "covid.npz")
    assert len(s) == 14 and s.class_names == ["COVID-19", "other"] and [int((s.labels == k).sum()) for k in (0, 1, -1)] == [6, 7, 1]
    assert s.notes[0] == "Patient with [MASK] [MASK], fever" and s.columns["tabular"][1] == "sex_male"
    np.testing.assert_array_equal(s.numeric["tabular"][:2], np.array([[50, 1, 0, 38.5, np.nan], [51, 0, 1, np.nan, np.nan]], np.float32))


def test_bad_spreadsheets_are_refused_in_one_line(folder, refused):
    tmp_path, rows = folder

    def said(rows, *argv, header=("image", "note", "label", "patient"), **how):
        write_csv(tmp_path, rows, header, **how)
        return refused(studies.main, "from-csv", "s.csv", "--out", "o.npz", *argv)

    assert "s.csv: has no column 'dx' (--label-column); it has image, note, label, patient" in said(rows, "--label-column", "dx")
    assert "--images .: s.csv has no column 'image'; name the column of the pictures with --image-column; it has file, label" in said(
        [[r[0], r[2]] for r in rows], "--images", ".", header=("file", "label"))
    assert "no column 'age' (--numeric)" in said(rows, "--numeric", "age")
    assert "no column 'label' (--label-column)" in said([r[:2] for r in rows], header=("image", "note"))
    assert "none of 12 pictures is readable; the first: " in said(rows, "--images", tmp_path / "nowhere")
    assert "label column 'label' is '0.5' in line 3; labels are class names or whole numbers" in said([[r[0], r[1], i / 2, ""] for i, r in enumerate(rows)])
    assert "has 1 classes (sick); need two or more" in said([[*r[:2], "sick", ""] for r in rows])
    assert "is 'maybe' in line 2; a finding is 0, 1, -1 (uncertain) or empty" in said([[r[0], "maybe", 1, ""] for r in rows], "--label-column", "note,label")
    many = [["", f"note {i}", f"kind {i}", ""] for i in range(60)]
    assert "has 60 different values in 60 rows; the limit is 30 classes" in said(many)
    assert "two columns are called 'note'" in said(rows, header=("image", "note", "note", "label"))
    assert "line 2 has 5 cells; the header has 4" in said([[*rows[0], "x"]])
    assert "has no rows" in said([])
    assert "no row has a picture" in said([["", "", "sick", ""], ["", "", "well", ""]])
    assert "'any' cannot be a modality's name" in said(rows, "--numeric", "any=patient")
    assert "--numeric patient,,patient: must name at least one column, and none twice" in said(rows, "--numeric", "patient,,patient")
    assert "--numeric labs=: must name at least one" in said(rows, "--numeric", "labs=")
    assert "encoding 'klingon' is not known" in said(rows, "--encoding", "klingon")
    assert "is not utf-8" in said([["", "fièvre", "well", ""], *rows], "--encoding", "utf-8", encoding="cp1252")
    assert "--size is 2" in said(rows, "--size", "2")
    assert "no such file" in refused(studies.main, "from-csv", "absent.csv")
    assert ".: no such file" in refused(studies.main, "from-csv", ".")
    assert "s.csv: not an .npz archive" in refused(studies.main, "inspect", "s.csv")
    (tmp_path / "o.npz").write_bytes(b"mine")
    assert "o.npz: exists already" in said(rows)
    assert (tmp_path / "o.npz").read_bytes() == b"mine"
    assert "no such file" in refused(studies.main, "inspect", "absent.npz")


LEAVING = ["../x.png", "../x", "../gone.png", "sub/../../x.png", "..", "/", "OUT", "..\\x.png", "sub\\..\\..\\x.png", "\\x.png", "\\\\server\\share\\x.png",
           "C:\\x.png", "c:x.png", "D:/x.png", "link.png", "link", "way/x.png", "way/gone.png", "in/../x.png"]  # fmt: skip


@pytest.mark.skipif(os.name == "nt", reason="links need rights there")
@pytest.mark.parametrize("cell", LEAVING)
def test_pictures_outside_of_their_folder_are_refused_by_line(cell, folder, refused):
    tmp_path, rows = folder
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for path in tmp_path.glob("p*.png"):
        path.rename(pictures / path.name)
    Image.fromarray(drawing()).save(tmp_path / "x.png")
    (pictures / "link.png").symlink_to(tmp_path / "x.png")
    (pictures / "way").symlink_to(tmp_path)
    (pictures / "in").symlink_to(tmp_path / "out/of/it")
    (tmp_path / "out/of/it").mkdir(parents=True)
    Image.fromarray(drawing()).save(tmp_path / "out/of/x.png")  # where in/../x.png leads
    cell = cell.replace("OUT", str(tmp_path / "x.png"))
    write_csv(tmp_path, [*rows[:3], [cell, "fever", "sick", "b"], *rows[3:]])
    said = refused(studies.main, "from-csv", "s.csv", "--images", "pictures", "--out", "o.npz")
    assert said.startswith(f"error: image column 'image' is '{cell}' in line 5: ") and "is outside of the picture folder pictures; put the picture into it, or give --images" in said


def test_subfolders_links_and_whole_paths_inside_the_folder_stay(folder, capsys):
    tmp_path, rows = folder
    pictures = tmp_path / "pictures"
    (pictures / "sub").mkdir(parents=True)
    for path in tmp_path.glob("p*.png"):
        path.rename(pictures / "sub" / path.name)
    cells = [f"sub/p{i}" for i in range(12)]
    write_csv(tmp_path, [[cell, *row[1:]] for cell, row in zip(cells, rows)])
    plain = convert(tmp_path, "--images", str(pictures), out="plain.npz")
    (pictures / "link.png").symlink_to(pictures / "sub/p0.png")
    (pictures / "way").symlink_to(pictures / "sub")
    (tmp_path / "folder").symlink_to(pictures)  # the folder itself is given as a link
    cells[:5] = ["link.png", "way/p1.png", str(pictures / "sub/p2.png"), "sub/../sub/p3.png", "./sub/../way/p4"]
    write_csv(tmp_path, [[cell, *row[1:]] for cell, row in zip(cells, rows)])
    np.testing.assert_array_equal(convert(tmp_path, "--images", str(tmp_path / "folder"), out="o.npz").images, plain.images)
    odd = ["..x.png", "...", "a\0b.png", "sub\\p0.png", "http://x.org/x.png"]  # inside, and not there
    write_csv(tmp_path, [[cell, *row[1:]] for cell, row in zip(odd + cells[5:], rows)])
    capsys.readouterr()
    convert(tmp_path, "--images", str(pictures), out="odd.npz")
    said = capsys.readouterr().out
    assert "4 files not there" in said and "missing    image: ... 1" in said


@pytest.mark.pictures
def test_inspect_describes_and_draws_a_sheet(folder, capsys, monkeypatch):
    pytest.importorskip("matplotlib", reason="matplotlib is in the pictures extra")
    tmp_path, rows = folder
    write_csv(tmp_path, [[r[0], "a $price$ note", *r[2:]] for r in rows])
    convert(tmp_path)
    capsys.readouterr()
    studies.main(["inspect", str(tmp_path / "o.npz")])
    said = capsys.readouterr().out
    assert "samples    12" in said and "split      train" in said and f"sheet: {tmp_path / 'o.png'}" in said
    with Image.open(tmp_path / "o.png") as sheet:
        assert sheet.width > sheet.height > 200
    data.save_study(tmp_path / "words.npz", phantoms.phantoms(40, 0).select(("note", "labs")))
    studies.main(["inspect", str(tmp_path / "words.npz")])
    assert "labs       age: " in capsys.readouterr().out and not (tmp_path / "words.png").exists()


def test_phantoms_are_written_to_a_file_that_both_scripts_read(tmp_path, monkeypatch, capsys):
    from conftest import TINY

    from minilora import task

    monkeypatch.chdir(tmp_path)
    drawn = {"usual": phantoms.phantoms(150, 2), "image": None, "both": None}
    for fact in drawn:
        for file in (fact, "again"):
            studies.main(["phantoms", "--out", f"{file}.npz", "--samples", "150", "--fact", fact])
        said = capsys.readouterr().out
        assert "samples    150, synthetic" in said and f"{fact}.npz: written; synthetic data, drawn by a program" in said
        assert (tmp_path / f"{fact}.npz").read_bytes() == (tmp_path / "again.npz").read_bytes()
        (tmp_path / "again.npz").unlink()
        read = data.load_study(f"{fact}.npz")
        wanted = phantoms.phantoms(150, 2, **phantoms.FACTS[fact])
        assert read.synthetic and read.class_names == phantoms.DIAGNOSES and read.report == (f"phantoms of the target domain, seed 2, fact {fact}",)
        assert read.modalities == (("image", "note", "vitals", "labs") if fact == "usual" else ("image", "note"))
        assert (read.images == wanted.images).all() and (read.notes == wanted.notes).all() and (read.labels == wanted.labels).all()
        mora = task.read_target(train_mora.Config(data=tmp_path / f"{fact}.npz"))
        selora, drawable = task.read_studies(train_selora.Config(data=tmp_path / f"{fact}.npz", phantoms=60))
        assert len(mora) == len(selora["target"]) == len(drawable) == 150 and mora.synthetic and selora["target"].synthetic
    studies.main(["phantoms", "--out", "source.npz", "--samples", "150", "--domain", "source", "--seed", "5", "--size", "24"])
    source = data.load_study("source.npz")
    assert {*source.labels.tolist()} == {0, 2, 3} and source.class_names == phantoms.DIAGNOSES and source.images.shape == (150, 24, 24)
    train_mora.main([*TINY, "--data", "image.npz", "--source", "source.npz", "--out", "run", "--methods", "mora", "--missing", "label:0.7", "--test-missing", "any:0.7"])
    split, study = data.read_npz("run/split-s0.npz"), data.load_study("image.npz")
    assert np.array_equal(split["present label:0.7"], data.missing_table(study.have(), study.modalities, "label:0.7", 0, study.labels))
    assert '"synthetic": true' in (tmp_path / "run/metrics.json").read_text()


@pytest.mark.parametrize("argv,words", [(["--out", "p.csv"], "--out p.csv: must end in .npz"), (["--out", "there.npz"], "exists already"), (["--samples", "0"], "--samples is 0; must be in 1..1000000"),
                                        (["--size", "7"], "--size is 7; must be in 8..256"), (["--seed", "-1"], "--seed is -1"), (["--samples", "1"], "labels hold one class only"),
                                        (["--samples", "4000", "--size", "128"], "--samples 4000 of --size 128 have 65,536,000 pixels; at most 33,554,432")])  # fmt: skip
def test_phantoms_that_cannot_be_written_are_refused(argv, words, refused, tmp_path):
    (tmp_path / "there.npz").write_bytes(b"mine")
    assert words in refused(studies.main, "phantoms", *argv)


# ------------------------------------------------------------------------------------------- a study with missing images


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """A study of which a third lacks its image, of which the fit is `pad`, and which names lines of a spreadsheet."""
    s = phantoms.phantoms(150, 4, size=32).select(("image", "note"))
    s.images[::3] = 0
    s.fit = "pad"
    s.lines = np.arange(150) * 2 + 5
    path = tmp_path_factory.mktemp("half") / "half.npz"
    data.save_study(path, s)
    return path


def test_mora_trains_and_serves_a_study_with_missing_images(half, tmp_path, monkeypatch, capsys):
    from conftest import TINY

    import export

    monkeypatch.chdir(tmp_path)
    train_mora.main([*TINY, "--data", str(half), "--out", "run", "--methods", "mora"])
    table = data.read_npz(tmp_path / "run" / "split-s0.npz")
    present = table["present both:0.7"] if "present both:0.7" in table else table[next(k for k in table if k.startswith("present "))]
    assert not present[::3, 0].any() and present[::3, 1].all()
    export.main(["mora", "run"])
    diagnoser = serve.Diagnoser("run/onnx", "cpu")
    assert diagnoser.manifest["fit"] == "pad"
    black, words = np.zeros((32, 32), np.uint8), ["fever"]
    np.testing.assert_array_equal(diagnoser.predict([black], words), diagnoser.predict([None], words))
    wide = drawing(20, 40)
    np.testing.assert_array_equal(diagnoser.predict([wide], words), diagnoser.predict([data.square(wide[None], "pad")[0]], words))
    with pytest.raises(Refused, match="sample 0 has nothing"):
        diagnoser.predict([black])
    export.main(["predict", "run/onnx", "--data", str(half), "--split", "run/split-s0.npz", "--out", "p.csv"])
    header, *lines = csv.reader((tmp_path / "p.csv").read_text().splitlines())
    assert header[:3] == ["row", "line", "present"]
    assert [int(line[1]) for line in lines] == [2 * int(line[0]) + 5 for line in lines]


def test_selora_leaves_out_samples_without_their_image(half, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    train_selora.main(["--data", str(half), "--out", "run", "--seeds", "1", "--steps", "4", "--every", "2", "--vae-steps", "4", "--pretrain-steps", "4", "--phantoms", "150",
                       "--width", "8", "--text-width", "8", "--heads", "1", "--batch", "8", "--device", "cpu", "--lr", "0.01", "full:0.001",
                       "--image-size", "16"])  # fmt: skip
    said = capsys.readouterr().out
    assert "left out: 50 samples of the target that lack their image" in said
    assert "images: 32x32 pixels in the file, resized to 16x16; --image-size sets another size" in said
    split = data.read_npz(tmp_path / "run" / "split-s0.npz")
    assert f"seed 0: pairs to train {len(split['train'])}, val {len(split['val'])}, test {len(split['test'])}" in said
    rows = np.concatenate([*split.values()])
    assert len(rows) == 100 and (rows % 3 > 0).all()
