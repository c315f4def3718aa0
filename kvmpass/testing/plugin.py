"""The plugin's entry point: options, markers, and the choice between lab and hardware."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from kvmpass.testing import capacity
from kvmpass.testing import fixtures as _fixtures
from kvmpass.testing.inner import Inner
from kvmpass.testing.inplace import STRICT_SKIPS, InPlace, TimeLimit
from kvmpass.testing.pool import GUEST_MARKER, GuestPlugin
from kvmpass.testing.profiles import MARKER, Hooks, LabLike
from kvmpass.testing.session import ENVIRONMENT, SPARES
from kvmpass.testing.state import Mode, State, detect

if TYPE_CHECKING:
    from kvmpass.lab.config import LabConfig

JOBS = "kvmpass_lab_jobs"
KERNEL_VARIABLE = "KVMPASS_LAB_KERNEL"


def pytest_addhooks(pluginmanager: pytest.PytestPluginManager) -> None:
    """Register ``Hooks``."""
    pluginmanager.add_hookspecs(Hooks)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, and the settings of a project's configuration."""
    group = parser.getgroup("kvmpass", "kvmpass: tests that need AMD-V, AMD-Vi and VFIO")
    group.addoption(
        "--lab-kernel",
        metavar="stock|full|next|PATH",
        help="kernel of the emulated host (default: full if KVMPASS_LAB_KERNEL is set, else stock)",
    )
    group.addoption(
        "--lab-qemu",
        metavar="system|modern|PATH",
        help="QEMU that emulates the host (default: modern with --lab-kernel=next, else system)",
    )
    group.addoption(
        "--lab-jobs",
        metavar="N",
        help=f"how many emulated hosts run in parallel (default: {JOBS}, else one for each CPU, as memory allows)",
    )
    parser.addini(JOBS, "how many emulated hosts run in parallel: a number, or auto", default="auto")
    parser.addini(ENVIRONMENT, "environment variables that are passed to tests in the emulated host", type="args")
    parser.addini(STRICT_SKIPS, "whether a skip inside an emulated host is a failure", type="bool", default=False)
    parser.addini(
        SPARES, "how often an emulated host that dies is replaced, for each boot; with a warning", default="0"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and the plugins for the mode that the environment selects."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(profile, timeout, duration, kernel, qemu): needs AMD-V, AMD-Vi and VFIO; "
        "runs in the lab or on hardware",
    )
    config.addinivalue_line(
        "markers", "destructive: destroys data on a device; on hardware only if KVMPASS_TEST_DESTRUCTIVE=1"
    )
    config.addinivalue_line(
        "markers",
        f"{GUEST_MARKER}(devices, reuse, may_die, ...): the guest that the fixture kvmpass_guest returns; "
        "further arguments are those of kvmpass.start",
    )
    config.pluginmanager.register(GuestPlugin(), "kvmpass-guests")
    state = detect(config)
    state.store(config)
    config.pluginmanager.register(_fixtures, "kvmpass-fixtures")
    if state.mode is Mode.OUTER:
        from kvmpass.testing.outer import Outer

        kernel = config.option.lab_kernel or ("full" if os.environ.get(KERNEL_VARIABLE) else "stock")
        qemu = config.option.lab_qemu or ("modern" if kernel == "next" else "system")
        if (kernel, qemu) == ("next", "system"):
            raise pytest.UsageError("--lab-kernel=next needs the modern QEMU: leave out --lab-qemu")
        config.pluginmanager.register(Outer(config, kernel, qemu, jobs(config)), "kvmpass-outer")
        return
    config.pluginmanager.register(InPlace(config), "kvmpass-inplace")
    config.pluginmanager.register(TimeLimit(), "kvmpass-time-limit")
    if state.plan is not None:
        config.pluginmanager.register(Inner(config, state.plan), "kvmpass-inner")


def jobs(config: pytest.Config) -> int:
    """Return how many emulated hosts may run in parallel. Raises ``UsageError`` for an invalid number."""
    asked = config.option.lab_jobs or config.getini(JOBS)
    if asked == "auto":
        return capacity.cpus()
    if not asked.isdecimal() or int(asked) == 0:
        raise pytest.UsageError(f"--lab-jobs, {JOBS}: must be a number from 1 on, or auto, not {asked!r}")
    return int(asked)


def pytest_report_header(config: pytest.Config) -> str:
    """Return a line about the host under test."""
    state = State.of(config)
    if state.mode is Mode.OUTER:
        outer = config.pluginmanager.get_plugin("kvmpass-outer")
        assert outer is not None
        several = f", up to {outer.jobs} at once" if outer.jobs > 1 else ""
        return f"kvmpass: emulated AMD-Vi host, {outer.kernel} kernel, {outer.qemu} QEMU{several}"
    devices = ", ".join(f"{role}={bdf}" for role, bdf in state.roles.items())
    if state.mode is Mode.LAB:
        return f"kvmpass: inside an emulated AMD-Vi host, kernel {os.uname().release}, {devices or 'no devices'}"
    return f"kvmpass: real AMD-Vi, kernel {os.uname().release}, {devices}"


@pytest.hookimpl(trylast=True)
def pytest_kvmpass_lab(lab: LabConfig) -> LabLike | None:
    """Return the real lab, unless another plugin has returned one."""
    from kvmpass.lab import Lab

    return Lab(lab)
