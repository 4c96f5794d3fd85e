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
    normal = mnist.normalize(mnist.train_images)
    assert normal.dtype == torch.float32
    assert normal.mean().item() == pytest.approx(0, abs=1e-3)
    assert normal.std().item() == pytest.approx(1, abs=1e-3)


def test_normalize_works_channel_by_channel():
    images = torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    empty = torch.zeros(0)
    some = data.ImageData(empty, empty, empty, empty, (), mean=(0.5, 0.1, 0.4), std=(0.25, 0.2, 0.1))
    normal = some.normalize(images)
    assert normal.flatten().tolist() == pytest.approx([-2.0, 0.5, 6.0], abs=1e-5)


def test_train_size_takes_the_first_of_a_fixed_permutation(mnist):
    small, large = mnist.first(100), mnist.first(200)
    assert torch.equal(small.train_images, large.train_images[:100])
    assert not torch.equal(small.train_labels, mnist.train_labels[:100])
    assert len(small.test_labels) == 10_000


def test_held_out_examples_are_all_that_training_does_not_see(mnist):
    split, whole = mnist.first(50_000, held_out=True), mnist.first(60_000)
    assert torch.equal(torch.cat([split.train_images, split.test_images]), whole.train_images)
    assert torch.equal(torch.cat([split.train_labels, split.test_labels]), whole.train_labels)
    assert not torch.equal(split.test_labels, mnist.test_labels)


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


def test_cifar10_is_the_original(cifar10):
    assert cifar10.train_images.shape == (50_000, 3, 32, 32)
    assert cifar10.test_images.shape == (10_000, 3, 32, 32)
    assert cifar10.train_labels.bincount().tolist() == [5000] * 10
    assert cifar10.test_labels.bincount().tolist() == [1000] * 10
    assert [cifar10.classes[label] for label in cifar10.test_labels[:4]] == ["cat", "ship", "ship", "airplane"]


def test_normalised_cifar10_has_zero_mean_and_unit_variance_in_every_channel(cifar10):
    normal = cifar10.normalize(cifar10.train_images)
    assert normal.mean(dim=(0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-3)
    assert normal.std(dim=(0, 2, 3)).tolist() == pytest.approx([1, 1, 1], abs=1e-3)
