"""What an import does to notes and numbers, and serving does again: spellings of missing, hidden
words, decimal marks. What was done stands in a record, which a study file, a run and an exported
folder carry.

    {"size": 64, "fit": "squeeze", "rgb": False,      how pictures became squares of `size`
     "na": ["-999"], "mask_words": ["covid"], "mask": "mark",
     "numbers": {"labs": {"crp": {"decimal": ",", "thousands": "."}}}}

Skip this file when you read for a method.
"""

import re
import unicodedata

from minilora.words import MASK, is_east_asian, normal_form, words_of

# What a cell, a note or a name may hold instead of nothing, in any case of letters.
MISSING = frozenset({
    "", "na", "n/a", "n.a.", "n.a", "nan", "nat", "null", "nil", "none", "<na>", "#n/a", "#na", "unknown",
    "unk", "\\n", "not available", "not applicable", "not known", "missing", "-", "--", "---", "?", "??",
    ".", "..", "...", "_", "#div/0!", "#value!", "#ref!", "#name?", "#num!", "#null!",
})  # fmt: skip
MASKINGS = ("mark", "delete")
MARKS = {"decimal": (".", ","), "thousands": ("", ".", ",", " ", "'", "\u2019", "\u00a0", "\u202f")}
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


def says_nothing(text, more=()):
    """Whether a text is one of the spellings of missing, or of `more`."""
    text = plain(text)
    bare = text.strip("()[]<>.") or text  # (unknown), n/a.
    return text in MISSING or bare in MISSING or text in map(plain, more)


def plain(text):
    """A text as spellings are compared: in normal form, every dash a -, white space as one space."""
    text = normal_form(unicodedata.normalize("NFKC", str(text)))
    text = "".join("-" if is_dash(character) else character for character in text)
    return " ".join(text.split())


def is_dash(character):
    """Whether a character is a dash or a minus sign."""
    return unicodedata.category(character) == "Pd" or character == "\u2212"


def read_note(text, record):
    """A note as a model reads it after the import of a record: hidden words are hidden; '' if it
    says nothing then, or holds no word at all."""
    na = record.get("na", ())
    if says_nothing(text, na):
        return ""
    left = hidden(text, record)
    if not words_of(left) or (left != text and says_nothing(left, na)):
        return ""
    return left


def same_name(text):
    """What the names of one patient have in common: case, form of Unicode, `7` and `7.0`."""
    text = plain(text)
    return re.sub(r"^([0-9]+)\.0+$", r"\1", text)


def number(text, decimal=".", thousands=""):
    """The number that a text writes with these marks; None if it is none that a float32 can hold."""
    text = str(text).strip()
    if thousands:
        whole = re.escape(thousands)
        if not re.fullmatch(rf"[+-]?[1-9]\d{{0,2}}({whole}\d{{3}})+({re.escape(decimal)}\d*)?", text):
            if thousands in text:
                return None
        text = text.replace(thousands, "")
    if decimal != ".":
        if "." in text:
            return None
        text = text.replace(decimal, ".")
    if not NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if abs(value) < 3e38 else None


def mask(note, words, how="mark"):
    """A note without the words, with whatever is written on to each: covid hides COVID-19 too, in
    any case and any form of Unicode. how: `mark` leaves [MASK], `delete` leaves nothing."""
    if not words:
        return note
    note = unicodedata.normalize("NFC", note)
    folded = []  # the note as it is compared
    places = []  # of each character of it, the place in the note
    for place, character in enumerate(note):
        for part in normal_form(character):
            part = "-" if is_dash(part) else part
            folded.append(" " if part.isspace() else part)
            places.append(place)
    text = "".join(folded)
    phrases = [re.split(r"[ -]+", plain(word)) for word in words]
    pattern = "|".join(r"[ -]+".join(map(re.escape, phrase)) for phrase in phrases)
    kept = []
    end = 0  # of what was looked at, in the note
    stop = 0  # the same in the text
    for found in re.finditer(pattern, text):
        start = found.start()
        inside = start and text[start - 1] != "-" and in_word(text[start - 1])
        inside = inside and not is_east_asian(text[start])
        if inside or start < stop:
            continue
        stop = found.end()
        while stop < len(text) and in_word(text[stop]) and not is_east_asian(text[stop - 1]):
            stop += 1
        kept.append(note[end : places[start]])
        kept.append(MASK if how == "mark" else "")
        end = places[stop - 1] + 1
    kept.append(note[end:])
    return "".join(kept)


def hidden(note, record):
    """A note without the words that the import of a record hid."""
    return mask(note, record.get("mask_words", ()), record.get("mask", "mark"))


def in_word(character):
    """Whether a character goes on with a word: a letter, a digit, a mark on one, - or _. An
    ideograph is a word of its own."""
    letter = character in "-_" or unicodedata.category(character)[0] in "LNM"
    return letter and not is_east_asian(character)


def check_record(record):
    """ValueError unless a value is {} or a record as above."""
    forms = {"size": int, "fit": str, "rgb": bool, "na": list, "mask_words": list, "mask": str,
             "numbers": dict}
    if not isinstance(record, dict) or (record and {*record} != {*forms}):
        raise ValueError("is no record of an import")
    for key, value in record.items():
        if type(value) is not forms[key]:
            raise ValueError(f"'{key}' is {value!r:.40}; must be a {forms[key].__name__}")
    if not record:
        return
    if not 4 <= record["size"] <= 4096:
        raise ValueError(f"'size' is {record['size']}; must be in 4..4096")
    if record["fit"] not in ("squeeze", "crop", "pad"):
        raise ValueError(f"'fit' is {record['fit']!r:.40}")
    if record["mask"] not in MASKINGS:
        raise ValueError(f"'mask' is {record['mask']!r:.40}; must be {' or '.join(MASKINGS)}")
    for text in (*record["na"], *record["mask_words"]):
        if not isinstance(text, str) or not text:
            raise ValueError(f"{text!r:.40} is no word")
    for text in record["mask_words"]:
        if not words_of(text):
            raise ValueError(f"mask word {text!r:.40} holds no letter and no digit")
    for columns in record["numbers"].values():
        marks = columns.values() if isinstance(columns, dict) else [None]
        for mark in marks:
            if not isinstance(mark, dict) or {*mark} != {*MARKS}:
                raise ValueError("'numbers' must hold a decimal and a thousands mark per column")
            for key, choices in MARKS.items():
                if mark[key] not in choices:
                    raise ValueError(f"'{key}' is {mark[key]!r:.40}")
