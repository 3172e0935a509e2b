"""A headless browser, to look at what is meant to be looked at."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",  # it has none as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",  # containers have little of it
    "--hide-scrollbars",
)


def find() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in NAMES if (path := shutil.which(name)) is not None), None)


class Browser:
    """Chromium with a profile of its own."""

    def __init__(self, profile: Path) -> None:
        found = find()
        if found is None:
            raise FileNotFoundError(f"no browser: looked for {', '.join(NAMES)}")
        self.command = [found, *FLAGS, f"--user-data-dir={profile}"]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*self.command, *arguments], capture_output=True, text=True, timeout=120, check=True)

    def dom(self, url: str) -> str:
        """The document after its scripts have run."""
        return self.run("--dump-dom", "--virtual-time-budget=2000", url).stdout

    def screenshot(self, url: str, path: Path, size: tuple[int, int]) -> None:
        """A picture of the top of the page, as PNG."""
        width, height = size
        self.run(f"--window-size={width},{height}", f"--screenshot={path}", url)
