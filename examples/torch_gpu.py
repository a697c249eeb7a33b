"""Runs a checkpoint on a GPU with integers: int8 codes times int8 weights, by fused kernels.

    python examples/torch_gpu.py quantized.safetensors examples/digits/evaluation.npz

It needs CuPy: pip install 'aquant-service[core,gpu]'. The first batch of a size compiles the kernels for it.
"""

from __future__ import annotations

import sys

import torch

import aquant_core


def main(checkpoint: str, file: str) -> None:
    network = aquant_core.IntegerModel(aquant_core.load(checkpoint), device="cuda")  # fp16 between the layers
    for name, layer in network.layers.items():
        print(f"{name}: {layer.route}, {layer.evaluated_because or 'codes by thresholds'}")
    images = aquant_core.read_images(file)  # (N, C, H, W), uint8 scaled to [0, 1]
    logits = torch.cat([network(batch) for batch in images.images.split(256)])  # (N, classes), fp32 on the GPU
    classes = logits.argmax(1).cpu()
    print("first classes:", *classes[:10].tolist())
    if images.labels is not None:
        print(f"top-1: {(classes == images.labels).float().mean():.2%} of {len(images):,} images")


if __name__ == "__main__":
    main(*sys.argv[1:])
