"""The IOMMU's events in the kernel's log: the forms that kernels print, who may have written them, the reader."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmpass.host.address import Bdf
from kvmpass.host.kernel.faults import UNATTACHED, EventParser, FaultLog, IommuEvent, open_fault_log
from kvmpass.host.kernel.kmsg import Record, parse_records, read_log

FAULT = "IO_PAGE_FAULT"

# As kernels printed them, from reports of their users and from their sources: the device, the event, its numbers.
RECORDED = {
    "6.5, vfio-pci": (
        "vfio-pci 0000:04:10.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0037 address=0x7b657064 flags=0x0000]",
        ("0000:04:10.0", FAULT, 0x7B657064, 0x37, 0, "read"),
    ),
    "5.19, top of the address space": (
        "xhci_hcd 0000:02:00.0: AMD-Vi: Event logged "
        "[IO_PAGE_FAULT domain=0x000f address=0xff00ffffffefe000 flags=0x0000]",
        ("0000:02:00.0", FAULT, 0xFF00FFFFFFEFE000, 0xF, 0, "read"),
    ),
    "EL8, 4.18: no AMD-Vi": (
        "amdgpu 0000:05:00.0: Event logged [IO_PAGE_FAULT domain=0x0000 address=0x1688011a0 flags=0x0070]",
        ("0000:05:00.0", FAULT, 0x1688011A0, 0, 0x70, "write"),
    ),
    "a driver with blanks in its name": (
        "Some Card 0000:05:00.0: Event logged [IO_PAGE_FAULT domain=0x0000 address=0x10 flags=0x0050]",
        ("0000:05:00.0", FAULT, 0x10, 0, 0x50, "read"),
    ),
    "an interrupt": (
        "nvme 0000:01:00.0: AMD-Vi: Event logged "
        "[IO_PAGE_FAULT domain=0x0000 address=0xfffffffdf8000000 flags=0x0008]",
        ("0000:01:00.0", FAULT, 0xFFFFFFFDF8000000, 0, 8, "interrupt"),
    ),
    "a translation request": (
        "nvme 0000:01:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0003 address=0x1000 flags=0x0120]",
        ("0000:01:00.0", FAULT, 0x1000, 3, 0x120, "translation request"),
    ),
    "3.17, a device without data": (
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=0a:00.0 domain=0x001d address=0x000000000637c000 flags=0x0000]",
        ("0000:0a:00.0", FAULT, 0x637C000, 0x1D, 0, "read"),
    ),
    "since 6.0, with the segment": (
        "AMD-Vi: Event logged [IO_PAGE_FAULT device=0001:0a:00.3 domain=0x001d address=0xfd637c000 flags=0x0020]",
        ("0001:0a:00.3", FAULT, 0xFD637C000, 0x1D, 0x20, "write"),
    ),
    "no driver": (
        "pci 0000:00:06.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x000b address=0x0 flags=0x0020]",
        ("0000:00:06.0", FAULT, 0, 0xB, 0x20, "write"),
    ),
    "behind VMD": (
        "nvme 10000:e1:00.0: AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0021 address=0xcafe000 flags=0x0030]",
        ("10000:e1:00.0", FAULT, 0xCAFE000, 0x21, 0x30, "write"),
    ),
    "no device at all": (
        "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x0007 address=0xffffc02000 flags=0x0000]",
        (None, FAULT, 0xFFFFC02000, 7, 0, "read"),
    ),
    "an illegal entry of the device table": (
        "pci 0000:00:00.2: AMD-Vi: Event logged [ILLEGAL_DEV_TABLE_ENTRY device=0000:0a:00.0 pasid=0x00000 "
        "address=0xfffffffdf8000000 flags=0x0a00]",
        ("0000:0a:00.0", "ILLEGAL_DEV_TABLE_ENTRY", 0xFFFFFFFDF8000000, None, 0xA00, ""),
    ),
    "an invalid request": (
        "AMD-Vi: Event logged [INVALID_DEVICE_REQUEST device=00:00.0 pasid=0x00000 address=0xfffffffdf8000000 "
        "flags=0x0a00]",
        ("0000:00:00.0", "INVALID_DEVICE_REQUEST", 0xFFFFFFFDF8000000, None, 0xA00, ""),
    ),
    "a device that does not answer": (
        "iommu ivhd0: AMD-Vi: Event logged [IOTLB_INV_TIMEOUT device=0000:0b:00.0 address=0x10a1ab9c0]",
        ("0000:0b:00.0", "IOTLB_INV_TIMEOUT", 0x10A1AB9C0, None, None, ""),
    ),
    "5.10: the IOMMU speaks, of another": (
        "iommu ivhd0: Event logged [PAGE_TAB_HARDWARE_ERROR device=0b:00.1 pasid=0x0000 address=0x8 flags=0x0000]",
        ("0000:0b:00.1", "PAGE_TAB_HARDWARE_ERROR", 8, None, 0, ""),
    ),
    "a bad page request": (
        "pci 0000:00:00.2: AMD-Vi: Event logged [INVALID_PPR_REQUEST device=0000:0b:00.1 pasid=0x00007 address=0x8 "
        "flags=0x0000 tag=0x003]",
        ("0000:0b:00.1", "INVALID_PPR_REQUEST", 8, None, 0, ""),
    ),
    "SEV-SNP": (
        "vfio-pci 0000:0c:00.0: AMD-Vi: Event logged "
        "[RMP_PAGE_FAULT vmg_tag=0x0000, gpa=0x1234000, flags_rmp=0x0001, flags=0x0020]",
        ("0000:0c:00.0", "RMP_PAGE_FAULT", 0x1234000, None, 0x20, ""),
    ),
    "SEV-SNP, no data": (
        "AMD-Vi: Event logged [RMP_HW_ERROR device=0000:0c:00.0, vmg_tag=0x0000, spa=0x8, flags=0x0020]",
        ("0000:0c:00.0", "RMP_HW_ERROR", 8, None, 0x20, ""),
    ),
    "a bad command, of no device": (
        "pci 0000:00:00.2: AMD-Vi: Event logged [ILLEGAL_COMMAND_ERROR address=0x100]",
        (None, "ILLEGAL_COMMAND_ERROR", 0x100, None, None, ""),
    ),
}
# What belongs together, in records: 4.9 and 4.14 have two for an event.
SPLIT = {
    "4.9": (
        [
            "AMD-Vi: Event logged [",
            "IO_PAGE_FAULT device=0a:00.0 domain=0x001d address=0x000000000637c000 flags=0x0020]",
        ],
        ("0000:0a:00.0", FAULT, 0x637C000, 0x1D, 0x20, "write"),
    ),
    "4.14": (
        [
            "iommu ivhd0: AMD-Vi: Event logged [",
            "INVALID_DEVICE_REQUEST device=0a:00.0 address=0xfffffffdf8000000 flags=0x0a00]",
        ],
        ("0000:0a:00.0", "INVALID_DEVICE_REQUEST", 0xFFFFFFFDF8000000, None, 0xA00, ""),
    ),
    "another CPU speaks in between": (
        [
            "AMD-Vi: Event logged [",
            "random: crng init done",
            "IO_PAGE_FAULT device=0a:00.0 domain=0x001d address=0x0 flags=0x0000]",
        ],
        ("0000:0a:00.0", FAULT, 0, 0x1D, 0, "read"),
    ),
    "no domain": (
        [
            "AMD-Vi: Event logged [Device not attached to domain properly]",
            "AMD-Vi:   device=0000:0a:00.0 domain=0x0004",
        ],
        ("0000:0a:00.0", UNATTACHED, None, 4, None, ""),
    ),
}
BODY = "[IO_PAGE_FAULT device=01:00.0 domain=0x0001 address=0x0 flags=0x0000]"
OTHERS = [
    "",
    "vfio-pci 0000:01:00.0: enabling device (0000 -> 0002)",
    "AMD-Vi: Interrupt remapping enabled",
    "amd_iommu_report_page_fault: 26 callbacks suppressed",
    f"usb 1-1: Product: AMD-Vi: Event logged {BODY}",
    f"usb 1-1: Product: 0000:01:00.0: AMD-Vi: Event logged {BODY}",
    f"usb 1-1: SerialNumber: vfio-pci 0000:01:00.0: Event logged {BODY}",
    f"scsi 2:0:0:0: Direct-Access     0000:01:00.0: AMD-Vi: Event logged {BODY}",
    f"input: AMD-Vi: Event logged {BODY} as /devices/pci0000:00/usb1/1-1/input/input9",
    f"AMD-Vi: Event logged {BODY} and more",
    f" AMD-Vi: Event logged {BODY}",
    f"Event logged {BODY}",  # nobody says it
    "AMD-Vi: Event logged [IO_PAGE_FAULT device=1:2:3.0 domain=0x0001 address=0x0 flags=0x0000]",
    "AMD-Vi: Event logged [IO_PAGE_FAULT device=01:3f.0 domain=0x0001 address=0x0 flags=0x0000]",
    "AMD-Vi: Event logged [IO_PAGE_FAULT device=01:00.8 domain=0x0001 address=0x0 flags=0x0000]",
    "AMD-Vi: Event logged [IO_PAGE_FAULT device=:::.0 domain=0x0001 address=0x0 flags=0x0000]",
    "AMD-Vi: Event logged [IO_PAGE_FAULT domain=0x address=0x0 flags=0x0000]",
    "AMD-Vi: Event logged [UNKNOWN event[0]=0x00000000 event[1]=0x00000000 event[2]=0x00000000 event[3]=0x00000000",
    "AMD-Vi: Event logged [",
    BODY[1:],  # the second half of nothing
]


def of_kernel(text: str) -> Record:
    return Record(0, 1, text)


def values(event: IommuEvent | None) -> tuple[object, ...]:
    assert event is not None
    name = None if event.bdf is None else str(event.bdf)
    return name, event.kind, event.address, event.domain, event.flags, event.access


@pytest.mark.parametrize("text, wanted", RECORDED.values(), ids=RECORDED)
def test_messages_that_tell_of_an_event(text: str, wanted: tuple[object, ...]) -> None:
    event = EventParser().feed(of_kernel(text))
    assert values(event) == wanted
    assert event is not None
    assert event.text == text


@pytest.mark.parametrize("texts, wanted", SPLIT.values(), ids=SPLIT)
def test_events_in_two_records(texts: list[str], wanted: tuple[object, ...]) -> None:
    parser = EventParser()
    *first, last = [parser.feed(of_kernel(text)) for text in texts]
    assert first == [None] * len(first)
    assert values(last) == wanted
    assert last is not None
    assert last.text == texts[0] + texts[-1]
    assert parser.feed(of_kernel(texts[-1])) is None, "it is over"


def test_a_second_record_that_never_comes() -> None:
    parser = EventParser()
    parser.feed(of_kernel("AMD-Vi: Event logged ["))
    for _ in range(100):
        assert parser.feed(of_kernel("something else")) is None
    assert parser.feed(of_kernel(BODY[1:])) is None


@pytest.mark.parametrize("text", OTHERS)
def test_messages_that_do_not(text: str) -> None:
    assert EventParser().feed(of_kernel(text)) is None


def test_only_the_kernels_own_records_count() -> None:
    text, wanted = RECORDED["6.5, vfio-pci"]
    for priority, counts in ((3, True), (4, True), (0 << 3 | 6, True), (1 << 3 | 3, False), (3 << 3 | 3, False)):
        [record] = parse_records(f"{priority},1,2,-;{text}\n".encode())
        event = EventParser().feed(record)
        assert (event is not None) is counts
        assert not counts or values(event) == wanted


def test_what_the_kernel_says_about_which_device_it_is_must_agree() -> None:
    text, wanted = RECORDED["6.5, vfio-pci"]
    for properties, counts in (
        ("\n SUBSYSTEM=pci\n DEVICE=+pci:0000:04:10.0", True),
        ("\n SUBSYSTEM=usb\n DEVICE=c189:1", False),
        ("\n SUBSYSTEM=pci\n DEVICE=+pci:0000:04:10.1", False),
        ("\n SUBSYSTEM=pci\n DEVICE=+pci:nonsense", False),
        ("\n nonsense", True),
    ):
        [record] = parse_records(f"3,1,2,-,caller=T1;{text}{properties}\n".encode())
        event = EventParser().feed(record)
        assert (event is not None) is counts, properties
        assert not counts or values(event) == wanted


def test_a_line_break_makes_no_record() -> None:
    [record] = parse_records(b"6,1,2,-;usb 1-1: Product: x\\x0aAMD-Vi: Event logged " + BODY.encode() + b"\n")
    assert EventParser().feed(record) is None


@given(st.lists(st.binary(max_size=80), max_size=6))
def test_no_bytes_make_it_raise(pieces: list[bytes]) -> None:
    parser = EventParser()
    for piece in pieces:
        for record in parse_records(piece):
            parser.feed(record)


def test_damaged_messages_do_not_make_it_raise() -> None:
    """Real messages with characters replaced, left out, doubled: an event that is found has a device that can be."""
    dice = random.Random(7)
    texts = [text for text, _ in RECORDED.values()] + [text for texts, _ in SPLIT.values() for text in texts]
    found = 0
    for _ in range(5000):
        text = list(dice.choice(texts))
        for _ in range(dice.randint(1, 4)):
            at = dice.randrange(len(text))
            text[at : at + dice.randint(0, 3)] = dice.choices("0123456789abcdefx:.=[]- ,", k=dice.randint(0, 3))
        parser = EventParser()
        event = parser.feed(of_kernel("".join(text))) or parser.feed(of_kernel(dice.choice(texts)))
        if event is not None:
            found += 1
            assert event.bdf is None or Bdf.parse(str(event.bdf)) == event.bdf
    assert found > 500


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
    return f"3,1042,5125900,-;{text}\n".encode()


def test_events_among_other_messages(log: Log) -> None:
    texts = [text for text, _ in RECORDED.values()]
    with FaultLog(log.path) as events:
        assert os.lseek(events.fileno(), 0, os.SEEK_CUR) == len("6,1,1,-;before\n"), "from now on"
        assert not os.get_inheritable(events.fileno())
        assert not os.get_blocking(events.fileno())
        assert events.read() == []
        log.records = [record(text) for text in [OTHERS[1], *texts, OTHERS[2]]]
        assert [event.text for event in events.read()] == texts
        assert events.read() == []
        halves, wanted = SPLIT["4.9"]
        log.records = [record(halves[0])]
        assert events.read() == []
        log.records = [record(halves[1])]
        assert [values(event) for event in events.read()] == [wanted]
    assert events.closed


def test_a_log_that_ran_over(log: Log) -> None:
    text = RECORDED["no driver"][0]
    with FaultLog(log.path) as events:
        log.records = [BrokenPipeError(errno.EPIPE, "lost"), record(text), BrokenPipeError(errno.EPIPE, "lost")]
        assert [event.text for event in events.read()] == [text]
        assert events.lost == 2
        log.records = [record("AMD-Vi: Event logged ["), BrokenPipeError(errno.EPIPE, "lost"), record(BODY[1:])]
        assert events.read() == [], "halves of two events"


def test_other_errors_and_bytes_that_are_no_text(log: Log) -> None:
    with FaultLog(log.path) as events:
        log.records = [b"3,1,1,-;\xff\xfe\n", b"nonsense\n", b"", OSError(errno.EIO, "broken")]
        assert events.read() == []
        with pytest.raises(OSError, match="broken"):
            events.read()


def test_the_whole_log(log: Log) -> None:
    log.records = [record("one"), BrokenPipeError(errno.EPIPE, "lost"), b"14,1043,1,-;of a program\n", record("two")]
    found = read_log(log.path)
    assert [record.text for record in found.records] == ["one", "of a program", "two"]
    assert found.having("o") == ["one", "two"]
    assert not found.complete, "its first record is not the boot's"
    log.records = [b"6,0,0,-;Linux version 6.12\n"]
    assert read_log(log.path).complete
    log.records = [b"6,0,0,-;Linux version 6.12\n", record("two"), record("three")]
    chosen = read_log(log.path, b"tw")
    assert [record.text for record in chosen.records] == ["two"]
    assert chosen.complete, "its first record is the boot's, whichever is chosen"
    log.records = [PermissionError(errno.EPERM, os.strerror(errno.EPERM))]
    assert read_log(log.path).error == "Operation not permitted"
    assert read_log("/nonexistent").error == "No such file or directory"


def test_who_may_not_read_is_told_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reason = open_fault_log(str(tmp_path / "none"))
    assert isinstance(reason, str)
    assert "No such file or directory; the kernel has no CONFIG_PRINTK" in reason
    for code, hint in ((errno.EPERM, "CAP_SYSLOG"), (errno.EACCES, "run as root")):

        def refuse(*_: object, code: int = code) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr("kvmpass.host.kernel.faults.open_node", refuse)
        reason = open_fault_log()
        assert isinstance(reason, str)
        assert hint in reason
        with pytest.raises(PermissionError):
            FaultLog()


def test_the_log_of_this_machine(tmp_path: Path) -> None:
    """A file stands in for the node where this process may not read it."""
    (tmp_path / "kmsg").write_bytes(record(RECORDED["no driver"][0]))
    events = open_fault_log(str(tmp_path / "kmsg"))
    assert isinstance(events, FaultLog)
    assert events.read() == []
    events.close()
