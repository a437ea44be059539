"""A diffusers pipeline from a local folder, plain and accelerated: the same pictures, and how long they take.

    python examples/accelerate_pipeline.py stable-diffusion-v1-5 --prompt "a lighthouse at dusk" --steps 20

The folder is one that `pipe.save_pretrained` wrote: model_index.json and a folder a component. Writes plain.png and
accelerated.png, and prints what was replaced.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

import diffkern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", help="for a pipeline with one")
    parser.add_argument("--label", type=int, help="for a class-conditional pipeline")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    if not (args.folder / "model_index.json").is_file():
        parser.error(f"{args.folder} is no pipeline in diffusers format: it has no model_index.json")
    args.out.mkdir(parents=True, exist_ok=True)

    import diffusers

    pipe = diffusers.DiffusionPipeline.from_pretrained(args.folder, torch_dtype=DTYPES[args.dtype])
    given: dict[str, Any] = {"num_inference_steps": args.steps}
    if args.prompt is not None:
        given["prompt"] = args.prompt
    if args.label is not None:
        given["class_labels"] = [args.label]

    def draw(name: str) -> float:
        start = time.perf_counter()
        picture = pipe(**given, generator=torch.Generator().manual_seed(args.seed)).images[0]
        seconds = time.perf_counter() - start
        picture.save(args.out / f"{name}.png")
        return seconds

    try:
        plain = draw("plain")
    except (TypeError, ValueError) as error:
        parser.error(f"{type(pipe).__name__} does not take these arguments: {error}")
    print(diffkern.accelerate(pipe))
    accelerated = draw("accelerated")
    print(f"plain {plain:.1f} s, accelerated {accelerated:.1f} s, first call included: {plain / accelerated:.2f} times")


if __name__ == "__main__":
    main()
