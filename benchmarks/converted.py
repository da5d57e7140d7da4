"""Does a converted checkpoint draw what its authors report? Distances of samples, and the known figure beside them.

    python benchmarks/converted.py edm-cifar10-32x32-uncond-vp.pkl --output_dir edm --dataset_name uoft-cs/cifar10
    python benchmarks/converted.py 64x64_diffusion.pt --output_dir adm --train_data_dir imagenet64 --known 2.07 \
        --resolution 64 --beta_schedule squaredcos_cap_v2 --attention_head_dim 64 --new_attention_order

The file is converted by `convert_checkpoint`, told what `diffusers-ext convert` is told; other arguments are those of
`diffusers-ext evaluate`. A figure is an FID of 50,000 samples: comparable to `--extractor inception --num_samples 50000
--reference train` alone, and by the authors' own sampler and steps. Known by name are the files of EDM (arXiv
2206.00364, table 2: deterministic, 35 evaluations at 32 x 32, 79 at 64 x 64).
"""

import sys
from dataclasses import fields
from functools import partial
from pathlib import Path

from bench import DEVICE, flags, machine

from diffusers_ext import convert_checkpoint
from diffusers_ext.commands import parse_arguments
from diffusers_ext.commands.convert import ConvertArguments
from diffusers_ext.evaluation import EvaluationArguments, evaluate, load_real_images, markdown_table, write_report
from diffusers_ext.reports.hub import HubArguments

KNOWN = {
    f"edm-{data}-{kind}.pkl": fid
    for data, row in {
        "cifar10-32x32": {"uncond-vp": 1.97, "uncond-ve": 1.98, "cond-vp": 1.79, "cond-ve": 1.79},
        "ffhq-64x64": {"uncond-vp": 2.39, "uncond-ve": 2.53},
        "afhqv2-64x64": {"uncond-vp": 1.96, "uncond-ve": 2.16},
    }.items()
    for kind, fid in row.items()
}


def of_both(words: list[str]) -> tuple[list[str], list[str]]:
    """The words of `convert` and those of `evaluate`; --resolution is of both."""
    own = {f.name for f in fields(ConvertArguments)} - {f.name for f in fields(HubArguments)}
    convert: list[str] = []
    rest: list[str] = []
    for i in [i for i, word in enumerate(words) if word.startswith("--")]:
        group = [words[i], *(w for w in words[i + 1 : i + 2] if not w.startswith("--"))]
        name = group[0][2:].split("=")[0]
        convert += group if name in own else []
        rest += group if name not in own or name == "resolution" else []
    return convert, rest


def main() -> None:
    if sys.argv[1:2] and not sys.argv[1].startswith("-"):
        sys.argv.insert(1, "--file")
    args, words = flags(__doc__, rest=True, file=Path, output_dir=Path, known=None)
    convert, rest = of_both(words)
    converted = convert_checkpoint(args.file, **parse_arguments(ConvertArguments, convert).told)
    print("\n".join(converted.sentences()))
    measured = parse_arguments(EvaluationArguments, rest)
    pipeline, out = converted.pipeline.to(DEVICE), args.output_dir
    found = evaluate({args.file.stem: pipeline}, partial(load_real_images, measured), out, **measured.options())
    write_report(found, out)
    known = args.known or KNOWN.get(args.file.name, "not known here: --known")
    print(f"{markdown_table(found)}\nFID that the authors report: {known}. Machine: {machine()}")


if __name__ == "__main__":
    main()
