"""Truth: what the user wrote, in the order that the documentation promises."""

import re
from dataclasses import fields

import pytest

from diffusers_ext.commands import parse_arguments
from diffusers_ext.presets import PRESETS
from diffusers_ext.training import TrainingArguments


def test_later_sources_win(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("preset: digits\nlearning_rate: 1e-4\nmax_train_steps: 7\nuse_ema: false\nmin_snr_gamma: null\n")
    args = parse_arguments(TrainingArguments, ["--config", str(file), "--max_train_steps", "5"])
    assert args.train_batch_size == PRESETS["digits"].arguments["train_batch_size"]
    assert args.ema_decay == PRESETS["digits"].arguments["ema_decay"] != TrainingArguments.ema_decay
    assert args.learning_rate == 1e-4  # a string to YAML
    assert (args.max_train_steps, args.use_ema, args.min_snr_gamma) == (5, False, None)
    assert args.adam_beta1 == TrainingArguments.adam_beta1


def test_the_command_line_switches_a_default_off():
    assert parse_arguments(TrainingArguments, ["--use_ema", "False"]).use_ema is False
    assert parse_arguments(TrainingArguments, ["--no_use_ema"]).use_ema is False


@pytest.mark.parametrize(
    ("argv", "yaml", "message"),
    [
        (["--preset", "digitz"], None, "no preset 'digitz'; presets: digits, mnist, cifar10"),
        (["--train_batch_size", "0"], None, "--train_batch_size must be at least 1"),
        (["--lr_scheduler", "cosinus"], None, "--lr_scheduler 'cosinus' is not one of constant"),
        (["--learning_rate=-1"], None, "--learning_rate must be above 0"),
        (["--label_drop", "2"], None, "--label_drop must be at least 0 and at most 1"),
        (["--max_train_step", "3"], None, "unknown argument '--max_train_step'; did you mean max_train_steps?"),
        ([], "learning_rat: 1", "unknown argument 'learning_rat'; did you mean learning_rate?"),
        ([], "learning_rate: fast", "invalid float value: 'fast'"),
        ([], "mixed_precision: int4", "invalid choice"),
        ([], "- a list", "must hold `name: value` lines"),
        (["--config", "nowhere.yaml"], None, "nowhere.yaml cannot be read"),
    ],
)
def test_mistakes_end_with_a_message(argv, yaml, message, tmp_path, capsys):
    if yaml is not None:
        (tmp_path / "run.yaml").write_text(yaml)
        argv = [*argv, "--config", str(tmp_path / "run.yaml")]
    with pytest.raises((SystemExit, ValueError)) as error:
        parse_arguments(TrainingArguments, argv)
    printed = capsys.readouterr().err + str(error.value)
    assert any(m in printed for m in message.split("|"))


def test_help_names_every_argument(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(TrainingArguments, ["--help", "all"])
    printed = capsys.readouterr().out
    named = set(re.findall(r"^  --(?:no_)?(\w+)", printed, re.MULTILINE))
    assert named == {f.name for f in fields(TrainingArguments)}
