"""Files and folders that are there as a whole or not at all, whatever stops the process that writes them."""

import contextlib
import fcntl
import glob
import os
import shutil

from common import InputError


@contextlib.contextmanager
def written_whole(path, advice="free space or choose another place", name=None):
    """A temporary path beside `path`, to write a file or a folder at; at the end it is flushed and renamed to `path`.

    InputError, which calls `path` by `name` and ends with `advice`, if it cannot be written.
    """
    part = path.with_name(f"{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(part)  # of a killed process that had this number
        yield part
        for file in (file for file in [part, *part.rglob("*")] if file.is_file()):
            with open(file, "rb+") as opened:
                os.fsync(opened.fileno())
        try:
            part.replace(path)
        except OSError:
            if not (part.is_dir() and path.is_dir()):  # another process finished the same work first
                raise
    except OSError as error:
        raise InputError(f"{name or path}: cannot be written ({error.strerror or error}); {advice}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(part)


def _remove(path):
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def make_once(path, make):
    """Calls make(), which makes `path`, unless that is there; of several processes one calls it and the others wait."""
    lock = path.with_name(f"{path.name}.lock")
    while not path.exists():
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = open(lock, "w")  # noqa: SIM115
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another place"
            ) from error
        with file:
            parts = path.parent.glob(f"{glob.escape(path.name)}.part-*")  # of killed processes
            try:
                fcntl.lockf(file, fcntl.LOCK_EX)
            except OSError:  # a file system without locks: all make it, and the first stays
                parts = ()
            if path.exists() or not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                continue  # made, or given up, by the process that had the lock
            for part in parts:
                _remove(part)
            try:
                make()
            finally:
                lock.unlink(missing_ok=True)
