"""The environments' answers between the turns of episodes, as token ids, for rollout engines."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace

from scsdpo.policy import CausalLM
from scsdpo.policy.chat import Chat
from scsdpo.rollout._base import Rollout
from scsdpo.types import Episode, Prompt, Responses, Sampling, Verdict
from scsdpo.verifiers import Episodes

CUT = "the response was cut at max_new_tokens"
FULL = "the environment's answer does not fit in max_new_tokens"


class Dialogue:
    """The environments of a batch of responses; there are none if the questions have one turn.

    Rows are numbered q G + g. An environment's answer is rendered and appended to the drawn tokens,
    which stay as they are, thinking included. If an answer leaves no room for another token, it is
    dropped and the episode ends before it.

    Args:
        prompts: the questions.
        sampling: number of responses and their longest length.
        chat: renders the answers.
        episodes: the episodes of all rows; empty: the questions have one turn.
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
        """The questions, each with the opening messages of its environment."""
        for each in self._episodes:
            self.prompts = tuple(
                _opened(prompt, opening, chat)
                for prompt, opening in zip(prompts, each.open(), strict=True)
            )
        self._used: dict[int, int] = {}
        self._drew_end: dict[int, bool] = {}
        self.due: set[int] = set()
        """Rows that wait for an answer."""
        self.cut: set[int] = set()
        """Rows that ended because an answer did not fit."""

    @property
    def is_played(self) -> bool:
        """True if some rows may have several turns."""
        return bool(self._episodes)

    def plays(self, row: int) -> bool:
        """True if `row` may have several turns."""
        return any(each.plays(row) for each in self._episodes)

    def respond(self, row: int, ids: Sequence[int], *, used: int, ended: bool) -> None:
        """Send a response to its environment.

        Args:
            row: row of the episode.
            ids: tokens of this turn.
            used: number of tokens after the prompt, in all turns so far.
            ended: the response ended by itself; False: at `max_new_tokens`.
        """
        self.due.add(row)
        self._used[row], self._drew_end[row] = used, ids[-1] in self._chat.eos_ids
        for each in self._episodes:
            each.submit(row, self._chat.decode(ids), last="" if ended else CUT)

    def answers(self, *, wait: bool) -> list[tuple[int, tuple[int, ...]]]:
        """(row, ids to put before its next turn) of rows that were answered; (): it is over.

        Args:
            wait: wait for at least one answer, if any is due.
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
        """Start the episode of `row` again, because the row will be drawn again."""
        self.due.discard(row)
        self.cut.discard(row)
        for each in self._episodes:
            each.forget(row)

    def record(self, row: int) -> Episode:
        """The record of the episode of `row`; empty for a question of one turn."""
        return next((each.record(row) for each in self._episodes), Episode())

    def text(self, row: int, ids: Sequence[int]) -> str:
        """`row` as text: the transcript of its episode, or else the text of `ids`."""
        record = self.record(row)
        # Each response begins with the thinking that its prompt opens, so that it is recognised.
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
    """An engine that draws episodes, and a question of one turn as an episode of one turn."""

    @abstractmethod
    def draw(self, policy: CausalLM, dialogue: Dialogue, sampling: Sampling) -> Responses:
        """Draw responses to `dialogue.prompts`; continue those that the dialogue answers.

        Args:
            policy: draw from its current weights.
            dialogue: the batch's environments.
            sampling: number of responses, their length, and the distribution.
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
