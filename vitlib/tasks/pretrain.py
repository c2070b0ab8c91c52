"""`python -m vitlib pretrain`: masked pre-training on unlabelled images (Paper, section 5), a trunk for `finetune --from`."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from vitlib.data import DataSet
from vitlib.data.read import files, images_in
from vitlib.draws import order
from vitlib.errors import UsageError
from vitlib.files import read_metadata
from vitlib.model import ViT, vit_config
from vitlib.model.weights import save
from vitlib.records import whole
from vitlib.tasks.images import View, read_images
from vitlib.tasks.runs import alone, check_place, computing, say
from vitlib.tasks.trunk import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, read_notes, write_notes
from vitlib.train import loop
from vitlib.train.checkpoint import Checkpoints
from vitlib.train.engine import Engine, resolve
from vitlib.train.masked import MaskedLoss, MaskedViT
from vitlib.train.recipe import Recipe
from vitlib.train.tokenizers import make_targets

MASKED = 75 / 196  # of the patches. Released code of BEiT
PROBES = 10  # in a run
RIDGE = 1e-2


@alone
def pretrain(
    folder: Path | str, out: Path | str, model: str = "W128-6/8", *, stem: str = "hmlp", targets: str = "tokens",
    image_size: int = 64, epochs: int = 50, batch_size: int = 64, lr: float = 1e-3, seed: int = 0, device: str = "auto",
) -> str:  # fmt: skip
    """Pre-train `model` on every image below `folder`; `out` gets trunk.safetensors.

    Where images are in folders, the name of an image's folder is what an online linear probe predicts from the mean of the
    patch tokens; a fifth of the images tests it. It says whether features get better, and trains nothing. Goes on where it
    was interrupted, and reads what is finished. Raises UsageError for targets, a stem or a model that cannot be, and where
    `out` holds another trunk.
    """
    folder, out = Path(folder), Path(out)
    check_place(out, ("trunk.safetensors", "checkpoint.pth"))
    if not whole(0)(seed):
        raise UsageError(f"seed is {seed!r}: allowed are whole numbers from 0")
    config = vit_config(model, image_size=image_size, num_classes=0, stem=stem, layer_scale=0.1)
    if config.grid < 2:
        raise UsageError(f"{image_size} pixels are one patch of {config.name}: allowed are 2x2 patches and more")
    view = View(image_size, config.patch_size, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    recipe, engine = Recipe(epochs=epochs, batch_size=batch_size, lr=lr, min_lr=0.0), Engine(resolve(device))
    names = images_in(folder) if folder.is_dir() else []
    if len(names) < 2:
        raise UsageError(f"there is no folder {folder} with images: allowed are two images and more")
    # an image's label is its folder
    kinds, labels = np.unique([os.path.dirname(name) for name in names], return_inverse=True)
    data, digests, _ = read_images(files(folder, names, labels, kinds), view, folder.resolve().name)
    masked = MaskedViT(config, (goal := make_targets(targets, data, config.patch_size, seed)).outputs, seed)
    rows, steps = np.arange(len(data)), loop.count_steps(recipe, len(data))
    told = json.dumps([asdict(config), asdict(recipe), targets, seed, digests])
    run, trunk = hashlib.sha256(told.encode()).hexdigest()[:16], out / "trunk.safetensors"
    if trunk.is_file():
        notes = read_notes(read_metadata(trunk), trunk)
        if notes.get("run") != run:
            raise UsageError(f"{out} holds another trunk: give another place with --out")
        return f"{trunk}: {config.name}, {notes['said']}"
    checkpoints, probed = Checkpoints(out / "checkpoint.pth", 60.0, run=run), len(kinds) > 1 and len(data) >= 5
    said = "no probe: the images are few, or in one folder"
    with tqdm(total=steps, desc=f"pre-training {config.name}", unit="step", disable=None, leave=False) as bar:

        def after(step: int, steps: int) -> None:
            nonlocal said
            bar.update(step - bar.n)
            if probed and (step == steps or step % max(1, steps // PROBES) == 0):
                said = f"linear probe {probe(masked.vit, data, engine):.1f} % of {len(kinds)} folders"
                loop.set_train_mode(masked)
                say(f"  step {step} of {steps}: {said}")

        loss = MaskedLoss(goal, seed, round(MASKED * config.grid**2))
        with computing(config, batch_size):
            history = loop.train(masked, recipe, data, rows, seed, loss, after, engine, checkpoints=checkpoints)
    said = f"loss {history[0].loss:.2f} -> {history[-1].loss:.2f}, {said}"
    save(masked.vit.cpu(), trunk, write_notes(view, (), run=run, said=said))
    checkpoints.remove()
    return f"{trunk}: {config.name}, {said}"


@torch.no_grad()
def probe(vit: ViT, data: DataSet, engine: Engine) -> float:
    """Top-1 in percent, on a fifth of the images, of ridge regression from the mean of the patch tokens."""
    vit.eval()
    means = [vit.encode(vit.embed(engine.move(b).images))[:, 1:].mean(1).cpu() for b in data.evaluation_batches(200)]
    x = torch.cat(means).double()
    shuffled = torch.from_numpy(order(0, "probe", 0, len(x)))
    held, fit = shuffled[: len(x) // 5], shuffled[len(x) // 5 :]
    x = torch.cat([(x - x[fit].mean(0)) / (x[fit].std(0) + 1e-6), torch.ones(len(x), 1)], dim=1)
    y = torch.nn.functional.one_hot(data.labels, len(data.classes)).double()
    weight = torch.linalg.solve(x[fit].T @ x[fit] + RIDGE * len(fit) * torch.eye(x.shape[1]), x[fit].T @ y[fit])
    return 100 * float(((x[held] @ weight).argmax(1) == data.labels[held]).double().mean())
