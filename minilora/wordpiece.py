"""Words cut into the pieces of a BERT vocabulary, for a base that was pretrained on them.

Training, export and serving share it. Skip it when you read for a method.
Normal form and cutting are those of the uncased BERT models, as the tokenizers library has them.
"""

import re
import unicodedata

import numpy as np

# Pieces that a text may hold as they are written here; `[mask]` is punctuation and a word.
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
SPECIAL = re.compile("(" + "|".join(map(re.escape, SPECIALS)) + ")")
LONGEST_WORD = 100  # characters; a longer word is [UNK]
# Each of these characters is a word. The sixth range starts where the tokenizers library has it.
CHINESE = re.compile(
    "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b81f"
    "\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]"
)


def is_punctuation(character):
    """Whether a character is a word of its own: Unicode's punctuation and ASCII's symbols."""
    kind = unicodedata.category(character)[0]
    return kind == "P" or (kind == "S" and character.isascii())


def normal_form(character):
    """What a character is read as: lower-cased, without accents, with spaces around punctuation."""
    category = unicodedata.category(character)
    if character in "\t\n\r" or category[0] == "Z":
        return " "
    if character == "\ufffd" or category in ("Cc", "Cf", "Co", "Cs"):
        return ""  # control, format, private use, half of a surrogate pair
    parts = unicodedata.normalize("NFD", character)
    parts = [part.lower() for part in parts if unicodedata.category(part) != "Mn"]
    text = "".join(f" {part} " if is_punctuation(part) else part for part in parts)
    return f" {text} " if CHINESE.match(character) else text


class NormalForms(dict):
    """Code point -> normal form, worked out when a character is first met, for `str.translate`."""

    def __missing__(self, point):
        self[point] = normal_form(chr(point))
        return self[point]


class WordPiece:
    """Cuts notes into pieces. `vocabulary` is the text of a vocab.txt: the piece of id n in line n.

    `.text` is that text, `.size` its number of pieces. Raises ValueError for a vocabulary that is
    empty, holds a piece twice, lacks one of SPECIALS, or does not begin with [PAD].
    """

    def __init__(self, vocabulary):
        # str.splitlines would also cut at U+2028 and its like, which are pieces or stand in them.
        lines = vocabulary.removesuffix("\n").split("\n")
        lines = [line.removesuffix("\r") for line in lines]
        if lines == [""]:
            raise ValueError("the vocabulary is empty")
        self.ids = {piece: number for number, piece in enumerate(lines)}
        again = [piece for number, piece in enumerate(lines) if self.ids[piece] != number]
        missing = [piece for piece in SPECIALS if piece not in self.ids]
        if again:
            raise ValueError(f"the vocabulary holds the piece {again[0]!r} more than once")
        if missing:
            raise ValueError(f"the vocabulary lacks {', '.join(missing)}")
        if lines[0] != "[PAD]":
            raise ValueError(f"the vocabulary's first piece is {lines[0]!r} and must be [PAD]")
        self.text = vocabulary
        self.size = len(lines)
        self.forms = NormalForms()
        self.words = {}  # word -> its pieces: notes repeat words

    def cut(self, word):
        """The pieces of a word in normal form: again and again the longest that fits, or [UNK]."""
        if len(word) > LONGEST_WORD:
            return ["[UNK]"]
        pieces = []
        start = 0
        while start < len(word):
            prefix = "##" if start else ""
            end = len(word)
            while end > start and prefix + word[start:end] not in self.ids:
                end -= 1
            if end == start:
                return ["[UNK]"]
            pieces.append(prefix + word[start:end])
            start = end
        return pieces

    def pieces(self, note):
        """The pieces of a note, without [CLS] and [SEP]."""
        pieces = []
        for part in SPECIAL.split(str(note)):
            if part in SPECIALS:
                pieces.append(part)
                continue
            if len(self.words) > 10**5:  # a server must not remember every word that it ever met
                self.words.clear()
            for word in part.translate(self.forms).split():
                if word not in self.words:
                    self.words[word] = self.cut(word)
                pieces += self.words[word]
        return pieces

    def tokenize(self, notes, positions):
        """Piece ids [N,P] int64 of N notes: the pieces, [SEP], then [PAD], which is 0.

        There is no [CLS]: the model's classification token is it. Of a note that is too long the
        first P - 1 pieces are kept, then [SEP]. An empty note is [SEP], [PAD], ...
        """
        ids = np.zeros((len(notes), positions), np.int64)  # [N,P]
        for row, note in zip(ids, notes):
            pieces = self.pieces(note)[: positions - 1] + ["[SEP]"]
            row[: len(pieces)] = [self.ids[piece] for piece in pieces]
        return ids

    def longest(self, notes):
        """How many positions the longest of the notes needs, its [SEP] counted; 1 without notes."""
        return 1 + max((len(self.pieces(note)) for note in notes), default=0)
