"""Lets a repository on the Hub be opened with `trust_remote_code=True`; see pipelines/README.md of diffusers_ext.

diffusers looks for the scheduler's class in this file, and names the missing package where there is no diffusers_ext.
"""

from diffusers_ext import *  # noqa: F403
