"""What a user can get wrong, told in one message.

In: any exception. Out: exit code 0 (done), 1 (done in part: `Unfinished`, one message, or ours to mend: a traceback),
2 (the user's to mend, one message), 75 (asked to stop, can be continued: `StoppedEarly`), 130 (Ctrl-C, in commands that
have nothing to save: training makes it 75). Training has more: 124, ended by its watch (`processes/pulse.py`) because
there was no progress or another rank failed; 130 and 143, ended by a second SIGINT or SIGTERM before it had saved.
Under torchrun a rank that was asked to stop exits with 0, for torchrun would start it again; torchrun itself exits with
1 for whatever its ranks fail with.
"""

from __future__ import annotations

import io
import math
import sys
import traceback
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from types import TracebackType

from pipeline.credentials import mask

EXIT_UNFINISHED = 1
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells report it
EXIT_HUNG = 124  # as timeout(1) has it
LONGEST_LINE = 2000  # characters of a message
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: run the same command again to go on


class UserError(ValueError):
    """A mistake in input, configuration or surroundings: says wanted, got and what to do."""


class Unfinished(Exception):  # noqa: N818 - not an error of this program
    """What could be done is done and kept; the message names the rest and says how to go on."""


class StoppedEarly(Exception):  # noqa: N818 - not an error
    """The run was asked to stop and saved its state; the message says how to go on."""


def nearest(word: str, candidates: Iterable[str], *, cutoff: float = 0.5) -> str:
    """`"; did you mean X?"` for the closest candidate, or an empty string; `cutoff`: how alike it is, 1 being equal."""
    matches = get_close_matches(word, list(candidates), n=1, cutoff=cutoff)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def printable(text: str) -> str:
    """`text` with escapes such as `\\x1b` for what a terminal would obey or hide; line ends and tabs stay.

    Control and formatting characters, lone surrogates and the like are escaped, so the result is always valid UTF-8.
    """
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() or character in "\n\t" else character.encode("unicode_escape").decode()
        for character in text
    )


def counted(number: int, noun: str) -> str:
    """`1 file`, `2 files`, `3,000 files`."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def sized(count: float) -> str:
    """Bytes as people say them: `512 bytes`, `12.0 kB`, `3.2 MB`, `120.0 GB`; a kB is a thousand of them."""
    if count < 1000:
        return counted(round(count), "byte")
    power = min(int(math.log10(count)) // 3, 4)
    return f"{count / 1000**power:,.1f} {'kMGT'[power - 1]}B"


def duration(seconds: float) -> str:
    """As h:mm:ss, or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def run_command(main: Callable[[], None]) -> None:
    """Run a script's `main` and turn the user's mistakes into exit codes instead of tracebacks."""
    print_all_characters()
    try:
        main()
    except BaseException as error:
        code = tell(error)
        if code is None:
            raise
        raise SystemExit(code) from None


def print_all_characters() -> None:
    """Print `\\xe9` where a terminal does not know `é`: a name or a text that it lacks is no reason to fail.

    Tracebacks are printed without credentials.
    """
    sys.excepthook = _print_traceback
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _print_traceback(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    print(mask("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


def tell(error: BaseException) -> int | None:
    """Print what a person needs to know of `error`; the exit code, or None where a traceback is due."""
    code, message = verdict(error)
    if message:
        print(message, file=sys.stderr)
    if isinstance(error, BrokenPipeError):
        sys.stderr.close()
    return code


def verdict(error: BaseException) -> tuple[int | None, str]:
    """Exit code and message of an error; (None, "") where a traceback is due.

    Whatever a message quotes, it holds no credentials, no control characters and no endless lines.
    """
    code, message = _verdict(error)
    return code, "\n".join(map(readable, mask(message).split("\n")))


def readable(line: str) -> str:
    """What somebody else wrote as one line: printable, line ends escaped, too, and cut where it has no end."""
    cut = line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."
    return printable(cut).replace("\n", "\\n")


def _verdict(error: BaseException) -> tuple[int | None, str]:
    match error:
        case UserError():
            return EXIT_USER_ERROR, f"error: {error}"
        case Unfinished():
            return EXIT_UNFINISHED, f"unfinished: {error}"
        case StoppedEarly():
            return EXIT_STOPPED, str(error)
        case KeyboardInterrupt():
            return EXIT_INTERRUPTED, ""
        case BrokenPipeError():  # the reader of our output (head, less) went away
            return 0, ""
        case OSError():  # a full disk, a folder without permission, a file where a folder was expected
            where = f" {error.filename}" if error.filename else ""
            return EXIT_USER_ERROR, f"error: cannot use{where or ' a file'}: {error.strerror or error}"
    return None, ""
