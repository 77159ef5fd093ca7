"""The quickstart's two datasets and the conversations of `make chat`, from Python's documentation.

    python data/python_docs/prepare.py [--out_dir=DIR] [--vocab_size=4096]
    python train.py --dataset=python_docs/docstrings ...

docstrings/     all docstrings of the standard library, for pretraining: 1.7 MB, 8,000 documents
topics/         Python's language reference, as help("if") shows it, for finetuning: 0.4 MB
conversations/  train.jsonl, val.jsonl and test.jsonl for data/chat/prepare.py: questions about
                classes and functions, with answers from their docstrings; about 2,800 to train on

No network is needed. Both datasets use the same byte-level BPE, trained on the training docstrings.
Documents that mostly repeat others are left out, so that no text is in two splits. Conversations in
val.jsonl and test.jsonl are about validation docstrings. Token counts differ a little between
versions of Python.
"""
import ast
import json
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

# folders to skip: tests, third-party packages, generated tables, and the topics
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
LONGEST_ANSWER = 100  # characters, so that a conversation fits in the quickstart's 128 tokens


def find_docstrings(node: ast.AST) -> Iterator[str]:
    """Yields the docstrings of a module and of all its classes and functions, in their order.

    Walks statements only: a def may be inside an `if` or a `try`, but never in an expression.
    """
    if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
        yield docstring.strip()         # get_docstring has removed the indentation
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from find_docstrings(child)


def read_library() -> dict[str, ast.Module]:
    """Returns {path in the standard library: its syntax tree}, in the order of the paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")
             if not SKIP & set(path.relative_to(library).parts)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # the library has invalid escapes
        return {name: ast.parse(files[name].read_bytes()) for name in
                tqdm(sorted(files), desc="standard library", unit="file", disable=None)}


def read_docstrings(library: dict[str, ast.Module]) -> list[str]:
    """Returns the docstrings of the standard library, in the order of its paths."""
    docstrings = [docstring for tree in library.values() for docstring in find_docstrings(tree)]
    if len(docstrings) < 1000:
        raise UserError(f"only {len(docstrings)} docstrings in {sysconfig.get_paths()['stdlib']}: "
                        "this Python has no sources of its library; use one from python.org")
    return docstrings


def read_topics() -> list[str]:
    """Returns the topics of help(), in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python has no pydoc_data.topics; install all of its standard "
                        "library (Debian: apt install libpython3-stdlib), or use one from "
                        "python.org") from None
    return [topics[name].strip() for name in sorted(topics)]


def drop_repeats(documents: list[str]) -> list[str]:
    """Returns `documents` without those whose paragraphs are mostly in longer ones too.

    A third of the topics' text is repeated: the topic "if" is also a part of the topic "compound".
    Without this, a model would be trained on text of the validation split.
    """
    seen, kept = set(), set()
    for i in sorted(range(len(documents)), key=lambda i: -len(documents[i])):
        paragraphs = {" ".join(p.split()) for p in re.split(r"\n\s*\n", documents[i])}
        long = {p for p in paragraphs if len(p) >= 40}      # shorter ones repeat by chance
        if documents[i] not in seen and 2 * sum(map(len, long & seen)) <= sum(map(len, long)):
            kept.add(i)
        seen |= long | {documents[i]}
    return [documents[i] for i in sorted(kept)]


# -----------------------------------------------------------------------------
# conversations

def find_named(node: ast.AST, name: str) -> Iterator[tuple[str, ast.AST]]:
    """Yields (dotted name, node) of the public classes and functions in a module or class."""
    for child in node.body:
        if isinstance(child, DOCUMENTED) and not child.name.startswith("_"):
            yield f"{name}.{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from find_named(child, f"{name}.{child.name}")


def find_subjects(library: dict[str, ast.Module],
                  splits: dict[str, set[str]]) -> Iterator[tuple[str, tuple]]:
    """Yields (split, (module, name, node, answer)) of each public class or function whose
    docstring has a first paragraph, `answer`, of 20 to LONGEST_ANSWER characters. `split` names the
    split with the docstring."""
    for path, tree in library.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for name, node in find_named(tree, module):
            docstring = (ast.get_docstring(node) or "").strip()
            answer = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
            split = next((split for split, texts in splits.items() if docstring in texts), None)
            if split and 20 <= len(answer) <= LONGEST_ANSWER:
                yield split, (module, name, node, answer)


def ask_about(module: str, name: str, node: ast.AST, answer: str,
              draw: random.Random) -> list[tuple[str, str]]:
    """Returns [(question, answer), ...] about a class or function. The first question asks what it
    is or does. Questions about its module and its arguments follow at random; the first question
    shows the arguments if a later one asks for them."""
    is_class, asked, more = isinstance(node, ast.ClassDef), name, []
    if not is_class and draw.random() < 0.5:
        arguments = [a.arg for a in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)
                     if a.arg not in ("self", "cls")]
        asked = f"{name}({', '.join(arguments)})"
        *others, last = arguments or ["no arguments"]
        listed = f"{', '.join(others)} and {last}" if others else last
        more.append(("What does it take?", f"It takes {listed}."))
    if draw.random() < 0.5:
        more.append(("Which module is it in?", f"It is in the module {module}."))
    draw.shuffle(more)
    return [(f"What is {asked}?" if is_class else f"What does {asked} do?", answer), *more]


def make_chats(library: dict[str, ast.Module], splits: dict[str, set[str]]) -> dict[str, list]:
    """Returns {"train", "val", "test": conversations}. A conversation is a list of messages about
    one subject or two adjacent ones. Every second conversation about validation docstrings is in
    "test"."""
    draw, subjects, chats = random.Random(1337), {"train": [], "val": []}, {}
    for split, subject in find_subjects(library, splits):
        subjects[split].append(subject)
    for split, left in subjects.items():
        chats[split] = []
        while left:
            size = 1 + (draw.random() < 0.4)
            taken, left = left[:size], left[size:]
            turns = [turn for subject in taken for turn in ask_about(*subject, draw)]
            chats[split].append([{"role": role, "content": text} for turn in turns
                                 for role, text in zip(("user", "assistant"), turn)])
    return {"train": chats["train"], "val": chats["val"][::2], "test": chats["val"][1::2]}


def write_chats(folder: Path, chats: dict[str, list]) -> None:
    """Writes the files SPLIT.jsonl, one conversation per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, conversations in chats.items():
        lines = [json.dumps({"messages": messages}) + "\n" for messages in conversations]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder}: " + ", ".join(f"{split}.jsonl {len(conversations):,} conversations"
                                    for split, conversations in chats.items()))


def main(argv: list[str] | None = None) -> None:
    p = fetch.parser(__doc__, Path(__file__).parent, tokenizers=(
        "train, gpt2, a tokenizer.json, a folder, a run or a hub id (default: train)"))
    p.set_defaults(tokenizer="train")
    p.add_argument("--vocab_size", type=int, default=4096,
                   help="tokens of --tokenizer=train (default: 4096)")
    args = p.parse_args(argv)
    library = read_library()
    topics, docstrings = drop_repeats(read_topics()), drop_repeats(read_docstrings(library))
    train, val = fetch.split_documents(docstrings)
    tokenizer = (fetch.choose_tokenizer(args.tokenizer) if args.tokenizer != "train"
                 else fetch.train_bpe(train, args.vocab_size))
    counts = fetch.encode_dataset(args.out_dir / "docstrings", train, val, tokenizer)
    fetch.encode_dataset(args.out_dir / "topics", *fetch.split_documents(topics), tokenizer)
    write_chats(args.out_dir / "conversations", make_chats(library, {
        name: {text for text, _ in split} for name, split in (("train", train), ("val", val))}))
    fetch.print_next("quickstart_pretrain", args.out_dir / "docstrings", counts)


if __name__ == "__main__":
    fetch.run(main)
