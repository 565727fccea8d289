"""Subclasses that fix defects of x-transformers' modules. Importing this package warns about unsupported releases."""

from palme_xt.upstream.versions import warn_if_unsupported

warn_if_unsupported()
