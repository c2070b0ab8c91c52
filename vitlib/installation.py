"""Is the installation whole? One sentence where it is not."""

from __future__ import annotations

from vitlib.errors import UsageError


def check_pair() -> str:
    """The versions of torch, torchvision and timm. Raises UsageError where torch and torchvision are no pair.

    torchvision's compiled operators belong to one build of torch: beside another (a CPU-only torch, say) its import
    fails with "operator torchvision::nms does not exist", and timm imports torchvision.
    """
    import torch

    try:
        import torchvision
    except (RuntimeError, ImportError, OSError) as fault:
        raise UsageError(
            f"torch {torch.__version__} and the installed torchvision are not builds of one family "
            f"({str(fault).splitlines()[0]}): remove .venv and run `make setup`, which takes the matching pair"
        ) from fault
    import timm

    return f"torch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}"
