"""What a run is told on a command line: options of ``aquant quantize``, and of ``aquant submit`` for a service.

Imports nothing heavy: both are known to every call of ``aquant``.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

import typer

from aquant_core.config import Method, PresetName
from aquant_core.config_reading import read_configuration


def _one_of(*words: str) -> Callable[[str], list[str]]:
    """What a shell completes an option's value to."""
    return lambda incomplete: [word for word in words if word.startswith(incomplete)]


Model = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="ONNX, or a state dict.")]
Calibration = Annotated[
    Path, typer.Option(exists=True, dir_okay=False, help="Images: .npz, .npy, .safetensors; or zip, tar.")
]
Evaluation = Annotated[
    Path | None, typer.Option(exists=True, dir_okay=False, help="Labelled images to measure accuracy on.")
]
LayerBits = Annotated[int | None, typer.Option(help="2 to 8, or 32 for float; with --target the least (2).")]
TargetDrop = Annotated[
    float | None,
    typer.Option(
        "--target",
        metavar="POINTS",
        min=0,
        max=100,
        help="Instead of bits: points of accuracy that may be lost; searches the smallest network that holds.",
    ),
]
MethodName = Annotated[
    str | None,
    typer.Option(
        help=f"aquant where unsaid; or {', '.join(name for name in get_args(Method) if name != 'aquant')}.",
        autocompletion=_one_of(*get_args(Method)),
    ),
]
PresetOption = Annotated[
    str | None,
    typer.Option(help="fast where unsaid; or smoke, paper.", autocompletion=_one_of(*get_args(PresetName))),
]
Architecture = Annotated[str | None, typer.Option(help="Network that a state dict belongs to.")]
Seed = Annotated[int | None, typer.Option(help="Seed of everything random.")]
ConfigSource = Annotated[str | None, typer.Option(help="JSON, or the path of a JSON file; other options go over it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what it would do and take, and leave it at that.")]


def configured(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command the options of a configuration in place of its parameter ``configuration``, which gets the keys.

    The options stand where the parameter does, so what follows it needs a default.
    """
    options = inspect.signature(_configuration, eval_str=True).parameters
    own = inspect.signature(command, eval_str=True)

    @functools.wraps(command)
    def with_options(**given: Any) -> None:
        asked = {name: given.pop(name) for name in options}
        command(configuration=_configuration(**asked), **given)

    parameters = [
        parameter
        for name, mine in own.parameters.items()
        for parameter in (options.values() if name == "configuration" else [mine])
    ]
    # What Typer reads of a command.
    vars(with_options)["__signature__"] = own.replace(parameters=parameters)
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _configuration(
    weight_bits: LayerBits = None,
    activation_bits: LayerBits = None,
    target: TargetDrop = None,
    method: MethodName = None,
    preset: PresetOption = None,
    architecture: Architecture = None,
    seed: Seed = None,
    config: ConfigSource = None,
    dry_run: DryRun = False,
) -> dict[str, Any]:
    """The configuration that a command line asks for.

    Raises:
        typer.BadParameter: ``config`` is no JSON object, or names a key twice.
    """
    options = {
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "target": None if target is None else {"max_accuracy_drop": target},
        "method": method,
        "preset": preset,
        "architecture": architecture,
        "seed": seed,
        "dry_run": dry_run or None,
    }
    try:
        return read_configuration(config, options)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--config") from error
