# SPDX-License-Identifier: Apache-2.0
"""Results are complete or absent, and replace nothing but their like."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ddo_modulus.data.output import ENGINE, FILE, REPORT, STORE, check_output, replacing
from ddo_modulus.errors import InputError

ROOT = Path(__file__).parents[2]


def test_an_interruption_leaves_no_half_store(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "out") as new:
        new.mkdir()
        (new / "half").write_text("")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_like_a_folder(tmp_path):
    path = tmp_path / "movie.gif"
    path.write_text("older")
    with replacing(path, overwrite=True) as new:
        new.write_text("newer")
        assert path.read_text() == "older"
    assert path.read_text() == "newer"
    assert list(tmp_path.iterdir()) == [path]


def test_the_working_directory_is_never_replaced(tmp_path, monkeypatch):
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work" / "here")
    for path in (".", "..", tmp_path / "work"):
        with pytest.raises(InputError, match="working directory"):
            check_output(path, overwrite=True)


def test_a_place_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is not a folder"):
        check_output(tmp_path / "file" / "deep" / "a.zarr")


def folder(path, file, text="older"):
    path.mkdir()
    (path / file).write_text(text)
    return path


MARKS = {STORE: "zarr.json", REPORT: "scores.json", ENGINE: "engine.json"}


@pytest.mark.parametrize("kind", MARKS, ids=lambda kind: kind.name)
def test_only_a_result_of_the_same_kind_is_replaced(tmp_path, kind):
    other = folder(tmp_path / "thesis", "chapter.tex")
    with pytest.raises(InputError, match=f"thesis exists and is not {kind.name}"):
        check_output(other, overwrite=True, kind=kind)
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match=f"is not {kind.name}"):
        check_output(file, overwrite=True, kind=kind)
    own = folder(tmp_path / "own", MARKS[kind])
    with pytest.raises(InputError, match="own exists; .*overwrite=true"):
        check_output(own, kind=kind)
    with replacing(own, overwrite=True, kind=kind) as new:
        folder(new, MARKS[kind], "newer")
    assert (own / MARKS[kind]).read_text() == "newer"
    (tmp_path / "empty").mkdir()  # as mktemp -d makes it
    assert check_output(tmp_path / "empty", overwrite=True, kind=kind)


def test_a_folder_is_no_file_to_replace(tmp_path):
    path = folder(tmp_path / "r.csv", "years.txt")
    with pytest.raises(InputError, match="is not a file"):
        check_output(path, overwrite=True, kind=FILE)


def test_an_input_is_never_the_output(tmp_path):
    store = folder(tmp_path / "a.zarr", "zarr.json")
    (tmp_path / "link").symlink_to(store)
    for path in (store, tmp_path / "link", tmp_path / "x" / ".." / "a.zarr"):
        with pytest.raises(InputError, match="is read by this command"):
            check_output(path, overwrite=True, kind=STORE, inputs=[None, store])
    (tmp_path / "deep").mkdir()
    inner = folder(tmp_path / "deep" / "b.zarr", "zarr.json")
    with pytest.raises(InputError, match="is read by this command"):
        check_output(tmp_path / "deep", overwrite=True, inputs=[inner])
    assert check_output(tmp_path / "c.zarr", kind=STORE, inputs=[store, "hf://some/where", None])


def test_places_that_cannot_be_written_are_refused_beforehand(tmp_path, monkeypatch):
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(InputError, match="is a link to nothing"):
        check_output(tmp_path / "dangling", overwrite=True)
    for name in ("n" * 250, "n" * 300, "a\0b"):  # the first is a name, the hidden one is none
        with pytest.raises(InputError, match="is no name for a result"):
            check_output(tmp_path / name)
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "locked")
    with pytest.raises(InputError, match="locked is read-only"):
        check_output(tmp_path / "locked" / "deep" / "a.zarr")


def test_a_full_disk_is_one_line_and_leaves_the_older_result(tmp_path):
    path = folder(tmp_path / "a.zarr", "zarr.json")
    with pytest.raises(InputError, match="no space left on device.*free some space"):
        with replacing(path, overwrite=True, kind=STORE) as new:
            new.mkdir()
            raise OSError(errno.ENOSPC, "full")
    assert (path / "zarr.json").read_text() == "older"
    assert list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
from pathlib import Path
from ddo_modulus.data.output import replacing
path, stop = Path(sys.argv[1]), int(sys.argv[2])
calls, rename, replace = [], Path.rename, Path.replace
def ended(function):
    def call(self, target):
        calls.append(self)
        if len(calls) == stop:
            os._exit(9)
        result = function(self, target)
        if len(calls) == -stop:
            os._exit(9)
        return result
    return call
Path.rename, Path.replace = ended(rename), ended(replace)
with replacing(path, overwrite=True) as new:
    new.mkdir()
    (new / "zarr.json").write_text("newer")
    if stop == 0:
        os._exit(9)
"""


@pytest.mark.parametrize("stop", [0, 1, -1, 2, -2], ids=str)
@pytest.mark.parametrize("exists", [True, False])
def test_a_kill_at_any_point_is_healed_by_the_next_command(tmp_path, stop, exists, caplog):
    """While it writes, before and after each rename: whole or absent, older or newer."""
    path = tmp_path / "a.zarr"
    if exists:
        folder(path, "zarr.json")
    command = [sys.executable, "-c", KILLED, str(path), str(stop)]
    killed = subprocess.run(command, cwd=ROOT, check=False)
    renames = 2 if exists else 1
    assert killed.returncode == (9 if abs(stop) <= renames else 0)
    try:
        check_output(path, kind=STORE)
    except InputError as error:
        assert "overwrite=true" in str(error)
    if abs(stop) > renames or stop == -renames:
        assert (path / "zarr.json").read_text() == "newer"
    elif exists:
        assert (path / "zarr.json").read_text() == "older"
    else:
        assert not path.exists()
    assert ("is restored" in caplog.text) == (exists and stop in (-1, 2))
    assert list(tmp_path.iterdir()) == ([path] if path.exists() else [])


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    path = tmp_path / "a.zarr"
    with replacing(path) as new:
        new.mkdir()
        check_output(path)
        assert new.exists()
    assert path.exists()


def test_sigterm_removes_what_is_half_written(tmp_path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from ddo_modulus.cli import main as cli\n"
        "from ddo_modulus.data.output import replacing\n"
        "def run(config):\n"
        "    with replacing(Path(sys.argv[1])) as new:\n"
        "        new.mkdir()\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "cli.COMMANDS['simulate'] = run\n"
        "cli.main(['simulate', 'simulator=kolmogorov', 'out=x', 'trajectories=1', 'frames=1'])\n"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.zarr")], cwd=ROOT, check=False
    )
    assert ended.returncode == 143
    assert list(tmp_path.iterdir()) == []
