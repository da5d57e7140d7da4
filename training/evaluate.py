"""Quality, likelihood and cost of diffusers pipelines, side by side: does this help my model?

    accelerate launch training/evaluate.py --pretrained_model_name_or_path google/ddpm-cifar10-32 you/ddpm-tuned \
        --dataset_name uoft-cs/cifar10 --schedulers DDIM,DPMSolverMultistep --nfe 5,10,20,50 --output_dir evaluation

Every model draws from the same noise. Distances are corrected for their bias and have intervals; the distance that real
images have is shown beside them. `output_dir` holds results.json, results.csv, table.md, plots, sample grids, and all
of it in one file, index.html. An evaluation that was stopped, or is repeated with more models, schedulers, steps or
samples, draws only what is missing. `--help` lists every argument. From Python: `diffusers_ext.evaluation.evaluate`.
"""

import shlex
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from diffusers_ext.commands import parse_arguments
from diffusers_ext.data.sources import HubStream, load_images
from diffusers_ext.errors import NOT_PUSHED, InputError, TrainingStopped, command
from diffusers_ext.evaluation import (
    Evaluation,
    EvaluationArguments,
    evaluate,
    load_real_images,
    markdown_table,
    push_model_index,
    write_model_index,
    write_report,
)
from diffusers_ext.fields import arg
from diffusers_ext.files import is_local
from diffusers_ext.reports.card import shown_command
from diffusers_ext.subjects import load_pipeline
from diffusers_ext.training.environment import make_accelerator


@dataclass
class ModelArguments(EvaluationArguments):
    """Arguments that say which models are compared, how they are sampled and measured, and where the results go."""

    pretrained_model_name_or_path: list[str] = field(
        default_factory=list, metadata={"help": "Pipelines (Hub names or folders), the baseline first."}
    )
    names: list[str] = field(
        default_factory=list, metadata={"help": "What to call them; by default the last part of each."}
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
        places = [str(Path(model).resolve()) if is_local(model) else model for model in models]
        if twice := [model for i, model in enumerate(models) if places[i] in places[:i]]:
            raise InputError(f"--pretrained_model_name_or_path names the same model twice: {', '.join(twice)}")
        if not names:
            lasts = [Path(model.rstrip("/")).name for model in models]
            self.names = lasts if len(set(lasts)) == len(lasts) else list(models)
        elif len(names) != len(models) or len(set(names)) != len(names):
            raise InputError(f"--names must be {len(models)} different names, one for each model, got {names}")

    @property
    def models(self) -> dict[str, str]:
        """The Hub name or folder of each model, by the model's name."""
        return dict(zip(self.names, self.pretrained_model_name_or_path, strict=True))


def load(args: ModelArguments, path: str, device: torch.device) -> Any:
    dtype = getattr(torch, args.torch_dtype)
    return load_pipeline(path, args.revision, args.variant, args.cache_dir, dtype).to(device)


def captions(args: ModelArguments) -> list[str] | None:
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
    evaluation = evaluate(
        {name: load(args, path, accelerator.device) for name, path in args.models.items()},
        partial(load_real_images, args, say=accelerator.print),
        args.output_dir,
        **args.options(),
        prompts=captions(args),
        accelerator=accelerator,
        command=shown_command(f"accelerate launch {shlex.join(sys.argv)}"),
    )
    failures: list[str] = []
    if accelerator.is_main_process:
        write_report(evaluation, args.output_dir)
        page = Path(args.output_dir) / "index.html"
        print(f"{markdown_table(evaluation)}\nall of it, with pictures: {page}")
        failures = publish(args, evaluation) if args.push_to_hub else []
    accelerator.wait_for_everyone()
    accelerator.end_training()
    if failures:
        raise TrainingStopped("\n".join(failures), code=NOT_PUSHED)


if __name__ == "__main__":
    main()
