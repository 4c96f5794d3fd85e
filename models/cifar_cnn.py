"""A small CNN for CIFAR-10 with exactly 767,936 trainable parameters."""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class CifarCNN(nn.Module):
    """Six 3x3 convolutions behind a fixed whitening layer, made for training in few epochs.

    After cifar10-airbench (Jordan 2024, arXiv:2404.00498): the first layer whitens 2x2 patches and is not trained,
    the convolutions start as identities, a scaled-down output keeps early gradients small. Pooling stands before
    BatchNorm, which then works on a quarter of the elements. `widths` are the filters of the convolutions.

    Before training nothing tells which filters will be pruned: all have norm 1 and a BatchNorm scale of 1, and which
    of them are identities is drawn at random.
    """

    WIDTHS = (64, 64, 124, 148, 144, 220)
    VERSION = 2  # of 1, the BatchNorm scales of the last three layers started on a ramp over the filters

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.whitening = nn.Conv2d(3, 24, 2, bias=False).requires_grad_(False)
        for layer, (c_in, c_out) in enumerate(pairwise([24, *widths]), start=1):
            conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
            start_as_identities(conv.weight)
            setattr(self, f"conv{layer}", conv)
            setattr(self, f"bn{layer}", nn.BatchNorm2d(c_out, momentum=0.4))
        self.head = nn.Linear(widths[-1], 10, bias=False)

    @property
    def widths(self) -> tuple[int, ...]:
        """The arguments that make a network of this shape, also after channels were taken out."""
        return tuple(getattr(self, f"conv{layer}").out_channels for layer in range(1, 7))

    def forward(self, images: Tensor) -> Tensor:
        """Logits `(N, 10)` of images `(N, 3, H, W)`; the shapes below are those of 32x32 pixels."""
        x = F.relu(self.whitening(images))  # (N, 24, 31, 31)
        x = F.relu(self.bn1(F.max_pool2d(self.conv1(x), 2)))  # (N, 64, 15, 15)
        x = F.relu(self.bn2(self.conv2(x)))  # (N, 64, 15, 15)
        x = F.relu(self.bn3(F.max_pool2d(self.conv3(x), 2)))  # (N, 124, 7, 7)
        x = F.relu(self.bn4(self.conv4(x)))  # (N, 148, 7, 7)
        x = F.relu(self.bn5(F.max_pool2d(self.conv5(x), 2)))  # (N, 144, 3, 3)
        x = F.relu(self.bn6(self.conv6(x)))  # (N, 220, 3, 3)
        return self.head(F.max_pool2d(x, 3).flatten(1)) / 9  # adaptive_max_pool2d is not deterministic on CUDA

    @torch.no_grad()
    def whiten(self, images: Tensor) -> None:
        """Set the first layer so that it whitens 2x2 patches of normalised images `(N, 3, H, W)`.

        Its 24 filters are the 12 principal components of the patches, scaled to unit variance, and their negatives.
        """
        patches = images.unfold(2, 2, 1).unfold(3, 2, 1)  # (N, 3, H - 1, W - 1, 2, 2)
        patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, 12).double()
        variance, components = torch.linalg.eigh(patches.T @ patches / len(patches))
        filters = (components / (variance + 5e-4).sqrt()).T.view(12, 3, 2, 2)  # without 5e-4, noise would be blown up
        self.whitening.weight.copy_(torch.cat([filters, -filters]))


@torch.no_grad()
def start_as_identities(weight: Tensor) -> None:
    """Let as many filters as possible of `(C_out, C_in, 3, 3)` pass on one input channel each, in place.

    Filters and channels are paired at random. The other filters, where there are more than channels, get random
    directions of the same norm, which is 1.
    """
    c_out, c_in = weight.shape[:2]
    weight.copy_(F.normalize(torch.randn_like(weight), dim=(1, 2, 3)))
    pairs = min(c_out, c_in)
    filters, channels = torch.randperm(c_out)[:pairs], torch.randperm(c_in)[:pairs]
    weight[filters] = 0
    weight[filters, channels, 1, 1] = 1
