"""Train or fine-tune a diffusers model on the diffusion times [0, T] alone (Franzese et al., 2022, arXiv 2206.05173).

    accelerate launch training/train_short_time.py --help

The command is `diffusers_ext.commands.train_short_time`, and runs as `diffusers-ext train-short-time`, too.
"""

from diffusers_ext.commands.train_short_time import main

if __name__ == "__main__":
    main()
