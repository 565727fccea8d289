"""Errors explained on one line."""

from __future__ import annotations

import pytest

from palme_xt.storage.files import explained


class Unusual(ValueError):
    """An error of the caller's kind."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RuntimeError("two\nlines"), "it broke: two lines; mend it"),
        (KeyError("name"), "it broke: 'name' is missing; mend it"),
        (FileNotFoundError(2, "No such file", "x"), "it broke: No such file; mend it"),
        (AssertionError(), "it broke: AssertionError; mend it"),
    ],
)
def test_any_error_becomes_one_line_of_the_kind(error: Exception, message: str) -> None:
    with pytest.raises(Unusual) as raised, explained("it broke", Unusual, "; mend it"):
        raise error
    assert str(raised.value) == message
    assert raised.value.__cause__ is error


def test_a_package_that_is_not_installed_is_its_own_error() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^pip install it$"), explained("it broke", Unusual):
        raise ModuleNotFoundError("pip install it")
