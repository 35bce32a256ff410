"""Mutated checkpoint files: the very same content or one sentence, never anything else."""

import json
import os
import pickle
import resource
import zipfile

import numpy as np
import openai_unet
import pytest
import torch
from safetensors.torch import save_file
from test_checkpoint import SMALL, content
from test_foreign import ddpm_variables, published

import engine
from engine import checkpoint
from engine.checkpoint import CheckpointError, load_ddpm_tf, load_diffusers, load_openai

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from mutations import blind, mutated, mutations  # noqa: E402

MEMORY = 600e6  # bytes by which the process may grow, libraries loaded on the way included


def fuzzed(examples: int):
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@pytest.fixture(scope="module", autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before < MEMORY


def one_sentence(error: Exception) -> None:
    assert type(error) in (ValueError, CheckpointError, checkpoint.Damaged), repr(error)
    assert str(error).isprintable() and 10 < len(str(error)) < 2100


# --- checkpoints of this engine -----------------------------------------------------------------


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """A folder, a checkpoint's bytes, and what is in it."""
    folder = tmp_path_factory.mktemp("fuzz")
    tensors, info = content(0.5)
    for name, value in tensors.items():
        value.add_(len(name))  # so that tensors of one shape differ
    checkpoint.save(folder / "whole.safetensors", tensors, info)
    raw = (folder / "whole.safetensors").read_bytes()
    return folder, raw, checkpoint.read(folder / "whole.safetensors")


def test_a_mutated_checkpoint_is_the_same_or_refused(original):
    folder, raw, (tensors, info) = original
    file, loaded, refused = folder / "mutated.safetensors", [], []

    @fuzzed(300)
    @given(mutations)
    def check(drawn):
        file.unlink(missing_ok=True)  # a tensor of before may be mapped
        file.write_bytes(mutated(raw, drawn))
        for prefix in ("", "ema.", "none."):
            try:
                found, its = checkpoint.read(file, prefix)
            except Exception as error:
                one_sentence(error)
                refused.append(error)
                continue
            loaded.append(drawn)
            assert its == info
            expected = {k: v for k, v in tensors.items() if k.startswith(prefix)}
            assert found.keys() == expected.keys()
            for name, value in expected.items():
                assert found[name].dtype == value.dtype and torch.equal(found[name], value), name

    check()
    assert len(refused) > 300 and loaded  # some mutations change what is not read


HOSTILE = (
    None, -1, 0, 10**6, 10**9, 10**30, 1.5, float("nan"), "x", "\n", [], [10**9], [0], {}, True,
    {"a": 1}, [[1]], [1] * 100_000, "cosine",
)  # fmt: skip


def test_hostile_metadata_with_right_checksums_is_refused_or_harmless(original):
    """A checksum is no signature: whoever writes the file may write any options into it."""
    folder, _, (tensors, info) = original
    file = folder / "hostile.safetensors"
    places = [(key, None) for key in info] + [
        (key, name) for key in ("model", "diffusion", "train") for name in (*info[key], "other")
    ]

    @fuzzed(150)
    @given(st.sampled_from(places), st.sampled_from(HOSTILE))
    def check(place, value):
        changed = {k: dict(v) if isinstance(v, dict) else v for k, v in info.items()}
        if place[1] is None:
            changed[place[0]] = value
        else:
            changed[place[0]][place[1]] = value
        file.unlink(missing_ok=True)
        checkpoint.save(file, tensors, changed)
        for load in (engine.load, checkpoint.load_classifier):
            try:
                load(file)
            except Exception as error:
                one_sentence(error)

    check()


@pytest.mark.parametrize(
    "changes",
    [{"num_res_blocks": 10**9}, {"channel_mult": [1] * 10**5}, {"model_channels": 10**6}],
    ids=lambda changes: next(iter(changes)),
)
def test_an_endless_model_is_never_begun(original, changes):
    folder, _, (tensors, info) = original
    file = folder / "endless.safetensors"
    checkpoint.save(file, tensors, {**info, "model": info["model"] | changes})
    with pytest.raises(CheckpointError, match=r"has .* blocks, and|do not belong|size mismatch"):
        engine.load(file)


def test_tensors_of_other_shapes_do_not_fit(original):
    folder, _, (tensors, info) = original
    for name in ("model.conv_in.weight", "ema.conv_in.weight", "ema.norm_out.bias"):
        for value in (torch.zeros(1), torch.zeros(()), torch.zeros(1, 8, 3, 3), torch.zeros(0)):
            checkpoint.save(folder / "shape.safetensors", {**tensors, name: value}, info)
            with pytest.raises(CheckpointError, match=f"size mismatch for {name}"):
                engine.load(folder / "shape.safetensors")


# --- other projects' ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """Files of every kind, each with its loader, in a folder of its own."""
    folder = tmp_path_factory.mktemp("foreign")
    spec, options = published("iddpm")
    state = openai_unet.random_state(spec)
    torch.save(state, folder / "openai.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file({k: v.contiguous() for k, v in state.items()}, folder / "openai.safetensors")
    np.savez(folder / "openai.npz", **{k: v.numpy() for k, v in state.items()})
    np.savez_compressed(folder / "ddpm.npz", **{k: v.numpy() for k, v in ddpm_variables().items()})
    checkpoint.save_diffusers(engine.UNet(**SMALL), folder / "diffusers")
    tf = dict(image_size=8, in_channels=2, model_channels=16, channel_mult=(1, 2))
    tf |= dict(num_res_blocks=1, attention_resolutions=(4,), num_groups=4, embedding="sin_cos")

    def openai(path):
        return load_openai(path, options, "h3d")

    def ddpm(path):
        return load_ddpm_tf(path, tf)

    kinds = dict.fromkeys(("openai.pt", "old.pt", "openai.safetensors", "openai.npz"), openai)
    return folder, state, {**kinds, "ddpm.npz": ddpm}


def test_mutated_foreign_files_are_models_or_refused(foreign):
    folder, _, kinds = foreign
    raw = {name: (folder / name).read_bytes() for name in kinds}
    made = []

    @fuzzed(250)
    @given(st.sampled_from(sorted(kinds)), st.booleans(), blind, mutations)
    def check(name, header, drawn, with_header):
        drawn = with_header if header and name.endswith(".safetensors") else drawn
        path = folder / f"mutated-{name}"
        path.unlink(missing_ok=True)
        path.write_bytes(mutated(raw[name], drawn))
        try:
            made.append(kinds[name](path))
        except Exception as error:
            one_sentence(error)

    check()
    assert made


def test_mutated_diffusers_folders_are_models_or_refused(foreign):
    source = foreign[0] / "diffusers"
    config = json.loads((source / "config.json").read_text())
    weights = (source / "diffusion_pytorch_model.safetensors").read_bytes()
    folder, made = foreign[0] / "other", []
    folder.mkdir()
    keys = [*config, "_label_dropout", "sample_size", "attn_norm_num_groups", "other"]

    @fuzzed(200)
    @given(st.sampled_from(("value", "text", "weights")), st.sampled_from(keys), mutations, blind,
           st.sampled_from(HOSTILE))  # fmt: skip
    def check(kind, key, drawn, of_text, value):
        text = json.dumps({**config, key: value} if kind == "value" else config).encode()
        (folder / "config.json").write_bytes(mutated(text, of_text) if kind == "text" else text)
        file = folder / "diffusion_pytorch_model.safetensors"
        file.unlink(missing_ok=True)
        file.write_bytes(mutated(weights, drawn) if kind == "weights" else weights)
        try:
            made.append(load_diffusers(folder))
        except Exception as error:
            one_sentence(error)

    check()
    assert made


def test_odd_things_in_the_place_of_weights(foreign):
    folder, state, kinds = foreign
    name = next(iter(state))
    odd = {
        "sparse": torch.eye(3).to_sparse(),
        "complex": torch.zeros(state[name].shape, dtype=torch.complex64),
        "meta": torch.empty(state[name].shape, device="meta"),
        "scalar": torch.zeros(()),
        "empty": torch.zeros(0),
        "text": "weights",
        "number": 3,
        "list": [torch.zeros(1)],
        "nothing": None,
    }
    for value in odd.values():
        torch.save({**state, name: value}, folder / "odd.pt")
        with pytest.raises(CheckpointError) as error:
            kinds["openai.pt"](folder / "odd.pt")
        one_sentence(error.value)
    for whole in (
        {3: torch.zeros(1)},
        {None: 1},
        [1],
        torch.zeros(3),
        7,
        {"a\nb\x1b[31m": odd["empty"]},
    ):
        torch.save(whole, folder / "odd.pt")
        with pytest.raises(CheckpointError) as error:
            kinds["openai.pt"](folder / "odd.pt")
        one_sentence(error.value)
    for value in (np.array("text"), np.array(["2020"], "M8[Y]"), np.array([(1, 2)], "i4,i4")):
        np.savez(folder / "odd.npz", **{name: value})
        with pytest.raises(CheckpointError) as error:
            kinds["openai.npz"](folder / "odd.npz")
        one_sentence(error.value)


def test_a_tensor_that_is_larger_than_its_file_is_refused(foreign):
    """Rearranging its channels would make a copy of the size that it claims."""
    folder, state, kinds = foreign
    name = next(name for name in state if name.endswith("qkv.weight"))
    torch.save({**state, name: torch.zeros(1).expand(3 * 2**22, 32, 1)}, folder / "large.pt")
    with pytest.raises(CheckpointError, match=r"of shape .* that repeats fewer numbers"):
        kinds["openai.pt"](folder / "large.pt")


# --- pickle -------------------------------------------------------------------------------------


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def evil(tmp_path):
    """Files that make a folder when they are unpickled, by name."""
    state, mark = {"conv_in.weight": torch.zeros(1)}, tmp_path / "executed"
    folder = tmp_path / "evil"
    folder.mkdir()
    torch.save({**state, "x": Evil(mark)}, folder / "new.pt")
    torch.save({**state, "x": Evil(mark)}, folder / "old.pt", _use_new_zipfile_serialization=False)
    (folder / "plain.pkl").write_bytes(pickle.dumps(Evil(mark), 2))
    (folder / "plain.pt").write_bytes(pickle.dumps(Evil(mark), 2))
    (folder / "no_suffix").write_bytes(pickle.dumps({"x": Evil(mark)}, 2))
    np.savez(folder / "objects.npz", x=np.array([Evil(mark)], dtype=object))
    np.save(folder / "one", np.array([Evil(mark)], dtype=object))
    (folder / "one.npy").rename(folder / "one.npz")
    with zipfile.ZipFile(folder / "archive.npz", "w") as archive:
        archive.writestr("x.npy", pickle.dumps(Evil(mark), 2))
    for name in ("as.safetensors", checkpoint.FILE, "diffusion_pytorch_model.bin"):
        torch.save({**state, "x": Evil(mark)}, folder / name)
    config = {"_class_name": "UNet2DModel", "block_out_channels": [32, 64]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder, mark


@pytest.mark.parametrize("forced", [False, True], ids=["", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"])
def test_a_malicious_pickle_is_refused_and_nothing_runs(evil, monkeypatch, forced):
    from engine import inception

    folder, mark = evil
    if forced:  # people set it to make old scripts run
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    _, options = published("iddpm")
    loaders = {
        "load": engine.load,
        "classifier": checkpoint.load_classifier,
        "openai": lambda path: load_openai(path, options, "h3d"),
        "openai classifier": lambda path: checkpoint.load_openai_classifier(path, "adm-64"),
        "ddpm": lambda path: load_ddpm_tf(path, SMALL),
        "diffusers": lambda path: load_diffusers(folder),
        "inception": inception.load,
    }
    for file in sorted(folder.iterdir()):
        for loader, load in loaders.items():
            with pytest.raises(ValueError) as error:
                load(file)
            assert str(error.value).isprintable(), (file, loader)
            assert not mark.exists(), (file, loader)
    with pytest.raises(FileNotFoundError):  # the mark does appear where a file is unpickled
        assert not mark.exists()
        pickle.loads((folder / "plain.pkl").read_bytes())
        mark.rmdir()
        raise FileNotFoundError
