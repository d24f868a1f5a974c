"""The pixels that the model gets, put together again from a sample's tensors.

Idefics3, SmolVLM and Gemma 3 take tiles `[tiles, 3, height, width]`; the Qwen family takes images
of its own sizes, flat `[3 * height * width]` until the device cuts them (`collate.pixels`); Kimi
takes patches `[patches, 3, height, width]`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from raytune_vlm.inspection.text import TIMES
from raytune_vlm.inspection.tokens import Piece

if TYPE_CHECKING:
    from raytune_vlm.collate.encoded import Encoded

MAX_TILES = 64
GAP = 4
GROUND = 226
_CELL = re.compile(r"row_(\d+)_col_(\d+)")


@dataclass(frozen=True)
class Given:
    """One image as the model gets it."""

    size: str
    """Height, then width: `252 x 336`; or `5 tiles of 364 x 364`."""
    num_tokens: int | None
    """Image tokens that stand for it; None where that cannot be told image by image."""
    pixels: np.ndarray | None
    """uint8 `[height, width, 3]`: the image, or its tiles laid out."""


def given_images(
    encoded: Encoded, processor: Any, pieces: list[Piece], num_images: int
) -> list[Given]:
    """Each image of a sample as the model gets it; empty where the tensors cannot tell."""
    pixels = encoded.tensors.get("pixel_values")
    if pixels is None or num_images == 0:
        return []
    grids = encoded.tensors.get("image_grid_thw")
    if grids is not None and pixels.ndim == 4:
        return _from_patches(pixels, grids, processor.image_processor)
    if grids is not None:
        return _from_grids(pixels, grids, processor.image_processor)
    if pixels.ndim == 4 and pixels.shape[1] == 3:
        mask = encoded.tensors.get("pixel_attention_mask")
        return _from_tiles(pixels, mask, pieces, num_images)
    return []


def _from_grids(pixels: np.ndarray, grids: np.ndarray, settings: Any) -> list[Given]:
    patch, merge = int(settings.patch_size), int(settings.merge_size)
    given, start = [], 0
    for frames, down, across in grids.tolist():
        count = frames * down * across
        size = count * patch * patch * 3
        image = pixels[start : start + size].reshape(3, -1, across * patch)
        start += size
        shown = f"{down * patch} {TIMES} {across * patch}"
        given.append(Given(shown, count // merge**2, np.moveaxis(image, 0, -1)))
    return given


def _from_patches(pixels: np.ndarray, grids: np.ndarray, settings: Any) -> list[Given]:
    """Kimi's patches `[patches, 3, height, width]`, row by row."""
    given, start = [], 0
    for _, down, across in grids.tolist():
        count, side = down * across, pixels.shape[-1]
        patches = pixels[start : start + count].reshape(down, across, 3, side, side)
        start += count
        image = patches.transpose(0, 3, 1, 4, 2).reshape(down * side, across * side, 3)
        shown = f"{down * side} {TIMES} {across * side}"
        given.append(Given(shown, count // int(settings.merge_size) ** 2, image))
    return given


def _from_tiles(
    pixels: np.ndarray, mask: np.ndarray | None, pieces: list[Piece], num_images: int
) -> list[Given]:
    shares, runs = _tiles_by_image(len(pixels), pieces, num_images), _image_runs(pieces)
    if shares is None:
        return []
    per_tile = [run.num_tokens for _, run in runs] if len(runs) == len(pixels) else None
    given, start = [], 0
    for share in shares:
        tiles = [
            _unpadded(pixels[place], None if mask is None else mask[place])
            for place in range(start, start + share)
        ]
        heights = {tile.shape[:2] for tile in tiles}
        sizes = " and ".join(f"{height} {TIMES} {width}" for height, width in sorted(heights))
        size = sizes if share == 1 else f"{share} tiles of {sizes}"
        count = None if per_tile is None else sum(per_tile[start : start + share])
        cells = _cells(pieces, runs, start, share) if per_tile is not None else None
        given.append(Given(size, count, _laid_out(tiles[:MAX_TILES], cells)))
        start += share
    return given


def _unpadded(tile: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """The tile as `[height, width, 3]`, without the area that its mask hides."""
    image = np.moveaxis(tile, 0, -1)
    if mask is None or not mask.any():
        return image
    return image[: int(mask.any(1).sum()), : int(mask.any(0).sum())]


def _image_runs(pieces: list[Piece]) -> list[tuple[int, Piece]]:
    """Place and piece of each run of image tokens: one run a tile."""
    return [(place, piece) for place, piece in enumerate(pieces) if piece.kind == "image"]


def _tiles_by_image(num_tiles: int, pieces: list[Piece], num_images: int) -> list[int] | None:
    """How many tiles each image has; None where that cannot be told.

    Idefics3 and SmolVLM end the tiles of an image with one of the whole, behind `<global-img>`.
    """
    if num_images == 1 or num_tiles == num_images:
        return [num_tiles // num_images] * num_images
    shares, count = [], 0
    for place, _ in _image_runs(pieces):
        count += 1
        if place and "global-img" in pieces[place - 1].text:
            shares.append(count)
            count = 0
    return shares if len(shares) == num_images and sum(shares) == num_tiles else None


def _cells(
    pieces: list[Piece], runs: list[tuple[int, Piece]], start: int, share: int
) -> list[tuple[int, int]] | None:
    """Row and column of each tile but the last (the whole image), where the tokens name them."""
    cells = []
    for place, _ in runs[start : start + share - 1]:
        named = _CELL.findall(pieces[place - 1].text) if place else []
        if not named:
            return None
        row, column = named[-1]
        cells.append((int(row) - 1, int(column) - 1))
    return cells


def _laid_out(tiles: list[np.ndarray], cells: list[tuple[int, int]] | None) -> np.ndarray:
    """The tiles in their rows and columns, the whole image to their right; else in a row."""
    if len(tiles) == 1:
        return tiles[0]
    if cells is None or len(cells) != len(tiles) - 1:
        cells = [(0, column) for column in range(len(tiles) - 1)]
    height = max(tile.shape[0] for tile in tiles) + GAP
    width = max(tile.shape[1] for tile in tiles) + GAP
    num_rows, num_columns = (max(axis) + 1 for axis in zip(*cells, strict=True))
    places = [(row * height, column * width) for row, column in cells]
    places.append((0, num_columns * width + 3 * GAP))
    shape = (num_rows * height - GAP, (num_columns + 1) * width + 2 * GAP, 3)
    canvas = np.full(shape, GROUND, dtype=np.uint8)
    for (top, left), tile in zip(places, tiles, strict=True):
        canvas[top : top + tile.shape[0], left : left + tile.shape[1]] = tile
    return canvas
