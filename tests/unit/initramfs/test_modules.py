"""From modaliases to modules in the order of loading."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest
import zstandard
from support.kernel_files import module

from kvmpass.errors import KvmpassError
from kvmpass.initramfs import GuestRoot
from kvmpass.initramfs.modules import ModuleTree, decompress, modinfo, module_name, plan

RELEASE = "6.12.1-test"
NVME = "pci:v0000144Dd0000A808sv0000144Dsd0000A801bc01sc08i02"
NIC = "pci:v00008086d000010D3sv00008086sd00000000bc02sc00i00"
AHCI = "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    directory = tmp_path / RELEASE
    packers = {
        "kernel/drivers/nvme/host/nvme.ko.xz": lzma.compress,
        "kernel/drivers/nvme/host/nvme-core.ko.zst": zstandard.ZstdCompressor().compress,
        "kernel/drivers/nvme/common/nvme-auth.ko.gz": gzip.compress,
        "kernel/drivers/net/e1000e.ko": bytes,
        "kernel/drivers/ptp/ptp.ko": bytes,
        "kernel/crypto/crc-early.ko": bytes,
        "kernel/drivers/net/phy-late.ko": bytes,
    }
    for path, pack in packers.items():
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_bytes(pack(module(name=module_name(path))))
    (directory / "modules.dep").write_text(
        "kernel/drivers/nvme/host/nvme.ko.xz: kernel/drivers/nvme/host/nvme-core.ko.zst "
        "kernel/drivers/nvme/common/nvme-auth.ko.gz\n"
        "kernel/drivers/nvme/host/nvme-core.ko.zst: kernel/drivers/nvme/common/nvme-auth.ko.gz\n"
        "kernel/drivers/nvme/common/nvme-auth.ko.gz:\n"
        "kernel/drivers/net/e1000e.ko: kernel/drivers/ptp/ptp.ko\n"
        "kernel/drivers/ptp/ptp.ko:\n"
        "kernel/crypto/crc-early.ko:\n"
        "kernel/drivers/net/phy-late.ko:\n"
    )
    (directory / "modules.alias").write_text(
        "# Aliases extracted from modules themselves.\n"
        "alias pci:v*d*sv*sd*bc01sc08i02* nvme\n"
        "alias pci:v00008086d000010D3sv*sd*bc*sc*i* e1000e\n"
        "alias pci:v00008086d00001[!0]D3sv*sd*bc*sc*i* wrong\n"
        "alias usb:v*p* usbthing\n"
        "alias of:N*T*Cx oddone\n"
    )
    (directory / "modules.softdep").write_text(
        "# Soft dependencies extracted from modules themselves.\n"
        "softdep nvme pre: crc-early absent-module\n"
        "softdep e1000e post: phy_late\n"
    )
    (directory / "modules.builtin").write_text("kernel/drivers/ata/ahci.ko\nkernel/drivers/ata/libahci.ko\n")
    (directory / "modules.builtin.modinfo").write_bytes(
        b"ahci.author=someone\0ahci.alias=pci:v*d*sv*sd*bc01sc06i01*\0libahci.license=GPL\0"
    )
    return tmp_path


def names(root: Path, *modaliases: str, files: tuple[Path, ...] = (), extra: tuple[str, ...] = ()) -> list[str]:
    return [item.name for item in plan(ModuleTree(RELEASE, root), modaliases, files, extra).modules]


def test_dependencies_and_soft_dependencies_in_order(root: Path) -> None:
    assert names(root, NVME) == ["crc_early", "nvme_auth", "nvme_core", "nvme"]
    assert names(root, NIC) == ["ptp", "e1000e", "phy_late"]
    assert names(root, NIC, NVME, NIC).count("nvme") == 1


def test_modules_are_decompressed(root: Path) -> None:
    for item in plan(ModuleTree(RELEASE, root), [NVME, NIC]).modules:
        assert item.data == module(name=item.name)


def test_a_builtin_driver_has_no_file_but_matches(root: Path) -> None:
    made = plan(ModuleTree(RELEASE, root), [AHCI])
    assert made.modules == ()
    assert made.matched == {AHCI}
    assert ModuleTree(RELEASE, root).find([AHCI]) == ((), {AHCI})


def test_no_driver_and_no_tree(root: Path) -> None:
    unknown = "pci:v0000FFFFd00000001sv00000000sd00000000bcFFsc00i00"
    for tree in (ModuleTree(RELEASE, root), ModuleTree("other", root)):
        assert plan(tree, [unknown]).modules == ()
        assert plan(tree, [unknown]).matched == frozenset()
    assert not ModuleTree("other", root).exists


def test_extra_modules_by_name(root: Path) -> None:
    assert names(root, extra=("nvme-core",)) == ["nvme_auth", "nvme_core"]


def test_a_module_under_test_replaces_the_stock_driver(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "my-nvme.ko"
    alias = "pci:v*d*sv*sd*bc01sc08i02*"
    mine.write_bytes(module(alias=alias, depends="nvme-core,helper", vermagic=f"{RELEASE} SMP"))
    helper = tmp_path / "helper.ko"
    helper.write_bytes(module(depends="", vermagic=f"{RELEASE} SMP"))
    made = plan(ModuleTree(RELEASE, root), [NVME], [mine, helper])
    assert [item.name for item in made.modules] == ["nvme_auth", "nvme_core", "helper", "my_nvme"]
    assert [item.name for item in made.modules if item.under_test] == ["helper", "my_nvme"]
    assert made.matched == {NVME}


def test_a_module_under_test_with_a_stock_name_keeps_its_place(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "nvme-core.ko"
    mine.write_bytes(module(depends="nvme-auth"))
    made = plan(ModuleTree(RELEASE, root), [NVME], [mine])
    assert [item.name for item in made.modules] == ["crc_early", "nvme_auth", "nvme_core", "nvme"]
    assert made.modules[2].under_test


def test_an_unrelated_module_leaves_the_stock_driver(root: Path, tmp_path: Path) -> None:
    mine = tmp_path / "other.ko"
    mine.write_bytes(module(alias=["pci:v00001234d*sv*sd*bc*sc*i*"]))
    assert names(root, NIC, files=(mine,)) == ["ptp", "e1000e", "phy_late", "other"]


def test_a_module_for_none_of_the_devices_is_idle(root: Path, tmp_path: Path) -> None:
    """Unless another module needs it: the user's or the kernel's."""

    def idle(*files: tuple[str, bytes], modaliases: tuple[str, ...] = (NVME,)) -> list[str]:
        paths = [tmp_path / name for name, _ in files]
        for path, (_, content) in zip(paths, files, strict=True):
            path.write_bytes(content)
        return [path.name for path in plan(ModuleTree(RELEASE, root), modaliases, paths).idle]

    mine = ("mine.ko", module(alias="pci:v*d*sv*sd*bc01sc08i02*", depends="helper"))
    other = ("other.ko", module(alias="pci:v00001234d*sv*sd*bc*sc*i*"))
    plain = ("plain.ko", module(name="plain"))
    assert idle(mine, ("helper.ko", module(name="helper")), other, plain) == ["other.ko", "plain.ko"]
    assert idle(("nvme-core.ko", module(name="nvme_core")), ("phy-late.ko", module(name="x"))) == ["phy-late.ko"]
    assert idle(("phy-late.ko", module(name="x")), ("nvme.ko", module(name="x")), modaliases=(NVME, NIC)) == []
    assert idle(other, modaliases=()) == [], "no devices"


def test_modules_that_cannot_load_are_refused(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "x.ko"
    for content, reason in (
        (b"text", "not a kernel module"),
        (b"\x28\xb5\x2f\xfdxxxx", "cannot be decompressed"),
        (module(), "no .modinfo"),
        (module(vermagic="5.10.0 SMP"), "built for kernel 5.10.0"),
        (module(depends="nowhere"), "depends on nowhere"),
    ):
        file.write_bytes(content)
        with pytest.raises(KvmpassError, match=reason):
            plan(ModuleTree(RELEASE, root), [], [file])
    file.write_bytes(module(vermagic="5.10.0 SMP modversions", depends="libahci"))
    assert names(root, files=(file,)) == ["x"]


def test_parameters_after_the_file_get_a_hint(root: Path, tmp_path: Path) -> None:
    (tmp_path / "my-x.ko").write_bytes(module())
    for words, hint in (
        (' n=1 name="a b"', "--append 'my_x.n=1 my_x.name=\"a b\"'"),
        (" switch", "--append my_x.switch"),
    ):
        with pytest.raises(FileNotFoundError) as refused:
            plan(ModuleTree(RELEASE, root), [NVME], [Path(f"{tmp_path}/my-x.ko{words}")])
        assert refused.value.__notes__[0].endswith(hint)
    with pytest.raises(FileNotFoundError) as plain:
        plan(ModuleTree(RELEASE, root), [NVME], [tmp_path / "no such.ko"])
    assert not hasattr(plain.value, "__notes__")


def test_the_guests_init_loads_them_with_their_parameters(tmp_path: Path) -> None:
    busybox = tmp_path / "busybox"
    busybox.write_text("#!/bin/sh\n")
    busybox.chmod(0o755)
    paths = [tmp_path / "my-nvme.ko", tmp_path / "helper.ko", tmp_path / "idle.ko"]
    for path, info in zip(paths, ({"alias": "pci:v*bc01sc08i02*", "depends": "helper"}, {}, {}), strict=True):
        path.write_bytes(module(name="x", **info))
    root = GuestRoot(busybox)
    parameters = {"my_nvme": 'name="a b"', "other": "x=1"}
    root.add_modules(ModuleTree(RELEASE, tmp_path), [NVME, NIC], files=paths, parameters=parameters)
    root.build()
    load, settings, data = (root.tree.get(f"/kvmpass/{name}") for name in ("load", "settings", "modules/my_nvme.ko"))
    assert load and settings and data
    assert load.data == b"load helper yes ''\nload my_nvme yes 'name=\"a b\"'\nload idle yes ''\n"
    assert b"EXPECTED=144d:a808\n" in settings.data
    assert data.data == paths[0].read_bytes()
    assert [warning.partition(": ")[0] for warning in root.warnings] == [f"--module {paths[2]}"]


def test_circular_dependencies(root: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "a.ko", tmp_path / "b.ko"
    first.write_bytes(module(depends="b"))
    second.write_bytes(module(depends="a"))
    assert sorted(names(root, files=(first, second))) == ["a", "b"]


def test_modinfo_and_zstd_without_a_content_size(tmp_path: Path) -> None:
    data = module(alias=["pci:x", "pci:y"], depends="a-b,c", vermagic="1 SMP")
    assert modinfo(data) == {"alias": ["pci:x", "pci:y"], "depends": ["a-b,c"], "vermagic": ["1 SMP"]}
    path = tmp_path / "m.ko.zst"
    stream = zstandard.ZstdCompressor(write_content_size=False).compressobj()
    path.write_bytes(stream.compress(data) + stream.flush())
    assert decompress(path) == data


def test_a_kernel_without_a_module_that_is_needed_is_refused(root: Path) -> None:
    """Unless its modules are unknown: then the guest says so."""
    GuestRoot().add_modules(ModuleTree(RELEASE, root), [], parameters={}, needed=["ptp", "ahci"])
    GuestRoot().add_modules(ModuleTree("other", root), [], parameters={}, needed=["virtiofs"])
    with pytest.raises(KvmpassError, match="has no module virtiofs, which the host's files need"):
        GuestRoot().add_modules(ModuleTree(RELEASE, root), [], parameters={}, needed=["virtiofs"])
    (root / RELEASE / "modules.builtin").unlink()  # made for modules under test alone: what is built in is unknown
    GuestRoot().add_modules(ModuleTree(RELEASE, root), [], parameters={}, needed=["virtiofs"])
