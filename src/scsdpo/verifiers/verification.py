"""Settings of the processes that judge responses."""

from dataclasses import dataclass

from scsdpo.verifiers.verify import MAX_FEEDBACK


@dataclass(frozen=True, kw_only=True)  # no slots: jsonargparse reads defaults off `__dict__`
class Verification:
    """Settings of the processes that judge responses.

    Args:
        workers: processes that judge, on each rank. 0: the training process does, and a verifier
            that hangs hangs the run.
        deadline: seconds of own time (`scsdpo.verifiers.own_time`) that one verdict may take; then
            its process is killed, and the rollout gets reward 0 and an `error`.
        memory_mb: MiB that a process may hold. A verifier that asks for more gets a MemoryError;
            a process that holds half of it after a verdict is replaced.
        max_feedback: characters of feedback that are kept; what is longer ends in " [cut]".
        turn_deadline: seconds on the clock that an environment of several turns may take to answer
            one response; then its process is killed, and the episode gets reward 0 and an `error`.
        episode_deadline: seconds on the clock that it may take for all turns of an episode.
        max_observation: characters of each message with which it answers; what is longer is cut at
            its end, and then ends in " [cut]".

    Raises:
        ValueError: if an argument is outside its range.
    """

    workers: int = 2
    deadline: float = 10.0
    memory_mb: int = 4096
    max_feedback: int = MAX_FEEDBACK
    turn_deadline: float = 30.0
    episode_deadline: float = 300.0
    max_observation: int = 8000

    def __post_init__(self) -> None:
        checks = {
            "workers": (self.workers >= 0, ">= 0"),
            "deadline": (0 < self.deadline < float("inf"), "> 0 and finite, in seconds"),
            "memory_mb": (self.memory_mb >= 256, ">= 256, which Python itself may need"),
            "max_feedback": (self.max_feedback >= 100, ">= 100, in characters"),
            "turn_deadline": (0 < self.turn_deadline < float("inf"), "> 0 and finite, in seconds"),
            "episode_deadline": (
                0 < self.episode_deadline < float("inf"),
                "> 0 and finite, in seconds",
            ),
            "max_observation": (self.max_observation >= 100, ">= 100, in characters"),
        }
        for name, (good, rule) in checks.items():
            if not good:
                raise ValueError(
                    f"`Verification({name}=...)` must be {rule}, got {getattr(self, name)}"
                )
