"""LeNet-5 as the pruning literature uses it."""

import torch.nn.functional as F
from torch import Tensor, nn


class MnistCNN(nn.Module):
    """Two 5x5 convolutions and two linear layers; 431,080 parameters, 430,500 of them weights.

    The variant that came with Caffe and that Han et al. 2015 (arXiv:1506.02626, section 4.1) prune: max-pooling
    where LeCun et al. 1998 have trained subsampling, ReLU where they have tanh. `widths` are the channels of the two
    convolutions and the neurons of the hidden layer, so a smaller network is the same class with smaller widths.
    """

    VERSION = 1

    def __init__(self, widths: tuple[int, int, int] = (20, 50, 500)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, widths[0], kernel_size=5)
        self.conv2 = nn.Conv2d(widths[0], widths[1], kernel_size=5)
        self.fc1 = nn.Linear(widths[1] * 4 * 4, widths[2])
        self.fc2 = nn.Linear(widths[2], 10)

    @property
    def widths(self) -> tuple[int, int, int]:
        """The widths as they are, in a network that has been cut too."""
        return self.conv1.out_channels, self.conv2.out_channels, self.fc1.out_features

    def forward(self, images: Tensor) -> Tensor:
        """Normalised images `(N, 1, 28, 28)` to logits `(N, 10)`."""
        # Pooling first gives the same numbers as ReLU first (both are monotonic) on a quarter of the elements.
        x = F.relu(F.max_pool2d(self.conv1(images), 2))  # (N, 20, 12, 12)
        x = F.relu(F.max_pool2d(self.conv2(x), 2))  # (N, 50, 4, 4)
        x = F.relu(self.fc1(x.flatten(1)))  # (N, 800) -> (N, 500)
        return self.fc2(x)
