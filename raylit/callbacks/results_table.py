"""The table of results that validate and test print at their end. Driver only."""

import shutil
import sys
from collections.abc import Mapping, Sequence

_MIN_WIDTH = 25
_TO_ASCII = str.maketrans("━─┃│┏┳┓┡╇┩└┴┘", "=-||+++++++++")


def print_results_table(stage: str, per_loader: Sequence[Mapping[str, float]]) -> None:
    """A row for each metric and a column for each loader; columns that the terminal has no room for go below."""
    columns = [
        {_row_name(name, index): str(value) for name, value in one.items()} for index, one in enumerate(per_loader)
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
        print(_printable("\n".join(_table(header, [row for row in rows if any(row[1:])], widths))))


def _row_name(name: str, dataloader_idx: int) -> str:
    return name.removesuffix(f"/dataloader_idx_{dataloader_idx}")


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], widths: Sequence[int]) -> list[str]:
    return [
        _line("┏┳┓", ["━" * width for width in widths]),
        _line("┃┃┃", _centred(header, widths)),
        _line("┡╇┩", ["━" * width for width in widths]),
        *(_line("│││", _centred(row, widths)) for row in rows),
        _line("└┴┘", ["─" * width for width in widths]),
    ]


def _line(borders: str, cells: Sequence[str]) -> str:
    return borders[0] + borders[1].join(cells) + borders[2]


def _centred(texts: Sequence[str], widths: Sequence[int]) -> list[str]:
    return [text.center(width) for text, width in zip(texts, widths, strict=True)]


def _printable(text: str) -> str:
    """A table that stdout cannot encode would end a good run with an exception."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return text.translate(_TO_ASCII)
    return text
