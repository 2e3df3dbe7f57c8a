"""Fixtures of all tests: a cache folder of their own, the real reads where they are, simulated reads, processes."""

import sys
from functools import partial
from pathlib import Path

import h5py
import pytest

import prepare_data
from common.args import parse_args
from common.reads.simulate import write_simulated
from common.reads.store import prepare
from tests import forks


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Where prepared reads go: an empty place for each test, never the user's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "poressl"


@pytest.fixture(scope="session")
def shared_data():
    """The folder of real reads beside the project; it is not part of it."""
    folder = Path(__file__).parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real reads in {folder}, which is not there")
    return folder


@pytest.fixture(scope="session")
def simulated(tmp_path_factory):
    """Mapped-signal HDF5 of 12 simulated reads of 1000 to 2000 bases; two of them are in the validation split."""
    path = tmp_path_factory.mktemp("simulated") / "reads.hdf5"
    write_simulated(path, reads=12, mean_bases=1000, seed=1)
    return path


@pytest.fixture
def one_place(simulated, tmp_path):
    """The names of the simulated reads, all with the signal and the bases of one of them."""
    with h5py.File(simulated) as every, h5py.File(tmp_path / "one_place.hdf5", "w") as file:
        for name in every["Reads"]:
            every.copy("Reads/simulated-1-1", file.require_group("Reads"), name)
    return tmp_path / "one_place.hdf5"


@pytest.fixture(scope="session")
def few(simulated, tmp_path_factory):
    """A read store of three of the simulated reads, one of them in the validation split: 43 and 28 tiles of 400."""
    folder = tmp_path_factory.mktemp("few")
    with h5py.File(simulated) as every, h5py.File(folder / "reads.hdf5", "w") as file:
        for name in ("simulated-1-1", "simulated-1-3", "simulated-1-6"):
            every.copy(f"Reads/{name}", file.require_group("Reads"))
    return prepare([folder / "reads.hdf5"], folder / "store").path


@pytest.fixture
def one_read(simulated, tmp_path):
    """Mapped-signal HDF5 of one simulated read, which is for training."""
    with h5py.File(simulated) as every, h5py.File(tmp_path / "one.hdf5", "w") as file:
        every.copy("Reads/simulated-1-3", file.require_group("Reads"))
    return tmp_path / "one.hdf5"


@pytest.fixture
def command(monkeypatch):
    """prepare_data.py with these words, in this process."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, words)])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        prepare_data.main(parse_args(prepare_data.Args))

    return run


@pytest.fixture(scope="session")
def server():
    """server(folder, *calls): exit code and lines on standard error of a process that makes these calls there."""
    with forks.server() as run:
        yield run


@pytest.fixture
def child(server, tmp_path):
    return partial(server, tmp_path)
