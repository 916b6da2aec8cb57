"""Tokenizers and templates of the common model families, small and made here.

Each has its family's tokens with its family's flags, and a template that reads and changes contents
as its family's does.
"""

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

_CORPUS = [
    "user\nassistant\nsystem\nmodel\n<|>|\n\n>\n\n<<a>>\n|>\n[INST] [/INST] the answer is 42.\n\n",
    "What is <b>bold</b>? end_of_turn start_header_id im_end im_start eot_id User Assistant",
    "tool_call think image_pad return channel message </s> <s> [/ ] <| |>",
] * 4

CHATML = """\
{%- for m in messages %}
{%- set content = m.content if m.content is string else '' %}
{%- if m.role == 'assistant' %}
{%- if '</think>' in content %}{% set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>assistant\\n' + content }}
{%- for call in m.tool_calls or [] %}
{{- '\\n<tool_call>\\n' + call.function | tojson + '\\n</tool_call>' }}
{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>\\n' + content + '\\n</tool_response><|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}"""

LLAMA3 = """\
{{- bos_token }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' }}
{%- if loop.first and m.role == 'system' %}{{- 'Today Date: ' + date + '\\n\\n' }}{% endif %}
{{- m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
LLAMA3 = "{%- set date = strftime_now('%d %b %Y') %}" + LLAMA3

GEMMA = """\
{{ bos_token }}
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- first if loop.first }}
{{- m.content | trim }}{{- '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}"""

MISTRAL = """\
{{- bos_token }}
{%- set first = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- for m in messages if m.role != 'system' %}
{%- if m.role == 'user' %}{{- '[INST] ' + (first if loop.first else '') + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content | trim + eos_token }}
{%- endif %}
{%- endfor %}"""

HARMONY = """\
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- if '<|channel|>analysis<|message|>' in m.content %}{{ raise_exception('tags') }}{% endif %}
{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{% endif %}"""

DEEPSEEK = """\
{{- bos_token }}
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}
{%- elif m.role == 'user' %}{{- '<｜User｜>' + m.content }}
{%- elif m.role == 'tool' %}{{- '<｜tool▁output▁begin｜>' + m.content + '<｜tool▁output▁end｜>' }}
{%- elif m.tool_calls %}
{{- '<｜Assistant｜></think>' }}
{%- for call in m.tool_calls %}
{{- '<｜tool▁call▁begin｜>' + call.function.name + call.function.arguments }}
{%- endfor %}
{{- '<｜tool▁call▁end｜><｜end▁of▁sentence｜>' }}
{%- else %}
{{- '<｜Assistant｜></think>' + m.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜><think>\\n' }}{% endif %}"""

PHI = """\
{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{% endif %}"""

PLAIN = """\
{%- for m in messages %}{{- m.role + ': ' + m.content + ' </s> ' }}{% endfor %}
{%- if add_generation_prompt %}{{- 'assistant:' }}{% endif %}"""


def _special(*names, **flags):
    return [AddedToken(name, special=True, normalized=False, **flags) for name in names]


def _words(*names, **flags):
    return [AddedToken(name, special=False, normalized=False, **flags) for name in names]


def _byte_level(added):
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator(_CORPUS, trainer)
    _add(bpe, added)
    return bpe


def _add(tokenizer, added):
    tokenizer.add_special_tokens([token for token in added if token.special])
    tokenizer.add_tokens([token for token in added if not token.special])


def _sentencepiece(added, kind="bpe", prepend="first"):
    """Vocabulary with the control tokens in it, bytes for what it lacks, and no byte level."""
    pieces = [token.content for token in added if token.special]
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    letters = sorted({c for text in _CORPUS for c in text.replace(" ", "▁")} | {"▁"})
    if kind == "unigram":
        scored = [(piece, 0.0) for piece in ["<unk>", *pieces]]
        scored += [(one, -20.0) for one in bytes_] + [(one, -5.0) for one in letters]
        scored += [("the", -4.0), ("▁the", -4.0), ("▁is", -4.0)]
        model = models.Unigram(scored, unk_id=0, byte_fallback=True)
    else:
        merged = [("<", "/"), ("s", ">"), ("</", "s>"), ("t", "h"), ("th", "e"), ("▁", "the")]
        names = dict.fromkeys(["<unk>", *pieces, *bytes_, *letters, *map("".join, merged)])
        vocabulary = {name: i for i, name in enumerate(names)}
        model = models.BPE(
            vocab=vocabulary, merges=merged, unk_token="<unk>", fuse_unk=True, byte_fallback=True
        )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add(made, added)
    return made


def _word_level(added):
    """Words of lower-cased text, where the spellings of control tokens are words too."""
    words = [
        "<unk>",
        "</s>",
        "<pad>",
        *["user", "assistant", "system", ":", "the", "answer", "is", "42"],
    ]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    made.normalizer = normalizers.Lowercase()
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\s+|:"), behavior="removed")
    _add(made, added)
    return made


def _family(tokenizer, template, **tokens):
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, chat_template=template, clean_up_tokenization_spaces=False,
        **tokens,
    )  # fmt: skip


def families():
    """Name -> tokenizer; `eos_token` ends a response."""
    chatml = _special("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|image_pad|>")
    chatml += _words("<think>", "</think>", "<tool_call>", "</tool_call>")
    chatml += _words("<tool_response>", "</tool_response>")
    llama = _special("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>")
    llama += _special("<|end_header_id|>", "<|python_tag|>", "<|finetune_right_pad_id|>")
    gemma = _special("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>", "<image>")
    gemma += _words("\n\n", "<b>", "</b>", "[multimodal]")
    mistral = _special("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[THINK]", "[/THINK]")
    harmony = _special("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>")
    deepseek = _special("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
    deepseek += _words("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
    deepseek += _words("<｜tool▁output▁begin｜>", "<｜tool▁output▁end｜>")
    deepseek += _words("<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>")
    phi = _special("<|endoftext|>") + _special(
        "<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True, lstrip=True
    )
    plain = [AddedToken(name, special=True, normalized=True) for name in ("</s>", "<pad>")]
    return {
        "chatml": _family(_byte_level(chatml), CHATML, eos_token="<|im_end|>"),
        "llama": _family(
            _byte_level(llama), LLAMA3, eos_token="<|eot_id|>", bos_token="<|begin_of_text|>"
        ),
        "gemma": _family(
            _sentencepiece(gemma), GEMMA, eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
        ),
        "mistral": _family(
            _sentencepiece(mistral), MISTRAL, eos_token="</s>", bos_token="<s>", unk_token="<unk>"
        ),
        "unigram": _family(
            _sentencepiece(mistral, "unigram", "always"), MISTRAL, eos_token="</s>",
            bos_token="<s>", unk_token="<unk>",
        ),
        "harmony": _family(_byte_level(harmony), HARMONY, eos_token="<|return|>"),
        "deepseek": _family(
            _byte_level(deepseek), DEEPSEEK, eos_token="<｜end▁of▁sentence｜>",
            bos_token="<｜begin▁of▁sentence｜>",
        ),
        "phi": _family(_byte_level(phi), PHI, eos_token="<|end|>"),
        "words": _family(
            _word_level(plain), PLAIN, eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
        ),
    }  # fmt: skip
