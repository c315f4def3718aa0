"""The scripts behind ``make bench``: what they make of their samples."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from kvmpass.lab import LabResult

ROOT = Path(__file__).parents[3]
SCRIPTS = ROOT / "scripts" / "bench"
STAGES = [{"name": "imports & checks", "seconds": 1.0, "exits": 0}, {"name": "boot", "seconds": 3.0, "exits": 420}]
Script = Callable[[str], ModuleType]


@pytest.fixture
def report(script: Script) -> ModuleType:
    return script("report")


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        (["--only", "guests"], "need --output DIR"),
        (["--only", "guests", "--output", str(SCRIPTS / "../../docs")], "need --output DIR"),
        (["--limit", "60"], "need --output DIR"),
        (["--here"], "KVMPASS_TEST_NVME=BDF"),
        (["--only", "spans,nothing"], "unknown sections: nothing"),
    ],
)
def test_what_would_write_or_assign_too_much_is_refused(
    script: Script,
    options: list[str],
    refusal: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = script("run")
    monkeypatch.delenv("KVMPASS_TEST_NVME", raising=False)
    monkeypatch.setattr(run, "measure", lambda *arguments: pytest.fail("it measured"))
    monkeypatch.setattr(sys, "argv", ["run.py", *options])
    with pytest.raises(SystemExit):
        run.main()
    assert refusal in capsys.readouterr().err


def test_ratios_of_medians_with_quartiles(report: ModuleType) -> None:
    samples = {
        "boot, s": {"kvmpass": [2.0, 1.0, 9.0], "QEMU": [4.0, 4.0, 4.0], "C": [1.0]},
        "peer only": {"C": [1.0]},
    }
    rows = report.summary(samples)
    assert [(row["peer"], row["ratio"]) for row in rows] == [("QEMU", 0.5), ("C", 2.0)]
    assert rows[0]["kvmpass"] == (1.5, 2.0, 5.5)
    assert rows[1]["peer_quartiles"] == (1.0, 1.0, 1.0)
    assert "  0.50" in report.text(rows) and "boot, s / QEMU" in report.text(rows)


def test_a_missed_goal_is_named(report: ModuleType) -> None:
    name = "first process of the guest, s"
    for own, goal in ((0.6, "≤ 0.65"), (0.7, "≤ 0.65, missed")):
        rows = report.summary({name: {"kvmpass": [own], "QEMU": [1.0]}})
        assert f"| {name} | QEMU | {own:.2f} | {goal} |" in report.table(rows)


def test_a_peer_that_takes_nothing_has_no_ratio(report: ModuleType) -> None:
    rows = report.summary({"exits": {"kvmpass": [3.0], "QEMU": [0.0]}})
    assert "| exits | QEMU |  |  |" in report.table(rows)
    assert "exits / QEMU" in report.text(rows) and "exits" not in report.bars(rows)


def test_the_bars_are_well_formed(report: ModuleType) -> None:
    rows = report.summary({"a < b": {"kvmpass": [90.0], "QEMU": [1.0]}, "c": {"kvmpass": [1.0], "QEMU": [4.0]}})
    picture = ElementTree.fromstring(report.bars(rows))
    assert "a < b / QEMU" in [element.text for element in picture.iter()]
    bars = [element for element in picture.iter() if element.tag.endswith("rect")]
    assert all(float(bar.get("x", 0)) + float(bar.get("width", 0)) <= float(picture.get("width", 0)) for bar in bars)


def test_the_stages_of_two_runs_have_one_scale(report: ModuleType) -> None:
    runs = {"kvmpass": {"seconds": 4.0, "stages": STAGES}, "QEMU": {"seconds": 2.0, "stages": STAGES[:1]}}
    picture = ElementTree.fromstring(report.timeline(runs))
    assert {"imports & checks: 1.00 s, 0 exits", "boot: 3.00 s, 420 exits"} <= {
        found.text for found in picture.iter()
    }
    widths = [float(found.get("width", 0)) for found in picture.iter() if found.get("height") == "20"]
    assert widths[0] == widths[2] and widths[1] == pytest.approx(3 * widths[0], abs=0.2)


def test_rows_that_differ_in_a_size_are_a_curve(report: ModuleType) -> None:
    samples = {
        f"assign, {size} MiB, type1, s": {"kvmpass": [size / 1000], "C": [size / 2000]} for size in (256, 1024)
    }
    picture = ElementTree.fromstring(report.growth({**samples, "alone, 8 MiB, s": {"C": [1.0]}}))
    assert [found.text for found in picture.iter() if found.text and "over" in found.text] == [
        "assign, type1, s, over MiB"
    ]
    assert len([found for found in picture.iter() if found.tag.endswith("polyline")]) == 2


def test_only_what_is_between_the_marks_is_replaced(report: ModuleType) -> None:
    before = "a\n<!-- begin: bench ratios -->\nold\n<!-- end: bench ratios -->\nb\n"
    assert report.document(before, {"ratios": r"n\1w", "other": "x"}) == before.replace("old", r"n\1w")


def test_stages_are_medians_of_all_runs(report: ModuleType) -> None:
    memory = {"name": "memory", "seconds": 1.0, "cpu_seconds": 2.0}
    runs = [[{"name": "imports", "seconds": wall, "cpu_seconds": 1.0}, memory] for wall in (2.0, 9.0, 3.0)]
    counts = {report.STAGES + "256 MiB": runs, report.STAGES + "8 MiB": [runs[0][:1]], "ioctls": {}}
    assert report.stages_table(counts).splitlines() == [
        "| stage | 256 MiB | 8 MiB |",
        "|---|---|---|",
        "| imports | 3.00 (1.00) | 2.00 (1.00) |",
        "| memory | 1.00 (2.00) | 0.00 (0.00) |",
        "| **all** | 4.00 (3.00) | 2.00 (1.00) |",
    ]


def test_how_often_and_where_is_said_by_the_data(report: ModuleType) -> None:
    found: dict[str, Any] = {
        "rounds": 9,
        "cpus": 2,
        "at_once": 2,
        "hosts": [["layers", "guests"], ["spans"], ["parallel"]],
    }
    found["rows"] = [{"rounds": 9}, {"rounds": 9}]
    assert report.conditions(found) == (
        "Rounds: 9; CPUs of the machine: 2; emulated host 1: `layers`, `guests`; emulated host 2: `spans`; "
        "emulated host 3:\n`parallel`; hosts 1 and 2 at the same time."
    )
    found |= {"rows": [{"rounds": 7}, {"rounds": 9}], "at_once": 0, "hosts": [], "note": "It was busy."}
    assert report.conditions(found) == "Rounds: 7 to 9; CPUs of the machine: 2.\n\nIt was busy."
    assert report.conditions({**found, "rows": []}).startswith("Rounds: 9; ")
    assert "and were replaced: 2." in report.conditions({**found, "replaced": {"spans": 2}}).replace("\n", " ")
    found |= {"note": "", "repeated": {"guests": ["hung", "hung"], "spans": ["failed"]}}
    said = "measurements that failed or hung, and were repeated: 2 in `guests`, 1 in `spans`."
    assert said in report.conditions(found).replace("\n", " ")


def test_every_section_is_described(script: Script, report: ModuleType) -> None:
    assert report.MEASURED.keys() == {*script("inside").SECTIONS, "trees"}
    table = report.sections_table({"guests": 508.4}).splitlines()
    assert table[2:3] == ["| `layers` | one ioctl through each layer |  |"]
    assert "| `guests` | boots, data, interrupts, output | 508 |" in table


def test_time_and_cpu_end_at_the_first_kvm_run(tmp_path: Path) -> None:
    """In any thread, on any descriptor: this program has no VM."""
    program = tmp_path / "until_run"
    subprocess.run(["cc", "-Wall", "-Werror", "-o", program, SCRIPTS / "until_run.c"], check=True)
    run = partial(subprocess.run, capture_output=True, text=True, timeout=60)
    work = "import fcntl, threading, time; time.sleep(0.3); call = lambda: fcntl.ioctl(0, 0xae80)\n"
    work += "sum(range(10**7))\n"  # CPU time is counted by ticks
    work += "threading.Thread(target=call).start(); time.sleep(50)"
    done = run([program, "60", sys.executable, "-c", work])
    nanoseconds, cpu = map(int, done.stdout.split())
    assert not done.returncode and 0.3e9 < nanoseconds < 45e9 and 0.03e9 < cpu < nanoseconds
    for words in (["true"], ["/missing"]):
        done = run([program, "60", *words])
        assert done.returncode == 1 and "ended without KVM_RUN" in done.stderr
    done = run([program, "1", "sleep", "55"])
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "sleep: no KVM_RUN within 1 s: killed\n")
    assert run([program, "0", "true"]).returncode == run([program, "sleep", "1"]).returncode == 2


def test_neither_program_of_the_cpu_row_finalizes_its_interpreter(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One is killed at its first KVM_RUN: the other must not count its end."""
    starts, samples = script("starts"), script("samples")
    ends = "import atexit; atexit.register(print, 'finalized')\n"

    def printed(words: list[str], *, user: bool) -> float:
        assert user and words[:2] == [sys.executable, "-c"]
        done = subprocess.run([*words[:2], ends + words[2]], check=True, capture_output=True, text=True)
        assert not done.stdout
        return 1.0

    class Nothing:
        def __init__(self, bench: Any) -> None:
            self.measure, self.least = lambda *arguments: None, 64

    monkeypatch.setattr(starts, "spent", printed)
    monkeypatch.setattr(starts, "Loaded", Nothing)
    bench = samples.Bench(samples.Samples(), tmp_path, {})
    with starts.start(bench) as jobs:
        for job in jobs:
            job()
    assert bench.samples.samples == {"user CPU until the first KVM_RUN, ms": {"import click": [1.0]}}


@pytest.mark.parametrize(("needed", "size"), [(64, 64), (65, 128), (80, 128), (129, 256)])
def test_the_least_memory_is_what_the_guests_kernel_takes(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, needed: int, size: int
) -> None:
    starts, samples = script("starts"), script("samples")
    image = SimpleNamespace(kernel=SimpleNamespace(path="/k"), cmdline="", initrd=b"", least_memory=needed << 20)
    monkeypatch.setattr(starts, "prepare", lambda *arguments: image)
    assert starts.Loaded(samples.Bench(samples.Samples(), tmp_path, {})).least == size


def test_calls_are_named_by_their_descriptor(script: Script) -> None:
    """VFIO has given some numbers twice."""
    lines = [
        "7 ioctl(3, 0x3b66, 0x3) = 0",
        "7 ioctl(3, 0x3b71, 0x7ffc) = 0",
        "ioctl(-1, 0, 0x1) = -1 (errno 9)",
        "[pid 7] ioctl(5, 0x3b71, 0x7ffc) = 0",
        "ioctl(0, 0x5401, 0x7ffc) = -1 (errno 25)",
        "ioctl(1048576, 0, 0) = -1 (errno 9)",
        "ioctl(9, 0xaeff, 0) = 0",
    ]
    assert list(map(dict, script("ioctls").parsed(lines))) == [
        {"VFIO_SET_IOMMU": 1, "VFIO_IOMMU_MAP_DMA": 1},
        {"VFIO_DEVICE_PCI_HOT_RESET": 1},
        {"0xaeff": 1},
    ]


def test_what_the_documents_say_is_what_was_measured(script: Script) -> None:
    document: dict[str, Any] = json.loads((ROOT / "docs" / "bench.json").read_text())
    again = json.loads(json.dumps(script("report").summary(document["samples"])))
    assert document["rows"] == again
    for name, content in script("run").documents(document).items():
        assert (ROOT / "docs" / name).read_text() == content, "run.py --redraw writes it again"


def test_the_measured_calls_of_c_are_the_least_of_the_test(script: Script) -> None:
    document: dict[str, Any] = json.loads((ROOT / "docs" / "bench.json").read_text())
    for backend, calls in script("ioctls").LEAST.items():
        assert document["counts"]["ioctls"][backend]["C"]["first device"] == dict(calls)


def test_what_was_saved_stays_whole_if_the_host_ends_while_it_saves_again(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    samples, write = script("samples").Samples(), Path.write_text
    samples.done["memory"] = 1
    samples.save(tmp_path / "result")

    def end(path: Path, text: str) -> None:
        write(path, text[:40])
        raise OSError("the host has ended")

    samples.done["memory"] = 2
    with monkeypatch.context() as patch, pytest.raises(OSError, match="has ended"):
        patch.setattr(Path, "write_text", end)
        samples.save(tmp_path / "result")
    assert json.loads((tmp_path / "result").read_text())["done"] == {"memory": 1}
    samples.save(tmp_path / "result")
    assert json.loads((tmp_path / "result").read_text())["done"] == {"memory": 2}


def test_what_two_hosts_have_measured_is_one_run(script: Script) -> None:
    samples = script("samples")
    hosts = []
    for value in (1.0, 2.0):
        part = samples.Samples()
        part.note("row", "kvmpass", value)
        part.note("another" if value == 2 else "row", "C", value)
        part.counts |= {"runs": [value], "phases": {"boot": {"exits": 7}}}
        part.fail("spans", f"fault {value:.0f}")
        assert part.repeat("spans", f"hang {value:.0f}")
        part.seconds["spans"], part.done["spans"] = value, 1
        hosts.append(json.loads(json.dumps(vars(part))))
    both = samples.merged(*hosts)
    assert both["samples"] == {"row": {"kvmpass": [1.0, 2.0], "C": [1.0]}, "another": {"C": [2.0]}}
    assert both["counts"] == {"runs": [1.0, 2.0], "phases": {"boot": {"exits": 7}}}
    assert both["failures"] == {"spans": ["fault 1", "fault 2"]}
    assert both["repeated"] == {"spans": ["hang 1", "hang 2"]}
    assert (both["seconds"], both["done"]) == ({"spans": 3.0}, {"spans": 2})
    assert samples.merged(vars(samples.Samples()), hosts[0]) == hosts[0]


@pytest.mark.parametrize(
    ("faults", "limit", "replaced"), [(0, None, 0), (1, None, 1), (2, 600.0, 2), (3, 600.0, 2), (1, 60.0, 0)]
)
def test_a_host_that_the_emulator_ends_is_replaced(
    script: Script,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    faults: int,
    limit: float | None,
    replaced: int,
) -> None:
    """Each host here measures two rounds of the first section before it ends; a whole one measures what is asked."""
    run, samples = script("run"), script("samples")
    asked: list[list[str]] = []

    class Lab:
        def __init__(self, config: Any) -> None:
            assert config.timeout == pytest.approx(limit or 3600, abs=30)

        def run(self, words: list[str], **streams: Any) -> Any:
            asked.append(words[3:])
            ends = len(asked) <= faults
            part = samples.Samples()
            for section in words[3:4] if ends else words[3:]:
                name, _, rounds = section.partition(":")
                for _ in range(2 if ends else int(rounds)):
                    part.note(name, "kvmpass", 1.0)
                    part.done[name] = part.done.get(name, 0) + 1
            part.save(Path(words[2], f"result-{words[3].partition(':')[0]}"))
            return LabResult(None if ends else 0, "panic" if ends else "exited", "double fault", 1.0)

    monkeypatch.setattr(run, "Lab", Lab)
    found = run.measure(tmp_path, 5, "full", False, limit, ["memory", "spans"])
    assert found["replaced"] == ({"memory": replaced} if replaced else {})
    if faults <= replaced:
        assert asked[: replaced + 1] == [[f"memory:{5 - 2 * n}", "spans:5"] for n in range(replaced + 1)]
    else:
        assert len(asked) == replaced + 1
    if limit == 60:  # too little time is left: what it has measured is kept
        assert found["done"] == {"memory": 2}
    elif faults <= replaced:
        assert found["done"] == {"memory": 5, "spans": 5} and len(found["samples"]["memory"]["kvmpass"]) == 5
    assert ("double fault" in capsys.readouterr().err) is bool(faults)


def test_too_many_faults_of_the_emulator_write_nothing(
    script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = script("run")
    monkeypatch.setattr(run, "run_emulated", lambda *arguments: False)
    with pytest.raises(SystemExit, match="too many emulated hosts"):
        run.measure(tmp_path, 5, "full", False, None, ["spans"])


def test_the_lower_bound_is_click_and_what_c_takes(report: ModuleType) -> None:
    assert report.bound_table({}) == "not measured"
    samples = {
        report.BOUND: {report.PASS: [0.25], report.IMPORT: [0.6]},
        report.ATTACHED: {"kvmpass": [2.0], "QEMU": [1.0], "C": [0.5]},
    }
    assert (
        "| **`import click`, then C: the lower bound** | 1.10 | 1.10 |\n| kvmpass | 2.00 | 2.00 |"
        in report.bound_table(samples)
    )


def test_parts_of_the_imports_add_up(report: ModuleType) -> None:
    table = report.instructions_table({"Python": (24_000_000, 35, 0), "click": (115_400_000, 97, 1)})
    assert table.splitlines()[2:] == ["| Python | 24 | 24 | 35 | 0 |", "| click | 91 | 115 | 62 | 1 |"]
