import math
import os
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from experiment import checkpoints
from experiment.cli import CheckpointError
from models.cifar_cnn import CifarCNN
from models.mnist_cnn import MnistCNN


def test_a_write_that_fails_leaves_the_old_file_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "file.json"
    checkpoints.write_whole(path, b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_whole(path, b"new content")
    assert path.read_bytes() == b"old"
    assert os.listdir(path.parent) == ["file.json"]


def test_files_have_the_mode_that_the_umask_gives(tmp_path):
    (tmp_path / "plain").write_bytes(b"")
    checkpoints.write_whole(tmp_path / "whole", b"")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_packed_by_hand():
    packed = checkpoints.pack_sparse(torch.tensor([[0.0, 7.0, 0.0]]))
    assert packed["shape"] == [1, 3]
    assert packed["positions"].tolist() == [0b01000000]
    assert packed["values"].tolist() == [7.0]


@given(
    size=st.integers(1, 3000),
    density=st.sampled_from([0, 0.001, 0.01, 0.5, 1]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.int64]),
    seed=st.integers(0, 2**32),
)
def test_unpacking_gives_back_what_was_packed(size, density, dtype, seed):
    numbers = torch.Generator().manual_seed(seed)
    tensor = (
        (torch.randn(size, generator=numbers) * 100 * (torch.rand(size, generator=numbers) < density))
        .to(dtype)
        .view(1, size, 1)
    )
    packed = checkpoints.pack_sparse(tensor)
    assert torch.equal(checkpoints.unpack_sparse(packed), tensor)
    indices_nbytes, bits_nbytes = 4 * int(tensor.count_nonzero()), math.ceil(size / 8)
    assert packed["positions"].nbytes == min(indices_nbytes, bits_nbytes)


@pytest.mark.parametrize(("sparsity", "most_bytes"), [(0.5, 930_000), (0.9, 240_000), (0.99, 45_000)])
def test_a_sparse_checkpoint_is_small_and_loads_exactly(tmp_path, sparsity, most_bytes):
    model = MnistCNN().to(memory_format=torch.channels_last)
    for parameter in model.parameters():
        parameter.data[torch.rand_like(parameter) < sparsity] = 0
    checkpoints.write_whole(tmp_path / "model.pt", checkpoints.network_bytes(model))
    assert (tmp_path / "model.pt").stat().st_size < most_bytes
    again = checkpoints.load_model(tmp_path / "model.pt", MnistCNN)
    assert again.widths == (20, 50, 500)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_network_comes_back_from_its_file(tmp_path):
    model = MnistCNN((3, 4, 5))
    (tmp_path / "network.pt").write_bytes(checkpoints.network_bytes(model))
    again = checkpoints.load_model(tmp_path / "network.pt", MnistCNN)
    assert again.widths == (3, 4, 5)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


class Stranger:
    """What runs code where a pickle is trusted."""

    def __reduce__(self):
        return os.mkdir, ("/tmp/this-must-not-appear",)


def small_checkpoint(version=CifarCNN.VERSION, **state):
    """That of a small CifarCNN, some of its tensors replaced, those that are None left out."""
    model = CifarCNN((2, 2, 2, 2, 2, 2))
    state_dict = {name: tensor for name, tensor in (model.state_dict() | state).items() if tensor is not None}
    kind = {"network": "CifarCNN", "version": version}
    return checkpoints.saved({**kind, "widths": list(model.widths), "state_dict": state_dict})


def altered(content):
    """With one bit turned over, of a weight."""
    place = content.index(CifarCNN().bn1.running_var[:2].numpy().tobytes())
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


@pytest.mark.parametrize(
    ("content", "mentions"),
    [
        (checkpoints.network_bytes(MnistCNN((3, 4, 5))), r"not a checkpoint of a CifarCNN \(it holds a MnistCNN\)"),
        (b"", "not a zip file"),
        (b"no checkpoint at all", "not a zip file"),
        (pickle.dumps(Stranger(), protocol=2), "not a zip file"),
        (checkpoints.saved(Stranger()), "Weights only load failed"),
        (checkpoints.saved([1, 2]), "not a checkpoint of a CifarCNN"),
        (small_checkpoint(version=1), "version 1 of it, made before"),
        (small_checkpoint()[:-1000], "not a zip file"),
        (altered(small_checkpoint()), "its checksum is wrong"),
        (small_checkpoint(**{"bn1.bias": None}), "Missing key.*bn1.bias"),
        (small_checkpoint(**{"bn1.bias": torch.zeros(3)}), "size mismatch for bn1.bias"),
        (small_checkpoint(**{"bn1.bias": torch.tensor([0, math.nan])}), "bn1.bias holds NaN"),
    ],
)
def test_a_file_that_is_no_checkpoint_of_the_network_is_named(tmp_path, content, mentions):
    path = tmp_path / "file.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=mentions) as caught:
        checkpoints.load_model(path, CifarCNN)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not os.path.exists("/tmp/this-must-not-appear")


def test_no_file_no_model(tmp_path):
    with pytest.raises(CheckpointError, match="No such file"):
        checkpoints.load_model(tmp_path / "nothing.pt", CifarCNN)
