"""Can a model of clean images be trained from noisy ones? Digits with noise that is fixed and known, 16 x 16.

    python benchmarks/noisy_images.py --output_dir noisy-digits --noise 0.2 0.5

Writes the noisy images into output_dir, floating point (and, for the run that takes them as clean, 8 bits, which end at
black and white), trains each row of the table at equal cost, in passes of the network, and measures 1000 samples
against the clean images: distances of the features and of the pixels, and the standard deviation that is left in flat
regions. Writes noisy.png, a row of samples for each row of the table. `--only` trains and draws some rows.
"""

import csv
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch
from bench import flags
from claims import PLAIN, RECIPES, Lab, Recipe
from PIL import Image

from diffusers_ext.data.images import Transform
from diffusers_ext.data.sources import Digits
from diffusers_ext.files import replacing
from diffusers_ext.reports.card import table
from diffusers_ext.reports.pictures import image_grid

_ENDS = slice(3), slice(-3, None)
SIDE, TENTH = 16, 10  # every tenth image is clean in `mixed`, and alone in `clean`: the digits come class by class
ROLLOUT = 0.3 * 3 + 0.7 * (3 + 6 / 2)  # passes a step: from 30% on six more evaluations of half of the batch


def write_images(folder: Path, noise: float) -> None:
    """The digits with noise in `float` and `8bit`; in `mixed` those of `float`, a tenth of them clean, which are alone
    in `clean`."""
    transform = Transform(SIDE, 1)
    for split in ("train", "test"):
        source, generator = Digits(split), torch.Generator().manual_seed(int(split == "test"))
        for name in ("float", "8bit", "mixed", "clean"):
            (folder / name / split).mkdir(parents=True, exist_ok=True)
        with replacing(folder / "mixed" / split / "metadata.csv") as aside, open(aside, "w") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "noise"])
            for i in range(len(source)):
                clean = transform(source.open(i), torch.Generator())[0]
                noisy = clean + noise * torch.randn(clean.shape, generator=generator)
                is_clean = i % TENTH == 0
                names = {"float": noisy, "mixed": clean if is_clean else noisy} | ({"clean": clean} if is_clean else {})
                for name, x in names.items():
                    Image.fromarray(x.numpy().astype(np.float32)).save(folder / name / split / f"{i:04d}.tiff")
                eight = ((noisy + 1) * 127.5).round().clamp(0, 255).numpy().astype(np.uint8)
                Image.fromarray(eight).save(folder / "8bit" / split / f"{i:04d}.png")
                rows.writerow([f"{i:04d}.tiff", 0 if is_clean else noise])


def recipes(folder: Path, noise: float) -> dict[str, tuple[str, str, float]]:
    """The rows of a noise level, in words: the name of the model, the options of its training, passes a step."""
    images = f"{PLAIN} --value_range=-1,1 --train_data_dir {folder / str(noise)}"
    given = f"--data_noise {noise}"
    return {
        f"noise {noise}, taken as clean": (f"naive-{noise}", f"{PLAIN} --train_data_dir {folder / str(noise)}/8bit", 3),
        f"noise {noise}, ambient loss": (f"ambient-{noise}", f"{images}/float {given}", 3),
        f"noise {noise}, ambient loss, 10% clean": (f"mixed-{noise}", f"{images}/mixed --data_noise_column noise", 3),
        f"noise {noise}, ambient loss, rollout": (
            f"rollout-{noise}", f"{images}/float {given} --below_noise rollout", ROLLOUT,
        ),
    }  # fmt: skip


def flat_noise(images: torch.Tensor) -> float:
    """The standard deviation within the corners, 3 x 3, where digits are black; images in [-1, 1]."""
    corners = [images[:, 0, rows, columns].flatten(1) for rows in _ENDS for columns in _ENDS]
    return torch.cat(corners).std(1).mean().item()


def main() -> None:
    args, for_training = flags(
        __doc__, rest=True, output_dir=Path, noise=[0.2, 0.5], seed=0, steps=20, only=[""],
    )  # fmt: skip
    folder = args.output_dir.resolve()
    rows = {"clean images": "baseline", "clean images, 10% of them": "clean-tenth"}
    tenth = f"{PLAIN} --value_range=-1,1 --train_data_dir {folder / str(args.noise[0])}/clean"
    RECIPES["clean-tenth"] = Recipe("train_consistency.py", 3, tenth)
    for noise in args.noise:
        if not (folder / str(noise) / "mixed" / "test" / "metadata.csv").exists():
            write_images(folder / str(noise), noise)
        for words, (name, options, cost) in recipes(folder, noise).items():
            rows[words], RECIPES[name] = name, Recipe("train_consistency.py", cost, options)
    lab = Lab(Namespace(preset="digits", seed=args.seed, output_dir=folder, minutes=0.0), for_training)
    measured, pictures = [], []
    for words, name in rows.items():
        if not any(part in words for part in args.only):
            continue
        drawing = lab.draw(name, args.steps)
        quality = lab.judge.measure(drawing, lab.drawn)
        images = torch.cat(list(drawing.images(lab.drawn))).float() / 127.5 - 1
        pictures.append(images[:16])
        found = (quality.frechet, quality.pixels)
        measured.append([words, *(f"{d.estimate:.2f} ({d.low:.2f} to {d.high:.2f})" for d in found)])
        measured[-1].append(f"{flat_noise(images):.3f}")
        print(" | ".join(measured[-1]), flush=True)
    print(table(["trained on", "Frechet distance", "of pixels", "left in flat regions"], measured))
    grid = image_grid((torch.cat(pictures) + 1).div(2).permute(0, 2, 3, 1).numpy(), columns=16, min_size=32)
    with replacing(folder / "noisy.png") as aside:
        grid.save(aside)


if __name__ == "__main__":
    main()
