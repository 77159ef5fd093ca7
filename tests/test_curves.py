"""loss.png: its scale, and the step that it marks."""
import pytest

from nanotune.training import curves


def evaluations(*losses):
    return [{"step": 10 * i, "train_loss": loss - 0.01, "val_loss": loss}
            for i, loss in enumerate(losses)]


def test_a_high_first_loss_does_not_flatten_the_curve():
    low, high = curves.limits(evaluations(10.9, 0.50, 0.81))
    assert 0.4 < low < 0.49 and 0.81 < high < 0.9


@pytest.mark.parametrize("losses", [(5.75, 5.3, 4.6, 4.2, 4.0), (5.75, 4.0), (3.9, 3.0, 2.6)])
def test_the_loss_of_step_0_is_shown_unless_it_flattens_the_rest(losses):
    """To compare a finetuned model with the pretrained one."""
    assert curves.limits(evaluations(*losses))[1] > losses[0]
    later = losses[1:]
    assert len(later) == 1 or curves.limits(evaluations(20.0, *later))[1] < 6


def test_the_best_loss_is_shown_even_if_it_is_the_first():
    low, _ = curves.limits(evaluations(3.0, 3.4, 3.5, 3.6))
    assert low < 2.99


@pytest.mark.parametrize("losses", [(3.0,), (3.0, 3.0), (2.0, 1.0, 0.5, 0.9), (5.0,) * 9])
def test_all_later_losses_are_shown(losses):
    found = curves.limits(evaluations(*losses))
    if len(losses) == 1:
        assert found is None  # matplotlib chooses
    else:
        assert found[0] < min(losses[1:]) - 0.01 and found[1] > max(losses[len(losses) // 4:][1:])


def test_the_best_step_is_marked(tmp_path):
    entries = [*evaluations(3.0, 1.0, 2.0), {"iter": 0, "loss": 3.0}]
    assert curves.best_of(entries)["step"] == 10 and curves.best_of([]) is None
    for name, runs in (("one.png", entries), ("none.png", [])):
        curves.draw(runs, tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    curves.draw_runs({"a": entries, "b": [], "c": evaluations(1.0)}, tmp_path / "runs.png")
    assert (tmp_path / "runs.png").read_bytes().startswith(b"\x89PNG")
