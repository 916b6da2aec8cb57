"""Fields of the lines that a run writes; docs/records.md explains them.

Numbers are plain JSON; one that is not finite is null. A field keeps name and meaning until a
new `SCHEMA_VERSION`; new fields may be added at any time.
"""

from typing import Literal, TypedDict

SCHEMA_VERSION = 2

JsonNumber = float | None
"""None: not finite, or not computed."""


class Place(TypedDict):
    """Identifies a rollout of a run."""

    schema_version: int
    run: str
    """Name of the run's folder when it was written, e.g. `tiny/version_3`."""
    split: Literal["train", "val"]
    batch: int
    """Batches of training questions asked so far, as in `metrics.jsonl`."""
    step: int
    """Optimizer steps taken before the response was learned from."""
    key: str
    """`Prompt.key` of the question."""
    sample: int
    """Number among the question's responses, from 0; a question that is twice in a batch, or in the
    validation, has 2 `samples` responses."""


class TurnRecord(TypedDict):
    """One message of an episode of several turns."""

    role: str
    """`assistant`: the policy; `tool` or `user`: its environment."""
    text: str
    name: str
    """Name of the tool that answered; '': none."""
    feedback: str
    """The environment's feedback on the response before it; '': none."""
    reward: JsonNumber
    """Reward of the response before it, for credit by turn."""
    calls: int
    """Number of tool calls in the response before it."""
    failed: int
    """Number of these calls that could not be read or made, or that raised."""


class RolloutRecord(Place):
    """A line of `rollouts/SPLIT_BATCH.jsonl`: one response."""

    category: str
    messages: list[dict[str, str]]
    """The question, as chat turns."""
    gold: str
    """The gold answer, which the policy never sees."""
    response: str
    """Text of the response without control tokens at its ends; of an episode, the transcript."""
    turns: list[TurnRecord]
    """Messages of an episode in order; empty: the response is a single turn."""
    answer: str | None
    """The answer that the verifier extracted; None: nothing."""
    reward: JsonNumber
    success: bool
    feedback: str
    """The verifier's feedback on a wrong response."""
    error: str
    """Reason why the verifier itself failed; '': it did not."""
    stopped: Literal["", "turns", "time"]
    """The limit of the environment that ended an episode before the policy did; '': none."""
    finished: bool
    """False: cut off by the limit on its length."""
    n_tokens: int
    """Number of tokens, end of sequence included."""
    samples: int
    """G, the number of responses to the question."""
    pass_rate: float
    """Share of the question's responses that succeeded."""
    weight: JsonNumber
    """W in the loss, of question and rollout; 1 in validation."""
    active: bool
    """True if the loss could give it credit; False in validation."""
    teacher_prompt: str | None
    """The teacher's rendered prompt; None: there was no teacher."""
    version: str
    """Label of the weights that it was sampled from; of several, the newest."""
    age_steps: int
    """Optimizer steps between the weights that drew its oldest token and those trained on it."""
    age_batches: int
    """Age of its oldest token in batches from which a step was taken."""
    traced: bool
    """True if its tokens are in `tokens/`."""


class TokenRecord(Place):
    """A line of `tokens/SPLIT_BATCH.jsonl`: the tokens of one response, in columns.

    Each list has an entry a token, n in all. Log-probs, entropies and divergences are in nats, of
    logits divided by `temperature`, before the step was taken. For each token y

        credit = -d loss / d z(y) = coefficient * weight * token_weight * importance * c(y)

    with z = logits / temperature and c(y) the credit that the advantage gives, less S(y) times the
    sum of its credits. Values that the loss did not need, such as a teacher's, are null.
    """

    temperature: float
    objective_name: str
    """The advantage's name for its objective: `divergence`, `objective`."""
    coefficient: JsonNumber
    """Factor of a token's loss in the step's loss: one over the reduction's denominator."""
    weight: JsonNumber
    """W, the weight of question and rollout."""
    ids: list[int]
    text: list[str]
    """Pieces of the response, special tokens included. Where several tokens make one character, the
    last of them has it and the others have ''."""
    turn: list[int]
    """Number, from 0, of the token's turn in an episode."""
    credit: list[JsonNumber]
    """Credit of the sampled token; > 0: the step makes it more likely."""
    magnitude: list[JsonNumber]
    """sum_v |d loss / d z(v)|, the size of the token's gradient."""
    objective: list[JsonNumber]
    """The token's loss before any factor."""
    token_weight: list[JsonNumber]
    importance: list[JsonNumber]
    logprob: list[JsonNumber]
    """log S(y)."""
    teacher_logprob: list[JsonNumber]
    """log T(y)."""
    version: list[str]
    """Label of the weights that drew the token."""
    age: list[int]
    """Optimizer steps between the weights that drew it and those trained on it."""
    sampler_logprob: list[JsonNumber]
    """The sampler's log S(y), of the whole distribution; null: not known."""
    gap: list[JsonNumber]
    """The trainer's log S(y) before the batch's first update, less `sampler_logprob`."""
    entropy: list[JsonNumber]
    """H(S)."""
    teacher_entropy: list[JsonNumber]
    """H(T)."""
    forward_kl: list[JsonNumber]
    """sum_v T log(T / S), over the whole vocabulary whatever the advantage's support."""
    reverse_kl: list[JsonNumber]
    """sum_v S log(S / T)."""
    jsd: list[JsonNumber]
    """Jensen-Shannon divergence of S and T, at most log 2."""
    top_ids: list[list[int]]
    """The most likely tokens of the student, then those of the teacher that are not among them."""
    top_probs: list[list[JsonNumber]]
    """S of each of `top_ids`."""
    top_teacher_probs: list[list[JsonNumber]]
    """T of each."""
    top_credit: list[list[JsonNumber]]
    """-d loss / d z of each."""
    vocabulary: dict[str, str]
    """Text of each id in `top_ids` alone; an incomplete character is �."""


class HealthRecord(TypedDict):
    """A line of `health.jsonl`: a finding of a rule."""

    schema_version: int
    batch: int
    step: int
    time: float
    """Unix time, seconds."""
    rule: str
    """Name of the rule, as in docs/health.md."""
    message: str
    """The finding, with its numbers."""
    remedy: str
    """The remedy."""
    values: dict[str, JsonNumber]
    """The numbers that the rule compared, by name, its thresholds included."""
