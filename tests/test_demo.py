"""benchmark/demo.py: its commands are ones that the scripts take, with the seed it was given."""

import importlib
import shlex
import sys

import pytest
import tyro

from benchmark import demo
from common.reads import simulate


def test_the_scripts_take_its_commands(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo.subprocess, "run", lambda words, check: commands.append(words[1:]))
    monkeypatch.setattr(demo, "plot", lambda runs, out: None)
    monkeypatch.setattr(demo, "table", lambda runs: "the table")
    demo.main(seed=7)
    names = []
    for script, *words in commands:
        if script == "-m":
            args, name = tyro.cli(simulate.Args, args=words[1:]), words[0]
        else:
            name = script.removesuffix(".py")
            args = tyro.cli(importlib.import_module(name).Args, args=words)
        names.append(name)
        assert args.seed == 7
    assert names == ["common.reads.simulate", "masked", "finetune_basecaller", "finetune_basecaller"]
    pretrained, scratch = (shlex.join(words) for words in commands[2:])
    assert "--weights" in pretrained and "--weights" not in scratch
    (folder,) = (tmp_path / "runs").iterdir()
    assert (folder / "comparison.md").read_text() == "the table\n"
    assert "the table" in capsys.readouterr().out


def test_a_command_that_fails_ends_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(demo.subprocess.CalledProcessError):
        demo.main(seed=0)
