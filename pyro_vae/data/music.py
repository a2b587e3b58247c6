"""Music as piano rolls, which show the sounding keys (of 88) at each step.

A file is JSON in the format of the JSB chorales (Boulanger-Lewandowski et al., 2012). It is an
object with the parts "train", "valid" (or "validation") and "test". Each part is a list of pieces,
a piece is a list of steps, and a step is a list of the MIDI numbers that sound. A number outside
the keyboard is a rest.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor

from pyro_vae.data.sizes import read_bytes
from pyro_vae.errors import UsageError

Piece: TypeAlias = Sequence[Sequence[float]]

LOWEST, KEYS = 21, 88
"""The MIDI number of the lowest key of a piano, and the number of keys."""


def read_pieces(path: Path) -> dict[str, list[Piece]]:
    """The pieces of a file by part: "train", "validation" and "test".

    Raises `UsageError` for a file that cannot be read or has another format.
    """
    try:
        content = json.loads(read_bytes(path))
    except UsageError:
        raise
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} cannot be read as JSON ({error})") from error
    if isinstance(content, dict) and "valid" in content:
        content["validation"] = content.pop("valid")
    parts = ("train", "validation", "test")
    if not (isinstance(content, dict) and all(_are_pieces(content.get(part)) for part in parts)):
        raise UsageError(
            f"{path} must be an object with the parts train, valid and test: each part is a list "
            "of pieces, a piece is a list of steps, and a step is a list of MIDI numbers"
        )
    return {part: content[part] for part in parts}


def piano_rolls(pieces: Sequence[Piece], steps: int) -> Tensor:
    """Pieces as zeros and ones of shape (n, steps, 88), with zeros after the end of a piece.

    >>> piano_rolls([[[21, 23], [-1]]], 3)[0, :, :4]
    tensor([[1., 0., 1., 0.],
            [0., 0., 0., 0.],
            [0., 0., 0., 0.]])
    """
    rolls = torch.zeros(len(pieces), steps, KEYS)
    for roll, piece in zip(rolls, pieces, strict=True):
        for row, sounding in zip(roll, piece, strict=False):
            for number in sounding:
                if 0 <= number - LOWEST < KEYS:
                    row[int(number) - LOWEST] = 1
    return rolls


def _are_pieces(part: object) -> bool:
    return (
        isinstance(part, list)
        and len(part) > 0
        and all(isinstance(piece, list) and piece for piece in part)
        and all(isinstance(step, list) for piece in part for step in piece)
        and all(isinstance(note, (int, float)) for piece in part for step in piece for note in step)
    )
