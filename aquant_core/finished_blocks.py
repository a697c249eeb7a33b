"""Finished blocks kept in a folder, so that a run that was cut off continues with the next one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from aquant_core.config import BorderConfig, Method, QuantizationConfig
from aquant_core.errors import ResumeError
from aquant_core.graph import CapturedModel, Node
from aquant_core.layers import ActivationQuantizer, QuantizedLayer
from aquant_core.model import QuantizedModel, bits_of_layers, bits_of_marks
from aquant_core.partition import Block

_FORMAT = "aquant-block/1"
_KEY = "aquant"  # as in the checkpoint: one header key, for a fixed order


class FinishedBlocks:
    """The blocks of one run, a file each.

    Args:
        folder: made if it is not there.
        run: JSON values that decide the outcome; blocks of a run with others are refused.
        method: its name is part of the files', so that several methods share a folder.
        widths: from ``words_of_widths``, where networks of several widths share a folder, too.

    Raises:
        ResumeError: ``folder`` is a file.
    """

    def __init__(self, folder: Path, run: dict[str, Any], method: Method, widths: Sequence[str] | None = None) -> None:
        self._folder, self._method, self._widths = folder, method, widths
        self._run = hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
        if folder.exists() and not folder.is_dir():
            raise ResumeError(f"{folder} is a file.", "Give a folder; it is made if it is not there.")
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, index: int, block: Block, model: QuantizedModel, entry: dict[str, Any]) -> None:
        """Writes the block, whole or not at all.

        Args:
            index: its place among the network's blocks.
            block, model: what has been learned is in the model's layers.
            entry: the block's part of the report.
        """
        path = self._path(index)
        partial = path.with_suffix(".partial")
        tensors = _tensors_of(block, model)
        document = {"format": _FORMAT, "run": self._run, "entry": entry, "sha256": _digest(tensors, entry)}
        save_file(tensors, partial, {_KEY: json.dumps(document)})
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)

    def load(self, index: int, block: Block, model: QuantizedModel, border: BorderConfig) -> dict[str, Any] | None:
        """Puts a finished block into the model's layers.

        Returns:
            The block's part of the report; None where the block is not finished, or its file is damaged.

        Raises:
            ResumeError: the folder belongs to another run.
        """
        path = self._path(index)
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                document = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            if (document["format"], document["run"]) != (_FORMAT, self._run):
                raise ResumeError(
                    f"{path} belongs to another run: model, calibration images, config or preset differ.",
                    "Resume with what that run was started with, or give an empty folder.",
                )
            entry: dict[str, Any] = document["entry"]
            if document["sha256"] != _digest(tensors, entry):
                return None
        except (OSError, SafetensorError, ValueError, LookupError, TypeError):
            return None
        _put_tensors(block, model, border, tensors)
        return entry

    def _path(self, index: int) -> Path:
        words = [self._method, f"{index:04d}", *([] if self._widths is None else [self._widths[index]])]
        return self._folder / f"block-{'-'.join(words)}.safetensors"


def words_of_widths(graph: CapturedModel, blocks: Sequence[Block], config: QuantizationConfig) -> list[str]:
    """A word a block for the widths of all that decides how it comes out: its own and those of the blocks before."""
    bits = bits_of_layers(graph, config)
    all_bits: dict[str, Any] = {**bits, **bits_of_marks(graph, bits, config)}
    sha, words = hashlib.sha256(), []
    for block in blocks:
        sha.update(json.dumps([(node.name, all_bits.get(node.name)) for node in block.nodes]).encode())
        words.append(sha.hexdigest()[:16])
    return words


def _digest(tensors: dict[str, Tensor], entry: dict[str, Any]) -> str:
    sha = hashlib.sha256(json.dumps(entry, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.numpy().tobytes())
    return sha.hexdigest()


def _tensors_of(block: Block, model: QuantizedModel) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for node, part in _parts(block, model):
        if isinstance(part, QuantizedLayer) and part.weight is not None:
            tensors[f"{node.name}.codes"] = part.weight.codes.to(torch.uint8)
        if part.activation_scale is not None:
            tensors[f"{node.name}.input_scale"] = part.activation_scale
        if part.border is not None:
            tensors[f"{node.name}.border"] = part.border.coefficients  # rounded to what is stored
            if part.border.alpha is not None:
                tensors[f"{node.name}.alpha"] = part.border.alpha
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


@torch.no_grad()
def _put_tensors(block: Block, model: QuantizedModel, border: BorderConfig, tensors: dict[str, Tensor]) -> None:
    for node, part in _parts(block, model):
        if part.activation_scale is not None:
            part.activation_scale.copy_(tensors[f"{node.name}.input_scale"])
        if not isinstance(part, QuantizedLayer):
            continue
        if part.weight is not None:
            part.weight.codes.copy_(tensors[f"{node.name}.codes"])
        if f"{node.name}.border" in tensors:
            learned = part.add_border(border)
            learned.coefficients.copy_(tensors[f"{node.name}.border"])
            if learned.alpha is not None:
                learned.alpha.copy_(tensors[f"{node.name}.alpha"])


def _parts(block: Block, model: QuantizedModel) -> Iterator[tuple[Node, ActivationQuantizer]]:
    """The block's layers and quantizers by node."""
    parts = model.parts
    return ((node, parts[node.name]) for node in block.nodes if node.name in parts)
