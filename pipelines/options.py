"""A command line of the tools: what is wrong with it is said in one line, by the exception of all wrong requests."""

from __future__ import annotations

import argparse
from typing import NoReturn

from distill.config import RecipeError


class Parser(argparse.ArgumentParser):
    """argparse without its usage lines and its exit on an error, and without guessing at shortened options."""

    def __init__(self, *, description: str, epilog: str = "", usage: str | None = None) -> None:
        super().__init__(
            description=description,
            epilog=epilog,
            usage=usage,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        """Raises RecipeError."""
        raise RecipeError(f"{message}; see --help")
