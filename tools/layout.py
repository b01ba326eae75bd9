"""Where the tools read and write. All take their folders from here, so a project elsewhere works too."""

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Layout:
    """The folders of one checkout."""

    root: Path = HERE

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def profiles(self) -> Path:
        return self.notebooks / "profiles"

    @property
    def figures(self) -> Path:
        return self.root / "figures"

    @property
    def build(self) -> Path:
        return self.root / "build"

    def names(self) -> list[str]:
        """Names (stems) of the notebooks' sources, in order; not of what editors and macOS hide beside them."""
        return sorted(path.stem for path in self.notebooks.glob("[!.]*.py"))
