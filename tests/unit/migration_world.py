"""A private PostgreSQL and tiny Django applications on it, on which playbooks/files/django_migrations.py is run as on a host."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "playbooks/files/django_migrations.py"
PYTHON = ROOT / ".cache/application/bin/python"
POSTGRESQL = Path("/usr/lib/postgresql/15/bin")
SETTINGS = """
import os
SECRET_KEY = "x"
USE_TZ = True
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
INSTALLED_APPS = os.environ["APPS"].split()
def database(name):
    return {"ENGINE": "primaries", "HOST": os.environ["SERVER"], "USER": "shop", "NAME": name}
NAME = os.environ["NAME"]
DATABASES = {"core": database(NAME), "default": database(NAME), "plugins": database(NAME + "_plugins")}
DATABASE_ROUTERS = ["project.Router"]
class Router:
    def allow_migrate(self, db, app_label, **hints):
        return db != "plugins" or app_label != "shop"
"""
# As an application has it that must not keep a connection to a primary that has become a standby.
BACKEND = """
from django.db.backends.postgresql import base
class DatabaseWrapper(base.DatabaseWrapper):
    def is_usable(self):
        with self.cursor() as cursor:
            cursor.execute("SHOW transaction_read_only")
            return super().is_usable() and cursor.fetchone() == ("off",)
"""
HEAD = "from django.db import migrations, models\nfrom django.db.migrations import *\n"


@contextmanager
def cluster() -> Iterator[Path]:
    """A PostgreSQL that is reached by the socket in this folder, by anybody as anybody."""
    folder = Path(tempfile.mkdtemp(prefix="evenkeel-migrations-"))
    folder.chmod(0o777)
    become: dict[str, Any] = {}
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        account = pwd.getpwnam("postgres")
        become = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    data = folder / "data"
    initdb = [f"{POSTGRESQL}/initdb", "--no-sync", "--username=super", "--auth=trust", "--encoding=UTF8", "--locale=C.UTF-8", str(data)]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/", **become)
    settings = ["listen_addresses=", f"unix_socket_directories={folder}", "fsync=off", "max_connections=40"]
    command = [f"{POSTGRESQL}/postgres", "-D", str(data), *(word for each in settings for word in ("-c", each))]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd="/", stdout=log, stderr=log, **become)
    try:
        ready = [f"{POSTGRESQL}/pg_isready", "-q", "-h", str(folder), "-t", "30"]
        while subprocess.run(ready, check=False).returncode:
            assert server.poll() is None, (folder / "log").read_text()
        with psycopg.connect(host=str(folder), user="super", dbname="postgres", autocommit=True) as session:
            session.execute("CREATE ROLE shop LOGIN")
        yield folder
    finally:
        server.send_signal(signal.SIGQUIT)
        server.wait()
        shutil.rmtree(folder)


@dataclass
class World:
    """A Django project whose applications are migrations in files, and its database, or its two."""

    folder: Path
    server: Path
    name: str
    apps: tuple[str, ...] = ("shop",)
    template: str = "template1"

    def __post_init__(self) -> None:
        (self.folder / "project.py").write_text(SETTINGS)
        (self.folder / "primaries").mkdir()
        (self.folder / "primaries/base.py").write_text(BACKEND)
        for app in (app for app in self.apps if "." not in app):
            self.migrations(app).mkdir(parents=True)
            (self.folder / app / "models.py").touch()
            for each in (self.folder / app, self.migrations(app)):
                (each / "__init__.py").touch()
        with self.session("postgres", "super") as session:
            session.execute(f"CREATE DATABASE {self.name} OWNER shop TEMPLATE {self.template}")
            if len(self.apps) == 3:
                session.execute(f"CREATE DATABASE {self.name}_plugins OWNER shop")

    def migrations(self, app: str = "shop") -> Path:
        """The folder of an application's migrations."""
        return self.folder / app / "migrations"

    def migration(self, name: str, operations: str, after: str | None = None, more: str = "", app: str = "shop", needs: str = "") -> None:
        """Write one; `after`: the one before it, `more`: Python above its class, `needs`: one of the shop's that comes first, too."""
        depends = ([(app, after)] if after else []) + ([("shop", needs)] if needs else [])
        body = textwrap.dedent(more)
        text = f"{HEAD}{body}\nclass Migration(migrations.Migration):\n    dependencies = {depends}\n    operations = [{operations}]\n"
        (self.migrations(app) / f"{name}.py").write_text(text)

    def session(self, name: str | None = None, user: str = "shop", **options: Any) -> psycopg.Connection[Any]:
        """A session on one of the databases."""
        return psycopg.connect(host=str(self.server), user=user, dbname=name or self.name, **{"autocommit": True, **options})

    def rows(self, sql: str) -> list[Any]:
        """What a query finds."""
        with self.session() as session:
            return session.execute(sql).fetchall()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Begin the program."""
        environment = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": str(self.folder),
            "PYTHONDONTWRITEBYTECODE": "1",
            "DJANGO_SETTINGS_MODULE": "project",
            "SERVER": str(self.server),
            "NAME": self.name,
            "APPS": " ".join(self.apps),
        }
        with PROGRAM.open() as program:
            return subprocess.Popen(
                [str(PYTHON), "-", *arguments],
                stdin=program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=self.folder,
            )  # fmt: skip

    def run(self, *arguments: str, code: int = 0) -> tuple[dict[str, Any], str]:
        """Run the program: its JSON (empty when it printed none), and what it told people."""
        with self.start(*arguments) as process:
            out, err = process.communicate(timeout=60)
        assert process.returncode == code, out + err
        return (json.loads(out.splitlines()[-1]) if out.strip() else {}), err

    def plan(self) -> dict[str, Any]:
        """What is pending on core."""
        return self.run("plan", "core")[0]
