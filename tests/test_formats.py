"""Raw reads out of POD5, FAST5, BLOW5 and mapped-signal HDF5 (common/reads/formats.py)."""

import os
import subprocess
import sys
import uuid
from datetime import UTC, datetime
from pathlib import Path

import h5py
import numpy as np
import pod5
import pytest

from common import InputError
from common.reads.formats import Rejected, count_reads, raw_reads

PROJECT = Path(__file__).parents[1]
RANGE, OFFSET, DIGITISATION, RATE = 1444.86, 6.0, 8192.0, 4000


def wander(rng, samples=3000):
    """int16 signal with many values, no two of them too frequent."""
    return np.clip(500 + 90 * rng.standard_normal(samples), 0, 1000).astype(np.int16)


def some_reads(number=4, seed=0):
    rng = np.random.default_rng(seed)
    return {str(uuid.UUID(bytes=rng.bytes(16))): wander(rng, 2000 + 300 * i) for i in range(number)}


def write_mapped(path, reads, bases=100, **attributes):
    """Mapped-signal HDF5 of {id: dacs}: base i starts at sample 5 + 10 i."""
    calibration = {"range": RANGE, "offset": OFFSET, "digitisation": DIGITISATION} | attributes
    with h5py.File(path, "w") as file:
        for read_id, dacs in reads.items():
            group = file.create_group(f"Reads/{read_id}")
            group["Dacs"], group["Reference"] = dacs, np.arange(bases, dtype=np.int16) % 4
            group["Ref_to_signal"] = 5 + 10 * np.arange(bases + 1, dtype=np.int32)
            group.attrs.update(calibration)


def without_bases(group):
    """Takes the labels out of a read in mapped-signal HDF5."""
    del group["Reference"], group["Ref_to_signal"]
    group["Reference"], group["Ref_to_signal"] = np.zeros(0, np.int16), np.zeros(1, np.int32)


def write_fast5(path, reads, single=False):
    channel = {"range": RANGE, "offset": OFFSET, "digitisation": DIGITISATION, "sampling_rate": RATE}
    with h5py.File(path, "w") as file:
        for read_id, dacs in reads.items():
            raw = file.create_group("Raw/Reads/Read_7" if single else f"read_{read_id}/Raw")
            raw.create_dataset("Signal", data=dacs, compression="gzip")
            raw.attrs["read_id"] = np.bytes_(read_id)
            file.create_group("UniqueGlobalKey/channel_id" if single else f"read_{read_id}/channel_id").attrs.update(
                channel
            )


def write_pod5(path, reads, **run):
    names = ["acquisition_id", "experiment_name", "flow_cell_id", "flow_cell_product_code", "protocol_name"]
    names += ["protocol_run_id", "sample_id", "sequencing_kit", "sequencer_position", "sequencer_position_type"]
    names += ["software", "system_name", "system_type"]
    times = dict.fromkeys(["acquisition_start_time", "protocol_start_time"], datetime(2020, 1, 1, tzinfo=UTC))
    settings = {"adc_min": -4096, "adc_max": 4095, "sample_rate": RATE, "context_tags": {}, "tracking_id": {}}
    run = pod5.RunInfo(**dict.fromkeys(names, "test") | times | settings | run)
    with pod5.Writer(path) as writer:
        for number, (read_id, dacs) in enumerate(reads.items()):
            writer.add_read(
                pod5.Read(
                    uuid.UUID(read_id), pod5.Pore(1, 1, "r9"), pod5.Calibration(OFFSET, RANGE / DIGITISATION), number,
                    0, 0.0, pod5.EndReason(pod5.EndReasonEnum.SIGNAL_POSITIVE, False), run, signal=dacs,
                )
            )  # fmt: skip


def picoampere_reads(path):
    return {raw.id: (raw.dacs.astype(np.float64) + raw.offset) * raw.scale for raw in raw_reads(path)}


def test_fast5_and_pod5_of_the_same_reads_agree(shared_data):
    fast5 = picoampere_reads(shared_data / "formats/multi_read_gzip.fast5")
    from_pod5 = picoampere_reads(shared_data / "formats/same_reads_as_multi_read_gzip.pod5")
    assert len(fast5) == 10 and fast5.keys() == from_pod5.keys()
    for read_id, current in fast5.items():
        np.testing.assert_allclose(from_pod5[read_id], current, rtol=1e-6)


def test_fast5_and_pod5_tell_the_same_of_run_and_read(shared_data):
    """Oxford Nanopore's converter made the one of the other."""
    paths = [shared_data / "formats" / name for name in ("multi_read_gzip.fast5", "same_reads_as_multi_read_gzip.pod5")]
    fast5, from_pod5 = ({raw.id: raw for raw in raw_reads(path)} for path in paths)
    for read_id, raw in fast5.items():
        other = from_pod5[read_id]
        assert (raw.tags.pop("fn"), other.tags.pop("fn")) == tuple(path.name for path in paths)
        assert raw.run == other.run and raw.tags == other.tags and raw.tags.keys() == {"ch", "mx", "rn", "st"}
    run = {"ID": "a08e850aaa44c8b56765eee10b386fc3e516a62b", "PM": "MS00000", "LB": "TEST_SAMPLE", "SM": "TEST_SAMPLE"}
    assert raw.run == run | {"DT": "2019-05-13T11:11:43.000+00:00"}  # and no flow cell
    first = fast5["0000173c-bf67-44e7-9a9c-1ad0bc728e74"].tags
    assert first == {"ch": 109, "mx": 4, "rn": 1093, "st": "2019-05-13T11:30:36.580+00:00"}  # sample 4534321


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({}, {}),
        ({"exp_start_time": "2020-02-28T23:59:59Z"}, {"DT": "28T23:59:59.000", "st": "29T00:00:00.500"}),
        ({"exp_start_time": b"2020-02-29T08:00:00.25+08:00"}, {"DT": "29T00:00:00.250", "st": "29T00:00:01.750"}),
        ({"exp_start_time": "2020-02-29T00:00:00"}, {"DT": "29T00:00:00.000", "st": "29T00:00:01.500"}),
        ({"exp_start_time": "1582934400"}, {"DT": "29T00:00:00.000", "st": "29T00:00:01.500"}),
        ({"exp_start_time": "1582934400", "start_time": b"x"}, {"DT": "29T00:00:00.000"}),
        ({"exp_start_time": "yesterday"}, {}),
        ({"exp_start_time": "9" * 30}, {}),
        ({"exp_start_time": "9" * 18}, {}),
        ({"read_number": -1}, {"rn": None}),
        ({"read_number": 2**40}, {"rn": None}),
        ({"read_number": np.inf}, {"rn": None}),
        ({"read_number": np.arange(3)}, {"rn": None}),
        ({"start_mux": b""}, {"mx": None}),
        ({"flow_cell_id": ""}, {"PU": None}),
    ],
)
def test_run_and_tags_of_fast5(tmp_path, single, attributes, expected):
    """What is no number, no time, or not there, is left out, and costs no read."""
    run = {"run_id": b"a1", "flow_cell_id": "FAX", "device_id": "MN1", "sample_id": "two\twörds"}
    read = {"read_number": 7, "start_mux": np.uint8(3), "start_time": np.uint64(6000)}  # 1.5 s
    write_fast5(tmp_path / "reads.fast5", some_reads(1), single)
    with h5py.File(tmp_path / "reads.fast5", "r+") as file:
        parent = file["UniqueGlobalKey"] if single else next(iter(file.values()))
        parent["channel_id"].attrs["channel_number"] = b"12"
        parent.create_group("tracking_id").attrs.update({**run, **attributes})
        (file["Raw/Reads/Read_7"] if single else parent["Raw"]).attrs.update({**read, **attributes})
    (raw,) = raw_reads(tmp_path / "reads.fast5")
    known = {"ID": "a1", "PU": "FAX", "PM": "MN1", "LB": "two?w?rds", "SM": "two?w?rds"}
    known |= {"fn": "reads.fast5", "ch": 12, "mx": 3, "rn": 7} | expected
    known |= {tag: f"2020-02-{known[tag]}+00:00" for tag in ("DT", "st") if tag in known}
    known = {tag: value for tag, value in known.items() if value is not None}
    assert raw.run == {tag: value for tag, value in known.items() if tag.isupper()}
    assert raw.tags == {tag: value for tag, value in known.items() if tag.islower()}


@pytest.mark.parametrize("name", ["single_read_gzip.fast5", "single_read_vbz_rna.fast5"])
def test_single_read_files_open(shared_data, name):
    (raw,) = raw_reads(shared_data / "formats" / name)
    current = (raw.dacs + raw.offset) * raw.scale
    assert len(raw.dacs) > 10_000 and raw.sample_rate in (3012, 4000) and raw.bases is None
    assert 40 < np.median(current) < 150  # pA, what a pore passes


def test_without_the_vbz_plugin_the_error_says_what_to_install(shared_data, tmp_path):
    (tmp_path / "vbz_h5py_plugin.py").write_text("raise ImportError('not installed')")
    path = shared_data / "formats/single_read_vbz_rna.fast5"
    code = f"import pathlib; from common.reads.formats import raw_reads; list(raw_reads(pathlib.Path({str(path)!r})))"
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{PROJECT}"}
    environment.pop("HDF5_PLUGIN_PATH", None)
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    last = done.stderr.splitlines()[-1]
    assert done.returncode != 0 and "InputError" in last
    assert str(path) in last and "pip install vbz-h5py-plugin" in last


@pytest.mark.parametrize("kind", ["mapped.hdf5", "multi.fast5", "single.fast5", "reads.pod5"])
def test_reads_come_back_as_written(tmp_path, kind):
    path, reads = tmp_path / kind, some_reads(1 if kind.startswith("single") else 4)
    if kind.endswith("pod5"):
        write_pod5(path, reads)
    elif kind.endswith("fast5"):
        write_fast5(path, reads, single=kind.startswith("single"))
    else:
        write_mapped(path, reads, sample_rate=RATE)
    raws = {raw.id: raw for raw in raw_reads(path)}
    assert raws.keys() == reads.keys()
    for read_id, raw in raws.items():
        assert raw.dacs.dtype == np.int16 and (raw.dacs == reads[read_id]).all()
        assert (raw.offset, raw.scale) == pytest.approx((OFFSET, RANGE / DIGITISATION))
        assert raw.sample_rate == RATE
        if kind == "mapped.hdf5":
            assert raw.bases.tolist() == [1, 2, 3, 4] * 25
            assert raw.base_starts.tolist() == list(range(5, 1006, 10))
        else:
            assert raw.bases is None


def test_a_signal_that_is_not_a_row_of_integers_is_corrupt(tmp_path):
    reads = {"good": wander(np.random.default_rng(0)), "2-D": np.zeros((500, 2), np.int16), "float": np.zeros(500)}
    write_mapped(tmp_path / "reads.hdf5", reads)
    left_out = [raw for raw in raw_reads(tmp_path / "reads.hdf5") if isinstance(raw, Rejected)]
    assert sorted(left_out) == [(name, "corrupt: the signal is not a row of integers") for name in ("2-D", "float")]


# --------------------------------------------------------------------------------------------------------------- BLOW5


def write_blow5(path, reads, **run):
    pyslow5 = pytest.importorskip("pyslow5")
    file = pyslow5.Open(str(path), "w")
    assert file.write_header({"asic_id": "1"} | run) == 0
    for number, (read_id, dacs) in enumerate(reads.items()):
        read, more = file.get_empty_record(aux=True)
        read |= {"read_id": read_id, "read_group": 0, "digitisation": DIGITISATION, "range": RANGE, "offset": OFFSET}
        read |= {"sampling_rate": float(RATE), "len_raw_signal": len(dacs), "signal": dacs}
        more |= {"channel_number": "12", "median_before": 0.0, "read_number": number, "start_mux": 2}
        assert file.write_record(read, more | {"start_time": RATE * number}) == 0
    file.close()


def test_blow5_gives_what_pod5_does(tmp_path):
    reads = some_reads()
    run = {"run_id": "a", "sequencing_kit": "sqk-lsk109", "flow_cell_product_code": "FLO-MIN106", "sample_id": "s"}
    write_blow5(tmp_path / "reads.blow5", reads, exp_start_time="2020-01-01T00:00:00Z", **run)
    found = list(raw_reads(tmp_path / "reads.blow5"))
    assert count_reads(tmp_path / "reads.blow5") == len(found) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["reads.blow5"]  # no index beside it
    for number, (raw, (read_id, dacs)) in enumerate(zip(found, reads.items(), strict=True)):
        assert raw.id == read_id and raw.dacs.dtype == np.int16 and np.array_equal(raw.dacs, dacs)
        assert (raw.offset, raw.scale, raw.sample_rate) == (OFFSET, RANGE / DIGITISATION, RATE)
        assert str(raw.chemistry) == "R9.4.1 DNA at 4 kHz" and raw.run["ID"] == "a" and raw.run["SM"] == "s"
        began = f"2020-01-01T00:00:0{number}.000+00:00"
        assert raw.tags == {"fn": "reads.blow5", "ch": 12, "mx": 2, "rn": number, "st": began}


def test_reads_that_a_damaged_blow5_has_lost_are_counted(tmp_path):
    write_blow5(tmp_path / "reads.blow5", some_reads())
    whole = (tmp_path / "reads.blow5").read_bytes()
    damaged, path = bytearray(whole), tmp_path / "damaged.blow5"
    damaged[len(whole) * 2 // 3] ^= 255  # of the third
    path.write_bytes(damaged)
    found = list(raw_reads(path))
    assert [isinstance(raw, Rejected) for raw in found] == [False, False, True, True]
    for content in (
        whole[:-60],
        whole[:-60] + b"5WOLB",
        b"",
        b"some other file",
    ):  # of which pyslow5 says less, or crashes
        path.write_bytes(content)
        assert count_reads(path) == 0
        with pytest.raises(InputError, match="cannot be read as blow5"):
            list(raw_reads(path))


def test_without_pyslow5_it_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyslow5", None)
    (tmp_path / "reads.blow5").touch()
    with pytest.raises(InputError, match=r"reads\.blow5: pip install pyslow5"):
        list(raw_reads(tmp_path / "reads.blow5"))
