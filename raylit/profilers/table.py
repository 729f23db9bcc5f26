"""The tables of times that a profiler shows at the end of a run. Driver only."""

import shutil
from collections.abc import Sequence

from raylit.messages import Action, Profile
from raylit.tables import drawn, fitting_widths

_GAP = "   "


def drawn_profiles(stage: str, profiles: Sequence[Profile], *, is_extended: bool = True) -> str:
    """A table for each profile, beside each other where the terminal has room for that."""
    shown = [profile for profile in profiles if profile.actions]
    if not shown:
        return ""
    workers = [profile for profile in shown if profile.rank is not None]
    order = list(dict.fromkeys(action.name for profile in workers for action in _longest_first(profile)))
    blocks = [_block(profile, order, is_extended=is_extended) for profile in shown]
    lines = [f"Profile of {stage}, host time"]
    for row in _abreast(blocks, shutil.get_terminal_size().columns):
        lines += ["", *(_GAP.join(parts).rstrip() for parts in zip(*_levelled(row), strict=True))]
    return "\n".join(lines)


def _longest_first(profile: Profile) -> list[Action]:
    return sorted(profile.actions, key=lambda action: action.total_s, reverse=True)


def _block(profile: Profile, order: Sequence[str], *, is_extended: bool) -> list[str]:
    """A profile's title, table and peak memory. Workers' tables have one order of rows, for the eye to compare."""
    actions = {action.name: action for action in _longest_first(profile)}
    names = list(actions) if profile.rank is None else order
    header = ["Action", "Total s", "Mean ms", *(["Calls", "Share"] if is_extended else [])]
    total = Action(name="total", num_calls=1, total_s=profile.elapsed_s)
    measured = [actions.get(name, Action(name=name, num_calls=0, total_s=0.0)) for name in names]
    rows = [_row(action, profile.elapsed_s, is_extended=is_extended) for action in [*measured, total]]
    rows[-1][2:4] = ["", ""][: len(rows[-1]) - 2]
    memory = ", ".join(f"{_size(size)} {of}" for of, size in profile.peak_memory_bytes)
    table = drawn(header, rows, fitting_widths(header, rows), align="l" + "r" * (len(header) - 1))
    return [profile.title, *table, *([f"Peak memory: {memory}"] if memory else [])]


def _row(action: Action, elapsed_s: float, *, is_extended: bool) -> list[str]:
    mean_ms = f"{1000 * action.total_s / action.num_calls:,.3f}" if action.num_calls else ""
    row = [action.name, f"{action.total_s:,.3f}", mean_ms]
    if is_extended:
        row += [f"{action.num_calls:,}" if action.num_calls else "", f"{action.total_s / max(elapsed_s, 1e-9):.1%}"]
    return row


def _abreast(blocks: Sequence[list[str]], width: int) -> list[list[list[str]]]:
    """Rows of as many blocks as fit."""
    rows: list[list[list[str]]] = []
    taken = 0
    for block in blocks:
        block_width = max(map(len, block))
        if rows and taken + len(_GAP) + block_width <= width:
            rows[-1].append(block)
            taken += len(_GAP) + block_width
        else:
            rows.append([block])
            taken = block_width
    return rows


def _levelled(row: Sequence[list[str]]) -> list[list[str]]:
    """Blocks with one number of lines, each line as wide as its block."""
    height = max(map(len, row))
    return [[line.ljust(max(map(len, block))) for line in [*block, *[""] * (height - len(block))]] for block in row]


def _size(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"
