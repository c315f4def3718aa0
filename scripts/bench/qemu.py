"""QEMU as the peer: its q35 machine under KVM, with vfio-pci and a monitor (QMP), and kvmpass's guest in it."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from kvmpass.guest.image import GuestImage
from kvmpass.ports import SERIAL_LINES

WORDS = ["qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-cpu", "host"]
WORDS += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-qmp", "stdio"]
SECONDS = 120
FIND_PORT, FIND_NONE = b"    find_port && return\n", b"    # on serial ports  \n"
"""Of init: it would wait for the port of kvmpass's agent wherever there is a virtio console."""


def boot_words(folder: Path, image: GuestImage, memory: int) -> list[str]:
    """Return the words that boot a guest with ``memory`` MiB, its CPUs stopped at first.

    Its serial ports are files in ``folder``: ``serial3`` says when the command begins and ends, and what it prints
    comes through the pipe ``serial1.out``. ``image`` is for serial ports.
    """
    assert image.initrd.count(FIND_PORT) == 1 and len(FIND_PORT) == len(FIND_NONE)
    (folder / "initrd").write_bytes(image.initrd.replace(FIND_PORT, FIND_NONE))
    words = ["-S", "-m", f"{memory}M", "-kernel", str(image.kernel.path), "-initrd", str(folder / "initrd")]
    words += ["-append", image.cmdline]
    for end in ("in", "out"):
        os.mkfifo(folder / f"serial1.{end}")
    for index, line in enumerate(SERIAL_LINES):
        kind = "pipe" if index == 1 else "file"
        words += ["-chardev", f"{kind},id=serial{index},path={folder / f'serial{index}'}"]
        place = f"iobase={line.port:#x},irq={line.irq},index={index}"
        words += ["-device", f"isa-serial,chardev=serial{index},{place}"]
    return words


def port_words(kind: str, path: Path) -> list[str]:
    """Return the words for a port of a virtio console, ``/dev/vport0p1`` in the guest."""
    words = ["-chardev", f"{kind},id=port,path={path}", "-device", "virtio-serial-pci"]
    return [*words, "-device", "virtserialport,chardev=port,name=port"]


class Qemu:
    """A QEMU that answers on its monitor: its devices are attached then. ``with`` ends it."""

    def __init__(self, *words: str) -> None:
        started = time.monotonic()
        self.child = subprocess.Popen([*WORDS, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert self.child.stdout is not None
            self.child.stdout.readline()  # its greeting
            self.command("qmp_capabilities")
        except BaseException:
            self.child.kill()
            self.child.communicate()
            raise
        self.started = started
        """When it was started, on ``time.monotonic``'s clock."""
        self.attach_seconds = time.monotonic() - started
        """How long that took, from the start of the process."""

    def command(self, name: str, **arguments: Any) -> Any:
        """Run a command of the monitor and return its result. Raises ``RuntimeError`` with what QEMU says."""
        assert self.child.stdin is not None and self.child.stdout is not None
        self.child.stdin.write(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        self.child.stdin.flush()
        while line := self.child.stdout.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise RuntimeError(f"{name}: QEMU has ended")

    def wait_for(self, condition: Callable[[], bool]) -> float:
        """Wait until a condition holds; return when it did. Raises ``TimeoutError``, or if QEMU ends first."""
        deadline = time.monotonic() + SECONDS
        while True:
            status = self.child.poll()  # first: what it did last counts
            if condition():
                return time.monotonic()
            if status is not None:
                raise RuntimeError(f"QEMU has ended with status {status}")
            if time.monotonic() > deadline:
                raise TimeoutError("QEMU's guest hangs")
            time.sleep(0.01)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.returncode is None:
            self.child.kill()
        self.child.communicate()
