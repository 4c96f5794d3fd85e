from itertools import pairwise

import pytest
import torch

from experiment.measure import macs, parameters
from models.cifar_cnn import CifarCNN


def test_parameters_by_hand():
    convolutions = 9 * (24 * 64 + 64 * 64 + 64 * 124 + 124 * 148 + 148 * 144 + 144 * 220)
    norms = 2 * (64 + 64 + 124 + 148 + 144 + 220)
    assert convolutions + norms + 220 * 10 == 767_936
    assert parameters(CifarCNN()) == 767_936


def test_macs_by_hand():
    """At 32x32 pixels the maps are 31x31, after each pooling 15x15, 7x7 and 3x3."""
    maps = [(12 * 24, 31), (9 * 24 * 64, 31), (9 * 64 * 64, 15), (9 * 64 * 124, 15)]
    maps += [(9 * 124 * 148, 7), (9 * 148 * 144, 7), (9 * 144 * 220, 3)]
    by_hand = sum(weights * side**2 for weights, side in maps) + 220 * 10
    assert macs(CifarCNN(), torch.randn(2, 3, 32, 32)) == by_hand


def test_widths_make_the_same_network_again():
    model = CifarCNN((3, 5, 7, 11, 13, 2))
    assert model.widths == (3, 5, 7, 11, 13, 2)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert [p.shape for p in CifarCNN(model.widths).parameters()] == [p.shape for p in model.parameters()]


def test_whitened_patches_have_unit_variance_and_no_correlation(cifar10):
    images = cifar10.normalize(cifar10.train_images[:2000])
    model = CifarCNN()
    model.whiten(images)
    outputs = model.whitening(images).movedim(1, 0).flatten(1)[:12]  # (12, N * 31 * 31)
    covariance = outputs @ outputs.T / outputs.shape[1]
    assert (covariance - torch.diag(covariance.diagonal())).abs().max() < 0.01
    # The weakest components of patches are noise: there 5e-4 is added to their variance.
    assert covariance.diagonal()[-6:].tolist() == pytest.approx([1] * 6, abs=0.05)
    assert torch.equal(model.whitening.weight[:12], -model.whitening.weight[12:])


def test_before_training_nothing_tells_one_filter_from_another():
    """All have norm 1 and a scale of 1; identities stand anywhere, each on a channel of its own."""
    torch.manual_seed(0)
    model = CifarCNN()
    for layer, (c_in, c_out) in enumerate(pairwise([24, *model.widths]), start=1):
        filters = model.get_submodule(f"conv{layer}").weight.detach()
        assert filters.flatten(1).norm(dim=1).tolist() == pytest.approx([1] * c_out)
        assert (model.get_submodule(f"bn{layer}").weight == 1).all()
        identities = (filters.flatten(1) != 0).sum(1) == 1
        assert identities.sum() == min(c_in, c_out)
        assert len(filters[identities].flatten(1).argmax(1).unique()) == min(c_in, c_out)
        if c_out > c_in:
            assert not identities[:c_in].all(), "not the first ones"
