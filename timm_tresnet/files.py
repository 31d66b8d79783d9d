"""Files and folders that appear whole or not at all."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path, overwrite: bool = True) -> Iterator[Path]:
    """Have a file or folder written under another name, and renamed to its own when it is complete.

    What is written is in a hidden folder beside path. When the block ends without an error, all that is in it takes its
    place beside path, path itself last; until then nothing is there.

    Args:
        path: the final name.
        overwrite: replace a file of that name.

    Yields:
        Where to write. Files that belong to it can be written beside it.

    Raises:
        FileExistsError: if path has come to exist and overwrite is not set; says where the complete one is.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        yield Path(folder) / path.name
        if not overwrite and path.exists():
            left = path.with_name(f"{Path(folder).name}.complete")
            os.replace(Path(folder) / path.name, left)
            raise FileExistsError(f"{path} came to exist meanwhile and is left as it is; what was made is in {left}")
        for entry in sorted(Path(folder).iterdir(), key=lambda entry: entry.name == path.name):
            os.replace(entry, path.with_name(entry.name))
