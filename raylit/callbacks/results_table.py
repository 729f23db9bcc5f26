"""The table of results that validate and test print at their end. Driver only."""

import shutil
from collections.abc import Mapping, Sequence

from raylit.tables import drawn, printable

_MIN_WIDTH = 25


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
        print(printable("\n".join(drawn(header, [row for row in rows if any(row[1:])], widths))))


def _row_name(name: str, dataloader_idx: int) -> str:
    return name.removesuffix(f"/dataloader_idx_{dataloader_idx}")
