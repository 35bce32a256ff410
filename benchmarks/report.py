"""Tables from benchmarks/results/*.json: writes RESULTS.md and README's table.

README shows the headline rows between its two markers; RESULTS.md shows every row, losses included.
Files of GPUs (gpu_results.py) come first; --results takes another folder and leaves README alone.
"""

import argparse
import json
import math
from pathlib import Path

import cpu_plot
import gpu_report
import unet_report
from gpu_results import RESULTS, ROOT, SCHEMA

BEGIN, END = "<!-- results: begin -->", "<!-- results: end -->"
HEADLINE = (
    "bench_forward[32x128x32x32-bf16-channels_last]",
    "bench_forward[32x128x32x32-fp32-contiguous]",
    "bench_forward[1x128x32x32-bf16-channels_last]",
    "bench_forward[32x256x4x4-fp32-contiguous]",
    "bench_backward[32x128x32x32-bf16-channels_last]",
    "bench_attention_forward[32x16x256x8-bf16]",
    "bench_attention_forward[32x2x256x64-fp32]",
    "bench_attention_backward[32x16x256x8-bf16]",
    "bench_conv2d_amx_3x3[1x128x128x8]",  # as older files name bench_conv2d_bf16
    "bench_conv2d_amx_3x3[32x128x128x16]",
    "bench_conv2d_bf16_3x3[1x128x128x8]",
    "bench_conv2d_bf16_3x3[32x128x128x16]",
    "bench_conv2d_winograd_bf16[1x128x128x8]",
    "bench_conv2d_winograd_bf16[32x128x128x16]",
    "bench_conv2d_winograd_forward[32x128x128x16-avx2]",
    "bench_conv2d_winograd_training[32x128x128x16-avx2]",
    "bench_reverse_step[64x1x28x28]",
    "bench_reverse_step[128x3x32x32]",
    "bench_scheduler_step[128x3x32x32-ddpm]",
    "bench_noise[1M]",
    "bench_forward_noise[32x1x28x28]",
    "bench_forward_noise[128x3x32x32]",
    "bench_batch_1[1x256x64x64-bf16-channels_last]",
)
NOTES = (
    "Medians; below 1 in a × column we lose. Each × comes from a pair timed in turns; `ours` is",
    "from the turn with eager, not with compile. For reverse_step, noise and forward_noise,",
    "eager and compile draw with torch.randn. The allocator keeps freed blocks, for all contenders",
    "alike (benchmarks/conftest.py). In `eager` stand diffusers' schedulers for scheduler_step,",
    "and ours on one thread for batch_1. In attention's rows eager is PyTorch's SDPA. unet_*: a",
    "whole model of diffusers, accelerated and not. conv2d_*, linear_*: eager is oneDNN, its",
    "weights packed beforehand as ours are, in training F.conv2d.",
)
COLUMNS = "| case | ours µs | eager µs | compile µs | × eager | × compile | GB/s | of copy |"


NOT_MEASURED = "GPU: not measured yet; `make gpu` on a machine with one does."


def load(folder: Path = RESULTS) -> list[dict]:
    """Every run, the longest-named last: cpu.json before its repetitions."""
    paths = sorted(folder.glob("*.json"), key=lambda path: (len(path.stem), path.stem))
    return [{"file": path.name, **json.loads(path.read_text())} for path in paths]


def device(result: dict) -> str:
    m = result["machine_info"]
    machine = f"{m['cpu']}, {m['capability']}, {m['threads']} threads; torch {m['torch']}"
    return f"{machine} ({result['file']})"


def row(benchmark: dict) -> str:
    info = benchmark["extra_info"]
    us, speedup = info["median_us"], info["speedup"]

    def cell(values: dict, name: str, digits: int) -> str:
        return f"{values[name]:.{digits}f}" if name in values else "–"

    name = benchmark["name"].removeprefix("bench_").replace("[", " ").rstrip("]")
    return (
        f"| {name} | {us['ours']:.0f} | {cell(us, 'eager', 0)} | {cell(us, 'compile', 0)} "
        f"| {cell(speedup, 'eager', 2)} | {cell(speedup, 'compile', 2)} "
        f"| {cell(info, 'gb_per_s', 1)} | {cell(info, 'share_of_copy', 2)} |"
    )


def table(benchmarks: list[dict]) -> list[str]:
    return [COLUMNS, "| --- |" + " ---: |" * (COLUMNS.count("|") - 2), *map(row, benchmarks)]


def geomean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def summary(benchmarks: list[dict]) -> list[str]:
    """One line per operation and kind: geometric mean and worst case against each baseline."""
    groups: dict[str, list[dict]] = {}
    for b in benchmarks:
        operation, _, case = b["name"].removeprefix("bench_").rstrip("]").partition("[")
        kind = case.partition("-")[2]
        groups.setdefault(f"{operation} {kind}".strip(), []).append(b["extra_info"]["speedup"])
    lines = ["| operation | × eager geomean | worst | × compile geomean | worst | cases |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, speedups in groups.items():
        cells = []
        for baseline in ("eager", "compile"):
            values = [s[baseline] for s in speedups if baseline in s]
            cells += [f"{geomean(values):.2f}", f"{min(values):.2f}"] if values else ["–", "–"]
        lines.append(f"| {name} | {' | '.join(cells)} | {len(speedups)} |")
    return lines


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the JSON files")
    folder = parser.parse_args(arguments).results.resolve()
    full, short = ["# Results", ""], []
    loaded = load(folder)
    on_gpu = [r for r in loaded if r.get("schema") == SCHEMA]
    on_cpu = [r for r in loaded if "machine_info" in r and "benchmarks" in r]
    shown = [r for r in on_gpu if not r["stand_in"]]
    for result in on_gpu:
        full += [*gpu_report.tables(result, folder), ""]
    for result in shown:
        short += [*gpu_report.headline(result), ""]
    if not shown:
        full += [NOT_MEASURED, ""]
        short += [NOT_MEASURED, ""]
    if on_cpu:
        full += [*NOTES, ""]
    for result in on_cpu:
        benchmarks = [b for b in result["benchmarks"] if not unet_report.is_unet(b)]
        full += [f"## {device(result)}", ""]
        whole = unet_report.tables(result["benchmarks"])
        full += whole
        steps = unet_report.tables(result["benchmarks"], profiles=False)
        short += [f"{device(result)}:", "", *steps] if steps else []
        if not benchmarks:
            continue
        if picture := cpu_plot.draw({**result, "benchmarks": benchmarks}, folder):
            full += [f"![times as fast]({picture})", ""]
        full += [*summary(benchmarks), "", *table(benchmarks), ""]
        chosen = [b for b in benchmarks if b["name"] in HEADLINE]
        short += [f"{device(result)}:", "", *table(chosen), ""] if chosen else []
    (folder / "RESULTS.md").write_text("\n".join(full))
    if folder != RESULTS:
        return
    readme = (ROOT / "README.md").read_text()
    before, _, rest = readme.partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join([before + BEGIN, "", *short, END + after])
    (ROOT / "README.md").write_text(text)


if __name__ == "__main__":
    main()
