"""A short supervised warm-up in the teacher's template: does a policy that was shown how to use a
demonstration then gain from being its own teacher?

    python benchmarks/teacher_warmup.py OUT --policy DIR [--steps 30] [--lr 1e-5] [--plain]

The training questions of `scsdpo.lab.Arithmetic`, each with the right answer as its demonstration
in SDPO's words, and that answer as the response. `--plain` is the control: the same questions and
responses without a demonstration, which teaches form and length and not how to use what is told.
OUT is a folder to give to `benchmarks/real.py --policy`.
"""

import argparse
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from scsdpo.lab import Arithmetic
from scsdpo.policy import CausalLM
from scsdpo.teacher import SiblingDemonstration
from scsdpo.types import Prompt

BATCH = 16


def example(policy: CausalLM, question: Prompt, plain: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids, and the same ids with -100 at the prompt."""
    said = f"The answer is {question.answer}."
    if plain:
        prompt = policy.chat.render(question.messages)
    else:
        prompt = SiblingDemonstration().show(policy.chat, question, said)
    response = (*policy.chat.encode(said), policy.chat.eos_ids[0])
    ids = torch.tensor([*prompt, *response])
    return ids, torch.tensor([*[-100] * len(prompt), *response])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--policy", required=True)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--lr", type=float, default=1e-5)
    parser.add_argument("--plain", action="store_true", help="without a demonstration: the control")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = CausalLM(args.policy)
    policy.configure_model()
    policy.to(device)
    model = policy.language_model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    questions = Arithmetic("train")
    generator = torch.Generator().manual_seed(0)
    for step in range(args.steps):
        chosen = torch.randint(len(questions), (BATCH,), generator=generator).tolist()
        pairs = [example(policy, questions[i], args.plain) for i in chosen]
        ids = pad_sequence([pair[0] for pair in pairs], batch_first=True).to(device)
        labels = pad_sequence([pair[1] for pair in pairs], batch_first=True, padding_value=-100)
        logits = model(ids).logits[:, :-1].float()
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].to(device).flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: {loss.item():.3f}", flush=True)
    model.save_pretrained(args.out)
    policy.chat.tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
