"""One run on several processes: sums over ranks, and two processes compared with one."""
import json
import os
import subprocess
import sys

import pytest
import torch
from tiny import REPO, arguments, losses, read_metrics, run_script, run_train, write_dataset

import evaluate
import train
from nanotune import files
from nanotune.training import distributed
from nanotune.training.distributed import read_world, sum_over_ranks

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


def test_one_process_creates_no_process_group():
    world = read_world("cpu")
    assert (world.rank, world.size, world.is_main) == (0, 1, True)
    distributed.join(world)
    distributed.barrier()
    assert not torch.distributed.is_initialized()
    assert sum_over_ranks(1, torch.tensor(2.5), True, device="cpu") == [1.0, 2.5, 1.0]


@pytest.mark.parametrize("steps, size, use", [(3, 2, 2), (40, 3, 39), (1, 4, 4)])
def test_accumulation_steps_that_do_not_divide_among_processes_are_refused(
        tmp_path, monkeypatch, capsys, ranks, steps, size, use):
    ranks(0, size)
    status, _, err = run_script(monkeypatch, capsys, train.main, arguments(
        write_dataset(tmp_path / "chars"), tmp_path / "out", gradient_accumulation_steps=steps))
    assert status == 1 and err.count("\n") == 1
    assert (f"--gradient_accumulation_steps={steps} does not divide among {size} processes; "
            f"use a multiple, such as {use}\n") in err
    assert not (tmp_path / "out").exists()


# -----------------------------------------------------------------------------
# two processes

FIELDS = dict(gradient_accumulation_steps=4, lr_decay_iters=6, eval_iters=3, dropout=0.2)

DRIVER = '''
import json, os, signal, sys
import torch
import evaluate, train
from nanotune import cli
from nanotune.training import distributed, logbook

join = distributed.join

def join_once(*args):
    if not torch.distributed.is_initialized():
        join(*args)

logbook.draw = lambda *_: None
distributed.join = evaluate.join = join_once
forward_backward = train.forward_backward
for job in json.load(open(sys.argv[1])):
    def signalled(r, step):
        if [r.world.rank, step] == job.get("signal"):
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(r, step)

    train.forward_backward = signalled
    status = 0
    try:
        {"train": train.main, "evaluate": evaluate.main}[job["script"]](job["argv"])
    except SystemExit as end:
        status = end.code or 0
    with open(f"{job['note']}.{os.environ['RANK']}", "w") as f:
        f.write(str(status))
cli.end_now(0)  # as scripts do, because destructors of DDP may abort
'''


def torchrun(*command, timeout=120):
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         *map(str, command)],
        cwd=REPO, capture_output=True, text=True, timeout=timeout,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)})


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """(folder, stdout) of several runs on two processes, done once for all tests. "whole" has six
    steps; "parts" has three and resumes for three more; "stopped" is stopped at step 4 by a signal
    to rank 1 and is resumed; "masked" has uneven numbers of targets."""
    folder = tmp_path_factory.mktemp("two")
    dataset = write_dataset(folder / "chars")
    masked = write_dataset(folder / "masked")
    (masked / "train.mask.bin").write_bytes((b"\0" * 60 + b"\1" * 40) * 20)

    def job(name, out, data=dataset, signal=None, **fields):
        argv = arguments(data, folder / out, **FIELDS | fields)
        return {"script": "train", "argv": argv, "note": str(folder / name), "signal": signal}

    jobs = [job("whole", "whole"), job("part 1", "parts", max_iters=3),
            job("part 2", "parts", init_from="resume"), job("stopped", "stopped", signal=[1, 4]),
            job("resumed", "stopped", init_from="resume"),
            job("masked", "masked-out", masked, dropout=0.0),
            {"script": "evaluate", "note": str(folder / "evaluated"), "argv": [
                f"--out_dir={folder / 'whole'}", f"--dataset={dataset}", "--device=cpu",
                "--dtype=float32", "--eval_iters=7", "--batch_size=3"]}]
    (folder / "jobs.json").write_text(json.dumps(jobs))
    (folder / "driver.py").write_text(DRIVER)
    done = torchrun(folder / "driver.py", folder / "jobs.json")
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def statuses(folder, name):
    return [int((folder / f"{name}.{rank}").read_text()) for rank in (0, 1)]


def assert_same_state(a, b, atol=0.0):
    one, other = files.load(a / "state.pt"), files.load(b / "state.pt")
    assert one["iter_num"] == other["iter_num"]
    for name in one["model"]:
        torch.testing.assert_close(one["model"][name], other["model"][name], rtol=0, atol=atol,
                                   msg=name)
    for name, state in one["optimizer"].items():
        for key in state:
            torch.testing.assert_close(state[key], other["optimizer"][name][key], rtol=0,
                                       atol=atol, msg=f"{name} {key}")


def test_two_processes_compute_the_same_as_one(two, tmp_path):
    folder, _ = two
    assert statuses(folder, "whole") == [0, 0]
    run_train(folder / "chars", tmp_path / "one", **FIELDS)
    ours, theirs = losses(tmp_path / "one"), losses(folder / "whole")
    assert len(ours) == len(theirs) == 9
    for one, other in zip(ours, theirs):
        assert one == pytest.approx(other, abs=1e-4)
    assert_same_state(tmp_path / "one", folder / "whole", atol=1e-3)


def test_targets_that_are_uneven_among_ranks_have_equal_weights(two, tmp_path):
    folder, _ = two
    run_train(folder / "masked", tmp_path / "one", **FIELDS | {"dropout": 0.0})
    for one, other in zip(losses(tmp_path / "one"), losses(folder / "masked-out")):
        assert one == pytest.approx(other, abs=1e-4)


def test_two_processes_resume_exactly(two):
    folder, _ = two
    assert_same_state(folder / "parts", folder / "whole")
    assert losses(folder / "parts") == losses(folder / "whole")


def test_a_signal_to_one_stops_both_at_the_same_step(two):
    folder, printed = two
    assert statuses(folder, "stopped") == [143, 143]
    assert "stopped by a signal after step 4" in printed
    assert "torchrun --standalone --nproc_per_node=2 train.py" in printed
    assert statuses(folder, "resumed") == [0, 0]
    assert_same_state(folder / "stopped", folder / "whole")
    assert losses(folder / "stopped") == losses(folder / "whole")


def test_one_process_resumes_a_run_of_two(two, tmp_path):
    folder, _ = two
    (tmp_path / "state.pt").write_bytes((folder / "whole" / "state.pt").read_bytes())
    assert run_train(folder / "chars", tmp_path, init_from="resume", **FIELDS, max_iters=8) == 0
    assert [e["step"] for e in read_metrics(tmp_path) if "step" in e] == [8]


def test_two_processes_print_each_line_once(two):
    _, printed = two
    assert printed.count("step 0: train loss") == 4  # whole, part 1, stopped, masked
    assert printed.count("nats per token") == 1


def test_two_processes_evaluate_the_same_as_one(two, capsys):
    folder, printed = two
    evaluate.main([f"--out_dir={folder / 'whole'}", f"--dataset={folder / 'chars'}",
                   "--device=cpu", "--dtype=float32", "--eval_iters=7", "--batch_size=3"])
    assert capsys.readouterr().out.strip() in printed


def test_a_user_error_under_torchrun_is_one_line(tmp_path):
    done = torchrun("train.py", *arguments(write_dataset(tmp_path / "chars"), tmp_path / "out",
                                           gradient_accumulation_steps=3))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "does not divide among 2 processes" in errors[0]
    assert "Traceback" not in done.stderr.partition("error:")[0]


@pytest.mark.slow
def test_a_non_finite_loss_ends_both_processes(tmp_path):
    done = torchrun("train.py", *arguments(
        write_dataset(tmp_path / "chars"), tmp_path / "out", learning_rate=1e30, grad_clip=0.0))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and errors[0].startswith("error: step 1: the ")
    assert files.load(tmp_path / "out" / "state.pt")["iter_num"] == 0


@pytest.mark.slow
def test_a_failure_of_rank_0_ends_both_processes(tmp_path):
    """Only rank 0 writes. If its disk is full, rank 1 must not wait for it."""
    (tmp_path / "driver.py").write_text(
        "import os, train\n"
        "from nanotune import cli, files\n"
        "real, saved = os.replace, []\n"
        "def replace(source, target):\n"
        "    saved.extend([target] * str(target).endswith('.pt'))\n"
        "    if len(saved) > 2:  # both files of step 0\n"
        "        raise OSError(28, 'No space left on device')\n"
        "    real(source, target)\n"
        "files.os.replace = replace\n"
        "cli.run(train.main)\n")
    done = torchrun(tmp_path / "driver.py", *arguments(
        write_dataset(tmp_path / "chars"), tmp_path / "out"))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "ckpt.pt (No space left on device)" in errors[0]
    assert files.load(tmp_path / "out" / "state.pt")["iter_num"] == 0


@pytest.mark.slow
def test_sigterm_to_torchrun_saves_and_the_printed_command_resumes(tmp_path):
    dataset = write_dataset(tmp_path / "chars")
    fields = FIELDS | dict(max_iters=100_000, eval_interval=50_000)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc_per_node=2", "train.py", *arguments(dataset, tmp_path / "out", **fields)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True,
                          stderr=subprocess.DEVNULL,
                          env=os.environ | {"OMP_NUM_THREADS": "1"}) as process:
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if line.startswith("iter 3:"))
        process.terminate()
        printed = [*lines]
        assert process.wait(60) != 0
    step = files.load(tmp_path / "out" / "state.pt")["iter_num"]
    assert f"after step {step - 1}; resume with" in printed[-2]
    assert printed[-1].strip().startswith("torchrun --standalone --nproc_per_node=2 train.py")
    done = torchrun("train.py", *printed[-1].split()[4:], f"--max_iters={step + 2}")
    assert done.returncode == 0, done.stderr
    assert f"resuming at step {step} of {step + 2}" in done.stdout
