"""What evaluate.py measures: perplexity of a text, prompted classification, LAMBADA.

    perplexity(model, tokens, ...)       sliding windows; loss, its standard error, bits per byte
    answer(model, prompts, ...)          greedy answers to prompts of any lengths, in batches
    score_labels(model, prompts, ...)    the log-probability of each label behind each prompt
    lambada(model, texts, ...)           the last word of each text
    detokenize_wikitext(text)            WikiText as it was before it was cut into words

Teacher-forced numbers come from model.logits_at(), the logits of the positions that count alone:
a GPT and an exported .onnx file both have it.
"""
import itertools
import json
import math
import re

import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import IGNORED, stream

# Words that rarely end a sentence: articles, pronouns, prepositions, conjunctions, auxiliaries.
# Radford et al. 2019, section 3.3, filter such words and do not print their list; this is ours.
STOP_WORDS = frozenset("""
a about above across after again against all along also although always am among an and another any
are around as at back be because been before behind being below between both but by can could did
do does doing down during each either else even ever every few for from further had has have having
he her here hers herself him himself his how i if in inside into is it its itself just like many may
me might mine more most much must my myself near neither never no nor not now of off on once one
only onto or other our ours ourselves out over own perhaps quite rather really same shall she
should since so some still such than that the their theirs them themselves then there these they
this those though through to together too toward towards under until up upon us very was we were
what when where whether which while who whom whose why will with within without would yet you your
yours yourself
""".split())  # noqa: SIM905


def bar(batches, shown):
    """A progress bar, where it is to be shown and a terminal shows it."""
    return tqdm(batches, leave=False, disable=None if shown else True)


# -----------------------------------------------------------------------------
# perplexity

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


def read_windows(tokens, mask, windows, block_size):
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
    for batch in bar(batches[world.rank::world.size], progress):
        x, y = read_windows(tokens, mask, batch, block_size)
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
        raise ValueError("no target counts in the loss here; look at the mask, or give more text")
    mean = loss / n
    spread = max(0.0, loss2 - 2 * mean * loss_n + mean * mean * n2)
    error = math.sqrt(spread * windows / (windows - 1)) / n if windows > 1 else math.nan
    bits = loss / math.log(2) / n_bytes if n_bytes else math.nan
    return {"loss": mean, "standard_error": error, "bits_per_byte": bits, "tokens": int(n),
            "windows": int(windows)}


# -----------------------------------------------------------------------------
# prompts

def read_lines(path, *names):
    """[(line number, fields), ...] of a .jsonl file whose lines hold these names as strings.
    Raises ValueError with the file and the line."""
    if not path.is_file():
        raise ValueError(f"{path} does not exist")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as e:
            raise ValueError(f"{path}, line {number}: malformed JSON ({e.msg} at column "
                             f"{e.colno})") from None
        if not isinstance(fields, dict) or not all(isinstance(fields.get(n), str) for n in names):
            raise ValueError(f"{path}, line {number}: wants a JSON object with "
                             f"{' and '.join(names)} as strings")
        lines.append((number, fields))
    if not lines:
        raise ValueError(f"{path} is empty; it should hold a line an example, with "
                         f"{' and '.join(names)}")
    return lines


def read_prompts(path, tokenizer, block_size):
    """(prompts as ids, their labels as text, {label: its ids as a completion}) of a test.jsonl.

    Raises ValueError for less than two labels, and for a prompt that the context cannot hold
    together with the longest label.
    """
    lines = read_lines(path, "prompt", "completion")
    completions = {fields["completion"].strip(): fields["completion"] for _, fields in lines}
    if len(completions) < 2:
        raise ValueError(f"{path}: every completion is {next(iter(completions))!r}; to classify "
                         "takes two labels or more")
    labels = {label: tokenizer.encode(completions[label]) for label in sorted(completions)}
    longest = max(map(len, labels.values()))
    prompts = []
    for number, fields in lines:
        ids = tokenizer.encode(fields["prompt"])
        if not 1 <= len(ids) <= block_size - longest:
            raise ValueError(f"{path}, line {number}: the prompt has {len(ids)} tokens; the model "
                             f"reads 1 to {block_size - longest} beside the longest label; shorten "
                             "or drop it")
        prompts.append(ids)
    return prompts, [fields["completion"].strip() for _, fields in lines], labels


def batches_by_length(rows, batch_size):
    """Indices of rows in batches, long ones first: little filling, and memory's worst comes at
    once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def flush_right(rows, device):
    """Rows of ids of several lengths as (B, T), filled at the left, and how much, (B,); None where
    they need no filling."""
    length = max(map(len, rows))
    pad = [length - len(row) for row in rows]
    x = torch.tensor([[0] * n + row for n, row in zip(pad, rows)], device=device)
    return x, torch.tensor(pad, device=device) if any(pad) else None


def answer(model, prompts, max_new_tokens, eot, n_vocab, batch_size, device, progress=False):
    """The greedy continuation of each prompt, a list of ids each, without the end-of-text that
    ended it. Batched, and yet what each prompt would get alone, rounding aside."""
    answers = [None] * len(prompts)
    for batch in bar(batches_by_length(prompts, batch_size), progress):
        x, pad = flush_right([prompts[i] for i in batch], device)
        new = stream(model, x, max_new_tokens, temperature=0, stop_token=eot, n_vocab=n_vocab,
                     pad=pad)
        for i, ids in zip(batch, torch.stack(list(new), 1).tolist()):
            answers[i] = ids[:ids.index(eot)] if eot in ids else ids
    return answers


@torch.no_grad()
def score_labels(model, prompts, labels, eot, batch_size, device, progress=False):
    """log p of each label (a list of ids each) behind each prompt, (N, labels) float32.

    Each prompt is read once. End-of-text counts as part of the labels only where one label is the
    beginning of another, which would else never lose against it.
    """
    begins = any(a != b and b[:len(a)] == a for a in labels for b in labels)
    if begins and eot is not None:
        labels = [[*label, eot] for label in labels]
    scores = torch.zeros(len(prompts), len(labels))
    longest = max(map(len, labels))
    for batch in bar(batches_by_length(prompts, batch_size), progress):
        x, pad = flush_right([prompts[i] for i in batch], device)
        cache = model.new_cache(len(batch), x.size(1) + longest - 1)
        cache.pad = pad
        first = model(x, cache=cache).log_softmax(-1)
        for column, label in enumerate(labels):
            cache.pos = x.size(1)  # back to the end of the prompts
            score = first[:, label[0]]
            for token, following in itertools.pairwise(label):
                logits = model(torch.full((len(batch), 1), token, device=device), cache=cache)
                score = score + logits.log_softmax(-1)[:, following]
            scores[batch, column] = score.cpu()
    return scores


def parse_label(text, labels):
    """The label that an answer's first line is, case and spaces aside; None if it is none."""
    line = text.strip().split("\n")[0].strip().casefold()
    return next((label for label in labels if label.casefold() == line), None)


def check_sklearn():
    """Raises ValueError where scikit-learn is missing: before the model runs, not after."""
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError:
        raise ValueError("--task=classify needs scikit-learn for its scores: pip install "
                         "scikit-learn") from None


def classification_scores(truth, predicted, labels):
    """{accuracy, macro_f1, no_label, confusion}; a prediction of None is no label, and so wrong.
    confusion[i][j]: prompts of label i answered by label j, or, in the last column, by none."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
    none = "(no label)"
    named = [none if label is None else label for label in predicted]
    return {"accuracy": float(accuracy_score(truth, named)),
            "macro_f1": float(f1_score(truth, named, labels=labels, average="macro",
                                       zero_division=0)),
            "no_label": named.count(none),
            "confusion": confusion_matrix(truth, named, labels=[*labels, none])[:-1].tolist()}


# -----------------------------------------------------------------------------
# LAMBADA

def split_last_word(text, tokenizer):
    """(ids of what stands before, ids of the last word with the space before it); None where
    there is nothing before."""
    context, space, word = text.rstrip().rpartition(" ")
    if not context.strip() or not space:
        return None
    return tokenizer.encode(context), tokenizer.encode(" " + word)


def stop_word_ids(tokenizer):
    """Ids of the stop words that are a single token behind a space, capitalised too."""
    words = (tokenizer.encode(" " + form) for word in STOP_WORDS for form in (word, word.title()))
    return sorted({ids[0] for ids in words if len(ids) == 1})


@torch.no_grad()
def lambada(model, pairs, stop_ids, batch_size, device, progress=False):
    """Three tensors (N,): -log p of the last word of each (context, word) pair of ids; whether
    each of its tokens is the likeliest; and whether it is with the stop words left out of what
    the word may begin with (Radford et al. 2019, section 3.3)."""
    losses = torch.zeros(len(pairs))
    hits, filtered = torch.zeros(len(pairs), dtype=torch.bool), torch.zeros(len(pairs)).bool()
    rows = [context + word for context, word in pairs]
    for batch in bar(batches_by_length(rows, batch_size), progress):
        x = torch.zeros(len(batch), len(rows[batch[0]]) - 1, dtype=torch.int64)
        y = torch.full_like(x, IGNORED)
        for row, i in enumerate(batch):  # filled at the right, where nothing looks
            context, word = pairs[i]
            x[row, :len(rows[i]) - 1] = torch.tensor(rows[i][:-1])
            y[row, len(context) - 1:len(rows[i]) - 1] = torch.tensor(word)
        counts = y != IGNORED
        row, targets = counts.nonzero()[:, 0], y[counts]
        logits = torch.cat(list(model.logits_at(x.to(device), counts.to(device))))
        batch = torch.tensor(batch)
        loss = F.cross_entropy(logits, targets.to(device), reduction="none").cpu()
        losses[batch] = torch.zeros(len(batch)).index_add_(0, row, loss)
        hits[batch] = all_of_row(logits.argmax(-1).cpu() == targets, row, len(batch))
        first = (row.diff(prepend=row.new_tensor([-1])) > 0).nonzero()[:, 0].to(device)
        logits[first[:, None], torch.tensor(stop_ids, device=device)] = -math.inf
        filtered[batch] = all_of_row(logits.argmax(-1).cpu() == targets, row, len(batch))
    return losses, hits, filtered


def all_of_row(right, row, n_rows):
    """right (N,) bool, row (N,) -> (n_rows,), whether all of a row are right."""
    return torch.zeros(n_rows).index_add_(0, row, (~right).float()) == 0


# -----------------------------------------------------------------------------
# WikiText

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
