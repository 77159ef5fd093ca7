"""The quickstart's two datasets, from what lies in every Python installation (no network), and the
conversations of `make chat`.

    python data/python_docs/prepare.py [--out_dir=DIR] [--vocab_size=4096]
    python train.py --dataset=python_docs/docstrings ...

docstrings/     every docstring of the standard library, to pretrain on: 1.7 MB, 8,000 documents
topics/         Python's language reference, as help("if") shows it, to finetune on: 0.4 MB
conversations/  train.jsonl, val.jsonl and test.jsonl for data/chat/prepare.py: questions about
                classes and functions, with answers from their docstrings; some 2,800

The datasets use one byte-level BPE, trained on the docstrings that train. A document, or one that
mostly repeats it, stands in one split only; conversations in val.jsonl and test.jsonl are about
docstrings that validate. Token counts differ a little between versions of Python.
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

# tests, other people's packages, tables made by scripts, and the topics themselves
SKIP = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
LONGEST_ANSWER = 100  # characters: a conversation fits into the quickstart's 128 tokens


def find_docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and of all classes and functions in it, in the order of the file.

    Only statements are walked: a def hides in an `if` or a `try`, but never in an expression.
    """
    if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
        yield docstring.strip()         # get_docstring has evened the indentation
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from find_docstrings(child)


def read_library() -> dict[str, ast.Module]:
    """{path in the standard library: its syntax tree}, in the order of the paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")
             if not SKIP & set(path.relative_to(library).parts)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of the library's own invalid escapes
        return {name: ast.parse(files[name].read_bytes()) for name in
                tqdm(sorted(files), desc="standard library", unit="file", disable=None)}


def read_docstrings(library: dict[str, ast.Module]) -> list[str]:
    """The docstrings of the standard library, in the order of its paths."""
    docstrings = [docstring for tree in library.values() for docstring in find_docstrings(tree)]
    if len(docstrings) < 1000:
        raise UserError(f"only {len(docstrings)} docstrings in {sysconfig.get_paths()['stdlib']}: "
                        "this Python comes without the sources of its library; use one from "
                        "python.org")
    return docstrings


def read_topics() -> list[str]:
    """The topics of help(), in the order of their names."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise UserError("this Python comes without pydoc_data.topics; install all of its standard "
                        "library (Debian: apt install libpython3-stdlib), or use one from "
                        "python.org") from None
    return [topics[name].strip() for name in sorted(topics)]


def drop_repeats(documents: list[str]) -> list[str]:
    """`documents` without those that stand in others, by half or more of their paragraphs.

    A third of the topics' text does: the topic "if" is also a part of the topic "compound", and
    what a model learns from the one would validate in the other.
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
    """Yields (split, (module, name, node, answer)) of what has a short docstring, with the split
    that holds the docstring. The answer is its first paragraph."""
    for path, tree in library.items():
        module = path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if any(part.startswith("_") for part in module.split(".")):
            continue
        for name, node in find_named(tree, module):
            docstring = (ast.get_docstring(node) or "").strip()
            answer = " ".join(re.split(r"\n\s*\n", docstring)[0].split())
            split = next((split for split, held in splits.items() if docstring in held), None)
            if split and 20 <= len(answer) <= LONGEST_ANSWER:
                yield split, (module, name, node, answer)


def ask_about(module: str, name: str, node: ast.AST, answer: str,
              draw: random.Random) -> list[tuple[str, str]]:
    """[(question, answer), ...] about a class or function: what it is or does, and then, in any
    order, its module and the arguments that the first question showed."""
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
    """{"train", "val", "test": conversations}, lists of messages, each about one subject or two
    neighbours. Every second of those that validate is in "test"."""
    draw, subjects, chats = random.Random(1337), {"train": [], "val": []}, {}
    for split, subject in find_subjects(library, splits):
        subjects[split].append(subject)
    for split, held in subjects.items():
        chats[split] = []
        while held:
            size = 1 + (draw.random() < 0.4)
            taken, held = held[:size], held[size:]
            turns = [turn for subject in taken for turn in ask_about(*subject, draw)]
            chats[split].append([{"role": role, "content": text} for turn in turns
                                 for role, text in zip(("user", "assistant"), turn)])
    return {"train": chats["train"], "val": chats["val"][::2], "test": chats["val"][1::2]}


def write_chats(folder: Path, chats: dict[str, list]) -> None:
    """Writes the files SPLIT.jsonl, a conversation per line."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, held in chats.items():
        lines = [json.dumps({"messages": messages}) + "\n" for messages in held]
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{folder}: " + ", ".join(f"{split}.jsonl {len(held):,} conversations"
                                    for split, held in chats.items()))


def main(argv: list[str] | None = None) -> None:
    p = fetch.parser(__doc__, Path(__file__).parent, tokenizers=(
        "train, gpt2, a tokenizer.json, a folder or a hub id (default: train)"))
    p.set_defaults(tokenizer="train")
    p.add_argument("--vocab_size", type=int, default=4096,
                   help="of --tokenizer=train (default: 4096)")
    args = p.parse_args(argv)
    library = read_library()
    topics, docstrings = drop_repeats(read_topics()), drop_repeats(read_docstrings(library))
    train, val = fetch.split_documents(docstrings)
    tokenizer = (fetch.choose_tokenizer(args.tokenizer) if args.tokenizer != "train"
                 else fetch.train_bpe(train, args.vocab_size))
    counts = fetch.encode_dataset(args.out_dir / "docstrings", train, val, tokenizer)
    fetch.encode_dataset(args.out_dir / "topics", *fetch.split_documents(topics), tokenizer)
    write_chats(args.out_dir / "conversations", make_chats(library, {
        name: {text for text, _ in held} for name, held in (("train", train), ("val", val))}))
    fetch.print_next("quickstart_pretrain", args.out_dir / "docstrings", counts, context=128)


if __name__ == "__main__":
    fetch.run(main)
