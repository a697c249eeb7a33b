"""What a run may use, and the peak of what it did use."""

from __future__ import annotations

import mmap
from pathlib import Path

import psutil
import pytest
import torch

from aquant_core.errors import DeviceError
from aquant_core.resources import PeakMemory, Resources, available_bytes, resident_bytes, usable_device

CPU = torch.device("cpu")
MIB = 1 << 20


def peak_can_be_reset() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


needs_reset = pytest.mark.skipif(not peak_can_be_reset(), reason="/proc/self/clear_refs cannot be written here")


def allocate(mebibytes: int) -> mmap.mmap:
    """Pages of the system's: an allocator may answer from what this process freed before and still holds."""
    pages = mmap.mmap(-1, mebibytes * MIB)
    for _ in range(mebibytes):
        pages.write(b"\1" * MIB)
    return pages


def allocate_and_free(mebibytes: int) -> None:
    allocate(mebibytes).close()


def test_devices_that_are_not_there_are_named() -> None:
    assert usable_device("cpu") == usable_device(CPU) == CPU
    absent = torch.cuda.device_count()
    for device in (absent, f"cuda:{absent}", torch.device("cuda", absent)):
        with pytest.raises(DeviceError, match=rf"'cuda:{absent}' is not there: {absent} CUDA devices .* \"cpu\""):
            usable_device(device)
        with pytest.raises(DeviceError, match="is not there"):
            Resources(device)
    for take in (usable_device, Resources):
        with pytest.raises(DeviceError, match=r"'gpu' is no device\. Choose"):
            take("gpu")
    with pytest.raises(DeviceError, match=r"'meta' is neither cpu nor cuda\. Choose"):
        Resources("meta")


def pretend_gpus(monkeypatch: pytest.MonkeyPatch, count: int, available: bool = True) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)


def test_resources_are_made_of_a_device_s_name_or_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Resources("cpu").device == Resources(CPU).device == CPU
    pretend_gpus(monkeypatch, 2)
    for device in (1, "cuda:1", torch.device("cuda", 1)):
        assert Resources(device).device == torch.device("cuda", 1)


@pytest.mark.parametrize("device", ["cuda", torch.device("cuda")])
def test_without_cuda_nobody_gets_as_far_as_torch_s_own_words(
    device: str | torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    for count in (0, 1):  # a card whose driver this torch cannot use is counted all the same
        pretend_gpus(monkeypatch, count, available=False)
        with pytest.raises(DeviceError, match=r"'cuda' is not there: 0 CUDA devices are usable.*NVIDIA driver"):
            Resources(device)


@needs_reset
def test_the_peak_is_seen_after_it_has_gone() -> None:
    peak = PeakMemory(CPU)
    allocate_and_free(128)
    assert 120 * MIB < peak.read() - peak.start < 200 * MIB
    assert resident_bytes() - peak.start < 64 * MIB


@needs_reset
def test_a_peak_starts_afresh() -> None:
    allocate_and_free(256)
    second = PeakMemory(CPU)
    assert second.read() - second.start < 32 * MIB
    allocate_and_free(64)
    assert 60 * MIB < second.read() - second.start < 120 * MIB


def test_resident_bytes_are_what_the_process_holds() -> None:
    before = resident_bytes()
    with allocate(64):
        assert 60 * MIB < resident_bytes() - before < 100 * MIB
        assert resident_bytes() == pytest.approx(psutil.Process().memory_info().rss, abs=8 * MIB)


def test_numbers_given_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_gpus(monkeypatch, 1)
    assert Resources(memory_bytes=123).memory_budget() == 123
    assert Resources(memory_bytes=0).memory_budget() == 0
    assert Resources(torch.device("cuda"), device_bytes=7).device_budget() == 7
    assert Resources(torch.device("cuda"), device_bytes=0).device_budget() == 0


def test_a_cpu_has_no_device_memory() -> None:
    assert Resources().device == CPU
    assert Resources().device_budget() == Resources(device_bytes=7).device_budget() == 0


def test_the_budget_by_default_is_within_the_machine() -> None:
    assert resident_bytes() < Resources().memory_budget() < psutil.virtual_memory().total
    assert 0 < available_bytes() < psutil.virtual_memory().total


def test_the_budget_by_default_is_below_the_limit() -> None:
    limit = resident_bytes() + available_bytes() // 4
    assert Resources(limit_bytes=limit).memory_budget() == int(0.9 * limit)
    assert Resources(limit_bytes=1).memory_budget() == 0
    assert limit < Resources(limit_bytes=1 << 60).memory_budget() < psutil.virtual_memory().total
    for given in (0, 2 * limit):  # whoever gives a number means it
        assert Resources(memory_bytes=given, limit_bytes=limit).memory_budget() == given


LIMIT, CURRENT = (f"/sys/fs/cgroup/memory.{name}" for name in ("max", "current"))


def pretend(monkeypatch: pytest.MonkeyPatch, limit: str | None, available: int = 4000 * MIB) -> None:
    """A machine with so much available, and a control group that uses 400 MiB; None is one without control groups."""
    files = {"/proc/meminfo": f"MemTotal: 9999999 kB\nMemAvailable: {available // 1024} kB\nHugePages_Total: 0\n"}
    if limit is not None:
        files |= {LIMIT: f"{limit}\n", CURRENT: f"{400 * MIB}\n"}

    def read_text(path: Path) -> str:
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (None, 4000),
        ("max", 4000),
        (str(1000 * MIB), 600),
        (str(5000 * MIB), 4000),  # more than the machine has left
        (str(300 * MIB), 0),  # lowered below what is in use
    ],
)
def test_available_is_what_machine_and_control_group_leave(
    limit: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, limit)
    assert available_bytes() == expected * MIB
