"""The environment: complete, or one line for each variable that is not."""

import subprocess
import sys

import pytest

from conftest import SERVERS
from drydock.config import VARIABLES, Config, ConfigurationError, RedisAddress

REQUIRED = sorted(name for name, variable in VARIABLES.items() if variable.default is None)
COMMANDS = {
    "drydock": ["drydock", "check"],
    "gunicorn": ["gunicorn", "-c", "python:drydock.gunicorn_conf", "drydock.wsgi:application"],
    "celery": ["celery", "-A", "drydock.celery", "worker", "-Q", "export"],
}


@pytest.mark.parametrize("name", REQUIRED)
def test_a_missing_variable_is_named_in_one_line_with_its_purpose_and_an_example(name: str) -> None:
    environment = {key: value for key, value in SERVERS.environment.items() if key != name}
    with pytest.raises(ConfigurationError) as caught:
        Config.from_environment(environment)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"drydock: {name} is not set: {VARIABLES[name].purpose}. Set it")
    assert f"{name}={VARIABLES[name].example}" in message


def test_everything_missing_is_said_at_once() -> None:
    with pytest.raises(ConfigurationError) as caught:
        Config.from_environment({})
    assert len(str(caught.value).splitlines()) == len(REQUIRED)


@pytest.mark.parametrize("program", COMMANDS)
def test_every_process_ends_with_that_line_and_no_traceback(program: str) -> None:
    environment = SERVERS.child_environment()
    del environment["REDIS_PASSWORD"]
    command = [sys.executable, "-m", *COMMANDS[program]]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
    assert ended.returncode == 1
    assert ended.stderr.splitlines() == [VARIABLES["REDIS_PASSWORD"].problem("is not set").join(["drydock: ", ""])]


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("DATABASE_CORE_URL", "mysql://db/x", "not a postgresql:// URL"),
        ("DATABASE_CORE_URL", "postgresql://u@h:1/x?nonsense=1", "nonsense"),
        ("DATABASE_CORE_URL", "postgresql://u:secret@h/x", "carries a password"),
        ("DATABASE_PLUGINS_URL", "postgresql://u@h:5432", "names no database"),
        ("REDIS_URL", "rediss://u:secret@h", "carries a password"),
        ("REDIS_URL", "http://h", "not a redis://"),
        ("REDIS_URL", "rediss+cluster://h/0", "not a redis://"),
        ("REDIS_URL", "rediss://u@a,b/0", "several hosts"),
        ("REDIS_URL", "rediss+sentinel://u@a,b", "which master"),
        ("REDIS_URL", "rediss://h/main", "not a whole number"),
        ("REDIS_CA_FILE", "/nowhere/ca.crt", "not a readable file"),
        ("S3_ENDPOINT", "localhost:9000", "not an http(s) URL"),
        ("LATEX_COMPILE_TIMEOUT_MS", "soon", "not a whole number"),
        ("LATEX_COMPILE_TIMEOUT_MS", "0", "at least 1"),
        ("LATEX_ENGINE", "sh", "none of lualatex"),
        ("DRYDOCK_DATA_DIR", "data", "not an absolute path"),
        ("DRYDOCK_SECRET_KEY", "short", "too short"),
    ],
)
def test_a_wrong_value_is_explained_without_repeating_a_secret(name: str, value: str, why: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Config.from_environment(SERVERS.environment | {name: value})
    message = str(caught.value)
    assert message.startswith(f"drydock: {name} is wrong")
    assert why in message
    assert "secret" not in message.replace("DRYDOCK_SECRET_KEY", "")


def test_a_url_of_several_hosts_keeps_them_in_order_with_the_options() -> None:
    url = "postgresql://app@a:5432,b:5433/name?sslmode=verify-full&target_session_attrs=read-write"
    database = Config.from_environment(SERVERS.environment | {"DATABASE_CORE_URL": url}).databases["core"]
    assert (database["HOST"], database["PORT"], database["NAME"], database["USER"]) == (
        "a,b",
        "5432,5433",
        "name",
        "app",
    )
    options = database["OPTIONS"]
    assert (options["sslmode"], options["target_session_attrs"]) == ("verify-full", "read-write")
    assert (options["connect_timeout"], options["tcp_user_timeout"]) == (2, 3000)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("rediss://app@h/3", RedisAddress(True, "app", (("h", 6379),), 3)),
        ("redis://127.0.0.1:7000", RedisAddress(False, "", (("127.0.0.1", 7000),), 0)),
        ("rediss+sentinel://app@a,b:7001/main", RedisAddress(True, "app", (("a", 26379), ("b", 7001)), 0, "main")),
        ("redis+sentinel://a/other/2", RedisAddress(False, "", (("a", 26379),), 2, "other")),
    ],
)
def test_redis_is_one_server_or_what_sentinels_name(url: str, address: RedisAddress) -> None:
    assert Config.from_environment(SERVERS.environment | {"REDIS_URL": url}).redis == address
