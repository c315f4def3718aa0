"""``make bench`` on a host whose devices are named (``--here``), in its shortest form."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).parents[2] / "scripts/bench/run.py"
CPU = "user CPU until the first KVM_RUN, ms"
pytestmark = pytest.mark.amdvi(duration=20)


@pytest.mark.soak("half a minute in an emulated host")
def test_until_the_first_kvm_run(nvme: str, tmp_path: Path) -> None:
    """Of kvmpass and of QEMU, with the same files and the same device."""
    for program in ("cc", "qemu-system-x86_64"):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed: make deps")
    words = [sys.executable, str(RUN), "--here", "--rounds", "1", "--only", "start", "--output", str(tmp_path)]
    environment = {**os.environ, "KVMPASS_TEST_NVME": nvme}
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert not done.returncode, done.stderr
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["place"] == "this host" and not found["failures"], found["failures"]
    samples = found["samples"]
    assert samples[CPU].keys() == {"kvmpass", "import click", "QEMU"}
    [seconds] = [samples[row] for row in samples if row.startswith("process start to first KVM_RUN")]
    assert all(0 < samples[CPU][program][0] < 1000 * seconds[program][0] for program in ("kvmpass", "QEMU"))
