"""Tables of bench_unet.py: our U-Net beside diffusers', and where the time of each goes."""

# Contenders: as the measurements call them → as the tables do, in their order.
CONTENDERS = {
    "ours": "ours",
    "ours, PyTorch's ops": "ours on PyTorch's ops alone (ENGINE_BACKEND=eager)",
    "ours, compiled": "ours, compiled",
    "memory returned": "ours, freed memory returned",
    "ours, bf16 weights": "ours, weights in bf16, float32 masters",
    "diffusers": "diffusers",
    "diffusers channels_last": "diffusers, channels_last",
    "compile": "diffusers, compiled",
    "openvino": "diffusers' model in OpenVINO",
}
NAMES = ("bench_denoising_step", "bench_sampling_step", "bench_training_step", "bench_profile")
NAMES += ("bench_kept_memory", "bench_weights_in_bf16")
COPIES = (
    "Casts of weights and of their gradients are mixed precision itself. Those for biases and for "
    "layouts are made inside PyTorch's addmm and convolution_backward; its AdamW made one of every "
    "gradient in channels_last, which engine/optimizer.py does without."
)
WORTH = 1.015  # a gain below is not worth a second copy of the weights


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
                f"Peak memory of a training step beyond the model: {peak['ours']} MB, diffusers "
                f"{peak['diffusers']} MB.",
                "",
            ]
        if (gained := b["extra_info"].get("gained_ms")) is not None:
            lines += [masters(b["extra_info"], gained), ""]
    for b in rows:
        if profiles and (found := b["extra_info"].get("copies")):
            lines += [*profile_table("copies of ours", {"ours": found}), "", COPIES, ""]
        if profiles and (found := b["extra_info"].get("milliseconds")):
            lines += [*profile_table(case(b), found), ""]
    return lines


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


def masters(info: dict, gained: float) -> str:
    ours = info["median_us"]["ours"] / 1e3
    gain = ours / (ours - gained)
    text = (
        "Weights held in bf16, with float32 masters in the optimiser, end with the same bits and "
        f"make a training step of {ours:.0f} ms {abs(gained):.1f} ms "
        f"{'shorter' if gained > 0 else 'longer'} (median of pairs of steps). "
    )
    if gain >= WORTH:
        return text
    return text + (
        "Training does without: autocast casts each weight once a step, which is what copying the "
        "masters back costs, and gradients are made float32 once either way."
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
