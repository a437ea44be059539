"""The command line: `diffkern sample`, `diffkern likelihood`, `diffkern bench` and `diffkern doctor`.

Whatever is wrong with the input gets one sentence that names what is allowed, on standard error, and exit code 2."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

import diffkern
from diffkern import doctor, files, options, pictures
from diffkern.dataset import command as dataset
from diffkern.dataset.plan import Plan
from diffkern.dataset.shards import FORMATS
from diffkern.models.bundle import Diffusion, load
from diffkern.ranks import SaidByFirst, is_launched, of_this_process
from diffkern.samplers import SAMPLERS, make_table
from diffkern.schedules import one_of
from diffkern.stop import Stopped


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    """argv: the command's words, of which the first says which of the large commands is needed: who samples does not
    wait for the others to be imported."""
    parser = _Parser(prog="diffkern", description="Fused kernels to sample and to score diffusion models.")
    parser.add_argument("--version", action="version", version=f"diffkern {diffkern.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="sample|likelihood|bench|doctor", parser_class=_Parser
    )

    s = commands.add_parser("sample", help="draw pictures with a diffusion model", description=_sample.__doc__)
    options.add_model(s)
    s.add_argument("--sampler", default="dpmpp_2m", metavar="NAME", help=", ".join(SAMPLERS))
    s.add_argument("--steps", type=int, default=20, help="steps of the sampler (default 20)")
    s.add_argument("-n", type=int, default=36, help="how many pictures (default 36)")
    s.add_argument("--seed", type=int, default=0, help="picture i of a seed is always the same (default 0)")
    s.add_argument("--label", action="append", metavar="NAME",
                   help="what to draw; may be given again; default: every label in turn")  # fmt: skip
    s.add_argument("--guidance", type=float, default=3.0, help="classifier-free guidance scale (default 3; 1: none)")
    options.add_machine(s)
    s.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default 64)")
    s.add_argument("--batch-invariant", action="store_true", help="the same bits whatever the batch size, in more time")
    s.add_argument("--out", type=Path, help="a grid .png, a .npy, or a folder for single PNGs (default samples.png); "
                   "with --format a folder for shards (default samples)")  # fmt: skip
    s.add_argument("--format", metavar="NAME",
                   help=f"make a dataset, in shards that a run started again keeps: {', '.join(FORMATS)}; "
                   "under torchrun its processes share them out")  # fmt: skip
    s.add_argument("--shard-size", type=int, default=512, help="pictures in a shard (default 512)")
    s.set_defaults(run=_sample)

    later = {
        "likelihood": "score pictures with a diffusion model: bits per dimension",
        "bench": "time ops against what else there is, compare records",
    }
    for name, words in later.items():
        command = commands.add_parser(name, help=words)
        if argv[:1] == [name]:
            importlib.import_module(f"diffkern.{name}.command").add(command)

    d = commands.add_parser("doctor", help="what is here, what is ready, and why not", description=doctor.__doc__)
    d.add_argument("--json", action="store_true", help="the same as JSON")
    d.set_defaults(run=lambda args: doctor.main(args.json))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit code: 0, or 2 for bad input, after one sentence on standard error; or what a
    command says of itself."""
    argv = list(sys.argv[1:] if argv is None else argv)
    args = _parser(argv).parse_args(argv)
    try:
        code: int = args.run(args) or 0
        sys.stdout.flush()
        return code
    except SaidByFirst:
        return 2
    except BrokenPipeError:
        # Whoever read the output has seen enough, as `| head` has: no error. What is still to be written goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except (ValueError, ConnectionError, diffkern.BackendError) as e:
        print(f"diffkern {args.command}: {e}", file=sys.stderr)
        return 2
    except OSError as e:
        where = f" {e.filename}" if e.filename else ""
        print(f"diffkern {args.command}: cannot write{where}: {e.strerror or e}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print(f"diffkern {args.command}: out of memory: give a smaller --batch-size", file=sys.stderr)
        return 2
    except KeyboardInterrupt as e:
        if of_this_process()[0] == 0:
            print(f"diffkern {args.command}: stopped; {str(e) or 'nothing was written'}", file=sys.stderr)
        return e.code if isinstance(e, Stopped) else 130


def _sample(args: argparse.Namespace) -> None:
    """Draw pictures with a diffusion model: the bundled one, or a diffusers folder of your own."""
    options.at_least(1, n=args.n, batch_size=args.batch_size, shard_size=args.shard_size)
    dtype, device = options.dtype_of(args.dtype), options.device_of(args.device)
    if args.format is not None:
        one_of("format", args.format, FORMATS)
    elif is_launched():
        raise ValueError(f"under torchrun give --format: one of {', '.join(FORMATS)}")
    out = args.out or (dataset.OUT if args.format else Path("samples.png"))
    (pictures.kind_of if args.format is None else files.check_folder)(out)
    with diffkern.use_backend(args.backend):
        diffusion = load(args.model, dtype=dtype, device=device)
        table = make_table(args.sampler, diffusion.schedule, args.steps)
        labels, guidance = _labels(diffusion, args)
        plan = Plan(
            diffusion.model, table, args.n, None, args.seed, labels, guidance, None, None, args.batch_size,
            args.batch_invariant,
        )  # fmt: skip
        plan.check()
        header = [
            f"{diffusion.name}: {args.n} pictures, {table.name}, {args.steps} steps, seed {args.seed}"
            + (f", guidance {guidance:g}" if guidance is not None else ""),
            options.machine(diffusion, ("randn", *diffusion.model.OPS, "sampler_step"), device),
        ]
        if args.format is not None:
            dataset.sample(plan, out, args.format, args.shard_size, header)
            return
        print(*header, sep="\n")
        start = time.perf_counter()
        samples = plan.draw(range(args.n), progress=None).cpu()
        seconds = time.perf_counter() - start
    pictures.write(samples, out, [f"{args.seed}-{i:05d}" for i in range(args.n)])
    calls = len(table) * -(-args.n // args.batch_size)
    print(f"{seconds:.2f} s: {1000 * seconds / calls:.0f} ms a step, {args.n / seconds:.2f} pictures a second")
    print(out)


def _labels(diffusion: Diffusion, args: argparse.Namespace) -> tuple[list[int] | None, float | None]:
    """The labels that the pictures have in turn and the guidance scale; None for a model without labels."""
    classes = len(diffusion.labels) or diffusion.model.num_classes
    if args.label:
        chosen = [diffusion.label_id(name) for name in args.label]
    elif classes:
        chosen = list(range(classes))
    else:
        return None, None
    guided = diffusion.model.null_label is not None
    return chosen, args.guidance if guided else None


if __name__ == "__main__":
    sys.exit(main())
