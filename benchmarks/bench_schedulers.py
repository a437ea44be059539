"""Time diffusers' schedulers, fused and as they are, over whole runs: set_timesteps, scale_model_input and step.

    python benchmarks/bench_schedulers.py               # everything, into benchmarks/results/<machine>/schedulers.json
    python benchmarks/bench_schedulers.py --scheduler DDIMScheduler --dtype float32 --no-record

The model's output is one tensor, made before: a run is what the scheduler itself takes. torch.compile is no rival: a
step of diffusers reads numbers on the host, where the graph breaks (DDIM compiled took as long as not), and most count
their steps, for each of which it would compile anew.
"""

from __future__ import annotations

import argparse
import inspect
import warnings
from collections.abc import Callable
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

from diffkern.bench import record
from diffkern.integrations.diffusers import FUSED, fuse_scheduler

STEPS = 20
SHAPES = ((1, 4, 64, 64), (8, 4, 128, 128))
ULPS = 64.0  # what results may differ by, of their largest: in 16 bits diffusers rounds about as often in 20 steps


def loop(scheduler: Any, m: Tensor, x: Tensor) -> Callable[[], Tensor]:
    """A whole run, from timesteps that are set anew."""
    generator = torch.Generator() if "generator" in inspect.signature(scheduler.step).parameters else None
    options = {} if generator is None else {"generator": generator}

    def run() -> Tensor:
        if generator is not None:
            generator.manual_seed(0)
        scheduler.set_timesteps(STEPS)
        y = x
        for t in scheduler.timesteps:
            if hasattr(scheduler, "scale_model_input"):
                scheduler.scale_model_input(y, t)
            y = scheduler.step(m, t, y, return_dict=False, **options)[0]
        return y

    return run


def rivals(name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Callable[[], Tensor]]:
    """The runs to compare, by name: both lead to the same sample."""
    plain = getattr(diffusers, name)(**({"lower_order_final": True} if "Singlestep" in name else {}))
    fused = fuse_scheduler(plain)
    x, m = (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    x, m = (x * float(getattr(plain, "init_noise_sigma", 1.0))).to(dtype), (0.1 * m).to(dtype)
    runs = {"fused": loop(fused, m, x), "diffusers": loop(plain, m, x)}
    expected = runs["diffusers"]().double()
    error = (runs["fused"]().double() - expected).abs().max()
    allowed = ULPS * torch.finfo(dtype).eps * expected.abs().max()
    assert error <= allowed, f"{name}: off by {error:.2g}, {error / allowed:.2g} times what is allowed"
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scheduler", choices=FUSED, action="append", help="only this one (may be repeated)")
    parser.add_argument("--dtype", action="append", choices=("float32", "float16", "bfloat16"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--no-record", action="store_true", help="print, and write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # of numpy, in diffusers

    work = [
        (name, dtype, shape)
        for name in options.scheduler or FUSED
        for dtype in options.dtype or ("float32", "bfloat16")
        for shape in SHAPES
    ]
    rows: list[dict[str, Any]] = []
    for name, dtype, shape in tqdm(work, disable=None):
        runs = rivals(name, getattr(torch, dtype), shape)
        times = record.interleave(runs, options.rounds, at_least=0.02)
        rows.append(
            {
                "scheduler": name,
                "sample": list(shape),
                "dtype": dtype,
                "steps": STEPS,
                "us a step": {n: record.spread([t / STEPS * 1e6 for t in ts]) for n, ts in times.items()},
                "faster by": record.ratio(times["diffusers"], times["fused"]),
            }
        )
        us, faster = rows[-1]["us a step"]["fused"]["median"], rows[-1]["faster by"]["median"]
        tqdm.write(f"{name:32} {dtype:9} {shape!s:18} {us:.0f} us, faster by {faster:.2f}")
    if not options.no_record:
        print(record.write("schedulers", "cpu", rows))


if __name__ == "__main__":
    with torch.no_grad():
        main()
