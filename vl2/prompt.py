"""Conversations to token ids and image tiles, id for id as the original processor (spec section 4)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from vl2.errors import VL2Error
from vl2.image import ImageGeometry, image_crops, image_tiles, image_token_count, load_image
from vl2.processor_config import IMAGE_PLACEHOLDER, check_vocabulary, read_processor_config
from vl2.special_tokens import ASSISTANT, USER, SpecialTokens, load_tokenizer

_ROLES = {
    USER: "user", "user": "user",
    ASSISTANT: "assistant", "assistant": "assistant",
    "system": "system", "deepseekapi-sys": "system",
}


@dataclass(frozen=True)
class Message:
    """One turn. role: "user", "assistant" or "system"; one image for each `<image>` in the content.

    token_ids: of an answer as it was generated; they stand for the content, which might encode to others.
    """

    role: str
    content: str
    images: Sequence[str | os.PathLike | Image.Image] = ()
    token_ids: Sequence[int] | None = None


@dataclass(frozen=True)
class Layout:
    """An encoded conversation whose images are not cut yet.

    input_ids, target_ids: int64 [T]; images_seq_mask: bool [T]; images: RGB; crops: int64 [n, 2] (tw, th).
    """

    input_ids: np.ndarray
    target_ids: np.ndarray
    images_seq_mask: np.ndarray
    images: tuple[Image.Image, ...]
    crops: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """An encoded conversation; without images N = n = 0 (only `collate` adds the original's empty tile).

    input_ids, target_ids: int64 [T]; images_seq_mask: bool [T]; tiles: float32 [N, 3, S, S];
    crops: int64 [n, 2], local tiles of each image as (tw, th).
    """

    input_ids: np.ndarray
    images_seq_mask: np.ndarray
    tiles: np.ndarray
    crops: np.ndarray
    target_ids: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Prompts padded on the left. input_ids, labels: int64 [B, T]; attention_mask, images_seq_mask: bool [B, T];
    images: float32 [B, N, 3, S, S]; images_spatial_crop: int64 [B, n, 2], N and n at least 1."""

    input_ids: np.ndarray
    labels: np.ndarray
    attention_mask: np.ndarray
    images_seq_mask: np.ndarray
    images: np.ndarray
    images_spatial_crop: np.ndarray


@dataclass
class _Tokens:
    """Ids with, for each, whether it is an image position and whether it is a training target."""

    ids: list[int] = field(default_factory=list)
    image: list[bool] = field(default_factory=list)
    target: list[bool] = field(default_factory=list)

    def add(self, ids: Sequence[int], target: bool, image: bool = False) -> None:
        self.ids += ids
        self.image += [image] * len(ids)
        self.target += [target and not image] * len(ids)


@dataclass(frozen=True)
class Processor:
    """Tokenizer, image geometry and template of one checkpoint or bundle."""

    tokenizer: Tokenizer
    special: SpecialTokens
    geometry: ImageGeometry
    ignore_id: int = -100
    mask_prompt: bool = True

    @classmethod
    def from_folder(cls, folder: str | os.PathLike) -> Processor:
        """Reads processor_config.json and the tokenizer files of a checkpoint or bundle.

        Raises VL2Error for a missing or broken file, a key that is unknown or unsupported, and where config.json
        contradicts them.
        """
        folder = Path(folder)
        config = read_processor_config(folder)
        tokenizer, special = load_tokenizer(folder, IMAGE_PLACEHOLDER, config.pad_token)
        processor = cls(tokenizer, special, config.geometry, config.ignore_id, config.mask_prompt)
        check_vocabulary(folder, processor.largest_id)
        return processor

    @cached_property
    def largest_id(self) -> int:
        """The largest token id of the tokenizer, which may have holes below it."""
        return max(self.tokenizer.get_vocab(with_added_tokens=True).values())

    bos_id = property(lambda self: self.special.bos_id)
    eos_id = property(lambda self: self.special.eos_id)
    pad_id = property(lambda self: self.special.pad_id)
    image_id = property(lambda self: self.special.image_id)

    def encode(self, conversation: Sequence[Message], inference: bool = True) -> Prompt:
        """The prompt of a conversation.

        Inference: it must end with an assistant message; an empty one asks for an answer, other content is continued.
        Training (`inference=False`): the final eos stays. Raises VL2Error for a role, an order or a number of images
        the template does not allow.
        """
        return self._cut(self.lay_out(conversation, inference))

    def lay_out(self, conversation: Sequence[Message], inference: bool = True) -> Layout:
        """As `encode`, but the images stay whole: a chat cuts only those that are new."""
        if not conversation:
            raise VL2Error("the conversation is empty", "begin with a user message")
        roles = [self._role(message, index) for index, message in enumerate(conversation)]
        if inference and roles[-1] != "assistant":
            raise VL2Error(f"the conversation ends with a {roles[-1]} message, expected an assistant message",
                           'end it with Message("assistant", ""), or with the beginning of the answer')
        images = [load_image(image) for message in conversation for image in message.images]
        crops = self._crops(images)
        tokens, counts = _Tokens(), iter(crops)
        tokens.add([self.bos_id], target=not self.mask_prompt)
        for message, role in zip(conversation, roles, strict=True):
            self._add_message(tokens, message, role, counts)
        return self._layout(tokens, images, crops, inference)

    def encode_text(self, text: str, images: Sequence = (), chat: bool = False, inference: bool = True) -> Prompt:
        """The prompt of a raw string: bos, the text, and eos in training; `chat` makes it one user turn."""
        content = f"{USER}: {text}\n\n{ASSISTANT}:" if chat else text
        _match_images(content, images, "the prompt")
        images = [load_image(image) for image in images]
        crops = self._crops(images)
        tokens = _Tokens()
        tokens.add([self.bos_id], target=True)
        self._add_text(tokens, content, iter(crops), target=True)
        tokens.add([self.eos_id], target=True)
        return self._cut(self._layout(tokens, images, crops, inference))

    def collate(self, prompts: Sequence[Prompt]) -> Batch:
        """One batch in the original collator's form: ids padded left, tiles and crops padded with zeros at the end."""
        size, length = len(prompts), max(len(prompt.input_ids) for prompt in prompts)
        tile_count = max(1, *(len(prompt.tiles) for prompt in prompts))
        crop_count = max(1, *(len(prompt.crops) for prompt in prompts))
        side = self.geometry.tile_size
        batch = Batch(
            np.full((size, length), self.pad_id, np.int64),
            np.full((size, length), self.ignore_id, np.int64),
            np.zeros((size, length), bool),
            np.zeros((size, length), bool),
            np.zeros((size, tile_count, 3, side, side), np.float32),
            np.zeros((size, crop_count, 2), np.int64),
        )
        for row, prompt in enumerate(prompts):
            start = length - len(prompt.input_ids)
            batch.input_ids[row, start:] = prompt.input_ids
            batch.labels[row, start:] = prompt.target_ids
            batch.attention_mask[row, start:] = True
            batch.images_seq_mask[row, start:] = prompt.images_seq_mask
            batch.images[row, : len(prompt.tiles)] = prompt.tiles
            batch.images_spatial_crop[row, : len(prompt.crops)] = prompt.crops
        return batch

    def _role(self, message: Message, index: int) -> str:
        role = _ROLES.get(message.role)
        if role is None:
            raise VL2Error(f"message {index + 1} has role {message.role!r}", f"expected one of {', '.join(_ROLES)}")
        if role == "system" and index > 0:
            raise VL2Error(f"message {index + 1} is a system message", "only the first message may be one")
        if role == "user":
            _match_images(message.content, message.images, f"message {index + 1}")
        elif message.images or (IMAGE_PLACEHOLDER in message.content and message.token_ids is None):
            raise VL2Error(f"message {index + 1} ({role}) holds an image", "only user messages may hold images")
        return role

    def _add_message(self, tokens: _Tokens, message: Message, role: str, crops) -> None:
        content = message.content.strip()
        if role == "user":
            self._add_text(tokens, f"{USER}: {content}\n\n{ASSISTANT}:", crops, target=not self.mask_prompt)
        elif role == "system":
            tokens.add(self._ids(content), target=not self.mask_prompt)
        else:
            ids = self._ids(content) if message.token_ids is None else message.token_ids
            tokens.add([*ids, self.eos_id], target=True)

    def _add_text(self, tokens: _Tokens, text: str, crops, target: bool) -> None:
        first, *rest = text.split(IMAGE_PLACEHOLDER)
        tokens.add(self._ids(first), target)
        for piece in rest:
            count = image_token_count(next(crops), self.geometry)
            tokens.add([self.image_id] * count, target, image=True)
            tokens.add(self._ids(piece), target)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _crops(self, images: Sequence[Image.Image]) -> np.ndarray:
        return image_crops([image.size for image in images], self.geometry)

    def _layout(self, tokens: _Tokens, images: Sequence, crops: np.ndarray, inference: bool) -> Layout:
        end = len(tokens.ids) - 1 if inference else len(tokens.ids)
        ids = np.array(tokens.ids[:end], np.int64)
        targets = np.where(np.array(tokens.target[:end], bool), ids, self.ignore_id)
        return Layout(ids, targets, np.array(tokens.image[:end], bool), tuple(images), crops)

    def _cut(self, layout: Layout) -> Prompt:
        side = self.geometry.tile_size
        tiles = [np.empty((0, 3, side, side), np.float32)]
        tiles += [image_tiles(image, crop, self.geometry)
                  for image, crop in zip(layout.images, layout.crops, strict=True)]
        return Prompt(layout.input_ids, layout.images_seq_mask, np.concatenate(tiles), layout.crops, layout.target_ids)


def _match_images(content: str, images: Sequence, name: str) -> None:
    expected = content.count(IMAGE_PLACEHOLDER)
    if expected != len(images):
        raise VL2Error(f"{name} has {expected} {IMAGE_PLACEHOLDER} and {len(images)} images, expected equal numbers",
                       f"write one {IMAGE_PLACEHOLDER} for each image, where it belongs")
