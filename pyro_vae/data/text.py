"""Text as rows of tokens: one token for each character, and token 0 for the end of a line."""

import re
import sysconfig
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from pyro_vae.data.sizes import read_bytes
from pyro_vae.errors import UsageError

END = "\n"


def vocabulary_of(lines: Sequence[str]) -> str:
    """The sorted characters of the lines, after the end of a line, which is token 0.

    >>> vocabulary_of(["abba", "cab"])
    '\\nabc'
    """
    return END + "".join(sorted(set("".join(lines)) - {END}))


def as_tokens(lines: Sequence[str], vocabulary: str, length: int) -> Tensor:
    """Lines as rows of tokens (n, length). The token 0 ends a line and fills the rest of its row.

    A line with ``length`` or more characters is cut to ``length`` and has no end token.

    Raises `UsageError` for a character that is not in the vocabulary, for a vocabulary that does
    not start with the end of a line, and for a length below 1.

    >>> as_tokens(["ab", "abc"], "\\nabc", 3)
    tensor([[1, 2, 0],
            [1, 2, 3]])
    """
    if isinstance(lines, str) or not all(isinstance(line, str) for line in lines):
        raise UsageError("must be a list of strings", argument="lines")
    if not isinstance(length, Integral) or length < 1:
        raise UsageError(f"must be a whole number of at least 1, got {length}", argument="length")
    _require_vocabulary(vocabulary)
    number = {character: token for token, character in enumerate(vocabulary)}
    rows = torch.zeros(len(lines), length, dtype=torch.long)
    for row, line in zip(rows, lines, strict=True):
        cut = line[:length]
        unknown = [character for character in cut if number.get(character, 0) == 0]
        if unknown:
            raise UsageError(
                f"the vocabulary of {len(vocabulary) - 1} characters lacks {unknown[0]!r}"
            )
        row[: len(cut)] = torch.tensor([number[character] for character in cut])
    return rows


def as_text(rows: Tensor, vocabulary: str) -> list[str]:
    """Rows of tokens (n, length) as lines, each up to its first end token.

    Raises `UsageError` for a token that is not in the vocabulary, for rows of another shape, and
    for a vocabulary that does not start with the end of a line.

    >>> as_text(torch.tensor([[1, 2, 0, 3], [3, 3, 3, 3]]), "\\nabc")
    ['ab', 'cccc']
    """
    _require_vocabulary(vocabulary)
    rows = torch.as_tensor(rows)
    if rows.dim() != 2:
        raise UsageError(f"must have shape (n, length), got {tuple(rows.shape)}", argument="rows")
    known = (rows >= 0) & (rows < len(vocabulary)) & (rows == rows.floor())
    if not bool(known.all()):
        raise UsageError(
            f"must hold tokens from 0 to {len(vocabulary) - 1}, got {rows[~known][0].item():g}",
            argument="rows",
        )
    lines = ("".join(vocabulary[int(token)] for token in row) for row in rows.tolist())
    return [line.split(END)[0] for line in lines]


def _require_vocabulary(vocabulary: str) -> None:
    if vocabulary[:1] != END or len(set(vocabulary)) != len(vocabulary):
        raise UsageError(
            "must be different characters, of which the first is the end of a line ('\\n'), got "
            f"{vocabulary[:20]!r}",
            argument="vocabulary",
        )


def read_lines(path: Path) -> list[str]:
    """The different non-empty lines of a UTF-8 text file, without leading and trailing spaces.

    Raises `UsageError` for a file that cannot be read as UTF-8.
    """
    try:
        content = read_bytes(path).decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} cannot be read as UTF-8 text ({error})") from error
    lines = dict.fromkeys(line.strip() for line in content.splitlines())
    return [line for line in lines if line]


# The string right after a line that ends in a colon, up to the end of its first paragraph.
_DOCSTRING = re.compile(r""":[ \t]*\n\s+[rR]?(\"{3}|'{3}|"|')(.*?)(?:\1|\n\s*\n)""", re.DOTALL)


def docstrings(length: int) -> list[str]:
    """First sentences of the docstrings of Python's standard library, as lines of text.

    Only sentences with fewer than ``length`` characters are used, and docstrings of tests are left
    out. They are read from the running Python installation (license: PSF-2.0), so they differ a
    little between versions of Python.
    """
    root, found = Path(sysconfig.get_path("stdlib")), dict[str, None]()
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idle_test"}.isdisjoint(path.relative_to(root).parts):
            source = path.read_text(encoding="utf-8", errors="ignore")
            for _, start in _DOCSTRING.findall(source):
                sentence = re.split(r"(?<=\.)\s", " ".join(start.split()))[0]
                found[sentence] = None
    return [line for line in found if len(line) < length and _is_sentence(line)]


def _is_sentence(line: str) -> bool:
    return bool(re.fullmatch(r"[A-Z][ -~]{8,}\.", line))
