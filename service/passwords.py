"""Makes up the passwords by which the services of docker-compose.yml know each other: `python -m service.passwords`.

Each reader has a folder of its own, to be mounted into its container alone. All passwords are derived from one seed,
which is drawn once and lies in a folder that no other container has: whatever is cut off or lost is made again the
same by the next run.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import sys
from collections.abc import Mapping
from pathlib import Path

DATABASE_HOST, BROKER_HOST, BUCKET = "postgres", "redis", "aquant"
"""As docker-compose.yml names them."""
USER = "aquant"
"""Of the database and of its server, and of the S3 server."""

SEED_BYTES = 32
_READABLE = 0o440
"""By the owner's group, which the readers are in; the folders are closed to all others."""


def make_passwords(root: Path) -> list[Path]:
    """Write every reader's files into its folder under ``root``; returns them.

    Raises:
        OSError: a folder is not there, or cannot be written to.
    """
    seed = _seed(root / "seed" / "seed")
    files = [(root / reader / name, text) for reader, texts in _files(seed).items() for name, text in texts.items()]
    for path, text in files:
        _write(path, text.encode())
    return [path for path, _ in files]


def _files(seed: bytes) -> Mapping[str, Mapping[str, str]]:
    """What each reader is told, in its own words."""
    database, broker, store = (
        hmac.digest(seed, purpose.encode(), hashlib.sha256).hex() for purpose in ("database", "broker", "store")
    )
    actions = [f"{action}:{BUCKET}" for action in ("Admin", "Read", "Write", "List", "Tagging")]
    identity = {"name": USER, "credentials": [{"accessKey": USER, "secretKey": store}], "actions": actions}
    return {
        "postgres": {"password": database},
        "redis": {"redis.conf": f"requirepass {broker}\n", "password": broker},
        "s3": {"s3.json": json.dumps({"identities": [identity]})},
        "aquant": {  # settings, by their variables' names, and Amazon's file of keys
            "aquant_database_url": f"postgresql://{USER}:{database}@{DATABASE_HOST}/{USER}",
            "aquant_broker_url": f"redis://:{broker}@{BROKER_HOST}:6379/0",
            "credentials": f"[default]\naws_access_key_id = {USER}\naws_secret_access_key = {store}\n",
        },
    }


def _seed(path: Path) -> bytes:
    if not path.exists():
        _write(path, secrets.token_bytes(SEED_BYTES))
    seed = path.read_bytes()
    if len(seed) != SEED_BYTES:
        raise OSError(f"{path} holds {len(seed)} bytes instead of {SEED_BYTES}. Restore it from a backup.")
    return seed


def _write(path: Path, content: bytes) -> None:
    """Whole or not at all, and on the disk when this returns: a server keeps the password it first saw."""
    partial = path.with_name(f".{path.name}")
    partial.unlink(missing_ok=True)  # of a run that was cut off; it cannot be written to
    partial.touch(0o600)
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.chmod(_READABLE)
    partial.replace(path)


def main() -> int:
    """Fill the folders under the one that is named, and tell which files are there."""
    if len(sys.argv) != 2:
        print("usage: python -m service.passwords FOLDER", file=sys.stderr)
        return 2
    try:
        for path in make_passwords(Path(sys.argv[1])):
            print(path)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
