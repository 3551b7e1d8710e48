"""Documents that mean harm: each ends as a compile error or a time-out, leaves nothing, and the worker lives on."""

import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from browser import Browser
from drydock import config
from drydock.documents import latex, sandbox
from platform_servers import Servers, wait_for
from test_documents import finished, latin, survivors

TIMEOUT_SECONDS = 60.0


@pytest.fixture(autouse=True)
def configured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Compile in this process, with time enough for what ends by itself; return what changes the configuration."""

    def change(**changes: Any) -> None:
        changed = dataclasses.replace(config.load(), **changes)
        monkeypatch.setattr(config, "load", lambda: changed)
        latex.prepare_font_cache()

    change(latex_compile_timeout_seconds=TIMEOUT_SECONDS)
    return change


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    """After each test no process and no file of its compiles is there."""
    yield
    wait_for("every process of the compile being gone", lambda: survivors() == [], 5)
    compiles = config.load().data_dir / "compile"
    assert not compiles.exists() or list(compiles.iterdir()) == []


def lua(code: str) -> str:
    return latin(rf"\directlua{{{code}}}")


HOSTILE = {
    "shell escape": (latin(r"\immediate\write18{touch escaped.tex}\input{escaped}"), "escaped.tex' not found"),
    "piped input": (latin(r"\input{|id}"), "not found"),
    "a file of the system": (latin(r"\input{/etc/passwd}"), "passwd.tex' not found"),
    "a file of the system, read line by line": (
        latin(r"\newread\f\openin\f=/etc/passwd \ifeof\f\errmessage{refused}\fi"), "refused"),
    "a file above": (latin(r"\input{../../secret}"), "secret.tex' not found"),
    "Lua: a file of the system": (lua("assert(io.open('/etc/passwd'))"), "assertion failed"),
    "Lua: the worker's environment": (lua("assert(io.open('/proc/self/environ'))"), "assertion failed"),
    "Lua: a list of the compiles": (lua("for x in lfs.dir('..') do texio.write(x) end"), "cannot open"),
    "Lua: a file outside, written": (lua("assert(io.open('/tmp/drydock-test-escaped', 'w'))"), "assertion failed"),
    "Lua: a command": (lua("assert(os.execute('true') == 0)"), "assertion failed|disabled"),
    "Lua: a command in place of the engine": (lua("assert(os.exec({'/bin/true'}))"), "disabled|assertion failed"),
    "Lua: a command behind the wrapper": (
        lua("local n, f = debug.getupvalue(os.execute, 2) assert(f('true') == 0)"), "disabled|assertion failed"),
    "Lua: a function of C": (lua("package.loaded.ffi.cdef('int fork(void);')"), "nil value"),
    "Lua: the network": (lua("require('socket.core')"), "socket.core' not found|Operation not permitted"),
    "Lua: a link in place of the PDF": (lua("assert(lfs.link('/etc/passwd', 'main.pdf', true))"), "Permission denied"),
    "another file in place of the PDF": (
        latin(r"\directlua{luatexbase.add_to_callback('wrapup_run', function() os.remove('main.pdf')"
              r" local f = io.open('main.pdf', 'w') f:write('<html>') f:close() end, 'w')}"), "the engine made no PDF"),
    "one endless file": (
        lua("f = io.open('big', 'w') while true do assert(f:write(string.rep('x', 1e6))) end"),
        "a file grew over 64 MB"),
    "10 GB in many files": (
        lua("for i = 1, 200 do f = io.open('f' .. i, 'w')"
            " for j = 1, 50 do f:write(string.rep('x', 1e6)) end f:close() end"),
        "the output grew over 256 MB"),
    "10 GB in removed files": (
        lua("k = {} for i = 1, 200 do f = io.open('f' .. i, 'w') k[i] = f os.remove('f' .. i)"
            " for j = 1, 50 do f:write(string.rep('x', 1e6)) end f:flush() end"), "the output grew over 256 MB"),
    "many files": (
        lua("for i = 1, 20000 do io.open('f' .. i, 'w'):close() end"), "it made more than 5000 files"),
    "deep directories": (
        lua("for i = 1, 6000 do lfs.mkdir('d') lfs.chdir('d') end while true do end"),
        "directories that are too deep"),
    "deep recursion": (latin(r"\def\x{\x x}\x"), "TeX capacity exceeded"),
    "deep groups": (latin(r"\def\x{\begingroup\x}\x"), "TeX capacity exceeded"),
    "Lua: deep recursion": (lua("local function f(n) return f(n + 1) + 1 end f(1)"), "stack overflow"),
}  # fmt: skip
ENDLESS = {
    "loop": (latin(r"\def\x{\x}\x"), "timed out after 4 s"),
    "pages": (latin(r"\loop\hbox{x}\newpage\iftrue\repeat"), "timed out|grew over"),
    "log": (latin(r"\loop\message{xxxxxxxxxxxxxxxxxxxxxxxxxxxx}\iftrue\repeat"), "timed out|grew over"),
    "memory": (lua("t = '0123456789' while true do t = t .. t end"), "not enough memory|timed out|of memory"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_q2_a_hostile_source_is_a_compile_error(what: str) -> None:
    source, why = HOSTILE[what]
    (config.load().data_dir / "secret.tex").write_text("secret")
    outcome = latex.compile_source(source)
    assert outcome.pdf is None, outcome.log
    assert outcome.reason.startswith("compile error: "), outcome.reason
    assert re.search(why, outcome.reason + outcome.log), (outcome.reason, outcome.log)
    assert "root:" not in outcome.log
    assert not Path("/tmp/drydock-test-escaped").exists()  # noqa: S108


@pytest.mark.parametrize("what", ENDLESS)
def test_q2_an_endless_source_is_a_time_out_if_no_other_limit_ends_it(
    what: str, configured: Callable[..., None]
) -> None:
    configured(latex_compile_timeout_seconds=4.0)
    source, why = ENDLESS[what]
    outcome = latex.compile_source(source)
    assert outcome.pdf is None
    assert re.search(why, outcome.reason), outcome


@pytest.mark.parametrize("what", ["shell escape", "a file of the system", "a file above", "deep recursion"])
def test_q2_the_same_holds_for_pdflatex(what: str, configured: Callable[..., None]) -> None:
    configured(latex_engine="pdflatex")
    outcome = latex.compile_source(HOSTILE[what][0])
    assert outcome.reason.startswith("compile error: "), outcome
    assert "root:" not in outcome.log


def test_q2_a_time_out_kills_the_whole_process_group(configured: Callable[..., None]) -> None:
    configured(latex_compile_timeout_seconds=10.0)
    outcomes: list[latex.Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(latex.compile_source(latin(r"\def\x{\x}\x"))))
    thread.start()
    wait_for("latexmk and its engine running", lambda: {"latexmk\n", "lualatex\n"} <= set(survivors()), 10)
    thread.join(30)
    assert outcomes[0].pdf is None
    assert outcomes[0].reason == "timed out after 10 s (LATEX_COMPILE_TIMEOUT_MS)"


def test_a_document_cannot_read_what_is_being_compiled_beside_it() -> None:
    with latex._work_directory() as neighbour:
        (neighbour / "main.tex").write_text("a secret of somebody else")
        by_tex = latex.compile_source(latin(rf"\input{{../{neighbour.name}/main}}"))
        by_lua = latex.compile_source(lua(f"assert(io.open('../{neighbour.name}/main.tex'))"))
        assert neighbour.is_dir()
    assert "not found" in by_tex.reason
    assert "assertion failed" in by_lua.reason
    assert "secret of" not in by_tex.log + by_lua.log


def test_the_worker_lives_on_and_compiles_the_next_document(sign_in: Callable[..., Browser]) -> None:
    person = sign_in()
    for what in ("10 GB in many files", "many files", "deep recursion", "Lua: a link in place of the PDF"):
        source, why = HOSTILE[what]
        document = person.post("/api/documents", {"title": what, "source": source}).json["id"]
        answer = finished(person, document).json
        assert (answer["state"], answer["job"]["attempt"]) == ("failed", 1), answer
        assert re.search(why, answer["reason"]), answer["reason"]
        page = person.get(f"/documents/{document}/").text
        assert "compile error" in page
    document = person.post("/api/documents", {"title": "good", "source": latin("good")}).json["id"]
    assert finished(person, document).json["state"] == "compiled"


# --- An engine with a hole --------------------------------------------------------------------------------------------


@pytest.fixture
def subverted(monkeypatch: pytest.MonkeyPatch, configured: Callable[..., None]) -> None:
    """Let documents be Perl: what a source can do once it has got hold of the engine."""
    assert configured
    monkeypatch.setitem(latex.ENGINES, "lualatex", (("perl", "-w"), {"perl": "the Debian package perl"}))


def perl(code: str) -> latex.Outcome:
    wrote_pdf = "open(my $f, '>', 'main.pdf') or die; print $f '%PDF-'; close $f; open(STDOUT, '>', 'main.log');"
    return latex.compile_source(wrote_pdf + code + ";\nexit 0;\n")


@pytest.mark.usefixtures("subverted")
def test_what_a_subverted_engine_may_do_is_make_a_pdf() -> None:
    assert perl("print `id -u`").pdf == b"%PDF-"


REACHING_OUT = {
    "the network": "socket(my $s, 2, 1, 0) or die $!",
    "the network by IPv6": "socket(my $s, 10, 1, 0) or die $!",
    "local sockets": "socket(my $s, 1, 1, 0) or die $!",
    "a pair of sockets": "socketpair(my $s, my $t, 1, 1, 0) or die $!",
    "rings for input and output": "syscall(425, 8, my $b = chr(0) x 120) >= 0 or die $!",
    "signals to its parent": "kill(0, getppid) or die $!",
    "signals to everybody": "kill(0, -1) or die $!",
    "a session of its own": "use POSIX; POSIX::setsid() >= 0 or die $!",
    "a group of its own": "setpgrp(0, 0) or die $!",
    "a link": "symlink('/etc/passwd', 'link') or die $!",
    "a hard link": "link('/usr/bin/perl', 'link') or die $!",
    "a pipe with a name": "use POSIX; POSIX::mkfifo('pipe', 0600) or die $!",
    "shared memory": "shmget(1, 4096, 0600 | 01000) // die $!",
    "users' files": "open(my $g, '<', '/etc/passwd') or die $!",
    "the list of processes": "opendir(my $d, '/proc') or die $!",
    "a file outside": "open(my $g, '>', '/tmp/drydock-test-escaped') or die $!",
}


@pytest.mark.usefixtures("subverted")
@pytest.mark.parametrize("what", REACHING_OUT)
def test_a_subverted_engine_cannot_reach(what: str) -> None:
    outcome = perl(REACHING_OUT[what])
    assert outcome.pdf is None
    assert re.search("Operation not permitted|Permission denied|Invalid cross-device link", outcome.log), outcome.log


@pytest.mark.usefixtures("subverted")
def test_a_subverted_engine_cannot_reach_a_listening_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        outcome = perl(f"use IO::Socket::INET; IO::Socket::INET->new('127.0.0.1:{port}') or die $@;")
    assert outcome.pdf is None


@pytest.mark.usefixtures("subverted")
def test_a_fork_bomb_is_ended_as_one() -> None:
    assert perl("fork while 1;").reason == "compile error: it started more than 32 processes"
    # One that does not hurry is over as well.
    outcome = perl("for (1 .. 40) { fork or do { sleep 60; exit } } sleep 60;")
    assert outcome.reason == "compile error: it started more than 32 processes"


@pytest.mark.usefixtures("subverted")
def test_memory_is_bounded_over_all_processes() -> None:
    # Each is within its own limit.
    outcome = perl("for (1 .. 4) { fork or do { my $x = 'x' x 700_000_000; sleep 60; exit } } sleep 60;")
    assert outcome.reason == "compile error: it used more than 2048 MB of memory"


@pytest.mark.usefixtures("subverted")
def test_what_a_document_leaves_running_is_ended_with_it() -> None:
    # The process that was started has ended well: the one that it leaves is found by its group.
    assert perl("fork or do { close STDOUT; fork; sleep 60; exit };").pdf == b"%PDF-"


@pytest.mark.usefixtures("subverted")
def test_directories_that_are_closed_and_deep_are_removed_too() -> None:
    outcome = perl("mkdir 'a'; mkdir 'a/b'; chmod 0, 'a/b'; chmod 0, 'a'; for (1 .. 1500) { mkdir 'd'; chdir 'd' }")
    assert outcome.reason in ("", "compile error: it made directories that are too deep"), outcome


def test_the_number_of_processes_is_bounded_by_the_kernel_too(servers: Servers) -> None:
    """It holds for users other than root: the watch is not the only guard, because it looks only now and then."""
    work = servers.root / "processes"
    work.mkdir()
    shutil.copy(sandbox.__file__, work)
    # A user who runs nothing else here.
    become = {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}
    if become:
        os.chown(work, 65534, 65534)
    bomb = (
        "my $n = 0; for (1 .. 50) { my $p = fork; last unless defined $p; unless ($p) { sleep 5; exit } $n++ } print $n"
    )
    command = ["/usr/bin/python3", "-I", "sandbox.py", str(os.getpid()), json.dumps({"NPROC": 10}), "perl", "-e", bomb]
    answer = subprocess.run(
        command, cwd=work, capture_output=True, text=True, timeout=30, check=True, start_new_session=True, **become  # type: ignore[call-overload]
    )  # fmt: skip
    assert 5 <= int(answer.stdout) <= 10, answer
