"""A pytest plugin for tests that need AMD-V, AMD-Vi and VFIO.

A test marked ``@pytest.mark.amdvi`` asks for its devices by role, as fixtures that are PCI addresses::

    @pytest.mark.amdvi(timeout=60)
    def test_identify(nvme: str) -> None:
        assert nvme.startswith("0000:")

Without further settings such tests run inside the lab (:mod:`kvmpass.lab`), an emulated AMD-Vi host that is
booted once for each profile, and their reports become part of the one report outside. With
``KVMPASS_TEST_<ROLE>=BDF`` in the environment (``KVMPASS_TEST_NVME``, ``KVMPASS_TEST_NIC`` …) they run in place, on
real hardware; tests for roles that have no device are skipped, and so are tests marked ``destructive`` unless
``KVMPASS_TEST_DESTRUCTIVE=1``.

Arguments of the marker, each of them optional: ``profile`` (which lab), ``timeout`` (seconds for each phase),
``duration`` (expected seconds for all phases: which hosts start first),
``kernel`` (``"full"``: needs iommufd; ``"stock"``: needs the distribution's kernel), ``qemu`` (``"system"``,
``"modern"``). Markers of module and class are merged, the closest wins. A test whose kernel or QEMU is another than
the run's own (``--lab-kernel``, ``--lab-qemu``) gets a host of its own, in the same run; it is skipped where that
kernel or QEMU has not been made ready (``kvmpass lab kernel``, ``kvmpass lab qemu``).

The environment inside is a small one; the setting ``kvmpass_environment`` of a project's pytest configuration names
variables that go in as well.

The modules: :mod:`.profiles` says what labs there are, :mod:`.roles` finds devices, :mod:`.fixtures` are the
fixtures, :mod:`.inplace` runs marked tests here, :mod:`.inner` reports from inside the lab, :mod:`.events` is the
wire between, :mod:`.returning` brings files out, :mod:`.session` is one lab that runs, :mod:`.hosts` are several side
by side (:mod:`.capacity`: how many), :mod:`.outer` replays, :mod:`.plugin` puts them together.
"""

from __future__ import annotations

from kvmpass.testing.profiles import DEFAULT_PROFILES, Profile, Requirement
from kvmpass.testing.roles import ROLES, discover

__all__ = ["DEFAULT_PROFILES", "ROLES", "Profile", "Requirement", "discover"]
