#!/bin/bash
# Make this machine a runner for tests/amdvi on real hardware, or say what keeps it from being one.
# usage: scripts/setup-runner.sh [--user USER]     as root; USER: the runner's account, which gets sudo for the tests
# It can be run again. It changes: Debian packages, /etc/modules-load.d, /etc/security/limits.d, /etc/sudoers.d.
set -euo pipefail

user=
while [ $# -gt 0 ]; do
    case $1 in
        --user) user=${2:?--user needs a name}; shift 2 ;;
        -h | --help) sed -n '2,4s/^# //p' "$0"; exit ;;
        *) echo "unknown argument: $1" >&2; exit 2 ;;
    esac
done
[ "$(id -u)" = 0 ] || { echo "run it as root" >&2; exit 2; }
if [ -n "$user" ] && ! id "$user" > /dev/null 2>&1; then
    echo "there is no account $user" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."

problems=0
problem() {
    echo "PROBLEM: $1" >&2
    problems=$((problems + 1))
}

echo "packages"
command -v make > /dev/null || apt-get install -q=2 -y --no-install-recommends make > /dev/null
make deps

echo "modules"
printf '%s\n' kvm_amd vfio-pci > /etc/modules-load.d/kvmpass.conf
for module in kvm_amd vfio-pci; do
    modprobe "$module" || problem "the module $module cannot be loaded"
done

echo "limits"
cat > /etc/security/limits.d/kvmpass.conf <<'LIMITS'
# Guest memory is pinned while a device can reach it.
root - memlock unlimited
root - nofile 65536
LIMITS

if [ -n "$user" ]; then
    echo "sudo for $user"
    file=/etc/sudoers.d/kvmpass-runner
    draft=$(mktemp)
    echo "$user ALL=(root) NOPASSWD:SETENV: ALL" > "$draft"
    command -v visudo > /dev/null || { problem "sudo is not installed"; rm -f "$draft"; draft=; }
    if [ -n "$draft" ]; then
        visudo -q -c -f "$draft"
        install -m 440 "$draft" "$file"
        rm -f "$draft"
    fi
fi

echo "host"
grep -qw svm /proc/cpuinfo || problem "no AMD-V: switch SVM on in the firmware"
grep -qw npt /proc/cpuinfo || problem "no nested paging"
[ -e /dev/kvm ] || problem "no /dev/kvm"
compgen -G "/sys/class/iommu/ivhd*" > /dev/null || problem "no AMD-Vi: switch the IOMMU on in the firmware"
dmesg 2> /dev/null | grep -qi "AMD-Vi: Interrupt remapping enabled" \
    || echo "note: the kernel's log does not (or no longer) say that interrupts are remapped; the tests check it"

echo
echo "devices that are alone in their IOMMU group:"
for path in /sys/bus/pci/devices/*; do
    [ -e "$path/iommu_group" ] || continue
    members=("$path"/iommu_group/devices/*)
    [ "${#members[@]}" = 1 ] || continue
    case $(cat "$path/class") in 0x06*) continue ;; esac
    driver=none
    [ -e "$path/driver" ] && driver=$(basename "$(readlink "$path/driver")")
    printf '  %s  class %s  driver %-12s %s\n' "${path##*/}" "$(cat "$path/class")" "$driver" \
        "$(lspci -s "${path##*/}" | cut -d' ' -f2-)"
done
cat <<'NEXT'

Next: give the ones that the host can spare to the tests, as variables of the repository (KVMPASS_TEST_NVME,
KVMPASS_TEST_NIC, …: a PCI address each), set KVMPASS_HARDWARE=1 there, and register the runner with the labels
self-hosted and amd-vi.
NEXT
[ "$problems" = 0 ] || { echo "$problems problem(s), see above" >&2; exit 1; }
