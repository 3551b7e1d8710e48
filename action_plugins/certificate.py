# Copyright: Evenkeel contributors
# SPDX-License-Identifier: Apache-2.0
"""Controller side of the `certificate` module: the internal CA, and the exchange of request and certificate."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import ipaddress
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ansible.module_utils
from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_UTILS = str(Path(__file__).resolve().parent.parent / "module_utils")
if _UTILS not in ansible.module_utils.__path__:  # found from a role or a unit test, too
    ansible.module_utils.__path__.append(_UTILS)

DEFAULTS: dict[str, Any] = {
    "ca_common_name": "Evenkeel internal CA",
    "ca_days": 3650,
    "days": 825,
    "renew_before_days": 60,
    "directory": "/etc/evenkeel/pki",
    "group": "ssl-cert",
}
REQUIRED = ("ca_dir", "names")
CLOCK_TOLERANCE = datetime.timedelta(hours=1)
LONGEST_COMMON_NAME = 64


class CaError(Exception):
    """A CA that cannot be used; the text is for people."""


@dataclass(frozen=True)
class Authority:
    """The CA: its key and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @property
    def pem(self) -> str:
        """The certificate as text."""
        return self.certificate.public_bytes(serialization.Encoding.PEM).decode()


def load_authority(directory: Path) -> Authority | None:
    """Return the CA in a directory, None when there is none yet."""
    key_path, certificate_path = directory / "ca.key", directory / "ca.crt"
    try:
        key_data = key_path.read_bytes() if key_path.exists() else None
        certificate_data = certificate_path.read_bytes() if certificate_path.exists() else None
    except OSError as error:
        raise CaError(f"the CA in {directory} cannot be read ({error.strerror}: {error.filename}). Run as the user who owns it.") from None
    if key_data is None and certificate_data is None:
        return None
    if key_data is None:
        raise CaError(
            f"{directory} holds ca.crt but not ca.key, so nothing can be signed. Restore ca.key from its backup; or, to "
            "give every host a certificate of a new CA, move ca.crt away and run again."
        )
    try:
        key = serialization.load_pem_private_key(key_data, password=None)
    except (ValueError, TypeError):
        raise CaError(f"{key_path} is not a readable private key. Restore it from its backup.") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CaError(f"{key_path} is not an elliptic curve key. Restore the key that was made for this CA.")
    if certificate_data is None:
        raise CaError(
            f"{directory} holds ca.key but not ca.crt. Restore ca.crt from its backup (each host has a copy, "
            "/etc/evenkeel/pki/ca.crt); or, for a new CA, move ca.key away and run again."
        )
    try:
        certificate = x509.load_pem_x509_certificate(certificate_data)
    except ValueError:
        raise CaError(f"{certificate_path} is not a readable certificate. Restore it from its backup.") from None
    if certificate.public_key() != key.public_key():
        raise CaError(
            f"ca.key and ca.crt in {directory} do not belong together. Restore both from the same backup; or, for a new "
            "CA, move both away and run again."
        )
    mode = key_path.stat().st_mode & 0o777
    if mode & 0o077:
        raise CaError(
            f"{key_path} may be read by others (mode {mode:04o}): whoever has it can pose as every host. Type: chmod 0600 {key_path}"
        )
    return Authority(key, certificate)


def make_authority(directory: Path, common_name: str, days: int) -> Authority:
    """Make a CA and store it. Each file is complete when it appears; a marker stays until both have."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:LONGEST_COMMON_NAME])])
    usage = x509.KeyUsage(
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=True,
        crl_sign=True,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    authority = Authority(key, certificate)
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    # The caller holds the lock, so a CA that still has its marker has signed nothing, and `usable` may start over.
    marker = directory / "ca.incomplete"
    _write(marker, b"This CA was not finished and has signed nothing. The next run replaces it.\n", 0o600)
    _write(directory / "ca.key", private, 0o600)
    _write(directory / "ca.crt", authority.pem.encode(), 0o644)
    marker.unlink()
    return authority


def usable(directory: Path, common_name: str, days: int, *, check_mode: bool) -> Authority | None:
    """Return the CA, made on first use. Safe when several processes ask at once. None: check mode and none there."""
    if check_mode:
        return None if (directory / "ca.incomplete").exists() else load_authority(directory)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory / ".lock"):
            if (directory / "ca.incomplete").exists():
                return make_authority(directory, common_name, days)
            return load_authority(directory) or make_authority(directory, common_name, days)
    except OSError as error:
        raise CaError(
            f"the CA directory {directory} on the controller cannot be used ({error.strerror}: {error.filename}). "
            "Give pki_ca_dir a directory that the user who runs the playbook may write."
        ) from None


def sign(authority: Authority, request: str, names: Sequence[str], days: int, renew_before_days: int) -> str:
    """Return a certificate for the key of a request. Names and usages are the controller's, not the request's."""
    try:
        asked = x509.load_pem_x509_csr(request.encode())
    except ValueError:
        raise CaError("the host sent a request that cannot be read") from None
    try:
        sound = asked.is_signature_valid
    except InvalidSignature:
        sound = False
    key = asked.public_key()
    if not sound or not isinstance(key, ec.EllipticCurvePublicKey):
        raise CaError("the host sent a request that is not signed by an elliptic curve key of its own")
    now = datetime.datetime.now(datetime.UTC)
    end = min(now + datetime.timedelta(days=days), authority.certificate.not_valid_after_utc)
    if end <= now + datetime.timedelta(days=renew_before_days):
        raise CaError(
            f"a certificate of {days} days from a CA that ends on {authority.certificate.not_valid_after_utc:%Y-%m-%d} "
            f"would have to be renewed at once, because renewal starts {renew_before_days} days before the end. "
            "Lower pki_renew_before_days, or make a new CA: move ca.key and ca.crt away and run again."
        )
    usage = x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
    common = next((name for name in names if len(name) <= LONGEST_COMMON_NAME), "host")
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)]))
        .issuer_name(authority.certificate.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_TOLERANCE)
        .not_valid_after(end)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([general_name(name) for name in names]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key()), critical=False)
        .sign(authority.key, hashes.SHA256())
    )
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def general_name(name: str) -> x509.GeneralName:
    """Return an address as an address and anything else as a DNS name."""
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    try:
        return x509.DNSName(name)
    except ValueError:
        raise CaError(f"{name!r} is neither an IP address nor a DNS name in ASCII") from None


def distinct(names: Sequence[str]) -> list[str]:
    """Return names in the one form that both sides compare, each once, in the given order."""
    found: dict[str, None] = {}
    for name in names:
        try:
            found[str(ipaddress.ip_address(name))] = None
        except ValueError:
            found[name.lower().rstrip(".")] = None
    return list(found)


def problems_of(args: dict[str, Any]) -> list[str]:
    """Say what is wrong with the arguments of a task."""
    known = (*REQUIRED, *DEFAULTS)
    found = [f"unknown option {key!r}; known are {', '.join(known)}" for key in args if key not in known]
    found += [f"needs {key}" for key in REQUIRED if not args.get(key)]
    for key in ("ca_days", "days", "renew_before_days"):
        value = args.get(key, DEFAULTS[key])
        if not str(value).isdecimal() or int(value) < 1:
            found.append(f"{key} must be a number of days, not {value!r}")
    if args.get("ca_dir") and not str(args["ca_dir"]).startswith(("/", "~")):
        found.append(f"ca_dir must be an absolute path, not {args['ca_dir']!r}")
    names = args.get("names")
    if names and (not isinstance(names, list) or not all(isinstance(name, str) and name for name in names)):
        found.append("names must be a list of texts, none of them empty")
    return found


class ActionModule(ActionBase):  # type: ignore[misc]
    """Check the host's certificate in one remote call; renew it in a second one only when it must be."""

    TRANSFERS_FILES = False
    _supports_check_mode = True
    _supports_async = False

    def run(self, tmp: Any = None, task_vars: dict[str, Any] | None = None) -> dict[str, Any]:
        """Check, and if needed sign and install."""
        result: dict[str, Any] = super().run(tmp, task_vars)
        problems = problems_of(self._task.args)
        if problems:
            raise AnsibleActionFail("the task is wrong: " + "; ".join(problems))
        args = {**DEFAULTS, **self._task.args}
        days, renew_before_days = int(args["days"]), int(args["renew_before_days"])
        names = distinct(args["names"])
        check_mode = bool(self._task.check_mode)
        try:
            authority = usable(Path(args["ca_dir"]).expanduser(), args["ca_common_name"], int(args["ca_days"]), check_mode=check_mode)
            sent = {
                "names": names,
                "renew_before_days": renew_before_days,
                "directory": args["directory"],
                "group": args["group"],
                "ca": authority.pem if authority else "",
            }
            seen = self._call("check", sent, task_vars)
            request = seen.pop("request", "")
            result.update(seen)
            if seen.get("failed"):
                return result
            if authority and request:
                certificate = sign(authority, request, names, days, renew_before_days)
                done = self._call("install", {**sent, "certificate": certificate}, task_vars)
                result["changed"] = True
                if done.get("failed"):
                    result.update(failed=True, msg=done.get("msg", "the certificate could not be installed"))
        except CaError as error:
            raise AnsibleActionFail(str(error)) from None
        if self._task.diff and result.get("changed"):
            result["diff"] = {
                "before_header": args["directory"],
                "after_header": args["directory"],
                "before": "".join(f"{reason}\n" for reason in result.get("reasons", [])),
                "after": f"names {', '.join(names)}\n" + "".join(f"{path}\n" for path in result["changed_files"]),
            }
        return result

    def _call(self, action: str, sent: dict[str, Any], task_vars: dict[str, Any] | None) -> dict[str, Any]:
        answer: dict[str, Any] = self._execute_module("certificate", module_args={**sent, "action": action}, task_vars=task_vars)
        answer.pop("invocation", None)
        return answer


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Put a complete file in its place in one step, on the disk."""
    staged = path.with_name(f".{path.name}.{secrets.token_hex(6)}")
    descriptor = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
