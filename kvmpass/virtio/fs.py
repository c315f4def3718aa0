"""A virtio file system, which a daemon such as virtiofsd serves (Virtual I/O Device 1.2, section 5.11)."""

from __future__ import annotations

from kvmpass.errors import LayoutError
from kvmpass.virtio.frontend import FrontEnd
from kvmpass.virtio.remote import RemoteDevice

DEVICE_TYPE = 26
CLASS_CODE = 0x018000  # mass storage controller, other
MODALIAS = "pci:v00001AF4d0000105Asv00001AF4sd00001100bc01sc80i00"
"""Of the function, for the choice of its drivers."""
MAX_TAG = 36
"""Bytes of a tag."""
_QUEUES = (128, 128)  # for requests that must not wait (FUSE_FORGET, FUSE_INTERRUPT), and for the others


class VirtioFs(RemoteDevice):
    """A file system that the guest mounts by its ``tag``. Raises ``LayoutError`` for an invalid one."""

    def __init__(self, front: FrontEnd, tag: str) -> None:
        name = tag.encode()
        if not 0 < len(name) <= MAX_TAG or not tag.isascii() or not tag.isprintable():
            raise LayoutError(f"{tag!r} is no tag of a file system: 1 to {MAX_TAG} printable ASCII characters")
        config = name.ljust(MAX_TAG, b"\0") + (len(_QUEUES) - 1).to_bytes(4, "little")
        super().__init__(
            front, device_type=DEVICE_TYPE, class_code=CLASS_CODE, features=0, queues=_QUEUES, config=config
        )
