"""CSVLogger: metrics as a table in `metrics.csv`. Driver only."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any, TextIO

from raylit.errors import ConfigError
from raylit.loggers.file import FileLogger
from raylit.places import is_url, joined, read_text, write_text


class CSVLogger(FileLogger):
    """`metrics.csv` in `save_dir/name/version_N`: one row for each call of `log_metrics`, one column for each name.

    Rows wait in memory until `flush_logs_every_n_steps` further steps have gone by, or `save`. An existing file of a
    given version is continued.
    """

    def __init__(
        self,
        save_dir: str | os.PathLike[str] | None = None,
        name: str | None = "lightning_logs",
        version: int | str | None = None,
        prefix: str = "",
        flush_logs_every_n_steps: int = 100,
    ) -> None:
        super().__init__(save_dir, name, version, prefix)
        if flush_logs_every_n_steps < 1:
            raise ConfigError(f"flush_logs_every_n_steps={flush_logs_every_n_steps}: must be at least 1")
        self._flush_every_n_steps = flush_logs_every_n_steps
        self._rows: list[dict[str, Any]] = []
        self._num_rows = 0
        """Those written included."""

    @property
    def metrics_file(self) -> str:
        return joined(self.log_dir, "metrics.csv")

    @property
    def experiment(self) -> "CSVLogger":
        """Itself: there is no other package behind it."""
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            step = self._num_rows
        self._num_rows += 1
        values = {name: int(value) if name == "epoch" else value for name, value in self._prefixed(metrics).items()}
        self._rows.append({"step": step} | values)
        if abs(step - self._rows[0]["step"]) >= self._flush_every_n_steps:
            self.save()

    def save(self) -> None:
        if self._rows:
            _append(self.metrics_file, self._rows)
            self._rows = []

    def finalize(self, status: str) -> None:
        self.save()

    def __getstate__(self) -> dict[str, Any]:
        # The rows are the original's to write; with them in a copy they would be written twice.
        return {**self.__dict__, "_rows": []}


def _append(path: str, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the file; one with new columns makes the file be written anew with the longer header."""
    if is_url(path):
        rows = [*csv.DictReader(io.StringIO(read_text(path) or "", newline="")), *rows]
        text = io.StringIO(newline="")
        _write_rows(text, list(dict.fromkeys(name for row in rows for name in row)), rows)
        write_text(text.getvalue(), path)
        return
    # Read from the file each time, which costs a line: another logger of the same version may have added columns.
    old_columns = _read_header(path)
    columns = list(dict.fromkeys([*old_columns, *(name for row in rows for name in row)]))
    if columns == old_columns:
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, restval="").writerows(rows)
        return
    if not old_columns:
        _write(path, columns, rows)
        return
    with open(path, newline="", encoding="utf-8") as file:
        # Replaced at once, so that neither a reader nor a crash finds half a table.
        _write(f"{path}.new", columns, csv.DictReader(file), rows)
    os.replace(f"{path}.new", path)


def _read_header(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _write(path: str, columns: list[str], *parts: Iterable[Mapping[str, Any]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        _write_rows(file, columns, *parts)


def _write_rows(file: TextIO, columns: list[str], *parts: Iterable[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(file, columns, restval="")
    writer.writeheader()
    for rows in parts:
        writer.writerows(rows)
