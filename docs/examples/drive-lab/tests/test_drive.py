import os
import subprocess

import pytest

ROUNDS = int(os.environ.get("DRIVE_LAB_ROUNDS", "1"))


def in_guest(bdf: str, script: str) -> str:
    words = ["kvmpass", "assign", "--memory", "256M", bdf, "--", "sh", "-ec", script]
    return subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True, timeout=100).stdout


def test_arithmetic():
    assert 256 << 20 == 268435456


@pytest.mark.amdvi(profile="two-drives", timeout=120)
class TestDrive:
    def test_size(self, nvme: str, emulated_host: bool):
        size = int(in_guest(nvme, "blockdev --getsize64 /dev/nvme0n1"))
        assert size == 256 << 20 or not emulated_host

    @pytest.mark.destructive
    def test_what_is_written_is_read(self, nvme2: str):
        for _ in range(ROUNDS):
            said = in_guest(
                nvme2, "echo hello | dd of=/dev/nvme0n1 conv=sync,fsync 2>/dev/null; head -n 1 /dev/nvme0n1"
            )
            assert said == "hello\n"
