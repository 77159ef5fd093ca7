r"""Your own conversations as a dataset, to finetune a model that chats.

    python data/chat/prepare.py --input=chats.jsonl --out_dir=data/mine
    python train.py config/finetune_chat.py --dataset=mine
    python sample.py --out_dir=out-chat --chat

FILE is .jsonl with one conversation per line, or a .json array of conversations. Their fields:

messages                     [{"role": "system", "user" or "assistant", "content": "..."}, ...]
conversations                ShareGPT's: [{"from": "human" or "gpt", "value": "..."}, ...]
instruction, input, output   Alpaca's: the user's text is instruction and input, which is optional
prompt, completion           also source_text, target_text, or question, answer

The loss counts only the assistant's texts and the mark that ends each (train.mask.bin).
nanotune/text/chat.py shows the template. End-of-text follows the conversation, not each turn.

The first message may be a system message; the next is a user's. White space around a text is
removed, and so is text after the last answer. A conversation longer than --block_size is cut after
an answer. If its first answer does not fit, the conversation is left out. Both are counted.

These are errors: another role, an empty text, an assistant's message before the first user's, and a
text that holds the end of a turn or end-of-text. --skip_bad leaves such conversations out and
counts them.

--user, --assistant, --system and --end change the texts of the template, for example to shorter
ones. --test_fraction=0.05 writes that fraction to test.jsonl, for evaluate.py --task=generate;
--test_input=FILE uses the conversations of a file instead.
"""
import argparse
import json
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import fetch
from fetch import Message, UserError

SHAREGPT = {"human": "user", "gpt": "assistant", "chatgpt": "assistant"}
WANTED = "messages, conversations (ShareGPT), instruction and output (Alpaca), or prompt and " \
         "completion"
ENCODED_AT_ONCE = 5000  # conversations
Chat = tuple[Message, ...]


def read_rows(path: Path) -> Iterator[tuple[str, dict]]:
    """Yields ('FILE, line N', fields) of a .jsonl, .csv or .tsv, or ('FILE, item N', fields) of a
    .json array. Raises UserError if the file is malformed."""
    if path.suffix.lower() != ".json":
        yield from fetch.read_fields(path)
        return
    try:
        items = json.loads(fetch.read_text(path))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: malformed JSON ({error})") from None
    if not isinstance(items, list):
        raise UserError(f"{path}: must be a JSON array of conversations; if it has one per line, "
                        "name it .jsonl")
    for number, fields in enumerate(items, 1):
        if not isinstance(fields, dict):
            raise UserError(f"{path}, item {number}: must be a JSON object")
        yield f"{path}, item {number}", fields


def find_messages(where: str, fields: dict) -> list:
    """Returns the messages of a line in one of the known forms, unchecked."""
    if "messages" in fields:
        return fields["messages"]
    if "conversations" in fields:
        turns = fields["conversations"]
        valid = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
        return [turn if "role" in turn else
                {"role": SHAREGPT.get(str(turn.get("from")), turn.get("from")),
                 "content": turn.get("value")} for turn in turns] if valid else turns
    no_options = argparse.Namespace(completion_column=None)
    prompt, completion = fetch.pick_columns(
        where, fields, no_options, [("instruction", "output"), *fetch.PAIRS], WANTED)
    asked = [fetch.as_text(where, fields, prompt)]
    if prompt == "instruction" and fields.get("input"):
        asked.append(fetch.as_text(where, fields, "input"))
    return [{"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": fetch.as_text(where, fields, completion)}]


def to_chat(where: str, fields: dict, tokenizer: fetch.AnyTokenizer) -> Chat:
    """Returns the conversation of a line up to its last answer. Raises UserError if the
    conversation is invalid."""
    messages = fetch.read_messages(find_messages(where, fields), where)
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=-1)
    if last < 0:
        raise UserError(f"{where}: no message is the assistant's; add an answer")
    for number, message in enumerate(messages, 1):
        fetch.check_text(message.content, tokenizer, f"{where}: message {number}")
    return tuple(messages[:last + 1])


def read_chats(path: Path | None, tokenizer: fetch.AnyTokenizer, skip_bad: bool) -> list[Chat]:
    """Returns the conversations of a file; none if `path` is None. With skip_bad, prints how many
    were left out."""
    chats, bad = [], []
    for where, fields in read_rows(path) if path else ():
        try:
            chats.append(to_chat(where, fields, tokenizer))
        except UserError as error:
            if not skip_bad:
                raise UserError(f"{error} (--skip_bad leaves such conversations out)") from None
            bad.append(str(error))
    if bad:
        print(f"note: {len(bad):,} conversations are left out; the first error: {bad[0]}")
    return chats


def warn_about_merges(tokenizer: fetch.AnyTokenizer, chat: Chat) -> None:
    """Prints a note if a whole conversation has other ids than its parts, encoded one by one."""
    parts = [i for ids, _ in fetch.encode_turns(tokenizer, chat) for i in ids]
    if tokenizer.encode(tokenizer.chat.text(chat)) != parts:
        print("note: this tokenizer merges the marks of turns with the texts between them: "
              "programs that encode a whole conversation at once, with the exported chat_template, "
              "get other ids than nanotune")


def encode_whole(chats: list[Chat], tokenizer: fetch.AnyTokenizer,
                 name: str) -> Iterator[list[tuple[list[int], list[int]]]]:
    """Yields [(ids, mask) of each turn] for each conversation, with a progress bar."""
    with tqdm(desc=name, total=len(chats), unit="chat", disable=None) as bar:
        for start in range(0, len(chats), ENCODED_AT_ONCE):
            part = chats[start:start + ENCODED_AT_ONCE]
            turns = iter(fetch.encode_turns(tokenizer, [m for chat in part for m in chat]))
            yield from ([next(turns) for _ in chat] for chat in part)
            bar.update(len(part))


def encode_chats(chats: list[Chat], tokenizer: fetch.AnyTokenizer, most: int,
                 name: str) -> tuple[np.ndarray, np.ndarray, list[Chat], int]:
    """Returns (ids, mask, the conversations that were kept, how many of these were cut). A
    conversation with more than `most` ids is cut after the last answer that fits."""
    end, ids, mask, kept, cut = fetch.document_end(tokenizer), array("H"), array("B"), [], 0
    for chat, whole in zip(chats, encode_whole(chats, tokenizer, name), strict=True):
        ends = np.cumsum([len(turn) for turn, _ in whole]) + len(end)
        n = max((i for i, message in enumerate(chat, 1)
                 if message.role == "assistant" and ends[i - 1] <= most), default=0)
        if n:
            kept.append(chat[:n])
            cut += n < len(chat)
            ids.extend([i for turn, _ in whole[:n] for i in turn] + end)
            mask.extend([counts for _, turn in whole[:n] for counts in turn] + [0] * len(end))
    return np.array(ids, dtype=fetch.TOKEN), np.array(mask, dtype=np.uint8), kept, cut


def write_chats(args: argparse.Namespace, splits: dict[str, list[Chat]],
                tokenizer: fetch.AnyTokenizer) -> tuple[int, int]:
    """Writes train.bin and val.bin with their masks, test.jsonl, and the template. Returns the
    numbers of tokens in train.bin and val.bin. Prints how many conversations were cut or left out.
    """
    files = tokenizer.files | {"tokenizer_config.json": fetch.chat_config(tokenizer)}
    tokens, kept, cut, out = {}, {}, 0, 0
    for split, chats in splits.items():
        tokens[split], mask, kept[split], shortened = encode_chats(
            chats, tokenizer, args.block_size, split)
        cut, out = cut + shortened, out + len(chats) - len(kept[split])
        if split == "test":
            files |= {"test.jsonl": jsonl(kept["test"])} if kept["test"] else {}
        else:
            files[f"{split}.mask.bin"] = mask.tobytes()
    counts = fetch.write_dataset(args.out_dir, [tokens["train"]], [tokens["val"]], files)
    chats = [chat for split in kept.values() for chat in split]
    turns = sum(message.role == "assistant" for chat in chats for message in chat)
    print("conversations: " + ", ".join(f"{len(kept[s]):,} {s}" for s in ("train", "val", "test"))
          + f"; {turns / max(1, len(chats)):.1f} answers and "
          f"{sum(map(len, tokens.values())) / max(1, len(chats)):.1f} tokens on average")
    if cut or out:
        print(f"note: {cut + out:,} conversations were longer than --block_size={args.block_size}: "
              f"{cut:,} are cut after an answer, {out:,} left out: their first answer does not fit")
    return counts


def jsonl(chats: list[Chat]) -> bytes:
    """Returns the content of a .jsonl file with one conversation per line."""
    return "".join(json.dumps({"messages": [message._asdict() for message in chat]},
                              ensure_ascii=False) + "\n" for chat in chats).encode("utf-8")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    p = fetch.parser(__doc__, Path(__file__).parent, "a .jsonl or .json file of conversations")
    fetch.add_split_options(p)
    p.add_argument("--test_input", type=Path, metavar="FILE",
                   help="test on this file instead of a part of --input")
    p.add_argument("--block_size", type=int, default=1024,
                   help="longer conversations are cut (default: 1024, GPT-2's context)")
    for part, text in fetch.Template().spec().items():
        if part != "before":
            what = "ends a turn" if part == "end" else f"begins a turn of the {part}"
            p.add_argument(f"--{part}", default=text, metavar="TEXT",
                           help=f"{what} (default: {text.encode('unicode_escape').decode()})")
    p.add_argument("--skip_bad", action="store_true",
                   help="leave malformed conversations out instead of stopping at the first")
    args = p.parse_args(argv)
    if args.input is None:
        raise UserError("no conversations are given; pass --input=FILE")
    if args.test_input and args.test_fraction:
        raise UserError("--test_input and --test_fraction contradict each other: pass one of them")
    fetch.check_fractions(args)
    args.end = args.end.replace("\\n", "\n")
    for part in (*fetch.ROLES, "end"):
        fetch.check_surrogates(getattr(args, part), f"--{part}")
    if not all((args.system, args.user, args.assistant, args.end.strip())):
        raise UserError("--system, --user, --assistant and --end must not be empty")
    return args


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    tokenizer = fetch.choose_tokenizer(args.tokenizer)
    fetch.attach(tokenizer, fetch.Template(args.system, args.user, args.assistant, end=args.end))
    chats, val, test = (read_chats(path, tokenizer, args.skip_bad)
                        for path in (args.input, args.val_input, args.test_input))
    if not chats:
        raise UserError(f"{args.input} has no conversations; it must have one per line, with "
                        f"{WANTED}")
    warn_about_merges(tokenizer, chats[0])
    splits = fetch.split_examples(chats, val, args.val_fraction, args.test_fraction, args.seed,
                                  test)
    if not splits["train"]:
        raise UserError(f"{args.input}: {len(chats)} conversations leave none for training; add "
                        "more")
    counts = write_chats(args, splits, tokenizer)
    fetch.print_next("finetune_chat", args.out_dir, counts, fetch.init_from_option(args.tokenizer))


if __name__ == "__main__":
    fetch.run(main)
