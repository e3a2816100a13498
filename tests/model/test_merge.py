from __future__ import annotations

import pytest
import torch

from tests.conftest import GOLDENS
from tests.model.recorded import load_mini
from vl2.errors import VL2Error
from vl2.model.merge import ImageEnds, assemble_image, place_images

NEWLINE, SEPARATOR = torch.tensor([-1.0]), torch.tensor([-2.0])


def numbered(tiles: int, side: int) -> torch.Tensor:
    """Features [tiles, side², 1] whose value says tile, row and column: 123 is tile 1, row 2, column 3."""
    tile, row, column = (torch.arange(n) for n in (tiles, side, side))
    return (100 * tile[:, None, None] + 10 * row[:, None] + column).reshape(tiles, side**2, 1).float()


def test_rows_of_neighbouring_tiles_join_and_end_with_the_newline_vector() -> None:
    vectors = assemble_image(numbered(1 + 2 * 2, 2), (2, 2), ImageEnds(NEWLINE, SEPARATOR, "head"))
    assert vectors[:, 0].tolist() == [
        0, 1, -1, 10, 11, -1, -2,
        100, 101, 200, 201, -1, 110, 111, 210, 211, -1,
        300, 301, 400, 401, -1, 310, 311, 410, 411, -1,
    ]  # fmt: skip


def test_crop_is_width_first() -> None:
    ends = ImageEnds(NEWLINE, SEPARATOR, "head")
    wide, tall = (assemble_image(numbered(4, 1), crop, ends)[:, 0].tolist() for crop in ((3, 1), (1, 3)))
    assert wide == [0, -1, -2, 100, 200, 300, -1]
    assert tall == [0, -1, -2, 100, -1, 200, -1, 300, -1]


def test_another_global_view_position_puts_the_local_view_first() -> None:
    vectors = assemble_image(numbered(2, 1), (1, 1), ImageEnds(NEWLINE, SEPARATOR, "tail"))
    assert vectors[:, 0].tolist() == [100, -1, -2, 0, -1]


@pytest.mark.parametrize("crop", ((1, 1), (2, 1), (1, 2), (3, 2), (2, 3), (3, 3), (9, 1), (1, 9)))
def test_the_number_of_vectors_follows_the_formula_of_the_specification(crop: tuple[int, int]) -> None:
    width, height = crop
    vectors = assemble_image(torch.zeros(1 + width * height, 196, 1), crop, ImageEnds(NEWLINE, SEPARATOR, "head"))
    assert len(vectors) == 211 + 14 * height * (14 * width + 1)


def test_images_overwrite_the_masked_positions_in_order_and_nothing_else() -> None:
    embeds, mask = torch.zeros(2, 4, 1), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    images = [torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[4.0]])]
    assert place_images(embeds, mask, images)[..., 0].tolist() == [[0, 1, 2, 0], [3, 0, 0, 4]]


@pytest.mark.parametrize("vectors", (0, 1, 3))
def test_a_count_of_vectors_that_differs_from_the_positions_is_refused(vectors: int) -> None:
    embeds, mask = torch.zeros(1, 4, 1), torch.tensor([[0, 1, 1, 0]]).bool()
    images = [torch.ones(vectors, 1)] if vectors else []
    with pytest.raises(VL2Error, match=f"2 image positions, the images give {vectors} vectors"):
        place_images(embeds, mask, images)


def test_crops_that_do_not_account_for_every_tile_are_refused() -> None:
    model = load_mini(GOLDENS / "tiny-mini").model
    with pytest.raises(VL2Error, match=r"5 tiles were given, the crops \[\[2, 1\]\] account for 3"):
        model.assemble_images(torch.zeros(5, 196, 96), torch.tensor([[2, 1]]))


def test_a_prompt_with_image_positions_and_no_tiles_is_refused() -> None:
    model = load_mini(GOLDENS / "tiny-mini").model
    ids = torch.zeros(1, 3, dtype=torch.long)
    with pytest.raises(VL2Error, match="1 image positions, the images give 0 vectors"):
        model.embed(ids, torch.tensor([[False, True, False]]), torch.zeros(0, 3, 384, 384), torch.zeros(0, 2).long())


def test_ids_at_image_positions_have_no_effect() -> None:
    model = load_mini(GOLDENS / "tiny-mini").model
    ids = torch.randint(600, (1, 430))
    mask = torch.zeros(1, 430, dtype=torch.bool)
    mask[:, 3:424] = True
    tiles, crops = torch.randn(2, 3, 384, 384), torch.tensor([[1, 1]])
    with torch.inference_mode():
        first = model.embed(ids, mask, tiles, crops)
        second = model.embed(torch.where(mask, 5, ids), mask, tiles, crops)
    assert torch.equal(first, second)


def test_gradients_reach_tower_projector_and_image_vectors() -> None:
    model = type(load_mini(GOLDENS / "tiny-mini").model)(load_mini(GOLDENS / "tiny-mini").model.config)
    mask = torch.ones(1, 421, dtype=torch.bool)
    embeds = model.embed(torch.zeros(1, 421).long(), mask, torch.randn(2, 3, 384, 384), torch.tensor([[1, 1]]))
    embeds.square().mean().backward()
    parameters = {n: p for n, p in model.named_parameters() if not n.startswith("language.")}
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in parameters.values())
