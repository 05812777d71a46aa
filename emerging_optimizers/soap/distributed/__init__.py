"""Stepping parameters that several processes hold: another driver of the same ``soap_step``."""
