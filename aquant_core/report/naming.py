"""What a report is about, in a line."""

from __future__ import annotations

from aquant_core.config import FLOAT_BITS
from aquant_core.report.formats import bits, method
from aquant_core.report.plan import Plan
from aquant_core.report.schema import Report


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


def _wide(width: int) -> str:
    return bits(width) if width == FLOAT_BITS else f"{width}-bit"
