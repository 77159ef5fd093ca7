"""The states of a run on disk: which one is resumed, when they are written, errors of the disk."""
import errno
import json
import math
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from ranks import Job, run_ranks
from test_logbook import DAMAGED
from tiny import arguments, read_metrics, run_script, run_train

import export
import train
from nanotune import files
from nanotune.training import logbook, resume


@pytest.fixture(scope="module")
def whole(dataset, tmp_path_factory):
    """A run of six steps with states of steps 3 and 6; tests must not change it."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run_train(dataset, out) == 0
    return out


@pytest.fixture
def out(whole, tmp_path):
    """A copy of `whole` that a test may damage."""
    return Path(shutil.copytree(whole, tmp_path / "out"))


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Do not draw loss.png, which takes half a second and is tested elsewhere."""
    monkeypatch.setattr(logbook, "draw", lambda *args: None)


def resume_run(monkeypatch, capsys, dataset, out, **fields):
    """(exit status, stdout and stderr) of train.py with --init_from=resume."""
    argv = arguments(dataset, out, **{"init_from": "resume"} | fields)
    status, output, err = run_script(monkeypatch, capsys, train.main, argv)
    assert err.count("\n") == (status == 1), err
    return status, output + err


def step_of(path):
    return files.load(path)["iter_num"]


def assert_same_weights(a, b):
    a, b = (files.load(folder / "state.pt") for folder in (a, b))
    assert all(torch.equal(a["model"][name], b["model"][name]) for name in a["model"])
    assert all(torch.equal(a["optimizer"][name][key], b["optimizer"][name][key])
               for name in a["optimizer"] for key in ("exp_avg", "exp_avg_sq"))


def flip(path):
    """Flip a bit of a weight in a checkpoint, which torch.load alone would not notice."""
    data = bytearray(path.read_bytes())
    weight = files.load(path)["model"]["transformer.wpe.weight"]
    at = data.index(weight.numpy().tobytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1000])


# -----------------------------------------------------------------------------
# the choice of the state

def test_the_last_two_states_are_kept(whole):
    assert (step_of(whole / "state.pt"), step_of(whole / "state.1.pt")) == (6, 3)
    assert not (whole / "state.2.pt").exists()


@pytest.mark.parametrize("keep, steps", [(1, [6]), (4, [6, 3, 0])])
def test_keep_states_is_the_number_of_states_kept(dataset, tmp_path, keep, steps):
    run_train(dataset, tmp_path / "out", keep_states=keep)
    assert [step_of(path) for path in resume.state_files(tmp_path / "out")] == steps


def test_a_complete_state_exists_while_the_next_is_written(tmp_path, monkeypatch):
    """At each rename, state.pt exists and is complete."""
    path = tmp_path / "state.pt"
    data = {"model": {}, "model_args": {}, "iter_num": 0}
    files.save(path, data, keep=3)
    real, seen = os.replace, []
    monkeypatch.setattr(os, "replace", lambda *args: (
        seen.append(files.load(path)["iter_num"]), real(*args)))
    for step in (1, 2, 3):
        files.save(path, data | {"iter_num": step}, keep=3)
    assert seen == [0, 1, 1, 2, 2]
    assert [step_of(p) for p in resume.state_files(tmp_path)] == [3, 2, 1]


def test_states_are_kept_on_a_disk_without_hard_links(tmp_path, monkeypatch):
    def link(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    for step in range(3):
        files.save(tmp_path / "state.pt", {"model": {}, "model_args": {}, "iter_num": step}, 2)
    assert [step_of(p) for p in resume.state_files(tmp_path)] == [2, 1]


@pytest.mark.parametrize("spoil", [flip, cut, Path.unlink], ids=["flip", "cut", "unlink"])
def test_a_run_with_a_damaged_state_resumes_from_the_one_before(whole, dataset, out, monkeypatch,
                                                                capsys, spoil):
    spoil(out / "state.pt")
    status, output = resume_run(monkeypatch, capsys, dataset, out)
    assert status == 0
    if spoil is not Path.unlink:
        warnings = [line for line in output.splitlines() if line.startswith("warning")]
        assert len(warnings) == 1
        assert "the newest state (of step 6) cannot be used" in warnings[0]
        assert f"resuming from {out / 'state.1.pt'}, of step 3" in warnings[0]
        assert (out / "state.refused").exists()
    assert "resuming at step 3 of 6" in output
    assert_same_weights(out, whole)
    # the damaged state did not replace the good one
    assert [step_of(path) for path in resume.state_files(out)] == [6, 3]


def test_evaluating_a_damaged_run_renames_nothing(dataset, out, monkeypatch, capsys):
    flip(out / "state.pt")
    before = sorted(os.listdir(out))
    assert resume_run(monkeypatch, capsys, dataset, out, eval_only=True)[0] == 0
    assert sorted(os.listdir(out)) == before


def test_with_no_good_state_the_error_says_what_can_be_used(dataset, out, monkeypatch, capsys):
    flip(out / "state.pt")
    cut(out / "state.1.pt")
    for fields in ({}, {"init_from": "scratch", "auto_resume": True}):
        status, output = resume_run(monkeypatch, capsys, dataset, out, **fields)
        assert status == 1
        assert "state.pt is damaged" in output and "state.1.pt is truncated" in output
        assert f"ckpt.pt is intact, with the weights of step 6: begin a new run from them with " \
               f"--init_from={out} --out_dir=ANOTHER" in output
    cut(out / "ckpt.pt")
    status, output = resume_run(monkeypatch, capsys, dataset, out)
    assert status == 1 and "start again with --overwrite=True" in output


def test_a_state_that_does_not_fit_in_memory_is_not_treated_as_damaged(dataset, out, monkeypatch,
                                                                       capsys):
    """The run ends with an error; no other state is used, and none is renamed."""
    def load(*args, **options):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9")

    before = sorted(os.listdir(out))
    monkeypatch.setattr(torch, "load", load)
    status, output = resume_run(monkeypatch, capsys, dataset, out)
    assert status == 1 and "out of memory on this machine" in output
    assert sorted(os.listdir(out)) == before


def make_infinite(path):
    state = torch.load(path)
    state["model"]["transformer.wpe.weight"][0, 0] = math.inf
    torch.save(state, path)


def test_weights_that_are_not_finite_replace_no_good_state(dataset, out, monkeypatch, capsys):
    """The update overflows, although the loss and the gradient are finite."""
    status, output = resume_run(monkeypatch, capsys, dataset, out, max_iters=9, save_interval=1,
                                learning_rate=1e38, decay_lr=False)
    assert status == 1
    assert "error: step 7: the weights are not finite; stopped without saving" in output
    assert [step_of(path) for path in resume.state_files(out)] == [6, 3]
    assert step_of(out / "ckpt.pt") == 6
    assert resume_run(monkeypatch, capsys, dataset, out, max_iters=7)[0] == 0


def test_a_state_that_is_not_finite_is_not_used(whole, dataset, out, monkeypatch, capsys):
    make_infinite(out / "state.pt")
    status, output = resume_run(monkeypatch, capsys, dataset, out)
    assert status == 0 and "state.pt: transformer.wpe.weight has values that are NaN" in output
    assert_same_weights(out, whole)


def test_overwrite_keeps_the_old_run_until_the_new_one_works(dataset, out, tmp_path, monkeypatch,
                                                             capsys):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate_splits", lambda r: [math.nan, math.nan])
        status, output = resume_run(monkeypatch, capsys, dataset, out, overwrite=True,
                                    init_from="scratch")
    assert status == 1 and "the validation loss is nan; stopped without saving" in output
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert resume_run(monkeypatch, capsys, dataset, out, max_iters=8)[0] == 0


# -----------------------------------------------------------------------------
# states of another run

def test_a_state_of_another_run_is_not_used(whole, dataset, out, tmp_path, monkeypatch, capsys):
    run_train(dataset, tmp_path / "other")
    shutil.copy(tmp_path / "other/state.pt", out / "state.pt")
    status, output = resume_run(monkeypatch, capsys, dataset, out)
    assert status == 0
    assert "state.pt is of run " in output and "state.1.pt, of step 3" in output
    assert_same_weights(out, whole)


def test_a_state_of_another_run_can_be_resumed_by_force(dataset, out, tmp_path, monkeypatch,
                                                        capsys):
    run_train(dataset, tmp_path / "other", seed=7)
    other = resume.read_run_file(tmp_path / "other")["run_id"]
    shutil.copy(tmp_path / "other/state.pt", out / "state.pt")
    (out / "state.1.pt").unlink()
    status, output = resume_run(monkeypatch, capsys, dataset, out)
    assert status == 1 and "--force_resume=True" in output
    assert resume_run(monkeypatch, capsys, dataset, out, force_resume=True, max_iters=8)[0] == 0
    assert resume.read_run_file(out)["run_id"] == other


def test_a_state_alone_can_be_moved_and_resumed(whole, dataset, tmp_path, monkeypatch, capsys):
    moved = tmp_path / "moved"
    moved.mkdir()
    shutil.copy(whole / "state.1.pt", moved / "state.pt")
    status, output = resume_run(monkeypatch, capsys, dataset, moved)
    assert status == 0 and "best.pt is missing: the next evaluation writes it" in output
    assert_same_weights(moved, whole)


@pytest.mark.parametrize("spoil", ["missing", "of run", "damaged"])
def test_a_best_model_that_is_missing_foreign_or_damaged_is_replaced(dataset, out, tmp_path,
                                                                     monkeypatch, capsys, spoil):
    """The next evaluation writes best.pt, even if its loss is not the lowest so far."""
    if spoil == "of run":
        run_train(dataset, tmp_path / "other", max_iters=0)
        shutil.copy(tmp_path / "other/best.pt", out / "best.pt")
    elif spoil == "damaged":
        cut(out / "best.pt")
    else:
        (out / "best.pt").unlink()
    worse = iter([(9.0, 9.0)])
    monkeypatch.setattr(train, "evaluate_splits", lambda r: list(next(worse)))
    status, output = resume_run(monkeypatch, capsys, dataset, out, max_iters=8)
    assert status == 0 and f"best.pt {'is ' * (spoil != 'of run')}{spoil}" in output.replace(
        "is of run", "of run")
    assert step_of(out / "best.pt") == 8


# -----------------------------------------------------------------------------
# --auto_resume

def test_auto_resume_starts_a_run_and_resumes_it(whole, dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    for max_iters, message in ((2, None), (4, "resuming at step 2"), (6, "resuming at step 4")):
        status, output = resume_run(monkeypatch, capsys, dataset, out, init_from="scratch",
                                    auto_resume=True, max_iters=max_iters, lr_decay_iters=6)
        assert status == 0
        assert ("resuming" not in output) if message is None else (message in output)
    assert_same_weights(out, whole)
    before = (out / "state.pt").read_bytes()
    status, output = resume_run(monkeypatch, capsys, dataset, out, init_from="scratch",
                                auto_resume=True)
    assert status == 0 and (out / "state.pt").read_bytes() == before


def test_auto_resume_starts_again_if_killed_before_the_first_state(whole, dataset, out, monkeypatch,
                                                                   capsys):
    """A ckpt.pt of step 0 may be overwritten; one of a later step, without a state, may not."""
    run_train(dataset, out, max_iters=0, overwrite=True)
    (out / "state.pt").unlink()
    assert resume_run(monkeypatch, capsys, dataset, out, init_from="scratch",
                      auto_resume=True)[0] == 0
    assert_same_weights(out, whole)
    for path in resume.state_files(out):
        path.unlink()
    status, output = resume_run(monkeypatch, capsys, dataset, out, init_from="scratch",
                                auto_resume=True)
    assert status == 1 and "already holds a run (ckpt.pt, best.pt)" in output


def test_auto_resume_does_not_train_past_an_early_stop(dataset, tmp_path, monkeypatch, capsys):
    pairs = iter([(3.0, 3.0), (3.0, 3.1), (3.0, 3.2)])
    monkeypatch.setattr(train, "evaluate_splits", lambda r: list(next(pairs)))
    fields = dict(init_from="scratch", auto_resume=True, patience=2, max_iters=60)
    for _ in range(2):
        status, output = resume_run(monkeypatch, capsys, dataset, tmp_path / "out", **fields)
        assert status == 0 and "stopped early" in output
    assert step_of(tmp_path / "out/state.pt") == 6


def test_auto_resume_with_overwrite_is_refused(dataset, out, monkeypatch, capsys):
    status, output = resume_run(monkeypatch, capsys, dataset, out, auto_resume=True, overwrite=True)
    assert status == 1
    assert "--auto_resume=True resumes the run that --overwrite=True would" in output


# -----------------------------------------------------------------------------
# writing states

def test_states_are_saved_every_save_interval_steps(whole, dataset, tmp_path, monkeypatch):
    saved, real = [], files.save
    monkeypatch.setattr(files, "save", lambda path, data, keep: (
        saved.append((path.stem, data["iter_num"])), real(path, data, keep)))
    assert run_train(dataset, tmp_path / "out", save_interval=4) == 0
    assert saved == [("ckpt", 0), ("state", 0), ("ckpt", 3), ("state", 4), ("ckpt", 6),
                     ("state", 6)]
    assert_same_weights(tmp_path / "out", whole)


def fail_writes(monkeypatch, name, steps, error):
    """Make writes of the file `name` fail with `error`. `steps` has their numbers, from 0."""
    count, real = [-1], files.write_atomic

    def write_atomic(path, write, keep=1):
        def fail(f):
            write(f)
            raise error
        count[0] += Path(path).name == name
        return real(path, fail if Path(path).name == name and count[0] in steps else write, keep)

    monkeypatch.setattr(files, "write_atomic", write_atomic)


@pytest.mark.parametrize("name", ["state.pt", "ckpt.pt"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"),
                                   OSError(errno.EROFS, "Read-only file system"),
                                   OSError(errno.EIO, "Input/output error")],
                         ids=["full", "read-only", "io"])
def test_a_disk_that_fails_once_does_not_end_the_run(whole, dataset, tmp_path, monkeypatch, capsys,
                                                     name, error):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        fail_writes(patch, name, [1], error)
        status, output = resume_run(patch, capsys, dataset, out, init_from="scratch")
    assert status == 0
    assert output.count(f"warning: step 3: cannot write {out / name} ({error.strerror})") == 1
    assert not list(out.glob("*.tmp"))
    assert_same_weights(out, whole)
    assert step_of(out / "state.1.pt") == (0 if name == "state.pt" else 3)


@pytest.mark.parametrize("name", ["state.pt", "ckpt.pt"])
def test_a_disk_that_fails_until_the_end_is_an_error(dataset, tmp_path, monkeypatch, capsys, name):
    out = tmp_path / "out"
    fail_writes(monkeypatch, name, [1, 2, 3], OSError(errno.ENOSPC, "No space left on device"))
    status, output = resume_run(monkeypatch, capsys, dataset, out, init_from="scratch")
    assert status == 1
    assert output.splitlines()[-1].startswith(f"error: cannot write {out / name} (No space left")
    assert step_of(out / name) == 0


def test_the_status_of_a_run_is_saved_even_on_a_full_disk(dataset, tmp_path, monkeypatch, capsys):
    """run.json is overwritten in place if the disk has no space for a new file."""
    out, full = tmp_path / "out", OSError(errno.ENOSPC, "No space left on device")
    with monkeypatch.context() as patch:
        fail_writes(patch, "run.json", range(1, 99), full)
        assert resume_run(patch, capsys, dataset, out, init_from="scratch")[0] == 0
    last = resume.read_run_file(out)
    assert (last["status"], last["saved_step"]) == ("done", 6)
    with monkeypatch.context() as patch:
        for name in ("run.json", "state.pt"):
            fail_writes(patch, name, range(1 if name == "run.json" else 0, 99), full)
        assert resume_run(patch, capsys, dataset, out, max_iters=9)[0] == 1
    last = resume.read_run_file(out)
    assert (last["status"], last["saved_step"]) == ("failed", None)
    assert "without a message" not in resume_run(monkeypatch, capsys, dataset, out, max_iters=9)[1]


def test_the_error_of_a_full_disk_is_that_of_the_system(tmp_path):
    """torch's zip writer replaces the error of the file with a RuntimeError."""
    class Full:
        def __init__(self, f):
            self.f = f

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(files.WriteError, match=r"state\.pt \(No space left on device\)"):
        files.write_atomic(tmp_path / "state.pt", lambda f: torch.save(
            {"a": torch.ones(9)}, Full(f)))


def test_a_best_model_that_was_not_written_is_not_the_best(dataset, tmp_path, monkeypatch):
    """The losses are 3.0, 2.0 (not written) and 2.5: the last is the best on disk."""
    pairs = iter([(3.0, 3.0), (2.0, 2.0), (2.5, 2.5)])
    monkeypatch.setattr(train, "evaluate_splits", lambda r: list(next(pairs)))
    fail_writes(monkeypatch, "ckpt.pt", [1], OSError(errno.ENOSPC, "No space left on device"))
    assert run_train(dataset, tmp_path, always_save_checkpoint=False) == 0
    assert files.load(tmp_path / "ckpt.pt")["best_val_loss"] == 2.5


def no_file_above_60_kb(rank):
    """Limit files to 60 kB: state.pt has 100 kB, ckpt.pt 40 kB."""
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


def test_a_run_continues_if_the_system_limits_the_size_of_files(whole, dataset, out, tmp_path):
    """It continues to the last step, and its earlier states can be resumed."""
    argv = arguments(dataset, out, init_from="resume", max_iters=9)
    (status,), output = run_ranks(1, argv, tmp_path / "log", no_file_above_60_kb)
    assert status == 1
    assert "error: cannot write" in output and "File too large" in output
    assert [step_of(path) for path in resume.state_files(out)] == [6, 3]
    assert not list(out.glob("*.tmp"))
    assert step_of(out / "ckpt.pt") == 9
    assert run_train(dataset, out, init_from="resume", max_iters=9) == 0
    assert step_of(out / "state.pt") == 9


def test_a_folder_deleted_during_a_run_is_a_one_line_error(dataset, tmp_path, monkeypatch, capsys):
    out, real = tmp_path / "out", train.update
    monkeypatch.setattr(train, "update", lambda r, *args: (
        shutil.rmtree(out, ignore_errors=True), real(r, *args))[1])
    status, output = resume_run(monkeypatch, capsys, dataset, out, init_from="scratch")
    assert status == 1 and f"error: cannot write {out}" in output
    assert f"warning: cannot write to {out}" in output  # for metrics.jsonl, printed once


def test_a_save_makes_no_copy_of_the_tensors(tmp_path):
    """Saving 256 MB of tensors raises the peak of memory by less than 64 MB."""
    def peak():
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) // 1000

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("no /proc to measure memory with")
    data = {"model": {str(i): torch.ones(2**23) for i in range(8)}, "model_args": {}}
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = peak()
    files.save(tmp_path / "state.pt", data, keep=2)
    assert peak() - before < 64


# -----------------------------------------------------------------------------
# the end of the last process

def wait_for(job, out, step):
    """Wait until metrics.jsonl has that step."""
    while job.alive() and resume.reached_step(out) <= step:
        pass
    assert job.alive(), job.output()


def test_a_resume_says_that_the_last_run_was_killed(dataset, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    job = Job(1, arguments(dataset, out, max_iters=10**6, eval_interval=10**6), tmp_path / "log")
    wait_for(job, out, 3)
    job.kill()
    assert job.wait() == [-signal.SIGKILL]
    reached = resume.reached_step(out)
    status, output = resume_run(monkeypatch, capsys, dataset, out, max_iters=4, eval_interval=4)
    assert status == 0
    assert "ended without a message: it was killed" in output
    assert f"resuming from step 0: steps 0 to {reached} are done again" in output
    assert "without a message" not in resume_run(monkeypatch, capsys, dataset, out, max_iters=4)[1]


def test_a_run_that_failed_or_was_stopped_says_so_in_run_json(dataset, out, monkeypatch, capsys):
    """Status: done, failed or stopped. The next resume prints no warning."""
    assert resume.read_run_file(out)["status"] == "done"
    with monkeypatch.context() as patch:
        patch.setattr(train, "forward_backward", lambda r, step: float("nan"))
        patch.setattr(train, "gradient_norm", lambda r: (torch.tensor(1.0), 1.0))
        assert resume_run(patch, capsys, dataset, out, max_iters=9)[0] == 1
    assert resume.read_run_file(out)["status"] == "failed"
    with monkeypatch.context() as patch:
        real = train.update
        patch.setattr(train, "update", lambda *args: (  # sent twice, as some schedulers do
            signal.raise_signal(signal.SIGTERM), real(*args))[1])
        status, output = resume_run(patch, capsys, dataset, out, max_iters=9)
    assert status == 143 and "without a message" not in output
    assert resume.read_run_file(out) | {"pid": 0, "host": ""} == {
        "run_id": resume.read_run_file(out)["run_id"], "status": "stopped", "pid": 0, "host": "",
        "saved_step": 8}
    assert "without a message" not in resume_run(monkeypatch, capsys, dataset, out, max_iters=9)[1]


@pytest.mark.parametrize("content", [
    "", "{", "[1]", "7", pytest.param("[" * 10**5, id="nested"), "\xff",
    json.dumps({"status": "odd"}),
    json.dumps({"run_id": ["x"], "status": "running", "saved_step": "9", "host": {}})])
def test_a_damaged_run_json_does_not_prevent_a_resume(dataset, out, monkeypatch, capsys, content):
    (out / "run.json").write_bytes(content.encode("latin-1"))
    assert resume_run(monkeypatch, capsys, dataset, out)[0] == 0


def test_damaged_metrics_do_not_stop_a_run_or_an_export(whole, dataset, out, monkeypatch, capsys):
    """An export reads them for its model card. The damaged lines are those of test_logbook.py."""
    with open(out / "metrics.jsonl", "ab") as f:
        f.write(b"\n".join(DAMAGED) + b'{"iter": 7')
    assert resume.reached_step(out) == resume.reached_step(whole) == 6
    export.main([f"--out_dir={out}", f"--export_dir={out / 'hf'}"])
    assert resume_run(monkeypatch, capsys, dataset, out, max_iters=7)[0] == 0
    assert [entry.get("iter") for entry in read_metrics(out)[-2:]] == [6, None]
    (out / "metrics.jsonl").unlink()
    (out / "metrics.jsonl").mkdir()
    status, output = resume_run(monkeypatch, capsys, dataset, out, max_iters=8)
    assert status == 0 and output.count("warning: cannot write to") == 1


# -----------------------------------------------------------------------------
# memory

def little_memory(rank):
    """Limit the address space to 300 MB more than is mapped now."""
    import resource
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 300_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def test_a_machine_without_memory_is_a_one_line_error(dataset, tmp_path):
    argv = arguments(dataset, tmp_path / "out", batch_size=4096, n_embd=64, n_layer=4)
    (status,), output = run_ranks(1, argv, tmp_path / "log", little_memory)
    assert status == 1
    error = output[output.index("error: "):]
    assert error.startswith("error: out of memory on this machine (")
    assert "lower --batch_size, and raise --gradient_accumulation_steps" in error
    assert error.count("\n") == 1
    assert resume.read_run_file(tmp_path / "out")["status"] == "failed"


@pytest.mark.parametrize("error, where", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "the device"),
    (MemoryError(), "this machine"), (RuntimeError("std::bad_alloc"), "this machine"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "this machine")],
    ids=["CUDA", "MemoryError", "bad_alloc", "ENOMEM"])
def test_each_kind_of_memory_error_is_a_one_line_error(monkeypatch, capsys, error, where):
    def main(argv):
        raise error

    status, _, err = run_script(monkeypatch, capsys, main, [])
    assert status == 1 and err.count("\n") == 1
    assert err.startswith(f"error: out of memory on {where}") and "--batch_size" in err


def test_other_errors_keep_their_traceback(monkeypatch, capsys):
    def main(argv):
        raise RuntimeError("shapes do not match")

    with pytest.raises(RuntimeError, match="shapes"):
        run_script(monkeypatch, capsys, main, [])
