"""Loads a model from any source, and defines the content of ckpt.pt.

    model, tokenizer = load_model(source)
    source     a run's out_dir or .pt file, a Hugging Face folder, a hub id, a folder with a
               TensorFlow checkpoint

    out_dir/ckpt.pt    the model: weights, model_args, iter_num, best_val_loss, config (nanoGPT's
                       keys), tokenizer, run_id
    out_dir/best.pt    the same for the best validation loss so far, with always_save_checkpoint
    out_dir/state.pt   the latest step for --init_from=resume: also optimizer, scaler, progress

A LoRA run's files hold only the adapters, with the name and the hash of their base. nanoGPT's
ckpt.pt can be sampled, evaluated and resumed.
"""
import hashlib
import re
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from model import GPT, GPTConfig
from nanotune import files
from nanotune.device import DTYPES
from nanotune.errors import UserError
from nanotune.formats import hf, hf_config, hub, tf
from nanotune.formats.checks import check_fields, check_weight
from nanotune.formats.onnx_model import OnnxGPT, OnnxT5, open_onnx
from nanotune.text.tokenizer import (
    AnyTokenizer,
    gpt2_by_size,
    limit_rows,
    tokenizer_from_spec,
    tokenizer_of_folder,
    tokenizer_of_source,
)
from nanotune.training import lora
from t5 import T5, T5Config

MODEL_FILE, BEST_FILE, STATE_FILE = "ckpt.pt", "best.pt", "state.pt"


def best_file(always_save_checkpoint: bool) -> str:
    """Returns the best model's file name: best.pt if ckpt.pt is the latest step, else ckpt.pt."""
    return BEST_FILE if always_save_checkpoint else MODEL_FILE


@dataclass(frozen=True)
class Family:
    """A model's classes, and how to read its checkpoints."""
    model: type
    config: type
    model_types: tuple[str, ...]  # the model_types of config.json that it reads
    defaults: dict[str, object]    # values of the fields that a checkpoint lacks
    float16: bool                 # whether the model computes in float16 without overflow


FAMILIES = (
    Family(GPT, GPTConfig, ("gpt2", "gpt_neo"), {"activation": "gelu"}, True),  # as nanoGPT
    Family(T5, T5Config, ("t5",), {}, False),  # activations of its MLP exceed 65504
)
AnyModel = GPT | T5
AnyConfig = GPTConfig | T5Config


def model_class(config: AnyConfig) -> type[AnyModel]:
    """Returns the model class of a config."""
    return next(family.model for family in FAMILIES if isinstance(config, family.config))


def check_dtype(model: Any, dtype: torch.dtype) -> None:
    """Raises UserError if the model overflows with matrix products in `dtype`."""
    family = next(family for family in FAMILIES if isinstance(model.config, family.config))
    if dtype == torch.float16 and not family.float16:
        raise UserError(f"{family.model.family} overflows in float16; use --dtype=bfloat16 or "
                        "--dtype=float32")


def family_of(hf_config: dict, name: str) -> Family:
    """Returns the family of a config.json. Raises UserError if its model_type is not supported."""
    kind = hf_config.get("model_type")
    found = next((family for family in FAMILIES if kind in family.model_types), None)
    if found is None:
        known = [kind for family in FAMILIES for kind in family.model_types]
        raise UserError(f"{name} is a {kind!r} model; nanotune supports model_type "
                        f"{', '.join(known)}")
    return found


def config_from_args(args: dict, path: str | Path) -> AnyConfig:
    """Returns the config of a checkpoint's model_args. Raises UserError if a field is unknown or
    its value is invalid."""
    names = [{f.name for f in fields(family.config)} for family in FAMILIES]
    at = next((i for i, known in enumerate(names) if args.keys() <= known), 0)
    family, unknown = FAMILIES[at], args.keys() - names[at]
    if unknown:
        raise UserError(f"{path}: model_args has unknown fields: {', '.join(sorted(unknown))}")
    args = family.defaults | args
    check_fields(args, f"{path}: model_args")
    return family.config(**args)


def load_model(source: str, block_size: int | None = None, dropout: float = 0.0,
               device: str | torch.device = "cpu", with_onnx: bool = False,
               dtype: torch.dtype = torch.float32,
               ) -> tuple[AnyModel | OnnxGPT | OnnxT5, AnyTokenizer | None]:
    """Returns (model, tokenizer) of a run's out_dir or .pt file, a Hugging Face folder, a hub id or
    a folder with a TensorFlow checkpoint; with `with_onnx` also of an exported .onnx file or its
    folder, as an OnnxGPT or OnnxT5.

    The model is in training mode, with its matrices in `dtype` and LoRA adapters merged. A smaller
    block_size crops the context. Raises UserError if the source is missing, unknown or damaged.
    """
    folder = Path(source)
    if (graph := onnx_file(folder)) is not None:
        if not with_onnx:
            raise UserError(f"{source} can only be sampled from and evaluated; give the run or the "
                            "folder that it was exported from")
        model, tokenizer = open_onnx(str(graph), block_size)
        limit_rows(tokenizer, model.config.vocab_size, source)
        return model, tokenizer
    if (path := run_file(source)) is not None:
        model, tokenizer = load_run(path, dropout, device, dtype)
    elif tf.is_tf_checkpoint(folder):
        model = tf.read_model(folder, dropout, device, dtype)
        tokenizer = tokenizer_of_folder(folder) or gpt2_by_size(model.config.vocab_size)
    else:
        check_can_be_pretrained(source)
        hub.note_folder(source)
        family = family_of(hub.find_config(source), source)
        model = family.model.from_pretrained(source, dropout, device, dtype)
        tokenizer = tokenizer_of_source(source)
    limit_rows(tokenizer, model.config.vocab_size, source)
    if block_size is not None:
        model.crop_block_size(block_size)
    return model, tokenizer


def load_run(path, dropout, device, dtype):
    """(model, tokenizer or None) of a ckpt.pt, with adapters merged."""
    data = files.load(path)
    with files.checked_parse(path):
        model = model_from(data, path, dropout, dtype)
        tokenizer = tokenizer_from(data)
    model.to(device)
    lora.merge_lora(model)
    model.tie_head()
    return model, tokenizer


def pick_source(out_dir: str, init_from: str) -> str:
    """Returns the source to load a model from: out_dir if init_from is "resume", else init_from.
    Raises UserError if out_dir does not exist; it is never a hub id."""
    if init_from != "resume":
        return init_from
    if not Path(out_dir).exists():
        runs = sorted(str(path.parent) for path in Path().glob(f"*/{MODEL_FILE}"))
        raise UserError(f"--out_dir={out_dir} does not exist; "
                        + (f"runs here: {', '.join(runs[:8])}" if runs else "no runs here")
                        + "; give other models with --init_from=")
    return out_dir


def run_file(source: str) -> Path | None:
    """Returns the checkpoint of a run's out_dir, the source if it is a .pt file, or None."""
    path = Path(source)
    if path.suffix == ".pt" and path.is_file():
        return path
    return path / MODEL_FILE if (path / MODEL_FILE).is_file() else None


def onnx_file(path: Path) -> Path | None:
    """Returns the path if it names an .onnx file, the .onnx file of an exported folder (for a T5
    the decoder's), or None. Raises UserError if the folder has several."""
    if path.suffix == ".onnx":
        return path
    graphs = sorted(path.glob("*.onnx")) if path.is_dir() else []
    names = {graph.name for graph in graphs}
    graphs = [graph for graph in graphs
              if re.sub("^encoder", "decoder", graph.name) not in names - {graph.name}]
    if not graphs or (path / MODEL_FILE).is_file() or (path / "config.json").is_file():
        return None
    if len(graphs) > 1:
        raise UserError(f"{path} holds {', '.join(graph.name for graph in graphs)}; give one of "
                        "them")
    return graphs[0]


def check_can_be_pretrained(source):
    """Raises UserError if `source` is not a Hugging Face folder and cannot be a hub id, which is
    NAME or OWNER/NAME."""
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{source} holds neither {MODEL_FILE} (a run's out_dir) nor config.json "
                        "(a Hugging Face folder) nor hparams.json (a TensorFlow checkpoint)")
    if folder.is_file():
        raise UserError(f"{source} is a file; give a .pt or .onnx file, or a folder")
    hub_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", source)
    is_path = re.match("out(-|/|$)", source) or folder.suffix in (".pt", ".onnx", ".json", ".bin")
    if not folder.exists() and (hub_id is None or is_path):
        raise UserError(f"{source} does not exist; give a run's out_dir, a Hugging Face folder, "
                        "or a hub id such as gpt2")


def model_from(data: dict, path: str | Path, dropout: float = 0.0,
               dtype: torch.dtype = torch.float32) -> AnyModel:
    """Returns the model of a loaded checkpoint, also of nanoGPT's. LoRA adapters are not merged.
    Tensors that have `dtype` are not copied. Raises UserError if tensors do not fit model_args."""
    if data.get("lora"):
        return adapted_from(data, path, dropout, dtype)
    config = replace(config_from_args(data["model_args"], path), dropout=dropout)
    weights = {}
    for key, tensor in data["model"].items():
        if not hf.BUFFERS.search(key) or tensor.dim() == 1:
            check_weight(tensor, key, path)
            weights[plain_key(key)] = tensor.to(dtype if tensor.dim() >= 2 else torch.float32)
    with torch.device("meta"):
        model = model_class(config)(config)
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as e:
        raise UserError(f"{path}: its weights do not fit its model_args "
                        f"({' '.join(str(e).split())[:200]})") from None
    model.tie_head()
    return model


def peek_or_load(path):
    """The content of a checkpoint file, with its tensors memory-mapped if possible. Raises
    UserError if the file is damaged."""
    try:
        return files.peek(path)
    except Exception:  # torch.load raises many types; files.load turns them into UserError
        return files.load(path)


def history_of(source: str) -> dict:
    """Returns {"iter_num", "best_val_loss", "config"} of a run's ckpt.pt without reading weights,
    or {} if the source is not a run's out_dir."""
    path = run_file(source)
    if path is None:
        return {}
    data = peek_or_load(path)
    return {key: data.get(key) for key in ("iter_num", "best_val_loss", "config")}


def model_config(source: str) -> AnyConfig:
    """Returns the config of load_model's model without reading weights. Raises the same errors."""
    for path in (run_file(source), Path(source) / STATE_FILE):
        if path is not None and path.is_file():
            data = peek_or_load(path)
            with files.checked_parse(path):
                return config_from_args(data["model_args"], path)
    if tf.is_tf_checkpoint(Path(source)):
        return tf.read_config(Path(source))
    check_can_be_pretrained(source)
    found = hub.find_config(source)
    return family_of(found, source).config(**hf_config.config_from_hf(found, source))


def adapted_from(data, path, dropout, dtype):
    """The base of a LoRA checkpoint with its adapters, not merged. Raises UserError if the base is
    not found, has changed since training, or does not fit the adapters."""
    spec = data["lora"]
    try:
        changed = hash_of(spec["base"]) != spec["hash"]
    except UserError as e:
        raise UserError(f"{path} holds LoRA adapters of {spec['base']}, which cannot be loaded: "
                        f"{e}") from None
    if changed:
        raise UserError(f"{path} holds LoRA adapters of {spec['base']}, which has changed since "
                        "they were trained (its hash differs); restore the old base")
    # load in the dtype of training, so that the weights are rounded as they were then
    model, _ = load_model(spec["base"], data["model_args"].get("block_size"), dropout,
                          dtype=DTYPES[spec["weights"]])
    model.config = replace(config_from_args(data["model_args"], path), dropout=dropout)
    model.set_dtype(dtype)
    lora.add_lora(model, spec["rank"])
    params, saved = lora.adapters(model), data["model"]
    if {name: p.shape for name, p in params.items()} != {n: t.shape for n, t in saved.items()}:
        raise UserError(f"{path}: its adapters do not fit {spec['base']}")
    with torch.no_grad():
        for name, param in params.items():
            check_weight(saved[name], name, path)
            param.copy_(saved[name])
    return model


def read_adapters(source: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns (the `lora` entry, {name: adapter}) of a LoRA run's ckpt.pt. Raises UserError if the
    source is not a LoRA run."""
    path = run_file(source)
    data = {} if path is None else files.load(path)
    if not data.get("lora"):
        raise UserError(f"{source} has no adapters: --format=peft exports a run that was trained "
                        "with --lora_rank; use --format=hf")
    return data["lora"], data["model"]


def weight_files(source):
    """The paths of a source's weight files."""
    if (path := run_file(source)) is not None:
        return [path]
    if tf.is_tf_checkpoint(Path(source)):
        return tf.weight_files(Path(source))
    return hub.find_pretrained(source)[1]


def hash_of(source: str) -> str:
    """Returns the SHA-256 of the weight files of a run's out_dir, a Hugging Face folder, a hub id
    or a TensorFlow checkpoint. Raises UserError if they are not found."""
    digest = hashlib.sha256()
    for file in weight_files(source):
        with open(file, "rb") as f:
            digest.update(hashlib.file_digest(f, "sha256").digest())
    return digest.hexdigest()


def plain_key(key: str) -> str:
    """A parameter's name without the prefix of torch.compile or DDP."""
    return key.removeprefix("_orig_mod.").removeprefix("module.")


def tokenizer_from(data: dict) -> AnyTokenizer | None:
    """Returns the tokenizer of a loaded checkpoint. nanoGPT stores only the dataset's name."""
    if "tokenizer" in data:
        return data["tokenizer"] and tokenizer_from_spec(data["tokenizer"])
    dataset = data.get("config", {}).get("dataset")
    found = dataset and tokenizer_of_folder(Path("data") / dataset)
    return found or gpt2_by_size(data["model_args"].get("vocab_size"))


def saved_weights(model: AnyModel) -> dict[str, torch.Tensor]:
    """Returns the {name: tensor} to save of a model that is not sharded, without copies; for a LoRA
    run only the adapters."""
    return ({name: param.detach() for name, param in lora.adapters(model).items()}
            or dict(model.state_dict()))


def model_data(model: AnyModel, iter_num: int, best_val_loss: float, config: dict,
               tokenizer: AnyTokenizer, weights: dict[str, torch.Tensor] | None = None,
               run_id: str | None = None, lora_spec: dict | None = None) -> dict:
    """Returns the content of ckpt.pt. If the model is sharded, pass its gathered `weights`. The
    `lora_spec` of a LoRA run has the rank, the base, and the hash and dtype of the base."""
    data = {"model": dict(weights or saved_weights(model)), "model_args": asdict(model.config),
            "iter_num": iter_num, "best_val_loss": best_val_loss, "config": config,
            "tokenizer": tokenizer.spec, "run_id": run_id}
    return data | {"lora": lora_spec} if lora_spec else data
