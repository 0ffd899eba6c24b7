"""Counts and names the damaged images of a data set, and raises an error when there are too many."""

from typing import Protocol

MAX_FAULT_SHARE = 0.01


class DataError(ValueError):
    """Too many images of a data set cannot be decoded: which, why and what to do."""


class Examples(Protocol):
    """What has numbered examples: a data set of any task."""

    @property
    def path(self) -> str: ...

    def __len__(self) -> int: ...

    def name(self, number: int) -> str: ...


class Faults:
    """The images that could not be decoded; `max_share` of all examples may fail before `check` raises."""

    def __init__(self, source: Examples, max_share: float = MAX_FAULT_SHARE) -> None:
        if not 0 <= max_share <= 1:
            raise ValueError(
                f"Expected max_share in [0, 1], received {max_share!r}. "
                f"Pass the share of the images that may be damaged, such as {MAX_FAULT_SHARE}."
            )
        self.max_share = max_share
        self.source = source
        self._reasons: dict[int, str] = {}  # threads add to it, each by one atomic call
        self._refused: ValueError | None = None

    def __len__(self) -> int:
        return len(self._reasons)

    def add(self, number: int, reason: str) -> None:
        """Notes that example `number` could not be decoded; again is not counted twice."""
        self._reasons.setdefault(number, reason)

    def refuse(self, error: ValueError) -> None:
        """Notes an error that no share of the examples excuses: `check` raises it."""
        self._refused = self._refused or error

    def report(self) -> dict[str, str]:
        """Returns the reason by the name of the example, in the order of the source."""
        return {self.source.name(number): self._reasons[number] for number in sorted(self._reasons)}

    def check(self) -> None:
        """Raises DataError when more than the allowed share of all examples has failed."""
        if self._refused is not None:
            raise self._refused
        if len(self) > self.max_share * len(self.source):
            first = "; ".join(f"{name}: {reason}" for name, reason in list(self.report().items())[:3])
            raise DataError(
                f"Expected at most {self.max_share:.3g} of the {len(self.source)} images of "
                f"'{self.source.path}' to be damaged, but {len(self)} could not be decoded so far. Repair "
                f"them or allow a larger share. First of them: {first}"
            )
