"""Command lines: how every command parses, refuses and ends."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from distill.children import begin_work
from distill.errors import EXIT_CODE, Failed, Interrupted, LossError, RequestError

SPEAK_SECONDS = 5.0
"""How long processes of one launcher wait for the one that says what is wrong; they start within a second of each other."""
KINDS = {"int": "whole number", "float": "number"}
"""What argparse calls by the name of a type."""


class Parser(argparse.ArgumentParser):
    """argparse without its usage lines and its exit on an error, without guessing at shortened options, and with the nearest
    name for an unknown one."""

    def __init__(self, **options: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options)
        self.register("type", Path, _path)

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """The values of all options. Raises RequestError for what is no option."""
        words = sys.argv[1:] if args is None else list(args)
        options = set(_options(self, words))
        # before argparse looks: of a misspelt option it would say that the right one is missing
        given = [word.split("=")[0] for word in words[: words.index("--") if "--" in words else None] if " " not in word]
        if unknown := [name for name in given if name.startswith("--") and name not in options]:
            raise RequestError("; ".join(unknown_arguments(unknown, self, words)))
        known, more = self.parse_known_args(words, namespace)
        if more:
            raise RequestError("; ".join(unknown_arguments(more, self, words)))
        return known

    def error(self, message: str) -> NoReturn:
        """Raises RequestError."""
        told = re.sub(r"invalid (\w+) value: (.*)", lambda m: f"{m[2]} is no {KINDS.get(m[1], m[1])}", message)
        raise RequestError(f"{told.removeprefix('argument ')}; see --help")


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """A type for `add_argument`: a whole number of at least `least`, and at most `most`."""
    rule = f"of at least {least}" if most is None else f"from {least} to {most}"

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least or (most is not None and value > most):
            raise argparse.ArgumentTypeError(f"{text} is no whole number {rule}")
        return value

    return read


def percent(text: str) -> float:
    """A type for `add_argument`: a share in per cent, from 0 to 100."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"{text} is no share from 0 to 100 per cent")
    return value


def _path(text: str) -> Path:
    """The type of paths: `Path("")` would be the folder in which the command was started."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no path")
    return Path(text)


def new_file(text: str) -> Path:
    """A type for `add_argument`: a file that a command writes at its end. What cannot be written is refused before the work.

    It is written beside and renamed (`files.written_aside`): its folder is written to, and a device or a pipe cannot be it.
    """
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a folder; give a file in it")
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{path} is a device or a pipe; give a file")
    path = path.resolve() if path.is_symlink() else path  # the new file would take the place of the link
    if not path.absolute().parent.is_dir():
        raise argparse.ArgumentTypeError(f"{path.absolute().parent} is no folder; make it first")
    if not all(os.access(each, os.W_OK) for each in (path.absolute().parent, path) if each.exists()):
        raise argparse.ArgumentTypeError(f"{path} cannot be written: no right to; give another file")
    return path


def _options(parser: argparse.ArgumentParser, words: Sequence[str]) -> Iterator[str]:
    """The options of a parser and of the command that the words name; of all its commands where they name none."""
    for action in parser._actions:
        yield from action.option_strings
        if isinstance(action, argparse._SubParsersAction):
            named = next((word for word in words if word in action.choices), None)
            for command in [action.choices[named]] if named else action.choices.values():
                yield from _options(command, words)


def unknown_arguments(arguments: Sequence[str], parser: argparse.ArgumentParser, words: Sequence[str] = ()) -> list[str]:
    """A line for each argument that is no option of the parser, with the nearest one; `words` name its command."""
    problems, options = [], list(_options(parser, words))
    for argument in arguments:
        if argument.startswith("--"):
            name = argument.split("=")[0]
            problems.append(f"{name}: unknown option{_remedy(name, options)}")
    return problems or [f"{argument}: not expected here; see --help" for argument in arguments[:1]]


def _remedy(name: str, options: Sequence[str]) -> str:
    """The end of a message about an unknown option: the nearest of its section comes before those of other sections."""
    section, _, last = name.rpartition(".")
    inside = _names_in(section, options)
    if close := nearest(last, inside):
        return f", did you mean {section}.{close}?"
    above, _, inner = section.rpartition(".")
    if above and inside:
        return f"; {section} has {', '.join(inside)}"
    if above and (sections := _names_in(above, options)):
        close = nearest(inner, sections)
        meant = [each for each in (f"{above}.{close}.{last}", f"{above}.{close}") if each in options]
        return f", did you mean {meant[0]}?" if meant else f"; {above} has {', '.join(sections)}"
    close = nearest(name, options)
    return f", did you mean {close}?" if close else "; see --help"


def _names_in(section: str, options: Sequence[str]) -> list[str]:
    """The names that may follow a section and a dot; not NAME, which stands for all of them."""
    found = [each.removeprefix(f"{section}.").split(".")[0] for each in options if section and each.startswith(f"{section}.")]
    return [each for each in dict.fromkeys(found) if each != "NAME"]


def nearest(name: str, names: Sequence[str]) -> str | None:
    """The one of `names` that is meant by `name`: by its last part (`epochs`), that part's initials (`lr`), or the spelling."""

    def last(text: str) -> str:
        return text.lstrip("-").rpartition(".")[2]

    def initials(text: str) -> str:
        return "".join(word[:1] for word in re.split("[-_]", last(text)))

    same = [each for each in names if last(name) in (last(each), initials(each))]
    close = difflib.get_close_matches(name, same or names, n=1, cutoff=0.0 if same else 0.5)
    return close[0] if close else None


@contextmanager
def requests() -> Iterator[None]:
    """Turns every ValueError inside into a RequestError: what cannot be built as asked is the request's fault."""
    try:
        yield
    except RequestError:
        raise
    except ValueError as error:
        raise RequestError(str(error)) from error


def check_text(words: Sequence[str]) -> None:
    """RequestError where the bytes of a word of the command line are no UTF-8: names are kept in JSON and printed."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise RequestError(
                f"{word.encode(errors='backslashreplace').decode()}: is no UTF-8; rename it, or give a link with another name"
            ) from None


def command(run: Callable[[Sequence[str]], int | None]) -> Callable[..., int]:
    """A command's `main`: it calls `run` with the command line (sys.argv where nobody gives one) and returns the exit code.

    0, or what `run` returns; 2 for a wrong request (RequestError, or LossError of a user's own loss), after one line that says
    what is wrong; 1, after such a line, for what failed (Failed); 75 for a run that was asked to stop and has saved
    (Interrupted); 130 for a Ctrl-C that nothing else takes. Any other exception passes: Python prints it and exits with 1.
    """

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        """`run`, with an answer for each way in which it ends."""
        begin_work()
        # processes of one machine would say the same; another machine may lack a file that this one has
        speaks = os.environ.get("LOCAL_RANK", "0") == "0"
        words = sys.argv[1:] if argv is None else argv
        try:
            check_text(words)
            return run(words) or 0
        except Interrupted as interruption:
            if speaks:
                print(interruption)
            return EXIT_CODE
        except (RequestError, LossError) as error:
            if speaks:
                print(f"error: {error}", file=sys.stderr, flush=True)
            elif "TORCHELASTIC_RUN_ID" in os.environ:
                # torchrun ends all others as soon as one ends: the one that speaks may still be importing
                time.sleep(SPEAK_SECONDS)
            return 2
        except Failed as error:  # perhaps of one process alone
            print(f"error: {error}", file=sys.stderr, flush=True)
            return 1
        except KeyboardInterrupt:
            if speaks:
                print("interrupted", file=sys.stderr, flush=True)
            return 128 + signal.SIGINT

    return main
