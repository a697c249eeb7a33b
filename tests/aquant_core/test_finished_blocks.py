"""Runs that are cut off and continued: what is learned again, and that the outcome is an undisturbed run's.

Run as a script, this is the run that a test has killed: ``test_finished_blocks.py FOLDER``.
"""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipeline_runs import Net

from aquant_core.config import QuantizationConfig
from aquant_core.errors import ResumeError
from aquant_core.finished_blocks import FinishedBlocks
from aquant_core.images import ImageSet
from aquant_core.methods import Preset
from aquant_core.pipeline import QuantizationResult, quantize
from aquant_core.progress import Progress
from aquant_core.resources import Resources
from cupy_kernels.ops import reference_only

PRESET = Preset(4, 8, border_rate=3e-2, scale_rate=1e-3, rounding_rate=3e-2)
BLOCKS = [1, 2, 3]
CASES: dict[str, dict[str, Any]] = {
    "qdrop_refactored": {"method": "qdrop_refactored"},
    "aquant_no_border": {"method": "aquant_no_border"},
    "aquant": {"method": "aquant"},
    "alpha_learned": {"border": {"alpha": "learned", "bits": 8}},
    "qdrop": {"method": "qdrop"},
    "adaround": {"method": "adaround"},
    "shortcut": {"protocol_switches": {"shortcut": "low"}},
}
COMPARED = {"compare": ["qdrop", "adaround", "nearest"]}
FLOAT_CASES: dict[str, dict[str, Any]] = {
    "float_weights": {"weight_bits": 32},
    "float_inputs": {"activation_bits": 32},
    "one_float_layer": {"layers": {"second": {"weight_bits": 32, "activation_bits": 32}}},
}


class StoppedError(Exception):
    """Raised by a test's callback."""


def make_net(seed: int = 0) -> Net:
    """Its mean before the classifier is a block without layers."""
    torch.manual_seed(seed)
    return Net().eval()


def make_images(count: int, seed: int) -> ImageSet:
    return ImageSet(torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)))


CALIBRATION, EVALUATION = make_images(24, 1), make_images(12, 2)


def run(
    folder: Path | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    net: Net | None = None,
    calibration: ImageSet = CALIBRATION,
    evaluation: ImageSet | None = EVALUATION,
    preset: Preset = PRESET,
    resources: Resources | None = None,
    **changes: Any,
) -> QuantizationResult:
    config = QuantizationConfig(**{"weight_bits": 4, "activation_bits": 4} | changes)
    return quantize(net or make_net(), calibration, config, evaluation, on_progress, preset, resources, folder)


def outcome(result: QuantizationResult) -> tuple[bytes, str]:
    """The checkpoint's bytes and the digest of the logits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.safetensors"
        result.save(path)
        return path.read_bytes(), result.report["digests"]["logits"]


def entries(result: QuantizationResult) -> list[dict[str, Any]]:
    """The report's blocks, without what the clock and the machine say."""
    return [{k: v for k, v in block.items() if k not in ("seconds", "peak_bytes")} for block in result.report["blocks"]]


@cache
def undisturbed(case: str) -> QuantizationResult:
    return run(**(CASES | FLOAT_CASES | {"compared": COMPARED})[case])


def stop_in(block: int, how: Callable[[], None], method: str | None = None) -> Callable[[Progress], None]:
    """Stops in the middle of a block: after the first of its iterations (with a method of several)."""

    def on_progress(progress: Progress) -> None:
        if (progress.block, progress.iteration) == (block, 1) and method in (None, progress.method):
            how()

    return on_progress


def raise_stopped() -> None:
    raise StoppedError


def interrupt(folder: Path, block: int, of: str | None = None, **changes: Any) -> None:
    """Stops a run in a block; ``of`` one method, where several are compared."""
    with pytest.raises(StoppedError):
        run(folder, stop_in(block, raise_stopped, of), **changes)


def resume(folder: Path, **changes: Any) -> tuple[QuantizationResult, list[int]]:
    """The result, and which blocks were learned for it."""
    told: list[Progress] = []
    result = run(folder, told.append, **changes)
    return result, sorted({progress.block for progress in told if progress.stage == "reconstruct"})


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


PLACES = ["0000", "0001", "0003"]  # of the blocks; 2 is the mean


@pytest.mark.parametrize(("case", "block"), [*((case, 2) for case in CASES), ("aquant", 1), ("aquant", 3)])
def test_an_interrupted_run_continues_with_the_block_it_was_in(case: str, block: int, tmp_path: Path) -> None:
    interrupt(tmp_path, block, **CASES[case])
    method = CASES[case].get("method", "aquant")
    assert files(tmp_path) == files_of(method, BLOCKS[: block - 1])
    result, learned = resume(tmp_path, **CASES[case])
    assert learned == BLOCKS[block - 1 :]
    assert outcome(result) == outcome(undisturbed(case))
    assert entries(result) == entries(undisturbed(case))
    assert files(tmp_path) == files_of(method, BLOCKS)


LEARNED = ["aquant", "qdrop", "adaround"]  # nearest learns nothing and has no files


def files_of(method: str, blocks: list[int]) -> list[str]:
    return [f"block-{method}-{PLACES[block - 1]}.safetensors" for block in blocks]


def rows(result: QuantizationResult) -> list[dict[str, Any]]:
    """The report's table, without what the clock says."""
    return [{key: value for key, value in row.items() if key != "seconds"} for row in result.report["comparison"]]


@pytest.mark.parametrize("method", LEARNED)
def test_an_interrupted_comparison_continues_with_the_method_it_was_in(method: str, tmp_path: Path) -> None:
    interrupt(tmp_path, 2, method, **COMPARED)
    before = LEARNED[: LEARNED.index(method)]
    there = {name: [1, 2] if name in before else [1] for name in LEARNED}
    assert files(tmp_path) == sorted(file for name, blocks in there.items() for file in files_of(name, blocks))
    told: list[Progress] = []
    result = run(tmp_path, told.append, **COMPARED)
    again = {(p.block, p.method) for p in told if p.stage == "reconstruct"}
    assert again == {(block, name) for name in LEARNED for block in BLOCKS if block not in there[name]}
    whole = undisturbed("compared")
    assert outcome(result) == outcome(whole)
    assert entries(result) == entries(whole)
    assert rows(result) == rows(whole)
    assert [row["method"] for row in rows(whole)] == [*LEARNED, "nearest"]
    assert files(tmp_path) == sorted(file for name in LEARNED for file in files_of(name, BLOCKS))
    steps = [p for p in told if p.stage == "reconstruct"]
    assert all(p.eta_seconds is not None and p.eta_seconds >= 0 for p in steps)


def test_one_methods_damaged_block_is_learned_again_and_no_others(tmp_path: Path) -> None:
    run(tmp_path, **COMPARED)
    damaged = tmp_path / files_of("qdrop", [2])[0]
    damaged.write_bytes(flip_last_byte(damaged.read_bytes()))
    told: list[Progress] = []
    result = run(tmp_path, told.append, **COMPARED)
    assert {(p.block, p.method) for p in told if p.stage == "reconstruct"} == {(2, "qdrop"), (3, "qdrop")}
    assert outcome(result) == outcome(undisturbed("compared"))
    assert rows(result) == rows(undisturbed("compared"))


def test_a_methods_blocks_serve_whatever_it_is_compared_with(tmp_path: Path) -> None:
    interrupt(tmp_path, 3, **COMPARED)
    for changes in ({}, {"compare": ["qdrop"]}, {"method": "qdrop"}):
        told: list[Progress] = []
        result = run(tmp_path, told.append, **changes)
        learned = {(p.block, p.method) for p in told if p.stage == "reconstruct"}
        assert learned <= {(3, "aquant"), (3, "qdrop")}
    assert outcome(result) == outcome(undisturbed("qdrop"))


@pytest.mark.parametrize("case", FLOAT_CASES)
def test_so_it_does_where_some_is_float(case: str, tmp_path: Path) -> None:
    interrupt(tmp_path, 3, **FLOAT_CASES[case])
    result, learned = resume(tmp_path, **FLOAT_CASES[case])
    assert learned == [3]
    assert outcome(result) == outcome(undisturbed(case))


def test_where_all_is_float_nothing_is_learned_either_time(tmp_path: Path) -> None:
    bits = {"weight_bits": 32, "activation_bits": 32}
    first, second = (resume(tmp_path, **bits) for _ in range(2))
    assert first[1] == second[1] == []
    assert outcome(first[0]) == outcome(second[0])


def test_a_run_may_be_interrupted_again_and_again(tmp_path: Path) -> None:
    for block in (1, 2, 2, 3):
        interrupt(tmp_path, block)
    result, learned = resume(tmp_path)
    assert learned == [3]
    assert outcome(result) == outcome(undisturbed("aquant"))


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of method ``aquant`` with learned alpha, to be copied."""
    folder = tmp_path_factory.mktemp("finished") / "not" / "there"
    run(folder, **CASES["alpha_learned"])
    return folder


@pytest.fixture
def finished(finished_run: Path, tmp_path: Path) -> Path:
    for path in finished_run.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def resume_finished(folder: Path, **changes: Any) -> tuple[QuantizationResult, list[int]]:
    return resume(folder, **CASES["alpha_learned"] | changes)


def test_a_finished_folder_gives_the_result_without_learning(finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    assert sorted(before) == files_of("aquant", BLOCKS)
    result, learned = resume_finished(finished)
    assert learned == []
    assert outcome(result) == outcome(undisturbed("alpha_learned"))
    assert entries(result) == entries(undisturbed("alpha_learned"))
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def test_what_it_is_measured_on_may_change(finished: Path) -> None:
    result, learned = resume_finished(finished, evaluation=make_images(10, 7))
    assert learned == []
    states = result.model.state_dict(), undisturbed("alpha_learned").model.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[1])


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"seed": 1}, id="seed"),
        pytest.param({"calibration": make_images(24, 5)}, id="images"),
        pytest.param({"net": make_net(1)}, id="network"),
        pytest.param({"preset": replace(PRESET, iterations=5)}, id="iterations"),
        pytest.param({"preset": replace(PRESET, border_rate=1e-2)}, id="rate"),
        pytest.param({"weight_bits": 5}, id="bits"),
        pytest.param({"border": {"bound": "clip", "alpha": "learned"}}, id="border"),
        pytest.param({"protocol": "qdrop"}, id="protocol"),
        pytest.param({"evaluation": None}, id="held_back"),  # learned from 21 images, not from 24
    ],
)
def test_blocks_of_another_run_are_refused(changes: dict[str, Any], finished: Path) -> None:
    before = {path.name: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(ResumeError, match="belongs to another run") as caught:
        resume_finished(finished, **changes)
    assert caught.value.code == "resume_mismatch"
    assert "block-aquant-0000" in caught.value.detail
    assert "an empty folder" in caught.value.remedy
    assert {path.name: path.read_bytes() for path in finished.iterdir()} == before


def flip_last_byte(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda _: b"", id="empty"),
        pytest.param(lambda data: data[:5], id="length_cut"),
        pytest.param(lambda data: data[: len(data) // 2], id="half"),
        pytest.param(lambda data: data[:-1], id="last_byte_missing"),
        pytest.param(lambda data: data + b"\0", id="one_byte_more"),
        pytest.param(lambda data: b"\xff" * len(data), id="overwritten"),
        pytest.param(lambda data: data.replace(b"aquant", b"aquand", 1), id="no_document"),
        pytest.param(lambda data: data.replace(b"second.input_scale", b"second.input_scala"), id="a_value_missing"),
        pytest.param(flip_last_byte, id="a_bit_of_a_value"),
        pytest.param(lambda data: data.replace(b"first.border", b"first.bordes"), id="no_border"),
        pytest.param(lambda data: data.replace(b"second.alpha", b"second.alphb"), id="no_alpha"),
    ],
)
def test_a_damaged_block_is_learned_again(damage: Callable[[bytes], bytes], finished: Path) -> None:
    path = finished / files_of("aquant", [2])[0]
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert path.read_bytes() != whole
    result, learned = resume_finished(finished)
    assert learned == [2, 3]
    assert outcome(result) == outcome(undisturbed("alpha_learned"))
    assert path.read_bytes() != damage(whole)


def test_a_missing_block_is_learned_again(finished: Path) -> None:
    (finished / files_of("aquant", [1])[0]).unlink()
    result, learned = resume_finished(finished)
    assert learned == BLOCKS
    assert outcome(result) == outcome(undisturbed("alpha_learned"))


@pytest.mark.parametrize("block", [0, 1])
def test_what_was_left_half_written_does_no_harm(block: int, tmp_path: Path) -> None:
    interrupt(tmp_path, 2)
    (tmp_path / files_of("aquant", BLOCKS)[block]).with_suffix(".partial").write_bytes(b"half")
    result, learned = resume(tmp_path)
    assert learned == [2, 3]
    assert outcome(result) == outcome(undisturbed("aquant"))


def test_a_block_that_cannot_be_written_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))
    result, learned = resume(tmp_path)
    assert learned == BLOCKS
    assert outcome(result) == outcome(undisturbed("aquant"))


@pytest.fixture
def by_reference() -> Iterator[None]:
    """As in the child, which shall not wait for the loops to be compiled."""
    with reference_only():
        yield


@pytest.mark.usefixtures("by_reference")
def test_a_killed_run_continues(tmp_path: Path) -> None:
    found = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # what the tests share
    argv = [sys.executable, __file__, str(tmp_path)]
    child = subprocess.run(argv, env=found, capture_output=True, text=True, check=False)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert files(tmp_path) == files_of("aquant", [1])
    result, learned = resume(tmp_path)
    assert learned == [2, 3]
    assert outcome(result) == outcome(run())


@pytest.mark.parametrize("case", ["qdrop_refactored", "alpha_learned", "adaround", "compared"])
def test_caches_on_disk_change_nothing_and_leave_nothing(case: str, tmp_path: Path) -> None:
    changes = (CASES | {"compared": COMPARED})[case]
    result = run(resources=Resources(memory_bytes=0, folder=tmp_path), **changes)
    assert files(tmp_path) == []
    assert {block["placement"] for block in result.report["blocks"]} == {"disk"}
    assert {block["placement"] for block in undisturbed(case).report["blocks"]} == {"memory"}
    assert outcome(result) == outcome(undisturbed(case))
    assert rows(result) == rows(undisturbed(case))


def kill_oneself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    with reference_only():
        run(Path(sys.argv[1]), stop_in(2, kill_oneself))


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ResumeError, match="is a file"):
        FinishedBlocks(tmp_path / "file", {}, "aquant")
