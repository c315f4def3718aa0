"""A DMA domain over a made-up kernel: two groups, one with two devices, one with one."""

from __future__ import annotations

from typing import Any

from kvmpass.dma import BackendFactory, Domain, IommufdBackend, Type1
from kvmpass.layout import GIB, MIB, Range, Reserved
from kvmpass.memory import GuestMemory
from support.fake_vfio import FakeKvmVfio, FakeVfio
from support.recording import Calls, recording

NIC, SOUND, DISK = "0000:01:00.0", "0000:01:00.1", "0000:02:00.0"
MEMBERS: dict[int, tuple[str, ...]] = {1: (NIC, SOUND), 2: (DISK,)}
MSI = Reserved(Range(0xFEE0_0000, MIB), "msi")


class Stage:
    """RAM and ROM, and a domain for them."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.backend: BackendFactory = Type1 if isinstance(kernel, FakeVfio) else IommufdBackend
        self.calls: Calls = []
        self.kvm = FakeKvmVfio(self.kernel, "vm")
        self.memory = GuestMemory()
        self.rom = self.memory.add_rom(GIB, b"rom", "rom")
        self.ram = self.memory.add_ram(0, MIB, "ram")
        self.domain = Domain(self.memory, recording(self.calls, self.backend), self.kvm, [MSI])

    def check(self) -> None:
        """What the kernel has is what the domain says, and what the memory wants."""
        self.domain.audit()
        ledger = {Range(m.iova, m.size): (m.hva, m.writable) for m in self.domain.ledger}
        assert ledger == self.kernel.mappings
        assert self.kvm.files == self.kernel.files
        assert self.domain.active == bool(self.kernel.files)
        if isinstance(self.kernel, FakeVfio):
            assert self.domain.active == bool(self.kernel.containers)
            assert sorted(self.kernel.groups) == sorted(self.domain.backend._groups)
        else:
            assert self.domain.active == bool(self.kernel.contexts)

    @property
    def registered(self) -> set[str | None]:
        """Which VM has the files that are open."""
        return {self.kernel.file(fd).kvm for fd in self.kernel.files}

    def close(self) -> None:
        """Nothing may be left anywhere."""
        self.kernel.fail(0)
        self.domain.close()
        assert (self.kernel.state(), self.kvm.files) == (({}, []), set())
        self.memory.close()
