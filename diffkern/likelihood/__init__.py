"""What is p(x)? Bounds on the log-likelihood of a model that samples, and estimates of it from its score."""

from diffkern.likelihood.denoiser import Denoiser, Levels
from diffkern.likelihood.elbo import LatentModel, Terms, elbo, iwae
from diffkern.likelihood.encode import decode, encode, round_trip_error
from diffkern.likelihood.energy import energy_difference, path_dependence
from diffkern.likelihood.exact import GaussianMixture, LinearGaussian, LinearGaussianChain
from diffkern.likelihood.integrate import NotSolved
from diffkern.likelihood.ode import ode_log_likelihood
from diffkern.likelihood.result import Likelihood
from diffkern.likelihood.score import score
from diffkern.likelihood.vdm import vdm
from diffkern.likelihood.vlb import vlb, vlb_table

__all__ = [
    "Denoiser",
    "GaussianMixture",
    "LatentModel",
    "Levels",
    "Likelihood",
    "LinearGaussian",
    "LinearGaussianChain",
    "NotSolved",
    "Terms",
    "decode",
    "elbo",
    "encode",
    "energy_difference",
    "iwae",
    "ode_log_likelihood",
    "path_dependence",
    "round_trip_error",
    "score",
    "vdm",
    "vlb",
    "vlb_table",
]
