"""What a tracker gets: all that the disk has. Truth: the lines of log.jsonl, and a clock that the test sets."""

import math
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_train_consistency import log_of, script, small  # noqa: F401

from diffusers_ext.evaluation.measures import SIGMA_BINS
from diffusers_ext.training import TrainingArguments
from diffusers_ext.training import log as log_module
from diffusers_ext.training.log import RunLog


@pytest.fixture
def tracked(script, small, tmp_path):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--report_to", "tensorboard", "--logging_steps", 1, "--validation_steps", 2]
    options += ["--num_validation_images", 2, "--max_train_steps", 3]
    script.run(*small, *options, "--output_dir", tmp_path / "out")
    (events,) = (tmp_path / "out" / "logs" / "train_consistency").glob("events.*")
    return EventAccumulator(str(events)).Reload(), log_of(tmp_path / "out")


def values(found, name):
    return {event.step: event.value for event in found.Scalars(name)}


def test_losses_by_level_and_held_out_ones_reach_the_tracker(tracked):
    found, lines = tracked
    steps = {r["step"]: r for r in lines if "by_sigma" in r}
    assert values(found, "denoising") == pytest.approx({n: r["denoising"] for n, r in steps.items()}, rel=1e-6)
    by_level = [name for name in found.Tags()["scalars"] if name.startswith("denoising_by_sigma/")]
    for n, r in steps.items():
        seen = sorted(v for name in by_level for step, v in values(found, name).items() if step == n)
        assert seen == pytest.approx(sorted(v for v in r["by_sigma"]["denoising"] if v is not None), rel=1e-6)
    held_out = {r["step"]: r["validation"] for r in lines if "validation" in r}
    assert set(held_out) == {2, 3}
    for n, one in held_out.items():
        mean = sum(one["eps_mse"]) / len(one["eps_mse"])
        assert values(found, "held_out/eps_mse")[n] == pytest.approx(mean, rel=1e-6)
        for sigma, v in zip(one["sigmas"], one["eps_mse"], strict=True):
            assert values(found, f"held_out_by_sigma/{sigma:.3g}")[n] == pytest.approx(v, rel=1e-6)
    assert all(v > 0 for v in values(found, "grad_norm").values())
    assert sorted(values(found, "grad_norm")) == [1, 2, 3]


def test_a_loss_is_named_by_the_level_that_it_was_recorded_at(tmp_path):
    """The name is within half a bin of the level, on a logarithmic scale; the values are the levels themselves."""
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none")
    seen = []
    log = RunLog(args, Accelerator(), (0.02, 20.0), 8, 1)
    log.accelerator = SimpleNamespace(
        reduce=lambda x, how: x, log=lambda values, step: seen.append(values), is_main_process=False, device="cpu"
    )
    log.bar, log._since, log._since_step = SimpleNamespace(set_postfix=lambda shown: None), 0.0, 0
    sigma = torch.tensor([0.021, 0.3, 1.7, 19.0])
    log.record(sigma, {"loss": sigma})
    log.flush(1, 1e-3, 2.0)
    named = {float(name.split("/")[1]): v for name, v in seen[0].items() if name.startswith("loss_by_sigma/")}
    assert sorted(named.values()) == pytest.approx(sorted(sigma.tolist()))
    half_a_bin = math.log(20.0 / 0.02) / SIGMA_BINS / 2
    assert all(abs(math.log(name / value)) <= half_a_bin + 0.01 for name, value in named.items())
    assert seen[0]["grad_norm"] == 2.0


def test_validations_do_not_count_as_time_of_steps(script, small, tmp_path, monkeypatch):  # noqa: F811
    """The clock goes on by a second a look, and by 1000 while a sample grid is drawn or the held-out loss measured."""
    now, original = [0.0], log_module.RunLog.doing

    class Clock:
        @staticmethod
        def monotonic():
            now[0] += 1.0
            return now[0]

    def doing(self, what):
        inner = original(self, what)

        class Slow:
            def __enter__(self):
                inner.__enter__()
                now[0] += 1000.0

            def __exit__(self, *error):
                return inner.__exit__(*error)

        return Slow()

    monkeypatch.setattr(log_module, "time", Clock)
    monkeypatch.setattr(log_module.RunLog, "doing", doing)
    options = ["--validation_steps", 1, "--num_validation_images", 2, "--logging_steps", 2, "--max_train_steps", 4]
    script.run(*small, *options, "--output_dir", tmp_path / "out")
    speeds = [r["images_per_second"] for r in log_of(tmp_path / "out") if "images_per_second" in r]
    (start,) = (r["start"] for r in log_of(tmp_path / "out") if "start" in r)
    assert len(speeds) == 2
    assert min(speeds) > 2 * start["images_per_step"] / 100
