"""What tracing may take for granted of a user's code, in sentences."""

from __future__ import annotations

from dataclasses import dataclass

VISITS = "every index is visited: for an expert without tokens the loop's body changes nothing"
CLASSES = "there is a count for every class: those after the last one chosen are 0 and change nothing"
COUNTS = "the numbers read from the tensor are counts: none is negative"
TOKENS = "the branch is the one of an expert that has tokens; without tokens it changes nothing"
SIZES = "sizes that depend on data are equal where they meet, and none is a single row to be broadcast"
WITHIN = "slices by counts lie within what they slice, each end after its start"
SENTINEL = "no token selects the last class"


@dataclass(frozen=True)
class Assumption:
    """What tracing took for granted, one of the sentences above, and the user's "file.py:123" it is about."""

    text: str
    source: str

    def __str__(self) -> str:
        return f"{self.source}: {self.text}" if self.source else self.text
