"""Generates text from a trained or pretrained model.

    python sample.py --out_dir=out-shakespeare
    python sample.py --init_from=gpt2 --start="What is the answer?" --num_samples=5
    python sample.py --out_dir=out-mine --start=FILE:prompt.txt --stop="\\n\\n" --temperature=0
"""
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from configurator import (
    AtLeast0,
    AtLeast1,
    EscapedText,
    Penalty,
    Probability,
    Temperature,
    UpTo65536,
    configure,
)
from nanotune.cli import run
from nanotune.device import DtypeName, autocast, pick_compile, pick_device, pick_dtype
from nanotune.errors import UserError
from nanotune.formats.checkpoint import load_model, pick_source
from nanotune.generation.fast import for_generation
from nanotune.generation.generate import TextPieces, stream
from nanotune.text.read import check_surrogates, read_text
from nanotune.text.tokenizer import EOT


@dataclass
class Config:
    # model
    out_dir: str = "out"              # the run whose ckpt.pt to read
    init_from: str = "resume"  # resume: out_dir; else a hub id, a folder, a run or an .onnx file
    # text
    start: EscapedText = "\n"         # the prompt, or FILE:path to read it from a file
    num_samples: UpTo65536 = 10       # samples to generate as one batch
    max_new_tokens: AtLeast1 = 500    # most tokens per sample
    temperature: Temperature = 0.8    # 0: the most likely token; below 1 less random, above 1 more
    top_k: AtLeast0 = 200             # keep only the k most likely tokens; 0: all
    top_p: Probability = 1.0          # keep the fewest tokens that have this much probability
    repetition_penalty: Penalty = 1.0  # above 1: make tokens already in the text less likely
    stop: EscapedText = "<|endoftext|>"  # end a sample before this text, or at end-of-text
    seed: AtLeast0 = 1337
    # system
    device: str = "auto"              # auto, cpu, cuda, cuda:N, mps
    dtype: DtypeName = "auto"         # auto, float32, bfloat16, float16
    compile: bool | Literal["auto"] = False  # auto: on a GPU; takes a minute at the start


def read_prompt(start):
    """The text of --start."""
    if start.startswith("FILE:"):
        return read_text(start.removeprefix("FILE:"))
    check_surrogates(start, "--start")
    return start


def encode_prompt(tokenizer, text, block_size):
    """The prompt's ids; an empty prompt becomes end-of-text, after which a document begins."""
    ids = tokenizer.encode(text)
    if not ids and tokenizer.eot is None:
        raise UserError("--start is empty, and the model's vocabulary has no end-of-text to begin "
                        "with; give it a character")
    if len(ids) > block_size:
        raise UserError(f"--start has {len(ids)} tokens, the model reads at most {block_size}; "
                        "give a shorter prompt")
    return ids or [tokenizer.eot]


def main(argv: list[str]) -> None:
    cfg = configure(Config, argv)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    prompt = read_prompt(cfg.start)
    source = pick_source(cfg.out_dir, cfg.init_from)
    model, tokenizer = load_model(source, device=device, with_onnx=True)
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer file: put its tokenizer.json into the folder")
    ids = encode_prompt(tokenizer, prompt, model.config.block_size)
    model.eval()
    model = for_generation(model, device, dtype, pick_compile(cfg.compile, device))

    pieces = [TextPieces(tokenizer, ids, "" if cfg.stop == EOT else cfg.stop)
              for _ in range(cfg.num_samples)]
    live = cfg.num_samples == 1 and sys.stdout.isatty()
    shown = tokenizer.decode(ids if prompt else [])  # hides the end-of-text of an empty prompt
    texts = [[shown] for _ in pieces]
    if live:
        print(shown, end="", flush=True)
    times = [time.perf_counter()]
    with autocast(device, dtype, cache=True):
        tokens = stream(
            model, [ids] * cfg.num_samples, cfg.max_new_tokens, temperature=cfg.temperature,
            top_k=cfg.top_k or None, top_p=cfg.top_p, repetition_penalty=cfg.repetition_penalty,
            stop_token=tokenizer.eot, n_vocab=tokenizer.n_vocab,
            generator=torch.Generator(device).manual_seed(cfg.seed))
        for token in tokens:
            for text, piece, id in zip(texts, pieces, token.tolist()):
                text.append(piece.add(id))
            times.append(time.perf_counter())
            if live:
                print(texts[0][-1], end="", flush=True)
            if all(piece.done for piece in pieces):
                break
    for text, piece in zip(texts, pieces):
        print(piece.rest() if live else "".join([*text, piece.rest(), "\n", "-" * 15]))
    print(speed(times, cfg.num_samples), file=sys.stderr)


def speed(times: list[float], num_samples: int) -> str:
    """The text of tokens per second, in total and in the later half, which excludes loading,
    recording and compiling kernels. `times`, in seconds: the start, then one per token."""
    new, seconds = (len(times) - 1) * num_samples, times[-1] - times[0]
    text = f"{new:,} tokens in {seconds:.2f} s, {new / seconds:,.1f} a second"
    later = times[len(times) // 2:]
    if len(later) > 1:
        rate = (len(later) - 1) * num_samples / (later[-1] - later[0])
        text += f" (the later half at {rate:,.1f})"
    return text


if __name__ == "__main__":
    run(main)
