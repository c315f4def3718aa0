"""The NUMA nodes of the host (Documentation/ABI/stable/sysfs-devices-node), and those that a process may use."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

NODES = "sys/devices/system/node"
_MOST_NODES = 1024  # include/linux/numa.h: MAX_NUMNODES


def node_numbers(names: Iterable[str]) -> list[int]:
    """Return the sorted numbers of the nodes among the names in the directory :data:`NODES`."""
    return sorted(int(name[4:]) for name in names if name.startswith("node") and name[4:].isdecimal())


def parse_nodes(text: str) -> frozenset[int]:
    """Return the numbers in a list such as ``0-1,3`` (``Mems_allowed_list``), without what is no such list."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if first.isdecimal() and (last.isdecimal() or not dash):
            numbers.update(range(int(first), min(int(last or first), _MOST_NODES) + 1))
    return frozenset(numbers)


def split_nodes(names: Iterable[str], memory: str, allowed: str) -> tuple[list[int], list[int]]:
    """Return the nodes with memory that are ``allowed``, and the others; if none is, that is unknown: all are.

    ``names``: those in the directory :data:`NODES`; ``memory``: the list in its file ``has_memory``. The kernel never
    allows a node without memory; where that list is unknown, all nodes are taken to have some.
    """
    nodes, present, numbers = node_numbers(names), parse_nodes(memory), parse_nodes(allowed)
    nodes = [node for node in nodes if node in present] or nodes
    ours = [node for node in nodes if node in numbers] or nodes
    return ours, [node for node in nodes if node not in ours]


def own_nodes() -> tuple[list[int], list[int]]:
    """Return the nodes that this process may have memory of, and the others (``/proc/self/status``, cpuset)."""
    try:
        names, status = os.listdir(f"/{NODES}"), Path("/proc/self/status").read_text()  # noqa: PTH208 - lighter
    except OSError:  # a kernel without CONFIG_NUMA
        return [], []
    allowed = re.search(r"^Mems_allowed_list:\s*(.*)$", status, re.MULTILINE)
    memory = ""
    with suppress(OSError):  # before Linux 3.8
        memory = Path("/", NODES, "has_memory").read_text()
    return split_nodes(names, memory, allowed[1] if allowed else "")
