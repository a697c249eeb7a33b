"""Archives of image files come out as torchvision prepares them, or are refused before they take any room."""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from aquant_core.architectures import import_torchvision
from aquant_core.config import Preprocess
from aquant_core.errors import ImageSetError, PreprocessMissingError
from aquant_core.images import read_images

Files = Mapping[str, bytes]
PLAIN = Preprocess(size=20, crop=16)


def picture(seed: int, size: tuple[int, int] = (30, 24), mode: str = "RGB") -> Image.Image:
    width, height = size
    channels = {"RGB": (3,), "RGBA": (4,), "L": ()}[mode]
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, *channels)).astype(np.uint8)
    return Image.fromarray(noise)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind)
    return buffer.getvalue()


def zipped(files: Files) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def tarred(files: Files) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def gzipped(files: Files) -> bytes:
    return gzip.compress(tarred(files), mtime=0)


def with_entry(kind: bytes, **about: object) -> bytes:
    """A tar of one entry of this kind."""
    entry = tarfile.TarInfo("a.png")
    entry.type = kind
    for name, value in about.items():
        setattr(entry, name, value)
    return entry.tobuf(tarfile.GNU_FORMAT) + bytes(20 * 512)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., torch.Tensor]:
    def read(data: bytes, preprocess: Preprocess = PLAIN) -> torch.Tensor:
        (tmp_path / "archive").write_bytes(data)
        return read_images(tmp_path / "archive", "calibration", preprocess).images

    return read


@pytest.mark.parametrize("pack", [zipped, tarred, gzipped])
@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(size=20, crop=16),
        Preprocess(size=(18, 22), crop=None, interpolation="bicubic"),
        Preprocess(size=17, crop=(20, 12), mean=(0.5,), std=(0.25,)),
    ],
)
def test_images_are_those_of_torchvision(
    read: Callable[..., torch.Tensor], pack: Callable[[Files], bytes], preprocess: Preprocess
) -> None:
    pictures = {
        "a.png": encoded(picture(0)),
        "b.JPG": encoded(picture(1), "JPEG"),
        "c.bmp": encoded(picture(2, mode="L"), "BMP"),
        "d.webp": encoded(picture(3, mode="RGBA"), "WEBP"),
    }
    transforms = import_torchvision().transforms
    steps = transforms.Compose(
        [
            transforms.Resize(preprocess.size, transforms.InterpolationMode(preprocess.interpolation)),
            *([] if preprocess.crop is None else [transforms.CenterCrop(preprocess.crop)]),
            transforms.ToTensor(),
            transforms.Normalize(preprocess.mean, preprocess.std),
        ]
    )
    mode = "RGB" if len(preprocess.mean) == 3 else "L"
    expected = [steps(Image.open(io.BytesIO(data)).convert(mode)) for data in pictures.values()]
    assert torch.equal(read(pack(pictures), preprocess), torch.stack(expected))


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_classes_are_folders_by_name_and_take_turns(tmp_path: Path, pack: Callable[[Files], bytes]) -> None:
    names = ["x/cat/2.png", "x/ant/1.png", "x/ant/3.png", "x/ant/2.png", "x/bee/9.png", "x/cat/1.png"]
    colours = {name: Image.new("L", (16, 16), 10 * index) for index, name in enumerate(names)}
    litter = {"__MACOSX/x/._1.png": b"?", "x/ant/.DS_Store": b"?"}
    (tmp_path / "archive").write_bytes(pack({name: encoded(image) for name, image in colours.items()} | litter))
    preprocess = Preprocess(size=16, crop=None, mean=(0.0,), std=(1.0,))
    images = read_images(tmp_path / "archive", preprocess=preprocess)
    assert images.labels is not None
    assert images.labels.tolist() == [0, 1, 2, 0, 2, 0]
    order = [names[round(255 * float(image[0, 0, 0]) / 10)] for image in images.images]
    assert order == ["x/ant/1.png", "x/bee/9.png", "x/cat/1.png", "x/ant/2.png", "x/cat/2.png", "x/ant/3.png"]


@pytest.mark.parametrize("names", [("a.png", "b.png"), ("one/a.png", "one/b.png")])
def test_one_folder_is_no_class(tmp_path: Path, names: tuple[str, ...]) -> None:
    (tmp_path / "archive").write_bytes(zipped({name: encoded(picture(0)) for name in names}))
    assert read_images(tmp_path / "archive", preprocess=PLAIN).labels is None


def test_an_archive_without_preprocess_is_asked_for_it(tmp_path: Path) -> None:
    (tmp_path / "archive").write_bytes(zipped({"a.png": encoded(picture(0))}))
    with pytest.raises(PreprocessMissingError, match="preprocess"):
        read_images(tmp_path / "archive")


def link_in_zip() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        entry = zipfile.ZipInfo("link.png")
        entry.external_attr = 0o120777 << 16
        archive.writestr(entry, "/etc/passwd")
    return buffer.getvalue()


def long_pax_header() -> bytes:
    return with_entry(tarfile.XHDTYPE, size=2**30)


PNG = encoded(picture(0))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (zipped({"../a.png": PNG}), "no name of a file"),
        (zipped({"/a.png": PNG}), "no name of a file"),
        (zipped({"a\\b.png": PNG}), "no name of a file"),
        (tarred({"x/../../a.png": PNG}), "no name of a file"),
        (link_in_zip(), "link or device"),
        (with_entry(tarfile.SYMTYPE, linkname="/etc/passwd"), "link or device"),
        (with_entry(tarfile.LNKTYPE, linkname="b.png"), "link or device"),
        (with_entry(tarfile.CHRTYPE), "link or device"),
        (with_entry(tarfile.GNUTYPE_SPARSE), "link or device"),
        (with_entry(tarfile.REGTYPE, size=2**40), "said to have 1099511627776 bytes"),
        (long_pax_header(), "said to have 1073741824 bytes"),
        (zipped({"a.png": PNG, "b.txt": b"text"}), "no image"),
        (zipped({"a.png": PNG, "b.pkl": b"\x80\x04."}), "no image"),
        (zipped({"readme/": b""}), "holds no image"),
        (zipped({"a.png": PNG, "x/b.png": PNG}), "beside the folders"),
        (zipped({"a.png": PNG[:80]}), "damaged"),
        (zipped({"a.png": b"not an image"}), "cannot be read as"),
        (zipped({"a.png": encoded(picture(0), "TIFF")}), "cannot be read as"),
        (zipped({"a.png": bytes(3 * 2**20)}), "unpacks to more than"),
        (gzipped({"a.png": PNG, "b.png": bytes(20 * 2**20)}), "more than 100 times"),
        (zipped({"a.png": encoded(Image.new("1", (20_000, 20_000)))}), "pixels"),
        (zipped({"a.png": encoded(Image.new("1", (60_000, 1)))}), "would be resized"),
        (zipped({"a.png": PNG})[:-30], "cannot be read"),
        (gzipped({"a.png": PNG})[:-30], "cannot be read"),
        (tarred({"a.png": PNG})[:700], "cannot be read"),
    ],
)
def test_refused_archives(read: Callable[..., torch.Tensor], data: bytes, words: str) -> None:
    with pytest.raises(ImageSetError, match=words):
        read(data)


def test_whole_images_must_have_one_shape(read: Callable[..., torch.Tensor]) -> None:
    data = zipped({"a.png": PNG, "b.png": encoded(picture(1, (40, 24)))})
    with pytest.raises(ImageSetError, match=r"preprocess\.crop"):
        read(data, Preprocess(size=20, crop=None))
