#!/usr/bin/python
# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Host side of the `certificate` module."""

from __future__ import annotations

DOCUMENTATION = r"""
---
module: certificate
short_description: Keep a host's certificate from the suite's internal CA valid
description:
  - The CA lives on the controller (O(ca_dir)) and is made on first use. The host makes its own key and a request; the
    controller signs; the key never leaves the host.
  - In the steady state this is one remote call. It checks with the C(openssl) of the host that the certificate is of
    this CA, has exactly the wanted names and both extended key usages, lasts for longer than O(renew_before_days), and
    belongs to the key.
  - A key that is sound is kept when the certificate is renewed, so that a renewal replaces one file in one atomic step.
    For a new key remove the old one and run again.
  - What the certificate says comes from the task, never from the host's request.
options:
  ca_dir:
    description: Directory of the CA on the controller, C(ca.key) (0600) and C(ca.crt). Whoever reads C(ca.key) can pose
      as every host.
    type: path
    required: true
  ca_common_name:
    description: Name of a CA that is made now.
    type: str
    default: Evenkeel internal CA
  ca_days:
    description: Days that a CA lasts which is made now.
    type: int
    default: 3650
  names:
    description: DNS names and IP addresses of the host, the subject alternative names. The first is the common name, too.
    type: list
    elements: str
    required: true
  days:
    description: Days that a new certificate lasts. Never longer than the CA.
    type: int
    default: 825
  renew_before_days:
    description: A certificate that expires within so many days is renewed.
    type: int
    default: 60
  directory:
    description: Directory on the host for C(ca.crt), C(host.crt) (0644) and C(host.key) (0640).
    type: path
    default: /etc/evenkeel/pki
  group:
    description: Group that may read the key.
    type: str
    default: ssl-cert
author:
  - Evenkeel contributors (@evenkeel)
attributes:
  check_mode:
    support: full
    description: Says what would be renewed and why. Makes neither a CA nor a key.
  diff_mode:
    support: full
    description: The reasons before, the names and the expiry after. Never a key.
"""

EXAMPLES = r"""
- name: Keep the host's certificate valid
  certificate:
    ca_dir: /home/operator/.local/state/evenkeel/inventories/demo/pki
    names: [db1, 10.0.0.5, localhost, 127.0.0.1]
"""

RETURN = r"""
changed_files:
  description: The files that were changed or, in check mode, would be.
  returned: always
  type: list
  elements: str
  sample: [/etc/evenkeel/pki/host.crt]
reasons:
  description: Why the certificate was or would be renewed. Empty in the steady state.
  returned: always
  type: list
  elements: str
  sample: [it expires within 60 days]
"""

import ipaddress
import os
import re
import shutil
import subprocess
import tempfile
from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.evenkeel_host import (
    Attributes,
    gid_of,
    make_directory,
    set_attributes,
    sweep,
    write_file,
)

ARGUMENT_SPEC: dict[str, dict[str, Any]] = {
    "action": {"type": "str", "choices": ["check", "install"], "required": True},
    "ca": {"type": "str", "default": ""},
    "certificate": {"type": "str", "default": ""},
    "names": {"type": "list", "elements": "str", "required": True},
    "renew_before_days": {"type": "int", "required": True},
    "directory": {"type": "path", "required": True},
    "group": {"type": "str", "required": True},
}
WANTED_USAGES = ("TLS Web Server Authentication", "TLS Web Client Authentication")
DAY_SECONDS = 86400


class CertificateError(Exception):
    """Something that this host cannot do; the text is for people."""


def canonical(name: str) -> str:
    """Return a name in the one form in which names are compared."""
    try:
        return str(ipaddress.ip_address(name))
    except ValueError:
        return name.lower().rstrip(".")


def parse_names(text: str) -> set[str]:
    """Return the subject alternative names in what `openssl x509 -ext subjectAltName` prints."""
    found = re.findall(r"(?:DNS|IP Address):([^,\s]+)", text)
    return {canonical(name) for name in found}


def openssl(*arguments: str, data: str = "") -> subprocess.CompletedProcess[str]:
    """Run openssl with a fixed language and its input from memory, never from the command line."""
    return subprocess.run(
        ["openssl", *arguments],
        input=data,
        capture_output=True,
        text=True,
        env={"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "LC_ALL": "C", "OPENSSL_CONF": "/dev/null"},
        check=False,
        timeout=30,
    )


def read(path: str) -> str:
    """Return a file's text, empty when there is none."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def public_key(key: str) -> str:
    """Return the public half of a private key, empty when it is no usable P-256 key."""
    answer = openssl("pkey", "-pubout", data=key) if key else None
    if answer is None or answer.returncode:
        return ""
    kind = openssl("pkey", "-pubin", "-noout", "-text", data=answer.stdout)
    return answer.stdout if "prime256v1" in kind.stdout else ""


def faults(ca: str, certificate: str, key: str, names: set[str], renew_before_days: int) -> list[str]:
    """Say why a certificate is not good enough. An empty list means that it is."""
    if not certificate:
        return ["there is no certificate yet"]
    own = openssl("x509", "-noout", "-pubkey", data=certificate)
    if own.returncode:
        return ["the certificate cannot be read"]
    found: list[str] = []
    if not key:
        found.append("the key is missing")
    elif public_key(key) != own.stdout:
        found.append("the certificate and the key do not belong together")
    with tempfile.NamedTemporaryFile("w", suffix=".crt") as authority:
        authority.write(ca)
        authority.flush()
        trust = ("-CAfile", authority.name, "-no-CApath", "-no-CAstore", "-no_check_time")
        if openssl("verify", *trust, data=certificate).returncode:
            found.append("it is not of this CA")
    if openssl("x509", "-noout", "-checkend", str(renew_before_days * DAY_SECONDS), data=certificate).returncode:
        found.append(f"it expires within {renew_before_days} days")
    said = openssl("x509", "-noout", "-ext", "subjectAltName,extendedKeyUsage", data=certificate).stdout
    present = parse_names(said)
    if present != names:
        lost, extra = sorted(names - present), sorted(present - names)
        found.append("; ".join([f"it lacks {', '.join(lost)}"] * bool(lost) + [f"it has {', '.join(extra)} too many"] * bool(extra)))
    found += [f"it is not for {usage}" for usage in WANTED_USAGES if usage not in said]
    return found


class Host:
    """The three files on this host."""

    def __init__(self, directory: str, group: str) -> None:
        self.directory = directory
        self.group = group
        self.ca = os.path.join(directory, "ca.crt")
        self.certificate = os.path.join(directory, "host.crt")
        self.key = os.path.join(directory, "host.key")

    def attributes(self) -> dict[str, Attributes]:
        """Return what each file shall have."""
        gid = gid_of(self.group)
        if gid is None:
            raise CertificateError(f"this host has no group {self.group!r}: install the package ssl-cert, or name another group")
        public = Attributes(0, 0, 0o644)
        return {self.ca: public, self.certificate: public, self.key: Attributes(0, gid, 0o640)}

    def write(self, path: str, text: str) -> None:
        """Replace one of the files atomically, with its final owner and mode from the first moment."""
        write_file(path, text.encode(), self.attributes()[path])

    def prepare(self) -> None:
        """Make the directory and remove what an interrupted run left."""
        if not os.path.isdir(self.directory):
            make_directory(self.directory, Attributes(0, 0, 0o755))
        sweep([self.directory])

    def request(self) -> str:
        """Return a request that is signed by the host's key; make the key when there is no sound one."""
        key = read(self.key)
        if not public_key(key):
            made = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
            if made.returncode:
                raise CertificateError(f"openssl could not make a key: {made.stderr.strip()}")
            key = made.stdout
            self.write(self.key, key)
        # The key goes through a pipe of this process: it is on no command line and in no second file.
        reading, writing = os.pipe()
        try:
            os.write(writing, key.encode())
            os.close(writing)
            made = subprocess.run(
                ["openssl", "req", "-new", "-sha256", "-subj", "/CN=request", "-key", f"/dev/fd/{reading}"],
                pass_fds=[reading],
                capture_output=True,
                text=True,
                check=False,
                timeout=30,
            )
        finally:
            os.close(reading)
        if made.returncode:
            raise CertificateError(f"openssl could not make a request: {made.stderr.strip()}")
        return made.stdout


def check(module: AnsibleModule, host: Host, names: set[str]) -> dict[str, Any]:
    """Look at what there is. Outside check mode set owners right and prepare a request if one is needed."""
    ca: str = module.params["ca"]
    key = read(host.key)
    if shutil.which("openssl") is None:
        if not module.check_mode:
            raise CertificateError("this host has no openssl: install the package openssl")
        reasons = ["openssl is not installed yet"]
    elif not ca:
        reasons = ["there is no CA yet"]
    else:
        reasons = faults(ca, read(host.certificate), key, names, module.params["renew_before_days"])
    changed_files: list[str] = []
    if read(host.ca) != ca or not ca:
        changed_files.append(host.ca)
    if reasons:
        changed_files.append(host.certificate)
        if "not installed" in reasons[0] or not public_key(key):
            changed_files.append(host.key)
    result: dict[str, Any] = {"reasons": reasons}
    if module.check_mode:
        changed_files += [path for path in wrong_attributes(host) if path not in changed_files]
    else:
        host.prepare()
        for path, wanted in host.attributes().items():
            if os.path.exists(path) and set_attributes(path, wanted) and path not in changed_files:
                changed_files.append(path)
        if reasons:
            result["request"] = host.request()
        elif host.ca in changed_files:
            host.write(host.ca, ca)
    return {**result, "changed": bool(changed_files), "changed_files": changed_files}


def wrong_attributes(host: Host) -> list[str]:
    """Return the files whose owner, group or mode would be changed."""
    if gid_of(host.group) is None:
        return []
    found: list[str] = []
    for path, wanted in host.attributes().items():
        if os.path.exists(path):
            seen = os.stat(path)
            if Attributes(seen.st_uid, seen.st_gid, seen.st_mode & 0o7777) != wanted:
                found.append(path)
    return found


def install(module: AnsibleModule, host: Host, names: set[str]) -> dict[str, Any]:
    """Put the CA and the new certificate in their places, after making sure that they fit this host's key."""
    ca, certificate = module.params["ca"], module.params["certificate"]
    wrong = faults(ca, certificate, read(host.key), names, 0)
    if wrong:
        raise CertificateError(
            f"the controller sent a certificate that this host cannot use: {'; '.join(wrong)}. Nothing was installed. "
            "Compare the clocks of the controller and of this host, then run again."
        )
    if read(host.ca) != ca:
        host.write(host.ca, ca)
    host.write(host.certificate, certificate)
    return {"changed": True}


def main() -> None:
    """Run one of the two halves of the exchange with the controller."""
    module = AnsibleModule(argument_spec=ARGUMENT_SPEC, supports_check_mode=True)
    host = Host(module.params["directory"], module.params["group"])
    names = {canonical(name) for name in module.params["names"]}
    try:
        step = check if module.params["action"] == "check" else install
        module.exit_json(**step(module, host, names))
    except (CertificateError, OSError, subprocess.TimeoutExpired) as error:
        module.fail_json(msg=str(error))


if __name__ == "__main__":
    main()
