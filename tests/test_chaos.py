"""A short version of `make chaos`: see chaos.py."""
import random

import attacks
import chaos
import pytest
from tiny import write_dataset


@pytest.mark.parametrize("parallel, kills", [
    ("ddp", 4), pytest.param("fsdp", 10, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_often_is_bitwise_equal_to_one_that_is_not(tmp_path, parallel, kills):
    dataset = write_dataset(tmp_path / "words")
    count, equal = chaos.kill_repeatedly(parallel, kills, tmp_path, dataset, random.Random(1))
    assert equal and count["kills"] == kills and count["resumes"] > 0


def test_altered_checkpoints_are_refused_or_fall_back(tmp_path):
    dataset = write_dataset(tmp_path / "words")
    count = chaos.alterations(25, tmp_path, dataset, random.Random(1))
    assert count["refused"] and count["fell back"]
    assert count["refused"] + count["fell back"] + count["harmless"] == 25, count


def test_a_second_writer_is_refused_and_damages_no_state(tmp_path):
    count = attacks.two_writers(20, tmp_path, write_dataset(tmp_path / "words"))
    assert not chaos.has_failure(count) and count["looks"] >= 20, count


def test_ctrl_c_with_a_broken_pipe_loses_no_step(tmp_path):
    count = attacks.pipes(2, tmp_path, write_dataset(tmp_path / "words"), chaos.same,
                          random.Random(1))
    assert count == {"stops with a broken pipe": 2, "bitwise equal to the undisturbed run": 1}


@pytest.mark.slow
def test_ranks_end_when_their_torchrun_is_killed(tmp_path):
    count = attacks.orphans(1, tmp_path, write_dataset(tmp_path / "words"), chaos.same)
    assert count == {"orphaned jobs that ended": 1, "bitwise equal to the undisturbed run": 1}


def test_random_fields_give_a_one_line_error_or_valid_output(tmp_path):
    count = attacks.fuzz(10, tmp_path, write_dataset(tmp_path / "words"), random.Random(3))
    assert not chaos.has_failure(count) and sum(count.values()) == 10, count
