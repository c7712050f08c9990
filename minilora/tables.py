"""What the cells of a table mean: labels, numbers and what is missing; pandas reads the file.

Every cell is read as text, because only the whole column says what `9.100` is. Nothing is guessed
in silence: what a reading rests on comes back as lines for the report. Skip this file when you
read for the methods.
"""

import csv
import io
import re
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from datetime import datetime

import numpy as np

from minilora.data import Refused
from minilora.prepare import number, says_nothing
from minilora.words import normal_form

# And what the report says of each. Of two that stand equally often in a header, the first is the rarer in its words.
DELIMITERS = {"\t": ", tabs", ";": ", semicolons", ",": "", "|": ", bars"}
OTHERS = {
    ".xls", ".xlsb", ".ods", ".numbers", ".json", ".jsonl", ".parquet", ".feather", ".arrow",
    ".sav", ".dta", ".sas7bdat", ".rds", ".xml", ".html", ".pkl", ".h5", ".db", ".sqlite", ".gz",
    ".zip", ".pdf", ".docx", ".npz", ".npy",
}  # fmt: skip
STARTS = {  # of files that are no text
    b"\xd0\xcf\x11\xe0": "an old or protected workbook (.xls)", b"PAR1": "Parquet",
    b"ARROW1": "Arrow", b"\x1f\x8b": "gzip", b"$FL2": "SPSS", b"%PDF": "PDF", b"{": "JSON",
    b"[{": "JSON", b"<": "HTML or XML",
}  # fmt: skip
QUOTED = r'"(?:[^"]|"")*"'
# (decimal mark, thousands mark): of two that read a column equally well, the first is taken.
FORMATS = [(".", ""), (",", ""), (".", ","), (",", ".")]
FORMATS += [(decimal, mark) for mark in (" ", "\u00a0", "\u202f", "'", "\u2019") for decimal in ".,"]
GROUP = re.compile(r"[+-]?[1-9]\d{0,2}([.,])\d{3}")  # 9.100: thousands, or three decimals
CODE = re.compile(r"-1|-?(9+|8+|7+)")  # what registries write for "missing", "refused", "unknown"
NO_FINDING = ("no finding", "no findings")
SWITCHES = {"true": 1, "false": 0}


@dataclass
class Table:
    """A file's cells as stripped text, in a pandas DataFrame whose index holds line numbers.

    origin: how it was read, in words; delimiter: '' of a workbook; exact: columns of a workbook
    that hold numbers with decimals, whose mark is the point whatever the country."""

    cells: object
    origin: str
    delimiter: str = ""
    exact: set = field(default_factory=set)

    def __len__(self):
        return len(self.cells)

    @property
    def lines(self):
        return list(self.cells.index)

    def column(self, name, na=()):
        """The cells of a column, '' for each that says nothing. na: further spellings of that; a
        number among them stands for every way to write it."""
        values = {number(text) for text in na} - {None}
        cells = []
        for cell in self.cells[name]:
            missing = says_nothing(cell, na) or (values and number(cell) in values)
            cells.append("" if missing else cell)
        return cells

    def missing(self, name, na=()):
        """{spelling: count} of the cells of a column that say nothing."""
        pairs = zip(self.cells[name], self.column(name, na))
        return Counter(cell or "empty" for cell, text in pairs if not text)

    def distinct(self):
        """The table without rows that repeat an earlier one in every cell."""
        return self.take(~self.cells.duplicated().to_numpy())

    def take(self, rows):
        return Table(self.cells[rows], self.origin, self.delimiter, self.exact)


def some(values):
    """' (a, b, c, ...)' of the first three, '' of none."""
    values = [str(value) for value in values]
    if not values:
        return ""
    if len(values) > 3:
        values = [*values[:3], "..."]
    return f" ({', '.join(values)})"


# ----------------------------------------------------------------------------------------- reading


def read_table(path, encoding=""):
    """The `Table` of a .csv (comma, semicolon, tab or bar) or .xlsx file. `Refused` if it is of
    another format, has no rows, a column twice, or a row that is not as long as the header."""
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    try:
        import pandas
    except ImportError:
        raise Refused(f"{path}: reading it needs pandas: pip install 'minilora[studies]'") from None
    content = path.read_bytes()
    if _is_workbook(path, content):
        cells, origin, exact = _read_workbook(path, pandas)
        lengths = (cells != "").to_numpy() * np.arange(1, cells.shape[1] + 1)
        lengths = lengths.max(1, initial=0)  # up to the last cell that is not empty
        delimiter = ""
    else:
        text, codec = _decode(path, content, encoding)
        cells, lengths, delimiter = _read_text(path, text, pandas)
        origin = codec + DELIMITERS[delimiter]
        exact = set()
    cells = cells.apply(lambda column: column.str.strip())
    full = (cells != "").any(axis=1).to_numpy(copy=True)  # empty lines are no rows
    if full.sum() < 2:
        raise Refused(f"{path}: has no rows; the first line names the columns, each further line "
                      "is a study")
    first = full.argmax()
    header = cells.iloc[first].tolist()
    while not header[-1]:  # a line may end in delimiters
        header.pop()
    full[first] = False
    again = [str(i) for i in np.flatnonzero(full) if cells.iloc[i, : len(header)].tolist() == header]
    if again:
        raise Refused(f"{path}: the header is repeated {len(again)} times further down, as where "
                      "tables were joined; remove these lines")
    lengths = np.array(lengths)[full]
    if not delimiter:
        lengths = np.maximum(lengths, len(header))
    cells = cells[full]
    _check_lengths(path, cells, lengths, len(header))
    cells = cells.iloc[:, : len(header)]
    cells.columns = header
    for column in header:
        if column and header.count(column) > 1:
            raise Refused(f"{path}: two columns are called '{column}'; rename one")
    exact = {header[i] for i in exact if i < len(header)}
    return Table(cells, f"{path}: {len(cells)} rows, {origin}", delimiter, exact)


def _is_workbook(path, content):
    """Whether a file is an .xlsx workbook; `Refused` if it is neither that nor text."""
    kind = path.suffix.lower() if path.suffix.lower() in OTHERS else ""
    for start, name in STARTS.items():
        if content.lstrip(b"\xef\xbb\xbf \r\n").startswith(start):
            kind = name
    if content.startswith(b"PK\x03\x04"):
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if "xl/workbook.xml" in archive.namelist():
                    return True
            kind = kind or "a zip archive"
        except (zipfile.BadZipFile, NotImplementedError):
            raise Refused(f"{path}: not a readable workbook (damaged)") from None
    elif not kind and path.suffix.lower() in (".xlsx", ".xlsm"):
        kind = "not the workbook that its name says"
    if kind:
        raise Refused(f"{path}: is {kind}; only text (.csv) and .xlsx are read: save it as either")
    return False


def _read_workbook(path, pandas):
    """(text cells, how they were read, positions of columns with decimals) of the first sheet."""
    try:
        whole = {"read_only": False}  # else which cells are merged is not read
        with pandas.ExcelFile(path, engine="openpyxl", engine_kwargs=whole) as book:
            sheets = [s for s in book.book.worksheets if s.sheet_state == "visible"]
            merged = [str(cells) for cells in sheets[0].merged_cells.ranges]
            values = pandas.read_excel(book, sheet_name=sheets[0].title, header=None, dtype=object,
                                       na_filter=False)
    except ImportError:
        raise Refused(f"{path}: reading it needs openpyxl: "
                      "pip install 'minilora[studies]'") from None
    except Exception as error:  # the libraries raise many types for a damaged file
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise Refused(f"{path}: not a readable workbook ({reason})") from None
    if merged:
        raise Refused(f"{path}: cells {merged[0]} are merged in sheet '{sheets[0].title}': split "
                      "them, and write the value into each")
    exact = set()
    for i in values:  # % of #N/A, a NaN, is not above 0
        if any(isinstance(value, float) and value % 1 > 0 for value in values[i]):
            exact.add(i)
    values.index += 1
    origin = f"sheet '{sheets[0].title}'"
    if len(sheets) > 1:
        origin += f", the first of {len(sheets)}"
    return values.map(_shown).astype(str), origin, exact


def _shown(value):
    """A workbook's cell as a person sees it in the sheet."""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float):
        return "#N/A" if value != value else f"{value:.15g}"
    if isinstance(value, datetime) and value.time() == datetime.min.time():
        return value.date().isoformat()
    return str(value)


def _decode(path, content, encoding):
    """(text, name of its encoding) of a file: the encoding that was asked for, or a likely one."""
    codec = encoding or "utf-8-sig"
    if not encoding and content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        codec = "utf-16"
    try:
        text = content.decode(codec)
    except UnicodeDecodeError as error:
        if encoding:
            raise Refused(f"{path}: byte {error.start} is not {encoding}") from None
        codec = "windows-1252"
        text = content.decode(codec, "replace")
        if "\ufffd" in text:  # bytes that this encoding does not have
            raise Refused(f"{path}: is neither UTF-8 nor Windows-1252; name its encoding with "
                          "--encoding, such as shift-jis, gb18030 or windows-1251") from None
    except LookupError:
        raise Refused(f"{path}: encoding '{encoding}' is not known; try utf-8, windows-1252 or "
                      "shift-jis") from None
    if text.count("\0") > len(text) // 4:
        raise Refused(f"{path}: holds zero bytes when read as {codec}; if it is UTF-16 without a "
                      "byte order mark, give --encoding utf-16-le or utf-16-be")
    # An encoding that was asked for may leave the byte order mark in the text.
    return text.removeprefix("\ufeff"), codec.removesuffix("-sig")


def _read_text(path, text, pandas):
    """(text cells under their line numbers, cells of each line, delimiter) of delimited text."""
    stated = re.match(r'"?sep=(.)"?[,;]*\r?\n', text, re.I)  # Excel's own first line
    if stated:
        text = text[stated.end() :]
        delimiter = stated[1]
        if delimiter not in DELIMITERS:
            raise Refused(f"{path}: line 1 names '{delimiter}' as the delimiter; use , ; | or tab")
    else:
        header = re.match(rf'\s*(?:[^"\r\n]|{QUOTED})*', text)[0]
        header = re.sub(QUOTED, "", header)
        delimiter = max(DELIMITERS, key=header.count) if {*header} & {*DELIMITERS} else ","
    # pandas fills short rows and names no lines, so csv counts first.
    lines = []
    lengths = []
    limit = csv.field_size_limit(2**30)  # a note may be long
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        line = 1 + bool(stated)
        for row in reader:
            lines.append(line)
            lengths.append(len(row))
            line = reader.line_num + 1 + bool(stated)
    except csv.Error as error:
        raise Refused(f"{path}: line {line}: {error}") from None
    finally:
        csv.field_size_limit(limit)
    if not any(lengths):
        raise Refused(f"{path}: has no rows; it is empty")
    cells = pandas.read_csv(
        io.StringIO(text, newline=""), sep=delimiter, header=None, names=range(max(lengths)),
        index_col=False, dtype=str, keep_default_na=False, skip_blank_lines=False,
    )  # fmt: skip
    if len(cells) != len(lines):
        raise Refused(f"{path}: its quotes can be read as {len(lines)} rows or as {len(cells)}")
    return cells.fillna("").set_axis(lines), lengths, delimiter


def _check_lengths(path, cells, lengths, width):
    """`Refused` unless all rows are as long as the header, or all by the same empty cells longer."""
    common = Counter(lengths.tolist()).most_common(1)[0][0]
    if common < width or (cells[lengths == common].iloc[:, width:] != "").any(axis=None):
        common = width
    wrong = np.flatnonzero(lengths != common)
    if not len(wrong):
        return
    message = f"line {cells.index[wrong[0]]} has {lengths[wrong[0]]} cells; the header has {width}"
    if common != width:
        message += f", most rows {common}"
    if len(wrong) > 1:
        message += f"; {len(wrong)} such rows, in lines{some(cells.index[wrong])}"
    raise Refused(f"{path}: {message}; a text with a line break or a delimiter needs quotes")


# ----------------------------------------------------------------------------------------- numbers


def number_formats(table, names, na=(), decimal=""):
    """({column: (decimal mark, thousands mark)}, ["column 'cell' is number"] to report) of columns.

    The marks that read the most cells of a column are its own. Where two readings are equal, as
    for `9.100`, `_decimal_mark` decides. decimal: the mark, where the user names it."""
    columns = {name: table.column(name, na) for name in names}
    readings = {}  # {column: formats that read the most of its cells}
    for name, cells in columns.items():
        mark = "." if name in table.exact else decimal  # a workbook's own numbers leave no doubt
        readings[name] = _best_formats({*cells}, mark)
    decimals = set()  # of the columns that leave no doubt
    for name, formats in readings.items():
        marks = {mark for mark, _ in formats}
        if len(marks) == 1 and any(re.search("[.,]", cell) for cell in columns[name]):
            decimals |= marks
    formats = {}
    report = []
    for name, cells in columns.items():
        choices = readings[name]
        doubt = len({mark for mark, _ in choices}) > 1
        if doubt:
            mark = _decimal_mark(cells, decimals, table.delimiter)
            choices = [marks for marks in choices if marks[0] == mark]
        formats[name] = choices[0]
        examples = [cell for cell in cells if re.search(r"[^\d+-]", cell)]
        examples = [cell for cell in examples if number(cell, *choices[0]) is not None]
        if examples and (doubt or choices[0] != (".", "")):
            report.append(f"{name} '{examples[0]}' is {number(examples[0], *choices[0]):.10g}")
    return formats, report


def _best_formats(cells, decimal):
    """The formats that read the most of a set of cells. decimal: the only mark to try, or ''."""
    marks = {*"".join(cells)}
    counts = {}
    for point, group in FORMATS:
        if (decimal and point != decimal) or (group and group not in marks):
            continue
        counts[point, group] = sum(number(cell, point, group) is not None for cell in cells)
    return [marks for marks, count in counts.items() if count == max(counts.values())]


def _decimal_mark(cells, decimals, delimiter):
    """The decimal mark of a column that does not show it, such as one of 9.100 and 850.

    The other columns decide, if they agree (decimals: their marks). Else, beside whole numbers below
    1000, groups of three digits are thousands if one ends in 0: who drops decimals would write 9.1.
    Else the reading that brings groups and whole numbers closer together. Without whole
    numbers, a comma in a comma-separated file parts thousands, and a point decimals."""
    groups = [cell for cell in cells if GROUP.fullmatch(cell)]
    plain = [abs(int(cell)) for cell in cells if re.fullmatch(r"[+-]?0*[1-9]\d*", cell)]
    mark = GROUP.fullmatch(groups[0])[1] if groups else "."
    other = "." if mark == "," else ","
    if groups and plain and max(plain) >= 1000:  # written without a mark
        return mark
    if len(decimals) == 1:
        return min(decimals)
    if groups and plain and any(cell.endswith("0") for cell in groups):
        return other
    if not groups:
        return "."
    thousands = mark == "," and delimiter in (",", "")
    if plain:
        middle = np.median([abs(number(cell, mark)) for cell in groups])
        thousands = np.median(plain) > middle * 1000**0.5
    return other if thousands else mark


def read_numbers(table, names, formats, na=()):
    """(float32 [N,F] of F columns, NaN = missing; the cells that are not numbers, in words)."""
    values = np.full((len(table), len(names)), np.nan, np.float32)
    wrong = []
    dropped = {number(text) for text in na}
    lines = table.lines
    for i, name in enumerate(names):
        for row, cell in enumerate(table.column(name, na)):
            value = number(cell, *formats[name])
            if value is not None and value not in dropped:
                values[row, i] = value
            elif cell and value is None:
                wrong.append(f"{name} '{cell[:40]}' in line {lines[row]}")
    return values, wrong


def sentinels(values):
    """[(number, count)] of the values [N] that are repeated and far from the middle 80% of the others:
    codes (9, 99, -999, ..., -1) by 2.25 times the range of these, or below 0 where these are not;
    any other number by 12 times that range."""
    values = values[~np.isnan(values)]
    numbers, counts = np.unique(values, return_counts=True)
    texts = [f"{value:.9g}".replace(".", "") for value in numbers]
    codes = np.array([bool(CODE.fullmatch(text)) for text in texts], bool)
    repeated = counts >= max(3, len(values) / 100)
    others = values[~np.isin(values, numbers[codes & repeated])]
    if not repeated.any() or not others.size:
        return []
    low, high = np.quantile(others, [0.1, 0.9])
    spread = (high - low) or 3 * others.std() or 1
    away = np.maximum(low - numbers, numbers - high) / spread
    far = codes & ((away > 2.25) | ((numbers < 0) & (low >= 0)))
    far |= away > 12
    return [(float(numbers[i]), int(counts[i])) for i in np.flatnonzero(repeated & far)]


# ------------------------------------------------------------------------------------------ labels


def read_labels(table, names, na=(), uncertain="ignore", blank="ignore", separator="auto"):
    """(labels [N] or [N,C], class names, report lines) of the label columns; -1 is unlabelled.

    One column holds class names; of several, each is a finding. 0 and 1 are what they say, -1 is
    `uncertain` and an empty cell `blank`, in one column and in several. Cells such as A|B, or lists,
    are findings too. `Refused` on numbers that are not whole (a measurement is not a class), on
    names that differ only in how they are written, and on more classes than half of the rows."""
    if not names:
        return np.full(len(table), -1), ["class 0", "class 1"], []
    cells = {name: table.column(name, na) for name in names}
    # A placeholder such as `unknown` is no blank: nobody knows.
    blanks = {name: [cell.lower() in ("", "nan") for cell in table.cells[name]] for name in names}
    rules = {"uncertain": uncertain, "blank": blank}
    if len(names) > 1:
        labels, report = _read_findings(table, cells, blanks, rules)
        return labels, list(names), report
    name = names[0]
    column = f"label column '{name}'"
    cells = cells[name]
    if separator == "auto":
        separator = _separator(cells)
    if separator:
        labels, classes = _read_lists(table, column, cells, blanks[name], rules, separator)
        return labels, classes, [f"findings   {len(classes)} in column '{name}', whose cells are "
                                 f"separated by '{separator}'"]
    return _read_classes(table, name, cells, blanks[name], rules)


def _read_classes(table, name, cells, blanks, rules):
    """(labels [N], class names, report lines) of one column of class names or whole numbers."""
    column = f"label column '{name}'"
    numbers = {cell: number(cell) for cell in cells if cell}
    order = None  # of letters
    if None not in numbers.values():  # 0, 1, 2 or 0.0, 1.0, as pandas writes them
        order = int
        for line, cell in zip(table.lines, cells):
            if cell and numbers[cell] % 1:
                raise Refused(f"{column} is '{cell}' in line {line}; labels are class names or "
                              "whole numbers, not measurements")
        # Codes of 18 digits are more than a float can tell apart.
        whole = {cell: int(cell) if re.fullmatch(r"[+-]?\d+", cell) else int(numbers[cell])
                 for cell in numbers}
        cells = [str(whole[cell]) if cell else "" for cell in cells]
    if {*cells} <= {"", "0", "1", "-1"}:
        findings, report = _read_findings(table, {name: cells}, {name: blanks}, rules)
        cells = ["" if value < 0 else str(value) for value in findings[:, 0]]
    else:
        report = []
        if rules["blank"] == "negative" and any(blanks):
            raise Refused(f"--blank negative: {column} holds classes, not 0 and 1")
    classes = sorted(set(cells) - {""}, key=order)
    _check_classes(column, classes, len(table))
    index = {name: i for i, name in enumerate(classes)}
    return np.array([index.get(cell, -1) for cell in cells], np.int64), classes, report


def _check_classes(column, classes, rows):
    """`Refused` unless the names are few, and differ in more than how they are written."""
    if len(classes) > max(20, rows // 2):
        raise Refused(f"{column} has {len(classes)} different values in {rows} rows; the limit is "
                      f"{max(20, rows // 2)} classes")
    _check_spellings(column, classes)
    if len(classes) < 2:
        raise Refused(f"{column} has {len(classes)} classes{some(classes)}; need two or more, or "
                      "--label-column '' for a file to predict on")


def _check_spellings(column, names):
    """`Refused` if names are the same but for case, spaces or the form of Unicode."""
    forms = {}
    for name in names:
        form = "".join(normal_form(unicodedata.normalize("NFKC", name)).split())
        forms.setdefault(form, []).append(name)
    doubles = [" and ".join(map(ascii if len({*map(normal_form, group)}) == 1 else repr, group))
               for group in forms.values() if len(group) > 1]
    if doubles:
        raise Refused(f"{column}: {'; '.join(doubles[:5])} differ only in case, spaces or Unicode "
                      "form; write each class in one way")


def _read_findings(table, columns, blanks, rules):
    """(int64 [N,C] of {column: cells}: 0, 1 or -1 for unlabelled, report lines)."""
    values = {"ignore": -1, "positive": 1, "negative": 0}
    labels = np.full((len(table), len(columns)), -1)
    uncertain = 0
    for i, (name, cells) in enumerate(columns.items()):
        for row, cell in enumerate(cells):
            value = SWITCHES.get(cell.lower(), number(cell))
            if cell and value not in (-1, 0, 1):
                raise Refused(f"label column '{name}' is '{cell}' in line {table.lines[row]}; "
                              "a finding is 0, 1, -1 (uncertain) or empty")
            if value == -1:
                uncertain += 1
                labels[row, i] = values[rules["uncertain"]]
            elif cell:
                labels[row, i] = value
            elif blanks[name][row]:
                labels[row, i] = values[rules["blank"]]
    report = []
    if uncertain:
        meaning = rules["uncertain"].replace("ignore", "unlabelled")
        report.append(f"uncertain  {uncertain} labels are -1 and count as {meaning} (--uncertain)")
    return labels, report


def _separator(cells):
    """What parts the findings in the cells of a label column: '[...]' of lists, '|', or ''."""
    texts = {cell for cell in cells if cell}
    if texts and all(re.fullmatch(r"\[.*\]", text, re.S) for text in texts):
        return "[...]"
    joined = [cell for cell in cells if "|" in cell]
    counts = Counter(part for text in texts for part in {*_parts(text, "|")})
    repeated = [part for text in joined for part in _parts(text, "|") if counts[part] > 1]
    return "|" if len(joined) > 1 and repeated else ""


def _parts(cell, separator):
    """The findings in a cell, in order."""
    if separator == "[...]":
        found = re.findall(r"'([^']*)'|\"([^\"]*)\"|([^,'\"\s][^,'\"]*)", cell[1:-1])
        parts = ["".join(groups) for groups in found]
    else:
        parts = cell.split(separator)
    parts = [part.strip() for part in parts]
    return [part for part in parts if not says_nothing(part)]


def _read_lists(table, column, cells, blanks, rules, separator):
    """(labels [N,C], findings) of cells that name what there is; 'No Finding' means none."""
    if separator == "[...]" and not all(re.fullmatch(r"(\[.*\])?", cell, re.S) for cell in cells):
        raise Refused(f"{column}: not every cell is a list in brackets")
    parts = [_parts(cell, separator) for cell in cells]
    names = sorted({part for row in parts for part in row})
    findings = [name for name in names if name.lower() not in NO_FINDING]
    _check_classes(column, findings, len(cells))
    index = {name: i for i, name in enumerate(findings)}
    labels = np.full((len(cells), len(findings)), -1)
    for row, present in enumerate(parts):
        hits = [index[part] for part in present if part in index]
        if hits and len(hits) < len(present):
            raise Refused(f"{column} is '{cells[row]}' in line {table.lines[row]}: no finding and "
                          "a finding at once")
        empty = blanks[row] or re.fullmatch(r"\[\s*\]", cells[row])
        if present or (empty and rules["blank"] == "negative"):
            labels[row] = 0
            labels[row, hits] = 1
    return labels, findings
