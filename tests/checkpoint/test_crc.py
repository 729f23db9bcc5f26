"""The checksums in checkpoints are zip's own."""

import io
import zipfile
import zlib

import numpy as np
import pytest
import torch

from raylit.checkpoint.crc import Crc32
from raylit.checkpoint.image import Image


def test_the_number_is_zlibs_whatever_the_size() -> None:
    crc = Crc32()
    data = np.random.default_rng(0).integers(0, 256, 6_000_000, dtype=np.uint8)
    sizes = (0, 1, 1_000, 1_042_879, 1_042_880, 1_042_881, 1_260_000, 2_000_001, 5_999_999)
    for size in sizes:
        assert crc.of(data[:size]) == zlib.crc32(data[:size]), size
        assert crc.of(data[:size], 123_456_789) == zlib.crc32(data[:size], 123_456_789), size


def test_every_bit_counts() -> None:
    crc, data = Crc32(), np.zeros(2_000_000, np.uint8)
    whole = crc.of(data)
    for place in (0, 3, 4, 260_719, 260_720, 1_000_000, 1_739_280, 1_999_999):
        data[place] ^= 16
        assert crc.of(data) != whole
        data[place] ^= 16
    assert crc.of(data[:-1]) != whole


def test_any_program_finds_the_checksums_sound() -> None:
    state = {"large": torch.randn(700_000), "small": torch.arange(3), "empty": torch.empty(0), "name": "x" * 70_000}
    image = Image(state)
    whole = b"".join(bytes(image.piece(number)) for number in range(image.num_pieces))
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        assert archive.testzip() is None
        assert all(record.CRC for record in archive.infolist() if record.file_size > 0)
    file = io.BytesIO()
    torch.save(state, file)
    with zipfile.ZipFile(file) as theirs, zipfile.ZipFile(io.BytesIO(whole)) as ours:
        numbers = [{name: archive.getinfo(f"archive/data/{name}").CRC for name in "012"} for archive in (theirs, ours)]
    assert numbers[0] == numbers[1]


@pytest.mark.slow
def test_more_than_four_gigabytes_and_many_records() -> None:
    state = {"first": torch.zeros(2**30 + 1), "many": [torch.full((1,), float(i)) for i in range(66_000)]}
    image = Image(state)
    file = _Pieces(image)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        assert len(names) > 66_000
        infos = {info.filename: info for info in archive.infolist()}
        one = torch.tensor([65_999.0]).numpy().tobytes()
        assert zlib.crc32(one) == infos["archive/data/66000"].CRC
        assert _crc_of_zeros(2**32 + 4) == infos["archive/data/0"].CRC


class _Pieces(io.RawIOBase):
    """The image as a file, of which few pieces are in memory at once."""

    def __init__(self, image: Image) -> None:
        self._image, self._place = image, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = offset + (0, self._place, self._image.num_bytes)[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = self._image.num_bytes if size < 0 else min(self._place + size, self._image.num_bytes)
        self._image._seal(end)
        data = b"".join(self._image._slices(self._place, end - self._place))
        self._place = end
        return data


def _crc_of_zeros(size: int) -> int:
    crc, zeros = 0, bytes(2**24)
    while size > 0:
        crc = zlib.crc32(zeros[: min(size, 2**24)], crc)
        size -= 2**24
    return crc
