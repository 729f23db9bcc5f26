"""Position: how much of an epoch's data has been dealt out, by however many workers. Worker."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """After so many batches of each worker so many items of the epoch's order had gone to the workers together.

    It holds for every number of workers and size of batches: the rest is cut into other batches, its items stay.
    """

    epoch: int = -1
    num_batches: int = 0
    num_items: int = 0
    """Samples; batches where a loader's batches are dealt out whole."""

    @classmethod
    def of(cls, stored: dict[str, Any] | None) -> "Position | None":
        """What `to_dict` gave."""
        return None if stored is None else cls(**stored)

    def to_dict(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in self.__slots__}

    def num_items_at(self, num_batches: int, *, group_size: int) -> int:
        """Where the workers are that go on from here with `group_size` items in each step."""
        return self.num_items + (num_batches - self.num_batches) * group_size
