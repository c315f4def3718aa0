"""A guest of kvmpass beside one of QEMU and the host's own drivers: boot, registers, data, interrupts, output.

All three run the same script of phases. Before and after each it prints a line, and waits while KVM's counters are
read; times are those of the guest's own clock. ``nothing`` is a phase that has only the two lines.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from attach import until
from counters import Counters
from network import DOWN, DOWN_MIB, GUEST_ADDRESS, HOST_ADDRESS, SECONDS, UP, UP_MIB, has_network, network, wait_for
from qemu import Qemu, boot_words, port_words
from samples import KVMPASS, Bench, Job, populate, resident_mib, running

from kvmpass import host
from kvmpass.guest import GuestSpec, prepare
from kvmpass.layout import MIB

MEMORY = 256
CONFIG_READS, DRIVE_MIB, DIRECT_READS, INTERRUPTS, OUTPUT_MIB = 5, 64, 500, 500, 16
LINES, WIDTH = 20, 200
"""How much of a guest that hangs is recorded: last lines, and characters of each."""
LAST = "output"
"""The phase that begins when all others have ended."""
ROWS: Mapping[str, str] = {
    "config": "configuration space of the device, reads in the guest, s",
    "drive": f"drive, {DRIVE_MIB} MiB in sequence, s",
    "direct": f"drive, {DIRECT_READS} reads of 4 KiB one by one, s",
    "up": f"network, {UP_MIB} MiB from the guest, s",
    "down": f"network, {DOWN_MIB} MiB to the guest, s",
    "interrupts": f"{INTERRUPTS} interrupts of edu, from device to handler, s",
    "output": f"output of a command, {OUTPUT_MIB} MiB, s",
}
MICROVM = ("-machine", "microvm,pcie=on,acpi=on,isa-serial=off,rtc=on,pic=off,pit=off")
"""The least of QEMU's machines that has PCI Express, without chips that the guest can do without.

Without a clock (``rtc``) the guest takes three times as long.
"""
BOOT = "boot of the guest, until its first process, s"
ON_THE_HOST = ("drive", "direct", "up", "down")
"""Phases that the host's own drivers take part in."""

PHASE = """
exec 3>&1 4>&2
clock() { read -r up rest </proc/uptime; echo "$up"; }
phase() {
    name=$1; shift
    echo "begin $name"; sleep 0.2
    start=$(clock); "$@" >/dev/null 2>&1 || { echo "failed $name"; return; }
    echo "end $name $start $(clock)"; sleep 0.1
}
"""
APPLETS = "".join(f'{name}() {{ busybox {name} "$@"; }}\n' for name in ("dd", "nc", "ping"))
"""For the host's shell: the guest's programs."""
DRIVE = f"""
sequence() {{ dd if=$drive of=/dev/null bs=1M count={DRIVE_MIB}; }}
one_by_one() {{ dd if=$drive of=/dev/null bs=4k count={DIRECT_READS} iflag=direct; }}
phase drive sequence
phase direct one_by_one
"""
NETWORK = f"""
net=$(ls $card/net)
ip addr add {GUEST_ADDRESS}/24 dev $net; ip link set $net up
for try in $(seq 60); do ping -q -c 1 -W 1 {HOST_ADDRESS} >/dev/null && break; done
echo "pings until an answer: $try"
send() {{ dd if=/dev/zero bs=64k count={UP_MIB * 16} | nc {HOST_ADDRESS} {UP}; }}
receive() {{ nc {HOST_ADDRESS} {DOWN} </dev/null >/dev/null; }}
phase up send
phase down receive
"""
IN_A_GUEST = f"""
configuration() {{
    for i in {" ".join(map(str, range(CONFIG_READS)))}; do cat /sys/class/nvme/nvme0/device/config; done
}}
phase nothing true
phase config configuration
"""
EDU = f"""
echo 1 >/sys/module/vfio/parameters/enable_unsafe_noiommu_mode
name=${{edu##*/}}
echo vfio-pci >$edu/driver_override; echo $name >/sys/bus/pci/drivers_probe
group=$(readlink $edu/iommu_group)
phase interrupts /edu /dev/vfio/noiommu-${{group##*/}} $name msi {INTERRUPTS}
"""
FIND = """
for directory in /sys/bus/pci/devices/*; do
    read -r vendor <$directory/vendor; read -r model <$directory/device
    [ $vendor:$model = {identity} ] && {variable}=$(readlink -f $directory)
done
"""


def find(variable: str, bdf: str) -> str:
    """Return the words of a shell that put the directory of a device into a variable."""
    device = host.Sysfs().device(host.Bdf.parse(bdf))
    return FIND.format(identity=f"0x{device.vendor:04x}:0x{device.device:04x}", variable=variable)


def script(bench: Bench, output: str) -> str:
    """Return what a guest does; ``output`` is where the bytes of the phase of this name go."""
    text = PHASE + IN_A_GUEST + "drive=/dev/nvme0n1\n" + DRIVE
    if has_network(bench):
        text += find("card", bench.devices["nic"]) + NETWORK
    if has_edu(bench):
        text += find("edu", bench.devices["edu"]) + EDU
    return text + f"bulk() {{ dd if=/dev/zero bs=64k count={OUTPUT_MIB * 16} >{output}; }}\nphase output bulk\n"


def has_edu(bench: Bench) -> bool:
    """Whether there is QEMU's edu device, and its program was compiled."""
    return "edu" in bench.devices and (bench.programs / "edu").exists()


def assigned(bench: Bench) -> list[str]:
    """Return the devices of the guest."""
    names = ["nvme", *(["nic"] if has_network(bench) else []), *(["edu"] if has_edu(bench) else [])]
    return [bench.devices[name] for name in names]


def copies(bench: Bench) -> tuple[str, ...]:
    """Return what is copied into the guest."""
    return (f"{bench.programs / 'edu'}:/edu",) if has_edu(bench) else ()


# --- the host's side


def reuse_memory(bench: Bench) -> None:
    """Populate once what the guests before have had.

    An emulator drops what it has translated of a guest's code when its memory is overwritten: 1.8 s with 256 MiB, for
    whichever program gets that memory next. What VFIO pins for QEMU comes from the kernel's unmovable pages, which
    only a program that leaves populating to VFIO gets again (``PF_MEMALLOC_PIN``, include/linux/sched/mm.h).
    """
    populate(2 * MEMORY * MIB)
    with Qemu("-m", f"{MEMORY}M", "-S", "-device", f"vfio-pci,host={bench.devices['nvme']}") as peer:
        peer.command("quit")


@contextmanager
def explained(said: Iterable[str], console: Path | None = None) -> Iterator[None]:
    """Add to an error what a script has said last, and the last lines of its guest's console."""
    try:
        yield
    except Exception as error:
        error.add_note("\n".join(["said last:", *said]))
        if console is not None and console.exists():
            lines = console.read_text(errors="replace").splitlines()[-LINES:]
            error.add_note("\n".join(["on the console last:", *(line[:WIDTH] for line in lines)]))
        raise


def follow(
    bench: Bench,
    program: str,
    stream: IO[bytes],
    said: deque[str],
    counters: Counters | None = None,
    pid: int | None = None,
) -> None:
    """Read what the script prints; record each phase, with KVM's counts during it. Other output is dropped.

    ``said`` gets the lines. ``pid``: of the program whose resident size is recorded when the last phase begins.
    """
    before: dict[str, int] = {}
    for line in stream:
        text = line.strip(b"\0\n\r").decode(errors="replace")
        said.append(text[:WIDTH])
        word, _, rest = text.partition(" ")
        if word == "begin" and rest == LAST and pid is not None:
            row = f"resident beyond {MEMORY} MiB of the guest, MiB"
            bench.samples.note(row, program, resident_mib(pid) - MEMORY)
        if word == "begin" and counters is not None:
            before = counters.read()
        elif word == "end":
            after = counters.read() if counters is not None else {}
            name, start, end = rest.split()
            found = {what: count - before[what] for what, count in after.items()}
            record(bench, program, name, float(end) - float(start), found)
        elif word == "failed":
            bench.samples.lack(f"{ROWS[rest]} / {program}", "the command failed in the guest")


def record(bench: Bench, program: str, name: str, seconds: float, found: Mapping[str, int]) -> None:
    """Record a phase."""
    if found:
        bench.samples.counts.setdefault("phases", {}).setdefault(name, {})[program] = found
    if name in ROWS:
        bench.samples.note(ROWS[name], program, seconds)
    if name == "config" and (exits := found.get("exits to user space")):
        bench.samples.note("configuration space, each exit, us", program, seconds / exits * 1e6)
    if name == "output" and found:
        bench.samples.note("exits for each MiB of output", program, found["exits to user space"] / OUTPUT_MIB)


def guest_of_kvmpass(bench: Bench, counters: Counters) -> None:
    """Boot a guest with ``kvmpass assign``, which runs the script."""
    reuse_memory(bench)
    said = deque[str](maxlen=LINES)
    with tempfile.TemporaryDirectory() as folder, explained(said, Path(folder, "console")):
        status = Path(folder, "status")
        words = ["assign", "--memory", f"{MEMORY}M", "--backend", "type1", "--status-file", str(status), "--timings"]
        words += ["--timeout", str(SECONDS), "--console-log", f"{folder}/console"]
        for copy in copies(bench):
            words += ["--copy", copy]
        words = [*KVMPASS, *words, *assigned(bench), "--", "sh", "-c", script(bench, "&4")]
        # stderr has the bytes of the last phase, as QEMU's port
        with running(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as child:
            assert child.stdout is not None
            follow(bench, "kvmpass", child.stdout, said, counters, child.pid)
        outcome: dict[str, Any] = json.loads(status.read_text())
        if child.returncode:
            raise RuntimeError(f"kvmpass assign: status {child.returncode}: {outcome['outcome']}, {outcome['error']}")
        timings = outcome["timings"]
    bench.samples.note("first process of the guest, s", "kvmpass", until(timings, "guest's boot"))
    [boot] = [stage["seconds"] for stage in timings["stages"] if stage["name"] == "guest's boot"]
    bench.samples.note(BOOT, "kvmpass", boot)
    bench.samples.count("a guest with a drive", timings)


def guest_of_qemu(
    bench: Bench, counters: Counters, program: str = "QEMU", command: Sequence[str] = (), machine: Sequence[str] = ()
) -> None:
    """Boot the same kernel and files in QEMU; its serial ports carry the lines, a virtio port the output in bulk.

    ``command``: instead of the script; ``machine``: words for another machine than q35.
    """
    modaliases = [host.Sysfs().device(host.Bdf.parse(bdf)).modalias for bdf in assigned(bench)]
    words = tuple(command) or ("sh", "-c", script(bench, "/dev/vport0p1"))
    spec = GuestSpec(command=words, copy=copies(bench))
    image = prepare(spec, modaliases).on_serial_ports()
    reuse_memory(bench)
    said = deque[str](maxlen=LINES)
    with tempfile.TemporaryDirectory() as name, explained(said, Path(name, "serial0")):
        folder = Path(name)
        given = [*machine, *boot_words(folder, image, MEMORY)]
        for bdf in assigned(bench):  # on hardware its firmware would run option ROMs
            given += ["-device", f"vfio-pci,host={bdf},rombar=0"]
        given += port_words("file", Path("/dev/null"))
        stages = Stages()
        with Qemu(*given) as peer, (folder / "serial1.out").open("rb") as stream:
            stages.end("start to attached devices", peer.attach_seconds)
            reader = threading.Thread(
                target=follow, args=(bench, program, stream, said, counters, peer.child.pid), daemon=True
            )
            reader.start()
            try:
                started = time.monotonic()
                peer.command("cont")
                control = folder / "serial3"
                ready = peer.wait_for(lambda: b"ready" in control.read_bytes())
                stages.end("guest's boot", ready - started)
                ended = peer.wait_for(lambda: b"exit" in control.read_bytes())
                stages.end("command", ended - ready)
                peer.child.wait()
                stages.end("power off", time.monotonic() - ended)
            finally:
                peer.child.kill()  # ends what is read
                reader.join(10)
        bench.samples.note("first process of the guest, s", program, peer.attach_seconds + ready - started)
        bench.samples.note(BOOT, program, ready - started)
    if not command:
        bench.samples.count("a guest of QEMU with a drive", stages.document())


class Stages:
    """The stages of a run of QEMU, in the shape of ``Timings``."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []

    def end(self, name: str, seconds: float) -> None:
        """Add a stage."""
        self.stages.append({"name": name, "seconds": seconds})

    def document(self) -> dict[str, Any]:
        """Return the stages and their sum."""
        return {"seconds": sum(stage["seconds"] for stage in self.stages), "stages": self.stages}


# --- the host's own drivers


def host_alone(bench: Bench) -> None:
    """Run the phases of data on the host, with its own drivers; the card is in a network namespace."""
    devices = [bench.devices["nvme"], *([bench.devices["nic"]] if has_network(bench) else [])]
    host.unbind(devices)
    try:
        controller = Path("/sys/bus/pci/devices", bench.devices["nvme"], "nvme")
        wait_for(lambda: any(controller.glob("nvme*/nvme*n1")))
        [name] = [path.name for path in controller.glob("nvme*/nvme*n1")]
        drive = Path("/dev", re.sub(r"c\d+n", "n", name))  # a path of a namespace that may have several
        wait_for(drive.exists)
        text = PHASE + APPLETS + f"drive={drive}\n" + DRIVE
        if has_network(bench):
            card = f"/sys/bus/pci/devices/{bench.devices['nic']}"
            wait_for(lambda: any(Path(card, "net").iterdir()))
            [interface] = [path.name for path in Path(card, "net").iterdir()]
            # sysfs shows the interfaces of the namespace that it was mounted in.
            text += NETWORK.replace("net=$(ls $card/net)", f"net={interface}")
        words = ["unshare", "--net", "busybox", "sh", "-c", f"read go\n{text}"]
        said = deque[str](maxlen=LINES)
        with explained(said), running(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
            assert child.stdin is not None and child.stdout is not None
            if has_network(bench):
                wait_for(lambda: namespace(child.pid) != namespace("self"))
                subprocess.run(["ip", "link", "set", interface, "netns", str(child.pid)], check=True)
            child.stdin.write(b"go\n")
            child.stdin.close()
            follow(bench, "host", child.stdout, said)
    finally:
        if has_network(bench):  # the interface returns when the namespace has ended
            wait_for(lambda: any(Path(f"/sys/bus/pci/devices/{bench.devices['nic']}/net").glob("*")))
        host.bind(devices)


def namespace(process: int | str) -> Path:
    """Return the network namespace of a process."""
    return Path(f"/proc/{process}/ns/net").readlink()


@contextmanager
def guests(bench: Bench) -> Iterator[list[Job]]:
    """Measure a guest from its start to its end."""
    if not has_edu(bench):
        bench.samples.lack("interrupts of edu", "needs QEMU's edu device, and gcc")
    with network(bench), Counters() as counters:
        yield [
            lambda: guest_of_kvmpass(bench, counters),
            lambda: guest_of_qemu(bench, counters),
            lambda: guest_of_qemu(bench, counters, "QEMU microvm", ["true"], MICROVM),
            lambda: host_alone(bench),
        ]
