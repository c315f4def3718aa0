#!/bin/busybox sh
# The emulated host's first process. It is started twice: from the initramfs, to mount the shared root, and in that
# root, to run one command and to report its exit status. All of it runs in busybox, because starting a program that
# needs libraries from the shared root is slow under emulation.

LAB=/run/kvmpass-lab

first_stage() {
    /bin/busybox --install -s /bin
    export PATH=/bin
    mount -t proc proc /proc
    mount -t sysfs sys /sys
    [ -e /dev/null ] || mount -t devtmpfs dev /dev
    for module in /mods/*.ko; do
        [ -f "$module" ] && insmod "$module"
    done
    mount -t 9p -o trans=virtio,version=9p2000.L,ro,msize=512000,cache=loose root /ro || poweroff -f
    mount -t tmpfs tmpfs /rw && mkdir /rw/upper /rw/work
    mount -t overlay -o lowerdir=/ro,upperdir=/rw/upper,workdir=/rw/work overlay /newroot || poweroff -f
    mkdir -p /newroot/proc /newroot/sys /newroot/dev /newroot/run /newroot/tmp
    mount -t tmpfs -o mode=755 tmpfs /newroot/run
    cp -a /lab /newroot"$LAB" && cp -a /bin /init /newroot"$LAB"
    for place in proc sys dev; do mount -o move /$place /newroot/$place; done
    exec switch_root /newroot "$LAB/bin/busybox" sh "$LAB/init" second
}

port() {
    for entry in /sys/class/virtio-ports/*; do
        read -r name < "$entry/name" && [ "$name" = "$1" ] && echo "/dev/${entry##*/}" && return
    done
    return 1
}

wait_until() { # SECONDS COMMAND…
    tries=$(($1 * 20)); shift
    while ! "$@"; do
        [ $((tries -= 1)) -gt 0 ] || return 1
        usleep 50000
    done
}

mount_all() {
    mkdir -p /dev/pts /dev/shm
    mount -t devpts -o mode=620,ptmxmode=666 devpts /dev/pts
    mount -t tmpfs tmpfs /dev/shm
    ln -s /proc/self/fd /dev/fd; ln -s fd/0 /dev/stdin; ln -s fd/1 /dev/stdout; ln -s fd/2 /dev/stderr
    mount -t debugfs debugfs /sys/kernel/debug
    mount -t tracefs tracefs /sys/kernel/tracing
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
    # kvmpass's state directory is about the machine's own devices: unused here, and not readable for every user.
    mkdir -p /var/lib/kvmpass
    mount -t tmpfs -o mode=755 kvmpass /var/lib/kvmpass
    number=0
    while read -r directory; do
        mkdir -p "$directory"
        mount -t 9p -o trans=virtio,version=9p2000.L,msize=512000,cache=none "writable$number" "$directory"
        number=$((number + 1))
    done < "$LAB/writable"
}

# Put the kernel's files where Debian has them.
place_kernel() {
    release=$(uname -r)
    mkdir -p /boot "/lib/modules/$release"
    : > "/boot/vmlinuz-$release" && mount -o bind "$KERNEL_IMAGE" "/boot/vmlinuz-$release"
    [ -z "$KERNEL_CONFIG" ] || { : > "/boot/config-$release" && mount -o bind "$KERNEL_CONFIG" "/boot/config-$release"; }
    [ -z "$KERNEL_MODULES" ] || mount -o bind "$KERNEL_MODULES" "/lib/modules/$release"
}

# Load the driver of each device, as udev does on a real host.
load_drivers() {
    [ -s "/lib/modules/$(uname -r)/modules.dep" ] || return
    modprobe=/sbin/modprobe
    [ -x $modprobe ] || modprobe=/usr/sbin/modprobe
    # One process for all, because it reads the module index once. By its path, because busybox would prefer its own.
    $modprobe -qab vfio-pci kvm_amd $(cat /sys/bus/pci/devices/*/modalias | sort -u)
    # By now disks and virtio devices have been found. A USB stick has not: its drivers are loaded for it in advance.
    behind=$(for device in /sys/bus/scsi/devices/* /sys/bus/virtio/devices/*; do
        [ -e "$device/driver" ] || cat "$device/modalias"
    done)
    ! grep -q ^0x0c03 /sys/bus/pci/devices/*/class || behind="$behind usb_storage sd_mod"
    [ -z "$behind" ] || $modprobe -qab $behind
}

drives_are_there() {
    for drive in /sys/bus/pci/drivers/nvme/*:*; do
        [ -e "$drive" ] || continue
        set -- "$drive"/nvme/nvme*/nvme*n*
        [ -e "$1" ] || return 1
    done
}

run_command() {
    if [ "$INPUT" = tty ]; then
        wait_until 10 test -c /dev/hvc0
        while read -r size; do stty -F /dev/hvc0 $size; done < "$(port kvmpass.in)" &
        # The size is lost when the terminal is closed: set it while it is open.
        setsid -c /usr/bin/env --default-signal sh -c "stty $TERMINAL_SIZE; exec sh $LAB/command" < /dev/hvc0 > /dev/hvc0 2>&1 3>&- &
        wait $!
        return
    fi
    input=/dev/null
    [ "$INPUT" = null ] || input=$(port kvmpass.in)
    # Pipes, because a port can be opened only once, and a command may open its /dev/stdout again.
    mkfifo "$LAB/out" "$LAB/err"
    cat < "$LAB/out" > "$(port kvmpass.out)" & out=$!
    cat < "$LAB/err" > "$(port kvmpass.err)" & err=$!
    # Without --default-signal a background process of a shell ignores SIGINT.
    setsid /usr/bin/env --default-signal sh "$LAB/command" < "$input" > "$LAB/out" 2> "$LAB/err" 3>&- &
    wait $!
    code=$?
    end_stragglers
    wait $out $err
    return $code
}

# Kill processes that the command started and that still run: they would keep its pipes open.
end_stragglers() {
    for process in /proc/[0-9]*; do
        id=${process#/proc/}
        case $id in 1 | "$out" | "$err") continue ;; esac
        [ -e "$process/exe" ] && kill -9 "$id"
    done
}

# The number of bytes that a port has sent: the process outside waits for them.
sent() {
    device=$(port "$1") || { echo 0; return; }
    count=$(sed -n 's/^bytes_sent: //p' "/sys/kernel/debug/virtio-ports/${device##*/}")
    echo "${count:-unknown}"
}

second_stage() {
    . "$LAB/settings"
    export PATH="$LAB/bin"
    exec 2> /dev/ttyS0
    mount_all 2> /dev/null
    hostname kvmpass-lab
    ip link set lo up
    place_kernel
    load_drivers 2> /dev/null
    [ ! -e /dev/vfio/vfio ] || chmod 666 /dev/vfio/vfio
    wait_until 10 drives_are_there
    for wanted in $PORTS; do wait_until 10 port "$wanted" > /dev/null; done
    exec 3<> "$(port kvmpass.status)"
    echo ready >&3
    # The process outside may still refuse this host.
    read -r answer <&3
    [ "$answer" = go ] || poweroff -f
    run_command
    code=$?
    sync
    echo "exit $code $(sent kvmpass.out) $(sent kvmpass.err)" >&3
    sleep 60
    poweroff -f
}

if [ "$1" = second ]; then second_stage; else first_stage; fi
