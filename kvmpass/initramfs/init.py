"""The guest's init: a shell script for busybox."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

DIRECTORY = "/kvmpass"
COMPLETE = f"{DIRECTORY}/complete"  # the archive's last file
SETTLE_SECONDS = 20  # of the guest's time, for a driver to bind to its device
WATCHDOG_SECONDS = 20
NAMESPACE_SECONDS = 5  # from a live NVMe controller to its namespaces, if it has any
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# For one `mount -a`: each process takes a tenth of a second in an emulated guest.
FSTAB = b"""\
proc /proc proc defaults 0 0
sysfs /sys sysfs defaults 0 0
devpts /dev/pts devpts defaults 0 0
tmpfs /dev/shm tmpfs defaults 0 0
tmpfs /tmp tmpfs defaults 0 0
tmpfs /run tmpfs mode=0755 0 0
debugfs /sys/kernel/debug debugfs defaults 0 0
tracefs /sys/kernel/tracing tracefs defaults 0 0
"""
# Symlinks in /dev that devtmpfs lacks.
STREAMS = {"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2"}


_COMMON = """\
#!/usr/bin/busybox sh
export PATH={path} HOME=/root TERM={term}
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
cp -a {directory}/dev/. /dev/
mount -a -t nodebugfs,notracefs
mount -a -t debugfs,tracefs 2>/dev/null  # where the kernel has them
echo kvmpass >/proc/sys/kernel/hostname

now() {{ read -r uptime rest </proc/uptime; up=${{uptime%.*}}; }}
say() {{ echo "kvmpass: $*" >/dev/console; }}
fail() {{ say "$*"; [ -z "$control" ] || echo "kvmpass 1 error $*" >&6; }}
die() {{ fail "$*"; [ -z "$control" ] || stty -F /dev/ttyS3 115200; poweroff -f; }}
"""

# The kernel continues with what it could unpack (init/initramfs.c: do_populate_rootfs).
_CHECK = f"""
[ -e {COMPLETE} ] || die "the root file system is incomplete: the guest has too little memory to unpack it"
"""

_CHANNEL = """
control=
for tty in ttyS1 ttyS2 ttyS3; do
    [ -c /dev/$tty ] || die "no /dev/$tty in the guest: its kernel found no serial port there"
    stty -F /dev/$tty 115200 raw -echo || die "/dev/$tty cannot be set up"
done
exec 4>/dev/ttyS1 5>/dev/ttyS2 6>/dev/ttyS3
control=yes
"""

# A lockup or a hung task ends a guest that runs a command (Documentation/admin-guide/sysctl/kernel.rst); soft lockups
# are detected after twice the threshold. Parameters on the kernel's command line take precedence.
_STRICT = """
read -r cmdline </proc/cmdline
strict() {{
    case " $cmdline " in
    *" $1="*) ;;
    *) [ ! -w /proc/sys/kernel/$1 ] || echo $2 >/proc/sys/kernel/$1 ;;
    esac
}}
strict watchdog_thresh {threshold}; strict softlockup_panic 1; strict hung_task_panic 1
"""

# The parameters are one argument, which insmod passes on with its quotes.
_LOAD = """
load() {{
    message=$(insmod "/kvmpass/modules/$1.ko" ${{3:+"$3"}} 2>&1) || {{
        fail "module $1 did not load: ${{message##*: }}"
        [ -z "$2" ] || {{ dmesg | tail -n 20 >/dev/console; {on_failure}; }}
    }}
}}
"""

# Drivers may probe asynchronously (NVMe does), and an NVMe controller that is live adds its namespaces later: a block
# device below the controller, or (multipath) below its subsystem, so look in /dev.
_SETTLE = """
unsettled() {
    for device in /sys/bus/pci/devices/*; do
        [ -e "$device/vendor" ] || continue
        read -r vendor <"$device/vendor"; read -r model <"$device/device"; read -r class <"$device/class"
        case " $expected " in
        *" ${vendor#0x}:${model#0x} "*) [ -e "$device/driver" ] || return 0 ;;
        esac
        [ "$class" = 0x010802 ] && [ -e "$device/driver" ] || continue
        for state in "$device"/nvme/nvme*/state; do
            [ -e "$state" ] || return 0
            read -r word <"$state"
            case $word in
            live)
                live=${live:-$up}
                set -- /dev/nvme*n*
                [ -e "$1" ] || [ $up -ge $((live + NAMESPACE)) ] || return 0 ;;
            new | connecting | resetting) return 0 ;;
            esac
        done
    done
    return 1
}
now
end=$((up + SECONDS)); live=
while unsettled; do
    now
    [ $up -lt $end ] || { fail "${device##*/} is not ready after SECONDS seconds"; break; }
    usleep 50000
done
"""

_COMMAND = """
now
echo "kvmpass 1 ready $uptime" >&6
cd /root
sh /kvmpass/command </dev/null >&4 2>&5 4>&- 5>&- 6>&-
status=$?
# Setting a terminal's modes waits until what was written to it has been sent.
stty -F /dev/ttyS1 115200
stty -F /dev/ttyS2 115200
echo "kvmpass 1 exit $status" >&6
stty -F /dev/ttyS3 115200
poweroff -f
"""

_SHELL = """
exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty sane{size}
# The host sends each new size of the terminal: see kvmpass/guest/size.py.
[ ! -c /dev/ttyS3 ] || (
    stty -F /dev/ttyS3 115200 raw -echo || exit
    exec </dev/ttyS3 >/dev/ttyS3 2>/dev/null
    while echo "kvmpass 1 size" && read -r rows columns; do
        stty -F /dev/ttyS0 rows "$rows" cols "$columns"
    done
) &
cd /root
setsid cttyhack sh -l
poweroff -f
"""


def quote(word: str) -> str:
    """Quote ``word`` for a POSIX shell."""
    return "'" + word.replace("'", "'\\''") + "'"


def command_script(command: Sequence[str]) -> bytes:
    """Return a script that executes the command with these arguments, unchanged."""
    text = "exec " + " ".join(quote(word) for word in command) + "\n"
    return text.encode("utf-8", "surrogateescape")


def init_script(
    *,
    modules: Iterable[tuple[str, bool, str]],
    expected: Iterable[str],
    command: bool,
    term: str = "linux",
    size: tuple[int, int] = (24, 80),
) -> bytes:
    """Return ``/init``.

    ``modules``: of each its name, whether it is under test (its failure ends a run with a command), its parameters.
    ``expected``: ``vendor:device``, four hexadecimal digits each, of devices to wait for. ``size``: rows and columns
    of the interactive shell's terminal.
    """
    dimensions = f" rows {size[0]} cols {size[1]}"
    load = _LOAD.format(on_failure='die "the module under test is not usable"' if command else ":")
    loads = "".join(
        f"load {quote(name)} {quote('yes' if tested else '')} {quote(options)}\n" for name, tested, options in modules
    )
    parts = [
        _COMMON.format(path=PATH, term=quote(term), directory=DIRECTORY),
        _CHANNEL + _STRICT.format(threshold=WATCHDOG_SECONDS) if command else "\ncontrol=\n",
        _CHECK,
        load + loads if loads else "",
        f"\nexpected={quote(' '.join(expected))}\n",
        _SETTLE.replace("SECONDS", str(SETTLE_SECONDS)).replace("NAMESPACE", str(NAMESPACE_SECONDS)),
        _COMMAND if command else _SHELL.format(size=dimensions),
    ]
    return "".join(parts).encode("utf-8", "surrogateescape")
