"""What chemistry reads are of (common/reads/chemistry.py): from files to the store, the line of a run, basecall.py."""

import json
import re
import sys
import uuid

import h5py
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

import basecall
import finetune_basecaller
from common import InputError
from common.args import parse_args
from common.chunks import open_data
from common.reads.chemistry import Chemistry, agreed, product_code
from common.reads.formats import raw_reads
from finetune_basecaller import Args, Basecaller, main
from tests.test_basecall import basecaller
from tests.test_formats import some_reads, write_fast5, write_mapped, write_pod5


@pytest.mark.parametrize(
    ("kit", "flow_cell", "rna", "said"),
    [
        ("SQK-LSK109", "FLO-MIN106", False, "R9.4.1 DNA"),
        ("SQK-LSK110-XL", "FLO-PRO002", False, "R9.4.1 DNA"),
        ("", "FLO-FLG001", False, "R9.4.1 DNA"),
        ("", "FLO-MIN106D", False, "R9.4.1 DNA"),
        ("SQK-RBK004", "", False, "R9.4.1 DNA"),
        ("SQK-LSK109", "FLO-MIN111", False, "DNA"),  # R10.3: the flow cell has the say
        ("SQK-LSK114", "FLO-MIN114", False, "R10.4.1 DNA"),
        ("SQK-NBD114-24", "FLO-PRO114M", False, "R10.4.1 DNA"),
        ("SQK-NBD114.24", "", False, "R10.4.1 DNA"),
        ("", "FLO-FLG114HD", False, "R10.4.1 DNA"),
        ("SQK-RNA002", "FLO-MIN106", True, "RNA002"),
        ("SQK-RNA001", "FLO-MIN107", True, "RNA002"),
        ("", "FLO-PRO002", True, "RNA002"),
        ("SQK-RNA004", "FLO-PRO004RA", True, "RNA004"),
        ("SQK-RNA004-XL", "", True, "RNA004"),
        ("", "FLO-MIN004RA", False, "RNA004"),
        ("", "FLO-MIN114", True, "RNA"),
        ("", "", True, "RNA"),
        ("", "", False, "unknown chemistry"),
    ],
)
def test_the_pore_is_that_of_the_flow_cell_or_of_the_kit(kit, flow_cell, rna, said):
    assert str(Chemistry.of(kit, flow_cell, rna, 0)) == said
    assert str(Chemistry.of(kit, flow_cell, rna, np.float32(4000))) == f"{said} at 4 kHz"


def test_what_differs_and_what_is_agreed_on():
    """What one of two does not know does not differ, nor do kits of one pore, nor 3012 and 3000 Hz."""
    of = Chemistry.of
    dna, other_kit = of("SQK-LSK109", "FLO-MIN106", False, 4000), of("SQK-LSK110", "FLO-PRO002", False, 4000)
    new, no_pore = of("SQK-LSK114", "", False, 4000), of("SQK-LSK111", "FLO-MIN112", False, 0)
    rna, near, fast, none = of("SQK-RNA002", "", True, 3012), *(of("", "", False, x) for x in (3000, 5000, np.nan))
    for one, two in ((rna, dna), (rna, fast), (dna, new), (near, fast), (rna, no_pore)):
        assert one.differs(two) and two.differs(one)
    for one, two in ((rna, near), (dna, other_kit), (dna, no_pore), (new, no_pore), (none, rna), (none, fast)):
        assert not one.differs(two) and not two.differs(one)
    assert agreed([none, dna, no_pore]) == dna and agreed([dna, new]) == ("DNA", "", 4000)
    assert agreed([rna, dna]) == agreed([none]) == of("", "", False, np.inf) == of("", "", False, -1) == ("", "", 0)


def test_product_codes():
    assert (
        product_code(b"sqk-lsk109")
        == product_code(np.bytes_(b"SQK-LSK109"))
        == product_code("SQK-lsk109")
        == "SQK-LSK109"
    )
    for text in ("", "not_set", None, b"\xff-\xff", "SQK-\n", "SQK-" + 40 * "1", "SQK-L 1", np.ones(3)):
        assert product_code(text) == ""


@pytest.mark.parametrize("layout", ["pod5", "pod5 of an old FAST5", "multi", "single", "old MinKNOW", "mapped"])
def test_codes_come_out_of_each_format_into_the_store(tmp_path, capsys, layout):
    reads, kit, cell = some_reads(1), "sqk-lsk109", "FLO-MIN106"
    path = tmp_path / f"reads.{'pod5' if 'pod5' in layout else 'fast5'}"
    if layout == "pod5":
        write_pod5(path, reads, sequencing_kit=kit, flow_cell_product_code=cell)
    elif "pod5" in layout:
        write_pod5(path, reads, sequencing_kit="", context_tags={"sequencing_kit": kit, "flowcell_type": cell.lower()})
    elif layout == "mapped":
        write_mapped(path, reads, sample_rate=4000, sequencing_kit=kit, flow_cell_product_code=cell)
    else:
        write_fast5(path, reads, single=layout == "single")
        with h5py.File(path, "r+") as file:
            group = file["UniqueGlobalKey"] if layout == "single" else next(iter(file.values()))
            tags = group.create_group("context_tags").attrs
            tags["sequencing_kit"] = np.bytes_(kit.encode())
            if layout == "old MinKNOW":
                tags["flowcell_type"] = np.bytes_(cell.lower().encode())
            else:
                group.create_group("tracking_id").attrs["flow_cell_product_code"] = cell
    (store,) = open_data([path])
    assert store.reads[["kit", "flow_cell", "rna"]].tolist() == [(b"SQK-LSK109", b"FLO-MIN106", False)]
    said = "reads: 1 of R9.4.1 DNA at 4 kHz (SQK-LSK109, FLO-MIN106)"
    assert capsys.readouterr().out.splitlines()[1:] == [said]


def test_codes_of_real_reads(shared_data):
    found = {}
    for path in [*(shared_data / "formats").iterdir(), shared_data / "na12878_r941.pod5"]:
        (found[path.name],) = {(raw.kit, raw.flow_cell, str(raw.chemistry)) for raw in raw_reads(path)}
    assert found == {
        "multi_read_gzip.fast5": ("SQK-LSK108", "", "R9.4.1 DNA at 4 kHz"),
        "same_reads_as_multi_read_gzip.pod5": ("SQK-LSK108", "", "R9.4.1 DNA at 4 kHz"),
        "single_read_gzip.fast5": ("", "", "unknown chemistry at 4 kHz"),
        "single_read_vbz_rna.fast5": ("SQK-RNA002", "FLO-MIN106", "RNA002 at 3 kHz"),
        "na12878_r941.pod5": ("SQK-LSK109", "FLO-PRO002", "R9.4.1 DNA at 4 kHz"),
    }


R9 = {"sequencing_kit": "SQK-LSK109", "flow_cell_product_code": "FLO-MIN106"}
R10 = {"sequencing_kit": "SQK-LSK114", "flow_cell_product_code": "FLO-PRO114M"}
RNA = {"sequencing_kit": "SQK-RNA002", "flow_cell_product_code": "FLO-MIN106"}


@pytest.mark.parametrize(
    ("runs", "differ"),
    [
        ((R9, R9 | {"flow_cell_product_code": "FLO-PRO002"}, R9 | {"sequencing_kit": "SQK-LSK110"}, {}), False),
        ((R9, R10), True),
        ((R9, RNA), True),
        ((R9, {"context_tags": {"experiment_type": "rna"}}), True),
        ((RNA, RNA | {"sample_rate": 3012}, RNA | {"sample_rate": 3000}), True),
        ((RNA | {"sample_rate": 3012}, RNA | {"sample_rate": 3000}), False),
        ((R10, R10 | {"sample_rate": 5000}), True),
    ],
)
def test_a_run_says_what_it_was_given_and_warns_of_a_mixture(tmp_path, capsys, runs, differ):
    for number, run in enumerate(runs):
        write_pod5(tmp_path / f"{number}.pod5", some_reads(number + 1, seed=number), **run)
    open_data([tmp_path])
    *_, reads, last = capsys.readouterr().out.splitlines()
    assert (last == "--data: chemistries or sample rates differ; a basecaller is for one of them") == differ
    counts = re.findall(r"(\d+) of ", reads if differ else last)
    assert sum(map(int, counts)) == sum(range(1, len(runs) + 1))


def test_of_many_sorts_the_most_frequent_are_said(tmp_path, capsys):
    for number in range(6):
        code = f"FLO-MIN90{number}"
        write_pod5(tmp_path / f"{number}.pod5", some_reads(6 - number, seed=number), flow_cell_product_code=code)
    open_data([tmp_path])
    words = "; ".join(f"{6 - i} of DNA at 4 kHz (FLO-MIN90{i})" for i in range(4))
    assert capsys.readouterr().out.splitlines()[-1] == f"reads: {words}; 3 of others"


def saved(chemistry=None):
    """What basecaller.pt of random weights holds; without `chemistry` as it was before it had any."""
    model = basecaller()
    if chemistry is None:
        return model.state_dict()
    model.chemistry = chemistry
    return model.to_file()


def test_a_basecaller_carries_the_chemistry_of_its_training_reads(few, tmp_path, monkeypatch):
    """Not that of other reads in its --data, nor that of the weights it started from."""
    monkeypatch.setattr(finetune_basecaller, "draw_calls", lambda *_: Figure())  # which takes longer than the run
    torch.save(saved(Chemistry("RNA", "RNA004", 3000)), tmp_path / "weights.pt")
    write_pod5(tmp_path / "unlabelled.pod5", some_reads(), **R10)
    settings = {"size": "tiny", "device": "cpu", "chunk_len": 400, "batch_size": 10, "steps": 1}
    data = (few, tmp_path / "unlabelled.pod5")
    main(Args(data=data, weights=tmp_path / "weights.pt", run_dir=tmp_path / "run", **settings))
    assert json.loads((tmp_path / "run" / "args.json").read_text())["chemistry"] == "R9.4.1 DNA at 4 kHz"
    for name in ("basecaller.pt", "basecaller_last.pt"):
        state = torch.load(tmp_path / "run" / name, weights_only=True)
        assert json.loads(bytes(state["chemistry"].tolist())) == ["DNA", "R9.4.1", 4000]
        assert Basecaller.from_state_dict(state).chemistry == Chemistry("DNA", "R9.4.1", 4000)
    assert Basecaller.from_state_dict(saved()).chemistry == Chemistry()
    for damaged in (torch.zeros(3, dtype=torch.uint8), torch.ones(3) / 2, torch.tensor([*b"[1,2,3,4]"]), "DNA"):
        with pytest.raises(ValueError, match="not a basecaller's weights"):
            Basecaller.from_state_dict(state | {"chemistry": damaged})


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """What basecall.py with a basecaller of this chemistry says of reads of these runs; call() without counts."""

    def said(chemistry, *runs):
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)
        folder = tmp_path / str(uuid.uuid4())
        folder.mkdir()
        for number, run in enumerate(runs):
            write_pod5(folder / f"{number}.pod5", some_reads(number + 1, seed=number), **run)
        torch.save(saved(chemistry), folder / "basecaller.pt")
        words = ["basecall.py", folder / "basecaller.pt", folder, "-o", folder / "calls.fastq", "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [*map(str, words)])
        basecall.main(parse_args(basecall.Args))
        return capsys.readouterr().err.replace("\r", "\n").splitlines()

    def call(*given):
        return [line.partition("basecaller.pt: ")[2] for line in said(*given) if "basecaller.pt: " in line]

    call.said = said
    return call


def test_basecall_says_that_reads_are_of_another_chemistry(call):
    r9, rna = Chemistry("DNA", "R9.4.1", 4000), Chemistry("RNA", "RNA002", 3000)
    end = ": expect wrong bases in them, or none"
    assert call(r9, R9, R10, R10 | {"sample_rate": 5000}, {}) == [
        "is for R9.4.1 DNA at 4 kHz; 5 of 10 reads are of another chemistry "
        f"(3 of R10.4.1 DNA at 5 kHz; 2 of R10.4.1 DNA at 4 kHz){end}"
    ]
    assert call(r9, RNA | {"sample_rate": 3012}) == [
        f"is for R9.4.1 DNA at 4 kHz; 1 of 1 reads are of another chemistry (1 of RNA002 at 3 kHz){end}"
    ]
    assert call(Chemistry("", "", 5000), {}) == [
        "is for unknown chemistry at 5 kHz; 1 of 1 reads are of another chemistry "
        f"(1 of unknown chemistry at 4 kHz){end}"
    ]
    assert call(rna, RNA | {"sample_rate": 3012}) == call(r9, R9, {}) == []
    assert "reads: 1 of R9.4.1 DNA at 4 kHz; the basecaller is for RNA002 at 3 kHz" in call.said(rna, R9)
    assert call(None, RNA, R10) == call(Chemistry(), RNA, R10) == []  # of before; of reads that did not say


def test_most_reads_without_a_base_are_said_where_their_chemistry_is_unknown(call, monkeypatch):
    calls = iter(["", "", "ACGT"])
    monkeypatch.setattr(basecall, "decode", lambda *_: (next(calls), np.arange(4), np.full(4, 9, np.uint8)))
    hint = "calls no base in most reads; are they of the chemistry that it was trained on?"
    assert call(Chemistry(), {}, {}) == [hint]
    calls = iter(["", "ACGT", "ACGT"])
    assert call(Chemistry(), {}, {}) == []


def test_it_is_said_where_no_base_is_called_at_all(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(basecall, "decode", lambda *_: ("", np.zeros(0, int), np.zeros(0, np.uint8)))
    torch.save(saved(Chemistry("DNA", "R9.4.1", 4000)), tmp_path / "basecaller.pt")
    write_pod5(tmp_path / "reads.pod5", some_reads(), **R10)
    with pytest.raises(InputError, match="no read was called"):
        basecall.main(basecall.Args(tmp_path / "basecaller.pt", (tmp_path / "reads.pod5",), tmp_path / "calls.fastq"))
    assert "4 of 4 reads are of another chemistry (4 of R10.4.1 DNA at 4 kHz)" in capsys.readouterr().err
