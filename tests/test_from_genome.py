"""benchmark/from_genome.py: each round labels with the basecaller before and goes on from its weights."""

import importlib
import shutil
from pathlib import Path

import tyro

from benchmark import demo, from_genome
from common.reads import simulate


def run_without_work(monkeypatch, store):
    """Commands become (script, its arguments); those of labels leave a copy of `store`."""
    commands = []

    def take(words, check):
        script, *words = words[1:]
        name, words = (words[0], words[1:]) if script == "-m" else (script.removesuffix(".py"), words)
        module = simulate if name == "common.reads.simulate" else importlib.import_module(name)
        commands.append((name, tyro.cli(module.Args, args=words)))
        if name == "prepare_data":
            shutil.copytree(store, commands[-1][1].out)

    monkeypatch.setattr(demo.subprocess, "run", take)
    return commands


def test_rounds_go_on_from_one_another(few, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    commands, tested = run_without_work(monkeypatch, few), []
    monkeypatch.setattr(
        from_genome, "identities_by_read", lambda *args, **splits: tested.append(args) or {"a": [70.0], "b": [80.0]}
    )
    args = from_genome.Args(Path("reads.pod5"), Path("genome.fasta"), tests=(Path("other.hdf5"),), rounds=2, seed=7)
    from_genome.main(args)
    names = [name for name, _ in commands]
    assert names == ["common.reads.simulate", *["finetune_basecaller", "prepare_data"] * 2, "finetune_basecaller"]
    first, second, third = (args for name, args in commands if name == "finetune_basecaller")
    labels = [args for name, args in commands if name == "prepare_data"]
    basecallers = [args.run_dir / "basecaller_last.pt" for args in (first, second, third)]
    assert [args.weights for args in (first, second, third)] == [None, *basecallers[:2]]
    assert [args.basecaller for args in labels] == basecallers[:2]
    assert [args.data for args in (second, third)] == [(args.out,) for args in labels]
    assert [weights for weights, _ in tested] == [path for path in basecallers for _ in range(2)]
    assert [data for _, data in tested] == [labels[1].out, Path("other.hdf5")] * 3
    assert {args.seed for name, args in commands if name != "prepare_data"} == {7}
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("| round 2 | ") and last.endswith(" | 75.00 | 75.00 |")


def test_a_basecaller_of_ones_own_needs_no_simulated_reads(few, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    commands = run_without_work(monkeypatch, few)
    monkeypatch.setattr(from_genome, "identities_by_read", lambda *args, **splits: {"a": [70.0]})
    from_genome.main(from_genome.Args(Path("reads.pod5"), Path("genome.fasta"), basecaller=Path("my own.pt"), rounds=1))
    assert [(name, getattr(args, "basecaller", None)) for name, args in commands] == [
        ("prepare_data", Path("my own.pt")),
        ("finetune_basecaller", None),
    ]
