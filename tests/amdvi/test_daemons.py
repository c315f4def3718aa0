"""Virtio devices that daemons serve, in guests that have an assigned device as well."""

from __future__ import annotations

import hashlib
import os
import threading
from pathlib import Path

import pytest
from support import daemons

from kvmpass import host
from kvmpass.guest import Guest, GuestSpec, prepare
from kvmpass.host import Sysfs
from kvmpass.machine import Machine
from kvmpass.memory import Backing
from kvmpass.virtio.fs import MODALIAS

pytestmark = pytest.mark.amdvi(duration=12)


def test_a_guest_mounts_a_directory_of_the_host(edu: str, tmp_path: Path) -> None:
    """The daemon serves it: no exit for a request, no thread of this process."""
    shared, content = tmp_path / "shared", os.urandom(5_000_000)
    shared.mkdir()
    (shared / "data").write_bytes(content)
    script = """mkdir /mnt; mount -t virtiofs files /mnt || exit 9; sha256sum /mnt/data
        echo from the guest > /mnt/written; ls /sys/bus/pci/devices; cat /proc/interrupts | grep virtio"""
    spec = GuestSpec(command=("sh", "-c", script))
    image = prepare(spec, [Sysfs().device(host.Bdf.parse(edu)).modalias, MODALIAS])
    said = bytearray()
    with (
        host.borrow(edu),
        daemons.virtiofsd(shared, tmp_path / "socket") as process,
        Machine(memory="192M", backing=Backing.MEMFD) as machine,
    ):
        machine.assign(edu)
        machine.add_filesystem("files", tmp_path / "socket")
        image.load(machine)
        with Guest(machine, console=None, output=said.extend, errors=said.extend) as guest:
            result = guest.run(timeout=240)
        machine.audit()
        print(machine.exit_reasons, said.decode(), [thread.name for thread in threading.enumerate()])
        assert (result.status, result.failures) == (0, ()), (result, said)
        machine.close()
        assert process.wait(20) == 0, "the connection is closed, and it has no other"
    assert hashlib.sha256(content).hexdigest() in said.decode()
    assert (shared / "written").read_text() == "from the guest\n"
