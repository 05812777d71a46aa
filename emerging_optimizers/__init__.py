"""SOAP for PyTorch: Adam run in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

The optimizer's home is ``emerging_optimizers.soap``. ``from emerging_optimizers import SOAP`` finds it too, but nothing
is imported before that is asked for, so that reading the version costs no import of torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from emerging_optimizers.soap import SOAP as SOAP

__version__ = "0.1.0"

__all__ = ["SOAP", "__version__"]


def __getattr__(name: str) -> Any:
    if name == "SOAP":
        from emerging_optimizers.soap import SOAP

        return SOAP
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
