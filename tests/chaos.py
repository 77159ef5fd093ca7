"""Fault injection: kill processes at random moments, corrupt checkpoints, and run attacks.py.

    make chaos                       # 50 kills each of ddp and fsdp, 200 altered files, all attacks
    PYTHONPATH=. python tests/chaos.py --kills=5 --altered=0 --parallel=fsdp --seed=1

A tiny run is killed with SIGKILL (one rank, or all ranks, as if the machine went down) while it
starts, steps or saves. It is restarted each time with --auto_resume=True. Every tenth time its
newest state is also corrupted. In the end its weights, moments and losses must be bitwise equal to
those of an undisturbed run. Then altered checkpoints are given to --init_from=resume and to
load_model(), which must not load wrong weights, run code, or end in a traceback.
"""
import contextlib
import io
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import zipfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from attacks import run_attacks
from ranks import Job, run_ranks
from tiny import arguments, losses, write_dataset

import train
from configurator import configure
from nanotune import files
from nanotune.cli import run
from nanotune.errors import UserError
from nanotune.formats import checkpoint
from nanotune.training import resume, state_dicts

RANKS = 2


@dataclass
class Config:
    kills: int = 50              # for each value in `parallel`
    altered: int = 200           # altered checkpoints
    parallel: str = "ddp,fsdp"
    looks: int = 1000            # reads of the states while a second run tries to start
    stops: int = 20              # Ctrl-C with a broken pipe
    orphans: int = 3             # killed torchruns
    fuzzed: int = 400            # runs with random fields
    seed: int = 0


# -----------------------------------------------------------------------------
# kills

def same(a, b):
    """Whether two runs ended bitwise equal: weights, moments, progress, losses."""
    one, other = (files.load(folder / checkpoint.STATE_FILE) for folder in (a, b))
    progress = [state["progress"] | {"run_id": ""} for state in (one, other)]
    return (progress[0] == progress[1] and losses(a) == losses(b)
            and one["model"].keys() == other["model"].keys()
            and all(torch.equal(one["model"][name], other["model"][name]) for name in one["model"])
            and all(torch.equal(state[key], other["optimizer"][name][key])
                    for name, state in one["optimizer"].items() for key in state))


def slow_steps(rank):
    """Slow each step by 10 ms, so that the run does not end before the last kill."""
    def forward_backward(r, step):
        time.sleep(0.01)
        return real(r, step)

    real, train.forward_backward = train.forward_backward, forward_backward


def wait_for(moment, job, out, step, rng):
    """Wait for a "start", "step" or "save" after `step`; return False if the run ended first."""
    if moment == "start":
        time.sleep(rng.uniform(0, 1.5))
        return job.alive()
    while job.alive():
        if resume.reached_step(out) > step and (moment == "step" or list(out.glob("*.pt.*.tmp"))):
            if moment == "step":
                time.sleep(rng.uniform(0, 0.02))
            return True
    return False


def corrupt_newest(out, rng):
    """Overwrite 4096 bytes of the newest state, as a bad sector would."""
    path = resume.state_files(out)[0]
    data = bytearray(path.read_bytes())
    data[len(data) // 3:len(data) // 3 + 4096] = rng.randbytes(4096)
    path.write_bytes(data)


def kill_repeatedly(parallel, kills, folder, dataset, rng):
    """Kill a run `kills` times and let it end; return the counts, and whether the run is bitwise
    equal to an undisturbed one."""
    fields = dict(parallel=parallel, max_iters=6 * kills + 20, eval_interval=20, save_interval=2,
                  n_embd=32, timeout=60, lr_decay_iters=6 * kills + 20)
    whole, out = folder / f"{parallel}-whole", folder / f"{parallel}-killed"
    statuses, output = run_ranks(RANKS, arguments(dataset, whole, **fields), folder / "log",
                                 seconds=600)
    assert statuses == [0] * RANKS, output
    count, argv = Counter(), arguments(dataset, out, **fields, auto_resume=True)
    while True:
        job = Job(RANKS, argv, folder / "log", slow_steps)
        if count["kills"] == kills:
            assert job.wait(600) == [0] * RANKS, job.output()
            read_log(job.output(0), count)
            return count, same(whole, out)
        moment = rng.choices(("step", "save", "start"), (4, 4, 2))[0]
        if not wait_for(moment, job, out, resume.reached_step(out) + rng.randint(0, 2), rng):
            raise AssertionError(f"the run ended before it was killed:\n{job.output()}")
        victims = rng.choice(((0,), tuple(range(RANKS))) if moment == "save" else
                             (*((rank,) for rank in range(RANKS)), tuple(range(RANKS))))
        job.kill(*victims)
        statuses = job.end(seconds=5)
        assert all(statuses[rank] == -signal.SIGKILL for rank in victims), job.output()
        count["kills"] += 1
        count["during a save"] += any(out.glob("*.pt.*.tmp"))
        count["before the first step"] += "iter " not in job.output(0)
        count["of all ranks"] += len(victims) == RANKS
        read_log(job.output(0), count)
        count["reached"] = resume.reached_step(out)
        if count["kills"] % 10 == 5 and len(resume.state_files(out)) == 2:
            corrupt_newest(out, rng)
            count["states corrupted"] += 1


def read_log(output, count):
    """Count fallbacks, resumes and lost steps in the output of a start."""
    count["fallbacks"] += "cannot be used" in output
    if "resuming at step " in output:
        step = int(output.partition("resuming at step ")[2].split()[0])
        count["resumes"] += 1
        count["lost steps"] += max(0, count["reached"] - step)


# -----------------------------------------------------------------------------
# altered checkpoints

class Trap:
    """An object that creates a file when its pickle is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def foreign(rng, data, trap):
    """A file that nanotune never wrote: code, garbage, or a state with wrong fields."""
    def torch_zip(content, **options):
        f = io.BytesIO()
        torch.save(content, f, **options)
        return f.getvalue()

    def bare_zip(content):
        f = io.BytesIO()
        with zipfile.ZipFile(f, "w") as archive:
            archive.writestr("archive/data.pkl", content)
            archive.writestr("archive/version", "3")
        return f.getvalue()

    saved = torch.load(io.BytesIO(data), weights_only=True)
    name, moments = rng.choice(list(saved["model"])), saved.get("optimizer", {})
    wrong = rng.choice([{"model": 3}, {"model_args": []}, {"model_args": {"n_head": 0}},
                        {"optimizer": []}, {"optimizer": {name: {}}}, {"progress": {"step": "x"}},
                        {"progress": {"shoe_size": 44}}, {"config": 7}, {"tokenizer": {"kind": 1}},
                        {"scaler": "x"}, {"config": {"batch_size": "many"}},
                        {"optimizer": moments | {name: {"exp_avg": torch.ones(3, 3)}}},
                        {"model": saved["model"] | {name: torch.ones(2, 2)}}])
    return rng.choice([
        lambda: pickle.dumps(Trap(trap)),
        lambda: bare_zip(pickle.dumps(Trap(trap))),
        lambda: torch_zip({"model": Trap(trap), "model_args": {}}),
        lambda: torch_zip(saved | {"progress": Trap(trap)}),
        lambda: torch_zip(saved | {"x": Trap(trap)}, _use_new_zipfile_serialization=False),
        lambda: b"", lambda: b"PK\x05\x06" + bytes(18), lambda: b"version https://git-lfs\n",
        lambda: rng.randbytes(5000), lambda: bare_zip(rng.randbytes(500)),
        lambda: torch_zip([1, 2]), lambda: torch_zip({"weights": torch.ones(3)}),
        *[lambda: torch_zip(saved | wrong)] * 8])()


def altered(rng, data, others, trap):
    """(kind of damage, the bytes of the altered checkpoint)."""
    kind = rng.choices(("cut", "bit", "bits", "block", "tail", "swapped", "foreign"),
                       (4, 6, 2, 2, 1, 2, 5))[0]
    if kind == "swapped":
        return kind, rng.choice(others)
    if kind == "foreign":
        return kind, foreign(rng, data, trap)
    if kind == "cut":
        return kind, data[:rng.randrange(len(data))]
    if kind == "tail":
        return kind, data + rng.randbytes(rng.randint(1, 5000))
    damaged = bytearray(data)
    if kind == "block":
        at, size = rng.randrange(len(data)), rng.choice((16, 512, 4096))
        damaged[at:at + size] = bytes(len(damaged[at:at + size]))
    else:
        for _ in range(1 if kind == "bit" else rng.randint(2, 64)):
            damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return kind, bytes(damaged)


def resumed(argv):
    """Run train.py --eval_only; return (exit status, stderr, the run's namespace or None)."""
    found, err = [], io.StringIO()
    with (mock.patch.object(train, "evaluate_splits", lambda r: found.append(r) or [1.0, 1.0]),
          mock.patch.object(sys, "argv", ["train.py", *argv]),
          contextlib.redirect_stderr(err),
          contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO()))):
        try:
            run(train.main)
            status = 0
        except SystemExit as end:
            status = end.code
    return status, err.getvalue(), found[0] if found else None


def loads_right(r, references):
    """Whether weights, moments and run_id equal those of the run's own state at that step."""
    reference = references.get(r.progress.step)
    if reference is None or r.progress.run_id != reference["progress"]["run_id"]:
        return False
    moments = state_dicts.optimizer_state(r.model, r.optimizer)
    return (all(torch.equal(tensor, reference["model"][name])
                for name, tensor in r.model.state_dict().items())
            and all(torch.equal(value, moments[name][key])
                    for name, state in reference["optimizer"].items()
                    for key, value in state.items()))


def alterations(times, folder, dataset, rng):
    """Alter state.pt, both states or ckpt.pt `times` times; return the counts of outcomes."""
    out, trap = folder / "good", folder / "ran"
    runs = [(out, {}), (folder / "same-size", {}), (folder / "larger", dict(n_embd=32))]
    for path, fields in runs:
        statuses, output = run_ranks(1, arguments(dataset, path, **fields), folder / "log")
        assert statuses == [0], output
    names = ("state.pt", "state.1.pt", "ckpt.pt")
    good = {name: (out / name).read_bytes() for name in names}
    others = [(path / name).read_bytes() for path, _ in runs[1:] for name in names[:2]]
    references = {s["iter_num"]: s for s in (files.load(out / name) for name in names[:2])}
    argv = arguments(dataset, out, init_from="resume", eval_only=True)
    count = Counter()
    for _ in range(times):
        targets = rng.choice((("state.pt",), ("state.pt", "state.1.pt"), ("ckpt.pt",)))
        for name in names:
            (out / name).write_bytes(good[name])
        for name in targets:
            kind, data = altered(rng, good[name], others, trap)
            (out / name).write_bytes(data)
        count[kind] += 1
        if targets == ("ckpt.pt",):
            outcome = load_altered(out, references, others=kind in ("swapped", "foreign"))
        else:
            status, err, r = resumed(argv)
            if r is None:
                fine = status == 1 and err.startswith("error: ") and err.count("\n") == 1
                outcome = "refused" if fine else f"WRONG MESSAGE: {err}"
            elif loads_right(r, references):
                outcome = "harmless" if r.progress.step == 6 else "fell back"
            else:
                outcome = f"LOADED WRONG: {kind}"
        if trap.exists():
            outcome = f"RAN CODE: {kind}"
        count[outcome] += 1
    shutil.rmtree(out)
    return count


def load_altered(out, references, others):
    """The outcome of load_model on an altered ckpt.pt, which must be an error or the run's weights.
    `others`: the file may be a valid ckpt.pt of another run, which load_model cannot detect."""
    try:
        model, _ = checkpoint.load_model(str(out))
    except UserError:
        return "refused"
    right = all(torch.equal(tensor, references[6]["model"].get(name))
                for name, tensor in model.state_dict().items()
                if tensor.shape == references[6]["model"][name].shape)
    return "harmless" if right or others else "LOADED WRONG: ckpt.pt"


# -----------------------------------------------------------------------------

def has_failure(count):
    """Whether an outcome is a failure: its name is in capitals."""
    return any(what.split(":")[0].isupper() for what in count)


def main(argv):
    cfg = configure(Config, argv)
    began, failed = time.monotonic(), False
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        dataset = write_dataset(folder / "words")
        for parallel in cfg.parallel.split(",") if cfg.kills else ():
            rng = random.Random(f"{cfg.seed} {parallel}")
            count, equal = kill_repeatedly(parallel, cfg.kills, folder, dataset, rng)
            del count["reached"]
            print(f"{parallel} on {RANKS} processes: "
                  + ", ".join(f"{n} {what}" for what, n in count.items())
                  + f"; bitwise equal to the undisturbed run: {'yes' if equal else 'NO'}",
                  flush=True)
            failed |= not equal
        if cfg.altered:
            count = alterations(cfg.altered, folder, dataset, random.Random(cfg.seed))
            print(f"{cfg.altered} altered checkpoints: "
                  + ", ".join(f"{n} {what}" for what, n in sorted(count.items())))
            failed |= has_failure(count)
        for name, count in run_attacks(cfg, folder, dataset, same):
            print(f"{name}: " + ", ".join(f"{n} {what}" for what, n in sorted(count.items())),
                  flush=True)
            failed |= has_failure(count)
    print(f"{'FAILED' if failed else 'passed'} in {time.monotonic() - began:.0f} s")
    sys.exit(failed)


if __name__ == "__main__":
    run(main)
