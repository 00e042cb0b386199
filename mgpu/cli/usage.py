"""What Click and Typer say of a wrong command line, in mgpu's words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

# What Typer's types say of a number, and what is said instead.
_NUMBERS = (
    (r"Input should be a valid integer.*", "it wants a whole number"),
    (r"Input should be a valid number.*", "it wants a number"),
    (r"Input should be greater than or equal to (\S+)", r"it wants \1 or more"),
    (r"Input should be less than or equal to (\S+)", r"it wants \1 or less"),
    (r"Input should be greater than (\S+)", r"it wants more than \1"),
    (r"Input should be less than (\S+)", r"it wants less than \1"),
)
# How much of an option's name must be like what was typed; "frobnicate" is not near "price".
_NEAR = 0.7


def usage_words(error: Exception, message: str) -> str:
    """Return `message`, which Click or Typer has for its usage `error`, with near options only as possible ones."""
    message = message.replace("Value error, ", "")
    # Click writes what can be chosen on lines of their own.
    message = re.sub(r"\. Choose from:\s*", ": one of ", message)
    message = re.sub(r"\s*\n\s*", " ", message).strip()
    for pattern, words in _NUMBERS:
        message = re.sub(pattern, words, message)
    typed, possible = getattr(error, "option_name", None), getattr(error, "possibilities", None)
    if not typed or not possible:
        return message
    near = _near(typed, possible)
    told = f"; did you mean {' or '.join(near)}?" if near else ""
    return f"No such option: {typed[:60]}{told}"


def _near(typed: str, possible: Sequence[str]) -> list[str]:
    """Those of the `possible` options that begin as what was typed, or are spelt much like it; the nearest first."""
    names = {name.lstrip("-"): name for name in possible}
    word = typed.lstrip("-")
    begun = [name for name in names if len(word) > 1 and name.startswith(word)]
    alike = difflib.get_close_matches(word, names, n=3, cutoff=_NEAR)
    return [names[name] for name in dict.fromkeys((*begun, *alike))]
