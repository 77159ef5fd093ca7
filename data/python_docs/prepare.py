"""The quickstart's two datasets, from what lies in every Python installation (no network).

    python data/python_docs/prepare.py [--out_dir=DIR] [--vocab_size=4096]
    python train.py --dataset=python_docs/docstrings ...

docstrings/  every docstring of the standard library, to pretrain on: 1.7 MB, some 8,000 documents
topics/      Python's language reference, as help("if") shows it, to finetune on: 0.4 MB

Both use one byte-level BPE, trained on the docstrings that train. A document, or one that mostly
repeats it, stands in one split only. Token counts differ a little between versions of Python.
"""
import ast
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
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def find_docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of a module and of all classes and functions in it, in the order of the file.

    Only statements are walked: a def hides in an `if` or a `try`, but never in an expression.
    """
    if isinstance(node, DOCUMENTED) and (docstring := ast.get_docstring(node)):
        yield docstring.strip()         # get_docstring has evened the indentation
    for block in ("body", "handlers", "orelse", "finalbody", "cases"):
        for child in getattr(node, block, ()):
            yield from find_docstrings(child)


def read_docstrings() -> list[str]:
    """The docstrings of the standard library, in the order of its paths."""
    library = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(library).as_posix(): path for path in library.rglob("*.py")
             if not SKIP & set(path.relative_to(library).parts)}
    docstrings = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")         # of the library's own invalid escapes
        for name in tqdm(sorted(files), desc="standard library", unit="file", disable=None):
            docstrings += find_docstrings(ast.parse(files[name].read_bytes()))
    if len(docstrings) < 1000:
        raise UserError(f"only {len(docstrings)} docstrings in {library}: this Python comes "
                        f"without the sources of its library; use one from python.org")
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


def main(argv: list[str] | None = None) -> None:
    p = fetch.parser(__doc__, Path(__file__).parent, tokenizers=(
        "train, gpt2, a tokenizer.json, a folder or a hub id (default: train)"))
    p.set_defaults(tokenizer="train")
    p.add_argument("--vocab_size", type=int, default=4096,
                   help="of --tokenizer=train (default: 4096)")
    args = p.parse_args(argv)
    topics, docstrings = drop_repeats(read_topics()), drop_repeats(read_docstrings())
    train, val = fetch.split_documents(docstrings)
    tokenizer = (fetch.choose_tokenizer(args.tokenizer) if args.tokenizer != "train"
                 else fetch.train_bpe((text for text, _ in train), args.vocab_size))
    counts = fetch.encode_dataset(args.out_dir / "docstrings", train, val, tokenizer)
    fetch.encode_dataset(args.out_dir / "topics", *fetch.split_documents(topics), tokenizer)
    fetch.print_next("quickstart_pretrain", args.out_dir / "docstrings", counts, context=128)


if __name__ == "__main__":
    fetch.run(main)
