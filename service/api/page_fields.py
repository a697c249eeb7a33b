"""The page's form as a submission: its fields make up the config, a file is a file as anywhere."""

from __future__ import annotations

import json
from typing import Any

from aquant_core.config import QuantizationConfig
from aquant_core.config_reading import repeated_key, why_not_json
from service.api.forms import Part
from service.api.submitting import text_of
from service.jobs.errors import ConfigError, FormError
from service.jobs.schemas import UploadName, WebhookRequest
from service.jobs.states import Device
from service.jobs.submission import CONFIG_REMEDY, TWICE_REMEDY, read_config, read_device
from service.pages.form import SETTINGS
from service.settings import Settings


class PageFields:
    """What the page's form says; a field that was left empty says nothing."""

    reuse = False
    webhook: WebhookRequest | None = None
    is_form = True

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._said: dict[str, str] = {}
        self._more = b""
        self.device: Device | None = None
        self.filenames: dict[UploadName, str] = {}

    async def take(self, part: Part) -> None:
        """Read a field."""
        if part.name in SETTINGS:
            self._said[part.name] = await text_of(part)
        elif part.name == "device":
            chosen = await text_of(part)
            self.device = read_device(chosen.encode()) if chosen else None
        elif part.name == "config":
            self._more = await part.content(self._settings.max_config_bytes)
        else:
            raise FormError(f"The form has a part {part.name!r}, which means nothing here.", "Load the page again.")

    def config(self) -> QuantizationConfig:
        """The fields, and before them what the JSON says."""
        config: dict[str, Any] = {name: text for name, text in self._said.items() if text}
        if self._more.strip():
            try:
                more = json.loads(self._more)
                twice = repeated_key(self._more)
            except (ValueError, RecursionError) as error:
                why = why_not_json(error)
                raise ConfigError(f"The further settings are not JSON: {why}.", CONFIG_REMEDY) from error
            if not isinstance(more, dict):
                raise ConfigError(
                    "The further settings are not a JSON object.", 'Write them as {"seed": 1, "compare": ["qdrop"]}.'
                )
            if twice is not None:
                raise ConfigError(f'The further settings name "{twice}" twice.', TWICE_REMEDY)
            config |= more
        return read_config(json.dumps(config).encode())
