"""Vocabularies: the text files of a snapshot folder that give known values their index.

One value a line, UTF-8, each line ended by a single line feed; an int64 stands there in decimal. The first line is
index 1; index 0 is left for unknown values and null.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from schemas.hashing import take_indexed


class VocabularyError(ValueError):
    """A vocabulary that cannot be written or read back as it was."""


class Vocabulary:
    """The index of each known value; built once and used for many chunks.

    Raises:
        VocabularyError: A value is there twice, or holds a line break and so has no line of its own.
    """

    def __init__(self, values: Iterable[str | int]) -> None:
        self.values: Sequence[str] = tuple(str(value) for value in values)
        self._index = {value: place for place, value in enumerate(self.values, start=1)}
        if len(self._index) != len(self.values):
            raise VocabularyError("a vocabulary names a value twice")
        if any("\n" in value for value in self.values):
            raise VocabularyError("a vocabulary's values hold a line break; such values need a hash")

    def __len__(self) -> int:
        return len(self.values)

    def index(self, values: pa.Array) -> NDArray[np.int64]:
        """Give the index of each string or int64, 0 where it is unknown; null slots hold anything."""
        encoded = values if pa.types.is_dictionary(values.type) else values.dictionary_encode()
        get = self._index.get
        places = [get(str(value), 0) for value in encoded.dictionary.to_pylist()]
        return take_indexed(np.array(places, dtype=np.int64), encoded.indices)

    def to_bytes(self) -> bytes:
        """Give the file's content."""
        return "".join(value + "\n" for value in self.values).encode()


def read_vocabulary(path: Path) -> Vocabulary:
    """Give the vocabulary in a file.

    Raises:
        VocabularyError: The file is not UTF-8 or names a value twice.
    """
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise VocabularyError(f"{path.name} is not UTF-8 text (byte {error.start})") from None
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    try:
        return Vocabulary(lines)
    except VocabularyError as error:
        raise VocabularyError(f"{path.name}: {error}") from None
