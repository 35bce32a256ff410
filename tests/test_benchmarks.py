"""The GPU benchmarks' whole path with the CPU in the GPU's place, and what is derived from it."""

import io
import json
import math
import re
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import proof
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import bench_gpu  # noqa: E402
import gpu  # noqa: E402
import gpu_anchors  # noqa: E402
import gpu_measure  # noqa: E402
import gpu_report  # noqa: E402
import gpu_results  # noqa: E402
import gpu_warm  # noqa: E402
import report  # noqa: E402
import sanitize  # noqa: E402
from gpu_device import StandIn  # noqa: E402
from test_gpu_measure import raising, tiny  # noqa: E402

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="a machine without CUDA is needed")


@pytest.fixture(scope="module")
def quick(tmp_path_factory) -> Path:
    """`make gpu ARGS=--quick`, on the stand-in: the JSON file that it leaves."""
    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.setenv("TRITON_INTERPRET", "0")  # interpreted, it would take minutes
        for name in ("PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            patch.delenv(name, raising=False)  # pytest-benchmark times nothing in a worker
        status = gpu.main(["--quick", "--stand-in", "--results", str(folder)])
    assert status == 0 and "0 contenders failed or were wrong" in printed.getvalue()
    last = printed.getvalue().splitlines()[-1]
    assert re.fullmatch(r"benchmarks: done; (\d+) of \1 cases measured", last)
    return folder / "stand-in.json"


def test_quick_run_leaves_every_headline_case(quick):
    data = json.loads(quick.read_text())
    assert (data["schema"], data["stand_in"]) == ("engine-gpu-1", True)
    assert not quick.with_suffix(".running").exists()
    assert {"name", "l2_mb", "memory_gb", "before", "after"} <= set(data["device"])
    assert {"torch", "cuda", "cudnn", "triton", "python"} <= set(data["versions"])
    expected = [case.name for case in bench_gpu.all_cases(StandIn(), "quick")]
    assert list(data["cases"]) == data["planned"] == expected and len(expected) >= 3
    for record in data["cases"].values():
        native = record["contenders"].get("native", {})
        if record["op"].startswith("attention"):
            continue
        assert native["status"] == "ok" and 0 <= native["error_share"] <= 1
        cold, warm = native["cold"], native["warm"]
        assert 0 < cold["p20"] <= cold["us"] <= cold["p80"]
        assert len(cold["rounds_us"]) == 2 and cold["calls"] >= 10 and warm["us"] > 0
        seconds = cold["us"] / 1e6
        assert math.isclose(
            native["gb_per_s"], record["useful_bytes"] / seconds / 1e9, rel_tol=0.1, abs_tol=0.01
        )
        assert record["verdict"] in ("win", "tie", "loss") and record["host_us"] > 0
        assert record["rotation"]["sets"] >= 2
        assert record["contenders"]["triton"]["status"] == "refused"


def test_anchors(quick):
    found = json.loads(quick.read_text())["anchors"]
    assert "failed" not in found
    assert all(rate > 0 for rate in found["copy_gb_per_s"].values())
    assert found["node_us"] > 0 and found["matrix_tflops"] > 0
    assert found["noise_bits"]["native CPU"] is True and found["noise_bits"]["native"] is True
    assert "needs a CUDA tensor" in found["noise_bits"]["triton"]
    assert found["graph_sampling"] == {"skipped": "a CUDA graph needs a CUDA device"}


def test_dispatch_rows_are_data(quick):
    data = json.loads(quick.read_text())
    rows = {row["case"]: row for row in data["dispatch"]}
    for name, record in data["cases"].items():
        row = rows[name]
        assert row["us"][row["fastest"]] == min(row["us"].values())
        assert row["serve"] in ("native", "triton", "eager") and row["op"] == record["op"]
        assert row["shape"] == record["shape"] and row["dtype"] == record["dtype"]


def test_report_shows_a_device_and_never_a_stand_in(quick, tmp_path):
    data = json.loads(quick.read_text())
    report.main(["--results", str(quick.parent)])
    text = (quick.parent / "RESULTS.md").read_text()
    assert "no measurement" in text and "not measured yet" in text
    # The same file as if it came from a GPU.
    data |= {"stand_in": False}
    assert data["parity"] == {"outcome": "not run", "known": {}}
    data["parity"]["known"] = {"noise": {"triton": 9}}
    *_, unmeasured, case = data["cases"]
    for row in data["cases"][unmeasured]["contenders"].values():
        row.pop("cold", None)
    data["cases"][unmeasured] |= {"speedup": None, "verdict": None, "best_ours": None}
    (tmp_path / "evidence.json").write_text('{"a GPU": {}}')  # travels beside it
    data["cases"][case]["contenders"]["native"] |= {"status": "wrong", "reason": "by hand"}
    data["cases"]["lost"] = {"section": "x", "error": "out of memory", "contenders": {}}
    (tmp_path / "gpu.json").write_text(json.dumps(data))
    report.main(["--results", str(tmp_path)])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "not measured yet" not in text
    for name in data["cases"]:
        assert name in text
    assert "wrong: by hand" in text and "lost: out of memory" in text
    n = len(data["planned"])
    assert f"\n{n - 1} of {n} cases measured.\n" in text
    assert "not run. engine/evidence.json holds for this GPU, in cases: noise triton 9.\n" in text
    for kind in ("share", "speedup"):
        picture = tmp_path / f"gpu-{kind}.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size < 200_000
        assert f"(gpu-{kind}.png)" in text
    assert any(
        line.startswith(f"| {case} ")
        for line in gpu_report.headline(json.loads((tmp_path / "gpu.json").read_text()))
    )


def test_without_matplotlib_the_tables_are_there(quick, monkeypatch, capsys):
    data = {"file": "a.json", **json.loads(quick.read_text()), "stand_in": False}
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    lines = gpu_report.tables(data, quick.parent)
    assert any(line.startswith("### ") for line in lines)
    assert "no plots are drawn" in capsys.readouterr().out


# --- verdicts, and what outlives a process


def test_a_lost_gpu_ends_the_process_and_the_next_one_leaves_the_culprit_out(tmp_path):
    class Lost(StandIn):
        def healthy(self):
            return False

    results = gpu_results.Results(tmp_path / "a.json")
    results.begin(StandIn(), "quick")
    case = tiny()
    good = dict(case.contenders)
    case.contenders = {**good, "native": raising}

    def note(contender):
        results.note(case.name, contender)

    with pytest.raises(gpu_measure.DeviceLost, match="boom"):
        gpu_measure.measure(case, Lost(), note=note)
    # The process died here. The next one reads the file:
    results = gpu_results.Results(tmp_path / "a.json")
    assert results.running() == [case.name, "native"]
    results.crash("illegal address")
    assert results.data["crashed"] == {case.name: {"native": "illegal address"}}
    assert case.name not in results.data["cases"]
    crashed = results.crashed(case.name)
    rows = gpu_measure.measure(tiny(), StandIn(), crashed=crashed)["contenders"]
    assert rows["native"] == {"status": "failed", "reason": "illegal address"}
    assert rows["eager"]["cold"]["us"] > 0
    same_op, other_op = f"{case.name.split()[0]} another", "noise 1M"
    assert not results.crashed(same_op) and results.running() is None
    results.note(same_op, "native")
    results.crash("illegal address")
    assert "2 processes" in results.crashed("group_norm_silu-fwd third")["native"]
    assert not results.crashed(other_op)
    results.note(case.name, "timing")
    results.crash("gone again")
    assert results.data["cases"][case.name]["error"] == "gone again"


def test_losses_and_ties_are_called_so():
    def record(ours, baseline, spread=0.0):
        def row(us):
            cold = {"us": us, "p20": us * (1 - spread), "p80": us * (1 + spread)}
            return {"status": "ok", "cold": {**cold, "rounds_us": [us, us]}}

        rows = {"triton": row(ours), "eager": row(3 * baseline), "compile": row(baseline)}
        found = {"useful_bytes": 10**6, "contenders": rows}
        gpu_results.conclude(found, {"copy_gb_per_s": {"16 MB": 1.0, "1024 MB": 1000.0}})
        return found

    assert record(10, 20)["verdict"] == "win" and record(10, 20)["speedup"] == 2
    assert record(20, 10)["verdict"] == "loss" and record(20, 10)["best_baseline"] == "compile"
    assert record(10, 10.5, spread=0.05)["verdict"] == "tie"
    assert record(10, 10.5)["verdict"] == "win"
    unproven = record(20, 10)
    unproven["contenders"]["blocked"] = unproven["contenders"]["triton"] | {"cold": {"us": 1}}
    gpu_results.conclude(unproven, {"copy_gb_per_s": {"1024 MB": 1000.0}})
    assert (unproven["best_ours"], unproven["best_baseline"]) == ("triton", "compile")
    row = record(1, 2)["contenders"]["triton"]
    assert (row["gb_per_s"], row["share_of_copy"]) == (1000.0, 1.0)


# --- the front


def test_cases_are_those_of_the_plan():
    """On the GPU's shapes, without running them: names differ, headline first, bytes by hand."""

    class Large(StandIn):
        stand_in = False

    cases = bench_gpu.all_cases(Large(), "default")
    names = [case.name for case in cases]
    assert len(set(names)) == len(names) > 150
    headline = [case.headline for case in cases]
    assert headline == sorted(headline, reverse=True) and 8 <= sum(headline) <= 16
    by_name = {case.name: case for case in cases}
    gn = by_name["group_norm_silu-fwd CIFAR-a-nhwc-bf16"]
    assert gn.useful_bytes == 2 * 2 * 128 * 128 * 32 * 32
    assert "blocked" not in gn.contenders
    blocked = by_name["group_norm_silu-bwd LSUN-a-nchw-bf16"].contenders
    assert list(blocked)[-1] == "blocked"
    assert by_name["group_norm_silu-bwd CIFAR-a-nchw-bf16"].useful_bytes == 3 * 2 * 128**2 * 1024
    assert by_name["reverse_step 256² fp32"].useful_bytes == 12 * 128 * 3 * 2**16 > 64e6
    attention = by_name["attention-fwd ADM64-32"]
    assert attention.flop == 4 * 64 * 6 * 1024 * 1024 * 64
    assert attention.useful_bytes == 4 * 64 * 6 * 1024 * 64 * 2
    for op in ("group_norm_silu", "attention", "attention_qkv"):
        for direction in ("fwd", "bwd"):
            assert sum(n.startswith(f"{op}-{direction} ") for n in names) >= 12
    assert "attention_qkv-fwd SD-cross" not in by_name


def test_warming_runs_our_kernels_alone(monkeypatch):
    ran = []
    case = tiny()
    case.contenders = {n: lambda one, n=n: lambda: ran.append(n) for n in ("triton", "compile")}
    monkeypatch.setattr(gpu_warm, "all_cases", lambda device, mode: [case] * 5)
    assert gpu_warm.warm(StandIn(), 1, 2) == 2 and ran == ["triton"] * 2


@NO_GPU
def test_without_a_gpu_one_sentence(capsys):
    with pytest.raises(SystemExit) as found:
        gpu.main(["--arch"])  # what make asks first
    assert re.fullmatch("make gpu needs a CUDA GPU and a CUDA build .* none", found.value.code)
    assert sanitize.main([]) == 2
    (line,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch("make gpu-sanitize needs a CUDA GPU and a CUDA build .* none", line)


def test_the_cpu_benchmarks_are_collected_without_the_gpu_s():
    command = [sys.executable, "-m", "pytest", "benchmarks", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "bench_gpu" not in done.stdout
    assert "bench_group_norm_silu.py::bench_forward" in done.stdout


# --- sanitizer and proof


def test_sanitizer_cases_run_and_know_every_kernel():
    sanitize.run_all(torch.device("cpu"))
    sources = "".join(p.read_text() for p in (ROOT / "csrc" / "cuda").iterdir())
    assert len(sanitize.kernels()) == len(re.findall(r"^__global__|\n\s*__global__", sources))
    assert {"noise_kernel", "group_norm_silu_fwd_planes_kernel"} <= sanitize.kernels()


def test_only_whole_runs_prove():
    def config(source="TESTPATHS", **option):
        return SimpleNamespace(
            args_source=SimpleNamespace(name=source), option=SimpleNamespace(**option)
        )

    assert proof.counts(config(), 0) and proof.counts(config(), 1)
    assert not proof.counts(config(), 2)
    assert not proof.counts(config("ARGS"), 0) and not proof.counts(config(ignore=["a"]), 0)
    assert proof.counts(config(numprocesses=8, keyword=""), 0)
    assert proof.counts(config(numprocesses=8), 1)
    assert not proof.counts(config(numprocesses=8), 1, unknown=True)
    assert not proof.counts(config(numprocesses=8), 2)
    assert not proof.counts(config(numprocesses=8, keyword="noise"), 0)
    worker = config()
    worker.workerinput = {}
    assert not proof.counts(worker, 0)


def test_whom_a_failure_takes_the_proof_from():
    def report(**changes):
        plain = dict(failed=True, when="call", nodeid="tests/test_a.py::test_b", user_properties=[])
        return SimpleNamespace(**plain | changes)

    case = [("backend", "triton"), ("op", "noise")]
    here = "tests/test_group_norm_silu_plan.py::"
    clusters, blocked = f"{here}test_clusters[planes-0]", f"{here}test_blocked[waves-0]"
    assert proof.unknown(report()) and proof.unknown(report(user_properties=case[:1]))
    assert not proof.unknown(report(failed=False)) and not proof.unknown(
        report(user_properties=case)
    )
    assert not proof.unknown(report(nodeid=clusters))
    assert not proof.unknown(report(nodeid=blocked))
    assert proof.unknown(report(nodeid=clusters, when="???"))  # a worker died there


def test_an_anchor_that_fails_is_told(monkeypatch):
    def broken(device, size):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(gpu_anchors, "matrix_tflops", broken)
    monkeypatch.setattr(gpu_anchors, "host_us", lambda device: {})
    monkeypatch.setattr(gpu_anchors, "noise_bits", lambda device: {})
    found = gpu_anchors.anchors(StandIn())
    assert found["failed"] == {"matrix_tflops": "RuntimeError: out of memory"}
    assert found["node_us"] > 0
