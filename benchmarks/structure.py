# SPDX-License-Identifier: Apache-2.0
"""The structure of a checkout: rooms, floors, arrows, lines, and the way of the data through them.

    python benchmarks/structure.py                    # this checkout
    python benchmarks/structure.py --tree OTHER       # another one, such as an older revision
    python benchmarks/structure.py --since REVISION   # lines by room, then and now

A *room* is a module or a package directly under ``ddo_modulus``. An *arrow* is an import from one
room to another, a *floor* the length of the longest chain of arrows below a room. The way of an
observation is traced while ``ddo assimilate`` runs on a few reports, the way of a training sample
while ``ddo train`` makes three steps: a *stop* is a file whose functions run, a *step up* a call
from a file to one on a higher floor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

PACKAGE = "ddo_modulus"
# What the commands do before and after the data's own way: reading options, printing.
_ASIDE = {"__main__", "cli", "console", "errors", "application", "sweep", "commands/common"}


def room_of(module: str) -> str:
    """Name of the room that a module belongs to; the top of the package has none."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def arrows_of(tree: Path) -> dict[str, set[str]]:
    """For each room the rooms that it imports."""
    import grimp

    sys.path.insert(0, str(tree))
    graph = grimp.build_graph(PACKAGE, exclude_type_checking_imports=True, cache_dir=None)
    arrows: dict[str, set[str]] = {
        room_of(m): set() for m in graph.modules if room_of(m) not in ("", "__main__")
    }
    for module in graph.modules:
        for other in graph.find_modules_directly_imported_by(module):
            one, two = room_of(module), room_of(other)
            if one in arrows and two in arrows and one != two:
                arrows[one].add(two)
    return arrows


def floors_of(arrows: dict[str, set[str]]) -> dict[str, int]:
    """Floor of each room, the ground is 1."""
    floors: dict[str, int] = {}

    def floor(room: str) -> int:
        if room not in floors:
            floors[room] = 1 + max((floor(other) for other in arrows[room]), default=0)
        return floors[room]

    for room in arrows:
        floor(room)
    return floors


def lines_by_room(tree: Path, folder: str) -> Counter[str]:
    """Lines of Python by the first part of the path under a folder."""
    counts: Counter[str] = Counter()
    root = tree / folder
    for path in root.rglob("*.py"):
        room = path.relative_to(root).parts[0].removesuffix(".py")
        counts[room] += len(path.read_text(encoding="utf-8").splitlines())
    return counts


def lines_since(tree: Path, revision: str) -> str:
    """Table of the lines by room at a revision and now; a moved file counts where it is now."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(tree), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def room(path: str) -> str:
        return path.split("/")[1].removesuffix(".py")

    moved = {}
    for line in git("diff", "-M20%", "-l0", "--diff-filter=R", "--name-status", revision).split(
        "\n"
    ):
        if line:
            _, old, new = line.split("\t")
            moved[old] = new
    before: dict[str, Counter[str]] = {PACKAGE: Counter(), "tests": Counter()}
    for path in git("ls-tree", "-r", "--name-only", revision, PACKAGE, "tests").split():
        if path.endswith(".py"):
            text = git("show", f"{revision}:{path}")
            before[path.split("/")[0]][room(moved.get(path, path))] += len(text.splitlines())
    now = {folder: lines_by_room(tree, folder) for folder in before}
    rooms = {r for count in (*before.values(), *now.values()) for r in count}
    counts = [before[PACKAGE], now[PACKAGE], before["tests"], now["tests"]]
    rows = ["| room | package, before | now | tests, before | now |", "|---|---|---|---|---|"]
    for one in sorted(rooms, key=lambda r: (-now[PACKAGE][r], r)):
        rows.append(
            f"| {one} | " + " | ".join(f"{c[one]:,}" if c[one] else "-" for c in counts) + " |"
        )
    rows.append("| all | " + " | ".join(f"{sum(c.values()):,}" for c in counts) + " |")
    return "\n".join(rows)


_TRACED = """
import json, os, sys
from pathlib import Path
root = str(Path(sys.argv[1]) / "ddo_modulus") + os.sep
sys.path.insert(0, sys.argv[1])
try:
    from ddo_modulus.cli.main import main
except ImportError:
    from ddo_modulus.cli import main
pairs = {}
def traced(frame, event, _):
    if event != "call":
        return
    callee = frame.f_code.co_filename
    if not callee.startswith(root) or frame.f_code.co_name == "<module>":
        return
    above = frame.f_back
    while above is not None and not above.f_code.co_filename.startswith(root):
        above = above.f_back
    if above is not None and above.f_code.co_filename != callee:
        pairs[above.f_code.co_filename[len(root):], callee[len(root):]] = True
main(["--version"])
sys.setprofile(traced)
status = main(sys.argv[3:])
sys.setprofile(None)
assert status == 0, status
Path(sys.argv[2]).write_text(json.dumps(list(pairs)))
"""


def way(tree: Path, command: list[str], floors: dict[str, int]) -> tuple[int, int, int]:
    """Files that a command's data pass through, calls between them, and how many of those go up."""
    import json

    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "pairs.json"
        done = subprocess.run(
            [sys.executable, "-c", _TRACED, str(tree), str(found), *command],
            cwd=folder,
            env=os.environ | {"PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{tree}: {done.stderr.strip().splitlines()[-1]}")
        pairs = [(a, b) for a, b in json.loads(found.read_text())]

    def room(path: str) -> str:
        return Path(path).parts[0].removesuffix(".py")

    def aside(path: str) -> bool:
        return room(path) in _ASIDE or path.removesuffix(".py") in _ASIDE

    kept = [(a, b) for a, b in pairs if not aside(a) and not aside(b)]
    stops = {path for pair in kept for path in pair}
    up = [
        (a, b)
        for a, b in kept
        if floors.get(room(a), 0) < floors.get(room(b), 0) and "__init__" not in b
    ]
    return len(stops), len(kept), len(up)


def commands(folder: Path) -> dict[str, list[str]]:
    """Small runs, on data made here."""
    import numpy as np
    import pandas as pd

    table = folder / "reports.csv"
    random = np.random.default_rng(0)
    pd.DataFrame(
        {
            "time": "2019-03-27T06:00",
            "lat": random.uniform(51, 57, 12),
            "lon": random.uniform(-9, 1, 12),
            "observation": 281 + random.normal(size=12),
            "variable": "t2m",
            "observation_error": 1.0,
        }
    ).to_csv(table, index=False)
    flow = folder / "flow.zarr"
    simulate = "simulate simulator=kolmogorov simulator.resolution=16 simulator.output_resolution=8"
    simulate += " simulator.reynolds=50 simulator.forcing_wavenumber=2 simulator.spin_up=0.4"
    simulate += f" simulator.dt=0.02 trajectories=4 frames=5 out={flow}"
    subprocess.run([sys.executable, "-m", f"{PACKAGE}.cli", *simulate.split()], check=True)
    train = f"train experiment=kolmogorov64 data.path={flow} data.validation.trajectories=1"
    train += " symmetry.roll=[4,1] symmetry.glide=2 operator.network.widths=[4]"
    train += " operator.network.depths=[1] operator.network.modes=[5] operator.network.embedding=8"
    train += " operator.network.coordinates=[2,0] trainer.steps=3 trainer.batch=4"
    train += " trainer.precision=fp32 trainer.compile=false trainer.validate_every=2"
    train += f" trainer.checkpoint_every=2 trainer.loggers=[] trainer.figure=false out={folder}/run"
    assimilate = f"assimilate package=uk_t2m observations={table} ensemble=2 posterior.steps=2"
    assimilate += f" out={folder}/analysis.zarr"
    return {
        "an observation, from the table to the dataset": assimilate.split(),
        "a sample, from the store to the loss": train.split(),
    }


def draw(
    path: Path, arrows: dict[str, set[str]], floors: dict[str, int], lines: Counter[str]
) -> None:
    """Picture of the floors: a box for each room, as wide as it has lines, and the arrows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(11, 6.5))
    top, place = max(floors.values()), {}
    widest = max(sum(lines[r] ** 0.5 for r in floors if floors[r] == n) for n in range(1, top + 1))
    for number in range(1, top + 1):
        rooms = sorted((r for r in floors if floors[r] == number), key=lambda r: -lines[r])
        widths = [0.045 + 0.75 * lines[r] ** 0.5 / widest for r in rooms]
        gap = (1 - sum(widths)) / (len(rooms) + 1)
        x = gap
        for room, width in zip(rooms, widths, strict=True):
            place[room] = x + width / 2
            box = plt.Rectangle((x, number - 0.22), width, 0.44, fc="#dce8f2", ec="#34607f")
            axes.add_patch(box)
            axes.text(x + width / 2, number + 0.05, room, ha="center", va="center", fontsize=8)
            label = f"{lines[room]:,}"
            axes.text(x + width / 2, number - 0.13, label, ha="center", va="center", fontsize=6)
            x += width + gap
        axes.text(-0.01, number, str(number), ha="right", va="center", fontsize=9, color="#555555")
    for one, others in arrows.items():
        for two in others - {"errors"}:  # nearly every room imports the error
            ends = (place[one], floors[one] - 0.22), (place[two], floors[two] + 0.22)
            axes.annotate(
                "",
                ends[1],
                ends[0],
                arrowprops={"arrowstyle": "->", "color": "#8899aa", "lw": 0.5, "alpha": 0.6},
                zorder=0,
            )
    axes.set(xlim=(-0.03, 1), ylim=(0.6, top + 0.4))
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1])
    parser.add_argument("--no-ways", action="store_true", help="leave the traced commands out")
    parser.add_argument("--since", help="revision to compare the lines by room with, only")
    parser.add_argument("--picture", type=Path, help="SVG of the floors to write")
    options = parser.parse_args()
    tree = options.tree.resolve()
    if options.since:
        print(lines_since(tree, options.since))
        return
    arrows = arrows_of(tree)
    floors = floors_of(arrows)
    package, tests = lines_by_room(tree, PACKAGE), lines_by_room(tree, "tests")
    if options.picture is not None:
        draw(options.picture, arrows, floors, package)
    total = sum(package.values())
    largest, size = package.most_common(1)[0]
    print("| | |\n|---|---|")
    print(f"| rooms | {len(arrows)} |")
    print(f"| floors | {max(floors.values())} |")
    print(f"| arrows | {sum(map(len, arrows.values()))} |")
    print(f"| largest room | {largest}, {size / total:.0%} of {total} lines |")
    if not options.no_ways:
        with tempfile.TemporaryDirectory() as folder:
            for what, command in commands(Path(folder)).items():
                stops, calls, up = way(tree, command, floors)
                print(f"| {what} | {stops} files, {calls} calls between them, {up} of them up |")
    by_floor = defaultdict(list)
    for room, number in floors.items():
        by_floor[number].append(room)
    print("\n| floor | rooms |\n|---|---|")
    for number in sorted(by_floor, reverse=True):
        print(f"| {number} | {', '.join(sorted(by_floor[number]))} |")
    print("\n| room | lines of the package | lines of its tests |\n|---|---|---|")
    for room in sorted({*package, *tests}, key=lambda r: (-package[r], r)):
        print(f"| {room} | {package[room] or '-'} | {tests[room] or '-'} |")
    print(f"| all | {total} | {sum(tests.values())} |")


if __name__ == "__main__":
    main()
