"""Validation figures at a run's start and end."""

from dataclasses import dataclass

from scsdpo.report.reading import Run


@dataclass(frozen=True, kw_only=True)
class Change:
    """A figure at the first validation and at the last."""

    name: str
    before: float
    after: float

    @property
    def points(self) -> float:
        """In percentage points."""
        return 100 * (self.after - self.before)

    def __str__(self) -> str:
        ends = f"from {100 * self.before:.1f} to {100 * self.after:.1f} %"
        return f"{'rose' if self.points > 0 else 'fell' if self.points < 0 else 'went'} {ends}"


def changes(run: Run) -> dict[str, Change]:
    """Of each validation figure, by name; empty without two validations."""
    if len(run.validations) < 2:
        return {}
    first, last = run.validations[0], run.validations[-1]
    return {
        (name := key.removeprefix("val/")): Change(name=name, before=first[key], after=last[key])
        for key in last
        if key.startswith("val/") and first.get(key) is not None and last[key] is not None
    }


def overall(run: Run, kind: str = "mean") -> Change | None:
    """mean@k or maj@k of all validation questions."""
    found = changes(run)
    return next((found[name] for name in found if name.startswith(f"{kind}@")), None)
