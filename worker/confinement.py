"""What a child does to itself before it touches an untrusted byte: limits, and no way out of its folder."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
from importlib.util import find_spec
from pathlib import Path

from worker import landlock, seccomp
from worker.sandbox import Limits

_SET_PDEATHSIG, _SET_NO_NEW_PRIVS = 1, 38
_NEW_USER, _NEW_NETWORK, _NEW_IPC = 0x10000000, 0x40000000, 0x08000000
_CAPABILITY_VERSION = 0x20080522

_PACKAGES = ("worker", "service", "aquant_core", "cupy_kernels")
_SYSTEM = (
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/usr/share/zoneinfo",
    "/etc/ld.so.cache", "/etc/localtime", "/etc/nsswitch.conf", "/etc/passwd", "/etc/group",
    "/proc/self", "/proc/cpuinfo", "/proc/meminfo", "/proc/stat", "/proc/filesystems",
    "/proc/sys/vm", "/proc/sys/kernel", "/sys/devices", "/sys/bus", "/sys/fs/cgroup",
    "/dev/null", "/dev/zero", "/dev/urandom", "/dev/random",
)  # fmt: skip
"""What the C library, Python, torch and onnxruntime read of a system."""

LIMITS, FILES, CALLS, NETWORK, PRIVILEGES = "limits", "files", "system calls", "namespaces", "privileges"
"""The confinements by name."""


def confine(limits: Limits, parent: int, folder: Path) -> list[str]:
    """Limits that cannot be raised, files of ``folder`` alone, no network, no programs, no life without the parent.

    The process must have one thread yet.

    Returns:
        The confinements in force; the kernel, or the container the worker runs in, may lack the others.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise SystemExit("the parent is gone")
    _limit(limits)
    inside = {LIMITS: True}
    # With a right to, the network namespace alone; without, within a user namespace, where such are allowed.
    inside[NETWORK] = not libc.unshare(_NEW_NETWORK | _NEW_IPC) or not libc.unshare(_NEW_USER | _NEW_NETWORK | _NEW_IPC)
    inside[PRIVILEGES] = not libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) and _drop_capabilities(libc)
    try:
        inside[FILES] = landlock.restrict([*map(Path, _SYSTEM), *_python()], [folder])
    except OSError:
        inside[FILES] = False
    inside[CALLS] = seccomp.restrict()
    return [name for name, done in inside.items() if done]


def _limit(limits: Limits) -> None:
    for what, amount in (
        # DATA, not AS: libraries reserve address space by the tens of GiB that they never touch.
        (resource.RLIMIT_DATA, limits.memory_bytes),
        (resource.RLIMIT_CPU, limits.cpu_seconds),
        (resource.RLIMIT_FSIZE, limits.file_bytes),
        (resource.RLIMIT_NOFILE, limits.open_files),
        (resource.RLIMIT_CORE, 0),
    ):
        hard = resource.getrlimit(what)[1]
        amount = amount if hard == resource.RLIM_INFINITY else min(amount, hard)
        resource.setrlimit(what, (amount, amount))


def _drop_capabilities(libc: ctypes.CDLL) -> bool:
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION, 0)
    none = (ctypes.c_uint32 * 6)()
    return not libc.capset(header, none)


def _python() -> list[Path]:
    """Where the interpreter, what is installed, and this project's packages lie; not a whole checkout, which may hold
    the service's data.
    """
    prefixes = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix}
    paths = {Path(prefix) / lib for prefix in prefixes for lib in ("lib", "lib64", "pyvenv.cfg")}
    paths |= {Path(entry) for entry in sys.path if any(Path(entry).glob("*.dist-info"))}
    for name in _PACKAGES:
        spec = find_spec(name)
        paths.update(map(Path, (spec.submodule_search_locations or ()) if spec else ()))
    return sorted(paths)
