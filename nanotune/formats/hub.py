"""Finds the files of a pretrained model, in a local folder or in a repository of the hub.

    config_file, weight_files = find_pretrained("gpt2")

A hub file is read from this machine's cache, and downloaded if it is not there.
"""
import json
from pathlib import Path, PureWindowsPath

from nanotune.errors import UserError, first_line

# (layers, heads, width) of OpenAI's models: a dry run needs no download
GPT2_SHAPES = {"gpt2": (12, 12, 768), "gpt2-medium": (24, 16, 1024), "gpt2-large": (36, 20, 1280),
               "gpt2-xl": (48, 25, 1600)}
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json",
                "pytorch_model.bin", "pytorch_model.bin.index.json")


def find_config(name: str) -> dict:
    """Returns the config.json of a local folder or a hub id; OpenAI's sizes need no download.

    Raises UserError if there is none or the hub cannot be reached.
    """
    if name in GPT2_SHAPES and not Path(name).is_dir():
        n_layer, n_head, n_embd = GPT2_SHAPES[name]
        return dict(model_type="gpt2", vocab_size=50257, n_positions=1024, n_layer=n_layer,
                    n_head=n_head, n_embd=n_embd)
    file = find_file(name, "config.json")
    if file is None:
        raise UserError(f"{name} has no config.json: it is not a Hugging Face model")
    return read_json(file)


def note_folder(source: str) -> None:
    """Prints a note if `source` is a local folder with the name of one of OpenAI's models."""
    if source in GPT2_SHAPES and Path(source).is_dir():
        print(f"note: {source} is a local folder here, not the hub's model of that name")


def find_pretrained(name: str) -> tuple[str, list[str]]:
    """Returns the paths (config.json, [weight files]) of a local folder or a hub id.

    Raises UserError if a file is missing or the hub cannot be reached.
    """
    config = find_file(name, "config.json")
    if config is None:
        raise UserError(f"{name} has no config.json: it is not a Hugging Face model")
    for file in WEIGHT_FILES:
        path = find_file(name, file)
        if path is None:
            continue
        if not file.endswith(".index.json"):
            return config, [path]
        shards = shards_of(path)
        paths = [find_file(name, shard) for shard in shards]
        if None in paths:
            raise UserError(f"{name}: the shard {shards[paths.index(None)]}, listed in {file}, is "
                            "missing; fetch it again")
        return config, paths
    raise UserError(f"{name} has none of {', '.join(WEIGHT_FILES)}"
                    + ("" if Path(name).is_dir() else
                      ", or the hub cannot be reached; try again"))


def shards_of(index):
    """The shards that an index file lists, in order. Raises UserError if it lists none, or a path
    outside the folder."""
    shards = read_json(index).get("weight_map")
    shards = list(shards.values()) if isinstance(shards, dict) else []
    if not shards or not all(map(stays_inside, shards)):
        raise UserError(f"{index} is damaged (its weight_map must name files in the same folder); "
                        "fetch it again")
    return sorted(set(shards))


def stays_inside(name):
    """Whether a value of an index file is a path inside the folder, on any operating system."""
    if not isinstance(name, str) or not name.isprintable() or len(name) > 255:
        return False
    path = PureWindowsPath(name)  # parses both kinds of slashes, and drives
    return bool(path.name) and not path.anchor and ".." not in path.parts


def read_json(file: str | Path) -> dict:
    """Returns the JSON object in a file. Raises UserError if it holds none."""
    try:
        data = json.loads(Path(file).read_bytes())
    except (ValueError, RecursionError) as e:  # not JSON, not UTF-8, or nested too deeply
        raise UserError(f"{file} is damaged ({e}); fetch it again") from None
    if not isinstance(data, dict):
        raise UserError(f"{file} is damaged (not a JSON object); fetch it again")
    return data


def find_file(name: str, file: str) -> str | None:
    """Returns the path of a file of a local folder or a hub id, or None if there is none."""
    if not Path(name).is_dir():
        return hub_file(name, file)
    path = Path(name, file)
    return str(path) if path.is_file() else None


def download(repo: str, *names: str) -> Path:
    """Returns the cache folder of these files of a hub repository. Files that the repository lacks
    are skipped, except the first, which must exist. Raises UserError as hub_file() does."""
    paths = [hub_file(repo, name) for name in names]
    if paths[0] is None:
        raise UserError(f"{repo} has no {names[0]}")
    return Path(paths[0]).parent


def hub_file(repo: str, file: str) -> str | None:
    """Returns the path of a hub repository's file in the cache, downloaded if it is not there.

    Returns None if the repository lacks the file, or if the hub cannot be reached and the cache
    lacks it. Raises UserError if the repository does not exist or is gated, or if config.json
    cannot be reached.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    try:
        if file == "config.json":  # read before all other files
            try:
                hf_hub_download(repo, file, local_files_only=True)
            except LocalEntryNotFoundError:  # not cached: hf_hub_download() would try for 30 s
                get_hf_file_metadata(hf_hub_url(repo, file), timeout=8)
        return hf_hub_download(repo, file)
    except LocalEntryNotFoundError:  # no answer from the hub, and not in the cache
        if file == "config.json":    # each model has one
            raise UserError(hub_unreachable(repo)) from None
        return None
    except EntryNotFoundError:
        return None
    except GatedRepoError:
        raise UserError(f"{repo} is gated: accept its terms on the hub, then run "
                        "`hf auth login`") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(f"{repo} is neither a folder on this machine nor a model on the hub; if it "
                        "is private, run `hf auth login`") from None
    except Exception as e:  # the file system and the HTTP library raise other types
        raise UserError(f"{hub_unreachable(repo)} ({type(e).__name__}: {first_line(e)})"
                        ) from None


def hub_unreachable(repo: str) -> str:
    """The message if the hub cannot be reached, with what to do."""
    return (f"the Hugging Face hub cannot be reached for {repo}, which is neither a folder nor in "
            "the cache on this machine; on a machine with network run `hf download "
            f"{repo} --local-dir FOLDER`, copy FOLDER here, and give FOLDER instead")
