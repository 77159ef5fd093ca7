r"""Your own task as a dataset: prompts and the completions to learn, or plain texts.

    python data/jsonl/prepare.py --input=FILE --out_dir=data/mine --loss_on=completion
    python train.py config/finetune_task.py --dataset=mine
    python evaluate.py --task=classify --out_dir=out-task --dataset=mine

FILE (UTF-8) holds a line an example, {"prompt": "...", "completion": "..."} or {"text": "..."}; or
it is a .csv whose first row names these columns, or whose only column is the text.

The examples are shuffled and packed end to end, end-of-text after each. End a prompt with a mark
that never varies and no space ("Sentiment:"), and begin its completion with the space
(" positive"): to GPT-2 a word with its space is one token, and a space alone another.

--loss_on=all           each token is learnt (the default)
--loss_on=completion    only completions are, and texts; prompts are read, not learnt
--test_fraction=0.05    keeps so much apart as test.jsonl, for evaluate.py --task=classify
"""
import argparse
import json
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

WANTED = '{"prompt": "...", "completion": "..."} or {"text": "..."}'


def to_example(where: str, fields: dict) -> fetch.Example:
    """An example of a line's fields, which are checked; `where` is what errors call the line."""
    prompt, completion = fields.get("prompt"), fields.get("completion")
    if prompt is None and completion is None:
        prompt, completion = "", fields.get("text")
    if not isinstance(prompt, str) or not isinstance(completion, str):
        raise UserError(f"{where}: wants {WANTED}, all of them strings; it has "
                        f"{', '.join(fields) or 'nothing'}")
    if not completion.strip():
        name = "completion" if "completion" in fields else "text"
        raise UserError(f"{where}: its {name} is empty, there is nothing to learn")
    return fetch.Example(prompt, completion)


def read_jsonl(path: Path) -> list[fetch.Example]:
    examples = []
    for number, line in enumerate(fetch.read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: malformed JSON ({error.msg} at column "
                            f"{error.colno}); each line wants {WANTED}") from None
        if not isinstance(fields, dict):
            raise UserError(f"{path}, line {number}: wants {WANTED}, not {line.strip()[:40]}")
        examples.append(to_example(f"{path}, line {number}", fields))
    return examples


def read_csv(path: Path) -> list[fetch.Example]:
    rows = fetch.read_rows(path, fetch.read_text(path))
    where, header = next(rows, (str(path), []))
    columns = [name.strip().lower() for name in header]
    if len(columns) == 1:
        print(f"{path}: {header[0]!r} in the first row is taken for the name of the only column")
        columns = ["text"]
    if header and "text" not in columns and not {"prompt", "completion"} <= set(columns):
        raise UserError(f"{where}: the first row must name the columns prompt and completion, or "
                        f"text, not {', '.join(columns)}")
    examples = []
    for where, row in rows:
        if len(row) != len(columns):
            raise UserError(f"{where}: {len(row)} fields where the first row names "
                            f"{len(columns)}")
        examples.append(to_example(where, dict(zip(columns, row))))
    return examples


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
    p.add_argument("--tokenizer", default="gpt2", help="gpt2, or a tokenizer.json")
    args = p.parse_args(argv)
    if args.input is None:
        raise UserError("which examples? pass --input=FILE")
    fetch.check_fraction("val_fraction", args.val_fraction)
    fetch.check_fraction("test_fraction", args.test_fraction)
    if args.tokenizer != "gpt2" and not Path(args.tokenizer).is_file():
        raise UserError(f"--tokenizer={args.tokenizer}: must be gpt2 or a tokenizer.json file")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    examples = (read_csv if args.input.suffix.lower() == ".csv" else read_jsonl)(args.input)
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
    encoder = (fetch.gpt2_encoder() if args.tokenizer == "gpt2"
               else fetch.json_encoder(Path(args.tokenizer).read_bytes(), args.tokenizer))
    fetch.write_examples(args.out_dir, splits, encoder, args.loss_on, args.block_size)
    print(f"next: python train.py config/finetune_task.py "
          f"--dataset={fetch.dataset_name(args.out_dir)}")


if __name__ == "__main__":
    fetch.run(main)
