"""Files and folders that are there as a whole or not at all, whatever stops the process that writes them; arrays."""

import contextlib
import glob
import os
import shutil

import numpy as np
from filelock import FileLock

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
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{path}.lock"):
            if not path.exists():
                for part in path.parent.glob(f"{glob.escape(path.name)}.part-*"):  # of killed processes
                    _remove(part)
                make()
    except OSError as error:
        raise InputError(f"{path}: cannot be written ({error.strerror}); free space or choose another place") from error


class NpyWriter:
    """Appends rows to a .npy file of unknown length; plain writes, so that a full disk is an error and no crash."""

    def __init__(self, path, dtype, row=()):
        self.dtype, self.row, self.rows = np.dtype(dtype), tuple(row), 0
        self.file = open(path, "wb")  # noqa: SIM115
        self._header()

    def _header(self):
        # NumPy pads the header so that the number of rows can grow in place.
        header = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(self.file, header | {"shape": (self.rows, *self.row)})

    def append(self, array):
        array = np.ascontiguousarray(array, self.dtype).reshape(-1, *self.row)
        self.file.write(array)
        self.rows += len(array)

    def close(self):
        self.file.seek(0)
        self._header()
        self.file.close()


def load_npy(path):
    """The array in a .npy file, memory-mapped; ValueError or OSError if there is none."""
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError):
        raise
    except Exception as error:  # NumPy lets through what its parser of headers raises
        raise ValueError(f"{path.name} is no array") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path.name} is no array")
    return array
