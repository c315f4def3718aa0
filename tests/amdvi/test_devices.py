"""Every kind of device, driven by its driver in a real guest. docs/devices.md has one row for each test."""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.inside import (
    DRIVE,
    PING,
    SOAK,
    SYSFS,
    Done,
    Job,
    boot,
    compiled,
    drive_of,
    edu_script,
    host_interface,
    outcomes,
    script,
)
from support.modes import FULL, MODES
from support.nvme_admin import online_function
from support.recording import Calls, recording
from support.witness import iommu_events, merged, without_probe

from kvmpass import host
from kvmpass.assignment.assign import assigned
from kvmpass.guest import Guest, GuestSpec
from kvmpass.host.backend import choose_backend
from kvmpass.testing.state import State

pytestmark = [
    pytest.mark.amdvi(profile="devices", timeout=3600 if SOAK else 300, duration=12),
    pytest.mark.usefixtures("backend"),  # of the guests, which tests ask for by name
]

MODERN = pytest.mark.amdvi(profile="modern", qemu="modern")
NO_IOMMU = pytest.mark.amdvi(
    kernel="full"
)  # Debian's kernels have no VFIO without an IOMMU, which edu's program uses
MSIX, MSI, INTX = "PCI-MSIX", "PCI-MSI", "IO-APIC"

HEAD = 1 << 20
EDU_RAISES = 100_000 if SOAK else 2000
DRIVES = ("nvme", "ahci", "virtio_blk", "xhci")
MEMORIES = ("ivshmem", "ivshmem2")
MARK = 0x6B766D70_00000000  # tests/amdvi/guest/bar.c

E1000E = (
    PING
    + """
dmesg | grep "e1000e.*interrupt test" || true
"""
)
# A register is named by its offset in the first doubleword and read and written in the second (82574 datasheet, 3.3).
IO_BAR = """
cat $device/net/*/address
echo ${device##*/} >$device/driver/unbind; echo 1 >$device/enable
io_write() { printf $2 | dd of=$device/resourceINDEX bs=4 count=1 seek=$1 conv=notrunc 2>/dev/null; }
io_read() { dd if=$device/resourceINDEX bs=4 count=1 skip=1 2>/dev/null | od -An -tx1; }
io_write 0 '\\x38\\0\\0\\0'; io_write 1 '\\x34\\x12\\0\\0'  # VLAN Ether Type
io_write 0 '\\0\\x54\\0\\0'; echo "RAL $(io_read)"
io_write 0 '\\x38\\0\\0\\0'; echo "VET $(io_read)"
"""


@pytest.fixture(scope="module")
def roles(pytestconfig: pytest.Config) -> dict[str, str]:
    """What this host has: a guest gets the devices that are there, a test skips over those that are not."""
    return State.of(pytestconfig).roles


@pytest.fixture(scope="module", params=["type1", pytest.param("iommufd", marks=FULL)] if SOAK else None)
def backend(request: pytest.FixtureRequest) -> str:
    """The IOMMU back end: each in the long form, else what the kernel has."""
    return str(getattr(request, "param", "auto"))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("devices")


def marker(directory: Path) -> Path:
    path = directory / "marker"
    if not path.exists():
        path.write_bytes(os.urandom(4096))
    return path


def check_drive(done: Done, drive: Path, before: bytes, marker: bytes) -> None:
    """The guest read what the host had written, and the host reads what the guest wrote."""
    assert hashlib.sha256(before).hexdigest() in done.checked
    with drive.open("rb") as file:
        assert file.read(HEAD) == before[: 3 * 4096] + marker + before[4 * 4096 :]


@pytest.fixture(scope="module")
def peer(roles: dict[str, str]) -> Iterator[None]:
    """A card on the same network stays with the host; without one the guests do their other jobs."""
    with host_interface(roles["nic2"]) if "nic2" in roles else contextlib.nullcontext():
        yield


# --- one guest with every drive, a network card and the memories; two with the card in its other modes


@pytest.fixture(scope="module")
def contents(roles: dict[str, str], emulated_host: bool) -> dict[str, bytes]:
    """What the host has written to each drive, where it may destroy what is on them."""
    if not (emulated_host or os.environ.get("KVMPASS_TEST_DESTRUCTIVE") == "1"):
        return {}
    written = {role: os.urandom(HEAD) for role in DRIVES if role in roles}
    for role, content in written.items():
        drive_of(roles[role]).write_bytes(content)
    return written


@pytest.fixture(scope="module")
def default_guest(
    roles: dict[str, str], peer: None, directory: Path, backend: str, contents: dict[str, bytes]
) -> dict[str, Done]:
    jobs = [Job(role, roles[role], DRIVE) for role in contents]
    if "nic2" in roles:
        jobs.append(Job("e1000e", roles["nic"], E1000E))
    if "nic" in roles and (index := io_bar(roles["nic"])) is not None:
        jobs.append(Job("io", roles["nic"], IO_BAR.replace("INDEX", str(index))))
    jobs += [
        Job(role, roles[role], "echo 1 >$device/enable; /bar $device/resource2") for role in MEMORIES if role in roles
    ]
    copies = ("--copy", f"{compiled('bar', directory)}:/bar", "--copy", f"{marker(directory)}:/marker")
    return boot(jobs, "--backend", backend, *copies)


def interrupt_guest(roles: dict[str, str], directory: Path, backend: str, kind: str, mode: int) -> dict[str, Done]:
    jobs = []
    if "nic2" in roles:
        jobs.append(Job("e1000e", roles["nic"], E1000E))
    if {"legacy_nic", "nic2"} <= roles.keys() and kind == "intx":
        jobs.append(Job("e1000", roles["legacy_nic"], PING))
    if "edu" in roles:
        jobs.append(Job("edu", roles["edu"], edu_script(kind, EDU_RAISES)))
    options = ("--copy", f"{compiled('edu', directory)}:/edu", "--append", f"e1000e.IntMode={mode}")
    return boot(jobs, "--backend", backend, *options)


@pytest.fixture(scope="module")
def msi_guest(roles: dict[str, str], peer: None, directory: Path, backend: str) -> dict[str, Done]:
    return interrupt_guest(roles, directory, backend, "msi", 1)


@pytest.fixture(scope="module")
def intx_guest(roles: dict[str, str], peer: None, directory: Path, backend: str) -> dict[str, Done]:
    return interrupt_guest(roles, directory, backend, "intx", 0)


GUESTS = {"msix": ("default_guest", MSIX), "msi": ("msi_guest", MSI), "intx": ("intx_guest", INTX)}


@pytest.mark.parametrize(("role", "kind"), [(role, MSI if role == "ahci" else MSIX) for role in DRIVES], ids=DRIVES)
def test_drive(
    role: str,
    kind: str,
    request: pytest.FixtureRequest,
    directory: Path,
    contents: dict[str, bytes],
    destructive: None,
) -> None:
    bdf = request.getfixturevalue(role)
    done: Done = request.getfixturevalue("default_guest")[role]
    check_drive(done, drive_of(bdf), contents[role], marker(directory).read_bytes())
    done.check_interrupts(kind, 1)


@pytest.mark.parametrize("mode", GUESTS)
def test_e1000e(mode: str, nic: str, nic2: str, request: pytest.FixtureRequest, emulated_host: bool) -> None:
    """QEMU's card fails the driver's own test of MSI (docs/lab.md): the driver turns MSI off, and INTx on."""
    if mode != "msix" and (SYSFS / nic / "driver").resolve().name != "e1000e":
        pytest.skip(f"only the e1000e driver can be told to use {mode}: KVMPASS_TEST_NIC names another card")
    guest, kind = GUESTS[mode]
    done: Done = request.getfixturevalue(guest)["e1000e"]
    assert "20 packets received" in done.checked
    refused = "MSI interrupt test failed, using legacy interrupt" in done.text
    assert refused == (mode == "msi" and emulated_host), done.text
    done.check_interrupts(INTX if refused else kind, 10)


def test_e1000(legacy_nic: str, nic2: str, request: pytest.FixtureRequest) -> None:
    done: Done = request.getfixturevalue("intx_guest")["e1000"]
    assert "20 packets received" in done.checked
    done.check_interrupts(INTX, 10)


@NO_IOMMU
@pytest.mark.parametrize("mode", ["msi", "intx"])
def test_edu(mode: str, edu: str, request: pytest.FixtureRequest) -> None:
    guest, kind = GUESTS[mode]
    done: Done = request.getfixturevalue(guest)["edu"]
    assert f"raised {EDU_RAISES}\n" in done.checked
    assert re.search(r"^dma [1-9]\d* bytes$", done.text, re.MULTILINE)
    kinds, total = done.interrupts("after")
    assert kinds == {kind}
    assert total >= EDU_RAISES


def io_bar(bdf: str) -> int | None:
    """The index of the first BAR of I/O ports (IORESOURCE_IO)."""
    lines = (SYSFS / bdf / "resource").read_text().splitlines()[:6]
    return next((index for index, line in enumerate(lines) if int(line.split()[2], 16) & 0x100), None)


def test_io_bar(nic: str, request: pytest.FixtureRequest) -> None:
    """The card's own address and a register just written, both read through I/O ports."""
    if io_bar(nic) is None:
        pytest.skip("this card has no BAR of I/O ports: let KVMPASS_TEST_NIC name an e1000e")
    lines = request.getfixturevalue("default_guest")["io"].checked.splitlines()
    address = lines[0].split(":")
    assert lines[1:] == [f"RAL  {' '.join(address[:4])}", "VET  34 12 00 00"]


@pytest.mark.parametrize("role", MEMORIES)
def test_memory_bar(role: str, request: pytest.FixtureRequest) -> None:
    """What the guest wrote to its first, middle and last page is in the device."""
    resource = SYSFS / request.getfixturevalue(role) / "resource2"
    size = resource.stat().st_size
    assert f"size {size}\n" in request.getfixturevalue("default_guest")[role].checked
    assert size >= {"ivshmem": 1 << 30, "ivshmem2": 8 << 30}[role]
    (resource.parent / "enable").write_text("1")
    try:
        with resource.open("rb") as file:
            for at in (0, size // 2, size - mmap.PAGESIZE):
                with mmap.mmap(file.fileno(), mmap.PAGESIZE, prot=mmap.PROT_READ, offset=at) as page:
                    words = memoryview(page).cast("Q")
                    assert list(words) == [MARK + at + i for i in range(len(words))]
                    words.release()
    finally:
        (resource.parent / "enable").write_text("0")


# --- several at once


@NO_IOMMU
def test_three_devices_share_one_domain(
    nvme: str,
    nic: str,
    nic2: str,
    edu: str,
    peer: None,
    directory: Path,
    backend: str,
    destructive: None,
) -> None:
    """Each works, and the kernel saw the guest's memory mapped once, not once for each."""
    before = os.urandom(HEAD)
    drive_of(nvme).write_bytes(before)
    jobs = [Job("nvme", nvme, DRIVE), Job("nic", nic, PING), Job("edu", edu, edu_script("msi", EDU_RAISES))]
    copy = (f"{marker(directory)}:/marker", f"{compiled('edu', directory)}:/edu")
    spec = GuestSpec(command=("sh", "-c", script(jobs)), copy=copy)
    output = bytearray()
    calls: Calls = []
    with (
        iommu_events() as events,
        assigned(
            [nvme, nic, edu],
            spec,
            memory="256M",
            backend=recording(calls, MODES[choose_backend(host.Sysfs(), wanted=backend).name].backend),
        ) as machine,
        Guest(machine, console=None, output=output.extend, errors=output.extend) as guest,
    ):
        ram = merged([region.range for region in machine.memory if region.kind.dma])
        mapped = [range_ for operation, range_ in calls if operation == "map"]
        result = guest.run()
    assert result.status == 0, result.console
    done = outcomes(jobs, output.decode())
    check_drive(done["nvme"], drive_of(nvme), before, marker(directory).read_bytes())
    assert "20 packets received" in done["nic"].checked
    assert f"raised {EDU_RAISES}\n" in done["edu"].checked
    assert merged(mapped) == ram
    # The host's own drivers use addresses just below 4 GiB, or above.
    events[:] = [(name, range_) for name, range_ in events if any(range_.overlaps(each) for each in ram)]
    without_probe(events)
    assert merged([range_ for name, range_ in events if name == "map"]) == ram


# --- what needs QEMU 11


@pytest.fixture(scope="module")
def modern_peer(nic: str) -> Iterator[None]:
    with host_interface(nic):
        yield


@MODERN
def test_igb(igb: str, modern_peer: None, backend: str) -> None:
    done = boot([Job("igb", igb, PING)], "--backend", backend)["igb"]
    assert "20 packets received" in done.checked
    done.check_interrupts(MSIX, 10)


@MODERN
def test_nvme_virtual_function(nvme_pf: str, directory: Path, backend: str, destructive: None) -> None:
    """The physical function and the namespace that both share stay with the host."""
    before = os.urandom(HEAD)
    with online_function(nvme_pf) as function:
        drive_of(nvme_pf).write_bytes(before)
        options = ("--backend", backend, "--copy", f"{marker(directory)}:/marker")
        done = boot([Job("vf", function, DRIVE)], *options)["vf"]
        check_drive(done, drive_of(nvme_pf), before, marker(directory).read_bytes())
    done.check_interrupts(MSIX, 1)


@MODERN
def test_igb_virtual_function(igb: str, modern_peer: None, backend: str, destructive: None) -> None:
    """Its packets reach the wire through the physical function, which stays with the host."""
    number = SYSFS / igb / "sriov_numvfs"
    with host_interface(igb, "198.51.100.1"):
        number.write_text("1")
        try:
            function = (SYSFS / igb / "virtfn0").readlink().name
            done = boot([Job("vf", function, PING)], "--backend", backend)["vf"]
        finally:
            number.write_text("0")
    assert "20 packets received" in done.checked
    done.check_interrupts(MSIX, 10)
