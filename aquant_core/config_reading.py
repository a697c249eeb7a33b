"""Reads a configuration as people write it, and says what is wrong with one: field, value, what is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from aquant_core.config import (
    BorderConfig,
    LayerOverride,
    Preprocess,
    ProtocolSwitches,
    QuantizationConfig,
    Target,
)

_BELOW: dict[str, type[BaseModel]] = {
    "border": BorderConfig,
    "layers": LayerOverride,
    "preprocess": Preprocess,
    "protocol_switches": ProtocolSwitches,
    "target": Target,
}
"""The keys of the configuration that hold keys of their own."""
_LONGEST_VALUE = 60
_LONGEST_KEY = 100
_MOST_FAULTS = 20


def read_configuration(given: str | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """A command line's keys and values.

    Args:
        given: JSON, or the path of a file of it.
        options: go over it where they are not None.

    Raises:
        ValueError: it is no JSON object, it names a key twice, or the file cannot be read.
    """
    configuration: Any = {}
    if given is not None:
        try:
            text = given if given.lstrip().startswith("{") else Path(given).read_text()
            configuration = json.loads(text)
            twice = repeated_key(text)
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"{given} is neither JSON nor a file of it: {why_not_json(error)}") from error
        if not isinstance(configuration, dict):
            raise ValueError(f"{given} holds a {type(configuration).__name__}, not an object")
        if twice is not None:
            raise ValueError(f'{given} names "{twice}" twice: say it once')
    return {**configuration, **{name: value for name, value in options.items() if value is not None}}


def why_not_json(error: Exception) -> str:
    """What reading JSON raised, in words for people."""
    return "it is nested too deeply" if isinstance(error, RecursionError) else str(error)


def repeated_key(text: str | bytes) -> str | None:
    """The place of the first key that an object of a JSON document has twice, its parts joined by dots.

    Readers of JSON take the last of such values and say nothing. The document must have been found to be JSON.
    """
    document = json.loads(text, object_pairs_hook=_Pairs, parse_int=str, parse_float=str)
    return next(_repeated(document), None)


def faults_of(
    error: ValidationError, whole: str = "config", *, values: bool = True, named: Callable[[str], str] = str
) -> str:
    """The faults of a document, the first 20: place, what is wrong, what is allowed, and the value that it has.

    Args:
        error: what pydantic found.
        whole: what the document itself is called.
        values: whether values are told; what may hold a secret keeps them to itself.
        named: what a key is called where people write it.
    """
    listed: set[type[BaseModel]] = set()
    told = [
        f"{'.'.join(named(_cut(str(key), _LONGEST_KEY)) for key in fault['loc']) or whole}: "
        f"{_told(fault, values, listed)}"
        for fault in error.errors(include_url=False, include_context=False)[:_MOST_FAULTS]
    ]
    more = error.error_count() - len(told)
    return "; ".join([*told, f"and {more} more"] if more else told)


class _Pairs(list[tuple[str, Any]]):
    """An object as it is written."""


def _repeated(value: Any, *place: str) -> Any:
    seen = set()
    if isinstance(value, _Pairs):
        for name, item in value:
            if name in seen:
                yield ".".join([*place, name])
            seen.add(name)
            yield from _repeated(item, *place, name)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _repeated(item, *place, str(index))


def _told(fault: Any, values: bool, listed: set[type[BaseModel]]) -> str:
    kind, message = fault["type"], fault["msg"]
    if kind == "extra_forbidden":
        return f"unknown key{_instead_of(fault['loc'], listed) if values else ''}"
    if kind == "missing":
        return "missing"
    if kind == "value_error":  # our own words, which name the value
        return str(message).removeprefix("Value error, ")
    if not values or kind == "json_invalid":
        return str(message)
    return f"{message}, not {_shown(fault['input'])}"


def _instead_of(place: tuple[str | int, ...], listed: set[type[BaseModel]]) -> str:
    """What an unknown key may have been meant to be, or what keys there are, unless they have been listed before."""
    *above, name = place[1:] if len(place) > 1 and place[0] == "config" else place
    model = _BELOW[str(above[0])] if above else QuantizationConfig
    known = list(model.model_fields)
    close = difflib.get_close_matches(str(name), known, n=1) if len(str(name)) <= _LONGEST_KEY else []
    if close:
        return f" (did you mean {close[0]}?)"
    if model in listed:
        return ""
    listed.add(model)
    return f" (there are {', '.join(known)})"


def _shown(value: Any) -> str:
    return _cut(json.dumps(value, default=str), _LONGEST_VALUE)


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else f"{text[:longest]}..."
