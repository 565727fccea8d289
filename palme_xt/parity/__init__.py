"""Check whether two models compute the same numbers, and whether one model still computes the same as before."""

from typing import TYPE_CHECKING

from palme_xt.parity.comparison import Outcome, Report, compare
from palme_xt.parts import exactly

if TYPE_CHECKING:
    from palme_xt.parity.drift import Verdict, check, record
else:

    def __getattr__(name):
        # Import on first use, because `compare` does not need safetensors.
        if name not in __all__:
            raise AttributeError(f"module 'palme_xt.parity' has no attribute {name!r}")
        from palme_xt.parity import drift

        return getattr(drift, name)


__all__ = ["Outcome", "Report", "Verdict", "check", "compare", "exactly", "record"]
