import pytest
import torch
from torch import nn

from models.mnist_cnn import MnistCNN
from pruning.compaction import compact
from pruning.magnitude import dense_masks, update_masks


def widths(model):
    return [layer.weight.shape[0] for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def assert_same_outputs(model, small, example):
    model.eval()
    small.eval()
    for batch in (example, torch.randn_like(example), 100 * torch.randn_like(example)):
        torch.testing.assert_close(small(batch), model(batch), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.99, 0.995, 0.999])
@pytest.mark.parametrize("scope", ["global", "lamp"])
def test_lenet_computes_the_same_with_fewer_channels(sparsity, scope):
    torch.manual_seed(0)
    model, example = MnistCNN().double(), torch.randn(4, 1, 28, 28, dtype=torch.double)
    with torch.no_grad():
        for parameter in model.parameters():  # heavy tails, as training makes them: zeros gather in some channels
            parameter *= torch.randn(len(parameter), *[1] * (parameter.dim() - 1)).exp()
    update_masks(model, dense_masks(model), sparsity, scope)
    small = compact(model, example)
    assert_same_outputs(model, small, example)
    if sparsity == 0:
        assert widths(small) == [20, 50, 500, 10]
    if sparsity >= 0.99:
        assert sum(widths(small)) < sum(widths(model)) / 2


def test_by_hand():
    """Neuron 0 is read by nobody; neuron 1 has no input and is always relu(2) = 2, worth 2 * 5 and 2 * 0; 2 stays."""
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 2)).double()
    model[0].weight.data = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]]).double()
    model[0].bias.data = torch.tensor([1.0, 2.0, 3.0]).double()
    model[2].weight.data = torch.tensor([[0.0, 5.0, 6.0], [0.0, 0.0, 7.0]]).double()
    model[2].bias.data = torch.tensor([0.5, 0.25]).double()
    small = compact(model, torch.randn(3, 2).double())
    assert small[0].weight.tolist() == [[3, 4]]
    assert small[2].weight.tolist() == [[6], [7]]
    assert small[2].bias.tolist() == [10.5, 0.25]


def test_one_useless_layer_makes_the_next_useless():
    """fc2 reads only neuron 0 of fc1, which reads only channel 1 of the convolution."""
    model = MnistCNN().double()
    with torch.no_grad():
        model.fc2.weight[:, 1:] = 0
        model.fc1.weight[0] = 0
        model.fc1.weight[0, 16:32] = 1
    example = torch.randn(2, 1, 28, 28, dtype=torch.double)
    small = compact(model, example)
    assert widths(small) == [20, 1, 1, 10]
    assert_same_outputs(model, small, example)


def dead_filter(bias, padding):
    """Channel 0 of the first convolution is `bias` whatever the input; BatchNorm and ReLU come before its reader."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=padding)
    )
    model.append(nn.AdaptiveAvgPool2d(1)).append(nn.Flatten()).append(nn.Linear(5, 2)).double()
    nn.init.normal_(model[1].running_mean)
    nn.init.uniform_(model[1].weight, 0.5, 2)
    model[0].weight.data[0] = 0
    model[0].bias.data[0] = model[1].running_mean[0] + bias  # after BatchNorm: bias times a positive number
    nn.init.zeros_(model[1].bias)
    return model


@pytest.mark.parametrize(
    ("bias", "padding", "left"),
    [(3.0, 0, 3), (3.0, "valid", 3), (3.0, 1, 4), (3.0, "same", 4), (-3.0, 1, 3)],
    ids=[
        "folds",
        "folds",
        "padding shows the constant's edge",
        "so does same",
        "relu makes it zero, which has no edge",
    ],
)
def test_a_constant_channel_goes_where_that_is_exact(bias, padding, left):
    model, example = dead_filter(bias, padding), torch.randn(2, 3, 8, 6, dtype=torch.double)
    small = compact(model, example)
    assert widths(small) == [left, 5, 2]
    assert_same_outputs(model, small, example)


def test_an_input_that_is_constant_by_chance_is_not_folded():
    """The output layer is all zeros, so that nothing makes a pinned channel, and the example is all zeros too."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).double()
    nn.init.zeros_(model[1].weight)
    small = compact(model, torch.zeros(1, 2).double())
    assert torch.isin(small[0].weight, model[0].weight).all()
    assert_same_outputs(model, small, torch.randn(3, 2).double())


def test_the_model_itself_is_left_as_it_was():
    model, example = dead_filter(3.0, 0).train(), torch.randn(2, 3, 8, 6, dtype=torch.double)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    compact(model, example)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
