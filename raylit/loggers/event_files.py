"""TensorBoard's event files, as files: how long they are, and how entries are taken out of them. Driver only."""

import os
import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raylit.loggers.file import is_past
from raylit.places import file_system, is_url, joined, replace_file, write_bytes

_MARK = "events.out.tfevents"
_LENGTH = struct.Struct("<Q")
_CRC_BYTES = 4


def sizes(directory: str) -> dict[str, int]:
    """The bytes of each event file in the directory or below it, by its path there."""
    if is_url(directory):
        files, root = file_system(directory)
        files.invalidate_cache()
        found = files.find(root, detail=True) if files.exists(root) else {}
        named = {path[path.index(root.strip("/")) + len(root.strip("/")) :].strip("/"): path for path in found}
        return {name: int(found[path]["size"]) for name, path in named.items() if _is_event_file(name)}
    paths = [os.path.join(parent, name) for parent, _, names in os.walk(directory) for name in names]
    return {os.path.relpath(path, directory): os.path.getsize(path) for path in paths if _is_event_file(path)}


def remove_past(directory: str, names: Sequence[str], *, step: int, sure: Mapping[str, int] | None) -> bool:
    """Take out what comes again in a run that goes on from a checkpoint after `step` steps: what lies beyond the
    numbers of bytes that files had then, or, where those are not known, what stands at that step or later. Returns
    whether there was anything, and nothing is left at that step or later."""
    contents = {name: _read(joined(directory, name)) for name in names}
    starts = {name: sure.get(name, 0) for name in names} if sure is not None else {}
    others = {
        tag
        for content in contents.values()
        for _, event in _records(content)
        if event.step != step
        for tag in _tags(event)
    }
    has_removed, newest_kept = False, -1
    for name, content in contents.items():
        kept = bytearray()
        num_read = num_out = 0
        for record, event in _records(content):
            tags = _tags(event)
            is_before = num_read < starts[name] if sure is not None else event.step < step
            num_read += len(record)
            if is_before or not tags or not is_past(event.step, tags, limit=step, others=others):
                kept += record
                newest_kept = max(newest_kept, event.step if tags else -1)
            else:
                num_out += 1
        if num_out > 0:
            has_removed = True
            _replace(joined(directory, name), bytes(kept))
    return has_removed and newest_kept < step


def wait_for_later_name(directory: str) -> None:
    """Readers go by the files' names, which have the second in them: one that continues others is to be the last."""
    seconds = [os.path.basename(name).partition(f"{_MARK}.")[2].partition(".")[0] for name in sizes(directory)]
    newest_s = max((int(text) for text in seconds if text.isdecimal()), default=0)
    if (left_s := newest_s + 1 - time.time()) <= 1.0:
        time.sleep(max(0.0, left_s))


def _is_event_file(path: str) -> bool:
    return _MARK in os.path.basename(path)


def _records(content: bytes) -> Iterator[tuple[bytes, Any]]:
    """Each whole record and the event in it; what was cut off while it was written comes to nothing."""
    from tensorboard.compat.proto.event_pb2 import Event  # slow to import

    start = 0
    while start + _LENGTH.size + _CRC_BYTES <= len(content):
        (length,) = _LENGTH.unpack_from(content, start)
        first = start + _LENGTH.size + _CRC_BYTES
        end = first + length + _CRC_BYTES
        if end > len(content):
            return
        yield content[start:end], Event.FromString(content[first : first + length])
        start = end


def _tags(event: Any) -> list[str]:
    return [value.tag for value in event.summary.value] if event.HasField("summary") else []


def _read(path: str) -> bytes:
    if is_url(path):
        files, place = file_system(path)
        return bytes(files.cat_file(place))
    with open(path, "rb") as file:
        return file.read()


def _replace(path: str, content: bytes) -> None:
    if is_url(path):
        write_bytes(content, path)
        return
    replace_file(content, path)
