"""Run one command where it can harm nothing: `python -I sandbox.py <parent's pid> <limits as JSON> <command…>`.

TeX's own switches (no shell escape, paranoid paths) do not bind LuaTeX: a document's Lua code opens any file that its
user may open, and engines have had holes that let a document run commands. So the kernel is asked:

- Landlock allows reading what TeX needs (programs, fonts, its configuration) and writing files in the work directory.
- A seccomp filter refuses sockets, signals to others, leaving the process group, and what else reaches beyond it.
- Resource limits bound the memory, processor time and files of each process; `watch.py` bounds their sum.

The restrictions hold for every process started from here, and cannot be taken back. This process itself stays outside
of them, as the leader of the process group: it ends the group when the worker dies. Only the standard library is
imported, so that this costs milliseconds.
"""

import contextlib
import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Iterable
from typing import NoReturn

READABLE = ("/usr", "/bin", "/lib", "/lib64", "/etc/texmf", "/etc/fonts", "/etc/ld.so.cache", "/etc/alternatives",
            "/etc/perl", "/var/lib/texmf", "/var/lib/tex-common", "/var/cache/fontconfig",
            "/var/cache/tectonic")  # fmt: skip
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")

# From linux/landlock.h; the three system calls have these numbers on every architecture.
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
RULE_PATH_BENEATH = 1
EXECUTE, WRITE_FILE, READ_FILE, READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14
ALL_OF_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}
ONLY_FOR_DIRECTORIES = READ_DIR | REFER | (((1 << 13) - 1) & ~(EXECUTE | WRITE_FILE | READ_FILE))
# No links, pipes, sockets or devices: what a document leaves behind is plain.
WRITING = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE

# System calls that are refused, by their numbers on x86_64 and aarch64.
REFUSED = {
    # The network, and what makes sockets without asking for one.
    "socket": (41, 198), "socketpair": (53, 199), "io_uring_setup": (425, 425),
    # Out of the process group, or out of sight.
    "setsid": (112, 157), "setpgid": (109, 154), "unshare": (272, 97), "setns": (308, 268),
    # Other processes of the user: the worker, other documents' compiles.
    "kill": (62, 129), "tkill": (200, 130), "tgkill": (234, 131), "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240), "pidfd_send_signal": (424, 424), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "prlimit64": (302, 261), "setpriority": (141, 140),
    "ioprio_set": (251, 30), "sched_setparam": (142, 118), "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122), "sched_setattr": (314, 274), "migrate_pages": (256, 238), "move_pages": (279, 239),
    # What is in no directory, and may outlive the compile.
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "semget": (64, 190),
    "msgget": (68, 186), "mq_open": (240, 180), "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    # Doors into the kernel that no engine needs.
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282),
}  # fmt: skip
# The machine's name -> its AUDIT_ARCH and its column above.
ARCHITECTURES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
FOREIGN_CALLS = 0x40000000  # numbers from here on are x86_64's second table (x32)

# From linux/filter.h and linux/seccomp.h.
LOAD, JUMP_EQUAL, JUMP_AT_LEAST, RETURN = 0x20, 0x15, 0x35, 0x06
KILL_PROCESS, REFUSE, ALLOW = 0x80000000, 0x00050000 | errno.EPERM, 0x7FFF0000
NUMBER, ARCHITECTURE = 0, 4  # offsets in `struct seccomp_data`

PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38
SECCOMP_MODE_FILTER = 2
UNAVAILABLE = 78  # EX_CONFIG: the exit status that says "this host cannot do it"

libc = ctypes.CDLL(None, use_errno=True)


class PathBeneath(ctypes.Structure):
    """`struct landlock_path_beneath_attr`."""

    _pack_ = 1
    _fields_ = (("allowed_access", ctypes.c_uint64), ("parent_fd", ctypes.c_int32))


class Instruction(ctypes.Structure):
    """`struct sock_filter`."""

    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class Program(ctypes.Structure):
    """`struct sock_fprog`."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(Instruction)))


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
    allow((writable,), WRITING)
    _checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    _checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def restrict_calls() -> None:
    """Forbid this process and its children the system calls in `REFUSED`; needs PR_SET_NO_NEW_PRIVS."""
    try:
        architecture, column = ARCHITECTURES[os.uname().machine]
    except KeyError as error:
        raise OSError(errno.ENOSYS, f"no table of system calls for {error}") from None
    instructions = [
        Instruction(LOAD, 0, 0, ARCHITECTURE),
        Instruction(JUMP_EQUAL, 1, 0, architecture),
        Instruction(RETURN, 0, 0, KILL_PROCESS),
        Instruction(LOAD, 0, 0, NUMBER),
        Instruction(JUMP_AT_LEAST, 0, 1, FOREIGN_CALLS),
        Instruction(RETURN, 0, 0, REFUSE),
    ]
    for numbers in REFUSED.values():
        instructions += [Instruction(JUMP_EQUAL, 0, 1, numbers[column]), Instruction(RETURN, 0, 0, REFUSE)]
    instructions.append(Instruction(RETURN, 0, 0, ALLOW))
    program = Program(len(instructions), (Instruction * len(instructions))(*instructions))
    _checked(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0))


def tasks_of_user() -> int:
    """Return how many processes and threads the user runs that can be seen from here."""
    tasks = 0
    for process in os.scandir("/proc"):
        with contextlib.suppress(OSError):
            if process.name.isdecimal() and process.stat().st_uid == os.getuid():
                tasks += len(os.listdir(f"{process.path}/task"))
    return tasks


def become(command: list[str], limits: dict[str, int]) -> NoReturn:
    """Give up everything that is not needed, then become the command."""
    program = shutil.which(command[0])
    if program is None:
        _unavailable(f"{command[0]} is not installed")
    try:
        # The limit counts all that the user runs.
        limits["NPROC"] += tasks_of_user()
        for name, value in limits.items():
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        restrict_files(os.getcwd())
        restrict_calls()
    except (OSError, ValueError) as error:
        _unavailable(f"Landlock or seccomp is not available ({error}): the kernel or a container's filter lacks it")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.execv(program, command)  # noqa: S606 - no shell is what we want


def _unavailable(why: str) -> NoReturn:
    sys.stderr.write(f"{why}\n")
    sys.stderr.flush()
    os._exit(UNAVAILABLE)


def main() -> None:
    """Start the command, wait for it, and end its process group when the worker is gone."""
    parent, limits, command = int(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3:]
    signal.signal(signal.SIGTERM, lambda *_: os.killpg(0, signal.SIGKILL))
    # A worker that is killed cannot end what it has started: the kernel tells us of its end.
    _checked(libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0))
    if os.getppid() != parent:
        sys.exit("the worker is gone")
    child = os.fork()
    if child == 0:
        become(command, limits)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    sys.exit(status if status >= 0 else 128 - status)


if __name__ == "__main__":
    main()
