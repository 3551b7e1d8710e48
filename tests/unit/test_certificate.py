"""The internal CA and the checks on a host's certificate."""

from __future__ import annotations

import datetime
import importlib.util
import shutil
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

import ansible.module_utils
import pytest
from cryptography import x509

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["db1", "10.0.0.5", "localhost", "127.0.0.1"]


def load(path: Path) -> ModuleType:
    if str(ROOT / "module_utils") not in ansible.module_utils.__path__:
        ansible.module_utils.__path__.append(str(ROOT / "module_utils"))
    spec = importlib.util.spec_from_file_location(f"certificate_{path.parent.name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


action = load(ROOT / "action_plugins" / "certificate.py")
host = load(ROOT / "library" / "certificate.py")


def openssl(*arguments: str, data: str = "") -> str:
    return subprocess.run(["openssl", *arguments], input=data, capture_output=True, text=True, check=True).stdout


def key_and_request(directory: Path) -> tuple[str, str]:
    key = openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    path = directory / "test.key"
    path.write_text(key)
    return key, openssl("req", "-new", "-subj", "/CN=evil", "-addext", "subjectAltName=DNS:evil", "-key", str(path))


def make_ca(directory: Path, days: int = 3650) -> object:
    return action.usable(directory, "test CA", days, check_mode=False)


def serial_of_ca(directory: Path) -> int:
    certificate = make_ca(directory).certificate  # type: ignore[attr-defined]
    return int(certificate.serial_number)


def test_ca_is_made_once_and_private(tmp_path: Path) -> None:
    first = make_ca(tmp_path / "deep" / "ca")
    second = make_ca(tmp_path / "deep" / "ca")
    assert first.pem == second.pem  # type: ignore[attr-defined]
    assert (tmp_path / "deep" / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in (tmp_path / "deep" / "ca").iterdir()) == [".lock", "ca.crt", "ca.key"]


def test_forks_get_one_ca(tmp_path: Path) -> None:
    with ProcessPoolExecutor(8) as pool:
        serials = set(pool.map(serial_of_ca, [tmp_path / "ca"] * 16))
    assert len(serials) == 1


def test_check_mode_makes_nothing(tmp_path: Path) -> None:
    assert action.usable(tmp_path / "ca", "test CA", 10, check_mode=True) is None
    assert not (tmp_path / "ca").exists()


def test_interrupted_creation_starts_over(tmp_path: Path) -> None:
    (tmp_path / "ca.incomplete").write_text("")
    (tmp_path / "ca.key").write_text("half")
    assert make_ca(tmp_path) is not None
    assert not (tmp_path / "ca.incomplete").exists()


def test_pair_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    make_ca(tmp_path / "one")
    make_ca(tmp_path / "two")
    shutil.copy(tmp_path / "two" / "ca.key", tmp_path / "one" / "ca.key")
    with pytest.raises(action.CaError, match="do not belong together"):
        make_ca(tmp_path / "one")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ca.key", None, "holds ca.crt but not ca.key"),
        ("ca.crt", None, "holds ca.key but not ca.crt"),
        ("ca.key", "nonsense", "not a readable private key"),
        ("ca.crt", "nonsense", "not a readable certificate"),
    ],
)
def test_damaged_ca_says_what_to_do(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    make_ca(tmp_path)
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(action.CaError, match=message):
        make_ca(tmp_path)


def test_key_that_others_may_read_is_refused(tmp_path: Path) -> None:
    make_ca(tmp_path)
    (tmp_path / "ca.key").chmod(0o644)
    with pytest.raises(action.CaError, match="chmod 0600"):
        make_ca(tmp_path)


def test_signed_certificate_is_good_and_says_only_what_the_controller_says(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    key, request = key_and_request(tmp_path)
    pem = action.sign(ca, request, NAMES, 825, 60)
    assert host.faults(ca.pem, pem, key, set(NAMES), 60) == []  # type: ignore[attr-defined]
    certificate = x509.load_pem_x509_certificate(pem.encode())
    assert "evil" not in certificate.subject.rfc4514_string()
    left = certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 824 <= left.days <= 825


def test_each_fault_is_named(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    other = make_ca(tmp_path / "other")
    key, request = key_and_request(tmp_path)
    stranger, _ = key_and_request(tmp_path)
    pem = action.sign(ca, request, NAMES, 90, 60)
    good, wanted = ca.pem, set(NAMES)  # type: ignore[attr-defined]
    assert host.faults(good, "", key, wanted, 60) == ["there is no certificate yet"]
    assert host.faults(good, "nonsense", key, wanted, 60) == ["the certificate cannot be read"]
    assert host.faults(good, pem, "", wanted, 60) == ["the key is missing"]
    assert host.faults(good, pem, stranger, wanted, 60) == ["the certificate and the key do not belong together"]
    assert host.faults(other.pem, pem, key, wanted, 60) == ["it is not of this CA"]  # type: ignore[attr-defined]
    assert host.faults(good, pem, key, wanted, 91) == ["it expires within 91 days"]
    assert host.faults(good, pem, key, {*wanted, "db1.example"}, 60) == ["it lacks db1.example"]
    assert host.faults(good, pem, key, wanted - {"db1"}, 60) == ["it has db1 too many"]


def test_certificate_never_outlives_its_ca_nor_renews_for_ever(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca", days=100)
    _, request = key_and_request(tmp_path)
    pem = action.sign(ca, request, NAMES, 825, 60)
    assert x509.load_pem_x509_certificate(pem.encode()).not_valid_after_utc == ca.certificate.not_valid_after_utc  # type: ignore[attr-defined]
    with pytest.raises(action.CaError, match="would have to be renewed at once"):
        action.sign(ca, request, NAMES, 825, 100)


def test_forged_request_is_refused(tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    with pytest.raises(action.CaError, match="cannot be read"):
        action.sign(ca, "nonsense", NAMES, 825, 60)
    rsa = openssl("genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048")
    (tmp_path / "rsa.key").write_text(rsa)
    request = openssl("req", "-new", "-subj", "/CN=x", "-key", str(tmp_path / "rsa.key"))
    with pytest.raises(action.CaError, match="elliptic curve"):
        action.sign(ca, request, NAMES, 825, 60)


def test_names_are_compared_in_one_form() -> None:
    said = "X509v3 Subject Alternative Name: \n    DNS:Db1, IP Address:127.0.0.1, IP Address:0:0:0:0:0:0:0:1\n"
    assert host.parse_names(said) == {"db1", "127.0.0.1", "::1"}
    assert action.distinct(["DB1", "db1", "::1", "0:0:0:0:0:0:0:1", "127.0.0.1"]) == ["db1", "::1", "127.0.0.1"]
    assert {host.canonical(name) for name in action.distinct(NAMES)} == set(NAMES)


def test_arguments_are_checked() -> None:
    assert action.problems_of({"ca_dir": "/x", "names": ["a"]}) == []
    problems = action.problems_of({"ca_dir": "x", "names": ["a", ""], "days": "many", "nmaes": 1})
    assert len(problems) == 4
    assert action.problems_of({}) == ["needs ca_dir", "needs names"]
