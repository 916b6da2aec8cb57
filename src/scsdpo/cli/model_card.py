"""The README.md of an exported policy."""

from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]

from scsdpo.checkpoints import Saved
from scsdpo.policy.chat import TODAY

_CARD = """\
---
{front}---

# Policy trained with scsdpo

{what}

## Method

| axis | strategy |
|---|---|
{method}

## Validation

{metrics}

## Use

```python
{use}
```

## Configuration

```yaml
{config}```
"""
_MERGED = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")"""
_ADAPTER = """\
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = AutoModelForCausalLM.from_pretrained({base!r}{bits})
model = PeftModel.from_pretrained(base, "this/folder")
tokenizer = AutoTokenizer.from_pretrained("this/folder")"""


_BITS = """, quantization_config=BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant={double}
)"""
"""The argument of `from_pretrained` for an adapter that was trained on a base in 4 bits."""


def model_card(saved: Saved, *, adapter: bool) -> str:
    """Markdown with the front matter that the Hugging Face hub reads."""
    arguments = saved.model["policy"]["init_args"]
    base = arguments["name_or_path"]
    front = {"library_name": "peft" if adapter else "transformers", "tags": ["scsdpo"]}
    front["pipeline_tag"] = "text-generation"
    if "/" in base and not Path(base).exists():  # a name on the hub
        front["base_model"] = base
    use = _adapter(base, arguments.get("quantization")) if adapter else _MERGED
    if template := arguments.get("chat_template_kwargs"):
        spelled = {key: repr(value) for key, value in template.items()}
        if TODAY in template:  # templates call it
            spelled[TODAY] = f"datetime.fromisoformat({str(template[TODAY])!r}).strftime"
        given = ", ".join(f"{key}={value}" for key, value in spelled.items())
        use += f"\n# Trained with tokenizer.apply_chat_template(..., {given})"
    return _CARD.format(
        front=yaml.safe_dump(front, sort_keys=False),
        what=f"From {base}, after {saved.step} optimizer steps.",
        method="\n".join(
            f"| {axis} | {_call(node)} |"
            for axis, node in saved.model.items()
            if isinstance(node, dict) and "class_path" in node
        ),
        metrics=_metrics(saved.metrics),
        use=use,
        config=yaml.safe_dump({"model": saved.model}, sort_keys=False),
    )


def _adapter(base: str, quantization: Any) -> str:
    given: Any = quantization
    if not isinstance(quantization, dict):
        given = {"class_path": str(quantization)}
    if given["class_path"].rpartition(".")[2] != "NF4":
        return _ADAPTER.format(base=base, bits="")
    bits = _BITS.format(double=given.get("init_args", {}).get("double_quant", True))
    use = _ADAPTER.format(base=base, bits=bits)
    return use.replace("AutoTokenizer\n", "AutoTokenizer, BitsAndBytesConfig\n")


def _call(node: Any) -> str:
    """`Name(argument=value, ...)` without templates and the path of a teacher's copy."""
    if isinstance(node, list):
        return f"[{', '.join(map(_call, node))}]"
    if not isinstance(node, dict):
        return str(node)
    given = node.get("init_args", {}) if "class_path" in node else node
    shown = {key: value for key, value in given.items() if key not in ("templates", "stored")}
    inside = ", ".join(f"{key}={_call(value)}" for key, value in shown.items())
    return f"{node.get('class_path', '').rpartition('.')[2]}({inside})"


def _metrics(metrics: dict[str, float]) -> str:
    measured = {k.removeprefix("val/"): v for k, v in metrics.items() if k.startswith("val/")}
    rows = [f"| {name} | {value:.4f} |" for name, value in measured.items()]
    return "\n".join(["| metric | value |", "|---|---|", *rows]) if rows else "Not measured."
