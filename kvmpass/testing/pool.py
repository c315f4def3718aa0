"""The marker ``guest`` and the fixture ``kvmpass_guest``: guests that several tests use, one after the other."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Collection, Generator, Iterator, Mapping
from dataclasses import field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from kvmpass._dataclass import dataclass, replace
from kvmpass.errors import GuestDied, NotEnoughMemory
from kvmpass.testing.fixtures import device
from kvmpass.testing.profiles import MARKER
from kvmpass.testing.state import State

if TYPE_CHECKING:
    from kvmpass.session import Session

GUEST_MARKER = "guest"
_REUSE = ("session", "module", "test")
_CONSOLE = "the guest's console"
_KEPT = 1 << 20  # bytes of a guest's console
_ANSWER_SECONDS = 10.0  # that a guest has to answer after a test; one that runs takes milliseconds
_SILENT = "it does not answer"


@dataclass(frozen=True, slots=True)
class Wish:
    """The guest that a test wants: the arguments of its marker."""

    devices: tuple[str, ...] = ()
    """Roles of its devices; one with a question mark at its end is left out where the host has no such device."""
    reuse: str = "session"
    """For which tests: those of the session, of the module, or this one alone."""
    may_die: bool = False
    """Whether the test may end its guest."""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Further arguments of ``kvmpass.start``."""

    @classmethod
    def of(cls, item: pytest.Item) -> Wish | None:
        """Return the wish of a marked test, ``None`` for any other. Raises ``UsageError``."""
        mark = item.get_closest_marker(GUEST_MARKER)
        if mark is None:
            return None
        if mark.args:
            raise pytest.UsageError(f"{item.nodeid}: the marker {GUEST_MARKER} takes keyword arguments only")
        options = dict(mark.kwargs)
        own = {name: options.pop(name) for name in ("devices", "reuse", "may_die") if name in options}
        wish = replace(cls(), **own, options=MappingProxyType(options))
        if wish.reuse not in _REUSE:
            raise pytest.UsageError(f"{item.nodeid}: reuse must be one of {', '.join(_REUSE)}, not {wish.reuse!r}")
        if isinstance(wish.devices, str):
            raise pytest.UsageError(f"{item.nodeid}: devices must be a tuple of roles, not {wish.devices!r}")
        return wish

    def addresses(self, config: pytest.Config) -> tuple[str, ...]:
        """Return the PCI addresses of its devices. Skips or fails the test if a device is missing."""
        there = State.of(config).roles
        wanted = (role for role in self.devices if not role.endswith("?") or role[:-1] in there)
        return tuple(device(config, role.removesuffix("?")) for role in wanted)

    def key(self, item: pytest.Item) -> tuple[object, ...]:
        """Return what tests that share a guest have in common."""
        scope = {"session": "", "module": module_of(item), "test": item.nodeid}[self.reuse]
        return scope, tuple(self.devices), tuple(sorted((name, repr(value)) for name, value in self.options.items()))


def module_of(item: pytest.Item) -> str:
    """Return the part of a test's node ID that names its module."""
    return item.nodeid.partition("::")[0]


class Recording:
    """The end of what a guest's console has printed.

    Synchronization: called by one thread, read by another: it replaces what it keeps at once.
    """

    def __init__(self) -> None:
        self._kept = b""
        self.size = 0
        """Bytes that were printed so far."""

    def __call__(self, data: bytes) -> None:
        """Take what is printed."""
        self._kept = (self._kept + data)[-_KEPT:]
        self.size += len(data)

    def since(self, size: int) -> str:
        """Return what was printed after the first ``size`` bytes, as far as it is kept."""
        new = self.size - size
        return self._kept[-new:].decode(errors="replace").replace("\r", "") if new > 0 else ""


class Pooled:
    """A guest of the pool."""

    def __init__(self, session: Session, console: Recording, boot_seconds: float) -> None:
        self.session = session
        """The guest."""
        self.console = console
        """Its console."""
        self.boot_seconds = boot_seconds
        """How long it took to boot."""
        self.uses = 0
        """Tests that have used it."""

    def lost(self, slowdown: float = 1.0) -> str | None:
        """Return why no further test can use it: it has ended, or hangs. None: it runs.

        The guest is asked, and has 10 seconds to answer, times ``slowdown``.
        """
        if self.session.ended is not None:
            return self.session.ended
        if not self.session.answering:
            return _SILENT
        try:
            self.session.ping(_ANSWER_SECONDS * slowdown)  # "answering" is known only after half a minute of silence
        except TimeoutError:
            return _SILENT
        except GuestDied as error:
            return error.reason
        return None


class Pool:
    """Guests by what their tests have in common. A device is in one of them at a time."""

    def __init__(self, start: Callable[..., Session]) -> None:
        self._start = start
        self._guests: dict[tuple[object, ...], tuple[tuple[str, ...], Pooled]] = {}

    def get(
        self, key: tuple[object, ...], devices: tuple[str, ...], options: Mapping[str, Any], slowdown: float = 1.0
    ) -> Pooled:
        """Return the guest for ``key`` if it runs, else a new one: guests that have its devices are stopped first.

        ``slowdown``: that of ``Pooled.lost``.
        """
        known = self._guests.get(key)
        if known is not None:
            reason = known[1].lost(slowdown)
            if reason is None:
                return known[1]
            self.drop(key)  # first: a warning that is an error must not leave it there for every later test
            warnings.warn(pytest.PytestWarning(f"the guest was lost after the tests before: {reason}"), stacklevel=2)
        self.release(devices)
        try:
            pooled = self._boot(devices, options)
        except NotEnoughMemory:
            if not self._guests:
                raise
            self.close()  # of tests that are over, perhaps
            pooled = self._boot(devices, options)
        self._guests[key] = devices, pooled
        return pooled

    def _boot(self, devices: tuple[str, ...], options: Mapping[str, Any]) -> Pooled:
        console, started = Recording(), time.monotonic()
        session = self._start(devices, on_console=console, **options)
        return Pooled(session, console, time.monotonic() - started)

    def release(self, devices: Collection[str], kept: tuple[object, ...] | None = None) -> None:
        """Stop the guests that have one of these devices, but for the one for ``kept``."""
        for key, (taken, _) in list(self._guests.items()):
            if key != kept and not set(devices).isdisjoint(taken):
                self.drop(key)

    def end(self, scope: str) -> None:
        """Stop the guests of one module, or of one test."""
        for key in [key for key in self._guests if key[0] == scope]:
            self.drop(key)

    def drop(self, key: tuple[object, ...]) -> None:
        """Stop a guest, if there is one for ``key``."""
        known = self._guests.pop(key, None)
        if known is not None:
            known[1].session.stop()

    def close(self) -> None:
        """Stop all guests."""
        from kvmpass._teardown import run_all

        guests, self._guests = self._guests, {}
        run_all(*(pooled.session.stop for _, pooled in guests.values()))


def _start(devices: tuple[str, ...], **options: Any) -> Session:
    from kvmpass.session import start  # loads a VMM: only for tests that need it

    return start(devices, **options)


@dataclass(frozen=True, slots=True)
class _Use:
    """A test's use of a guest."""

    guest: Pooled
    """The guest."""
    console: int
    """Bytes that its console had printed before."""
    events: int
    """Events of its devices before."""


_USE = pytest.StashKey[_Use]()


class GuestPlugin:
    """Provides guests to marked tests, and adds to the report of a failed one what its guest has said meanwhile."""

    def __init__(self) -> None:
        self.pool = Pool(_start)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Mark tests of guests as tests that need AMD-V, AMD-Vi and VFIO."""
        for item in items:
            if Wish.of(item) is not None and item.get_closest_marker(MARKER) is None:
                item.add_marker(getattr(pytest.mark, MARKER))

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        """Stop the guests that have a device which the test asks for itself, by the fixture of its role."""
        roles, wish = State.of(item.config).roles, Wish.of(item)
        wanted = {roles[name] for name in getattr(item, "fixturenames", ()) if name in roles}
        self.pool.release(wanted, wish.key(item) if wish is not None else None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, Any, Any]:
        """Stop the guests of a module whose tests are over."""
        try:
            return (yield)
        finally:
            if nextitem is None or module_of(nextitem) != module_of(item):
                self.pool.end(module_of(item))

    @pytest.fixture
    def kvmpass_guest(self, request: pytest.FixtureRequest) -> Iterator[Session]:
        """Return the guest that the marker ``guest`` describes; other tests have used it, and will.

        A test that ends its guest, or leaves one that does not answer within 10 seconds, fails unless its marker says
        ``may_die=True``; the next test gets a new guest.
        """
        item = request.node
        wish = Wish.of(item)
        if wish is None:
            pytest.fail(f"the fixture kvmpass_guest is for tests marked {GUEST_MARKER}", pytrace=False)
        key = wish.key(item)
        devices = wish.addresses(request.config)
        options = dict(wish.options)
        from kvmpass.session.session import BOOT_SECONDS  # loads a VMM: only for tests that need it

        # More where emulated hosts share the machine, as the limits of tests are.
        slowdown = State.of(request.config).slowdown
        options["boot_timeout"] = options.get("boot_timeout", BOOT_SECONDS) * slowdown
        guest = self.pool.get(key, devices, options, slowdown)
        guest.uses += 1
        item.stash[_USE] = _Use(guest, guest.console.size, guest.session.event_count)
        boot = guest.boot_seconds if guest.uses == 1 else 0.0
        item.user_properties += [("guest", guest.session.name), ("guest_boot_seconds", round(boot, 3))]
        yield guest.session
        lost, ended = guest.lost(slowdown), guest.session.ended
        if lost is not None or wish.reuse == "test":
            self.pool.drop(key)
        if lost is not None and not wish.may_die:
            what = "hung" if ended is None else "ended"
            pytest.fail(f"the test has {what} its guest: {ended or lost} (may_die=True allows it)", pytrace=False)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add sections to the report of a failed test: its part of the console and of the events.

        The part of a test whose guest does not boot is the console since its start.
        """
        report = yield
        use = item.stash.get(_USE, None)
        if use is None and call.excinfo is not None and isinstance(call.excinfo.value, GuestDied):
            report.sections.append((_CONSOLE, call.excinfo.value.console))
        if use is not None and report.failed:
            if new := use.guest.session.event_count - use.events:
                events = use.guest.session.events[-new:]
                report.sections.append(("events of the guest's devices", "\n".join(map(str, events))))
            if text := use.guest.console.since(use.console):
                report.sections.append((_CONSOLE, text))
        return report

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self) -> None:
        """Stop all guests."""
        self.pool.close()
