"""What stands in the lines that a run leaves behind; docs/records.md explains them.

Numbers are plain JSON, and one that is not finite is null. A field is never renamed or given
another meaning without a new `SCHEMA_VERSION`; new fields may come at any time.
"""

from typing import Literal, TypedDict

SCHEMA_VERSION = 1

Number = float | None
"""None: not finite, or not computed."""


class Place(TypedDict):
    """Which rollout of a run."""

    schema_version: int
    run: str
    """Name of the run's folder when it was written, e.g. `tiny/version_3`."""
    split: Literal["train", "val"]
    batch: int
    """Batches of training questions asked so far, as in `metrics.jsonl`."""
    step: int
    """Optimizer steps taken before the response was learned from."""
    key: str
    """`Prompt.key`: the question."""
    sample: int
    """Its number among the question's responses, from 0; a question that is twice in a batch, or in
    the validation, has 2 `samples` of them."""


class TurnRecord(TypedDict):
    """What one side said in an episode of several turns."""

    role: str
    """`assistant`: the policy; `tool` or `user`: its environment."""
    text: str
    name: str
    """Of the tool that answered; '': none."""
    feedback: str
    """The environment's words on the response before it; '': none."""
    reward: Number
    """That the response before it earned, for credit by turn."""
    calls: int
    """Of tools in the response before it."""
    failed: int
    """How many of these could not be read or made, or raised."""


class RolloutRecord(Place):
    """A line of `rollouts/SPLIT_BATCH.jsonl`: one response."""

    category: str
    messages: list[dict[str, str]]
    """The question, as chat turns."""
    target: str
    """The gold answer, which the policy never sees."""
    output: str
    """The response's text, without beginnings, ends and padding; of an episode, its transcript."""
    turns: list[TurnRecord]
    """Of an episode, what each side said, in order; empty: the response is all."""
    answer: str | None
    """What the verifier extracted; None: nothing."""
    reward: Number
    success: bool
    feedback: str
    """The verifier's words on what is wrong."""
    error: str
    """Why the verifier itself failed; '': it did not."""
    stopped: Literal["", "turns", "time"]
    """Of an episode, what of its environment's ran out before the policy had done; '': nothing."""
    finish_reason: Literal["stop", "length"]
    """Ended by an end of sequence or a stop string, or by the cap on its length."""
    n_tokens: int
    """End of sequence included."""
    samples: int
    """G: responses to the question."""
    pass_rate: float
    """Share of them that succeeded."""
    weight: Number
    """W of the loss: the question's and rollout's; 1 in validation."""
    active: bool
    """Whether the loss could give it credit; False in validation."""
    teacher_prompt: str | None
    """What the teacher read before the response, as rendered; None: there was no teacher."""
    version: str
    """The weights that it was sampled from; the newest, if there were several."""
    age_steps: int
    """Optimizer steps between the weights that drew its oldest token and those that learn from it.
    """
    age_batches: int
    """The same in batches from which a step was taken."""
    traced: bool
    """Whether its tokens are in `tokens/`."""


class TokenRecord(Place):
    """A line of `tokens/SPLIT_BATCH.jsonl`: the tokens of one response, in columns.

    Each list has an entry a token, n in all. Log-probs, entropies and divergences are in nats, of
    logits divided by `temperature`, before the step was taken. For each token y

        credit = -d loss / d z(y) = coefficient * weight * token_weight * importance * c(y)

    with z = logits / temperature and c(y) the credit that the advantage gives, less S(y) times the
    sum of its credits. What the loss did not read is null: a teacher, for one.
    """

    temperature: float
    objective_name: str
    """What the advantage calls its objective: `divergence`, `objective`."""
    coefficient: Number
    """Of a token loss in the step's loss: the reduction's, one over its denominator."""
    weight: Number
    """W, of question and rollout."""
    ids: list[int]
    text: list[str]
    """Pieces of the response, special tokens included. Where several tokens make one character, the
    last of them has it and the others have ''."""
    turn: list[int]
    """Number, from 0, of the turn of an episode to which the token belongs."""
    credit: list[Number]
    """> 0: the step makes the sampled token more likely."""
    magnitude: list[Number]
    """sum_v |d loss / d z(v)|: how hard the step pulls, wherever to."""
    objective: list[Number]
    """The token's loss before any factor."""
    token_weight: list[Number]
    importance: list[Number]
    logprob: list[Number]
    """log S(y)."""
    teacher_logprob: list[Number]
    """log T(y)."""
    version: list[str]
    """Label of the weights that drew the token."""
    age: list[int]
    """Optimizer steps between the weights that drew it and those that learn from it."""
    sampler_logprob: list[Number]
    """The sampler's log S(y), of the whole distribution; null: not known."""
    gap: list[Number]
    """The trainer's log S(y) before the batch's first update, less `sampler_logprob`."""
    entropy: list[Number]
    """H(S)."""
    teacher_entropy: list[Number]
    """H(T)."""
    forward_kl: list[Number]
    """sum_v T log(T / S), over the whole vocabulary whatever the advantage's support."""
    reverse_kl: list[Number]
    """sum_v S log(S / T)."""
    jsd: list[Number]
    """Jensen-Shannon divergence of S and T, at most log 2."""
    top_ids: list[list[int]]
    """The most likely tokens of the student, then those of the teacher that are not among them."""
    top_probs: list[list[Number]]
    """S of each of `top_ids`."""
    top_teacher_probs: list[list[Number]]
    """T of each."""
    top_credit: list[list[Number]]
    """-d loss / d z of each."""
    vocabulary: dict[str, str]
    """The text of each id that stands in `top_ids`, by itself; bytes of a character are �."""


class HealthRecord(TypedDict):
    """A line of `health.jsonl`: what a rule noticed."""

    schema_version: int
    batch: int
    step: int
    time: float
    """Unix time, seconds."""
    rule: str
    """Name of the rule, as in docs/health.md."""
    message: str
    """What was seen, with the numbers."""
    remedy: str
    """What to do."""
    values: dict[str, Number]
    """The numbers that the rule compared, by name, its thresholds included."""
