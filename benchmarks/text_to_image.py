"""Train a small text-to-image model from nothing, then LoRAs of it, by the training scripts; pictures and a table.

    python benchmarks/text_to_image.py --cifar10 FOLDER --autoencoder FOLDER [--minutes 10] [--docs docs]

Nothing is downloaded: FOLDER are CIFAR-10 as `datasets` loads it (columns `image`, `label`), and the tiny autoencoder
of Stable Diffusion (`AutoencoderTiny`, TAESD). The images are enlarged to 64 pixels, latents are 4 x 8 x 8, and the
caption of an image is "a photo of a <class>". The pipeline is a `StableDiffusionPipeline`: a small UNet and a small
text encoder, both with random weights; the latter stays so: its embeddings are no more than names of the classes.

It is trained for `--minutes`, fully, by plain denoising; then LoRAs of rank 8 on two classes for a quarter of its
steps: one by each loss, and one by plain denoising. Pictures have equal seeds before and after. The table is that of
training/evaluate.py, for the captions of the two classes, with classifier-free guidance of 3 and 25 steps of DDIM.
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from bench import flags
from datasets import ClassLabel, load_dataset
from diffusers import AutoencoderTiny, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from trained import ROOT, train
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_ext.reports.pictures import image_grid

SIDE, LENGTH, WIDTH, SEED, IMAGES = 64, 16, 64, 0, 10_000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
PAIR = ("airplane", "ship")
RECIPES = {
    "plain": ("train_consistency.py", "--consistency_weight 0"),
    "consistency": ("train_consistency.py", "--consistency_weight 1"),
    "observation": ("train_observation.py", "--observation_weight 0.005 --frechet_samples 0 --validation_steps 100000"),
}


def prompt(name: str) -> str:
    return f"a photo of a {name}"


def random_pipeline(autoencoder: str) -> StableDiffusionPipeline:
    """A small pipeline with random weights beside the real autoencoder; its tokenizer knows the captions' words."""
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{w}</w>" for w in ("a", "photo", "of", *CLASSES))]
    letters = sorted({c for w in ("photo", "of", *CLASSES) for c in w})
    merges, pieces = [], set()
    for word in ("photo", "of", *CLASSES):
        left = [*word[:-1], f"{word[-1]}</w>"]
        while len(left) > 1:
            merges.append((left[0], left[1]))
            left = [left[0] + left[1], *left[2:]]
            pieces.add(left[0])
    tokens = dict.fromkeys([*words, *letters, *(f"{c}</w>" for c in letters), *sorted(pieces)])
    tokenizer = CLIPTokenizer(
        {t: i for i, t in enumerate(tokens)}, list(dict.fromkeys(merges)), model_max_length=LENGTH
    )
    torch.manual_seed(SEED)
    text = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(tokens), hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        projection_dim=WIDTH, num_attention_heads=4, max_position_embeddings=LENGTH, bos_token_id=0, eos_token_id=1,
    ))  # fmt: skip
    unet = UNet2DConditionModel(
        sample_size=SIDE // 8, block_out_channels=(64, 128), layers_per_block=1, cross_attention_dim=WIDTH,
        attention_head_dim=16, norm_num_groups=16, down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", rescale_betas_zero_snr=False)
    return StableDiffusionPipeline(
        AutoencoderTiny.from_pretrained(autoencoder), text, tokenizer, unet, scheduler, None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def captioned(source: str, out: Path) -> tuple[Path, Path]:
    """Write the images with their captions: all of them, and those of the two classes."""
    rows = load_dataset(source, split="train")
    names = rows.features["label"].names if isinstance(rows.features["label"], ClassLabel) else CLASSES
    rows = rows.shuffle(seed=SEED).select(range(min(IMAGES, len(rows))))
    rows = rows.map(lambda row: {"text": prompt(names[row["label"]])})
    pair = rows.filter(lambda row: names[row["label"]] in PAIR)
    files = out / "all" / "train.parquet", out / "pair" / "train.parquet"
    for file, part in zip(files, (rows, pair), strict=True):
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part.select_columns(["image", "text"]).to_parquet(file)
    return files


def draw(pipe: DiffusionPipeline, prompts: list[str], n: int) -> np.ndarray:
    """n images of the prompts in turn, the same noise in every call."""
    pipe.set_progress_bar_config(disable=True)
    options = {"height": SIDE, "width": SIDE, "num_inference_steps": 25, "guidance_scale": 3.0, "output_type": "np"}
    texts = [prompts[i % len(prompts)] for i in range(n)]
    return pipe(texts, generator=torch.Generator().manual_seed(SEED), **options).images


def main() -> None:
    args: Namespace
    defaults = {"minutes": 10.0, "output_dir": "text-to-image", "docs": "docs", "samples": 300}
    args, more = flags(__doc__, rest=True, cifar10=str, autoencoder=str, **defaults)
    out = Path(args.output_dir)
    everything, pair = captioned(args.cifar10, out)
    if not (out / "random" / "model_index.json").exists():
        random_pipeline(args.autoencoder).save_pretrained(out / "random")
    common = ["--caption_column", "text", "--resolution", str(SIDE), "--num_validation_images", "8"]
    common += ["--center_crop", "--cache_latents", "--cache_dir", str(out / "cache")]
    common += ["--max_validation_samples", "64", "--report_to", "none", "--train_batch_size", "64", "--seed", str(SEED)]
    common += ["--mixed_precision", "no", "--logging_steps", "20", "--checkpointing_steps", "100", *more]
    full = ["--pretrained_model_name_or_path", str(out / "random"), "--dataset_name", str(everything)]
    full += ["--learning_rate", "5e-4", "--lr_warmup_steps", "50", "--lr_scheduler", "cosine", "--ema_decay", "0.995"]
    full += ["--proportion_empty_prompts", "0.1", "--consistency_weight", "0"]
    start = time.monotonic()
    steps = max(2, round(args.minutes * 60 / seconds_of_a_step(args, full + common, out)))
    base = train("train_consistency.py", out / "base", [*full, *common, "--max_train_steps", str(steps)])
    of_lora = ["--pretrained_model_name_or_path", str(base), "--dataset_name", str(pair), "--rank", "8"]
    of_lora += ["--learning_rate", "1e-3", "--lr_scheduler", "cosine", "--max_train_steps", str(max(2, steps // 4))]
    loras = [
        train(script, out / name, [*of_lora, "--no_use_ema", *options.split(), *common])
        for name, (script, options) in RECIPES.items()
    ]
    pipe, prompts = DiffusionPipeline.from_pretrained(base), [prompt(name) for name in PAIR]
    everyone, grids = draw(pipe, [prompt(name) for name in CLASSES], 20), [draw(pipe, prompts, 8)]
    for lora in loras:
        pipe.load_lora_weights(lora)
        grids.append(draw(pipe, prompts, 8))
        pipe.unload_lora_weights()
    docs = Path(args.docs)
    image_grid(everyone, columns=10).save(docs / "text_to_image.png")
    image_grid(np.concatenate(grids), columns=8).save(docs / "text_to_image_lora.png")
    models = ["--pretrained_model_name_or_path", *[str(base)] * 4, "--lora_weights", "none", *map(str, loras)]
    models += ["--names", "before", *(f"LoRA, {name}" for name in RECIPES), "--output_dir", str(out / "evaluation")]
    data = ["--dataset_name", str(pair), "--caption_column", "text", "--reference", "train", "--resolution", str(SIDE)]
    how = ["--extractor", "pixels", "--schedulers", "DDIM", "--nfe", "25", "--guidance_scale", "3"]
    how += ["--num_samples", str(args.samples), "--train_batch_size", "50", "--center_crop"]
    subprocess.run([sys.executable, str(ROOT / "training" / "evaluate.py"), *models, *data, *how], check=True)
    print(f"{steps} steps; {(time.monotonic() - start) / 60:.0f} minutes in all")


def seconds_of_a_step(args: Namespace, arguments: list[str], out: Path) -> float:
    """Of the full training, from a run of some steps."""
    log = train("train_consistency.py", out / "timed", [*arguments, "--max_train_steps", "40"]) / "logs" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return 64 / [line["images_per_second"] for line in lines if "images_per_second" in line][-1]


if __name__ == "__main__":
    sys.exit(main())
