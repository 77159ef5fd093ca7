"""Computes the loss of a text: for train.py's evaluation and evaluate.py's perplexity.

    evaluate_loss(model, data, windows, ...)    the mean loss
    perplexity_sums(model, data, windows, ...)  sums for perplexity_of_sums(), which returns the
                                                loss, its standard error and bits per byte
    detokenize_wikitext(text)                   undoes WikiText's tokenization

The windows are those of TokenBin.windows; ranks split them and add up their sums.
"""
import math
import re
from collections.abc import Callable

import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import GPT
from nanotune.device import autocast
from nanotune.errors import UserError
from nanotune.formats.onnx_model import OnnxGPT
from nanotune.text.loader import IGNORED, TokenBin
from nanotune.torch_private import is_compiled
from nanotune.training.distributed import World, sum_over_ranks


def rank_batches(model, data, windows, batch_size, world, progress):
    """Yields this rank's windows as inputs and targets, (B, T) each, on its device.

    All ranks get the same number of batches, since a sharded model needs all ranks in each forward
    pass. A compiled model gets batches of one shape. Windows added to fill batches have no targets.
    """
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    for first in tqdm(range(0, len(batches), world.size), leave=False,
                      disable=None if progress else True):
        mine = first + world.rank
        batch = batches[min(mine, len(batches) - 1)]
        missing = batch_size - len(batch) if is_compiled(model) else 0
        x, y = data.read(batch + batch[:1] * missing)
        y[len(batch) if mine < len(batches) else 0:] = IGNORED
        yield x.to(world.device), y.to(world.device)


@torch.no_grad()
def evaluate_loss(model: GPT | OnnxGPT, data: TokenBin, windows: list[tuple[int, int]],
                  batch_size: int, world: World, dtype: torch.dtype) -> float:
    """Returns the mean loss of the windows in nats per token, the same on all ranks. Uses no random
    numbers and keeps the model's training mode. Raises UserError if no target counts."""
    was_training = model.training
    model.eval()
    loss, count = 0.0, 0
    for x, y in rank_batches(model, data, windows, batch_size, world, progress=False):
        with autocast(world.device, dtype):
            batch_loss = model(x, y)
        loss += float(batch_loss)  # note: a CPU-GPU sync point
        count += int((y != IGNORED).sum())
    model.train(was_training)
    loss, count = sum_over_ranks(loss, count, device=world.device)
    if count == 0:
        raise UserError(f"{data.path}: no target in the windows read counts in the loss; raise "
                        "--eval_iters or check the mask")
    return loss / count


@torch.no_grad()
def row_losses(model, x, y):
    """x, y (B, T) -> the loss summed over each row's targets, (B,) float64 on the CPU. Computed
    from logits, since head_loss() cannot use packed models or ONNX files."""
    row, targets = (y != IGNORED).nonzero()[:, 0].cpu(), y[y != IGNORED]
    losses = [y.new_zeros(0, dtype=torch.float32)]
    for logits in model.logits_at(x, y):
        losses.append(F.cross_entropy(logits, targets[:len(logits)], reduction="none"))
        targets = targets[len(logits):]
    total = torch.zeros(len(x), dtype=torch.float64)
    return total.index_add_(0, row, torch.cat(losses).double().cpu())


@torch.no_grad()
def perplexity_sums(model: GPT | OnnxGPT, data: TokenBin, windows: list[tuple[int, int]],
                    batch_size: int, world: World,
                    n_bytes: Callable[[list[int]], int]) -> list[float]:
    """Returns sums over this rank's windows, to be added over ranks: windows with targets, targets
    n, loss l in nats, l * l, l * n, n * n, bytes of the targets (from a tokenizer's n_bytes)."""
    sums = torch.zeros(7, dtype=torch.float64)
    for x, y in rank_batches(model, data, windows, batch_size, world, progress=world.is_main):
        loss = row_losses(model, x, y)
        n = (y != IGNORED).sum(1).double().cpu()
        sums += torch.stack([(n > 0).double(), n, loss, loss * loss, loss * n, n * n,
                             torch.zeros_like(n)], 1).sum(0)
        sums[-1] += n_bytes(y[y != IGNORED].tolist())
    return sums.tolist()


def perplexity_of_sums(sums: list[float]) -> dict:
    """Returns {loss, standard_error, bits_per_byte, tokens, windows}, the loss in nats per token.
    The error is that of a ratio estimator over windows: tokens of one window are not independent
    (Cochran 1977, 6.4). Raises UserError if no target counts."""
    windows, n, loss, loss2, loss_n, n2, n_bytes = sums
    if n == 0:
        raise UserError("no target counts in the loss; check the mask, or give more text")
    mean = loss / n
    spread = max(0.0, loss2 - 2 * mean * loss_n + mean * mean * n2)
    error = math.sqrt(spread * windows / (windows - 1)) / n if windows > 1 else math.nan
    bits = loss / math.log(2) / n_bytes if n_bytes else math.nan
    return {"loss": mean, "standard_error": error, "bits_per_byte": bits, "tokens": int(n),
            "windows": int(windows)}


def detokenize_wikitext(text: str) -> str:
    """Returns WikiText without the spaces that its tokenizer inserted, as the GPT-2 paper evaluates
    it (section 3.1), since plain text never contains ' @-@ '."""
    text = re.sub(r" @([-,.])@ ", r"\1", text)
    # = = Heading = = -> == Heading ==
    text = re.sub(r"(?m)^ ?((?:= ){1,6})(.*?)((?: =){1,6}) ?$",
                  lambda m: m[1].replace(" ", "") + " " + m[2].strip() + " "
                  + m[3].replace(" ", ""), text)
    text = re.sub(r'" ([^"\n]*?) "', r'"\1"', text)
    text = re.sub(r" (n't|'(?:s|t|re|ve|ll|d|m)\b)", r"\1", text, flags=re.IGNORECASE)
    text = re.sub(r"(?<=s) ' (?!s )", "' ", text)             # the players ' union
    text = re.sub(r" ([,.;:!?%°)\]}\u2019\u201d]|\.\.\.)", r"\1", text)
    text = re.sub(r"([(\[{\u201c$£¥#]) ", r"\1", text)
    text = re.sub(r"(?<=\w) / (?=\w)", "/", text)
    text = re.sub(r"(?<=\d) (\u2013) (?=\d)", r"\1", text)     # 2006 en dash 07
    return re.sub(r"(?m)^ | $", "", text)                     # spaces at the ends of each line
