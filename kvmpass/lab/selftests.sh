#!/bin/sh
# Run the kernel's VFIO selftests in the emulated host, as its kselftest/runner.sh does: selftests.sh DIRECTORY SECONDS
# NAME=ID[,ID]…, where an ID (0xVENDOR:0xDEVICE) stands for the first PCI function that has it. Prints TAP.

directory=$1 seconds=$2
shift 2

bind_to_vfio() { # BDF
    device=/sys/bus/pci/devices/$1
    case $(readlink "$device/driver") in */vfio-pci) return ;; esac
    [ ! -e "$device/driver" ] || echo "$1" > "$device/driver/unbind"
    echo vfio-pci > "$device/driver_override"
    echo "$1" > /sys/bus/pci/drivers_probe
}

find_function() { # ID
    for device in /sys/bus/pci/devices/*; do
        read -r vendor < "$device/vendor"
        read -r model < "$device/device"
        [ "$vendor:$model" != "$1" ] || { echo "${device##*/}"; return; }
    done
}

status=$(mktemp)
echo "TAP version 13"
echo "1..$#"
number=0
for test; do
    name=${test%%=*} number=$((number + 1)) functions=
    for id in $(echo "${test#*=}" | tr , ' '); do
        function=$(find_function "$id")
        [ -n "$function" ] || continue
        bind_to_vfio "$function"
        functions="$functions $function"
    done
    title="selftests: vfio: $name"
    echo "# $title$functions"
    # Line-buffered, so that each line appears when it is written. The list of functions is split on purpose.
    { timeout "$seconds" stdbuf -oL "$directory/$name" $functions 2>&1; echo $? > "$status"; } | sed -u 's/^/# /'
    read -r code < "$status"
    case $code in
        0) echo "ok $number $title" ;;
        4) echo "ok $number $title # SKIP" ;;
        124) echo "not ok $number $title # TIMEOUT $seconds seconds" ;;
        *) echo "not ok $number $title # exit=$code" ;;
    esac
done
