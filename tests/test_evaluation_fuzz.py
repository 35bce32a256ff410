"""A damaged evaluation.json: it is read as it is, or one sentence says what to do with it."""

import copy
import json
import random

import pytest
from mutations import cut_out, flip, insert, splice, truncate

from engine import evaluation

RECORDS = [
    {"run": "runs/a", "trained_steps": 7, "results": {"EMA": {"fid": 3.5, "n": 10}}},
    {
        "run": "rüns/a",
        "file": "checkpoint.safetensors",
        "nll": {"terms": {"vb": [2, 0.5], "mse": [0.1, 0.2]}},
    },
]
HOSTILE = (
    None,
    True,
    0,
    -1,
    10**400,
    float("nan"),
    float("inf"),
    -float("inf"),
    "",
    "\ud800",
    [],
    {},
    [[]],
)
TEXTS = (
    "",
    "[",
    "null",
    "[1]",
    '[{"a": ' + "9" * 5000 + "}]",
    "[" * 100_000,
    "\x00",
    '["\\ud800"]',
    "[{}",
    "{}",
)


def looked_at(folder) -> None:
    """What reads the file does so, or raises ValueError, one sentence that names it."""
    path = folder / evaluation.FILE
    for use in (evaluation.read, evaluation.terms_of, lambda f: evaluation.add(f, {"run": "b"})):
        before = path.read_bytes()
        try:
            found = use(folder)
        except ValueError as error:
            said = str(error)
            assert said.count("\n") == 0 and path.read_bytes() == before
            assert "is not what engine.evaluate writes: move" in said or "no bits/dim yet" in said
        else:
            if use is evaluation.terms_of:
                assert all(isinstance(float(v), float) for key in ("vb", "mse") for v in found[key])
    try:
        evaluation.read(folder)
    except ValueError:
        return
    assert json.loads(path.read_text())[-1] == {"run": "b"}  # what was read can be added to


def places(value, path=()):
    yield path
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, each in inner:
        yield from places(each, (*path, key))


@pytest.mark.parametrize("seed", range(4))
def test_bytes(tmp_path, seed):
    random_ = random.Random(seed)
    evaluation.add(tmp_path, RECORDS[0])
    evaluation.add(tmp_path, RECORDS[1])
    whole = (tmp_path / evaluation.FILE).read_bytes()
    for _ in range(60):
        damage = random_.choice((flip, truncate, insert, cut_out, splice))
        (tmp_path / evaluation.FILE).write_bytes(damage(whole, random_))
        looked_at(tmp_path)


def test_values_in_the_place_of_others(tmp_path):
    for path in places(RECORDS):
        for value in HOSTILE:
            records = copy.deepcopy(RECORDS)
            holder = records
            for key in path[:-1]:
                holder = holder[key]
            if path:
                holder[path[-1]] = value
            else:
                records = value
            (tmp_path / evaluation.FILE).write_text(json.dumps(records))
            looked_at(tmp_path)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:12])
def test_texts(tmp_path, text):
    (tmp_path / evaluation.FILE).write_text(text)
    looked_at(tmp_path)


def test_a_folder_of_that_name_is_said_before_the_work(tmp_path):
    (tmp_path / evaluation.FILE).mkdir()
    with pytest.raises(OSError, match=r"evaluation\.json"):
        evaluation.read(tmp_path)
