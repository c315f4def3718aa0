"""Preconditions of assignment, from firmware to file permissions: one catalogue of checks.

``kvmpass doctor`` shows all of them; :func:`check_host`, :func:`check_memory` and :func:`check_limits` raise for
those that fail.

The public names, each imported when it is first used: an assignment does not load the whole catalogue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmpass._lazy import lazy_names

if TYPE_CHECKING:
    from kvmpass.host.check import Check as Check
    from kvmpass.host.check import Finding as Finding
    from kvmpass.host.check import Outcome as Outcome
    from kvmpass.host.check import Reading as Reading
    from kvmpass.host.doctor.catalogue import CATALOGUE as CATALOGUE
    from kvmpass.host.doctor.catalogue import diagnose as diagnose
    from kvmpass.host.doctor.catalogue import diagnose_device as diagnose_device
    from kvmpass.host.doctor.resources import check_limits as check_limits
    from kvmpass.host.doctor.resources import check_memory as check_memory
    from kvmpass.host.doctor.resources import diagnose_huge_pages as diagnose_huge_pages
    from kvmpass.host.doctor.vital import check_host as check_host
    from kvmpass.host.doctor.vital import host_blocker as host_blocker

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "kvmpass.host.check": ("Check", "Finding", "Outcome", "Reading"),
        "kvmpass.host.doctor.catalogue": ("CATALOGUE", "diagnose", "diagnose_device"),
        "kvmpass.host.doctor.resources": ("check_limits", "check_memory", "diagnose_huge_pages"),
        "kvmpass.host.doctor.vital": ("check_host", "host_blocker"),
    },
)
