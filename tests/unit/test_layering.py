"""Which module may import which: the layers of the house, held against the import graph."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import kvmpass

PACKAGE = Path(kvmpass.__file__).parent

# Each room's floor. A room imports from lower floors; within a floor only what SAME_FLOOR names.
FLOORS: tuple[frozenset[str], ...] = (
    frozenset({"errors", "_native", "_teardown", "_ratelimit", "hugepages", "ports", "pciregs"}),
    frozenset({"_fd", "_signals", "layout", "bus", "events", "crash"}),
    frozenset({"memory", "initramfs"}),
    frozenset({"kvm", "vfio", "iommufd"}),
    frozenset({"boot", "pci", "dma"}),
    frozenset({"board"}),
    frozenset({"machine", "lab", "testing", "host"}),
    frozenset({"guest"}),
    frozenset({"assignment"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
SAME_FLOOR = {
    ("machine", "host"),  # facts about the host; see test_machine_does_not_touch_drivers
    ("testing", "lab"),
    ("testing", "host"),
    ("testing", "machine"),
}
NATIVE_USERS = {"kvm", "vfio", "iommufd", "memory"}
LEAVES = {"errors", "crash", "_teardown", "_ratelimit", "_fd", "layout", "bus", "initramfs"}
FLOOR_OF = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str:
    """``kvmpass.kvm.vcpu`` is in the room ``kvm``; the package itself has no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: str, source: str, is_package: bool) -> set[str]:
    """Every kvmpass module a source names in an import, at the top or inside a function."""
    package = module if is_package else module.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - (node.level - 1)]
                base = ".".join([*above, base]) if base else ".".join(above)
            # `from kvmpass import kvm` names a room, `from kvmpass.kvm import Vm` a name in one.
            found.update(f"{base}.{alias.name}" if base == "kvmpass" else base for alias in node.names)
    return {name for name in found if name.split(".")[0] == "kvmpass"}


def edges() -> list[tuple[str, str, str]]:
    """(importing module, its room, imported room), without imports inside a room."""
    result = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = module_name(path)
        if module == "kvmpass":
            continue  # the public names: it may take from everywhere
        for name in imported(module, path.read_text(), path.name == "__init__.py"):
            if room(name) not in ("", room(module)):
                result.append((module, room(module), room(name)))
    return result


EDGES = edges()


def test_every_room_has_a_floor() -> None:
    rooms = {room(module_name(path)) for path in PACKAGE.rglob("*.py")} - {""}
    assert rooms <= set(FLOOR_OF), f"new rooms: {sorted(rooms - set(FLOOR_OF))}"


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports kvmpass.{target}"
        for module, source, target in EDGES
        if FLOOR_OF[target] >= FLOOR_OF[source] and (source, target) not in SAME_FLOOR
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_ioctl_layer_and_memory_use_c() -> None:
    assert not [module for module, source, target in EDGES if target == "_native" and source not in NATIVE_USERS]


def test_kernel_interfaces_do_not_know_one_another() -> None:
    apart = {"kvm", "vfio", "iommufd"}
    assert not [module for module, source, target in EDGES if source in apart and target in apart]


def test_lab_imports_only_leaves() -> None:
    assert not [f"{module}: {target}" for module, source, target in EDGES if source == "lab" and target not in LEAVES]


def test_machine_does_not_touch_drivers() -> None:
    drivers = {
        "borrow",
        "bind",
        "journal",
        "restore",
        "transaction",
        "unbind",
        "Borrow",
    }
    for name in ("machine/machine.py", "guest/guest.py"):
        for node in ast.walk(ast.parse((PACKAGE / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvmpass.host"):
                words = {alias.name for alias in node.names} | set((node.module or "").split("."))
                assert not words & drivers, f"{name}: {sorted(words & drivers)}"


@pytest.mark.parametrize(
    "source, expected",
    [
        ("import kvmpass.kvm.vm", {"kvmpass.kvm.vm"}),
        ("from kvmpass import vfio, Machine", {"kvmpass.vfio", "kvmpass.Machine"}),
        ("from kvmpass.memory import GuestMemory", {"kvmpass.memory"}),
        ("from .. import memory", {"kvmpass.memory"}),
        ("from ..memory import GuestMemory", {"kvmpass.memory"}),
        ("from . import exits", {"kvmpass.kvm"}),
        ("def f():\n    import kvmpass.host", {"kvmpass.host"}),
        ("import os", set()),
    ],
)
def test_the_reader_of_imports(source: str, expected: set[str]) -> None:
    assert imported("kvmpass.kvm.vcpu", source, is_package=False) == expected
