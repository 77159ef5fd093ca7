"""README and docs: commands and programs run at tiny scale; links and lists of files are right."""
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

import pytest
from conftest import TEXT, hf_model
from tiny import REPO
from torch.distributed.run import get_args_parser

# in this order, since commands use runs of earlier documents
DOCUMENTS = ["README.md", *(f"docs/{name}.md" for name in (
    "training", "data", "tasks", "serve", "export", "cluster", "memory", "benchmarks", "design")),
    "CONTRIBUTING.md", "CHANGELOG.md", "data/README.md"]
TEXTS = {name: (REPO / name).read_text(encoding="utf-8") for name in DOCUMENTS}
README, MAKEFILE = TEXTS["README.md"], (REPO / "Makefile").read_text(encoding="utf-8")
MOST_BYTES = 12 * 1024  # of README.md
BENCHMARKS = ("bench.py", "experiments/t5_benchmarks.py")  # cannot run at tiny scale
NOT_OURS = ("llama.cpp/", "llama_cpp", "ctranslate2", "openai")  # in commands and programs
# models of the hub, created here as folders: a local folder is used first
NAMES = ("gpt2", "gpt2-xl")
# options that make each script's commands small; they replace those of the document
TINY = {
    "train.py": ["--max_iters=2", "--eval_interval=1", "--eval_iters=1", "--batch_size=1",
                 "--gradient_accumulation_steps=2", "--n_layer=1", "--n_head=1", "--n_embd=16",
                 "--device=cpu", "--overwrite=True"],
    "sample.py": ["--max_new_tokens=3", "--num_samples=1", "--device=cpu"],
    "serve.py": ["--port=0", "--device=cpu"],
    "evaluate.py": ["--batch_size=16", "--device=cpu"],
    "export.py": ["--overwrite=True"],
    "runs.py": [],
    "data/shakespeare/prepare.py": ["--input=text.txt"],
    "data/shakespeare_char/prepare.py": ["--input=text.txt"],
    "data/openwebtext/prepare.py": ["--help"],  # needs datasets: tests/test_data.py runs it
    "data/twitter_sentiment/prepare.py": ["--input=tweets.csv", "--samples=80"],
    "data/text/prepare.py": [],
    "data/python_docs/prepare.py": [],
    "data/jsonl/prepare.py": [],
    "data/pairs/prepare.py": [],
    "data/chat/prepare.py": [],
}
RESUMED = ["--max_iters=3", "--device=cpu"]  # a resumed run keeps its other fields
CONTEXTS = {"quickstart": 128, "chat": 64}   # --block_size of these config files; else 32
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
    "tweets.csv": "".join(f'"{"04"[i % 2]}","{i}","day","NO_QUERY","me","tweet {i}"\n'
                          for i in range(120)),
    "lambada_test.jsonl": "".join(
        json.dumps({"text": f"{i} of them went to the river"}) + "\n" for i in range(3)),
}


# -----------------------------------------------------------------------------
# the commands of a document

def code_in(text):
    """The commands and programs of a document, in order: [(language, code)]. Each line of a code
    block is one entry; a Python block is one entry. Code in sentences counts only if it starts with
    python or make."""
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```|`((?:python|make) [^`\n]+)`", text,
                             re.MULTILINE | re.DOTALL):
        language, block, span = match.groups()
        if language == "python":
            found.append(("python", block))
        else:
            lines = (span or block).replace("\\\n", " ").splitlines()
            found += [("shell", line.strip().lstrip("!")) for line in lines]
    return found


def command(line):
    """The words of a line that runs a script of this project, or None."""
    line = re.sub(r"^(srun |\.venv/bin/)", "", line.partition(" > ")[0])
    if not re.match(r"(python (?!-)|torchrun |make )", line) or any(
            name in line for name in (*NOT_OURS, *BENCHMARKS)):
        return None
    return shlex.split(line, comments=True)


def runs_of_make(words):
    """The [(script, arguments)] that `make WORDS` runs. Raises if a target is unknown."""
    printed = subprocess.run(["make", "-n", *words], cwd=REPO, check=True, capture_output=True,
                             text=True).stdout
    found = map(shlex.split, re.findall(r"\.venv/bin/python ((?:\w+/)*\w+\.py\b[^|;\n]*)", printed))
    return [(script, arguments) for script, *arguments in found]


def runs_of(line):
    """The [(script, arguments)] that a line of a document runs, on one process."""
    words = command(line)
    if words is None:
        return []
    if words[0] == "make":
        made = runs_of_make(words[1:]) if shutil.which("make") else []
        # other targets run tests, or are tested elsewhere
        return made if words[1] in ("quickstart", "chat") else []
    if words[0] == "torchrun":
        parsed = get_args_parser().parse_args(words[1:])
        return [(parsed.training_script, parsed.training_script_args)]
    return [(words[1], words[2:])]


def shrink(script, arguments):
    """The arguments of a tiny run: each option once, and no --epochs, which would contradict
    --max_iters."""
    arguments = [argument for argument in arguments if not argument.startswith("--epochs=")]
    if "--help" in arguments or (script == "train.py" and not arguments):
        return arguments
    added = TINY[script]
    if script == "train.py" and "--init_from=resume" in arguments:
        added = RESUMED
    elif script == "train.py":
        size = next((size for name, size in CONTEXTS.items() if name in arguments[0]), 32)
        left_out = (["block_size"] * ("finetune_t5" in arguments[0])
                    + ["overwrite"] * ("--auto_resume=True" in arguments))
        added = [*added, f"--block_size={size}"]
        added = [field for field in added if field[2:].partition("=")[0] not in left_out]
    # if an option is repeated, the last one counts; equal commands run once
    by_name = {argument.partition("=")[0]: argument for argument in [*arguments, *added]}
    return list(by_name.values())


# -----------------------------------------------------------------------------
# the commands run

@pytest.fixture
def sandbox(tmp_path, monkeypatch, gpt2_vocabulary, write_hf, t5_folders):
    """A copy of the project with small texts, and tiny models instead of downloads."""
    for name in ("config", "data", "nanotune"):
        shutil.copytree(REPO / name, tmp_path / name,
                        ignore=shutil.ignore_patterns("*.bin", "*.json", "*.pkl", "*.txt"))
    for script in REPO.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "my_texts").mkdir()
    for path, text in FILES.items():
        (tmp_path / path).write_text(text, encoding="utf-8")
    model = hf_model(vocab_size=50257, n_embd=16, n_positions=512)  # 16: for int8
    for name in NAMES:
        write_hf(model, name=name)
    shutil.copytree(t5_folders[0], tmp_path / "google-t5" / "t5-small")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("nanotune.serving.server.Server.serve_forever", lambda server: None)
    return tmp_path


def status_of(monkeypatch, script, arguments):
    """Run a script in this process; return its exit status."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("Line 1\n"))
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    try:
        if script.startswith("data/"):
            return runpy.run_path(script)["main"](arguments)
        return importlib.import_module(script.removesuffix(".py")).main(arguments)
    except SystemExit as end:
        return end.code


@pytest.mark.timeout(900)  # some 90 commands: a minute on an idle machine
def test_commands_and_programs_of_all_documents_run(sandbox, monkeypatch, capsys):
    done = []
    for name, text in TEXTS.items():
        for language, code in code_in(text):
            if language == "python":
                if not any(word in code for word in NOT_OURS):
                    exec(compile(code, f"a program of {name}", "exec"), {})
                continue
            for run in runs_of(code):
                run = run[0], shrink(*run)
                if run not in done:
                    done.append(run)
                    status = status_of(monkeypatch, *run)
                    assert not status, f"{name}: {code} ended with {status}"
    out = capsys.readouterr().out
    # the program of docs/export.md compares the files that its commands wrote
    assert re.search(r"^\['0.00%', '\d+.\d+%', '\d+.\d+%'\]$", out, re.MULTILINE)


def test_torchrun_runs_the_readmes_command_on_two_processes(sandbox):
    line = next(code for _, code in code_in(README) if code.startswith("torchrun"))
    runpy.run_path("data/shakespeare/prepare.py")["main"](["--input=text.txt"])
    (script, arguments), = runs_of(line)
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         script, *shrink(script, arguments)],
        check=True, timeout=250, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert (sandbox / "out-4gpus" / "ckpt.pt").is_file()


# -----------------------------------------------------------------------------
# the documents are complete

def test_each_script_is_shown_in_a_document():
    runs = [run for text in TEXTS.values() for language, code in code_in(text)
            if language == "shell" for run in runs_of(code)]
    scripts = {script for script, _ in runs}
    assert {path.name for path in REPO.glob("*.py")} - {
        "bench.py", "model.py", "t5.py", "configurator.py"} <= scripts
    assert {str(path.relative_to(REPO)) for path in REPO.glob("data/*/prepare.py")} <= scripts
    assert scripts <= TINY.keys(), "add the options of a tiny run to TINY"


@pytest.mark.skipif(not shutil.which("make"), reason="no make")
@pytest.mark.parametrize("target, name, title", [
    ("quickstart", "docs/training.md", "## Quickstart without make"),
    ("chat", "docs/tasks.md", "### Try it without data")])
def test_make_runs_the_commands_that_are_shown_without_make(target, name, title):
    section = re.split("^#+ ", TEXTS[name].partition(title)[2], flags=re.MULTILINE)[0]
    typed = [run for language, code in code_in(section) if language == "shell"
             and not code.startswith("make") for run in runs_of(code)]
    found = runs_of_make([target])
    made = [(script, [a for a in arguments if a != "--auto_resume=True"])
            for script, arguments in found]
    # after Ctrl-C the same target resumes
    assert all("--auto_resume=True" in arguments for script, arguments in found
               if script == "train.py")
    at = 2 if target == "chat" else 0  # make chat begins with two commands of quickstart
    assert list(dict.fromkeys(map(str, made[at:]))) == list(map(str, typed))


def test_the_readme_has_at_most_12_kb():
    assert len(README.encode()) <= MOST_BYTES


@pytest.mark.skipif(not (REPO / ".git").exists(), reason="not a git repository")
def test_git_ignores_the_exports_and_the_picture_of_the_documents():
    folders = set(re.findall(r"--export_dir=([\w-]+)", "".join(TEXTS.values())))
    paths = sorted({"export/x", "runs.png"} | {f"{folder}/x" for folder in folders})
    found = subprocess.run(["git", "check-ignore", *paths], cwd=REPO, capture_output=True,
                           text=True)
    assert found.stdout.split() == paths


@pytest.mark.parametrize("name", DOCUMENTS)
def test_no_table_has_a_cell_that_was_not_measured(name):
    cells = [cell.strip().lower() for line in TEXTS[name].splitlines() if line.startswith("|")
             for cell in line.split("|")]
    assert not [cell for cell in cells if re.match(r"(not (run|measured)|todo|tbd)\b", cell)]


def test_the_trees_list_each_file():
    """The README lists each script; docs/design.md lists each file of the package."""
    tree = README.split("## The files")[1].split("```")[1]
    listed = {line.split()[0] for line in tree.splitlines() if line.strip()}
    assert {path.name for path in REPO.glob("*.py")} <= listed
    assert all((REPO / name).exists() for name in listed)
    tree = TEXTS["docs/design.md"].split("## The package")[1].split("```")[1]
    named = sorted(re.findall(r"\w+\.(?:py|html|css|js)\b", tree))
    files = [path.name for path in (REPO / "nanotune").rglob("*.*")
             if path.suffix in (".py", ".html", ".css", ".js") and path.name != "__init__.py"]
    assert named == sorted(files)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_test_files_that_a_document_names_exist(name):
    for path in re.findall(r"tests/\w+\.py", TEXTS[name]):
        assert (REPO / path).is_file(), path


def anchors(text):
    """The anchors of a document's headings, as on GitHub."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.*)", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_links_and_anchors_exist(name):
    for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", TEXTS[name]):
        target = (REPO / name).parent / path if path else REPO / name
        assert target.exists(), path
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), anchor


def test_these_checks_find_wrong_commands_and_anchors():
    """An unknown flag of torchrun or target of make is an error. Code and anchors are found."""
    assert runs_of("torchrun --nproc_per_node=2 train.py --x=1") == [("train.py", ["--x=1"])]
    with pytest.raises(SystemExit):
        runs_of("torchrun --processes=2 train.py")
    if shutil.which("make"):
        with pytest.raises(subprocess.CalledProcessError):
            runs_of("make quickstrat")
    assert code_in("Use `python a.py --b=1` or\n```bash\npython c.py \\\n  --d=2\n```\n") == [
        ("shell", "python a.py --b=1"), ("shell", "python c.py    --d=2")]
    assert anchors("# What `x` is, now\n```\n# none\n```\n") == {"what-x-is-now"}
