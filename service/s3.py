"""Opens an S3 bucket as the AWS_* variables say, keys from Amazon's file of keys included, and makes one."""

from __future__ import annotations

import configparser
import os
import re
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import obstore
from obstore.store import S3Store

if TYPE_CHECKING:
    from obstore.store import S3Config

ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
"""Variables that name an S3 server other than Amazon's."""

_FIRST_REGION = "us-east-1"
"""S3's own default, and the one region that a bucket is made in without naming it."""
_NAMESPACE = "http://s3.amazonaws.com/doc/2006-03-01/"


class UnsupportedStoreError(ValueError):
    """The artifact store's URL, that of its server, or its file of keys is of a kind this version does not serve."""


class BucketNotMadeError(Exception):
    """The server did not make a bucket; the message is the reason alone."""


def open_bucket(url: str) -> S3Store:
    """The store behind ``s3://bucket/prefix``; nothing is asked of the server here.

    Raises:
        UnsupportedStoreError: a variable names no server, or no file of keys.
    """
    for name in ENDPOINTS:
        endpoint = urlsplit(os.environ.get(name, "https://unset"))
        if endpoint.scheme not in ("http", "https") or not endpoint.netloc:
            raise UnsupportedStoreError(
                f"{name} is {os.environ[name]!r}. Set it to the S3 server's address, for example http://s3:9000."
            )
    return S3Store.from_url(
        url,
        config=_keys_from_file(),
        client_options={
            "allow_http": True,
            "connect_timeout": timedelta(seconds=5),
            "timeout": timedelta(minutes=1),
        },
        # Short, because a request of the API waits meanwhile; a worker waits longer by itself.
        retry_config={"max_retries": 5, "retry_timeout": timedelta(seconds=20)},
    )


def create_bucket(url: str) -> None:
    """Make the bucket of ``s3://bucket/prefix``; that this user has it already is no error.

    The store's library has no call for it, but signs the address of S3's CreateBucket.

    Raises:
        BucketNotMadeError: the server refused, or did not answer.
    """
    bucket = open_bucket(f"s3://{urlsplit(url).netloc}")
    region = bucket.config.get("region") or _FIRST_REGION
    body = f"<LocationConstraint>{region}</LocationConstraint>"
    body = f'<CreateBucketConfiguration xmlns="{_NAMESPACE}">{body}</CreateBucketConfiguration>'
    address = obstore.sign(bucket, "PUT", "", timedelta(minutes=1))
    try:
        answer = httpx.put(address, content="" if region == _FIRST_REGION else body, timeout=60.0)
    except httpx.HTTPError as error:
        raise BucketNotMadeError(str(error)) from error
    if not answer.is_success and (code := error_code(answer.text)) != "BucketAlreadyOwnedByYou":
        raise BucketNotMadeError(code or f"the server answered {answer.status_code}")


def error_code(text: str) -> str:
    """The code in an S3 server's answer; empty if there is none."""
    code = re.search(r"<Code>(\w+)</Code>", text)
    return code[1] if code else ""


def _keys_from_file() -> S3Config:
    """The keys in Amazon's shared credentials file, which the store's library does not read, if a variable names one
    and none holds the keys themselves."""
    path = os.environ.get("AWS_SHARED_CREDENTIALS_FILE")
    if not path or os.environ.get("AWS_ACCESS_KEY_ID"):
        return {}
    profile = os.environ.get("AWS_PROFILE", "default")
    credentials = configparser.RawConfigParser()
    try:
        credentials.read_string(Path(path).read_text(encoding="utf-8"))
        keys = credentials[profile]
        return {"access_key_id": keys["aws_access_key_id"], "secret_access_key": keys["aws_secret_access_key"]}
    except (OSError, ValueError, KeyError, configparser.Error) as error:
        why = f"{path}: {error.strerror}" if isinstance(error, OSError) else f"{path} lacks them"  # and quotes no key
        raise UnsupportedStoreError(
            f"AWS_SHARED_CREDENTIALS_FILE names no file of keys: {why}. It needs a section [{profile}] (AWS_PROFILE) "
            "with aws_access_key_id and aws_secret_access_key."
        ) from None
