"""Settings come from the environment, and from files where it names a folder of them."""

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


def test_what_no_variable_says_is_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AQUANT_DATABASE_URL", "AQUANT_BROKER_URL", "REDIS_URL"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "aquant_database_url").write_text("postgresql://a:b@c/d\n")
    (tmp_path / "aquant_broker_url").write_text("redis://:e@f:1/0")
    monkeypatch.setenv("AQUANT_SECRETS_DIR", str(tmp_path))
    assert Settings().database == "postgresql://a:b@c/d"
    assert Settings().broker_url == "redis://:e@f:1/0"
    monkeypatch.setenv("AQUANT_DATABASE_URL", "sqlite:////elsewhere")
    assert Settings().database == "sqlite:////elsewhere"
    monkeypatch.delenv("AQUANT_SECRETS_DIR")
    assert Settings(secrets_dir=tmp_path).broker_url == "redis://:e@f:1/0"
    assert Settings().broker_url is None


def test_folder_of_files_that_is_not_there_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_SECRETS_DIR", str(tmp_path / "absent"))
    with pytest.raises(ValidationError, match="Path does not point to a directory"):
        Settings()
