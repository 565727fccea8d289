"""The switch between upstream's own computations and faster ones, which differ from them by rounding."""


class Exact:
    """A module that computes something faster than upstream, unless it is told to be exact.

    Attributes:
        exact: Compute as upstream does, bit for bit. On this class, it counts the callers that ask all modules for it.
    """

    exact = 0
