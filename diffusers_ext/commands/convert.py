r"""Make a diffusers pipeline of a checkpoint of EDM, ADM (guided-diffusion), score_sde or Reflected-Diffusion.

    diffusers-ext convert edm-cifar10-32x32-uncond-vp.pkl --output_dir edm-cifar10 --license cc-by-nc-sa-4.0
    diffusers-ext convert 64x64_diffusion.pt --resolution 64 --beta_schedule squaredcos_cap_v2 \
        --attention_head_dim 64 --new_attention_order --output_dir adm-imagenet-64 --license mit
    diffusers-ext convert checkpoint_26.pth --sde vp --resolution 32 --output_dir ddpmpp-cifar10

The kind of file is recognised by its content, and nothing of the file is executed. A file of EDM says all of its model;
what others do not say is asked for. All commands then take `--pretrained_model_name_or_path edm-cifar10`.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from ..checkpoints import Converted, convert_checkpoint
from ..errors import InputError, command
from ..fields import arg
from ..files import remove_partial, replacing_files, shown
from ..reports.card import command_line, loading_section, save_card, shown_command
from ..reports.hub import HubArguments, make_pusher
from ..subjects import subject_of
from ..training.environment import end_run, make_accelerator
from .parsing import parse_arguments


@dataclass
class ConvertArguments(HubArguments):
    """Arguments that name the file, say what it does not say of its model, and where the pipeline goes."""

    first: ClassVar = "file"

    config: str | None = arg(None, "YAML file of arguments.")
    file: str | None = arg(None, "The checkpoint; `convert FILE ...` is the same.")
    resolution: int | None = arg(None, "ADM, score_sde: height and width of the images.", at_least=1)
    beta_schedule: Literal["linear", "squaredcos_cap_v2"] | None = arg(
        None, "ADM: its noise levels; squaredcos_cap_v2 is what it calls cosine."
    )
    attention_head_dim: int | None = arg(None, "ADM: channels of a head (num_head_channels).", at_least=1)
    num_attention_heads: int | None = arg(None, "ADM: heads of each attention, instead (num_heads).", at_least=1)
    new_attention_order: bool = arg(False, "ADM: it was trained with use_new_attention_order.")
    sde: Literal["vp", "ddpm", "ve", "reflected"] | None = arg(
        None, "score_sde: the process; vp is that of continuous times, ddpm that of 1000 discrete ones."
    )
    sigma_min: float | None = arg(
        None, "ve, reflected: least noise, of data in [0, 1]; by default the file's.", above=0
    )
    sigma_max: float | None = arg(None, "ve, reflected: most noise, likewise.", above=0)
    fir: bool = arg(False, "score_sde: fir in its configuration, where the network has no pyramid of the input.")
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
    remove_partial(out)
    with replacing_files(out) as aside:
        pipeline.save_pretrained(aside)
    subject, file = subject_of(pipeline), Path(str(args.file)).name
    origin = "" if args.source is None else f" from {shown(args.source)}"
    owner = "not said here (--license)" if args.license is None else f"as its owner states it, {args.license}"
    parts = [
        f"Converted from `{file}`{origin}. Licence of the weights: {owner}.",
        *converted.sentences(),
        loading_section(name, type(pipeline).__name__, subject.needs_package, {}, None),
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
    failure = None
    if accelerator.is_main_process:
        converted = convert_checkpoint(args.file, **args.told)
        save(args, converted, out.name if pusher is None else pusher.repo_id)
        print("\n".join(converted.sentences()))
        print(
            f"The pipeline is in {out}. Next, with your data:\n"
            f"  diffusers-ext evaluate --pretrained_model_name_or_path {out} --train_data_dir IMAGES"
        )
        if pusher is not None:
            pusher.push(out, "pipeline")
            failure = pusher.finish(args.hub_timeout)
    end_run(accelerator, failure)


if __name__ == "__main__":
    main()
