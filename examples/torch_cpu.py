"""Runs a checkpoint with PyTorch on the CPU.

    python examples/torch_cpu.py quantized.safetensors examples/digits/evaluation.npz

The module computes in float32 what the integers stand for, bit for bit as it was evaluated when it was quantized.
"""

from __future__ import annotations

import sys

import torch

import aquant_core


def main(checkpoint: str, file: str) -> None:
    model = aquant_core.load(checkpoint)
    images = aquant_core.read_images(file)  # (N, C, H, W), uint8 scaled to [0, 1]
    with torch.inference_mode():
        logits = torch.cat([model(batch) for batch in images.images.split(256)])  # (N, classes)
    classes = logits.argmax(1)
    print("first classes:", *classes[:10].tolist())
    if images.labels is not None:
        print(f"top-1: {(classes == images.labels).float().mean():.2%} of {len(images):,} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
