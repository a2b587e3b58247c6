"""AnnData on disk: HDF5 files (.h5ad) and zarr stores (.zarr), which are read alike.

No code of a file runs. A zarr store is a folder of anyone's making: its links, its codecs and the
sizes that it declares are checked before an array is read."""

import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil, prod
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pyro_vae.errors import UsageError, first_line

FILE = ".h5ad"
"""The ending of AnnData files."""

STORE = ".zarr"
"""The ending of AnnData stores, which are folders."""

ENDINGS = (FILE, STORE)
"""The endings of AnnData on disk."""

CODECS = (
    *("bytes", "vlen-bytes", "vlen-utf8", "sharding_indexed", "transpose", "delta", "shuffle"),
    *("blosc", "bz2", "gzip", "lz4", "packbits", "zlib", "zstd", "crc32", "crc32c"),
)
"""The codecs of zarr that may be read; others, such as pickle, can run code of the store."""

Mode = Literal["r", "r+"]

_SMALL, _RATIO = 2**26, 1000
"""An array may declare 64 MiB, and 1000 times what the store holds: chunks of zeros are absent."""

_FEW_CHUNKS, _CHUNKS_PER_FILE = 10_000, 100

_UNREADABLE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


@contextmanager
def opened(path: Path, mode: Mode = "r") -> Iterator[Any]:
    """The root group of an AnnData file or store.

    Raises `UsageError` if it cannot be read, or if the package that reads it is not installed.
    """
    opener, kind = (_store, "store") if path.suffix == STORE else (_file, "file")
    try:
        with opener(path, mode) as root:
            yield root
    except UsageError:
        raise
    except _UNREADABLE as error:
        words = first_line(error)[:120]
        ending = STORE if kind == "store" else FILE
        raise UsageError(f"{path} cannot be read as a {ending} {kind} ({words})") from error


def strings(element: Any) -> np.ndarray:
    """The words of an array of words, as objects."""
    return np.asarray(element.asstr()[:] if hasattr(element, "asstr") else element[:], object)


def require_whole(element: Any, path: Path) -> None:
    """Raise `UsageError` if an array of a store lacks chunks, which zarr would fill with zeros.

    This is right only for arrays that hold no chunk of zeros, such as the names of cells.
    """
    count, found = getattr(element, "nchunks", 0), getattr(element, "nchunks_initialized", 0)
    if found < count:
        raise UsageError(
            f"{path} is not complete: {element.name} has {found} of its {count} chunks"
        )


@contextmanager
def _file(path: Path, mode: Mode) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise _not_installed(FILE, "h5py", "anndata") from error
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    # A file that is changed is a temporary one, which `data.temporary` has locked already.
    with h5py.File(path, mode, locking=None if mode == "r" else False) as file:
        yield file


@contextmanager
def _store(path: Path, mode: Mode) -> Iterator[Any]:
    try:
        import zarr
        from zarr.storage import LocalStore
    except ImportError as error:
        raise _not_installed(STORE, "zarr 3", "zarr") from error
    if not path.is_dir():
        raise UsageError(f"{path}: no such folder")
    held = _held(path)
    local = LocalStore(path, read_only=mode == "r")
    # Consolidated metadata repeat those of the arrays, and can differ from them.
    group = zarr.open_group(local, mode=mode, use_consolidated=False)
    yield _Group(group, path, held)


def _not_installed(ending: str, package: str, extra: str) -> UsageError:
    what = "files" if ending == FILE else "stores"
    return UsageError(
        f"{ending} {what} need {package}, which is not installed; run pip install "
        f"'pyro-vae[{extra}]'"
    )


@dataclass(frozen=True)
class _Held:
    """What a store holds: the number of its files and their bytes."""

    files: int
    bytes: int


def _held(path: Path) -> _Held:
    """What a store holds; raise `UsageError` for a link that leaves it, and for a device."""
    root, sizes = path.resolve(), []
    for folder, folders, files in os.walk(path):
        for name in (*folders, *files):
            part = Path(folder, name)
            if part.is_symlink() and not part.resolve().is_relative_to(root):
                raise UsageError(f"{part} is a link that leaves the store: copy what it names")
            found = part.stat()
            if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
                raise UsageError(f"{part} is not a file, so {path} is not read")
        sizes += [Path(folder, name).stat().st_size for name in files]
    return _Held(len(sizes), sum(sizes))


@dataclass(frozen=True)
class _Group:
    """A group of a zarr store that is used like one of h5py, and checks the arrays it returns."""

    group: Any
    path: Path
    held: _Held

    @property
    def attrs(self) -> Any:
        return self.group.attrs

    @property
    def name(self) -> str:
        return self.group.name

    def __contains__(self, name: str) -> bool:
        return name in self.group

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.group.keys()))

    def __getitem__(self, name: str) -> Any:
        element = self.group[name]
        if not hasattr(element, "shape"):
            return _Group(element, self.path, self.held)
        _require_codecs(element, self.path)
        _require_held(element, self.path, self.held)
        return element


def _require_codecs(array: Any, path: Path) -> None:
    """Raise `UsageError` for a codec that is not among those that are known to run no code."""
    for name in _codecs(array.metadata.to_dict()):
        if name.removeprefix("numcodecs.") not in CODECS:
            raise UsageError(f"{array.name} of {path} needs the codec '{name}', which is refused")


def _codecs(metadata: dict[str, Any]) -> Iterator[str]:
    """The names of the codecs of an array in format 2 or 3, with those inside of shards."""
    given = [*(metadata.get("filters") or ()), metadata.get("compressor")]
    given += [*(metadata.get("codecs") or ()), *(metadata.get("index_codecs") or ())]
    for codec in given:
        if codec is not None:
            codec = codec if isinstance(codec, dict) else _configuration(codec)
            yield str(codec.get("id") or codec["name"])
            yield from _codecs(codec.get("configuration") or {})


def _configuration(codec: Any) -> dict[str, Any]:
    """The description of a codec of numcodecs or zarr."""
    return codec.get_config() if hasattr(codec, "get_config") else codec.to_dict()


def _require_held(array: Any, path: Path, held: _Held) -> None:
    """Raise `UsageError` if an array declares much more than the store holds."""
    chunk = array.shards or array.chunks
    sizes = [max(pair) for pair in zip(array.shape, chunk, strict=True)]
    need = prod(sizes) * array.dtype.itemsize
    chunks = prod(ceil(size / part) for size, part in zip(array.shape, chunk, strict=True))
    too_many = chunks > _FEW_CHUNKS + _CHUNKS_PER_FILE * held.files
    if need > _SMALL + _RATIO * held.bytes or too_many:
        shape = " × ".join(map(str, array.shape))
        raise UsageError(
            f"{array.name} of {path} declares {shape} values in {chunks:,} chunks, but the store "
            f"holds only {held.bytes:,} bytes in {held.files:,} files: it is damaged"
        )
