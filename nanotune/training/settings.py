"""Writes a run's fields to settings.json, and restores them for a resume.

settings.json is for people. It has every field by section, the command and the versions. A resume
reads the fields from state.pt, which also holds the weights that they belong to, or from ckpt.pt.
"""
import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import torch

from configurator import build, by_section, check_type, hints_of, read_sources
from nanotune import files
from nanotune.errors import UserError, first_line
from nanotune.formats.checkpoint import MODEL_FILE
from nanotune.training import resume

SETTINGS_FILE, VERSION = "settings.json", 1
# fields that belong to one start of the program: a resume does not restore them
NOT_RESUMED = ("out_dir", "overwrite", "auto_resume", "force_resume", "eval_only", "dry_run",
                "device", "backend", "timeout")
# fields that a resume cannot change: the weights or the optimizer's state depend on them. With
# force_resume `weights` can change, except in a LoRA run; the results then differ
FIXED = ("init_from", "n_layer", "n_head", "n_embd", "bias", "weights", "optimizer", "lora_rank")
# fields that a pretrained model sets: settings.json has the model's values. The state keeps the
# config's values, since a resume compares FIXED fields with them
SIZES = ("block_size", "n_layer", "n_head", "n_embd", "bias")


def read_run_config(out_dir: str | Path) -> dict[str, Any]:
    """Returns the fields that a run was last trained with, from its newest readable state.pt, else
    from ckpt.pt (also nanoGPT's); {} if neither can be read. Reads no weights."""
    run_id = resume.read_run_file(out_dir).get("run_id")
    for path in (*resume.state_files(out_dir), Path(out_dir) / MODEL_FILE):
        try:
            data = files.peek(path)
            config = dict(data["config"])
        except Exception:  # torch.load raises many kinds; loading the weights reports them
            continue
        if run_id and data.get("run_id", run_id) != run_id:  # of another run
            continue
        if "settings_version" not in config:  # first edition, nanoGPT: counts batches
            config["eval_iters"] = config.get("eval_iters", 0) * config.get("batch_size", 1)
        if config.get("init_from") == "resume":  # the value of the first start is not known
            del config["init_from"]
        return config
    return {}


def remembered(cls: type, config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of a run that a resume keeps, as a source for build()."""
    kept = {}
    for name, kind in hints_of(cls).items():
        if name in config and name not in NOT_RESUMED:
            try:
                kept[name] = check_type(kind, config[name], name)
            except UserError:  # nanoGPT's field may have another type
                continue
    for names in cls.ONE_OF:  # epochs sets max_iters: keep only epochs
        given = [name for name in names if kept.get(name) is not None]
        for name in given[1:]:
            del kept[name]
    return kept


def configure_resume(cls: type, argv: list[str], out_dir: str,
                     config: dict[str, Any]) -> tuple[Any, list[str]]:
    """Returns (cls() of a resumed run, a line for each field that argv changes). `config` is from
    read_run_config(). Raises UserError if argv changes a field that a resume cannot change."""
    then, sources = remembered(cls, config), read_sources(cls, argv)
    then = {"optimizer": "adamw", "lora_rank": 0} | then  # for runs without these fields
    given = {name: value for source in sources for name, value in source.items()}
    for name in FIXED:
        by_force = name == "weights" and given.get("force_resume") and not then["lora_rank"]
        if name in given and name in then and not by_force and (
                given[name] not in (then[name], "resume")):
            raise UserError(
                f"--{name}={given[name]}: the run in {out_dir} was started with "
                f"{name}={then[name]}, which a resume cannot change; leave it out, or begin a new "
                "run with another --out_dir")
    cfg = build(cls, [then, *sources])
    before = config | then
    changes = [f"{name}: {before[name]} -> {getattr(cfg, name)}" for name in given
               if name in before and name not in (*NOT_RESUMED, "init_from")
               and getattr(cfg, name) != before[name]]
    cfg.init_from = "resume"
    return cfg, changes


def with_sizes(config: dict[str, Any], model: Any) -> dict[str, Any]:
    """Returns a run's fields with the SIZES of its model's config, None for those that a T5 lacks.
    """
    return config | {name: vars(model).get(name) for name in SIZES}


def write_settings(cfg: Any, config: dict[str, Any], argv: list[str], model: Any) -> None:
    """Writes out_dir/settings.json: `config`, which is also saved in the run's state, with the
    sizes of the model's config. Raises files.WriteError if the disk is full."""
    content = {"version": VERSION, "command": shlex.join(["python", "train.py", *argv]),
               "torch": torch.__version__, "nanotune": revision(),
               "settings": by_section(type(cfg), with_sizes(config, model))}
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    files.write_atomic(Path(cfg.out_dir) / SETTINGS_FILE, lambda f: f.write(text.encode()))


def check_settings(out_dir: str | Path) -> str | None:
    """Returns a warning if settings.json is missing or damaged; it will be written again. Raises
    UserError if a newer version of nanotune wrote it."""
    path = Path(out_dir) / SETTINGS_FILE
    try:
        content = json.loads(path.read_bytes())
        version = content["version"]
        if not isinstance(content["settings"], dict) or not isinstance(version, int):
            raise ValueError("it has other fields")
    except FileNotFoundError:
        return f"{path} is missing; it is written again, from the state"
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as e:
        return f"{path} is damaged ({first_line(e)}); it is written again, from the state"
    if version > VERSION:
        raise UserError(f"{path} was written by a newer nanotune (version {version}, this one "
                        f"knows {VERSION}): update this copy with git pull")
    return None


def revision() -> str | None:
    """Returns the git revision of this repository, None if it is not known."""
    here = Path(__file__).resolve().parents[2]
    try:
        found = subprocess.run(["git", "-C", str(here), "describe", "--always", "--dirty"],
                               capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return found.stdout.strip() or None
