"""Train a reflected diffusion model (Lou, Ermon, 2023, arXiv 2304.04740): its samples keep to the range of the data.

    accelerate launch training/train_reflected.py --help

The command is `diffusers_ext.commands.train_reflected`, and runs as `diffusers-ext train-reflected`, too.
"""

from diffusers_ext.commands.train_reflected import main

if __name__ == "__main__":
    main()
