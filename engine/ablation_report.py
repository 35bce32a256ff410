"""What an ablation's records say: means with intervals, tables, a figure, and the explanation."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TITLES = {"is": "IS", "fid": "FID", "kid": "KID × 1000"}
SCALE = {"kid": 1000.0}
WAY = {True: "x̂₀ clipped", False: "not clipped"}


def student(level: float, freedom: int) -> float:
    """The t of P(|X| ≤ t) = level for Student's distribution.

    With x = √ν tan θ its density is ∝ cos^(ν−1) θ, integrated here on a grid.
    """
    theta = np.linspace(0, math.pi / 2, 100_001)
    density = np.cos(theta) ** (freedom - 1)
    mass = np.concatenate([[0], np.cumsum((density[1:] + density[:-1]) / 2)])
    return math.sqrt(freedom) * math.tan(np.interp(level, mass / mass[-1], theta))


def interval(values: Sequence[float], errors: Sequence[float | None]) -> tuple[float, float | None]:
    """Mean and half width of its 95 % interval: Student's t over seeds, s/√k.

    Of a single seed, 1.96 times the bootstrap's standard error; None where there is none.
    """
    k, mean = len(values), float(np.mean(values))
    if k > 1:
        return mean, student(0.95, k - 1) * float(np.std(values, ddof=1)) / math.sqrt(k)
    return mean, None if errors[0] is None else 1.96 * errors[0]


def interval_name(seeds: int) -> str:
    if seeds > 1:
        return f"95 % interval over {seeds} seeds (Student's t)"
    return "95 % interval over samples of one seed (bootstrap); other seeds may differ by more"


def rows(records: list[dict]) -> list[dict]:
    """One row per schedule, loss and way of sampling, in the order of the records."""
    groups: dict[tuple, list[dict]] = {}
    for record in records:
        key = (record["schedule"], record["loss"], record["clip"])
        groups.setdefault(key, []).append(record)
    found = []
    for (schedule, loss, clip), group in groups.items():
        row = {"schedule": schedule, "loss": loss, "clip": clip, "seeds": len(group)}
        row |= {"n": group[0]["n"], "interval": "bootstrap" if len(group) == 1 else "student"}
        for metric in group[0]["scores"]:
            scores = [record["scores"][metric] for record in group]
            scale = SCALE.get(metric, 1.0)
            row[metric], half = interval(
                [scale * s["value"] for s in scores],
                [None if s["error"] is None else scale * s["error"] for s in scores],
            )
            row[f"{metric}_half"] = half
        for name in ("max", "outside", "saturated"):
            row[name] = float(np.mean([record["final"][name] for record in group]))
        found.append(row)
    return found


def value(mean: float, half: float | None) -> str:
    return f"{mean:.2f}" if half is None else f"{mean:.2f} ± {half:.2f}"


def markdown(records: list[dict], real: dict | None) -> str:
    """Schedules × losses, a column per metric and way of sampling; the explanation below."""
    table, settings = rows(records), records[0]["settings"]
    metrics = [m for m in TITLES if m in table[0]]
    clips = sorted({row["clip"] for row in table}, reverse=True)
    columns = [(metric, clip) for metric in metrics for clip in clips]
    seeds = max(row["seeds"] for row in table)
    lines = [
        f"Protocol `{settings['name']}`: {settings['about']}; {settings['precision']}. "
        f"Per cell and seed {records[0]['n']} samples; {settings['scorer']}. "
        f"Beside each mean: {interval_name(seeds)}.",
        "",
        f"| schedule | loss | {' | '.join(f'{TITLES[m]}, {WAY[c]}' for m, c in columns)} |",
        "| --- | --- |" + " ---: |" * len(columns),
    ]
    cells = {(row["schedule"], row["loss"], row["clip"]): row for row in table}
    for schedule, loss in dict.fromkeys((row["schedule"], row["loss"]) for row in table):
        found = []
        for metric, clip in columns:
            row = cells.get((schedule, loss, clip))
            found.append("–" if row is None else value(row[metric], row[f"{metric}_half"]))
        short = f" ({row['seeds']} seeds)" if row is not None and row["seeds"] < seeds else ""
        lines.append(f"| {schedule} | {loss}{short} | {' | '.join(found)} |")
    if real is not None:
        found = []
        for metric, _ in columns:
            score, scale = real["scores"][metric], SCALE.get(metric, 1.0)
            half = None if score["error"] is None else 1.96 * scale * score["error"]
            found.append(value(scale * score["value"], half))
        lines.append(f"| *{real['n']} test pictures* | | {' | '.join(found)} |")
    return "\n".join([*lines, "", *explanation(records), ""])


def as_csv(records: list[dict]) -> str:
    table = rows(records)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in r.items()} for r in table
    )
    return text.getvalue()


# --- why a schedule does badly without clipping -------------------------------------------------


def of(records: list[dict], schedule: str, clip: bool) -> list[dict]:
    return [r for r in records if r["schedule"] == schedule and r["clip"] == clip]


def mean_of(records: list[dict], figure) -> float:
    return float(np.mean([figure(record) for record in records]))


def measured(records: list[dict], schedule: str, clip: bool) -> dict[str, float] | None:
    """Means over losses and seeds of what the reverse process did; None without a record."""
    some = of(records, schedule, clip)
    if not some:
        return None
    first = min(1, len(some[0]["trace"]["t"]) - 1)  # what the second step is given
    figures = {
        "factor": lambda r: r["trace"]["first_factor"],
        "rms": lambda r: r["trace"]["rms_x"][first],
        "rms_forward": lambda r: r["trace"]["rms_forward"][first],
        "outside_x0": lambda r: r["trace"]["outside_x0"][0],
        "outside": lambda r: r["final"]["outside"],
        "saturated": lambda r: r["final"]["saturated"],
    }
    found = {name: mean_of(some, figure) for name, figure in figures.items()}
    found["highest"] = max(r["trace"]["highest_x"] for r in some)
    for metric in some[0]["scores"]:
        found[metric] = mean_of(some, lambda r, m=metric: r["scores"][m]["value"])
    return found


def explanation(records: list[dict]) -> list[str]:
    """Sentences with measured figures, one per schedule, and what clipping does to the ranking."""
    schedules = list(dict.fromkeys(record["schedule"] for record in records))
    ways = sorted({record["clip"] for record in records})  # not clipped first
    lines = []
    for schedule in schedules:
        found = {way: measured(records, schedule, way) for way in ways}
        found = {way: m for way, m in found.items() if m is not None}
        some = next(iter(found.values()))

        def each(form: str, found=found) -> str:
            return ", ".join(f"{form.format(**m)} {WAY[way]}" for way, m in found.items())

        lines.append(
            f"* {schedule}: the first reverse step multiplies by 1/√α = {some['factor']:.3g}. "
            f"After it x has rms {each('{rms:.3g}')}; the forward process has "
            f"{some['rms_forward']:.3g}. Largest |x| on the way: {each('{highest:.3g}')}. "
            f"Pixels of the first x̂₀ outside the range: {each('{outside_x0:.0%}')}; "
            f"of the samples: {each('{outside:.1%}')}; "
            f"black or white: {each('{saturated:.0%}')}."
        )
    return lines + verdicts(records, schedules, ways)


def verdicts(records: list[dict], schedules: list[str], ways: list[bool]) -> list[str]:
    """Of every schedule whose first step multiplies by more than 10: its IS beside the others'."""
    lines = []
    for schedule in schedules:
        at = measured(records, schedule, ways[0])
        others = [s for s in schedules if s != schedule]
        if at is None or at["factor"] < 10 or not others or "is" not in at or len(ways) < 2:
            continue
        parts = []
        for way in ways:
            one = measured(records, schedule, way)
            rest = [measured(records, other, way) for other in others]
            if one is None or None in rest:
                return lines
            mean = float(np.mean([m["is"] for m in rest]))
            parts.append((way, one["is"], mean))
        said = ", ".join(f"{a:.2f} against {b:.2f} {WAY[way]}" for way, a, b in parts)
        before, after = (a - b for _, a, b in parts)
        lines.append(
            f"* {schedule}'s IS beside the mean of the other schedules: {said}. Clipping x̂₀ alone, "
            f"with the same weights and noise, changes its distance to them from {before:+.2f} to "
            f"{after:+.2f}."
        )
    return lines


# --- the figure ---------------------------------------------------------------------------------


def plot(records: list[dict], real: dict | None, path: Path) -> None:
    """Scores of all cells with their intervals, and |x_t| against the forward process's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    table = rows(records)
    metrics = [m for m in ("is", "fid") if m in table[0]]
    schedules = list(dict.fromkeys(row["schedule"] for row in table))
    losses = list(dict.fromkeys(row["loss"] for row in table))
    panels = len(metrics) + 1
    size = (4.6 * panels, 4.2)
    figure, axes = pyplot.subplots(1, panels, figsize=size, dpi=110, layout="constrained")
    axes = np.atleast_1d(axes)
    colours = [f"C{i}" for i in range(10)]
    for metric, panel in zip(metrics, axes, strict=False):
        for row in table:
            j = losses.index(row["loss"])
            at = schedules.index(row["schedule"]) + (j - (len(losses) - 1) / 2) * 0.24
            panel.errorbar(
                at + (0.05 if row["clip"] else -0.05),
                row[metric],
                None if row[f"{metric}_half"] is None else row[f"{metric}_half"],
                color=colours[j],
                marker="o",
                markerfacecolor=colours[j] if row["clip"] else "white",
                capsize=2,
            )
        if real is not None:
            panel.axhline(real["scores"][metric]["value"], color="grey", linestyle=":")
        panel.set_xticks(range(len(schedules)), schedules, rotation=20)
        panel.set_title(f"{TITLES[metric]}, {records[0]['n']} samples")
        panel.grid(alpha=0.3, axis="y")
    for j, loss in enumerate(losses):
        axes[0].plot([], [], "o", color=colours[j], label=loss)
    axes[0].plot([], [], "o", color="grey", label=WAY[True])
    axes[0].plot([], [], "o", color="grey", markerfacecolor="white", label=WAY[False])
    if real is not None:
        axes[0].plot([], [], ":", color="grey", label="test pictures")
    axes[0].legend(fontsize=8)
    for i, schedule in enumerate(schedules):
        for clip, line in ((True, "-"), (False, "--")):
            some = [record["trace"] for record in of(records, schedule, clip)]
            if some:
                ratio = np.mean([trace["rms_x"] for trace in some], 0) / some[0]["rms_forward"]
                label = f"{schedule}, {WAY[clip]}"
                axes[-1].plot(some[0]["t"], ratio, line, color=colours[i], label=label)
    axes[-1].invert_xaxis()
    axes[-1].set_yscale("log")
    axes[-1].set(xlabel="t, from noise to picture", title="rms of x_t / forward process's")
    axes[-1].grid(alpha=0.3, which="both")
    axes[-1].legend(fontsize=8)
    try:
        figure.savefig(path, format="png")
    finally:
        pyplot.close(figure)
