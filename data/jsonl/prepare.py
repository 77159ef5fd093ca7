r"""Your own task as a dataset: prompts and completions, or plain texts.

    python data/jsonl/prepare.py --input=FILE --out_dir=data/mine --loss_on=completion
    python train.py config/finetune_task.py --dataset=mine --separate_documents=True
    python evaluate.py --task=classify --out_dir=out-task --dataset=mine

FILE is .jsonl, with one example per line, or a .csv or .tsv whose first row names the columns:

prompt, completion           also source_text, target_text, or question, answer
instruction, input, output   Alpaca's, written as Alpaca's prompt; input is optional
text                         a plain text; if a table has one column, its name does not matter

--prompt_column= and --completion_column= name other columns. Numbers are used as text.
--hub=OWNER/NAME reads a dataset of the Hugging Face hub; it needs `pip install datasets`.

The examples are shuffled and packed one after another, each with end-of-text. <|endoftext|> in a
plain text separates documents. End each prompt with the same mark and no space ("Sentiment:"), and
begin each completion with the space (" positive"): GPT-2's tokens include the space before a word.

--loss_on=all           the loss counts all tokens (the default)
--loss_on=completion    the loss counts only completions and plain texts
--test_fraction=0.05    writes that fraction to test.jsonl, for evaluate.py --task=classify
"""
import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import UserError

PAIRS = (*fetch.PAIRS, ("instruction", "output"))
WANTED = "the columns prompt and completion, or text (--help lists others)"
# the prompts of Stanford Alpaca (Taori et al. 2023), without and with an input
ALPACA = """Below is an instruction that describes a task. Write a response that appropriately \
completes the request.

### Instruction:
{instruction}

### Response:
"""
ALPACA_INPUT = """Below is an instruction that describes a task, paired with an input that \
provides further context. Write a response that appropriately completes the request.

### Instruction:
{instruction}

### Input:
{input}

### Response:
"""


def find_columns(where: str, fields: dict, args: argparse.Namespace) -> tuple[str | None, str]:
    """Returns the names of the prompt's column, None for a plain text, and of the completion's.
    Raises UserError if the fields have no such columns."""
    text = [] if {"prompt", "completion"} & fields.keys() else [(None, "text")]
    return fetch.pick_columns(where, fields, args, [*PAIRS, *text], WANTED)


def to_examples(where: str, fields: dict, tokenizer: fetch.AnyTokenizer,
                args: argparse.Namespace) -> list[fetch.Example]:
    """Returns the example of a line, or one for each document of a plain text. End-of-text at the
    end of a completion is removed, because each example gets one. Raises UserError if a text is
    missing or holds end-of-text, or if the completion or plain text is empty."""
    prompt_column, column = find_columns(where, fields, args)
    completion = fetch.as_text(where, fields, column)
    if prompt_column is None:
        prompt, texts = "", fetch.split_at(tokenizer.special.get("eos_token"), completion)
    else:
        prompt = fetch.as_text(where, fields, prompt_column)
        texts = [fetch.without_end(completion, tokenizer)]
        if (prompt_column, column) == ("instruction", "output"):
            given = fetch.as_text(where, {"input": ""} | fields, "input")
            prompt = (ALPACA_INPUT if given else ALPACA).format(instruction=prompt, input=given)
    if not "".join(texts).strip():
        raise UserError(f"{where}: its {column} is empty; fill it or delete the row")
    for name, text in ((prompt_column, prompt), (column, texts[0])):
        fetch.check_no_end(where, name, text, tokenizer)
    return [fetch.Example(prompt, text) for text in texts]


def read_hub(name: str) -> Iterator[tuple[str, dict]]:
    """Yields ('NAME, row N', fields) of a dataset of the hub."""
    rows = fetch.load_with_datasets(
        name, lambda datasets: datasets.load_dataset(name, split="train"))
    for number, fields in enumerate(rows, 1):
        yield f"{name}, row {number}", fields


def read_examples(rows: Iterator[tuple[str, dict]], tokenizer: fetch.AnyTokenizer,
                  args: argparse.Namespace) -> list[fetch.Example]:
    return [example for where, fields in rows
            for example in to_examples(where, fields, tokenizer, args)]


def warn_about_spaces(examples: list[fetch.Example]) -> None:
    """Prints a note if prompts end in a space, or completions begin without one."""
    pairs = [e for e in examples if e.prompt]
    ends = sum(e.prompt.endswith(" ") for e in pairs)
    begins = sum(not e.completion[0].isspace() and not e.prompt[-1].isspace() for e in pairs)
    if ends or begins:
        print(f"note: {ends:,} prompts end in a space and {begins:,} completions begin without "
              "one; GPT-2 learns best if the space begins the completion")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "a .jsonl, .csv or .tsv file")
    p.add_argument("--hub", metavar="OWNER/NAME",
                   help="a dataset of the Hugging Face hub instead of --input")
    fetch.add_example_options(p)
    p.add_argument("--loss_on", default="all", choices=["all", "completion"],
                   help="tokens that the loss counts (default: all)")
    p.add_argument("--block_size", type=int, default=1024,
                   help="print how many examples have more tokens (default: 1024)")
    args = p.parse_args(argv)
    if (args.input is None) == (args.hub is None):
        raise UserError("pass either --input=FILE or --hub=OWNER/NAME")
    fetch.check_example_options(args)
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = fetch.choose_tokenizer(args.tokenizer)
    source = args.hub or args.input
    rows = read_hub(args.hub) if args.hub else fetch.read_fields(args.input)
    examples = read_examples(rows, tokenizer, args)
    val = [] if args.val_input is None else (
        read_examples(fetch.read_fields(args.val_input), tokenizer, args))
    if not examples:
        raise UserError(f"{source} is empty; it must have one example per line, with {WANTED}")
    if args.loss_on == "completion" and not any(example.prompt for example in examples):
        raise UserError(f"{source} has only texts without prompts; use --loss_on=all")
    warn_about_spaces(examples)
    splits = fetch.split_examples(examples, val, args.val_fraction, args.test_fraction, args.seed)
    if not splits["train"]:
        raise UserError(f"{source}: {len(examples)} examples leave none for training; add more")
    counts = fetch.write_examples(args.out_dir, splits, tokenizer, args.loss_on, args.block_size)
    options = [fetch.init_from_option(args.tokenizer)]
    if tokenizer.eot is not None:
        options.append("--separate_documents=True")
    fetch.print_next("finetune_task", args.out_dir, counts, *options, epochs=3)


if __name__ == "__main__":
    fetch.run(main)
