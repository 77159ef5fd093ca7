"""The campaign of `make chaos`, a short one."""
import random

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
