"""Every command in README and docs runs, on a tiny scale, in the order in which it stands."""
import importlib
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TEXT, hf_model
from tiny import REPO

README = (REPO / "README.md").read_text(encoding="utf-8")
DOCS = {name: (REPO / "docs" / f"{name}.md").read_text(encoding="utf-8")
        for name in ("serve", "export", "tasks")}
FOREIGN = "llama.cpp/"  # scripts of other programs
NAMES = ("gpt2", "gpt2-medium", "gpt2-xl")  # made as folders: a folder goes before the hub
# what makes each script's commands small; appended, so that it wins
TINY = {
    "train.py": ["--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--batch_size=1",
                 "--gradient_accumulation_steps=2", "--block_size=16", "--n_layer=1", "--n_head=1",
                 "--n_embd=16", "--device=cpu", "--overwrite=True"],
    "sample.py": ["--max_new_tokens=3", "--num_samples=1", "--device=cpu"],
    "serve.py": ["--port=0", "--device=cpu"],
    "evaluate.py": ["--batch_size=16", "--device=cpu"],
    "export.py": [],
    "runs.py": [],
    "data/shakespeare/prepare.py": ["--input=text.txt"],
    "data/shakespeare_char/prepare.py": ["--input=text.txt"],
    "data/text/prepare.py": [],
    "data/python_docs/prepare.py": [],
    "data/jsonl/prepare.py": [],
    "data/pairs/prepare.py": [],
    "data/chat/prepare.py": [],
}
CONTEXTS = {"quickstart": 128, "chat": 64}  # --block_size of these config files
FILES = {
    "text.txt": TEXT * 3,
    "my_texts/one.txt": TEXT * 3,
    "prompts.txt": "Line 1\nLine 2\n",
    "token.txt": "correct-horse-battery\n",
    "wikitext-2.txt": " = A title = \n\n" + TEXT,
    "examples.jsonl": "".join(
        json.dumps({"prompt": f"Tweet: number {i}\nSentiment:", "completion": f" {label}"}) + "\n"
        for i, label in enumerate(["positive", "negative"] * 30)),
    "chats.jsonl": "".join(json.dumps({"messages": [
        {"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": "Yes."}]}) + "\n"
        for i in range(80)),
    "pairs.csv": "source_text,target_text\n" + "".join(
        f"Line {'abcdefgh'[i % 8] * (1 + i // 8)},a\n" for i in range(40)),
    "lambada_test.jsonl": "".join(
        json.dumps({"text": f"{i} of them went to the river"}) + "\n" for i in range(3)),
}


def commands(text):
    """The lines of a document's code that start a script of ours, as lists of words."""
    code = re.findall(r"^```\w*\n(.*?)^```|^((?:    .*\n)+)", text, re.MULTILINE | re.DOTALL)
    lines = [line.strip().lstrip("!") for block in code for line in "".join(block).splitlines()]
    words = [shlex.split(line, comments=True) for line in lines
             if re.match(rf"(\.venv/bin/)?(python|torchrun) (?!-[cm] |{FOREIGN})", line)]
    words = [command[:command.index(">")] if ">" in command else command for command in words]
    return list(dict.fromkeys(map(tuple, words)))  # once each, in order


def script_and_arguments(command):
    at = next(i for i, word in enumerate(command) if word.endswith(".py"))
    return command[at], list(command[at + 1:])


@pytest.fixture
def sandbox(tmp_path, monkeypatch, gpt2_vocabulary, write_hf, t5_folders):
    """A copy of the project, with a text and with tiny models where the README downloads."""
    for name in ("config", "data", "nanotune"):
        shutil.copytree(REPO / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("*.bin", "*.json", "*.pkl", "*.txt"))
    for script in REPO.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "my_texts").mkdir()
    for path, text in FILES.items():
        (tmp_path / path).write_text(text, encoding="utf-8")
    model = hf_model(vocab_size=50257, n_embd=16, n_positions=64)  # 16: what int8 takes
    for name in NAMES:
        write_hf(model, name=name)
    shutil.copytree(t5_folders[0], tmp_path / "google-t5" / "t5-small")
    monkeypatch.chdir(tmp_path)
    # the three commands at the README's top come before those that prepare their text
    runpy.run_path("data/shakespeare/prepare.py")["main"](["--input=text.txt"])
    return tmp_path


def test_the_readme_shows_commands():
    shown = README + "".join(DOCS.values())
    scripts = {script_and_arguments(command)[0] for command in commands(shown)}
    assert {"train.py", "sample.py", "evaluate.py", "data/shakespeare/prepare.py"} <= scripts
    assert scripts <= TINY.keys(), "tell TINY how to make a new script's commands small"


# docs/serve.md shows the runs that the README's commands make
@pytest.mark.parametrize("text", [README + DOCS["serve"], DOCS["export"], DOCS["tasks"]],
                         ids=["README and serve", "export", "tasks"])
def test_a_documents_commands_run(sandbox, monkeypatch, capsys, text):
    monkeypatch.setattr("nanotune.serving.server.Server.serve_forever", lambda server: None)
    for command in commands(text):
        script, argv = script_and_arguments(command)
        if "torchrun" in command[0]:
            continue
        monkeypatch.setattr(sys, "stdin", io.StringIO("Line 1\n"))
        argv += TINY[script]
        if script == "train.py":  # a conversation takes more than 16 tokens
            size = next((size for name, size in CONTEXTS.items() if name in argv[0]), 16)
            argv = [arg.replace("--block_size=16", f"--block_size={size}") for arg in argv]
        if text is DOCS["tasks"] and script == "train.py":  # T5 has no --block_size
            argv.remove("--block_size=16")
        monkeypatch.setattr(sys, "argv", [script, *argv])
        if script.startswith("data/"):
            main = runpy.run_path(str(sandbox / script))["main"]
            status = main(argv)
        else:
            try:
                status = importlib.import_module(script.removesuffix(".py")).main(argv)
            except SystemExit as end:
                status = end.code
        assert not status, f"{' '.join(command)} ended with {status}"
        capsys.readouterr()
    if text is DOCS["export"]:  # its program compares the files that its commands wrote
        programs = re.findall("```python\n(.*?)```", text, re.DOTALL)
        exec(next(program for program in programs if "first[0]" in program), {})
        assert re.fullmatch(r"\['0.00%', '\d+.\d+%', '\d+.\d+%'\]\n", capsys.readouterr().out)


def test_the_readmes_torchrun_command_runs(sandbox):
    command = next(c for c in commands(README) if c[0] == "torchrun")
    script, argv = script_and_arguments(command)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         script, *argv, *TINY[script]],
        check=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (sandbox / "out-shakespeare" / "ckpt.pt").is_file()


def test_the_makefile_runs_what_the_readme_says():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8")
    rule = makefile.split("\nquickstart:")[1].split("\n\n")[0]
    made = [line.split("$(PY) ")[1].replace(" --overwrite=True", "")
            for line in rule.splitlines() if "$(PY) " in line]
    typed = [line.removeprefix(".venv/bin/python ") for line in README.splitlines()
             if line.startswith(".venv/bin/python ") and ".py" in line]
    assert made == typed


def test_make_chat_runs_what_the_readme_says():
    makefile = (REPO / "Makefile").read_text(encoding="utf-8").replace(
        "$(TALKS)", "data/python_docs/conversations")
    chat = re.search(r"\nCHAT = \$\(PY\) (.*)", makefile).group(1)
    rule = makefile.split("\nchat:")[1].split("\n\n")[0]
    made = [line.split("$(PY) ")[1].replace(" --overwrite=True", "")
            for line in rule.splitlines() if "$(PY) " in line]
    section = README.split("## Chat\n")[1].split("With your own")[0]
    typed = [line.removeprefix("python ") for line in section.splitlines()
             if line.startswith("python ")]
    assert [*made[2:], chat] == typed
    assert [line.split()[0] for line in made[:2]] == ["data/python_docs/prepare.py", "train.py"]


def test_the_file_tree_is_whole():
    """Each script, and each file of the package, by name; what is listed exists."""
    tree = README.split("## The files")[1].split("```")[1]
    package, root = [], []
    for line in tree.splitlines():
        (package if line.startswith("  ") else root).append(line)
    listed = {line.split()[0] for line in root if line.strip()}
    assert {path.name for path in REPO.glob("*.py")} <= listed
    assert all((REPO / name).exists() for name in listed)
    files = {path.name for path in (REPO / "nanotune").rglob("*.py")} - {"__init__.py"}
    named = re.findall(r"[\w/]+\.py", "\n".join(package))
    assert set(named) == files


def test_links_lead_somewhere():
    for document, folder in ((README, REPO), *((text, REPO / "docs") for text in DOCS.values())):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document):
            assert Path(folder, target).exists(), target
