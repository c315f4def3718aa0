"""A small made-up host in a directory: its sysfs tree, and what the kernel does when somebody writes to it."""

from __future__ import annotations

import errno
import os
import shutil
import struct
from pathlib import Path
from typing import ClassVar

from kvmpass.host import Sysfs
from kvmpass.host.sysfs import PCI_DEVICES

BOOT = "11111111-2222-3333-4444-555555555555"


def ivhd(kind: int = 0x10, device_id: int = 0x0002, base: int = 0xFD00_0000) -> bytes:
    """A block of the ACPI table IVRS that describes an IOMMU (AMD IOMMU specification, 5.2.2)."""
    return struct.pack("<BBHHHQHHI", kind, 0, 24, device_id, 0x40, base, 0, 0, 0)


def ivmd(kind: int, first: int, last: int, start: int, size: int, flags: int = 0b111) -> bytes:
    """One that requires direct-mapped memory (the same, 5.2.3); types 20h all, 21h one, 22h a range of devices."""
    return struct.pack("<BBHHH8xQQ", kind, flags, 32, first, last, start, size)


def ivrs(*blocks: bytes, wrong: int = 0) -> bytes:
    """The table (the same, 5.2.1): ACPI's header, IVinfo, reserved bytes, blocks. ``wrong`` damages its checksum."""
    body = struct.pack("<I8x", 0x0020_3043) + b"".join(blocks)

    def table(checksum: int) -> bytes:
        header = ("<4sIBB6s8sIII", b"IVRS", 36 + len(body), 2, checksum, b"KVMPAS", b"MADE UP ", 1, 0, 1)
        return struct.pack(*header) + body

    return table((wrong - sum(table(0))) % 256)


class Host(Sysfs):
    """A tree with the effects of ``driver_override``, ``unbind``, ``bind`` and ``drivers_probe``."""

    made: ClassVar[list[Host]] = []  # in this test, for the fixture that asks all commands about them

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.made.append(self)
        self.writes: list[tuple[str, str]] = []
        self.natural: dict[str, str] = {}  # the driver that takes a device by its ids
        self.refuses: set[str] = set()  # drivers whose probe fails
        self.put("proc/sys/kernel/random/boot_id", BOOT)
        self.process(os.getpid(), "pytest", Path("/proc/self/stat").read_text())
        self.put("proc/cpuinfo", "vendor_id : AuthenticAMD\nflags : fpu svm npt")
        self.put("proc/meminfo", "MemTotal: 8388608 kB\nMemAvailable: 4194304 kB")
        self.put("proc/self/status", "CapEff:\t0000000000000000")
        self.put("sys/kernel/irq/9/chip_name", "IR-IO-APIC")
        self.put("sys/bus/pci/drivers_probe", "")
        self.put("dev/kvm", "")
        self.put("dev/vfio/vfio", "")
        self.put("usr/libexec/virtiofsd", "")
        for directory in (
            "module/kvm_amd",
            "module/vfio_iommu_type1",
            "class/iommu/ivhd0",
            "class/net",
            "class/block",
        ):
            self.path("sys", directory).mkdir(parents=True)
        self.add_driver("vfio-pci")

    # --- building

    def put(self, path: str, content: str | bytes) -> Path:
        file = self.path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else f"{content}\n".encode())
        return file

    def add_driver(self, name: str) -> None:
        for file in ("bind", "unbind"):
            self.put(f"sys/bus/pci/drivers/{name}/{file}", "")

    def add(
        self,
        bdf: str,
        driver: str | None = None,
        group: int | None = None,
        class_code: int = 0x010802,
        *,
        above: str = "",
        config: bytes = b"",
        **files: str,
    ) -> None:
        """A function on the root bus, or below the bridges ``above`` (``bdf/bdf``); ``config`` is that file."""
        real = f"sys/devices/pci0000:00/{above}/{bdf}" if above else f"sys/devices/pci0000:00/{bdf}"
        content = {"vendor": "0x1022", "device": "0x1234", "class": f"{class_code:#08x}", "driver_override": "(null)"}
        content |= {"remove": "", "power_state": "D0", "numa_node": "-1", "reset_method": "flr bus"}
        content |= {"resource": "0x00000000fe000000 0x00000000fe003fff 0x0000000000140204\n0x0 0x0 0x0", **files}
        for name, text in content.items():
            self.put(f"{real}/{name.replace('__', '/')}", text)
        if config:
            self.path(real, "config").write_bytes(config)
        self._symlink(f"sys/bus/pci/devices/{bdf}", real)
        if group is not None:
            base = f"sys/kernel/iommu_groups/{group}"
            self.put(f"{base}/type", "DMA-FQ")
            self.put(
                f"{base}/reserved_regions",
                "0x00000000fee00000 0x00000000feefffff msi\n0x000000fd00000000 0x000000ffffffffff reserved",
            )
            self._symlink(f"{base}/devices/{bdf}", real)
            self._symlink(f"{real}/iommu_group", base)
        if driver is not None:
            self.natural[bdf] = driver
            if not self.path("sys/bus/pci/drivers", driver).exists():
                self.add_driver(driver)
            self._bind(bdf, driver)

    def add_below(self, bdf: str, listing: str, name: str, **files: str) -> None:
        """A block device, a network interface … whose parent is the function."""
        real = f"sys/devices/pci0000:00/{bdf}/sub/{name}"
        self.path(real).mkdir(parents=True)
        for file, text in files.items():
            self.put(f"{real}/{file}", text)
        self._symlink(f"{listing}/{name}", real)

    def process(self, pid: int, name: str, stat: str = "", nodes: tuple[str, ...] = ()) -> None:
        self.put(f"proc/{pid}/comm", name)
        self.put(f"proc/{pid}/stat", stat or f"{pid} ({name}) S " + " ".join(["0"] * 18) + " 777 0")
        for number, node in enumerate(nodes):
            self._symlink(f"proc/{pid}/fd/{number}", node)

    def remove(self, bdf: str) -> None:
        self.path("sys/bus/pci/devices", bdf).unlink()
        shutil.rmtree(self.path("sys/devices/pci0000:00", bdf))

    def _symlink(self, at: str, target: str) -> None:
        link = self.path(at)
        link.parent.mkdir(parents=True, exist_ok=True)
        goal = (
            target if target.startswith("/") else os.path.relpath(self.path(target).resolve(), link.parent.resolve())
        )
        link.symlink_to(goal)

    # --- the kernel

    def write(self, path: Path, text: str, timeout: float | None = None, held: int | None = None) -> None:
        place = str(path.relative_to(self.root))
        self.writes.append((place, text))
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        word = text.strip()
        if path.name == "driver_override":
            path.write_text(f"{word or '(null)'}\n")
        elif path.name in ("unbind", "bind", "drivers_probe") and not self.path(PCI_DEVICES, word).exists():
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(path))
        elif path.name == "unbind":
            if self.link("sys/bus/pci/devices", word, "driver") != path.parent.name:
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV), str(path))
            self.path("sys/bus/pci/devices", word, "driver").unlink()
        elif path.name == "drivers_probe":
            override = self.text("sys/bus/pci/devices", word, "driver_override")
            driver = self.natural.get(word) if override == "(null)" else override
            if driver and self.link("sys/bus/pci/devices", word, "driver") is None:
                self._bind(word, driver)
        elif path.name == "bind":
            self._bind(word, path.parent.name)
        else:
            path.write_text(text)

    def _bind(self, bdf: str, driver: str) -> None:
        if driver in self.refuses or not self.path("sys/bus/pci/drivers", driver).exists():
            return
        self._symlink(f"sys/bus/pci/devices/{bdf}/driver", f"sys/bus/pci/drivers/{driver}")
        group = self.link("sys/bus/pci/devices", bdf, "iommu_group")
        if driver == "vfio-pci":
            self.put(f"dev/vfio/{group}", "")
            control = self.path("sys/bus/pci/devices", bdf, "power/control")
            if control.exists():
                control.write_text("on\n")

    def load_module(self, name: str) -> None:
        self.add_driver(name)

    def state(self, bdf: str) -> tuple[str | None, str | None]:
        """Driver and override."""
        base = ("sys/bus/pci/devices", bdf)
        override = self.text(*base, "driver_override")
        return self.link(*base, "driver"), None if override == "(null)" else override
