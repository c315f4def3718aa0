"""Commands in guests that stay.

The peer in QEMU is the least that can run a command there: a loop of the guest's shell that reads a line from a port
of a virtio console, and answers with the status; there are pipes on the host's side. It carries no output, input,
signals or environment.
"""

from __future__ import annotations

import os
import select
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from qemu import SECONDS, Qemu, boot_words, port_words
from samples import CLICK, KVMPASS, Bench, Job, elapsed

import kvmpass
from kvmpass.guest import GuestSpec, prepare

NAME = "bench"
MEMORY = 192
COMMANDS = 10
EXEC = [*KVMPASS, "exec", NAME, "--", "true"]
ROW, LIBRARY_ROW = "kvmpass exec GUEST -- true, s", "one command in a guest, ms"
# The shell has no command of its own by this path.
LOOP = "exec 4<>/dev/vport0p1; echo begin; while read -r line <&4; do $line; echo $? >&4; done"
ASK = 'echo /usr/bin/true >"$0.in"; read -r status <"$0.out"; exit "$status"'


class Peer:
    """A guest of QEMU that runs commands."""

    def __init__(self, port: Path) -> None:
        self._port = port
        self._input, self._output = port.with_suffix(".in").open("wb"), port.with_suffix(".out").open("rb")

    def run(self, words: list[str]) -> None:
        """Run a command, without output. Raises ``CalledProcessError``, and ``TimeoutError`` if the guest hangs."""
        self._input.write(" ".join(words).encode() + b"\n")
        self._input.flush()
        if not select.select([self._output], [], [], SECONDS)[0]:
            raise TimeoutError("QEMU's guest hangs")
        if status := int(self._output.readline()):
            raise subprocess.CalledProcessError(status, words)

    def exec(self) -> None:
        """Run ``true`` by a process of the host."""
        subprocess.run(["sh", "-c", ASK, str(self._port)], check=True, timeout=SECONDS)

    def close(self) -> None:
        """Close the pipes."""
        self._input.close()
        self._output.close()


@contextmanager
def guest_of_qemu() -> Iterator[Peer]:
    """Boot a guest that runs the loop."""
    image = prepare(GuestSpec(command=("sh", "-c", LOOP)), []).on_serial_ports()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for end in ("in", "out"):
            os.mkfifo(folder / f"port.{end}")
        with Qemu(*boot_words(folder, image, MEMORY), *port_words("pipe", folder / "port")) as qemu:
            qemu.command("cont")
            with (folder / "serial1.out").open("rb") as stream:
                qemu.wait_for(lambda: bool(select.select([stream], [], [], 0)[0]))
            peer = Peer(folder / "port")
            try:
                yield peer
            finally:
                peer.close()


@contextmanager
def sessions(bench: Bench) -> Iterator[list[Job]]:
    """Measure one ``true``: by ``kvmpass exec``, and by ``Session.run``."""
    note = bench.samples.note

    def each(run: object, program: str = "true") -> float:
        assert callable(run)
        return elapsed(lambda: [run([program]) for _ in range(COMMANDS)]) / COMMANDS * 1000

    words = ["--name", NAME, "--memory", f"{MEMORY}M"]
    subprocess.run([*KVMPASS, "start", *words], check=True, stdout=subprocess.DEVNULL)
    try:
        with kvmpass.start(memory=f"{MEMORY}M", name=f"{NAME}-library") as guest, guest_of_qemu() as peer:
            yield [
                lambda: note(ROW, "kvmpass", elapsed(partial(subprocess.run, EXEC, check=True))),
                lambda: note(ROW, "import click", elapsed(partial(subprocess.run, CLICK, check=True))),
                lambda: note(ROW, "QEMU", elapsed(peer.exec)),
                lambda: note(LIBRARY_ROW, "kvmpass", each(guest.run)),
                lambda: note(LIBRARY_ROW, "on the host", each(subprocess.run)),
                lambda: note(LIBRARY_ROW, "QEMU", each(peer.run, "/usr/bin/true")),
            ]
    finally:
        subprocess.run([*KVMPASS, "stop", NAME], check=True, stdout=subprocess.DEVNULL)
