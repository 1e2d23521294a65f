"""Maps keep their place when they are brought from the cells of a network to pixels or to even cells, and back."""

import pytest
import torch
from torch.nn import functional

from stages.ops.cells import PIXELS, CellAxis, CellGrid, cells_to_pixels, pixels_to_cells, resample_maps


def _maps(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0))


def _grid(first_px: float, stride_px: float) -> CellGrid:
    return CellGrid(CellAxis(first_px, stride_px), CellAxis(first_px, stride_px))


def _ramps(size, first_px, stride_px):
    """A map of two classes whose values are the pixels that the cells look at: rows, and columns."""
    rows, columns = (torch.arange(count) * stride_px + first_px for count in size)
    return torch.stack(torch.meshgrid(rows, columns, indexing="ij")).float()


@pytest.mark.parametrize("size", [(5, 7), (12, 9), (3, 4), (11, 2)])
def test_even_cells_that_fill_the_input_are_resized_as_by_interpolate(size):
    maps = _maps(2, 5, 7)
    expected = functional.interpolate(maps[None], size=size, mode="bilinear", align_corners=False)[0]
    even = CellGrid.even((5, 7), (80, 112))
    torch.testing.assert_close(resample_maps(maps, size=size, image_size=(80, 112), cells=even), expected)
    torch.testing.assert_close(cells_to_pixels(maps, (80, 112), even)[:, 8:72:16, 8:104:16].shape, (2, 4, 6))


@pytest.mark.parametrize("first_px", [0.0, 3.5, 7.0])
def test_pixels_by_hand(first_px):
    """Cell 1 of a map at stride 8 stands at pixel first + 8; half-way to cell 2 the two count alike."""
    maps = torch.tensor([[[0.0, 1.0, 0.0]]])
    row = cells_to_pixels(maps, (1, 24), _grid(first_px, 8.0))[0, 0]
    places = torch.arange(24.0)
    torch.testing.assert_close(row, (1 - (places - first_px - 8).abs() / 8).clamp(min=0))


@pytest.mark.parametrize("first_px", [0.0, 7.5, 15.0])
@pytest.mark.parametrize("is_flipped", [False, True])
def test_values_lie_where_the_cells_look_in_a_padded_and_mirrored_input(first_px, is_flipped):
    image_size, size = (70, 90), (18, 23)  # the input is 96 × 96
    maps = _ramps((6, 6), first_px, 16.0)
    found = resample_maps(maps, size=size, image_size=image_size, cells=_grid(first_px, 16.0), is_flipped=is_flipped)
    rows, columns = ((torch.arange(count) + 0.5) * px / count - 0.5 for count, px in zip(size, image_size, strict=True))
    seen = image_size[1] - 1 - columns if is_flipped else columns
    ends = first_px, first_px + 5 * 16
    torch.testing.assert_close(found[0], rows.clamp(*ends)[:, None].expand(size))
    torch.testing.assert_close(found[1], seen.clamp(*ends)[None].expand(size))


def test_means_over_cells_by_hand():
    pixels = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]])
    one_row = CellAxis(0.0, 1.0)
    middle = pixels_to_cells(pixels, (1, 2), CellGrid(one_row, CellAxis(1.5, 4.0)))
    torch.testing.assert_close(middle, torch.tensor([[2.5, 6.5]]))
    corner = pixels_to_cells(pixels, (1, 2), CellGrid(one_row, CellAxis(0.0, 4.0)))
    torch.testing.assert_close(corner, torch.tensor([[(1 + 2 + 3 / 2) / 4, (3 / 2 + 4 + 5 + 6 + 7 / 2) / 4]]))


def test_means_over_even_cells_are_areas_means():
    pixels = _maps(2, 24, 40)
    expected = functional.adaptive_avg_pool2d(pixels, (3, 5))
    torch.testing.assert_close(pixels_to_cells(pixels, (3, 5), CellGrid.even((3, 5), (24, 40))), expected)


def test_pixels_are_their_own_cells():
    pixels = _maps(2, 5, 7)
    assert torch.equal(cells_to_pixels(pixels, (5, 7), PIXELS), pixels)
    assert torch.equal(pixels_to_cells(pixels, (5, 7), PIXELS), pixels)


def test_maps_stay_in_float32_under_autocast_and_carry_a_gradient():
    maps = _maps(1, 3, 3).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cells_to_pixels(maps, (12, 12), _grid(0.0, 4.0))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, cells_to_pixels(maps, (12, 12), _grid(0.0, 4.0)), rtol=0, atol=0)
    found.sum().backward()
    assert maps.grad is not None
    assert maps.grad.sum() == pytest.approx(144)
