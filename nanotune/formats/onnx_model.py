"""An exported ONNX file behind GPT's interface: what sample.py and evaluate.py do with a GPT.

    model, tokenizer = open_onnx("shakespeare-int8/model.int8.onnx")
    logits = model(idx)                     # (B, T, V)
    loss = model(idx, targets)              # summed over the targets that are not -1
    logits = model(idx, cache=cache)        # of the last position; cache = model.new_cache(B)

onnxruntime computes, on the CPU; torch tensors go in and come out.
"""
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from model import GPTConfig
from nanotune.errors import UserError
from nanotune.generation.generate import stream
from nanotune.text.loader import IGNORED
from nanotune.text.tokenizer import tokenizer_from_spec

METADATA = "nanotune"  # the key in a file's metadata by which it is known as export.py's
ALL = 2**31            # logits_to_keep: more than any context


class OnnxCache:
    """What each layer has seen, as onnxruntime's own tensors: they go from a call to the next
    without a copy. Set pos back to drop what stands behind it. `pad` is as in KVCache; where it is
    not 0, each row has a cache of its own, in `rows`."""
    def __init__(self):
        self.pos, self.past, self.pad, self.rows = 0, None, None, None

    def up_to_pos(self):
        """The past, shorter where pos was set back."""
        from onnxruntime import OrtValue
        if self.pos == 0 or self.past[0].shape()[2] == self.pos:
            return self.past if self.pos else None
        return [OrtValue.ortvalue_from_numpy(np.ascontiguousarray(v.numpy()[:, :, :self.pos]))
                for v in self.past]


class OnnxGPT:
    training = False

    def __init__(self, session, config):
        self.session, self.config = session, config
        self.outputs = [o.name for o in session.get_outputs()]
        self.present = [name for name in self.outputs if name != "logits"]

    def run(self, idx, past, keep):
        """(logits (B, min(keep, T), V) float32, present) of idx (B, T) behind a past."""
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

    def __call__(self, idx, targets=None, cache=None):
        if cache is not None:
            return self.last_logits(idx, cache)
        if targets is None:
            return self.run(idx, None, ALL)[0]
        where = targets != IGNORED
        wanted = [row[marked] for row, marked in zip(targets, where) if marked.any()]
        return sum(F.cross_entropy(logits, row, reduction="sum")
                   for logits, row in zip(self.logits_at(idx, where), wanted))

    def last_logits(self, idx, cache):
        """(B, V) of idx (B, T) behind what the cache holds, which it is added to."""
        if cache.pad is not None and bool(cache.pad.any()):  # the graph has no mask for filling:
            cache.rows = cache.rows or [OnnxCache() for _ in idx]  # each row alone, without it
            logits = []
            for row, own, pad in zip(idx, cache.rows, cache.pad.tolist()):
                own.pos = max(0, cache.pos - pad)
                logits.append(self.last_logits(row[None, max(0, pad - cache.pos):], own))
            logits = torch.cat(logits)
        else:
            logits, cache.past = self.run(idx, cache.up_to_pos(), 1)
            logits = logits[:, -1]
        cache.pos += idx.size(1)
        return logits

    def logits_at(self, idx, where):
        """As GPT.logits_at, a row at a time, read to its last such position."""
        for row, marked in zip(idx, where):
            at = marked.nonzero()[:, 0].tolist()
            if at:
                logits, _ = self.run(row[None, :at[-1] + 1], None, at[-1] + 1 - at[0])
                yield logits[0, marked[at[0]:at[-1] + 1]]

    def new_cache(self, batch_size, length=None):
        return OnnxCache()

    def generate(self, idx, max_new_tokens, **options):
        """idx (B, T) and what follows it, (B, T + new); options as for model.stream()."""
        new = list(stream(self, idx, max_new_tokens, **options))
        return torch.cat([idx] + [token[:, None] for token in new], dim=1)

    def crop_block_size(self, block_size):
        if block_size > self.config.block_size:
            raise UserError(f"block_size={block_size} is more than the {self.config.block_size} "
                            "positions that the model was trained with; lower --block_size")
        self.config = replace(self.config, block_size=block_size)

    def eval(self):
        return self

    def train(self, mode=True):
        assert not mode, "an ONNX file is not trained"
        return self


def open_onnx(path, block_size=None):
    """(OnnxGPT, tokenizer or None) of a file that export.py wrote; UserError for any other."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(f"{path} needs onnxruntime: pip install -r requirements-export.txt"
                        ) from None
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; export.py --format=onnx writes one")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3  # errors; they are raised as well
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as e:  # onnxruntime has a kind for each of its status codes
        raise UserError(f"{path} is damaged, incomplete or no ONNX file that onnxruntime "
                        f"{onnxruntime.__version__} reads ({str(e).splitlines()[0][:200]}); "
                        "export it again") from None
    held = session.get_modelmeta().custom_metadata_map.get(METADATA)
    if held is None:
        raise UserError(f"{path} was not written by export.py: give one that was, or the folder "
                        "of the model that it came from")
    held = json.loads(held)
    model = OnnxGPT(session, GPTConfig(**held["config"]))
    if block_size is not None:
        model.crop_block_size(block_size)
    return model, held["tokenizer"] and tokenizer_from_spec(held["tokenizer"])
