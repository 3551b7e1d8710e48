"""Run one command where it can harm nothing: `python -I sandbox.py <limits as JSON> <command…>`.

TeX's own switches (no shell escape, paranoid paths) do not bind LuaTeX: a document's Lua code opens any file that its
user may open. So the kernel is asked: Landlock allows reading what TeX needs (programs, fonts, its configuration) and
writing in the work directory, and nothing else; resource limits bound memory, processor time and the size of files.
The restrictions hold for every process started from here, and cannot be taken back. Only the standard library is
imported, so that this costs milliseconds.
"""

import ctypes
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterable

READABLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/texmf", "/etc/fonts", "/etc/ld.so.cache", "/etc/alternatives",
            "/etc/perl", "/var/lib/texmf", "/var/lib/tex-common", "/var/cache/fontconfig")  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# From linux/landlock.h; the three system calls have these numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REFER, TRUNCATE = 1 << 13, 1 << 14
ALL_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
ONLY_FOR_DIRECTORIES = READ_DIR | REFER | (((1 << 13) - 1) & ~(EXECUTE | WRITE_FILE | READ_FILE))

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38
UNAVAILABLE = 78  # EX_CONFIG: the exit status that says "this host cannot do it"

libc = ctypes.CDLL(None, use_errno=True)


class PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def restrict_files(writable: str) -> None:
    """Forbid this process and its children every file outside what TeX needs and `writable`."""
    abi = _checked(libc.syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))
    handled = ALL_OF_ABI[min(abi, 3)]
    attributes = ctypes.c_uint64(handled)
    ruleset = _checked(libc.syscall(CREATE_RULESET, ctypes.byref(attributes), ctypes.c_size_t(8), 0))

    def allow(paths: Iterable[str], access: int) -> None:
        for path in paths:
            if not os.path.exists(path):
                continue
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = access & handled & (~0 if os.path.isdir(path) else ~ONLY_FOR_DIRECTORIES)
            rule = PathBeneath(allowed, descriptor)
            _checked(libc.syscall(ADD_RULE, ruleset, RULE_PATH_BENEATH, ctypes.byref(rule), 0))
            os.close(descriptor)

    allow(READABLE, EXECUTE | READ_FILE | READ_DIR)
    allow(DEVICES, READ_FILE | WRITE_FILE | TRUNCATE)
    allow((writable,), handled & ~EXECUTE)
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def main() -> None:
    """Apply the limits, then become the command."""
    limits, command = json.loads(sys.argv[1]), sys.argv[2:]
    program = shutil.which(command[0])
    if program is None:
        sys.stderr.write(f"{command[0]} is not installed\n")
        sys.exit(UNAVAILABLE)
    # When the worker is killed, nobody is left to end this process: the kernel does.
    _checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    for name, value in limits.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
    try:
        restrict_files(os.getcwd())
    except OSError as error:
        sys.stderr.write(f"Landlock is not available ({error.strerror}): the kernel or a container's filter lacks it\n")
        sys.exit(UNAVAILABLE)
    os.execv(program, command)  # noqa: S606 - no shell is what we want


if __name__ == "__main__":
    main()
