"""A host in a file: the record of this one gives the answers that it gives itself."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import kvmpass
from kvmpass import host
from kvmpass.cli.doctor import look_at_device, look_at_host
from kvmpass.host import Bdf
from kvmpass.layout import MIB

VOLATILE = {"memory", "huge-pages", "cgroup-memory", "address-space", "tasks"}  # they count what is free just now


def answers(sysfs: host.Sysfs, addresses: list[str]) -> dict[str, str]:
    """What the commands say of this host and of some of its devices, question by question."""

    def findings(bdf: Bdf | None) -> list[object]:
        found = host.diagnose(sysfs, bdf, memory=MIB)
        return [(finding.check, finding.outcome) if finding.check in VOLATILE else finding for finding in found]

    found = {"list": repr(host.inventory(sysfs)), "doctor": repr(findings(None))}
    for bdf in map(Bdf.parse, addresses):
        found[f"show {bdf}"] = repr(host.describe(sysfs, bdf))
        found[f"doctor {bdf}"] = repr(findings(bdf))
        made = kvmpass.plan([bdf], memory="64M", sysfs=sysfs)
        reasons = [*made.blockers, *made.warnings]
        found[f"plan {bdf}"] = repr((made.devices, made.memory, made.phys_bits, made.descriptors, reasons))
    return found


def first_difference(here: str, there: str) -> str:
    at = next((n for n, pair in enumerate(zip(here, there, strict=False)) if pair[0] != pair[1]), len(here))
    return f"{here[max(0, at - 200) : at + 100]!r} became {there[max(0, at - 20) : at + 100]!r}"


def differences(archive: Path, user: int, addresses: list[str]) -> list[str]:
    """What a record of this host, made by that user, says otherwise than the host; in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(user)
            os.setuid(user)
            live = answers(host.Sysfs(), addresses)
            recorder = host.record.Recorder()
            look_at_host(recorder)
            host.record.record(recorder, look_at_device)
            assert recorder.write_tar(archive) > 500
            with host.record.open_recorded(archive) as tree:
                again = answers(tree, addresses)
            found = [f"{key}: {first_difference(live[key], again[key])}" for key in live if live[key] != again[key]]
        except BaseException as error:
            found = [repr(error)]
        finally:
            os.write(writer, json.dumps(found).encode()[:60000])
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as file:  # noqa: PTH123 - a descriptor
        found = json.loads(file.read())
    os.waitpid(child, 0)
    assert isinstance(found, list)
    return found


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory that any user may write to."""
    place = Path(tempfile.mkdtemp(prefix="kvmpass-test-"))
    place.chmod(0o777)
    yield place
    shutil.rmtree(place)


@pytest.mark.amdvi(kernel="full", duration=40)
@pytest.mark.parametrize("user", [0, 65534], ids=["root", "nobody"])
def test_a_record_gives_the_same_answers(open_place: Path, user: int, nvme: str, nic: str, bridged: str) -> None:
    """Also that of a user without rights, read by root: what that user could not see stays unseen."""
    assert differences(open_place / "host.tar.gz", user, [nvme, nic, bridged]) == []
    with host.record.open_recorded(open_place / "host.tar.gz") as tree:
        assert host.inventory(tree).complete is (user == 0)


@pytest.mark.amdvi(kernel="full", duration=24)
def test_a_record_without_addresses(nic: str, tmp_path: Path) -> None:
    """Its cards' addresses are in no byte of it, and the devices are judged the same."""
    addresses = [path.read_text().strip() for path in Path("/sys/class/net").glob("*/address")]
    words = [sys.executable, "-m", "kvmpass"]
    subprocess.run(
        [*words, "doctor", "--record", str(tmp_path / "host.tar"), "--anonymous"], check=True, capture_output=True
    )
    data = (tmp_path / "host.tar").read_bytes()
    assert not [address for address in addresses if address.encode() in data and address.strip("0:")]
    shown = []
    for more in ([], ["--sysfs", str(tmp_path / "host.tar")]):
        done = subprocess.run([*words, "list", "--json", *more], check=True, capture_output=True, text=True)
        shown.append(
            [(device["bdf"], device["assignable"], device["driver"]) for device in json.loads(done.stdout)["devices"]]
        )
    assert shown[0] == shown[1]
    assert nic in [bdf for bdf, *_ in shown[1]]
