"""Configuration space from inside a guest, and as a guest reaches it."""

from __future__ import annotations

from collections.abc import Callable

from kvmpass.machine import AssignedDevice, Machine

CONFIGURE = """
# put DEVICE OFFSET VALUE: a dword of configuration space, least significant byte first.
put() {
    bytes=; for shift in 0 8 16 24; do bytes=$bytes$(printf '\\\\x%02x' $(($3 >> shift & 255))); done
    printf "$bytes" | dd of=/sys/bus/pci/devices/$1/config bs=4 seek=$(($2 / 4)) count=1 conv=notrunc 2>/dev/null
}
get() { hexdump -s $2 -n 4 -e '1/4 "0x%08x\\n"' /sys/bus/pci/devices/$1/config; }
first=0000:00:01.0; second=0000:00:02.0
# sleeper: $first, an e1000e card, without its driver and on; its power management register and its BAR 0.
sleeper() {
    echo $first >/sys/bus/pci/drivers/e1000e/unbind 2>/dev/null
    echo 1 >/sys/bus/pci/devices/$first/enable
    capability=$(($(get $first 52) & 255))
    while [ $(($(get $first $capability) & 255)) -ne 1 ]; do
        capability=$(($(get $first $capability) >> 8 & 255)); [ $capability -ne 0 ] || exit 1; done
    register=$((capability + 4)); at=$(($(get $first 16) & ~15))
}
"""


def config_of(machine: Machine, device: AssignedDevice) -> Callable[..., int]:
    """Configuration space as a guest reaches it: ``config(offset, size)`` reads, with a value it writes first."""
    pci, devfn = machine._board.pci, device.slot << 3 | device.number

    def config(offset: int, size: int, value: int | None = None) -> int:
        if value is not None:
            pci.write(0, devfn, offset, value.to_bytes(size, "little"))
        return int.from_bytes(pci.read(0, devfn, offset, size), "little")

    return config
