"""Arguments of a wrong kind: one sentence that names the argument, from every op."""

import numpy as np
import pytest
import torch

from engine import ops

X, W = torch.zeros(2, 8, 4, 4), torch.zeros(8)
ROWS = torch.zeros(10, 5)

CALLS = {
    "x is ndarray": lambda: ops.group_norm_silu(X.numpy(), W, W, 4),
    "weight is list": lambda: ops.group_norm_silu(X, [1.0] * 8, W, 4),
    "num_groups is True": lambda: ops.group_norm_silu(X, W, W, True),
    "num_groups is '4'": lambda: ops.group_norm_silu(X, W, W, "4"),
    "num_groups is 4.0": lambda: ops.group_norm_silu(X, W, W, 4.0),
    "8 channels cannot be split": lambda: ops.group_norm_silu(X, W, W, 3),
    "eps is None": lambda: ops.group_norm_silu(X, W, W, 4, None),
    "eps is nan": lambda: ops.group_norm_silu(X, W, W, 4, float("nan")),
    "x is list": lambda: ops.rms_norm_silu([1.0], W),
    "weight is float": lambda: ops.rms_norm_silu(X, 1.0),
    "eps is 'a'": lambda: ops.rms_norm_silu(X, W, eps="a"),
    "k is NoneType": lambda: ops.attention(X, None, X),
    "model_out is float": lambda: ops.reverse_step(X, 1.0, ROWS, 0, key=0),
    "step is 10": lambda: ops.reverse_step(X, X, ROWS, 10, key=0),
    "step is '0'": lambda: ops.reverse_step(X, X, ROWS, "0", key=0),
    "key is 1.5": lambda: ops.reverse_step(X, X, ROWS, 0, key=1.5),
    "clip is '1'": lambda: ops.reverse_step(X, X, ROWS, 0, key=0, clip="1"),
    "offset is -1": lambda: ops.reverse_step(X, X, ROWS, 0, key=0, offset=-1),
    "offset is 18446744073709551616": lambda: ops.reverse_step(X, X, ROWS, 0, key=0, offset=2**64),
    "scale is 'a'": lambda: ops.attention(X, X, X, scale="a"),
    "shape is": lambda: ops.noise(0, 0, 0, (-4,)),
    "stream is 4294967296, expected an integer, 0 … 2": lambda: ops.noise(0, 0, 2**32, (4,)),
    "stream is 'a'": lambda: ops.noise(0, 0, "a", (4,)),
    "unknown op 'nose'": lambda: ops.explain("nose", X),
    "unexpected keyword argument 'foo'": lambda: ops.explain("attention", X, X, X, foo=1),
    "missing a required argument": lambda: ops.explain("group_norm_silu", X),
}


@pytest.mark.parametrize("sentence", CALLS)
def test_one_sentence(sentence):
    with pytest.raises(ValueError, match=sentence) as raised:
        CALLS[sentence]()
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_that_is_not_there():
    with pytest.raises(ValueError, match=r"device cuda: (this torch|torch finds no GPU)"):
        ops.noise(0, 0, 0, (4,), device="cuda")


def test_whole_numbers_of_numpy_serve():
    assert ops.group_norm_silu(X, W, W, np.int64(4)).shape == X.shape
    assert torch.equal(ops.noise(np.int64(3), 0, 0, (4,)), ops.noise(3, 0, 0, (4,)))
