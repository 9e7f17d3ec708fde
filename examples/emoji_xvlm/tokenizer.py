"""Word-level tokenizer with plural endings as pieces ("dogs" is ``dog ##s``)."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
ENDINGS = ("s", "es")
DEFAULT_VOCABULARY = Path(__file__).resolve().parent / "vocab.json"

IntArray = npt.NDArray[np.int64]


class Tokenizer:
    """Maps sentences to padded token ids and back."""

    def __init__(self, vocabulary: Sequence[str]) -> None:
        if tuple(vocabulary[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise ValueError(f"the vocabulary must begin with {', '.join(SPECIAL_TOKENS)}")
        self._tokens = tuple(vocabulary)
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self.pad_id, self.unknown_id, self.cls_id, self.sep_id, self.mask_id = range(len(SPECIAL_TOKENS))

    @classmethod
    def from_file(cls, path: Path = DEFAULT_VOCABULARY) -> "Tokenizer":
        """The tokenizer of a committed ``vocab.json``."""
        return cls(json.loads(path.read_text(encoding="utf-8")))

    @property
    def tokens(self) -> tuple[str, ...]:
        """The vocabulary, by id."""
        return self._tokens

    def __len__(self) -> int:
        return len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Token ids of one sentence, [CLS] first and [SEP] last."""
        pieces = [piece for word in text.lower().replace(",", " ,").split() for piece in self._encode_word(word)]
        return [self.cls_id, *pieces, self.sep_id]

    def _encode_word(self, word: str) -> list[int]:
        if word in self._ids:
            return [self._ids[word]]
        for ending in ENDINGS:
            stem = word.removesuffix(ending)
            if stem != word and stem in self._ids:
                return [self._ids[stem], self._ids["##" + ending]]
        return [self.unknown_id]

    def decode(self, ids: Sequence[int]) -> str:
        """The sentence of one row of ids; special tokens are left out."""
        words = [self._tokens[index] for index in ids if index >= len(SPECIAL_TOKENS)]
        return " ".join(words).replace(" ##", "").replace(" ,", ",")

    def encode_batch(self, texts: Sequence[str], length: int | None = None) -> tuple[IntArray, IntArray]:
        """Ids and padding mask of several sentences, padded on the right.

        Args:
            texts: (B) sentences.
            length: tokens a row; the longest sentence decides where it is None.

        Returns:
            input_ids: (B, L) int64, padded with 0.
            attention_mask: (B, L) int64, 1 = a token, 0 = padding.

        Raises:
            ValueError: a sentence has more tokens than ``length``.
        """
        rows = [self.encode(text) for text in texts]
        longest = max(map(len, rows))
        if length is not None and longest > length:
            raise ValueError(f"a sentence has {longest} tokens, more than length={length}")
        input_ids = np.full((len(rows), length or longest), self.pad_id, dtype=np.int64)
        attention_mask = np.zeros_like(input_ids)
        for index, row in enumerate(rows):
            input_ids[index, : len(row)] = row
            attention_mask[index, : len(row)] = 1
        return input_ids, attention_mask
