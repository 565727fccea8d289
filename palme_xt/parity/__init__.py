"""Check whether two models compute the same numbers, and whether one model still computes the same as before."""

from palme_xt.parity.comparison import Report, compare

__all__ = ["Report", "compare"]
