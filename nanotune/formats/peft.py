"""Writes the adapters of a LoRA run as a folder that PEFT loads.

    write_peft(folder, fields, adapters, spec, tokenizer)   # then reads back and compares

PEFT's layer adds lora_alpha / r * B A x; ours adds SCALE * B A x. PEFT's A (rank, in) and B (out,
rank) have our shapes, also for a Conv1D, whose weight is (in, out); fan_in_fan_out marks it. Where
transformers splits one of our matrices by rows (GPT-Neo's q, k, v), all parts have the same A.
"""
import json
from pathlib import Path

import torch

from nanotune.errors import UserError
from nanotune.formats.hf import save_tensors, write_tokenizer
from nanotune.formats.hf_config import LAYOUTS, check_hf_takes, keys_of, model_type_of
from nanotune.text.tokenizer import AnyTokenizer
from nanotune.training.lora import SCALE

MATRICES = {"lora_a": "lora_A", "lora_b": "lora_B"}  # ours: PEFT's


def write_peft(folder: Path, fields: dict, adapters: dict[str, torch.Tensor], spec: dict,
               tokenizer: AnyTokenizer | None) -> None:
    """Writes adapter_model.safetensors, adapter_config.json and the tokenizer of a LoRA run, given
    its GPTConfig fields, {name: adapter} and `spec`, the checkpoint's `lora` entry.

    Raises UserError if transformers cannot express the base or the weights differ when read back;
    OSError if the disk is full.
    """
    from safetensors.torch import load_file
    check_hf_takes(fields)
    layout = LAYOUTS[model_type_of(fields)]
    tensors = adapters_to_peft(adapters, layout)
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": name_of_base(spec["base"]), "r": spec["rank"],
        "lora_alpha": int(SCALE * spec["rank"]), "lora_dropout": 0.0,
        "fan_in_fan_out": bool(layout.transposed),
        "target_modules": sorted({key.split(".")[-3] for key in tensors})}
    config_file, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    config_file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    save_tensors(tensors, weights, like=config_file)
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, fields["block_size"])
    back = load_file(weights)
    if back.keys() != tensors.keys() or not all(torch.equal(back[k], tensors[k]) for k in back):
        raise UserError(f"{weights.name} does not read back as it was written; check the disk")


def adapters_to_peft(adapters, layout):
    """{key: tensor} as PEFT stores {our name: adapter}."""
    tensors = {}
    for name, adapter in adapters.items():
        module, _, kind = name.rpartition(".")
        keys, _ = keys_of(f"{module}.weight", layout)
        parts = adapter.chunk(len(keys)) if kind == "lora_b" else [adapter] * len(keys)
        for key, part in zip(keys, parts):
            path = f"base_model.model.{key.removesuffix('.weight')}"
            # a clone: safetensors refuses tensors that share memory
            tensors[f"{path}.{MATRICES[kind]}.weight"] = part.clone()
    return tensors


def needs_export(base: str) -> bool:
    """Returns whether the base of a LoRA run is a folder that transformers cannot load: it has no
    config.json."""
    return Path(base).is_dir() and not Path(base, "config.json").is_file()


def name_of_base(base: str) -> str:
    """Returns the name with which transformers loads the base: a hub id, a folder, or the folder to
    export it to. An absolute path is cut to its last part, since the rest is private."""
    path = Path(base)
    if needs_export(base):
        return f"{path.name}-hf"
    return path.name if path.is_absolute() else base
