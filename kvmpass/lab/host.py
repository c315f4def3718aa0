"""One emulated host: its start, the check that its DMA is translated, its command, its end."""

from __future__ import annotations

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from kvmpass import crash
from kvmpass.errors import LabError
from kvmpass.lab import devices, initrd, kernels, proof, qemu
from kvmpass.lab.cache import Say, cache_errors, need_tool, run_directory
from kvmpass.lab.channels import Channels, Lines, Pump, Writer
from kvmpass.lab.command import CONTROL, command_line
from kvmpass.lab.config import LabConfig, LabOutcome, LabResult
from kvmpass.lab.script import Job, overlay

BOOT_SECONDS = 240.0
FIRST_BOOT_SECONDS = 120.0  # a boot that hangs does so early; booting again is faster than waiting
END_SECONDS = 5.0
STALL_SECONDS = 20.0  # the timers of an idle host use CPU time ten times in it
NOISE = ("TCG doesn't support", "warning: ")

IN, OUT, ERR, STATUS = "kvmpass.in", "kvmpass.out", "kvmpass.err", "kvmpass.status"


class Host:
    """A QEMU process and its channels. The end of the ``with`` block ends QEMU and removes the run's files.

    Synchronization: one thread, except for :meth:`cpu_time` and :meth:`stop`.
    """

    def __init__(self, config: LabConfig, say: Say) -> None:
        self._config, self._say = config, say
        self._began = time.monotonic()
        self._deadline = math.inf
        self._started = False
        self._woken = 0
        self._cleanup = ExitStack()
        self._pumps: dict[str, Pump] = {}

    def __enter__(self) -> Self:
        self._directory = self._cleanup.enter_context(run_directory())
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    @cache_errors()
    def start(self, job: Job) -> None:
        """Start QEMU with the job's ports. Raises ``LabError`` if a tool, a kernel or a file is missing."""
        config = self._config
        self._emulator = qemu.find(config.qemu or kernels.emulator_for(config.kernel))
        self._accelerator = qemu.accelerator(config.accel)
        self._kernel = kernels.find(config.kernel, self._say)
        found = devices.qemu_devices(
            config.devices,
            self._directory,
            root_ports=self._emulator.root_ports,
            is_pci=self._emulator.is_pci,
            southbridge=self._kernel.wants_southbridge,
        )
        for path, size in found.files:
            with path.open("wb") as file:
                file.truncate(size)
        writable = tuple(path.absolute() for path in config.writable)
        for path in writable:
            if not path.is_dir():
                raise LabError(f"{path} is not a directory")
        image = self._directory / "initrd"
        first = initrd.base(self._kernel, self._say).read_bytes()
        image.write_bytes(initrd.padded(first) + overlay(job, self._kernel, writable))
        self._trace = None
        if "iommu" not in config.without:
            self._trace = (config.iommu_trace or self._directory / "trace").absolute()
            self._trace.unlink(missing_ok=True)
        self._channels = Channels((*job.ports, CONTROL))
        self._cleanup.callback(self._channels.close)
        self._console = self._directory / "console"
        self._launch(
            command_line(
                config,
                self._emulator,
                self._kernel,
                image,
                found,
                self._channels.inner,
                self._console,
                self._trace,
            )
        )
        self._lines = Lines(self.port(STATUS))

    def _launch(self, words: list[str]) -> None:
        # Without it QEMU would keep running after this process was killed.
        guard = [str(need_tool("setpriv")), "--pdeathsig", "KILL", "--"]
        self._errors = self._directory / "stderr"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [*guard, *words],
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=errors,
                env={**os.environ, **self._emulator.environment},
                pass_fds=tuple(self._channels.inner.values()),
                start_new_session=True,
            )
        self._cleanup.callback(self.stop)
        self._channels.close_inner()
        self._deadline = time.monotonic() + (self._config.timeout or math.inf)

    def port(self, name: str) -> socket.socket:
        """Return this process's end of a port."""
        return self._channels.outer[name]

    def pump(self, outputs: Mapping[str, Writer]) -> None:
        """Start to copy these ports to their writers. A writer that fails ends the run."""
        for name, target in outputs.items():
            pump = Pump(self.port(name), target, self._give_up)
            self._pumps[name] = pump
            pump.start()

    def _give_up(self) -> None:
        with suppress(OSError):
            self.port(STATUS).shutdown(socket.SHUT_RDWR)

    def boot(self, patience: float) -> LabResult | None:
        """Wait at most ``patience`` seconds for the host, and let it start the command.

        Returns ``None``, or the result of a host that has not booted.
        Raises ``LabError`` if QEMU refuses its arguments, or if it does not translate DMA.
        """
        try:
            line = self._lines.read(min(self._deadline, time.monotonic() + patience))
        except TimeoutError:
            return self._result("timeout")
        if line is None:
            self._process.wait(END_SECONDS)
            complaints = self._complaints()
            if self._process.returncode and complaints:
                raise LabError(f"QEMU: {complaints[0]}")
            return self._died()
        if self._trace is not None:
            if not proof.bypassed(self._config.append):
                proof.require(self._trace, self._emulator, self._kernel)
            if self._config.iommu_trace is None:
                proof.stop_trace(self.port(CONTROL))
        self._lines.send("go\n")
        self._started = True
        return None

    def wait(self) -> LabResult:
        """Wait for the command's end and all of its output. Raises what a writer of output raised."""
        used = None
        while True:
            try:
                line = self._lines.read(min(self._deadline, time.monotonic() + STALL_SECONDS))
                break
            except TimeoutError:
                if time.monotonic() >= self._deadline:
                    return self._result("timeout")
            before, used = used, self.cpu_time()
            if used is not None and used == before:
                self._wake()
        if line is not None:
            return self._finish(line)
        self._raise_failures()
        return self._died()

    def _wake(self) -> None:
        """Raise an interrupt in a host whose vCPU sleeps although interrupts are pending.

        QEMU's emulation of VMRUN and #VMEXIT changes the vCPU's set of pending interrupts without the lock that
        protects it (``target/i386/tcg/sysemu/svm_helper.c``): the interrupt of a timer can get lost. The local APIC
        still has it, and signals it again together with the next one: that of a byte that is never read.
        """
        self._woken += 1
        with suppress(OSError):
            self._lines.send("\n")

    def _finish(self, line: str) -> LabResult:
        _, status, *counts = line.split()
        for name, count in zip((OUT, ERR), counts, strict=True):
            pump = self._pumps.get(name)
            if pump is None:
                continue
            if not count.isdigit():  # unknown: a kernel without debugfs
                pump.wait_for(1 << 62, time.monotonic() + 1)
            elif not pump.wait_for(int(count), self._deadline):
                return self._result("timeout")
        self._raise_failures()
        # A terminal's last output arrives before QEMU closes its end of the port.
        self.stop()
        for pump in self._pumps.values():
            pump.join(END_SECONDS)
        return self._result("exited", int(status))

    def _raise_failures(self) -> None:
        for pump in self._pumps.values():
            if pump.failure is not None:
                raise pump.failure

    def _died(self) -> LabResult:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for pump in self._pumps.values():
            pump.join(END_SECONDS)
        return self._result("panic" if "Kernel panic" in self._console_text() else "silent")

    def _result(self, outcome: LabOutcome, status: int | None = None) -> LabResult:
        lines = crash.excerpt(self._console_text())
        if outcome == "silent":
            lines += [f"QEMU: {line}" for line in self._complaints()]
        seconds = time.monotonic() - self._began
        return LabResult(status, outcome, "\n".join(lines), seconds, self._started, self._woken)

    def _console_text(self) -> str:
        with suppress(FileNotFoundError):
            return self._console.read_bytes().decode("utf-8", "replace").replace("\r", "")
        return ""

    def _complaints(self) -> list[str]:
        """Lines of QEMU's own output, without the usual ones."""
        text = self._errors.read_bytes().decode("utf-8", "replace")
        lines = [line.split(": ", 1)[-1] for line in text.splitlines()]
        return [line for line in lines if line.strip() and not any(noise in line for noise in NOISE)]

    def cpu_time(self) -> float | None:
        """Return the seconds of CPU time that QEMU has used (``/proc/PID/stat``: utime and stime, in ticks of 10 ms).

        ``None`` until the command starts, after QEMU's end, and with KVM, where an idle host uses next to none.
        Synchronization: any thread.
        """
        if not self._started or self._accelerator == "kvm":
            return None
        try:
            stat = Path(f"/proc/{self._process.pid}/stat").read_text()
        except OSError:
            return None
        fields = stat.rpartition(")")[2].split()  # the program's name, in parentheses, may have spaces
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """End QEMU: SIGTERM, and SIGKILL if it does not respond. Idempotent.

        Synchronization: any thread.
        """
        for number in (signal.SIGTERM, signal.SIGKILL):
            if self._process.poll() is None:
                self._process.send_signal(number)
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(END_SECONDS)
