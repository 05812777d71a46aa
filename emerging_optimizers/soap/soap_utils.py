"""Eigenbases of a list of Kronecker factors, under the path where they were published."""

from emerging_optimizers.soap.functional import get_eigenbasis_eigh, get_eigenbasis_qr

__all__ = ["get_eigenbasis_eigh", "get_eigenbasis_qr"]
