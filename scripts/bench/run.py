"""``make bench``: kvmpass, QEMU's vfio-pci and the least that C needs, in the same boot of the emulated host.

Writes ``docs/bench.json`` (all samples, and the exits of a guest) and ``docs/bench.svg``. Times in an emulated host
are counts of instructions rather than nanoseconds: the ratios count. On a host with an AMD IOMMU, as root:
``run.py --here``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from kvmpass.lab import Lab, LabConfig

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
SUBJECT = "kvmpass"
WIDTH, BAR, LEFT = 900, 18, 420
COLOURS = ("#4878a8", "#a8b8c8", "#d8a048", "#78a878", "#a07898", "#888888")


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return lower quartile, median and upper quartile."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def summary(samples: dict[str, dict[str, list[float]]]) -> list[dict[str, Any]]:
    """Return for each row and peer the ratio of medians, and the quartiles of both."""
    rows = []
    for row, programs in samples.items():
        own = quartiles(programs[SUBJECT])
        for peer, values in programs.items():
            if peer != SUBJECT:
                theirs = quartiles(values)
                ratio = round(own[1] / theirs[1], 3)
                rows.append({"row": row, "peer": peer, "ratio": ratio, SUBJECT: own, "peer_quartiles": theirs})
    return rows


def text(rows: list[dict[str, Any]]) -> str:
    """Return a table."""
    lines = [f"{'ratio':>6}  {'kvmpass':>9}  {'peer':>9}"]
    for row in rows:
        own, theirs = row[SUBJECT][1], row["peer_quartiles"][1]
        lines.append(f"{row['ratio']:6.2f}  {own:9.4g}  {theirs:9.4g}  {row['row']} / {row['peer']}")
    return "\n".join(lines)


def svg(rows: list[dict[str, Any]], timings: dict[str, Any]) -> str:
    """Draw a bar for each ratio, with a line at 1, and the stages of one run."""
    scale = (WIDTH - LEFT - 60) / max(2.0, *(min(row["ratio"], 6.0) for row in rows))
    parts, y = [], 30
    for row in rows:
        width = min(row["ratio"], 6.0) * scale
        label = escape(f"{row['row']} / {row['peer']}")
        parts.append(f'<text x="{LEFT - 8}" y="{y + 13}" text-anchor="end">{label}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR - 4}" fill="{COLOURS[0]}"/>')
        parts.append(f'<text x="{LEFT + width + 5:.1f}" y="{y + 12}">{row["ratio"]:.2f}</text>')
        y += BAR
    line = LEFT + scale
    parts.append(f'<line x1="{line:.1f}" y1="22" x2="{line:.1f}" y2="{y}" stroke="#c03030"/>')
    parts.append(f'<text x="{line:.1f}" y="18" text-anchor="middle">1: as long as the peer</text>')
    y += 30
    parts.append(f'<text x="8" y="{y}">stages of one run, {timings["seconds"]:.1f} s:</text>')
    y += 8
    x = 8.0
    for number, stage in enumerate(timings["stages"]):
        width = (WIDTH - 16) * stage["seconds"] / timings["seconds"]
        colour = COLOURS[number % len(COLOURS)]
        parts.append(f'<rect x="{x:.1f}" y="{y}" width="{width:.1f}" height="20" fill="{colour}"/>')
        place = y + 40 + BAR * number
        parts.append(f'<rect x="8" y="{place - 10}" width="10" height="10" fill="{colour}"/>')
        name = escape(f"{stage['name']}: {stage['seconds']:.2f} s, {stage['exits']} exits")
        parts.append(f'<text x="24" y="{place}">{name}</text>')
        x += width
    height = y + 50 + BAR * len(timings["stages"])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif"'
    return f'{head} font-size="12">\n' + "\n".join(parts) + "\n</svg>\n"


def measure(rounds: int, kernel: str, here: bool) -> dict[str, Any]:
    """Run the measurements in an emulated host, or on this one."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        baseline, result = folder / "baseline", folder / "result"
        subprocess.run(["cc", "-O2", "-Wall", "-o", baseline, HERE / "baseline.c"], check=True)
        words = [sys.executable, str(HERE / "inside.py"), str(baseline), str(rounds), str(result)]
        if here:
            subprocess.run(words, check=True)
        else:
            config = LabConfig(devices=("nvme",), kernel=kernel, writable=(folder,), memory="6G")
            done = Lab(config).run(words, stdout=sys.stdout.buffer, stderr=sys.stderr.buffer)
            if done.status:
                print(f"bench: the measurements ended with status {done.status}", file=sys.stderr)
        found: dict[str, Any] = json.loads(result.read_text())
        return found


def main() -> None:
    """Measure, and write the documents."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kernel", default="full", help="of the emulated host: full, stock or a bzImage")
    parser.add_argument("--here", action="store_true", help="measure on this host, whose NVMe drive is used")
    parser.add_argument("--output", type=Path, default=DOCS, help="directory for bench.json and bench.svg")
    options = parser.parse_args()
    found = measure(options.rounds, options.kernel, options.here)
    rows = summary(found["samples"])
    place = "this host" if options.here else "emulated host"
    document = {"place": place, "rounds": found["rounds"], "rows": rows, **found}
    options.output.joinpath("bench.json").write_text(json.dumps(document, indent=1) + "\n")
    options.output.joinpath("bench.svg").write_text(svg(rows, found["counts"]["a guest with a drive"]))
    print(text(rows))


if __name__ == "__main__":
    main()
