"""How the rows of an optimizer step are cut into micro-batches."""

from collections.abc import Sequence


def token_budget(
    rows: Sequence[int],
    lengths: Sequence[int],
    prompts: Sequence[Sequence[tuple[int, ...]]],
    *,
    group: int,
    max_tokens: int,
) -> list[list[int]]:
    """Micro-batches of rows, longest questions first, siblings together, rows ascending.

    A micro-batch holds as many rows as fit the budget; its tokens are those of its larger
    forward, each distinct prompt counted once. A row that alone exceeds the budget is a
    micro-batch of its own.

    Args:
        rows: indices q * group + g of the rollouts to run.
        lengths: [R] response tokens.
        prompts: for each forward (student, teacher, ...) the [R] prompts.
        group: rollouts a question.
        max_tokens: the budget.
    """
    longest: dict[int, int] = {}
    for row in rows:
        total = lengths[row] + max(len(each[row]) for each in prompts)
        longest[row // group] = max(total, longest.get(row // group, 0))
    order = sorted(rows, key=lambda row: (-longest[row // group], row))
    batches: list[list[int]] = []
    met: list[set[tuple[int, ...]]] = [set() for _ in prompts]
    totals = [0 for _ in prompts]
    for row in order:
        own = [each[row] for each in prompts]
        grown = [
            total + lengths[row] + (0 if prompt in seen else len(prompt))
            for total, prompt, seen in zip(totals, own, met, strict=True)
        ]
        if batches and max(grown) <= max_tokens:
            batches[-1].append(row)
            totals = grown
            for seen, prompt in zip(met, own, strict=True):
                seen.add(prompt)
        else:
            batches.append([row])
            met, totals = [{prompt} for prompt in own], [lengths[row] + len(p) for p in own]
    return [sorted(batch) for batch in batches]
