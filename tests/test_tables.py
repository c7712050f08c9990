"""Tables as hospitals write them: kind x member -> the right cell, number, label or refusal. Each test writes its file."""

import json
import sys
from datetime import date, datetime
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from minilora import data, prepare, studies, tables
from minilora.data import Refused

pytest.importorskip("pandas", reason="pandas is in the studies extra")


def write(folder, content, name="t.csv"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def column_file(folder, columns, delimiter=","):
    """A file of {name: cells}; every cell is quoted."""
    lines = [columns.keys(), *zip(*columns.values())]
    return write(folder, "".join(delimiter.join(f'"{cell}"' for cell in line) + "\n" for line in lines))


def convert(path, **flags):
    """(study, report) of a file, as `from-csv` makes them, and as its study file gives them back."""
    study, report = studies.from_csv(studies.FromCsv(path, **flags))
    data.save_study(path.with_suffix(".npz"), study)
    again = data.load_study(path.with_suffix(".npz"), training=False)
    assert again.prepared == study.prepared and json.loads(json.dumps(study.prepared)) == study.prepared
    np.testing.assert_array_equal(again.labels, study.labels)
    return study, "\n".join([*report, *studies.describe(study)])


# --------------------------------------------------------------------------------------------------------------- reading

ROW = "fever, dry cough"
READ = {
    "commas": 'note,age\n"fever, dry cough",36\n',
    "semicolons": "note;age\nfever, dry cough;36\n",
    "tabs": "note\tage\nfever, dry cough\t36\n",
    "bars": "note|age\nfever, dry cough|36\n",
    "sep line": "sep=;\nnote;age\nfever, dry cough;36\n",
    "sep line in quotes, Windows": '"sep=;"\r\nnote;age\r\nfever, dry cough;36\r\n',
    "sep line against the header": 'sep=;\n"note";"age"\nfever, dry cough;36\n',
    "trailing delimiters everywhere": "note;age;\nfever, dry cough;36;\n",
    "trailing delimiters in rows alone": "note;age\nfever, dry cough;36;;\n",
    "trailing delimiters in the header alone": "note;age;;\nfever, dry cough;36\n",
    "quoted delimiters in the header": '"note","a,b,c,d",age,"x;y;z;w;v"\n"fever, dry cough",0,36,0\n',
    "more semicolons than commas inside quotes": '"note",age,";;;;"\n"fever, dry cough",36,1\n',
    "quoted line break in the header": '"the\nnote",note,age\n0,"fever, dry cough",36\n',
    "a comma in the header of tabs": "note, first\tnote\tage\n-\tfever, dry cough\t36\n",
    "as many commas as semicolons": "note;a, b;age, years;age\nfever, dry cough;;;36\n",
    "empty lines": '\n\nnote,age\n\n"fever, dry cough",36\n,\n \n',
    "spaces around": 'note , age\n"fever, dry cough ", 36 \n',
    "no end of line": 'note,age\n"fever, dry cough",36',
    "old Macintosh lines": 'note,age\r"fever, dry cough",36\r',
    "unnamed first column": ',note,age\n0,"fever, dry cough",36\n',
    "byte order mark": '\ufeffnote,age\n"fever, dry cough",36\n',
    "UTF-16": 'note;age\nfever, dry cough;36\n'.encode("utf-16"),
}


@pytest.mark.parametrize("kind", READ)
def test_every_way_to_delimit_gives_the_same_cells(kind, tmp_path):
    table = tables.read_table(write(tmp_path, READ[kind]))
    assert len(table) == 1 and list(table.cells["note"]) == [ROW] and list(table.cells["age"]) == ["36"]


def test_line_numbers_are_those_of_the_file(tmp_path):
    table = tables.read_table(write(tmp_path, 'sep=,\nnote,age\n"two\nlines",1\n\n"three\r\n\r\nlines",2\nx,3\n'))
    assert table.lines == [3, 6, 9] and list(table.cells["note"]) == ["two\nlines", "three\r\n\r\nlines", "x"]


def test_no_cell_is_taken_for_something_else(tmp_path):
    cells = ["007", "1e5", "NA", "true", "2020-01-02", "1_000", "None", "0x10", "inf"]
    assert list(tables.read_table(column_file(tmp_path, {"a": cells, "b": cells})).cells["a"]) == cells


REFUSED = {
    "short row": ("a,b,c\n1,2,3\n1,2\n", r"line 3 has 2 cells; the header has 3"),
    "long row": ("a,b\n1,2,3\n1,2\n", r"line 2 has 3 cells; the header has 2"),
    "line breaks without quotes": ("a,b,c\n1,2,3\nx\ny,2,3\n1,2,3\nx\ny,2,3\n", r"line 3 has 1 cells; the header has 3; 2 such rows, in lines \(3, 6\); .*needs quotes"),
    "comma without quotes before an empty cell": ("a,b,c\n1,2,3\nfever, cough,2,\n", r"line 3 has 4 cells"),
    "rows as wide as each other, not as the header": ("a,b\n1,2,3\n1,2,3\n", r"line 2 has 3 cells"),
    "row too short beside trailing delimiters": ("a;b\n1;2;\n1;2;\n1;2\n", r"line 4 has 2 cells; the header has 2, most rows 3"),
    "quote that never ends": ('a,b\n1,"2\n3,4\n', r"line 2: unexpected end of data"),
    "text after a quote": ('a,b\n1,"2" x\n', r"line 2: ',' expected"),
    "column twice": ("a,b,a\n1,2,3\n", r"two columns are called 'a'"),
    "header alone": ("a,b\n\n", r"has no rows"),
    "nothing": ("", r"has no rows"),
    "sep line of another mark": ("sep=#\na#b\n1#2\n", r"line 1 names '#' as the delimiter"),
    "UTF-16 without a mark": ("a,b\n1,2\n".encode("utf-16-le"), r"holds zero bytes .*utf-16-le"),
    "JSON": ('[{"a": 1}]', r"is JSON; only text \(.csv\) and .xlsx are read"),
    "HTML": ("<html><table>", r"is HTML"),
    "old Excel": (b"\xd0\xcf\x11\xe0\xa1\xb1" + bytes(600), r"is an old or protected workbook"),
    "Parquet": (b"PAR1\x15\x04", r"is Parquet"),
    "gzip": (b"\x1f\x8b\x08", r"is gzip"),
    "cut workbook": (b"PK\x03\x04" + bytes(90), r"not a readable workbook"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_shift_cells_is_refused_by_line(kind, tmp_path):
    content, message = REFUSED[kind]
    with pytest.raises(Refused, match=message):
        tables.read_table(write(tmp_path, content))


@pytest.mark.parametrize("suffix", [".xls", ".ods", ".json", ".parquet", ".sav", ".feather"])
def test_other_formats_are_named(suffix, tmp_path):
    with pytest.raises(Refused, match=rf"is {suffix}; only text"):
        tables.read_table(write(tmp_path, "a,b\n1,2\n", f"t{suffix}"))
    with pytest.raises(Refused, match="not the workbook that its name says"):
        tables.read_table(write(tmp_path, "a,b\n1,2\n", "t.xlsx"))


def workbook(folder, rows, *more):
    openpyxl = pytest.importorskip("openpyxl", reason="openpyxl is in the studies extra")
    book = openpyxl.Workbook()
    book.active.title = "studies"
    for row in rows:
        book.active.append(row)
    for title in more:
        book.create_sheet(title).append(["other"])
    book.save(folder / "t.xlsx")
    return folder / "t.xlsx"


def test_a_workbook_reads_as_a_person_sees_it(tmp_path):
    header = ["note", "day", "at", "smokes", "age", "crp", "id", "empty"]
    rows = [header, ["fever", date(2020, 1, 2), datetime(2020, 1, 2, 3, 4), True, 37.0, 36.6, "007", None], [], ["x", None, None, False, 0.1 + 0.2, 9.125, 8, None]]
    table = tables.read_table(workbook(tmp_path, rows, "second"))
    assert "2 rows, sheet 'studies', the first of 2" in table.origin and table.lines == [2, 4]
    cells = table.cells.to_numpy().tolist()
    assert cells[0] == ["fever", "2020-01-02", "2020-01-02 03:04:00", "TRUE", "37", "36.6", "007", ""]
    assert cells[1] == ["x", "", "", "FALSE", "0.3", "9.125", "8", ""]
    with pytest.raises(Refused, match="line 3 has 3 cells; the header has 2"):
        tables.read_table(workbook(tmp_path, [["a", "b"], [1, 2], [1, 2, 3], [1, 2]]))
    with pytest.raises(Refused, match="has no rows"):
        tables.read_table(workbook(tmp_path, []))


def test_numbers_of_a_workbook_have_decimal_points_and_its_texts_their_own(tmp_path):
    rows = [["label", "crp", "typed", "leuko"], *[["ab"[i % 2], 9 + i / 8 + 0.001, f"36,{i}", f"9.{i}00"] for i in range(8)], ["a", 850, "37,5", "850"]]
    study, report = convert(workbook(tmp_path, rows), numeric=("crp,typed,leuko",))
    np.testing.assert_allclose(study.numeric["tabular"][[0, 8]], [[9.001, 36, 9000], [850, 37.5, 850]], rtol=1e-6)
    assert "typed '36,0' is 36, leuko '9.000' is 9000" in report


@pytest.mark.parametrize("library,name", [("pandas", "t.csv"), ("openpyxl", "t.xlsx")])
def test_a_missing_extra_is_one_line(library, name, tmp_path, monkeypatch):
    path = workbook(tmp_path, [["a", "b"], [1, 2]]) if name == "t.xlsx" else write(tmp_path, "a,b\n1,2\n")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(Refused, match=rf"{name}: reading it needs {library}: pip install 'minilora\[studies\]'"):
        tables.read_table(path)


def test_rows_are_repeats_only_if_every_cell_is_equal(tmp_path):
    path = write(tmp_path, "note,label,visit\ncough,a,1\ncough,a,2\ncough,a,2\nfever,b,1\n")
    study, report = convert(path)
    assert len(study) == 3 and "left out   1 rows that repeat an earlier one in every cell" in report


# --------------------------------------------------------------------------------------------------------------- missing

SPELLINGS = ["", "NA", "n/a", "nan", "NaN", "NULL", "None", "<NA>", "#N/A", "NaT", "unknown", "Unknown", "not available", "-", "--", "?", ".", "n.a.", "missing", "nobody knows", "Weiß nicht"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_spelling_of_missing_is_missing_everywhere(spelling, tmp_path):
    n = 24
    cells = {"note": [f"cough {i}" for i in range(n)], "label": [f"{'ab'[i % 2]}" for i in range(n)],
             "age": [str(20 + i) for i in range(n)], "patient": [f"p{i}" for i in range(n)], "row": range(n)}  # fmt: skip
    for name, start in (("note", 0), ("label", 1), ("age", 2), ("patient", 3)):
        cells[name][start::4] = [spelling] * 6
    study, report = convert(column_file(tmp_path, cells), numeric=("age",), na="nobody knows, Weiß nicht")
    assert [i for i in range(n) if not study.notes[i]] == [*range(0, n, 4)]
    assert [*np.flatnonzero(study.labels < 0)] == [*range(1, n, 4)] and study.class_names == ["a", "b"]
    assert [*np.flatnonzero(np.isnan(study.numeric["tabular"][:, 0]))] == [*range(2, n, 4)]
    assert [i for i in range(n) if not study.patients[i]] == [*range(3, n, 4)]
    assert len({*data.groups(study)}) == n, "placeholder patients are nobody's siblings"
    for name in ("note", "label", "age", "patient"):
        assert f"missing    {name}: {spelling or 'empty'} 6" in report


def test_missing_is_counted_by_spelling(tmp_path):
    path = column_file(tmp_path, {"note": ["x", "None", "?", "None", "", "y"], "label": [*"ababab"], "row": range(6)})
    assert "missing    note: None 2, ? 1, empty 1" in convert(path, numeric=("row",))[1]


# --------------------------------------------------------------------------------------------------------------- numbers

NAN = np.nan
NUMBERS = {
    "points": (["36.5", "37", "-0.25"], [36.5, 37, -0.25], None),
    "commas": (["36,5", "37", "-0,25"], [36.5, 37, -0.25], "'36,5' is 36.5"),
    "thousands point beside whole numbers": (["9.100", "850", "12.300"], [9100, 850, 12300], "'9.100' is 9100"),
    "thousands point by closeness": (["9.125", "850", "912"], [9125, 850, 912], "'9.125' is 9125"),
    "thousands comma beside whole numbers": (["9,100", "850"], [9100, 850], "'9,100' is 9100"),
    "three decimals beside small numbers": (["9.125", "7", "8"], [9.125, 7, 8], "'9.125' is 9.125"),
    "three decimals beside long numbers": (["9.125", "1250"], [9.125, 1250], "'9.125' is 9.125"),
    "a leading zero decides": (["0.125", "9.125"], [0.125, 9.125], None),
    "one cell decides": (["9.125", "9.100", "850", "9.5"], [9.125, 9.1, 850, 9.5], None),
    "one cell decides for thousands": (["9.125", "9.100,5"], [9125, 9100.5], "'9.125' is 9125"),
    "only thousand groups of commas": (["1,234", "5,678"], [1234, 5678], "'1,234' is 1234"),
    "both marks, English": (["1,234.5", "12"], [1234.5, 12], "'1,234.5' is 1234.5"),
    "both marks, German": (["1.234,5", "12"], [1234.5, 12], "'1.234,5' is 1234.5"),
    "millions": (["1.234.567", "12"], [1234567, 12], "'1.234.567' is 1234567"),
    "spaces": (["1 234", "12,5"], [1234, 12.5], "'1 234' is 1234"),
    "hard spaces": (["1\u00a0234,5", "12"], [1234.5, 12], "is 1234.5"),
    "narrow spaces": (["1\u202f234,5", "12"], [1234.5, 12], "is 1234.5"),
    "Swiss": (["1'234.5", "12"], [1234.5, 12], "\"'\" is 1234.5"),
    "Swiss, curled": (["1\u2019234.5", "12"], [1234.5, 12], "is 1234.5"),
    "exponents": (["1e5", "1.5E-3", "2"], [1e5, 1.5e-3, 2], None),
    "a leading zero among thousands": (["9.100,5", "0.850", "9.200,5"], [9100.5, NAN, 9200.5], "(x '0.850' in line 3)"),
    "as many of either": (["36.5", "36,5", "7"], [36.5, NAN, 7], "(x '36,5' in line 3)"),
    "contradiction": (["36,5", "37,1", "38.25"], [36.5, 37.1, NAN], "(x '38.25' in line 4)"),
    "contradiction in a column of points": (["36.5", "37.1", "38,2"], [36.5, 37.1, NAN], "(x '38,2' in line 4)"),
    "two numbers in a cell": (["120_80", "120/80", "7"], [NAN, NAN, 7], "2 cells are not numbers"),
    "not decimal": (["0x10", "1_000", "inf", "7"], [NAN, NAN, NAN, 7], "3 cells are not numbers"),
    "units and limits": (["37.2 C", "5%", ">38", "7"], [NAN, NAN, NAN, 7], "3 cells are not numbers"),
    "dates": (["2020-01-02", "1.2.2020", "7"], [NAN, NAN, 7], "2 cells are not numbers"),
    "too large": (["1e39", "7"], [NAN, 7], "1 cells are not numbers"),
}


@pytest.mark.parametrize("kind", NUMBERS)
def test_a_column_has_one_way_to_write_numbers(kind, tmp_path):
    cells, values, words = NUMBERS[kind]
    path = column_file(tmp_path, {"x": [*cells, ""], "label": ["a", "b", "a", "b", "a", "b"][: len(cells) + 1], "y": range(len(cells) + 1)})
    study, report = convert(path, numeric=("x,y",))
    np.testing.assert_array_equal(study.numeric["tabular"][:, 0], np.array([*values, NAN], np.float32))
    if words is None:
        assert "numbers " not in report and "not numbers" not in report
    else:
        assert words.replace("\"'\"", "'1'234.5'") in report
    marks = study.prepared["numbers"]["tabular"]["x"]  # what serving reads with
    assert [prepare.number(cell, **marks) for cell in cells if not np.isnan(values[cells.index(cell)])] == pytest.approx([v for v in values if v == v])


def test_columns_of_a_file_share_their_decimal_mark(tmp_path):
    columns = {"t": ["36,5", "37,1"], "leuko": ["1.101", "9.199"], "age": ["30", "40"], "label": ["a", "b"]}
    study, report = convert(column_file(tmp_path, columns, ";"), numeric=("vitals=t", "labs=leuko,age"))
    assert study.numeric["labs"].tolist() == [[1101, 30], [9199, 40]]
    assert "numbers    t '36,5' is 36.5, leuko '1.101' is 1101; if not, use --decimal" in report
    assert study.prepared["numbers"] == {"vitals": {"t": {"decimal": ",", "thousands": ""}},
                                         "labs": {"leuko": {"decimal": ",", "thousands": "."}, "age": {"decimal": ",", "thousands": ""}}}  # fmt: skip
    columns["t"] = ["36.5", "37.1"]
    study, _ = convert(column_file(tmp_path, columns, ";"), numeric=("t,leuko",))
    assert study.numeric["tabular"][0].tolist() == np.float32([36.5, 1.101]).tolist()
    study, _ = convert(column_file(tmp_path, {"leuko": ["9.100", "850"], "label": ["a", "b"]}), numeric=("leuko",), decimal="point")
    assert study.numeric["tabular"].ravel().tolist() == np.float32([9.1, 850]).tolist()


CODES = {
    "-999 among temperatures": ([36.5 + i / 100 for i in range(80)] + [-999.0] * 5, [(-999, 5)]),
    "999 among ages": ([*range(20, 100)] + [999] * 3, [(999, 3)]),
    "-9 among positives": ([*range(80)] + [-9] * 4, [(-9, 4)]),
    "-1 among 0 and 1": ([0, 1] * 20 + [-1] * 3, [(-1, 3)]),
    "9999": ([*range(80)] + [9999] * 3, [(9999, 3)]),
    "two codes": ([*range(80)] + [999] * 4 + [-99] * 5, [(-99, 5), (999, 4)]),
    "99.9": ([36.5 + i / 100 for i in range(80)] + [99.9] * 3, [(np.float32(99.9), 3)]),
    "twice is no code": ([*range(80)] + [999] * 2, []),
    "under one percent is none": ([*range(80)] * 5 + [999] * 3, []),
    "within the others' range": ([*range(80)] + [9] * 9 + [77] * 5, []),
    "negative among negatives": ([*range(-40, 40)] + [-9] * 9, []),
    "an age of 99": ([*range(20, 98)] + [99] * 9, []),
    "constant": ([999] * 9, []),
    "nothing": ([NAN] * 9, []),
}


@pytest.mark.parametrize("kind", CODES)
def test_codes_for_missing_are_named_with_a_count(kind):
    values, codes = CODES[kind]
    assert tables.sentinels(np.array(values, np.float32)) == codes


@pytest.mark.parametrize("spelling", ["-999", "-999.00", "-999.0"])
def test_codes_are_named_and_dropped_by_na_however_written(spelling, tmp_path):
    path = column_file(tmp_path, {"t": [spelling if i % 5 == 0 else f"{36 + i / 10}" for i in range(40)], "row": range(40), "label": ["a", "b"] * 20})
    study, report = convert(path, numeric=("t,row",))
    assert "codes?     t -999 8 times: " in report and "--na=-999 drops them" in report and study.numeric["tabular"][0, 0] == -999
    study, report = convert(path, numeric=("t,row",), na="-999")
    assert np.isnan(study.numeric["tabular"][::5, 0]).all() and np.isnan(study.numeric["tabular"]).sum() == 8
    assert "codes?" not in report and f"missing    t: {spelling} 8" in report and study.prepared["na"] == ["-999"]


# ---------------------------------------------------------------------------------------------------------------- labels

LIST = ["['A', 'B']", "['B']", "['A']", "['C', 'No Finding']"]
LABELS = {
    "names": (["b", "a", "", "b"], {}, ["a", "b"], [1, 0, -1, 1], None),
    "numbers in their order": (["10", "9.0", "", "10.0"], {}, ["9", "10"], [1, 0, -1, 1], None),
    "0 and 1": (["1.0", "0", "", "1"], {}, ["0", "1"], [1, 0, -1, 1], None),
    "uncertain is unlabelled": (["1.0", "0.0", "-1.0", ""], {}, ["0", "1"], [1, 0, -1, -1], "1 labels are -1 and count as unlabelled (--uncertain)"),
    "uncertain is positive": (["1", "0", "-1", ""], {"uncertain": "positive"}, ["0", "1"], [1, 0, 1, -1], "1 labels are -1 and count as positive"),
    "uncertain is negative": (["1", "0", "-1", ""], {"uncertain": "negative"}, ["0", "1"], [1, 0, 0, -1], "1 labels are -1 and count as negative"),
    "blank is negative": (["1", "0", "-1", ""], {"blank": "negative"}, ["0", "1"], [1, 0, -1, 0], None),
    "blank is negative as pandas writes it": (["1", "1", "nan", ""], {"blank": "negative"}, ["0", "1"], [1, 1, 0, 0], None),
    "true and false stay names": (["TRUE", "FALSE", "", "TRUE"], {}, ["FALSE", "TRUE"], [1, 0, -1, 1], None),
    "unknown is no blank": (["1", "0", "unknown", ""], {"blank": "negative"}, ["0", "1"], [1, 0, -1, 0], None),
    "-1 beside 2 is a class": (["-1", "0", "2", ""], {}, ["-1", "0", "2"], [0, 1, 2, -1], None),
    "bars are findings": (["A", "A|B", "B|C", ""], {}, ["A", "B", "C"], [[1, 0, 0], [1, 1, 0], [0, 1, 1], [-1, -1, -1]], "findings   3 in column 'label', whose cells are separated by '|'"),
    "No Finding is none of them": (["No Finding", "A|B", "B|A", "A"], {}, ["A", "B"], [[0, 0], [1, 1], [1, 1], [1, 0]], "findings   2"),
    "bars that are no separators": (["x|1", "y|2", "x|1", ""], {}, ["x|1", "y|2"], [0, 1, 0, -1], None),
    "bars kept on request": (["A", "A|B", "B|A", ""], {"label_separator": ""}, ["A", "A|B", "B|A"], [0, 1, 2, -1], None),
    "another separator": (["A/B", "B", "A", ""], {"label_separator": "/"}, ["A", "B"], [[1, 1], [0, 1], [1, 0], [-1, -1]], "separated by '/'"),
    "lists": (["['A', 'B']", "['B']", "[]", '["A"]'], {}, ["A", "B"], [[1, 1], [0, 1], [-1, -1], [1, 0]], "separated by '[...]'"),
    "lists with commas in names": (["['A, left', 'B']", "['B']", "[nan]", "['No Finding']"], {}, ["A, left", "B"], [[1, 1], [0, 1], [-1, -1], [0, 0]], None),
    "empty lists as negatives": (["['A' 'B']", "[unknown, 'B']", "[]", "?"], {"blank": "negative"}, ["A", "B"], [[1, 1], [0, 1], [0, 0], [-1, -1]], None),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_mean_what_their_writers_meant(kind, tmp_path):
    cells, flags, classes, labels, words = LABELS[kind]
    path = column_file(tmp_path, {"x": range(4), "label": [cell.replace('"', '""') for cell in cells]})
    table = tables.read_table(path)
    names = {"label_separator": "separator"}
    found, class_names, report = tables.read_labels(table, ["label"], **{names.get(k, k): v for k, v in flags.items()})
    assert class_names == classes and found.tolist() == labels
    assert words is None or words in "\n".join(report)
    assert studies.FromCsv(path, **flags)


@pytest.mark.parametrize("uncertain,blank", [("ignore", "ignore"), ("positive", "negative"), ("negative", "ignore"), ("ignore", "negative")])
def test_one_column_and_several_have_one_rule(uncertain, blank, tmp_path):
    cells = ["1", "0", "-1", "", "1.0", "0.0", "-1.0", "unknown"] * 2
    path = column_file(tmp_path, {"x": range(16), "a": cells, "b": cells[::-1]})
    table = tables.read_table(path)
    both, _, _ = tables.read_labels(table, ["a", "b"], (), uncertain, blank)
    one, names, _ = tables.read_labels(table, ["a"], (), uncertain, blank)
    value = {"ignore": -1, "positive": 1, "negative": 0}
    assert names == ["0", "1"] and one.tolist() == [1, 0, value[uncertain], value[blank], 1, 0, value[uncertain], -1] * 2
    assert (both[:, 0] == one).all() and (both[:, 1] == one[::-1]).all()


BAD_LABELS = {
    "case": (["Sick", "sick", "well", "well"], {}, r"'Sick' and 'sick' differ only in case, spaces or Unicode form"),
    "spaces": (["lung  mass", "lung mass", "well", "well"], {}, r"'lung  mass' and 'lung mass' differ only"),
    "Unicode form": (["f\u00e9vrier", "fe\u0301vrier", "well", "well"], {}, r"'fe\\u0301vrier' and 'f\\xe9vrier' differ only"),
    "unseen characters": (["sick\u200b", "sick", "well", "well"], {}, r"'sick\\u200b' differ only"),
    "full width": (["A\uff11", "A1", "well", "well"], {}, r"'A1' and .* differ only"),
    "parts": (["A|b", "a|b", "b|c", "c"], {}, r"'A' and 'a' differ only"),
    "measurements": (["0.5", "1", "2", "3"], {}, r"is '0.5' in line 2; labels are class names or whole numbers"),
    "one class": (["a", "a", "", "a"], {}, r"has 1 classes \(a\); need two or more"),
    "only 1 and -1": (["1", "-1", "", "1"], {}, r"has 1 classes \(1\)"),
    "blank of names": (["a", "b", "", "a"], {"blank": "negative"}, r"--blank negative: .* holds classes, not 0 and 1"),
    "no finding and one": (["No Finding|A", "A|B", "B|A", "B"], {}, r"is 'No Finding\|A' in line 2: no finding and a finding at once"),
    "finding in every row": (["A|B", "A|C", "A", "A|B|C"], {}, r"finding 'A' never varies; every finding needs both 0 and 1"),
    "half lists": (["['A']", "B", "['B']", "A"], {"label_separator": "[...]"}, r"not every cell is a list"),
}


@pytest.mark.parametrize("kind", BAD_LABELS)
def test_labels_that_mislead_are_refused_at_import(kind, tmp_path):
    cells, flags, message = BAD_LABELS[kind]
    with pytest.raises(Refused, match=message):
        convert(column_file(tmp_path, {"x": range(4), "label": cells}), numeric=("x",), **flags)


def test_a_finding_that_never_varies_is_refused_by_name(tmp_path):
    path = column_file(tmp_path, {"x": ["1", "2", "3", ""], "mass": ["1", "1", "", "0"], "edema": [0, 1, 0, 1]})
    with pytest.raises(Refused, match="finding 'mass' never varies.*leave it out of --label-column, or see --blank"):
        convert(path, numeric=("x",), label_column="mass,edema")  # the only 0 stands in a row with nothing
    study, _ = convert(path, numeric=("x",), label_column="mass,edema", blank="negative")
    assert study.labels.tolist() == [[1, 0], [1, 1], [0, 0]]


# --------------------------------------------------------------------------------------------------------------- leakage


def notes_file(folder, notes, labels):
    return column_file(folder, {"note": notes, "label": labels})


def test_a_mark_that_one_class_gets_is_reported(tmp_path):
    labels = ["covid" if i % 2 else "other" for i in range(60)]
    notes = [f"{'covid19 ' if i % 2 else ''}day {i % 7} ward {i}" for i in range(60)]
    path = notes_file(tmp_path, notes, labels)
    study, report = convert(path, mask_words="covid")
    assert "leakage    words of one class: '[mask]' in 30 notes, 30 of them covid (50% of all notes)" in report
    assert "import     64 pixels, squeeze, grey; hidden (mark): covid\n" in report
    assert study.prepared["mask_words"] == ["covid"] and study.prepared["mask"] == "mark" and "[MASK] day 1 ward 1" in study.notes[1]
    study, report = convert(path, mask_words="covid", mask="delete")
    assert "leakage" not in report and study.notes[1].split() == ["day", "1", "ward", "1"] and study.prepared["mask"] == "delete"


def test_any_word_of_one_class_is_reported_and_no_other(tmp_path):
    rng = np.random.default_rng(0)
    labels = ["rare" if i % 10 == 0 else "often" for i in range(400)]
    words = [" ".join(f"w{k}" for k in rng.integers(0, 60, 8)) for _ in labels]
    notes = [f"{text}{' intubated' if label == 'rare' and i % 20 == 0 else ''}" for i, (text, label) in enumerate(zip(words, labels))]
    report = convert(notes_file(tmp_path, notes, labels))[1]
    assert "leakage    words of one class: 'intubated' in 20 notes, 20 of them rare (10% of all notes)\n" in report
    assert "leakage" not in convert(notes_file(tmp_path, words, labels))[1]


def test_findings_leak_too_and_so_does_their_absence(tmp_path):
    a = [i % 2 for i in range(80)]
    b = [i // 2 % 2 for i in range(80)]
    notes = [f"n{i} {'tube' if a[i] else ''} {'clear' if not b[i] else ''}" for i in range(80)]
    report = convert(column_file(tmp_path, {"note": notes, "a": a, "b": b}), label_column="a,b")[1]
    assert "'tube' in 40 notes, 40 of them a (50% of all notes)" in report and "'clear' in 40 notes, 40 of them no b (50% of all notes)" in report


# ----------------------------------------------------------------------------------------------------- groups and splits


def test_the_largest_groups_are_printed_and_warn(tmp_path):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is in the studies extra")
    rng = np.random.default_rng(0)
    for i in range(30):
        Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(tmp_path / f"p{i}.png")
    Image.new("L", (8, 8)).save(tmp_path / "black.png")
    names = ["p0.png"] * 20 + [f"p{i}.png" for i in range(1, 30)] + ["black.png"]
    columns = {"image": names, "label": [*"ab"] * 25, "patient": ["x"] * 30 + [f"y{i}" for i in range(20)], "row": range(50)}
    study, report = convert(column_file(tmp_path, columns), size=8)
    assert "pictures   p0.png is the picture of 20 samples" in report and "19 repeat another, largest group 20 samples" in report
    assert "patients   20, largest group 30 samples" in report
    assert "warning: far from 80/10/10" not in report and len(study) == 49
    assert "left out   1 rows without a picture, words or numbers, in lines (51)" in report and "black.png: one grey level" in report
    columns["patient"] = ["x"] * 45 + [f"y{i}" for i in range(5)]
    assert "warning: far from 80/10/10, because each patient and picture stays in one part" in convert(column_file(tmp_path, columns), size=8)[1]


def test_what_the_import_did_is_in_the_study(tmp_path):
    path = column_file(tmp_path, {"note": ["a b", "c d"], "label": ["a", "b"], "t": ["36,5", "37"]})
    study, _ = convert(path, numeric=("labs=t",), na="-9, nix", mask_words="covid, tb", size=32, fit="pad", rgb=True)
    assert study.prepared == {"size": 32, "fit": "pad", "rgb": True, "na": ["-9", "nix"], "mask_words": ["covid", "tb"], "mask": "mark",
                              "numbers": {"labs": {"t": {"decimal": ",", "thousands": ""}}}}  # fmt: skip


def test_the_extra_names_every_library_that_is_used():
    text = Path(ROOT / "pyproject.toml").read_text()
    assert 'studies = ["pandas' in text and "openpyxl" in text.split("studies = ")[1].split("\n")[0]


def imported_lines(tmp_path, refused, name, write, *flags):
    write(tmp_path / name)
    return refused(studies.main, "from-csv", name, *flags)


def test_tables_that_cannot_be_right_are_refused(tmp_path, refused):
    """Merged cells, a header that stands there again, an encoding that is neither of the two that are guessed."""
    openpyxl = pytest.importorskip("openpyxl")

    def merged(path):
        book = openpyxl.Workbook()
        for row in (("label", "age", "patient"), *(("ab"[i % 2], 20 + i, f"p{i}") for i in range(20))):
            book.active.append(row)
        book.active.merge_cells("C2:C5")
        book.save(path)

    assert "cells C2:C5 are merged in sheet 'Sheet'" in imported_lines(tmp_path, refused, "m.xlsx", merged, "--numeric", "age")
    part = "label,age\n" + "".join(f"{'ab'[i % 2]},{20 + i}\n" for i in range(20))
    said = imported_lines(tmp_path, refused, "j.csv", lambda p: p.write_text(part + part), "--numeric", "age")
    assert "the header is repeated 1 times" in said
    text = "label,age\n" + "".join(f"{'左右'[i % 2]},{20 + i}\n" for i in range(20))
    assert "name its encoding with --encoding" in imported_lines(tmp_path, refused, "s.csv", lambda p: p.write_bytes(text.encode("shift-jis")), "--numeric", "age")


def test_codes_of_18_digits_are_classes_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    codes = ["900000000000207008", "900000000000207009", "22298006"]
    (tmp_path / "c.csv").write_text("label,age\n" + "".join(f"{codes[i % 3]},{20 + i}\n" for i in range(30)))
    studies.main(["from-csv", "c.csv", "--numeric", "age", "--out", "c.npz"])
    study = data.load_study(tmp_path / "c.npz")
    assert sorted(study.class_names) == sorted(codes) and np.bincount(study.labels).tolist() == [10] * 3


def test_the_mark_of_the_file_decides_before_the_look_of_a_column(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [("7.350", "36.5"), ("7.400", "37.1"), ("7", "36.6"), ("7.380", "38.2")] * 6
    (tmp_path / "p.csv").write_text("label,ph,t\n" + "".join(f"{'ab'[i % 2]},{p},{t}\n" for i, (p, t) in enumerate(rows)))
    studies.main(["from-csv", "p.csv", "--numeric", "ph,t", "--out", "p.npz"])
    assert data.load_study(tmp_path / "p.npz").numeric["tabular"][:, 0].max() < 8


AGES = np.random.default_rng(0).integers(20, 80, 100).astype(float)


@pytest.mark.parametrize("values,found", [
    (np.r_[[999.0] * 6, 9999, AGES], [(999, 6)]), (np.r_[[-999.0] * 6, -2000, np.random.default_rng(1).normal(0, 50, 90)], [(-999, 6)]), (np.r_[[0.0] * 6, 36 + AGES / 80], [(0, 6)]),
    (np.r_[[99999999.0] * 5, AGES], [(99999999, 5)]), (np.r_[[-9.0] * 5, AGES], [(-9, 5)]), (AGES, []), (np.random.default_rng(2).exponential(10, 200).round(), []),
    (np.r_[np.zeros(190), [5.0] * 3, [40.0]], []), (np.arange(50.0), []), (AGES % 2, [])])
def test_codes_among_numbers_are_named(values, found):
    assert tables.sentinels(values) == found
