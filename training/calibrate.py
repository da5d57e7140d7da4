"""Measure the mean error of a pretrained model, to be subtracted by calibrated schedulers (arXiv 2302.10688).

    accelerate launch training/calibrate.py --help

The command is `diffusers_ext.commands.calibrate`, and runs as `diffusers-ext calibrate`, too.
"""

from diffusers_ext.commands.calibrate import main

if __name__ == "__main__":
    main()
