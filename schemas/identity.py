"""What stands for an object in a cache: found by which object it is, so that nothing of it is compared or hashed."""

from dataclasses import dataclass
from typing import Generic, TypeVar

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, eq=False)
class Identity(Generic[_T]):
    """Equal to another one of the same object alone. A cache that has it keeps the object."""

    of: _T

    def __hash__(self) -> int:
        return id(self.of)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identity) and self.of is other.of
