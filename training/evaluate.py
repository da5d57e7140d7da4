"""Quality, likelihood and cost of diffusers pipelines, side by side: does this help my model?

    accelerate launch training/evaluate.py --help

The command is `diffusers_ext.commands.evaluate`, and runs as `diffusers-ext evaluate`, too.
"""

from diffusers_ext.commands.evaluate import main

if __name__ == "__main__":
    main()
