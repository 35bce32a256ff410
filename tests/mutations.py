"""What fuzzing does to a safetensors file: bytes changed blindly, and its header with meaning."""

import json
import random

import numpy as np
from hypothesis import strategies as st

# Each takes bytes and a random.Random; the last ones know safetensors' header.


def flip(raw: bytes, rng) -> bytes:
    changed = bytearray(raw)
    for _ in range(rng.choice((1, 1, 2, 20))):
        changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def flip_near_the_start(raw: bytes, rng) -> bytes:
    changed = bytearray(raw)
    changed[rng.randrange(min(len(raw), 4000))] = rng.randrange(256)
    return bytes(changed)


def truncate(raw: bytes, rng) -> bytes:
    return raw[: rng.choice((rng.randrange(len(raw)), rng.randrange(64), len(raw) - 1))]


def insert(raw: bytes, rng) -> bytes:
    at = rng.choice((rng.randrange(len(raw)), len(raw)))
    return raw[:at] + rng.randbytes(rng.choice((1, 8, 100))) + raw[at:]


def cut_out(raw: bytes, rng) -> bytes:
    at = rng.randrange(len(raw))
    return raw[:at] + raw[at + rng.choice((1, 4, 64)) :]


def splice(raw: bytes, rng) -> bytes:
    """A piece of the file over another piece of it."""
    size = rng.choice((4, 64, 1024))
    source, target = (rng.randrange(max(1, len(raw) - size)) for _ in range(2))
    return raw[:target] + raw[source : source + size] + raw[target + size :]


def header_length(raw: bytes, rng) -> bytes:
    length = int.from_bytes(raw[:8], "little")
    value = rng.choice((0, 1, length - 1, length + 1, length + 8, 2**27, 2**40, 2**63, 2**64 - 1))
    return (value % 2**64).to_bytes(8, "little") + raw[8:]


BLIND = (flip, flip_near_the_start, truncate, insert, cut_out, splice)


def edit(change):
    """A mutation of the header: change(entries: list of [name, entry], rng)."""

    def mutation(raw: bytes, rng) -> bytes:
        start = 8 + int.from_bytes(raw[:8], "little")
        try:
            entries = [[k, v] for k, v in json.loads(raw[8:start]).items()]
            change(entries, rng)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            return raw  # a mutation before this one has left no header
        pairs = (f"{json.dumps(k)}: {json.dumps(v)}" for k, v in entries)  # names may come twice
        text = ("{" + ", ".join(pairs) + "}").encode()
        return len(text).to_bytes(8, "little") + text + raw[start:]

    mutation.__name__ = change.__name__
    return mutation


def some(entries, rng) -> list:
    return rng.choice([each for each in entries if each[0] != "__metadata__"])


@edit
def dtype(entries, rng):
    some(entries, rng)[1]["dtype"] = rng.choice(
        ("F64", "F16", "BF16", "I32", "U32", "BOOL", "F8_E4M3", "F4", "C64", "X", "", None, 3)
    )


@edit
def shape(entries, rng):
    entry = some(entries, rng)[1]
    reversed_shape, flat = entry["shape"][::-1], [int(np.prod(entry["shape"]))]
    huge = ([2**40], [2**62, 4], [2**63 - 1], [2**64], [1] * 500, [2**32, 2**32], [0])
    entry["shape"] = rng.choice((reversed_shape, flat, [], [-1], None, "x", *huge))


@edit
def offsets(entries, rng):
    entry = some(entries, rng)[1]
    first, last = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        ([first + 4, last + 4], [last, first], [0, 2**50], [first], [-1, 4], None, [0, last])
    )


@edit
def swap(entries, rng):
    one, two = some(entries, rng)[1], some(entries, rng)[1]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]


@edit
def swap_names(entries, rng):
    one, two = some(entries, rng), some(entries, rng)
    one[0], two[0] = two[0], one[0]


@edit
def rename(entries, rng):
    entry = some(entries, rng)
    entry[0] = rng.choice(("", "x", entry[0] + " ", entry[0].upper(), "\n\x1b[31m", "__metadata__"))


@edit
def twice(entries, rng):
    """A name twice, of two places."""
    entry, other = some(entries, rng), some(entries, rng)
    entries.insert(rng.randrange(len(entries) + 1), [entry[0], other[1]])


@edit
def lose(entries, rng):
    entries.remove(some(entries, rng))


@edit
def metadata(entries, rng):
    found = dict(entries)["__metadata__"]
    key = rng.choice(list(found))
    text, at = found[key], rng.randrange(len(found[key]))
    found[key] = rng.choice(
        (
            text[:at] + chr(rng.randrange(32, 127)) + text[at + 1 :],
            text[:at],
            text.replace("3", "4", 1),
            text.replace('"format": 2', '"format": 1'),
            text.replace('"format": 2', f'"format": {rng.choice((0, 3, -1, "{}", 2.0, 1e400))}'),
            "",
            "[" * 50_000,
            "9" * 5000,
            None,
            {"a": 1},
        )
    )


@edit
def lose_metadata(entries, rng):
    found = dict(entries)["__metadata__"]
    del found[rng.choice(list(found))]


HEADER = (dtype, shape, offsets, swap, swap_names, rename, twice, lose, metadata, lose_metadata)
ALL = (*BLIND, header_length, *HEADER)

mutations = st.tuples(st.lists(st.sampled_from(ALL), min_size=1, max_size=3), st.integers(0, 2**32))
blind = st.tuples(st.lists(st.sampled_from(BLIND), min_size=1, max_size=2), st.integers(0, 2**32))


def mutated(raw: bytes, drawn) -> bytes:
    steps, seed = drawn
    rng = random.Random(seed)
    for step in steps:
        raw = step(raw, rng) or b"\0"
    return raw
