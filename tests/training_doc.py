"""The code of docs/training.md: its fenced blocks, to be run. A diff runs as it was before, then as it is after."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

DOC = Path(__file__).resolve().parents[1] / "docs" / "training.md"
LEFT_OUT = ("Spark", "A trainer that owns its loop")  # tried by hand; tests/unit/vm_training/test_deepctr.py


@dataclass(frozen=True)
class Block:
    """A fenced block of the document. section: the heading above it."""

    section: str
    language: str
    code: str
    line: int

    def run(self, names: dict[str, Any]) -> None:
        """Run Python with these names; what it assigns is put among them."""
        padding = "\n" * self.line  # so that a traceback names the line of the document
        for side in self.sides():
            exec(compile(padding + side, str(DOC), "exec"), names)

    def sides(self) -> Iterator[str]:
        """Give the code, of a diff what stood there before and what stands there after."""
        if self.language != "diff":
            yield self.code
            return
        lines = self.code.splitlines()
        for other in "+-":  # the other side's lines are left empty: a traceback counts them
            yield "".join(("" if line.startswith(other) else line[1:]) + "\n" for line in lines)


def blocks() -> list[Block]:
    found, section, fence = [], "", None
    for number, line in enumerate(DOC.read_text(encoding="utf-8").splitlines(), 1):
        if fence is not None:
            if line == "```":
                found.append(Block(section, fence[0], "\n".join(fence[2]) + "\n", fence[1]))
                fence = None
            else:
                fence[2].append(line)
        elif line.startswith("```"):
            fence = (line.removeprefix("```"), number, [])
        elif line.startswith("#"):
            section = line.lstrip("# ")
    return found


def blocks_with(*texts: str) -> list[Block]:
    """Give the block that has each text."""
    return [next(block for block in blocks() if text in block.code) for text in texts]
