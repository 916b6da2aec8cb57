"""What stands between the turns of an episode, as token ids, and engines that go by it."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from scsdpo.policy import CausalLM
from scsdpo.policy.chat import Chat
from scsdpo.rollout._base import Rollout
from scsdpo.types import Episode, Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import Episodes

CUT = "the response was cut at max_new_tokens"
FULL = "what the environment answered has no room in max_new_tokens"


class Dialogue:
    """The environments of a batch of responses; of one whose questions have one turn, nobody.

    Rows are numbered q G + g. What an environment answers is rendered behind the tokens that were
    drawn, which stay as they are, thinking included. An answer after which no token could be drawn
    any more is left out, and the episode ends before it.

    Args:
        prompts: the questions.
        sampling: how many responses, and how long they may be.
        chat: renders.
        episodes: of all rows; empty: the questions have one turn.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        chat: Chat,
        episodes: Sequence[Episodes] = (),
    ) -> None:
        self._episodes = tuple(episodes)
        self._chat, self._n, self._most = chat, sampling.n, sampling.max_new_tokens
        self.prompts = tuple(prompts)
        """As they are asked: with what their environments show at first."""
        for each in self._episodes:
            self.prompts = tuple(
                _opened(prompt, opening, chat)
                for prompt, opening in zip(prompts, each.open(), strict=True)
            )
        self._used: dict[int, int] = {}
        self._drew_end: dict[int, bool] = {}
        self.due: set[int] = set()
        """Rows that are being answered."""
        self.cut: set[int] = set()
        """Rows that ended because an answer had no room."""

    @property
    def is_played(self) -> bool:
        """Whether a row may have several turns."""
        return bool(self._episodes)

    def plays(self, row: int) -> bool:
        """Whether a row may have several turns."""
        return any(each.plays(row) for each in self._episodes)

    def respond(self, row: int, ids: Sequence[int], *, used: int, ended: bool) -> None:
        """Give the environment a response.

        Args:
            row: of which episode.
            ids: of this turn.
            used: tokens behind the prompt, of all turns so far.
            ended: by itself, and not by the cap.
        """
        self.due.add(row)
        self._used[row], self._drew_end[row] = used, ids[-1] in self._chat.eos_ids
        for each in self._episodes:
            each.submit(row, self._chat.decode(ids), last="" if ended else CUT)

    def answers(self, *, wait: bool) -> list[tuple[int, tuple[int, ...]]]:
        """By row, the ids that stand before its next turn; none: the episode is over.

        Args:
            wait: for at least one, if any is due.
        """
        found: list[tuple[int, tuple[int, ...]]] = []
        for each in self._episodes:
            while self.due and not found:
                for row, answer in each.answers(wait=wait):
                    if isinstance(answer, Verdict):
                        found.append((row, ()))
                        continue
                    tools = self.prompts[row // self._n].tools
                    ids = self._chat.continuation(answer.messages, tools)[self._drew_end[row] :]
                    if self._used[row] + len(ids) < self._most:
                        found.append((row, ids))
                    else:
                        self.cut.add(row)
                        each.submit(row, "", last=FULL)
                if not wait:
                    break
        self.due -= {row for row, _ in found}
        return found

    def forget(self, row: int) -> None:
        """A row will be drawn again from its start."""
        self.due.discard(row)
        self.cut.discard(row)
        for each in self._episodes:
            each.forget(row)

    def record(self, row: int) -> Episode:
        """What was said in a row."""
        return next((each.record(row) for each in self._episodes), Episode())

    def text(self, row: int, ids: Sequence[int]) -> str:
        """A row as text: the transcript of an episode, and else what `ids` say."""
        record = self.record(row)
        # Each response begins with what its prompt leaves open, so that its thinking can be told.
        opened = self.prompts[row // self._n].thinking
        return (
            record.transcript(lambda said: opened + said)
            if record.parts
            else self._chat.decode(ids)
        )


def _opened(prompt: Prompt, opening: Sequence[dict[str, str]], chat: Chat) -> Prompt:
    if tuple(opening) == prompt.messages:
        return prompt
    return replace(prompt, messages=tuple(opening), ids=chat.render(tuple(opening), prompt.tools))


class DialogueRollout(Rollout):
    """An engine for which a question of one turn is a dialogue without an environment."""

    @abstractmethod
    def draw(self, policy: CausalLM, dialogue: Dialogue, sampling: Sampling) -> Responses:
        """Responses to `dialogue.prompts`, which go on where the dialogue answers them.

        Args:
            policy: as it is now.
            dialogue: of this batch.
            sampling: how often, and how.
        """

    def sample(self, policy: CausalLM, prompts: Sequence[Prompt], sampling: Sampling) -> Responses:
        return self.draw(policy, Dialogue(prompts, sampling, policy.chat), sampling)

    @property
    def can_be_asked(self) -> bool:
        return True

    @property
    def plays_episodes(self) -> bool:
        return True

    def play(
        self,
        policy: CausalLM,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        episodes: Episodes,
    ) -> Responses:
        return self.draw(policy, Dialogue(prompts, sampling, policy.chat, [episodes]), sampling)
