"""Processes that die, hang or compute NaN: the others stop together, and a restart resumes."""
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import ROOT, Job, run_ranks
from tiny import arguments, losses

import train
from nanotune import files
from nanotune.formats import checkpoint
from nanotune.training import resume

FIELDS = dict(eval_iters=0, lr_decay_iters=12, keep_states=2)


def assert_same_state(a, b, atol=0.0):
    a, b = (files.load(folder / checkpoint.STATE_FILE) for folder in (a, b))
    assert a["iter_num"] == b["iter_num"]
    for name, moments in a["optimizer"].items():
        for key in moments:
            torch.testing.assert_close(moments[key], b["optimizer"][name][key], rtol=0, atol=atol)
    for name in a["model"]:
        torch.testing.assert_close(a["model"][name], b["model"][name], rtol=0, atol=atol)


def when_step(out, step, job):
    """Wait until `step` is logged."""
    while job.alive() and resume.reached_step(out) <= step:
        time.sleep(0.001)
    assert job.alive(), job.output()


# -----------------------------------------------------------------------------
# NaN on one rank: all ranks stop before the step

def nan_in_the_activations(rank):
    """In step 2 the activations of rank 1 are NaN."""
    def forward_backward(r, step):
        if rank == 1 and step == 2:
            r.model.transformer.ln_f.register_forward_hook(lambda module, args, x: x * math.nan)
        return real(r, step)

    real, train.forward_backward = train.forward_backward, forward_backward


def nan_in_the_loss(rank):
    """In step 2 the loss of rank 1 is NaN, but its gradients are finite."""
    def forward_backward(r, step):
        loss = real(r, step)
        return loss * math.nan if rank == 1 and step == 2 else loss

    real, train.forward_backward = train.forward_backward, forward_backward


def nan_in_a_gradient(rank):
    """In step 2 a gradient of rank 1 becomes NaN after the all-reduce, as with a memory fault."""
    def forward_backward(r, step):
        loss = real(r, step)
        if rank == 1 and step == 2:
            grad = r.model.transformer.h[0].mlp.c_fc.weight.grad
            local = grad.to_local() if hasattr(grad, "to_local") else grad
            local.view(-1)[0] = math.nan
        return loss

    real, train.forward_backward = train.forward_backward, forward_backward


@pytest.mark.parametrize("parallel, hook", [
    ("ddp", nan_in_a_gradient), ("fsdp", nan_in_the_loss),
    *(pytest.param(*pair, marks=pytest.mark.slow) for pair in (
        ("ddp", nan_in_the_activations), ("ddp", nan_in_the_loss), ("fsdp", nan_in_the_activations),
        ("fsdp", nan_in_a_gradient)))])
def test_all_ranks_stop_before_the_step_if_one_has_a_nan(dataset, tmp_path, parallel, hook):
    out = tmp_path / "out"
    argv = arguments(dataset, out, **FIELDS | dict(parallel=parallel, save_interval=1))
    statuses, output = run_ranks(2, argv, tmp_path / "log", hook)
    assert statuses == [1, 1], output
    errors = [line for line in output.splitlines() if line.startswith("error")]
    assert len(errors) == 2  # rank 1 waits before it prints; torchrun would end it in that wait
    assert errors[0] == errors[1]
    what = "gradient norm is not finite" if hook is nan_in_a_gradient else "loss is nan"
    assert errors[0].startswith(f"error: step 2: the {what}; stopped before the step")
    state = files.load(out / "state.pt")
    assert state["iter_num"] == 2
    assert all(t.isfinite().all() for t in state["model"].values())


# -----------------------------------------------------------------------------
# a process that is gone or does not answer

@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_killed_rank_ends_the_other_and_the_run_can_be_resumed(dataset, tmp_path, rank):
    out, whole = tmp_path / "out", tmp_path / "whole"
    fields = FIELDS | dict(max_iters=12, save_interval=2, eval_interval=6)
    statuses, output = run_ranks(2, arguments(dataset, whole, **fields), tmp_path / "log")
    assert statuses == [0, 0], output
    argv = arguments(dataset, out, **fields, auto_resume=True)
    job = Job(2, argv, tmp_path / "log")
    when_step(out, 4, job)
    job.kill(rank)
    statuses = job.wait(60)
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] == 1, job.output()
    output = job.output(1 - rank)
    assert f"error: process {1 - rank} of 2: another process is gone or did not answer" in output
    assert "--auto_resume=True" in output and "Traceback" not in output
    statuses, output = run_ranks(2, argv, tmp_path / "log")
    assert statuses == [0, 0], output
    assert ("without a message" in output) == (rank == 0)  # only rank 0 records how a run ends
    assert_same_state(out, whole)
    assert losses(out) == losses(whole)


def test_a_rank_that_hangs_ends_the_other_after_the_timeout(dataset, tmp_path):
    """A process stopped by SIGSTOP is like a machine without network: its connections stay open."""
    out = tmp_path / "out"
    job = Job(2, arguments(dataset, out, **FIELDS, max_iters=10**6, eval_interval=10**6,
                           timeout=3), tmp_path / "log")
    when_step(out, 2, job)
    os.kill(job.ranks[1].pid, signal.SIGSTOP)
    try:
        job.ranks[0].join(60)  # gloo's default timeout is 30 minutes
        assert job.ranks[0].exitcode == 1, job.output()
    finally:
        job.kill(1)
        job.wait()
    output = job.output(0)
    assert "error: process 0 of 2: another process is gone or did not answer in time" in output
    assert "Traceback" not in output
    assert resume.read_run_file(out)["status"] == "failed"


def test_a_process_that_never_starts_ends_the_other_after_the_timeout(dataset, tmp_path):
    """Only one of two processes starts."""
    job = Job(2, arguments(dataset, tmp_path / "out", **FIELDS, timeout=4), tmp_path / "log",
              absent_second)
    statuses = job.wait(60)
    assert statuses[0] == 1, job.output()
    assert "error: process 0 of 2: another process is gone or did not answer" in job.output(0)


def absent_second(rank):
    if rank == 1:
        sys.exit(0)


# -----------------------------------------------------------------------------
# torchrun restarts the processes

def torchrun(argv, log, *options, size=2):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={size}", *options, str(ROOT / "train.py"), *argv]
    return subprocess.Popen(command, cwd=ROOT, stdout=open(log, "w"), stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks_of(launcher):
    """The processes that torchrun started, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if int((folder / "stat").read_text().rpartition(")")[2].split()[1]) == launcher.pid:
                env = dict(part.partition("=")[::2] for part in
                           (folder / "environ").read_text().split("\0"))
                found[int(env["RANK"])] = int(folder.name)
        except (OSError, KeyError):
            continue
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("parallel, size, atol", [("ddp", 2, 0.0), ("fsdp", 2, 0.0),
                                                  ("ddp", 4, 1e-6)])
def test_torchrun_restarts_and_resumes(dataset, tmp_path, parallel, size, atol):
    """Ranks are killed in turn, three times; the weights equal those of an undisturbed run."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    fields = FIELDS | dict(max_iters=40, lr_decay_iters=40, save_interval=5, eval_interval=20,
                           gradient_accumulation_steps=4, parallel=parallel)
    statuses, output = run_ranks(size, arguments(dataset, whole, **fields), tmp_path / "log")
    assert statuses == [0] * size, output
    launcher = torchrun(arguments(dataset, out, **fields, auto_resume=True),
                        tmp_path / "torchrun.log", "--max-restarts=3", size=size)
    try:
        for kill, step in enumerate((7, 18, 31)):
            while launcher.poll() is None and resume.reached_step(out) <= step:
                time.sleep(0.01)
            assert launcher.poll() is None, (tmp_path / "torchrun.log").read_text()
            os.kill(ranks_of(launcher)[kill % size], signal.SIGKILL)
            time.sleep(1)  # metrics.jsonl is cut back to the state's step when the run resumes
        assert launcher.wait(300) == 0, (tmp_path / "torchrun.log").read_text()
    finally:
        launcher.kill()
    output = (tmp_path / "torchrun.log").read_text()
    assert output.count("resuming at step") == 3
    assert_same_state(out, whole, atol)
    assert [entry["iter"] for entry in map(json.loads, (out / "metrics.jsonl").open())
            if "iter" in entry] == list(range(40))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sigterm_to_torchrun_saves_and_the_run_can_be_resumed(dataset, tmp_path):
    """Slurm sends SIGTERM before the time limit. The same command resumes the run."""
    out = tmp_path / "out"
    fields = FIELDS | dict(max_iters=10**6, eval_interval=10**6, parallel="fsdp", auto_resume=True)
    launcher = torchrun(arguments(dataset, out, **fields), tmp_path / "torchrun.log")
    try:
        while launcher.poll() is None and resume.reached_step(out) <= 3:
            time.sleep(0.01)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(120) != 0
    finally:
        launcher.kill()
    output = (tmp_path / "torchrun.log").read_text()
    assert "stopped by a signal after step" in output, output
    state = files.load(out / "state.pt")
    assert state["iter_num"] > 3
    statuses, output = run_ranks(2, arguments(dataset, out, **fields | dict(
        max_iters=state["iter_num"] + 1)), tmp_path / "log")
    assert statuses == [0, 0] and f"resuming at step {state['iter_num']}" in output
