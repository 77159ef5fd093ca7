"""Generates text from a trained or pretrained model.

    python sample.py --out_dir=out-shakespeare
    python sample.py --init_from=gpt2 --start="What is the answer?" --num_samples=5
    python sample.py --out_dir=out-mine --start=FILE:prompt.txt --stop="\\n\\n" --temperature=0
    python sample.py --out_dir=out-mine --start=LINES:prompts.txt --num_samples=1 > samples.jsonl
    python sample.py --out_dir=out-mine --interactive --num_samples=1
    python sample.py --out_dir=out-chat --chat
    python sample.py --init_from=google-t5/t5-small --start="translate English to German: Good day."
    python sample.py --out_dir=out-t5 --start="summarize: ..." --num_beams=4
"""
import contextlib
import json
import sys
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import nanotune.threads  # noqa: F401

import torch
from tqdm import tqdm

from configurator import (
    AtLeast0,
    AtLeast1,
    Beams,
    EscapedText,
    LengthPenalty,
    Penalty,
    Probability,
    Temperature,
    UpTo65536,
    configure,
)
from nanotune.cli import run
from nanotune.device import DtypeName, autocast, pick_compile, pick_device, pick_dtype
from nanotune.errors import UserError
from nanotune.formats.checkpoint import pick_source
from nanotune.generation.beams import beam_search, check_length_penalty
from nanotune.generation.fast import open_model
from nanotune.generation.generate import TextPieces, encode_prompt, stream, text_before
from nanotune.text.chat import (
    Message,
    chat_prompt,
    check_template,
    check_text,
    ends_of_turn,
    room_for_answer,
)
from nanotune.text.read import check_surrogates, read_text
from nanotune.text.tokenizer import EOT


@dataclass
class Config:
    # model
    out_dir: str = "out"              # read ckpt.pt of this run
    init_from: str = "resume"  # resume: out_dir; else a hub id, a folder, a run or an .onnx file
    # text
    start: EscapedText = "\n"  # the prompt, or FILE:path; LINES:path has one prompt per line
    interactive: bool = False         # read prompts from the terminal; loads the model once
    chat: bool = False  # talk to a model finetuned with config/finetune_chat.py
    system: EscapedText = ""          # chat: the system message, which comes first
    num_samples: UpTo65536 | None = None  # per prompt; None: 10 (beams or temperature 0: 1)
    batch_size: UpTo65536 = 16      # LINES: samples or beams per batch; more if one prompt has more
    max_new_tokens: AtLeast1 = 500    # maximum new tokens per sample
    temperature: Temperature = 0.8    # 0: the most likely token; below 1 less random, above 1 more
    top_k: AtLeast0 = 200             # keep only the k most likely tokens; 0: all
    top_p: Probability = 1.0          # keep the most likely tokens up to this total probability
    repetition_penalty: Penalty = 1.0  # above 1: make tokens already in the text less likely
    num_beams: Beams | None = None    # beam search with this many beams; None: sampling
    length_penalty: LengthPenalty = 1.0  # beams: divide log p by tokens ** this; higher: longer
    stop: EscapedText = "<|endoftext|>"  # end a sample before this text, or at end-of-text
    seed: AtLeast0 = 1337
    # system
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: DtypeName = "auto"
    compile: bool | Literal["auto"] = False  # auto: on a GPU; takes a minute at the start

    ONE_OF: ClassVar = tuple(("num_beams", name) for name in (
        "temperature", "top_k", "top_p", "repetition_penalty"))


def read_prompt(start):
    """The text of --start, read from the file if it names one."""
    for mark in ("FILE:", "LINES:"):
        if start.startswith(mark):
            return read_text(start.removeprefix(mark))
    check_surrogates(start, "--start")
    return start


def check_beams(cfg):
    """Raises UserError if --num_beams contradicts other options; sets num_samples if it is None."""
    check_length_penalty(cfg)
    if cfg.num_beams is not None and cfg.num_samples not in (None, 1):
        raise UserError(f"--num_beams finds one answer per prompt: leave --num_samples="
                        f"{cfg.num_samples} out")
    if cfg.num_beams is not None and cfg.chat:
        raise UserError("beam search does not stop at the end of a turn: leave --num_beams out "
                        "of --chat")
    one = cfg.num_beams or cfg.temperature == 0  # greedy samples are all the same
    cfg.num_samples = cfg.num_samples or (1 if one else 10)


def main(argv: list[str]) -> None:
    cfg = configure(Config, argv)
    for name in ("interactive", "chat"):
        if getattr(cfg, name) and cfg.start != Config.start:
            raise UserError(f"--{name} asks for prompts; leave --start out")
    if cfg.interactive and cfg.chat:
        raise UserError("--interactive and --chat contradict each other: give one")
    if cfg.system and not cfg.chat:
        raise UserError("--system is the first message of a chat: give --chat too")
    check_beams(cfg)
    for name in ("stop", "system"):
        check_surrogates(getattr(cfg, name), f"--{name}")
    prompt = read_prompt(cfg.start)
    sampler = Sampler(cfg)
    if cfg.chat:
        chat_in_terminal(sampler)
    elif cfg.interactive:
        answer_terminal(sampler)
    elif cfg.start.startswith("LINES:"):
        answer_lines(sampler, prompt)
    else:
        print_samples(sampler, prompt)


class Sampler:
    """A loaded model and its sampling options."""
    def __init__(self, cfg):
        self.cfg, self.device = cfg, pick_device(cfg.device)
        self.dtype = pick_dtype(cfg.dtype, self.device)
        source = pick_source(cfg.out_dir, cfg.init_from)
        model = open_model(source, self.device, self.dtype, pick_compile(cfg.compile, self.device))
        self.model, self.tokenizer = model.fast, model.tokenizer
        self.stops = [] if cfg.stop in ("", EOT) else [cfg.stop]
        if cfg.chat:
            check_template(self.tokenizer, source)
            check_text(cfg.system, self.tokenizer, "--system")
            self.stops += ends_of_turn(self.tokenizer)

    def encode(self, text, where):
        return encode_prompt(self.tokenizer, text, self.model.config.block_size, where)

    def generator(self):
        return torch.Generator(self.device).manual_seed(self.cfg.seed)

    def stream(self, prompts, generator):
        """Yields (new texts, whether each text has ended), two lists with an item per prompt, after
        each token; for beam search, once. The last pair has the texts that TextPieces has not
        returned yet. `prompts` are lists of ids."""
        cfg, tokenizer = self.cfg, self.tokenizer
        pieces = [TextPieces(tokenizer, text_before(self.model, ids), self.stops)
                  for ids in prompts]
        if cfg.num_beams:
            yield self.best_answers(prompts, pieces), [piece.done for piece in pieces]
            return
        with autocast(self.device, self.dtype, cache=True):
            for token in stream(
                    self.model, prompts, cfg.max_new_tokens, temperature=cfg.temperature,
                    top_k=cfg.top_k or None, top_p=cfg.top_p,
                    repetition_penalty=cfg.repetition_penalty, stop_token=tokenizer.eot,
                    n_vocab=tokenizer.n_vocab, generator=generator):
                before = [piece.done for piece in pieces]
                new = [piece.add(id) for piece, id in zip(pieces, token.tolist())]
                yield ([text + piece.rest() if piece.done and not was else text
                        for text, piece, was in zip(new, pieces, before)],
                       [piece.done for piece in pieces])
                if all(piece.done for piece in pieces):
                    break
        yield (["" if piece.done else piece.rest() for piece in pieces],
               [piece.done for piece in pieces])

    def best_answers(self, prompts, pieces):
        """The text of each prompt's best answer by beam search."""
        with autocast(self.device, self.dtype, cache=True):
            found = beam_search(self.model, prompts, self.cfg.max_new_tokens, self.cfg.num_beams,
                                self.cfg.length_penalty, self.tokenizer.eot,
                                self.tokenizer.n_vocab)
        texts = ["".join(map(piece.add, ids)) for piece, ids in zip(pieces, found)]
        return [text if piece.done else text + piece.rest() for text, piece in zip(texts, pieces)]


def print_samples(sampler, prompt, where="--start"):
    """Prints the samples of one prompt in order, each when it has ended, with a progress bar if
    there are several. A single sample on a terminal is printed token by token."""
    n, ids = sampler.cfg.num_samples, sampler.encode(prompt, where)
    live = n == 1 and sys.stdout.isatty()
    # an empty prompt became end-of-text, which is not printed
    shown = sampler.tokenizer.decode(text_before(sampler.model, ids) if prompt else [])
    texts, printed = [[shown] for _ in range(n)], 0
    if live:
        print(shown, end="", flush=True)
    times = [time.perf_counter()]
    with tqdm(total=sampler.cfg.max_new_tokens, unit="tok", leave=False,
              disable=None if n > 1 else True) as bar:
        for new, done in sampler.stream([ids] * n, sampler.generator()):
            times.append(time.perf_counter())
            bar.update()
            for text, piece in zip(texts, new):
                text.append(piece)
            if live:
                print(new[0], end="", flush=True)
            while not live and printed < n and done[printed]:
                bar.clear()
                print("".join([*texts[printed], "\n", "-" * 15]), flush=True)
                printed += 1
    for text in texts[printed:]:
        print("" if live else "".join([*text, "\n", "-" * 15]))
    if sampler.model.config.takes_pairs and not all(done):
        print(f"{done.count(False)} of {n} answers were cut at "
              f"--max_new_tokens={sampler.cfg.max_new_tokens}", file=sys.stderr)
    if sampler.cfg.num_beams is None:
        print(speed(times[:-1], n), file=sys.stderr)


def greet(text):
    """Prints instructions if the input is a terminal."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # Windows
            import readline  # noqa: F401  arrow keys and history for input()
        print(text, file=sys.stderr)


def read_line():
    return input("> " if sys.stdin.isatty() else "")


def answer_terminal(sampler):
    """Reads prompts, one per line, until the end of the input. Each starts from the same seed.
    Ctrl-C ends a sample. A bad prompt prints an error."""
    greet("one prompt per line; Ctrl-C ends a sample, Ctrl-D ends the session")
    while True:
        try:
            prompt = read_line()
        except EOFError:
            return
        try:
            check_surrogates(prompt, "the prompt")
            print_samples(sampler, prompt, "the prompt")
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)
        except KeyboardInterrupt:
            print()


def chat_in_terminal(sampler):
    """Reads the user's messages, one per line, until the end of the input or Ctrl-C, and prints the
    model's answers. If the input is not a terminal, prints the messages too."""
    greet("one message per line; /reset starts a new conversation; Ctrl-C ends an answer; at "
          "the prompt it ends the session")
    generator, first = sampler.generator(), sampler.cfg.system.strip()
    system = [Message("system", first)] if first else []
    history = []
    while True:
        try:
            text = read_line().strip()
        except (EOFError, KeyboardInterrupt):
            return print() if sys.stdin.isatty() else None
        if text and not sys.stdin.isatty():
            print(f"> {text}", flush=True)
        if text == "/reset":
            history = []
            print("(a new conversation)", file=sys.stderr)
        if text in ("", "/reset"):
            continue
        try:
            check_surrogates(text, "the message")
            check_text(text, sampler.tokenizer, "the message")
            asked = [*history, Message("user", text)]
            history = reply(sampler, system, asked, generator)
        except UserError as e:
            print(f"error: {e}", file=sys.stderr)


def reply(sampler, system, asked, generator):
    """Prints the answer to a conversation token by token, until Ctrl-C. Returns the conversation
    with the answer, without the oldest messages if they did not fit into the context."""
    size = sampler.model.config.block_size
    most = size - room_for_answer(size, sampler.cfg.max_new_tokens)
    ids, dropped = chat_prompt(sampler.tokenizer, [*system, *asked], most)
    if dropped:
        print(f"(the context is full: the {dropped} oldest messages are left out)",
              file=sys.stderr)
    answer = ""
    try:
        for (new,), _ in sampler.stream([ids], generator):
            new = new if answer else new.lstrip()
            answer += new
            print(new, end="", flush=True)
    except KeyboardInterrupt:
        pass
    print(flush=True)
    if not answer.strip():  # training data has no empty turn
        print("(no answer; the message is forgotten)", file=sys.stderr)
        return asked[dropped:-1]
    return [*asked[dropped:], Message("assistant", answer.strip())]


def answer_lines(sampler, text):
    """Prints a JSON object per prompt: its line number, its text, the new text of its samples."""
    n = sampler.cfg.num_samples
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise UserError(f"--start={sampler.cfg.start}: the file has no prompt; give one per line")
    ids = [sampler.encode(line, f"line {number} of --start") for number, line in lines]
    rows = n * (sampler.cfg.num_beams or 1)  # per prompt
    size, generator = max(1, sampler.cfg.batch_size // rows), sampler.generator()
    for first in range(0, len(lines), size):
        batch = [prompt for prompt in ids[first:first + size] for _ in range(n)]
        new = (pieces for pieces, _ in sampler.stream(batch, generator))
        texts = ["".join(pieces) for pieces in zip(*new)]
        for at, (number, line) in enumerate(lines[first:first + size]):
            print(json.dumps({"line": number, "prompt": line,
                              "samples": texts[at * n:(at + 1) * n]}), flush=True)


def speed(times: list[float], num_samples: int) -> str:
    """The tokens per second as text: in total, and in the second half, which excludes loading,
    recording and compiling kernels. `times`, in seconds: the start, then one per token."""
    new, seconds = (len(times) - 1) * num_samples, times[-1] - times[0]
    text = f"{new:,} tokens in {seconds:.2f} s, {new / seconds:,.1f} per second"
    later = times[len(times) // 2:]
    if len(later) > 1:
        rate = (len(later) - 1) * num_samples / (later[-1] - later[0])
        text += f" (second half: {rate:,.1f})"
    return text


if __name__ == "__main__":
    run(main)
