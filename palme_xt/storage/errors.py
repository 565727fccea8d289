"""Turn the errors of other libraries into one line that says what was read or written."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def explained(what: str, kind: type[ValueError] = ValueError, remedy: str = "") -> Iterator[None]:
    """Turn any error inside into one of the given kind, on one line that begins with `what` and ends with `remedy`."""
    try:
        yield
    except Exception as error:  # some libraries raise errors of many types, or bare ones
        raise kind(f"{what}: {one_line(error)}{remedy}") from error


def one_line(value: object) -> str:
    """Return the message of an error on one line, or the name of its type if it has none, or any other value."""
    if isinstance(value, OSError) and value.strerror:
        return value.strerror
    if isinstance(value, KeyError):
        return f"{value} is missing"
    return " ".join(str(value).split()) or type(value).__name__
