"""The noise schedule of a diffusers scheduler_config.json."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from diffkern.schedules import (
    Schedule,
    cosine,
    edm,
    flow,
    from_betas,
    linear,
    one_of,
    rescale_zero_snr,
    scaled_linear,
    sigmoid,
)

# beta_start, beta_end, beta_schedule, timestep_spacing and clip_sample where a config leaves them out.
_DIFFUSERS: dict[str, tuple[float, float, str, str, bool]] = {
    **dict.fromkeys(("DDPMScheduler", "DDIMScheduler"), (1e-4, 0.02, "linear", "leading", True)),
    "PNDMScheduler": (1e-4, 0.02, "linear", "leading", False),
    "LCMScheduler": (0.00085, 0.012, "scaled_linear", "leading", False),
    "HeunDiscreteScheduler": (0.00085, 0.012, "linear", "linspace", False),
}
for _name in ("EulerDiscrete", "EulerAncestralDiscrete", "DPMSolverMultistep", "DEISMultistep", "UniPCMultistep"):
    _DIFFUSERS[f"{_name}Scheduler"] = (1e-4, 0.02, "linear", "linspace", False)
_EDM_CLASSES = ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler")
_FLOW_CLASSES = ("FlowMatchEulerDiscreteScheduler",)
_BETA_SCHEDULES = {"linear": linear, "scaled_linear": scaled_linear, "squaredcos_cap_v2": cosine, "sigmoid": sigmoid}
PREDICTION_TYPES = {"epsilon": "epsilon", "sample": "x0", "v_prediction": "v", "flow_prediction": "flow"}
# fmt: off
# Keys with the only values that a table of coefficients can honour; anything else is refused rather than ignored.
# A dynamic shift depends on the image size: a config can have "shift" set to exp(mu) instead.
_ONLY: dict[str, tuple[Any, ...]] = {
    "variance_type": (None, "fixed_small", "fixed_large"), "lambda_min_clipped": (None, -math.inf),
    "interpolation_type": ("linear",), "timestep_type": ("discrete",), "shift_terminal": (None,), "solver_p": (None,),
    **dict.fromkeys(("thresholding", "use_beta_sigmas", "use_lu_lambdas", "use_dynamic_shifting"), (False,)),
    **dict.fromkeys(("invert_sigmas", "stochastic_sampling"), (False,)),
}
_READ = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type",
    "rescale_betas_zero_snr", "timestep_spacing", "steps_offset", "clip_sample", "clip_sample_range",
    "use_karras_sigmas", "use_exponential_sigmas", "use_flow_sigmas", "flow_shift", "shift", "sigma_min", "sigma_max",
    "sigma_data", "sigma_schedule", "rho",
)
# These choose the sampler or its options, or have no effect once the keys above have the values they must have.
_SAMPLER = (
    "set_alpha_to_one", "skip_prk_steps", "final_sigmas_type", "solver_order", "solver_type", "algorithm_type",
    "lower_order_final", "euler_at_final", "predict_x0", "disable_corrector", "original_inference_steps",
    "timestep_scaling", "sample_max_value", "dynamic_thresholding_ratio", "base_shift", "max_shift",
    "base_image_seq_len", "max_image_seq_len", "time_shift_type",
)
# fmt: on
_LONGEST = 1_000_000  # timesteps: a thousand times what is usual, and no strain on any memory


def from_diffusers_config(config: Mapping[str, Any]) -> Schedule:
    """The schedule of a diffusers scheduler_config.json. Keys that choose the sampler are left to the sampler.

    Raises ValueError, naming what is allowed, for an unknown class, key or value."""
    allowed = (*_READ, *_ONLY, *_SAMPLER)
    for key, value in config.items():
        if not key.startswith("_"):
            one_of("key of a scheduler config", key, allowed)
            if key in _ONLY and value not in _ONLY[key]:
                choices = " or ".join(repr(v) for v in _ONLY[key])
                raise ValueError(f"{key}={value!r} is not supported in a scheduler config: it must be {choices}")
    name = config.get("_class_name", "DDPMScheduler")
    one_of("diffusers scheduler", name, (*_DIFFUSERS, *_EDM_CLASSES, *_FLOW_CLASSES))

    def get(key: str, default: Any) -> Any:
        value = config.get(key)
        return default if value is None else value

    T = int(get("num_train_timesteps", 1000))
    if T > _LONGEST:
        raise ValueError(f"num_train_timesteps is {T}, allowed are up to {_LONGEST}")
    options: dict[str, Any] = {"steps_offset": int(get("steps_offset", 0))}
    if get("use_karras_sigmas", False) or get("use_exponential_sigmas", False):
        options["spacing"] = "karras" if get("use_karras_sigmas", False) else "exponential"
    if name in _EDM_CLASSES:
        one_of("prediction_type of an EDM scheduler", get("prediction_type", "epsilon"), ("epsilon",))
        one_of("sigma_schedule", spacing := get("sigma_schedule", "karras"), ("karras", "exponential"))
        keys = {"sigma_min": 0.002, "sigma_max": 80.0, "rho": 7.0, "sigma_data": 0.5}
        return edm(T, **{k: get(k, v) for k, v in keys.items()}, **(options | {"spacing": spacing}))
    if name in _FLOW_CLASSES:
        return flow(T, get("shift", 1.0), **({"spacing": "linspace"} | options))

    start, end, beta_schedule, spacing, clip_sample = _DIFFUSERS[name]
    options = {"spacing": get("timestep_spacing", spacing)} | options
    one_of("prediction_type", kind := get("prediction_type", "epsilon"), PREDICTION_TYPES)
    options["prediction"] = PREDICTION_TYPES[kind]
    if get("clip_sample", clip_sample):
        options["clip"] = float(get("clip_sample_range", 1.0))
    if get("use_flow_sigmas", False):
        return flow(T, get("flow_shift", 1.0), **options)
    if (betas := config.get("trained_betas")) is not None:
        schedule = from_betas(torch.as_tensor(betas, dtype=torch.float64), **options)
    else:
        one_of("beta_schedule", beta_schedule := get("beta_schedule", beta_schedule), _BETA_SCHEDULES)
        if beta_schedule != "squaredcos_cap_v2":
            options |= {"beta_start": get("beta_start", start), "beta_end": get("beta_end", end)}
        schedule = _BETA_SCHEDULES[beta_schedule](T, **options)
    return rescale_zero_snr(schedule) if get("rescale_betas_zero_snr", False) else schedule
