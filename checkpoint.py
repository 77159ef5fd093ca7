"""Checkpoints on disk, and the one door through which every script gets a model.

    out_dir/ckpt.pt    the model one would ship: weights, model_args, iter_num, best_val_loss,
                       config (nanoGPT's keys) and the tokenizer
    out_dir/state.pt   the latest step, whole: what --init_from=resume goes on from

A LoRA run's files hold the adapters alone, with the name and the hash of the base they belong to.
Both are written to a temporary file, synced and renamed, so that a crash leaves the old one; both
are checked bit by bit before use, and read as plain data: no code in them is run. What nanoGPT
wrote as ckpt.pt samples, evaluates and resumes here.
"""
import hashlib
import os
import pickle
import shutil
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, fields
from fnmatch import fnmatch
from pathlib import Path

import torch

import lora
import optimizer as optimizers
import pretrained
import tokenizer as tokenizers
from distributed import DTYPES, first_line, is_sharded, out_of_memory, share
from model import GPT, GPTConfig
from onnx_model import open_onnx

MODEL_FILE, STATE_FILE = "ckpt.pt", "state.pt"


# -----------------------------------------------------------------------------
# files

class WriteError(ValueError):
    """The disk did not take a file; what stood there before is untouched."""


def write_atomic(path, write, keep=1):
    """Calls write(file) on a temporary file beside `path`, syncs it and renames it to `path`. With
    `keep` above 1 what stood there becomes NAME.1.pt, and so on: that many stay in all.

    Raises WriteError where the disk does not take it; what stood at `path` is then still there.
    """
    temporary = f"{path}.tmp"
    try:
        try:
            with open(temporary, "wb") as f:
                write(f)
                f.flush()
                os.fsync(f.fileno())
            make_older(Path(path), keep)
            os.replace(temporary, path)
            sync_folder(os.path.dirname(path) or ".")
        finally:  # a second Ctrl-C in the middle leaves no half file either
            Path(temporary).unlink(missing_ok=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: torch's zip writer, over an OSError
        reasons = [getattr(error, "strerror", None) for error in (e, e.__context__)]
        raise WriteError(f"cannot write {path} ({next(filter(None, reasons), first_line(e))}); "
                         "what stood there before is untouched: free space or choose another "
                         "--out_dir") from e


def make_older(path, keep):
    """Shifts NAME.1.pt to NAME.2.pt and so on; a second name for `path` becomes NAME.1.pt, so that
    there is no moment without a file at `path`."""
    def aged(age):
        return path.with_suffix(f".{age}{path.suffix}")

    if not path.is_file():
        return
    for age in range(keep - 1, 1, -1):
        if aged(age - 1).is_file():
            os.replace(aged(age - 1), aged(age))
    if keep > 1:
        aged(1).unlink(missing_ok=True)
        try:
            os.link(path, aged(1))
        except OSError:  # a file system without hard links: then there is such a moment
            os.replace(path, aged(1))


def sync_folder(folder):
    """Makes a rename in the folder survive a power cut; Windows has no such call."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def write_folder(path, write, replaceable, overwrite=False):
    """Calls write(folder) on a temporary folder beside `path` and renames it to `path`: so that it
    is there whole or not at all.

    A folder that stands at `path` and is not empty is replaced only with `overwrite`, and only if
    each file in it is named by one of the patterns of `replaceable`. Raises ValueError for one
    that must stay, and where the disk does not take the new one: the old one is then untouched.
    """
    path = Path(path)
    check_replaceable(path, replaceable, overwrite)
    temporary = path.with_name(f"{path.name}.new-{os.getpid()}")
    old = path.with_name(f"{path.name}.old-{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        write(temporary)
        for file in temporary.iterdir():
            with open(file, "rb+") as f:
                os.fsync(f.fileno())
        if path.exists():
            path.rename(old)
        temporary.rename(path)
        sync_folder(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as e:
        if old.exists() and not path.exists():
            old.rename(path)
        raise ValueError(f"cannot write {path} ({e.strerror or e}); nothing was left there or "
                         "changed: free space or choose another folder") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_replaceable(path, replaceable, overwrite):
    """Raises ValueError where the folder at `path` holds what must not be replaced."""
    if not path.exists():
        return
    held = sorted(p.name for p in path.iterdir()) if path.is_dir() else None
    if held is None:
        raise ValueError(f"{path} is a file; give a folder that does not exist yet")
    foreign = [name for name in held if not any(fnmatch(name, p) for p in replaceable)]
    if held and not overwrite:
        raise ValueError(f"{path} is not empty ({held[0]}{', ...' if held[1:] else ''}); choose "
                         "another folder, or replace it by --overwrite=True")
    if foreign:
        raise ValueError(f"{path} holds {foreign[0]}, which no export writes: it is not replaced, "
                         "with --overwrite=True neither; choose another folder")


def save(path, data, keep=1):
    """torch.save, atomically. Tensors go to disk one by one: the whole is never held twice."""
    write_atomic(path, lambda f: torch.save(data, f), keep)


def load(path):
    """A checkpoint file as a dict of plain data and CPU tensors. Raises ValueError for one that is
    missing, damaged (a flipped bit too: torch.load alone lets that through) or carries code."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} does not exist; give the --out_dir of a run that has saved")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        with warnings.catch_warnings(action="ignore"):  # of odd pickles, which are refused
            if damaged is None:
                data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} carries code or objects beside plain data; refused, none of it "
                         "was run") from None
    except Exception as e:  # a damaged archive or pickle can raise nearly anything
        if out_of_memory(e):
            raise
        raise ValueError(f"{path} is truncated, damaged or no checkpoint ({first_line(e)}); use "
                         "another copy of it") from None
    if damaged is not None:
        raise ValueError(f"{path} is damaged (in {damaged}); use another copy of it")
    if not isinstance(data, dict) or not {"model", "model_args"} <= data.keys():
        raise ValueError(f"{path} is no checkpoint of nanotune or nanoGPT: it lacks 'model' or "
                         "'model_args'")
    return data


@contextmanager
def made_by_nobody(path):
    """Around the reading of a file's content, which may be whole and yet nobody's checkpoint: what
    that raises has no end, and becomes a ValueError."""
    try:
        yield
    except Exception as e:
        if isinstance(e, ValueError) or out_of_memory(e):
            raise
        raise ValueError(f"{path} is no checkpoint of nanotune or nanoGPT ({type(e).__name__}: "
                         f"{first_line(e)}); use another copy of it") from None


# -----------------------------------------------------------------------------
# models

def load_model(source, block_size=None, dropout=0.0, device="cpu", with_onnx=False,
               dtype=torch.float32):
    """(GPT, tokenizer or None) from a run's out_dir, a Hugging Face folder, or a hub id; with
    with_onnx, from an exported .onnx file too, which gives an OnnxGPT.

    The matrices are in `dtype`, the vectors in float32. A LoRA run's model comes merged. A smaller
    block_size crops the context. Raises ValueError that says what to do where the source is none
    of these.
    """
    folder = Path(source)
    if folder.suffix == ".onnx":
        if not with_onnx:
            raise ValueError(f"{source} can be sampled from and evaluated, no more; give the run "
                             "or the folder that it was exported from")
        return open_onnx(source, block_size)
    if (folder / MODEL_FILE).is_file():
        data = load(folder / MODEL_FILE)
        with made_by_nobody(folder / MODEL_FILE):
            model = model_from(data, folder / MODEL_FILE, dropout, dtype)
            tokenizer = tokenizer_from(data)
        model.to(device)
        lora.merge_lora(model)
        model.tie_head()
        if block_size is not None:
            model.crop_block_size(block_size)
        return model, tokenizer
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise ValueError(f"{source} holds neither {MODEL_FILE} (a run's out_dir) nor config.json "
                         "(a Hugging Face folder)")
    if not folder.exists() and (source.count("/") > 1 or source.startswith((".", "/", "out"))):
        raise ValueError(f"{source} does not exist; give a run's out_dir, a Hugging Face folder, "
                         "or a hub id such as gpt2")
    model = GPT.from_pretrained(source, block_size, dropout, device, dtype)
    return model, tokenizer_of_pretrained(source, model.config.vocab_size)


def model_from(data, path, dropout=0.0, dtype=torch.float32):
    """The GPT of a loaded checkpoint, ours or nanoGPT's; takes the tensors over without a copy
    where they are of that dtype. A LoRA run's has its adapters beside its matrices."""
    if data.get("lora"):
        return adapted_from(data, path, dropout, dtype)
    args = dict(data["model_args"])
    args.setdefault("activation", "gelu")  # nanoGPT's; its checkpoints do not say
    unknown = args.keys() - {f.name for f in fields(GPTConfig)}
    if unknown:
        raise ValueError(f"{path}: model_args has unknown fields: {', '.join(sorted(unknown))}")
    weights = {plain_key(key): tensor.to(dtype if tensor.dim() >= 2 else torch.float32)
               for key, tensor in data["model"].items()
               if not pretrained.BUFFERS.search(key) or tensor.dim() == 1}
    with torch.device("meta"):
        model = GPT(GPTConfig(**args | {"dropout": dropout}))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise ValueError(f"{path}: its weights do not fit its model_args "
                         f"({' '.join(str(e).split())[:200]})") from None
    for param in model.parameters():
        param.requires_grad_(True)
    model.tie_head()
    return model


def history_of(source):
    """How a run got to the model in its out_dir, {"iter_num", "best_val_loss", "config"}, its
    weights left on disk; {} where the source is no run."""
    path = Path(source, MODEL_FILE)
    if not path.is_file():
        return {}
    data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return {key: data.get(key) for key in ("iter_num", "best_val_loss", "config")}


def model_config(source):
    """The GPTConfig that load_model's model would have, without its weights."""
    for path in (Path(source) / name for name in (MODEL_FILE, STATE_FILE)):
        if path.is_file():
            try:
                data = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            except Exception:  # torch.load raises many kinds, load one that says what to do
                data = load(path)
            return GPTConfig(**{"activation": "gelu"} | data["model_args"])
    return GPTConfig(**pretrained.config_from_hf(pretrained.find_config(source), source))


def adapted_from(data, path, dropout, dtype):
    """The base that a LoRA checkpoint names, with its adapters. Raises ValueError where the base
    cannot be had or is no longer the one they were trained beside."""
    spec = data["lora"]
    try:
        changed = hash_of(spec["base"]) != spec["hash"]
    except ValueError as e:
        raise ValueError(f"{path} holds LoRA adapters of {spec['base']}, which cannot be had: "
                         f"{e}") from None
    if changed:
        raise ValueError(f"{path} holds LoRA adapters of {spec['base']}, but what is there now is "
                         "not what they were trained beside (its hash differs): put the old one "
                         "back")
    # as it was in training, rounding included
    model, _ = load_model(spec["base"], data["model_args"]["block_size"], dropout,
                          dtype=DTYPES[spec["weights"]])
    model.set_dtype(dtype)
    lora.add_lora(model, spec["rank"])
    params, saved = lora.adapters(model), data["model"]
    if {name: p.shape for name, p in params.items()} != {n: t.shape for n, t in saved.items()}:
        raise ValueError(f"{path}: its adapters do not fit {spec['base']}")
    with torch.no_grad():
        for name, param in params.items():
            param.copy_(saved[name])
    return model


def hash_of(source):
    """SHA-256 of the weight files of a run's out_dir, a Hugging Face folder or a hub id."""
    path = Path(source) / MODEL_FILE
    digest = hashlib.sha256()
    for file in [path] if path.is_file() else pretrained.find_pretrained(source)[1]:
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def plain_key(key):
    """A parameter's name without what torch.compile or DDP put before it."""
    return key.removeprefix("_orig_mod.").removeprefix("module.")


def tokenizer_from(data):
    """The tokenizer that a checkpoint holds; nanoGPT's holds none, but names its dataset."""
    if "tokenizer" in data:
        return data["tokenizer"] and tokenizers.from_spec(data["tokenizer"])
    dataset = data.get("config", {}).get("dataset")
    found = dataset and tokenizers.of_folder(Path("data") / dataset)
    return found or gpt2_by_size(data["model_args"].get("vocab_size"))


def tokenizer_of_pretrained(source, vocab_size):
    if source in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2"):
        return tokenizers.GPT2Tokenizer()
    folder = Path(source)
    if not folder.is_dir():  # a hub id: the files that there are, into the hub's cache
        folder = Path(pretrained.hub_file(source, "config.json")).parent
        if pretrained.hub_file(source, "tokenizer.json") is None:
            pretrained.hub_file(source, "vocab.json")
            pretrained.hub_file(source, "merges.txt")
    return tokenizers.of_folder(folder) or gpt2_by_size(vocab_size)


def gpt2_by_size(vocab_size):
    return tokenizers.GPT2Tokenizer() if vocab_size in tokenizers.GPT2_SIZES else None


def model_data(model, iter_num, best_val_loss, config, tokenizer, weights=None, run_id=None,
               lora_spec=None):
    """What ckpt.pt holds; `weights` where the model's own are not whole (sharded). lora_spec of a
    LoRA run: its rank, the base's name and hash, and the dtype that its weights were kept in."""
    data = {"model": dict(weights or whole_weights(model)), "model_args": asdict(model.config),
            "iter_num": iter_num, "best_val_loss": best_val_loss, "config": config,
            "tokenizer": tokenizer.spec, "run_id": run_id}
    return data | {"lora": lora_spec} if lora_spec else data


# -----------------------------------------------------------------------------
# the same file whatever wrote it: whole tensors, optimizer state by parameter name

def whole_weights(model):
    """{name: tensor}: references to the model's own, of a LoRA run's the adapters alone; of a
    sharded one, which all ranks must ask together, a full copy in rank 0's CPU memory, and {} on
    the others."""
    if not is_sharded(model):
        return ({name: param.detach() for name, param in lora.adapters(model).items()}
                or dict(model.state_dict()))
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    weights = get_model_state_dict(
        model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if weights and model.config.tied_head:  # came twice: one tensor again, as unsharded
        weights["lm_head.weight"] = weights["transformer.wte.weight"]
    return weights


def optimizer_state(model, optimizer):
    """{parameter name: {"exp_avg": ..., "exp_avg_sq": ..., "step": ...}}; references or, of a
    sharded model, copies as whole_weights makes them. {} before the first step."""
    if not is_sharded(model):
        names = {p: name for name, p in model.named_parameters()}
        return {names[p]: optimizers.plain_state(state) for p, state in optimizer.state.items()}
    if not optimizer.state:  # asked now, the helper would take a step to make one
        return {}
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
    return get_optimizer_state_dict(model, optimizer, options=StateDictOptions(
        full_state_dict=True, cpu_offload=True)).get("state", {})


def checked_optimizer_state(model, state, path):
    """A saved optimizer state, ours or nanoGPT's list, by the names of an unsharded model's
    parameters; {} before the first step. Raises ValueError where it is not of them."""
    if {"state", "param_groups"} <= state.keys():
        state = by_name(model, state, path)
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if state and state.keys() != params.keys():
        wrong = sorted(state.keys() ^ params.keys())
        raise ValueError(f"{path}: its optimizer state is of other parameters ({wrong[0]}, ...)")
    for name, held in state.items():
        p = params[name]
        held = {key: v for key, v in held.items() if not key.endswith(".scale")}
        if any(v.dim() and (v.shape[1:] != p.shape[1:] or len(v) < len(p)) for v in held.values()):
            raise ValueError(f"{path}: its optimizer state does not fit {name}, {tuple(p.shape)}")
    return state


def load_optimizer_state(model, optimizer, state, path, world=None):
    """Fills an optimizer that has not stepped with a saved state. On several ranks rank 0 gives
    it, the others give {}, and each takes what its share of the model needs."""
    params = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if world is None or world.is_main:
        state = state if is_sharded(model) else checked_optimizer_state(model, state, path)
        state = {name: cropped(held, params[name]) for name, held in state.items()}
    if not isinstance(optimizer, torch.optim.AdamW):
        return fill_optimizer(params, optimizer, state, path, world)
    names = {p: name for name, p in params.items()}
    if world is not None and world.size > 1:
        from torch.distributed.checkpoint.state_dict import (
            StateDictOptions,
            set_optimizer_state_dict,
        )
        groups = [group | {"params": [names[p] for p in group["params"]]}
                  for group in optimizer.param_groups]
        whole = {"state": state, "param_groups": groups} if world.is_main else {}
        set_optimizer_state_dict(model, optimizer, whole, options=StateDictOptions(
            full_state_dict=True, broadcast_from_rank0=True))
    elif state:
        order = [p for group in optimizer.param_groups for p in group["params"]]
        # the optimizer's own loader casts and moves what it takes
        optimizer.load_state_dict({
            "state": {i: state[names[p]] for i, p in enumerate(order)},
            "param_groups": optimizer.state_dict()["param_groups"]})


def cropped(state, param):
    """One parameter's state, its moments cut to as many rows as a cropped wpe has."""
    return {key: value[:len(param)] if value.dim() and not key.endswith(".scale") else value
            for key, value in state.items()}


def fill_optimizer(params, optimizer, state, path, world):
    """load_optimizer_state for the optimizers of optimizer.py: a parameter at a time, so that no
    rank holds the whole twice."""
    for name, param in params.items():
        held = state.get(name)
        if world is not None:
            held = share(world, held)
        try:
            optimizers.fill_state(optimizer, param, held)
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from None


def by_name(model, state, path):
    """nanoGPT numbers its parameters: matrices in the model's order, then vectors."""
    named = list(model.named_parameters())
    names = [n for n, p in named if p.dim() >= 2] + [n for n, p in named if p.dim() < 2]
    if len(state["state"]) != len(names):
        raise ValueError(f"{path}: its optimizer state has {len(state['state'])} parameters, "
                         f"the model {len(names)}")
    return {plain_key(name): state["state"][i] for i, name in enumerate(names)}
