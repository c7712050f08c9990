"""The words of a note, as the hashed ids that a model reads: there is no vocabulary to ship.

Training, export and serving share it. Skip it when you read for a method.
"""

import re
import zlib

import numpy as np

PAD, CLS, UNK = 0, 1, 2  # reserved word ids; hashed words start at 3


def word_id(word, buckets):
    """A word's id in [3, buckets), by crc32; the word `[mask]` is UNK."""
    if word == "[mask]":
        return UNK
    return 3 + zlib.crc32(word.encode("utf-8", "replace")) % (buckets - 3)


def words_of(note):
    """The lower-cased words and numbers of a note; `[MASK]` is one word."""
    return re.findall(r"\[mask\]|\w+", str(note).lower())


def tokenize(notes, buckets, positions):
    """Word ids [N,P] int64 of N strings: CLS, the words, PAD; what is past P positions is cut.

    An empty note is [CLS, PAD, ...], never all padding: a softmax over nothing is NaN.
    """
    ids = np.full((len(notes), positions), PAD, np.int64)
    ids[:, 0] = CLS
    for row, note in zip(ids, notes):
        words = words_of(note)[: positions - 1]
        row[1 : 1 + len(words)] = [word_id(word, buckets) for word in words]
    return ids
