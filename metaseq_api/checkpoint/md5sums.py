"""Lists of md5 sums as Meta publishes them (csv: a file's name, its sum), and files held against them.

What a list says is advice: those of OPT-175B were replaced twice while the weights stayed the same, users with sound
shards do not match them, and that of OPT-66B gives one sum to two files; torch.save's bytes depend on its version. Does
not know what is in a file.
"""

from __future__ import annotations

import csv
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from metaseq_api.checkpoint.finding import Finding
from metaseq_api.errors import CheckpointNotFound, SettingsError
from metaseq_api.progress import Progress

BLOCK = 8 << 20
"""Units: bytes."""
MAX_LIST = 64 << 20
"""Units: bytes of a list."""
ADVICE = "advice only: such lists were replaced for the same weights, and sums depend on torch's version"
_SUM = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Md5Sums:
    """A list: the sums by file name."""

    path: Path
    sums: dict[str, str]

    @staticmethod
    def read(path: Path) -> Md5Sums:
        """Raises: SettingsError where the file is no such list."""
        try:
            with path.open(newline="", encoding="utf-8", errors="strict") as file:
                rows = list(csv.reader(file.read(MAX_LIST).splitlines()))
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror}); name a list with --checksums") from None
        except (ValueError, csv.Error):
            rows = []
        pairs = [[cell.strip() for cell in row] for row in rows]
        sums = {Path(row[0]).name: row[1].lower() for row in pairs if len(row) > 1 and _SUM.fullmatch(row[1].lower())}
        if not sums or not all(name.isprintable() for name in sums):
            raise SettingsError(
                f"{path} has no line of a file's name, a comma and an md5 sum; name a list with --checksums"
            )
        return Md5Sums(path, sums)

    def compare(
        self, folder: Path, progress: Callable[[int], Progress] = lambda total: lambda done: None
    ) -> Iterator[Finding]:
        """Say which files differ from the list, and which it names that are not in the folder.

        Raises: CheckpointNotFound where one cannot be read.
        """
        present = [folder / name for name in self.sums if (folder / name).is_file()]
        tell = progress(sum(path.stat().st_size for path in present))
        missing = [name for name in self.sums if not (folder / name).is_file()]
        if missing:
            names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
            what = f"lists {len(missing)} of {len(self.sums)} files that are not in {folder}: {names}"
            yield Finding(self.path, what, fatal=False)
        repeated = Counter(self.sums.values())
        for path in present:
            wanted, found = self.sums[path.name], _md5(path, tell)
            if found != wanted:
                twice = ", where another file has it too" if repeated[wanted] > 1 else ""
                what = f"has the md5 sum {found}, not {wanted} as in {self.path.name}{twice} ({ADVICE})"
                yield Finding(path, what, fatal=False)


def beside(folder: Path) -> Path | None:
    """Find the list that lies in a folder, if there is one."""
    return next(iter(sorted(folder.glob("*md5*.csv"))), None)


def _md5(path: Path, tell: Progress) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK):
                digest.update(block)
                tell(len(block))
    except OSError as error:
        raise CheckpointNotFound(f"{path} cannot be read ({error.strerror}); make it readable") from None
    return digest.hexdigest()
