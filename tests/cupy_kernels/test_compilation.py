"""Every kernel compiles for the devices it is for, without spills, and a launch refuses what it cannot take."""

from __future__ import annotations

import functools
import importlib.util
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from border_cases import (
    LAYER_ROUTES,
    LAYERS,
    MAPS,
    PLACES,
    SINGLE,
    VARIANTS,
    Layer,
    Variant,
    layer_problem,
    training_problem,
)

from cupy_kernels import compilation, cuda_inference, cuda_training, specification
from cupy_kernels.compilation import launch, source
from cupy_kernels.packing import Route

FOLDER = Path(compilation.__file__).parent
FILES = (
    "border_columns.cu", "border_gradients.cu", "integer_columns.cu", "integer_convolution.cu", "integer_depthwise.cu",
    "integer_outputs.cu",
)  # fmt: skip
ARCHITECTURES = (80, 90)

Constants = tuple[tuple[str, int], ...]


class Recorder:
    """What the launchers ask for: a file's constants, without compiling or running it."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[Constants, set[int]]] = defaultdict(lambda: defaultdict(set))
        self.architectures: tuple[int, ...] = ()

    def launch(self, file: str, constants: Mapping[str, int], *_: Any) -> None:
        self.seen[file][tuple(constants.items())].update(self.architectures)

    def train(self, variant: Variant, *architectures: int) -> None:
        self.architectures = architectures
        problem = training_problem(variant, MAPS["padded"])
        grad = cuda_training.forward(**problem)
        x, window = problem["x"], problem["window"]
        rows, width = window.output_size(x.shape[2], x.shape[3])
        columns = torch.empty(len(x), x.shape[1] * window.positions, rows * width) if variant.columns else None
        cuda_training.backward(grad, **problem, columns=columns)

    def infer(self, layer: Layer, route: Route, place: str, *architectures: int) -> None:
        self.architectures = architectures
        problem = layer_problem(layer, PLACES[place])
        packed = problem.packed(route)
        assert packed.thresholds is not None or layer.fused or layer.dtype == SINGLE or layer.bits > 4
        cuda_inference.convolution(problem.x, packed, problem.residual, problem.relu)


HEAVIEST = ("3x3_all", "3x3_depthwise_all", "5x5_all", "7x7_by_position")

# Of the implicit GEMM, with numbers of outputs of a block.
QUANTIZERS = {
    "nearest": Layer(32, 0, quantizer="nearest", dtype=SINGLE),
    "codes": Layer(32, 0, quantizer="pixel", weight_bits=8),
    "nearest_thresholds": Layer(32, 0, quantizer="nearest", bits=2),
    "fused": Layer(32, 0, dtype=SINGLE),
    "fused_alpha_8_bits": Layer(32, 0, alpha=True, weight_bits=8, bits=8),
    "by_position": Layer(32, 0, fused=False, bits=8),
    "thresholds_3": Layer(32, 0, fused=False, bits=2, spread=0.2),
    "thresholds_7": Layer(32, 0, fused=False, bits=3, bound="clip", terms=2, weight_bits=8, spread=0.05),
    "thresholds_15": Layer(32, 0, fused=False, bits=4, spread=0.2),
}
KERNELS = ((1, 1), (3, 3), (5, 5), (7, 7))


@functools.cache
def recorded() -> dict[str, dict[Constants, set[int]]]:
    """By file, constants and the architectures to compile for: all variants that are tested, by turns or for both."""
    recorder = Recorder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_training, "launch", recorder.launch)
        patch.setattr(cuda_inference, "launch", recorder.launch)
        for index, (name, variant) in enumerate(VARIANTS.items()):
            architectures = ARCHITECTURES if name in HEAVIEST else (ARCHITECTURES[index % 2],)
            recorder.train(variant, *architectures)
        for index, (name, route) in enumerate(LAYER_ROUTES):
            if route != "implicit":
                recorder.infer(LAYERS[name], route, ("padded", "strided")[index % 2], ARCHITECTURES[index // 2 % 2])
        for row, layer in enumerate(QUANTIZERS.values()):
            for column, width in enumerate((256, 128, 64 if row % 2 else 32)):
                kernel = KERNELS[(row + column) % 4]
                if layer.quantizer == "pixel" and kernel == (1, 1):  # which has no codes by pixel
                    kernel = (2, 2)
                architectures = ARCHITECTURES if width == 256 else (ARCHITECTURES[(row + column) // 2 % 2],)
                of_width = replace(layer, outputs=width - row % 2, kernel=kernel)  # even and odd
                recorder.infer(of_width, "implicit", "padded", *architectures)
        patch.setattr(cuda_training, "SHARED_MAP_BYTES", 0)
        for name, architecture in (("3x3_all", 90), ("5x5_depthwise", 80)):
            recorder.train(VARIANTS[name], architecture)
    return recorder.seen


class Built(NamedTuple):
    """What the compiler said."""

    registers: int
    spills: tuple[int, ...]  # bytes: stack frame, stores, loads
    shared: int  # bytes
    warnings: tuple[str, ...]


@functools.cache
def build(file: str, constants: Constants, architecture: int) -> Built:
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source(file, dict(constants)), file, (), ())
    try:
        options = (f"--gpu-architecture=sm_{architecture}", "--ptxas-options=-v", *compilation.OPTIONS)
        nvrtc.compileProgram(program, options)
    finally:
        log = nvrtc.getProgramLog(program)
        nvrtc.destroyProgram(program)
    (frame,) = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    shared = re.findall(r"(\d+) bytes smem", log)
    return Built(
        int(re.findall(r"Used (\d+) registers", log)[0]),
        tuple(int(number) for number in frame),
        int(shared[0]) if shared else 0,
        tuple(line for line in log.splitlines() if "warning #" in line),
    )


@functools.cache
def has_nvrtc() -> bool:
    if importlib.util.find_spec("cupy_backends") is None:
        return False
    try:
        from cupy_backends.cuda.libs import nvrtc

        return nvrtc.getVersion() >= (12, 0)
    except (ImportError, RuntimeError):
        return False


needs_nvrtc = pytest.mark.skipif(not has_nvrtc(), reason="no NVRTC that CuPy finds: cupy, nvidia-cuda-nvrtc")


def built(file: str, architecture: int) -> dict[Constants, Built]:
    wanted = [constants for constants, targets in recorded()[file].items() if architecture in targets]
    return {constants: build(file, constants, architecture) for constants in wanted}


def test_all_files_are_compiled() -> None:
    assert set(FILES) == {path.name for path in FOLDER.glob("*.cu")} == set(recorded())


def test_what_is_compiled_covers_the_constants() -> None:
    """Each value that a launcher can give a constant is among those that are compiled."""
    values: dict[str, set[int]] = defaultdict(set)
    for variants in recorded().values():
        for constants in variants:
            for name, value in constants:
                values[name].add(value)
    assert {1, 3, 5, 7} <= values["KERNEL_HEIGHT"] & values["KERNEL_WIDTH"]
    assert {0, 1, 2} == values["BOUND"]
    assert {2, 3} == values["TERMS"]
    assert {0, 1, 2, 3} == values["QUANTIZER"]
    assert {3, 7, 15} <= values["LEVELS"]
    assert {32, 64, 128, 256} == values["OUTPUTS"]
    assert {1, 4} == values["WIDTH"]
    either = "BORDERED FUSED LEARNED_ALPHA ROUNDED SUMMED INPUT_GRADIENT WRITE_COLUMNS SHARED_MAP"
    of_integers = "CORRECTED UNIFORM PAIRED CHANNELS_LAST LANES_ARE_CHANNELS"
    for name in f"{either} {of_integers}".split():
        assert {False, True} == values[name], name
    implicit = [dict(constants) for constants in recorded()["integer_convolution.cu"]]
    widths = {(constants["OUTPUTS"], constants["QUANTIZER"]) for constants in implicit}
    assert widths >= {(width, quantizer) for width in (128, 256) for quantizer in range(4)}


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_it_compiles_without_spills(file: str, architecture: int) -> None:
    results = built(file, architecture)
    assert results
    spilled = [f"{result} {dict(constants)}" for constants, result in results.items() if any(result.spills)]
    assert not spilled, "\n".join(spilled)


@needs_nvrtc
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("file", FILES)
def test_it_compiles_without_warnings(file: str, architecture: int) -> None:
    assert {line for result in built(file, architecture).values() for line in result.warnings} == set()


SMALLEST_OPT_IN = 99 << 10
"""Shared memory of a block, static and dynamic together, that sm_86 and sm_89 grant; sm_80 and sm_90 grant more."""


@needs_nvrtc
@pytest.mark.parametrize("variant", ["3x3_all", "5x5_all", "7x7"])
def test_the_map_in_shared_memory_fits_beside_what_is_static(variant: str) -> None:
    kernel = VARIANTS[variant].kernel
    shared = [
        build("border_gradients.cu", constants, min(targets)).shared
        for constants, targets in recorded()["border_gradients.cu"].items()
        if (dict(constants)["KERNEL_HEIGHT"], dict(constants)["KERNEL_WIDTH"]) == kernel
    ]
    counted = cuda_training.static_bytes(kernel[0] * kernel[1])  # which the launcher takes off
    assert max(shared) - counted + cuda_training.SHARED_MAP_BYTES <= SMALLEST_OPT_IN


@needs_nvrtc
def test_the_largest_window_s_sums_fit_into_shared_memory() -> None:
    side = math.isqrt(cuda_training.MOST_POSITIONS)
    constants = dict(next(iter(recorded()["border_gradients.cu"]))) | {"KERNEL_HEIGHT": side, "KERNEL_WIDTH": side}
    result = build("border_gradients.cu", tuple(constants.items()), 80)
    assert result.shared <= cuda_training.static_bytes(side * side) + 64 <= 48 << 10


@needs_nvrtc
def test_static_shared_memory_is_within_what_any_launch_is_granted() -> None:
    for file in FILES:
        for architecture in ARCHITECTURES:
            for constants, result in built(file, architecture).items():
                assert result.shared <= 48 << 10, (file, constants)


@pytest.mark.parametrize("file", FILES)
def test_the_source_is_one_text_with_the_specification_s_constants(file: str) -> None:
    text = source(file, {"FIRST": 5, "SECOND": True})
    assert text.startswith("#define FIRST 5\n#define SECOND 1\n#define SIGMOID_LIMIT 8.0f\n")
    assert "#include" not in text
    assert text.count("struct Grid {") == 1
    for name in ("SIGMOID_P0", "SIGMOID_P1", "SIGMOID_P2", "SIGMOID_Q1", "SIGMOID_Q2", "SCALE_OF_BOUND"):
        (written,) = re.findall(rf"^#define {name} (\S+)f$", text, re.MULTILINE)
        assert np.float32(float(written)) == np.float32(getattr(specification, name))


class Launched:
    """Stands in for the compiler; keeps what it is asked for."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.calls: list[Any] = []

    def __call__(self, text: str, entry: str, device: torch.device) -> Any:
        self.asked.append((entry, device))
        assert "#define" in text
        return lambda *call: self.calls.append(call)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launched]:
    compiler = Launched()
    monkeypatch.setattr(compilation, "compile_for_gpu", compiler)
    compilation.compiled.cache_clear()
    yield compiler
    compilation.compiled.cache_clear()


def test_arguments_are_addresses_and_32_bits(launched: Launched) -> None:
    x, y = torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8)
    launch("border_columns.cu", {"A": 1}, (7, 2), 96, [x, None, 5, 2.5, y, True], 1234)
    ((grid, threads, arguments, shared_bytes),) = launched.calls
    assert (grid, threads, shared_bytes) == ((7, 2), 96, 1234)
    assert [int(arguments[0]), int(arguments[1]), int(arguments[4])] == [x.data_ptr(), 0, y.data_ptr()]
    assert [type(argument) for argument in arguments] == [
        np.uint64, np.uint64, np.int32, np.float32, np.uint64, np.int32,
    ]  # fmt: skip
    assert (arguments[2], arguments[3], arguments[5]) == (5, 2.5, 1)


def test_each_kernel_is_compiled_once_for_its_constants_and_device(launched: Launched) -> None:
    x = torch.zeros(3)
    for constants in ({"A": 1}, {"A": 1}, {"A": 2}, {"A": 1}):
        launch("border_columns.cu", constants, (1,), 32, [x])
    launch("border_gradients.cu", {"A": 1}, (1,), 32, [x])
    launch("border_columns.cu", {"A": 1}, (1,), 32, [torch.zeros(3, device="meta")])
    cpu, meta = torch.device("cpu"), torch.device("meta")
    assert launched.asked == [
        ("border_columns", cpu), ("border_columns", cpu), ("border_gradients", cpu), ("border_columns", meta),
    ]  # fmt: skip
    assert len(launched.calls) == 6


def test_the_most_blocks_are_granted(launched: Launched) -> None:
    launch("border_columns.cu", {}, (2**21, 65535, 65535), 32, [torch.zeros(1)])
    assert len(launched.calls) == 1


WIDE = torch.zeros(4, 6)


@pytest.mark.parametrize(
    ("grid", "tensors", "message"),
    [
        ((1,), [WIDE, WIDE[:, ::2]], r"a tensor of shape \(4, 3\) and stride \(6, 2\) is not contiguous"),
        ((1,), [WIDE.expand(2, 4, 6)], r"shape \(2, 4, 6\) and stride \(0, 6, 1\) is not contiguous"),
        ((1,), [WIDE, None, WIDE.to("meta")], "tensors on cpu and on meta cannot meet in one kernel"),
        ((2**21 + 1,), [WIDE], r"border_columns.cu would need \(2097153,\) blocks.*give fewer images at a time"),
        ((1, 65536), [WIDE], r"border_columns.cu would need \(1, 65536\) blocks"),
        ((1, 1, 65536), [WIDE], r"border_columns.cu would need \(1, 1, 65536\) blocks"),
    ],
)
def test_refusals_come_before_compilation(
    grid: tuple[int, ...], tensors: list[Any], message: str, launched: Launched
) -> None:
    with pytest.raises(ValueError, match=message):
        launch("border_columns.cu", {}, grid, 32, tensors)
    assert not launched.asked


def test_channels_last_is_dense(launched: Launched) -> None:
    launch("border_columns.cu", {}, (1,), 32, [torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)])
    assert len(launched.calls) == 1


class FakeCupy:
    """As much of CuPy as a launch asks for; ``events`` are what it was asked."""

    def __init__(self, static_shared_bytes: int) -> None:
        events: list[Any] = []
        self.events = events
        self.cuda = self

        class Entered:
            def __enter__(self) -> None: ...
            def __exit__(self, *_: object) -> None: ...

        class Stream(Entered):
            @staticmethod
            def from_external(stream: Any) -> Entered:
                events.append(("stream", stream.__cuda_stream__()[1]))
                return Entered()

        class RawKernel:
            shared_size_bytes = static_shared_bytes

            def __init__(self, text: str, entry: str, options: tuple[str, ...]) -> None:
                events.append(("source", text, entry, options))

            def compile(self) -> None: ...

            def __setattr__(self, name: str, value: int) -> None:
                events.append((name, value))

            def __call__(self, *call: Any, shared_mem: int) -> None:
                events.append(("launch", *call, shared_mem))

        self.Stream, self.RawKernel = Stream, RawKernel

    def Device(self, index: int) -> Any:  # noqa: N802 - CuPy's name
        assert index == 1
        return self.Stream()


@pytest.fixture
def cupy(monkeypatch: pytest.MonkeyPatch) -> FakeCupy:
    fake = FakeCupy(1504)
    monkeypatch.setitem(sys.modules, "cupy", fake)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(cuda_stream=4321))
    return fake


def test_a_launch_goes_to_torch_s_stream(cupy: FakeCupy) -> None:
    run = compilation.compile_for_gpu("text", "entry", torch.device("cuda", 1))
    run((5, 2), 96, [np.int32(7)], 0)
    run((5,), 32, [], 100)
    assert cupy.events == [
        ("source", "text", "entry", ("--std=c++17", "--fmad=false", "--ftz=true")),
        ("stream", 4321),
        ("launch", (5, 2), (96,), (7,), 0),
        ("stream", 4321),
        ("launch", (5,), (32,), (), 100),
    ]


@pytest.mark.parametrize(
    "dynamic",
    [(48 << 10) - 100, (48 << 10) + 4],
)
def test_more_than_48_kib_have_to_be_asked_for(dynamic: int, cupy: FakeCupy) -> None:
    """Static and dynamic together; once for a kernel, unless it is more than before."""
    run = compilation.compile_for_gpu("text", "entry", torch.device("cuda", 1))
    for _ in range(2):
        run((1,), 32, [], dynamic)
    asked = [event[1] for event in cupy.events if event[0] == "max_dynamic_shared_size_bytes"]
    assert len(asked) == 1
    assert asked[0] >= dynamic
