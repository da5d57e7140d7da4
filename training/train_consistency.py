"""Train or fine-tune a diffusers model with the consistency regulariser (Daras et al., 2023, arXiv 2302.09057).

    accelerate launch training/train_consistency.py --help

The command is `diffusers_ext.commands.train_consistency`, and runs as `diffusers-ext train-consistency`, too.
"""

from diffusers_ext.commands.train_consistency import main

if __name__ == "__main__":
    main()
