"""Everything that Drydock reads from its environment, in one typed place.

A variable that is missing or wrong ends the process with one line for each such variable: which one, what it
is for, and how to set it.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote, urlsplit

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict

T = TypeVar("T")

# A client must notice a dead or demoted primary within seconds, not after the kernel's quarter of an hour.
DATABASE_CLIENT_OPTIONS: dict[str, Any] = {
    "connect_timeout": 2,
    "tcp_user_timeout": 3000,
    "keepalives": 1,
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "application_name": "drydock",
    # A process that was frozen in a transaction must not hold its locks: the relay passes over a job that is locked.
    "options": "-c idle_in_transaction_session_timeout=60s",
}
LATEX_ENGINES = ("lualatex", "pdflatex", "tectonic")


class ConfigurationError(SystemExit):
    """The environment is incomplete.

    It is a `SystemExit` so that gunicorn, Celery and the command line all end with its lines and not with a traceback.
    """


@dataclass(frozen=True)
class Variable:
    """One environment variable: what it is for, what it may look like, and its default if it has one."""

    name: str
    purpose: str
    example: str
    default: str | None = None

    def problem(self, what: str) -> str:
        """Say in one line what is wrong with this variable and how to set it."""
        return f"{self.name} {what}: {self.purpose}. Set it in the environment, for example {self.name}={self.example}"


VARIABLES = {
    variable.name: variable
    for variable in (
        Variable("DRYDOCK_SECRET_KEY", "it signs sessions and forms (at least 50 random characters)", "<random text>"),
        Variable("DRYDOCK_INTERNAL_TOKEN", "it is the bearer token of the internal endpoints", "<random text>"),
        Variable("DRYDOCK_ALLOWED_HOSTS", "names and addresses under which the platform answers", "app.example.org"),
        Variable("DRYDOCK_DATA_DIR", "directory for compile work and font caches, writable", "/var/lib/drydock"),
        Variable(
            "DRYDOCK_CSRF_TRUSTED_ORIGINS", "other origins whose forms are accepted", "https://app.example.org", ""
        ),
        Variable("DRYDOCK_HSTS_SECONDS", "how long browsers must insist on HTTPS", "31536000", "0"),
        Variable("DATABASE_CORE_URL", "where the core database is", "postgresql://drydock@db1:5432,db2:5432/drydock"),
        Variable("DATABASE_CORE_PASSWORD", "the password for DATABASE_CORE_URL", "<password>"),
        Variable("DATABASE_PLUGINS_URL", "where the plugins database is", "postgresql://drydock@db1:5433/drydock"),
        Variable("DATABASE_PLUGINS_PASSWORD", "the password for DATABASE_PLUGINS_URL", "<password>"),
        Variable(
            "REDIS_URL",
            "where the broker is, or the Sentinels that know",
            "rediss+sentinel://drydock@redis1:26379,redis2:26379,redis3:26379/main/0",
        ),
        Variable("REDIS_PASSWORD", "the password for REDIS_URL, for Redis and for Sentinel alike", "<password>"),
        Variable("REDIS_CA_FILE", "certificate authority of a rediss:// broker", "/etc/ssl/ca.crt", ""),
        Variable("S3_ENDPOINT", "the object storage endpoint", "https://s3.example.org:9000"),
        Variable("S3_BUCKET", "the bucket for PDFs and exports", "drydock"),
        Variable("S3_ACCESS_KEY_ID", "the access key for S3_ENDPOINT", "<key id>"),
        Variable("S3_SECRET_ACCESS_KEY", "the secret of S3_ACCESS_KEY_ID", "<secret>"),
        Variable("S3_CA_FILE", "certificate authority of the object storage", "/etc/ssl/ca.crt", ""),
        Variable("INTERNAL_API_URL", "where workers reach the web tier", "https://app.example.org"),
        Variable("PLATFORM_CA_FILE", "certificate authority of INTERNAL_API_URL", "/etc/ssl/ca.crt", ""),
        Variable("LATEX_ENGINE", "the LaTeX engine: " + ", ".join(LATEX_ENGINES), "lualatex", "lualatex"),
        Variable("LATEX_COMPILE_TIMEOUT_MS", "longest LaTeX compile in milliseconds", "120000", "120000"),
        Variable("DRYDOCK_LEASE_SECONDS", "silence after which a worker has lost its job", "30", "30"),
        Variable("OMERO_IMS_CELERY_TIME_LIMIT", "longest export in seconds", "600", "600"),
        Variable(
            "OMERO_SCRIPTS_PROCESSORS", "how many scripts a script processor runs at once; 0 disables exports", "2", "2"
        ),
        Variable(
            "PROCESSOR_URL", "where the script processors are", "https://processor1:8002", "http://127.0.0.1:8002"
        ),
        Variable("PROCESSOR_CERTIFICATE", "certificate of the script processor, for TLS", "/etc/ssl/host.crt", ""),
        Variable("PROCESSOR_KEY", "private key of PROCESSOR_CERTIFICATE", "/etc/ssl/host.key", ""),
        Variable("DRYDOCK_RUN_DIR", "directory on tmpfs for job files, writable", "/run/drydock", "/run/drydock"),
        Variable("DRYDOCK_RATE_LIMIT_ACTIONS", "how many major actions a user may start in the time", "6", "6"),
        Variable("DRYDOCK_RATE_LIMIT_SECONDS", "the time of DRYDOCK_RATE_LIMIT_ACTIONS, in seconds", "60", "60"),
        Variable("DRYDOCK_UPLOAD_PHOTO_MAX_BYTES", "how large a photo may be", "20971520", "20971520"),
        Variable("DRYDOCK_UPLOAD_ATTACHMENT_MAX_BYTES", "how large an attachment may be", "104857600", "104857600"),
        Variable("DRYDOCK_UPLOAD_PHOTO_STALE_SECONDS", "age of a photo's leftovers to be pruned", "3600", "3600"),
        Variable(
            "DRYDOCK_UPLOAD_ATTACHMENT_STALE_SECONDS", "age of an attachment's leftovers to be pruned", "86400", "86400"
        ),
    )
}


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is: one server, or the Sentinels that know which of several is the master (`master` is its name)."""

    tls: bool
    user: str
    hosts: tuple[tuple[str, int], ...]
    database: int
    master: str = ""


@dataclass(frozen=True)
class Config:
    """The environment, read and checked."""

    secret_key: str
    internal_token: str
    allowed_hosts: list[str]
    csrf_trusted_origins: list[str]
    hsts_seconds: int
    data_dir: Path
    databases: dict[str, dict[str, Any]]
    redis: RedisAddress
    redis_password: str
    redis_ca_file: str
    s3_endpoint: str
    s3_bucket: str
    s3_access_key_id: str
    s3_secret_access_key: str
    s3_ca_file: str
    internal_api_url: str
    platform_ca_file: str
    latex_engine: str
    latex_compile_timeout_seconds: float
    lease_seconds: int
    export_time_limit_seconds: int
    script_processors: int
    processor_urls: list[str]
    processor_certificate: str
    processor_key: str
    run_dir: Path
    rate_limit_actions: int
    rate_limit_seconds: int
    # By the kind of upload.
    upload_max_bytes: dict[str, int]
    upload_stale_seconds: dict[str, int]

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "Config":
        """Read every variable, collect every problem, and fail once with all of them."""
        problems: list[str] = []

        def read(name: str, parse: Callable[[str], T], fallback: T) -> T:
            variable = VARIABLES[name]
            text = environment.get(name, "").strip() or variable.default
            if text is None:
                problems.append(variable.problem("is not set"))
                return fallback
            try:
                return parse(text)
            except ValueError as error:
                problems.append(variable.problem(f"is wrong ({error})"))
                return fallback

        def database(cluster: str) -> dict[str, Any]:
            nothing: dict[str, Any] = {}
            settings = read(f"DATABASE_{cluster}_URL", _database, nothing)
            settings["PASSWORD"] = read(f"DATABASE_{cluster}_PASSWORD", str, "")
            return settings

        def upload(what: str) -> dict[str, int]:
            number = _whole_number(1)
            return {kind: read(f"DRYDOCK_UPLOAD_{kind.upper()}_{what}", number, 1) for kind in ("photo", "attachment")}

        config = cls(
            secret_key=read("DRYDOCK_SECRET_KEY", _secret_key, ""),
            internal_token=read("DRYDOCK_INTERNAL_TOKEN", str, ""),
            allowed_hosts=read("DRYDOCK_ALLOWED_HOSTS", _words, []),
            csrf_trusted_origins=read("DRYDOCK_CSRF_TRUSTED_ORIGINS", _words, []),
            hsts_seconds=read("DRYDOCK_HSTS_SECONDS", _whole_number(0), 0),
            data_dir=read("DRYDOCK_DATA_DIR", _absolute_path, Path("/")),
            databases={"core": database("CORE"), "plugins": database("PLUGINS")},
            redis=read("REDIS_URL", _redis_address, RedisAddress(False, "", (), 0)),
            redis_password=read("REDIS_PASSWORD", str, ""),
            redis_ca_file=read("REDIS_CA_FILE", _readable_file, ""),
            s3_endpoint=read("S3_ENDPOINT", _http_url, ""),
            s3_bucket=read("S3_BUCKET", str, ""),
            s3_access_key_id=read("S3_ACCESS_KEY_ID", str, ""),
            s3_secret_access_key=read("S3_SECRET_ACCESS_KEY", str, ""),
            s3_ca_file=read("S3_CA_FILE", _readable_file, ""),
            internal_api_url=read("INTERNAL_API_URL", _http_url, ""),
            platform_ca_file=read("PLATFORM_CA_FILE", _readable_file, ""),
            latex_engine=read("LATEX_ENGINE", _engine, ""),
            latex_compile_timeout_seconds=read("LATEX_COMPILE_TIMEOUT_MS", _whole_number(1), 1) / 1000,
            lease_seconds=read("DRYDOCK_LEASE_SECONDS", _whole_number(3), 3),
            export_time_limit_seconds=read("OMERO_IMS_CELERY_TIME_LIMIT", _whole_number(1), 1),
            script_processors=read("OMERO_SCRIPTS_PROCESSORS", _whole_number(0), 0),
            processor_urls=read("PROCESSOR_URL", _http_urls, []),
            # Credentials of the processor alone: that they are readable and fit is for its own start to check.
            processor_certificate=read("PROCESSOR_CERTIFICATE", str, ""),
            processor_key=read("PROCESSOR_KEY", str, ""),
            run_dir=read("DRYDOCK_RUN_DIR", _absolute_path, Path("/")),
            rate_limit_actions=read("DRYDOCK_RATE_LIMIT_ACTIONS", _whole_number(1), 1),
            rate_limit_seconds=read("DRYDOCK_RATE_LIMIT_SECONDS", _whole_number(1), 1),
            upload_max_bytes=upload("MAX_BYTES"),
            upload_stale_seconds=upload("STALE_SECONDS"),
        )
        if problems:
            raise ConfigurationError("\n".join(f"drydock: {problem}" for problem in problems))
        return config


@lru_cache(maxsize=1)
def load() -> Config:
    """Return this process's configuration; read once."""
    return Config.from_environment(os.environ)


def _secret_key(text: str) -> str:
    if len(text) < 50 or len(set(text)) < 5:
        raise ValueError("too short or too regular")
    return text


def _words(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def _whole_number(at_least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < at_least:
            raise ValueError(f"{text!r} is not a whole number of at least {at_least}")
        return int(text)

    return parse


def _absolute_path(text: str) -> Path:
    if not text.startswith("/"):
        raise ValueError(f"{text!r} is not an absolute path")
    return Path(text)


def _readable_file(text: str) -> str:
    if text and not os.access(text, os.R_OK):
        raise ValueError(f"{text!r} is not a readable file")
    return text


def _http_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"{text!r} is not an http(s) URL")
    return text.rstrip("/")


def _http_urls(text: str) -> list[str]:
    return [_http_url(word) for word in _words(text)]


def _engine(text: str) -> str:
    if text not in LATEX_ENGINES:
        raise ValueError(f"{text!r} is none of {', '.join(LATEX_ENGINES)}")
    return text


def _redis_address(text: str) -> RedisAddress:
    parts = urlsplit(text)
    scheme, _, sentinel = parts.scheme.partition("+")
    user, _, hosts = parts.netloc.rpartition("@")
    if scheme not in ("redis", "rediss") or sentinel not in ("", "sentinel") or not hosts:
        raise ValueError("it is not a redis://, rediss:// or rediss+sentinel:// URL")
    if ":" in user:
        raise ValueError("it carries a password; put that into REDIS_PASSWORD")
    if "," in hosts and not sentinel:
        raise ValueError("it names several hosts: name their Sentinels, as rediss+sentinel://")
    path = parts.path.strip("/")
    master, _, database = path.partition("/") if sentinel else ("", "", path)
    if sentinel and not master:
        raise ValueError("it does not say which master the Sentinels are asked for")
    return RedisAddress(
        tls=scheme == "rediss",
        user=unquote(user),
        hosts=tuple(_host_and_port(word, 26379 if sentinel else 6379) for word in hosts.split(",")),
        database=_whole_number(0)(database or "0"),
        master=master,
    )


def _host_and_port(text: str, default: int) -> tuple[str, int]:
    parts = urlsplit(f"//{text}")
    if not parts.hostname:
        raise ValueError(f"{text!r} names no host")
    return parts.hostname, parts.port or default


def _database(url: str) -> dict[str, Any]:
    """Turn a libpq URL, several hosts allowed, into Django's settings of a database."""
    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("it is not a postgresql:// URL")
    try:
        options = conninfo_to_dict(url)
    except ProgrammingError as error:
        raise ValueError(str(error).strip()) from None
    if options.pop("password", None):
        raise ValueError("it carries a password; put that into the variable made for it")
    if not options.get("dbname"):
        raise ValueError("it names no database")
    return {
        "ENGINE": "drydock.postgresql",
        "NAME": options.pop("dbname"),
        "USER": options.pop("user", ""),
        "HOST": options.pop("host", ""),
        "PORT": str(options.pop("port", "")),
        "OPTIONS": DATABASE_CLIENT_OPTIONS | options,
        # Kept over requests, and tested before each, so that a failover costs no user an error page.
        "CONN_MAX_AGE": 60,
        "CONN_HEALTH_CHECKS": True,
    }
