r"""Quality, likelihood and cost of diffusers pipelines, side by side: does this help my model?

    diffusers-ext evaluate --pretrained_model_name_or_path google/ddpm-cifar10-32 you/ddpm-tuned \
        --dataset_name uoft-cs/cifar10 --schedulers DDIM,DPMSolverMultistep --nfe 5,10,20,50 --output_dir evaluation

Every model draws from the same noise. Distances are corrected for their bias and have intervals; the distance that real
images have is shown beside them. `output_dir` holds results.json, results.csv, table.md, plots, sample grids, and all
of it in one file, index.html. An evaluation that was stopped, or is repeated with more models, schedulers, steps or
samples, draws only what is missing. From Python: `diffusers_ext.evaluation.evaluate`.
"""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from ..data.columns import NONE
from ..data.prompts import read_prompts
from ..data.sources import HubStream, load_images
from ..errors import InputError, command
from ..evaluation import (
    Evaluation,
    EvaluationArguments,
    evaluate,
    load_real_images,
    markdown_table,
    push_model_index,
    write_model_index,
    write_report,
)
from ..fields import arg
from ..files import is_local
from ..reports.card import command_line, shown_command
from ..reports.hub import HubPusher
from ..subjects import load_lora, load_pipeline
from ..training.environment import end_run, make_accelerator
from .parsing import parse_arguments


@dataclass
class ModelArguments(EvaluationArguments):
    """Arguments that say which models are compared, how they are sampled and measured, and where the results go."""

    pretrained_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Pipelines (Hub names or folders), the baseline first."}
    )
    names: list[str] = field(
        default_factory=list, metadata={"help": "What to call them; by default the last part of each."}
    )
    lora_weights: list[str] = field(
        default_factory=list, metadata={"help": f"For each pipeline a LoRA (Hub name or folder), or {NONE}."}
    )
    prompt_file: str | None = arg(
        None, "Text-to-image: file of the prompts, one in a line; by default the captions of the data."
    )
    revision: str | None = arg(None, "Git revision of the pipelines.")
    variant: str | None = arg(None, "Weights variant of the pipelines, e.g. fp16.")
    torch_dtype: Literal["float32", "float16", "bfloat16"] = arg("float32", "Precision of the networks that draw.")
    output_dir: str = arg("evaluation", "Folder of the results and of the images that were drawn.")
    push_to_hub: bool = arg(False, "Write the results into the model cards (model-index) of the pipelines on the Hub.")
    hub_token: str | None = arg(None, "By default the token that `hf auth login` has stored.")

    def __post_init__(self) -> None:
        super().__post_init__()
        models, names = self.pretrained_model_name_or_path, self.names
        if not models:
            raise InputError("name the models: --pretrained_model_name_or_path A B ...")
        if (loras := len(self.lora_weights)) not in (0, len(models)):
            raise InputError(f"--lora_weights has {loras} for {len(models)} pipelines: one for each of them, or {NONE}")
        places = [[str(Path(part).resolve()) if is_local(part) else part for part in pair] for pair in self.parts]
        if twice := [" with ".join(pair) for i, pair in enumerate(self.parts) if places[i] in places[:i]]:
            raise InputError(f"--pretrained_model_name_or_path names the same model twice: {', '.join(twice)}")
        if not names:
            own = [pair[-1] for pair in self.parts]
            lasts = [Path(name.rstrip("/")).name for name in own]
            self.names = next(
                names
                for names in (lasts, own, [" with ".join(pair) for pair in self.parts])
                if len(set(names)) == len(names)
            )
        elif len(names) != len(models) or len(set(names)) != len(names):
            raise InputError(f"--names must be {len(models)} different names, one for each model, got {names}")

    @property
    def parts(self) -> list[list[str]]:
        """The Hub name or folder of each pipeline, and that of its LoRA, if it has one."""
        models = self.pretrained_model_name_or_path
        loras = self.lora_weights or [NONE] * len(models)
        return [[model] if lora == NONE else [model, lora] for model, lora in zip(models, loras, strict=True)]

    @property
    def models(self) -> dict[str, str]:
        """The Hub name or folder of what was trained, the LoRA if there is one, by the model's name."""
        return {name: pair[-1] for name, pair in zip(self.names, self.parts, strict=True)}


def load(args: ModelArguments, path: str, lora: str | None = None) -> Any:
    dtype = getattr(torch, args.torch_dtype)
    pipeline = load_pipeline(path, args.revision, args.variant, args.cache_dir, dtype)
    if lora is not None:
        load_lora(pipeline, lora, args.cache_dir)
    return pipeline


def prompts(args: ModelArguments) -> list[str] | None:
    if args.prompt_file is not None:
        return read_prompts(args.prompt_file, "prompt_file")
    if args.caption_column is None:
        return None
    source = load_images(args, args.train_split)
    if isinstance(source, HubStream):
        raise InputError("--caption_column needs data that are not streamed")
    return list(source.captions or [])


def publish(args: ModelArguments, evaluation: Evaluation) -> list[str]:
    """Write the results into the models' cards; return a message for each that failed."""
    failures = []
    for name, path in args.models.items():
        try:
            if Path(path).is_dir():
                write_model_index(evaluation, name, Path(path) / "README.md")
                print(f"the card in {path} has the results; it is not on the Hub: hf upload USER/NAME {path}")
                continue
            push_model_index(evaluation, name, path, args.hub_token, args.output_dir)
        except (OSError, RuntimeError, ValueError) as error:
            failures.append(str(error))
    return failures


@command
def main() -> None:
    args = parse_arguments(ModelArguments)
    accelerator = make_accelerator()
    if (
        args.push_to_hub
        and accelerator.is_main_process
        and not all(Path(path).is_dir() for path in args.models.values())
    ):
        HubPusher(None, Path(args.output_dir), private=None, token=args.hub_token).require_login()
    evaluation = evaluate(
        {name: load(args, *pair).to(accelerator.device) for name, pair in zip(args.names, args.parts, strict=True)},
        partial(load_real_images, args, say=accelerator.print),
        args.output_dir,
        **args.options(),
        prompts=prompts(args),
        sources=args.models,
        accelerator=accelerator,
        command=shown_command(command_line()),
    )
    failures: list[str] = []
    if accelerator.is_main_process:
        write_report(evaluation, args.output_dir)
        page = Path(args.output_dir) / "index.html"
        print(f"{markdown_table(evaluation)}\nall of it, with pictures: {page}")
        failures = publish(args, evaluation) if args.push_to_hub else []
    end_run(accelerator, "\n".join(failures) or None)


if __name__ == "__main__":
    main()
