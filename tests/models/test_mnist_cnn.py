import torch

from experiment.measure import parameters
from models.mnist_cnn import MnistCNN


def test_lenet_has_the_parameters_of_the_literature():
    by_hand = (25 * 20 + 20) + (20 * 25 * 50 + 50) + (800 * 500 + 500) + (500 * 10 + 10)
    assert by_hand == 431_080
    assert parameters(MnistCNN()) == by_hand


def test_narrower_networks_are_the_same_class():
    model = MnistCNN((3, 5, 7))
    assert parameters(model) == (25 * 3 + 3) + (3 * 25 * 5 + 5) + (5 * 16 * 7 + 7) + (7 * 10 + 10)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
