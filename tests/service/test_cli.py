"""The command line without a service: what it says when something is missing."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from service import cli, local
from service.client import Client


@pytest.fixture(autouse=True)
def no_other_commands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "entry_points", lambda **_: [])
    commands = list(cli.app.registered_commands)
    monkeypatch.setattr(cli.app, "registered_commands", commands)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["aquant", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def test_absent_service_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "show", 24 * "0", "--url", "http://127.0.0.1:1") == 1
    error = capsys.readouterr().err
    assert "http://127.0.0.1:1" in error
    assert "aquant up" in error
    assert run(monkeypatch, "show", "x", "--url", "127.0.0.1:1") == 2
    assert "'127.0.0.1:1' is no address" in capsys.readouterr().err
    assert run(monkeypatch, "watch", "", "--url", "http://127.0.0.1:1") == 2
    assert "it is empty" in capsys.readouterr().err
    assert run(monkeypatch, "delete", "..", "--url", "http://127.0.0.1:1") == 2
    assert "'..' is no id of a job" in capsys.readouterr().err


def test_bad_bits_are_refused_before_anything_is_sent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "m").write_bytes(b"x")
    arguments = ["submit", str(tmp_path / "m"), "--calibration", str(tmp_path / "m")]
    assert run(monkeypatch, *arguments, "--weight-bits", "9", "--activation-bits", "2") == 2
    assert "weight_bits: must be 2 to 8, or 32 for float; got 9. Change what" in capsys.readouterr().err
    assert run(monkeypatch, *arguments, "--weight-bits", "2") == 2
    assert "activation_bits: missing. Give --weight-bits and --activation-bits, or --target." in capsys.readouterr().err


def test_a_variable_that_is_not_valid_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("AQUANT_PORT", "x")
    monkeypatch.setenv("AQUANT_WEBHOOK_ALLOW", "near")
    for command in (["keys", "list"], ["migrate"], ["up"]):
        assert run(monkeypatch, *command) == 2
        error = capsys.readouterr().err
        assert error.startswith("The settings are not valid: AQUANT_PORT: Input should be a valid integer, ")
        assert "not \"x\"; AQUANT_WEBHOOK_ALLOW: 'near' does not appear to be an IPv4 or IPv6 network. " in error
        assert error.endswith(" docs/operations.md tells of them.\n")


def test_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else object())
    with pytest.raises(local.MissingExtraError, match=r"'worker' \(torch not found\)"):
        local.require_extras()
    assert run(monkeypatch, "up") == 1
    assert "aquant-service[worker]" in capsys.readouterr().err


def test_commands_of_other_packages_join_in(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    there = EntryPoint("where", "os:getcwd", cli.COMMAND_GROUP)
    absent = EntryPoint("quantize", "no_such_package.cli:quantize", cli.COMMAND_GROUP)
    monkeypatch.setattr(cli, "entry_points", lambda **_: [there, absent])
    assert run(monkeypatch, "where") == 0
    assert run(monkeypatch, "quantize", "model.onnx", "--bits", "2") == 1
    assert "no_such_package" in capsys.readouterr().err


def test_a_config_that_is_no_object_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "m").write_bytes(b"x")
    (tmp_path / "c.json").write_text("[1]")
    arguments = ["submit", str(tmp_path / "m"), "--calibration", str(tmp_path / "m")]
    assert run(monkeypatch, *arguments, "--config", str(tmp_path / "c.json")) == 2
    assert "holds a list, not an object" in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_a_file_that_cannot_be_written_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def download(_client: Client, _job_id: str, path: Path, *_: object) -> str:
        path.write_bytes(b"")  # where there is no folder
        return ""

    monkeypatch.setattr(Client, "download", download)
    assert run(monkeypatch, "download", "x", "-o", str(tmp_path / "none" / "x")) == 2
    error = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert "cannot be written: No such file or directory" in error


def test_migrate_makes_schema_and_store_ready(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("AQUANT_DATABASE_URL", "AQUANT_ARTIFACTS_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AQUANT_DATA_DIR", str(tmp_path / "data"))
    for _ in range(2):
        assert run(monkeypatch, "migrate") == 0
    assert (tmp_path / "data/artifacts").is_dir()
    with closing(sqlite3.connect(tmp_path / "data/aquant.sqlite3")) as database:
        assert database.execute("SELECT count(*) FROM jobs").fetchone() == (0,)
    (tmp_path / "data/artifacts").rmdir()
    (tmp_path / "data/artifacts").touch()
    assert run(monkeypatch, "migrate") == 1
    monkeypatch.setenv("AQUANT_DATABASE_URL", "mysql://nowhere/x")
    assert run(monkeypatch, "migrate") == 1
    errors = capsys.readouterr().err
    assert "Check that AQUANT_ARTIFACTS_URL (or AQUANT_DATA_DIR) names a folder" in errors
    assert "'mysql' is not a kind of database served here" in errors
