"""`diffkern likelihood`: bits per dimension of pictures, in a table, as JSON and as a plot of where they come from."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import diffkern
from diffkern import options
from diffkern.columns import aligned
from diffkern.data import SETS, Pictures, load_data
from diffkern.likelihood import plot
from diffkern.likelihood.dequantize import DEQUANTIZATIONS
from diffkern.likelihood.divergence import DIVERGENCES
from diffkern.likelihood.integrate import SOLVERS
from diffkern.likelihood.record import Entry, Record
from diffkern.likelihood.run import METHODS, Settings, run, settings_of
from diffkern.likelihood.vlb import VARIANCES
from diffkern.models.bundle import Diffusion, load
from diffkern.models.unet_condition import UNet2DCondition
from diffkern.ranks import of_this_process
from diffkern.samplers import SAMPLERS
from diffkern.schedules import one_of
from diffkern.stop import on_signals

TERMS = 32  # unless told otherwise
FEW = 8  # pictures that are listed without being asked for


def add(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    p = parser
    p.description = likelihood.__doc__
    p.set_defaults(run=likelihood)
    options.add_model(p)
    p.add_argument("--data", action="append", metavar="NAME",
                   help=f"{', '.join(SETS)}, or a folder of PNGs; may be given again (default held-out)")  # fmt: skip
    p.add_argument("--method", action="append", metavar="NAME",
                   help=f"{', '.join(METHODS)} or all; may be given again (default all)")  # fmt: skip
    p.add_argument("-n", type=int, metavar="N", help="pictures of each set, evenly from all over it (default all)")
    p.add_argument("--label", metavar="NAME", help="score every picture as one of this label (default: its own)")
    p.add_argument("--unlabelled", action="store_true", help="score every picture without its label")
    p.add_argument("--terms", metavar="K",
                   help=f"noise levels a picture, of vlb and vdm, or all (default {TERMS})")  # fmt: skip
    p.add_argument("--variance", default="fixed_small", metavar="NAME", help=f"of vlb and vdm: {', '.join(VARIANCES)}")
    p.add_argument("--solver", default="dopri5", metavar="NAME", help=f"of ode: {', '.join(SOLVERS)}")
    p.add_argument("--steps", type=int, default=20, help="of the solvers with fixed steps (default 20)")
    p.add_argument("--tolerance", type=float, default=1e-3, help="of the error of a dopri5 step (default 1e-3)")
    p.add_argument("--divergence", metavar="NAME",
                   help=f"of ode: {', '.join(DIVERGENCES)} (default difference, in 16 bits hutchinson)")  # fmt: skip
    p.add_argument("--dequantization", default="uniform", metavar="NAME", help=f"of ode: {', '.join(DEQUANTIZATIONS)}")
    p.add_argument(
        "--repeats", type=int, default=1, help="how often all is done, with other noise (default 1; ode at least twice)"
    )
    p.add_argument("--seed", type=int, default=0, help="of the noise; picture i of a seed gets always the same")
    options.add_machine(p)
    p.add_argument("--batch-size", type=int, metavar="N",
                   help="model evaluations at a time (default 32, on a GPU 256)")  # fmt: skip
    p.add_argument("--out", type=Path, default=Path("likelihood.json"),
                   help="result and state: the same command goes on from it (default likelihood.json)")  # fmt: skip
    p.add_argument("--restart", action="store_true", help="replace what is in --out")
    p.add_argument("--plot", type=Path, metavar="FILE", help="draw where the bits come from: .png, .svg or .pdf")
    p.add_argument("--per-image", action="store_true", help="list every picture")
    p.add_argument("--json", action="store_true", help="print what --out holds instead of the table")


def likelihood(args: argparse.Namespace) -> None:
    """Score pictures with a diffusion model: how many bits per dimension it takes to tell them from all others, with
    error bars. A run that was stopped goes on when it is started again."""
    methods, device = _checked(args), options.device_of(args.device)
    with diffkern.use_backend(args.backend):
        diffusion = load(args.model, dtype=options.dtype_of(args.dtype), device=device)
        if isinstance(diffusion.model, UNet2DCondition):
            raise ValueError(f"{diffusion.name} needs a prompt: only models of pictures alone are scored")
        terms = _terms(args.terms, len(diffusion.schedule))
        settings = Settings(
            args.seed, args.repeats, terms, args.variance, args.solver, args.steps, args.tolerance, args.divergence,
            args.dequantization,
        )  # fmt: skip
        names = dict.fromkeys(args.data or ["held-out"])
        sets = [load_data(name, diffusion.model.sample_shape, args.n) for name in names]
        labels, words = {}, {}
        for p in sets:
            labels[p.name], words[p.name] = _labels(diffusion, p, args.label, args.unlabelled)
        data = {
            p.name: {"pictures": len(p), "sha256": p.digest(), "labels": words[p.name], "names": list(p.names)}
            for p in sets
        }
        batch_size = args.batch_size or (32 if device.type == "cpu" else 256)
        kept = settings_of(diffusion, settings, args.backend)
        if of_this_process()[0]:  # the first has the record, and says all that there is to say
            with on_signals(None) as stop:
                run(diffusion, sets, labels, methods, settings, Record(args.out, diffusion.name, kept, data, []),
                    batch_size=batch_size, pause=stop.pause)  # fmt: skip
            return
        record = Record.open(args.out, diffusion.name, kept, data, methods, args.restart)
        out = sys.stderr if args.json else sys.stdout
        print(f"{diffusion.name}: {', '.join(_said(p, words[p.name]) for p in sets)}, seed {args.seed}", file=out)
        print(options.machine(diffusion, (*diffusion.model.OPS, "add_noise", "vlb_term"), device), file=out)
        if done := sum(e.done for e in record.entries):
            print(f"{args.out}: goes on after {done} of {sum(e.pictures for e in record.entries)} scores", file=out)
        with on_signals("diffkern likelihood: stopping after these pictures; again to stop at once") as stop:
            run(diffusion, sets, labels, methods, settings, record, batch_size=batch_size, pause=stop.pause)
    if args.plot is not None:
        plot.draw(record, diffusion.schedule, args.plot)
    if args.json:
        print(json.dumps(record.to_json(), ensure_ascii=False, allow_nan=False))
        return
    print(_table(record))
    if args.per_image or all(facts["pictures"] <= FEW for facts in record.data.values()):
        print(_per_image(record))
    print(args.out if args.plot is None else f"{args.out}, {args.plot}")


def _checked(args: argparse.Namespace) -> list[str]:
    """The methods that are asked for. Raises ValueError for what is wrong whatever the model and the data."""
    if args.divergence is None:
        args.divergence = "difference" if args.dtype == "float32" else "hutchinson"
    given = {"n": args.n, "batch_size": args.batch_size, "repeats": args.repeats, "steps": args.steps}
    options.at_least(1, **{name: value for name, value in given.items() if value is not None})
    if not args.tolerance > 0 or math.isinf(args.tolerance):
        raise ValueError(f"--tolerance must be finite and > 0, not {args.tolerance}")
    one_of("variance", args.variance, VARIANCES)
    one_of("solver", args.solver, SOLVERS)
    one_of("divergence", args.divergence, DIVERGENCES)
    one_of("dequantization", args.dequantization, DEQUANTIZATIONS)
    if args.divergence == "difference" and args.dtype != "float32":
        raise ValueError(f"--divergence difference says nothing in {args.dtype}: take hutchinson, or --dtype float32")
    methods = _methods(args.method)
    if args.plot is not None:
        plot.check(args.plot, methods)
    return methods


def _methods(given: Sequence[str] | None) -> list[str]:
    for name in given or ():
        if name in SAMPLERS:
            raise ValueError(
                f"{name!r} is a sampler, which draws pictures and gives no likelihood: choose one of "
                f"{', '.join(METHODS)}, all"
            )
        one_of("method", name, (*METHODS, "all"))
    return list(METHODS) if not given or "all" in given else [name for name in METHODS if name in given]


def _terms(given: str | None, T: int) -> int | None:
    """None for all of them."""
    if given is None:
        return TERMS if T > TERMS else None
    if given == "all":
        return None
    if not given.isdecimal() or not 3 <= int(given) < T:
        raise ValueError(f"--terms must be all, or from 3 to {T - 1}, the number of transitions, not {given}")
    return int(given)


def _labels(diffusion: Diffusion, pictures: Pictures, label: str | None, unlabelled: bool) -> tuple[Tensor | None, str]:
    """The label of each picture, int64 [n], None for none or the null label; and in words."""
    if label is not None:
        number = diffusion.label_id(label)
        name = diffusion.labels[number] if number < len(diffusion.labels) else str(number)
        return torch.full((len(pictures),), number), name
    known = set(pictures.label_names) <= set(diffusion.labels)
    if pictures.labels is not None and known and not unlabelled:
        numbers = torch.tensor([diffusion.labels.index(name) for name in pictures.label_names])
        return numbers[pictures.labels], "own"
    if diffusion.model.num_classes and diffusion.model.null_label is None:
        raise ValueError(f"{diffusion.name} needs a label, which {pictures.name} has not: give --label")
    return None, "none"


def _said(pictures: Pictures, labels: str) -> str:
    with_ = {"own": "with their labels", "none": "without labels"}.get(labels, f"as {labels}")
    return f"{len(pictures)} of {pictures.name} {with_}"


def _table(record: Record) -> str:
    """A line for each set and method."""
    rows = [("data", "labels", "pictures", "method", "bits/dim", "+-", "noise", "", "seconds", "evaluations")]
    for e in record.scored:
        assert e.likelihood is not None
        mean, error = e.likelihood.average()
        rows.append((
            e.data, record.data[e.data]["labels"], f"{e.done}", e.method, f"{mean:.4f}", _error(error),
            _error(e.noise()), METHODS[e.method].figure, f"{e.seconds:.1f}", f"{e.evaluations}",
        ))  # fmt: skip
    note = (
        "bits/dim: the average, smaller is likelier; +-: its standard error over the pictures; noise: what of that is\n"
        "Monte-Carlo noise, which --repeats makes less of"
    )
    return f"{aligned(rows)}\n{note}"


def _per_image(record: Record) -> str:
    """For each set a line for each picture: bits per dimension, and its standard error, by each method."""
    blocks = []
    for name, facts in record.data.items():
        entries = [e for e in record.scored if e.data == name]
        rows = [(name, *(column for e in entries for column in (e.method, "+-")))]
        for i, picture in enumerate(facts["names"]):
            rows.append((picture, *(figure for e in entries for figure in _figures(e, i))))
        blocks.append(aligned(rows))
    return "\n\n".join(blocks)


def _figures(entry: Entry, i: int) -> tuple[str, str]:
    found = entry.likelihood
    if found is None or i >= len(found):
        return "", ""
    return f"{found.bits_per_dim[i]:.4f}", _error(found.bits_per_dim_stderr[i].item())


def _error(value: float) -> str:
    return "?" if math.isnan(value) else f"{value:.4f}"
