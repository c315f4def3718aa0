"""What a guest's image is made of, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.kernel_files import bzimage

from kvmpass.errors import BadKernel, KvmpassError
from kvmpass.guest import GuestSpec, prepare


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        (GuestSpec(initrd=Path("own"), session=True, copy=("/etc/hostname:/x",)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), session=True, modules=(Path("one.ko"),)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), command=("true",), copy_out=("/a",)), "COMMAND, --copy and --module"),
        (GuestSpec(initrd=Path("own"), session=True, root="host"), "mounts --root and --share"),
        (GuestSpec(initrd=Path("own"), session=True, shares=("/tmp",)), "mounts --root and --share"),
        (GuestSpec(initrd=Path("own"), session=True, copy_out=("/a",)), "sends files"),
    ],
)
def test_an_initramfs_of_the_users_own_gets_nothing_more(spec: GuestSpec, reason: str) -> None:
    """Nothing would use it: not even its kernel is looked for."""
    with pytest.raises(KvmpassError, match=reason):
        prepare(spec, ())


@pytest.mark.parametrize(
    ("text", "lacking"),
    [
        (None, ""),
        ("CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_CONSOLE=m\nCONFIG_DEVTMPFS=y\n", ""),
        ("CONFIG_VIRTIO_PCI=y\n# CONFIG_VIRTIO_CONSOLE is not set\n", "CONFIG_VIRTIO_CONSOLE, CONFIG_DEVTMPFS"),
    ],
)
def test_a_kernel_without_a_port_for_the_agent_beside_an_init(tmp_path: Path, text: str | None, lacking: str) -> None:
    """It is refused, not waited for, if its configuration is known."""
    (tmp_path / "bzImage").write_bytes(bzimage())
    (tmp_path / "own").write_bytes(b"own")
    if text is not None:
        (tmp_path / "config-6.12.1-test").write_text(text)
    spec = GuestSpec(kernel=tmp_path / "bzImage", initrd=tmp_path / "own", session=True)
    if not lacking:
        assert prepare(spec, ()).initrd.endswith(b"own")
        return
    with pytest.raises(BadKernel, match=f"^kernel 6.12.1-test lacks {lacking}, which the agent"):
        prepare(spec, ())
