"""CSVLogger: metrics as a table in `metrics.csv`. Driver only."""

import csv
import io
import os
from collections.abc import Iterable, Mapping
from typing import Any

from raylit.errors import ConfigError
from raylit.loggers.base import FileLogger, is_repeated
from raylit.storage import exists, is_url, join, make_directory, read_text, write_text


class CSVLogger(FileLogger):
    """Logger that writes `save_dir/name/version_N/metrics.csv`: a row per `log_metrics` call, a column per name.

    Rows stay in memory for `flush_logs_every_n_steps` steps, or until `save`, which is called before each checkpoint.
    An existing file of a given version is continued; a run that continues from a checkpoint removes the rows after it.

    Args:
        save_dir: Root directory or fsspec URL; None: the Trainer's.
        name: Directory below `save_dir`.
        version: Number or name of the version; None: the next free number.
        prefix: Put before every metric's name, with a hyphen.
        flush_logs_every_n_steps: Steps after which rows are written, at least 1.

    Raises:
        ConfigError: if an argument is invalid, or a name leads out of `save_dir`.
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
        """Number of rows logged, written or not."""
        self._num_written: int | None = None
        """Number of rows in the file; None if they have not been counted."""

    @property
    def metrics_file(self) -> str:
        """Path of the table."""
        return join(self.log_dir, "metrics.csv")

    @property
    def experiment(self) -> "CSVLogger":
        """The logger itself, as there is no other package behind it."""
        return self

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is None:
            step = self._num_rows
        self._num_rows += 1
        values: dict[str, float] = self._convert_metrics(metrics)
        if "epoch" in values:
            values["epoch"] = int(values["epoch"])
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
            _append_rows(self.metrics_file, self._rows)
        except FileNotFoundError:
            # The rows stay in memory for the next attempt.
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
        columns, rows = _read_table(self.metrics_file)
        num_sure = position["num_rows"] if self._is_own(position) else 0
        steps = [int(row["step"]) if row["step"].lstrip("-").isdigit() else None for row in rows]
        names = [{name for name, value in row.items() if value and name not in ("step", "epoch")} for row in rows]
        others = set().union(*(row_names for row_names, at in zip(names, steps, strict=True) if at != step))

        def stays(index: int) -> bool:
            at = steps[index]
            if index < num_sure or (not self._is_own(position) and (at is None or at < step)):
                return True
            return not is_repeated(at, names[index], limit=step, others=others)

        remaining = [row for index, row in enumerate(rows) if stays(index)]
        if len(remaining) < len(rows):
            _write_table(self.metrics_file, columns, remaining)

    def _count_written(self) -> int:
        if self._num_written is None:
            self._num_written = len(_read_table(self.metrics_file)[1]) if exists(self.metrics_file) else 0
        return self._num_written

    def finalize(self, status: str) -> None:
        self.save()

    def __getstate__(self) -> dict[str, Any]:
        # Only the original writes the rows; a copy would write them a second time.
        return {**self.__dict__, "_rows": []}


def _append_rows(path: str, rows: list[dict[str, Any]]) -> None:
    """Append rows to the file; new columns make it write the whole file with the longer header."""
    if is_url(path):
        columns, old_rows = _read_table(path) if exists(path) else ([], [])
        rows = [*old_rows, *rows]
        _write_table(path, list(dict.fromkeys([*columns, *(name for row in rows for name in row)])), rows)
        return
    # Read each time, which costs one line: another logger of the same version may have added columns.
    old_columns = _read_header(path)
    columns = list(dict.fromkeys([*old_columns, *(name for row in rows for name in row)]))
    if columns != old_columns:
        _write_table(path, columns, [*(_read_table(path)[1] if old_columns else []), *rows])
        return
    num_bytes = os.path.getsize(path)
    try:
        with open(path, "a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, columns, restval="").writerows(rows)
    except OSError:
        # A full disk may leave half a row. Remove it, as all rows are written again at the next attempt.
        os.truncate(path, num_bytes)
        raise


def _read_header(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return next(csv.reader(file), [])


def _read_table(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """Return columns and rows."""
    reader = csv.DictReader(io.StringIO(read_text(path) or "", newline=""), restval="")
    rows = list(reader)
    return list(reader.fieldnames or []), rows


def _write_table(path: str, columns: list[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Replace the file atomically, so that neither a reader nor a crash leaves half a table."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    writer.writeheader()
    writer.writerows(rows)
    write_text(text.getvalue(), path)
