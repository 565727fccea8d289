"""The releases of x-transformers that this package supports."""

import warnings
from importlib.metadata import version

MINIMUM = (2, 26)  # 2.17.1 to 2.25.4 multiply queries and keys by the qk-norm scale, on top of the attention scale
BELOW = (3,)


def warn_if_unsupported() -> None:
    """Warn if the installed x-transformers is outside the supported range."""
    installed = version("x-transformers")
    release = tuple(int(part) for part in installed.split(".")[:2] if part.isdigit())
    if not MINIMUM <= release < BELOW:
        found = f"x-transformers {installed} is installed, but palme_xt supports 2.26 to 2.x"
        why = "other releases may compute different numbers from the same weights without an error"
        warnings.warn(f"{found}: {why}; pip install 'x-transformers>=2.26,<3'", stacklevel=3)
