"""`training/calibrate.py` as a user runs it. Truth: a network whose output is one constant, which is its mean error."""

import functools
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import stranger
import torch
from datasets import ClassLabel, Dataset, Features, Image, Value
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from hub_server import HubServer
from test_models import tiny_unet
from tiny_pipelines import tiny
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ext import CalibratedDDIMScheduler, Calibration, ClassConditionalPipeline, estimate_calibration
from diffusers_ext.reports import calibration_card as calibration_report
from diffusers_ext.subjects import Pixels, subject_of

SCRIPT = Path(__file__).parents[1] / "training" / "calibrate.py"


@pytest.fixture
def calibrate(load_script):
    return load_script("calibrate")


def constant_unet(value, **config):
    """Its output is `value` in the first row of the image and 0 elsewhere, whatever comes in."""
    unet = tiny_unet(**config)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.constant_(unet.conv_out.bias, value)
    return unet


def save_model(folder, value=0.1, prediction_type="epsilon"):
    scheduler = DDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    DDIMPipeline(unet=constant_unet(value), scheduler=scheduler).save_pretrained(folder)
    return folder


def arguments(model, out, *more):
    data = ("--dataset_name", "digits", "--max_train_samples", 96, "--train_batch_size", 32, "--num_levels", 4)
    return ["--pretrained_model_name_or_path", model, *data, "--output_dir", out, *more]


def test_a_constant_output_is_found_and_taken_away(calibrate, tmp_path, capsys):
    calibrate.run(*arguments(save_model(tmp_path / "model"), tmp_path / "out"))
    calibration = Calibration.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(calibration.offsets, torch.full((4, 1, 1, 8, 8), 0.1), rtol=1e-3, atol=1e-4)
    assert (calibration.shrinkage > 0.999).all()
    assert calibration.num_samples.unique().tolist() == [96]
    # int 0.1^2 dln(sigma) / ln 2
    low, high = calibration.config.sigmas[0], calibration.config.sigmas[-1]
    assert calibration.likelihood_gain().item() == pytest.approx(0.01 * np.log(high / low) / np.log(2), rel=1e-3)
    scheduler = CalibratedDDIMScheduler.from_pretrained(tmp_path / "out", subfolder="scheduler")
    scheduler.set_timesteps(4)
    x = torch.randn(2, 1, 8, 8)
    stock = DDIMScheduler.from_config(scheduler.config)
    stock.set_timesteps(4)
    t = scheduler.timesteps[1]
    ours = scheduler.step(torch.full_like(x, 0.1), t, x).prev_sample
    torch.testing.assert_close(ours, stock.step(torch.zeros_like(x), t, x).prev_sample, rtol=1e-3, atol=1e-4)
    said = capsys.readouterr().out
    assert "worth trying" in said
    assert "4 of 4 levels, the largest 0.1" in said
    assert "samples gained where the solver clips x0" in said
    card = (tmp_path / "out" / "README.md").read_text()
    assert "pipe = calibrate_pipeline(pipe, calibration)" in card
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "out" / "config.json").read_text()
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert numbers["mean_error"][0] == pytest.approx([0.1] * 4, rel=1e-3)
    assert (tmp_path / "out" / "offsets.png").stat().st_size > 5000


def test_without_matplotlib_only_the_picture_is_missing(calibrate, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    calibrate.run(*arguments(save_model(tmp_path / "model"), tmp_path / "out"))
    assert "no picture of the offsets: it needs matplotlib" in capsys.readouterr().out
    assert "offsets.png" not in (tmp_path / "out" / "README.md").read_text()
    assert Calibration.from_pretrained(tmp_path / "out").offsets.mean() > 0.09


def test_a_model_without_a_mean_error_is_left_alone(calibrate, tmp_path, capsys):
    """For the zero network eps is 0 at v = 0 only with data of mean 0; with prediction epsilon it is 0 exactly."""
    calibrate.run(*arguments(save_model(tmp_path / "model", value=0.0), tmp_path / "out"))
    calibration = Calibration.from_pretrained(tmp_path / "out")
    assert calibration.offsets.abs().max() < 1e-5
    assert "no mean error found" in capsys.readouterr().out


def test_a_stopped_run_goes_on_to_the_same_result(calibrate, tmp_path, monkeypatch):
    unet = tiny_unet()
    DDIMPipeline(unet=unet, scheduler=DDIMScheduler()).save_pretrained(tmp_path / "model")
    calibrate.run(*arguments(tmp_path / "model", tmp_path / "whole", "--train_batch_size", 4))
    plain, calls = Pixels.encode, []

    def stop(subject, images, generator):
        calls.append(1)
        if len(calls) == 15:
            raise KeyboardInterrupt
        return plain(subject, images, generator)

    again = arguments(tmp_path / "model", tmp_path / "halves", "--train_batch_size", 4)
    monkeypatch.setattr(Pixels, "encode", stop)
    with pytest.raises(SystemExit, match="interrupted"):
        calibrate.run(*again)
    monkeypatch.setattr(Pixels, "encode", plain)
    forwards = []
    monkeypatch.setattr(type(unet), "forward", counted(type(unet).forward, forwards))
    calibrate.run(*again)
    assert 0 < len(forwards) <= 2 * 4 * 14 + 1  # the last 14 of 24 batches, and a probe
    a, b = (Calibration.from_pretrained(tmp_path / name) for name in ("whole", "halves"))
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    with pytest.raises(SystemExit, match="sums of another run, with other data, seed"):
        calibrate.run(*again, "--seed", 1)


TWO_PROCESSES = """
import importlib.util, os, sys
from accelerate import Accelerator
from diffusers_ext import Calibration
from safetensors.torch import load_file
_, script, *options = sys.argv
spec = importlib.util.spec_from_file_location("calibrate", script)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
from diffusers_ext.subjects import Pixels
encode, save, batches = Pixels.encode, Calibration.save_pretrained, []

def say(line):  # in one piece, as `print` does not
    os.write(1, f"{line}\\n".encode())

def counted(*args):
    batches.append(1)
    if len(batches) == stop:
        raise KeyboardInterrupt
    return encode(*args)

def saved(self, folder, **kwargs):
    say(f"saved {os.path.relpath(folder).split('/')[0]}")
    save(self, folder, **kwargs)

Pixels.encode, Calibration.save_pretrained = counted, saved
Accelerator.end_training = lambda self: say(f"{out} took {len(batches)} in one of {self.num_processes}")
for out, stop in (("whole", None), ("halves", 15), ("halves", None)):
    batches.clear()
    sys.argv = ["calibrate.py", *options, out]
    try:
        module.main()
    except SystemExit:
        state = load_file(f"{out}/state/sums-{os.environ['RANK']}-of-2.safetensors")
        seen = [name for name in os.listdir(out) if not name.startswith(".")]
        say(f"stopped {seen}, {state['batches']} batches are kept")
"""


def test_two_processes_measure_what_one_does_and_go_on_after_a_stop(calibrate, captioned, tmp_path):
    """A network that predicts x0 = 0.1 has the values (x + sigma n - 0.1) / sigma; n cancels with -n. So the mean error
    is (E x - 0.1) / sigma, with E x of the images: each must be taken once, and the noise is left out of it."""
    model = save_model(tmp_path / "model", prediction_type="sample")
    options = ["--pretrained_model_name_or_path", model, "--dataset_name", captioned, "--num_levels", 2]
    options = [*map(str, options), "--train_batch_size", "1", "--output_dir"]
    calibrate.run(*options, tmp_path / "one")
    (tmp_path / "driver.py").write_text(TWO_PROCESSES)
    done = stranger.ranks(2, tmp_path / "driver.py", SCRIPT, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    tables = ["saved halves"] * 2 + ["saved whole"] * 2  # beside the scheduler, too
    assert sorted(line for line in said if line.startswith("saved")) == tables  # by one process
    for out in ("whole", "halves"):
        assert said.count(f"{out} took 20 in one of 2") == 2
    stopped = [line for line in said if line.startswith("stopped")]
    assert stopped == ["stopped ['state'], 10 batches are kept"] * 2

    one, whole, halves = (Calibration.from_pretrained(tmp_path / name) for name in ("one", "whole", "halves"))
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(halves.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for name in ("offsets", "noise_floor", "squared_norm", "num_samples"):
        torch.testing.assert_close(getattr(whole, name), getattr(one, name), rtol=1e-4, atol=1e-5)
    grey = torch.arange(40).double() * 6 / 127.5 - 1
    sigmas = torch.tensor(whole.config.sigmas).double()
    expected = ((grey.mean() - 0.1) / sigmas).reshape(2, 1, 1, 1, 1).expand(2, 1, 1, 8, 8)
    torch.testing.assert_close(whole.offsets.double(), expected, rtol=1e-4, atol=1e-5)
    floor = 64 * grey.var() / 40 / sigmas[:, None] ** 2
    torch.testing.assert_close(whole.noise_floor.double(), floor, rtol=1e-4, atol=1e-5)
    assert whole.num_samples.tolist() == [[40], [40]]


def counted(function, calls):
    def count(*args, **kwargs):
        calls.append(1)
        return function(*args, **kwargs)

    count.__signature__ = __import__("inspect").signature(function)
    return count


def test_classes_and_the_null_class_have_rows(calibrate, tmp_path, monkeypatch):
    unet = constant_unet(0.1, num_class_embeds=11)
    pipeline = ClassConditionalPipeline(unet, DDIMScheduler(clip_sample=False), null_class=10)
    pipeline.save_pretrained(tmp_path / "model")
    calibrate.run(*arguments(tmp_path / "model", tmp_path / "two", "--max_train_samples", 64))
    assert Calibration.from_pretrained(tmp_path / "two").config.rows == ["conditional", "unconditional"]
    more = ("--per_class", "--max_train_samples", 640, "--num_levels", 2)
    calibrate.run(*arguments(tmp_path / "model", tmp_path / "all", *more))
    monkeypatch.chdir(tmp_path)
    for name, what in (("two", CalibratedDDIMScheduler), ("all", DDIMScheduler)):  # no scheduler knows the class
        assert type(by_the_card(tmp_path / name)["pipe"].scheduler) is what
    calibration = Calibration.from_pretrained(tmp_path / "all")
    assert calibration.config.rows == [*map(str, range(10)), "unconditional"]
    torch.testing.assert_close(calibration.offsets, torch.full((2, 11, 1, 8, 8), 0.1), rtol=1e-3, atol=1e-4)
    assert calibration.num_samples[0, :10].sum() == calibration.num_samples[0, 10] == 640


def by_the_card(folder) -> dict:
    """What is defined after the code on the card was run; in the folder that it names."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)[1]
    exec(code, given := {})
    return given


@pytest.fixture
def captioned():
    features = Features({"image": Image(), "text": Value("string"), "label": ClassLabel(names=["a", "b"])})
    images = [np.full((16, 16, 3), 6 * i, dtype=np.uint8) for i in range(40)]
    rows = {"image": images, "text": [f"grey {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}
    with tempfile.TemporaryDirectory() as folder:  # pytest's own begins with test_, which `datasets` takes for a split
        Dataset.from_dict(rows, features=features).to_parquet(Path(folder) / "train.parquet")
        yield Path(folder) / "train.parquet"


def tiny_stable_diffusion(folder):
    words = {
        w: i for i, w in enumerate(["<|startoftext|>", "<|endoftext|>", *"grey0123456789", *["g", "r", "e", "y</w>"]])
    }
    (folder / "tokenizer").mkdir(parents=True)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(words))
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(
        str(folder / "tokenizer" / "vocab.json"), str(folder / "tokenizer" / "merges.txt"), model_max_length=8
    )
    text = CLIPTextConfig(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16, attention_head_dim=4,
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = StableDiffusionPipeline(
        vae, CLIPTextModel(text), tokenizer, unet, DDIMScheduler(clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip
    return pipeline


def test_text_to_image_models_are_measured_on_latents_and_captions(calibrate, captioned, tmp_path):
    pipeline = tiny_stable_diffusion(tmp_path / "parts")
    pipeline.save_pretrained(tmp_path / "sd")
    prompts, encode = [], StableDiffusionPipeline.encode_prompt

    @functools.wraps(encode)
    def remember(self, prompt, *args, **kwargs):
        prompts.extend(prompt)
        return encode(self, prompt, *args, **kwargs)

    StableDiffusionPipeline.encode_prompt = remember
    try:
        calibrate.run(
            *("--pretrained_model_name_or_path", tmp_path / "sd", "--dataset_name", captioned, "--num_levels", 2),
            *("--caption_column", "text", "--train_batch_size", 8, "--output_dir", tmp_path / "out"),
            *("--max_train_samples", 40, "--save_pipeline"),
        )
    finally:
        StableDiffusionPipeline.encode_prompt = encode
    assert sorted(p for p in prompts if p) == sorted(f"grey {i}" for i in range(40))
    calibration = Calibration.from_pretrained(tmp_path / "out")
    assert calibration.config.shape == [4, 8, 8]
    assert calibration.config.rows == ["conditional", "unconditional"]
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "out", safety_checker=None)
    assert type(loaded.scheduler) is DDIMScheduler
    loaded.scheduler = CalibratedDDIMScheduler.from_scheduler(loaded.scheduler, calibration, guidance_scale=3.0)
    options = {"num_inference_steps": 2, "guidance_scale": 3.0, "output_type": "np"}
    images = [p("grey 1", generator=torch.Generator().manual_seed(0), **options).images for p in (pipeline, loaded)]
    assert 0 < np.abs(images[0] - images[1]).max() <= 1


OPEN = """
from diffusers import DiffusionPipeline
import sys
pipe = DiffusionPipeline.from_pretrained("tester/model")
print(type(pipe.scheduler).__name__, "diffusers_ext" in sys.modules)
from diffusers_ext import CalibratedDDIMScheduler, Calibration
print(Calibration.from_pretrained("tester/model").offsets.mean().item())
scheduler = CalibratedDDIMScheduler.from_pretrained("tester/model", subfolder="scheduler", guidance_scale=1.0)
print(scheduler.calibration.offsets.mean().item())
"""


def test_what_it_pushes_opens_with_the_package_and_without(tmp_path):
    model = save_model(tmp_path / "model")
    with HubServer() as hub:
        environment = hub.environment(tmp_path / "home") | {"HF_DATASETS_OFFLINE": "1"}
        argv = arguments(model, tmp_path / "out", "--save_pipeline", "--push_to_hub", "--hub_model_id", "model")
        done = stranger.run(SCRIPT, *argv, env=environment)
        assert done.returncode == 0, done.stderr
        opened = stranger.run(OPEN, env=hub.environment(tmp_path / "other", token=None))
        assert not [f for f in hub.files("tester/model") if "state" in f]
        assert 'Calibration.from_pretrained("tester/model")' in hub.files("tester/model")["README.md"].decode()
    assert opened.returncode == 0, opened.stderr
    stock, root, beside = opened.stdout.splitlines()
    assert stock == "DDIMScheduler False"
    assert float(root) == float(beside) == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--max_train_samples", "16"], "fewer than a batch of 32"),
        (["--per_class"], "takes no class labels"),
        (["--caption_column", "text"], "no effect on the embedded digits"),
        (["--resolution", "9"], "does not fit the model"),
        (["--pretrained_model_name_or_path", "nowhere"], "could not be loaded"),
    ],
)
def test_errors_say_what_to_do(calibrate, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        calibrate.run(*arguments(save_model(tmp_path / "model"), tmp_path / "out"), *argv)


def test_data_that_do_not_fit_the_model_are_refused(calibrate, captioned, tmp_path):
    """40 images in two classes, with captions."""
    unet = constant_unet(0.1, num_class_embeds=3)
    ClassConditionalPipeline(unet, DDIMScheduler(clip_sample=False), null_class=2).save_pretrained(tmp_path / "two")
    with pytest.raises(SystemExit, match="takes labels of 2 classes, the data have 10 classes"):
        calibrate.run(*arguments(tmp_path / "two", tmp_path / "out"))
    more = ("--dataset_name", captioned, "--train_batch_size", 8, "--max_train_samples", 40)
    options = arguments(tmp_path / "two", tmp_path / "out", *more)
    with pytest.raises(SystemExit, match="the model takes no prompts"):
        calibrate.run(*options, "--caption_column", "text")
    calibrate.run(*options)
    unlabelled = Dataset.from_parquet(str(captioned)).remove_columns("label")
    unlabelled.to_parquet(captioned.parent / "other.parquet")
    with pytest.raises(SystemExit, match="takes labels of 2 classes, the data have no labels"):
        calibrate.run(*options, "--dataset_name", captioned.parent / "other.parquet")
    save_model(tmp_path / "model")
    long = arguments(tmp_path / "model", tmp_path / "long", "--train_batch_size", 8)  # sums are kept after 10 batches
    calibrate.run(*long)
    with pytest.raises(SystemExit, match="holds the sums of another run, with other data"):
        calibrate.run(*long, "--train_split", "test")


def test_a_stream_is_not_read_twice(calibrate, captioned, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)
    options = arguments(save_model(tmp_path / "model"), tmp_path / "out", "--dataset_name", captioned, "--streaming")
    with pytest.raises(SystemExit, match="has 36 images in whole batches: repeat with --max_train_samples 36"):
        calibrate.run(*options, "--train_batch_size", 12)
    calibrate.run(*options, "--train_batch_size", 12, "--max_train_samples", 36)
    assert Calibration.from_pretrained(tmp_path / "out").num_samples.unique().tolist() == [36]


def test_a_tolerance_that_was_not_reached_is_said(calibrate, tmp_path, capsys):
    DDIMPipeline(unet=tiny_unet(), scheduler=DDIMScheduler()).save_pretrained(tmp_path / "model")
    for tolerance, said in (("1e-9", True), ("10", False)):
        calibrate.run(*arguments(tmp_path / "model", tmp_path / tolerance, "--tolerance", tolerance))
        message = f"before the tolerance of {float(tolerance):.2g} was reached at 4 of 4 levels"
        assert (message in capsys.readouterr().out) is said
        assert (message in (tmp_path / tolerance / "README.md").read_text()) is said


def test_conditions_in_a_tree_reach_the_unconditional_row():
    """As those of Stable Diffusion XL: a dictionary within the keyword arguments."""

    def network(x, t, added):
        return added["bias"].reshape(-1, 1, 1, 1).expand_as(x)

    def batches():
        for _ in range(4):
            yield torch.randn(16, 1, 4, 4), {"added": {"bias": torch.full((16,), 0.5)}}

    null = {"added": {"bias": torch.full((1,), 0.25)}}
    calibration = estimate_calibration(network, DDIMScheduler(), batches(), num_levels=2, unconditional=null)
    torch.testing.assert_close(calibration.offsets[:, 0], torch.full((2, 1, 4, 4), 0.5))
    torch.testing.assert_close(calibration.offsets[:, 1], torch.full((2, 1, 4, 4), 0.25))


def test_latents_are_drawn_from_the_seed_alone(calibrate, captioned, tmp_path, capsys):
    """Without captions, which is said before the work: the table is of no use for guidance."""
    tiny_stable_diffusion(tmp_path / "parts").save_pretrained(tmp_path / "sd")
    tables = []
    for i in range(2):
        torch.manual_seed(i)
        calibrate.run(
            *("--pretrained_model_name_or_path", tmp_path / "sd", "--dataset_name", captioned, "--num_levels", 2),
            *("--train_batch_size", 20, "--output_dir", tmp_path / str(i)),
        )
        tables.append(Calibration.from_pretrained(tmp_path / str(i)).offsets)
    torch.testing.assert_close(*tables, rtol=1e-4, atol=1e-5)
    assert capsys.readouterr().out.startswith("without --caption_column the mean error is that of the empty prompt")
    with pytest.raises(ValueError, match=r"needs the rows .*calibrate\.py: --caption_column"):
        Calibration.from_pretrained(tmp_path / "0").guidance_weights(7.5)


def test_a_name_that_the_hub_does_not_take_ends_with_a_message(calibrate, tmp_path):
    with pytest.raises(SystemExit, match="--hub_model_id"):
        calibrate.run(
            *arguments(save_model(tmp_path / "model"), tmp_path / "out", "--push_to_hub", "--hub_model_id", "a/b/c")
        )


def test_the_verdict_says_what_is_not_worth_using_and_what_was_not_tested():
    calibration = Calibration([1, 2, 2], [0.1, 1.0, 10.0], measured_on={"shrink": True})
    calibration.offsets.fill_(0.1)
    calibration.shrinkage.fill_(1.0)
    for gain, said in ((-0.01, "not worth using"), (1e-5, "too small to make a difference"), (0.05, "worth trying")):
        calibration.squared_norm.fill_(gain)
        assert said in calibration_report.verdict(calibration)
        assert "nothing was tested" not in calibration_report.verdict(calibration)
    calibration.register_to_config(measured_on={"shrink": False})
    assert "nothing was tested" in calibration_report.verdict(calibration)


def test_a_pipeline_is_measured_and_saved_at_the_resolution_that_is_asked_for(calibrate, tmp_path):
    out = tmp_path / "out"
    calibrate.run(*arguments(save_model(tmp_path / "model"), out, "--resolution", 12, "--save_pipeline"))
    pipe = DiffusionPipeline.from_pretrained(out)
    calibration = Calibration.from_pretrained(out)
    assert (pipe.unet.config.sample_size, list(calibration.config.shape)) == (12, [1, 12, 12])


# Of each family: what the code on the card says of guidance, and a call with another scale than the one by default.
SAID = {
    "sd": ("it reads the guidance scale", {"guidance_scale": 3.0}),
    "sd-v": ("it reads the guidance scale", {"guidance_scale": 3.0}),
    "sdxl": ("it reads the guidance scale", {"guidance_scale": 3.0}),
    "sd3": ("it reads the guidance scale", {"guidance_scale": 3.0}),
    "flux": ("guidance_scale=1)  # that of your calls", {}),
    "flux-schnell": ("guidance_scale=1)  # that of your calls", {}),
    "pixart": ("guidance_scale=4.5)  # that of your calls", {}),
    "pixart-alpha": ("guidance_scale=4.5)  # that of your calls", {}),
}


@pytest.mark.parametrize("name", SAID)
def test_every_family_is_measured_and_calibrated_by_the_lines_that_are_printed(
    name, calibrate, captioned, tmp_path, capsys, monkeypatch
):
    """Truth: the hook, where a pipeline calls its network once with the unconditional half first, and else a loop."""
    tiny(name).save_pretrained(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    calibrate.run(
        *("--pretrained_model_name_or_path", "model", "--dataset_name", captioned, "--caption_column", "text"),
        *("--num_levels", 3, "--train_batch_size", 8, "--max_train_samples", 40, "--output_dir", "out", "--plain"),
        *("--resolution", 16),
    )
    printed = capsys.readouterr().out
    said, scale = SAID[name]
    assert said in printed
    given = by_the_card(tmp_path / "out")
    code = re.search(r"use it by\n\n(.*?)\n\n", printed.replace("\n\npipe", "\npipe"), re.DOTALL)[1]
    exec(code, from_console := {})
    pipe, calibration = given["pipe"], given["calibration"]
    assert calibration.config.rows == ["conditional", "unconditional"]
    assert type(from_console["pipe"].scheduler) is type(pipe.scheduler)
    assert type(pipe.scheduler).__name__.startswith("Calibrated")
    options = subject_of(pipe).call(2, captions=["grey 1", "grey 2"], resolution=16) | {"output_type": "latent"}
    options |= {"num_inference_steps": 3} | scale
    if name.startswith("pixart"):
        del options["guidance_scale"]  # the default is the one that was told
    latents = [
        p(generator=torch.Generator().manual_seed(0), **options).images
        for p in (pipe, from_console["pipe"], by_hand(tiny(name), calibration, name), tiny(name))
    ]
    assert torch.equal(latents[0], latents[1])
    torch.testing.assert_close(latents[0], latents[2], rtol=1e-4, atol=1e-4)
    assert (latents[0] - latents[3]).abs().max() > 1e-3


def by_hand(pipe, calibration, name):
    """Subtract each row's offset from the network's output, where the rows are known from how the pipeline calls it."""
    subject = subject_of(pipe)
    network, schedule = subject.network, calibration.schedule
    forward = network.forward
    cfg = not name.startswith("flux")

    def calibrated(sample=None, timestep=None, **kwargs):
        sample = kwargs.pop("hidden_states") if sample is None else sample
        (output,) = forward(sample, timestep=timestep, **kwargs)
        t = torch.as_tensor(timestep).flatten()[:1].float() * (1 if cfg else 1000)
        rows = [1.0] * 2 if not cfg else [0.0] * 2 + [1.0] * 2
        weights = torch.tensor([[w, 1 - w] for w in rows])
        per = calibration.per_for(sample.shape[1:])
        offset = calibration.offset(schedule.sigma(t).float().expand(len(rows)), weights, per)
        c = offset.shape[1]
        if output.shape[1] == 2 * c and cfg:
            return (torch.cat([output[:, :c] - offset, output[:, c:]], 1),)
        return (output - offset,)

    network.forward = calibrated
    return pipe


def test_a_lora_is_measured_with_its_model(calibrate, captioned, tmp_path, capsys, monkeypatch):
    from test_weights import lora

    pipe = tiny("sd")
    pipe.save_pretrained(tmp_path / "model")
    state = {k.replace(".style", ""): v for k, v in lora(pipe, size=1.0).unet.state_dict().items() if ".lora_" in k}
    pipe.save_lora_weights(tmp_path / "style", unet_lora_layers=state)
    monkeypatch.chdir(tmp_path)
    arguments = ["--pretrained_model_name_or_path", "model", "--dataset_name", captioned, "--caption_column", "text"]
    arguments += ["--num_levels", 2, "--train_batch_size", 8, "--max_train_samples", 40, "--plain", "--resolution", 16]
    calibrate.run(*arguments, "--output_dir", "with", "--lora_weights", "style")
    calibrate.run(*arguments, "--output_dir", "without")
    assert 'pipe.load_lora_weights("style")' in capsys.readouterr().out
    given = by_the_card(tmp_path / "with")
    assert given["calibration"].config.measured_on["lora_weights"] == "style"
    assert len(given["calibration"].lora_sample) > 0
    assert not torch.equal(given["calibration"].offsets, Calibration.from_pretrained("without").offsets)
    with pytest.raises(SystemExit, match="the LoRA 'nowhere' could not be loaded; it must be a folder or a repository"):
        calibrate.run(*arguments, "--output_dir", "none", "--lora_weights", "nowhere")
    tiny("pixart").save_pretrained(tmp_path / "pixart")
    with pytest.raises(SystemExit, match="--lora_weights: PixArtSigmaPipeline has no loader for a LoRA"):
        calibrate.run(
            *arguments,
            "--output_dir",
            "none",
            "--lora_weights",
            "style",
            *("--pretrained_model_name_or_path", "pixart"),
        )
    with pytest.raises(
        SystemExit, match="--guidance_scale: the network of a StableDiffusionPipeline is told no guidan"
    ):
        calibrate.run(*arguments, "--output_dir", "none", "--guidance_scale", 2)


def test_the_printed_lines_take_any_name_of_a_folder():
    code = calibration_report.example(
        "o'neil's", "pass", {"pretrained_model_name_or_path": 'a "model"', "variant": "fp16"}
    )
    words = re.findall(r"from_pretrained\((.*)\)", code)
    assert [eval(f"dict(name={word})")["name"] for word in words] == ['a "model"', "o'neil's"]
    assert eval(f"dict(name={words[0]})")["variant"] == "fp16"
