"""How many instructions a column element costs in the implicit GEMM's prologue: counted in its machine code.

    python benchmarks/instructions.py

Compiles ``integer_convolution.cu`` (3 x 3, fp16, 128 windows by 64 outputs) by NVRTC for each quantizer and counts the
instructions of the innermost loops that make codes, addresses and stores included. Needs no GPU, but ``nvdisasm`` on
the PATH (the package nvidia-cuda-nvdisasm has it). A count is no time: it is the least that the lanes must issue.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from floors import LANES_RATE
from record import RESULTS, about, write

from cupy_kernels.compilation import OPTIONS, source

ELEMENTS_A_TURN = 4 * 4
"""Windows and channels that a thread takes in one turn of the loop."""
COMMON = {
    "KERNEL_HEIGHT": 3, "KERNEL_WIDTH": 3, "TERMS": 3, "BOUND": 0, "LEARNED_ALPHA": 0, "INPUT": 1, "OUTPUT": 1,
    "WIDTH": 4, "CORRECTED": 0, "WINDOWS": 128, "OUTPUTS": 64, "STAGE": 9, "PAIRED": 1,
}  # fmt: skip
QUANTIZERS: dict[str, dict[str, int]] = {
    "nearest, by thresholds": {"QUANTIZER": 2, "BORDERED": 0, "FUSED": 0, "LEVELS": 3, "UNIFORM": 1},
    "border without fusion, by thresholds": {"QUANTIZER": 2, "BORDERED": 0, "FUSED": 0, "LEVELS": 3, "UNIFORM": 0},
    "nearest, evaluated": {"QUANTIZER": 0, "BORDERED": 0, "FUSED": 0, "LEVELS": 1, "UNIFORM": 0},
    "border without fusion, evaluated": {"QUANTIZER": 1, "BORDERED": 1, "FUSED": 0, "LEVELS": 1, "UNIFORM": 0},
    "border, channel_mean": {"QUANTIZER": 1, "BORDERED": 1, "FUSED": 1, "LEVELS": 1, "UNIFORM": 0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--columns", type=int, default=470_065_152, help="elements, of ResNet-18 at batch 32")
    parser.add_argument("--out", type=Path, default=RESULTS / "instructions.json")
    options = parser.parse_args()
    rows: dict[str, Any] = {}
    for name, constants in QUANTIZERS.items():
        count = loop_instructions(machine_code(COMMON | constants)) / ELEMENTS_A_TURN
        rows[name] = {
            "instructions_an_element": round(count, 2),
            "least_microseconds": round(1e6 * count * options.columns / LANES_RATE),
        }
        print(name, rows[name])
    from cupy_backends.cuda.libs import nvrtc

    compiler = {"nvrtc": list(nvrtc.getVersion()), "architecture": "sm_90", "lanes_per_second": LANES_RATE}
    write(options.out, {"about": about(torch.device("cpu"), columns=options.columns, **compiler), "quantizers": rows})


def machine_code(constants: dict[str, int]) -> str:
    """The disassembly of one variant."""
    from cupy_backends.cuda.libs import nvrtc

    program = nvrtc.createProgram(source("integer_convolution.cu", constants), "integer_convolution.cu", (), ())
    nvrtc.compileProgram(program, ("--gpu-architecture=sm_90", *OPTIONS))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(nvrtc.getCUBIN(program) + b"\0")  # CuPy leaves the last byte out
        file.flush()
        return subprocess.run(["nvdisasm", "-c", file.name], capture_output=True, text=True, check=True).stdout


def loop_instructions(disassembly: str) -> int:
    """Instructions of all innermost loops without a matrix product."""
    labels: dict[str, int] = {}
    instructions: list[str] = []
    for line in disassembly.splitlines():
        if label := re.match(r"^(\.L\S+):", line):
            labels[label[1]] = len(instructions)
        elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            instructions.append(instruction[1].strip())
    loops = []
    for end, instruction in enumerate(instructions):
        target = re.search(r"BRA.*`\((\.L\S+)\)", instruction)
        if target and labels[target[1]] < end:
            loops.append((labels[target[1]], end))
    innermost = [loop for loop in loops if not any(_inside(other, loop) for other in loops)]
    bodies = [instructions[start : end + 1] for start, end in innermost]
    return sum(len(body) for body in bodies if not any("IMMA" in one for one in body) and len(body) > ELEMENTS_A_TURN)


def _inside(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one != other and other[0] <= one[0] and one[1] <= other[1]


if __name__ == "__main__":
    main()
