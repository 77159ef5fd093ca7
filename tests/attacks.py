"""Four attacks of `make chaos`: a second writer, Ctrl-C with a broken pipe, a killed torchrun, and
random fields. Each returns the counts of its outcomes; outcomes in capitals are failures."""
import contextlib
import math
import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import torch
from ranks import Job, run_ranks
from test_elastic import ranks_of, torchrun
from test_pipes import at_step, redirect
from tiny import arguments

import evaluate
import export
import sample
import train
from configurator import choices, members
from nanotune import files
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.training import resume

ENDLESS = dict(max_iters=10**6, eval_interval=10**6, log_interval=10**6, save_interval=1)


# -----------------------------------------------------------------------------
# a second writer

def wait_briefly_for_the_lock(rank):
    files.RETRY = 0.2


def two_writers(looks, folder, dataset):
    """Repeatedly start a second run in the folder of a running one, and load the first run's states
    meanwhile."""
    count, copy, out = Counter(), folder / "look.pt", folder / "two-writers"
    argv = arguments(dataset, out, **ENDLESS, auto_resume=True)
    first, second = Job(1, argv, folder / "first"), None
    while first.alive() and not (out / "state.pt").exists():
        time.sleep(0.01)
    while count["looks"] < looks or len(count) < 2:
        if second is None:
            second = Job(1, argv, folder / "second", wait_briefly_for_the_lock)
        if not second.alive():
            refused = second.wait() == [1] and "is in use: process" in second.output()
            count["second runs refused" if refused else "SECOND RUNS NOT REFUSED"] += 1
            second = None
        for name in ("state.pt", "state.1.pt"):
            with contextlib.suppress(FileNotFoundError):
                copy.write_bytes((out / name).read_bytes())
                count["looks"] += 1
                try:
                    files.load(copy)
                except UserError:
                    count["DAMAGED STATES"] += 1
        assert first.alive(), first.output()
    first.kill()
    first.wait()
    if second is not None:
        second.end(seconds=0)
    return count


# -----------------------------------------------------------------------------
# Ctrl-C with a broken pipe

def ctrl_c(step, rank):
    """Simulate Ctrl-C in `train.py 2>&1 | tee log` at a step; tee ends first."""
    tee = subprocess.Popen(["tee", os.devnull], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)
    redirect(tee.stdin.fileno())

    def act():
        tee.kill()
        tee.wait()
        signal.raise_signal(signal.SIGINT)
    at_step(step, act)


def pipes(times, folder, dataset, same, rng):
    """Stop a run `times` times at random steps and compare it to an undisturbed run."""
    count = Counter()
    steps = sorted(rng.sample(range(6 * times), times))
    fields = dict(max_iters=6 * times, eval_interval=20, lr_decay_iters=6 * times)
    whole, out = folder / "pipes-whole", folder / "pipes"
    assert run_ranks(1, arguments(dataset, whole, **fields), folder / "log")[0] == [0]
    argv = arguments(dataset, out, **fields, auto_resume=True)
    for step in steps:
        statuses, _ = run_ranks(1, argv, folder / "log", partial(ctrl_c, step))
        saved = files.load(out / checkpoint.STATE_FILE)["iter_num"]
        good = (statuses, saved) == ([130], step + 1)
        count["stops with a broken pipe" if good else "STOPS THAT LOST STEPS"] += 1
    assert run_ranks(1, argv, folder / "log")[0] == [0]
    count["bitwise equal to the undisturbed run" if same(whole, out) else "ANOTHER RESULT"] += 1
    return count


# -----------------------------------------------------------------------------
# a killed torchrun

def is_alive(pid):
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def orphans(times, folder, dataset, same):
    """Kill only torchrun, `times` times; start the job again each time; then let it finish."""
    count, out, whole = Counter(), folder / "orphans", folder / "orphans-whole"
    fields = dict(max_iters=60 * (times + 1), eval_interval=50, save_interval=5,
                  lr_decay_iters=1000, timeout=60)
    assert run_ranks(2, arguments(dataset, whole, **fields), folder / "log", seconds=300)[0] == [
        0, 0]
    argv = arguments(dataset, out, **fields, auto_resume=True)
    for attempt in range(times + 1):
        launcher = torchrun(argv, folder / "torchrun.log")
        while launcher.poll() is None and (attempt == times
                                           or resume.reached_step(out) <= 60 * attempt + 10):
            time.sleep(0.01)
        if attempt < times:
            left = ranks_of(launcher).values()
            launcher.kill()
            end = time.monotonic() + 60
            while any(map(is_alive, left)) and time.monotonic() < end:
                time.sleep(0.1)
            count["ORPHANS LEFT" if any(map(is_alive, left)) else "orphaned jobs that ended"] += 1
    good = launcher.wait() == 0 and same(whole, out)
    count["bitwise equal to the undisturbed run" if good else "ANOTHER RESULT"] += 1
    return count


# -----------------------------------------------------------------------------
# random fields

ORDINARY = {bool: ["True", "False"], int: ["0", "1", "2", "4"], float: ["0.0", "0.01", "0.5", "1"],
            str: [], type(None): ["None"]}
EXTREME = {
    bool: ["maybe"], int: ["-1", "1000000000", f"{10**15}", f"{10**400}", "1.5"],
    float: ["1e-320", "1e-45", "-1.0", "1e38", "1e308", "nan", "inf"],
    str: ["", "x" * 5000, "/dev/null", "no/such/path", "\x1b[31m", "é", "meta"], type(None): []}
# some values of these fields use the network, compile for minutes, or never end
LEFT_OUT = {"wandb_log", "compile", "max_iters", "max_new_tokens", "optimizer"}
SCRIPTS = {"train": train, "sample": sample, "evaluate": evaluate, "export": export}


def random_fields(script, rng):
    """One to four fields of a script with random values, of which one in four is extreme."""
    hints = get_type_hints(SCRIPTS[script].Config, include_extras=True)
    found = []
    for name in rng.sample(sorted(hints.keys() - LEFT_OUT), rng.randint(1, 4)):
        pool = EXTREME if rng.random() < 0.25 else ORDINARY
        values = [value for kind in choices(hints[name]) for value in pool[kind]]
        values += [str(option) for member in members(hints[name])
                   if get_origin(member) is Literal for option in get_args(member)]
        found += [f"--{name}={rng.choice(values)}"] if values else []
    return found


def confined(folder, rank):
    """Change to `folder` and limit the address space to 3 GB more than is mapped now."""
    import resource
    os.chdir(folder)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 3 * 10**9
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def is_valid(script, folder, output):
    """Whether a script with exit status 0 wrote or printed what it should."""
    if script == "train":
        path = folder / "new/ckpt.pt"
        return not path.exists() or all(
            torch.isfinite(tensor).all() for tensor in files.load(path)["model"].values())
    if script == "evaluate":
        found = re.search(r"loss (\S+) nats|accuracy", output)
        return bool(found) and (found[1] is None or math.isfinite(float(found[1])))
    if script == "sample":  # beam search prints the answer and dashes, but no speed
        return " tokens in " in output or "-" * 15 in output
    return "wrote " in output


def fuzz(times, folder, dataset, rng):
    """Run random scripts with random fields; print the runs that fail."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    count, run, cwd = Counter(), folder / "fuzzed", folder / "cwd"
    assert run_ranks(1, arguments(dataset, run), folder / "log")[0] == [0]
    base = {"train": arguments(dataset, "new", max_iters=2, overwrite=True),
            "sample": [f"--out_dir={run}", "--max_new_tokens=3", "--device=cpu"],
            "evaluate": [f"--out_dir={run}", f"--dataset={dataset}", "--device=cpu"],
            "export": [f"--out_dir={run}"]}
    for _ in range(times):
        script = rng.choice(list(SCRIPTS))
        fields = random_fields(script, rng)
        shutil.rmtree(cwd, ignore_errors=True)
        cwd.mkdir()
        job = Job(1, [*base[script], *fields], folder / "log", partial(confined, cwd), script)
        try:
            status, = job.wait(60)
        except AssertionError:
            status = None
        output = job.output()
        errors = sum(line.startswith("error: ") for line in output.splitlines())
        if status == 1 and errors == 1 and "Traceback" not in output:
            outcome = "one-line error"
        elif status == 0 and not errors and is_valid(script, cwd, output):
            outcome = "valid output"
        else:
            outcome = "HANGS" if status is None else "NEITHER ERROR NOR OUTPUT"
            print(outcome, script, *(field[:80] for field in fields), output[-2000:], sep="\n  ")
        count[outcome] += 1
    return count


def run_attacks(cfg, folder, dataset, same):
    """Yield (name, counts) of each attack that cfg enables."""
    if cfg.looks:
        yield "two writers", two_writers(cfg.looks, folder, dataset)
    if cfg.stops:
        yield "Ctrl-C with a broken pipe", pipes(cfg.stops, folder, dataset, same,
                                           random.Random(cfg.seed))
    if cfg.orphans:
        yield "torchrun killed", orphans(cfg.orphans, folder, dataset, same)
    if cfg.fuzzed:
        yield f"{cfg.fuzzed} runs with random fields", fuzz(cfg.fuzzed, folder, dataset,
                                                            random.Random(cfg.seed))
