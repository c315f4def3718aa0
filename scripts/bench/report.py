"""What ``make bench`` makes of its samples: ratios with quartiles, tables, pictures."""

from __future__ import annotations

import re
import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import escape

SUBJECT = "kvmpass"
ATTACHED, BOUND = "process start to attached, 256 MiB, s", "lower bound of process start to attached, s"
PASS, IMPORT = "python -c pass", "import click"
"""Programs in ``BOUND``."""
GOALS: Mapping[tuple[str, str], float] = MappingProxyType(
    {
        ("first process of the guest, s", "QEMU"): 0.65,
        ("configuration space, each exit, us", "QEMU"): 2.0,
        (ATTACHED, "QEMU"): 1.25,
        ("process start to attached, 2048 MiB, s", "QEMU"): 1.05,
        ("user CPU until the first KVM_RUN, ms", "import click"): 4.0,
        ("CPU of --help, ms", "import click"): 1.3,
        ("CPU of list, ms", "import click"): 3.0,
        **{
            (f"Machine.assign, {size} MiB, {backend}, s", "C"): 1.05
            for size in (1024, 2048)
            for backend in ("type1", "iommufd")
        },
        # A rate of 0.9 is a time of 1.11.
        ("drive, 64 MiB in sequence, s", "QEMU"): 1.11,
        ("network, 4 MiB from the guest, s", "QEMU"): 1.11,
        ("network, 48 MiB to the guest, s", "QEMU"): 1.11,
    }
)
"""The largest ratio that is aimed at, by row and peer."""
MEASURED: Mapping[str, str] = MappingProxyType(
    {
        "layers": "one ioctl through each layer",
        "calls": "the ioctls of an assignment, counted once",
        "memory": "memory of a running guest",
        "commands": "CPU time of `--help` and `list`",
        "sessions": "commands in guests that stay",
        "start": "until the first KVM_RUN, 64 MiB: time and CPU time",
        "spans": "`Machine.assign`, further devices",
        "processes": "until attached, and until the first KVM_RUN with more memory",
        "guests": "boots, data, interrupts, output",
        "parallel": "as `processes`, in an emulated host with two CPUs, while no other runs",
        "trees": "`list` on made-up hosts, where `make bench` runs",
    }
)
"""The sections."""
BEGIN, END = "<!-- begin: bench -->", "<!-- end: bench -->"
WIDTH, BAR, LEFT = 900, 18, 440
COLOURS = ("#4878a8", "#a8b8c8", "#d8a048", "#78a878", "#a07898", "#888888")
STAGES = "stages until attached, "
"""Begins the names of counts that are stages."""
LONGEST = 6.0
"""The ratio at which a bar is cut."""


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> list[dict[str, Any]]:
    """Return for each row and peer the ratio of medians, and the quartiles of both."""
    rows = []
    for row, programs in samples.items():
        if SUBJECT not in programs:
            continue
        own = quartiles(programs[SUBJECT])
        for peer, values in programs.items():
            if peer != SUBJECT:
                theirs = quartiles(values)
                ratio = round(own[1] / theirs[1], 3) if theirs[1] else None
                rounds = min(len(programs[SUBJECT]), len(values))
                found = {"row": row, "peer": peer, "ratio": ratio, "goal": GOALS.get((row, peer)), "rounds": rounds}
                rows.append({**found, SUBJECT: own, "peer_quartiles": theirs})
    return rows


def text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table."""
    lines = [f"{'ratio':>6}  {'goal':>5}  {'kvmpass':>9}  {'peer':>9}"]
    for row in rows:
        own, theirs = row[SUBJECT][1], row["peer_quartiles"][1]
        lines.append(
            f"{_number(row['ratio']):>6}  {_number(row['goal']):>5}  {own:9.4g}  {theirs:9.4g}  "
            f"{row['row']} / {row['peer']}"
        )
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table of a Markdown document."""
    lines = ["| row | peer | ratio | goal | kvmpass: median, quartiles | peer: median, quartiles | rounds |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        goal = f"≤ {row['goal']:.2f}" if row["goal"] else ""
        if goal and row["ratio"] is not None and row["ratio"] > row["goal"]:
            goal += ", missed"
        both = f"{_spread(row[SUBJECT])} | {_spread(row['peer_quartiles'])}"
        number = _number(row["ratio"])
        lines.append(f"| {row['row']} | {row['peer']} | {number} | {goal} | {both} | {row['rounds']} |")
    return "\n".join(lines)


def _spread(values: Sequence[float]) -> str:
    low, middle, high = (f"{value:.0f}" if value >= 1000 else f"{value:.3g}" for value in values)
    return f"{middle} ({low}–{high})"


def counts_table(phases: Mapping[str, Mapping[str, Mapping[str, int]]]) -> str:
    """Return KVM's counts of each phase as a table of a Markdown document."""
    names = ("exits to user space", "of them ports", "of them MMIO", "exits to KVM", "MSIs")
    lines = ["| phase | program | " + " | ".join(names) + " |", "|---" * (2 + len(names)) + "|"]
    for phase, programs in phases.items():
        for program, counts in programs.items():
            values = " | ".join(str(counts[name]) for name in names)
            lines.append(f"| {phase} | {program} | {values} |")
    return "\n".join(lines)


def ioctls_table(found: Mapping[str, Any], reasons: Mapping[str, str]) -> str:
    """Return the calls that attach the first and second device as a table of a Markdown document."""
    lines = []
    for backend, programs in found.items():
        lines += [f"| {backend} | first device | C | second device | C | why |", "|---" * 6 + "|"]
        columns = [
            programs[program][step] for step in ("first device", "second device") for program in (SUBJECT, "C")
        ]
        for name in dict.fromkeys(name for column in (columns[1], columns[0], *columns[2:]) for name in column):
            values = " | ".join(str(column.get(name, "")) for column in columns)
            lines.append(f"| `{name}` | {values} | {reasons.get(name, '')} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def stages_table(counts: Mapping[str, Any]) -> str:
    """Return the stages until the device is attached, medians of all runs, as a table of a Markdown document."""
    columns = {name.removeprefix(STAGES): runs for name, runs in counts.items() if name.startswith(STAGES)}
    if not columns:
        return "not measured"
    lines = ["| stage | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name in dict.fromkeys(stage["name"] for runs in columns.values() for run in runs for stage in run):
        cells = [
            _stage([stage for run in runs for stage in run if stage["name"] == name]) for runs in columns.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    totals = [
        _stage([{key: sum(stage[key] for stage in run) for key in ("seconds", "cpu_seconds")} for run in runs])
        for runs in columns.values()
    ]
    return "\n".join([*lines, f"| **all** | {' | '.join(totals)} |"])


def _stage(found: Sequence[Mapping[str, float]]) -> str:
    seconds, cpu = (statistics.median([stage[key] for stage in found] or [0]) for key in ("seconds", "cpu_seconds"))
    return f"{seconds:.2f} ({cpu:.2f})"


def bound_table(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Return the least that a command of Python with click can take, as a table of a Markdown document."""
    if BOUND not in samples or not {SUBJECT, "QEMU", "C"} <= samples.get(ATTACHED, {}).keys():
        return "not measured"
    middle = {name: quartiles(values)[1] for name, values in {**samples[BOUND], **samples[ATTACHED]}.items()}
    seconds = {
        f"`{PASS}`": middle[PASS],
        f"`{IMPORT}`, Python included": middle[IMPORT],
        "C: populate and map 256 MiB, open the device, which resets it": middle["C"],
        f"**`{IMPORT}`, then C: the lower bound**": middle[IMPORT] + middle["C"],
        "kvmpass": middle[SUBJECT],
        "QEMU": middle["QEMU"],
    }
    lines = ["| 256 MiB, one CPU | seconds | × QEMU |", "|---|---|---|"]
    return "\n".join([*lines, *(f"| {name} | {s:.2f} | {s / middle['QEMU']:.2f} |" for name, s in seconds.items())])


def instructions_table(parts: Mapping[str, tuple[int, int, int]]) -> str:
    """Return what each part adds to those before, as a table of a Markdown document.

    Of each: instructions, modules, and modules of kvmpass among them, with those of the parts before it.
    """
    lines = [
        "| what is imported | million instructions | with those above | modules | of kvmpass |",
        "|---" * 5 + "|",
    ]
    before = (0, 0, 0)
    for name, total in parts.items():
        count, modules, own = (now - then for now, then in zip(total, before, strict=True))
        lines.append(f"| {name} | {count / 1e6:.0f} | {total[0] / 1e6:.0f} | {modules} | {own} |")
        before = total
    return "\n".join(lines)


def conditions(found: Mapping[str, Any]) -> str:
    """Return how often and where the published results were measured, and the note on them, if they have one."""
    rounds = [row["rounds"] for row in found["rows"]] or [found["rounds"]]
    least, most = min(rounds), max(rounds)
    lines = [f"Rounds: {most if least == most else f'{least} to {most}'}; CPUs of the machine: {found['cpus']}"]
    for number, names in enumerate(found["hosts"], 1):
        lines.append(f"emulated host {number}: {', '.join(f'`{name}`' for name in names)}")
    if found["at_once"] > 1:
        lines.append("hosts 1 and 2 at the same time")
    if replaced := sum(found.get("replaced", {}).values()):
        lines.append(f"emulated hosts that ended by a fault of the emulator, and were replaced: {replaced}")
    if repeated := found.get("repeated"):
        where = ", ".join(f"{len(reasons)} in `{name}`" for name, reasons in repeated.items())
        lines.append(f"measurements that failed or hung, and were repeated: {where}")
    paragraphs = ["; ".join(lines) + ".", *([found["note"]] if "note" in found else [])]
    return "\n\n".join(textwrap.fill(text, 118, break_on_hyphens=False) for text in paragraphs)


def sections_table(seconds: Mapping[str, float]) -> str:
    """Return what each section measures, and how long it took, as a table of a Markdown document."""
    lines = ["| section | what is measured | seconds, all rounds |", "|---" * 3 + "|"]
    for name, what in MEASURED.items():
        lines.append(f"| `{name}` | {what} | {f'{seconds[name]:.0f}' if name in seconds else ''} |")
    return "\n".join(lines)


def document(shown: str, blocks: Mapping[str, str]) -> str:
    """Return a Markdown document with what is between its marks replaced: ``<!-- begin: bench NAME -->``."""
    for name, block in blocks.items():
        begin, end = (mark.replace("bench", f"bench {name}") for mark in (BEGIN, END))
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        shown = pattern.sub(lambda _, whole=f"{begin}\n{block}\n{end}": whole, shown)  # type: ignore[misc]
    return shown


# --- pictures


def picture(parts: Sequence[str], height: float) -> str:
    """Return an SVG document."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height:.0f}" font-family="sans-serif"'
    return f'{head} font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"


def bars(rows: Sequence[Mapping[str, Any]]) -> str:
    """Draw a bar for each ratio, with a line at 1, and a mark at each goal."""
    rows = [row for row in rows if row["ratio"] is not None]
    scale = (WIDTH - LEFT - 60) / max(2.0, *(min(row["ratio"], LONGEST) for row in rows), 0)
    parts, y = [], 30
    for row in rows:
        width = min(row["ratio"], LONGEST) * scale
        label = escape(f"{row['row']} / {row['peer']}")
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 4}" fill="{COLOURS[0]}"/>')
        parts.append(f'<text x="{LEFT + width + 5:.1f}" y="{y + 12}">{row["ratio"]:.2f}</text>')
        if row["goal"]:
            x = LEFT + row["goal"] * scale
            parts.append(f'<rect x="{x - 1:.1f}" y="{y - 1}" width="2" height="{BAR - 2}" fill="{COLOURS[2]}"/>')
        y += BAR
    line = LEFT + scale
    parts.append(f'<line x1="{line:.1f}" y1="22" x2="{line:.1f}" y2="{y}" stroke="#c03030"/>')
    parts.append(f'<text x="{line:.1f}" y="18" text-anchor="middle">1: as long as the peer; ▮ goal</text>')
    return picture(parts, y + 10)


def timeline(runs: Mapping[str, Mapping[str, Any]]) -> str:
    """Draw the stages of one run of each program, on one scale."""
    scale = (WIDTH - 96) / max(run["seconds"] for run in runs.values())
    parts, y = [], 10
    for program, run in runs.items():
        parts.append(f'<text x="8" y="{y + 15}">{escape(program)}</text>')
        x, row = 80.0, y + 40
        for number, stage in enumerate(run["stages"]):
            width, colour = scale * stage["seconds"], COLOURS[number % len(COLOURS)]
            parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>')
            exits = f", {stage['exits']} exits" if "exits" in stage else ""
            name = escape(f"{stage['name']}: {stage['seconds']:.2f} s{exits}")
            parts.append(f'<rect x="80" y="{row - 10}" width="10" height="10" fill="{colour}"/>')
            parts.append(f'<text x="96" y="{row}">{name}</text>')
            x, row = x + width, row + BAR
        y = row + 10
    return picture(parts, y)


def growth(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Draw how the rows grow that differ in a size or a number: medians over it, a curve for each program."""
    charts: dict[tuple[str, str], dict[str, list[tuple[float, float]]]] = defaultdict(lambda: defaultdict(list))
    for row, programs in samples.items():
        if found := re.fullmatch(r"(.*?)(\d+) (MiB|functions)(, .*)", row):
            before, number, unit, after = found.groups()
            for program, values in programs.items():
                charts[before.rstrip(", ") + after, unit][program].append((float(number), quartiles(values)[1]))
    parts, y = [], 0
    for (title, unit), curves in charts.items():
        if max(map(len, curves.values())) > 1:
            parts += _chart(f"{title}, over {unit}", curves, y)
            y += 220
    return picture(parts, y + 10)


def _chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]], top: float) -> list[str]:
    left, width, height = 70, 560, 150
    most_x = max(x for curve in curves.values() for x, _ in curve)
    most_y = max(y for curve in curves.values() for _, y in curve) or 1.0
    base = top + 30 + height
    parts = [f'<text x="{left}" y="{top + 20}">{escape(title)}</text>']
    parts.append(f'<path d="M{left},{top + 30} V{base} H{left + width}" fill="none" stroke="#888888"/>')
    parts.append(f'<text x="{left - 6}" y="{top + 38}" text-anchor="end">{most_y:.3g}</text>')
    for x in sorted({x for curve in curves.values() for x, _ in curve}):
        place = left + width * x / most_x
        parts.append(f'<text x="{place:.1f}" y="{base + 14}" text-anchor="middle">{x:.0f}</text>')
    for number, (program, curve) in enumerate(curves.items()):
        colour = COLOURS[(0, 2, 3, 4)[number % 4]]
        points = [(left + width * x / most_x, base - height * y / most_y) for x, y in sorted(curve)]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in points]
        label = top + 40 + BAR * number
        parts.append(f'<rect x="{left + width + 30}" y="{label - 10}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{left + width + 46}" y="{label}">{escape(program)}</text>')
    return parts
