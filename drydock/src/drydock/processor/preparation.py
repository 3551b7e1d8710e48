"""What a processor needs of its host: directories that it may write to, and a certificate that fits and lasts."""

import os
import ssl
import subprocess
from pathlib import Path

from drydock import config
from drydock.config import Config, ConfigurationError

# Certificates are renewed weeks before this: something is wrong with that, and a restart is when somebody looks.
LASTS_SECONDS = 24 * 3600


def work_directory() -> Path:
    """Return where scripts write what they make."""
    return config.load().data_dir / "processor"


def prepare(settings: Config) -> list[str]:
    """Make the directories that are missing and return which; then check everything.

    A ConfigurationError says in one line which variable is wrong and how to set it.
    """
    made = []
    for variable, directory in (
        ("DRYDOCK_DATA_DIR", work_directory()),
        ("DRYDOCK_RUN_DIR", settings.run_dir / "jobs"),
    ):
        try:
            if not directory.is_dir():
                directory.mkdir(mode=0o750, parents=True)
                made.append(str(directory))
        except OSError as error:
            raise _wrong(variable, str(error)) from error
        if not os.access(directory, os.W_OK | os.X_OK):
            raise _wrong(variable, f"{directory} is not writable for this user")
    if settings.processor_certificate or settings.processor_key:
        _check_certificate(settings.processor_certificate, settings.processor_key)
    return made


def _check_certificate(certificate: str, key: str) -> None:
    for variable, path in (("PROCESSOR_CERTIFICATE", certificate), ("PROCESSOR_KEY", key)):
        if not os.access(path, os.R_OK):
            raise _wrong(variable, f"{path!r} is not a readable file")
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(certificate, key)
    except ssl.SSLError as error:
        raise _wrong("PROCESSOR_KEY", f"{key} does not fit {certificate}: {error.reason or error}") from error
    lasts = subprocess.run(  # noqa: S603
        ["/usr/bin/openssl", "x509", "-in", certificate, "-noout", "-checkend", str(LASTS_SECONDS)],
        stdout=subprocess.DEVNULL, check=False,
    )  # fmt: skip
    if lasts.returncode != 0:
        raise _wrong("PROCESSOR_CERTIFICATE", f"{certificate} has ended, or ends within a day: renew it")


def _wrong(variable: str, what: str) -> ConfigurationError:
    return ConfigurationError(f"drydock: {config.VARIABLES[variable].problem(f'is wrong ({what})')}")
