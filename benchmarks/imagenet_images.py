"""Images of an ImageNet folder as BRECQ and QDrop take them, prepared once into files of a cache folder.

Transforms are torchvision's, on PIL images: for calibration ``RandomResizedCrop`` and ``RandomHorizontalFlip``, for
validation ``Resize(256)`` and ``CenterCrop(224)``; bilinear. Then ImageNet's mean and deviation.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import aquant_core

SUFFIXES = (".jpeg", ".jpg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
DEVIATION = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
SAMPLE = 1000
"""Validation images that are held in memory, for ``quantize``'s own report."""
AT_A_TIME = 512
"""Validation images that are floats at a time; a multiple of ``evaluation_batch_size``, so its batches are kept."""


class InputError(Exception):
    """What was given cannot be measured on; the message says why."""


def classes(folder: Path) -> list[str]:
    """The folders in it by name, as ``ImageFolder`` numbers classes; none where there is no folder."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if folder.is_dir() else []


def problems(folder: Path) -> list[str]:
    """What is missing in a folder that should hold ``train`` and ``val``, a folder for each class in both."""
    if not folder.is_dir():
        return [f"the ImageNet folder {folder}"]
    train, validation = (classes(folder / part) for part in ("train", "val"))
    missing = [
        f"{folder / part}, with a folder of images for each class (as torchvision.datasets.ImageFolder reads it)"
        for part, found in (("train", train), ("val", validation))
        if not found
    ]
    if not missing and train != validation:
        differing = sorted(set(train) ^ set(validation))
        missing.append(f"the same classes in train and val of {folder}: {differing[0]} is in one of them only")
    return missing


def files_of(folder: Path) -> list[tuple[str, int]]:
    """Path in the folder and class of each image, sorted, as ``ImageFolder`` has them."""
    return [
        (os.path.relpath(f"{inner}/{file}", folder), number)
        for number, name in enumerate(classes(folder))
        for inner, _, files in sorted(os.walk(folder / name, followlinks=True))
        for file in sorted(files)
        if file.lower().endswith(SUFFIXES)
    ]


def spread(count: int, wanted: int) -> np.ndarray:
    """Places of ``wanted`` of ``count`` things in a row, evenly, so that all classes have their share."""
    wanted = min(count, wanted)
    return np.arange(wanted) * count // max(wanted, 1)


def random_resized_crop(image: Image.Image, size: int, random: np.random.Generator) -> Image.Image:
    """8 to 100 % of the area, at 3:4 to 4:3, resized to ``size`` x ``size``, every other one mirrored."""
    for _ in range(10):
        area = image.width * image.height * random.uniform(0.08, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < width <= image.width and 0 < height <= image.height:
            left = int(random.integers(image.width - width + 1))
            top = int(random.integers(image.height - height + 1))
            break
    else:  # too long or too high: the middle
        width, height = min(image.width, round(image.height * 4 / 3)), min(image.height, round(image.width * 4 / 3))
        left, top = (image.width - width) // 2, (image.height - height) // 2
    part = image.crop((left, top, left + width, top + height)).resize((size, size), Image.Resampling.BILINEAR)
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else part


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The shorter edge resized to 256 for a size of 224, then the middle."""
    edge, short = size * 256 // 224, min(image.size)
    width, height = (edge * length // short for length in image.size)
    left, top = round((width - size) / 2), round((height - size) / 2)
    resized = image.resize((width, height), Image.Resampling.BILINEAR)
    return resized.crop((left, top, left + size, top + size))


def decode(
    folder: Path, names: Sequence[str], transform: Callable[[Image.Image, int], Image.Image], into: np.ndarray
) -> None:
    """Writes the images, transformed, into (N, 3, S, S) bytes; ``transform`` is told the image's place."""

    def one(place: int) -> None:
        with Image.open(folder / names[place]) as image:
            into[place] = np.asarray(transform(image.convert("RGB"), place)).transpose(2, 0, 1)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for _ in pool.map(one, range(len(names))):
            pass


def normalised(images: np.ndarray) -> Tensor:
    """(N, 3, H, W) bytes as the networks take them."""
    return (torch.from_numpy(np.array(images)).float() / 255 - MEAN) / DEVIATION


def digest(*parts: object) -> str:
    """sha256 of what the parts print as."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def sha256(path: Path) -> str:
    """Of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def draw_calibration(folder: Path, count: int, size: int, seed: int, cache: Path) -> Path:
    """A file of ``count`` training images, drawn and cropped by the seed, each from a generator of its own.

    Raises:
        InputError: there are fewer.
    """
    train = folder / "train"
    path = cache / f"calibration-{count}-{size}-seed{seed}-{digest(str(train.resolve()))[:12]}.safetensors"
    if path.exists():
        return path
    files = files_of(train)
    if len(files) < count:
        raise InputError(f"{train} holds {len(files)} images, and {count} are wanted for calibration")
    print(f"{count} calibration images are drawn from {len(files)} in {train}", flush=True)
    drawn = np.random.default_rng(seed).choice(len(files), count, replace=False)
    images = np.empty((count, 3, size, size), np.uint8)
    generators = [np.random.default_rng([seed, place]) for place in range(count)]
    names = [files[number][0] for number in drawn]
    decode(train, names, lambda image, place: random_resized_crop(image, size, generators[place]), images)
    partial = path.with_suffix(".partial")
    aquant_core.ImageSet(normalised(images)).save(partial)
    partial.replace(path)
    return path


@dataclass(frozen=True)
class Validation:
    """Validation images, cropped, as bytes in a file: ImageNet's 50,000 take 7.5 GB there, and no memory.

    Attributes:
        images, labels: (N, 3, S, S) uint8 and (N,) int64, as ``.npy``.
        digest: of the names, the classes and the size.
    """

    images: Path
    labels: Path
    digest: str

    @classmethod
    def prepare(cls, folder: Path, wanted: int | None, size: int, cache: Path) -> Validation:
        """All of them, or ``wanted``; made where the cache lacks them.

        Raises:
            InputError: there is none.
        """
        files = files_of(folder / "val")
        if not files:
            raise InputError(f"{folder / 'val'} holds no images")
        files = [files[place] for place in spread(len(files), wanted or len(files))]
        code = digest(files, size)
        stem = f"validation-{len(files)}-{size}-{digest(code, str(folder.resolve()))[:12]}"
        validation = cls(cache / f"{stem}.npy", cache / f"{stem}-labels.npy", code)
        if not validation.images.exists():
            print(f"{len(files)} validation images are prepared in {validation.images}", flush=True)
            np.save(validation.labels, np.array([number for _, number in files]))
            partial = validation.images.with_suffix(".partial")
            shape = (len(files), 3, size, size)
            images = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
            decode(folder / "val", [name for name, _ in files], lambda image, _: centre_crop(image, size), images)
            images.flush()
            partial.replace(validation.images)
        return validation

    def __len__(self) -> int:
        return len(np.load(self.labels))

    def classes(self) -> Tensor:
        """(N,) the images' classes."""
        return torch.from_numpy(np.load(self.labels))

    def sample(self) -> aquant_core.ImageSet:
        """``SAMPLE`` images, or all if there are fewer."""
        places = spread(len(self), SAMPLE)
        images = np.load(self.images, mmap_mode="r")[places]
        return aquant_core.ImageSet(normalised(images), self.classes()[places])

    def batches(self) -> Iterator[Tensor]:
        """All images, ``AT_A_TIME`` at a time."""
        images = np.load(self.images, mmap_mode="r")
        for start in range(0, len(images), AT_A_TIME):
            yield normalised(images[start : start + AT_A_TIME])
