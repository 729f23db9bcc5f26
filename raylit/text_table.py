"""Tables of plain text: results, summaries and profiles as the driver prints them. Driver."""

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence

_TO_ASCII = str.maketrans("━─┃│┏┳┓┡╇┩└┴┘", "=-||+++++++++")

_MIN_WIDTH = 25
"""Minimum width of a column, in characters."""


def draw_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int], *, align: str | None = None
) -> list[str]:
    """Return the lines of a table whose columns have these widths.

    `align` has "l", "r" or "c" for each column; None centres all.
    """
    align = align or "c" * len(widths)
    return [
        _line("┏┳┓", ["━" * width for width in widths]),
        _line("┃┃┃", _align(header, widths, align)),
        _line("┡╇┩", ["━" * width for width in widths]),
        *(_line("│││", _align(row, widths, align)) for row in rows),
        _line("└┴┘", ["─" * width for width in widths]),
    ]


def fitting_widths(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[int]:
    """Return widths of columns that are just wide enough for their texts."""
    return [max(map(len, column)) + 2 for column in zip(header, *rows, strict=True)]


def printable(text: str) -> str:
    """Replace the table's lines by ASCII if stdout cannot encode them, which would raise an exception."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_TO_ASCII)
    return text


def print_results_table(stage: str, per_loader: Sequence[Mapping[str, float]]) -> None:
    """Print a row for each metric and a column for each loader.

    Columns that do not fit into the terminal's width are printed in further tables below.
    """
    columns = [
        {_row_name(name, index): str(value) for name, value in metrics.items()}
        for index, metrics in enumerate(per_loader)
    ]
    names = list(dict.fromkeys(name for column in columns for name in column))
    if not names:
        return
    title = f"{stage.capitalize()} metric"
    cells = [text for column in columns for text in column.values()]
    name_width, value_width = (max(_MIN_WIDTH, *map(len, texts)) + 2 for texts in ([title, *names], cells))
    room = shutil.get_terminal_size().columns - name_width - 2
    num_abreast = max(1, room // (value_width + 1))
    for start in range(0, len(columns), num_abreast):
        indices = range(start, min(start + num_abreast, len(columns)))
        header = [title, *(f"DataLoader {index}" for index in indices)]
        rows = [[name, *(columns[index].get(name, "") for index in indices)] for name in names]
        widths = [name_width] + [value_width] * len(indices)
        print(printable("\n".join(draw_table(header, [row for row in rows if any(row[1:])], widths))))


def _line(borders: str, cells: Sequence[str]) -> str:
    return borders[0] + borders[1].join(cells) + borders[2]


def _align(texts: Sequence[str], widths: Sequence[int], align: str) -> list[str]:
    return [_PLACES[side](text, width) for text, width, side in zip(texts, widths, align, strict=True)]


_PLACES: dict[str, Callable[[str, int], str]] = {
    "c": str.center,
    "l": lambda text, width: f" {text}".ljust(width),
    "r": lambda text, width: f"{text} ".rjust(width),
}


def _row_name(name: str, dataloader_idx: int) -> str:
    return name.removesuffix(f"/dataloader_idx_{dataloader_idx}")
