"""Predictions of all workers in data-set order, and the files of `EvalResult.write`. Driver."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from raylit.errors import ConfigError
from raylit.protocol.messages import Predicted, Written


def restore_sample_order(parts: Sequence[Predicted]) -> list[list[Any]]:
    """Return for each loader the outputs of its batches, in data-set order."""
    indexed_outputs = [
        [pair for part in parts for pair in part.outputs[index]] for index in range(len(parts[0].outputs))
    ]
    return [[output for _, output in sorted(pairs, key=lambda pair: pair[0])] for pairs in indexed_outputs]


def write(reports: Sequence[Written]) -> None:
    """Write for each file a list of row dicts in data-set order."""
    for filename in dict.fromkeys(filename for report in reports for filename in report.files):
        batches = [batch for report in reports for batch in report.files.get(filename, ())]
        batches.sort(key=lambda batch: batch[:2])
        _save_rows([row for _, _, columns in batches for row in _iterate_rows(columns)], filename)


def _iterate_rows(columns: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    names = list(columns)
    for values in zip(*columns.values(), strict=True):
        # A view would be serialized with the whole batch.
        yield {
            name: value.clone() if isinstance(value, Tensor) else value
            for name, value in zip(names, values, strict=True)
        }


def _save_rows(rows: list[dict[str, Any]], filename: str) -> None:
    if "://" in filename:
        with _open_remote(filename) as file:
            torch.save(rows, file)
        return
    path = Path(filename).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # The name is random, so that no other user can put a link to another file there.
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        torch.save(rows, temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _open_remote(filename: str) -> Any:
    try:
        import fsspec
    except ImportError as error:
        raise ConfigError(f"EvalResult.write(filename={filename!r}) needs fsspec: pip install fsspec") from error
    return fsspec.open(filename, "wb")
