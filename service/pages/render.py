"""Templates to HTML: one environment, everything escaped that is not a template's own, static files by digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from aquant_core.config import QuantizationConfig
from aquant_core.report.formats import FILTERS, NAMES, bits, duration, method
from aquant_core.report.naming import other_layers

STATIC: Mapping[str, tuple[str, str]] = {
    # The report's own style is the page's, too: one look, and its plots are drawn with it.
    "report.css": ("aquant_core.report", "text/css"),
    "page.css": (f"{__package__}.static", "text/css"),
    "page.js": (f"{__package__}.static", "text/javascript"),
    "icon.svg": (f"{__package__}.static", "image/svg+xml"),
    "swagger-ui.css": ("fastapi_swagger.resources", "text/css"),
    "swagger-ui-bundle.js": ("fastapi_swagger.resources", "text/javascript"),
    "docs.css": (f"{__package__}.static", "text/css"),
    "docs.js": (f"{__package__}.static", "text/javascript"),
}
"""Where each static file lies, and its type."""


@cache
def static_file(name: str) -> bytes:
    """The bytes of one of ``STATIC``."""
    package, _ = STATIC[name]
    if package.endswith(".static"):
        return files(package.removesuffix(".static")).joinpath("static", name).read_bytes()
    return files(package).joinpath(name).read_bytes()


@cache
def static_url(name: str) -> str:
    """Where a page finds a static file: another address once it is another file."""
    return f"/page/static/{hashlib.sha256(static_file(name)).hexdigest()[:16]}/{name}"


def render(template: str, **values: Any) -> str:
    """A page."""
    return _environment().get_template(template).render(**values)


def title_of(config: QuantizationConfig) -> str:
    """What a job does, in a few words."""
    widths = "bits by target" if config.target else f"W{bits(config.weight_bits)}A{bits(config.activation_bits)}"
    seed = f"seed {config.seed}" if config.seed else ""
    return ", ".join(
        filter(None, [method(config.method), widths, other_layers(config), seed, "dry run" if config.dry_run else ""])
    )


def about(seconds: float) -> str:
    """A time that is only estimated."""
    return f"{seconds:.0f}\N{NO-BREAK SPACE}s" if seconds < 120 else duration(seconds)


def when(at: datetime) -> str:
    """A time, to the minute."""
    return f"{at:%Y-%m-%d %H:%M} UTC"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader(__package__),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= FILTERS | {
        "about": about,
        "title_of": title_of,
        "when": when,
    }
    environment.globals |= {"static": static_url, "version": version("aquant-service"), "methods": NAMES}
    return environment
