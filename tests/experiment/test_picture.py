import torch

from experiment.picture import network, pixel_weights
from models.mnist_cnn import MnistCNN


def path():
    """LeNet-5 with one path: weights of 2, 3, 5 and 7 in a row."""
    model = MnistCNN((1, 1, 1))
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model.conv1.weight[0, 0, 2, 2] = 2
        model.conv2.weight[0, 0, 1, 1] = -3
        model.conv2.bias[0] = 100  # so that the path is alive
        model.fc1.weight[0, 4 * 1 + 2] = 5  # row 1, column 2 of the 4x4 map
        model.fc2.weight[9, 0] = 7
    return model


def test_the_pixels_that_are_looked_at():
    weights = pixel_weights(path())
    # Row 1 is pooled from 2 and 3, these come from 3 and 4, pooled from 6 to 9, and these from 8 to 11; columns alike.
    expected = torch.zeros(28, 28)
    expected[8:12, 12:16] = 2 * 3 * 5 * 7
    assert torch.equal(weights, expected)


def test_no_other_pixel_matters():
    images = torch.randn(50, 1, 28, 28, requires_grad=True)
    path()(images).sum().backward()
    seen = images.grad.abs().sum((0, 1)) > 0
    assert seen.any()
    assert not (seen & (pixel_weights(path()) == 0)).any()


def test_a_picture_is_a_png_and_leaves_the_network_as_it_was():
    model = path()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert network(model, torch.randint(256, (3, 1, 28, 28)), 99.2).startswith(b"\x89PNG")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
