"""The schedulers by their names in flags and settings. This module loads neither models nor torch."""

from __future__ import annotations

from typing import Any, Literal

# fmt: off
SchedulerName = Literal[
    "ddim", "ddpm", "pndm", "lms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "unipc", "kdpm2", "kdpm2_ancestral",
    "dpmpp_2m_sde", "dpmpp_3m", "dpmpp_3m_sde", "dpmpp_2s", "dpmpp_sde", "deis", "sa_solver", "lcm", "tcd",
]
# fmt: on
SCHEDULERS: dict[str, str] = {
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "pndm": "PNDMScheduler",
    "lms": "LMSDiscreteScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "kdpm2": "KDPM2DiscreteScheduler",
    "kdpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "dpmpp_2m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_3m": "DPMSolverMultistepScheduler",
    "dpmpp_3m_sde": "DPMSolverMultistepScheduler",
    "dpmpp_2s": "DPMSolverSinglestepScheduler",
    "dpmpp_sde": "DPMSolverSinglestepScheduler",
    "deis": "DEISMultistepScheduler",
    "sa_solver": "SASolverScheduler",
    "lcm": "LCMScheduler",
    "tcd": "TCDScheduler",
}
# Settings that tell schedulers of one class apart.
SCHEDULER_OPTIONS: dict[str, dict[str, Any]] = {
    "dpmpp_2m": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
    "dpmpp_3m": {"algorithm_type": "dpmsolver++", "solver_order": 3},
    "dpmpp_3m_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 3},
    "dpmpp_2s": {"algorithm_type": "dpmsolver++", "solver_order": 2},
    "dpmpp_sde": {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
}
# Of flow-matching bases, by the names of the same solvers.
FLOW_SCHEDULERS = {
    "euler": "FlowMatchEulerDiscreteScheduler",
    "heun": "FlowMatchHeunDiscreteScheduler",
    "lcm": "FlowMatchLCMScheduler",
}
# These schedulers sample one noise for the whole batch from their own seed, which the images' seeds cannot set.
_OWN_NOISE = ("DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler")
SIGMAS = ("karras", "exponential", "beta")  # spacings of the steps, by diffusers' settings use_karras_sigmas and so on
MOST_STEPS = {"lcm": 50, "tcd": 50}  # of the models that these were made for


def scheduler_class(name: str, pipeline: str, flow: bool) -> str:
    """Return the name of diffusers' class for the scheduler ``name``.

    Args:
        pipeline: the name of the pipeline's class.
        flow: whether its base samples by flow matching.

    Raises:
        ValueError: an unknown name, or one that is not for flow matching.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"Unknown scheduler {name!r}; choose one of {', '.join(SCHEDULERS)}.")
    if not flow:
        return SCHEDULERS[name]
    # All but SD3's pipelines pass noise levels of their own, which Heun's does not take.
    own_levels = "StableDiffusion3" not in pipeline
    known = [one for one in FLOW_SCHEDULERS if not (own_levels and one == "heun")]
    if name not in known:
        raise ValueError(
            f"The {pipeline} samples by flow matching, which the scheduler {name} is not for; leave it out, or choose "
            f"one of {', '.join(known)}."
        )
    return FLOW_SCHEDULERS[name]


def check_seedable(kind: str, pipeline: str, stochastic: bool = False) -> None:
    """Raise a ValueError for a scheduler whose noise cannot be set image by image.

    kind, pipeline: names of their classes. stochastic: whether one for flow matching samples noise in each step.
    """
    if kind in _OWN_NOISE:
        raise ValueError(
            f"{kind} samples noise that the seeds cannot set; "
            "use DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'."
        )
    # The pipelines of flow-matching bases pass no generator to their scheduler.
    if kind == "FlowMatchLCMScheduler" or stochastic:
        raise ValueError(
            f"{kind} samples noise between the steps that the seeds cannot set on a {pipeline}; use euler without "
            "stochastic_sampling, or call the pipeline inside attach."
        )
