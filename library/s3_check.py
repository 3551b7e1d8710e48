#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Is the object storage usable from this host: reachable, trusted, with these keys, for writing, reading and deleting?"""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: s3_check
short_description: Check an S3 endpoint from a host - reachability, credentials, write, read and delete
description:
  - In each bucket, writes one small object C(.evenkeel-check-…), reads it back, deletes it, and sees that it is gone.
    Also after a failure nothing is left behind; where that is not possible, the message says what is left and where. In a
    bucket with versions the deleted version stays until the bucket's own rules remove it. Buckets are addressed by path.
  - Fails with a sentence that says what is wrong and what to correct. Tells apart a name that does not resolve, a silent
    host, a certificate that is not trusted, an unknown key, a wrong secret key, a clock that is wrong, a missing bucket,
    missing rights, and a storage that loses or changes what it took.
  - Debian's C(curl) speaks and signs (C(--aws-sigv4)); every host has it from role base. The keys reach it on its standard
    input only.
  - No connection within 5 seconds, or no answer within 10, is a failure.
options:
  url:
    description: The endpoint, C(https://host[:port]).
    type: str
    required: true
  buckets:
    description: Names of the buckets.
    type: list
    elements: str
    required: true
  access_key:
    description: Access key id.
    type: str
    required: true
  secret_key:
    description: Secret access key.
    type: str
    required: true
  ca_file:
    description: The CA certificates to trust, on the host.
    type: path
    default: /etc/ssl/certs/ca-certificates.crt
  region:
    description: Region that requests are signed for.
    type: str
    default: us-east-1
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: partial
    description: Only reads. That shows all but whether the keys may write and delete.
"""

EXAMPLES = r"""
- name: Check the object storage
  s3_check:
    url: https://s3.example.org
    buckets: [shop, shop-backups]
    access_key: "{{ secrets.object_storage_access_key }}"
    secret_key: "{{ secrets.object_storage_secret_key }}"
"""

RETURN = r"""
checked: {description: The buckets that are usable., type: list, returned: always, sample: [shop, shop-backups]}
seconds: {description: How long it took., type: float, returned: always}
"""

import hashlib
import os
import re
import secrets
import subprocess
import time
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import urlsplit

from ansible.module_utils.basic import AnsibleModule

CONNECT_SECONDS = 5
REQUEST_SECONDS = 10
# Not in a folder: a storage on a file system removes one with its last object, also while another host writes into it.
PREFIX = ".evenkeel-check-"
WRITE, READ, DELETE = "write to", "read from", "delete from"
# A key that may not list the bucket gets the second also for an object that is not there.
NO_OBJECT, NO_RIGHT = "NoSuchKey", "AccessDenied"


class CheckError(Exception):
    """The storage cannot be used; the text is for people."""


@dataclass(frozen=True)
class Answer:
    """What came back over HTTP."""

    status: int
    body: bytes
    clock: float | None  # seconds since the epoch, of the storage

    def element(self, name: str) -> str:
        """The text of an element of S3's error; empty when there is none."""
        found = re.search(rf"<{name}>([^<]*)</{name}>", self.body.decode(errors="replace"))
        return " ".join(found.group(1).split())[:200] if found else ""

    @property
    def code(self) -> str:
        """S3's word for the error; empty of a success, and of what S3 would not say."""
        return self.element("Code") if self.status >= 300 else ""


@dataclass(frozen=True)
class Storage:
    """An S3 endpoint, and the way to ask it."""

    url: str
    access_key: str
    secret_key: str
    ca_file: str
    region: str

    def ask(self, method: str, bucket: str, key: str, body: str = "") -> Answer:
        """Send a signed request for an object; CheckError when nothing came back."""
        settings = {
            "url": f"{self.url.rstrip('/')}/{bucket}/{key}",
            "user": f"{self.access_key}:{self.secret_key}",
            "header": f"x-amz-content-sha256: {hashlib.sha256(body.encode()).hexdigest()}",
            **({"data-binary": body} if body else {}),
        }
        command = ["curl", "--disable", "--silent", "--show-error", "--noproxy", "*", "--request", method, "--config", "-"]
        command += ["--connect-timeout", str(CONNECT_SECONDS), "--max-time", str(REQUEST_SECONDS)]
        command += ["--cacert", self.ca_file, "--capath", "/dev/null", "--aws-sigv4", f"aws:amz:{self.region}:s3"]
        command += ["--write-out", r"\n%{http_code} %header{date}"]
        config = "".join(f"{name} = {quoted(value)}\n" for name, value in settings.items())
        try:
            done = subprocess.run(command, input=config.encode(), capture_output=True, check=False)
        except FileNotFoundError as error:
            raise CheckError("This host has no curl, which role base installs: run playbooks/site.yml first") from error
        if done.returncode != 0:
            raise CheckError(self._unreached(done.returncode, done.stderr.decode(errors="replace")))
        content, _, last = done.stdout.rpartition(b"\n")
        status, _, date = last.decode().partition(" ")
        return Answer(int(status), content, seconds_of(date))

    def _unreached(self, code: int, words: str) -> str:
        first = (words.strip().splitlines() or [f"curl exit code {code}"])[0].removeprefix(f"curl: ({code}) ")
        way = "start it, open the way to it (firewall, route), or correct platform_s3_url"
        known = {
            6: f"The name {urlsplit(self.url).hostname} of the object storage does not resolve: correct platform_s3_url or the resolver",
            7: f"Nothing takes a connection at {self.url}, the object storage: {way}",
            28: f"The object storage {self.url} does not answer in time: {way}",
            60: f"The certificate of the object storage {self.url} is not trusted ({first}): it must be valid today, name this host name, "
            f"and be signed by a CA that stands in {self.ca_file}",
            77: f"The CA file {self.ca_file} cannot be read: run playbooks/site.yml, which writes it",
        }
        return known.get(code, f"The conversation with the object storage {self.url} fails ({first}): {way}")

    def refusal(self, answer: Answer, bucket: str, doing: str) -> str:
        """What it means that the storage did not do it."""
        key, storage = "access key id", f"The object storage {self.url}"
        known = {
            "InvalidAccessKeyId": f"{storage} does not know the {key}: correct secrets.object_storage_access_key",
            "SignatureDoesNotMatch": f"{storage} has another secret key for the {key}: correct secrets.object_storage_secret_key",
            NO_RIGHT: f"The {key} may not {doing} bucket {bucket}: give it that right at the object storage",
            "NoSuchBucket": f"{storage} has no bucket {bucket}: create it there, or correct its name in the inventory",
            "RequestTimeTooSkewed": f"{storage} refuses this host's time, which is {apart(answer.clock, time.time())}. "
            "On the host type: timedatectl; systemctl restart systemd-timesyncd",
        }
        if answer.code in known:
            return known[answer.code]
        said = ", ".join(filter(None, (f"status {answer.status}", answer.code, answer.element("Message"))))
        if answer.code or answer.status >= 500:
            return f"{storage} failed to {doing} bucket {bucket} ({said}): ask those who run it"
        return f"{storage} does not answer as S3 does ({said}, asked to {doing} bucket {bucket}): correct platform_s3_url"


def quoted(value: str) -> str:
    """A value in curl's configuration."""
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


def seconds_of(date: str) -> float | None:
    """The moment of an HTTP date, None when it is none."""
    try:
        return parsedate_to_datetime(date.strip()).timestamp()
    except (TypeError, ValueError):
        return None


def apart(theirs: float | None, ours: float) -> str:
    """How wrong this host's clock is, in words."""
    if theirs is None:
        return "too far from its own"
    return f"{abs(ours - theirs):.0f} s {'ahead of' if ours > theirs else 'behind'} its own"


def removal(storage: Storage, bucket: str, key: str, absent: str) -> list[str]:
    """Delete the object; what went wrong. absent: what the storage said before the object was written."""
    by_hand = f"delete {key} in bucket {bucket} by hand"
    try:
        deleted = storage.ask("DELETE", bucket, key)
        refused = "" if deleted.status < 300 or deleted.status == 404 else storage.refusal(deleted, bucket, DELETE)
        now = storage.ask("GET", bucket, key).code
    except CheckError as error:
        return [str(error), f"when it answers again, {by_hand}"]
    if now == absent and (now == NO_OBJECT or not refused):
        return [refused]
    return [refused or f"The object storage {storage.url} has confirmed a deletion in bucket {bucket} and has not done it", by_hand]


def reading_problem(storage: Storage, bucket: str, key: str, text: str) -> str:
    """Why the object cannot be read as it was written; empty when it can."""
    got = storage.ask("GET", bucket, key)
    if got.code == NO_OBJECT:
        return f"The object storage {storage.url} has lost what it took a moment ago for bucket {bucket}: ask those who run it"
    if got.status >= 300:
        return storage.refusal(got, bucket, READ)
    if got.body != text.encode():
        return f"The object storage {storage.url} gave back other content than it took for bucket {bucket}: ask those who run it"
    return ""


def bucket_problem(storage: Storage, bucket: str, key: str, *, read_only: bool) -> str:
    """Why the bucket cannot be used; empty when it can. key: of an object that does not exist."""
    text = f"written by evenkeel's s3_check as {key}"
    try:
        before = storage.ask("GET", bucket, key)
        if before.code not in (NO_OBJECT, NO_RIGHT):
            return storage.refusal(before, bucket, READ)
        if read_only:
            return ""
        try:
            put = storage.ask("PUT", bucket, key, text)
            if 300 <= put.status < 500:
                return storage.refusal(put, bucket, WRITE)
            problem = storage.refusal(put, bucket, WRITE) if put.status >= 500 else reading_problem(storage, bucket, key, text)
        except CheckError as error:
            problem = str(error)  # perhaps it was written all the same
        return "; ".join(dict.fromkeys(filter(None, [problem, *removal(storage, bucket, key, before.code)])))
    except CheckError as error:
        return str(error)


def input_problem(storage: Storage, buckets: list[str]) -> str:
    """What is wrong with the input, in one sentence; empty when nothing is."""
    if not re.fullmatch(r"https?://[A-Za-z0-9.\[\]:-]+/?", storage.url):
        return f"platform_s3_url is {storage.url!r}, and must be https://host or https://host:port"
    if not re.fullmatch(r"[!-9;-~]+", storage.access_key):
        return "secrets.object_storage_access_key is empty, or has a colon, a blank or another character that no access key id has"
    if not re.fullmatch(r"[!-~]+", storage.secret_key):
        return "secrets.object_storage_secret_key is empty, or has a blank or another character that no secret key has"
    wrong = [bucket for bucket in buckets if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}", bucket)]
    return f"{wrong[0]!r} is no name of a bucket: 3 to 63 letters, digits, dots and dashes" if wrong else ""


def main() -> None:
    """Check each bucket, tell all that is wrong."""
    module = AnsibleModule(
        argument_spec={
            "url": {"type": "str", "required": True},
            "buckets": {"type": "list", "elements": "str", "required": True},
            "access_key": {"type": "str", "required": True, "no_log": True},
            "secret_key": {"type": "str", "required": True, "no_log": True},
            "ca_file": {"type": "path", "default": "/etc/ssl/certs/ca-certificates.crt"},
            "region": {"type": "str", "default": "us-east-1"},
        },
        supports_check_mode=True,
    )
    given = module.params
    storage = Storage(**{name: given[name] for name in ("url", "access_key", "secret_key", "ca_file", "region")})
    problem = input_problem(storage, given["buckets"])
    if problem:
        module.fail_json(msg=problem)
    started = time.monotonic()
    key = f"{PREFIX}{re.sub(r'[^A-Za-z0-9.-]', '-', os.uname().nodename)}-{secrets.token_hex(8)}"
    problems = {bucket: bucket_problem(storage, bucket, key, read_only=module.check_mode) for bucket in given["buckets"]}
    result = {"checked": [bucket for bucket in problems if not problems[bucket]], "seconds": round(time.monotonic() - started, 2)}
    told = list(dict.fromkeys(filter(None, problems.values())))
    if told:
        module.fail_json(msg="; ".join(told), **result)
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
