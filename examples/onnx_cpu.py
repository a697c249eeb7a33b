"""Runs an exported network with onnxruntime on the CPU; needs numpy and onnxruntime, neither torch nor this project.

python examples/onnx_cpu.py quantized.onnx examples/digits/evaluation.npz
"""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime


def main(network: str, file: str) -> None:
    session = onnxruntime.InferenceSession(network, providers=["CPUExecutionProvider"])
    with np.load(file) as content:
        images, labels = content["images"], content["labels"]
    if images.dtype == np.uint8:  # as they are read for calibration: scaled to [0, 1]
        images = images.astype(np.float32) / 255
    batches = np.array_split(images, max(len(images) // 256, 1))
    logits = np.concatenate([session.run(["logits"], {"input": batch})[0] for batch in batches])  # (N, classes)
    classes = logits.argmax(1)
    print("first classes:", *classes[:10])
    print(f"top-1: {np.mean(classes == labels):.2%} of {len(images):,} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
