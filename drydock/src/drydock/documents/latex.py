"""Compile one LaTeX source in a directory of its own, with bounded time, memory and output."""

import contextlib
import fcntl
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from drydock import config
from drydock.documents import sandbox, watch
from drydock.documents.service import MAX_LOG_CHARACTERS

logger = logging.getLogger(__name__)

LATEXMK = ("latexmk", "-norc", "-bibtex-", "-no-shell-escape", "-halt-on-error", "-interaction=nonstopmode",
           "-file-line-error")  # fmt: skip
# Each with the programs that it takes, and where they come from.
ENGINES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "lualatex": (
        (*LATEXMK, "-lualatex"),
        {"latexmk": "the Debian package latexmk", "lualatex": "the Debian package texlive-luatex"},
    ),
    "pdflatex": (
        (*LATEXMK, "-pdf"),
        {"latexmk": "the Debian package latexmk", "pdflatex": "the Debian package texlive-latex-base"},
    ),
    # It may not fetch anything: its cache must hold what documents use.
    "tectonic": (
        ("tectonic", "--untrusted", "--only-cached", "--keep-logs"),
        {"tectonic": "the program tectonic, with its cache in /var/cache/tectonic"},
    ),
}
PATH = "/usr/local/bin:/usr/bin:/bin"
NOISE = ("LaTeX Font Info:", "luaotfload |", "Lua module:", "Lua-only attribute", "Inserting `")
WATCH_SECONDS = 0.2
# Processes beyond those that the user runs anyway: the last resort. The watch ends a compile of far fewer.
SPARE_PROCESSES = 1000
FONT_CACHE_TIMEOUT_SECONDS = 60
# Makes the engine build its font database and the caches of the usual fonts.
FONT_CACHE_SOURCE = r"""\documentclass{article}
\usepackage{iftex}
\iftutex\usepackage{fontspec}\setmainfont{DejaVu Serif}\setsansfont{DejaVu Sans}\setmonofont{DejaVu Sans Mono}
\else\usepackage[T2A]{fontenc}\usepackage[utf8]{inputenc}\fi
\begin{document}Кириллица \textbf{Кириллица} \textsf{Кириллица} \texttt{Кириллица} $x^2$\end{document}
"""


@dataclass(frozen=True)
class Outcome:
    """How a compile ended: a PDF, or a reason for there being none."""

    pdf: bytes | None
    reason: str
    log: str


class UnavailableError(RuntimeError):
    """This host cannot compile, whatever the source; the message says what to do about it."""


def compile_source(source: str) -> Outcome:
    """Compile a source within the configured time."""
    font_cache = prepare_font_cache()
    with _work_directory() as work:
        # A copy: a document must not be able to change what another document's fonts are read from.
        shutil.copytree(font_cache, work / ".texmf-var")
        return _run(work, source, config.load().latex_compile_timeout_seconds)


def prepare_font_cache() -> Path:
    """Build the engine's font cache once, from a document of our own; return where it is."""
    engine = config.load().latex_engine
    cache = config.load().data_dir / f"font-cache-{engine}"
    if cache.is_dir():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with _locked(cache.parent / ".font-cache.lock"):
        if cache.is_dir():
            return cache
        with _work_directory() as work:
            built = work / ".texmf-var"
            built.mkdir()
            outcome = _run(work, FONT_CACHE_SOURCE, FONT_CACHE_TIMEOUT_SECONDS)
            if outcome.pdf is None:
                raise UnavailableError(f"{engine} does not work on this host: {outcome.reason}\n{outcome.log[-2000:]}")
            built.rename(cache)
        logger.info("the font cache of %s is ready", engine)
    return cache


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _work_directory() -> Iterator[Path]:
    """Give an empty directory that is locked while it is used; what killed workers have left is removed."""
    parent = config.load().data_dir / "compile"
    parent.mkdir(parents=True, exist_ok=True)
    with _locked(parent.parent / ".compile.lock"):
        for left in parent.glob("latex-*"):
            _remove_if_free(left)
        work = Path(tempfile.mkdtemp(prefix="latex-", dir=parent))
        held = os.open(work, os.O_RDONLY)
        fcntl.flock(held, fcntl.LOCK_EX)
    try:
        yield work
    finally:
        _remove(work)
        os.close(held)


def _remove_if_free(work: Path) -> None:
    with contextlib.suppress(OSError):
        held = os.open(work, os.O_RDONLY)
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(work)
        finally:
            os.close(held)


def _remove(work: Path) -> None:
    """Remove a directory, however deep it is: `shutil.rmtree` ends in a RecursionError."""
    removed = subprocess.run(["rm", "-rf", "--", work], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if removed.returncode:
        subprocess.run(["chmod", "-R", "u+rwx", "--", work], capture_output=True, check=False)  # noqa: S603, S607
        removed = subprocess.run(["rm", "-rf", "--", work], capture_output=True, text=True, check=False)  # noqa: S603, S607
    if removed.returncode:
        logger.error("a compile's directory was not removed: %s", removed.stderr[:500])


def _run(work: Path, source: str, timeout_seconds: float) -> Outcome:
    """Run the engine in `work`; when it takes too long or too much, kill everything that it has started."""
    command = _command()
    (work / "main.tex").write_text(source, encoding="utf-8")
    limits = {
        "CPU": int(timeout_seconds) + 5,
        "FSIZE": watch.MAX_FILE_BYTES,
        "AS": watch.MAX_MEMORY_BYTES,
        "NPROC": SPARE_PROCESSES,
        "CORE": 0,
    }
    with (work / ".output").open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - no shell, and no part of it comes from a user
            [sys.executable, "-I", sandbox.__file__, str(os.getpid()), json.dumps(limits), *command],
            cwd=work,
            env=_environment(work),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        reason = ""
        try:
            _wait(process, work, timeout_seconds)
        except watch.ExcessError as error:
            reason = f"compile error: {error}"
        except subprocess.TimeoutExpired:
            reason = f"timed out after {timeout_seconds:g} s (LATEX_COMPILE_TIMEOUT_MS)"
        finally:
            # Also after a normal end: nothing that a document has started may outlive its compile.
            _kill_group(process)
    log = _log(work)
    if process.returncode == sandbox.UNAVAILABLE:
        raise UnavailableError(f"LaTeX cannot be run safely on this host: {_tail(work / '.output', 500).strip()}")
    pdf = b"" if reason or process.returncode else _pdf(work / "main.pdf")
    if not pdf:
        return Outcome(None, reason or f"compile error: {_first_error(log)}", log)
    return Outcome(pdf, "", log)


def _command() -> list[str]:
    """Return the engine's command line; an error says what this host lacks for it."""
    engine = config.load().latex_engine
    command, programs = ENGINES[engine]
    for program, origin in programs.items():
        if shutil.which(program, path=PATH) is None:
            raise UnavailableError(
                f"LATEX_ENGINE is {engine}, but {program} is not installed on this host. Install {origin}, or set"
                f" LATEX_ENGINE to another of {', '.join(ENGINES)}"
            )
    return [*command, "main.tex"]


def _wait(process: subprocess.Popen[bytes], work: Path, timeout_seconds: float) -> None:
    """Wait for the end, with an eye on what is used; raise what speaks against going on, or against the result."""
    deadline = time.monotonic() + timeout_seconds
    while process.returncode is None:
        left = deadline - time.monotonic()
        if left <= 0:
            raise subprocess.TimeoutExpired(process.args, timeout_seconds)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(min(left, WATCH_SECONDS))
        watch.check(work, process.pid)


def _environment(work: Path) -> dict[str, str]:
    """Return all that the engine sees of our environment: none of our secrets."""
    cache = str(work / ".texmf-var")
    return {
        "PATH": PATH,
        "HOME": str(work),
        "TMPDIR": str(work),
        "LANG": "C.UTF-8",
        "TEXMFHOME": cache,
        "TEXMFCONFIG": cache,
        "TEXMFVAR": cache,
        "TEXMFCACHE": cache,
        "TECTONIC_CACHE_DIR": "/var/cache/tectonic",
        "openin_any": "p",
        "openout_any": "p",
        "shell_escape": "f",
        "max_print_line": "1000",
    }


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pdf(path: Path) -> bytes:
    """Return the PDF that the engine has made, if it has made one."""
    content = path.read_bytes() if path.is_file() and not path.is_symlink() else b""
    return content if content.startswith(b"%PDF-") else b""


def _log(work: Path) -> str:
    log = _tail(work / "main.log", 4 * MAX_LOG_CHARACTERS) or _tail(work / ".output", MAX_LOG_CHARACTERS)
    # Hundreds of lines about fonts and modules hide the few that an author looks for.
    lines = [line for line in log.replace(str(work), ".").splitlines() if not line.startswith(NOISE)]
    return "\n".join(lines)[-MAX_LOG_CHARACTERS:]


def _tail(path: Path, length: int) -> str:
    if not path.is_file() or path.is_symlink():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - length))
        return file.read().decode(errors="replace").replace("\x00", "")


def _first_error(log: str) -> str:
    """Return the line that the author needs to see."""
    beginnings = ("! ", "./main.tex:", "main.tex:", "[\\directlua]")
    lines = log.splitlines()
    for number, line in enumerate(lines):
        # "Fatal error occurred" only repeats that there was one.
        if line.startswith(beginnings) and "==> Fatal error" not in line:
            # TeX shows the place a few lines below: "l.12 what was read so far".
            place = next((below for below in lines[number + 1 : number + 10] if re.match(r"l\.\d+ ", below)), "")
            return f"{line.removeprefix('./')} {place}".strip()[:400]
    return "the engine made no PDF"
