import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vl2.errors import VL2Error
from vl2.prompt import Message, Processor, Prompt

GOLDENS = Path(__file__).parents[1] / "goldens"
CHECKPOINTS = ("tiny-mini", "small-mini", "base-mini")


def facts(checkpoint: str) -> dict:
    return json.loads((GOLDENS / checkpoint / "golden" / "processor.json").read_text())


CASES = [(checkpoint, case) for checkpoint in CHECKPOINTS for case in facts(checkpoint)["cases"]]
BATCHES = [(checkpoint, batch) for checkpoint in CHECKPOINTS for batch in facts(checkpoint)["batches"]]


@pytest.fixture(scope="module")
def processors() -> dict[str, Processor]:
    return {checkpoint: Processor.from_folder(GOLDENS / checkpoint) for checkpoint in CHECKPOINTS}


@pytest.fixture
def tiny(processors: dict[str, Processor]) -> Processor:
    return processors["tiny-mini"]


def encode(processor: Processor, case: dict) -> Prompt:
    """The prompt of a recorded case."""
    images = [GOLDENS / "images" / f"{name}.png" for name in case["images"]]
    inference = case.get("inference_mode", True)
    if "prompt" in case:
        return processor.encode_text(case["prompt"], images, case.get("apply_sft_format", False), inference)
    rest = iter(images)
    messages = [Message(turn["role"], turn["content"], [next(rest) for _ in range(turn["content"].count("<image>"))])
                for turn in case["conversations"]]
    return processor.encode(messages, inference)


def sha256(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


@pytest.mark.parametrize("checkpoint, name", CASES)
def test_prompts_equal_the_originals(processors, checkpoint: str, name: str) -> None:
    case = facts(checkpoint)["cases"][name]
    prompt = encode(processors[checkpoint], case)
    with np.load(GOLDENS / checkpoint / "golden" / "processor.npz") as arrays:
        for field in ("input_ids", "target_ids", "images_seq_mask"):
            np.testing.assert_array_equal(getattr(prompt, field), arrays[f"{name}/{field}"])
    assert (prompt.input_ids.dtype, prompt.images_seq_mask.dtype) == (np.int64, bool)
    assert len(prompt.input_ids) == case["seq_len"]
    batch = processors[checkpoint].collate([prompt])
    assert list(batch.images[0].shape) == case["images_shape"]
    assert sha256(batch.images[0]) == case["images_f32_sha256"]
    assert batch.images_spatial_crop[0].tolist() == case["images_spatial_crop"]


@pytest.mark.parametrize("checkpoint, name", BATCHES)
def test_batches_equal_the_originals(processors, checkpoint: str, name: str) -> None:
    expected = facts(checkpoint)["batches"][name]
    processor = processors[checkpoint]
    batch = processor.collate([encode(processor, facts(checkpoint)["cases"][member])
                               for member in expected["members"]])
    with np.load(GOLDENS / checkpoint / "golden" / "processor.npz") as arrays:
        for field in ("input_ids", "labels", "attention_mask", "images_seq_mask"):
            np.testing.assert_array_equal(getattr(batch, field), arrays[f"{name}/{field}"])
    assert sha256(batch.images) == expected["images_f32_sha256"]
    assert batch.images_spatial_crop.tolist() == expected["images_spatial_crop"]


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_special_ids_and_encodings_equal_the_originals(processors, checkpoint: str) -> None:
    processor, expected = processors[checkpoint], facts(checkpoint)
    for token, token_id in expected["special_ids"].items():
        assert processor.tokenizer.token_to_id(token) == token_id
    assert processor.tokenizer.get_vocab_size() == expected["tokenizer_length"]
    for row in expected["encode"]:
        assert processor.tokenizer.encode(row["text"], add_special_tokens=False).ids == row["ids"]
        assert processor.tokenizer.decode(row["ids"], skip_special_tokens=False) == row["decoded"]


def test_a_text_prompt_has_no_tile_of_its_own(tiny: Processor) -> None:
    prompt = tiny.encode([Message("user", "hello"), Message("assistant", "")])
    assert prompt.tiles.shape == (0, 3, 384, 384) and prompt.crops.shape == (0, 2)


def test_masked_prompts_train_on_answers_only(tmp_path: Path) -> None:
    folder = copy(tmp_path, lambda config: config.update(mask_prompt=True))
    processor = Processor.from_folder(folder)
    prompt = processor.encode([Message("user", "How many?"), Message("assistant", "Two.")], inference=False)
    answer = [*processor.tokenizer.encode("Two.", add_special_tokens=False).ids, processor.eos_id]
    assert prompt.target_ids[-len(answer):].tolist() == answer
    assert set(prompt.target_ids[:-len(answer)].tolist()) == {-100}


def copy(tmp_path: Path, change=lambda config: None) -> Path:
    """tiny-mini's processor files with an edited processor_config.json."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "processor_config.json"):
        shutil.copy(GOLDENS / "tiny-mini" / name, folder)
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
    return folder


def test_missing_special_tokens_are_added_at_the_end_in_the_originals_order(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] < 2]
    for token in [token for token, token_id in content["model"]["vocab"].items() if token_id == 2 or token_id >= 620]:
        del content["model"]["vocab"][token]
    path.write_text(json.dumps(content))
    processor = Processor.from_folder(folder)
    expected = ["<｜▁pad▁｜>", "<image>", "<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>", "<|grounding|>", "<|User|>",
                "<|Assistant|>"]
    ids = [processor.tokenizer.token_to_id(token) for token in expected]
    assert ids == list(range(ids[0], ids[0] + len(expected)))
    assert processor.tokenizer.encode("a<|ref|>b", add_special_tokens=False).ids[1] == ids[2]


def test_tokens_are_named_by_tokenizer_config_where_the_map_is_missing(tmp_path: Path, tiny: Processor) -> None:
    folder = copy(tmp_path)
    (folder / "special_tokens_map.json").unlink()
    assert Processor.from_folder(folder).special == tiny.special
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(VL2Error, match="neither special_tokens_map.json nor tokenizer_config.json"):
        Processor.from_folder(folder)


@pytest.mark.parametrize("key, value", [("sft_format", "plain"), ("normalize", False), ("add_special_token", True),
                                        ("image_token", "<img>"), ("tile_overlap", 3)])
def test_an_unsupported_or_unknown_key_is_refused_by_name(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(VL2Error, match=key):
        Processor.from_folder(copy(tmp_path, lambda config: config.update({key: value})))


@pytest.mark.parametrize("change", [
    lambda config: config.pop("patch_size"), lambda config: config.pop("candidate_resolutions"),
    lambda config: config.update(candidate_resolutions=[]), lambda config: config.update(image_mean=[0.5]),
    lambda config: config.update(candidate_resolutions=[[384]]), lambda config: config.update(patch_size=None),
])
def test_broken_image_settings_are_refused(tmp_path: Path, change) -> None:
    with pytest.raises(VL2Error, match="image settings are missing or malformed"):
        Processor.from_folder(copy(tmp_path, change))


@pytest.mark.parametrize("key, value", [("patch_size", 16), ("downsample_ratio", 1),
                                        ("candidate_resolutions", [[384, 384]])])
def test_processor_and_model_config_must_agree(tmp_path: Path, key: str, value: object) -> None:
    folder = copy(tmp_path, lambda config: config.update({key: value}))
    Processor.from_folder(folder)
    shutil.copy(GOLDENS / "tiny-mini" / "config.json", folder)
    with pytest.raises(VL2Error, match=f"{key} is .* in processor_config.json, .* in config.json"):
        Processor.from_folder(folder)


def test_a_tokenizer_with_more_ids_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    config = json.loads((GOLDENS / "tiny-mini" / "config.json").read_text())
    config["language_config"]["vocab_size"] = 627
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(VL2Error, match="the tokenizer has id 627, the model 627 ids"):
        Processor.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "processor_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    folder = copy(tmp_path)
    (folder / name).unlink()
    with pytest.raises(VL2Error, match=f"{name} is missing"):
        Processor.from_folder(folder)


def test_a_broken_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = copy(tmp_path)
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(VL2Error, match="not a tokenizer file"):
        Processor.from_folder(folder)


IMAGE = Image.new("RGB", (20, 30))


@pytest.mark.parametrize("conversation, message", [
    ([], "empty"),
    ([Message("user", "hello")], "ends with a user message"),
    ([Message("robot", "hello"), Message("assistant", "")], "role 'robot'"),
    ([Message("user", "hello"), Message("system", "x"), Message("assistant", "")], "message 2 is a system message"),
    ([Message("user", "<image>"), Message("assistant", "")], "message 1 has 1 <image> and 0 images"),
    ([Message("user", "hello", [IMAGE]), Message("assistant", "")], "message 1 has 0 <image> and 1 images"),
    ([Message("user", "hello"), Message("assistant", "<image>")], r"message 2 \(assistant\) holds an image"),
    ([Message("system", "hello", [IMAGE]), Message("assistant", "")], r"message 1 \(system\) holds an image"),
])
def test_a_conversation_that_the_template_forbids_is_refused(tiny: Processor, conversation, message: str) -> None:
    with pytest.raises(VL2Error, match=message) as error:
        tiny.encode(conversation)
    assert error.value.hint


def test_a_raw_prompt_with_a_wrong_number_of_images_is_refused(tiny: Processor) -> None:
    with pytest.raises(VL2Error, match="the prompt has 2 <image> and 1 images"):
        tiny.encode_text("<image><image>", [IMAGE])


def test_an_answer_keeps_the_ids_it_was_generated_with(tiny: Processor) -> None:
    turns = [Message("user", "hello"), Message("assistant", "<image>", token_ids=[620, 7]), Message("user", "again"),
             Message("assistant", "")]
    layout = tiny.lay_out(turns)
    first = len(tiny.encode(turns[:1] + turns[-1:]).input_ids)
    assert layout.input_ids[first:first + 3].tolist() == [620, 7, tiny.eos_id]
    assert not layout.images_seq_mask.any() and layout.images == ()
