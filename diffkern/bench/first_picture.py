"""One picture of emoji-32 in a process of its own, for `diffkern bench cold-start`: as a script with diffusers draws
it, which imports nothing of diffkern; or as `diffkern sample` does, with the time at which each of its parts was done.

    python first_picture.py diffusers|torch.compile FOLDER DTYPE DEVICE LABEL OUT.png
    python first_picture.py phases ARGUMENTS OF DIFFKERN SAMPLE
"""

import functools
import json
import sys
import time

STEPS, GUIDANCE, CHANNELS, SIZE = 20, 3.0, 3, 32


def by_diffusers(compiled: bool, folder: str, dtype: str, device: str, label: str, out: str) -> None:
    import diffusers
    import torch
    from PIL import Image

    unet = diffusers.UNet2DModel.from_pretrained(folder, torch_dtype=getattr(torch, dtype)).to(device)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
        diffusers.DDPMScheduler.load_config(folder), timestep_spacing="trailing", final_sigmas_type="zero"
    )
    scheduler.set_timesteps(STEPS, device=device)
    labels = torch.tensor([unet.config.num_class_embeds - 1, int(label)], device=device)
    forward = torch.compile(unet) if compiled else unet
    x = torch.randn(1, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        for t in scheduler.timesteps:
            m_u, m_c = forward(torch.cat([x, x]).to(unet.dtype), t, labels).sample.chunk(2)
            x = scheduler.step((m_u + GUIDANCE * (m_c - m_u)).float(), t, x).prev_sample
    pixels = ((x[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(out)
    print(out, flush=True)


def phases(*arguments: str) -> None:
    """Print, as JSON, the time in seconds since the epoch at which each part of the command was done."""
    done = {"start Python": time.time()}
    import torch  # noqa: F401

    done["import torch"] = time.time()
    from diffkern import cli

    done["import diffkern"] = time.time()
    parts = {"read the model": (cli, "load"), "load the library": (cli.options, "machine"),
             "sample": (cli.Plan, "draw"), "write the picture": (cli.pictures, "write")}  # fmt: skip

    def stamped(phase, function):  # type: ignore[no-untyped-def]
        @functools.wraps(function)
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            result = function(*args, **kwargs)
            done[phase] = time.time()
            return result

        return call

    for phase, (module, name) in parts.items():
        setattr(module, name, stamped(phase, getattr(module, name)))
    cli.main(["sample", *arguments])
    # A plan is tried with no sample before it is drawn: what counts is when a part was last done.
    print(json.dumps(dict(sorted(done.items(), key=lambda part: part[1]))), flush=True)


if __name__ == "__main__":
    what, *given = sys.argv[1:]
    if what == "phases":
        phases(*given)
    else:
        by_diffusers(what == "torch.compile", *given)
