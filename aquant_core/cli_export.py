"""`aquant export`: a checkpoint as ONNX, compared with the checkpoint if images are given."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from aquant_core.onnx_agreement import Agreement


def export(
    checkpoint: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Quantized checkpoint.")],
    output: Annotated[Path, typer.Option("--output", "-o", dir_okay=False, help="ONNX file to write.")] = Path(
        "quantized.onnx"
    ),
    compare: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, help="Images on which to compare it with the checkpoint."),
    ] = None,
) -> None:
    """Write a checkpoint as ONNX with standard operators."""
    from aquant_core.errors import AQuantError

    try:
        found = _export(checkpoint, output, compare)
    except AQuantError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    except OSError as error:
        raise typer.BadParameter(f"{output} cannot be written: {error.strerror}", param_hint="--output") from error
    typer.echo(f"{output}  {output.stat().st_size} bytes")
    if found is not None:
        typer.echo(
            f"{found.images} images in onnxruntime: {sum(found.differing_given_input.values())} of "
            f"{sum(found.codes.values())} codes differ given the same input, a share of {found.share_differing:.2g} in "
            f"the whole run; {found.same_top1} predictions are the same"
        )


def _export(checkpoint: Path, output: Path, images: Path | None) -> Agreement | None:
    import onnx

    import aquant_core
    from aquant_core.model import QuantizedModel
    from aquant_core.onnx_agreement import compare

    model = aquant_core.load(checkpoint)
    assert isinstance(model, QuantizedModel)
    given = None if images is None else aquant_core.read_images(images, "evaluation").images
    aquant_core.write_onnx(model, output)
    return None if given is None else compare(model, onnx.load(output), given)
