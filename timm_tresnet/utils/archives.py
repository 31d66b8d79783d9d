"""Weights files that claim more than they hold, refused before anything is inflated, allocated or built from them."""

import io
import pickletools
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from timm_tresnet.utils.files import read_bounded

_MOST_TIMES = 4  # what is inflated, over the file; weights hardly compress, and torch.save does not try
_LEAST = 2**24  # bytes that any file may inflate to
_MOST_OPERATIONS = 2_000_000  # of a pickle, each of which can make an object; the largest public weights have 40,000
_MOST_HEADER = 2**24  # bytes of safetensors' JSON; one of the largest public weights has 10**5
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # operations that give an object a number
_LEGACY_PICKLES = 5  # magic number, version, system, what was saved, keys of the storages

ZIP, PICKLE, SAFETENSORS = "zip", "pickle", "safetensors"


def find_format(path: Path) -> str | None:
    """What a weights file begins like: one of `ZIP`, `PICKLE`, `SAFETENSORS`; None for anything else.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it is not a file; a pipe would keep us waiting.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return ZIP
    safetensors = start[8:] == b"{"  # behind the length of the header, in 8 bytes of which the first can be any
    if start[:1] == b"\x80" and not (safetensors and start[3:8] == bytes(5)):  # zeros are no operations of a pickle
        return PICKLE
    return SAFETENSORS if safetensors else None


def check_claims(path: Path) -> str | None:
    """Compare what a weights file claims to hold with its size.

    Args:
        path: the file. Of a zip archive (torch.save, numpy.savez), the records' declared sizes are bounded, and the
            pickle among them as one of torch.save's older form is: in its operations, none of which may make bytes out
            of a number. Of safetensors, the header is. Other formats are not looked into.

    Returns:
        Its format, as `find_format` says.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: if it claims too much, is damaged, or is not a file; the message stands behind the file's name.
    """
    found = find_format(path)
    size = path.stat().st_size
    if found == ZIP:
        _check_zip(path, size)
    elif found == PICKLE:
        with path.open("rb") as file:
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(file)
    elif found == SAFETENSORS:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
        if length > min(size - 8, _MOST_HEADER):
            raise ValueError(
                f"damaged safetensors file: its header claims {length} bytes, where at most "
                f"{min(size - 8, _MOST_HEADER)} can be"
            )
    return found


def read_plain_pickle(path: Path) -> bytes:
    """A pickle that is not one of torch.save, once it is known to be small and to claim no more than it holds.

    Raises:
        OSError: if there is no such file, or it may not be read.
        ValueError: as in `check_claims`.
    """
    content = read_bounded(path, _LEAST)
    _check_pickle(io.BytesIO(content))
    return content


def _check_zip(path: Path, size: int) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            names = {record.filename for record in records}
            # Two readers of one archive must see the same records: PyTorch's is another than Python's.
            if len(names) < len(records) or (records and min(record.header_offset for record in records) != 0):
                raise ValueError("damaged archive: it has two records of one name, or something before the first")
            claimed = sum(record.file_size for record in records)
            if claimed > max(_MOST_TIMES * size, _LEAST):
                raise ValueError(
                    f"its records claim {claimed} bytes, more than {_MOST_TIMES} times the {size} of the file"
                )
            for record in records:
                if record.filename.rpartition("/")[2] == "data.pkl":
                    with archive.open(record) as file:
                        _check_pickle(file)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, zlib.error) as error:
        raise ValueError(f"damaged or foreign file of torch.save: {error}") from error


def _check_pickle(file: IO[bytes]) -> None:
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPERATIONS:
                raise _ClaimError(f"its pickle has more than {_MOST_OPERATIONS} operations")
            if operation.name == "GLOBAL" and argument and argument.endswith("bytearray"):  # of a number: as many zeros
                raise _ClaimError("its pickle makes a bytearray, and a file of weights needs none")
            # Python's reader makes a place for each number below.
            if operation.name in _PUTS and int(argument or 0) > count:
                raise _ClaimError(f"its pickle claims {argument} objects after {count} operations")
    except _ClaimError:
        raise
    except (ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"damaged or foreign file of torch.save: {error}") from error


class _ClaimError(ValueError):
    """What is claimed, where other errors mean damage."""
