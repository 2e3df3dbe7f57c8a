"""The rooms of the house: imports run one way, and the pore model needs torch alone."""

import ast
import functools
import graphlib
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
COMMON = {f"common.{path.stem}" for path in (ROOT / "common").glob("*.py") if path.stem != "__init__"}
READS = {f"common.reads.{path.stem}" for path in (ROOT / "common" / "reads").glob("*.py") if path.stem != "__init__"}
OURS = SCRIPTS | COMMON | READS | {"common", "benchmark", "tests"}


@functools.cache
def all_imports_of(module):
    """What `module` imports, anywhere in it; `from common import InputError` apart."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: a relative import"
            names = [name.name for name in node.names]
            if (node.module, names) != ("common", ["InputError"]):
                found |= {node.module, *(f"{node.module}.{name}" for name in names)}
    return found


def imports_of(module):
    """The modules of ours that `module` imports."""
    return {name for name in all_imports_of(module) if name in OURS or name.split(".")[0] in ("benchmark", "tests")}


def test_imports_run_one_way():
    for rooms, allowed in ((READS, READS), (COMMON, COMMON | READS), (SCRIPTS, SCRIPTS | COMMON | READS)):
        for module in rooms:
            assert imports_of(module) <= allowed, module
    # fails if a module imports itself by way of others
    graphlib.TopologicalSorter({module: imports_of(module) for module in READS | COMMON | SCRIPTS}).prepare()


def test_a_method_imports_no_script_and_no_reader_of_files():
    allowed = COMMON - {"common.ctc", "common.tracking"}
    for method in ("barlow", "byol", "cpc", "dino", "moco", "simclr", "simsiam"):
        assert imports_of(method) <= allowed, method
    assert imports_of("masked") <= allowed | {"common.reads.pictures"}  # which draws, and reads none


def test_the_pore_model_knows_neither_run_nor_data():
    assert imports_of("common.pore_model") == {"common.device"} and not imports_of("common.device")


def test_the_pore_model_needs_torch_alone():
    """What is loaded with it, but not with torch, is this project's or Python's own; nor does it name anything else."""
    code = "import sys, torch; before = {*sys.modules}; from common.pore_model import PoreModel; "
    code += "print(*{name.partition('.')[0] for name in sys.modules.keys() - before})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) - sys.stdlib_module_names == {"common"}
    named = all_imports_of("common.pore_model") | all_imports_of("common.device")
    named = {name.partition(".")[0] for name in named}
    assert named - sys.stdlib_module_names == {"common", "torch"} and "fcntl" not in named  # not every system has it
