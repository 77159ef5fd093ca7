"""Text from a trained or pretrained model.

    python sample.py --out_dir=out-shakespeare
    python sample.py --init_from=gpt2 --start="What is the answer?" --num_samples=5
    python sample.py --out_dir=out-mine --start=FILE:prompt.txt --stop=$'\\n\\n' --temperature=0
"""
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from configurator import configure
from nanotune.cli import run
from nanotune.device import autocast, pick_compile, pick_device, pick_dtype
from nanotune.errors import UserError
from nanotune.formats.checkpoint import load_model
from nanotune.generation.fast import for_generation
from nanotune.generation.generate import Writer, stream


@dataclass
class Config:
    # model
    out_dir: str = "out"         # the run whose ckpt.pt is read
    init_from: str = "resume"    # resume: out_dir's; or a hub id, a folder, a run, an .onnx file
    # text
    start: str = "\n"            # the prompt, or FILE:path of a file that holds it
    num_samples: int = 10        # generated together
    max_new_tokens: int = 500    # of each sample
    temperature: float = 0.8     # 0: the likeliest token; below 1 less random, above more
    top_k: int = 200             # only the likeliest so many tokens; 0: all
    top_p: float = 1.0           # only the fewest tokens that hold this much probability
    stop: str = "<|endoftext|>"  # a sample ends before this text; end-of-text ends it always
    seed: int = 1337
    # system
    device: str = "auto"         # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"          # auto, float32, bfloat16, float16
    compile: bool | str = False  # a step of one token: minutes first, faster then; auto: on a GPU


def read_prompt(start):
    if not start.startswith("FILE:"):
        return start
    path = Path(start.removeprefix("FILE:"))
    if not path.is_file():
        raise UserError(f"--start: the file {path} does not exist")
    data = path.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 (byte {e.start}); save it as UTF-8") from None


def check_config(cfg):
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("temperature", 0),
                        ("top_k", 0), ("seed", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name}={getattr(cfg, name)} must be at least {least}")
    if not 0 < cfg.top_p <= 1:
        raise UserError(f"--top_p={cfg.top_p} must be in (0, 1]")


def encode_prompt(tokenizer, text, block_size):
    """The prompt's ids; an empty prompt is end-of-text, after which GPT-2 begins a document."""
    ids = tokenizer.encode(text)
    if not ids and tokenizer.eot is None:
        raise UserError("--start is empty, and the model's vocabulary has no end-of-text to begin "
                        "with; give it a character")
    if len(ids) > block_size:
        raise UserError(f"--start has {len(ids)} tokens, the model reads at most {block_size}; "
                        "give a shorter prompt")
    return ids or [tokenizer.eot]


def main(argv):
    cfg = configure(Config, argv)
    check_config(cfg)
    device = pick_device(cfg.device)
    dtype = pick_dtype(cfg.dtype, device)
    prompt = read_prompt(cfg.start)
    source = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    model, tokenizer = load_model(source, device=device, with_onnx=True)
    if tokenizer is None:
        raise UserError(f"{source} has no tokenizer file: put its tokenizer.json into the folder")
    ids = encode_prompt(tokenizer, prompt, model.config.block_size)
    model.eval()
    model = for_generation(model, device, dtype, pick_compile(cfg.compile, device))

    shown_ids = ids if prompt else []  # an empty prompt's end-of-text is not shown
    writers = [Writer(tokenizer, shown_ids, cfg.stop) for _ in range(cfg.num_samples)]
    live = cfg.num_samples == 1 and sys.stdout.isatty()
    shown, times = 0, [time.perf_counter()]
    with autocast(device, dtype, cache=True):
        tokens = stream(
            model, torch.tensor([ids] * cfg.num_samples, device=device), cfg.max_new_tokens,
            temperature=cfg.temperature, top_k=cfg.top_k or None, top_p=cfg.top_p,
            stop_token=tokenizer.eot, n_vocab=tokenizer.n_vocab,
            generator=torch.Generator(device).manual_seed(cfg.seed))
        for token in tokens:
            for writer, id in zip(writers, token.tolist()):
                writer.add(id)
            times.append(time.perf_counter())
            if live:
                shown = show_new(writers[0], shown, len(cfg.stop))
            if all(writer.done for writer in writers):
                break
    if live:
        print(writers[0].text()[shown:])
    else:
        for writer in writers:
            print(writer.text())
            print("-" * 15)
    print(speed(times, cfg.num_samples), file=sys.stderr)


def speed(times, num_samples):
    """How fast tokens came, whose times these are behind that of the start: in all, and in the
    later half, when kernels are loaded, recorded or compiled."""
    new, seconds = (len(times) - 1) * num_samples, times[-1] - times[0]
    told = f"{new:,} tokens in {seconds:.2f} s, {new / seconds:,.1f} a second"
    later = times[len(times) // 2:]
    if len(later) > 1:
        rate = (len(later) - 1) * num_samples / (later[-1] - later[0])
        told += f" (the later half at {rate:,.1f})"
    return told


def show_new(writer, shown, held_back):
    """Prints what a sample has grown by, but for what may yet turn out to be a stop text or half
    a character; returns how much stands printed."""
    text = writer.text()
    ready = len(text) if writer.done else max(shown, len(text) - held_back)
    ready = len(text[:ready].rstrip("\ufffd"))
    print(text[shown:ready], end="", flush=True)
    return max(shown, ready)


if __name__ == "__main__":
    run(main)
