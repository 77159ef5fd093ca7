"""Runs exported ONNX files, with the methods of a GPT or a T5 that sample.py and evaluate.py use.

    model, tokenizer = open_onnx("shakespeare-int8/model.int8.onnx")
    model, tokenizer = open_onnx("t5-int8/decoder.int8.onnx")   # the encoder is in the same folder
    loss = model(x, y)                      # summed over the targets that are not -1
    cache, logits = model.start(prompts, room)
    logits = model.step(idx, cache)         # (B, V), after the last token

onnxruntime computes on the CPU; inputs and outputs are torch tensors.
"""
import hashlib
import io
import json
from collections.abc import Callable, Iterator, Sequence
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
from t5 import T5, T5Config, pad_sources, shift_right

OPSET = 23             # written by export.py; the first with Attention
METADATA = "nanotune"  # the key of export.py's entry in a file's metadata
ALL = 2**31            # logits_to_keep: more than any context


class OnnxCache:
    """The keys and values of at most `length` tokens, {input of the decoder: OrtValue}. A GPT's
    prompts of different lengths have one cache each, in `rows`, since the graph has no padding
    mask. For a T5, `source` has the decoder's inputs from the encoder; row i belongs to source
    prompt[i]."""
    def __init__(self, length: int, source: dict[str, Any] | None = None, rows: int = 0) -> None:
        self.pos, self.past, self.length, self.rows = 0, None, length, []
        self.source, self.prompt = source or {}, torch.arange(rows)

    @property
    def full(self) -> bool:
        return self.pos == self.length

    def rewind(self, pos: int) -> None:
        for row in self.rows:
            row.rewind(row.pos - (self.pos - pos))
        if self.past is not None and pos < self.pos:
            self.past = change(self.past, lambda array: array[:, :, :pos]) if pos else None
        self.pos = pos

    def reorder(self, rows: torch.Tensor) -> None:
        if self.rows:
            self.rows = [copy(self.rows[i]) for i in rows.tolist()]
            return
        self.past = change(self.past, lambda array: array[rows.numpy()])
        if self.source and not torch.equal(self.prompt[rows], self.prompt):
            self.prompt = self.prompt[rows]
            self.source = change(self.source, lambda array: array[rows.numpy()])


def ort_value(array):
    from onnxruntime import OrtValue
    return OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))


def change(values: dict[str, Any], function: Callable[[np.ndarray], np.ndarray]) -> dict[str, Any]:
    """Returns {name: OrtValue} with the function applied to each array."""
    return {name: ort_value(function(value.numpy())) for name, value in values.items()}


def run_graph(session, **feeds):
    """{output: OrtValue} of {input: OrtValue}."""
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run_with_ort_values(names, feeds)))


def run_decoder(session, idx, past, keep, **source):
    """(logits (B, min(keep, T), V) float32, present) of idx (B, T) after `past`, None if it is
    empty. `source` has the graph's other inputs."""
    if past is None:
        past = {i.name: ort_value(np.zeros((len(idx), i.shape[1], 0, i.shape[3]), np.float32))
                for i in session.get_inputs() if i.name.startswith("past_")}
    found = run_graph(session, **past, **source, input_ids=ort_value(idx.cpu().numpy()),
                      logits_to_keep=ort_value(np.array([keep])))
    logits = torch.from_numpy(found.pop("logits").numpy()).to(idx.device)
    return logits, {name.replace("present", "past_key_values"): value
                    for name, value in found.items()}


class OnnxGPT:
    """An exported GPT, with the methods and shapes of a GPT in evaluation mode."""
    training = False

    def __init__(self, session: Any, config: GPTConfig) -> None:
        self.session, self.config = session, config

    def __call__(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """x, y (B, T) -> the loss, in nats *summed* over the targets y that are not -1."""
        loss, rest = torch.zeros(()), y[y != IGNORED]
        for logits in self.logits_at(x, y):
            loss += F.cross_entropy(logits, rest[:len(logits)], reduction="sum")
            rest = rest[len(logits):]
        return loss

    def logits(self, idx: torch.Tensor) -> torch.Tensor:
        return run_decoder(self.session, idx, None, ALL)[0]

    def logits_at(self, idx: torch.Tensor, targets: torch.Tensor) -> Iterator[torch.Tensor]:
        """As GPT.logits_at, one chunk per row. Computes each row up to its last target only."""
        for row, marked in zip(idx, targets != IGNORED):
            at = marked.nonzero()[:, 0].tolist()
            if at:
                logits, _ = run_decoder(self.session, row[None, :at[-1] + 1], None,
                                        at[-1] + 1 - at[0])
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
            logits, cache.past = run_decoder(self.session, idx, cache.past, 1, **cache.source)
            logits = logits[:, -1]
        cache.pos += idx.size(1)
        return logits

    def crop_block_size(self, block_size: int) -> None:
        """Lowers block_size. Raises UserError if it is more than the model's."""
        if block_size > self.config.block_size:
            raise UserError(f"block_size={block_size} is more than the {self.config.block_size} "
                            "positions that the model was trained with; lower --block_size")
        self.config = replace(self.config, block_size=block_size)

    def eval(self) -> "OnnxGPT":
        return self

    def train(self, mode: bool = True) -> "OnnxGPT":
        assert not mode, "an ONNX model cannot be trained"
        return self


class OnnxT5:
    """An exported T5, with the methods and shapes of a T5 in evaluation mode."""
    training = False
    __call__, step, eval, train = OnnxGPT.__call__, OnnxGPT.step, OnnxGPT.eval, OnnxGPT.train
    crop_block_size = T5.crop_block_size

    def __init__(self, encoder: Any, decoder: Any, config: T5Config) -> None:
        self.encoder, self.session, self.config = encoder, decoder, config

    def encode(self, x):
        """x (B, S), sources padded with -1 -> {input of the decoder: OrtValue}."""
        mask = ort_value((x != IGNORED).long().cpu().numpy())
        ids = ort_value(x.clamp(min=0).cpu().numpy())
        return run_graph(self.encoder, input_ids=ids, attention_mask=mask) | {
            "attention_mask": mask}

    def logits_at(self, x: torch.Tensor, y: torch.Tensor) -> Iterator[torch.Tensor]:
        """As T5.logits_at, one chunk per row. Computes each row up to its last target only."""
        for source, ids, marked in zip(x, shift_right(y, self.config), y != IGNORED):
            at = marked.nonzero()[:, 0].tolist()
            if at:
                logits, _ = run_decoder(
                    self.session, ids[None, :at[-1] + 1], None, at[-1] + 1 - at[0],
                    **self.encode(source[None, source != IGNORED]))
                yield logits[0, marked[at[0]:at[-1] + 1]]

    def start(self, prompts: Sequence[list[int]], room: int,
              cache: OnnxCache | None = None) -> tuple[OnnxCache, torch.Tensor]:
        """As T5.start, always with a new cache."""
        x = pad_sources(prompts, self.config.end_id)
        cache = OnnxCache(1 + room, self.encode(x), len(x))
        return cache, self.step(torch.full_like(x[:, :1], self.config.start_id), cache)


# -----------------------------------------------------------------------------
# opening

def open_onnx(path: str, block_size: int | None = None
              ) -> tuple[OnnxGPT | OnnxT5, AnyTokenizer | None]:
    """Returns (model, tokenizer) of a file written by export.py; a T5's file may be the encoder's
    or the decoder's. Raises UserError if the file is missing, damaged or from another program, or
    onnxruntime is not installed; for a T5 also if the other graph or the weights are missing or
    from another export."""
    session, entry = open_session(path)
    with checked_parse(path):
        config, spec = config_of(entry, path), entry["tokenizer"]
        if config.takes_pairs:
            partner, other = open_partner(path, entry)
            sessions = {entry["part"]: session, other["part"]: partner}
            model = OnnxT5(sessions["encoder"], sessions["decoder"], config)
            spec = spec or other["tokenizer"]  # the decoder has it
        else:
            model = OnnxGPT(session, config)
        tokenizer = spec and tokenizer_from_spec(spec)
    check_graph(model, path)
    if block_size is not None:
        model.crop_block_size(block_size)
    return model, tokenizer


def open_session(path):
    """(onnxruntime's session of a file, export.py's entry in its metadata)."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs onnxruntime: pip install -r requirements-export.txt"
                        ) from None
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; create it with export.py --format=onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors only
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has one exception type per status code
        raise UserError(f"{path} is damaged, incomplete or cannot be read by onnxruntime "
                        f"{onnxruntime.__version__} ({str(e).splitlines()[0][:200]}); "
                        "export it again") from None
    entry = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if entry is None:
        raise UserError(f"{path} was not written by export.py; give a file that was, or the folder "
                        "of the original model")
    check_opset(path)
    with checked_parse(path):
        return session, json.loads(entry)


def check_opset(path):
    """Raises UserError unless the file is for opset OPSET. onnxruntime does not report the opset,
    and loads files of later opsets, in which an operator may have another meaning."""
    with checked_parse(path), open(path, "rb") as f:
        opsets = [dict(fields_of(io.BytesIO(value), None)) for number, value in fields_of(f, 8)
                  if number == 8]  # ModelProto.opset_import: {1: domain, 2: version}
    found = next((opset[2] for opset in opsets if opset.get(1, b"") in (b"", b"ai.onnx")), None)
    if found != OPSET:
        raise UserError(f"{path} is for ONNX opset {found}; nanotune runs opset {OPSET}: export it "
                        "again")


def fields_of(f, only):
    """Yields (number, value) of each field of a protobuf message; values are integers or bytes. If
    `only` is not None, skips the bytes of all fields except the one of that number."""
    def integer(byte):
        value = bits = 0
        while byte[0] > 127:
            value, bits, byte = value | (byte[0] & 127) << bits, bits + 7, f.read(1)
        return value | byte[0] << bits

    while byte := f.read(1):
        number, kind = divmod(integer(byte), 8)
        value = integer(f.read(1))
        if kind == 2:  # bytes, after their length
            skip = only not in (None, number)
            value = f.seek(value, io.SEEK_CUR) if skip else f.read(value)
        yield number, value


def config_of(entry, path):
    """The config in a file's metadata."""
    check_fields(entry["config"], f"{path}: its metadata")
    return (T5Config if "part" in entry else GPTConfig)(**entry["config"])


def open_partner(path, entry):
    """(session, metadata) of a T5's other graph. Raises UserError if this graph or the weights are
    missing or from another export."""
    partner = Path(path).with_name(Path(entry["partner"]).name)
    if not partner.is_file():
        raise UserError(f"{path} is the {entry['part']} of a T5 and needs {partner.name} in the "
                        "same folder; copy it there or export again")
    session, other = open_session(str(partner))
    if any(entry[key] != other.get(key) for key in ("config", "data", "digest")):
        raise UserError(f"{path} and {partner.name} are from different exports; export again")
    with open(partner.with_name(Path(entry["data"]).name), "rb") as f:
        if hashlib.file_digest(f, "sha256").hexdigest() != entry["digest"]:
            raise UserError(f"{f.name} is damaged or from another export than {path}; export again")
    return session, other


def check_graph(model, path):
    """Raises UserError unless the config in the metadata fits the graph."""
    c, inputs = model.config, model.session.get_inputs()
    layers, hs = ((c.n_decoder_layer, c.head_size) if c.takes_pairs
                  else (c.n_layer, c.n_embd // c.n_head))
    expected = {f"{name}.{layer}.{kind}": ["B", c.n_head, length, hs]
                for name, length in (("past_key_values", "P"), ("cross", "S"))
                for layer in range(layers) for kind in ("key", "value")
                if name != "cross" or c.takes_pairs}
    found = {i.name: i.shape for i in inputs if i.name.startswith(("past_", "cross."))}
    logits = next(o.shape for o in model.session.get_outputs() if o.name == "logits")
    outside = c.takes_pairs and max(c.start_id, c.pad_id, c.end_id) >= c.vocab_size
    if found != expected or logits[2] != c.vocab_size or outside:
        raise UserError(f"{path}: the config in its metadata does not fit the graph; export it "
                        "again")
