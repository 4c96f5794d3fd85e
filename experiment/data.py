"""MNIST and CIFAR-10 as whole tensors, and the batches that training draws from them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiment.download import cifar10_files, mnist_files

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclass(frozen=True)
class ImageData:
    """A data set for image classification, whole, on one device.

    Images are uint8 `(N, C, H, W)`, labels int64 `(N,)` or, to train on, probabilities `(N, classes)`; `mean` and `std`
    hold one number per input channel, of the training images scaled to [0, 1].
    """

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def to(self, device: torch.device) -> "ImageData":
        """The same data with its tensors on `device`."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **tensors)

    def first(self, size: int, held_out: bool = False) -> "ImageData":
        """The first `size` training examples of a fixed permutation; the test set stays whole.

        With `held_out` the other training examples take its place.
        """
        order = torch.randperm(len(self.train_labels), generator=torch.Generator().manual_seed(0))
        chosen, others = order[:size], order[size:]
        test = {"test_images": self.train_images[others], "test_labels": self.train_labels[others]} if held_out else {}
        return replace(self, train_images=self.train_images[chosen], train_labels=self.train_labels[chosen], **test)

    def normalize(self, images: Tensor) -> Tensor:
        """uint8 `(N, C, H, W)` in [0, 255] to float32 of about zero mean and unit variance, in channels_last."""
        channels = (255 * torch.tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        mean, std = (value.to(images.device, non_blocking=True) for value in channels)  # waits for no step before it
        return ((images - mean) / std).to(memory_format=torch.channels_last)


def load_mnist(data_dir: Path) -> ImageData:
    """MNIST: 60,000 training and 10,000 test images `(1, 28, 28)`. Raises DataError."""
    files = mnist_files(data_dir)
    # The IDX headers are 16 bytes for images, 8 for labels; the checksum vouches for the rest.
    images, labels, test_images, test_labels = (np.frombuffer(files[name], np.uint8) for name in files)
    return ImageData(
        train_images=torch.tensor(images[16:]).view(-1, 1, 28, 28),
        train_labels=torch.tensor(labels[8:]).long(),
        test_images=torch.tensor(test_images[16:]).view(-1, 1, 28, 28),
        test_labels=torch.tensor(test_labels[8:]).long(),
        classes=tuple("0123456789"),
        mean=(0.1307,),
        std=(0.3081,),
    )


def load_cifar10(data_dir: Path) -> ImageData:
    """CIFAR-10: 50,000 training and 10,000 test images `(3, 32, 32)`. Raises DataError."""
    files = cifar10_files(data_dir)
    rows = [torch.tensor(np.frombuffer(files[name], np.uint8)).view(10_000, 3073) for name in files]
    train, test = torch.cat(rows[:5]), rows[5]  # a row is one label byte, then the planes R, G, B
    return ImageData(
        train_images=train[:, 1:].reshape(-1, 3, 32, 32),
        train_labels=train[:, 0].long(),
        test_images=test[:, 1:].reshape(-1, 3, 32, 32),
        test_labels=test[:, 0].long(),
        classes=CIFAR10_CLASSES,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
    )


def random_shift(images: Tensor, *, pixels: int, generator: torch.Generator, mode: str = "constant") -> Tensor:
    """Each image `(C, H, W)` of the batch moved by its own random -pixels..pixels in both directions.

    What lies beyond an image is 0, or with mode "reflect" its mirror image.
    """
    n, _, *size = images.shape
    source = images if mode == "constant" else images.float()  # F.pad cannot mirror bytes
    padded = F.pad(source, [pixels] * 4, mode=mode).to(images.dtype)
    example = torch.arange(n, device=images.device).view(n, 1, 1)
    rows, columns = (
        torch.randint(0, 2 * pixels + 1, (n, 1), generator=generator).to(images.device, non_blocking=True)
        + torch.arange(length, device=images.device)
        for length in size
    )  # (N, H), (N, W)
    return padded.permute(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def batches(
    data: ImageData,
    batch_size: int,
    augment: Callable[..., Tensor],
    generator: torch.Generator,
    mirror_turn: int | None = None,
    part: slice = slice(None),
) -> Iterator[tuple[Tensor, Tensor]]:
    """The training set once, shuffled and augmented: normalised images `(B, C, H, W)` and labels `(B, ...)`.

    The last batch holds what is left over and may be smaller. With `mirror_turn`, a number, every second example is
    mirrored, and with the next number the others are. Of each batch `part` alone is given, the same as without it.
    """
    order = torch.randperm(len(data.train_labels), generator=generator).to(data.train_labels.device)
    for chosen in order.split(batch_size):
        images = augment(data.train_images[chosen], generator=generator)
        if mirror_turn is not None:
            images = torch.where((chosen + mirror_turn).view(-1, 1, 1, 1) % 2 == 0, images.flip(3), images)
        yield data.normalize(images[part]), data.train_labels[chosen][part]
