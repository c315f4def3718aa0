"""Everything below needs AMD-V, AMD-Vi and VFIO: real hardware, or the lab."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from support import outside
from support.emulator_faults import EmulatorFaults
from support.modes import as_without_tests, mode, type1_unless_said_otherwise
from support.preloaded import commands_start_preloaded

from kvmpass.testing import DEFAULT_PROFILES, Profile
from kvmpass.testing.state import Mode, State

__all__ = ["as_without_tests", "mode", "type1_unless_said_otherwise"]

HERE = Path(__file__).parent
SOAK = bool(os.environ.get("KVMPASS_SOAK"))
SOAK_SECONDS = 2 * 3600.0  # for each phase of a long form, of which nobody knows how fast its machine is


# Fixtures that need something from outside: a function that makes it, if it can be made, and returns what is missing.
MADE_OUTSIDE = {"older_kernel": outside.older_kernel, "faulty_module": outside.faulty_module, "fio": outside.fio}


@pytest.hookimpl(trylast=True)  # after the plugin has decided where tests run
def pytest_configure(config: pytest.Config) -> None:
    if State.of(config).mode is Mode.LAB:
        config.pluginmanager.register(EmulatorFaults())


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for fixture, make in MADE_OUTSIDE.items():
        needing = [item for item in items if fixture in getattr(item, "fixturenames", ())]
        if needing and State.of(config).mode is Mode.OUTER and (lacks := make()):
            for item in needing:
                item.add_marker(pytest.mark.skip(lacks))
    for item in items:
        if not SOAK and (soak := item.get_closest_marker("soak")) is not None:
            item.add_marker(pytest.mark.skip(f"{soak.args[0]}: KVMPASS_SOAK=1 runs it"))
        if HERE in item.path.parents and item.get_closest_marker("amdvi") is None:
            item.add_marker(pytest.mark.amdvi)
        if SOAK and HERE in item.path.parents:
            item.add_marker(pytest.mark.amdvi(timeout=SOAK_SECONDS), append=False)  # the closest marker wins


@pytest.fixture(scope="session", autouse=True)
def preloaded(pytestconfig: pytest.Config) -> Iterator[None]:
    """In the emulated host commands start at once; on real devices interpreters do."""
    with commands_start_preloaded() if State.of(pytestconfig).mode is Mode.LAB else nullcontext():
        yield


@pytest.fixture
def older_kernel() -> Path:
    """A kernel before 6.2 that a guest can boot."""
    return named_by(outside.OLDER_KERNEL, "a kernel 6.1")


@pytest.fixture
def faulty_module() -> Path:
    """``faulty.ko`` of ``docs/examples/driver``, for the lab's stock kernel, in the directory where it was built."""
    return named_by(outside.FAULTY_MODULE, "docs/examples/driver/faulty.ko, built for this kernel")


@pytest.fixture
def fio() -> None:
    """``fio`` and ``nvme`` are programs of this host."""
    if missing := outside.fio():
        pytest.skip(missing)


def named_by(variable: str, what: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable}=FILE names {what}; outside of the emulated host it is made where it can be")
    return Path(os.environ[variable])


def rom_directory(config: pytest.Config) -> Path:
    """Outside of temporary directories: the emulated host must see it, and every run the same one."""
    cache = getattr(config, "cache", None)  # absent with -p no:cacheprovider
    return cache.mkdir("kvmpass") if cache else HERE


def option_rom(directory: Path) -> Path:
    """An expansion ROM of 8 KiB for the emulated host: a valid header, then a pattern that differs in each block."""
    blocks = 16  # of 512 bytes (PCI Firmware Specification, 5.2)
    image = bytearray((at * 7 + at // 256) & 0xFF for at in range(blocks * 512))
    image[:3] = bytes([0x55, 0xAA, blocks])
    image[0x18:0x1A] = (0x40).to_bytes(2, "little")
    image[0x40:0x58] = b"PCIR" + bytes.fromhex("8680d310 0000 1800 00 000002".replace(" ", "")) + bytes(8)
    image[0x50:0x52] = blocks.to_bytes(2, "little")
    image[0x54:0x56] = bytes([0, 0x80])  # x86 code, the last image
    path = directory / "option.rom"
    path.write_bytes(image)
    return path


# Memory of two devices whose bus is reset as a whole.
SIBLINGS = (
    "pci-bridge,id=bridge1,chassis_nr=2,addr=12.0",
    "ivshmem-plain,size=1M,bus=bridge1,addr=01.0",
    "ivshmem-plain,size=2M,bus=bridge1,addr=02.0",
)


def pytest_kvmpass_profiles(config: pytest.Config) -> dict[str, Profile]:
    """Hosts of few tests.

    Debian's kernel, with modules and without iommufd, a drive, what the cookbook's driver is for, and two NUMA nodes
    that share the memory (the full kernel has no CONFIG_NUMA_EMU). What hosts
    seldom have: two devices on one bus, a card with an expansion ROM, a drive with 2048 vectors, a BAR that is too
    large for any address, a page of 1 GiB. A command line that says the IOAPIC is elsewhere, so that the kernel
    remaps no interrupt. The plugin's modern host with a device on bus 0, where the emulated IOMMU's events name it,
    and with leave for vfio-pci to make virtual functions. The plugin's newest host with two devices on one bus.
    """
    modern, newest = DEFAULT_PROFILES["modern"], DEFAULT_PROFILES["next"]
    return {
        "stock": Profile(devices=("edu,addr=04.0", "nvme,addr=05.0"), kernel="stock", append="numa=fake=2"),
        "odd": Profile(
            devices=(
                f"e1000e,addr=04.0,romfile={option_rom(rom_directory(config))}",
                "nvme,addr=05.0,max_ioqpairs=256,msix_qsize=2048",
                "edu,addr=06.0",
                "ivshmem-plain,size=2T,addr=07.0",
                "pci-bridge,id=bridge0,chassis_nr=1,addr=11.0",
                "edu,bus=bridge0,addr=01.0",
                "edu,bus=bridge0,addr=02.0",
                *SIBLINGS,
            ),
            memory="4G",
            append="hugepagesz=1G hugepages=1",
        ),
        "wrong-ioapic": Profile(
            devices=("edu,addr=05.0",),
            append="ivrs_ioapic=0@00:13.0 amd_iommu=pt pcie_acs_override=downstream",
            lab_only=True,
        ),
        "next": replace(newest, devices=(*newest.devices, *SIBLINGS)),
        "modern": replace(modern, devices=(*modern.devices, "edu,addr=06.0"), append="vfio_pci.enable_sriov=1"),
    }
