#!/usr/bin/busybox sh
# The guest's init, once file systems are mounted (cffi_build/agent/init.c): load modules, wait for drivers, run a
# command or a shell, power off. Other files in /kvmpass are made for each guest (kvmpass/initramfs): settings, load, and
# command if there is one.

SETTLE_SECONDS=20 # of the guest's time, for a driver to bind to its device
PORT_SECONDS=5 # from the console's driver to its port
NAMESPACE_SECONDS=5 # from a live NVMe controller to its namespaces, if it has any

export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
. /kvmpass/settings
export TERM

# Without a process, where busybox has FEATURE_SH_READ_FRAC: what is waited for may need the guest's one CPU.
if read -t 0.02 nothing </kvmpass/settings 2>/dev/null; then
    pause() { read -t 0.02 nothing <>/kvmpass/never; }
else
    pause() { usleep 20000 2>/dev/null || sleep 1; }
fi
now() { read -r uptime rest </proc/uptime; up=${uptime%.*}; }
say() { echo "kvmpass: $*" >/dev/console; }
fail() { say "$*"; report_failure "$*"; }
die() {
    fail "$*"
    [ -z "$COMMAND" ] || [ -n "$opening" ] || open_channels
    [ -z "$port" ] || become_agent -
    finish
}
finish() { [ -z "$control" ] || drain ttyS3; poweroff -f; }
drain() { stty -F /dev/$1 115200; } # setting a terminal's modes waits until what was written to it has been sent

# Failures before the channels are open are reported once they are; to the agent's port by the agent.
failures=; control=
report() { echo "kvmpass 1 $*" >&6; }
report_failure() {
    if [ -n "$control" ]; then report "error $*"; else failures="$failures$*
"; fi
}

# The channels: a port of a virtio console if the kernel has its driver, else serial ports.
opening=; port=
open_channels() {
    opening=yes
    find_port && return
    [ -z "$AGENT" ] || die "$AGENT needs a kernel with CONFIG_VIRTIO_CONSOLE and CONFIG_VIRTIO_PCI"
    for tty in ttyS1 ttyS2 ttyS3; do
        [ -c /dev/$tty ] || die "no /dev/$tty in the guest: its kernel found no serial port there"
        stty -F /dev/$tty 115200 raw -echo || die "/dev/$tty cannot be set up"
    done
    exec 4>/dev/ttyS1 5>/dev/ttyS2 6>/dev/ttyS3
    control=yes
    while read -r line; do [ -z "$line" ] || report_failure "$line"; done <<EOF
$failures
EOF
}
find_port() {
    set -- /sys/bus/virtio/drivers/virtio_console/virtio*
    [ -e "$1" ] || return
    now
    end=$((up + PORT_SECONDS))
    while :; do
        for directory in /sys/class/virtio-ports/*; do
            [ -e "$directory/name" ] || continue
            read -r name <"$directory/name"
            [ "$name" != "$PORT" ] || { port=/dev/${directory##*/}; return 0; }
        done
        now
        [ $up -lt $end ] || { say "no port of the agent after $PORT_SECONDS seconds"; return 1; }
        pause
    done
}
# It runs what the host starts, and powers off when the host lets it: see cffi_build/agent.
become_agent() { # [-]
    IFS='
'
    set -f
    exec /kvmpass/agent "$@" $failures <>$port
}

run_on_serial() {
    sh /kvmpass/command </dev/null >&4 2>&5 4>&- 5>&- 6>&-
    status=$?
    drain ttyS1
    drain ttyS2
    report "exit $status"
}

# Parameters on the kernel's command line take precedence.
set_sysctl() { # NAME VALUE
    read -r cmdline </proc/cmdline
    case " $cmdline " in
    *" $1="*) ;;
    *) [ ! -w "/proc/sys/kernel/$1" ] || echo "$2" >"/proc/sys/kernel/$1" ;;
    esac
}

if [ -n "$COMMAND" ]; then
    # A lockup or a hung task ends the guest (Documentation/admin-guide/sysctl/kernel.rst); soft lockups are detected
    # after twice the threshold.
    set_sysctl watchdog_thresh 20
    set_sysctl softlockup_panic 1
    set_sysctl hung_task_panic 1
fi

# The kernel continues with what it could unpack (init/initramfs.c: do_populate_rootfs).
[ -e /kvmpass/complete ] || die "the root file system is incomplete: the guest has too little memory to unpack it"

# The parameters are one argument, which insmod passes on with its quotes.
load() { # MODULE UNDER-TEST PARAMETERS
    message=$(insmod "/kvmpass/modules/$1.ko" ${3:+"$3"} 2>&1) && return
    fail "module $1 did not load: ${message##*: }"
    [ -n "$2" ] || return
    dmesg | tail -n 20 >/dev/console
    [ -z "$COMMAND" ] || die "the module under test is not usable"
}
. /kvmpass/load
[ -z "$COMMAND" ] || open_channels
# Directories of the host: see kvmpass/initramfs/served.py.
mount_all() { # FSTAB
    message=$(mount -a -T "$1" 2>&1) ||
        die "the host's files were not mounted: ${message##*mount: } (needs CONFIG_VIRTIO_FS and CONFIG_OVERLAY_FS)"
}
[ -z "$MOUNTS" ] || . /kvmpass/mounts

# Drivers may probe asynchronously (NVMe does), and an NVMe controller that is live adds its namespaces later: a block
# device below the controller, or (multipath) below its subsystem, so look in /dev.
unsettled() {
    for device in /sys/bus/pci/devices/*; do
        [ -e "$device/vendor" ] || continue
        read -r vendor <"$device/vendor"; read -r model <"$device/device"; read -r class <"$device/class"
        case " $EXPECTED " in
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
                [ -e "$1" ] || [ $up -ge $((live + NAMESPACE_SECONDS)) ] || return 0 ;;
            new | connecting | resetting) return 0 ;;
            esac
        done
    done
    return 1
}
now
end=$((up + SETTLE_SECONDS)); live=
while unsettled; do
    now
    [ $up -lt $end ] || { fail "${device##*/} is not ready after $SETTLE_SECONDS seconds"; break; }
    pause
done

if [ -n "$COMMAND" ]; then
    cd /root
    [ -z "$port" ] || become_agent
    now
    report "ready $uptime"
    run_on_serial
    finish
fi

exec </dev/ttyS0 >/dev/ttyS0 2>&1
stty sane $TERMINAL_SIZE
# The host sends each new size of the terminal: see kvmpass/guest/size.py.
[ ! -c /dev/ttyS3 ] || (
    stty -F /dev/ttyS3 115200 raw -echo || exit
    exec </dev/ttyS3 >/dev/ttyS3 2>/dev/null
    while echo "kvmpass 1 size" && read -r rows columns; do
        stty -F /dev/ttyS0 rows "$rows" cols "$columns"
    done
) &
cd /root
setsid cttyhack sh ${SHELL_SCRIPT:--l}
poweroff -f
