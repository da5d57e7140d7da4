"""Truth: accelerate itself, with the variables that `accelerate launch` and its users set."""

import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from diffusers_ext.errors import InputError
from diffusers_ext.training import TrainingArguments
from diffusers_ext.training.environment import require_as_asked
from diffusers_ext.training.loop import _accelerator


@pytest.fixture(autouse=True)
def _anew(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    yield
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()


def accelerator(tmp_path, **arguments):
    return _accelerator(TrainingArguments(report_to="none", output_dir=str(tmp_path), **arguments))


@pytest.mark.parametrize(("variable", "asked"), [("4", 1), ("4", 8), ("1", 2)])
def test_another_number_of_accumulation_steps_is_refused(variable, asked, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", variable)
    message = rf"is {asked}, .* makes it {variable} \(ACCELERATE_GRADIENT_ACCUMULATION_STEPS={variable}\)"
    with pytest.raises(InputError, match=message):
        accelerator(tmp_path, gradient_accumulation_steps=asked)


def test_what_says_the_same_is_taken(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    made = accelerator(tmp_path, gradient_accumulation_steps=4, mixed_precision="bf16")
    assert (made.gradient_accumulation_steps, made.mixed_precision) == (4, "bf16")


def test_a_precision_that_the_argument_leaves_open_is_that_of_the_launcher(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert accelerator(tmp_path).mixed_precision == "bf16"


def test_the_argument_has_the_last_word_on_the_precision(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert accelerator(tmp_path, mixed_precision="no").mixed_precision == "no"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"mixed_precision": "fp16"}, "--mixed_precision is bf16, and the environment makes it fp16"),
        ({"mixed_precision": "fp8"}, "--mixed_precision is bf16, and the environment makes it fp8"),
        ({"gradient_accumulation_steps": 3}, "not by ACCELERATE_GRADIENT_ACCUMULATION_STEPS, but by a plugin"),
        ({"tp_size": 2}, r"several processes share one batch .*\{'tp_size': 2\}"),
    ],
)
def test_what_plugins_change_is_refused(changed, message) -> None:
    class Made:
        gradient_accumulation_steps, mixed_precision, tp_size, cp_size, sp_size = 1, "bf16", 1, 1, 1

        @property
        def parallelism_config(self):
            return self

    made = Made()
    for name, value in changed.items():
        setattr(made, name, value)
    with pytest.raises(InputError, match=message):
        require_as_asked(made, TrainingArguments(mixed_precision="bf16"))


def test_a_precision_of_the_launcher_that_is_not_ours_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(InputError, match="fp8"):
        accelerator(tmp_path)


def test_the_tracker_is_tensorboard_where_it_is_installed(monkeypatch):
    from diffusers_ext.training import environment

    for there, expected in ((object(), "tensorboard"), (None, None)):
        monkeypatch.setattr(environment, "find_spec", lambda name, there=there: there)
        assert environment.tracker_named("auto") == expected
        assert environment.tracker_named("none") is None


def test_a_tracker_that_is_missing_is_named(monkeypatch):
    from diffusers_ext.training import environment

    monkeypatch.setattr(environment, "get_available_trackers", lambda: ["tensorboard"])
    assert environment.tracker_named("tensorboard") == "tensorboard"
    with pytest.raises(InputError, match="--report_to wandb: it is not installed"):
        environment.tracker_named("wandb")
    monkeypatch.setattr(environment, "get_available_trackers", lambda: ["wandb"])
    assert environment.tracker_named("wandb") == "wandb"
