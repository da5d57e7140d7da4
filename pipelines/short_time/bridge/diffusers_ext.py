"""Lets a repository on the Hub be opened with `trust_remote_code=True`; see pipelines/README.md of diffusers_ext.

diffusers looks for the bridge's class in this file, and names the missing package where there is no diffusers_ext.
"""

from diffusers_ext import FlowBridge, GaussianBridge, MixtureBridge

__all__ = ["FlowBridge", "GaussianBridge", "MixtureBridge"]
