"""SOAP for PyTorch: Adam run in the eigenbasis of Shampoo's preconditioner (arXiv 2409.11321).

Import the optimizer as ``from emerging_optimizers.soap import SOAP``. This top level imports nothing, so that reading
the version costs no import of torch.
"""

__version__ = "0.1.0"

__all__ = ["__version__"]
