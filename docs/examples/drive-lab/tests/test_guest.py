"""One guest with a drive and a network card, for all tests of this file."""

import subprocess

import pytest

from kvmpass import Session
from kvmpass.errors import GuestDied

GUEST = {"devices": ("nvme", "nic"), "memory": "256M", "boot_timeout": 120.0}
pytestmark = [pytest.mark.amdvi(profile="two-drives", timeout=120), pytest.mark.guest(**GUEST)]


def said(guest: Session, script: str) -> str:
    return guest.run(["sh", "-ec", script], text=True, check=True, timeout=60).stdout.strip()


@pytest.mark.parametrize("size", ["512", "1k", "4k", "16k", "64k", "128k", "256k", "512k"])
def test_blocks_of_each_size(kvmpass_guest: Session, size: str, record_property):
    wanted = said(kvmpass_guest, "head -c 524288 /dev/nvme0n1 | sha256sum")
    read = said(kvmpass_guest, f"dd if=/dev/nvme0n1 bs={size} 2>/dev/null | head -c 524288 | sha256sum")
    record_property("sha256", read.split()[0])
    assert read == wanted


@pytest.mark.destructive
@pytest.mark.parametrize("octal", ["000", "125", "252", "377"])
def test_what_is_written_is_read(kvmpass_guest: Session, octal: str):
    write = f"head -c 65536 /dev/zero | tr '\\0' '\\{octal}' | dd of=/dev/nvme0n1 bs=64k conv=fsync 2>/dev/null"
    read = "dd if=/dev/nvme0n1 bs=64k count=1 2>/dev/null"
    rest = kvmpass_guest.run(["sh", "-ec", f"{write}; {read}"], check=True, timeout=60).stdout
    assert rest == bytes([int(octal, 8)]) * 65536


def test_the_drive_has_a_queue(kvmpass_guest: Session):
    assert "nvme0q1" in said(kvmpass_guest, "cat /proc/interrupts")


def test_a_process_of_the_guest(kvmpass_guest: Session):
    with kvmpass_guest.popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdin.write(b"there and back\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"there and back\n"


@pytest.mark.guest(**GUEST, may_die=True)
def test_a_crash(kvmpass_guest: Session):
    with pytest.raises(GuestDied, match="panicked"):
        said(kvmpass_guest, "echo c >/proc/sysrq-trigger; sleep 60")


def test_another_guest_after_the_crash(kvmpass_guest: Session):
    assert "sysrq" not in kvmpass_guest.dmesg()


@pytest.mark.parametrize("size", [1280, 1500, 4000])
def test_sizes_of_packets(kvmpass_guest: Session, size: int):
    assert said(kvmpass_guest, f"ip link set eth0 mtu {size}; cat /sys/class/net/eth0/mtu") == str(size)


def test_the_card_has_an_address(kvmpass_guest: Session):
    assert said(kvmpass_guest, "cat /sys/class/net/eth0/address").count(":") == 5
