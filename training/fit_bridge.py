"""Fit an auxiliary model ("bridge") of the diffused data at a time T to a pretrained pipeline (arXiv 2206.05173).

    accelerate launch training/fit_bridge.py --help

The command is `diffusers_ext.commands.fit_bridge`, and runs as `diffusers-ext fit-bridge`, too.
"""

from diffusers_ext.commands.fit_bridge import main

if __name__ == "__main__":
    main()
