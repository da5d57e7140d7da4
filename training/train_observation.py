"""Train or fine-tune a diffusers model with observation guidance (Kang et al., CVPR 2024, arXiv 2310.04041).

    accelerate launch training/train_observation.py --help

The command is `diffusers_ext.commands.train_observation`, and runs as `diffusers-ext train-observation`, too.
"""

from diffusers_ext.commands.train_observation import main

if __name__ == "__main__":
    main()
