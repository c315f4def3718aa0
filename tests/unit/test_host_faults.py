"""DMA faults in the kernel's log: the forms that kernels print, and the reader of the log."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmpass.host.address import Bdf
from kvmpass.host.faults import DmaFault, FaultLog, open_fault_log, parse_fault

# As kernels printed them, from reports of their users.
RECORDED = {
    "6.5, vfio-pci": (
        "vfio-pci 0000:04:10.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0037 address=0x7b657064 flags=0x0000]",
        ("0000:04:10.0", 0x7B657064, 0x37, 0),
    ),
    "6.6, a driver with a second colon": (
        "ahci 0000:28:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0035 address=0x7fffff00300 flags=0x0000]",
        ("0000:28:00.0", 0x7FFFFF00300, 0x35, 0),
    ),
    "5.19, top of the address space": (
        "xhci_hcd 0000:02:00.0: AMD-Vi: Event logged "
        "[IO_PAGE_FAULT domain=0x000f address=0xff00ffffffefe000 flags=0x0000]",
        ("0000:02:00.0", 0xFF00FFFFFFEFE000, 0xF, 0),
    ),
    "4.18, permission": (
        "smartpqi 0000:23:00.0: AMD-Vi: Event logged "
        "[IO_PAGE_FAULT domain=0x0000 address=0xffffffffffec0000 flags=0x0010]",
        ("0000:23:00.0", 0xFFFFFFFFFFEC0000, 0, 0x10),
    ),
    "3.17, a device without data": (
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=0a:00.0 domain=0x001d address=0x000000000637c000 flags=0x0000]",
        ("0000:0a:00.0", 0x637C000, 0x1D, 0),
    ),
    "since 6.0, with the segment": (
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=0001:0a:00.3 domain=0x001d address=0xfd637c000 flags=0x0020]",
        ("0001:0a:00.3", 0xFD637C000, 0x1D, 0x20),
    ),
    "no driver": (
        "pci 0000:00:06.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000b address=0x0 flags=0x0020]",
        ("0000:00:06.0", 0, 0xB, 0x20),
    ),
    "behind VMD": (
        "nvme 10000:e1:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0021 address=0xcafe000 flags=0x0030]",
        ("10000:e1:00.0", 0xCAFE000, 0x21, 0x30),
    ),
    "no device at all": (
        "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0007 address=0xffffc02000 flags=0x0000]",
        (None, 0xFFFFC02000, 7, 0),
    ),
}
OTHERS = [
    "",
    "vfio-pci 0000:01:00.0: enabling device (0000 -> 0002)",
    "AMD-Vi: Interrupt remapping enabled",
    "AMD-Vi: Event logged [Device not attached to domain properly]",
    "AMD-Vi: Event logged [ILLEGAL_DEV_TABLE_ENTRY device=0000:0a:00.0 pasid=0x00000 address=0xfffffffdf8000000 "
    "flags=0x0a00]",
    "AMD-Vi: Event logged [INVALID_DEVICE_REQUEST device=0000:00:00.0 pasid=0x00000 address=0xfffffffdf8000000 "
    "flags=0x0a00]",
    "amd_iommu_report_page_fault: 26 callbacks suppressed",
]


@pytest.mark.parametrize("text, wanted", RECORDED.values(), ids=RECORDED)
def test_messages_that_tell_of_a_fault(text: str, wanted: tuple[str | None, int, int, int]) -> None:
    fault = parse_fault(text)
    assert fault is not None
    name, *numbers = wanted
    assert (fault.bdf, fault.text) == (Bdf.parse(name) if name else None, text)
    assert [fault.address, fault.domain, fault.flags] == numbers
    assert fault.write is bool(fault.flags & 0x20)


@pytest.mark.parametrize("text", OTHERS)
def test_messages_that_do_not(text: str) -> None:
    assert parse_fault(text) is None


class Log:
    """A file in place of the kernel's log: what ``os.read`` gives, record by record."""

    def __init__(self, path: Path, patch: pytest.MonkeyPatch) -> None:
        path.write_text("6,1,1,-;before\n")
        self.path = str(path)
        self.records: list[bytes | OSError] = []
        patch.setattr(os, "read", self.read)

    def read(self, fd: int, size: int) -> bytes:
        assert size >= 8192, "the kernel refuses a buffer that is too small for a record"
        if not self.records:
            raise BlockingIOError(errno.EAGAIN, "nothing more")
        record = self.records.pop(0)
        if isinstance(record, OSError):
            raise record
        return record


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Log]:
    return Log(tmp_path / "kmsg", monkeypatch)


def record(text: str) -> bytes:
    return f"3,1042,5125900,-;{text}\n SUBSYSTEM=pci\n DEVICE=+pci:0000:04:10.0\n".encode()


def test_faults_among_other_messages(log: Log) -> None:
    texts = [text for text, _ in RECORDED.values()]
    with FaultLog(log.path) as faults:
        assert os.lseek(faults.fileno(), 0, os.SEEK_CUR) == len("6,1,1,-;before\n"), "from now on"
        assert not os.get_inheritable(faults.fileno())
        assert not os.get_blocking(faults.fileno())
        assert faults.read() == []
        log.records = [record(text) for text in [OTHERS[1], *texts, OTHERS[2]]]
        assert [fault.text for fault in faults.read()] == texts
        assert faults.read() == []
    assert faults.closed


def test_a_log_that_ran_over(log: Log) -> None:
    text = RECORDED["no driver"][0]
    with FaultLog(log.path) as faults:
        log.records = [BrokenPipeError(errno.EPIPE, "lost"), record(text), BrokenPipeError(errno.EPIPE, "lost")]
        assert [fault.text for fault in faults.read()] == [text]
        assert faults.lost == 2


def test_other_errors_and_bytes_that_are_no_text(log: Log) -> None:
    with FaultLog(log.path) as faults:
        log.records = [b"3,1,1,-;\xff\xfe\n", b"", OSError(errno.EIO, "broken")]
        assert faults.read() == []
        with pytest.raises(OSError, match="broken"):
            faults.read()


def test_who_may_not_read_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = open_fault_log(str(tmp_path / "none"))
    assert isinstance(reason, str)
    assert "No such file or directory; the kernel has no CONFIG_PRINTK" in reason
    for code, hint in ((errno.EPERM, "CAP_SYSLOG"), (errno.EACCES, "run as root")):

        def refuse(*_: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("kvmpass.host.faults.open_node", refuse)
        reason = open_fault_log()
        assert isinstance(reason, str)
        assert hint in reason
        with pytest.raises(PermissionError):
            FaultLog()


def test_the_log_of_this_machine(tmp_path: Path) -> None:
    """A file stands in for the node where this process may not read it."""
    (tmp_path / "kmsg").write_bytes(record(RECORDED["no driver"][0]))
    faults = open_fault_log(str(tmp_path / "kmsg"))
    assert isinstance(faults, FaultLog)
    assert faults.read() == []
    faults.close()


def test_a_fault_is_a_value() -> None:
    text, _ = RECORDED["no driver"]
    assert parse_fault(text) == DmaFault(Bdf(0, 0, 6, 0), 0, 0xB, 0x20, text)
