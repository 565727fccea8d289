"""PalmE, a vision-language model, as a thin and exact composition over x-transformers."""

from palme_xt.config import PalmEConfig
from palme_xt.model import PalmE

__all__ = ["PalmE", "PalmEConfig"]
__version__ = "0.1.0"
