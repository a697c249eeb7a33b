"""The passwords of a deployment: one seed, a folder for each reader, the same again at every run."""

from __future__ import annotations

import configparser
import json
import stat
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from service.passwords import make_passwords
from service.settings import Settings

FOLDERS = ("seed", "aquant", "postgres", "redis", "s3")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    return tmp_path


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def test_each_reader_knows_the_same_password_in_its_own_words(root: Path) -> None:
    make_passwords(root)
    settings = Settings(secrets_dir=root / "aquant")
    database, broker = urlsplit(settings.database), urlsplit(str(settings.broker_url))
    assert (database.scheme, database.username, database.hostname) == ("postgresql", "aquant", "postgres")
    assert database.password == (root / "postgres/password").read_text()
    assert broker.password == (root / "redis/password").read_text()
    assert (root / "redis/redis.conf").read_text() == f"requirepass {broker.password}\n"
    keys = configparser.RawConfigParser()
    keys.read(root / "aquant/credentials")
    (identity,) = json.loads((root / "s3/s3.json").read_text())["identities"]
    assert identity["credentials"] == [
        {"accessKey": keys["default"]["aws_access_key_id"], "secretKey": keys["default"]["aws_secret_access_key"]}
    ]
    assert len({database.password, broker.password, keys["default"]["aws_secret_access_key"]}) == 3


def test_another_run_changes_nothing_and_makes_good_what_was_lost(root: Path) -> None:
    make_passwords(root)
    before = contents(root)
    make_passwords(root)
    assert contents(root) == before
    (root / "redis/redis.conf").unlink()
    (root / "aquant/.credentials").write_text("half a f")  # a run was cut off
    make_passwords(root)
    assert contents(root) == before


def test_another_deployment_has_other_passwords(root: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    other = tmp_path_factory.mktemp("other")
    for name in FOLDERS:
        (other / name).mkdir()
    make_passwords(root)
    make_passwords(other)
    assert (root / "postgres/password").read_text() != (other / "postgres/password").read_text()


def test_files_are_for_the_group_to_read_and_for_nobody_to_write(root: Path) -> None:
    files = [*make_passwords(root), root / "seed/seed"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o440}


def test_a_seed_that_is_cut_short_is_refused(root: Path) -> None:
    (root / "seed/seed").write_bytes(b"short")
    with pytest.raises(OSError, match=r"seed/seed holds 5 bytes instead of 32\. Restore it"):
        make_passwords(root)
    assert set(contents(root)) == {"seed/seed"}


def test_the_program_says_what_it_wrote_or_why_not(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "service.passwords", *arguments]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    assert run().returncode == 2
    missing = run(str(tmp_path))
    assert missing.returncode == 1
    assert "No such file or directory" in missing.stderr
    assert "Traceback" not in missing.stderr
    for name in FOLDERS:
        (tmp_path / name).mkdir()
    done = run(str(tmp_path))
    assert done.returncode == 0
    assert str(tmp_path / "aquant/credentials") in done.stdout.splitlines()
    password = (tmp_path / "postgres/password").read_text()
    assert password not in done.stdout
