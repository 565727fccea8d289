"""PalmE, a vision-language model, as a thin and exact composition over x-transformers."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palme_xt.config import PalmEConfig
    from palme_xt.model import PalmE
else:

    def __getattr__(name):
        # Import on first use, so that `palme-xt --version` does not wait for torch.
        if name not in __all__:
            raise AttributeError(f"module 'palme_xt' has no attribute {name!r}")
        from palme_xt import config, model

        return {"PalmE": model.PalmE, "PalmEConfig": config.PalmEConfig}[name]

    def __dir__():
        return [*globals(), *__all__]  # for help() and completion, which would not find them


__all__ = ["PalmE", "PalmEConfig"]
__version__ = "0.3.0"
