"""The loss of a model on a dataset's split: the number that train.py logs, as a command.

    python evaluate.py --out_dir=out-shakespeare --dataset=shakespeare
    python evaluate.py --init_from=gpt2 --dataset=shakespeare --split=train --eval_iters=200
"""
import math
from dataclasses import dataclass

import torch
from tqdm import tqdm

from checkpoint import load_model
from configurator import configure
from distributed import join, pick_dtype, read_world, run, sum_over_ranks
from loader import IGNORED, TokenBin, dataset_folder, open_tokens
from tokenizer import check_same, of_dataset


@dataclass
class Config:
    # what
    out_dir: str = "out"         # the run whose ckpt.pt is read
    init_from: str = "resume"    # resume: out_dir's; or a hub id, a folder, a run, an .onnx file
    dataset: str = "openwebtext"  # a folder below data/, or a path
    split: str = "val"           # train or val
    # how
    eval_iters: int = 0          # batches, evenly spaced over the split; 0: the whole split
    batch_size: int = 8
    block_size: int | None = None  # None: the model's own
    device: str = "auto"         # auto, cpu, cuda, cuda:N, mps
    dtype: str = "auto"          # auto, float32, bfloat16, float16


@torch.no_grad()
def evaluate_loss(model, data, eval_iters, batch_size, world, dtype, progress=False):
    """The mean loss, nats a token, of eval_iters * batch_size fixed windows evenly spaced over a
    TokenBin, or of all of it with eval_iters = 0. Every rank reads its share; all get the sum.

    Draws nothing at random and leaves the model in the mode that it found it in.
    """
    starts = data.windows(eval_iters * batch_size)
    batches = [starts[i:i + batch_size] for i in range(0, len(starts), batch_size)]
    was_training = model.training
    model.eval()
    loss, count = 0.0, 0
    # a sharded model's ranks must go forward together: the last round is run by all
    for first in tqdm(range(0, len(batches), world.size), leave=False,
                      disable=None if progress else True):
        mine = first + world.rank
        x, y = data.read(batches[min(mine, len(batches) - 1)])
        x, y = x.to(world.device), y.to(world.device)
        with torch.autocast(world.device.type, dtype, enabled=dtype != torch.float32):
            batch_loss = model(x, y)
        if mine < len(batches):
            loss += float(batch_loss)  # note: a CPU-GPU sync point
            count += int((y != IGNORED).sum())
    model.train(was_training)
    loss, count = sum_over_ranks(loss, count, device=world.device)
    if count == 0:
        raise ValueError(f"{data.path}: the windows read hold no target that counts in the loss; "
                         "raise --eval_iters or look at the mask")
    return loss / count


def main(argv):
    cfg = configure(Config, argv)
    for name, least in (("eval_iters", 0), ("batch_size", 1)):
        if getattr(cfg, name) < least:
            raise ValueError(f"--{name}={getattr(cfg, name)} must be at least {least}")
    world = read_world(cfg.device)
    dtype = pick_dtype(cfg.dtype, world.device)
    folder = dataset_folder(cfg.dataset)
    path = folder / f"{cfg.split}.bin"
    open_tokens(path, 1)
    source = cfg.out_dir if cfg.init_from == "resume" else cfg.init_from
    model, tokenizer = load_model(source, cfg.block_size, device=world.device, with_onnx=True)
    check_same(tokenizer, of_dataset(folder), source, folder)
    data = TokenBin(path, model.config.block_size, model.config.vocab_size)
    join(world)
    loss = evaluate_loss(model, data, cfg.eval_iters, cfg.batch_size, world, dtype, world.is_main)
    if world.is_main:
        print(f"{source} on {cfg.dataset} {cfg.split}: loss {loss:.4f} nats a token, "
              f"perplexity {math.exp(min(loss, 700)):.2f}, windows of {model.config.block_size}")


if __name__ == "__main__":
    run(main)
