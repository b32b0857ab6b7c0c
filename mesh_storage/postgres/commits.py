"""The commits of a storage, of which its caches must know before anybody reads."""

from __future__ import annotations


class Commits:
    """Says whether anything with a version was committed since somebody looked."""

    def __init__(self) -> None:
        self.latest = object()
        """Stands for the latest commit. A number would have to be counted up under a lock."""

    def note(self) -> None:
        """Note a commit, after it is visible and before its caller goes on."""
        self.latest = object()
