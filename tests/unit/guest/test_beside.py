"""The agent beside another init, the real program: as PID 1 of a namespace, in a root with little in it."""

from __future__ import annotations

import select
import shutil
import subprocess
from pathlib import Path

import pytest
from support.agent import PROGRAM

SECONDS = 20
AGAIN_SECONDS = 0.5  # it looks for its port each 0.2 s
UNSHARE = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """With what the agent's archive has, but for an init."""
    if subprocess.run([*UNSHARE, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs user namespaces: sysctl user.max_user_namespaces, kernel.unprivileged_userns_clone")
    (tmp_path / "kvmpass/mount").mkdir(parents=True)
    shutil.copy(PROGRAM, tmp_path / "kvmpass/beside")
    return tmp_path


def test_an_init_that_cannot_be_run_is_named(root: Path) -> None:
    (root / "kvmpass/init").symlink_to("/sbin/none")
    words = [*UNSHARE, "chroot", root, "/kvmpass/beside"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert (done.returncode, done.stderr) == (
        127,
        "kvmpass: the init of the initramfs cannot be run: /sbin/none, error 2\n",
    )


def test_a_kernel_without_a_port_is_reported_once(root: Path) -> None:
    busybox = shutil.which("busybox")
    if busybox is None:
        pytest.skip("needs busybox-static")
    shutil.copy(busybox, root / "busybox")
    (root / "kvmpass/init").symlink_to("/init")
    (root / "init").write_text("#!/busybox sh\nread line\n")
    (root / "init").chmod(0o755)
    words = [*UNSHARE, "chroot", root, "/kvmpass/beside"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as program:
        assert program.stdin is not None and program.stderr is not None
        assert select.select([program.stderr], [], [], SECONDS)[0]
        assert program.poll() is None
        assert program.stderr.readline().decode() == (
            "kvmpass: no port of the agent yet: it needs the drivers virtio_pci and virtio_console, and devtmpfs: "
            "load the drivers in the initramfs, or name another kernel\n"
        )
        assert not select.select([program.stderr], [], [], AGAIN_SECONDS)[0]
        program.stdin.close()
        assert program.stderr.read() == b""
