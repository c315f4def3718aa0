"""The plugin's guests in a run of pytest: when each boots and ends, and what reports have of them."""

from __future__ import annotations

import xml.etree.ElementTree as ET

import pytest
from support.fake_lab import lab, write

__all__ = ["lab"]
pytest_plugins = ["pytester"]

# Guests that note when they boot and end, instead of any machine.
FAKE_START = """
import itertools
from types import SimpleNamespace
from kvmpass.errors import GuestDied
from kvmpass.testing import pool

numbers = itertools.count(1)

def note(text):
    with open("log", "a") as file:
        file.write(text + "\\n")

def start(devices, on_console, **options):
    name = f"guest{next(numbers)}"
    if options.get("append") == "broken":
        raise GuestDied("the guest panicked", console="no init found")
    guest = SimpleNamespace(name=name, ended=None, answering=True, event_count=0, events=(), say=on_console)
    note(f"{name} boots: {' '.join(devices)}")
    guest.stop = lambda: note(f"{name} ends")
    guest.ping = lambda timeout: 0.001
    return guest

def silent(timeout):
    raise TimeoutError(f"{timeout} seconds")

pool._start = start
"""


@pytest.fixture
def guests(lab: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    for number, role in enumerate(("NVME", "NIC"), start=1):
        monkeypatch.setenv(f"KVMPASS_TEST_{role}", f"0000:0{number}:00.0")
    monkeypatch.setattr("kvmpass.testing.inplace.missing_hardware", lambda roles: None)
    monkeypatch.setattr("kvmpass.testing.pool._start", None)  # what the conftest sets is undone
    lab.makeconftest(FAKE_START)
    return lab


def log(guests: pytest.Pytester) -> list[str]:
    return (guests.path / "log").read_text().splitlines()


def test_when_guests_boot_and_end(guests: pytest.Pytester) -> None:
    write(
        guests,
        """
from conftest import note

def own(**arguments): return pytest.mark.guest(devices=("nvme", "edu?"), **arguments)

@own(reuse="module")
def test_a(kvmpass_guest): note("a")

@own(reuse="module")
def test_b(kvmpass_guest, nvme): note("b")  # its own guest's

@pytest.mark.amdvi
def test_c(nic): note("c")  # no guest's

@pytest.mark.amdvi
def test_d(nvme): note("d")  # the guest's

@own(reuse="module")
def test_e(kvmpass_guest): note("e")

@own(reuse="test")
def test_f(kvmpass_guest): note("f")

@pytest.mark.guest
def test_g(kvmpass_guest): note("g")

@own(reuse="module", append="more")
def test_h(kvmpass_guest): note("h")
""",
    )
    guests.makepyfile(test_zz="import pytest\nfrom conftest import note\n\ndef test_z(): note('z')")
    guests.runpytest_inprocess("-p", "no:randomly").assert_outcomes(passed=9)
    assert log(guests) == [
        *("guest1 boots: 0000:01:00.0", "a", "b", "c", "guest1 ends", "d"),
        *("guest2 boots: 0000:01:00.0", "e", "guest2 ends", "guest3 boots: 0000:01:00.0", "f", "guest3 ends"),
        *("guest4 boots: ", "g", "guest5 boots: 0000:01:00.0", "h", "guest5 ends", "z", "guest4 ends"),
    ]


def test_what_reports_have_of_them(guests: pytest.Pytester) -> None:
    write(
        guests,
        """
from conftest import silent

pytestmark = pytest.mark.guest

def test_good(kvmpass_guest): kvmpass_guest.say(b"of the first\\n")

def test_fails(kvmpass_guest):
    kvmpass_guest.say(b"of the second\\n")
    kvmpass_guest.event_count, kvmpass_guest.events = 1, ("an error of the device",)
    assert False

def test_ends_it(kvmpass_guest): kvmpass_guest.ended = "the guest powered off"

@pytest.mark.guest(may_die=True)
def test_may(kvmpass_guest): kvmpass_guest.ended = "the guest powered off"

@pytest.mark.guest(append="hangs")
def test_hangs(kvmpass_guest): kvmpass_guest.answering = False

@pytest.mark.guest(append="has just hung")
def test_stalls(kvmpass_guest): kvmpass_guest.ping = silent

@pytest.mark.guest(append="has just hung")
def test_after(kvmpass_guest): pass

@pytest.mark.guest(append="broken")
def test_boots(kvmpass_guest): pass
""",
    )
    result = guests.runpytest_inprocess("--junitxml=report.xml", "-o", "junit_family=xunit1")
    result.assert_outcomes(passed=6, failed=1, errors=4)
    text = result.stdout.str()
    assert "of the first" not in text
    result.stdout.fnmatch_lines_random(
        ["*events of the guest's devices*", "an error of the device", "of the second", "no init found"]
    )
    result.stdout.fnmatch_lines(["the test has ended its guest: the guest powered off (may_die=True allows it)"])
    result.stdout.fnmatch_lines(["the test has hung its guest: it does not answer (may_die=True allows it)"])
    properties = {
        case.get("name"): {each.get("name"): each.get("value") for each in case.iter("property")}
        for case in ET.parse(guests.path / "report.xml").iter("testcase")
    }
    used = [found.get("guest") for found in properties.values()]
    assert used == ["guest1"] * 3 + ["guest2", "guest3", "guest4", "guest5", None]
    assert properties["test_fails"]["guest_boot_seconds"] == "0.0"
