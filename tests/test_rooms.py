"""The rooms of the house: imports run one way, and the pore model needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = {path.stem for path in ROOT.glob("*.py")}
COMMON = {f"common.{path.stem}" for path in (ROOT / "common").glob("*.py") if path.stem != "__init__"}
READS = {f"common.reads.{path.stem}" for path in (ROOT / "common" / "reads").glob("*.py") if path.stem != "__init__"}


def imports_of(module):
    """The modules of ours that `module` imports, anywhere in it; `from common import InputError` apart."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module, [name.name for name in node.names]) != (
            "common",
            ["InputError"],
        ):
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    ours = SCRIPTS | COMMON | READS | {"common", "common.reads", "benchmark", "tests"}
    return {name for name in found if name in ours or name.split(".")[0] in ("benchmark", "tests")} - {"common.reads"}


def test_imports_run_one_way():
    for module in READS:
        assert imports_of(module) <= READS, module
    for module in COMMON:
        assert imports_of(module) <= COMMON | READS, module
    for module in SCRIPTS:
        assert imports_of(module) <= SCRIPTS | COMMON | READS, module


def test_no_module_imports_itself_by_way_of_others():
    for module in COMMON | READS | SCRIPTS:
        seen, waiting = set(), list(imports_of(module))
        while waiting:
            name = waiting.pop()
            assert name != module, f"{module} imports itself by way of others"
            if name not in seen:
                seen.add(name)
                waiting += imports_of(name)


def test_a_method_imports_no_script_and_no_reader_of_files():
    for method in ("barlow", "byol", "cpc", "dino", "moco", "simclr", "simsiam"):
        assert imports_of(method) <= COMMON - {"common.ctc", "common.tracking"}, method


def test_the_pore_model_knows_neither_run_nor_data():
    assert imports_of("common.pore_model") == {"common.device"}
    assert not imports_of("common.device")


def test_the_pore_model_needs_torch_alone():
    """What is loaded with it, but not with torch, is this project's, or Python's own."""
    shown = "; import sys; print(' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    loaded = []
    for line in ("import torch", "from common.pore_model import PoreModel"):
        done = subprocess.run(
            [sys.executable, "-c", line + shown], cwd=ROOT, capture_output=True, text=True, check=True
        )
        loaded.append(set(done.stdout.split()))
    more = loaded[1] - loaded[0] - set(sys.stdlib_module_names)
    assert more == {"common"}
