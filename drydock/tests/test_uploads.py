"""Uploads: received into locked files, checked, stored whole; and what broken ones leave behind is pruned (U1)."""

import hashlib
import io
import os
import random
import signal
import socket
import ssl
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db.models import Sum
from PIL import Image

from browser import Answer, Browser
from drydock import config, storage
from drydock.jobs.models import Tally
from drydock.uploads import service, temporary
from drydock.uploads.models import Upload
from platform_servers import Servers, wait_for

Maker = Callable[..., Browser]
BOUNDARY = "a-boundary-between-parts"
OLD = 2 * 3600


def picture(form: str = "JPEG", size: tuple[int, int] = (64, 48)) -> bytes:
    file = io.BytesIO()
    # Noise, so that it does not compress.
    noise = random.Random(1).randbytes(size[0] * size[1] * 3)  # noqa: S311
    Image.frombytes("RGB", size, noise).save(file, form)
    return file.getvalue()


def part(field: str, name: str, content_type: str) -> bytes:
    disposition = f'Content-Disposition: form-data; name="{field}"; filename="{name}"'
    return f"--{BOUNDARY}\r\n{disposition}\r\nContent-Type: {content_type}\r\n\r\n".encode()


END = f"\r\n--{BOUNDARY}--\r\n".encode()
FORM = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def send(person: Browser, field: str, content: bytes, name: str = "file", *, page: str = "", **headers: str) -> Answer:
    body = part(field, name, headers.pop("type", "application/octet-stream")) + content + END
    headers = {**FORM, "X-CSRFToken": person.csrf(), **headers}
    return person.request("POST", page or "/api/uploads", body, headers)


def leftovers(servers: Servers) -> list[Path]:
    return sorted((servers.root / "data" / "uploads").glob("*/*"))


@pytest.fixture(autouse=True)
def nothing_left(servers: Servers) -> Iterator[None]:
    """Whatever happened, no temporary file stays when the requests are over."""
    yield
    wait_for("no temporary files", lambda: leftovers(servers) == [])


# --- What is taken ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "content_type"), [("JPEG", "image/jpeg"), ("PNG", "image/png"), ("WEBP", "image/webp")]
)
def test_a_photo_is_stored_and_shown(sign_in: Maker, form: str, content_type: str) -> None:
    person, photo = sign_in(), picture(form)
    answer = send(person, "photo", photo, "Мой лист.jpg", type="text/html")
    assert answer.status == 201, answer.text
    told = answer.json
    assert (told["kind"], told["name"], told["size"]) == ("photo", "Мой лист.jpg", len(photo))
    # What it is says its content, not its sender.
    assert told["content_type"] == content_type
    assert told["sha256"] == hashlib.sha256(photo).hexdigest()
    assert person.get(answer.headers["Location"]).json == told
    assert [one["id"] for one in person.get("/api/uploads").json["uploads"]] == [told["id"]]
    file = person.get(told["file"])
    assert file.body == photo
    assert file.headers["Content-Type"] == content_type
    assert file.headers["Content-Disposition"].startswith("inline; filename*=utf-8''%D0%9C")
    assert file.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in file.headers["Content-Security-Policy"]
    assert storage.get(f"uploads/{told['id']}").read() == photo


def test_an_attachment_is_stored_and_downloaded_but_never_run(sign_in: Maker) -> None:
    person, page = sign_in(), b"<script>alert(1)</script>"
    told = send(person, "attachment", page, 'a"b\n.html', type="text/html").json
    file = person.get(told["file"])
    assert file.body == page
    assert file.headers["Content-Disposition"].startswith("attachment; filename=")
    assert file.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in file.headers["Content-Security-Policy"]


def test_the_page_takes_and_lists_uploads(sign_in: Maker) -> None:
    person, photo = sign_in(), picture()
    page = send(person, "photo", photo, "<b>.jpg", page="/uploads/")
    assert (page.status, page.url.endswith("/uploads/")) == (200, True)
    for shown in ("&lt;b&gt;.jpg", "Photo", hashlib.sha256(photo).hexdigest(), "at most 20.0\xa0MB"):
        assert shown in page.text
    refused = send(person, "photo", b"text", page="/uploads/")
    assert refused.status == 400
    assert '<p class="error" role="alert">The file is no photo' in refused.text
    assert "Choose a file" in person.submit("/uploads/").text


def test_an_upload_is_its_owners_and_the_staffs(sign_in: Maker) -> None:
    told = send(sign_in(), "photo", picture()).json
    stranger, staff = sign_in(), sign_in(staff=True)
    for path in (f"/api/uploads/{told['id']}", told["file"]):
        assert (stranger.get(path).status, staff.get(path).status) == (404, 200)
    assert staff.get("/api/uploads").json == {"uploads": []}


def test_a_request_sent_again_with_its_key_makes_nothing_new(sign_in: Maker) -> None:
    person, headers = sign_in(), {"Idempotency-Key": "k1"}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: send(person, "photo", picture(), **headers), range(8)))
    answers.append(send(person, "photo", picture(), **headers))
    assert {(answer.status, answer.json["id"]) for answer in answers} == {(201, answers[0].json["id"])}
    assert len(person.get("/api/uploads").json["uploads"]) == 1
    assert send(sign_in(), "photo", picture(), **headers).json["id"] != answers[0].json["id"]
    assert send(person, "photo", picture(), **{"Idempotency-Key": "x" * 101}).status == 400


# --- What is refused --------------------------------------------------------------------------------------------------


def huge_png() -> bytes:
    """Return a small file that would be 100 megapixels."""
    file = io.BytesIO()
    Image.new("1", (10_000, 10_000)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "empty"),
        (b"not a picture", "no photo that can be shown"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "no photo that can be shown"),
        (picture("JPEG")[:-500], "no photo that can be shown"),
        (picture("PNG")[:-500], "no photo that can be shown"),
        (picture("WEBP")[:-500], "no photo that can be shown"),
        (picture("GIF"), "no photo that can be shown"),
        (huge_png(), "10000 × 10000 pixels"),
    ],
    ids=["empty", "text", "only the head", "half a JPEG", "half a PNG", "half a WebP", "GIF", "too many pixels"],
)
def test_what_is_no_photo_is_refused(sign_in: Maker, content: bytes, why: str) -> None:
    person = sign_in()
    answer = send(person, "photo", content)
    assert (answer.status, answer.json["code"]) == (400, "INVALID_INPUT")
    assert why in answer.json["message"]
    assert person.get("/api/uploads").json == {"uploads": []}


@pytest.fixture(scope="module")
def small(servers: Servers) -> Iterator[str]:
    """A web tier with small limits."""
    servers.start_web("small", DRYDOCK_UPLOAD_PHOTO_MAX_BYTES="200000", DRYDOCK_UPLOAD_ATTACHMENT_MAX_BYTES="300000")
    url = f"https://localhost:{servers.ports['small']}"
    wait_for("the web tier answering", lambda: Browser(url, servers.tls).get("/health").status == 200)
    yield url
    servers.stop("small")


def test_each_kind_has_its_own_limit(small: str, sign_in: Maker) -> None:
    person = sign_in()
    person.base = small
    assert send(person, "attachment", b"x" * 300_000).status == 201
    for kind, size, limit in (("attachment", 300_001, "293.0"), ("photo", 200_001, "195.3")):
        answer = send(person, kind, b"x" * size)
        assert (answer.status, answer.json["code"]) == (413, "TOO_LARGE")
        assert f"{kind} may have at most {limit}\xa0KB" in answer.json["message"]
        page = send(person, kind, b"x" * 3_000_000, page="/uploads/")
        assert page.status == 413
        assert "The file is too large." in page.text


def test_files_that_nobody_asked_for_are_not_kept(servers: Servers, sign_in: Maker) -> None:
    person, photo = sign_in(), picture()
    answer = send(person, "other", b"x" * 1000)
    assert (answer.status, "“photo” or “attachment”" in answer.json["message"]) == (400, True)
    # Neither do they take the wanted one with them.
    both = photo + f"\r\n{part('other', 'o', 'text/plain').decode()}".encode() + b"x"
    assert send(person, "photo", both).json["sha256"] == hashlib.sha256(photo).hexdigest()
    stranger = Browser(servers.url, servers.tls)
    stranger.get("/login")
    assert send(stranger, "photo", photo).status == 401


def test_without_object_storage_nothing_is_half_done(servers: Servers, sign_in: Maker) -> None:
    person = sign_in()
    told = send(person, "photo", picture()).json
    servers.stop("s3")
    try:
        for page in ("/api/uploads", "/uploads/"):
            answer = send(person, "attachment", b"text", page=page)
            assert (answer.status, answer.headers["Retry-After"]) == (503, "30")
            assert "Nothing was kept. Try again in 30 seconds." in answer.text
        assert person.get(told["file"]).status == 503
    finally:
        servers._start_s3()
    wait_for("object storage answering", lambda: person.get(told["file"]).status == 200)
    assert [one["id"] for one in person.get("/api/uploads").json["uploads"]] == [told["id"]]


def test_a_disk_without_room_is_no_error_of_the_sender(servers: Servers, sign_in: Maker) -> None:
    """A file in the place of the directory stands for a disk that takes nothing."""
    person, home = sign_in(), servers.root / "data" / "uploads"
    moved = home.rename(home.with_name("moved")) if home.exists() else None
    home.touch()
    try:
        answer = send(person, "attachment", b"text")
    finally:
        home.unlink()
        if moved:
            moved.rename(home)
    assert (answer.status, answer.headers["Retry-After"]) == (503, "30")
    assert "no room" in answer.json["message"]


def test_other_code_can_store_files_of_its_own(servers: Servers) -> None:
    assert servers.processes
    assert set(config.load().upload_max_bytes) == set(Upload.Kind.values)
    upload = service.store(7, "photo", SimpleUploadedFile("leaf.png", picture("PNG"), "image/png"))
    assert upload.sha256 == hashlib.sha256(picture("PNG")).hexdigest()
    assert storage.get(upload.key).read() == picture("PNG")
    for kind, content, error in (("video", b"x", "one of: photo, attachment"), ("attachment", b"", "empty")):
        with pytest.raises(service.InvalidUploadError, match=error):
            service.store(7, kind, SimpleUploadedFile("x", content))


# --- U1: stale temporary files ----------------------------------------------------------------------------------------


class SlowUpload:
    """A request whose body comes piece by piece."""

    def __init__(self, person: Browser, tls: ssl.SSLContext, kind: str, size: int) -> None:
        before, after = part(kind, "slow.bin", "application/octet-stream"), END
        cookies = "; ".join(f"{cookie.name}={cookie.value}" for cookie in person.cookies)
        host, port = person.base.removeprefix("https://").split(":")
        lines = {
            "Host": f"{host}:{port}", "Cookie": cookies, "X-CSRFToken": person.csrf(), "Referer": person.base,
            "Content-Length": str(len(before) + size + len(after)), "Connection": "close", **FORM,
        }  # fmt: skip
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        raw = socket.create_connection((host, int(port)), timeout=30)
        self.socket = tls.wrap_socket(raw, server_hostname=host)
        self.socket.sendall(f"POST /api/uploads HTTP/1.1\r\n{head}\r\n".encode() + before)

    def send(self, piece: bytes) -> None:
        self.socket.sendall(piece)

    def end(self) -> bytes:
        self.socket.sendall(END)
        answer = b""
        while piece := self.socket.recv(65536):
            answer += piece
        self.socket.close()
        return answer


def begun(servers: Servers, kind: str, count: int = 1) -> list[Path]:
    """Return the temporary files that requests in hand have written to."""

    def files() -> list[Path]:
        found = [path for path in leftovers(servers) if path.parent.name == kind and path.stat().st_size]
        return found if len(found) == count else []

    return list(wait_for(f"{count} files of kind {kind}", files))


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(path, (then, then))


def prune(servers: Servers, *arguments: str, **changes: str) -> list[str]:
    ended = servers.drydock("prune_uploads", *arguments, **changes)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.splitlines()


def pruned() -> int:
    counted = Tally.objects.using("plugins").filter(subject="uploads", event="pruned")
    return counted.aggregate(total=Sum("count"))["total"] or 0


def test_u1_what_a_killed_web_process_left_is_pruned_after_its_kinds_age(servers: Servers, sign_in: Maker) -> None:
    servers.start_web("doomed")
    person = sign_in()
    person.base = f"https://localhost:{servers.ports['doomed']}"
    wait_for("the web tier answering", lambda: person.get("/health").status == 200)
    uploads = [SlowUpload(person, servers.tls, kind, 10_000_000) for kind in ("photo", "attachment")]
    for upload in uploads:
        upload.send(b"x" * 300_000)
    [photo], [attachment] = begun(servers, "photo"), begun(servers, "attachment")
    process = servers.processes.pop("doomed")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert leftovers(servers) == sorted([photo, attachment])
    size, before = photo.stat().st_size, pruned()

    # Young leftovers stay: perhaps somebody wants to look.
    assert prune(servers)[-1] == "unchanged uploads: no stale temporary files"
    # Two hours are old for a photo and young for an attachment.
    age(photo, OLD)
    age(attachment, OLD)
    told = [f"photo: would remove 1 file of {size} bytes, not written to for 3600 s"]
    told += ["attachment: would remove 0 files of 0 bytes, not written to for 86400 s"]
    told += [f"changed uploads: would remove 1 temporary file of {size} bytes"]
    assert prune(servers, "--dry-run") == told
    assert photo.exists()
    assert prune(servers) == [line.replace("would remove", "removed") for line in told]
    assert leftovers(servers) == [attachment]
    # The ages are configured for each kind.
    assert prune(servers, DRYDOCK_UPLOAD_PHOTO_STALE_SECONDS="1")[-1].startswith("unchanged")
    assert prune(servers, DRYDOCK_UPLOAD_ATTACHMENT_STALE_SECONDS="7000")[-1].startswith("changed")
    assert pruned() == before + 2
    assert prune(servers)[-1] == "unchanged uploads: no stale temporary files"


def test_u1_a_live_upload_is_never_pruned_however_old(servers: Servers, sign_in: Maker) -> None:
    upload = SlowUpload(sign_in(), servers.tls, "attachment", 600_000)
    upload.send(b"x" * 300_000)
    [file] = begun(servers, "attachment")
    age(file, 10 * 86400)
    assert prune(servers)[-1] == "unchanged uploads: no stale temporary files"
    assert prune(servers, "--dry-run")[-1] == "unchanged uploads: no stale temporary files"
    assert file.exists()
    upload.send(b"y" * 300_000)
    answer = upload.end()
    assert b" 201 " in answer.splitlines()[0]
    assert hashlib.sha256(b"x" * 300_000 + b"y" * 300_000).hexdigest().encode() in answer


def test_u1_an_upload_that_its_sender_breaks_off_leaves_nothing(servers: Servers, sign_in: Maker) -> None:
    upload = SlowUpload(sign_in(), servers.tls, "attachment", 600_000)
    upload.send(b"x" * 300_000)
    begun(servers, "attachment")
    upload.socket.close()
    wait_for("its file being gone", lambda: leftovers(servers) == [])


def test_u1_pruning_never_takes_a_file_that_was_just_made(servers: Servers) -> None:
    """With an age of nothing every file is stale, and only the lock keeps it."""
    assert servers.processes
    kind, over = f"race-{uuid.uuid4().hex[:8]}", threading.Event()

    def prune_on() -> int:
        removed = 0
        while not over.is_set():
            removed += temporary.prune(kind, -1).files
        return removed

    def make(_: int) -> bool:
        file = temporary.TemporaryUpload(kind, "x", None)
        file.append(b"x")
        there = file.path.exists() and file.path.stat().st_size == 1
        file.close()
        return there

    with ThreadPoolExecutor(8) as pool:
        pruning = [pool.submit(prune_on) for _ in range(2)]
        making = [pool.submit(make, number) for number in range(3000)]
        wait(making)
        over.set()
    assert all(one.result() for one in making)
    assert all(one.exception() is None for one in pruning)
    temporary.directory(kind).rmdir()


def test_u1_what_is_no_temporary_file_stays(servers: Servers) -> None:
    kind = f"other-{uuid.uuid4().hex[:8]}"
    home = temporary.directory(kind)
    (home / "directory").mkdir(parents=True)
    (servers.root / "precious").touch()
    age(servers.root / "precious", OLD)
    (home / "link").symlink_to(servers.root / "precious")
    assert temporary.prune(kind, -1) == temporary.Pruned()
    (home / "link").unlink()
    (home / "directory").rmdir()
    home.rmdir()


def test_u1_pruning_works_without_the_database_but_says_what_it_could_not_count(servers: Servers) -> None:
    home = temporary.directory("photo")
    home.mkdir(parents=True, exist_ok=True)
    (home / "left.part").write_bytes(b"12345")
    age(home / "left.part", OLD)
    nowhere = "postgresql://drydock@127.0.0.1:1/drydock"
    ended = servers.drydock("prune_uploads", DATABASE_PLUGINS_URL=nowhere)
    assert ended.returncode == 0
    assert ended.stdout.splitlines()[-1] == "changed uploads: removed 1 temporary file of 5 bytes"
    assert "did not take the count" in ended.stderr
