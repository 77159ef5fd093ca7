"""The rules of the code: which module may import which, and how long files may be.

Imports point one way, also those inside functions: scripts -> the rest of the package -> models ->
the base layer. There are no cycles, and no script imports a script. prepare.py imports only fetch.
"""
import ast
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SCRIPTS = {"train", "sample", "serve", "evaluate", "export", "runs", "bench"}
MODELS = {"model", "t5"}
BASE = {"configurator", "nanotune.errors", "nanotune.cli", "nanotune.device", "nanotune.files",
        "nanotune.attention", "nanotune.head", "nanotune.threads", "nanotune.torch_private",
        "nanotune.text.tokenizer", "nanotune.text.tokenizer_files", "nanotune.text.read",
        "nanotune.text.loader", "nanotune.text.bin_files", "nanotune.text.encode",
        "nanotune.text.documents", "nanotune.text.chat",
        "nanotune.formats.hub", "nanotune.formats.hf", "nanotune.formats.hf_config",
        "nanotune.formats.checks", "nanotune.generation.generate"}
# modules that data/fetch.py may import: they import neither torch nor a model
FOR_DATA = {"fetch", "nanotune.errors", "nanotune.cli", "nanotune.text.read",
            "nanotune.text.documents", "nanotune.text.chat", "nanotune.text.tokenizer",
            "nanotune.formats.hub"}


def name_of(path):
    return ".".join(path.relative_to(REPO).with_suffix("").parts)


def imported(path, known):
    """The modules of `known` that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return found & known


def modules():
    """{module name: path} of the scripts, the models and the package."""
    package = [p for p in REPO.glob("nanotune/**/*.py") if p.name != "__init__.py"]
    return {name_of(path): path for path in [*REPO.glob("*.py"), *package]}


KNOWN = modules()
IMPORTS = {name: imported(path, KNOWN.keys()) for name, path in KNOWN.items()}


def layer(name):
    """0 the base layer, 1 models, 2 the rest of the package, 3 scripts."""
    if name in SCRIPTS:
        return 3
    return 0 if name in BASE else 1 if name in MODELS else 2


def forbidden(imports):
    """[(importer, imported)] of imports from a higher layer, and of a script by a script."""
    return sorted((name, other) for name, others in imports.items() for other in others
                  if layer(other) > layer(name) or layer(name) == layer(other) == 3)


def import_cycle(imports):
    """Modules that import each other in a cycle, or None."""
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


def test_every_file_has_a_layer():
    root = {path.stem for path in REPO.glob("*.py")}
    assert root == SCRIPTS | MODELS | {"configurator"}
    assert KNOWN.keys() >= BASE | MODELS | SCRIPTS
    assert all(path.read_text() == "" for path in REPO.glob("nanotune/**/__init__.py"))


def test_no_module_imports_from_a_higher_layer():
    assert forbidden(IMPORTS) == []


def test_imports_have_no_cycle():
    assert import_cycle(IMPORTS) is None


def test_these_checks_find_forbidden_imports(tmp_path):
    """Each kind, also an import inside a function."""
    file = tmp_path / "x.py"
    file.write_text("def f():\n    from nanotune.formats import checkpoint\n    import train\n")
    assert imported(file, KNOWN.keys()) == {"nanotune.formats.checkpoint", "train"}
    wrong = {"nanotune.cli": {"model"}, "model": {"nanotune.training.plan"}, "sample": {"train"}}
    assert forbidden(IMPORTS | wrong) == sorted(
        (name, other) for name, others in wrong.items() for other in others)
    assert import_cycle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]


@pytest.mark.parametrize("path", sorted(REPO.glob("data/**/*.py")), ids=name_of)
def test_the_data_scripts_import_no_model_and_no_training(path):
    """The .bin format is the interface between data and training."""
    allowed = FOR_DATA if path.name == "fetch.py" else {"fetch"}
    assert imported(path, KNOWN.keys() | {"fetch"}) <= allowed


def test_no_file_of_the_package_runs_as_a_script():
    for path in REPO.glob("nanotune/**/*.py"):
        assert "\nif __name__" not in path.read_text(encoding="utf-8"), path


def test_files_and_functions_are_short():
    for name, path in KNOWN.items():
        text = path.read_text(encoding="utf-8")
        limit = 350 if name.startswith("nanotune") else 620 if name == "bench" else 450
        assert text.count("\n") <= limit, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, f"{path}: {node.name}"
