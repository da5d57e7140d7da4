"""What a run says before and after its work. Truth: the network's own parameters, and the parsers of the commands that
it names."""

import re
import shlex

import pytest
import torch
from diffusers import DiffusionPipeline
from test_train_consistency import script, small  # noqa: F401
from test_wrong_input import KINDS

from diffusers_ext.commands import parse_arguments
from diffusers_ext.progress import WIDTH
from diffusers_ext.training.announce import _short


@pytest.fixture
def said(script, small, tmp_path, capsys):  # noqa: F811
    options = ["--validation_steps", 2, "--num_validation_images", 2, "--consistency_weight", 3]
    script.run(*small, *options, "--max_train_steps", 3, "--output_dir", tmp_path / "out")
    return capsys.readouterr()


def test_a_run_says_what_it_trains_how_and_where(said, tmp_path):
    lines = dict(re.findall(r"^(data|model|run|device|results): (.*)", said.out, re.MULTILINE))
    assert list(lines) == ["data", "model", "run", "device", "results"]
    count = sum(p.numel() for p in DiffusionPipeline.from_pretrained(tmp_path / "out").unet.parameters())
    assert lines["model"] == f"DDIMPipeline of {_short(count)} parameters, all of them trained"
    assert re.fullmatch(r"3 steps of \d+ images, learning rate \S+, consistency_weight 3, seed \d+", lines["run"])
    assert lines["device"] == f"{'cuda' if torch.cuda.is_available() else 'cpu'}, 1 process, float32"
    assert lines["results"].startswith(f"{tmp_path / 'out'}; held-out loss and samples every 2 steps")


def test_after_its_work_it_says_what_to_do_next(said, tmp_path):
    *_, where, opened, judged, looked = said.out.strip().splitlines()
    assert where == f"the trained pipeline is in {tmp_path / 'out'}"
    scope = {"DiffusionPipeline": DiffusionPipeline}
    assert eval(opened.removeprefix("  open it:"), scope).unet.dtype == torch.float32
    words = shlex.split(judged.removeprefix("  judge it:"))
    assert words[:2] == ["diffusers-ext", "evaluate"]
    args = parse_arguments(KINDS["evaluate"], words[2:])
    assert args.pretrained_model_name_or_path == [str(tmp_path / "out")]
    assert args.dataset_name == "digits"
    pictures, log = looked.removeprefix("  look at it: ").split(", ")
    assert sorted(path.name for path in (tmp_path / "out" / "samples").iterdir()) == [
        "step-00000002.png",
        "step-00000003.png",
    ]
    assert pictures == str(tmp_path / "out" / "samples")
    assert (tmp_path / "out" / "logs" / "log.jsonl").samefile(log)


def test_something_is_seen_while_it_draws_and_measures(said):
    """At step 2 before the bar of the steps, after step 3 in lines of their own; all within the width."""
    shown = [re.sub(r"\x1b\[\w", "", line) for line in re.split(r"[\r\n]+", said.err)]
    for what in ("drawing 2 samples", "measuring the loss on held-out images"):
        assert sum(line.startswith(what) and "| 2/3 " in line for line in shown) >= 1
        assert sum(line.startswith(what) and line.endswith("...") for line in shown) == 1
    assert max(map(len, shown)) <= WIDTH


@pytest.mark.parametrize(("n", "said"), [(12, "12"), (1200, "1.2k"), (1_114_113, "1.11M"), (2_567_463_684, "2.57B")])
def test_numbers_of_parameters_are_short(n, said):
    assert _short(n) == said
