"""Runs an exported ONNX file, with the methods of a GPT that sample.py and evaluate.py use.

    model, tokenizer = open_onnx("shakespeare-int8/model.int8.onnx")
    loss = model(idx, targets)              # summed over the targets that are not -1
    cache, logits = model.start(prompts, room)
    logits = model.step(idx, cache)         # (B, V), after the last token

onnxruntime computes on the CPU; inputs and outputs are torch tensors.
"""
import json
from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from model import GPTConfig
from nanotune.errors import UserError
from nanotune.files import checked_parse
from nanotune.formats.checks import check_fields
from nanotune.text.loader import IGNORED
from nanotune.text.tokenizer import AnyTokenizer, tokenizer_from_spec

METADATA = "nanotune"  # the key of export.py's entry in a file's metadata
ALL = 2**31            # logits_to_keep: more than any context


class OnnxCache:
    """The keys and values of at most `length` tokens, in onnxruntime's tensors. Prompts of unequal
    length have one cache each, in `rows`, since the graph has no mask for padding."""
    def __init__(self, length: int) -> None:
        self.pos, self.past, self.length, self.rows = 0, None, length, []

    @property
    def full(self) -> bool:
        return self.pos == self.length

    def rewind(self, pos: int) -> None:
        for row in self.rows:
            row.rewind(row.pos - (self.pos - pos))
        if self.past is not None and pos < self.pos:
            self.past = self.of_each(lambda array: array[:, :, :pos]) if pos else None
        self.pos = pos

    def reorder(self, rows: torch.Tensor) -> None:
        if self.rows:
            self.rows = [copy(self.rows[i]) for i in rows.tolist()]
        else:
            self.past = self.of_each(lambda array: array[rows.numpy()])

    def of_each(self, change):
        from onnxruntime import OrtValue
        return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(change(value.numpy())))
                for value in self.past]


class OnnxGPT:
    """Has the methods of a GPT in evaluation mode, with the same shapes."""
    training = False

    def __init__(self, session: Any, config: GPTConfig) -> None:
        self.session, self.config = session, config
        self.outputs = [o.name for o in session.get_outputs()]
        self.present = [name for name in self.outputs if name != "logits"]

    def run(self, idx, past, keep):
        """(logits (B, min(keep, T), V) float32, present) of idx (B, T) after a past."""
        from onnxruntime import OrtValue
        c = self.config
        if past is None:
            shape = (len(idx), c.n_head, 0, c.n_embd // c.n_head)
            past = [OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))] * len(self.present)
        feeds = {name.replace("present", "past_key_values"): value
                 for name, value in zip(self.present, past)}
        feeds["input_ids"] = OrtValue.ortvalue_from_numpy(np.ascontiguousarray(idx.cpu().numpy()))
        feeds["logits_to_keep"] = OrtValue.ortvalue_from_numpy(np.array([keep]))
        found = dict(zip(self.outputs, self.session.run_with_ort_values(self.outputs, feeds)))
        logits = torch.from_numpy(found["logits"].numpy()).to(idx.device)
        return logits, [found[name] for name in self.present]

    def __call__(self, idx: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """idx, targets (B, T) -> the loss, in nats *summed* over the targets that are not -1."""
        loss, rest = torch.zeros(()), targets[targets != IGNORED]
        for logits in self.logits_at(idx, targets):
            loss += F.cross_entropy(logits, rest[:len(logits)], reduction="sum")
            rest = rest[len(logits):]
        return loss

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        return self.run(idx, None, ALL)[0]

    def logits_at(self, idx: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
        """As GPT.logits_at, one chunk per row, computed up to the row's last such position."""
        for row, marked in zip(idx, targets != IGNORED):
            at = marked.nonzero()[:, 0].tolist()
            if at:
                logits, _ = self.run(row[None, :at[-1] + 1], None, at[-1] + 1 - at[0])
                yield logits[0, marked[at[0]:at[-1] + 1]]

    def start(self, prompts: Sequence[list[int]], room: int,
              cache: OnnxCache | None = None) -> tuple[OnnxCache, torch.Tensor]:
        """As GPT.start, always with a new cache."""
        prompts = [ids[-self.config.block_size:] for ids in prompts]
        length = max(map(len, prompts))
        cache = OnnxCache(min(length + room, self.config.block_size))
        if min(map(len, prompts)) == length:
            return cache, self.step(torch.tensor(prompts), cache)
        starts = [self.start([ids], room) for ids in prompts]
        cache.rows, cache.pos = [own for own, _ in starts], length
        return cache, torch.cat([logits for _, logits in starts])

    def step(self, idx: torch.Tensor, cache: OnnxCache) -> torch.Tensor:
        """idx (B, T), the next tokens of each row -> the logits after the last, (B, V) float32."""
        if cache.rows:
            logits = torch.cat([self.step(row[None], own) for row, own in zip(idx, cache.rows)])
        else:
            logits, cache.past = self.run(idx, cache.past, 1)
            logits = logits[:, -1]
        cache.pos += idx.size(1)
        return logits

    def crop_block_size(self, block_size: int) -> None:
        """Raises UserError if block_size is more than the model's."""
        if block_size > self.config.block_size:
            raise UserError(f"block_size={block_size} is more than the {self.config.block_size} "
                            "positions that the model was trained with; lower --block_size")
        self.config = replace(self.config, block_size=block_size)

    def eval(self) -> "OnnxGPT":
        return self

    def train(self, mode: bool = True) -> "OnnxGPT":
        assert not mode, "an ONNX file is not trained"
        return self


def open_onnx(path: str, block_size: int | None = None) -> tuple[OnnxGPT, AnyTokenizer | None]:
    """Returns (model, tokenizer) of a file that export.py wrote. Raises UserError if the file is
    missing, damaged or from another program, or onnxruntime is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs onnxruntime: pip install -r requirements-export.txt"
                        ) from None
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; export.py --format=onnx writes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has one exception type per status code
        raise UserError(f"{path} is damaged, incomplete or no ONNX file that onnxruntime "
                        f"{onnxruntime.__version__} reads ({str(e).splitlines()[0][:200]}); "
                        "export it again") from None
    held = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if held is None:
        raise UserError(f"{path} was not written by export.py: give one that was, or the folder "
                        "of the model that it came from")
    with checked_parse(path):
        held = json.loads(held)
        check_fields(held["config"], f"{path}: its metadata")
        model = OnnxGPT(session, GPTConfig(**held["config"]))
        tokenizer = held["tokenizer"] and tokenizer_from_spec(held["tokenizer"])
    check_graph(model, path)
    if block_size is not None:
        model.crop_block_size(block_size)
    return model, tokenizer


def check_graph(model, path):
    """Raises UserError unless the config in the metadata is that of the graph."""
    c = model.config
    head = ["B", c.n_head, "P", c.n_embd // c.n_head]
    wanted = {f"past_key_values.{layer}.{kind}": head
              for layer in range(c.n_layer) for kind in ("key", "value")}
    found = {i.name: i.shape for i in model.session.get_inputs() if i.name.startswith("past")}
    logits = next(o.shape for o in model.session.get_outputs() if o.name == "logits")
    if found != wanted or logits[2] != c.vocab_size:
        raise UserError(f"{path}: its metadata has the config of another graph; export it again")
