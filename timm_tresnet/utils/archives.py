"""Refuse weights files whose declared sizes exceed the file, before anything is inflated or allocated."""

import io
import pickletools
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from typing import IO

from timm_tresnet.utils.files import read_bounded

_MOST_TIMES = 4  # inflated size over file size; weights hardly compress, and torch.save does not compress them
_LEAST = 2**24  # bytes that any file may inflate to, however small it is
_MOST_OPERATIONS = 2_000_000  # in a pickle; each can create an object. The largest public weights have 40,000
_MOST_HEADER = 2**24  # bytes of the safetensors header; the largest public weights have 10**5
_PUTS = ("PUT", "BINPUT", "LONG_BINPUT")  # operations that store an object in the memo under a given number
_LEGACY_PICKLES = 5  # magic number, version, system, saved object, keys of the storages

ZIP, PICKLE, SAFETENSORS = "zip", "pickle", "safetensors"


def find_format(path: Path) -> str | None:
    """Return the format of a weights file by its first bytes: `ZIP`, `PICKLE` or `SAFETENSORS`; None if unknown.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if it is not a regular file. Reading a pipe would block.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError("not a file")
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return ZIP
    safetensors = start[8:] == b"{"  # after the header's length, 8 bytes, whose first can be any value
    if start[:1] == b"\x80" and not (safetensors and start[3:8] == bytes(5)):  # 0 is not an operation of a pickle
        return PICKLE
    return SAFETENSORS if safetensors else None


def check_claims(path: Path) -> str | None:
    """Compare the declared sizes in a weights file with the size of the file.

    Zip archives (torch.save, numpy.savez): the records' declared sizes are bounded. Pickles, in an archive or in
    torch.save's older format: the number of operations is bounded, and no operation may create bytes from a number.
    safetensors: the header's length is bounded. Other formats are not examined.

    Returns:
        The file's format, see `find_format`.

    Raises:
        OSError: if the file does not exist or may not be read.
        ValueError: if it declares too much, is damaged, or is not a regular file. The message follows the file's name.
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
                f"damaged safetensors file: its header declares {length} bytes, at most "
                f"{min(size - 8, _MOST_HEADER)} are possible"
            )
    return found


def read_plain_pickle(path: Path) -> bytes:
    """Return the bytes of a pickle that was not written by torch.save, after checking its size and operations.

    Raises:
        OSError: if the file does not exist or may not be read.
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
            # PyTorch reads archives with its own code. It must see the same records as Python's zipfile.
            if len(names) < len(records) or (records and min(record.header_offset for record in records) != 0):
                raise ValueError("damaged archive: two records have the same name, or data precedes the first record")
            claimed = sum(record.file_size for record in records)
            if claimed > max(_MOST_TIMES * size, _LEAST):
                raise ValueError(
                    f"its records declare {claimed} bytes, more than {_MOST_TIMES} times the file's {size}"
                )
            for record in records:
                if record.filename.rpartition("/")[2] == "data.pkl":
                    if record.CRC == 0:  # none was computed: torch.serialization.set_crc32_options(False)
                        del record.CRC
                    with archive.open(record) as file:
                        _check_pickle(io.BytesIO(file.read()))  # read whole, as by PyTorch: a third of the time
    except (zipfile.BadZipFile, EOFError, NotImplementedError, OverflowError, RuntimeError, zlib.error) as error:
        raise ValueError(f"damaged file, or not written by torch.save: {error}") from error


def _check_pickle(file: IO[bytes]) -> None:
    try:
        for count, (operation, argument, _) in enumerate(pickletools.genops(file)):
            if count > _MOST_OPERATIONS:
                raise _ClaimError(f"its pickle has more than {_MOST_OPERATIONS} operations")
            if operation.name == "GLOBAL" and argument and argument.endswith("bytearray"):  # bytearray(n) makes n zeros
                raise _ClaimError("its pickle creates a bytearray, which weights do not need")
            # Python's unpickler allocates a memo entry for each number up to this one.
            if operation.name in _PUTS and int(argument or 0) > count:
                raise _ClaimError(f"its pickle declares {argument} objects after {count} operations")
    except _ClaimError:
        raise
    except (ValueError, OverflowError, struct.error) as error:
        raise ValueError(f"damaged file, or not written by torch.save: {error}") from error


class _ClaimError(ValueError):
    """A declared size or operation is refused; any other ValueError means that the file is damaged."""
