"""A pytest plugin for tests that need AMD-V, AMD-Vi and VFIO.

A test marked ``@pytest.mark.amdvi`` requests devices by role, as fixtures whose values are PCI addresses::

    @pytest.mark.amdvi(timeout=60)
    def test_identify(nvme: str) -> None:
        assert nvme.startswith("0000:")

By default such tests run inside the lab (:mod:`kvmpass.lab`), an emulated AMD-Vi host that is booted once for each
profile, and their reports are part of the one report outside. With ``KVMPASS_TEST_<ROLE>=BDF`` in the environment
(``KVMPASS_TEST_NVME``, ``KVMPASS_TEST_NIC`` …) they run in place, on real hardware. Tests for roles that have no
device are skipped then, and so are tests marked ``destructive`` unless ``KVMPASS_TEST_DESTRUCTIVE=1`` is set.

Arguments of the marker, all optional: ``profile`` (which host), ``timeout`` (seconds for each phase), ``duration``
(expected seconds for all phases; decides which hosts start first), ``kernel`` (``"full"``: needs iommufd;
``"next"``: needs Linux 7.3; ``"stock"``: needs the distribution's kernel), ``qemu`` (``"system"``, ``"modern"``).
Markers of module and class are merged, the closest takes precedence. A test whose kernel or QEMU is not the run's own
(``--lab-kernel``, ``--lab-qemu``) gets a host of its own, in the same run. It is skipped if that kernel or QEMU has
not been prepared (``kvmpass lab kernel``, ``kvmpass lab qemu``).

The environment inside is small; the setting ``kvmpass_environment`` of a project's pytest configuration names
variables that are passed to it.

Modules: :mod:`.profiles` defines the hosts, :mod:`.roles` finds devices, :mod:`.fixtures` has the fixtures,
:mod:`.pool` guests that tests share, :mod:`.inplace` runs marked tests in this process, :mod:`.inner` reports from
inside the lab, :mod:`.events` is the protocol, :mod:`.artifacts` copies files out, :mod:`.session` is one host,
:mod:`.hosts` are several in parallel (:mod:`.capacity`: how many), :mod:`.outer` reports their tests, :mod:`.plugin`
is the entry point.
"""

from __future__ import annotations

from kvmpass.testing.profiles import DEFAULT_PROFILES, Profile, Requirement
from kvmpass.testing.roles import ROLES, discover

__all__ = ["DEFAULT_PROFILES", "ROLES", "Profile", "Requirement", "discover"]
