"""Settings come from the environment and nowhere else."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from service.settings import Settings


def test_everything_lives_in_data_dir_by_default(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    assert settings.database == f"sqlite:///{tmp_path}/aquant.sqlite3"
    assert settings.artifacts == f"file://{tmp_path}/artifacts"
    assert settings.work_dir == tmp_path / "work"


@pytest.mark.parametrize("name", ["AQUANT_BROKER_URL", "REDIS_URL"])
def test_broker_is_known_by_two_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AQUANT_BROKER_URL", raising=False)
    monkeypatch.setenv(name, "redis://elsewhere:1/0")
    assert Settings().broker_url == "redis://elsewhere:1/0"


def test_environment_is_read_and_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_LEASE_SECONDS", "7.5")
    assert Settings().lease_seconds == 7.5
    monkeypatch.setenv("AQUANT_LEASE_SECONDS", "-1")
    with pytest.raises(ValidationError, match="greater than 0"):
        Settings()
