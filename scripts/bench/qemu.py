"""QEMU as the peer: its q35 machine under KVM, with vfio-pci and a monitor (QMP)."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any, Self

WORDS = ["qemu-system-x86_64", "-machine", "q35", "-accel", "kvm", "-cpu", "host"]
WORDS += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-qmp", "stdio"]
SECONDS = 120


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

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.returncode is None:
            self.child.kill()
        self.child.communicate()
