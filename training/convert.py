"""Make a diffusers pipeline of a checkpoint of EDM, ADM, score_sde or Reflected-Diffusion.

    accelerate launch training/convert.py --help

The command is `diffusers_ext.commands.convert`, and runs as `diffusers-ext convert`, too.
"""

from diffusers_ext.commands.convert import main

if __name__ == "__main__":
    main()
