"""What a report or a run is about, in few words."""

from __future__ import annotations

from aquant_core.config import FLOAT_BITS, QuantizationConfig
from aquant_core.report.formats import bits, method
from aquant_core.report.plan import Plan
from aquant_core.report.schema import Report

_LETTERS = 40
"""Of a layer's name, where there is little room."""


def heading(document: Report | Plan) -> str:
    """The network, as far as it has a name, the method, and the bits."""
    config, network = document.config, network_of(document)
    searched = config.target is not None
    widths = f"{_wide(config.weight_bits)} weights, {_wide(config.activation_bits)} activations"
    done = f"{method(config.method)}, {'bits searched by layer' if searched else widths}"
    return done if network is None else f"{network}: {done}"


def network_of(document: Report | Plan) -> str | None:
    """What its file was called, or the architecture; None where it came as a module, or in an older report."""
    of_file = None if document.sources is None else document.sources.model
    return of_file or document.config.architecture


def other_layers(config: QuantizationConfig) -> str:
    """Which layer has other bits than the network, or how many have; nothing where none has."""
    usual = config.weight_bits, config.activation_bits
    given = {
        name: (layer.weight_bits or usual[0], layer.activation_bits or usual[1])
        for name, layer in config.layers.items()
    }
    others = [(name, widths) for name, widths in given.items() if widths != usual]
    if len(others) > 1:
        return f"{len(others)} layers at other bits"
    called = [(name if len(name) <= _LETTERS else f"{name[:_LETTERS]}…", widths) for name, widths in others]
    return "".join(f"{name} at {bits(of_weights)}/{bits(of_input)}" for name, (of_weights, of_input) in called)


def _wide(width: int) -> str:
    return bits(width) if width == FLOAT_BITS else f"{width}-bit"
