from __future__ import annotations

import gzip
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from kvmpass.boot.linux import KernelImage
from kvmpass.guest import options
from kvmpass.guest.options import KernelOptions, ecam_alone, has_console

TEXT = b"#\nCONFIG_PCI_MMCONFIG=y\nCONFIG_VIRTIO_PCI=m\n# CONFIG_X is not set\n"


def kernel(path: Path, banner: str = "6.12.1-test (me@here) #1 SMP Mon") -> KernelImage:
    return KernelImage(str(path), b"", b"", 0, 0, 1, True, 0, 0, banner.split(" ")[0], banner)


@pytest.mark.parametrize("place", ["boot/config-6.12.1-test", ".config", "nowhere"])
def test_where_a_configuration_is_found(tmp_path: Path, place: str) -> None:
    boot = tmp_path / ("arch/x86/boot" if place == ".config" else "boot")
    boot.mkdir(parents=True)
    (tmp_path / place).write_bytes(TEXT)
    found = KernelOptions.of(kernel(boot / "bzImage"))
    assert found.built_in("PCI_MMCONFIG") is (place != "nowhere")
    assert not found.built_in("VIRTIO_PCI") and not found.built_in("PCI_MMCONFIG", "X") and not found.built_in("PCI")


def test_that_of_the_running_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of exactly that build."""
    running = tmp_path / "config.gz"
    running.write_bytes(gzip.compress(TEXT))
    monkeypatch.setattr(options, "RUNNING", running)
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(release="6.12.1-test", version="#1 SMP Mon"))
    assert KernelOptions.of(kernel(tmp_path / "bzImage")).built_in("PCI_MMCONFIG")
    other_build = kernel(tmp_path / "bzImage", "6.12.1-test (me@here) #2 SMP Mon")
    assert not KernelOptions.of(other_build).built_in("PCI_MMCONFIG")
    assert not KernelOptions.of(kernel(tmp_path / "bzImage", "")).built_in("PCI_MMCONFIG")
    running.write_bytes(b"damaged")
    assert not KernelOptions.of(kernel(tmp_path / "bzImage")).built_in("PCI_MMCONFIG")


@pytest.mark.parametrize("word", ["acpi=off", "pci=nommconf", "pci=conf1"])
def test_ports_stay_where_the_user_chooses(word: str) -> None:
    assert ecam_alone(KernelOptions(TEXT), ["quiet", "x=1"])
    assert not ecam_alone(KernelOptions(TEXT), ["x=1", word])
    assert not ecam_alone(KernelOptions(), [])


def test_drivers_of_a_console_are_built_in_or_loaded() -> None:
    both = KernelOptions(b"CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=y\n")
    assert has_console(both, ())
    assert not has_console(KernelOptions(TEXT), ()), "modules that are not loaded"
    assert has_console(KernelOptions(TEXT), {"virtio_pci", "virtio_console"})
    assert has_console(KernelOptions(b"CONFIG_VIRTIO_CONSOLE=y\n"), {"virtio_pci"})
    assert not has_console(KernelOptions(), {"virtio_pci"})
