"""A kernel's build tree: the tables that depmod would make."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.kernel_files import module

from kvmpass.initramfs.buildtree import BuildTree
from kvmpass.initramfs.modules import plan

RELEASE = "6.12.1-test"
NVME = "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02"
NIC = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00"
AHCI = "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"

MODULES = {
    "drivers/nvme/host/nvme": {"alias": ["pci:v*bc01sc08i02*", "pci:v0000144D*"], "depends": "nvme-core,crc64"},
    "drivers/nvme/host/nvme-core": {"softdep": "pre: early post: late-one"},
    "lib/crc64": {},
    "lib/early": {},
    "lib/late-one": {},
    "drivers/net/e1000e": {"alias": "pci:v00008086d000010D3*"},
}


@pytest.fixture(params=["o", "ko"])
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> BuildTree:
    """As ``make modules`` leaves it: names of objects since Linux 6.3, of modules before."""
    for path, info in MODULES.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{path}.ko").write_bytes(module(name="x", **info))
    (tmp_path / "drivers/empty.ko").write_bytes(b"")
    order = [*MODULES, "drivers/not-built", "drivers/empty"]
    (tmp_path / "modules.order").write_text("".join(f"{path}.{request.param}\n" for path in order))
    (tmp_path / "modules.builtin").write_text("kernel/drivers/ata/ahci.ko\n")
    (tmp_path / "modules.builtin.modinfo").write_bytes(b"ahci.alias=pci:v*d*sv*sd*bc01sc06i01*\0ahci.license=GPL\0")
    return BuildTree(tmp_path, RELEASE)


def test_modules_in_the_order_of_loading(tree: BuildTree) -> None:
    made = plan(tree, [NVME, AHCI])
    assert [item.name for item in made.modules] == ["crc64", "early", "nvme_core", "late_one", "nvme"]
    assert made.matched == {NVME, AHCI}
    assert made.modules[-1].data == (tree.directory / "drivers/nvme/host/nvme.ko").read_bytes()


def test_what_is_built(tree: BuildTree) -> None:
    assert tree.exists
    assert tree.find([NIC]) == (("e1000e",), {NIC})
    assert tree.lookup("nvme") == ("drivers/nvme/host/nvme.ko", "drivers/nvme/host/nvme-core.ko", "lib/crc64.ko")
    assert tree.lookup("not_built") is None
    assert tree.is_builtin("ahci")


def test_a_tree_without_modules(tmp_path: Path) -> None:
    tree = BuildTree(tmp_path, RELEASE)
    assert not tree.exists
    assert plan(tree, [NVME]).modules == ()
