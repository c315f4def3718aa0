"""list, show and monitor on a real kernel, held against lspci and the kernel's own files."""

from __future__ import annotations

import importlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.inside import LAB_ONLY

from kvmpass import host
from kvmpass.cli.main import main

NOBODY = 65534
DEVICES = Path("/sys/bus/pci/devices")
GROUPS = Path("/sys/kernel/iommu_groups")
MONITOR = (sys.executable, "-m", "kvmpass", "monitor")

Valid = Callable[[str, str | bytes], Any]


@pytest.fixture(autouse=True)
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVMPASS_STATE_DIR", str(tmp_path / "state"))


def run(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    """A command in this process; it must succeed. Its standard output."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments])
    output, errors = capfd.readouterr()
    assert ended.value.code == 0, errors
    return output


def as_nobody(tmp_path: Path, *arguments: str) -> tuple[str, str]:
    """The same in a fork without rights, who need not be able to read the interpreter."""
    importlib.import_module(f"kvmpass.cli.{arguments[0]}")
    output, errors = tmp_path / "out", tmp_path / "err"
    output.touch()
    errors.touch()
    child = os.fork()
    if child == 0:
        status = 99
        with output.open("w") as sys.stdout, errors.open("w") as sys.stderr:
            try:
                os.setgroups([])
                os.setgid(NOBODY)
                os.setuid(NOBODY)
                main([*arguments])
            except SystemExit as ended:
                status = ended.code if isinstance(ended.code, int) else 98
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, errors.read_text()
    return output.read_text(), errors.read_text()


def kernel_groups() -> dict[int, list[str]]:
    return {
        int(path.name): sorted(link.name for link in (path / "devices").iterdir() if ":" in link.name)
        for path in GROUPS.iterdir()
    }


def listed(capfd: pytest.CaptureFixture[str], valid: Valid, *filters: str) -> dict[str, Any]:
    """The devices of ``kvmpass list --json``, by address."""
    document = valid("list", run(capfd, "list", "--json", *filters))
    return {device["bdf"]: device for device in document["devices"]}


# --- list


def test_every_device_in_its_group(capfd: pytest.CaptureFixture[str], valid: Valid) -> None:
    document = valid("list", run(capfd, "list", "--json"))
    assert [device["bdf"] for device in document["devices"]] == sorted(path.name for path in DEVICES.iterdir())
    groups = {group["group"]: group["bdfs"] for group in document["iommu_groups"]}
    assert groups == {number: members for number, members in kernel_groups().items() if members}
    for device in document["devices"]:
        number = next((number for number, members in groups.items() if device["bdf"] in members), None)
        assert device["group"] == number
    assert document["host"] == {"ready": True, "permitted": True, "blocker": None}


def test_what_can_be_assigned(
    capfd: pytest.CaptureFixture[str], valid: Valid, nvme: str, edu: str, nic: str, bridged: str, multifunction: str
) -> None:
    """The library's own refusal says the same of each device."""
    found = listed(capfd, valid)
    assert all(found[bdf]["assignable"] for bdf in (nvme, edu, nic, bridged))
    assert not found[multifunction]["assignable"]
    sysfs = host.Sysfs()
    for bdf, device in found.items():
        reasons = [*host.blockers.blockers(sysfs, sysfs.device(host.Bdf.parse(bdf)))]
        assert [reason.kind for reason in reasons] == [blocker["kind"] for blocker in device["blockers"]]

    def sibling(bdf: str) -> dict[str, Any]:
        return next(
            device for device in found.values() if device["group"] == found[bdf]["group"] and device["bdf"] != bdf
        )

    assert sibling(multifunction)["blockers"][0]["blocked_by"] == [multifunction]
    assert [blocker["kind"] for blocker in sibling(bridged)["blockers"]] == ["bridge"]


def test_the_tree_of_groups(capfd: pytest.CaptureFixture[str], multifunction: str, bridged: str) -> None:
    lines = run(capfd, "list").splitlines()
    members = next(members for members in kernel_groups().values() if multifunction in members)
    first, last = (next(line for line in lines if members[number] in line) for number in (0, -1))
    assert "┬ " in first and "└ " in last and "group not viable" in first
    behind = next(line for line in lines if bridged in line)
    assert ("└ " in behind or "├ " in behind) and "yes" in behind
    if any(not (path / "iommu_group").exists() for path in DEVICES.iterdir()):  # the IOMMU itself, for one
        assert "Devices without an IOMMU group: nothing would confine their DMA" in lines


def test_a_drive_with_a_mounted_file_system(
    capfd: pytest.CaptureFixture[str], valid: Valid, nvme2: str, tmp_path: Path, destructive: None
) -> None:
    node = next(DEVICES.glob(f"{nvme2}/nvme/nvme*/nvme*n1")).name
    assert list(listed(capfd, valid, node)) == list(listed(capfd, valid, f"/dev/{node}")) == [nvme2]
    subprocess.run(["/bin/busybox", "mke2fs", f"/dev/{node}"], check=True, capture_output=True)
    subprocess.run(["mount", "-t", "ext4", f"/dev/{node}", str(tmp_path)], check=True)
    try:
        (blocker,) = listed(capfd, valid, nvme2)[nvme2]["blockers"]
        assert blocker["kind"] == "in-use" and f"/dev/{node} is mounted at {tmp_path}" in blocker["cause"]
        assert "no: in use here" in run(capfd, "list", nvme2)
        assert f"In use        /dev/{node} is mounted at {tmp_path}\n" in run(capfd, "show", nvme2)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_a_borrowed_device(capfd: pytest.CaptureFixture[str], valid: Valid, edu: str) -> None:
    with host.borrow(edu):
        assert "no: already assigned" in run(capfd, "list", edu)
        group = listed(capfd, valid, edu)[edu]["group"]
        with Path(f"/dev/vfio/{group}").open("rb"):
            blockers = listed(capfd, valid, f"/dev/vfio/{group}")[edu]["blockers"]
            assert {blocker["kind"] for blocker in blockers} == {"assigned"}
            assert any("this very process" in blocker["cause"] for blocker in blockers)
            assert f"In use        assigned by process {os.getpid()} (" in run(capfd, "show", edu)


def test_what_people_type(
    capfd: pytest.CaptureFixture[str], valid: Valid, nic: str, nvme: str, multifunction: str
) -> None:
    interface = next(DEVICES.glob(f"{nic}/net/*")).name
    assert list(listed(capfd, valid, interface)) == [nic]
    functions = sorted(path.name for path in DEVICES.glob(f"{multifunction[:-1]}?"))
    assert list(listed(capfd, valid, multifunction[5:-2])) == functions and len(functions) > 1
    drives = sorted(path.name for path in Path("/sys/bus/pci/drivers/nvme").iterdir() if path.name.count(":") == 2)
    assert list(listed(capfd, valid, "nvme")) == list(listed(capfd, valid, "nvm[e]")) == drives
    assert nvme in listed(capfd, valid, "*nvm*express*", nvme)


# --- show, held against lspci


def lspci() -> dict[str, str]:
    """What it says of each device, by address."""
    text = subprocess.run(["lspci", "-vvv", "-D"], capture_output=True, text=True, check=True).stdout
    return {block.split(" ", 1)[0]: block for block in text.strip().split("\n\n")}


def test_every_device_as_lspci_sees_it(capfd: pytest.CaptureFixture[str], valid: Valid) -> None:
    seen = lspci()
    for path in sorted(DEVICES.iterdir()):
        witness = seen[path.name]
        document = valid("show", run(capfd, "show", "--json", path.name))
        own = document["capabilities"]
        assert own["readable"]
        count = re.search(r"MSI-X: Enable([+-]) Count=(\d+)", witness)
        assert (own["msix"] is None) == (count is None)
        if count is not None:
            assert (own["msix"]["enabled"], own["msix"]["vectors"]) == (count[1] == "+", int(count[2]))
            table, pending = re.findall(r"(?:Vector table|PBA): BAR=(\d) offset=([0-9a-f]+)", witness)
            assert (own["msix"]["table_bar"], int(own["msix"]["table_offset"], 16)) == (
                int(table[0]),
                int(table[1], 16),
            )
            assert (own["msix"]["pba_bar"], int(own["msix"]["pba_offset"], 16)) == (
                int(pending[0]),
                int(pending[1], 16),
            )
        msi = re.search(r"MSI: Enable([+-]) Count=\d+/(\d+) Maskable([+-]) 64bit([+-])", witness)
        assert own["msi"] == (
            msi
            and {
                "vectors": int(msi[2]),
                "enabled": msi[1] == "+",
                "address64": msi[4] == "+",
                "maskable": msi[3] == "+",
            }
        )
        assert (own["express"] is not None) == ("] Express " in witness)
        assert bool(own["express"] and own["express"]["flr"]) == ("FLReset+" in witness.partition("DevCtl")[0])
        assert own["bus_master"] == ("BusMaster+" in witness)
        assert (own["power"] is not None) == ("Power Management version" in witness)
        assert own["aer"] == ("Advanced Error Reporting" in witness)
        assert (own["acs"] is not None) == ("Access Control Services" in witness)
        regions = {
            f"bar{match[1]}": int(match[2], 16)
            for match in re.finditer(r"Region (\d): (?:Memory|I/O ports) at ([0-9a-f]+)", witness)
        }
        found = {bar["name"]: int(bar["address"], 16) for bar in document["bars"] if bar["name"].startswith("bar")}
        assert found == regions
        for bar in document["bars"]:
            if bar["name"].startswith("bar"):
                assert (path / f"resource{bar['name'][3:]}").stat().st_size == bar["size"]


def test_the_surroundings(
    capfd: pytest.CaptureFixture[str], valid: Valid, bridged: str, multifunction: str, emulated_host: bool
) -> None:
    behind = valid("show", run(capfd, "show", "--json", bridged))
    bridge = behind["bridges"][0]
    if emulated_host:
        assert (bridge["kind"], bridge["isolates"]) == ("conventional bridge", False)
    assert (bridge["bdf"], "bridge") in [
        (sibling["bdf"], sibling["role"]) for sibling in behind["iommu_group"]["siblings"]
    ]
    kinds = {region["kind"]: region for region in behind["iommu_group"]["reserved_regions"]}
    assert (kinds["msi"]["start"], kinds["msi"]["last"]) == ("0xfee00000", "0xfeefffff")
    one = valid("show", run(capfd, "show", "--json", multifunction))
    assert "blocks" in [sibling["role"] for sibling in one["iommu_group"]["siblings"]]
    assert set(one["functions"]) & {sibling["bdf"] for sibling in one["iommu_group"]["siblings"]}


@pytest.mark.amdvi(qemu="modern", profile="modern")
def test_behind_a_root_port(capfd: pytest.CaptureFixture[str], valid: Valid, nvme_pf: str) -> None:
    """A link, SR-IOV, and a port whose access control services the kernel has switched on."""
    document = valid("show", run(capfd, "show", "--json", nvme_pf))
    seen = lspci()
    witness = seen[document["bridges"][0]["bdf"]]
    (port,) = document["bridges"]
    assert (port["kind"], port["isolates"]) == ("root port", True)
    names = dict(
        zip(
            ["SrcValid", "TransBlk", "ReqRedir", "CmpltRedir", "UpstreamFwd", "EgressCtrl", "DirectTrans"],
            ["SV", "TB", "RR", "CR", "UF", "EC", "DT"],
            strict=True,
        )
    )
    for key, line in (("supported", "ACSCap"), ("enabled", "ACSCtl")):
        flags = re.search(rf"{line}:\s+(.*)", witness)
        assert flags is not None
        assert port["acs"][key] == [names[word[:-1]] for word in flags[1].split() if word.endswith("+")]
    virtual = re.search(
        r"Total VFs: (\d+), .*\n?.*VF offset: (\d+), stride: (\d+), Device ID: ([0-9a-f]+)", seen[nvme_pf]
    )
    assert virtual is not None
    own = document["capabilities"]["sriov"]
    assert (own["total"], own["first_offset"], own["stride"], own["device"]) == (
        int(virtual[1]),
        int(virtual[2]),
        int(virtual[3]),
        virtual[4],
    )
    assert document["device"]["link"]["speed_gts"] == 2.5
    assert document["device"]["link"]["width"] == int((DEVICES / nvme_pf / "current_link_width").read_text())


@pytest.mark.amdvi(profile="sriov")
def test_a_device_without_a_group(capfd: pytest.CaptureFixture[str], valid: Valid, virtual_function: str) -> None:
    device = listed(capfd, valid)[virtual_function]
    if device["group"] is not None:
        pytest.skip("this host's virtual functions have groups: it runs in the lab under QEMU 7.2")
    assert [blocker["kind"] for blocker in device["blockers"]] == ["no-group"]
    physical = (DEVICES / virtual_function / "physfn").resolve().name
    assert device["sriov"]["physical_function"] == physical
    text = run(capfd, "list").partition("Devices without an IOMMU group")[2]
    assert virtual_function in text
    assert f"SR-IOV        virtual function of {physical}" in run(capfd, "show", virtual_function)


# --- without rights


def test_a_user_without_rights(tmp_path: Path, nvme: str, valid: Valid, emulated_host: bool) -> None:
    output, errors = as_nobody(tmp_path, "list")
    assert nvme in output and "other users' processes" in errors
    if emulated_host:  # elsewhere /dev/kvm may be open to all
        assert "this user (nobody) may not open /dev/kvm" in errors
    output, _ = as_nobody(tmp_path, "show", nvme)
    assert "without root the kernel shows only 64 bytes" in output
    document = valid("show", as_nobody(tmp_path, "show", "--json", nvme)[0])
    assert (document["complete"], document["capabilities"]["readable"]) == (False, False)
    assert (
        document["capabilities"]["responds"]
        and document["bars"][0]["size"] == (DEVICES / nvme / "resource0").stat().st_size
    )


# --- monitor


@pytest.fixture
def watching(request: pytest.FixtureRequest) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``kvmpass monitor`` in a process of its own, once it watches."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [*MONITOR, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1
        )
        started.append(process)
        assert process.stderr is not None
        assert process.stderr.readline() == "kvmpass: watching\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_a_device_there_and_back(
    watching: Callable[..., subprocess.Popen[str]], valid: Valid, edu: str, nic: str
) -> None:
    """Another device's events are not among them; each line is there at once."""
    group = int((DEVICES / nic / "iommu_group").resolve().name)
    driver = (DEVICES / nic / "driver").resolve().name
    process = watching("--json", "--timeout", "60", "--count", "6", nic)
    with host.borrow(edu), host.borrow(nic):
        pass
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    records = [valid("monitor", line) for line in output.splitlines()]
    assert [(record["event"], record["driver"], record["group"]) for record in records if record["bdf"]] == [
        ("driver-unbound", driver, group),
        ("driver-bound", "vfio-pci", group),
        ("driver-unbound", "vfio-pci", group),
        ("driver-bound", driver, group),
    ]
    assert {record["bdf"] for record in records} == {nic, None}
    nodes = [record for record in records if record["bdf"] is None]
    assert [record["event"] for record in nodes] == ["group-appeared", "group-vanished"]
    assert all((record["group"], record["bdfs"]) == (group, [nic]) for record in nodes)


@pytest.mark.usefixtures("usual_signals")
def test_a_device_comes_and_goes(
    watching: Callable[..., subprocess.Popen[str]], nvme2: str, emulated_host: bool
) -> None:
    if not emulated_host:
        pytest.skip(f"takes a device out of the host for a moment: {LAB_ONLY}")
    process = watching("--timeout", "60")
    (DEVICES / nvme2 / "remove").write_text("1")
    Path("/sys/bus/pci/rescan").write_text("1")
    assert process.stdout is not None
    lines = []
    while not any("bound" in line and "to nvme" in line for line in lines):
        lines.append(process.stdout.readline())
        assert lines[-1], lines
    assert any(re.search(rf"removed +{nvme2}  group \d+, Red Hat, Inc. QEMU NVM Express", line) for line in lines)
    assert any(re.search(rf"added +{nvme2}  group \d+", line) for line in lines)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 130
    assert process.stderr is not None and process.stderr.read().strip() == ""


@pytest.mark.usefixtures("usual_signals")
def test_how_it_ends(watching: Callable[..., subprocess.Popen[str]]) -> None:
    """By SIGTERM, and by a reader that has gone though nothing happens."""
    process = watching()
    process.terminate()
    assert process.wait(20) == 143
    process = watching()
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(20) == 0


def test_events_in_this_process(edu: str) -> None:
    events = host.watch_events(filters=[edu], timeout=30)
    with host.borrow(edu):
        pass
    seen = []
    for event in events:
        seen.append((event.kind, event.driver))
        if event.kind == "driver-unbound":
            break
    assert seen[0] == ("group-appeared", None) or seen[0] == ("driver-bound", "vfio-pci")
    assert ("driver-bound", "vfio-pci") in seen and seen[-1] == ("driver-unbound", "vfio-pci")


def test_completion(nvme: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kvmpass"],
        env={**os.environ, "_KVMPASS_COMPLETE": "bash_complete", "COMP_WORDS": f"kvmpass show {nvme[:-1]}"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"plain\t{nvme}\tNVMe: " in done.stdout
    assert len(done.stdout.splitlines()) == len([*DEVICES.glob(f"{nvme[:-1]}?")])
