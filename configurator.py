"""Config files and --key=value arguments onto a typed dataclass.

    @dataclass
    class Config:
        # optimizer
        learning_rate: float = 6e-4  # highest learning rate

    cfg = configure(Config, sys.argv[1:])

    $ python train.py config/finetune_shakespeare.py --learning_rate=1e-5
    $ python train.py --help

A config file is plain Python that assigns fields; what it imports or names with a leading
underscore stays its own. Files and arguments apply from left to right: the later one wins.
"""
import ast
import dataclasses
import difflib
import inspect
import os
import sys
import types
import typing

from nanotune.errors import UserError

BOOLS = {"True": True, "true": True, "False": False, "false": False}


def configure(cls, argv):
    """Returns cls() filled from argv, a list of config file paths and `--key=value` strings.

    Raises UserError with one line that says what is wrong and what to do. `--help` prints the
    fields, their defaults and comments, and exits.
    """
    if "--help" in argv or "-h" in argv:
        print(help_text(cls))
        sys.exit(0)
    cfg = cls()
    hints = typing.get_type_hints(cls)
    for arg in argv:
        if not arg.startswith("-"):
            for name, value in run_config_file(arg).items():
                where = f"{arg}: {name}"
                setattr(cfg, name, check_type(field_type(hints, name, where), value, where))
            continue
        name, equals, text = arg.lstrip("-").partition("=")  # a value may hold "=" too
        kind = field_type(hints, name, f"--{name}")
        if not equals:
            raise UserError(f"--{name} has no value: write --{name}=VALUE")
        setattr(cfg, name, parse(kind, text, f"--{name}"))
    return cfg


def run_config_file(path):
    """Runs a config file in a namespace of its own; returns its public names, modules aside."""
    if not os.path.isfile(path):
        raise UserError(f"config file {path} does not exist (a field is written --name=value)"
                        + nearest(path, sibling_configs(path)))
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


def sibling_configs(path):
    folder = os.path.dirname(path) or "config"
    if not os.path.isdir(folder):
        return []
    return [os.path.join(folder, f) for f in sorted(os.listdir(folder)) if f.endswith(".py")]


def field_type(hints, name, where):
    if name not in hints:
        raise UserError(f"{where}: there is no such field" + nearest(name, hints)
                        + "; --help lists them all")
    return hints[name]


def nearest(name, names):
    """' (did you mean X?)' for the closest of names, or nothing."""
    close = difflib.get_close_matches(name, list(names), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def choices(kind):
    """The plain types that a hint allows: int | None -> (int, NoneType)."""
    return typing.get_args(kind) or (kind,)


def spell(kind):
    return " or ".join("None" if k is types.NoneType else k.__name__ for k in choices(kind))


def check_type(kind, value, where):
    """A value from a config file, checked against the field's type; an int becomes a float."""
    allowed = choices(kind)
    if type(value) in allowed:
        return value
    if float in allowed and type(value) is int:  # not isinstance: a bool is no number here
        return float(value)
    raise UserError(f"{where} wants {spell(kind)}, not {value!r} ({type(value).__name__})")


def parse(kind, text, where):
    """A value from the command line. A str field takes the text as it stands, quotes and all."""
    allowed = choices(kind)
    if types.NoneType in allowed and text == "None":
        return None
    if bool in allowed and text in BOOLS:
        return BOOLS[text]
    if str in allowed:
        return text
    try:
        return check_type(kind, ast.literal_eval(text), where)
    except (UserError, ValueError, SyntaxError, TypeError, MemoryError, RecursionError,
            OverflowError):
        raise UserError(f"{where} wants {spell(kind)}, not {text!r}") from None


def help_text(cls):
    """The fields of a config class as its source shows them: section, name, default, comment."""
    lines = [inspect.getmodule(cls).__doc__ or "", "Fields, given as --name=value:"]
    names = {f.name for f in dataclasses.fields(cls)}
    for line in inspect.getsource(cls).splitlines():
        code, _, comment = line.strip().partition("  # ")
        name, _, rest = code.partition(":")
        if name in names:
            default = rest.partition("=")[2].strip()
            lines.append(f"  --{name + '=' + default:<40}  {comment}".rstrip())
        elif code.startswith("# "):
            lines.append(f"\n{code[2:]}")
    return "\n".join(lines)
