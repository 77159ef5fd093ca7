"""The loss of a text under a model: training's evaluation, and evaluate.py's perplexity.

    evaluate_loss(model, data, ...)          the mean loss of evenly spaced windows of a TokenBin
    perplexity_sums(model, tokens, ...)      sliding windows; perplexity_of_sums() gives loss,
                                             standard error and bits per byte
    detokenize_wikitext(text)                WikiText as it was before it was cut into words
"""
import math
import re

import torch
from torch.nn import functional as F
from tqdm import tqdm

from nanotune.device import autocast
from nanotune.errors import UserError
from nanotune.text.loader import IGNORED
from nanotune.training.distributed import sum_over_ranks


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
        x, y = fixed_size_batch(model, data, batches[min(mine, len(batches) - 1)], batch_size)
        x, y = x.to(world.device), y.to(world.device)
        with autocast(world.device, dtype):
            batch_loss = model(x, y)
        if mine < len(batches):
            loss += float(batch_loss)  # note: a CPU-GPU sync point
            count += int((y != IGNORED).sum())
    model.train(was_training)
    loss, count = sum_over_ranks(loss, count, device=world.device)
    if count == 0:
        raise UserError(f"{data.path}: the windows read hold no target that counts in the loss; "
                        "raise --eval_iters or look at the mask")
    return loss / count


def fixed_size_batch(model, data, starts, batch_size):
    """The windows from these positions, inputs and targets; for a compiled model, which would be
    compiled again for a smaller batch, filled up with a window whose targets do not count."""
    missing = batch_size - len(starts) if model._compiled_call_impl else 0
    x, y = data.read(starts + starts[:1] * missing)
    y[len(starts):] = IGNORED
    return x, y


def sliding_windows(n_tokens, block_size, stride):
    """[(start, first), ...]: each window reads up to block_size inputs from `start`, and its
    targets from the first-th on count; so each token but the very first is a target once, with
    at least block_size - stride tokens before it, the text's beginning aside."""
    windows, end = [], 0
    for start in range(0, n_tokens - 1, stride):
        windows.append((start, end - start))
        end = min(start + block_size, n_tokens - 1)
        if end == n_tokens - 1:
            break
    return windows


def sliding_batch(tokens, mask, windows, block_size):
    """Inputs and targets, (B, T) int64 each, of (start, first) windows; IGNORED is no target."""
    x = torch.zeros(len(windows), block_size, dtype=torch.int64)
    y = torch.full_like(x, IGNORED)
    for row, (start, first) in enumerate(windows):
        block = torch.as_tensor(tokens[start:start + block_size + 1].astype("int64"))
        x[row, :len(block) - 1] = block[:-1]
        y[row, first:len(block) - 1] = block[first + 1:]
        if mask is not None:
            keep = torch.as_tensor(mask[start + 1:start + len(block)].astype(bool))
            y[row, :len(keep)][~keep] = IGNORED
    return x, y


@torch.no_grad()
def target_losses(model, x, y):
    """x, y (B, T) on the model's device -> -log p of each target that counts, in order, (n,)."""
    counts = y != IGNORED
    losses, targets = [y.new_zeros(0, dtype=torch.float32)], y[counts]
    for logits in model.logits_at(x, counts):
        losses.append(F.cross_entropy(logits, targets[:len(logits)], reduction="none"))
        targets = targets[len(logits):]
    return torch.cat(losses)


@torch.no_grad()
def perplexity_sums(model, tokens, mask, windows, block_size, batch_size, n_bytes, world,
                    progress=False):
    """Sums over this rank's share of the windows, as a list: windows, targets n, loss l, l * l,
    l * n, n * n, bytes of the targets. Each sum can be added up over ranks."""
    sums = torch.zeros(7, dtype=torch.float64)
    batches = [windows[i:i + batch_size] for i in range(0, len(windows), batch_size)]
    for batch in tqdm(batches[world.rank::world.size], leave=False,
                      disable=None if progress else True):
        x, y = sliding_batch(tokens, mask, batch, block_size)
        counts = y != IGNORED
        losses = target_losses(model, x.to(world.device), y.to(world.device)).double().cpu()
        n = counts.sum(1).double()
        loss = torch.zeros(len(batch), dtype=torch.float64)
        loss.index_add_(0, counts.nonzero()[:, 0], losses)
        sums += torch.stack([(n > 0).double(), n, loss, loss * loss, loss * n, n * n,
                             torch.zeros_like(n)], 1).sum(0)
        sums[-1] += n_bytes(y[counts].tolist())
    return sums.tolist()


def perplexity_of_sums(sums):
    """{loss in nats a token, standard_error, bits_per_byte, tokens, windows}. The error is that of
    a ratio estimator over windows: tokens of one window are not independent (Cochran 1977, 6.4)."""
    windows, n, loss, loss2, loss_n, n2, n_bytes = sums
    if n == 0:
        raise UserError("no target counts in the loss here; look at the mask, or give more text")
    mean = loss / n
    spread = max(0.0, loss2 - 2 * mean * loss_n + mean * mean * n2)
    error = math.sqrt(spread * windows / (windows - 1)) / n if windows > 1 else math.nan
    bits = loss / math.log(2) / n_bytes if n_bytes else math.nan
    return {"loss": mean, "standard_error": error, "bits_per_byte": bits, "tokens": int(n),
            "windows": int(windows)}


def detokenize_wikitext(text):
    """WikiText's text with the spaces taken out that its tokeniser put in. The GPT-2 paper
    evaluates so (section 3.1), since a model of plain text has never seen ' @-@ '."""
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
    return re.sub(r"(?m)^ | $", "", text)                     # each line stood in spaces
