"""The check of the object storage: against a real S3 server over TLS, and against servers that fail on demand."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from programs import ROOT, load

s3 = load(ROOT / "library/s3_check.py", "evk_s3_check")

SECRET = 'a-secret"with\\quotes'
OBJECT = ".evenkeel-check-host-1"


def certificate(directory: Path, name: str) -> Path:
    """A self-signed certificate for localhost; its key lies beside it."""
    path = directory / f"{name}.crt"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    command += ["-subj", f"/CN={name}", "-addext", "subjectAltName=DNS:localhost", "-keyout", str(directory / f"{name}.key")]
    subprocess.run([*command, "-out", str(path)], check=True, capture_output=True)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Any]]:
    """Starts `rclone serve s3` with the bucket `shop`; gives a Storage that is right for it."""
    rclone = shutil.which("rclone", path=f"{ROOT}/.cache/application/bin:{os.environ['PATH']}")
    assert rclone, "rclone is missing: run bin/test-application --prepare"
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> Any:
        directory, port = tmp_path_factory.mktemp("s3"), free_port()
        (directory / "objects/shop").mkdir(parents=True)
        server = certificate(directory, "server")
        quotes = SECRET.replace('"', '""')
        environment = {**os.environ, "RCLONE_CONFIG": "/dev/null", "RCLONE_AUTH_KEY": f'"keyid,{quotes}"'}
        command = [rclone, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--cert", str(server), "--key", str(server.with_suffix(".key"))]
        with (directory / "log").open("wb") as log:
            command += ["--force-path-style", *options, str(directory / "objects")]
            started.append(subprocess.Popen(command, env=environment, stderr=log))
        for _ in range(200):
            if accepts(port):
                break
            time.sleep(0.05)
        return s3.Storage(f"https://localhost:{port}", "keyid", SECRET, str(server), "us-east-1")

    yield start
    for process in started:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def storage(real: Callable[..., Any]) -> Any:
    return real()


def objects(storage: Any) -> list[Path]:
    """All that lies in the real server's buckets, folders too."""
    return list((Path(storage.ca_file).parent / "objects/shop").rglob("*"))


def problem(storage: Any, bucket: str = "shop", *, read_only: bool = False) -> str:
    return str(s3.bucket_problem(storage, bucket, OBJECT, read_only=read_only))


def test_v5_a_bucket_that_can_be_written_read_and_deleted_is_well_and_nothing_is_left(storage: Any) -> None:
    assert problem(storage) == ""
    assert objects(storage) == []


@pytest.mark.parametrize(
    ("change", "bucket", "told"),
    [
        ({"access_key": "other"}, "shop", "does not know the access key id: correct secrets.object_storage_access_key"),
        ({"secret_key": "wrong"}, "shop", "another secret key for the access key id: correct secrets.object_storage_secret_key"),
        ({}, "missing", "has no bucket missing: create it there, or correct its name in the inventory"),
        ({"url": "https://no-such-name.invalid"}, "shop", "The name no-such-name.invalid of the object storage does not resolve"),
        ({"ca_file": "/etc/ssl/certs/ca-certificates.crt"}, "shop", "is not trusted (SSL certificate problem: self-signed certificate)"),
        ({"ca_file": "/no/such/file"}, "shop", "The CA file /no/such/file cannot be read"),
    ],
)
@pytest.mark.parametrize("read_only", [False, True])
def test_v5_what_is_wrong_is_told_apart(storage: Any, change: dict[str, str], bucket: str, told: str, read_only: bool) -> None:
    said = problem(replace(storage, **change), bucket, read_only=read_only)
    assert told in said
    assert said.count(told) == 1
    assert ";" not in said
    assert objects(storage) == []


def test_v5_a_certificate_for_another_name_is_not_trusted(storage: Any) -> None:
    said = problem(replace(storage, url=storage.url.replace("localhost", "127.0.0.1")))
    assert "is not trusted (SSL: no alternative certificate subject name matches target host name '127.0.0.1')" in said


def test_v5_a_storage_that_takes_nothing_is_named(real: Callable[..., Any]) -> None:
    assert "failed to write to bucket shop (status 500, InternalError, Internal Error)" in problem(real("--read-only"))


def test_v5_check_mode_only_reads(storage: Any, real: Callable[..., Any]) -> None:
    assert problem(storage, read_only=True) == ""
    assert problem(real("--read-only"), read_only=True) == ""


# --- Servers that fail ------------------------------------------------------------------------------------------------


def error(status: int, code: str) -> tuple[int, bytes]:
    return status, f"<Error><Code>{code}</Code><Message>told by the test</Message></Error>".encode()


DENIED, ABSENT, DONE = error(403, "AccessDenied"), error(404, "NoSuchKey"), (200, b"")


class Fake:
    """An HTTP server that keeps objects like S3, except where `answers` has another answer; no signature is checked."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.answers: dict[str, Callable[[str, bytes], tuple[int, bytes] | None]] = {}
        self.asked: list[str] = []
        self.clock_offset_seconds = 0.0
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                fake.asked.append(self.command)
                given = fake.answers.get(self.command, lambda _path, _body: None)(self.path, body)
                status, content = given or fake.usual(self.command, self.path, body)
                self.send_response_only(status)
                self.send_header("Date", formatdate(time.time() + fake.clock_offset_seconds, usegmt=True))
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_PUT = do_DELETE = answer

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.storage = s3.Storage(f"http://127.0.0.1:{self.server.server_port}", "keyid", SECRET, "/dev/null", "us-east-1")

    def usual(self, method: str, path: str, body: bytes) -> tuple[int, bytes]:
        if method == "PUT":
            self.objects[path] = body
            return DONE
        if method == "DELETE":
            self.objects.pop(path, None)
            return 204, b""
        return (200, self.objects[path]) if path in self.objects else ABSENT


@pytest.fixture
def fake() -> Iterator[Fake]:
    made = Fake()
    yield made
    made.server.shutdown()
    made.server.server_close()


def always(status: int, body: bytes = b"") -> Callable[[str, bytes], tuple[int, bytes]]:
    return lambda _path, _body: (status, body)


def test_the_usual_answers_of_the_fake_pass(fake: Fake) -> None:
    assert problem(fake.storage) == ""
    assert fake.asked == ["GET", "PUT", "GET", "DELETE", "GET"]


def test_v5_a_storage_that_loses_what_it_took(fake: Fake) -> None:
    fake.answers["PUT"] = always(200)
    assert "has lost what it took a moment ago for bucket shop" in problem(fake.storage)


def test_v5_a_storage_that_changes_what_it_took(fake: Fake) -> None:
    fake.answers["PUT"] = lambda path, body: fake.usual("PUT", path, body[:-1])
    assert "gave back other content than it took for bucket shop" in problem(fake.storage)
    assert fake.objects == {}


def test_v5_old_content_under_the_same_name_is_not_taken_for_the_new(fake: Fake) -> None:
    fake.objects[f"/shop/{OBJECT}"] = b"of an earlier run"
    assert "does not answer as S3 does (status 200" in problem(fake.storage)
    assert "PUT" not in fake.asked


def test_v5_a_deletion_that_is_confirmed_and_not_done(fake: Fake) -> None:
    fake.answers["DELETE"] = always(204)
    said = problem(fake.storage)
    assert "has confirmed a deletion in bucket shop and has not done it" in said
    assert said.endswith(f"delete {OBJECT} in bucket shop by hand")


def test_v5_a_key_that_may_not_write(fake: Fake) -> None:
    fake.answers["PUT"] = always(*DENIED)
    assert problem(fake.storage) == "The access key id may not write to bucket shop: give it that right at the object storage"


def test_v5_a_key_that_may_not_delete_and_what_is_left(fake: Fake) -> None:
    fake.answers["DELETE"] = always(*DENIED)
    said = problem(fake.storage)
    assert "may not delete from bucket shop" in said
    assert f"delete {OBJECT} in bucket shop by hand" in said


def test_v5_a_key_that_may_not_read_and_nothing_is_left(fake: Fake) -> None:
    fake.answers["GET"] = always(*DENIED)
    assert problem(fake.storage) == "The access key id may not read from bucket shop: give it that right at the object storage"
    assert fake.objects == {}


def test_v5_a_key_that_may_only_write_is_told_what_is_left(fake: Fake) -> None:
    fake.answers["GET"] = fake.answers["DELETE"] = always(*DENIED)
    said = problem(fake.storage)
    assert "may not read from" in said
    assert f"delete {OBJECT} in bucket shop by hand" in said


def test_v5_a_key_that_may_not_list_is_enough(fake: Fake) -> None:
    """S3 tells it of an absent object that access is denied."""
    fake.answers["GET"] = lambda path, _body: None if path in fake.objects else DENIED
    assert problem(fake.storage) == ""
    assert problem(fake.storage, read_only=True) == ""


def test_v5_nothing_is_left_of_a_write_that_was_reported_as_failed(fake: Fake) -> None:
    def stored_and_failed(path: str, body: bytes) -> tuple[int, bytes]:
        fake.usual("PUT", path, body)
        return error(500, "InternalError")

    fake.answers["PUT"] = stored_and_failed
    assert "failed to write to bucket shop (status 500, InternalError, told by the test)" in problem(fake.storage)
    assert fake.objects == {}


def test_v5_nothing_is_left_when_the_answer_to_a_write_is_lost(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def stored_and_silent(path: str, body: bytes) -> tuple[int, bytes]:
        done = fake.usual("PUT", path, body)
        time.sleep(1.5)
        return done

    monkeypatch.setattr(s3, "REQUEST_SECONDS", 1)
    fake.answers["PUT"] = stored_and_silent
    assert "does not answer in time" in problem(fake.storage)
    assert fake.objects == {}


def test_v5_a_wrong_clock_is_named_with_its_size(fake: Fake) -> None:
    fake.answers["GET"] = always(*error(403, "RequestTimeTooSkewed"))
    for offset, told in ((3600, "behind"), (-1800, "ahead of")):
        fake.clock_offset_seconds = offset
        apart = re.search(rf"refuses this host's time, which is (\d+) s {told} its own", problem(fake.storage))
        assert apart
        assert abs(int(apart[1]) - abs(offset)) <= 5  # HTTP has whole seconds


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (200, b"<html>Welcome", "does not answer as S3 does (status 200"),
        (404, b"<html>Not found", "does not answer as S3 does (status 404"),
        (503, b"", "failed to read from bucket shop (status 503): ask those who run it"),
        (301, error(301, "PermanentRedirect")[1], "failed to read from bucket shop (status 301, PermanentRedirect, told by the test)"),
    ],
)
def test_v5_what_is_no_s3_and_what_fails_is_told(fake: Fake, status: int, body: bytes, told: str) -> None:
    fake.answers["GET"] = always(status, body)
    assert told in problem(fake.storage)
    assert fake.asked == ["GET"]


def test_v5_a_port_that_nobody_listens_on(fake: Fake) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert f"Nothing takes a connection at {url}" in problem(replace(fake.storage, url=url))


def test_v5_a_silent_host_is_given_up_in_time(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "REQUEST_SECONDS", 1)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        before = time.monotonic()
        said = problem(replace(fake.storage, url=f"http://127.0.0.1:{silent.getsockname()[1]}"))
    assert "does not answer in time" in said
    assert time.monotonic() - before < 3


def test_v5_the_time_limits_are_those_that_are_documented() -> None:
    assert (s3.CONNECT_SECONDS, s3.REQUEST_SECONDS) == (5, 10)
    assert "No connection within 5 seconds, or no answer within 10, is a failure." in s3.DOCUMENTATION


# --- The module -------------------------------------------------------------------------------------------------------


def run(storage: Any, *, buckets: list[str], path: str = "", check: bool = False) -> dict[str, Any]:
    given = {**vars(storage), "buckets": buckets, "_ansible_check_mode": check, "_ansible_remote_tmp": "/tmp"}
    environment = {
        **os.environ,
        "PATH": path or os.environ["PATH"],
        "https_proxy": "http://127.0.0.1:9",
        "http_proxy": "http://127.0.0.1:9",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "library/s3_check.py")],
        input=json.dumps({"ANSIBLE_MODULE_ARGS": given}),
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    answer: dict[str, Any] = json.loads(done.stdout)
    del answer["invocation"]
    return answer


def test_v5_the_module_checks_each_bucket_and_changes_nothing(storage: Any) -> None:
    done = run(storage, buckets=["shop"])
    assert (done["changed"], done["checked"]) == (False, ["shop"])
    done = run(storage, buckets=["missing", "shop", "neither"])
    assert (done["failed"], done["checked"]) == (True, ["shop"])
    assert "has no bucket missing" in done["msg"]
    assert "has no bucket neither" in done["msg"]
    assert objects(storage) == []


def test_v5_one_cause_is_told_once(storage: Any) -> None:
    assert run(replace(storage, access_key="other"), buckets=["shop", "shop-backups"])["msg"].count("does not know") == 1


def test_v5_the_module_only_reads_in_check_mode(fake: Fake) -> None:
    assert run(fake.storage, buckets=["shop"], check=True)["checked"] == ["shop"]
    assert fake.asked == ["GET"]


def test_v5_each_run_writes_an_object_of_its_own_name_that_no_other_host_can_take_away(fake: Fake) -> None:
    """Nor its folder: rclone removes one with its last object, and answers 500 to whoever writes into it at that moment."""
    names: set[str] = set()
    fake.answers["PUT"] = lambda path, _body: names.add(path)  # type: ignore[func-returns-value]
    for _ in range(2):
        run(fake.storage, buckets=["shop"])
    assert len(names) == 2
    assert all(re.fullmatch(r"/shop/\.evenkeel-check-[^/]+", name) for name in names)


def test_v5_the_secret_key_is_on_no_command_line_and_in_no_answer(storage: Any, tmp_path: Path) -> None:
    curl = tmp_path / "curl"
    curl.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >>{tmp_path}/words\nenv >>{tmp_path}/words\nexec {shutil.which("curl")} "$@"\n')
    curl.chmod(0o755)
    done = run(storage, buckets=["shop"], path=f"{tmp_path}:{os.environ['PATH']}")
    assert done["checked"] == ["shop"]
    words = (tmp_path / "words").read_text()
    assert storage.ca_file in words
    assert SECRET not in words
    assert SECRET not in json.dumps(run(replace(storage, url="https://no-such-name.invalid"), buckets=["shop"]))


def test_v5_a_host_without_curl_says_so(storage: Any, tmp_path: Path) -> None:
    assert "This host has no curl" in run(storage, buckets=["shop"], path=str(tmp_path))["msg"]


@pytest.mark.parametrize(
    ("change", "bucket", "told"),
    [
        ({"url": "s3.example.org"}, "shop", "platform_s3_url is 's3.example.org', and must be https://host"),
        ({"url": "https://s3.example.org/prefix"}, "shop", "must be https://host"),
        ({"access_key": ""}, "shop", "secrets.object_storage_access_key is empty"),
        ({"access_key": "a:b"}, "shop", "secrets.object_storage_access_key is empty, or has a colon"),
        ({"secret_key": "two\nlines"}, "shop", "secrets.object_storage_secret_key is empty, or has a blank"),
        ({}, "../etc", "'../etc' is no name of a bucket"),
        ({}, "", "'' is no name of a bucket"),
    ],
)
def test_bad_input_is_told_in_one_sentence(storage: Any, change: dict[str, str], bucket: str, told: str) -> None:
    done = run(replace(storage, **change), buckets=[bucket])
    assert done["failed"]
    assert told in done["msg"]
