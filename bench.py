"""Compares the speed and memory of nanotune and other software.

    python bench.py train                        # against transformers' GPT-2 in a plain loop
    python bench.py train --against=../nanoGPT   # against a checkout of nanoGPT
    python bench.py sample --num_samples=10
    python bench.py sample --against=PATH_OF_LLAMA_BENCH    # or ctranslate2
    python bench.py sample --exported=True       # PyTorch, and ONNX in float32, int8, int4
    python bench.py load --model=gpt2-xl         # loading a Hugging Face folder
    python bench.py memory --model=gpt2-large    # peak memory, and --dry_run=True's prediction

nanotune's cases run train.py and sample.py themselves. Each case runs in its own process, with a
warm-up. The cases alternate: a change of the machine's speed affects all. Weights are random,
in the real shapes: nothing is downloaded. Prints a table of medians; writes bench.json, with the
numbers of each process.

tok/s     tokens per second, trained or generated, after the warm-up. For sample.py this is the
          speed of the second half of the tokens; "from the start" is the speed of all, including
          the time to load, record and compile kernels
memory    peak: resident memory of the process on a CPU, memory allocated by torch on a GPU
MFU       (6 N + 12 L C T) * tok/s / peak; the peak is the measured speed of a matrix product
MBU       bytes of weights * steps/s / bandwidth; the bandwidth is measured by reading 1 GiB
"""
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import nanotune.threads  # noqa: F401

import numpy as np
import torch
from tqdm import tqdm

from configurator import AtLeast1, configure
from nanotune import device as devices
from nanotune.cli import run
from nanotune.errors import UserError
from nanotune.formats import hf, hf_config
from nanotune.formats.hub import GPT2_SHAPES
from nanotune.text.tokenizer import tokenizer_of_folder

ROOT = Path(__file__).resolve().parent
WARM_UP = 2  # steps that are not counted
SHAPES = {name: dict(zip(("n_layer", "n_head", "n_embd"), shape))
          for name, shape in (GPT2_SHAPES | {"tiny": (2, 2, 16)}).items()}  # tiny is for tests
N_VOCAB = {"tiny": 257}  # the others have 50257


@dataclass
class Config:
    model: str = "gpt2"               # gpt2, gpt2-medium, gpt2-large, gpt2-xl: the shape
    against: str = "transformers"  # or none, ctranslate2, a nanoGPT checkout, a llama-bench file
    repeats: AtLeast1 = 3             # processes per case
    only: str = ""                    # run only cases whose names contain this
    steps: AtLeast1 = 4               # train: timed steps per process, after 2 warm-up steps
    batch_size: AtLeast1 = 1          # train
    block_size: AtLeast1 = 1024       # train, memory
    num_samples: AtLeast1 = 1         # sample: generated in one batch
    max_new_tokens: AtLeast1 = 300    # sample
    init_from: str | None = None      # sample --exported: your model instead of random weights
    dataset: str | None = None        # sample --exported: measure perplexity on this
    exported: bool = False  # sample: compare PyTorch in two dtypes with the ONNX formats
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of nanotune; others: each native one
    compiled: bool = True             # train: also run each case compiled, a minute more each
    out: str = "bench.json"           # the file to write


# -----------------------------------------------------------------------------
# processes

def run_process(argv, until=None, cwd=None):
    """Runs a command; returns (its output, seconds, peak resident bytes). Kills the command when
    `until()` returns True. If the command fails, raises UserError with the output's last line."""
    with tempfile.TemporaryFile("w+") as out:
        began = time.perf_counter()
        child = subprocess.Popen(list(map(str, argv)), stdout=out, stderr=subprocess.STDOUT,
                                 cwd=cwd)
        ended = False
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if until is not None and not ended and until():
                child.kill()
                ended = True
            time.sleep(0.02)
        child.returncode = status
        seconds = time.perf_counter() - began
        out.seek(0)
        text = out.read()
    if status and not ended:
        lines = [line for line in text.splitlines() if line.strip()]
        raise UserError(f"{Path(argv[1]).name} failed: {lines[-1] if lines else status}")
    rss = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return text, seconds, rss


def run_worker(task, **options):
    """Runs one of WORKERS, or of TASKS in experiments/rivals.py, in a new process. Returns its
    result with the peak memory: the process's, unless the result has a GPU's."""
    file = ["bench.py", "worker"] if task in WORKERS else ["experiments/rivals.py"]
    text, _, rss = run_process([sys.executable, ROOT / file[0], *file[1:], task,
                                json.dumps(options, default=str)])
    return {"memory": rss} | json.loads(text.strip().splitlines()[-1])


def script(name, **fields):
    return [sys.executable, ROOT / name, *(f"--{k}={v}" for k, v in fields.items())]


# -----------------------------------------------------------------------------
# measurements of one process, most as {column: number}

def run_train(cfg, folder, until=None, **fields):
    fields = dict(
        init_from=folder / "hf", dataset=folder / "data", out_dir=folder / "out", overwrite=True,
        batch_size=cfg.batch_size, gradient_accumulation_steps=1, block_size=cfg.block_size,
        max_iters=10**6, eval_interval=10**6, eval_iters=1, warmup_iters=0, learning_rate=1e-5,
        decay_lr=False, device=cfg.device, dtype=cfg.dtype) | fields
    return run_process(script("train.py", **fields), until)


def train_ours(cfg, folder, **fields):
    """Runs train.py until metrics.jsonl has enough steps; then kills it, to skip the last save."""
    metrics = folder / "out" / "metrics.jsonl"
    metrics.unlink(missing_ok=True)

    def entries():
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        return [json.loads(line) for line in lines if line.startswith('{"iter"')]

    run_train(cfg, folder, until=lambda: len(entries()) >= WARM_UP + cfg.steps, **fields)
    timed = entries()[WARM_UP:WARM_UP + cfg.steps] or entries()[-1:]
    return {"tok/s": statistics.median(e["tok_s"] for e in timed), "memory": timed[-1]["memory"]}


def train_nanogpt(cfg, folder, compiled):
    """Runs nanoGPT's train.py with its defaults, except sizes; reads the times that it prints."""
    path = Path(cfg.against, "train.py").resolve()
    text, _, rss = run_process(script(
        path, dataset=folder / "data", out_dir=folder / "nanogpt", device=cfg.device, bias=True,
        eval_iters=1, eval_interval=10**6, log_interval=1, batch_size=cfg.batch_size,
        compile=compiled, block_size=cfg.block_size, gradient_accumulation_steps=1,
        max_iters=WARM_UP + cfg.steps, **SHAPES[cfg.model]), cwd=path.parent)
    ms = [float(m) for m in re.findall(r"time ([\d.]+)ms", text)][WARM_UP:]
    return {"tok/s": cfg.batch_size * cfg.block_size / statistics.median(ms) * 1e3,
            "memory": None if on_gpu(cfg) else rss}


def run_sample(cfg, folder, **fields):
    """Runs sample.py without a stop text."""
    start = "w1" if cfg.init_from is None else "The"
    fields = dict(
        init_from=folder / "hf", start=start, stop="", num_samples=cfg.num_samples,
        max_new_tokens=cfg.max_new_tokens, device=cfg.device, dtype=cfg.dtype) | fields
    return run_process(script("sample.py", **fields))


def sample_ours(cfg, folder, **fields):
    text, _, rss = run_sample(cfg, folder, **fields)
    rates = re.search(r"s, ([\d,.]+) per second \(second half: ([\d,.]+)\)", text).groups()
    whole, later = (float(rate.replace(",", "")) for rate in rates)
    return {"tok/s": later, "from the start": whole, "memory": None if on_gpu(cfg) else rss}


def first_token(cfg, folder):
    """Seconds of a whole run of sample.py for one token: imports, weights, prompt."""
    _, seconds, _ = run_sample(cfg, folder, num_samples=1, max_new_tokens=1)
    return {"seconds": seconds}


def on_gpu(cfg):
    return cfg.device == "cuda"


# -----------------------------------------------------------------------------
# workers: each runs in its own process, and prints its figures as a line of JSON

def make_folders(folder, model, block_size, dtype, tokens=200_000):
    """Writes folder/hf, a Hugging Face model of random weights, and folder/data, random tokens.
    Both get a tokenizer.json of words w0, w1, ...: GPT-2's would have to be downloaded."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    from model import GPT, GPTConfig
    n_vocab = N_VOCAB.get(model, 50257)
    words = {f"w{i}": i for i in range(n_vocab - 1)} | {"<|endoftext|>": n_vocab - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    for part in ("hf", "data"):
        Path(folder, part).mkdir()
        tokenizer.save(str(Path(folder, part, "tokenizer.json")))
    drawn = np.random.RandomState(0).randint(0, n_vocab - 1, tokens).astype("<u2")
    drawn.tofile(Path(folder, "data", "train.bin"))
    drawn[:4 * block_size + 1].tofile(Path(folder, "data", "val.bin"))
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=n_vocab, **SHAPES[model])
    hf.write_model(Path(folder, "hf"), asdict(config), dict(GPT(config).named_parameters()),
                   devices.DTYPES[dtype], tokenizer_of_folder(Path(folder, "hf")))
    return {}


def load_ours(folder):
    from nanotune.formats.checkpoint import load_model
    return timed_load(lambda: load_model(str(Path(folder, "hf"))))


def load_by_copy(folder):
    """Loads as nanoGPT does: copies the tensors of transformers' model into a GPT."""
    from transformers import GPT2LMHeadModel

    from model import GPT, GPTConfig

    @torch.no_grad()
    def load():
        theirs = GPT2LMHeadModel.from_pretrained(Path(folder, "hf"))
        c = theirs.config
        ours = GPT(GPTConfig(block_size=c.n_positions, vocab_size=c.vocab_size, n_layer=c.n_layer,
                             n_head=c.n_head, n_embd=c.n_embd))
        weights = theirs.state_dict()
        for name, param in ours.named_parameters():
            _, transposed = hf_config.keys_of(name, hf_config.LAYOUTS["gpt2"])
            param.copy_(weights[name].t() if transposed else weights[name])
        return ours
    return timed_load(load)


def timed_load(load):
    cpu = torch.device("cpu")
    before = devices.peak_memory(cpu)
    began = time.perf_counter()
    model = load()
    seconds = time.perf_counter() - began
    model = model[0] if isinstance(model, tuple) else model
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"seconds": seconds, "memory/weights": (devices.peak_memory(cpu) - before) / weights}


def machine(device, dtype, model, block_size):
    """The device, its name, native dtypes, measured peak and bandwidth; the model's cost per
    token."""
    torch.set_float32_matmul_precision("high")  # TF32, as train.py
    device = devices.pick_device(device)
    ours = devices.pick_dtype(dtype, device)
    native = {torch.float32, devices.pick_dtype("auto", device)} - {torch.float16}
    name = (torch.cuda.get_device_name() if device.type == "cuda" else
            f"{torch.get_num_threads()} threads of {processor() or platform.processor()}")
    gigabyte = torch.ones(2**28, device=device)
    seconds = devices.least_seconds(gigabyte.sum, device, times=5)
    return {"device": device.type, "name": name, "torch": torch.__version__,
            "dtype": str(ours).removeprefix("torch."),
            "dtypes": sorted(str(d).removeprefix("torch.") for d in native),
            "peak": devices.matmul_peak(device, ours), "bandwidth": 2**30 / seconds,
            **cost_of_token(model, block_size)}


def cost_of_token(model, block_size):
    """The FLOPs of training per token, and N, the parameters without position embeddings."""
    from model import GPT, GPTConfig
    config = GPTConfig(block_size, N_VOCAB.get(model, 50257), **SHAPES[model])
    gpt = GPT.empty(config, "meta")
    return {"flops": gpt.flops_per_token(),
            "N": gpt.num_params() - gpt.transformer.wpe.weight.numel()}


def processor():
    """The CPU's name on Linux, else None."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.is_file() else []
    return names[0] if names else None


WORKERS = {f.__name__: f for f in (make_folders, load_ours, load_by_copy, machine)}


# -----------------------------------------------------------------------------
# the cases of each mode: {name: a function that measures one process}

def train_cases(cfg, found, folder):
    cases = {f"nanotune {found['dtype']}": lambda: train_ours(cfg, folder)}
    if cfg.compiled and not on_gpu(cfg):  # on a GPU train.py compiles by default
        cases[f"nanotune {found['dtype']}, compiled"] = partial(train_ours, cfg, folder,
                                                                compile=True)
    for compiled in (False, True) if cfg.compiled else (False,):
        suffix = ", compiled" * compiled
        if cfg.against == "transformers":
            for dtype in found["dtypes"]:
                cases[f"transformers {dtype}{suffix}"] = partial(
                    run_worker, "train_transformers", folder=folder, steps=cfg.steps,
                    warm_up=WARM_UP, batch_size=cfg.batch_size, block_size=cfg.block_size,
                    device=cfg.device, dtype=dtype, compiled=compiled)
        elif rival_of(cfg) == "nanoGPT":
            cases["nanoGPT" + suffix] = partial(train_nanogpt, cfg, folder, compiled)
    return cases


def rival_of(cfg):
    """The program of --against: transformers, ctranslate2, none, nanoGPT, llama.cpp; else None."""
    if cfg.against in ("transformers", "ctranslate2", "none"):
        return cfg.against
    if Path(cfg.against, "train.py").is_file():
        return "nanoGPT"
    return "llama.cpp" if os.access(cfg.against, os.X_OK) and Path(cfg.against).is_file() else None


def sample_cases(cfg, found, folder):
    if cfg.exported:
        return exported_cases(cfg, found, folder)
    cases = {f"nanotune {found['dtype']}": lambda: sample_ours(cfg, folder)}
    if on_gpu(cfg):
        cases[f"nanotune {found['dtype']}, compiled"] = partial(sample_ours, cfg, folder,
                                                                compiled=True)
    sizes = dict(num_samples=cfg.num_samples, max_new_tokens=cfg.max_new_tokens, device=cfg.device)
    if cfg.against == "transformers":
        for dtype in found["dtypes"]:
            for compiled in (False, True) if on_gpu(cfg) else (False,):
                cases[f"transformers {dtype}" + ", static cache" * compiled] = partial(
                    run_worker, "sample_transformers", folder=folder, dtype=dtype,
                    compiled=compiled, **sizes)
    elif rival_of(cfg) == "nanoGPT":
        cases[f"nanoGPT {found['dtype']}"] = partial(
            run_worker, "sample_nanogpt", path=cfg.against, shape=SHAPES[cfg.model],
            dtype=found["dtype"], **sizes)
    cases |= runtime_cases(cfg, folder, found["dtypes"])
    cases = {name: partial(with_mbu, cfg, found, name, case) for name, case in cases.items()}
    return cases | {"nanotune, one token": lambda: first_token(cfg, folder)}


def runtime_cases(cfg, folder, forms):
    """The cases of llama.cpp or CTranslate2, if --against names one, for these weight formats."""
    source, rival = cfg.init_from or folder / "hf", rival_of(cfg)
    options = dict(source=source, folder=folder, max_new_tokens=cfg.max_new_tokens)
    if rival == "llama.cpp":
        names = {"float32": "F32", "bfloat16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
        return {f"llama.cpp {names[form]}": partial(
            run_worker, "sample_llama_cpp", executable=cfg.against, form=names[form], **options)
            for form in forms}
    if rival == "ctranslate2":
        return {f"CTranslate2 {form}": partial(
            run_worker, "sample_ctranslate2", form=form, num_samples=cfg.num_samples, **options)
            for form in forms if form in ("float32", "int8")}
    return {}


def with_mbu(cfg, found, name, case):
    """A case's figures, and MBU: the share of bandwidth that reading the weights takes."""
    figures, size = case(), 2 if "float16" in name or "BF16" in name else 4
    steps = figures["tok/s"] / cfg.num_samples
    return figures | {"MBU": size * found["N"] * steps / found["bandwidth"]}


FORMS = {"ONNX float32": "none", "ONNX int8": "int8", "ONNX int4": "int4"}


def exported_cases(cfg, found, folder):
    """The cases of a model in PyTorch and as exported by export.py: size, speed, perplexity."""
    source = cfg.init_from or folder / "hf"
    cases = {f"PyTorch {dtype}": partial(sample_form, cfg, folder, source, dtype)
             for dtype in ("float32", "bfloat16") if dtype in found["dtypes"]}
    cases |= {name: partial(sample_onnx, cfg, folder, source, quantize)
              for name, quantize in FORMS.items()}
    return cases | runtime_cases(cfg, folder, [*found["dtypes"], "int8", "int4"])


def sample_onnx(cfg, folder, source, quantize):
    target = folder / quantize
    if not target.exists():  # in the first repeat
        run_process(script("export.py", init_from=source, format="onnx", quantize=quantize,
                           export_dir=target))
    return sample_form(cfg, folder, next(target.glob("model*.onnx")), "float32")


def sample_form(cfg, folder, source, dtype):
    found = sample_ours(cfg, folder, init_from=source, dtype=dtype)
    if cfg.dataset:
        text, _, _ = run_process(script("evaluate.py", init_from=source, dataset=cfg.dataset,
                                        dtype=dtype, device=cfg.device))
        found["perplexity"] = float(re.search(r"perplexity ([\d.]+)", text)[1])
    return {"size": weights_size(Path(source), dtype)} | found


def weights_size(source, dtype):
    """The bytes of the weights: of an .onnx file, or of a folder's float32 weights as `dtype`."""
    if source.is_file():
        return sum(f.stat().st_size for f in source.parent.glob(f"{source.name}*"))
    files = [f for f in source.iterdir() if f.name in ("ckpt.pt", "model.safetensors")]
    return sum(f.stat().st_size for f in files) // (2 if dtype == "bfloat16" else 1)


def load_cases(cfg, found, folder):
    return {"nanotune load_model": partial(run_worker, "load_ours", folder=folder),
            "transformers, and a copy": partial(run_worker, "load_by_copy", folder=folder)}


SETTINGS = {
    "float32 AdamW": {},
    "recompute": dict(recompute=True),
    "bfloat16, 8-bit AdamW, recompute": dict(weights="bfloat16", optimizer="adamw8bit",
                                             recompute=True),
    "LoRA 16, bfloat16, recompute": dict(lora_rank=16, weights="bfloat16", recompute=True),
}


def memory_cases(cfg, found, folder):
    cfg = replace(cfg, steps=0)  # warm-up is enough: its step 2 has gradients, moments, activations

    def measure(fields):
        fields = fields | dict(gradient_accumulation_steps=2)
        text, _, _ = run_train(cfg, folder, dry_run=True, **fields)
        predicted = predicted_peak(text)
        if "does not fit" in text:
            return {"predicted": predicted}
        peak = train_ours(cfg, folder, **fields)["memory"]
        return {"memory": peak, "predicted": predicted, "predicted/memory": predicted / peak}

    return {name: partial(measure, fields) for name, fields in SETTINGS.items()
            if fields.get("optimizer") != "adamw8bit" or importlib.util.find_spec("torchao")}


def predicted_peak(text):
    """The bytes of peak memory in the printed plan of train.py."""
    number, unit = re.search(r"^peak memory [\w ]+: ([\d.]+) (\w+)", text, re.MULTILINE).groups()
    return float(number) * {"GB": 1e9, "MB": 1e6}[unit]


CASES = {"train": train_cases, "sample": sample_cases, "load": load_cases, "memory": memory_cases}


# -----------------------------------------------------------------------------
# the table

def measure(cases, repeats):
    """Runs the cases in turn, `repeats` times. Returns {case: {column: [numbers]}}. Prints the
    error of a case that fails, and continues."""
    results = {}
    with tqdm(total=repeats * len(cases), leave=False, disable=None) as bar:
        for _ in range(repeats):
            for name, case in cases.items():
                bar.set_description(name)
                try:
                    for column, value in case().items():
                        results.setdefault(name, {}).setdefault(column, []).append(value)
                except UserError as e:
                    tqdm.write(f"{name}: {e}")
                bar.update()
    return results


def spell(column, values):
    """The median of a column's numbers, and their range if they differ."""
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    scale, unit, digits = {"memory": (1e9, " GB", 2), "predicted": (1e9, " GB", 2),
                           "size": (1e6, " MB", 0), "tok/s": (1, "", 1), "MBU": (0.01, "%", 0),
                           "from the start": (1, "", 1)}.get(column, (1, "", 2))
    low, middle, high = (f"{f(values) / scale:,.{digits}f}" for f in (min, statistics.median, max))
    return middle + unit + ("" if low == high else f" ({low} to {high})")


def ratio(results, name, column):
    """The factor by which the median of the first case (usually nanotune) is better than that of
    the case `name`."""
    ours, theirs = (statistics.median(results[n][column]) for n in (next(iter(results)), name))
    return ours / theirs if column == "tok/s" else theirs / ours


def table(results, peak_flops=None):
    """The results as a Markdown table; the last column compares the first case with each."""
    columns = list(dict.fromkeys(c for found in results.values() for c in found))
    first = results[next(iter(results))]
    judged = next((c for c in ("tok/s", "seconds") if c in first), None)
    head = ["", *columns, *(["MFU"] if peak_flops else []),
            *(["speedup of the first"] if judged else [])]
    rows = [head, ["---"] * len(head)]
    for name, found in results.items():
        row = [name, *(spell(c, found.get(c, [])) for c in columns)]
        if peak_flops:
            row.append(f"{statistics.median(found['tok/s']) / peak_flops:.0%}")
        if judged:
            row.append(f"{ratio(results, name, judged):.2f}x" if judged in found else "")
        rows.append(row)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
                     for row in rows)


def check_config(mode, cfg):
    if not hasattr(os, "wait4"):
        raise UserError("bench.py measures peak memory with os.wait4, which Windows lacks: "
                        "run it on Linux or macOS")
    if mode not in CASES:
        raise UserError(f"bench.py {mode}: choose one of {', '.join(CASES)}")
    if cfg.model not in SHAPES:
        raise UserError(f"--model={cfg.model} is not supported; use {', '.join(SHAPES)}")
    rival = rival_of(cfg)
    if rival is None:
        raise UserError(f"--against={cfg.against} is not supported; use transformers, "
                        "ctranslate2, none, or the path of a nanoGPT checkout or a llama-bench "
                        "executable")
    package = {"llama.cpp": "gguf", "ctranslate2": "ctranslate2"}.get(rival)
    if package and mode != "sample":
        raise UserError(f"--against={cfg.against} works only with `bench.py sample`")
    if rival == "llama.cpp" and cfg.num_samples > 1:
        raise UserError("llama-bench generates one sample at a time: use --num_samples=1")
    if package and importlib.util.find_spec(package) is None:
        raise UserError(f"--against={cfg.against} needs a package: pip install {package}")
    if (cfg.against == "transformers" or mode == "load") and mode != "memory" and (
            importlib.util.find_spec("transformers") is None):
        raise UserError("bench.py compares with transformers: pip install -r "
                        "requirements-dev.txt, or use --against=none")
    if cfg.init_from is not None and not (mode == "sample" and cfg.exported):
        raise UserError("--init_from works only with `bench.py sample --exported=True`")
    if cfg.exported and importlib.util.find_spec("onnxruntime") is None:
        raise UserError("--exported=True needs onnxruntime: pip install -r "
                        "requirements-export.txt")


def main(argv):
    if argv[:1] == ["worker"]:
        print(json.dumps(WORKERS[argv[1]](**json.loads(argv[2]))))
        return
    mode = argv[0] if argv and not argv[0].startswith("-") else "train"
    cfg = configure(Config, argv[argv[:1] == [mode]:])
    check_config(mode, cfg)
    found = run_worker("machine", device=cfg.device, dtype=cfg.dtype, model=cfg.model,
                       block_size=cfg.block_size)
    cfg.device = found["device"]
    print(f"{mode}: {cfg.model}, on {found['name']}, torch {found['torch']}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        every = CASES[mode](cfg, found, folder)
        cases = {name: case for name, case in every.items() if cfg.only in name}
        if not cases:
            raise UserError(f"--only={cfg.only} matches no case: {'; '.join(every)}")
        if cfg.init_from is None:
            run_worker("make_folders", folder=folder, model=cfg.model, block_size=cfg.block_size,
                       dtype="bfloat16" if mode == "memory" else "float32")
        results = measure(cases, cfg.repeats)
    if not results:
        raise UserError("all cases failed; see the errors above")
    peak = found["peak"] / found["flops"] if mode == "train" else None
    print(table(results, peak))
    Path(cfg.out).write_text(json.dumps({
        "mode": mode, "config": asdict(cfg), "machine": found, "results": results}, indent=1))


if __name__ == "__main__":
    run(main)
