"""The house: who may import whom, and how large a file may grow.

Imports point one way, and those inside functions count: scripts -> the middle -> models -> the
ground. No circle; no script imports a script; a prepare.py imports nothing of ours but fetch.
"""
import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = {"train", "sample", "serve", "evaluate", "export", "runs", "bench"}
MODELS = {"model", "t5"}
GROUND = {"configurator", "nanotune.errors", "nanotune.cli", "nanotune.device", "nanotune.files",
          "nanotune.attention", "nanotune.head", "nanotune.torch_private",
          "nanotune.text.tokenizer", "nanotune.text.tokenizer_files", "nanotune.text.read",
          "nanotune.text.loader", "nanotune.text.bin_files", "nanotune.text.arrays",
          "nanotune.text.documents", "nanotune.text.chat",
          "nanotune.formats.hub", "nanotune.formats.hf", "nanotune.formats.hf_config",
          "nanotune.formats.checks", "nanotune.generation.generate"}
# what the data scripts may use: no torch, and no model
FOR_DATA = {"fetch", "nanotune.errors", "nanotune.cli", "nanotune.text.read",
            "nanotune.text.documents", "nanotune.text.chat", "nanotune.text.tokenizer",
            "nanotune.formats.hub"}


def name_of(path):
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def imported(path, known):
    """The modules of ours that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & known


def modules():
    """{module name: path} of scripts, models and package; every __init__.py is empty."""
    package = [p for p in REPO.glob("nanotune/**/*.py") if p.name != "__init__.py"]
    return {name_of(path): path for path in [*REPO.glob("*.py"), *package]}


KNOWN = modules()
IMPORTS = {name: imported(path, KNOWN.keys()) for name, path in KNOWN.items()}


def layer(name):
    """0 the ground, 1 models, 2 the middle, 3 scripts."""
    if name in SCRIPTS:
        return 3
    return 0 if name in GROUND else 1 if name in MODELS else 2


def forbidden(imports):
    """[(importer, imported)] of the arrows that point up, or from a script to a script."""
    return sorted((name, other) for name, others in imports.items() for other in others
                  if layer(other) > layer(name) or layer(name) == layer(other) == 3)


def circle(imports):
    """Modules that import each other in a circle, or None."""
    done, path = set(), []

    def visit(name):
        if name in path:
            return path[path.index(name):]
        if name in done:
            return None
        path.append(name)
        found = next(filter(None, map(visit, sorted(imports[name]))), None)
        path.pop()
        done.add(name)
        return found
    return next(filter(None, map(visit, sorted(imports))), None)


def test_every_file_has_its_layer():
    root = {path.stem for path in REPO.glob("*.py")}
    assert root == SCRIPTS | MODELS | {"configurator"}
    assert KNOWN.keys() >= GROUND | MODELS | SCRIPTS
    assert all(path.read_text() == "" for path in REPO.glob("nanotune/**/__init__.py"))


def test_imports_point_one_way():
    assert forbidden(IMPORTS) == []


def test_there_is_no_circle():
    assert circle(IMPORTS) is None


def test_the_rule_finds_what_it_forbids(tmp_path):
    """Each kind of fault, an import inside a function among them."""
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from nanotune.formats import checkpoint\n    import train\n")
    assert imported(file, KNOWN.keys()) == {"nanotune.formats.checkpoint", "train"}
    wrong = {"nanotune.cli": {"model"}, "model": {"nanotune.training.plan"}, "sample": {"train"}}
    assert forbidden(IMPORTS | wrong) == sorted(
        (name, other) for name, others in wrong.items() for other in others)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("path", sorted(REPO.glob("data/**/*.py")), ids=name_of)
def test_the_data_scripts_stand_alone(path):
    """The .bin format is the interface between data and training."""
    allowed = FOR_DATA if path.name == "fetch.py" else {"fetch"}
    assert imported(path, KNOWN.keys() | {"fetch"}) <= allowed


def test_no_file_of_the_package_is_a_script():
    for path in REPO.glob("nanotune/**/*.py"):
        assert "\nif __name__" not in path.read_text(encoding="utf-8"), path


def test_files_and_functions_fit_in_the_eye():
    for name, path in KNOWN.items():
        text = path.read_text(encoding="utf-8")
        limit = 350 if name.startswith("nanotune") else 620 if name == "bench" else 450
        assert text.count("\n") <= limit, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"
