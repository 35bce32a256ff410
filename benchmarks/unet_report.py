"""Tables of bench_unet.py: our U-Net beside diffusers', and where the time of each goes."""

# Contenders: as the measurements call them → as the tables do, in their order.
CONTENDERS = {
    "ours": "ours",
    "ours, PyTorch's ops": "ours on PyTorch's ops alone (ENGINE_BACKEND=eager)",
    "ours, not recorded": "ours, its steps not recorded",
    "ours, compiled": "ours, compiled",
    "memory returned": "ours, freed memory returned",
    "ours, PyTorch's AdamW": "ours with PyTorch's fused AdamW, clipping, EMA, casts of weights",
    "ours, PyTorch's foreach AdamW": "ours with PyTorch's foreach AdamW, clipping, EMA",
    "diffusers": "diffusers",
    "diffusers channels_last": "diffusers, channels_last",
    "compile": "diffusers, compiled",
    "openvino": "diffusers' model in OpenVINO",
}
NAMES = ("bench_denoising_step", "bench_sampling_step", "bench_training_step", "bench_profile")
NAMES += ("bench_kept_memory", "bench_update")
COPIES = (
    "Those for biases and for layouts are made inside PyTorch's addmm and convolution_backward. "
    "Weights are cast where the optimiser writes them (engine/update.py), in no copy of their own."
)


def is_unet(benchmark: dict) -> bool:
    return benchmark["name"].startswith(NAMES)


def tables(benchmarks: list[dict], profiles: bool = True) -> list[str]:
    """Of the rows that are bench_unet.py's; with where their time goes, or without."""
    rows = [b for b in benchmarks if is_unet(b)]
    steps = [b for b in rows if "milliseconds" not in b["extra_info"]]
    lines = []
    if steps:
        lines += [*steps_table(steps), ""]
    for b in steps:
        if peak := b["extra_info"].get("peak_mb"):
            lines += [
                f"Peak memory of a training step beyond the model: {peak['ours']} MB, "
                f"{without_average(peak)}diffusers {peak['diffusers']} MB, which keeps no average.",
                "",
            ]
        if (gained := b["extra_info"].get("gained_ms")) is not None:
            lines += [one_pass(b["extra_info"], gained), ""]
    for b in rows:
        if profiles and (found := b["extra_info"].get("copies")):
            lines += [*profile_table("copies of ours", {"ours": found}), "", COPIES, ""]
        if profiles and (found := b["extra_info"].get("milliseconds")):
            lines += [*profile_table(case(b), found), ""]
    return lines


def without_average(peak: dict) -> str:
    found = peak.get("ours without an average")
    return "" if found is None else f"without the average of the weights {found} MB, "


def case(benchmark: dict) -> str:
    return benchmark["name"].removeprefix("bench_").replace("[", " ").rstrip("]")


def steps_table(steps: list[dict]) -> list[str]:
    """A row per contender; ms of a step, and how many times ours that is."""
    measured = {name for b in steps for name in names(b["extra_info"])}
    lines = [
        f"| ms of a step | {' | '.join(map(case, steps))} |",
        "| --- |" + " ---: |" * len(steps),
    ]
    for name, shown in CONTENDERS.items():
        if name in measured:
            cells = [cell(b["extra_info"], name) for b in steps]
            lines.append(f"| {shown} | {' | '.join(cells)} |")
    return lines


def names(info: dict) -> list[str]:
    return [*info["median_us"], *info.get("not_measured", [])]


def cell(info: dict, name: str) -> str:
    if name in info.get("not_measured", []):
        return "not measured"
    if name not in info["median_us"]:
        return "–"
    times = f" ({info['speedup'][name]:.2f}×)" if name in info["speedup"] else ""
    return f"{info['median_us'][name] / 1e3:.1f}{times}"


def one_pass(info: dict, gained: float) -> str:
    return (
        "Clipping, AdamW, average and weights in bf16 beside float32 masters, written in one pass, "
        f"make a training step of batch {info['batch']} {abs(gained):.1f} ms "
        f"{'shorter' if gained > 0 else 'longer'} than PyTorch's passes and autocast's casts "
        f"(median of pairs of steps; {info['median_us']['ours'] / 1e3:.0f} ms are left)."
    )


def profile_table(title: str, found: dict[str, dict[str, float]]) -> list[str]:
    """Milliseconds of a call per group of operators; the two columns are two runs."""
    groups = sorted(
        {group for times in found.values() for group in times},
        key=lambda group: -max(times.get(group, 0) for times in found.values()),
    )
    lines = [
        f"| {title}, ms of a call | {' | '.join(found)} |",
        "| --- |" + " ---: |" * len(found),
    ]
    for group in groups:
        cells = [f"{times[group]:.1f}" if group in times else "–" for times in found.values()]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    total = [f"{sum(times.values()):.1f}" for times in found.values()]
    return [*lines, f"| all | {' | '.join(total)} |"]
