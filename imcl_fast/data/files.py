"""Finds and fetches the files of a data set."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

from ..models import import_torchvision
from .dataset import DataError, MissingData


def find(name: str, folders: Sequence[Path], files: Iterable[str], source: str) -> Path:
    """The first folder that holds all files; there are no folders if the user named none.

    Raises:
        MissingData: there is no such folder; the message has ``name``, the data set's, and
            ``source``, where to get them.
    """
    files = list(files)
    for folder in folders:
        if all((folder / file).is_file() for file in files):
            return folder
    if not folders:
        raise MissingData(
            f"{name}: expected the folder that {files[0]} lies in as root (--data-root), got none; "
            f"{source}"
        )
    places = " or ".join(str(folder) for folder in folders)
    # The folder that lacks least: where most of a set is there, one file's name helps more.
    missing = min(
        ([file for file in files if not (folder / file).is_file()] for folder in folders), key=len
    )
    others = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
    raise MissingData(f"{name}: {missing[0]}{others} not found in {places}; {source}")


def find_or_fetch(
    name: str,
    root: Path | None,
    folder: str,
    files: Sequence[str],
    source: str,
    theirs: Any,
    download: bool,
) -> Path:
    """``find`` in ``root`` or its ``folder``; first with ``download``, if they aren't there, the
    archive of ``theirs``, torchvision's class of the data set, is unpacked in ``root``."""
    folders = [] if root is None else [root / folder, root]
    try:
        return find(name, folders, files, source)
    except MissingData:
        if not download or root is None:
            raise
    fetch(name, theirs.url, root, theirs.tgz_md5)
    return find(name, folders, files, source)


def fetch(name: str, url: str, folder: Path, md5: str) -> None:
    """Download one file into ``folder``, check it, and unpack it there if it is an archive.

    Raises:
        DataError: the download failed, or isn't what it should be.
    """
    utils: Any = import_torchvision().datasets.utils
    file = url.rsplit("/", 1)[-1]
    try:
        if file.endswith(".tar.gz"):
            utils.download_and_extract_archive(url, str(folder), filename=file, md5=md5)
        else:
            utils.download_url(url, str(folder), filename=file, md5=md5)
    except (OSError, URLError, RuntimeError) as error:
        problem = " ".join(str(error).split())
        raise DataError(f"{name}: downloading {url} failed: {problem}") from error
