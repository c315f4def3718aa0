"""The state of the lab on this machine: installed, cached, missing."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from kvmpass.errors import KvmpassError
from kvmpass.lab import build, headers, kernels, proof, qemu
from kvmpass.lab.cache import PACKAGES, cache_root, find_tool, used_bytes

TOOLS = ("busybox", "modprobe", "depmod", "setpriv", "apt-get", "dpkg-deb")
SUPPORTED_HOSTS = "x86-64 Linux with Debian 12's packages (tested); others with apt and QEMU 7.2 may work"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    part: str
    """What it is about."""
    text: str
    """Its state."""
    ok: bool = True
    """``False`` if ``kvmpass lab run`` without options would fail because of it."""


def rows() -> list[Row]:
    """Return the table. Nothing is downloaded and no lab is started."""
    root = cache_root()
    return [
        Row("host", f"{platform.machine()} {platform.system()} {platform.release()}", _host_is_supported()),
        Row("acceleration", _acceleration()),
        _emulator("QEMU system", qemu.system, required=True),
        _emulator("QEMU modern", qemu.modern, required=False),
        Row("kernel stock", _stock()),
        *(Row(f"kernel {recipe.name}", _built(recipe)) for recipe in kernels.RECIPES.values()),
        *_tools(),
        *(Row("DMA", f"{key}: {text}") for key, text in proof.verdicts().items()),
        Row("cache", f"{root}, {used_bytes(root) / 1e6:.0f} MB"),
    ]


def _host_is_supported() -> bool:
    return platform.system() == "Linux" and platform.machine() == "x86_64"


def _acceleration() -> str:
    if qemu.accelerator("auto") == "kvm":
        return "kvm (AMD-V can be nested here)"
    return "tcg, emulation: slow, but needs no hardware" + (
        "; /dev/kvm has no AMD-V to nest" if Path("/dev/kvm").exists() else ""
    )


def _emulator(part: str, find: Callable[[], qemu.Emulator], *, required: bool) -> Row:
    try:
        emulator = find()
    except KvmpassError as error:
        return Row(part, _with_remedy(error), not required)
    usable, verdict = qemu.judge(emulator.version)
    return Row(part, f"{emulator.version_text}, {emulator.path}: {verdict}", usable or not required)


def _stock() -> str:
    kernel = kernels.cached(kernels.stock_root(), "stock")
    if kernel is not None:
        return f"{kernel.release}, cached; {_headers(kernel.release)}"
    return f"not cached: the first run downloads {kernels.STOCK_PACKAGE}; kvmpass lab headers its headers, too"


def _headers(release: str) -> str:
    tree = headers.cached(release)
    return f"headers: {tree}" if tree else f"kvmpass lab headers fetches {headers.package(release)}"


def _built(recipe: kernels.Recipe) -> str:
    named = os.environ.get(recipe.variable)
    try:
        if named:
            return f"{kernels.kernel_release(Path(named))}, {recipe.variable}={named}"
        kernel = kernels.cached(recipe.root, recipe.name)
    except KvmpassError as error:
        return _with_remedy(error)
    if kernel is not None:
        return f"{kernel.release}, built; it loads no modules"
    lacking = build.missing_packages()
    return "not built: " + (f"apt-get install {' '.join(lacking)}, then " if lacking else "") + recipe.command


def _tools() -> list[Row]:
    missing = [tool for tool in TOOLS if find_tool(tool) is None]
    if not missing:
        return [Row("tools", ", ".join(TOOLS))]
    return [Row("tool missing", f"{tool}: apt-get install {PACKAGES.get(tool, tool)}", False) for tool in missing]


def _with_remedy(error: KvmpassError) -> str:
    return "; ".join([str(error), *getattr(error, "__notes__", ())])
