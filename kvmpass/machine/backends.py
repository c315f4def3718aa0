"""The back ends that a machine's DMA domain can have, by their names (``kvmpass.host.backend``)."""

from __future__ import annotations

from collections.abc import Sequence

from kvmpass import dma
from kvmpass.dma import Domain
from kvmpass.errors import HostNotReady
from kvmpass.host import Bdf, Sysfs
from kvmpass.host.backend import IOMMUFD, BackendChoice, choose_backend


def use_backend(domain: Domain, sysfs: Sysfs, bdfs: Sequence[Bdf], wanted: str, *, vf_token: bool) -> BackendChoice:
    """Set the back end of ``domain``, before its first devices are attached. Return which one it is, and why.

    Raises ``HostNotReady`` where the requested one is unavailable.
    """
    choice = choose_backend(sysfs, bdfs, wanted, vf_token=vf_token, p2p=domain.p2p)
    if choice.obstacle:
        raise HostNotReady(f"iommufd is unavailable: {choice.obstacle}", "use the back end type1, or auto")
    domain.use(dma.IommufdBackend if choice.name == IOMMUFD else dma.Type1)
    return choice
