"""CSVLogger: metrics as a table in `metrics.csv`. Driver only."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

from raylit.errors import ConfigError
from raylit.loggers.file import FileLogger, is_past
from raylit.storage import exists, is_url, join, make_directory, read_text, write_text


class CSVLogger(FileLogger):
    """`metrics.csv` in `save_dir/name/version_N`: one row for each call of `log_metrics`, one column for each name.

    Rows wait in memory until `flush_logs_every_n_steps` further steps have gone by, or `save`, as before each
    checkpoint. An existing file of a given version is continued; a run that goes on from a checkpoint removes the rows
    after it.
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
        self._num_written: int | None = None
        """In the file; None: not counted yet."""

    @property
    def metrics_file(self) -> str:
        return join(self.log_dir, "metrics.csv")

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
        if not self._rows:
            return
        num_before = self._count_written()
        try:
            if num_before > 0 and not exists(self.metrics_file):
                raise FileNotFoundError(f"{self.metrics_file} has been removed, and with it {num_before} rows")
            _append(self.metrics_file, self._rows)
        except FileNotFoundError:
            # The rows wait for the next attempt.
            self._num_written = 0
            make_directory(self.log_dir)
            raise
        self._num_written = num_before + len(self._rows)
        self._rows = []

    def position(self) -> Any:
        if not self.has_log_dir:
            return None
        return {"log_dir": self.log_dir, "num_rows": self._count_written()}

    def resume(self, step: int, position: Any) -> None:
        self._num_written = None
        if not self.has_log_dir or not exists(self.metrics_file):
            return
        columns, rows = _read(self.metrics_file)
        num_sure = position["num_rows"] if self._is_own(position) else 0
        steps = [int(row["step"]) if row["step"].lstrip("-").isdigit() else None for row in rows]
        names = [{name for name, value in row.items() if value and name not in ("step", "epoch")} for row in rows]
        others = set().union(*(own for own, at in zip(names, steps, strict=True) if at != step))

        def stays(index: int) -> bool:
            at = steps[index]
            if index < num_sure or (not self._is_own(position) and (at is None or at < step)):
                return True
            return not is_past(at, names[index], limit=step, others=others)

        kept = [row for index, row in enumerate(rows) if stays(index)]
        if len(kept) < len(rows):
            _replace(self.metrics_file, columns, kept)

    def _count_written(self) -> int:
        if self._num_written is None:
            self._num_written = len(_read(self.metrics_file)[1]) if exists(self.metrics_file) else 0
        return self._num_written

    def finalize(self, status: str) -> None:
        self.save()

    def __getstate__(self) -> dict[str, Any]:
        # The rows are the original's to write; with them in a copy they would be written twice.
        return {**self.__dict__, "_rows": []}


def _append(path: str, rows: list[dict[str, Any]]) -> None:
    """Adds rows to the file; one with new columns makes the file be written anew with the longer header."""
    if is_url(path):
        columns, old_rows = _read(path) if exists(path) else ([], [])
        rows = [*old_rows, *rows]
        _replace(path, list(dict.fromkeys([*columns, *(name for row in rows for name in row)])), rows)
        return
    # Read from the file each time, which costs a line: another logger of the same version may have added columns.
    old_columns = _read_header(path)
    columns = list(dict.fromkeys([*old_columns, *(name for row in rows for name in row)]))
    if columns != old_columns:
        _replace(path, columns, [*(_read(path)[1] if old_columns else []), *rows])
        return
    num_bytes = os.path.getsize(path)
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, restval="").writerows(rows)
    except OSError:
        # Of a full disk, half a row: all of them are tried again.
        os.truncate(path, num_bytes)
        raise


def _read_header(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _read(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows."""
    reader = csv.DictReader(io.StringIO(read_text(path) or "", newline=""), restval="")
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def _replace(path: str, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write the file anew, at once, so that neither a reader nor a crash finds half a table."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)
