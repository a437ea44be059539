"""Whole sampling runs, diffkern against what users have today, in one interleaved run on the same weights.

    python benchmarks/bench_end_to_end.py [--rounds 5] [--steps 5] [--rivals reference,diffusers,compile]

The network is the bundled emoji-32 (36 pictures with classifier-free guidance, DPM-Solver++ 2M, float32). Rivals run
diffusers' own model and scheduler, in channels_last, eager and under torch.compile. Before anything is timed, every
variant must draw the same pictures as diffkern's reference.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable

import record
import torch
from torch import Tensor

import diffkern
from diffkern.models.bundle import ASSETS

RIVALS = ("reference", "diffusers", "compile")


def ours(diffusion: diffkern.Diffusion, n: int, steps: int, guidance: float, backend: str) -> Callable[[], Tensor]:
    # diffusers' scheduler cannot clip x0 as the bundled model's schedule asks, so nobody does here
    table = diffkern.make_table("dpmpp_2m", diffusion.schedule, steps, spacing="trailing", clip=math.inf)
    labels = [i % len(diffusion.labels) for i in range(n)]

    def run() -> Tensor:
        with diffkern.use_backend(backend):
            return diffkern.sample(
                diffusion.model, table, n, labels=labels, guidance=guidance, batch_size=n, progress=False
            )

    return run


def diffusers_loop(folder: str, n: int, steps: int, guidance: float, compiled: bool) -> Callable[[], Tensor]:
    """The loop that a diffusers user writes, with the same initial noise."""
    import diffusers

    model = diffusers.UNet2DModel.from_pretrained(folder).eval().to(memory_format=torch.channels_last)
    config = diffusers.DDPMScheduler.load_config(folder)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        config, timestep_spacing="trailing", final_sigmas_type="zero"
    )
    forward = torch.compile(model) if compiled else model
    null = model.config.num_class_embeds - 1
    labels = torch.tensor([null] * n + [i % null for i in range(n)])
    noise = diffkern.randn(diffkern.noise_keys(0, n), [3, 32, 32])

    @torch.no_grad()
    def run() -> Tensor:
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            both = torch.cat([x, x]).contiguous(memory_format=torch.channels_last)
            m_u, m_c = forward(both, t, labels, return_dict=False)[0].chunk(2)
            x = scheduler.step(m_u + guidance * (m_c - m_u), t, x).prev_sample
        return x

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("-n", type=int, default=36)
    parser.add_argument("--guidance", type=float, default=2.0)
    parser.add_argument("--rivals", default=",".join(RIVALS), help=f"of {', '.join(RIVALS)}")
    args = parser.parse_args()

    diffusion = diffkern.load("emoji-32")
    call = (args.n, args.steps, args.guidance)
    folder = str(ASSETS / "emoji-32")
    makers: dict[str, Callable[[], Callable[[], Tensor]]] = {
        "reference": lambda: ours(diffusion, *call, backend="reference"),
        "diffusers": lambda: diffusers_loop(folder, *call, compiled=False),
        "compile": lambda: diffusers_loop(folder, *call, compiled=True),
    }
    variants = {"diffkern": ours(diffusion, *call, backend="auto")}
    variants |= {name: makers[name]() for name in args.rivals.split(",") if name}

    expected = ours(diffusion, *call, backend="reference")()
    first, delta = {}, {}
    for name, run in variants.items():
        start = time.perf_counter()
        delta[name] = (run() - expected).abs().max().item()
        first[name] = time.perf_counter() - start
        if not delta[name] <= 1e-2:
            raise SystemExit(f"{name} draws other pictures (max |delta| {delta[name]:.3g}): nothing was timed")

    seconds = record.interleave(variants, args.rounds)
    results = {
        name: {
            "ms per step": record.spread([1000 * s / args.steps for s in seconds[name]]),
            "diffkern is faster by": record.ratio(seconds[name], seconds["diffkern"]),
            "first run, seconds": float(f"{first[name]:.3g}"),
            "max delta to the reference": float(f"{delta[name]:.2g}"),
        }
        for name in variants
    }
    path = record.write(
        "end_to_end", "cpu", {"network": "emoji-32", "n": args.n, "guidance": args.guidance, "variants": results}
    )
    for name, r in results.items():
        print(f"{name:<12}{r['ms per step']}  diffkern is faster by {r['diffkern is faster by']['median']:.2f}")
    print(path)


if __name__ == "__main__":
    main()
