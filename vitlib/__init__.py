"""vitlib: the parts behind the notebooks on "Three things everyone should know about Vision Transformers".

Rooms, and the direction of imports: `model` and `data` know nothing of the rest, `train` uses both, `tasks` is for people's
own images and uses all. `errors`, `draws`, `files` and `stats` are the floor that every room stands on. What re-runs and
judges the paper is another package, `lab`.
"""

__version__ = "0.1.0"
# what `vitlib.finetune` and the like are: imported when first asked for
_LAZY = {
    "finetune": "finetune", "predict": "predict", "evaluate": "predict", "compare": "compare", "plan": "plan",
    "pretrain": "pretrain", "export_model": "export",
    "TaskBank": "deltas", "save_delta": "deltas", "load_delta": "deltas",
}  # fmt: skip


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module 'vitlib' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"vitlib.tasks.{_LAZY[name]}"), name)
