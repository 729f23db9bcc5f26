"""Image: a checkpoint's file as it will be, laid out in memory without a copy of the tensors. Both sides."""

import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.serialization import config

from raylit.checkpoint.archive import Record, records
from raylit.checkpoint.crc import Crc32
from raylit.checkpoint.disk import BLOCK_BYTES, MIN_DIRECT_BYTES
from raylit.checkpoint.layout import PIECE_BYTES, Layout

Known = dict[tuple[int, int], int]
"""Checksums of tensors that stay as they are, by address and size of their memory."""


class Image(Layout):
    """The bytes of torch's format, with their checksums: headers of its own, and tensors' numbers where they lie.

    Checksums are made while it is read.
    """

    def __init__(self, checkpoint: Mapping[str, Any] | torch.Tensor, *, known: Known | None = None) -> None:
        """`known`: grows; for several images of the same tensors."""
        self._checkpoint: Any = checkpoint  # lives as long as the references to its tensors' memory
        self._known = known
        self._places = places = _places_of(checkpoint)
        recorder: Any = _Recorder(places)
        # So that the disk can take them from where they lie. A file of many small ones would be mostly filling.
        is_aligned = sum(places.values()) >= MIN_DIRECT_BYTES * len(places) > 0
        alignment = BLOCK_BYTES if is_aligned else 64
        patched: Any = config.patch  # type: ignore[attr-defined]
        # torch's own, at zlib's speed, would be made all at once.
        has_checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            with patched({"save.storage_alignment": alignment}):
                torch.save(dict(checkpoint) if isinstance(checkpoint, Mapping) else checkpoint, recorder)
        finally:
            torch.serialization.set_crc32_options(has_checksums)
        super().__init__(recorder.parts())
        unsealed = records(lambda start, size: b"".join(self._slices(start, size)), self.num_bytes)
        self._unsealed = sorted(unsealed, key=lambda record: record.end, reverse=True)
        """Records without their checksum, the first of them last."""
        self._crc = Crc32()
        self._lock = threading.Lock()

    def parts(self) -> Iterator[memoryview]:
        for start, part in zip(self._starts, self._parts, strict=True):
            self._seal(start + len(part))
            yield part

    def piece(self, index: int) -> NDArray[np.uint8]:
        self._seal(min(PIECE_BYTES * (index + 1), self.num_bytes))
        return super().piece(index)

    def _seal(self, end: int) -> None:
        """Put in the checksums that stand before this place."""
        with self._lock:
            while self._unsealed and (record := self._unsealed[-1]).end <= end:
                self._put_checksum(record)
                self._unsealed.pop()

    def _put_checksum(self, record: Record) -> None:
        data = [*self._slices(record.start, record.end - record.start)]
        whole = np.frombuffer(data[0] if len(data) == 1 else b"".join(data), dtype=np.uint8)
        key = (whole.ctypes.data, len(whole))
        number = None if self._known is None else self._known.get(key)
        if number is None:
            number = self._crc.of(whole)
            if self._known is not None and self._places.get(key[0]) == key[1]:
                self._known[key] = number
        for place in record.checksums:
            for offset, byte in enumerate(number.to_bytes(4, "little")):
                [one] = self._slices(place + offset, 1)
                one[0] = byte


class _Recorder:
    """What torch.save takes for a file: keeps what is written to it, tensors' memory by reference."""

    def __init__(self, places: dict[int, int]) -> None:
        self._places = places
        self._parts: list[memoryview] = []
        self._own = bytearray()

    def write(self, data: memoryview) -> int:
        view = np.frombuffer(data, dtype=np.uint8)
        if self._places.get(view.ctypes.data, 0) >= len(data) > 0:
            self._close_own()
            self._parts.append(memoryview(data))
        else:
            self._own += data
        return len(data)

    def flush(self) -> None: ...

    def parts(self) -> list[memoryview]:
        self._close_own()
        return self._parts

    def _close_own(self) -> None:
        if self._own:
            self._parts.append(memoryview(self._own))
            self._own = bytearray()


def _places_of(value: Any) -> dict[int, int]:
    """Address and length of the memory of every CPU tensor."""
    places: dict[int, int] = {}

    def look(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            if value.layout is torch.strided and value.device.type == "cpu":
                storage = value.untyped_storage()
                places[storage.data_ptr()] = storage.nbytes()
        elif isinstance(value, Mapping):
            for item in value.values():
                look(item)
        elif isinstance(value, (list, tuple, set)):
            for item in value:
                look(item)

    look(value)
    return places
