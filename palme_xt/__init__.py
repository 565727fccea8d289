"""PalmE, a vision-language model, as a thin and exact composition over x-transformers."""

from palme_xt.support import warn_if_unsupported

warn_if_unsupported()  # before anything of an unsupported release is imported, which may fail

from palme_xt.config import PalmEConfig  # noqa: E402
from palme_xt.model import PalmE  # noqa: E402

__all__ = ["PalmE", "PalmEConfig"]
__version__ = "0.1.0"
