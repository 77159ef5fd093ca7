"""The campaign of `make chaos`, a short one."""
import random

import attacks
import chaos
import pytest
from tiny import write_dataset


@pytest.mark.parametrize("parallel, kills", [
    ("ddp", 4), pytest.param("fsdp", 10, marks=pytest.mark.slow)])
def test_kills_change_nothing(tmp_path, parallel, kills):
    dataset = write_dataset(tmp_path / "words")
    count, equal = chaos.campaign(parallel, kills, tmp_path, dataset, random.Random(1))
    assert equal and count["kills"] == kills and count["resumes"] > 0


def test_altered_checkpoints_are_refused_or_fall_back(tmp_path):
    dataset = write_dataset(tmp_path / "words")
    count = chaos.alterations(25, tmp_path, dataset, random.Random(1))
    assert count["refused"] and count["fell back"]
    assert count["refused"] + count["fell back"] + count["harmless"] == 25, count


def test_two_writers_tear_no_state(tmp_path):
    count = attacks.two_writers(20, tmp_path, write_dataset(tmp_path / "words"))
    assert not chaos.failures(count) and count["looks"] >= 20, count


def test_ctrl_c_under_a_pipe_loses_no_step(tmp_path):
    count = attacks.pipes(2, tmp_path, write_dataset(tmp_path / "words"), chaos.same,
                          random.Random(1))
    assert count == {"stops under a broken pipe": 2, "bitwise the undisturbed run": 1}


@pytest.mark.slow
def test_ranks_end_with_their_torchrun(tmp_path):
    count = attacks.orphans(1, tmp_path, write_dataset(tmp_path / "words"), chaos.same)
    assert count == {"orphaned jobs that ended": 1, "bitwise the undisturbed run": 1}


def test_random_fields_end_in_a_line_or_in_output(tmp_path):
    count = attacks.fuzz(10, tmp_path, write_dataset(tmp_path / "words"), random.Random(3))
    assert not chaos.failures(count) and sum(count.values()) == 10, count
