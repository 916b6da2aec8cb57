"""Colors that are distinct also for color-blind readers (Okabe and Ito), on white and on black.

Runs differ in their dashes too, so that no plot depends on color alone.
"""

LIGHT = {
    "page": "#fbfbf9",
    "card": "#ffffff",
    "wash": "#f1f0ec",
    "ink": "#1c1e22",
    "soft": "#626873",
    "rule": "#e6e5e0",
    "faint": "#c9c9c4",
    "focus": "#0072b2",
    "run-0": "#0072b2",
    "run-1": "#d55e00",
    "run-2": "#007a5a",
    "run-3": "#b0578d",
    "run-4": "#8a6d00",
    "run-5": "#3f8fc4",
    "run-6": "#5f5f6b",
    "run-7": "#7a4fb0",
    "right": "#0072b2",
    "wrong": "#bf5000",
    "start": "#9a9aa3",
    "student": "#a06f00",
    "teacher": "#7a4fb0",
    "none": "#e3a587",
    "some": "#e9e2cf",
    "all": "#6fa8cf",
    "phase-0": "#4b93c4",
    "phase-1": "#b5d3e4",
    "phase-2": "#e9c98a",
    "phase-3": "#d98f5f",
    "phase-4": "#9a9aa3",
}
"""Color of each tone on white."""

DARK = LIGHT | {
    "page": "#121316",
    "card": "#191b1f",
    "wash": "#23262b",
    "ink": "#e8e7e4",
    "soft": "#9ba1ab",
    "rule": "#2a2d33",
    "faint": "#484c54",
    "focus": "#6bb8ea",
    "run-0": "#56a9e0",
    "run-1": "#f08a3c",
    "run-2": "#2fbd95",
    "run-3": "#dd8fbd",
    "run-4": "#d9bd3d",
    "run-5": "#8cc8ee",
    "run-6": "#a9a9b5",
    "run-7": "#b592e8",
    "right": "#56a9e0",
    "wrong": "#f08a3c",
    "start": "#8b8f98",
    "student": "#e0b44a",
    "teacher": "#b592e8",
    "none": "#8a4a2a",
    "some": "#4a463b",
    "all": "#2f6d9c",
    "phase-0": "#2f6d9c",
    "phase-1": "#2c4f66",
    "phase-2": "#8f7338",
    "phase-3": "#96562f",
    "phase-4": "#77777f",
}
"""Color of each tone on black."""

RUNS = 8
DASHES = ("", "6 3", "2 2", "8 3 2 3")
"""SVG dash arrays of runs 0, 1, 2, 3, then again from 0; "": solid."""


def run_tone(run: int) -> str:
    """The tone of the run of this number."""
    return f"run-{run % RUNS}"


def dashes(tone: str) -> str:
    """The dash array of a tone's lines."""
    kind, _, number = tone.partition("-")
    return DASHES[int(number) % len(DASHES)] if kind == "run" else ""
