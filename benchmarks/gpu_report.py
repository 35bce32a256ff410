"""Markdown tables and plots from a GPU's JSON file: every case, losses and failures included."""

import math
from pathlib import Path

from gpu_measure import OURS
from gpu_results import copy_rate, measured, timed

MARK = {"win": "", "tie": "=", "loss": "−"}
NOTES = (
    "µs: medians of captured CUDA graphs, cold L2 (buffers of three times its size in rotation);",
    "*warm*: one buffer, for the fastest of ours. × is the best baseline's time over the best of",
    "ours; = is a tie (smaller than the spread and the difference of two rounds), − a loss.",
    "*of copy*: useful bytes per second as a share of the largest copy measured in the same run.",
)


def describe(result: dict) -> str:
    device, versions = result["device"], result["versions"]
    state = device.get("before") or {}
    words = [device["name"], f"{device['memory_gb']} GiB", f"{device['multiprocessors']} SMs"]
    words += [f"driver {state['driver_version']}"] if state.get("driver_version") else []
    words += [f"{name} {versions[name]}" for name in ("torch", "cuda", "cudnn", "triton")]
    return ", ".join(map(str, words)) + f" ({result.get('file', '')}, {result['mode']})"


def clocks(result: dict) -> str:
    parts = []
    load = (result.get("anchors") or {}).get("under_load")
    states = {**result["device"], "after matrix products": load}
    for when in ("before", "after matrix products", "after"):
        s = states.get(when) or {}
        if s:
            parts.append(
                f"{when}: SM {s.get('clocks.sm')} of {s.get('clocks.max.sm')} MHz, "
                f"memory {s.get('clocks.mem')} MHz, {s.get('temperature.gpu')} °C, "
                f"{s.get('power.draw')} W"
            )
    return "; ".join(parts)


def anchors(result: dict) -> list[str]:
    found = result.get("anchors") or {}
    lines = []
    if found.get("copy_gb_per_s"):
        rates = ", ".join(f"{size} {rate:.0f}" for size, rate in found["copy_gb_per_s"].items())
        lines.append(f"* copy, GB/s read plus written, by bytes moved: {rates}")
    if "node_us" in found:
        lines.append(f"* smallest kernel in a graph: {found['node_us']:.2f} µs")
    if "matrix_tflops" in found:
        lines.append(f"* 8192³ bfloat16 product: {found['matrix_tflops']:.0f} TFLOP/s")
    if found.get("noise_bits"):
        same = "; ".join(
            f"{name}: {'yes' if value is True else 'NO' if value is False else value}"
            for name, value in found["noise_bits"].items()
        )
        lines.append(f"* the noise has the CPU's bits: {same}")
    if found.get("reverse_step_host_us"):
        host = "; ".join(
            f"{name} {value:.0f}" if isinstance(value, (int, float)) else f"{name}: {value}"
            for name, value in found["reverse_step_host_us"].items()
        )
        lines.append(f"* one reverse step as a Python loop pays it, CIFAR-10 batch 128, µs: {host}")
    lines += graph_sampling(found.get("graph_sampling") or {})
    for name, reason in (found.get("failed") or {}).items():
        lines.append(f"* {name}: not measured ({reason})")
    return lines


def graph_sampling(found: dict) -> list[str]:
    """The sampling loop, ms a step: launched from Python, and as a CUDA graph."""
    if "skipped" in found:
        return [f"* sampling as a CUDA graph: {found['skipped']}"]
    lines = []
    if found:
        lines += ["", "| sampling, tiny U-Net | plain ms per step | graph ms per step | images |"]
        lines += ["| --- | ---: | ---: | --- |"]
    for name, row in found.items():
        if "error" in row:
            lines.append(f"| {name} | – | – | {row['error']} |")
            continue
        same = "the same" if row["same_images"] else "DIFFERENT"
        lines.append(f"| {name} | {row['plain_ms']:.3f} | {row['graph_ms']:.3f} | {same} |")
    return [*lines, ""] if found else lines


def cell(row: dict | None) -> str:
    if not row:
        return ""
    if row.get("cold"):
        return f"{row['cold']['us']:.1f}"
    return {"time": "–", "not there": "–", "refused": "refused"}.get(row["status"], row["status"])


def case_row(name: str, record: dict, columns: list[str]) -> str:
    rows = record["contenders"]
    mine = rows.get(record.get("best_ours") or "") or {}
    speedup, share = record.get("speedup"), mine.get("share_of_copy")
    sign = MARK.get(record.get("verdict"), "")
    cells = [
        name,
        *(cell(rows.get(column)) for column in columns),
        f"{mine['warm']['us']:.1f}" if mine.get("warm") else "–",
        f"{speedup:.2f} {sign}".strip() if speedup else "–",
        f"{mine['gb_per_s']:.0f}" if mine.get("gb_per_s") else "–",
        f"{share:.2f}" if share else "–",
    ]
    return "| " + " | ".join(cells) + " |"


def section_table(cases: dict[str, dict]) -> list[str]:
    columns = list(dict.fromkeys(n for r in cases.values() for n in r["contenders"]))
    columns.sort(key=lambda n: n not in OURS)
    flop = any("flop" in r for r in cases.values())
    heads = ["case", *(f"{c} µs" for c in columns), "warm µs", "×", "GB/s", "of copy"]
    lines = ["| " + " | ".join(heads) + " |", "| --- |" + " ---: |" * (len(heads) - 1)]
    lines += [case_row(name, record, columns) for name, record in cases.items()]
    if flop:
        best = [
            (n, r["contenders"][r["best_ours"]]) for n, r in cases.items() if r.get("best_ours")
        ]
        rates = [f"{n.split(' ', 1)[-1]} {row['tflops']:.0f}" for n, row in best if "tflops" in row]
        if rates:
            lines += ["", f"Ours, TFLOP/s: {', '.join(rates)}."]
    return lines


def sections(result: dict) -> dict[str, dict[str, dict]]:
    found: dict[str, dict[str, dict]] = {}
    for name, record in result["cases"].items():
        found.setdefault(record.get("section", "not measured"), {})[name] = record
    return found


def summary(result: dict) -> list[str]:
    """Per section: geometric mean and worst case against the best baseline of each case."""
    lines = [
        "| section | × best baseline, geomean | worst | wins | ties | losses | of copy, median |"
    ]
    lines.append("| --- |" + " ---: |" * 6)
    for section, cases in sections(result).items():
        compared = [r for r in cases.values() if r.get("speedup")]
        if not compared:
            lines.append(f"| {section} | – | – | – | – | – | – |")
            continue
        speedups = [r["speedup"] for r in compared]
        shares = [r["contenders"][r["best_ours"]].get("share_of_copy") for r in compared]
        shares = sorted(s for s in shares if s)
        verdicts = [r["verdict"] for r in compared]
        mean = math.exp(sum(map(math.log, speedups)) / len(speedups))
        counts = " | ".join(str(verdicts.count(v)) for v in ("win", "tie", "loss"))
        median = f"{shares[len(shares) // 2]:.2f}" if shares else "–"
        lines.append(f"| {section} | {mean:.2f} | {min(speedups):.2f} | {counts} | {median} |")
    return lines


def problems(result: dict) -> list[str]:
    lines = []
    for name, record in result["cases"].items():
        if "error" in record:
            lines.append(f"* {name}: {record['error']}")
        for contender, row in record["contenders"].items():
            if row["status"] in ("failed", "wrong"):
                lines.append(f"* {name}, {contender}, {row['status']}: {row['reason']}")
    refused: dict[tuple[str, str], list[str]] = {}
    for name, record in result["cases"].items():
        for contender, row in record["contenders"].items():
            if row["status"] in ("refused", "not there"):
                reason = row["reason"].split(" group_norm_silu on ")[0]
                refused.setdefault((contender, reason[:160]), []).append(name)
    for (contender, reason), names in refused.items():
        lines.append(f"* {contender} does not serve {len(names)} ({names[0]}, …): {reason}")
    if result.get("unmeasured"):
        lines.append(f"* no time was left for {len(result['unmeasured'])} cases")
    return lines


def tables(result: dict, folder: Path) -> list[str]:
    """Everything about one device; of a stand-in only that it is none."""
    if result["stand_in"]:
        return [f"## {result['file']}", "", "A test of the benchmarks on the CPU: no measurement."]
    parity = result.get("parity") or {}
    passed = ", ".join(f"{n} {back_end}" for back_end, n in (parity.get("passed") or {}).items())
    defaults = {n: r["sdpa_default"] for n, r in result["cases"].items() if r.get("sdpa_default")}
    chosen = sorted(set(defaults.values()))
    lines = [f"## {describe(result)}", "", *NOTES, ""]
    lines += [f"Commit {result['commit']}, {result['date']}. {clocks(result)}", ""]
    outcome = f"Parity on the device: {parity.get('outcome', 'not run')}"
    outcome += f" ({passed} cases)" if passed else ""
    lines.append(f"{outcome}.{known(parity)}")
    lines += ["", "{} of {} cases measured.".format(*measured(result)), ""]
    if chosen:
        lines += [f"SDPA by itself takes: {', '.join(chosen)}.", ""]
    lines += [*anchors(result), "", *summary(result), ""]
    for name in plots(result, folder):
        lines += [f"![{name}]({name})", ""]
    for section, cases in sections(result).items():
        lines += [f"### {section}", "", *section_table(cases), ""]
    found = problems(result)
    if found:
        lines += ["### What failed, was refused or left out", "", *found]
    return lines


def known(parity: dict) -> str:
    """Where the tests did not run: what engine/evidence.json held for this GPU before."""
    if "known" not in parity:
        return ""
    entries = [
        f"{op} {backend} {cases}"
        for op, backends in parity["known"].items()
        for backend, cases in backends.items()
    ]
    return f" engine/evidence.json holds for this GPU, in cases: {', '.join(entries) or 'nothing'}."


def headline(result: dict) -> list[str]:
    """README's share: the headline cases, the best of ours against the best baseline."""
    lines = [f"{describe(result)}:", ""]
    lines += ["| case | ours | µs | best baseline | µs | × | GB/s | of copy |"]
    lines += ["| --- | --- | ---: | --- | ---: | ---: | ---: | ---: |"]
    for name, record in result["cases"].items():
        rows = timed(record)
        mine, other = record.get("best_ours"), record.get("best_baseline")
        if not record.get("headline") or mine not in rows or other not in rows:
            continue
        row, share = rows[mine], rows[mine].get("share_of_copy")
        lines.append(
            f"| {name} | {mine} | {row['cold']['us']:.1f} | {other} "
            f"| {rows[other]['cold']['us']:.1f} | {record['speedup']:.2f} "
            f"| {row['gb_per_s']:.0f} | {f'{share:.2f}' if share else '–'} |"
        )
    return lines


def plots(result: dict, folder: Path) -> list[str]:
    """Two pictures beside the JSON, share of copy and speed-up; → the names of those drawn."""
    rows = {n: r for n, r in result["cases"].items() if r.get("speedup")}
    if not rows:
        return []
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plots are drawn, the tables are complete")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    def shares(who):
        return [r["contenders"][r[who]].get("share_of_copy") or 0 for r in rows.values()]

    stem = Path(result["file"]).stem
    names, at = list(rows), list(range(len(rows)))
    drawn = []
    for kind in ("share", "speedup"):
        figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.2 * len(rows)), dpi=80)
        if kind == "share":
            axes.barh([y - 0.2 for y in at], shares("best_ours"), 0.4, label="ours")
            axes.barh([y + 0.2 for y in at], shares("best_baseline"), 0.4, label="best baseline")
            title = f"Useful bytes, share of a copy ({copy_rate(result['anchors']):.0f} GB/s)"
            axes.legend(loc="lower right")
        else:
            colours = {"win": "tab:green", "tie": "tab:gray", "loss": "tab:red"}
            speedups = [r["speedup"] for r in rows.values()]
            axes.barh(at, speedups, 0.6, color=[colours[r["verdict"]] for r in rows.values()])
            axes.set_xscale("log")
            title = "Best baseline's time over ours (green: win, gray: tie, red: loss)"
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set_yticks(at, names, fontsize=6)
        axes.invert_yaxis()
        axes.margins(y=0.01)
        axes.set_title(f"{result['device']['name']}: {title}", fontsize=9)
        figure.tight_layout()
        name = f"{stem}-{kind}.png"
        figure.savefig(folder / name)
        pyplot.close(figure)
        drawn.append(name)
    return drawn
