"""The demo's base model: tokenizer, chat template, fast path, and the shipped weights."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from raytune_vlm.demo import base_model, lines, pretrain, receipts  # noqa: E402
from raytune_vlm.errors import CheckpointError  # noqa: E402
from raytune_vlm.json_tokens import SEPARATOR, json2token, tags_of  # noqa: E402


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    from transformers import AutoModelForImageTextToText, AutoProcessor

    folder = base_model.BASE_FOLDER
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    )
    return model.eval(), AutoProcessor.from_pretrained(folder, local_files_only=True)


def conversation(image: Image.Image, prompt: str, answer: str) -> list[dict[str, Any]]:
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": prompt}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def test_every_printable_text_survives_the_tokenizer(shipped: tuple[Any, Any]) -> None:
    tokenizer = shipped[1].tokenizer
    text = "".join(map(chr, range(32, 127)))
    for sample in (text, "A  B", " x ", "1\n2", "".join(base_model.TAGS), "<s_unknown>1</s_"):
        tokens = tokenizer.encode(sample)
        assert tokens == base_model.encode(sample)
        assert tokenizer.decode(tokens) == sample
        assert tokenizer.decode(tokens, skip_special_tokens=True) == sample
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.encode("é") == [tokenizer.unk_token_id] == base_model.encode("é")
    assert len(tokenizer) == len(base_model.VOCABULARY)


def test_every_tag_of_both_kinds_is_one_token(shipped: tuple[Any, Any]) -> None:
    tokenizer = shipped[1].tokenizer
    rng = np.random.default_rng(0)
    tags = {SEPARATOR}
    for render in (receipts.render_kind_a, receipts.render_kind_b):
        tags |= tags_of(render(rng)[1])
    assert tags == set(base_model.TAGS)
    for tag in tags:
        assert len(tokenizer.encode(tag)) == 1


def test_end_and_padding_tokens(shipped: tuple[Any, Any]) -> None:
    model, processor = shipped
    tokenizer = processor.tokenizer
    assert tokenizer.eos_token == base_model.END
    assert tokenizer.pad_token == base_model.PAD
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert model.config.image_token_id == processor.image_token_id
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_the_assistant_mask_covers_the_answers_and_their_ends(shipped: tuple[Any, Any]) -> None:
    processor = shipped[1]
    image, truth = receipts.render_kind_b(np.random.default_rng(0))
    messages = conversation(image, "parse", json2token(truth))
    messages += [
        {"role": "user", "content": "sum?"},
        {"role": "assistant", "content": "1.20"},
    ]
    batch = processor.apply_chat_template(
        messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
    )
    mask = np.asarray(batch["assistant_masks"][0], dtype=bool)
    learned = processor.tokenizer.decode(np.asarray(batch["input_ids"][0])[mask])
    assert learned == f"{json2token(truth)}<|end|>1.20<|end|>"


def test_the_prompt_ends_where_the_answer_begins(shipped: tuple[Any, Any]) -> None:
    processor = shipped[1]
    image = lines.render_line("1.20", np.random.default_rng(0))
    messages = conversation(image, "read", "1.20")
    prompt = processor.apply_chat_template(
        messages[:1], tokenize=True, return_dict=True, add_generation_prompt=True
    )
    whole = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    assert list(prompt["input_ids"][0]) == base_model.encode_prompt("read")
    expected = base_model.encode_prompt("read") + base_model.encode("1.20" + base_model.END)
    assert list(whole["input_ids"][0]) == expected


def test_the_fast_path_gives_the_processors_pixels(shipped: tuple[Any, Any]) -> None:
    processor = shipped[1]
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (57, 133), dtype=np.uint8)
    images = [
        receipts.render_kind_a(rng)[0],
        lines.render_line("RM3.20", rng),
        Image.fromarray(noise).convert("RGB"),
        Image.fromarray(noise.T.copy()).convert("RGB"),
    ]
    for image in images:
        batch = processor(images=[[image]], text=base_model.IMAGE, return_tensors="pt")
        fast = base_model.pixel_values([base_model.squeeze(image)])
        assert torch.allclose(batch["pixel_values"], fast, atol=1e-6)
        assert bool(batch["pixel_attention_mask"].all())


def test_the_shipped_weights_are_those_of_the_record() -> None:
    record = base_model.verify()
    assert record["steps"] == pretrain.NUM_STEPS
    assert record["seed"] == 0
    size = sum(path.stat().st_size for path in base_model.BASE_FOLDER.iterdir())
    assert size <= 8 * 1024**2


def test_altered_or_missing_weights_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        base_model.verify(tmp_path)
    (tmp_path / base_model.WEIGHTS_FILE).write_bytes(b"other")
    record = json.dumps({"sha256": "0" * 64})
    (tmp_path / base_model.TRAINING_FILE).write_text(record, encoding="utf-8")
    with pytest.raises(CheckpointError, match="sha256") as caught:
        base_model.verify(tmp_path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.parametrize(
    ("task", "least_right"),
    [(pretrain.read_line, 0.5), (pretrain.parse_receipt, 0.4)],
)
def test_the_shipped_model_reads(
    shipped: tuple[Any, Any], task: pretrain.Task, least_right: float
) -> None:
    rng = np.random.default_rng([7, 7])
    samples = [task(rng) for _ in range(48)]
    texts = pretrain.answer(shipped[0], samples)
    right = sum(text == sample.answer for text, sample in zip(texts, samples, strict=True))
    assert right / len(samples) >= least_right


def test_samples_are_seeded_and_patch_labels_show_the_text() -> None:
    for task in (*pretrain.LINE_TASKS, *pretrain.RECEIPT_TASKS):
        first, again = (task(np.random.default_rng(3)) for _ in range(2))
        assert (first.prompt, first.answer) == (again.prompt, again.answer)
        assert np.array_equal(first.picture, again.picture)
        assert np.array_equal(first.patch_labels, again.patch_labels)
    sample = pretrain.read_line(np.random.default_rng(3))
    shown = {base_model.VOCABULARY[label] for label in sample.patch_labels.flat if label}
    assert shown == set(sample.answer) - {" "}


def test_a_short_training_is_reproducible_and_writes_its_record(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    try:
        for name in ("first", "again"):
            pretrain.main(["--output", str(tmp_path / name), "--steps", "2", "--held-out", "4"])
    finally:
        torch.set_num_threads(threads)
    first, again = (base_model.verify(tmp_path / name) for name in ("first", "again"))
    assert first["sha256"] == again["sha256"]
    assert first["steps"] == 2
    assert set(first["exact_match"]) == {
        task.__name__ for task in (*pretrain.LINE_TASKS, *pretrain.RECEIPT_TASKS)
    }
