"""Arguments and config files set the fields of a dataclass; each mistake is a one-line error."""
import dataclasses
import math
import typing
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bench
import evaluate
import export
import sample
import train
from configurator import Interval, configure, help_text, members
from nanotune.errors import UserError


@dataclass
class Config:
    # names
    out_dir: str = "out"         # where it goes
    init_from: str = "scratch"
    # numbers
    learning_rate: float = 6e-4  # the highest
    max_iters: int = 5 * 8
    bias: bool = False           # of layers
    min_lr: float | None = None  # None: learning_rate / 10
    block_size: int | None = None
    compile: bool | str = "auto"


@pytest.fixture
def config_file(tmp_path):
    def write(text, name="some.py"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)
    return write


def refuse(argv, *parts, cls=Config):
    with pytest.raises(UserError) as error:
        configure(cls, argv)
    message = str(error.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# -----------------------------------------------------------------------------
# values

FIELDS = {
    "out_dir": st.text(), "learning_rate": st.floats(allow_nan=False, allow_infinity=False),
    "max_iters": st.integers(), "bias": st.booleans(),
    "min_lr": st.none() | st.floats(allow_nan=False, allow_infinity=False),
    "block_size": st.none() | st.integers(), "compile": st.booleans() | st.sampled_from(["auto"]),
}


@given(st.fixed_dictionaries({}, optional=FIELDS))
def test_any_value_is_read_back_from_the_command_line(values):
    cfg = configure(Config, [f"--{name}={value}" for name, value in values.items()])
    assert cfg == Config(**values)
    for name, value in values.items():
        assert type(getattr(cfg, name)) is type(value)


@given(values=st.fixed_dictionaries({}, optional=FIELDS))
def test_any_value_is_read_back_from_a_config_file(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "some.py"
    path.write_text("".join(f"{n} = {v!r}\n" for n, v in values.items()), encoding="utf-8")
    cfg = configure(Config, [str(path)])
    assert cfg == Config(**values)
    for name, value in values.items():
        assert type(getattr(cfg, name)) is type(value)


@given(st.sampled_from([f.name for f in dataclasses.fields(Config)]),
       st.text() | st.sampled_from(["{[]:1}", "1e999", "1" * 400, "(" * 999, "-" * 9999 + "1",
                                    "None", "True", "nan", "1.0", "0x10", "[1]", "'a'", "1L"]))
def test_any_text_is_a_value_of_the_type_or_an_error(name, text):
    try:
        value = getattr(configure(Config, [f"--{name}={text}"]), name)
    except UserError as error:
        assert str(error).startswith(f"--{name} must be ")
        return
    types = {"learning_rate": float, "min_lr": float | None, "max_iters": int, "bias": bool,
             "block_size": int | None, "compile": bool | str}
    assert isinstance(value, types.get(name, str))
    assert isinstance(value, bool) == (name in ("bias", "compile") and text.lower() in
                                       ("true", "false"))


@pytest.mark.parametrize("arg, expected", [
    ("--learning_rate=1", 1.0), ("--learning_rate=1e-5", 1e-5), ("--learning_rate=-3", -3.0),
    ("--min_lr=0", 0.0), ("--min_lr=None", None), ("--bias=True", True), ("--bias=false", False),
    ("--block_size=None", None), ("--block_size=128", 128), ("--compile=True", True),
    ("--compile=auto", "auto"), ("--out_dir=None", "None"), ("--out_dir=", ""),
    ("--out_dir=a=b==c", "a=b==c"), ("--out_dir='quoted'", "'quoted'"), ("--out_dir=12", "12"),
    ("--max_iters=1e3", 1000), ("--max_iters=2.0", 2), ("--block_size=1e2", 100),
    ("--out_dir=--x", "--x"), ("--out_dir= a b\n", " a b\n"), ("--init_from=https://x/?a=1&b=2",
                                                             "https://x/?a=1&b=2"),
])
def test_arguments_are_converted_to_the_type_of_the_field(arg, expected):
    value = getattr(configure(Config, [arg]), arg[2:].partition("=")[0])
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize("arg, kind", [
    ("--max_iters=1.5", "an integer"), ("--max_iters=True", "an integer"),
    ("--max_iters=1e-3", "an integer"), ("--max_iters=1e999", "an integer"),
    ("--max_iters=None", "an integer"), ("--max_iters=", "an integer"),
    ("--max_iters=ten", "an integer"), ("--learning_rate=True", "a number"),
    ("--learning_rate=fast", "a number"), ("--learning_rate=None", "a number"),
    ("--bias=1", "True or False"), ("--bias=yes", "True or False"),
    ("--bias=None", "True or False"), ("--block_size=big", "an integer or None"),
    ("--block_size=True", "an integer or None"), ("--min_lr=", "a number or None"),
    ("--min_lr=False", "a number or None"),
])
def test_wrong_types_are_refused(arg, kind):
    name, _, text = arg.partition("=")
    refuse([arg], f"{name} must be {kind}, got ", repr(text))


@pytest.mark.parametrize("line, parts", [
    ("max_iters = 1.5", ["max_iters must be an integer, got 1.5 (float)"]),
    ("max_iters = True", ["max_iters must be an integer, got True (bool)"]),
    ("learning_rate = False", ["learning_rate must be a number, got False (bool)"]),
    ("learning_rate = '1e-4'", ["learning_rate must be a number, got '1e-4' (str)"]),
    ("bias = 1", ["bias must be True or False, got 1 (int)"]),
    ("out_dir = 3", ["out_dir must be a string, got 3 (int)"]),
    ("out_dir = None", ["out_dir must be a string, got None"]),
    ("block_size = 2.5", ["block_size must be an integer or None"]),
    ("learning_rat = 1", ["learning_rat: there is no such field (did you mean learning_rate?)"]),
    ("def schedule(): pass", ["schedule: there is no such field"]),
])
def test_wrong_types_and_names_in_a_file_are_refused(config_file, line, parts):
    path = config_file(line)
    refuse([path], f"{path}: ", *parts)


def test_the_later_argument_or_file_wins(config_file):
    path = config_file("max_iters = 2\nout_dir = 'file'")
    assert configure(Config, [path, "--max_iters=3"]) == Config(max_iters=3, out_dir="file")
    assert configure(Config, ["--max_iters=3", path]) == Config(max_iters=2, out_dir="file")
    other = config_file("max_iters = 9", "other.py")
    assert configure(Config, [path, "--max_iters=3", other]).max_iters == 9
    assert configure(Config, ["--bias=True", "--bias=False", "--bias=True"]).bias is True
    assert configure(Config, []) == Config()


# -----------------------------------------------------------------------------
# config files

NANOGPT = {
    "finetune": """import time

out_dir = 'out-shakespeare'
eval_interval = 5
eval_iters = 40
wandb_log = False # feel free to turn on
wandb_project = 'shakespeare'
wandb_run_name = 'ft-' + str(time.time())

dataset = 'shakespeare'
init_from = 'gpt2-xl' # this is the largest GPT-2 model

# only save checkpoints if the validation loss improves
always_save_checkpoint = False

# 1 batch_size * 32 grad_accum * 1024 tokens = 32,768 tokens/iter
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20

# finetune at constant LR
learning_rate = 3e-5
decay_lr = False
""",
    "scratch": """wandb_log = True
wandb_project = 'owt'
wandb_run_name='gpt2-124M'
batch_size = 12
block_size = 1024
gradient_accumulation_steps = 5 * 8
max_iters = 600000
lr_decay_iters = 600000
eval_interval = 1000
eval_iters = 200
log_interval = 10
weight_decay = 1e-1
""",
    "characters": """out_dir = 'out-shakespeare-char'
dataset = 'shakespeare_char'
n_layer = 6
n_head = 6
n_embd = 384
dropout = 0.2
learning_rate = 1e-3
min_lr = 1e-4 # learning_rate / 10 usually
beta2 = 0.99
warmup_iters = 100
# device = 'cpu'
# compile = False
""",
    "evaluate": "batch_size = 8\neval_iters = 500\neval_only = True\nwandb_log = False\n"
                "init_from = 'gpt2'\n",
}


@pytest.mark.parametrize("name", NANOGPT)
def test_nanogpts_config_files_are_accepted(config_file, name):
    cfg = configure(train.Config, [config_file(NANOGPT[name])])
    assert cfg != train.Config()
    if name == "finetune":
        assert cfg.wandb_run_name.startswith("ft-") and float(cfg.wandb_run_name[3:]) > 0
        assert (cfg.init_from, cfg.learning_rate, cfg.decay_lr) == ("gpt2-xl", 3e-5, False)
    if name == "scratch":
        assert (cfg.gradient_accumulation_steps, cfg.weight_decay) == (40, 0.1)


def test_imports_and_private_names_in_a_file_are_not_fields(config_file, tmp_path):
    path = config_file("import math as m, os.path\n_half = 0.5\nlearning_rate = _half * m.pi\n"
                       "out_dir = __file__\n")
    cfg = configure(Config, [path])
    assert cfg.learning_rate == math.pi / 2 and cfg.out_dir == path
    assert "math" not in dir(cfg)
    # the next file does not see these names
    refuse([path, config_file("bias = _half > 0", "next.py")], "line 1: NameError", "_half")


@pytest.mark.parametrize("text, parts", [
    ("max_iters = 1\n\nbias = = True\n", ["line 3", "SyntaxError"]),
    ("max_iters = 1\nlearning_rate = 1 / 0\n", ["line 2", "ZeroDivisionError"]),
    ("def f():\n    raise KeyError('x')\n\n\nf()\n", ["line 5", "KeyError"]),
    ("import no_such_module\n", ["line 1", "no_such_module"]),
    (b"max_iters = 1\nout_dir = 'caf\xe9'\n", ["line 2", "SyntaxError"]),
    (b"max_iters = 1\0\n", ["line ", "SyntaxError"]),
])
def test_an_error_inside_a_file_is_reported_with_its_line(config_file, text, parts):
    path = config_file(text)
    refuse([path], path, *parts)


def test_a_file_is_read_as_utf8(config_file):
    assert configure(Config, [config_file("out_dir = 'café'")]).out_dir == "café"
    assert configure(Config, [config_file(b"\xef\xbb\xbfout_dir = 'bom'")]).out_dir == "bom"


def test_missing_files_are_refused(config_file, tmp_path):
    path = config_file("")
    missing = path.replace("some.py", "sme.py")
    refuse([missing], f"{missing} does not exist", f"did you mean {path}?")
    refuse([str(tmp_path)], "does not exist")
    refuse(["max_iters=3"], "max_iters=3 does not exist", "--name=value")


def test_a_flag_without_a_value_means_true():
    cfg = configure(Config, ["--bias", "--compile"])
    assert cfg.bias is True and cfg.compile is True
    assert configure(Config, ["--bias", "--bias=False"]).bias is False


# -----------------------------------------------------------------------------
# names

@pytest.mark.parametrize("arg, parts", [
    ("--learning_rte=1", ["--learning_rte", "did you mean learning_rate?", "--help"]),
    ("--outdir=x", ["did you mean out_dir?"]), ("--zzzzz=1", ["no such field; --help"]),
    ("--max_iters", ["--max_iters has no value: write --max_iters=VALUE"]),
    ("--min_lr", ["--min_lr has no value"]), ("--biass", ["did you mean bias?"]),
    ("--max-iters=3", ["did you mean max_iters?"]), ("--=3", ["no such field"]),
    ("--__class__=3", ["no such field"]),
])
def test_bad_arguments_are_refused(arg, parts):
    refuse([arg], *parts)


@pytest.mark.parametrize("argv, values", [
    (["--max_iters", "3", "--bias"], {"max_iters": 3, "bias": True}),
    (["--bias", "False", "--learning_rate", "1e-4"], {"bias": False, "learning_rate": 1e-4}),
    (["--learning_rate", "-1", "--out_dir", "a b"], {"learning_rate": -1.0, "out_dir": "a b"}),
    (["--bias", "FILE", "--max_iters=2"], {"bias": True, "max_iters": 2, "out_dir": "file"}),
])
def test_a_value_may_follow_a_space(argv, values, config_file):
    file = config_file("out_dir = 'file'")
    assert configure(Config, [file if arg == "FILE" else arg for arg in argv]) == Config(**values)


def test_compile_takes_an_optional_value_after_a_space():
    for argv, value in ((["--compile"], True), (["--compile", "auto"], "auto"),
                        (["--compile", "False"], False)):
        assert configure(train.Config, argv).compile == value
    refuse(["--max_iters", "--bias"], "--max_iters has no value: write --max_iters=VALUE")


@pytest.mark.parametrize("script, arg, meant", [
    (train, "--lr", "learning_rate"), (train, "--train.max_steps", "max_iters"),
    (train, "--per_device_train_batch_size", "batch_size"), (train, "--output-dir", "out_dir"),
    (train, "--steps", "max_iters"), (train, "--model_name_or_path", "init_from"),
    (train, "--Learning-Rate", "learning_rate"), (sample, "--prompt", "start"),
    (sample, "--length", "max_new_tokens"), (sample, "--nsamples", "num_samples"),
    (sample, "--checkpoint_dir", "init_from"), (evaluate, "--bf16", "dtype"),
])
def test_option_names_of_other_programs_get_a_suggestion(script, arg, meant):
    refuse([f"{arg}=1"], f"{arg}: there is no such field (did you mean {meant}?)",
           cls=script.Config)


@pytest.mark.parametrize("text, value", [
    (r"a\nb", "a\nb"), (r"\t\n", "\t\n"), (r"\\n", r"\n"), (r"\x \d", r"\x \d"), ("\n", "\n"),
    (r"FILE:C:\new\text.txt", r"FILE:C:\new\text.txt"), ("", ""), ("\\", "\\"),
])
def test_escapes_in_a_text_are_decoded_on_the_command_line(text, value, config_file):
    """Not in paths, and not in config files, where Python decodes them."""
    cfg = configure(sample.Config, [f"--start={text}", "--stop", text, f"--out_dir={text}"])
    assert (cfg.start, cfg.stop, cfg.out_dir) == (value, value, text)
    assert configure(train.Config, [f"--sample_start={text}"]).sample_start == value
    assert configure(sample.Config, [config_file(f"start = {text!r}")]).start == text


@pytest.mark.parametrize("script", [train, sample, evaluate], ids=lambda script: script.__name__)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_each_field_with_its_comment(script, flag, capsys):
    with pytest.raises(SystemExit) as end:
        configure(script.Config, ["--anything=1", flag])
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert script.__doc__.strip().splitlines()[0] in out
    lines = {line.strip().partition("=")[0]: line for line in out.splitlines() if "  --" in line}
    for field in dataclasses.fields(script.Config):
        default = lines[f"--{field.name}"].partition("=")[2].partition("  ")[0].strip()
        assert eval(default) == field.default, lines[f"--{field.name}"]
        assert "#" not in lines[f"--{field.name}"]
        if typing.get_origin(field.type) is typing.Literal:
            assert ", ".join(typing.get_args(field.type)) in lines[f"--{field.name}"]


def test_help_has_groups_defaults_and_comments():
    text = help_text(Config).splitlines()
    assert "names" in text and "numbers" in text
    line = next(line for line in text if "--learning_rate" in line)
    assert line.split() == ["--learning_rate=6e-4", "the", "highest"]
    assert next(line for line in text if "--block_size" in line) == "  --block_size=None"


# -----------------------------------------------------------------------------
# values outside their bounds

@pytest.mark.parametrize("script, arg, message", [
    (train, "--min_lr=-0.1", "--min_lr=-0.1 must be at least 0"),
    (train, "--lr_decay_iters=-1", "--lr_decay_iters=-1 must be at least 0"),
    (train, "--learning_rate=1e999", "--learning_rate=inf must be a finite number"),
    (train, "--beta2=1.0", "--beta2=1.0 must be in [0, 1)"),
    (train, "--seed=4294967296", "--seed=4294967296 must be in [0, 4294967296)"),
    (train, "--save_interval=0", "--save_interval=0 must be at least 1"),
    (train, "--backend=mpi", "--backend=mpi is not supported; use auto, nccl or gloo"),
    (train, "--compile=fast", "--compile=fast is not supported; use auto, True or False"),
    (sample, "--top_p=0.0", "--top_p=0.0 must be in (0, 1]"),
    (sample, "--repetition_penalty=0",
     "--repetition_penalty=0.0 must be at least 0.01 and at most 100"),
    (evaluate, "--stride=0", "--stride=0 must be at least 1"),
])
def test_a_value_outside_its_bounds_is_refused(script, arg, message):
    with pytest.raises(UserError) as info:
        configure(script.Config, [arg])
    assert str(info.value) == message


def test_bounds_apply_in_a_config_file_too(tmp_path):
    (tmp_path / "c.py").write_text("min_lr = -0.1\n")
    with pytest.raises(UserError, match=r"--min_lr=-0\.1 must be at least 0"):
        configure(train.Config, [str(tmp_path / "c.py")])
    assert configure(train.Config, [str(tmp_path / "c.py"), "--min_lr=0"]).min_lr == 0


@pytest.mark.parametrize("ends, inside, outside", [
    ("[)", [0, 0.5], [1, -1e-9]), ("(]", [0.5, 1], [0]), ("()", [0.5], [0, 1]),
    ("[]", [0, 1], [2])])
def test_an_interval_contains_its_closed_ends_but_not_nan_or_infinity(ends, inside, outside):
    interval = Interval(0, 1, ends)
    assert all(map(interval.holds, inside))
    assert not any(map(interval.holds, [*outside, math.nan, math.inf, -math.inf]))


@pytest.mark.parametrize("script", [train, sample, evaluate, export, bench],
                         ids=lambda script: script.__name__)
def test_every_number_has_bounds(script):
    for name, kind in typing.get_type_hints(script.Config, include_extras=True).items():
        assert not {int, float} & set(members(kind)), f"{script.__name__}.{name} has no bounds"

