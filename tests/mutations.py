"""Break the package in many places, one at a time, and see that tests go red: `python tests/mutations.py [numbers]`.

Each mutation is made in a temporary copy of the repository, and the tests that should see it are run there. The script
ends with status 1 if one of them survives.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]


class Mutation(NamedTuple):
    """`snippet`, which stands once in the whole package, becomes `instead`; `tests` are arguments of pytest."""

    part: str
    snippet: str
    instead: str
    tests: str


MUTATIONS = [
    Mutation(
        "process",
        "return (x0 - x) / align(sigma, x) ** 2",
        "return (x - x0) / align(sigma, x) ** 2",
        "tests/test_process.py",
    ),
    Mutation(
        "hypercube",
        "yield torch.exp2(rate * y0 * y), y + y0",
        "yield torch.exp2(rate * y0 * y), y - y0",
        "tests/test_hypercube.py -k anywhere",
    ),
    Mutation(
        "score",
        "Coefficients(variance**-0.5, sigma_data**2 / variance,",
        "Coefficients(variance**-0.5, sigma_data / variance,",
        "tests/test_score.py",
    ),
    Mutation(
        "noise levels",
        "** (1 / rho) - k * u * width",
        "** (1 / rho) - u * width",
        "tests/test_noise_levels.py -k ahead",
    ),
    Mutation("solvers", "* (slope + slope_next) / 2", "* slope_next", "tests/test_solvers.py -k 'order or heun'"),
    Mutation("interop", "output = output[:, :channels]", "output = output[:, channels:]", "tests/test_interop.py"),
    Mutation("signs of networks", "means.sign * calibration", "calibration", "tests/test_networks.py -k x0"),
    Mutation("times of networks", "return n - t if self.from_end else t", "return t", "tests/test_networks.py -k x0"),
    Mutation(
        "units of networks", "NetworkConvention(1000)", "NetworkConvention(None)", "tests/test_networks.py -k source"
    ),
    Mutation(
        "losses",
        "2 * r_1 * r_2 - (r_1 * r_2).detach()",
        "2 * r_1 * r_2 - (r_1 * r_1).detach()",
        "tests/test_losses.py -k expected",
    ),
    Mutation("point", "c_out * output).clamp(-1, 1)", "c_out * output)", "tests/test_reflected_point.py -k clamped"),
    Mutation(
        "point, units",
        "vp_v_prediction(align(sigma, x) / half)",
        "vp_v_prediction(align(sigma, x))",
        "tests/test_reflected_point.py -k exact_score",
    ),
    Mutation(
        "bridge in the box",
        "(ratio * (1 - ratio)).sqrt() * noise",
        "(1 - ratio).sqrt() * noise",
        "tests/test_reflected_point.py -k posterior",
    ),
    Mutation(
        "flow in the box",
        "h / 2 * (slope + sigma**2",
        "h * (slope + sigma**2",
        "tests/test_reflected_point.py -k flow_of",
    ),
    Mutation(
        "weight of a point",
        "(pi * sigma / self.process.width) ** 2",
        "(pi * sigma) ** 2",
        "tests/test_reflected_point.py -k weight",
    ),
    Mutation(
        "noise of a point's step",
        "(randn_tensor(x.shape, generator, x.device, x.dtype) for",
        "(randn_tensor(x.shape) for",
        "tests/test_reflected_point.py -k randomness",
    ),
    Mutation("scaled flow", "* v / a - rate * z", "* v / a", "tests/test_likelihood.py"),
    Mutation("ambient", "r * x + (1 - r) * denoised", "(1 - r) * x + r * denoised", "tests/test_losses.py -k ambient"),
    Mutation("ambient, level", "(data_noise / sigma) ** 2", "data_noise / sigma", "tests/test_losses.py -k ambient"),
    Mutation("ambient, weight", "(1 - r).clamp(min=LEAST)", "r.clamp(min=LEAST)", "tests/test_losses.py -k ambient"),
    Mutation(
        "copies, levels", "data_noise * ratio ** (i + 1)", "data_noise * ratio ** (i + 2)", "tests/test_noisy_images.py"
    ),
    Mutation("copies, variance", "copies.var(0).mean() / clean", "copies.var(0).mean()", "tests/test_noisy_images.py"),
    Mutation("levels above", "tau = 0.8 * data_noise", "tau = 1.2 * data_noise", "tests/test_noisy_images.py -k half"),
    Mutation(
        "levels, clean", "torch.where(data_noise > 0,", "torch.where(data_noise < 0,", "tests/test_noisy_images.py"
    ),
    Mutation(
        "end of the sampler",
        'changed |= {"timestep_spacing": "leading"',
        'changed |= {"x": "leading"',
        "tests/test_noisy_images.py -k lowest",
    ),
    Mutation(
        "betas above", "sigmas > sigma_min]])", "sigmas > 2 * sigma_min]])", "tests/test_noisy_images.py -k lowest"
    ),
    Mutation(
        "held-out noise",
        "(level**2 - noise**2).sqrt()",
        "(level**2 + noise**2).sqrt()",
        "tests/test_noisy_images.py -k held",
    ),
    Mutation("noise of the details", "TOLERATED * said", "0 * said", "tests/test_noisy_images.py -k not_there"),
    Mutation(
        "loss of captions", '("images", "labels", "captions", ', '("images", "labels", ', "tests/test_captions.py"
    ),
    Mutation(
        "law for likelihood",
        "rand_like(sigma, generator) < 0.5",
        "rand_like(sigma, generator) < 0.9",
        "tests/test_train_reflected.py -k law",
    ),
    Mutation("losses, gradient", "r_1 = denoiser(x_1, s", "r_1 = denoiser(x_2, s", "tests/test_losses.py -k gradient"),
    Mutation("losses, adversarial", "r1_weight / 2 * r1", "r1_weight * r1", "tests/test_losses.py -k r1"),
    Mutation(
        "discriminator",
        "(groups.var(1, correction=0)",
        "(groups.var(1, correction=1)",
        "tests/test_discriminator.py -k deviation",
    ),
    Mutation(
        "likelihood",
        "(tau_max / sigma_max) ** 2 / 2 *",
        "(tau_max / sigma_max) ** 2 *",
        "tests/test_likelihood.py -k prior_of_the_bound",
    ),
    Mutation("metrics", "(len(x) * (len(x) - 1))", "len(x) ** 2", "tests/test_metrics.py -k kernel"),
    Mutation(
        "extractors",
        "(a - b - c + d) / 2",
        "(a - b + c - d) / 2",
        "tests/test_extractors.py -k pixel",
    ),
    Mutation(
        "moments of bridges",
        "sqrt(self.count * m / n) * shift[None]",
        "sqrt(m / n) * shift[None]",
        "tests/test_bridge.py -k 'incremental or moments'",
    ),
    Mutation(
        "calibration",
        "torch.tensor([guidance_scale, 1 - guidance_scale])",
        "torch.tensor([guidance_scale, guidance_scale - 1])",
        "tests/test_calibration.py tests/test_scheduling_calibrated.py -k guid",
    ),
    Mutation(
        "mean error",
        '(f"{kind}squared_norm", norm - floor)',
        '(f"{kind}squared_norm", norm)',
        "tests/test_mean_error.py -k norm_has_no_bias",
    ),
    Mutation(
        "calibrated schedulers",
        "return position if 0 <= position < len(times)",
        "return position - 1 if 0 <= position < len(times)",
        "tests/test_scheduling_calibrated.py -k 'each_step and DDIM'",
    ),
    Mutation(
        "the argument of a step", ".index(name) - 2", ".index(name) - 1", "tests/test_scheduling_calibrated.py -k CogV"
    ),
    Mutation(
        "short-time tables",
        "getattr(self, name)[: len(self._short.sigmas)]",
        "getattr(self, name)[: len(self._short.sigmas) + 1]",
        "tests/test_scheduling_short_time.py -k first_timesteps",
    ),
    Mutation(
        "settings of short times",
        "if self._whole_config is not whole:",
        "if self._whole_config is None:",
        "tests/test_scheduling_short_time.py -k pipeline_changes",
    ),
    Mutation(
        "short-time schedulers",
        "self._start_scale = (1 + self._short.sigma_max**2) ** 0.5",
        "self._start_scale = 1 + self._short.sigma_max",
        "tests/test_scheduling_short_time.py -k 'start_of_euler or EulerDiscrete'",
    ),
    Mutation(
        "reflected schedulers",
        "v = -2 * sigma * dsigma_dr(sigma) * h",
        "v = -sigma * dsigma_dr(sigma) * h",
        "tests/test_scheduling_reflected.py -k by_hand",
    ),
    Mutation(
        "pipelines",
        "output = null + guidance_scale * (output - null)",
        "output = output + guidance_scale * (output - null)",
        "tests/test_pipelines.py -k guidance",
    ),
    Mutation(
        "per channel",
        "e.mean(axes, keepdim=True) * prod(e.shape[axis] for axis in axes) ** 0.5",
        "e.mean(axes, keepdim=True) * prod(e.shape[axis] for axis in axes)",
        "tests/test_per_channel.py",
    ),
    Mutation(
        "size of the samples",
        "per, self._shape = self.calibration.per_for(shape), shape",
        "per, self._shape = self.calibration.config.per, shape",
        "tests/test_per_channel.py",
    ),
    Mutation(
        "axes of the positions",
        "return (0,) if len(shape) == 2 else",
        "return (1,) if len(shape) == 2 else",
        "tests/test_per_channel.py",
    ),
    Mutation(
        "share of the micro-batches",
        "return slice(rows if drawn else 0), 1 / chance",
        "return slice(rows if drawn else 0), 1.0",
        "tests/test_train_text.py -k weight_that_keeps",
    ),
    Mutation(
        "latents of text-to-image",
        '(latents - (config.get("shift_factor") or 0.0))',
        '(latents + (config.get("shift_factor") or 0.0))',
        "tests/test_text_subjects.py -k decodes",
    ),
    Mutation(
        "generator of the latents",
        'DiagonalGaussianDistribution(law["moments"]).sample(generator)',
        'DiagonalGaussianDistribution(law["moments"]).sample()',
        "tests/test_text_subjects.py -k generator",
    ),
    Mutation(
        "generator of the levels",
        "mode_scale=scale, device=device, generator=generator",
        "mode_scale=scale, device=device",
        "tests/test_levels.py -k generator",
    ),
    Mutation(
        "other weights",
        "ROUNDING, SMALLEST = 2.0**-8, 2.0**-24",
        "ROUNDING, SMALLEST = 2.0**-4, 2.0**-24",
        "tests/test_weights.py -k named",
    ),
    Mutation(
        "null condition",
        "return each_tensor(torch.zeros_like, condition) if zero else condition",
        "return condition",
        "tests/test_text_subjects.py -k null_condition",
    ),
    Mutation(
        "short-time text",
        "latents = draw_start(self.bridge, batch_size, generator).to(device, dtype)",
        "latents = draw_start(self.bridge, batch_size, generator).to(device, dtype) / self.scheduler.init_noise_sigma",
        "tests/test_short_time_text.py -k stock_pipeline",
    ),
    Mutation(
        "variance",
        "torch.cat([output, variance[: len(output)]], 1)",
        "torch.cat([output, variance[-len(output) :]], 1)",
        "tests/test_pipelines.py -k variance",
    ),
    Mutation(
        "data",
        "self.seeds.generator(Stream.AUGMENTATION, s)",
        "self.seeds.generator(Stream.AUGMENTATION)",
        "tests/test_data.py",
    ),
    Mutation(
        "resuming",
        "moments[name] = spread_like(value, parameters[i])",
        "moments[name] = spread_like(0 * value, parameters[i])",
        "tests/test_loop.py -k 'stopped_run_goes_on and plain'",
    ),
    Mutation(
        "loop",
        "first = self.step * accumulate * world",
        "first = self.step * world",
        "tests/test_loop.py -k 'stopped_run_goes_on and accumulation'",
    ),
    Mutation(
        "evaluation",
        "chosen, floor = _halves(held_out)",
        "chosen, floor = held_out, held_out",
        "tests/test_evaluate_script.py -k halves",
    ),
    Mutation(
        "reports",
        "half = (value.high - value.low) / 2",
        "half = value.high - value.low",
        "tests/test_evaluation_report.py -k 'interval or digits'",
    ),
    Mutation(
        "log",
        "seconds = max(now - self._since - self._elsewhere, 1e-9)",
        "seconds = max(now - self._since, 1e-9)",
        "tests/test_trackers.py",
    ),
    Mutation(
        "log",
        "self._middles = ((edges[1:] + edges[:-1]) / 2).exp().tolist()",
        "self._middles = ((edges[1:] + edges[:-1]) / 2).exp().flip(0).tolist()",
        "tests/test_trackers.py -k named",
    ),
    Mutation(
        "levels",
        "relative=self.sigma_width_relative, generator=generator)",
        "relative=self.sigma_width_relative)",
        "tests/test_levels.py -k lower",
    ),
    Mutation(
        "losses",
        "weight = model.output_weight(torch.as_tensor(sigma, device=x.device))",
        "weight = 1.0",
        "tests/test_losses.py -k own_output",
    ),
    Mutation(
        "sample_pictures",
        "rows.append(real[:columns] / 2 + 0.5)",
        "rows.append(real[:columns] + 0.5)",
        "tests/test_evaluation_function.py -k pictures",
    ),
    Mutation(
        "tables",
        'return "better" if change.high < 0 else "worse" if change.low > 0 else "open"',
        'return "better" if change.estimate < 0 else "worse" if change.low > 0 else "open"',
        "tests/test_evaluation_report.py -k verdict",
    ),
    Mutation(
        "moments",
        "return self._laws[shrink]",
        "return [moments.law(self.rank, not shrink) for moments in self.classes]",
        "tests/test_bridge.py -k 'moments or shrinkage'",
    ),
    Mutation(
        "build",
        "if (its_size and resolution != size) or",
        "if (its_size and resolution == size) or",
        "tests/test_train_consistency.py -k preset",
    ),
    Mutation(
        "checkpoints",
        'rows.permute(*(order.index(axis) for axis in "jhd"), 3)',
        'rows.permute(*(order.index(axis) for axis in "jdh"), 3)',
        "tests/test_checkpoints.py -k answers",
    ),
    Mutation(
        "checkpoints",
        "label_table(weights, sqrt(classes) if song else 1.0, dropout)",
        "label_table(weights, 1.0, dropout)",
        "tests/test_checkpoints.py -k answers",
    ),
    Mutation(
        "checkpoints",
        'weights[f"conv_out.{kind}"] = -weights[f"conv_out.{kind}"]',
        'weights[f"conv_out.{kind}"] = weights[f"conv_out.{kind}"]',
        "tests/test_checkpoints.py -k reflected",
    ),
    Mutation(
        "checkpoints",
        '"time_offset": log(low) - shift',
        '"time_offset": log(low) + shift',
        "tests/test_checkpoints.py -k reflected",
    ),
    Mutation(
        "checkpoints",
        "/ (N - 1)).clamp(min=LEAST_TIME)",
        "/ N).clamp(min=LEAST_TIME)",
        "tests/test_checkpoints.py -k preserving",
    ),
    Mutation(
        "checkpoints",
        "return model | dict(zip(names, average, strict=True))",
        "return model",
        "tests/test_checkpoints.py -k 'answers or exploding'",
    ),
    Mutation(
        "checkpoints",
        'map_location="cpu", weights_only=True, **options',
        'map_location="cpu", weights_only=False, **options',
        "tests/test_checkpoints.py -k 'function or content'",
    ),
    Mutation(
        "checkpoints",
        "if value.numel() * value.itemsize > value.untyped_storage().nbytes():",
        "if False:",
        "tests/test_checkpoints.py -k memory",
    ),
    Mutation(
        "checkpoints",
        "if text not in self.names:",
        "if False:",
        "tests/test_checkpoints.py -k function",
    ),
    Mutation(
        "score_unet",
        "4 * time - log(2), class_labels)",
        "4 * time + log(2), class_labels)",
        "tests/test_checkpoints.py -k exploding",
    ),
    Mutation(
        "score_unet",
        "pyramid = x = (x + self.input_pyramid[i](pyramid)) / sqrt(2)",
        "x = (x + self.input_pyramid[i](pyramid)) / sqrt(2)",
        "tests/test_checkpoints.py -k 'answers or exploding or reflected'",
    ),
    Mutation(
        "score_unet",
        "module.num_groups = min(32, module.num_channels // config.norm_group_size)",
        "module.num_groups = min(32, module.num_channels // 8)",
        "tests/test_checkpoints.py -k answers",
    ),
    Mutation(
        "score_unet",
        "block.resnets[i].in_channels - block_out_channels[0] + first_channels",
        "block.resnets[i].in_channels",
        "tests/test_checkpoints.py -k published",
    ),
    Mutation(
        "checkpoints",
        "if compressed:",
        "if False:",
        "tests/test_checkpoints.py -k memory",
    ),
]


def place_of(snippet: str) -> Path:
    """The file of the package in which it stands."""
    found = [(f, n) for f in sorted((ROOT / "diffusers_ext").rglob("*.py")) if (n := f.read_text().count(snippet))]
    if [n for _, n in found] != [1]:
        raise SystemExit(f"the snippet must stand once in the package, found in {found}: {snippet}")
    return found[0][0].relative_to(ROOT)


def survives(mutation: Mutation) -> bool:
    """Whether the tests pass all the same; that none of them fails otherwise is for the test suite to say."""
    place = place_of(mutation.snippet)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "demo", "build"))
        (copy / place).write_text((copy / place).read_text().replace(mutation.snippet, mutation.instead))
        command = f"{sys.executable} -m pytest -q -x -p no:cacheprovider -p no:xdist {mutation.tests}"
        environment = os.environ | {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, shell=True, cwd=copy, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # 1: tests failed
        raise SystemExit(f"{mutation.part}: pytest ended with status {done.returncode}\n{done.stdout}{done.stderr}")
    last = done.stdout.strip().splitlines()[-1]
    print(f"{'SURVIVES' if done.returncode == 0 else 'red'}: {mutation.part}, {place}: {last}", flush=True)
    return done.returncode == 0


def main() -> None:
    for mutation in MUTATIONS:
        place_of(mutation.snippet)
    chosen = [MUTATIONS[int(number) - 1] for number in sys.argv[1:]] or MUTATIONS
    alive = [mutation.part for mutation in chosen if survives(mutation)]
    print(f"{len(chosen) - len(alive)} of {len(chosen)} mutations are seen; not: {', '.join(alive) or 'none'}")
    sys.exit(bool(alive))


if __name__ == "__main__":
    main()
