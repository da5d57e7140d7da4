"""`benchmarks/claims.py` and how it trains: verdicts, table, paired intervals, what is trained again. Truth: samples of
laws that are known, and a script that says when it was run."""

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_ext.evaluation import Manifold, quality
from diffusers_ext.metrics import Interval

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def claims(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    for name in ("bench", "trained", "reflected_guidance", "short_time"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("claims", BENCHMARKS / "claims.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "claims", module)
    spec.loader.exec_module(module)
    return module


def test_a_claim_of_two_seeds_holds_for_each_of_them(claims):
    one = claims.Claim(
        "better", "theirs", ("Frechet distance 3.00 → 1.00", Interval(-2.0, -3.0, -1.0), Interval(2, 1, 3))
    )
    other = claims.Claim(
        "better", "theirs", ("Frechet distance 2.00 → 1.90", Interval(-0.1, -0.5, 0.3), Interval(3, 2.5, 4))
    )
    claim, theirs, (ours, difference, pixels), _ = claims.over_seeds((one, other))
    assert (claim, theirs, ours) == ("better", "theirs", "Frechet distance 3.00 → 1.00; 2.00 → 1.90")
    assert difference == Interval(-1.05, -3.0, 0.3)
    assert pixels == Interval(2.5, 1, 4)
    assert claims.verdict(difference, better=True) == "too small to tell"


def test_a_verdict_is_the_side_of_zero_that_the_interval_lies_on(claims):
    less, more, both = Interval(-2, -3, -1), Interval(2, 1, 3), Interval(-1, -3, 1)
    assert claims.verdict(less, better=True) == "reproduced"
    assert claims.verdict(more, better=True) == "not reproduced"
    assert claims.verdict(both, better=True) == "too small to tell"
    assert claims.verdict(more, better=False) == "reproduced"  # the claim is harm
    assert claims.verdict(less, better=False) == "not reproduced"
    assert claims.verdict(less, better=True, claimed=False) == "better"
    assert claims.verdict(more, better=True, claimed=False) == "worse"


def test_as_good_is_no_worse_than_by_the_margin(claims):
    within, beyond, unknown = Interval(0.1, -0.1, 0.25), Interval(0.5, 0.4, 0.6), Interval(0.2, 0.1, 0.5)
    found = [claims.verdict(one, better=True, margin=0.3) for one in (within, beyond, unknown)]
    assert found == ["reproduced", "not reproduced", "too small to tell"]


def test_a_difference_is_paired(claims):
    """x and x + c against N(0, I): the distances are 0 and |c|^2, and what x has by chance is in both."""
    generator = torch.Generator().manual_seed(1)
    x, reference = (torch.randn(2000, 8, generator=generator) for _ in range(2))
    manifold = Manifold.of(reference, reference, None, 100)
    seen = torch.randn(2000, 3, generator=generator)
    judge = SimpleNamespace(measure=lambda one, folder: quality(one, manifold, (2 * one[:, :3], seen)))
    lab = SimpleNamespace(judge=judge, drawn=None)
    words, difference, pixels = claims.Lab.versus(lab, x + 0.3, x)
    assert pixels.low < 3 * 0.6**2 < pixels.high
    assert difference.low < 8 * 0.3**2 < difference.high
    assert words.startswith("Frechet distance ")
    before, after = (float(word) for word in words.removeprefix("Frechet distance ").split(" → "))
    assert after - before == pytest.approx(0.72, abs=0.2)  # from the baseline to the method
    _, paired, _ = claims.Lab.versus(lab, 1.01 * x, x)
    other = torch.randn(2000, 8, generator=generator)
    _, unpaired, _ = claims.Lab.versus(lab, 1.01 * x, other)
    assert paired.high - paired.low < 0.5 * (unpaired.high - unpaired.low)


def test_the_page_shows_all_rows_and_what_is_missing(claims, tmp_path):
    (tmp_path / "claims").mkdir()
    (tmp_path / "claims" / "HEAD.md").write_text("# Claims\n")
    row = {
        "method": "calibrated", "paper": "2302.10688", "claim": "It helps", "theirs": "FID 2 → 1", "ours": "3 → 2.5",
        "difference": [-0.5, -0.75, -0.25], "pixels": [0.1, 0.05, 0.2], "verdict": "reproduced",
        "command": "python benchmarks/claims.py",
    }  # fmt: skip
    (tmp_path / "claims" / "digits.json").write_text(json.dumps({"rows": [row], "described": "500 samples"}))
    claims.write_table(tmp_path)
    text = (tmp_path / "claims.md").read_text()
    assert text.startswith("# Claims\n")
    line = next(line for line in text.splitlines() if "It helps" in line)
    assert "https://arxiv.org/abs/2302.10688" in line
    assert "-0.5 (-0.75 to -0.25) | +0.1 (+0.05 to +0.2) | reproduced" in line
    assert "Not measured yet: consistency, reflected, short_time, observation, combinations." in text
    assert text.count("## ") == 3
    assert "500 samples" in text


def test_no_page_is_older_than_its_numbers(claims, tmp_path):
    """docs/claims.md is what the committed results make of it."""
    docs = BENCHMARKS.parent / "docs"
    (tmp_path / "claims").mkdir()
    for file in (docs / "claims").iterdir():
        (tmp_path / "claims" / file.name).write_text(file.read_text())
    claims.write_table(tmp_path)
    assert (tmp_path / "claims.md").read_text() == (docs / "claims.md").read_text()


# how models are trained

SCRIPT = """
import signal, sys, time
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--output_dir") + 1])
out.mkdir(parents=True, exist_ok=True)
with (out.parent / "calls").open("a") as file:
    file.write("call ")
if "--slow" in sys.argv and not (out / "checkpoint").exists():
    def stop(*_):
        (out / "checkpoint").touch()
        sys.exit(1)
    signal.signal(signal.SIGTERM, stop)
    time.sleep(60)
if "--bad" in sys.argv:
    sys.exit(7)
(out / "model_index.json").touch()
"""


@pytest.fixture
def trained(claims, tmp_path, monkeypatch):
    module = sys.modules["trained"]
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "fake.py").write_text(SCRIPT)
    monkeypatch.setattr(module, "ROOT", tmp_path)
    return module


def calls(tmp_path):
    return (tmp_path / "out" / "calls").read_text().split().count("call")


def test_what_is_there_is_not_trained_again_and_never_taken_for_another(trained, tmp_path, monkeypatch):
    folder = tmp_path / "out" / "a"
    assert trained.train("fake.py", folder, ["--seed", "1"], seed=1) == folder
    record = json.loads((tmp_path / "out" / "a.json").read_text())
    assert record["command"] == ["fake.py", "--seed", "1", "--output_dir", "a"]
    assert record["seed"] == 1
    assert record["seconds"] > 0
    monkeypatch.chdir(tmp_path)
    trained.train("fake.py", Path("out/a"), ["--seed", "1"], seed=1)  # the same, by another name
    assert calls(tmp_path) == 1
    with pytest.raises(SystemExit, match=r"a is of another run, with other arguments: use another --output_dir"):
        trained.train("fake.py", folder, ["--seed", "2"])


def test_a_deadline_stops_the_run_and_the_next_piece_goes_on(trained, tmp_path):
    folder = tmp_path / "out" / "a"
    with pytest.raises(trained.OutOfTime):
        trained.train("fake.py", folder, ["--slow"], deadline=time.monotonic() + 5)
    assert (folder / "checkpoint").exists()
    first = json.loads((tmp_path / "out" / "a.json").read_text())["seconds"]
    trained.train("fake.py", folder, ["--slow"], deadline=time.monotonic() + 60)
    assert json.loads((tmp_path / "out" / "a.json").read_text())["seconds"] > first > 1.5
    assert calls(tmp_path) == 2


def test_a_run_that_fails_ends_the_benchmark(trained, tmp_path):
    with pytest.raises(SystemExit, match=r"fake\.py ended with status 7"):
        trained.train("fake.py", tmp_path / "out" / "a", ["--bad"])


def test_an_evaluation_gets_the_arguments_of_the_data(trained):
    words = ["--preset", "digits", "--learning_rate", "1e-3", "--dataset_name=a/b", "--seed", "3", "--resolution", "8"]
    assert trained.of_the_data(words) == ["--preset", "digits", "--dataset_name", "a/b", "--resolution", "8"]
