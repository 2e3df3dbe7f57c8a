""".ci/words, which `make lint` calls."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / ".ci" / "words"


def test_it_names_each_place_of_a_word_that_must_not_come_back_also_across_lines(tmp_path):
    (tmp_path / ".venv").mkdir()
    (tmp_path / "docs").mkdir()
    word, two = "part" + "ner", ("stands", "still")
    (tmp_path / "docs" / "page.md").write_text(f"A positive pair.\nIts {word.title()}s.\n")
    (tmp_path / "script.py").write_text(f"# One of them {two[0]}\n# {two[1]}. A {word}ship does not count.\n")
    (tmp_path / "picture.txt").write_text(word)
    (tmp_path / ".venv" / "library.py").write_text(word)
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    lines = [f"docs/page.md:2: {word.title()}s", f"script.py:1: {two[0]} # {two[1]}"]
    assert (done.returncode, done.stdout.splitlines()) == (1, lines), done.stderr
    (tmp_path / "docs" / "page.md").unlink()
    (tmp_path / "script.py").write_text("# The target network has a stop-gradient.\n")
    done = subprocess.run([sys.executable, SCRIPT], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
