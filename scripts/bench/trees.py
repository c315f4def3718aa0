"""``kvmpass list`` on made-up hosts of several sizes: needs no AMD host, and runs where ``make bench`` does."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from samples import CLICK, KVMPASS, Bench, Job, spent

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from support.host_tree import Host

SIZES = (8, 331, 2048)


def make(folder: Path, functions: int) -> Path:
    """Make a host with this many functions, each alone in its IOMMU group; return its directory."""
    tree = Host(folder)
    for number in range(functions):
        bus, slot = divmod(number, 256)
        bdf = f"0000:{bus:02x}:{slot >> 3:02x}.{slot & 7}"
        driver, kind = ("nvme", None, "vfio-pci")[number % 3], (0x010802, 0x020000)[number % 2]
        names = "bc{:02X}sc{:02X}i{:02X}".format(*kind.to_bytes(3, "big"))
        modalias = f"pci:v00001022d00001234sv00001022sd00000000{names}"
        tree.add(bdf, driver=driver, group=number, class_code=kind, modalias=modalias, revision="0x00")
    return folder


@contextmanager
def trees(bench: Bench) -> Iterator[list[Job]]:
    """Measure the CPU time of ``kvmpass list`` on each."""
    note, jobs = bench.samples.note, list[Job]()
    with ExitStack() as stack:
        for functions in SIZES:
            place = make(Path(stack.enter_context(tempfile.TemporaryDirectory())), functions)
            row = f"list of {functions} functions, CPU ms"
            words = [*KVMPASS, "list", "--sysfs", str(place)]
            peer = ["lspci", "-A", "linux-sysfs", "-O", f"sysfs.path={place}/sys/bus/pci", "-Dnnk"]
            jobs += [
                lambda row=row, words=words: note(row, "kvmpass", spent(words)),  # type: ignore[misc]
                lambda row=row, words=peer: note(row, "lspci -k", spent(words)),  # type: ignore[misc]
                lambda row=row: note(row, "import click", spent(CLICK)),  # type: ignore[misc]
            ]
        yield jobs
