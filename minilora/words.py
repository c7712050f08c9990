"""The words of a note, as the hashed ids that a model reads: there is no vocabulary to ship.

Training, export and serving share it. Skip it when you read for a method.
"""

import re
import unicodedata
import zlib
from collections import Counter

import numpy as np

PAD, CLS, UNK = 0, 1, 2  # reserved word ids; hashed words start at 3
MASK = "[MASK]"  # what stands for a word that the import hid
# Each of these characters is a word: ideographs and kana, which are written without spaces.
EAST_ASIAN = (
    (0x3040, 0x30FF), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF),
)  # fmt: skip


def normal_form(text):
    """A text as it is compared: composed (NFC), without case, and without characters that nobody
    sees, such as soft hyphens and zero-width spaces."""
    text = unicodedata.normalize("NFC", str(text)).casefold()
    text = "".join(c for c in text if unicodedata.category(c) != "Cf")
    return unicodedata.normalize("NFC", text)


def is_east_asian(character):
    """Whether a character is an ideograph or kana."""
    return any(first <= ord(character) <= last for first, last in EAST_ASIAN)


class Letters(dict):
    """Code point -> what a word has of it, worked out when a character is first met, for
    `str.translate`: letters, digits and the marks that belong to them; a space for the rest."""

    def __missing__(self, point):
        character = chr(point)
        text = " "
        if is_east_asian(character):
            text = f" {character} "
        elif 0xFE00 <= point <= 0xFE0F:  # says how the character before it is drawn
            text = ""
        elif character == "_" or unicodedata.category(character)[0] in "LNM":
            text = character
        self[point] = text
        return text


LETTERS = Letters()


def words_of(note):
    """The words and numbers of a note, in normal form; `[MASK]` is one word."""
    words = []
    for i, part in enumerate(normal_form(note).split("[mask]")):
        if i:
            words.append("[mask]")
        words += part.translate(LETTERS).split()
    return words


def earlier_words_of(note):
    """The words as versions before this one cut them: without normal form, marks apart."""
    return re.findall(r"\[mask\]|\w+", str(note).lower())


# What a manifest calls a way to cut notes, and the function.
TOKENIZER = "crc32-nfc"  # that of this version
CUTS = {"crc32": earlier_words_of, TOKENIZER: words_of}


def word_id(word, buckets):
    """A word's id in [3, buckets), by crc32; the word `[mask]` is UNK."""
    if word == "[mask]":
        return UNK
    return 3 + zlib.crc32(word.encode("utf-8", "replace")) % (buckets - 3)


def buckets_for(notes):
    """Hash buckets for the words of notes: 16 for each distinct one, as a power of two from 2,048 to
    65,536. With 16, about 6 in 100 words share an id."""
    distinct = {word for note in notes for word in words_of(note)}
    return 1 << min(16, max(11, (16 * len(distinct) - 1).bit_length()))


def positions_for(notes, least=4, most=128):
    """Word positions for notes: what the longest needs, a multiple of 4, so that studies of about
    the same length share a base."""
    longest = max((len(words_of(note)) for note in notes), default=0)
    return min(most, max(least, -(-(1 + longest) // 4) * 4))


def coverage(notes, buckets, positions):
    """In words: how many distinct words share an id with another, and how many are cut."""
    found = [words_of(note) for note in notes]
    distinct = {word for words in found for word in words}
    sharing = Counter(word_id(word, buckets) for word in distinct)
    shared = sum(count for count in sharing.values() if count > 1)
    total = sum(map(len, found))
    cut = sum(max(0, len(words) - (positions - 1)) for words in found)
    return (f"{len(distinct):,} distinct on {buckets:,} ids, {shared:,} share an id; {cut:,} of "
            f"{total:,} are cut at {positions} positions")


def tokenize(notes, buckets, positions, cut=words_of):
    """Word ids [N,P] int64 of N strings: CLS, the words, PAD; what is past P positions is cut.

    An empty note is [CLS, PAD, ...], never all padding: a softmax over nothing is NaN.
    """
    ids = np.full((len(notes), positions), PAD, np.int64)
    ids[:, 0] = CLS
    for row, note in zip(ids, notes):
        words = cut(note)[: positions - 1]
        row[1 : 1 + len(words)] = [word_id(word, buckets) for word in words]
    return ids
