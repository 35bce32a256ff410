"""evaluation.json: what engine.evaluate has found of a run, a record per evaluation."""

from __future__ import annotations

import json
import math
from pathlib import Path

from .cli import neighbour
from .pictures import atomic

FILE = "evaluation.json"  # in the run's folder: a list of records


def read(folder: Path) -> list[dict]:
    """The records of a run's folder. Raises ValueError, one sentence, for a file that has none."""
    path = folder / FILE
    try:
        records = json.loads(path.read_text()) if path.exists() else []
        json.dumps(records, ensure_ascii=False).encode()  # as `add` will
    except (ValueError, RecursionError):  # no JSON, no text, a number too long, too deep
        records = None
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise _other(path)
    return records


def _other(path: Path) -> ValueError:
    return ValueError(f"{path} is not what engine.evaluate writes: move it away")


def add(folder: Path, record: dict) -> None:
    """Adds a record, atomically."""
    lines = [json.dumps(each, ensure_ascii=False) for each in (*read(folder), record)]
    with atomic(folder / FILE) as temporary:
        temporary.write_text("[\n" + ",\n".join(lines) + "\n]\n")


ROWS = (  # name, better is, what its figure rests on
    ("fid", "FID ↓", "against {count} training pictures"),
    ("kid", "KID ↓", "{kid_subsets} subsets of {kid_subset_size}, ± standard deviation"),
    ("is", "IS ↑", "{splits} splits, ± standard deviation"),
    ("precision", "precision ↑", "k = {neighbours}, {prc_real} training pictures"),
    ("recall", "recall ↑", "the same"),
    ("agreement", "agreement ↑", "classifier and label"),
)


def table(record: dict) -> str:
    """The record as text: settings, then a row per figure and a column per set of pictures."""
    s = record["settings"]
    lines = [
        f"{record['run']}: {record['trained_steps']} training steps, EMA weights; "
        f"{s['device']}, seed {record['seed']}"
    ]
    sets = record["results"]
    if sets:
        eta = f" and eta {s['eta']}" if s["eta"] else ""
        clip = "" if s["clip"] else ", no clip"
        scale = s.get("guidance")
        guided = "" if scale is None else f", guidance {scale:g}"
        lines.append(
            f"sampler: {s['sampler']} with {s['steps']} steps{eta}{clip}{guided}, {s['precision']}"
        )
        lines.append(f"features: {record['features']}")
        heads = [f"{name}, n = {found['n']}" for name, found in sets.items()]
        lines.append(" " * 14 + "".join(f"{head:>26}" for head in heads))
        first = next(iter(sets.values()))
        for name, title, basis in ROWS:
            if name not in first:
                continue
            cells = [figure(found, name) for found in sets.values()]
            facts = {**record["real"], **record, **first}
            lines.append(
                f"{title:<14}"
                + "".join(f"{cell:>26}" for cell in cells)
                + f"   {basis.format(**facts)}"
            )
    if "nll" in record:
        nll = record["nll"]
        error = nll["standard_error"]
        lines.append(
            f"bits/dim ↓    {nll['bits_per_dim']:.4f}{'' if error is None else f' ± {error:.4f}'}"
            f" (standard error) = prior {nll['prior']:.3g} + KL terms {nll['kl']:.4f} + decoder "
            f"{nll['decoder']:.4f}; T = {nll['T']}, {nll['n']} test pictures, {nll['precision']}, "
            f"terms over t in {nll['plot']}"
        )
    return "\n".join(lines)


def figure(found: dict, name: str) -> str:
    text = f"{found[name]:.4g}"
    deviation = found.get(f"{name}_std")
    return text if deviation is None else f"{text} ± {deviation:.2g}"


def terms_of(run: Path) -> dict:
    """The "terms" over t of the last bits/dim of a run: "vb" and "mse" (T,)."""
    from . import checkpoint  # late: engine.plots --help does not wait for torch

    run = run.expanduser()
    folder, name = (run, checkpoint.FILE) if run.is_dir() else (run.parent, run.name)
    # Records from before there were several checkpoints in a folder have no "file".
    records = [r for r in read(folder) if r.get("file", name) == name]
    found = [r["nll"] for r in records if r.get("nll") is not None]
    if not found:
        hint = "" if run.exists() else neighbour(run)
        raise ValueError(
            f"{run} has no bits/dim yet{hint}: run python -m engine.evaluate {run} --metrics nll"
        )
    terms = found[-1].get("terms") if isinstance(found[-1], dict) else None
    if not isinstance(terms, dict) or not all(_numbers(terms.get(k)) for k in ("vb", "mse")):
        raise _other(folder / FILE)
    return terms


def _numbers(values) -> bool:
    """Whether it is a list of numbers, not too large to be added; NaN and infinity are."""
    if not isinstance(values, list) or not all(type(v) in (int, float) for v in values):
        return False
    return all(v != v or v == math.inf or abs(v) < 1e30 for v in values)
