"""One writer at a time in a run folder; readers need no lock."""

import errno
import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path

from pyro_vae.data.sizes import read_bytes
from pyro_vae.data.temporary import fcntl, sweep
from pyro_vae.errors import UsageError, warn

LOCK = ".lock"

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

_OWN: ContextVar[frozenset[tuple[int, int, int]]] = ContextVar("own folders", default=frozenset())
"""The folders that this thread has reserved: process, device and inode."""

_WRITTEN: ContextVar[tuple[tuple[Path, int, int], ...]] = ContextVar("written", default=())
"""The folders that this thread writes into: path, device and inode."""

_HELD: set[int] = set()
"""The descriptors of the locks of this process."""


@contextmanager
def writing(run: Path | None) -> Iterator[None]:
    """Be the only writer of a run folder, which is created if it does not exist.

    The system releases the lock when the process ends, however it ends. Then temporary files of
    the dead process are swept. Raises `UsageError`, which names the other process, if the folder
    has a writer.
    """
    if run is None:
        yield
        return
    created = _create(run)
    found = os.stat(run)
    own = (os.getpid(), found.st_dev, found.st_ino)
    if own in _OWN.get():  # inside `reserved`; a further writer inside this block is refused
        token = _OWN.set(_OWN.get() - {own})
        try:
            yield
        finally:
            _OWN.reset(token)
        return
    descriptor = _lock(run)
    place = _WRITTEN.set((*_WRITTEN.get(), (run.absolute(), *own[1:])))
    try:
        sweep(run)
        yield
    finally:
        _WRITTEN.reset(place)
        if descriptor is not None:
            _release(run, descriptor)
        with suppress(OSError):  # a folder with a run is not empty, and stays
            for folder in created:
                folder.rmdir()


@contextmanager
def reserved(run: Path) -> Iterator[None]:
    """Be the only writer of a run folder for several blocks of `writing`, one after another."""
    with writing(run):
        found = os.stat(run)
        token = _OWN.set(_OWN.get() | {(os.getpid(), found.st_dev, found.st_ino)})
        try:
            yield
        finally:
            _OWN.reset(token)


def require_unmoved(path: Path) -> None:
    """Raise `UsageError` if the run folder of a file is not the one that was locked.

    Otherwise the file would begin a new folder without the other files of its run, or go into the
    folder of another run.
    """
    for run, device, inode in _WRITTEN.get():
        if not path.absolute().is_relative_to(run):
            continue
        with suppress(FileNotFoundError, NotADirectoryError):
            found = os.stat(run)
            if (found.st_dev, found.st_ino) == (device, inode):
                continue
        raise UsageError(
            f"{run} was deleted, moved or replaced during this command, so {path.name} was not "
            "written: restore the folder and continue from its last files, or start again"
        )


def _create(run: Path) -> list[Path]:
    """Create a folder and its parents; return those that did not exist, the innermost first."""
    if os.path.isdir(run):
        return []
    if os.path.exists(run):
        raise UsageError(f"{run} must be a folder, but it is a file")
    missing = [folder for folder in (run, *run.parents) if not os.path.isdir(folder)]
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"the folder {run} cannot be created: {error.strerror}") from error
    return missing


def _lock(run: Path) -> int | None:
    """Lock a folder; None, with a warning, if the system has no locks."""
    try:
        while fcntl is not None:
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
            descriptor = os.open(run / LOCK, flags, 0o666)
            _HELD.add(descriptor)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_current(descriptor, run):
                    _sign(descriptor)
                    return descriptor
            except BaseException:
                _close(descriptor)
                raise
            _close(descriptor)  # its holder deleted it between our two calls
    except BlockingIOError:
        raise UsageError(
            f"{_holder(run)} is writing into {run}: wait until it ends, or choose another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise UsageError(f"{run} cannot be written: {error.strerror}") from error
    warn(f"{run} cannot be locked on this system: do not write into it from two processes")
    return None


def _release(run: Path, descriptor: int) -> None:
    """Delete the lock file and release the lock; a forked child leaves both to its parent."""
    if descriptor in _HELD:
        with suppress(OSError):  # the folder has gone, or its disk does not answer
            if _is_current(descriptor, run):
                os.unlink(run / LOCK)
        _close(descriptor)


def _is_current(descriptor: int, run: Path) -> bool:
    """Whether the lock file of the folder is still this one."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(run / LOCK))
    except (FileNotFoundError, NotADirectoryError):
        return False


def _sign(descriptor: int) -> None:
    with suppress(OSError):  # a full disk still has a lock, which does not name its holder
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())


def _holder(run: Path) -> str:
    with suppress(UsageError):
        words = read_bytes(run / LOCK)[:200].decode(errors="replace")
        return " ".join(words.split()) or "another process"
    return "another process"


def _close(descriptor: int) -> None:
    _HELD.discard(descriptor)
    os.close(descriptor)


def _leave_to_parent() -> None:
    """Close inherited locks, so that a worker that outlives its parent does not hold them."""
    for descriptor in tuple(_HELD):
        _close(descriptor)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_to_parent)
