"""`make gpu` from outside: its parts, their windows, and what each leaves. No GPU is used."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_anchors  # noqa: E402
import gpu_report  # noqa: E402
import gpu_results  # noqa: E402
from gpu_device import StandIn  # noqa: E402

from engine import samplers, stepping  # noqa: E402


def test_parity_takes_the_first_run_that_proves(tmp_path, monkeypatch):
    """A parallel run with a failure that names its op counts; else one by one in what is left."""
    evidence = tmp_path / "evidence.json"
    monkeypatch.setattr(gpu, "EVIDENCE", evidence)
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 32)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: True)
    ran, ends = [], []

    def run(command, until, env):
        assert env["TORCHINDUCTOR_COMPILE_THREADS"] == "1" and "PATH" in env
        ran.append((command[command.index("-n") + 1] if "-n" in command else "1", until))
        status, cases, proves = ends[len(ran) - 1]
        if cases:
            Path(env["ENGINE_TEST_COUNTS"]).write_text(json.dumps({"triton": cases}))
        if proves:
            evidence.write_text(str(len(ran)))
            os.utime(evidence, ns=(len(ran), len(ran)))
        return status

    monkeypatch.setattr(gpu, "run", run)
    nothing = ": nothing is proved"
    end = time.time() + 60
    for script, outcome, passed, workers in (
        ([(0, 9, True)], "passed", {"triton": 9}, ["14"]),
        ([(1, 8, True)], "failed", {"triton": 8}, ["14"]),
        ([(1, 8, False), (0, 9, True)], "passed", {"triton": 9}, ["14", "1"]),
        ([(1, 8, False), (None, 0, False)], f"not finished{nothing}", {}, ["14", "1"]),
        ([(3, 0, False), (0, 9, False)], f"passed{nothing}", {"triton": 9}, ["14", "1"]),
    ):
        ran.clear()
        ends[:] = script
        evidence.unlink(missing_ok=True)
        found = gpu.parity(end)
        assert (found["outcome"], found["passed"]) == (outcome, passed)
        assert ran == [(n, end) for n in workers]
    monkeypatch.setattr(gpu, "run", lambda *args, **kwargs: pytest.fail("the time is over"))
    assert gpu.parity(time.time() - 1)["outcome"] == f"not finished{nothing}"


def test_parity_alone_has_all_the_time_and_leaves_the_evidence(tmp_path, monkeypatch, capsys):
    windows = []

    def parity(until):
        windows.append(until - time.time())
        return {"outcome": "passed", "passed": {}, "seconds": 1.0}

    evidence = tmp_path / "evidence.json"
    evidence.write_text('{"G": {}}')
    folder = tmp_path / "elsewhere"
    monkeypatch.setattr(gpu, "EVIDENCE", evidence)
    monkeypatch.setattr(gpu, "find_gpu", lambda: ("90", "G"))
    monkeypatch.setattr(gpu, "parity", parity)
    monkeypatch.setattr(gpu, "warm", lambda options, until: windows.append(None))
    monkeypatch.setattr(gpu, "benchmarks", lambda *args: "done")
    monkeypatch.setattr(gpu, "run", lambda *args: 0)
    assert gpu.main(["--parity-only", "--results", str(folder)]) == 0
    assert (folder / "evidence.json").read_text() == evidence.read_text()
    assert [path.name for path in folder.iterdir()] == ["evidence.json"]
    assert gpu.main(["--results", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "benchmarks: done; 0 of 0 cases measured"
    alone, shared, warmed = windows
    assert 500 < alone <= 540 and 0.4 < shared / alone < 0.5 and warmed is None
    for both in (["--parity-only", "--no-parity"], ["--parity-only", "--quick"]):
        with pytest.raises(SystemExit):
            gpu.main(both)


def test_the_commit_is_dirty_by_sources_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_results, "ROOT", tmp_path)
    assert gpu_results.commit() is None
    files = ["engine/evidence.json", "benchmarks/results/a.json", "README.md", "engine/unet.py"]
    for name in files:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "a"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    clean = gpu_results.commit()
    assert re.fullmatch("[0-9a-f]{12}", clean)
    for name in files:
        assert gpu_results.commit() == clean
        (tmp_path / name).write_text("after")
    assert gpu_results.commit() == f"{clean}-dirty"


def test_make_builds_again_for_another_architecture(tmp_path):
    """By make's own plan (-n): another ENGINE_CUDA_ARCH builds; the same, or none, does not."""
    stamps = tmp_path / "venv"
    stamps.mkdir()
    (stamps / ".engine-torch").write_text("torch==2.13.0\n")
    for stamp in ("venv", "packages", "build"):
        (stamps / f".engine-{stamp}").touch()
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "_C.abi3.so").touch()
    for name in ("setup.py", "pyproject.toml"):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1, 1))
    for stamp in ("venv", "packages", "build"):  # in the order in which make leaves them
        moment = 10 + ["venv", "packages", "build"].index(stamp)
        os.utime(stamps / f".engine-{stamp}", (moment, moment))

    def builds(arch):
        command = ["make", "-n", "-f", str(ROOT / "Makefile"), "build", f"VENV={stamps}"]
        environment = {
            n: v for n, v in os.environ.items() if n not in ("ENGINE_CUDA_ARCH", "TORCH")
        }
        environment |= {"ENGINE_CUDA_ARCH": arch} if arch else {}
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
        )
        return "building the kernels" in done.stdout

    assert builds("90") and not builds(None)
    (stamps / ".engine-arch").write_text("90;100a\n")
    assert builds("90") and not builds("90;100a") and not builds(None)


class Stepwise:
    """In a CUDA graph's place: what was captured, run again."""

    def __init__(self, run, rewind):
        rewind()
        self.replay = run


def test_graph_sampling_is_compared_with_the_plain_loop(monkeypatch):
    monkeypatch.setattr(samplers, "_wants_graph", lambda graph, device: graph is True)
    monkeypatch.setattr(stepping, "capture", Stepwise)
    monkeypatch.setattr(gpu_anchors.dispatch, "IMPLS", ("auto", "eager", "native"))
    monkeypatch.setenv("ENGINE_BACKEND", "auto")
    found = gpu_anchors.graph_sampling(StandIn(), batch=2, few=2, many=4)
    assert list(found) == ["ddpm, eager", "dpm++, eager", "ddpm, native", "dpm++, native"]
    for row in found.values():
        assert row["same_images"] is True and {"plain_ms", "graph_ms"} < set(row)
    text = "\n".join(gpu_report.graph_sampling(found))
    assert text.count("| the same |") == 4

    def other(run, rewind):
        return SimpleNamespace(replay=lambda: (run(), run.__self__.x.add_(1e-3)))

    def refuse(run, rewind):
        raise RuntimeError("operation not permitted")

    monkeypatch.setattr(gpu_anchors.dispatch, "IMPLS", ("auto", "eager"))
    monkeypatch.setattr(stepping, "capture", other)
    found = gpu_anchors.graph_sampling(StandIn(), batch=2, few=1, many=2)
    assert [row["same_images"] for row in found.values()] == [False, False]
    monkeypatch.setattr(stepping, "capture", refuse)
    found = gpu_anchors.graph_sampling(StandIn(), batch=2, few=1, many=2)
    assert all("cannot be captured" in row["error"] for row in found.values())
    assert os.environ["ENGINE_BACKEND"] == "auto"


def test_other_bits_of_the_noise_are_a_failure(tmp_path, monkeypatch):
    path = tmp_path / "a.json"

    def run(command, until, alive):
        results = gpu_results.Results(path)
        results.begin(StandIn(), "quick")
        results.data["anchors"] = {"noise_bits": {"native": bits, "triton": "refused"}}
        results.save()
        return 0

    monkeypatch.setattr(gpu, "run", run)
    options = SimpleNamespace(quick=True, full=False, stand_in=True)
    bits = True
    assert gpu.benchmarks(options, path, time.time() + 60) == "done"
    bits = False
    assert "other bits" in gpu.benchmarks(options, path, time.time() + 60)


def test_a_process_that_stands_still_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "STALL_S", 0.3)
    sleep = [sys.executable, "-c", "import time; time.sleep(30)"]
    assert gpu.run(sleep, time.time() + 20, alive=tmp_path / "nothing") is None
    assert gpu.run(sleep, time.time() + 0.3) is None
    assert gpu.run([sys.executable, "-c", "raise SystemExit(75)"], time.time() + 20) == 75
    # At work: the file is written again and again, and is not there between two cases.
    beats = "import pathlib, sys, time; p = pathlib.Path(sys.argv[1])\n"
    beats += "for i in range(8): p.write_text(''); p.unlink() if i % 2 else None; time.sleep(0.15)"
    monkeypatch.setattr(gpu, "STALL_S", 0.8)
    command = [sys.executable, "-S", "-c", beats, str(tmp_path / "at")]
    assert gpu.run(command, time.time() + 20, alive=tmp_path / "at") == 0
