"""Subclasses of x-transformers' modules, each for a defect of its releases. Importing it warns of unsupported ones."""

from palme_xt.upstream.versions import warn_if_unsupported

warn_if_unsupported()
