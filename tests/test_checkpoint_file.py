"""The file of a checkpoint: checksums, its older format, disks on which it cannot be written."""

import contextlib
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_checkpoint import SMALL, content

import engine
from engine import cache, checkpoint, checkpoint_file, train
from engine.checkpoint_file import KEY, SUM, CheckpointError, Damaged, Unsaved


@pytest.fixture
def file(tmp_path):
    path = tmp_path / checkpoint.FILE
    checkpoint.save(path, *content(0.5))
    return path


def metadata(file) -> dict:
    with safe_open(file, "pt") as opened:
        return opened.metadata()


DTYPES = [
    *(torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_shape_and_layout_comes_back(tmp_path, dtype):
    some = torch.arange(2 * 3 * 4 * 5).reshape(2, 3, 4, 5).remainder(120).to(dtype)
    tensors = {
        "scalar": some[1, 2, 3, 4],
        "none": some[:0],
        "odd": some.flatten()[:3],
        "channels_last": some.contiguous(memory_format=torch.channels_last),
        "view": some[:, 1:, ::2].transpose(1, 3),
        "with gradient": some.clone().requires_grad_(dtype.is_floating_point),
        "ein schöner Name/ü": torch.ones(3, dtype=torch.uint8),
        "wide": torch.ones(1, dtype=torch.float64),
    }
    path = tmp_path / "a.safetensors"
    checkpoint_file.write(path, tensors, {"α": [1, None, "\n"]})
    for found in (checkpoint_file.read(path)[0], load_file(path)):
        assert found.keys() == tensors.keys()
        for name, value in tensors.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert checkpoint_file.read(path)[1] == {"α": [1, None, "\n"], "format": 2}
    assert checkpoint_file.read(path, "v")[0].keys() == {"view"}


def test_a_folder_whose_name_is_no_utf_8(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    try:
        folder.mkdir()
    except OSError:
        pytest.skip("this disk has no such names")
    tensors, info = content(0.5)
    for step in (3, 4):
        checkpoint.save(folder / checkpoint.FILE, tensors, info | {"step": step}, keep_last=2)
    assert [checkpoint.step_of(file) for file in checkpoint.files(folder)] == [4, 3]
    found, _ = checkpoint.read(folder)
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    (folder / checkpoint.FILE).write_bytes(b"")
    with pytest.raises(Damaged, match="truncated"):
        checkpoint.read(folder / checkpoint.FILE)


def test_a_byte_that_has_changed_is_told(file):
    """Each tensor has a checksum of its own, and a reader of some tensors checks just these."""
    raw, names = file.read_bytes(), list(checkpoint.read(file)[0])
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    for name in (names[0], names[len(names) // 2], "diffusion.betas"):
        first, last = header[name]["data_offsets"]
        for at in (first, last - 1):
            changed = bytearray(raw)
            changed[start + at] ^= 1
            file.write_bytes(changed)
            with pytest.raises(Damaged, match=re.escape(f"damaged: {name} has another checksum")):
                engine.load(file)
            part = "ema." if name.startswith("model.") else "model."
            assert checkpoint.read(file, part)[0]  # the damage is elsewhere
            with pytest.raises(Damaged):
                checkpoint.read(file, name)
    text = raw.replace(b'\\"step\\": 3', b'\\"step\\": 8')
    assert text != raw
    file.write_bytes(text)
    with pytest.raises(Damaged, match="its metadata has another checksum"):
        checkpoint.read(file, "none.")


def test_a_checkpoint_without_all_its_checksums_is_none(file):
    """Nobody turns a damaged file into one of format 1, which has none."""
    tensors, found = load_file(file), metadata(file)
    text = found[KEY]
    for changed in (
        {KEY: text},
        {KEY: text.replace('"format": 2', '"format": 1')},
        {KEY: text.replace('"format": 2', '"format": 1'), SUM: found[SUM]},
        {KEY: text, SUM: "0" * 64},
        {KEY: text, SUM: ""},
        {KEY: text.replace('"format": 2', '"format": true')},
        {KEY: text.replace('"format": 2', '"format": 0')},
        {KEY: text.replace('"format": 2', '"format": -7')},
        {KEY: "[" * 100_000},
        {KEY: "1" * 10_000},
        {SUM: found[SUM]},
    ):
        save_file(tensors, file, changed)
        with pytest.raises(Damaged) as error:
            checkpoint.read(file, "none.")
        assert "\n" not in str(error.value) and len(str(error.value)) < 700
    lost = {k: v for k, v in tensors.items() if k != "diffusion.betas"}
    for others in (lost, tensors | {"extra": torch.zeros(1)}):
        save_file(others, file, found)
        with pytest.raises(Damaged, match="its checksums are not those of its tensors"):
            checkpoint.read(file, "none.")


def test_format_1_is_read_and_written_anew_as_2(file):
    tensors, info = content(0.25)
    text = json.dumps({"format": 1, **info})
    save_file({k: v.contiguous() for k, v in tensors.items()}, file, {KEY: text})  # as it was
    found, old = checkpoint.read(file)
    assert old == json.loads(text) | {"format": 2}
    assert all(torch.equal(found[name], value) for name, value in tensors.items())
    assert engine.load(file)[2]["step"] == 3
    checkpoint.save(file, found, old)
    assert SUM in metadata(file) and json.loads(metadata(file)[KEY])["format"] == 2
    assert checkpoint.read(file)[1] == old


def test_every_older_format_has_a_migration(file, monkeypatch):
    assert sorted(checkpoint_file.MIGRATIONS) == list(range(1, checkpoint_file.FORMAT))
    monkeypatch.setattr(checkpoint_file, "FORMAT", 4)
    steps = {2: lambda info: {**info, "b": info["step"]}, 3: lambda info: {**info, "c": info["b"]}}
    monkeypatch.setattr(checkpoint_file, "MIGRATIONS", checkpoint_file.MIGRATIONS | steps)
    info = checkpoint.read(file)[1]
    assert info["format"] == 4 and info["b"] == info["c"] == 3
    checkpoint.save(file, *content())
    monkeypatch.undo()
    with pytest.raises(
        CheckpointError, match=r"has checkpoint format 4, .* up to 2: a newer versi"
    ):
        checkpoint.read(file)


def test_a_damaged_file_of_the_cache_is_made_anew(tmp_path):
    path = tmp_path / "a" / "b.safetensors"
    assert cache.load(path) is None
    cache.store(path, {"x": torch.ones(100)}, {"count": 3})
    tensors, info = cache.load(path)
    assert tensors["x"].sum() == 100 and info["count"] == 3
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    assert cache.load(path) is None
    path.write_bytes(b"")
    assert cache.load(path) is None


def test_the_umask_stays_as_it_is(tmp_path, monkeypatch):
    """It is all threads': one that makes a file meanwhile would make it for everyone to write."""
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("the umask was changed"))
    checkpoint_file.write(tmp_path / "a.safetensors", {"x": torch.ones(3)}, {})


# --- where it cannot be written -----------------------------------------------------------------

BIG = {"x": torch.ones(150_000)}  # 600 kB
INFO = {"model": {}, "diffusion": {}, "train": {}, "step": 1, "skipped": 0}


def assert_kept(path) -> None:
    """The sentence; the old file intact, under its one name; no other file."""
    with pytest.raises(Unsaved) as error:
        checkpoint.save(path, {"x": BIG["x"] + 1}, {**INFO, "step": 2}, keep_last=3)
    said = str(error.value)
    assert said.startswith(f"{path.name} cannot be written in {path.parent}") and "\n" not in said
    assert "it needs 0.6 MB, and the one there before is as it was" in said
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    tensors, info = checkpoint.read(path.parent)
    assert torch.equal(tensors["x"], BIG["x"]) and info["step"] == 1
    return said


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 1 MB; skips where none can be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no disk can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk(small_disk):
    path = small_disk / checkpoint.FILE
    checkpoint.save(path, BIG, INFO, keep_last=3)
    said = assert_kept(path)
    assert re.search(r"where 0\.\d MB are free: No space left on device", said), said
    checkpoint.save(path, {"x": torch.ones(9)}, {**INFO, "step": 2}, keep_last=2)  # room for that
    assert len(checkpoint.files(small_disk)) == 2


def test_a_disk_mounted_read_only(small_disk):
    path = small_disk / checkpoint.FILE
    checkpoint.save(path, BIG, INFO, keep_last=3)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in assert_kept(path)


@contextlib.contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_without_modes(tmp_path, monkeypatch):
    """FAT refuses those that it cannot keep."""

    def fchmod(file, mode):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "fchmod", fchmod)
    checkpoint_file.write(tmp_path / "a.safetensors", BIG, INFO)
    assert torch.equal(checkpoint_file.read(tmp_path / "a.safetensors")[0]["x"], BIG["x"])


@pytest.mark.parametrize(
    "told",
    [
        "I/O error: No space left on device (os error 28)",
        "Error while serializing: I/O error: No space left on device (os error 28)",
        'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space" })',
    ],
)
def test_how_versions_of_safetensors_tell_of_a_full_disk(tmp_path, monkeypatch, told):
    path = tmp_path / checkpoint.FILE
    checkpoint.save(path, BIG, INFO, keep_last=3)

    def save_file(*arguments):
        raise SafetensorError(told)

    monkeypatch.setattr("safetensors.torch.save_file", save_file)
    assert "No space left on device" in assert_kept(path)


@pytest.mark.parametrize("size", [0, 1000, 300_000, 600_000])
def test_a_write_that_ends_half_way(tmp_path, size):
    path = tmp_path / checkpoint.FILE
    checkpoint.save(path, BIG, INFO, keep_last=3)
    with largest_file(size):
        assert "File too large" in assert_kept(path)


def test_a_folder_of_another_user():
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / checkpoint.FILE
        checkpoint.save(path, BIG, INFO, keep_last=3)
        os.chmod(name, 0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)  # nobody; root may write anywhere
        try:
            assert "Permission denied" in assert_kept(path)
        finally:
            if root:
                os.seteuid(0)
            os.chmod(name, 0o755)


def test_a_first_checkpoint_that_cannot_be_written(tmp_path):
    with largest_file(1000), pytest.raises(Unsaved, match=r"0\.6 MB, and nothing is left of it"):
        checkpoint.save(tmp_path / checkpoint.FILE, BIG, INFO)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Unsaved, match="nowhere: No such file or directory"):
        checkpoint.save(tmp_path / "nowhere" / checkpoint.FILE, BIG, INFO)


def test_a_folder_of_diffusers_that_cannot_be_written(tmp_path):
    model = engine.UNet(**SMALL)
    with (
        largest_file(1000),
        pytest.raises(Unsaved, match=f"cannot be written in {tmp_path}: .*oo l"),
    ):
        checkpoint.save_diffusers(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(Unsaved, match="file: File exists"):
        checkpoint.save_diffusers(model, tmp_path / "file")


def test_training_on_a_full_disk_ends_with_a_sentence(work, capsys):
    options = ["--dataset", "pictures", "--out", "run", "--timesteps", "10", "--batch", "4"]
    options += ["--samples", "0", "--sample-every", "0", "--device", "cpu", "--no-tensorboard"]
    options += ["--preset", "cifar10", "--steps", "4", "--save-every", "2", "--log-every", "1"]
    first = work / "first"
    assert train.main([*options, "--steps", "2", "--out", str(first)]) == 0
    # Before the first step there is no optimiser state, so that this checkpoint is smaller.
    small, whole = sorted(path.stat().st_size for path in checkpoint.files(first))
    capsys.readouterr()
    with largest_file((small + whole) // 2):
        assert train.main(options) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert re.match(
        r"error: checkpoint.safetensors cannot be written in run, where .*it needs", said
    )
    assert {path.name for path in (work / "run").iterdir()} == {checkpoint.FILE, "metrics.jsonl"}
    assert checkpoint.read("run")[1]["step"] == 0
    assert train.main(["--resume", "run"]) == 0
    assert checkpoint.read("run")[1]["step"] == 4
