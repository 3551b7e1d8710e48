"""Compile one LaTeX source in a directory of its own, with bounded time, memory and output."""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from drydock import config
from drydock.documents import sandbox
from drydock.documents.service import MAX_LOG_CHARACTERS

logger = logging.getLogger(__name__)

ENGINE_FLAGS = {"lualatex": "-lualatex", "pdflatex": "-pdf", "xelatex": "-xelatex"}
MEGABYTE = 1024 * 1024
MAX_FILE_BYTES = 64 * MEGABYTE
MAX_MEMORY_BYTES = 2048 * MEGABYTE
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


def compile_source(source: str) -> Outcome:
    """Compile a source within the configured time."""
    font_cache = prepare_font_cache()
    with _work_directory() as work:
        # A copy: a document must not be able to change what another document's fonts are read from.
        shutil.copytree(font_cache, Path(work) / ".texmf-var")
        return _run(Path(work), source, config.load().latex_compile_timeout_seconds)


def prepare_font_cache() -> Path:
    """Build the engine's font cache once, from a document of our own; return where it is."""
    engine = config.load().latex_engine
    cache = config.load().data_dir / f"font-cache-{engine}"
    if cache.is_dir():
        return cache
    cache.parent.mkdir(parents=True, exist_ok=True)
    with (cache.parent / ".font-cache.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if cache.is_dir():
            return cache
        with _work_directory() as work:
            built = Path(work) / ".texmf-var"
            built.mkdir()
            outcome = _run(Path(work), FONT_CACHE_SOURCE, FONT_CACHE_TIMEOUT_SECONDS)
            if outcome.pdf is None:
                raise RuntimeError(f"{engine} does not work on this host: {outcome.reason}\n{outcome.log[-2000:]}")
            built.rename(cache)
        logger.info("the font cache of %s is ready", engine)
    return cache


def _work_directory() -> tempfile.TemporaryDirectory[str]:
    parent = config.load().data_dir / "compile"
    parent.mkdir(parents=True, exist_ok=True)
    return tempfile.TemporaryDirectory(prefix="latex-", dir=parent, ignore_cleanup_errors=True)


def _run(work: Path, source: str, timeout_seconds: float) -> Outcome:
    """Run the engine in `work`; at the time-out kill everything that it has started."""
    engine = config.load().latex_engine
    (work / "main.tex").write_text(source, encoding="utf-8")
    limits = {
        "CPU": int(timeout_seconds) + 5,  # the last resort, should the worker die
        "FSIZE": MAX_FILE_BYTES,
        "AS": MAX_MEMORY_BYTES,
        "CORE": 0,
    }
    command = [
        *(sys.executable, "-I", sandbox.__file__, json.dumps(limits)),
        *("latexmk", "-norc", ENGINE_FLAGS[engine], "-bibtex-", "-no-shell-escape", "-halt-on-error"),
        *("-interaction=nonstopmode", "-file-line-error", "main.tex"),
    ]
    with (work / ".output").open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - no shell, and no part of it comes from a user
            command,
            cwd=work,
            env=_environment(work),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status: int | None = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            # Also after a normal end: nothing that a document has started may outlive its compile.
            _kill_group(process)
    log = _log(work)
    if status is None:
        return Outcome(None, f"timed out after {timeout_seconds:g} s (LATEX_COMPILE_TIMEOUT_MS)", log)
    if status == sandbox.UNAVAILABLE:
        raise RuntimeError(f"LaTeX cannot be run safely on this host: {_tail(work / '.output', 500).strip()}")
    pdf = work / "main.pdf"
    if status != 0 or not pdf.is_file() or pdf.is_symlink():
        return Outcome(None, f"compile error: {_first_error(log)}", log)
    return Outcome(pdf.read_bytes(), "", log)


def _environment(work: Path) -> dict[str, str]:
    """Return all that the engine sees of our environment: none of our secrets."""
    cache = str(work / ".texmf-var")
    return {
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HOME": str(work),
        "TMPDIR": str(work),
        "LANG": "C.UTF-8",
        "TEXMFHOME": cache,
        "TEXMFCONFIG": cache,
        "TEXMFVAR": cache,
        "TEXMFCACHE": cache,
        "openin_any": "p",
        "openout_any": "p",
        "shell_escape": "f",
        "max_print_line": "1000",
    }


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _log(work: Path) -> str:
    log = _tail(work / "main.log", 4 * MAX_LOG_CHARACTERS) or _tail(work / ".output", MAX_LOG_CHARACTERS)
    # Hundreds of lines about fonts hide the few that an author looks for.
    lines = [line for line in log.splitlines() if not line.startswith("LaTeX Font Info:")]
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
    errors = [line.strip()[:300] for line in log.splitlines() if line.startswith(beginnings)]
    # "Fatal error occurred" only repeats that there was one.
    return next((line for line in errors if "==> Fatal error" not in line), "the engine made no PDF")
