"""What processes hold, as Linux tells it."""

from pathlib import Path


def megabytes(pid: int | str = "self") -> dict[str, float]:
    """USS is the memory that nobody else shares; PSS also counts a process's share of what several have in common, so
    that sums over processes are right; RSS counts all of that."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines[1:]}
    return {"uss": sizes["Private_Clean"] + sizes["Private_Dirty"], "pss": sizes["Pss"], "rss": sizes["Rss"]}


def descendants(pid: int) -> list[int]:
    """Of a process, children first."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    children = [int(child) for task in tasks for child in (task / "children").read_text().split()]
    return children + [grandchild for child in children for grandchild in descendants(child)]
