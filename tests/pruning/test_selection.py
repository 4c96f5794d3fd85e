import math

import numpy as np
import pytest
import torch

from pruning import selection
from pruning.selection import Layer, find_weakest, lamp_scores


def lamp_by_loops(magnitudes):
    """Scores in the order of a list, by the formula of the paper, among equals the later one being larger."""
    scores, not_smaller = {}, 0.0
    for index in sorted(range(len(magnitudes)), key=lambda index: (magnitudes[index], index), reverse=True):
        not_smaller += magnitudes[index] ** 2
        scores[index] = magnitudes[index] ** 2 / (not_smaller or 1)
    return scores


def oracle(values, masks, sparsity, lamp):
    """The masks afterwards, by sorting all weights in Python."""
    ranked = []
    for number, (value, mask) in enumerate(zip(values, masks, strict=True)):
        magnitudes = [abs(x) for x in value.double().flatten().tolist()]
        alive = [index for index, here in enumerate(mask.flatten().tolist()) if here]
        scores = magnitudes
        if lamp:
            found = lamp_by_loops([magnitudes[index] for index in alive])
            scores = {index: found[place] for place, index in enumerate(alive)}
        layer = sorted((magnitudes[index], index) for index in alive)[:-1]  # all but the strongest
        ranked += [(scores[index], number, magnitude, index) for magnitude, index in layer]
    size = sum(mask.numel() for mask in masks)
    count = round(sparsity * size) - sum(int((~mask).sum()) for mask in masks)
    after = [mask.flatten().clone() for mask in masks]
    for _, number, _, index in sorted(ranked)[: max(0, count)]:
        after[number][index] = False
    return after


def some_layers(levels):
    """Layers of very different sizes and scales, partly masked; with `levels`, of so few values that most are tied."""
    shapes, scales = [(20, 15), (3, 5, 2, 2), (1, 1), (20, 1), (1, 150), (12, 12)], [1, 0.5, 2, 1, 0.001, 3]
    values = [scale * torch.randn(shape) for shape, scale in zip(shapes, scales, strict=True)]
    if levels:
        values = [(value * levels).round() / levels for value in values]
    return values, [torch.rand(shape) < density for shape, density in zip(shapes, (1, 0.5, 1, 1, 1, 0.3), strict=True)]


def as_numpy(index, value, mask):
    return Layer.of(str(index), value, mask)


def as_tensors(index, value, mask):
    """As they are elsewhere than on the CPU."""
    return Layer(str(index), value, mask, None, int(mask.sum()))


def guess_nonsense(layers, fraction, lamp):
    return [(0.3, 0.4)] * len(layers)


def guess_too_high(layers, fraction, lamp):
    return [(10.0, math.inf)] * len(layers)


@pytest.mark.parametrize("guess", [selection.guess_brackets, guess_nonsense, guess_too_high])
@pytest.mark.parametrize("form", [as_numpy, as_tensors])
@pytest.mark.parametrize("levels", [0, 2])
@pytest.mark.parametrize("lamp", [False, True])
def test_exactly_those_that_a_sort_finds(guess, form, levels, lamp, monkeypatch):
    monkeypatch.setattr(selection, "guess_brackets", guess)
    monkeypatch.setattr(selection, "PIECE", 128)
    torch.manual_seed(0)
    values, masks = some_layers(levels)
    for sparsity in (0.0, 0.37, 0.5, 0.9, 0.9999, 0.5):
        expected = oracle(values, masks, sparsity, lamp)
        for cut in find_weakest([form(*each) for each in zip(range(6), values, masks, strict=True)], sparsity, lamp):
            cut.apply()
        assert [mask.flatten().tolist() for mask in masks] == [mask.tolist() for mask in expected]


@pytest.mark.parametrize("guess", [guess_nonsense, guess_too_high])
@pytest.mark.parametrize("lamp", [False, True])
def test_a_wrong_guess_for_a_single_layer_is_noticed(guess, lamp, monkeypatch):
    monkeypatch.setattr(selection, "guess_brackets", guess)
    value = torch.linspace(0.01, 1, 100).view(10, 10)
    for fallen in (1, 10, 29, 30, 35, 39, 40, 41, 99):
        mask = torch.ones(10, 10, dtype=torch.bool)
        for cut in find_weakest([as_numpy(0, value, mask)], fallen / 100, lamp):
            cut.apply()
        assert mask.flatten().tolist() == [False] * fallen + [True] * (100 - fallen)


@pytest.mark.parametrize("lamp", [False, True])
def test_the_sample_spares_most_of_the_work(lamp, monkeypatch):
    """At 100,000 weights a few in a hundred are looked at closely, and all but once."""
    scans, scan = [], selection.scan
    monkeypatch.setattr(selection, "scan", lambda *given: scans.append(scan(*given)) or scans[-1])
    torch.manual_seed(0)
    values = [torch.randn(250, 200), 0.1 * torch.randn(50_000, 1)]
    masks = [torch.ones_like(value, dtype=torch.bool) for value in values]
    for cut in find_weakest([as_numpy(*each) for each in zip(range(2), values, masks, strict=True)], 0.9, lamp):
        cut.apply()
    assert sum(int(mask.sum()) for mask in masks) == 10_000
    for value, mask in zip(values, masks, strict=True):
        assert value[mask].abs().min() > value[~mask].abs().max()
    assert len(scans) == 2
    assert 0 < sum(len(each.inside) for each in scans) < 25_000


def test_lamp_scores_by_hand():
    assert lamp_scores(np.array([1.0, 2.0, 2.0])).tolist() == pytest.approx([1 / 9, 4 / 8, 4 / 4])
    assert lamp_scores(torch.tensor([1.0, 2.0]), energy=4.0).tolist() == pytest.approx([1 / 9, 4 / 8])
    assert lamp_scores(np.zeros(3)).tolist() == [0, 0, 0]
