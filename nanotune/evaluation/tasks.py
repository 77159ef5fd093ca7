"""Tasks that evaluate.py scores by prompting: classification and LAMBADA.

    answer(model, prompts, ...)          greedy answers to prompts of any lengths, in batches
    score_labels(model, prompts, ...)    the log-probability of each label behind each prompt
    lambada(model, texts, ...)           the last word of each text

Teacher-forced numbers come from model.logits_at(), the logits of only the positions that count: a
GPT and an exported .onnx file both have it.
"""
import itertools
import json
import math

import torch
from torch.nn import functional as F
from tqdm import tqdm

from nanotune.errors import UserError
from nanotune.generation.generate import stream
from nanotune.text.loader import IGNORED

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
# prompts

def read_lines(path, *names):
    """[(line number, fields), ...] of a .jsonl file whose lines hold these names as strings.
    Raises UserError with the file and the line."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    lines = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except json.JSONDecodeError as e:
            raise UserError(f"{path}, line {number}: malformed JSON ({e.msg} at column "
                            f"{e.colno})") from None
        if not isinstance(fields, dict) or not all(isinstance(fields.get(n), str) for n in names):
            raise UserError(f"{path}, line {number}: wants a JSON object with "
                            f"{' and '.join(names)} as strings")
        lines.append((number, fields))
    if not lines:
        raise UserError(f"{path} is empty; it should hold a line an example, with "
                        f"{' and '.join(names)}")
    return lines


def read_prompts(path, tokenizer, block_size):
    """(prompts as ids, their labels as text, {label: its ids as a completion}) of a test.jsonl.

    Raises UserError for less than two labels, and for a prompt that the context cannot hold
    together with the longest label.
    """
    lines = read_lines(path, "prompt", "completion")
    completions = {fields["completion"].strip(): fields["completion"] for _, fields in lines}
    if len(completions) < 2:
        raise UserError(f"{path}: every completion is {next(iter(completions))!r}; to classify "
                        "takes two labels or more")
    labels = {label: tokenizer.encode(completions[label]) for label in sorted(completions)}
    longest = max(map(len, labels.values()))
    prompts = []
    for number, fields in lines:
        ids = tokenizer.encode(fields["prompt"])
        if not 1 <= len(ids) <= block_size - longest:
            raise UserError(f"{path}, line {number}: the prompt has {len(ids)} tokens; the model "
                            f"reads 1 to {block_size - longest} beside the longest label; shorten "
                            "or drop it")
        prompts.append(ids)
    return prompts, [fields["completion"].strip() for _, fields in lines], labels


def batches_by_length(rows, batch_size):
    """Indices of rows in batches, long ones first: little filling, and memory's worst comes at
    once."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    return [order[i:i + batch_size] for i in range(0, len(order), batch_size)]


def answer(model, prompts, max_new_tokens, eot, n_vocab, batch_size, progress=False):
    """The greedy continuation of each prompt, a list of ids each, without the end-of-text that
    ended it. Batched, and yet what each prompt would get alone, rounding aside."""
    answers = [None] * len(prompts)
    for batch in bar(batches_by_length(prompts, batch_size), progress):
        new = stream(model, [prompts[i] for i in batch], max_new_tokens, temperature=0,
                     stop_token=eot, n_vocab=n_vocab)
        for i, ids in zip(batch, torch.stack(list(new), 1).tolist()):
            answers[i] = ids[:ids.index(eot)] if eot in ids else ids
    return answers


@torch.no_grad()
def score_labels(model, prompts, labels, eot, batch_size, progress=False):
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
        cache, logits = model.start([prompts[i] for i in batch], longest - 1)
        first, end = logits.log_softmax(-1), cache.pos
        for column, label in enumerate(labels):
            cache.rewind(end)
            score = first[:, label[0]]
            for token, following in itertools.pairwise(label):
                idx = torch.full((len(batch), 1), token, device=logits.device)
                logits = model.step(idx, cache)
                score = score + logits.log_softmax(-1)[:, following]
            scores[batch, column] = score.cpu()
    return scores


def parse_label(text, labels):
    """The label that an answer's first line is, case and spaces aside; None if it is none."""
    line = text.strip().split("\n")[0].strip().casefold()
    return next((label for label in labels if label.casefold() == line), None)


def check_sklearn():
    """Raises UserError where scikit-learn is missing: before the model runs, not after."""
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError:
        raise UserError("--task=classify needs scikit-learn for its scores: pip install "
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
        logits = torch.cat(list(model.logits_at(x.to(device), y.to(device))))
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
