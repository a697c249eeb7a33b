"""Everything about a deployment that can be set from outside, by AQUANT_* environment variables or in files."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, AliasChoices, DirectoryPath, Field
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SecretsSettingsSource, SettingsConfigDict

MIB = 1024 * 1024
GIB = 1024 * MIB


def _networks(text: str) -> list[IPv4Network | IPv6Network]:
    return [ip_network(network.strip()) for network in text.split(",") if network.strip()]


def _check_networks(text: str) -> str:
    _networks(text)
    return text


class Settings(BaseSettings):
    """One deployment's settings; API and worker read the same ones.

    Only ``data_dir`` is needed by a stack on one machine: database, artifacts and work folders live inside it
    unless an address says otherwise. Credentials of an S3 store are read from AWS_* variables, not from here.
    """

    model_config = SettingsConfigDict(
        env_prefix="AQUANT_", frozen=True, populate_by_name=True, extra="ignore", env_ignore_empty=True
    )

    secrets_dir: Annotated[
        DirectoryPath | None,
        Field(description="Folder of files that hold what no variable says, each named as its variable is."),
    ] = None
    data_dir: Annotated[
        Path, Field(description="Folder of working files and logs, and of what has no address of its own below.")
    ] = Path("data")
    database_url: Annotated[
        str | None, Field(description="postgresql:// or sqlite:// URL; without it SQLite in data_dir.")
    ] = None
    artifacts_url: Annotated[
        str | None, Field(description="s3://bucket/prefix or file:// URL; without it a folder in data_dir.")
    ] = None
    broker_url: Annotated[
        str | None,
        Field(
            validation_alias=AliasChoices("AQUANT_BROKER_URL", "REDIS_URL"),
            description="redis:// URL of the broker; `aquant up` starts a broker of its own without it.",
        ),
    ] = None
    queue_name: Annotated[str, Field(description="The broker's queues are called NAME.gpu and NAME.cpu.")] = "aquant"

    host: Annotated[str, Field(description="Address that `aquant up` listens on.")] = "127.0.0.1"
    workers: Annotated[
        int | None, Field(ge=1, le=64, description="Workers that `aquant up` starts; else one for each GPU, or one.")
    ] = None
    port: Annotated[int, Field(ge=0, le=65535, description="Port of the API; 0 takes a free one.")] = 8000

    open: Annotated[
        bool, Field(description="While there are no API keys, serve requests from beyond this machine, too.")
    ] = False
    published_on: Annotated[
        str | None,
        Field(description="Address that a container's port is published on; if loopback, nobody comes from elsewhere."),
    ] = None
    hosts: Annotated[
        str,
        Field(description="Names, separated by commas, that the API may be called by without a key; localhost always."),
    ] = ""
    reads_per_minute: Annotated[
        int, Field(ge=0, description="GET and HEAD requests an owner, or an address without keys, may make; 0: any.")
    ] = 12_000
    writes_per_minute: Annotated[int, Field(ge=0, description="The same of all other requests.")] = 1_200
    max_jobs_queued: Annotated[int, Field(ge=0, description="Jobs that one owner may have waiting.")] = 1_000
    max_jobs_running: Annotated[
        int | None, Field(ge=1, description="Jobs of one owner that run at a time; else as many as there are workers.")
    ] = None
    max_stored_bytes: Annotated[
        int, Field(ge=0, description="Bytes that one owner's files, uploads and results, may take.")
    ] = 100 * GIB

    log_format: Annotated[
        Literal["text", "json"], Field(description="Log lines for people, or for machines: one JSON object each.")
    ] = "text"
    otlp_endpoint: Annotated[
        str | None,
        Field(
            validation_alias=AliasChoices("AQUANT_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"),
            description="Where traces are sent (OTLP over HTTP, as http://host:4318); without it there are none.",
        ),
    ] = None

    max_upload_bytes: Annotated[int, Field(ge=1, description="Largest single upload.")] = 4 * GIB
    max_config_bytes: Annotated[int, Field(ge=1, description="Largest `config` field.")] = MIB
    max_unpacked_bytes: Annotated[
        int, Field(ge=1, description="Largest image array, by its header, once unpacked.")
    ] = 8 * GIB

    lease_seconds: Annotated[float, Field(gt=0, description="A worker silent for this long has lost its job.")] = 30.0
    heartbeat_seconds: Annotated[
        float,
        Field(gt=0, description="How often a running job's lease, progress and cancel flag are exchanged."),
    ] = 0.5
    reaper_seconds: Annotated[float, Field(gt=0, description="How often lost jobs are looked for.")] = 5.0
    renudge_seconds: Annotated[
        float, Field(gt=0, description="A queued job unannounced for this long is announced again.")
    ] = 15.0
    max_attempts: Annotated[int, Field(ge=1, description="How often a job whose worker died is tried.")] = 3
    keep_seconds: Annotated[
        float | None,
        Field(gt=0, description="A job and its files are deleted this long after it ended; else kept until deleted."),
    ] = None
    upload_keep_seconds: Annotated[
        float, Field(gt=0, description="An upload that no job uses is deleted this long after it was last touched.")
    ] = 2 * 24 * 3600.0
    idempotency_seconds: Annotated[
        float, Field(gt=0, description="How long an Idempotency-Key stands for the job that came of it.")
    ] = 24 * 3600.0
    webhook_allow: Annotated[
        str,
        AfterValidator(_check_networks),
        Field(description="Networks, separated by commas, that webhooks may go to besides public addresses."),
    ] = ""
    job_seconds: Annotated[float, Field(gt=0, description="Time limit of one attempt at a job.")] = 24 * 3600.0

    job_memory_bytes: Annotated[
        int | None,
        Field(ge=GIB, description="A job whose process takes more memory than this, mapped files left out, fails."),
    ] = None

    intake_seconds: Annotated[float, Field(gt=0, description="Wall clock of the upload check.")] = 600.0
    intake_memory_bytes: Annotated[int, Field(ge=256 * MIB, description="Memory of the upload check.")] = 16 * GIB
    intake_file_bytes: Annotated[int, Field(ge=1, description="Largest file that the upload check may write.")] = (
        16 * GIB
    )

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Field(description="Where a worker computes: auto takes a GPU if there is one that works, cuda insists on it."),
    ] = "auto"
    memory_bytes: Annotated[
        int | None,
        Field(
            ge=0,
            description="Memory a job fills before block inputs go to disk; else most of the machine's, at most 9/10 "
            "of job_memory_bytes.",
        ),
    ] = None
    device_memory_bytes: Annotated[
        int | None, Field(ge=0, description="The same on the GPU, before it keeps them in memory; else most of it.")
    ] = None

    @property
    def database(self) -> str:
        """The database's URL."""
        return self.database_url or f"sqlite:///{self.data_dir.resolve() / 'aquant.sqlite3'}"

    @property
    def artifacts(self) -> str:
        """The artifact store's URL."""
        return self.artifacts_url or (self.data_dir.resolve() / "artifacts").as_uri()

    @property
    def webhook_networks(self) -> list[IPv4Network | IPv6Network]:
        """Where webhooks may go besides public addresses."""
        return _networks(self.webhook_allow)

    @property
    def work_dir(self) -> Path:
        """Folder of the running jobs' working files."""
        return self.data_dir.resolve() / "work"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Arguments, variables, then the files of ``secrets_dir``."""
        folder = (env_settings() | init_settings()).get("secrets_dir")
        if folder is not None and Path(folder).is_dir():  # what is none is refused with the other values
            assert isinstance(file_secret_settings, SecretsSettingsSource)
            file_secret_settings.secrets_dir = folder
        return super().settings_customise_sources(
            settings_cls, init_settings, env_settings, dotenv_settings, file_secret_settings
        )
