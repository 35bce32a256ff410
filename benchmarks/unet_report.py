"""Tables of bench_unet.py: our U-Net beside diffusers', and where the time of each goes."""

OTHERS = ("diffusers", "diffusers channels_last", "compile", "openvino")
OTHERS += ("ours, compiled", "memory returned")
NAMES = ("bench_denoising_step", "bench_training_step", "bench_profile", "bench_kept_memory")


def is_unet(benchmark: dict) -> bool:
    return benchmark["name"].startswith(NAMES)


def tables(benchmarks: list[dict], profiles: bool = True) -> list[str]:
    """Of the rows that are bench_unet.py's; with where their time goes, or without."""
    rows = [b for b in benchmarks if is_unet(b)]
    steps = [b for b in rows if "milliseconds" not in b["extra_info"]]
    lines = []
    if steps:
        others = [o for o in OTHERS if any(o in b["extra_info"]["median_us"] for b in steps)]
        head = ["our U-Net", "ours ms", *(f"{o} ms" for o in others), *(f"× {o}" for o in others)]
        lines += [f"| {' | '.join(head)} |", "| --- |" + " ---: |" * (len(head) - 1)]
        lines += [step_row(b, others) for b in steps]
        lines += [""]
    for b in steps:
        if peak := b["extra_info"].get("peak_mb"):
            lines += [
                f"Peak memory of a training step beyond the model: {peak['ours']} MB, diffusers "
                f"{peak['diffusers']} MB.",
                "",
            ]
    for b in rows:
        if profiles and (found := b["extra_info"].get("milliseconds")):
            lines += [*profile_table(case(b), found), ""]
    return lines


def case(benchmark: dict) -> str:
    return benchmark["name"].removeprefix("bench_").replace("[", " ").rstrip("]")


def step_row(benchmark: dict, others: list[str]) -> str:
    us, speedup = (benchmark["extra_info"][key] for key in ("median_us", "speedup"))
    cells = [f"{us['ours'] / 1e3:.1f}"]
    cells += [f"{us[o] / 1e3:.1f}" if o in us else "–" for o in others]
    cells += [f"{speedup[o]:.2f}" if o in speedup else "–" for o in others]
    return f"| {case(benchmark)} | {' | '.join(cells)} |"


def profile_table(title: str, found: dict[str, dict[str, float]]) -> list[str]:
    """Milliseconds of a call per group of operators; the two columns are two runs."""
    groups = sorted(
        {group for times in found.values() for group in times},
        key=lambda group: -max(times.get(group, 0) for times in found.values()),
    )
    lines = [
        f"| {title}, ms of one call | {' | '.join(found)} |",
        "| --- |" + " ---: |" * len(found),
    ]
    for group in groups:
        cells = [f"{times[group]:.1f}" if group in times else "–" for times in found.values()]
        lines.append(f"| {group} | {' | '.join(cells)} |")
    total = [f"{sum(times.values()):.1f}" for times in found.values()]
    return [*lines, f"| all | {' | '.join(total)} |"]
