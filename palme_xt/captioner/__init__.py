"""Train captioners on your own images, and caption images with them."""

from palme_xt.captioner.caption import Captioner

__all__ = ["Captioner"]
