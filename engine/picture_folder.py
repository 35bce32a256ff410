"""The pictures in a folder and below: their names, in one order, whatever else lies there.

The order is that of sorted paths, part by part. A folder is read by os.scandir, a name at a time;
what is kept of a name are its bytes and 8 more, so that a million are some 30 MB.
"""

from __future__ import annotations

import hashlib
import os
import sys
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from . import cli

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".pgm", ".ppm"}
TOLD = 5  # of what is left out, so many are named


class Names(Sequence):
    """Strings that are only appended to, in one piece of memory."""

    def __init__(self, names=()) -> None:
        self.text, self.ends = bytearray(), array("q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        self.text += name.encode("utf-8", "surrogatepass")  # a name on disk may be no UTF-8
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return self.text[start : self.ends[i]].decode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends:
            yield self.text[start:end].decode("utf-8", "surrogatepass")
            start = end

    def digest(self) -> str:
        """Of the names and their order."""
        found = hashlib.sha256(self.text)
        found.update(np.asarray(self.ends, "<i8").tobytes())
        return found.hexdigest()


class Listing:
    """What lies in `folder` and below: `names` of pictures, relative to it, with /.

    Links to files are followed, links to folders are not. What has a picture's suffix and is no
    file (a pipe, a broken link …) and what cannot be listed is left out with a sentence on stderr.
    """

    def __init__(self, folder: Path) -> None:
        from tqdm import tqdm

        self.folder, self.names = os.fspath(folder), Names()
        self.others = 0  # files that are no pictures
        self.kinds: set[str] = set()  # their suffixes, or names
        self.idx = False  # whether Fashion-MNIST's are among them
        self.left_out: list[str] = []  # why, of the first ones
        self.count = 0  # of all of them
        self.links = 0  # to folders
        title = f"listing {cli.shown(self.folder)}"
        with tqdm(desc=title, unit=" names", leave=False, delay=1) as self.progress:
            self._walk()
        del self.progress
        for sentence in self.left_out:
            print(f"left out: {sentence}", file=sys.stderr)
        if self.count > TOLD:
            print(f"left out: {self.count - TOLD} more of this kind", file=sys.stderr)
        if self.links:
            print(
                f"{cli.shown(self.folder)} has {self.links} link(s) to folders, which are not "
                "followed",
                file=sys.stderr,
            )

    def _walk(self) -> None:
        """A folder's names are sorted, and it is gone through where its own name stands: so the
        whole is in the order of the paths' parts."""
        waiting = [("", *self._inside(""))]  # the folders on the way: prefix, names left, folders
        while waiting:
            prefix, names, folders = waiting[-1]
            if not names:
                waiting.pop()
                continue
            path = prefix + names.pop()
            if path[len(prefix) :] in folders:
                waiting.append((f"{path}/", *self._inside(f"{path}/")))
            else:
                self.names.append(path)

    def _inside(self, prefix: str) -> tuple[list[str], set[str]]:
        """Names of pictures and folders in a folder, the last one first; and which are folders."""
        names, folders = [], set()
        try:
            with os.scandir(os.path.join(self.folder, prefix)) as entries:
                for entry in entries:
                    self.progress.update()
                    if entry.is_dir(follow_symlinks=False):
                        folders.add(entry.name)
                    elif not self._is_picture(entry, prefix):
                        continue
                    names.append(entry.name)
        except OSError as error:  # no permission, gone, or too deep
            self._leave_out(prefix or self.folder, f"cannot be listed ({error.strerror or error})")
        names.sort(reverse=True)
        return names, folders

    def _is_picture(self, entry: os.DirEntry, prefix: str) -> bool:
        suffix = os.path.splitext(entry.name)[1]
        picture = suffix.lower() in SUFFIXES
        try:
            if entry.is_file():  # asks the disk only about a link
                if not picture:
                    self.others += 1
                    self.idx |= "-idx3-ubyte" in entry.name
                    if len(self.kinds) < 1000:
                        self.kinds.add(suffix or entry.name)
                return picture
            if entry.is_dir():
                self.links += 1
                return False
        except OSError:  # a link to itself, or into a folder without permission
            pass
        if picture:
            what = "is a broken link" if entry.is_symlink() else "is no file (a pipe or device)"
            self._leave_out(prefix + entry.name, what)
        return False

    def _leave_out(self, name: str, why: str) -> None:
        self.count += 1
        if self.count <= TOLD:
            self.left_out.append(f"{cli.shown(name)} {why}")

    def path(self, i: int) -> str:
        return os.path.join(self.folder, self.names[i])

    def labels(self) -> tuple[list[str], np.ndarray]:
        """Names of the folders right below, and each picture's number among them.

        Raises ValueError, one sentence, for a picture that lies in none.
        """
        classes: dict[str, int] = {}
        numbers = np.empty(len(self.names), np.int64)
        for i, name in enumerate(self.names):
            top, inside, _ = name.partition("/")
            if not inside:
                path = cli.shown(os.path.join(self.folder, name))
                raise ValueError(
                    f"{path} lies in no class folder: for labels, every picture must be in a "
                    f"sub-folder of {cli.shown(self.folder)}; move it into one, or leave "
                    "--classes out"
                )
            numbers[i] = classes.setdefault(top, len(classes))  # the names come sorted
        return list(classes), numbers

    def no_picture(self) -> str:
        """The sentence for a folder without one."""
        folder = cli.shown(self.folder)
        if self.idx:
            return (
                f"--dataset {folder} holds IDX files, no pictures: for Fashion-MNIST, give "
                f"--dataset fashion-mnist --data-dir {folder}"
            )
        some = ", ".join(cli.shown(kind) for kind in sorted(self.kinds)[:5])
        found = f"{self.others} other file(s) ({some})" if self.others else "no file at all"
        return (
            f"--dataset {folder} holds no picture: found {found}, expected "
            f"{', '.join(sorted(SUFFIXES))}; give the folder that has them, in itself or in "
            "sub-folders"
        )
