"""The command line: `python -m vitlib --help`. Heavy imports happen inside the commands, so that help is quick."""

from __future__ import annotations

import argparse
import functools
import os
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

import vitlib
from vitlib.errors import UsageError
from vitlib.files import first_line, no_room

MOST = 10_000  # of anything that is counted
BESIDE = ("numpy", "pillow", "pyarrow", "safetensors", "pyyaml", "filelock", "tqdm")


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Reads a whole number from `least` to `most`."""

    def read(text: str) -> int:
        if not (re.fullmatch(r"-?[0-9]{1,11}", text) and least <= int(text) <= most):
            raise argparse.ArgumentTypeError(f"{text[:40]!r} given, allowed are whole numbers from {least} to {most:,}")
        return int(text)

    return read


def rate(text: str) -> float | None:
    """A learning rate; None for auto."""
    try:
        return None if text == "auto" else float(text)
    except ValueError as fault:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} given, allowed are auto and numbers above 0") from fault


def words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",")]


def option(names: str, text: str, **settings: object) -> tuple[str, dict[str, object]]:
    return names, {"help": text, **settings}


SEED = whole(0, 2**31 - 1)
MODEL = option("model", "folder or file that finetune wrote", metavar="MODEL")
FOLDER = option("folder", "class folders of images, <folder>/<class>/*.jpg", metavar="DIR")
LABELS = option("--labels", "a CSV with columns path and label, in the place of class folders", metavar="FILE.csv")
TASK = [
    FOLDER,
    option("--from", "weights: a file (ours, DeiT, DeiT III, timm, DINOv2, Hugging Face ViT, birder), a timm name; else the "
           "small trunk that ships, of grey images of 16 pixels: to try the commands", dest="weights", metavar="WEIGHTS"),
    LABELS,
    option("--group", "column of that CSV: images of one group stay in one part", metavar="COLUMN"),
    option("--epochs", "passes over the training part (%(default)s)", type=whole(1), default=10),
    option("--batch-size", "images per step (%(default)s)", type=whole(1), default=32),
    option("--image-size", "pixels per side; else the trunk's, at most 224", type=whole(1)),
]  # fmt: skip
DEVICE = option("--device", "auto, cpu or cuda (%(default)s)", default="auto")
OUT = option("--out", "folder of what comes of it", required=True)
COMMANDS = {
    "finetune": ("fine-tune pretrained weights on a folder of images", [
        *TASK, DEVICE, OUT,
        option("--strategy", "what is trained: full, attn, ffn, head, fc1, norm, bias, last-2 (%(default)s)", default="attn"),
        option("--lr", "peak learning rate, or auto: searched on the validation part (%(default)s)", type=rate, default="auto"),
        option("--seed", "of the head and the order of images (%(default)s)", type=SEED, default=0),
    ]),
    "compare": ("is tuning attention alone enough on these images? Strategies side by side", [
        *TASK, DEVICE, OUT,
        option("--strategies", "with commas: finetune's, and lora (%(default)s)", type=words, default="full,attn,ffn,norm,bias,head"),
        option("--seeds", "runs of each strategy (%(default)s)", type=whole(1), default=5),
        option("--margin", "points that do not matter (%(default)s)", type=float, default=1.0),
    ]),
    "predict": ("the class of each image, by a fine-tuned model", [
        MODEL, DEVICE,
        option("paths", "images and folders of images", nargs="+", metavar="PATHS"),
        option("--csv", "write a table besides: path, class, share", metavar="FILE.csv"),
    ]),
    "evaluate": ("top-1 with its interval, per class, and the confusion matrix as a picture", [
        MODEL, FOLDER, LABELS, DEVICE,
        option("--picture", "draw the confusion matrix: .png, .svg or .pdf", metavar="FILE.png"),
    ]),
    "plan": ("memory and minutes per strategy, before anything is trained", [
        *TASK,
        option("--device", "here (auto, cpu, cuda), or a GPU: a100, h100, h200, l4, l40s, rtx3090, rtx4090, t4, v100 (%(default)s)",
               default="auto"),
        option("--strategies", "with commas: finetune's (%(default)s)", type=words, default="full,attn,head"),
    ]),
    "pretrain": ("masked pre-training on unlabelled images, for finetune --from", [
        DEVICE, OUT,
        option("folder", "images, in folders of any depth", metavar="DIR"),
        option("--model", "width, layers, patch size (%(default)s)", default="W128-6/8"),
        option("--stem", "linear, hmlp, conv or local (%(default)s)", default="hmlp"),
        option("--targets", "tokens (k-means) or pixels (%(default)s)", default="tokens"),
        option("--image-size", "pixels per side (%(default)s)", type=whole(1), default=64),
        option("--epochs", "passes over the images (%(default)s)", type=whole(1), default=50),
        option("--batch-size", "images per step (%(default)s)", type=whole(1), default=64),
        option("--lr", "peak learning rate (%(default)s)", type=float, default=1e-3),
        option("--seed", "of all draws (%(default)s)", type=SEED, default=0),
    ]),
    "export-model": ("a fine-tuned model as ONNX or torch.export, branches fused, checked against the model", [
        MODEL,
        option("--onnx", "ONNX, of any batch size", metavar="FILE"),
        option("--torch-export", "a program of torch.export", metavar="FILE"),
    ]),
}  # fmt: skip


class Parser(argparse.ArgumentParser):
    """One sentence for a wrong word, like every other mistake, and for an empty one, which would be the folder one is in."""

    def parse_args(self, words: Sequence[str] | None = None):
        words = sys.argv[1:] if words is None else words
        if empty := [word for word in words if re.fullmatch(r"(--[\w-]+=)?", word)]:
            raise UsageError(f"{empty[0] or 'a word'} is empty: give a value, or leave it out")
        return super().parse_args(words)

    def error(self, message: str):
        raise UsageError(message)


def main(words: list[str] | None = None) -> int:
    """Run one command; its exit code. A mistake in what was asked for is one sentence and 2."""
    top = Parser(prog="python -m vitlib", description=(vitlib.__doc__ or "vitlib").splitlines()[0])
    commands = top.add_subparsers(title="commands", required=True, metavar="COMMAND")
    text = "the installed versions; is the installation whole?"
    commands.add_parser("check", help=text, description=text).set_defaults(command=check)
    for name, (text, options) in COMMANDS.items():
        parser = commands.add_parser(name, help=text, description=text)
        for option in options:
            parser.add_argument(*option[0].split(), **option[1])
        parser.set_defaults(command=functools.partial(call, name))
    try:
        given = vars(top.parse_args(words))
        with no_room("for what this command writes"):
            given.pop("command")(**given)
    except UsageError as fault:
        print(f"vitlib: {fault}", file=sys.stderr)
        return 2
    except OSError as fault:  # a folder that cannot be written, a name that is too long
        named = f" ({str(fault.filename)[:200]})" if fault.filename else ""
        print(f"vitlib: {fault.strerror or first_line(fault)}{named}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("vitlib: interrupted: the same command goes on where it was", file=sys.stderr)
        return 130
    return 0


def call(name: str, **given: object) -> None:
    """Call the function that a command is, and print what it returns."""
    print(getattr(vitlib, name.replace("-", "_"))(**given))


def check() -> None:
    """Print the versions. Raises UsageError for a library that is absent, and where torch and torchvision are no pair."""
    try:
        others = ", ".join(f"{name} {version(name)}" for name in BESIDE)
        print(f"installation: {pair()}, {others}; vitlib {vitlib.__version__}")
    except (PackageNotFoundError, ModuleNotFoundError) as fault:
        raise UsageError(f"{fault.name} is not installed: pip install vitlib brings all that it needs") from fault


def pair() -> str:
    """The versions of torch, torchvision and timm.

    Raises UsageError where torch and torchvision are no pair: "operator torchvision::nms does not exist".
    """
    import torch

    try:
        import torchvision
    except (RuntimeError, ImportError, OSError) as fault:
        what = f"torch {torch.__version__} and the installed torchvision are not builds of one family"
        cure = "remove .venv and run `make setup`, which takes the matching pair"
        raise UsageError(f"{what} ({str(fault).splitlines()[0]}): {cure}") from fault
    import timm

    return f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"


def shield() -> None:
    """For a command: figures are files, whatever a notebook around it shows them with; a name that stdout cannot show is \\xe9."""
    os.environ["MPLBACKEND"] = "agg"
    sys.stdout.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    shield()
    sys.exit(main())
