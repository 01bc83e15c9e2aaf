"""Every error of ours, with the exit code of the command line.

    ThermofuseError        1
    ├── UsageError         2   what was asked for does not exist or does not fit
    ├── BadSample          -   one frame cannot be used; it is quarantined and the stage goes on
    ├── StageFailed        1   a stage cannot go on (too many bad samples, NaN, a full disk)
    └── LeaseHeld          3   another run holds the lease

The message is one sentence that says what to do next. Everything else that escapes is a bug.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class ThermofuseError(Exception):
    exit_code = 1


class UsageError(ThermofuseError):
    exit_code = 2


class BadSample(ThermofuseError):
    """Raised by readers; carries the reason that the quarantine records."""


class StageFailed(ThermofuseError):
    pass


class LeaseHeld(ThermofuseError):
    exit_code = 3


def unknown(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """The error for a name that is none of the `known` ones: it lists them, and guesses which was meant.

    kind: what is named, where the caller knows ("" where it does not).
    """
    close = get_close_matches(name, known := list(known), n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return UsageError(f"There is no {kind + ' ' if kind else ''}{name!r}; choose one of {', '.join(known)}.{hint}")
