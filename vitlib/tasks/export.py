"""`python -m vitlib export-model`: a fine-tuned model for other runtimes, with its branches fused and a free batch size."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from vitlib.errors import UsageError, need
from vitlib.files import check_target, write_whole
from vitlib.model import fuse
from vitlib.tasks.predict import classifier
from vitlib.tasks.trunk import write_notes

CLOSE = 1e-4  # of logits of size one: what another runtime may round differently


def export_model(model: Path | str, onnx: Path | str | None = None, torch_export: Path | str | None = None) -> str:
    """Write a model as ONNX, or as torch.export's program; FILE.json beside has its classes and preprocessing.

    What was written is run on batches of one and three images and compared with the model. Raises UsageError where it
    differs, where neither file or both are asked for, and where the packages of the extra `export` are absent.
    """
    if (onnx is None) == (torch_export is None):
        raise UsageError("export-model writes one file: give --onnx FILE or --torch-export FILE")
    check_target(path := Path(onnx or torch_export), (".onnx",) if onnx else (".pt2",))
    for package in ("onnx", "onnxscript", "onnxruntime") if onnx else ():
        need(package, "export")
    tuned = classifier(model)
    fused, config = fuse(tuned.model), tuned.model.config
    images = torch.randn(3, config.in_chans, config.image_size, config.image_size)
    sizes = ({0: torch.export.Dim("batch")},)
    with write_whole(path) as draft:
        if onnx is None:
            program = torch.export.export(fused, (images,), dynamic_shapes=sizes)
            with draft.open("wb") as file:  # torch's own writer says nothing of a full disk
                torch.export.save(program, file)
            run = torch.export.load(draft).module()
        else:
            run = to_onnx(fused, images, sizes, draft)
        for batch in (images, images[:1]):
            with torch.no_grad():
                gap = float((torch.as_tensor(run(batch)) - tuned.model(batch)).abs().max())
            if not gap < CLOSE:
                differs = f"the exported model's logits differ by {gap:.1e} from the model's"
                raise UsageError(f"{differs}: nothing was written")
    notes = json.loads(write_notes(tuned.seen, tuned.classes)["task"])
    with write_whole(path.with_name(f"{path.name}.json")) as draft:
        draft.write_text(json.dumps(notes, indent=1))
    return f"{path}: {path.stat().st_size / 1e6:.1f} MB, logits within {gap:.0e} of the model's; preprocessing in {path.name}.json"


def to_onnx(model: torch.nn.Module, images: torch.Tensor, sizes: tuple, path: Path):
    """Write ONNX; what runs it, images (B, C, H, W) -> logits (B, K)."""
    import onnxruntime

    torch.onnx.export(
        model, (images,), path, dynamo=True, dynamic_shapes=sizes, verbose=False, external_data=False,
        input_names=["images"], output_names=["logits"],
    )  # fmt: skip
    session = onnxruntime.InferenceSession(path.read_bytes())
    return lambda batch: np.asarray(session.run(None, {"images": batch.numpy()})[0])
