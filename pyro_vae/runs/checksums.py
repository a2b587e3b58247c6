"""Checksums inside the files of a run, so that reading detects every changed bit.

Each file has its own checksum, so that a crash between two writes damages no file. Files of
version 0.1.0 have no checksum and are read without it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, uint8

from pyro_vae.errors import UsageError

_KEY = "pyro_vae"
"""The only key in the metadata of a safetensors file; several keys have no fixed order."""

_SEAL = b"pyro_vae sha256 "

_SEAL_LENGTH = len(_SEAL) + 64

_ZIP_END, _ZIP_END_LENGTH = b"PK\x05\x06", 22


def checksum(tensors: Iterable[Tensor]) -> str:
    """SHA-256 of the types, shapes and bytes of tensors."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(uint8).numpy().data)
    return digest.hexdigest()


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of tensors, independent of their order.

    >>> import torch
    >>> a, b = torch.zeros(2), torch.ones(3)
    >>> fingerprint({"a": a, "b": b}) == fingerprint({"b": b, "a": a})
    True
    >>> fingerprint({"a": a}) == fingerprint({"a": a.double()})
    False
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(json.dumps([name, checksum([tensors[name]])]).encode())
    return digest.hexdigest()


def tensor_file(tensors: Mapping[str, Tensor], more: str = "") -> bytes:
    """A safetensors file of these tensors, with their fingerprint and ``more`` in its header."""
    seal = json.dumps({"more": more, "sha256": _seal(tensors, more)}, sort_keys=True)
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(whole, metadata={_KEY: seal})


def _seal(tensors: Mapping[str, Tensor], more: str) -> str:
    return hashlib.sha256(json.dumps([fingerprint(tensors), more]).encode()).hexdigest()


def open_tensor_file(content: bytes, path: Path) -> tuple[dict[str, Tensor], str | None]:
    """The tensors of a safetensors file and its ``more``, which is None for files of 0.1.0.

    Raises `UsageError` if the tensors do not match their checksum.
    """
    try:
        tensors = safetensors.torch.load(content)
    except (SafetensorError, KeyError) as error:
        raise UsageError(f"{path} is cut short or not a safetensors file ({error})") from error
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    if "__metadata__" not in header:
        return tensors, None
    try:
        seal = json.loads(header["__metadata__"][_KEY])
        sha256, more = seal["sha256"], seal["more"]
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: its checksum cannot be read") from error
    if sha256 != _seal(tensors, more):
        raise UsageError(f"{path} is damaged: its tensors do not match their checksum")
    return tensors, more


def sealed_archive(content: bytes) -> bytes:
    """A zip archive with the SHA-256 of its content as its comment.

    Programs that read zip archives, such as ``torch.load``, ignore the comment.
    """
    body = content[:-2] + _SEAL_LENGTH.to_bytes(2, "little")
    return body + _SEAL + hashlib.sha256(body).hexdigest().encode()


def require_sealed(content: bytes, path: Path) -> None:
    """Raise `UsageError` if a zip archive differs from what `sealed_archive` made."""
    body, seal = content[:-_SEAL_LENGTH], content[-_SEAL_LENGTH:]
    if seal.startswith(_SEAL):
        whole = seal == _SEAL + hashlib.sha256(body).hexdigest().encode()
    else:  # an archive of 0.1.0 has no comment
        whole = content[-_ZIP_END_LENGTH:].startswith(_ZIP_END) and content.endswith(b"\0\0")
    if not whole:
        raise UsageError(f"{path} is cut short or damaged: it does not match its checksum")


_JSON_END = re.compile(rb',\n  "sha256": "([0-9a-f]{64})"\n\}\n')


def sealed_json(content: bytes) -> bytes:
    """A JSON object, as ``json.dumps(indent=2)`` writes it, with the SHA-256 of its text.

    >>> sealed_json(b'{\\n  "a": 1\\n}\\n')[:32]
    b'{\\n  "a": 1,\\n  "sha256": "d298ee5'
    """
    body = content.removesuffix(b"\n}\n")
    return body + f',\n  "sha256": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def require_sealed_json(content: bytes, path: Path) -> None:
    """Raise `UsageError` if a JSON file differs from what `sealed_json` made."""
    body, end = content[:-_JSON_LENGTH], content[-_JSON_LENGTH:]
    found = _JSON_END.fullmatch(end)
    if found is None or found[1].decode() != hashlib.sha256(body).hexdigest():
        raise UsageError(
            f"{path} is cut short, damaged or edited: it does not match its checksum (sha256)"
        )


_JSON_LENGTH = len(',\n  "sha256": ""\n}\n') + 64
