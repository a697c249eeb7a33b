"""`aquant keys` and `aquant owners` on the database of the settings, and `aquant up` where it may not listen."""

from __future__ import annotations

import json
import re
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import servers
from sqlalchemy.orm import Session, sessionmaker
from typer.testing import CliRunner

from service import local
from service.cli import app
from service.jobs.database import migrate
from service.jobs.errors import KeyInvalidError
from service.jobs.keys import KeyRepository
from service.jobs.records import JobRecord, KeyRecord
from service.settings import Settings

Sessions = sessionmaker[Session]

pytestmark = pytest.mark.parametrize("storage", servers.DATABASES, indirect=True)


@pytest.fixture(autouse=True)
def environment(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_DATA_DIR", str(settings.data_dir))
    monkeypatch.setenv("AQUANT_DATABASE_URL", settings.database)
    migrate(settings)


def run(*arguments: str) -> tuple[str, str]:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return result.stdout, result.stderr


def refuse(*arguments: str) -> str:
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code != 0
    return " ".join(result.output.replace("│", " ").split())


def accept(sessions: Sessions, token: str) -> KeyRecord:
    with sessions.begin() as session:
        return KeyRepository(session).accept(token)


def test_a_key_is_printed_once_listed_without_its_secret_and_revoked(sessions: Sessions) -> None:
    out, told = run("keys", "create", "laptop", "--owner", "ada")
    token = out.strip()
    assert re.fullmatch(r"aquant_[0-9a-f]{12}_[\w-]{43}", token)  # alone on standard output, for $(...)
    assert "every request needs a key" in told
    assert accept(sessions, token).owner == "ada"

    _, told = run("keys", "create", "old", "--owner", "bob", "--expires-in", "3", "--metrics")
    assert "every request" not in told
    with sessions.begin() as session:
        key = session.get_one(KeyRecord, re.findall(r"Key (\w{12})", told)[0])
        assert key.scope == "metrics"
        assert key.expires_at is not None
        assert key.expires_at - key.created_at == pytest.approx(timedelta(days=3), abs=timedelta(minutes=1))
        key.expires_at = key.created_at

    first, second = run("keys", "list")[0].splitlines()
    assert re.fullmatch(r"\w{12}  ada +laptop +jobs +good +last used \d{4}-\d\d-\d\d \d\d:\d\d", first)
    assert re.fullmatch(r"\w{12}  bob +old +metrics +expired \d{4}-\d\d-\d\d +never used", second)
    assert token[20:] not in first

    assert re.fullmatch(r"revoked \w{12} \(laptop\) of ada\n", run("keys", "revoke", "laptop")[0])
    with pytest.raises(KeyInvalidError, match="revoked"):
        accept(sessions, token)
    assert "revoked 20" in run("keys", "list")[0].splitlines()[0]
    for document, line in zip(
        json.loads(run("keys", "list", "--json")[0]), run("keys", "list")[0].splitlines(), strict=True
    ):
        assert line.split()[:4] == [document[name] for name in ("id", "owner", "name", "scope")]
        assert (document["revoked_at"] is not None) == ("revoked" in line)
    assert "No key of the name or id 'laptop'" in refuse("keys", "revoke", "laptop")


@pytest.mark.parametrize("name", ["", "-x", "a b", "a/b", "x" * 65, "a\nb", "ä"])
def test_names_that_would_not_be_told_apart_are_refused(name: str, sessions: Sessions) -> None:
    refuse("keys", "create", "key", "--owner", name)
    refuse("keys", "create", "--owner", "ada", "--", name)
    with sessions() as session:
        assert not KeyRepository(session).any()


def test_jobs_from_before_can_be_adopted(sessions: Sessions, add_job: Any) -> None:
    jobs = [add_job(), add_job()]
    _, told = run("keys", "create", "laptop", "--owner", "ada", "--adopt")
    assert "2 jobs and 0 uploads" in told
    with sessions() as session:
        assert {session.get_one(JobRecord, job_id).owner for job_id in jobs} == {"ada"}


def test_owners_are_listed_with_what_they_use_and_may_use(add_job: Any) -> None:
    run("keys", "create", "laptop", "--owner", "ada")
    add_job()
    run("owners", "limit", "ada", "--jobs-queued", "7", "--stored-bytes", "0")
    run("owners", "limit", "ada", "--jobs-running", "2")
    found = json.loads(run("owners", "list")[0])
    assert found[""]["used"] == {"jobs_queued": 1, "jobs_running": 0, "stored_bytes": 0}
    assert found["ada"]["used"]["jobs_queued"] == 0
    assert found["ada"]["limits"] == {
        "jobs_queued": 7,
        "jobs_running": 2,
        "stored_bytes": 0,
        "upload_bytes": Settings().max_upload_bytes,
    }
    run("owners", "limit", "ada", "--jobs-running", "1", "--reset")
    found = json.loads(run("owners", "list")[0])
    assert found["ada"]["limits"] == found[""]["limits"] | {"jobs_running": 1}
    assert "no owner 'bob'" in refuse("owners", "limit", "bob", "--jobs-queued", "7")


def test_the_folder_can_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AQUANT_DATABASE_URL")
    run("migrate")
    run("migrate", "--data-dir", str(tmp_path / "other"))
    run("keys", "create", "laptop", "--owner", "ada", "--data-dir", str(tmp_path / "other"))
    assert run("keys", "list")[0] == ""
    assert "laptop" in run("keys", "list", "--data-dir", str(tmp_path / "other"))[0]


def test_no_key_is_made_in_a_database_that_no_service_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AQUANT_DATABASE_URL")
    folder = tmp_path / "wrong"
    for command in (["keys", "create", "laptop", "--owner", "ada"], ["keys", "list"], ["owners", "list"]):
        told = refuse(*command, "--data-dir", str(folder))
        assert f"no database at sqlite:///{folder}/aquant.sqlite3" in told
        assert "--data-dir" in told
        assert not folder.exists()


def test_a_database_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AQUANT_DATABASE_URL", "mysql://somewhere/else")
    for arguments in (("keys", "list"), ("owners", "list"), ("up", "--host", "0.0.0.0", "--port", "0")):
        assert "'mysql' is not a kind of database served here" in refuse(*arguments)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "a-name"])
def test_up_does_not_listen_beyond_this_machine_without_keys(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedError(Exception):
        pass

    def start(*_: object) -> None:
        raise StartedError

    monkeypatch.setattr(local, "start_component", start)
    monkeypatch.setattr(local, "free_port", lambda _: 1)
    assert "aquant keys create" in refuse("up", "--host", host, "--port", "1")

    def starts(settings: Settings) -> None:
        with pytest.raises(StartedError), local.local_stack(settings):
            pass

    starts(Settings(port=1))
    starts(Settings(port=1, host="localhost"))
    starts(Settings(port=1, host=host, open=True))
    with pytest.raises(local.OpenToStrangersError), local.local_stack(Settings(port=1, host=host)):
        pass
    run("keys", "create", "laptop", "--owner", "ada")
    starts(Settings(port=1, host=host))


def test_the_command_for_keys_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare = "aquant keys create NAME --owner OWNER"
    assert local.keys_command(Settings(data_dir=tmp_path / "a b")) == bare  # the variable names the database
    monkeypatch.delenv("AQUANT_DATABASE_URL")
    assert local.keys_command(Settings(data_dir=tmp_path / "a b")) == f"{bare} --data-dir '{tmp_path}/a b'"
    monkeypatch.delenv("AQUANT_DATA_DIR")
    assert local.keys_command(Settings()) == bare
    told = refuse("up", "--host", "0.0.0.0", "--port", "0", "--data-dir", str(tmp_path))
    assert f"`{bare} --data-dir {tmp_path}`" in told
