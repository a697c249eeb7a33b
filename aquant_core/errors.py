"""Named errors of the core: what was wrong, with which value, and what to do about it."""

from __future__ import annotations

import errno
import os

_MEMORY_WORDS = (os.strerror(errno.ENOMEM), "DefaultCPUAllocator", "std::bad_alloc")


class AQuantError(Exception):
    """Base of every error this package raises on purpose.

    Attributes:
        code: stable identifier, the same in the library, a job's failure and the HTTP problem document.
        detail: what was wrong, naming the value.
        remedy: what the caller can do about it.
    """

    code = "aquant_error"

    def __init__(self, detail: str, remedy: str) -> None:
        super().__init__(f"{detail} {remedy}")
        self.detail = detail
        self.remedy = remedy

    def __reduce__(self) -> tuple[type[AQuantError], tuple[str, str]]:
        """As it is made, so that it reaches another process."""
        return type(self), (self.detail, self.remedy)


class ModelFormatError(AQuantError):
    """The file is not a model this package reads (or is damaged)."""

    code = "model_invalid"


class UnsupportedOperatorError(AQuantError):
    """The network holds an operator that cannot be captured."""

    code = "operator_unsupported"


class UnknownArchitectureError(AQuantError):
    """The architecture name is not in the catalogue."""

    code = "architecture_unknown"


class WeightsMismatchError(AQuantError):
    """A state dict lacks weights, has extra ones, or has them in another shape."""

    code = "weights_mismatch"


class NonFiniteError(AQuantError):
    """NaN or infinity in weights, images or outputs."""

    code = "values_not_finite"


class CaptureMismatchError(AQuantError):
    """The captured graph does not reproduce the float model's outputs."""

    code = "capture_mismatch"


class ImageSetError(AQuantError):
    """Images are unreadable, of a wrong shape or type, or too few."""

    code = "images_invalid"


class PreprocessMissingError(AQuantError):
    """An archive of images came without a word on how they are prepared."""

    code = "preprocess_missing"


class UnknownLayerError(AQuantError):
    """The configuration names a layer that the network does not have."""

    code = "layer_unknown"


class DryRunError(AQuantError):
    """A run was asked for with a configuration that asks for a forecast alone."""

    code = "dry_run_requested"


class CheckpointError(AQuantError):
    """A quantized checkpoint is damaged, incomplete or of an unknown format version."""

    code = "checkpoint_invalid"


class ResumeError(AQuantError):
    """The folder to resume from holds the blocks of another run."""

    code = "resume_mismatch"


class OnnxExportError(AQuantError):
    """The quantized network cannot be written with standard ONNX operators."""

    code = "onnx_export_unsupported"


class DeviceError(AQuantError):
    """The device asked for is not there."""

    code = "device_unavailable"


def memory_is_full(error: BaseException) -> bool:
    """Whether it says that main memory does not do: numpy has a class for that, torch has words alone."""
    return isinstance(error, MemoryError) or any(words in str(error) for words in _MEMORY_WORDS)
