"""Looks at the processes of this machine."""

from pathlib import Path


def children(parent: int, title: str) -> list[int]:
    """Processes below a parent whose command line begins with a title."""
    found = []
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text()
                parents[int(entry.name)] = int(stat.rsplit(")", 1)[1].split()[1])
            except OSError:
                continue
    for pid in parents:
        above = pid
        while above in parents and above != parent:
            above = parents[above]
        if above == parent and pid != parent:
            try:
                if (Path("/proc") / str(pid) / "cmdline").read_text().startswith(title):
                    found.append(pid)
            except OSError:
                continue
    return found
