"""One picture of a CPU's results: how much faster ours is, case by case, losses included."""

from pathlib import Path


def draw(result: dict, folder: Path) -> str | None:
    """Writes <stem of result["file"]>.png into folder; None where matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot is drawn, the tables are complete")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = [
        (b["name"].removeprefix("bench_").replace("[", " ").rstrip("]"), b["extra_info"])
        for b in result["benchmarks"]
    ][::-1]  # barh counts upwards
    figure, axes = pyplot.subplots(
        figsize=(9, 1.5 + 0.18 * len(rows)), dpi=80, layout="constrained"
    )
    for baseline, shift, color in (("eager", 0.2, "tab:blue"), ("compile", -0.2, "tab:orange")):
        at = [i for i, (_, info) in enumerate(rows) if baseline in info["speedup"]]
        times = [rows[i][1]["speedup"][baseline] for i in at]
        beyond = [x - 1 for x in times]  # from 1, so that a loss points to the left
        where = [i + shift for i in at]
        axes.barh(where, beyond, 0.4, left=1, color=color, label=f"× {baseline}")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=7)
    axes.set_ylim(-1, len(rows))
    axes.set(xlabel="times as fast as the other (log scale); left of the line we lose")
    m = result["machine_info"]
    axes.set_title(f"{m['cpu']}, {m['capability']}, {m['threads']} threads", fontsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    name = f"{Path(result['file']).stem}.png"
    figure.savefig(folder / name)
    pyplot.close(figure)
    return name
