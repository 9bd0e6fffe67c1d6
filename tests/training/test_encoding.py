"""Encoding: what each record becomes, token by token, on two chat templates."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from phicore.training.encoding import IGNORE_INDEX, Encoded, encode, prompt_and_reference
from phicore.training.records import Record
from tests.chat_data import ANSWER, ASK, SYSTEM
from tests.chat_tokenizers import LONG, chat_tokenizer, tokenizer_of

ASK_AGAIN = {"role": "user", "content": "And\nthen?"}
ANSWER_AGAIN = {"role": "assistant", "content": "Là-bas 🙂 日\n\nThat is all."}
CONVERSATION = [SYSTEM, ASK, ANSWER, ASK_AGAIN, ANSWER_AGAIN]

# Every tokenizer that the exact texts below are checked on; the whitespace behind <|end|> is in no token of its own
# where the token takes it in, and there it does not come back when decoding.
SMOLLM2: dict[str, Any] = {"style": "smollm2"}
PHI3: dict[str, Any] = {"style": "phi3"}
PHI3_BYTE_FALLBACK: dict[str, Any] = {"style": "phi3", "backend": "byte-fallback"}
PHI3_PLAIN_TAGS: dict[str, Any] = {"style": "phi3", "rstrip": False}
KINDS = [SMOLLM2, PHI3, PHI3_BYTE_FALLBACK, PHI3_PLAIN_TAGS]

# Control characters are left out: Python and the tokenizer do not agree on which of them are whitespace.
characters = st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t", exclude_characters="<")
contents = st.text(characters, max_size=12)
spaced = st.text("ab \n", max_size=12)
turns = st.lists(st.tuples(contents, contents), min_size=1, max_size=3)


def learnt(encoded: Encoded, tokenizer: Any) -> list[str]:
    """The loss-bearing text, one string for each unbroken run of tokens."""
    runs: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return [tokenizer.decode(run) for run in runs]


def messages_of(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": content}
        for ask, answer in pairs
        for role, content in (("user", ask), ("assistant", answer))
    ]


# ===== Messages =====


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (SMOLLM2, ["Là-bas 🙂 日<|im_end|>", "Là-bas 🙂 日\n\nThat is all.<|im_end|>"]),
        (PHI3, ["Là-bas 🙂 日<|end|>", "Là-bas 🙂 日\n\nThat is all.<|end|><|endoftext|>"]),
        (PHI3_BYTE_FALLBACK, ["Là-bas 🙂 日<|end|>", "Là-bas 🙂 日\n\nThat is all.<|end|><|endoftext|>"]),
        (PHI3_PLAIN_TAGS, ["Là-bas 🙂 日<|end|>", "Là-bas 🙂 日\n\nThat is all.<|end|>\n<|endoftext|>"]),
    ],
)
def test_loss_is_on_what_the_assistant_says_and_ends_with(kind: dict[str, Any], expected: list[str]) -> None:
    tokenizer = tokenizer_of(**kind)
    encoded = encode(Record(1, messages=CONVERSATION), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == expected
    # The tokens themselves are those of the rendered conversation, whatever carries loss.
    text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    assert encoded.input_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not encoded.truncated
    assert not encoded.straddles


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50)
@given(pairs=turns)
def test_every_turn_and_nothing_else_carries_loss(kind: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    """Equal to tokenising the conversation piece by piece, each piece being the assistant's or not."""
    tokenizer = tokenizer_of(**kind)
    if kind["style"] == "smollm2":
        head = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        user, assistant, end, last = "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_end|>", ""
    else:
        head, user, assistant, end, last = "", "<|user|>\n", "<|assistant|>\n", "<|end|>", "<|endoftext|>"
    takes_in = kind in (PHI3, PHI3_BYTE_FALLBACK)  # role tokens and <|end|> take in the whitespace behind them
    gap = "" if takes_in else "\n"
    pieces: list[tuple[str, bool]] = [(head, False)]
    for i, (ask, answer) in enumerate(pairs):
        pieces += [
            (f"{user}{ask}{end}\n{assistant}", False),
            (answer.lstrip() if takes_in else answer, True),
            (end, True),
        ]
        pieces.append((gap, bool(last) and i == len(pairs) - 1))  # before Phi-3's last token, a newline is learnt
    pieces.append((last, True))
    expected_ids: list[int] = []
    expected_labels: list[int] = []
    for text, carries_loss in pieces:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        expected_ids += ids
        expected_labels += ids if carries_loss else [IGNORE_INDEX] * len(ids)
    encoded = encode(Record(1, messages=messages_of(pairs)), tokenizer, LONG)
    assert encoded.input_ids == expected_ids
    assert encoded.labels == expected_labels


@pytest.mark.parametrize("kind", KINDS)
def test_repeated_odd_and_empty_turns(kind: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**kind)
    end = "<|im_end|>" if kind == SMOLLM2 else "<|end|>"
    asked_last = [ASK, {"role": "assistant", "content": ""}, ASK, {"role": "assistant", "content": ASK["content"]}, ASK]
    assert learnt(encode(Record(1, messages=asked_last), tokenizer, LONG), tokenizer) == [end, f"Où? 日本{end}"]
    without_user = [SYSTEM, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]
    runs = learnt(encode(Record(1, messages=without_user), tokenizer, LONG), tokenizer)
    assert [run.rstrip("\n").split("<|")[0] for run in runs] == ["a", "b"]


def test_trailing_whitespace_of_an_answer_is_the_assistants() -> None:
    tokenizer = tokenizer_of("smollm2")
    messages = [ASK, {"role": "assistant", "content": " a \n"}]
    assert learnt(encode(Record(1, messages=messages), tokenizer, LONG), tokenizer) == [" a \n<|im_end|>"]


@settings(max_examples=50)
@given(pairs=st.lists(st.tuples(spaced, spaced), min_size=1, max_size=3))
def test_whitespace_carries_loss_where_offsets_are_trimmed(pairs: list[tuple[str, str]]) -> None:
    trimming = chat_tokenizer("smollm2", merges=[("Ġ", "Ġ")])
    trimming.backend_tokenizer.post_processor = processors.ByteLevel(add_prefix_space=False, trim_offsets=True)
    exact = chat_tokenizer("smollm2", merges=[("Ġ", "Ġ")])
    for record in (Record(1, messages=messages_of(pairs)), Record(1, prompt=pairs[0][0], completion=pairs[0][1])):
        assert encode(record, trimming, LONG) == encode(record, exact, LONG)


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_template_that_ends_the_last_turn_otherwise(eos: str) -> None:
    """GPT-OSS: <|return|> ends the last turn, and <|end|> all others; the next turn's first token is not learnt."""
    tokenizer = chat_tokenizer("smollm2")
    tokenizer.eos_token = eos
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' and not add_generation_prompt %}{{ '<|endoftext|>' }}"
        "{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    again = [*CONVERSATION, {"role": "assistant", "content": "Bye."}]
    first, second, third = (m["content"] for m in again if m["role"] == "assistant")
    runs = learnt(encode(Record(1, messages=again), tokenizer, LONG), tokenizer)
    assert runs == [f"{first}<|im_end|>", f"{second}<|im_end|>", f"{third}<|endoftext|>"]
    asked_last = [*CONVERSATION, ASK]
    runs = learnt(encode(Record(1, messages=asked_last), tokenizer, LONG), tokenizer)
    assert runs == [f"{first}<|im_end|>", f"{second}<|im_end|>"]


def test_template_that_does_not_say_how_a_turn_ends_that_is_not_the_last() -> None:
    tokenizer = chat_tokenizer("smollm2")
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
        "{% if loop.last and m['role'] == 'assistant' %}"
        "{% if add_generation_prompt %}{{ raise_exception('not twice') }}{% endif %}{{ '<|endoftext|>' }}"
        "{% else %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    runs = learnt(encode(Record(1, messages=CONVERSATION), tokenizer, LONG), tokenizer)
    assert runs == ["Là-bas 🙂 日", "Là-bas 🙂 日\n\nThat is all.<|endoftext|>"]


def test_phi3_template_on_a_tokenizer_that_does_not_know_its_tags() -> None:
    """eos and the next role tag begin alike ("<|"), and here these are tokens of their own."""
    tokenizer = chat_tokenizer("smollm2")
    tokenizer.chat_template = tokenizer_of("phi3").chat_template
    tokenizer.eos_token = "<|endoftext|>"
    runs = learnt(encode(Record(1, messages=CONVERSATION), tokenizer, LONG), tokenizer)
    assert runs == ["Là-bas 🙂 日<|end|>", "Là-bas 🙂 日\n\nThat is all.<|end|>\n<|endoftext|>"]


@pytest.mark.parametrize("kind", [PHI3, PHI3_PLAIN_TAGS])
def test_template_that_closes_with_another_token_than_eos(kind: dict[str, Any]) -> None:
    tokenizer = chat_tokenizer(**kind)
    tokenizer.chat_template = tokenizer.chat_template.replace("eos_token", "'<|endoftext|>'")
    tokenizer.eos_token = "<|end|>"
    runs = learnt(encode(Record(1, messages=CONVERSATION), tokenizer, LONG), tokenizer)
    assert runs[0] == "Là-bas 🙂 日<|end|>"


def test_template_that_begins_with_bos_gets_one_bos() -> None:
    tokenizer = chat_tokenizer("phi3", add_bos=True)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    encoded = encode(Record(1, messages=[ASK, ANSWER]), tokenizer, LONG)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1
    assert encoded.input_ids[0] == tokenizer.bos_token_id
    assert learnt(encoded, tokenizer) == ["Là-bas 🙂 日<|end|><|endoftext|>"]


def test_template_without_end_of_turn_token() -> None:
    tokenizer = chat_tokenizer("smollm2", merges=[(".", "Ċ")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}"
    )
    messages = [ASK, {"role": "assistant", "content": "a"}, ASK, {"role": "assistant", "content": "b."}]
    # The last full stop is one token with the newline behind it; it must not get lost.
    assert learnt(encode(Record(1, messages=messages), tokenizer, LONG), tokenizer) == ["a", "b.\n"]


def test_a_token_over_the_start_of_a_turn_is_told() -> None:
    tokenizer = chat_tokenizer("smollm2", merges=[("Ġ", "y")])
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    for answers, expected in ((["yes", "no"], True), (["no", "yes"], True), (["no", "no"], False)):
        messages = [m for answer in answers for m in (ASK, {"role": "assistant", "content": answer})]
        assert encode(Record(1, messages=messages), tokenizer, LONG).straddles == expected
    # A role token that takes in an answer's leading whitespace takes nothing that is worth a warning.
    messages = [ASK, {"role": "assistant", "content": "\n yes"}]
    assert not encode(Record(1, messages=messages), tokenizer_of("phi3"), LONG).straddles


@pytest.mark.parametrize(
    ("before_content", "generation_prompt", "message"),
    [
        # DeepSeek-R1 and QwQ: the generation prompt opens a thought that the rendered answer does not have.
        ("''", "<|im_start|>assistant\n<think>\n", r"the text before messages\[1\] is not how"),
        # Qwen3: an answer is rendered with an empty thought while it is the last, and without it later.
        (
            "('<think></think>' if loop.last and m['role'] == 'assistant' else '')",
            "<|im_start|>assistant\n",
            r"messages\[1\] is rendered otherwise",
        ),
    ],
)
def test_unstable_templates_are_refused(before_content: str, generation_prompt: str, message: str) -> None:
    tokenizer = chat_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + BEFORE_CONTENT + m['content'] + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'GENERATION_PROMPT' }}{% endif %}"
    )
    for name, value in (("BEFORE_CONTENT", before_content), ("GENERATION_PROMPT", generation_prompt)):
        tokenizer.chat_template = tokenizer.chat_template.replace(name, value)
    with pytest.raises(ValueError, match=f"not prefix-stable: .*{message}.*prompt and completion"):
        encode(Record(1, messages=CONVERSATION[1:]), tokenizer, LONG)


def test_template_that_drops_the_answer_is_refused() -> None:
    tokenizer = chat_tokenizer("smollm2")
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match=r"messages\[1\], the assistant's, has no token of its own"):
        encode(Record(1, messages=[ASK, ANSWER]), tokenizer, LONG)


@pytest.mark.parametrize("content", ["m.content", "m.content | trim"])
def test_template_that_leaves_out_a_system_message_is_told(content: str) -> None:
    tokenizer = chat_tokenizer()
    turn = "{{ '<|im_start|>' + m.role + '\n' + " + content + " + '<|im_end|>' }}"
    end = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    asked = {"role": "user", "content": " Où?\n"}
    for template, left_out in (
        ("{% for m in messages %}" + turn + "{% endfor %}" + end, False),
        ("{% for m in messages %}{% if m.role != 'system' %}" + turn + "{% endif %}{% endfor %}" + end, True),
    ):
        tokenizer.chat_template = template
        assert encode(Record(1, messages=[SYSTEM, asked, ANSWER]), tokenizer, LONG).left_out == left_out
        assert not encode(Record(1, messages=[asked, ANSWER]), tokenizer, LONG).left_out


def test_template_that_refuses_a_role() -> None:
    tokenizer = chat_tokenizer("smollm2")
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(ValueError, match="refuses messages with the roles system, user, assistant: System role not"):
        encode(Record(1, messages=[SYSTEM, ASK, ANSWER]), tokenizer, LONG)


# ===== Prompt and completion, text =====


@pytest.mark.parametrize("backend", ["byte-level", "byte-fallback"])
@pytest.mark.parametrize("add_bos", [False, True])
def test_completion_and_eos_carry_loss(backend: Any, add_bos: bool) -> None:
    tokenizer = chat_tokenizer("phi3", backend=backend, add_bos=add_bos)
    encoded = encode(Record(1, prompt="Où 日", completion="日🙂 là "), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == ["日🙂 là <|endoftext|>"]
    bos = [tokenizer.bos_token_id] * add_bos
    plain = tokenizer("Où 日日🙂 là ", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == [*bos, *plain, tokenizer.eos_token_id]


@pytest.mark.parametrize("add_bos", [False, True])
def test_every_token_of_a_text_carries_loss(add_bos: bool) -> None:
    tokenizer = chat_tokenizer("phi3", add_bos=add_bos)
    encoded = encode(Record(1, text="日 a"), tokenizer, LONG)
    bos = [tokenizer.bos_token_id] * add_bos
    plain = tokenizer("日 a", add_special_tokens=False)["input_ids"]
    assert encoded.input_ids == [*bos, *plain, tokenizer.eos_token_id]
    assert encoded.labels == encoded.input_ids


def test_a_text_that_brings_its_own_bos_gets_no_second() -> None:
    tokenizer = chat_tokenizer("phi3", add_bos=True)
    for record in (Record(1, text="<s>a b"), Record(1, prompt="<s>a", completion=" b")):
        encoded = encode(record, tokenizer, LONG)
        assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["<s>", "a", "Ġ", "b", "<|endoftext|>"]
    assert encode(Record(1, text="a<s>"), tokenizer, LONG).input_ids.count(tokenizer.bos_token_id) == 2


def test_eos_is_appended_once() -> None:
    tokenizer = tokenizer_of("smollm2")
    eos = tokenizer.eos_token_id
    for record in (Record(1, text="a<|im_end|>"), Record(1, prompt="a", completion="<|im_end|>")):
        encoded = encode(record, tokenizer, LONG)
        assert encoded.input_ids.count(eos) == 1
        assert encoded.labels[-1] == eos
    # An eos at the end of the prompt is not the completion's.
    encoded = encode(Record(1, prompt="a<|im_end|>", completion=""), tokenizer, LONG)
    assert encoded.input_ids[-2:] == [eos, eos]
    assert encoded.labels[-2:] == [IGNORE_INDEX, eos]


def test_special_tokens_that_a_tokenizer_puts_after_a_text_are_left_out() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = chat_tokenizer("phi3")
    bos, eos, tag = (tokenizer.convert_tokens_to_ids(t) for t in ("<s>", "<|endoftext|>", "<|end|>"))
    for closing in (("<|endoftext|>", eos), ("<|end|>", tag)):
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"<s> $A {closing[0]}", special_tokens=[("<s>", bos), closing]
        )
        encoded = encode(Record(1, text="a"), tokenizer, LONG)
        assert tokenizer.convert_ids_to_tokens(encoded.input_ids) == ["<s>", "a", "<|endoftext|>"]
        encoded = encode(Record(1, prompt="a", completion="b"), tokenizer, LONG)
        assert learnt(encoded, tokenizer) == ["b<|endoftext|>"]


def test_a_token_over_the_boundary_carries_no_loss_and_is_told() -> None:
    tokenizer = chat_tokenizer("smollm2", merges=[("Ġ", "y")])
    encoded = encode(Record(1, prompt="Q? ", completion="yes"), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == ["es<|im_end|>"]
    assert encoded.straddles
    encoded = encode(Record(1, prompt="Q?", completion=" yes"), tokenizer, LONG)
    assert learnt(encoded, tokenizer) == [" yes<|im_end|>"]
    assert not encoded.straddles


# ===== Length, tokenizers that do not serve =====


@settings(max_examples=50)
@given(pairs=turns, sequence_length=st.integers(1, 300))
def test_cut_is_the_beginning_of_the_whole(pairs: list[tuple[str, str]], sequence_length: int) -> None:
    tokenizer = tokenizer_of("phi3")
    for record in (
        Record(1, messages=messages_of(pairs)),
        Record(1, prompt=pairs[0][0], completion=pairs[0][1]),
        Record(1, text=pairs[0][0]),
    ):
        whole, cut = encode(record, tokenizer, LONG), encode(record, tokenizer, sequence_length)
        assert cut.input_ids == whole.input_ids[:sequence_length]
        assert cut.labels == whole.labels[:sequence_length]
        assert cut.length == whole.length == len(whole.input_ids)
        assert cut.truncated == (whole.length > sequence_length)


@pytest.mark.parametrize("sequence_length", [0, -1])
def test_sequence_length_must_be_positive(sequence_length: int) -> None:
    with pytest.raises(ValueError, match=f"sequence_length must be above 0, got {sequence_length}"):
        encode(Record(1, text="a"), tokenizer_of(), sequence_length)


def test_tokenizers_that_do_not_serve() -> None:
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = None
    for call in (lambda r: encode(r, tokenizer, LONG), lambda r: prompt_and_reference(r, tokenizer)):
        with pytest.raises(ValueError, match=r"no chat template.*set tokenizer\.chat_template"):
            call(Record(1, messages=[ASK, ANSWER]))
    tokenizer.eos_token = None
    for record in (Record(1, text="a"), Record(1, prompt="a", completion="b")):
        with pytest.raises(ValueError, match=r"no eos token.*set tokenizer\.eos_token"):
            encode(record, tokenizer, LONG)

    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="Slow is not a fast tokenizer"):
        encode(Record(1, text="a"), Slow(), LONG)


# ===== Prompts for generation =====


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_ends_where_the_last_answer_begins(kind: dict[str, Any]) -> None:
    tokenizer = tokenizer_of(**kind)
    messages = [*CONVERSATION[:-1], {"role": "assistant", "content": "  Bye.\n"}, ASK]
    prompt, reference = prompt_and_reference(Record(1, messages=messages), tokenizer)
    assert reference == "Bye."
    tag = "<|im_start|>assistant\n" if kind == SMOLLM2 else "<|assistant|>\n"
    end = "<|im_end|>" if kind == SMOLLM2 else "<|end|>"
    assert prompt.endswith(f"And\nthen?{end}\n{tag}")
    assert str(tokenizer.apply_chat_template(messages, tokenize=False)).startswith(prompt)
    # What is generated from the prompt is what was learnt: its tokens are those before the last loss-bearing run.
    answered = encode(Record(1, messages=CONVERSATION), tokenizer, LONG)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert answered.input_ids[: len(ids)] == ids
    assert answered.labels[len(ids) - 1] == IGNORE_INDEX
    assert IGNORE_INDEX not in answered.labels[len(ids) : -1]


@pytest.mark.parametrize(
    ("before", "written"),
    [("<think>\n\n</think>\n\n", "<think>\n\n</think>\n\nBye."), ("<|endoftext|>final", "finalBye.")],
    ids=["Qwen3", "GPT-OSS"],
)
def test_the_reference_is_what_a_perfect_model_answers(before: str, written: str) -> None:
    """Of what the template writes before the content, an answer has what is no special token."""
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{{ '"
        + before.replace("\n", "\\n")
        + "' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    record = Record(1, messages=[ASK, {"role": "assistant", "content": "Bye. "}])
    assert prompt_and_reference(record, tokenizer)[1] == written
    labels = [label for label in encode(record, tokenizer, LONG).labels if label != IGNORE_INDEX]
    assert tokenizer.decode(labels, skip_special_tokens=True).strip() == written


def test_prompt_of_other_records() -> None:
    assert prompt_and_reference(Record(1, prompt="a ", completion=" b"), tokenizer_of()) == ("a ", " b")
    with pytest.raises(ValueError, match=r'line 7 holds "text", which has no prompt'):
        prompt_and_reference(Record(7, text="a"), tokenizer_of())
