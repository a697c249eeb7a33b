"""The paper's tables on ImageNet, rehearsed on a folder of a few made images, and what each cell is told."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from aquant_core import read_images
from aquant_core.architectures import build
from aquant_core.torchvision_import import import_torchvision

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
CLASSES = ("n01440764", "n01443537", "n01484850")
SMALL = ["--size", "32", "--calibration", "16", "--iterations", "2", "--device", "cpu", "--threads", "1"]
CHOSEN = ["--networks", "resnet18", "--sections", "table1", "table2", "--bits", "W32A2"]


@pytest.fixture(scope="module")
def imagenet() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        yield importlib.import_module("imagenet")


@pytest.fixture(scope="module")
def images(imagenet: ModuleType) -> ModuleType:
    module: ModuleType = sys.modules[imagenet.Validation.__module__]
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 + 5 images in each of three classes, each of another shape."""
    folder = tmp_path_factory.mktemp("imagenet")
    random = np.random.default_rng(0)
    for part, count in (("train", 7), ("val", 5)):
        for name in CLASSES:
            (folder / part / name).mkdir(parents=True)
            for number in range(count):
                coarse = random.integers(0, 256, (6, 5 + number, 3), dtype=np.uint8)
                image = Image.fromarray(coarse).resize((50 + 7 * number, 60), Image.Resampling.BICUBIC)
                image.save(folder / part / name / f"{part}_{number}.JPEG")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_file(build("resnet18", num_classes=len(CLASSES)).state_dict(), folder / "resnet18.safetensors")
    return folder


def run(folder: Path, weights: Path, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    places = ["--imagenet", folder, "--weights", weights, "--cache", out / "cache", "--results", out / "results.json"]
    command = [sys.executable, BENCHMARKS / "imagenet.py", *places, "--page", out / "page.md", *SMALL, *more]
    environment = os.environ | {"OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.usefixtures("imagenet")
def test_every_chosen_cell_is_measured_once(folder: Path, weights: Path, tmp_path: Path) -> None:
    methods = ["--methods", "nearest", "a_rounding", "aquant"]
    first = run(folder, weights, tmp_path, *CHOSEN, *methods)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "4 cells to be measured, 0 are there" in first.stdout  # nearest is in both tables
    page = (tmp_path / "page.md").read_text()
    assert page in first.stdout
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    top1 = {cell["cell"]["method"]: cell["accuracy"]["quantized"]["top1"] for cell in cells.values()}
    for number in ("(40.22)", "(21.13)", "(6.10)", "(30.31)", "(46.61)", "(66.93)"):  # of each table, some
        assert number in page
    assert f"| A-rounding | W32A2 | {100 * top1['a_rounding']:.2f} (54.99) | - (31.38) | - (16.53) |" in page
    assert f"| AQuant | W32A2 | {100 * top1['aquant']:.2f} (62.09) | - (61.59) | - (2.20) |" in page
    assert "**Not the paper's setting**: iterations 2 instead" in page

    float_result = cells["resnet18, W32A32, nearest, paper, seed 0"]
    network = build("resnet18", num_classes=len(CLASSES))
    network.load_state_dict(load_file(weights / "resnet18.safetensors"))
    with torch.inference_mode():
        decided = network(prepared_by_torchvision(folder)).argmax(1)
    assert len(decided.unique()) > 1
    right = importlib.import_module("cells").unpacked(float_result)
    assert right.astype(bool).tolist() == (decided == torch.tensor([0] * 5 + [1] * 5 + [2] * 5)).tolist()

    written = (tmp_path / "results.json").read_bytes()
    again = run(folder, weights, tmp_path, *CHOSEN, *methods)
    assert again.returncode == 0, again.stdout + again.stderr
    assert "0 cells to be measured, 4 are there" in again.stdout
    assert (tmp_path / "results.json").read_bytes() == written


def prepared_by_torchvision(folder: Path) -> torch.Tensor:
    """(15, 3, 32, 32) validation images."""
    import_torchvision()
    from torchvision import transforms

    prepare = transforms.Compose(
        [
            transforms.Resize(36),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    paths = sorted((folder / "val").glob("*/*.JPEG"))
    return torch.stack([prepare(Image.open(path).convert("RGB")) for path in paths])


def test_centre_crop_is_torchvisions(images: ModuleType) -> None:
    import_torchvision()
    from torchvision import transforms

    theirs = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(224)])
    random = np.random.default_rng(0)
    for height, width in ((300, 401), (375, 500), (500, 375), (224, 224), (97, 250)):
        image = Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8))
        assert np.array_equal(np.asarray(images.centre_crop(image, 224)), np.asarray(theirs(image)))


@pytest.mark.parametrize(("width", "height"), [(64, 48), (500, 20), (20, 500)])
def test_a_random_crop_is_a_part_of_the_image(images: ModuleType, width: int, height: int) -> None:
    """Position is written into the colours, so the crop tells where it is from; long ones fall back to the middle."""
    places = np.stack(np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height)), -1)
    picture = np.concatenate([places, np.zeros((height, width, 1))], -1).round().astype(np.uint8)
    random = np.random.default_rng(0)
    mirrored, areas = 0, []
    for _ in range(60):
        crop = np.asarray(images.random_resized_crop(Image.fromarray(picture), 24, random)).astype(float)
        spans = [crop[12, -1, 0] - crop[12, 0, 0], crop[-1, 12, 1] - crop[0, 12, 1]]
        mirrored += spans[0] < 0
        shown = np.abs(spans) / 255 * [width, height]
        assert 0.5 < shown[0] / shown[1] < 1.6
        areas.append(shown.prod() / (width * height))
    assert 15 < mirrored < 45
    assert min(areas) > 0.02
    assert max(areas) < 1.01
    assert np.ptp(areas) > 0.3 or max(width, height) == 500


def test_calibration_images_come_from_the_seed(images: ModuleType, folder: Path, tmp_path: Path) -> None:
    drawn = {}
    for name, seed in (("once", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        drawn[name] = images.draw_calibration(folder, 16, 32, seed, tmp_path / name)
    assert drawn["once"].read_bytes() == drawn["again"].read_bytes()
    assert drawn["once"].read_bytes() != drawn["other"].read_bytes()
    calibration = read_images(drawn["once"]).images
    assert calibration.shape == (16, 3, 32, 32)
    assert len(torch.unique(calibration.flatten(1), dim=0)) == 16
    assert float(calibration.min()) >= -2.12
    assert float(calibration.max()) <= 2.65
    with pytest.raises(images.InputError, match="holds 21 images, and 22 are wanted"):
        images.draw_calibration(folder, 22, 32, 0, tmp_path)


def test_a_part_of_the_validation_images_has_all_classes(images: ModuleType, folder: Path, tmp_path: Path) -> None:
    every = images.Validation.prepare(folder, None, 32, tmp_path)
    part = images.Validation.prepare(folder, 6, 32, tmp_path)
    assert every.classes().tolist() == [0] * 5 + [1] * 5 + [2] * 5
    assert part.classes().tolist() == [0, 0, 1, 1, 2, 2]
    assert part.digest != every.digest
    whole = torch.cat(list(every.batches()))
    torch.testing.assert_close(whole, prepared_by_torchvision(folder))
    assert torch.equal(every.sample().images, whole)
    assert torch.equal(torch.cat(list(part.batches())), whole[[0, 2, 5, 7, 10, 12]])


def test_what_is_set_network_by_network(imagenet: ModuleType) -> None:
    cells = {(cell.network, cell.bits, cell.method): cell for cell in imagenet.plan(imagenet.Setting(), ["table3"])}
    regularisers = {"mobilenet_v2": 0.1, "mnasnet2_0": 0.2}
    for network in imagenet.NETWORKS:
        form = "linear" if network in regularisers else "quadratic"
        ours = cells[network, "W2A2", "aquant"]
        assert ours.configuration.border.form == form
        assert ours.configuration.border.fusion == "channel_mean"
        assert ours.changes == {}  # lambda 0.05 and beta from 16, as preset "paper" leaves the method
        for method in ("adaround", "brecq", "qdrop"):
            theirs = cells[network, "W2A4", method]
            weight = regularisers.get(network)
            assert theirs.changes == ({} if weight is None else {"settings": {"regulariser_weight": weight}})
    activations_only = imagenet.plan(imagenet.Setting(), ["table2"], methods=["qdrop"])
    assert not any(cell.changes for cell in activations_only)  # no weights to be regularised


def test_which_methods_are_in_which_table(imagenet: ModuleType) -> None:
    def told(section: str) -> set[tuple[str, str]]:
        return {(c.bits, c.method) for c in imagenet.plan(imagenet.Setting(), [section]) if c.section == section}

    def networks(section: str) -> set[str]:
        return {cell.network for cell in imagenet.plan(imagenet.Setting(), [section])}

    assert told("table1") == {("W32A2", "nearest"), ("W32A2", "a_rounding")}
    assert told("table2") == {(b, m) for b in ("W32A4", "W32A2") for m in ("nearest", "qdrop", "aquant")}
    methods = ("adaround", "brecq", "qdrop", "aquant")
    assert told("table3") == {(b, m) for b in ("W4A4", "W2A4", "W3A3", "W2A2") for m in methods}
    assert told("table4") == {("W2A2", "aquant"), ("W3A3", "aquant")}
    assert networks("table1") == {"resnet18", "resnet50", "regnet_x_600mf"}
    assert networks("table2") == networks("table3") == set(imagenet.NETWORKS)
    assert networks("table4") == {"resnet18", "regnet_x_600mf"}
    everything = imagenet.plan(imagenet.Setting())
    assert all(cell.preset == "paper" for cell in everything)
    assert [cell.section for cell in everything[:7]] == ["float"] * 6 + ["table1"]
    # Table 4's quadratic and fused rows are Table 3's: 6 + 3 x 2 + 6 x 6 - 3 + 6 x 16 + 2 x 4 - 4 of their own
    assert len({cell.key for cell in everything}) == 6 + 6 + 36 - 3 + 96 + 8
    borders = {
        (cell.variant, cell.configuration.border.form, cell.configuration.border.fusion)
        for cell in everything
        if cell.section == "table4"
    }
    assert borders == {
        ("Border function: linear", "linear", "channel_mean"),
        ("Border function: quadratic", "quadratic", "channel_mean"),
        ("Border fusion: none", "quadratic", "none"),
        ("Border fusion: fusion", "quadratic", "channel_mean"),
    }


def test_every_row_has_a_number_for_each_network(imagenet: ModuleType) -> None:
    for table in imagenet.TABLES.values():
        assert len(table.baseline) == len(table.networks)
        assert all(len(row.numbers) == len(table.networks) for row in table.rows)


def refusal(
    imagenet: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object
) -> str:
    """What the script says instead of measuring."""
    monkeypatch.setattr(sys, "argv", ["imagenet.py", *map(str, arguments)])
    monkeypatch.setattr(imagenet, "sweep", lambda *_: pytest.fail("it was measured"))
    with pytest.raises(SystemExit) as stopped:
        imagenet.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_what_is_missing_is_named(
    imagenet: ModuleType,
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def said(*arguments: object) -> str:
        return refusal(imagenet, monkeypatch, capsys, *arguments, "--cache", tmp_path / "cache")

    neither = said()
    assert "--imagenet FOLDER" in neither
    assert "--weights FOLDER" in neither
    nowhere = said("--imagenet", tmp_path / "nowhere", "--weights", tmp_path / "lost")
    assert f"the ImageNet folder {tmp_path / 'nowhere'}" in nowhere
    assert f"the folder of weights {tmp_path / 'lost'}" in nowhere
    networks = said("--imagenet", folder, "--weights", weights, "--networks", "resnet18", "resnet50", "mnasnet2_0")
    assert "resnet50.safetensors or .pth, the weights of ResNet-50" in networks
    assert "mnasnet2_0.safetensors or .pth" in networks
    assert "resnet18.safetensors" not in networks
    (tmp_path / "flat" / "train" / "n01").mkdir(parents=True)
    (tmp_path / "flat" / "val").mkdir()
    flat = said("--imagenet", tmp_path / "flat", "--weights", weights, "--networks", "resnet18")
    assert f"{tmp_path / 'flat' / 'val'}, with a folder of images for each class" in flat
    (tmp_path / "flat" / "val" / "n02").mkdir()
    other = said("--imagenet", tmp_path / "flat", "--weights", weights, "--networks", "resnet18")
    assert "the same classes in train and val" in other
    assert not (tmp_path / "cache").exists()


def test_results_of_other_images_are_not_continued(
    imagenet: ModuleType,
    folder: Path,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    measured = []
    monkeypatch.setattr(imagenet, "sweep", lambda cells, results, images, *_: measured.append((cells, results, images)))
    given = ["--imagenet", folder, "--weights", weights, "--cache", tmp_path, "--results", tmp_path / "results.json"]
    given += ["--networks", "resnet18", "--size", "32", "--calibration", "16"]
    monkeypatch.setattr(sys, "argv", ["imagenet.py", *map(str, given)])
    imagenet.main()
    [(cells, results, images)] = measured
    module = sys.modules[type(cells[0]).__module__]
    preset = module.preset_of(cells[0])
    as_it_would_run = {"preset": vars(preset), "settings": vars(module.settings_of(cells[0].method, preset))}
    top1 = {"accuracy": {"quantized": {"top1": 0.5}}}
    kept = {"given": images("resnet18").score.given, **top1, **as_it_would_run}
    results.add(cells[0], kept)
    imagenet.main()
    assert len(measured) == 2
    message = refusal(imagenet, monkeypatch, capsys, *given, "--images", 6)
    assert "measured with other inputs (images, validation)" in message
    assert "--results" in message
