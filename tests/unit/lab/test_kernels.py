"""The emulated host's kernels."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from kvmpass.errors import LabError
from kvmpass.lab import cache, initrd, kernels


def bzimage(release: str) -> bytes:
    head = bytearray(0x400)
    head[0x202:0x206] = b"HdrS"
    head[0x20E:0x210] = (0x300 - 0x200).to_bytes(2, "little")
    text = f"{release} (someone@somewhere) #1\0".encode()
    head[0x300 : 0x300 + len(text)] = text
    return bytes(head)


def test_kernel_release(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("6.12.1-own"))
    assert kernels.kernel_release(tmp_path / "bzImage") == "6.12.1-own"


def test_a_file_that_is_not_a_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no kernel")
    with pytest.raises(LabError, match="not a Linux kernel"):
        kernels.kernel_release(tmp_path / "text")
    with pytest.raises(LabError, match="No such file"):
        kernels.kernel_release(tmp_path / "nothing")


def test_half_of_a_kernel_is_refused(tmp_path: Path) -> None:
    """It would not boot, and print nothing."""
    whole = bytearray(bzimage("6.12.1-own") + bytes(0x600 + 0x1000 - 8))
    whole[0x1F1], whole[0x1F5] = 4, 1  # sectors of the setup, and 256 units of 16 bytes
    (tmp_path / "bzImage").write_bytes(whole)
    assert kernels.kernel_release(tmp_path / "bzImage") == "6.12.1-own"
    for size in (0xA00 + 0x1000 - 16, 0xA00, 0x400):
        os.truncate(tmp_path / "bzImage", size)
        with pytest.raises(LabError, match=f"is truncated: {max(0, size - 0xA00)} of 4096 bytes of code"):
            kernels.kernel_release(tmp_path / "bzImage")


@pytest.mark.parametrize("recipe", kernels.RECIPES.values(), ids=list(kernels.RECIPES))
def test_full_and_next_are_built_on_request_only(
    recipe: kernels.Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVMPASS_CACHE", str(tmp_path))
    monkeypatch.delenv(recipe.variable, raising=False)
    assert not recipe.available
    with pytest.raises(LabError, match=f"the {recipe.name} kernel") as caught:
        kernels.find(recipe.name, print)
    assert caught.value.__notes__[0].startswith(f"run {recipe.command}, which builds it")
    monkeypatch.setenv(recipe.variable, str(tmp_path / "bzImage"))
    assert recipe.available


@pytest.mark.parametrize(
    ("release", "wants"),
    [("6.12.117", False), ("6.19.0-rc1", False), ("7.3.4", True), ("10.0", True), ("odd", False)],
)
def test_which_kernels_look_for_the_southbridge(release: str, wants: bool) -> None:
    assert kernels.Kernel("k", Path("bzImage"), release).wants_southbridge == wants


def test_the_emulator_of_each_kernel() -> None:
    names = ("stock", "full", "next", "/some/bzImage")
    assert [kernels.emulator_for(name) for name in names] == ["system", "system", "modern", "system"]


@pytest.mark.skipif(cache.find_tool("depmod") is None, reason="no depmod: apt-get install kmod makes it run")
def test_a_built_kernel_lists_its_drivers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("6.12.1-own"))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/vfio/pci/vfio-pci.ko\n")
    monkeypatch.setenv(kernels.FULL.variable, str(tmp_path / "bzImage"))
    kernel = kernels.find("full", print)
    assert (kernel.name, kernel.release) == ("full", "6.12.1-own")
    assert kernel.modules is not None
    assert kernel.modules.parts[-3:] == ("lib", "modules", "6.12.1-own")
    assert (kernel.modules / "modules.builtin.bin").is_file()
    assert initrd.root_modules(kernel) == []


def test_a_kernel_tree_is_found(tmp_path: Path) -> None:
    assert kernels.cached(tmp_path, "stock") is None
    (tmp_path / "boot").mkdir()
    (tmp_path / "boot" / "vmlinuz-6.12-x").touch()
    (tmp_path / "lib" / "modules" / "6.12-x").mkdir(parents=True)
    kernel = kernels.cached(tmp_path, "stock")
    assert kernel is not None
    assert kernel.release == "6.12-x"
    assert kernel.modules == tmp_path / "lib" / "modules" / "6.12-x"
    assert kernel.config is None
