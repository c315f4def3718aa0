"""Excerpts of consoles, from the crash on."""

from __future__ import annotations

import pytest

from kvmpass.crash import excerpt, find

BOOT = [f"[    0.{number:06}] line {number} of the boot" for number in range(300)]
OOPS = [
    "[    2.500000] BUG: kernel NULL pointer dereference, address: 0000000000000000",
    "[    2.500001] #PF: supervisor write access in kernel mode",
    "[    2.500002] Oops: Oops: 0002 [#1] PREEMPT SMP NOPTI",
    "[    2.500003] RIP: 0010:probe+0x10/0x20 [bad]",
    *(f"[    2.6{number:05}]  frame {number}" for number in range(40)),
    "[    2.700000] Kernel panic - not syncing: Fatal exception",
]


def test_the_oops_comes_before_the_panic() -> None:
    shown = excerpt("\r\n".join([*BOOT, *OOPS]))
    assert shown == OOPS


def test_a_bug_begins_at_its_cut_line() -> None:
    cut = ["------------[ cut here ]------------", "kernel BUG at drivers/bad.c:7!", "invalid opcode: 0000 [#1]"]
    assert excerpt("\n".join([*BOOT, *cut])) == cut


@pytest.mark.parametrize(
    "line",
    [
        "watchdog: BUG: soft lockup - CPU#0 stuck for 26s! [insmod:77]",
        "INFO: task insmod:77 blocked for more than 120 seconds.",
        "rcu: INFO: rcu_sched detected stalls on CPUs/tasks:",
        "general protection fault, probably for non-canonical address 0xdead: 0000 [#1] SMP",
        "watchdog: Watchdog detected hard LOCKUP on cpu 0",
        "Kernel panic - not syncing: VFS: Unable to mount root fs on unknown-block(0,0)",
        "Oops: divide error: 0000 [#1] SMP",
    ],
)
def test_each_kind_of_crash(line: str) -> None:
    end = [f"[   30.1] {line}", "[   30.2] the end"]
    assert excerpt("\n".join([*BOOT, *end])) == end


def test_a_crash_takes_precedence_over_a_warning() -> None:
    warning = ["------------[ cut here ]------------", "WARNING: CPU: 0 PID: 1 at arch/x86/xstate.c:500 init+0x1"]
    assert excerpt("\n".join([*BOOT, *warning, "on it goes"])) == [*warning, "on it goes"]
    assert excerpt("\n".join([*warning, *BOOT, *OOPS])) == OOPS


def test_without_a_crash_the_last_lines() -> None:
    assert excerpt("\n".join(BOOT)) == BOOT[-20:]
    assert excerpt("") == []
    assert find(["debug: no oops here", "a BUGGY: line", "WARNING is a word"]) is None


def test_lines_in_the_middle_are_left_out() -> None:
    """The beginning has the cause, the end the latest state."""
    shown = excerpt("\n".join([*BOOT, *OOPS, *BOOT]), limit=50)
    assert len(shown) == 50
    assert shown[:3] == OOPS[:3]
    assert shown[-1] == BOOT[-1]
    assert f"[{len(OOPS) + len(BOOT) - 37 - 12} lines left out]" in shown
