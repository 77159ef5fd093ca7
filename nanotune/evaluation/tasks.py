"""Tasks that evaluate.py scores by prompting: classification, generated answers and LAMBADA.

    answer(model, prompts, ...)          answers to prompts of any lengths, in batches
    score_labels(model, prompts, ...)    the log-probability of each label after each prompt
    lambada(model, pairs, ...)           the loss and accuracy of the last word of each text

A model is a GPT, a T5, an OnnxGPT or an OnnxT5, in evaluation mode.
"""
import contextlib
import itertools
import math
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

from model import GPT
from nanotune.errors import UserError
from nanotune.formats.onnx_model import OnnxGPT
from nanotune.generation.beams import beam_search
from nanotune.generation.generate import stream
from nanotune.text.chat import chat_prompt, check_template, read_messages, room_for_answer
from nanotune.text.loader import IGNORED
from nanotune.text.read import read_jsonl
from nanotune.text.tokenizer import AnyTokenizer, without_end

# Words that rarely end a sentence: articles, pronouns, prepositions, conjunctions, auxiliaries.
# Radford et al. 2019, section 3.3, filter such words but do not give their list; this is ours.
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

MOST_LABELS = 20  # if over this many, and over half of all, completions differ, they are not labels


# -----------------------------------------------------------------------------
# prompts

def read_lines(path: Path, *names: str) -> list[tuple[str, dict]]:
    """Returns [("FILE, line N", fields), ...] of a .jsonl file. Raises UserError if the file is
    missing or empty, or a line is not a JSON object with strings of these names."""
    lines = list(read_jsonl(path))
    for where, fields in lines:
        if not all(isinstance(fields.get(name), str) for name in names):
            raise UserError(f"{where}: must be a JSON object with {' and '.join(names)} as "
                            "strings")
    if not lines:
        raise UserError(f"{path} is empty; it should have one line per example, with "
                        f"{' and '.join(names)}")
    return lines


def read_prompts(path: Path, tokenizer: AnyTokenizer,
                 block_size: int) -> tuple[list[list[int]], list[str], dict[str, list[int]]]:
    """Returns (ids of each prompt, label of each prompt, {label: ids}) of a test.jsonl. Raises
    UserError for fewer than two labels, for free answers instead of labels, or if a prompt with the
    longest label exceeds block_size.
    """
    lines = read_lines(path, "prompt", "completion")
    answers = [without_end(fields["completion"], tokenizer) for _, fields in lines]
    completions = {answer.strip(): answer for answer in answers}
    if len(completions) < 2:
        raise UserError(f"{path}: every completion is {next(iter(completions))!r}; "
                        "classification needs at least two labels")
    if len(completions) > max(MOST_LABELS, len(lines) // 2):
        raise UserError(f"{path}: {len(completions):,} of {len(lines):,} completions differ: these "
                        "look like free answers, not labels; use --task=generate")
    labels = {label: tokenizer.encode(completions[label]) for label in sorted(completions)}
    longest = max(map(len, labels.values()))
    prompts = []
    for where, fields in lines:
        ids = tokenizer.encode(fields["prompt"])
        if not 1 <= len(ids) <= block_size - longest:
            raise UserError(f"{where}: the prompt has {len(ids)} tokens; with the longest label it "
                            f"must have 1 to {block_size - longest}; shorten or drop it")
        prompts.append(ids)
    return prompts, [answer.strip() for answer in answers], labels


def batches_by_length(rows, batch_size):
    """Indices of rows in batches, longest rows first: there is little padding, and the first batch
    needs the peak memory. Shows a progress bar on a terminal."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    return tqdm(batches, leave=False, disable=None)


def answer(model: GPT | OnnxGPT, prompts: list[list[int]], max_new_tokens: int, eot: int | None,
           n_vocab: int, batch_size: int, end: Sequence[int] = (), num_beams: int | None = None,
           length_penalty: float = 1.0) -> tuple[list[list[int]], list[bool]]:
    """Returns (ids of each prompt's continuation, whether each was cut). Decodes greedily, or with
    beam_search if num_beams is given. A continuation ends before `eot` or the ids `end`, if given.
    It is cut after max_new_tokens, or where the longest row of its batch fills the context."""
    answers, cut = [None] * len(prompts), [False] * len(prompts)
    for batch in batches_by_length(prompts, batch_size):
        # + 1: the model does not read the last new token
        room = model.config.block_size - max(len(prompts[i]) for i in batch) + 1
        limit, rows = min(max_new_tokens, room), [prompts[i] for i in batch]
        if num_beams is None:
            new = stream(model, rows, limit, temperature=0, stop_token=eot, n_vocab=n_vocab)
            new = torch.stack(list(until(new, end)), 1).tolist()
        else:
            new = beam_search(model, rows, limit, num_beams, length_penalty, eot, n_vocab)
        for i, ids in zip(batch, new):
            at = next((n for n, id in enumerate(ids)
                       if id == eot or (end and ids[n:n + len(end)] == list(end))), None)
            answers[i], cut[i] = ids[:at], at is None
    return answers, cut


def until(tokens, end):
    """Yields `tokens`, (B,) at a time, until each row contains the ids `end`, if `end` is given."""
    if not end:
        yield from tokens
        return
    ended, pattern, last = False, torch.tensor(end), deque(maxlen=len(end))
    for token in tokens:
        yield token
        last.append(token.cpu())
        if len(last) == len(end):
            ended = ended | (torch.stack(list(last), 1) == pattern).all(1)  # (B,)
            if bool(ended.all()):
                return


@torch.no_grad()
def score_labels(model: GPT | OnnxGPT, prompts: list[list[int]], labels: list[list[int]],
                 eot: int | None, batch_size: int) -> torch.Tensor:
    """Returns log p in nats of each label after each prompt, (N, labels) float32. If a
    label is the beginning of another, it would always win over the longer one. Then `eot`, if not
    None, is appended to all labels."""
    begins = any(a != b and b[:len(a)] == a for a in labels for b in labels)
    if begins and eot is not None:
        labels = [[*label, eot] for label in labels]
    scores = torch.zeros(len(prompts), len(labels))
    longest = max(map(len, labels))
    for batch in batches_by_length(prompts, batch_size):
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


def parse_label(text: str, labels: list[str]) -> str | None:
    """Returns the label equal to an answer's first line, or None. Ignores case and outer spaces."""
    line = text.strip().split("\n")[0].strip().casefold()
    return next((label for label in labels if label.casefold() == line), None)


def check_sklearn() -> None:
    """Raises UserError if scikit-learn is not installed; call it before the model runs."""
    try:
        import sklearn.metrics  # noqa: F401
    except ImportError:
        raise UserError("--task=classify needs scikit-learn for its scores: pip install "
                        "scikit-learn") from None


def classification_scores(truth: list[str], predicted: list[str | None],
                          labels: list[str]) -> dict:
    """Returns {accuracy, macro_f1, no_label, confusion} from scikit-learn. A prediction of None is
    wrong. confusion[i][j] counts prompts of label i with answer j; the last column is for None."""
    from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
    none = "(no label)"
    named = [none if label is None else label for label in predicted]
    return {"accuracy": float(accuracy_score(truth, named)),
            "macro_f1": float(f1_score(truth, named, labels=labels, average="macro",
                                       zero_division=0)),
            "no_label": named.count(none),
            "confusion": confusion_matrix(truth, named, labels=[*labels, none])[:-1].tolist()}


# -----------------------------------------------------------------------------
# generated answers

def read_targets(path: Path, tokenizer: AnyTokenizer,
                 block_size: int) -> tuple[list[list[int]], list[str]]:
    """Returns (ids of each prompt, the text that should follow it) of a test.jsonl. Raises
    UserError if a prompt is empty or leaves no room in block_size."""
    prompts, targets = [], []
    for where, fields in read_lines(path, "prompt", "completion"):
        prompts.append(tokenizer.encode(fields["prompt"]))
        targets.append(without_end(fields["completion"], tokenizer))
        if not 1 <= len(prompts[-1]) <= block_size:
            raise UserError(f"{where}: the prompt has {len(prompts[-1])} tokens; the model reads 1 "
                            f"to {block_size}; shorten or drop it")
    return prompts, targets


def read_last_turns(path: Path, tokenizer: AnyTokenizer, block_size: int,
                    max_new_tokens: int) -> tuple[list[list[int]], list[str], int]:
    """Returns (ids of each conversation up to its last answer, each last answer, the number of
    conversations whose oldest turns were dropped) of a test.jsonl of {"messages"}. Raises UserError
    if a line is not a conversation that ends with an answer, or its last question does not fit."""
    check_template(tokenizer, str(path))
    prompts, targets, shortened = [], [], 0
    most = block_size - room_for_answer(block_size, max_new_tokens)
    for where, fields in read_jsonl(path):
        *before, last = read_messages(fields.get("messages"), where)
        if last.role != "assistant":
            raise UserError(f"{where}: the last message must be the assistant's; it is scored")
        try:
            ids, dropped = chat_prompt(tokenizer, before, most)
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
        prompts.append(ids)
        targets.append(last.content)
        shortened += dropped > 0
    return prompts, targets, shortened


def has_chats(path: Path) -> bool:
    """Returns whether the first line of a .jsonl file is a conversation."""
    return any("messages" in fields for _, fields in itertools.islice(read_jsonl(path), 1))


def answer_scores(target: str, answer: str) -> tuple[float, float]:
    """Returns (exact match, F1 of words), 0 to 1, of an answer. Differences in white space are
    ignored. F1 is SQuAD's (Rajpurkar et al. 2016), with repeated words counted."""
    expected, given = target.split(), answer.split()
    common = sum((Counter(expected) & Counter(given)).values())
    f1 = 2 * common / (len(expected) + len(given)) if expected or given else 1.0
    return float(expected == given), f1


ROUGE = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeLsum": "ROUGE-Lsum"}


def rouge_scores(targets: list[str], answers: list[str]) -> list[dict[str, float]]:
    """Returns {name of ROUGE: F1, 0 to 1} of each answer (Lin 2004), from the rouge-score package
    with its stemmer; {} for each if it is not installed."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError:
        return [{} for _ in targets]
    scorer = RougeScorer(list(ROUGE), use_stemmer=True)
    return [{name: score.fmeasure for name, score in scorer.score(target, answer).items()}
            for target, answer in zip(targets, answers)]


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, which is NaN for one value."""
    n = len(values)
    return statistics.mean(values), statistics.stdev(values) / math.sqrt(n) if n > 1 else math.nan


# -----------------------------------------------------------------------------
# LAMBADA

def split_last_word(text: str, tokenizer: AnyTokenizer) -> tuple[list[int], list[int]] | None:
    """Returns (ids of the context, ids of " WORD", the last word); None without a context."""
    context, space, word = without_end(text, tokenizer).rstrip().rpartition(" ")
    if not context.strip() or not space:
        return None
    return tokenizer.encode(context), tokenizer.encode(" " + word)


def stop_word_ids(tokenizer: AnyTokenizer) -> list[int]:
    """Returns the ids of stop words, also capitalised, that are one token with a space before."""
    found = set()
    for word in [*STOP_WORDS, *map(str.title, STOP_WORDS)]:
        with contextlib.suppress(UserError):  # the vocabulary cannot express it
            ids = tokenizer.encode(" " + word)
            found |= set(ids) if len(ids) == 1 else set()
    return sorted(found)


@torch.no_grad()
def lambada(model: GPT | OnnxGPT, pairs: list[tuple[list[int], list[int]]], stop_ids: list[int],
            batch_size: int,
            device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns (losses, hits, filtered), (N,) each, for pairs of (context ids, last word's ids):
    -log p of the word in nats; whether each of its tokens is the most likely one; the same when
    stop_ids are excluded as its first token (Radford et al. 2019, section 3.3)."""
    losses = torch.zeros(len(pairs))
    hits, filtered = torch.zeros(len(pairs), dtype=torch.bool), torch.zeros(len(pairs)).bool()
    rows = [context + word for context, word in pairs]
    for batch in batches_by_length(rows, batch_size):
        x = torch.zeros(len(batch), len(rows[batch[0]]) - 1, dtype=torch.int64)
        y = torch.full_like(x, IGNORED)
        for row, i in enumerate(batch):  # right-padded: the causal mask hides padding
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
        logits[first[:, None], torch.tensor(stop_ids, dtype=torch.int64, device=device)] = -math.inf
        filtered[batch] = all_of_row(logits.argmax(-1).cpu() == targets, row, len(batch))
    return losses, hits, filtered


def all_of_row(right, row, n_rows):
    """right (N,) bool, row (N,) -> (n_rows,) bool: whether all entries of a row are right."""
    return torch.zeros(n_rows).index_add_(0, row, (~right).float()) == 0
