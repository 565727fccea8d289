"""Do two models compute the same numbers, and does one still compute the same as before?"""

from palme_xt.parity.comparison import Report, compare

__all__ = ["Report", "compare"]
