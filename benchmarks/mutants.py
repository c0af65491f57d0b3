# SPDX-License-Identifier: Apache-2.0
"""Change the code at random places, and see whether a test notices.

`mutmut <https://mutmut.readthedocs.io>`_ makes the changes (mutants) of the rooms that everything
rests on, and runs the tests that reach each of them. There are some ten thousand, so a random
sample of each room is tried. A survivor is either equivalent, a change that no test could notice,
or a gap in the tests. What was found out about survivors is in ``benchmarks/mutants.yaml``.

    make mutants
    python benchmarks/mutants.py [--sample 100] [--seed 0] [--processes 2] [--out FILE]
    python benchmarks/mutants.py --only ddo_modulus.posterior.inflation
"""

from __future__ import annotations

import argparse
import os
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import report
import yaml

ROOMS = ("fields", "diffusion", "posterior", "observations")
ROOT = Path(__file__).parents[1]

#: Survivors that were looked at: file, the line before and after, reason, whether equivalent.
SURVIVORS = Path(__file__).with_suffix(".yaml")

#: A first run over some mutants makes all of them, and times the tests.
FIRST = "ddo_modulus.posterior.background.*__mutmut_1"


@dataclass(frozen=True)
class Mutant:
    """A change of the code, and what became of it.

    Attributes:
        name: Of mutmut.
        status: "killed", "timeout", "survived", "no tests" ...
    """

    name: str
    status: str

    @property
    def room(self) -> str:
        """The room of the package that it is in."""
        return self.name.split(".")[1]

    @property
    def killed(self) -> bool:
        """Whether a test failed, or did not end."""
        return self.status not in ("survived", "no tests", "not checked")


@dataclass(frozen=True)
class Change:
    """The lines that a mutant takes away and puts in their place."""

    file: str
    before: str
    after: str


def mutmut(*arguments: str, shown: bool = False) -> str:
    """Run mutmut in the root of the repository; what it printed, or nothing if that is shown."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    # The changed copy is to be imported, not this one.
    others = [path for path in paths if path and Path(path).resolve() != ROOT]
    variables["PYTHONPATH"] = os.pathsep.join(others)
    shared = ROOT.parent / "shared" / "data"
    if shared.is_dir():  # the tests run in a copy, from where this is not found
        variables.setdefault("DDO_SHARED_DATA", str(shared))
    run = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=not shown, text=True, check=False
    )
    if run.returncode:
        raise SystemExit(f"mutmut {arguments[0]} failed; {run.stdout or ''}{run.stderr or ''}")
    return run.stdout or ""


def statuses() -> dict[str, str]:
    """All mutants, by name."""
    lines = mutmut("results", "--all", "true").splitlines()
    return dict(line.strip().rsplit(": ", 1) for line in lines if ": " in line)


def change(name: str) -> Change:
    """What a mutant changes."""
    text = mutmut("show", name)
    file = next(line[4:] for line in text.splitlines() if line.startswith("+++ "))
    parts = [
        " ".join(
            line[1:].strip() for line in text.splitlines() if re.match(rf"\{sign}(?!\{sign})", line)
        )
        for sign in "-+"
    ]
    return Change(file.strip(), *parts)


def drawn(names: Sequence[str], sample: int, seed: int) -> list[str]:
    """As many mutants of each room, at random."""
    chance, chosen = random.Random(seed), []
    for room in ROOMS:
        these = sorted(name for name in names if name.startswith(f"ddo_modulus.{room}."))
        chosen += chance.sample(these, min(sample, len(these)))
    return chosen


def judged() -> dict[Change, tuple[bool, str]]:
    """Survivors that were looked at: whether each is equivalent, and the reason."""
    entries = yaml.safe_load(SURVIVORS.read_text()) or []
    return {
        Change(e["file"], e["before"], e["after"]): (bool(e.get("equivalent")), e["reason"])
        for e in entries
    }


def document(mutants: Sequence[Mutant]) -> list[str]:
    """The table, and the survivors with what is known of them."""
    opinions = judged()
    survivors = {m: change(m.name) for m in mutants if not m.killed}
    equivalent = {m for m, c in survivors.items() if opinions.get(c, (False, ""))[0]}
    lines = [
        "# Mutants",
        "",
        f"{report.command(__file__)} on {report.machine('mutmut')}.",
        "",
        "| room | mutants | killed | equivalent | survived | killed of the others |",
        "|---|---|---|---|---|---|",
    ]
    count = Counter((m.room, m in equivalent, m.killed) for m in mutants)
    for room in (*ROOMS, "all"):
        rooms = ROOMS if room == "all" else (room,)
        killed, same, alive = (
            sum(count[r, *key] for r in rooms)
            for key in ((False, True), (True, False), (False, False))
        )
        if killed + same + alive:
            share = f"{killed / max(killed + alive, 1):.1%}"
            lines.append(
                f"| {room} | {killed + same + alive} | {killed} | {same} | {alive} | {share} |"
            )
    lines += ["", "## Survivors", "", "| | change | |", "|---|---|---|"]
    for mutant, what in survivors.items():
        kind = "equivalent: " if mutant in equivalent else ""
        reason = opinions.get(what, (False, "not looked at"))[1]
        before, after = (text.replace("|", r"\|") for text in (what.before, what.after))
        place = what.file.removeprefix("ddo_modulus/")
        lines.append(f"| {place} | `{before}` → `{after}` | {kind}{reason} |")
    return lines


def main() -> None:
    """Make the mutants, try a sample of them, and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--sample", type=int, default=100, help="mutants of each room")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--only", help="all mutants of this module instead of a sample")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    processes = f"--max-children={options.processes}"
    print("making mutants and timing the tests", flush=True)
    mutmut("run", processes, FIRST, shown=True)
    names = list(statuses())
    if options.only:
        chosen = [name for name in names if name.startswith(f"{options.only}.")]
    else:
        chosen = drawn(names, options.sample, options.seed)
    print(f"trying {len(chosen)} of {len(names)} mutants", flush=True)
    mutmut("run", processes, *chosen, shown=True)
    found = statuses()
    report.publish(document([Mutant(name, found[name]) for name in chosen]), options.out)


if __name__ == "__main__":
    main()
