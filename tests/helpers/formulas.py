"""The papers' formulas in plain loops over `Case`; they share no code with the package."""

import math

import torch

import scsdpo.lab  # noqa: F401
from table_policy import OTHER, SUCCESSES, G, Q, TablePolicy, state

INF = math.inf

PACED = (0.5, 0.25, 1.0, 0.75)
"""Pass rates of the four questions before training."""


class Case:
    """One batch: `table` is the student's, with a gradient; `behind` the teacher's weights.

    Of a response the tokens count that the policy drew: `t` is a number among these.
    """

    def __init__(self, model, batch, *, live=False):
        self.judged = batch
        self.rollouts = self.judged.responses
        self.chat, self.tau = model.policy.chat, self.rollouts.temperature
        self.table = model.policy.table.detach().clone().requires_grad_()
        self.behind = TablePolicy().table.detach()
        if live:
            self.behind = self.table.detach()

    def rows(self):
        return [(q, g) for q in range(Q) for g in range(G)]

    def right(self, q, g):
        return g < SUCCESSES[q]

    def length(self, q, g):
        return int(self.rollouts.sampled[q, g].sum())

    def place(self, q, g, t):
        return int(self.rollouts.sampled[q, g].nonzero()[t, 0])

    def y(self, q, g, t):
        return int(self.rollouts.ids[q, g, self.place(q, g, t)])

    def _log_probs(self, table, prompt, q, g, t):
        place = self.place(q, g, t)
        previous = int(self.rollouts.ids[q, g, place - 1]) if place else -1
        return (table[state(prompt, previous)] / self.tau).log_softmax(-1)

    def log_s(self, q, g, t):
        return self._log_probs(self.table, self.rollouts.prompts[q].ids, q, g, t)

    def log_t(self, q, g, t, told):
        text = f"question {q}?{told}\n\nCorrectly solve the original question.\n"
        prompt = self.chat.render([{"role": "user", "content": text}])
        return self._log_probs(self.behind, prompt, q, g, t)

    def log_r(self, q, g, t):
        """The first policy after the question alone."""
        table = TablePolicy().table.detach()
        return self._log_probs(table, self.rollouts.prompts[q].ids, q, g, t)

    def log_other(self, q, g, t):
        """Another model after the question alone."""
        table = TablePolicy(seed=OTHER).table.detach()
        return self._log_probs(table, self.rollouts.prompts[q].ids, q, g, t)

    def cap(self, q, g, t):
        """min(S / S_rollout, 2), detached."""
        log_s = self.log_s(q, g, t)[self.y(q, g, t)].detach()
        drawn = self.rollouts.sampling_logprobs[q, g, self.place(q, g, t)]
        return min(math.exp(log_s - drawn), 2.0)

    def said(self, q, g):
        """What others are told of a response: of an episode all of it."""
        if self.turns(q, g) == 1:
            return f"response {q} {g}"
        return f"call {q} {g}\n\n[tool f]\nan answer\n[/tool]\n\nresponse {q} {g}"

    def turn(self, q, g, t):
        return int(self.rollouts.turns[q, g, self.place(q, g, t)])

    def turns(self, q, g):
        return self.turn(q, g, self.length(q, g) - 1) + 1

    def to_go(self, q, g, k):
        """What turn k and the later ones of a response earned: `with_a_tool` says how much."""
        first = (q + 2 * g) / 16 if self.turns(q, g) == 2 else 0.0
        last = float(self.right(q, g)) - first * (q % 2)
        return last + first * (k == 0)


def solution(text):
    return f"\nCorrect solution:\n\n{text}\n\n"


def sibling(case, q, g):
    """SDPO's demonstration: the first other success; '' if there is none."""
    others = [h for h in range(SUCCESSES[q]) if h != g]
    return solution(case.said(q, others[0])) if others else ""


def gold(case, q, g):
    return solution(f"gold {q}")


def sibling_or_feedback(case, q, g):
    told = sibling(case, q, g)
    if told or case.right(q, g):
        return told
    return (
        f"\nThe following is feedback from your unsuccessful earlier attempt:\n\nwrong {q} {g}\n\n"
    )


def jsd(case, q, g, t, told):
    """Jensen-Shannon on the whole vocabulary (its six tokens are within the top 100)."""
    log_s, log_t = case.log_s(q, g, t), case.log_t(q, g, t, told)
    m = (log_s.exp() + log_t.exp()) / 2
    return sum(
        p.exp()[v] * (p[v] - m[v].log()) / 2 for p in (log_s, log_t) for v in range(len(log_s))
    )


def reverse_kl(case, q, g, t, told):
    log_s, log_t = case.log_s(q, g, t), case.log_t(q, g, t, told)
    return sum(log_s.exp()[v] * (log_s[v] - log_t[v]) for v in range(len(log_s)))


def forward_kl(clip):
    def value(case, q, g, t, told):
        log_s, log_t = case.log_s(q, g, t), case.log_t(q, g, t, told)
        terms = [log_t.exp()[v] * (log_t[v] - log_s[v]) for v in range(len(log_s))]
        return sum(torch.clamp(term, max=clip) for term in terms)

    return value


def of_another_model(case, q, g, t, told):
    """KL(S || T), T another model's."""
    log_s, log_t = case.log_s(q, g, t), case.log_other(q, g, t)
    return sum(log_s.exp()[v] * (log_s[v] - log_t[v]) for v in range(len(log_s)))


def pg(advantage, modulation=lambda *_: 1.0):
    """-A log S(y): the gradient of -rho A at rho = 1. The value of -rho A is added back."""

    def value(case, q, g, t, told):
        a = advantage(case, q, g)
        if told:
            a = a * modulation(case, q, g, t, told, a)
        log_s = case.log_s(q, g, t)[case.y(q, g, t)]
        return -a * (1 + log_s - log_s.detach())

    return value


def grpo(case, q, g):
    p = SUCCESSES[q] / G
    if p in (0, 1):
        return 0.0
    std = math.sqrt(sum((float(case.right(q, h)) - p) ** 2 for h in range(G)) / (G - 1))
    return (float(case.right(q, g)) - p) / (std + 1e-6)


def turn_grpo(case):
    """Each turn's return to go, standardised among the rollouts of the group that have it."""
    terms = {}
    for q, g in case.rows():
        for t in range(case.length(q, g)):
            k = case.turn(q, g, t)
            returns = {h: case.to_go(q, h, k) for h in range(G) if case.turns(q, h) > k}
            mean = sum(returns.values()) / len(returns)
            squares = sum((each - mean) ** 2 for each in returns.values())
            if squares:
                std = math.sqrt(squares / (len(returns) - 1))
                a = (returns[g] - mean) / (std + 1e-6)
                terms[q, g, t] = case.cap(q, g, t) * pg(lambda *_, a=a: a)(case, q, g, t, "")
    return token_mean_all(case, terms)


def centred(case, q, g):
    return float(case.right(q, g)) - SUCCESSES[q] / G


def leave_one_out(case, q, g):
    return float(case.right(q, g)) - sum(case.right(q, h) for h in range(G) if h != g) / (G - 1)


def maxrl(case, q, g):
    return centred(case, q, g) / (SUCCESSES[q] / G) if SUCCESSES[q] else 0.0


def sequence_mean(case, terms):
    """mean over all rollouts of each one's token mean; rollouts without a loss count as 0."""
    return sum(value / (Q * G * case.length(q, g)) for (q, g, t), value in terms.items())


def token_mean_all(case, terms):
    return sum(terms.values()) / sum(case.length(q, g) for q, g in case.rows())


def token_mean_active(case, terms):
    return sum(terms.values()) / sum(case.length(q, g) for q, g in {(q, g) for q, g, _ in terms})


def distil(case, *, divergence=jsd, tell=sibling, weight=lambda p: 1.0, reduce=sequence_mean,
           token=lambda case, q, g, t: 1.0):  # fmt: skip
    """sum over tokens with a teacher of weight * importance * divergence, reduced."""
    terms = {}
    for q, g in case.rows():
        told, w = tell(case, q, g), weight(SUCCESSES[q] / G)
        if told and w:
            for t in range(case.length(q, g)):
                value = divergence(case, q, g, t, told)
                terms[q, g, t] = w * token(case, q, g, t) * case.cap(q, g, t) * value
    return reduce(case, terms)


def policy_gradient(case, advantage, *, reduce=token_mean_all, tell=lambda *_: "", **kwargs):
    terms = {}
    for q, g in case.rows():
        if advantage(case, q, g):
            for t in range(case.length(q, g)):
                told = tell(case, q, g)
                value = pg(advantage, **kwargs)(case, q, g, t, told)
                terms[q, g, t] = case.cap(q, g, t) * value
    return reduce(case, terms)


def normalised(power):
    """SC-SDPO, eq. (16): over the questions with 0 < k < G, which are 0 and 3."""
    kept = [k / G for k in SUCCESSES if 0 < k < G]
    mean = sum((p * (1 - p)) ** power for p in kept) / len(kept)
    return lambda p: (p * (1 - p)) ** power / mean if 0 < p < 1 else 0.0


def paced(case):
    mean = sum(p * (1 - p) for p in PACED) / len(PACED)
    terms = {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        for t in range(case.length(q, g)) if told else ():
            weight = PACED[q] * (1 - PACED[q]) / mean
            terms[q, g, t] = weight * case.cap(q, g, t) * jsd(case, q, g, t, told)
    return sequence_mean(case, terms)


def hybrid(case, weight=lambda p: 1.0):
    terms = {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        for t in range(case.length(q, g)):
            value = 0.9 * pg(centred)(case, q, g, t, "")
            if told:
                value = value + 0.1 * weight(SUCCESSES[q] / G) * jsd(case, q, g, t, told)
            terms[q, g, t] = case.cap(q, g, t) * value
    return sequence_mean(case, terms)


def anchored(case):
    """SC-SDPO where there is a teacher, and .1 KL(S || R) at every token."""
    weight = normalised(0.5)
    terms = {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        for t in range(case.length(q, g)):
            log_s = case.log_s(q, g, t)
            value = 0.1 * (log_s.exp() * (log_s - case.log_r(q, g, t))).sum()
            if told:
                value = value + weight(SUCCESSES[q] / G) * jsd(case, q, g, t, told)
            terms[q, g, t] = case.cap(q, g, t) * value
    return sequence_mean(case, terms)


def srpo(case, weight=lambda p: 1.0):
    """Wrong with a correct sibling: JSD times exp(-H_T) over its mean there; else GRPO."""
    weights, terms = {}, {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        for t in range(case.length(q, g)):
            if not case.right(q, g) and told:
                log_t = case.log_t(q, g, t, told)
                weights[q, g, t] = math.exp(sum(log_t.exp() * log_t))
    mean = sum(weights.values()) / len(weights)
    for q, g in case.rows():
        for t in range(case.length(q, g)):
            if (q, g, t) in weights:
                value = weights[q, g, t] / mean * jsd(case, q, g, t, sibling(case, q, g))
                value = weight(SUCCESSES[q] / G) * value
            else:  # z_GRPO = 1 - z_SDPO, with A = 0 where all rewards are equal
                value = pg(grpo)(case, q, g, t, "")
            terms[q, g, t] = case.cap(q, g, t) * value
    assert len(terms) == sum(case.length(q, g) for q, g in case.rows())
    return sum(terms.values()) / len(terms)


def rlsd_factor(case, q, g, t, told, a):
    difference = case.log_t(q, g, t, told) - case.log_s(q, g, t).detach()
    ratio = math.exp(math.copysign(1, a) * float(difference[case.y(q, g, t)]))
    return 0.5 + 0.5 * min(max(ratio, 0.8), 1.2)


def entropies(case, q, g, told):
    """Of student and teacher at each token of a response."""
    both = [], []
    for t in range(case.length(q, g)):
        pair = case.log_s(q, g, t).detach(), case.log_t(q, g, t, told)
        for kept, log_p in zip(both, pair, strict=True):
            kept.append(-float(log_p.exp() @ log_p))
    return both


def rhythm(student, teacher, window=8, steepness=1.0, gain=1.0, highest=1.5):
    """DRIFT's eq. (11) to (15): gate_t of one response, from its two lists of entropies."""
    n = len(student)

    def drop(h, t):
        before, after = h[max(t - window, 0) : t], h[t + 1 : t + 1 + window]
        if not before or not after:
            return 0.0
        return max(sum(before) / len(before) - sum(after) / len(after), 0.0)

    anchors = [
        max(drop(teacher, t) - drop(student, t), 0.0) * max(student[t] - teacher[t], 0.0)
        for t in range(n)
    ]
    mean = sum(anchors) / n
    std = math.sqrt(sum((a - mean) ** 2 for a in anchors) / n)
    z = [(a - mean) / std if std > 0 else 0.0 for a in anchors]
    m = [1 + gain * 2 * max(1 / (1 + math.exp(-steepness * each)) - 0.5, 0.0) for each in z]
    scale = sum(m) / n
    clipped = [min(max(each / scale, 0.5), highest) for each in m]
    return [min(max((each - 1) / (highest - 1), 0.0), 1.0) for each in clipped]


def drift_factor(case, q, g, t, told, a):
    difference = case.log_s(q, g, t).detach() - case.log_t(q, g, t, told)
    surprise = min(math.exp(max(float(difference[case.y(q, g, t)]), 0)), 2.0) - 1
    return 1 + rhythm(*entropies(case, q, g, told))[t] * surprise


def drift(case):
    """Beta(1, 1) after one group of four: rates 3/6, 1/6, 5/6, 2/6: medium, hard, easy, medium."""
    terms, gates = {}, []
    for q, g in case.rows():
        rate, told = (SUCCESSES[q] + 1) / (G + 2), sibling(case, q, g)
        for t in range(case.length(q, g)):
            if not case.right(q, g):
                if not told:
                    continue
                value = jsd(case, q, g, t, told)
            elif 0.2 <= rate <= 0.8:
                value = pg(grpo, drift_factor)(case, q, g, t, told)
                gates += rhythm(*entropies(case, q, g, told)) if told else []
            else:  # question 2, whose GRPO advantage is 0
                continue
            terms[q, g, t] = case.cap(q, g, t) * value
    assert max(gates) > 0
    return token_mean_all(case, terms)


def block(*lines):
    return "\n\n".join(lines) + "\n\n"


def remembered_attempts(case, q, g):
    """PMD: the last 5 right and 3 wrong ones of the question, but not the rollout itself."""
    kept = [*range(SUCCESSES[q])][-5:] + [*range(SUCCESSES[q], G)][-3:]
    right = [case.said(q, h) for h in kept if case.right(q, h) and h != g]
    wrong = [f"{case.said(q, h)}\nwrong {q} {h}" for h in kept if not case.right(q, h) and h != g]
    told = block("\nAttempts that were right:", *right) if right else ""
    return told + (block("\nAttempts that were wrong:", *wrong) if wrong else "")


def another_attempt(case, q, g):
    """OASIS: to the shortest success the shortest failure, else the second shortest success."""
    order = sorted(range(G), key=lambda h: case.length(q, h))
    good, bad = ([h for h in order if case.right(q, h) == side] for side in (True, False))
    if not good or g != good[0]:
        return ""
    kind, other = ("wrong", bad[0]) if bad else ("right", good[1])
    return block(f"\nAttempts that were {kind}:", case.said(q, other))


def ad_opsd(case):
    tokens = [(q, g, t) for q, g in case.rows() for t in range(case.length(q, g))]
    entropy = {
        at: -float(case.log_s(*at).detach().exp() @ case.log_s(*at).detach()) for at in tokens
    }
    forks = sorted(tokens, key=entropy.get, reverse=True)[: math.ceil(0.2 * len(tokens))]
    terms, held = {}, 0
    for q, g, t in tokens:
        log_s, log_t = case.log_s(q, g, t), case.log_t(q, g, t, gold(case, q, g))
        y, u = case.y(q, g, t), 0.0
        if (q, g, t) in forks and log_s[y] > log_t[y]:
            gap = float((log_s.detach() - log_t)[y])
            u, held = 1 / (1 + math.exp(-float(log_s.detach()[y].exp()) * gap)), held + 1
        target = u * case.log_r(q, g, t).exp() + (1 - u) * log_t.exp()
        value = sum(p * (p.log() - s) for p, s in zip(target, log_s, strict=True))
        terms[q, g, t] = case.cap(q, g, t) * value
    assert 0 < held < len(forks)
    return token_mean_active(case, terms)


def sdar(case):
    terms = {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        for t in range(case.length(q, g)):
            value = pg(grpo)(case, q, g, t, "")
            if told:
                gap = (case.log_t(q, g, t, told) - case.log_s(q, g, t))[case.y(q, g, t)]
                value = value + 0.01 * gap / (1 + math.exp(-5 * float(gap.detach())))
            terms[q, g, t] = case.cap(q, g, t) * value
    return token_mean_all(case, terms)


def geosd(case):
    terms = {}
    for q, g in case.rows():
        for t in range(case.length(q, g)):
            s = case.log_s(q, g, t).exp()
            taught, first = case.log_t(q, g, t, gold(case, q, g)).exp(), case.log_r(q, g, t).exp()
            hellinger = sum((a.sqrt() - b.sqrt()) ** 2 for a, b in zip(s, taught, strict=True)) / 2
            arc = 2 * torch.arccos(sum((a * b).sqrt() for a, b in zip(s, first, strict=True)))
            terms[q, g, t] = case.cap(q, g, t) * (hellinger + arc**2)
    return sequence_mean(case, terms)


def position(case, q, g, t):
    place = (t + 1) / case.length(q, g)
    return 0.25 + 0.75 / (1 + math.exp(-(place - 0.3) / 0.1))


def horizon(case, q, g, t):
    """DASH: how often r_t stands in sum_t A_t, A_t = r_t + l_t A_{t+1}."""
    value = forward_kl(0.05)
    r = [float(value(case, q, g, s, gold(case, q, g)).detach()) for s in range(case.length(q, g))]
    gates = [1 / (1 + math.exp(5 * (each - sum(r) / len(r)))) for each in r]
    return sum(math.prod(gates[start:t]) for start in range(t + 1))


def sequence_mean_active(case, terms):
    """mean over the rollouts with a loss of each one's token mean."""
    rollouts = len({(q, g) for q, g, _ in terms})
    return sum(value / (rollouts * case.length(q, g)) for (q, g, t), value in terms.items())


def dr_grpo(case, terms):
    return sum(terms.values()) / (Q * G * 2048)


def dapo(case):
    """The informative groups only, and their tokens only in the denominator."""
    terms, tokens = {}, 0
    for q in (0, 3):
        for g in range(G):
            tokens += case.length(q, g)
            for t in range(case.length(q, g)):
                terms[q, g, t] = case.cap(q, g, t) * pg(grpo)(case, q, g, t, "")
    return sum(terms.values()) / tokens


def mixed(case, q, g, t, told):
    """DemoPSD: JSD to the target T^(1 - a) S^a, a from the divergence of student and teacher."""
    log_s, log_t = case.log_s(q, g, t), case.log_t(q, g, t, told)
    fixed = log_s.detach()
    m = (fixed.exp() + log_t.exp()) / 2
    far = sum(
        p.exp()[v] * (p[v] - m[v].log()) / 2 for p in (fixed, log_t) for v in range(len(fixed))
    )
    a = 2 * 0.5 * (1 / (1 + math.exp(-float(far))) - 0.5)
    goal = ((1 - a) * log_t + a * fixed).log_softmax(-1)
    return between(log_s, goal)


def between(log_p, log_q):
    """Jensen-Shannon divergence of two distributions."""
    m = (log_p.exp() + log_q.exp()) / 2
    return sum(p.exp()[v] * (p[v] - m[v].log()) / 2 for p in (log_p, log_q) for v in range(len(m)))


def purified(case, q, g, t, told):
    """Purified OPSD: JSD to P0 exp(d), d what the solution says beyond its own words."""
    text = f"{told}\n\nCorrectly solve the original question.\n"
    alone = case.chat.render([{"role": "user", "content": text}])
    log_r = case._log_probs(case.behind, alone, q, g, t)
    d = case.log_t(q, g, t, told) - log_r
    d = d - sum(d) / len(d)
    d = 10 * torch.tanh(d / 10)
    return between(case.log_s(q, g, t), (case.log_r(q, g, t) + d).log_softmax(-1))


def i_sdpo(case):
    """Groups without a success: half of each KL to the policy told the gold solution; else GRPO."""
    terms = {}
    for q, g in case.rows():
        for t in range(case.length(q, g)):
            if SUCCESSES[q] == 0:
                log_s, log_t = case.log_s(q, g, t), case.log_t(q, g, t, gold(case, q, g))
                forward = sum(log_t.exp() * (log_t - log_s))
                value = 0.5 * forward + 0.5 * sum(log_s.exp() * (log_s - log_t))
            else:
                value = pg(grpo)(case, q, g, t, "")
            terms[q, g, t] = case.cap(q, g, t) * value
    return token_mean_all(case, terms)


def rlcsd(case):
    """A + r_t where the right and the wrong siblings disagree; each kind of token has its mean."""
    total, moved_of_all = 0.0, 0
    for q, g in case.rows():
        a, told = grpo(case, q, g), sibling(case, q, g)
        wrong = [h for h in range(SUCCESSES[q], G) if h != g][:2]
        means = {True: [], False: []}
        for t in range(case.length(q, g)):
            y, shift = case.y(q, g, t), 0.0
            if a and told and wrong:
                others = [case.log_t(q, g, t, solution(case.said(q, h)))[y] for h in wrong]
                e = case.log_t(q, g, t, told)[y] - sum(others) / len(others)
                shift = 0.5 * math.tanh(float(e))
                shift = shift if abs(shift) > 0.1 else 0.0
            new = max(0.0, a + shift) if a >= 0 else min(0.0, a + shift)
            value = pg(lambda *_, new=new: new)(case, q, g, t, "")
            means[shift != 0].append(case.cap(q, g, t) * value)
        moved_of_all += len(means[True])
        total = total + sum(sum(each) / len(each) for each in means.values() if each)
    assert moved_of_all > 5
    return total / (Q * G)


def agreement(case, q, g, t, told, a):
    """1 where the teacher's word has the advantage's sign, else 0."""
    difference = case.log_t(q, g, t, told) - case.log_s(q, g, t).detach()
    return float(math.copysign(1, a) * float(difference[case.y(q, g, t)]) >= 0)


def sc_grpo(case):
    """GRPO times D / (D + c) where at least two siblings were right; D = KL(T || S)."""
    far, terms = {}, {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        if grpo(case, q, g) and told and SUCCESSES[q] >= 2:
            for t in range(case.length(q, g)):
                log_t, log_s = case.log_t(q, g, t, told), case.log_s(q, g, t).detach()
                far[q, g, t] = float(log_t.exp() @ (log_t - log_s))
    ordered = sorted(far.values())
    place = 0.75 * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    c = max(low + (place - math.floor(place)) * (high - low), 1e-4)
    for q, g in case.rows():
        for t in range(case.length(q, g)):
            factor = far[q, g, t] / (far[q, g, t] + c) if (q, g, t) in far else 1.0
            terms[q, g, t] = case.cap(q, g, t) * factor * pg(grpo)(case, q, g, t, "")
    return token_mean_all(case, terms)


def gain(case, q, tell=sibling):
    """Mean log T - log S a token, right rollouts minus wrong ones; None: unseen."""
    sides = {True: [], False: []}
    for g in range(G):
        if told := tell(case, q, g):
            gaps = [
                float((case.log_t(q, g, t, told) - case.log_s(q, g, t).detach())[case.y(q, g, t)])
                for t in range(case.length(q, g))
            ]
            sides[case.right(q, g)].append(sum(gaps) / len(gaps))
    if not all(sides.values()):
        return None
    return sum(sides[True]) / len(sides[True]) - sum(sides[False]) / len(sides[False])


def trusted_hybrid(case, threshold=0.0):
    gains = [gain(case, q) for q in range(Q)]
    trusted = [each is not None and each > threshold for each in gains]
    terms = {}
    for q, g in case.rows():
        told = sibling(case, q, g)
        for t in range(case.length(q, g)):
            value = 0.9 * pg(centred)(case, q, g, t, "")
            if told and trusted[q]:
                value = value + 0.1 * jsd(case, q, g, t, told)
            terms[q, g, t] = case.cap(q, g, t) * value
    return sequence_mean(case, terms)


def all_wrong(case):
    return distil(case, tell=gold, weight=lambda p: float(p == 0), reduce=sequence_mean_active)
