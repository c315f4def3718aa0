"""Which module may import which: the layers, held against the import graph."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

import kvmpass

PACKAGE = Path(kvmpass.__file__).parent

# From the lowest to the highest. A package, or a module at the top, imports from lower layers only.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"_dataclass", "_lazy", "_log"}),
    frozenset({"events", "numa"}),
    frozenset(
        {
            "errors",
            "crash",
            "hugepages",
            "ports",
            "pciregs",
            "modalias",
            "_native",
            "_teardown",
            "_ratelimit",
            "_eventloop",
            "_garbage",
            "timings",
        }
    ),
    frozenset({"_fd", "_signals", "layout", "bus"}),
    frozenset({"_beneath", "_cache", "_together"}),
    frozenset({"memory", "initramfs", "files"}),
    frozenset({"kvm", "vfio", "iommufd"}),
    frozenset({"boot", "pci", "dma"}),
    frozenset({"virtio"}),
    frozenset({"board", "host"}),
    frozenset({"machine"}),
    frozenset({"guest"}),
    frozenset({"assignment", "lab"}),
    frozenset({"session"}),
    frozenset({"testing"}),
    frozenset({"cli"}),
    frozenset({"__main__"}),
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}

# What a package may not import although it is in a lower layer, and why.
APART = {
    "vfio": {"kvm", "iommufd"},  # they meet through file descriptors
    "kvm": {"vfio", "iommufd"},
    "iommufd": {"kvm", "vfio"},
    "host": {"kvm", "vfio", "iommufd", "pci", "dma", "memory", "virtio"},  # what looks at devices loads no VMM
    "lab": {
        "memory",
        "kvm",
        "vfio",
        "iommufd",
        "boot",
        "pci",
        "dma",
        "virtio",
        "board",
        "host",
        "machine",
        "guest",
    },  # runs anywhere
}
NATIVE_USERS = {"kvm", "vfio", "iommufd", "memory", "_beneath"}
DRIVER_CHANGES = {"bind", "unbind", "borrow", "restore"}


def package_of(module: str) -> str:
    """``kvmpass.kvm.vcpu`` is in the package ``kvm``; ``kvmpass`` itself is in none."""
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


def modules() -> list[tuple[str, Path]]:
    return [(module_name(path), path) for path in sorted(PACKAGE.rglob("*.py"))]


def edges() -> list[tuple[str, str, str]]:
    """(importing module, its package, imported package), without imports inside a package."""
    result = []
    for module, path in modules():
        if module == "kvmpass":
            continue  # the public names: it may take from everywhere
        for name in imported(module, path.read_text(), path.name == "__init__.py"):
            if package_of(name) not in ("", package_of(module)):
                result.append((module, package_of(module), package_of(name)))
    return result


EDGES = edges()


def complaints(names: Iterable[str]) -> list[str]:
    """Of these packages the ones without a layer, and layers' names that are no package."""
    there = set(names)
    return [
        *(f"{name}: no layer" for name in sorted(there - LAYER_OF.keys())),
        *(f"{name}: no such package" for name in sorted(LAYER_OF.keys() - there)),
    ]


def test_every_package_has_a_layer() -> None:
    names = {package_of(module) for module, _ in modules()} - {""} | {"_native"}
    assert complaints(names) == []
    assert complaints(names | {"elsewhere"}) == ["elsewhere: no layer"]
    assert complaints(names - {"dma"}) == ["dma: no such package"]


def test_imports_go_down() -> None:
    assert not [
        f"{module} imports kvmpass.{target}"
        for module, source, target in EDGES
        if LAYER_OF[target] >= LAYER_OF[source]
    ]


def test_what_does_not_know_one_another() -> None:
    assert not [
        f"{module} imports kvmpass.{target}" for module, source, target in EDGES if target in APART.get(source, ())
    ]
    for source, targets in APART.items():
        for target in targets:  # a line that forbids nothing is a line too much
            assert LAYER_OF[target] <= LAYER_OF[source], (source, target)


def test_only_the_ioctl_layer_and_memory_use_c() -> None:
    assert {source for _, source, target in EDGES if target == "_native"} == NATIVE_USERS


def test_a_pci_function_can_be_of_another_kind_than_vfios() -> None:
    """What the guest's side of PCI needs are protocols (kvmpass/pci/function.py); one module has VFIO's."""
    users = {module for module, source, target in EDGES if target == "vfio" and source in ("pci", "board")}
    assert users == {"kvmpass.pci.assigned"}


def test_machine_and_guest_change_no_driver() -> None:
    for module, path in modules():
        if package_of(module) not in ("machine", "guest"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("kvmpass.host"):
                assert not (node.module or "").startswith("kvmpass.host.drivers"), module
                assert not {alias.name for alias in node.names} & DRIVER_CHANGES, module


def test_looking_loads_no_virtual_machine() -> None:
    """What ``kvmpass list`` and the like import, in a process of its own."""
    names = ("list", "show", "doctor", "monitor", "bind", "restore")
    script = f"import sys, {', '.join(f'kvmpass.cli.{name}' for name in names)}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = {package_of(name) for name in done.stdout.split() if name.startswith("kvmpass.")}
    assert "host" in loaded
    assert not loaded & {"kvm", "vfio", "iommufd", "pci", "dma", "board", "machine", "guest", "memory", "_native"}


def test_a_request_to_a_guest_loads_nothing_of_a_virtual_machine() -> None:
    """What ``kvmpass exec`` and the like import, in a process of its own: hardly more than click does."""
    names = ("exec", "console", "cp", "logs", "ps", "stop")
    script = (
        f"import sys, click; before = {{*sys.modules}}; import {', '.join(f'kvmpass.cli.{name}' for name in names)}; "
    )
    script += "print(*{*sys.modules} - before)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    packages = {package_of(name) for name in loaded if name.startswith("kvmpass.")}
    assert {"cli", "session"} <= packages
    assert packages <= {"cli", "session", "errors", "_dataclass", "_lazy", "_log", "_signals", "_teardown"}
    assert not loaded & {"asyncio", "http", "logging", "subprocess", "tarfile", "uuid"}


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
