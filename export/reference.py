"""The PyTorch model run piece by piece, each piece's weights in memory only while it computes.

It answers as the float32 model whose weights were rounded as the bundle stores them; packed ones are dequantized.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from vl2.export.checkpoint import Checkpoint
from vl2.export.pieces import Piece, pieces_of
from vl2.export.schemes import storage_of
from vl2.export.trace import DTYPES, ROUNDING
from vl2.export.weights import Weight
from vl2.model.vl2 import DeepseekVL2
from vl2.plugins.substitution import substitute

_BLOCK_ROWS = 4096


class StreamedModel:
    """The reference of one checkpoint and scheme (of what is not packed); nothing is loaded until it runs.

    kv_cache: float16 or int8 where attention sees keys and values as such a cache holds them.
    """

    def __init__(self, checkpoint: Checkpoint, scheme: str, kv_cache: str | None = None):
        self._checkpoint, self._scheme, self._kv_cache = checkpoint, scheme, kv_cache
        with torch.device("meta"):
            self._model = DeepseekVL2(checkpoint.config).eval()
        if kv_cache is not None:
            substitute(self._model, ROUNDING)
        self._names = {id(parameter): name for name, parameter in self._model.named_parameters()}

    @torch.inference_mode()
    def encode_tiles(self, tiles: Tensor) -> Tensor:
        """As `DeepseekVL2.encode_tiles`."""
        values = {"tiles": tiles}
        for piece in pieces_of("vision", self._model):
            values = self._run(piece, values)
        return values["image_features"]

    @torch.inference_mode()
    def logits(self, inputs_embeds: Tensor, positions: int) -> Tensor:
        """Logits [positions, V] of the last positions of one unpadded prompt [1, T, H], without a cache."""
        *pieces, end = pieces_of("decoder", self._model, self._kv_cache)
        length = inputs_embeds.shape[1]
        values = {
            "inputs_embeds": inputs_embeds,
            "position_ids": torch.arange(length)[None],
            "attention_mask": torch.ones(1, length, dtype=torch.bool),
            "past_length": torch.tensor(0),
        }
        room = 0 if self._kv_cache is None else length
        for piece in pieces:
            known = {port.name for port in piece.inputs} & values.keys()
            past = [port for port in piece.inputs if port.name not in known]
            empty = {port.name: torch.zeros(1, room, *port.shape[2:], dtype=DTYPES[port.dtype]) for port in past}
            values |= self._run(piece, values | empty)
        x = values[end.inputs[0].name][0, -positions:]
        with self._loaded(end.module):
            return end.module.lm_head(end.module.norm(x))

    def embedding_rows(self, ids: Tensor) -> Tensor:
        """Rows of the token table, as stored, in float32."""
        name = "language.embed_tokens.weight"
        whole = Weight(name, self._checkpoint.shapes[name])
        rows = [self._checkpoint.read(whole.then(("narrow", (0, i, 1)), (1, whole.shape[1]))) for i in ids.tolist()]
        return self._stored(torch.cat(rows), name)

    def vector(self, name: str) -> Tensor:
        """A learnt vector of the top level, such as image_newline."""
        return self._stored(self._checkpoint.read(Weight(name, self._checkpoint.shapes[name])), name)

    def _run(self, piece: Piece, values: dict[str, Tensor]) -> dict[str, Tensor]:
        with self._loaded(piece.module):
            given = piece.module(*(values[port.name] for port in piece.inputs))
        given = given if isinstance(given, tuple) else (given,)
        return {port.name: tensor for port, tensor in zip(piece.outputs, given, strict=True)}

    @contextmanager
    def _loaded(self, module: nn.Module) -> Iterator[None]:
        parameters = dict(module.named_parameters())
        for local, parameter in parameters.items():
            _assign(module, local, nn.Parameter(self._read(self._names[id(parameter)]), requires_grad=False))
        try:
            yield
        finally:
            for local, parameter in parameters.items():
                _assign(module, local, parameter)

    def _read(self, name: str) -> Tensor:
        """A parameter in float32, filled block by block: beside it only one tensor of the file is in memory."""
        whole = Weight(name, self._checkpoint.shapes[name])
        filled = torch.empty(whole.shape)
        stacked = len(self._checkpoint.sources[name]) > 1
        parts = [whole.of_expert(e) for e in range(whole.shape[0])] if stacked else [whole]
        for target, part in zip(filled if stacked else [filled], parts, strict=True):
            for rows, block in zip(target.split(_BLOCK_ROWS), part.row_blocks(_BLOCK_ROWS), strict=True):
                rows.copy_(self._stored(self._checkpoint.read(block), name))
        return filled

    def _stored(self, tensor: Tensor, name: str) -> Tensor:
        if self._checkpoint.form(name) is not None:
            return tensor
        storage = storage_of(name, self._checkpoint.shapes[name], self._scheme)
        return tensor.to(storage.torch_dtype).to(torch.float32)


def _assign(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, parameter)
