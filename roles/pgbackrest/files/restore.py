#!/usr/bin/python3 -IS
"""The steps of a restore in place on a database host, for playbooks/restore.yml: restore.py STEP CLUSTER, the plan on standard input.

look    what this member is, and bring the archive up to date
stop    stop this member; a note beside its data keeps it from being started
run     on one member: put the old data aside, restore, recover, and verify that the target was reached
free    there too: forget what etcd knows of the cluster, and allow the member to be started
clear   on the others: remove the data, and allow the member to be started, which then copies the restored one
back    give the restore up before `free`: the old data return

Every step may be asked for again: what was done is in the note, and is not done twice.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

SETTINGS = Path("/etc/evenkeel/backup-member.json")
SPARE_BYTES = 1024**3
STOP_SECONDS = 180
ARCHIVE_SECONDS = 60
FORK_SECONDS = 30
START_SECONDS = 24 * 3600
RECOVERY_SETTINGS = ("restore_command", "recovery_target", "recovery_target_time", "recovery_target_name", "recovery_target_action",
                     "recovery_target_timeline", "recovery_target_inclusive")  # fmt: skip
LAST_COMMIT = """
CASE WHEN pg_is_in_recovery() OR current_setting('track_commit_timestamp') = 'off' THEN ''
  ELSE coalesce((pg_last_committed_xact()).timestamp::text, '') END
"""
LOOK = f"SELECT system_identifier, pg_is_in_recovery()::int, {LAST_COMMIT} FROM pg_control_system()"
# An empty transaction, so that recovery finds a commit after any time until now; when it has ended, its segment goes to the archive.
MARK = "SELECT pg_current_xact_id()"
SWITCH = "SELECT pg_walfile_name(pg_switch_wal())"
WAITING = "SELECT count(*) FROM pg_ls_archive_statusdir() WHERE name = '{wal}.ready'"


class RestoreError(Exception):
    """Something that people must put right; the text is for them."""


def run(*argv: str, seconds: float | None = None, postgres: bool = True) -> str:
    """Run a program, as postgres unless told otherwise; return what it printed."""
    command = ["runuser", "-u", "postgres", "--", *argv] if postgres else list(argv)
    try:
        environment = {**os.environ, "PGTZ": "UTC"}
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL, timeout=seconds, cwd="/", env=environment
        )
    except subprocess.TimeoutExpired:
        raise RestoreError(f"{Path(argv[0]).name} did not end within {seconds:.0f} s") from None
    if done.returncode:
        said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if re.search("ERROR|FATAL|PANIC", line)]
        raise RestoreError(f"{Path(argv[0]).name}: {(errors or said or ['it said nothing'])[-1]}")
    return done.stdout


# --- what can be told without a host -----------------------------------------------------------------------------------


def lsn(text: str) -> int:
    """An LSN such as 0/30000F8 as a number."""
    high, low = text.split("/")
    return (int(high, 16) << 32) + int(low, 16)


def verdict(plan: Mapping[str, Any], target: Mapping[str, Any], end: str, last_commit: str) -> str:
    """Why what was recovered is not what was asked for; empty when it is.

    end: the last line of the history of the timeline that recovery opened (timeline, LSN, reason). last_commit: the newest commit
    that is there, empty when unknown.
    """
    fields = end.split("\t")
    reason = fields[2] if len(fields) > 2 else ""
    if target["kind"] == "latest":
        if lsn(fields[1]) < plan["reaches"]:
            return f"recovery ended at {fields[1]}, before the end of the archive: WAL is missing between"
        return ""
    if "no recovery target" in reason or not reason:
        return "the WAL ended before the target: this is the newest state, not the one that was asked for"
    if target["kind"] == "name":
        return "" if target["text"] in reason else f"recovery ended at another point: {reason}"
    if last_commit and datetime.fromisoformat(last_commit).timestamp() > target["at"]:
        return f"it holds a commit of {last_commit}, after the target"
    return ""


def fatal(log: Path) -> str:
    """Why a server ended, from its log: the first that killed it, not those who came too early."""
    said = re.findall(r"(?:FATAL|PANIC):\s+(.*)", log.read_text(errors="replace") if log.exists() else "")
    return next((line for line in said if not line.startswith("the database system is")), "it does not say why")


# --- a member ----------------------------------------------------------------------------------------------------------


class Member:
    """This host's member of a cluster, and the note about the restore that is under way."""

    def __init__(self, cluster: str, settings: Mapping[str, Any]) -> None:
        own = settings["clusters"][cluster]
        self.cluster = cluster
        self.unit = f"patroni@{cluster}.service"
        self.binaries = Path(settings["binaries"])
        self.port = str(own["port"])
        self.data = Path(own["data"])
        self.file = self.data.parent / "restore.json"
        self.sockets = self.data.parent / "restore-socket"
        self.ended = self.data.parent / "restored.json"
        self.note: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.last: dict[str, Any] = json.loads(self.ended.read_text()) if self.ended.exists() else {}

    def remember(self, **facts: Any) -> None:
        """Write down how far the restore has come, in one step that survives a power cut."""
        self.note |= facts
        new = self.file.with_suffix(".new")
        with new.open("w") as file:
            file.write(json.dumps(self.note, indent=1, sort_keys=True))
            file.flush()
            os.fsync(file.fileno())
        new.replace(self.file)

    def ask(self, sql: str, sockets: str = "/var/run/postgresql") -> str:
        """The answer of this member's PostgreSQL."""
        argv = [str(self.binaries / "psql"), "-XAtq", "-h", sockets, "-p", self.port, "-U", "postgres", "-c", sql, "postgres"]
        return run(*argv, seconds=30).strip()

    def control(self, *words: str) -> None:
        """pg_ctl on the data directory."""
        run(str(self.binaries / "pg_ctl"), "-D", str(self.data), "-s", *words)

    def mine(self, plan: Mapping[str, Any]) -> None:
        """Refuse to mix two restores."""
        other = self.note.get("fingerprint")
        if other and other != plan["fingerprint"]:
            raise RestoreError(
                f"another restore ({other}) of cluster {self.cluster} is under way here. Finish it with -e confirm={other}, "
                f"or give it up with -e abort={other}"
            )

    def is_over(self, plan: Mapping[str, Any]) -> bool:
        """Whether this restore has ended here. It must not begin anew: somebody may have written since."""
        return not self.note and self.last.get("fingerprint") == plan["fingerprint"]

    # --- the steps

    def look(self) -> dict[str, Any]:
        """What this member is; the primary brings the archive up to date."""
        found: dict[str, Any] = {"role": "down", "time": time.time(), "restoring": self.note.get("fingerprint", "")}
        try:
            system, standby, last_commit = self.ask(LOOK).split("|")
        except RestoreError as error:
            return {**found, "problem": str(error)}
        found |= {"role": "standby" if standby == "1" else "primary", "system": system, "last_commit": last_commit}
        if found["role"] == "primary":
            self.ask(MARK)
            wal = self.ask(SWITCH)
            limit = time.monotonic() + ARCHIVE_SECONDS
            while self.ask(WAITING.format(wal=wal)) != "0" and time.monotonic() < limit:
                time.sleep(0.5)
            found["archived"] = self.ask(WAITING.format(wal=wal)) == "0"
        return found

    def stop(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Stop Patroni and PostgreSQL."""
        self.mine(plan)
        if self.is_over(plan):
            return {"step": "ended"}
        if "step" not in self.note:
            self.remember(fingerprint=plan["fingerprint"], step="stopped", since=datetime.now(UTC).isoformat(timespec="seconds"))
        run("systemctl", "stop", self.unit, seconds=STOP_SECONDS, postgres=False)
        return {"step": self.note["step"]}

    def restore(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Restore, recover and verify."""
        self.mine(plan)
        if self.is_over(plan):
            return {**self.last["result"], "kept": self.last["kept"]}
        if self.note["step"] == "recovered":
            return {**self.note["result"], "kept": self.note["kept"]}
        own, target = plan["clusters"][self.cluster], plan["target"]
        kept = self.put_aside(own["size"], plan["fingerprint"])
        began = time.monotonic()
        self.end_recovery("immediate")
        if kept and self.data.exists():  # of an attempt that was interrupted
            shutil.rmtree(self.data)
        self.data.mkdir(mode=0o700, exist_ok=True)
        shutil.chown(self.data, "postgres", "postgres")
        options = [f"--repo={own['number']}", f"--set={own['backup']}", *([] if kept else ["--delta", "--force"])]
        if target["kind"] != "latest":
            options += [f"--type={target['kind']}", f"--target={target['text']}", "--target-action=promote"]
        run("pgbackrest", "--config=/etc/pgbackrest/member.conf", f"--stanza={self.cluster}", *options, "restore")
        restored = time.monotonic()
        result = self.recover(own, target)
        result |= {"restore_seconds": round(restored - began, 1), "recover_seconds": round(time.monotonic() - restored, 1)}
        self.remember(step="recovered", result=result)
        return {**result, "kept": kept}

    def put_aside(self, size: int, fingerprint: str) -> str:
        """Keep the old data beside when there is room for the restored; return where, empty when there is none."""
        if "kept" not in self.note:
            free = shutil.disk_usage(self.data.parent).free
            room = free > size * 1.1 + SPARE_BYTES
            self.remember(kept=str(self.data.with_name(f"pgdata.before-{fingerprint}")) if room else "", step="restoring")
        kept: str = self.note["kept"]
        if kept and not Path(kept).exists() and self.data.exists():
            self.data.rename(kept)
        return kept

    def recover(self, own: Mapping[str, Any], target: Mapping[str, Any]) -> dict[str, Any]:
        """Let PostgreSQL recover to the target where nobody can reach it, and stop it when it has promoted itself.

        archive_mode stays on, so that the history of the new timeline goes to the archive with the rest, once Patroni runs it.
        """
        self.sockets.mkdir(mode=0o700, exist_ok=True)
        shutil.chown(self.sockets, "postgres", "postgres")
        settings = {"listen_addresses": "", "unix_socket_directories": str(self.sockets)}
        settings |= {"port": self.port, "archive_command": "/bin/false", "hot_standby": "off"}
        log = self.sockets / "log"
        log.unlink(missing_ok=True)
        words = " ".join(f"-c {name}='{value}'" for name, value in settings.items())
        self.control("-W", "-l", str(log), "-o", words, "start")
        self.wait_recovered(log)
        history = max(self.data.glob("pg_wal/*.history"), key=lambda path: path.name).read_text()
        end = [line for line in history.splitlines() if line.strip()][-1]
        last_commit = self.ask(f"SELECT {LAST_COMMIT}", str(self.sockets))
        problem = verdict(own, target, end, last_commit)
        for name in RECOVERY_SETTINGS:
            self.ask(f"ALTER SYSTEM RESET {name}", str(self.sockets))
        self.end_recovery("fast")
        if problem:
            raise RestoreError(problem)
        fields = end.split("\t")
        return {"ended": fields[1], "reason": fields[2], "last_commit": last_commit}

    def wait_recovered(self, log: Path) -> None:
        """Wait until recovery has ended. Until then nobody is let in, so pg_ctl cannot tell."""
        began, runs = time.monotonic(), False
        while time.monotonic() < began + START_SECONDS:
            time.sleep(0.5)
            with contextlib.suppress(RestoreError):
                if self.ask("SELECT pg_is_in_recovery()", str(self.sockets)) == "f":
                    return
            ran, runs = runs, self.recovers()
            if not runs and (ran or time.monotonic() > began + FORK_SECONDS):
                raise RestoreError(f"the target was not reached: {fatal(log)}")
        raise RestoreError(f"recovery has not ended after {START_SECONDS / 3600:.0f} hours")

    def recovers(self) -> bool:
        """Whether the PostgreSQL that recovers still runs."""
        file = self.data / "postmaster.pid"
        return file.exists() and Path(f"/proc/{file.read_text().split()[0]}").exists()

    def end_recovery(self, mode: str) -> None:
        """Stop the PostgreSQL that recovers, if it runs."""
        if self.recovers():
            self.control("-w", "-m", mode, "-t", str(STOP_SECONDS), "stop")

    def free(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Forget the cluster's state in etcd, which speaks of what was, and allow the start."""
        self.mine(plan)
        if not self.note:
            return {"step": "free"}
        if self.note["step"] != "recovered":
            raise RestoreError(f"nothing is recovered yet (step {self.note['step']})")
        answers = f"{self.cluster}\nYes I am aware\n{plan['clusters'][self.cluster]['member']}\n"
        done = subprocess.run(
            ["patronictl", "remove", self.cluster], input=answers, capture_output=True, text=True, check=False, timeout=60
        )
        if done.returncode and "does not exist" not in done.stdout + done.stderr:
            raise RestoreError(f"patronictl remove {self.cluster}: {(done.stderr or done.stdout).strip().splitlines()[-1]}")
        self.forget()
        return {"step": "free"}

    def clear(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Remove this member's data, so that it copies the restored ones."""
        self.mine(plan)
        if self.note:
            for path in self.data.iterdir() if self.data.exists() else []:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
            self.forget()
        return {"step": "clear"}

    def back(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """Give the restore up."""
        self.mine(plan)
        if not self.note:
            return {"step": "back"}
        kept, touched = self.note.get("kept"), "kept" in self.note
        if touched and not kept:
            raise RestoreError("the old data were not kept, for there was no room: finish the restore; only that brings data back")
        if kept and Path(kept).exists():
            self.end_recovery("immediate")
            if self.data.exists():
                shutil.rmtree(self.data)
            Path(kept).rename(self.data)
        self.file.unlink()
        return {"step": "back"}

    def forget(self) -> None:
        """Put the note away: Patroni may start."""
        if self.sockets.exists():
            shutil.rmtree(self.sockets)
        self.file.rename(self.ended)
        self.note = {}


def main() -> int:
    """Do one step; print what came of it as JSON."""
    step, cluster = sys.argv[1:]
    settings = json.loads(SETTINGS.read_text(encoding="utf-8"))
    member = Member(cluster, settings)
    try:
        if step == "look":
            print(json.dumps({"cluster": cluster, **member.look()}))
            return 0
        # One after another: the step of a playbook that was interrupted may still be at work. What it wrote down is read then.
        with Path(f"/run/evenkeel-restore-{cluster}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            member = Member(cluster, settings)
            steps = {"stop": member.stop, "run": member.restore, "free": member.free, "clear": member.clear, "back": member.back}
            print(json.dumps({"cluster": cluster, **steps[step](json.load(sys.stdin))}))
    except RestoreError as error:
        print(f"cluster {cluster}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
