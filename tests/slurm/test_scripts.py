# SPDX-License-Identifier: Apache-2.0
"""What can be tested of the scripts without Slurm."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = sorted((Path(__file__).parents[2] / "examples" / "slurm").iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=[path.name for path in SCRIPTS])
def test_shellcheck_finds_nothing(script):
    shellcheck = shutil.which("shellcheck", path=Path(sys.executable).parent)
    assert shellcheck, "not installed; it is in the extra `dev`"
    done = subprocess.run([shellcheck, script])
    assert done.returncode == 0


@pytest.mark.parametrize("status", [0, 1, 2, 75, 137, 138])
@pytest.mark.parametrize("restarts", [0, 3])
def test_which_ends_are_put_back_into_the_queue(status, restarts, tmp_path):
    """With stand-ins for Slurm's programs that log their arguments, and at most three turns."""
    (script,) = (path for path in SCRIPTS if path.name == "train_one_node.sbatch")
    log = tmp_path / "log"
    for name, end in (("srun", f"exit {status}"), ("scontrol", "exit 0"), ("sleep", "exit 0")):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho "{name} $*" >> {log}\n{end}\n')
        program.chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "45017",
        "SLURM_RESTART_COUNT": str(restarts),
        "MAX_TURNS": "3",
        "CONTAINER": "image",
        "MOUNTS": "here:there",
        "SAVE_DIR": str(tmp_path / "runs"),
    }
    done = subprocess.run(["bash", script, "a=b c"], env=environment, cwd=tmp_path)
    assert done.returncode == status
    calls = log.read_text()
    requeued = status in (75, 138) and restarts < 3
    assert ("scontrol requeue 45017" in calls) == requeued
    assert re.search(r"^srun .*--container-image=image --container-mounts=here:there", calls)
    assert "-m ddo_modulus.cli train a=b c" in calls
