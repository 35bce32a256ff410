"""Two runs never write in one folder; a lock ends with its process, and its want stops nobody."""

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

import engine
from engine import data, run_lock, train, train_classifier

ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([os.path.dirname(os.path.dirname(engine.__file__)), *sys.path]),
}
HOLD = """
import sys
from engine import data, run_lock, train, train_classifier
with run_lock.held(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def holder(folder):
    """A process that holds the lock until a line is written to it."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    ) as child:
        try:
            assert child.stdout.readline() == "held\n"
            yield child
        finally:
            child.kill()


def test_the_second_process_is_refused_by_name_and_let_in_after_the_first(tmp_path):
    with holder(tmp_path) as child:
        with pytest.raises(ValueError) as refused, run_lock.held(tmp_path):
            pass
        owner = f"process {child.pid} on {re.escape(socket.gethostname())}"
        assert re.fullmatch(
            rf"{re.escape(str(tmp_path))} is in use by another run, {owner}: .*another --out",
            str(refused.value),
        )
        child.stdin.write("\n")
        child.stdin.flush()
        assert child.wait() == 0
    assert not list(tmp_path.iterdir())
    with run_lock.held(tmp_path):
        assert [path.name for path in tmp_path.iterdir()] == [run_lock.FILE]
    assert not list(tmp_path.iterdir())


def test_kill_9_gives_the_lock_back(tmp_path):
    with holder(tmp_path) as child:
        child.kill()
        assert child.wait() == -signal.SIGKILL
    assert (tmp_path / run_lock.FILE).exists()
    with run_lock.held(tmp_path):
        said = (tmp_path / run_lock.FILE).read_text()
        assert said.split()[1] == str(os.getpid())
    assert not list(tmp_path.iterdir())


def test_an_error_gives_the_lock_back(tmp_path):
    with pytest.raises(ZeroDivisionError), run_lock.held(tmp_path):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def test_of_many_at_once_one_holds_it(tmp_path):
    inside, most, times = [], [], []

    def work(_):
        for _ in range(100):
            with contextlib.suppress(run_lock.InUse), run_lock.held(tmp_path):
                inside.append(1)
                most.append(len(inside))
                times.append(1)
                inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert set(most) == {1} and len(times) > 20
    assert not list(tmp_path.iterdir())


def test_a_lock_on_a_file_that_was_removed_is_none(tmp_path, monkeypatch):
    """Between a second process's open and flock, the first one ends and a third one begins."""
    real, first = run_lock._open, contextlib.ExitStack()
    first.enter_context(run_lock.held(tmp_path))

    def slow(path):
        file = real(path)
        monkeypatch.setattr(run_lock, "_open", real)
        first.close()
        third.enter_context(run_lock.held(tmp_path))
        return file

    monkeypatch.setattr(run_lock, "_open", slow)
    with contextlib.ExitStack() as third:
        with pytest.raises(run_lock.InUse), run_lock.held(tmp_path):
            pass
        assert (tmp_path / run_lock.FILE).exists()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("reason", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks(tmp_path, monkeypatch, reason):
    def flock(*args):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(fcntl, "flock", flock)
    with run_lock.held(tmp_path), run_lock.held(tmp_path):
        assert not list(tmp_path.iterdir())


def test_a_lock_that_cannot_be_opened_or_is_none(tmp_path):
    (tmp_path / "folder" / run_lock.FILE).mkdir(parents=True)
    (tmp_path / "link").mkdir()
    (tmp_path / "link" / run_lock.FILE).symlink_to(tmp_path / "precious")
    (tmp_path / "precious").write_text("precious")
    for place in ("folder", "link", "nowhere"):
        with run_lock.held(tmp_path / place):
            pass
    assert (tmp_path / "precious").read_text() == "precious"
    assert (tmp_path / "folder" / run_lock.FILE).is_dir()


def test_only_the_first_process_of_several_takes_it(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with run_lock.held(tmp_path):
        monkeypatch.setenv("RANK", "1")
        with run_lock.held(tmp_path):
            assert (tmp_path / run_lock.FILE).exists()
        assert (tmp_path / run_lock.FILE).exists()
    assert not list(tmp_path.iterdir())


def tree(folder) -> dict:
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


TRAIN = (
    *("--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "1", "--batch", "4"),
    *("--samples", "0", "--sample-every", "0", "--device", "cpu", "--no-tensorboard"),
    *("--preset", "cifar10"),
)
CLASSIFIER = (
    *("--dataset", "pictures", "--out", "run", "--timesteps", "10", "--steps", "1", "--batch", "4"),
    *("--image-size", "8", "--channels", "1", "--width", "32", "--device", "cpu"),
)


@pytest.mark.parametrize(
    "main, options", [(train.main, TRAIN), (train_classifier.main, CLASSIFIER)], ids=["U", "c"]
)
def test_a_folder_in_use_is_refused_and_untouched(work, capsys, monkeypatch, main, options):
    def refused(args) -> None:
        before = tree(work)
        assert main(args) == 2 and tree(work) == before
        said = capsys.readouterr().err
        assert said.startswith("error: run is in use by another run, process "), said
        assert said.count("\n") == 1

    (work / "run").mkdir()
    with run_lock.held("run"):
        refused(options)
    assert main(options) == 0
    assert not (work / "run" / run_lock.FILE).exists()
    capsys.readouterr()
    with run_lock.held("run"):
        refused(["--resume", "run", "--steps", "2"])
    # The folder was free, and not even there, until the pictures were read.
    opened = data.open_dataset

    def slow(*args, **kwargs):
        (work / "late").mkdir()
        stack.enter_context(run_lock.held("late"))
        return opened(*args, **kwargs)

    monkeypatch.setattr(data, "open_dataset", slow)
    with contextlib.ExitStack() as stack:
        assert main([*options, "--out", "late"]) == 2
        assert "late is in use by another run" in capsys.readouterr().err


def test_a_run_holds_its_lock_to_the_end(work, monkeypatch):
    drawn = []

    def draw(self):
        with pytest.raises(run_lock.InUse), run_lock.held(self.folder):
            pass
        drawn.append(self)

    monkeypatch.setattr("engine.drawing.final", draw)
    assert train.main(TRAIN) == 0 and drawn
