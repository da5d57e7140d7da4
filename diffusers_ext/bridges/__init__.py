r"""Auxiliary models of diffused data, from which sampling starts at a diffusion time T < 1: "bridges".

Sampling usually starts from N(0, I) at T = 1. At a shorter T that is not the law of the diffused data

    x_T = alpha_T x0 + sigma_T n,        alpha_T^2 + sigma_T^2 = 1,  n ~ N(0, I),

and sampling starts from a density nu(x_T) close to that law instead. The law of x_T is smoother than that of the data,
so a weak model is enough. (This is not a Schroedinger bridge.) With B = -2 ln alpha_T,

    KL[p_T || N(0, I)] = 1/2 |E x0|^2 e^-B + 1/4 |Cov x0 - I|^2 e^-2B + O(e^-3B),

and a Gaussian with the mean and covariance of x_T has neither of the two terms written: `GaussianBridge`, which every
other model has to beat. `MixtureBridge` and `FlowBridge` are richer; `base` holds what all three share, `moments`
estimates mean and covariance, and `fitting` fits the bridge that a script asks for.

Coordinates are those of the samples of a variance-preserving scheduler, here and nowhere else in the package; in
(x, sigma) they are scale(sigma) (x0 + sigma n) with scale = alpha_T and sigma = sigma_T / alpha_T.

Reference: How Much Is Enough? A Study on Diffusion Times in Score-Based Generative Models (Franzese, Rossi, Yang,
Finamore, Rossi, Filippone, Michiardi, 2022, arXiv 2206.05173).
"""

from .base import Bridge
from .flow import FlowBridge
from .gaussian import GaussianBridge
from .mixture import MixtureBridge

__all__ = ["Bridge", "FlowBridge", "GaussianBridge", "MixtureBridge"]
