r"""Your own task as a dataset: prompts and the completions to learn, or plain texts.

    python data/jsonl/prepare.py --input=FILE --out_dir=data/mine --loss_on=completion
    python train.py config/finetune_task.py --dataset=mine
    python evaluate.py --task=classify --out_dir=out-task --dataset=mine

FILE (UTF-8) holds a line an example, {"prompt": "...", "completion": "..."} or {"text": "..."}; or
it is a .csv whose first row names these columns, or whose only column is the text.

The examples are shuffled and packed end to end, end-of-text after each. Where a text holds
<|endoftext|>, it is several documents. End a prompt with a mark that never varies and no space
("Sentiment:"), and begin its completion with the space (" positive"): to GPT-2 a word with its
space is one token, and a space alone another.

--loss_on=all           each token is learnt (the default)
--loss_on=completion    only completions are, and texts; prompts are read, not learnt
--test_fraction=0.05    keeps so much apart as test.jsonl, for evaluate.py --task=classify
"""
import argparse
import random
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

WANTED = '{"prompt": "...", "completion": "..."} or {"text": "..."}'


def to_examples(where: str, fields: dict, tokenizer: fetch.AnyTokenizer) -> list[fetch.Example]:
    """Returns the example of a line's fields; of a text one for each document in it. End-of-text
    at the end of a completion is dropped, since each example gets one. Raises UserError."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    is_text = prompt is None and completion is None
    if is_text:
        prompt, completion = "", fields.get("text")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f"{where}: wants {WANTED}, all of them strings; it has "
                        f"{', '.join(fields) or 'nothing'}")
    texts = fetch.split_at(tokenizer.special.get("eos_token"), completion) if is_text else (
        [fetch.without_end(completion, tokenizer)])
    if not "".join(texts).strip():
        name = "text" if is_text else "completion"
        raise UserError(f"{where}: its {name} is empty, there is nothing to learn")
    for name, text in (("prompt", prompt), ("completion", texts[0])):
        fetch.check_no_end(where, name, text, tokenizer)
    return [fetch.Example(prompt, text) for text in texts]


def read_csv(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ('FILE, line N', fields) for each row. Raises UserError if the CSV is malformed."""
    rows = fetch.read_rows(path, fetch.read_text(path))
    where, header = next(rows, (str(path), []))
    columns = [name.strip().lower() for name in header]
    if len(columns) == 1:
        print(f"{path}: {header[0]!r} in the first row is taken for the name of the only column")
        columns = ["text"]
    if header and "text" not in columns and not {"prompt", "completion"} <= set(columns):
        raise UserError(f"{where}: the first row must name the columns prompt and completion, or "
                        f"text, not {', '.join(columns)}")
    for where, row in rows:
        if len(row) != len(columns):
            raise UserError(f"{where}: {len(row)} fields where the first row names "
                            f"{len(columns)}")
        yield where, dict(zip(columns, row))


def split(examples: list[fetch.Example], val_fraction: float, test_fraction: float,
          seed: int) -> dict[str, list[fetch.Example]]:
    """Shuffled and dealt out; of examples that are the same only one stays, so that none is in
    two splits."""
    distinct = list(dict.fromkeys(examples))
    if len(distinct) < len(examples):
        print(f"note: {len(examples) - len(distinct):,} examples repeat others and are left out")
    random.Random(seed).shuffle(distinct)
    n_test = round(len(distinct) * test_fraction)
    n_val = max(1, round(len(distinct) * val_fraction))
    return {"test": distinct[:n_test], "val": distinct[n_test:n_test + n_val],
            "train": distinct[n_test + n_val:]}


def tell_spaces(examples: list[fetch.Example]) -> None:
    """Says what looks like the commonest mistake of prompts for GPT-2."""
    pairs = [e for e in examples if e.prompt]
    ends = sum(e.prompt.endswith(" ") for e in pairs)
    begins = sum(not e.completion[0].isspace() and not e.prompt[-1].isspace() for e in pairs)
    if ends or begins:
        print(f"note: {ends:,} prompts end in a space and {begins:,} completions begin without "
              "one; GPT-2 learns best where the space is the completion's")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "a .jsonl or .csv file (required)")
    p.add_argument("--loss_on", default="all", choices=["all", "completion"],
                   help="which tokens are learnt (default: all)")
    p.add_argument("--val_fraction", type=float, default=0.1, help="(default: 0.1)")
    p.add_argument("--test_fraction", type=float, default=0.0, help="(default: 0)")
    p.add_argument("--seed", type=int, default=1337, help="of the order and the split")
    p.add_argument("--block_size", type=int, default=1024,
                   help="longer examples are counted (default: 1024, GPT-2's context)")
    args = p.parse_args(argv)
    if args.input is None:
        raise UserError("which examples? pass --input=FILE")
    fetch.check_fraction("val_fraction", args.val_fraction)
    fetch.check_fraction("test_fraction", args.test_fraction)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = fetch.choose_tokenizer(args.tokenizer)
    read = read_csv if args.input.suffix.lower() == ".csv" else fetch.read_jsonl
    examples = [example for where, fields in read(args.input)
                for example in to_examples(where, fields, tokenizer)]
    if not examples:
        raise UserError(f"{args.input} is empty; it should hold a line an example: {WANTED}")
    if args.loss_on == "completion" and not any(example.prompt for example in examples):
        raise UserError(f"{args.input} holds texts without prompts, each of whose tokens is to be "
                        "learnt; use --loss_on=all")
    tell_spaces(examples)
    splits = split(examples, args.val_fraction, args.test_fraction, args.seed)
    if not splits["train"]:
        raise UserError(f"{args.input}: {len(examples)} examples leave none to train on; give it "
                        "more of them")
    fetch.write_examples(args.out_dir, splits, tokenizer, args.loss_on, args.block_size)
    print(f"next: python train.py config/finetune_task.py "
          f"--dataset={fetch.dataset_name(args.out_dir)}")


if __name__ == "__main__":
    fetch.run(main)
