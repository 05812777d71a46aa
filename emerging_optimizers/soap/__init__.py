"""SOAP and KL-SOAP (arXiv 2409.11321, 2509.03378)."""

from emerging_optimizers.soap.soap import SOAP

__all__ = ["SOAP"]
