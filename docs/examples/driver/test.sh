#!/bin/sh
# In the guest: factorials by the device, and in /tmp/results what one wants to read afterwards.
mkdir /tmp/results
trap 'dmesg >/tmp/results/dmesg; cat /proc/interrupts >/tmp/results/interrupts' EXIT
cd /sys/bus/pci/drivers/factorial/*:*:*.* || exit 1
for number in 1 5 12; do
    echo $number >factorial || exit 1
    echo "$number! = $(cat factorial)" | tee -a /tmp/results/factorials
done
