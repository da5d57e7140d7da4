r"""Make a diffusers pipeline of a checkpoint of EDM, ADM (guided-diffusion), score_sde or Reflected-Diffusion.

    diffusers-ext convert edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10 --license cc-by-nc-sa-4.0
    diffusers-ext convert 64x64_diffusion.pt --resolution 64 --beta_schedule cosine \
        --attention_head_dim 64 --new_attention_order --output_dir adm-imagenet-64 --license mit
    diffusers-ext convert checkpoint_26.pth --sde vp --resolution 32 --output_dir ddpmpp-cifar10

The kind of file is recognised by its content, and nothing of the file is executed. What each needs:

    EDM                    nothing: the file says all of its model
    ADM, guided-diffusion  --resolution, --beta_schedule, and --attention_head_dim or --num_attention_heads
    score_sde              --resolution; of vp models --sde
    Reflected-Diffusion    --resolution; of ImageNet 64 --sigma_min and --sigma_max

All commands then take `--pretrained_model_name_or_path edm-cifar10`.
"""

import hashlib
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..checkpoints import Converted, convert_checkpoint
from ..errors import InputError, command
from ..fields import arg
from ..files import holds_result, remove_partial, replacing_files, shown
from ..reports.card import command_line, loading_section, save_card, shown_command
from ..reports.hub import HubArguments, make_pusher, push_and_wait
from ..subjects import subject_of
from ..training.environment import end_run, make_accelerator
from ..training.lock import RunLock
from .parsing import parse_arguments


@dataclass
class ConvertArguments(HubArguments):
    """Arguments that name the file, say what it does not say of its model, and where the pipeline goes."""

    named: ClassVar = "file"

    config: str | None = arg(None, "YAML file of arguments.")
    file: str | None = arg(None, "The checkpoint; `convert FILE ...` is the same.")
    resolution: int | None = arg(None, "All but EDM: height and width of the images.", at_least=1)
    beta_schedule: Literal["linear", "cosine", "squaredcos_cap_v2"] | None = arg(
        None, "ADM: its noise_schedule; squaredcos_cap_v2 is diffusers' name of cosine."
    )
    attention_head_dim: int | None = arg(None, "ADM: its num_head_channels.", at_least=1)
    num_attention_heads: int | None = arg(None, "ADM: its num_heads, where it has no num_head_channels.", at_least=1)
    new_attention_order: bool = arg(False, "ADM: it was trained with use_new_attention_order.")
    sde: Literal["vp", "ddpm", "ve", "reflected"] | None = arg(
        None, "score_sde: vp if its configuration has training.continuous = True, ddpm if False; ve is recognised."
    )
    sigma_min: float | None = arg(
        None, "ve, reflected: least noise, of data in [0, 1]; by default the file's.", above=0
    )
    sigma_max: float | None = arg(None, "ve, reflected: most noise, likewise.", above=0)
    fir: bool = arg(False, "score_sde, DDPM++: its configuration has fir = True (those that are published have False).")
    beta_min: float | None = arg(None, "vp: beta at time 0, by default 0.1.", above=0)
    beta_max: float | None = arg(None, "vp: beta at time 1, by default 20.", above=0)
    source: str | None = arg(None, "Where the file comes from, for the card: an address, or words.")
    output_dir: str = arg("pipeline", "Folder of the pipeline.")

    @property
    def told(self) -> dict[str, Any]:
        """What is told about the model, as arguments of `convert_checkpoint`."""
        own = ("resolution", "beta_schedule", "attention_head_dim", "num_attention_heads", "sde")
        values = {name: getattr(self, name) for name in (*own, "sigma_min", "sigma_max", "beta_min", "beta_max")}
        return values | {"new_attention_order": self.new_attention_order or None, "fir": self.fir or None}


def save(args: ConvertArguments, converted: Converted, name: str) -> None:
    """Write the pipeline and its card into the output folder."""
    out, pipeline = Path(args.output_dir), converted.pipeline
    if holds_result(out):
        print(f"the pipeline that was in {out} is replaced")
    remove_partial(out)
    with replacing_files(out) as aside:
        pipeline.save_pretrained(aside)
    subject, file = subject_of(pipeline), Path(str(args.file)).name
    digest = hashlib.sha256()
    with open(str(args.file), "rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    origin = "" if args.source is None else f" from {shown(args.source)}"
    owner = "see their source" if args.license is None else f"{args.license}, as whoever converted them says"
    drawn = {key: value for key, value in subject.call(4).items() if key != "guidance_scale"}
    call = ", ".join(f"{key}={value}" for key, value in drawn.items())
    parts = [
        f"Converted from `{file}`{origin}, SHA-256 {digest.hexdigest()}. Licence of the weights: {owner}.",
        *converted.sentences(),
        loading_section(name, type(pipeline).__name__, subject.needs_package, {}, None),
        f"```python\nimages = pipe({call}, num_inference_steps=50).images\n```",
        f"## How it was made\n\n```bash\n{shown_command(command_line())}\n```",
    ]
    save_card(out, name, parts, asdict(args), [f"diffusers:{type(pipeline).__name__}", "image-generation"])


@command
def main() -> None:
    args = parse_arguments(ConvertArguments)
    if args.file is None:
        raise InputError("name the file: convert FILE --output_dir pipeline")
    accelerator, out = make_accelerator(), Path(args.output_dir)
    pusher = make_pusher(args, out, accelerator.is_main_process)
    if accelerator.is_main_process:
        converted = convert_checkpoint(args.file, **args.told)
        with RunLock(out):
            save(args, converted, out.name if pusher is None else pusher.repo_id)
        print("\n".join(converted.sentences()))
        folder = shlex.quote(str(out))
        print(
            f"the pipeline is in {out}\n"
            f"  open it:   DiffusionPipeline.from_pretrained({str(out)!r}); the card has an example\n"
            f"  judge it:  diffusers-ext evaluate --pretrained_model_name_or_path {folder} --train_data_dir IMAGES"
        )
    end_run(accelerator, push_and_wait(pusher, out, "pipeline", args.hub_timeout))


if __name__ == "__main__":
    main()
