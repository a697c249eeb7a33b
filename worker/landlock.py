"""Linux's Landlock (5.13 and newer): a process gives up all files but those it names, without any privilege."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Iterable
from pathlib import Path

# linux/landlock.h; the call numbers are the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

_WRITE_FILE, _READ_FILE, _READ_DIR, _REMOVE_DIR, _REMOVE_FILE = (1 << bit for bit in (1, 2, 3, 4, 5))
_MAKE_DIR, _MAKE_REGULAR, _TRUNCATE = (1 << bit for bit in (7, 8, 14))
_READ = _READ_FILE | _READ_DIR
_CHANGE = _READ | _WRITE_FILE | _REMOVE_DIR | _REMOVE_FILE | _MAKE_DIR | _MAKE_REGULAR | _TRUNCATE
_ON_FILES = _READ_FILE | _WRITE_FILE | _TRUNCATE
"""Of these, what a rule about a single file may hold."""

_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 5: 16}
"""Version -> how many rights over files it knows; what is not named for a folder is refused, executing included."""
_TCP_SINCE, _TCP = 4, 0b11
_SCOPES_SINCE, _SCOPES = 6, 0b11
"""Abstract sockets of other processes, and signals to them."""


class _Ruleset(ctypes.Structure):
    _fields_ = (("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _PathBeneath(ctypes.Structure):
    _pack_ = 1
    _layout_ = "ms"
    _fields_ = (("allowed", ctypes.c_uint64), ("folder", ctypes.c_int32))


def version() -> int:
    """Of the kernel's interface; 0 without one."""
    return max(_call(_CREATE_RULESET, None, ctypes.c_size_t(0), ctypes.c_uint32(_VERSION)), 0)


def restrict(readable: Iterable[Path], changeable: Iterable[Path]) -> bool:
    """From here on this process reads what is beneath ``readable``, and writes files beneath ``changeable`` too.

    Nor can it look into processes that are not so restricted (their memory and environment), nor, from version 6 on,
    send them signals. It must have given up new privileges (``PR_SET_NO_NEW_PRIVS``) before.

    Returns:
        Whether the kernel does so; False if it has no Landlock.

    Raises:
        OSError: it has, and refuses.
    """
    known = version()
    if not known:
        return False
    rights = (1 << _FILE_RIGHTS[max(number for number in _FILE_RIGHTS if number <= known)]) - 1
    ruleset = _Ruleset(rights, _TCP if known >= _TCP_SINCE else 0, _SCOPES if known >= _SCOPES_SINCE else 0)
    # Kernels take a longer description than they know as long as the rest is zero.
    handle = _checked(_call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.c_size_t(ctypes.sizeof(ruleset)), 0))
    try:
        for paths, allowed in ((readable, _READ), (changeable, _CHANGE)):
            for path in paths:
                _allow(handle, path, allowed & rights)
        _checked(_call(_RESTRICT_SELF, handle, 0))
    finally:
        os.close(handle)
    return True


def _allow(ruleset: int, path: Path, rights: int) -> None:
    try:
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return  # what is not there needs no right
    try:
        if not stat.S_ISDIR(os.fstat(file).st_mode):
            rights &= _ON_FILES
        _checked(_call(_ADD_RULE, ruleset, _PATH_BENEATH, ctypes.byref(_PathBeneath(rights, file)), 0))
    finally:
        os.close(file)


def _call(number: int, *arguments: object) -> int:
    return int(ctypes.CDLL(None, use_errno=True).syscall(ctypes.c_long(number), *arguments))


def _checked(result: int) -> int:
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    return result
