"""Tables in box-drawing characters, on stdout or as text. Both sides."""

import sys
from collections.abc import Callable, Sequence

_TO_ASCII = str.maketrans("━─┃│┏┳┓┡╇┩└┴┘", "=-||+++++++++")


def drawn(
    header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], *, align: str | None = None
) -> list[str]:
    """The lines of a table whose columns have these widths. `align`: "l", "r" or "c" for each; None: all centred."""
    align = align or "c" * len(widths)
    return [
        _line("┏┳┓", ["━" * width for width in widths]),
        _line("┃┃┃", _placed(header, widths, align)),
        _line("┡╇┩", ["━" * width for width in widths]),
        *(_line("│││", _placed(row, widths, align)) for row in rows),
        _line("└┴┘", ["─" * width for width in widths]),
    ]


def fitting_widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Of columns just wide enough for what stands in them."""
    return [max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)]


def printable(text: str) -> str:
    """A table that stdout cannot encode would end a good run with an exception."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_TO_ASCII)
    return text


def _line(borders: str, cells: Sequence[str]) -> str:
    return borders[0] + borders[1].join(cells) + borders[2]


def _placed(texts: Sequence[str], widths: Sequence[int], align: str) -> list[str]:
    return [_PLACES[side](text, width) for text, width, side in zip(texts, widths, align, strict=True)]


_PLACES: dict[str, Callable[[str, int], str]] = {
    "c": str.center,
    "l": lambda text, width: f" {text}".ljust(width),
    "r": lambda text, width: f"{text} ".rjust(width),
}
