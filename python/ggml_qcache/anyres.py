"""Images of any resolution as LLaVA-NeXT and LLaVA-OneVision see them: tiles and an overview, put together row by row.

An image is scaled to fit the best of the model's *pinpoints*, padded with black and cut into tiles of the tower's size; the
whole image, squeezed into one tile, goes before them. After the projector the tiles' tokens are laid out as one grid, those
of the padding are dropped, and each row ends with the embedding `image_newline`. Everything follows Hugging Face's processors
and models, which follow the original training code, down to their rounding; libmtmd's own tiling differs in all of this.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

Pixels = npt.NDArray[np.uint8]
Embeddings = npt.NDArray[np.float32]

# a grid is only resampled when it is this much too wide, as OneVision was trained
_SLACK = 1.1


@dataclass(frozen=True)
class Anyres:
    """Layout of the visual tokens of an image.

    Attributes:
        tile_size: Height and width of a tile, pixels.
        n_side: Tokens on a side of a tile.
        pinpoints: Sizes an image may be scaled to, height and width in pixels, multiples of ``tile_size``.
        newline: Embedding at the end of each row, ``[n_embd]`` f32.
        max_tiles: OneVision: a grid with more tokens than this many tiles is resampled to about as many; 0: never.
        pad_color: OneVision: colour around an image that isn't square, where a prompt has several images and each is a
            single tile. None: every image is tiled.
    """

    tile_size: int
    n_side: int
    pinpoints: tuple[tuple[int, int], ...]
    newline: Embeddings
    max_tiles: int = 0
    pad_color: tuple[int, int, int] | None = None

    def tiled(self, n_images: int) -> bool:
        """Whether the images of a prompt with so many are cut into tiles."""
        return self.pad_color is None or n_images == 1

    def tiles(self, pixels: Pixels, tiled: bool) -> list[Pixels]:
        """Cuts an image into what the vision tower encodes.

        Args:
            pixels: ``[height, width, 3]``.
            tiled: See ``tiled``.

        Returns:
            ``[tile_size, tile_size, 3]`` each: the overview, then the tiles row by row; one alone if not ``tiled``.
        """
        height, width = pixels.shape[:2]
        size = self.tile_size
        if not tiled:
            side = max(height, width)
            square = np.full((side, side, 3), self.pad_color, dtype=np.uint8)
            top, left = (side - height) // 2, (side - width) // 2
            square[top : top + height, left : left + width] = pixels
            return [_resized(square, size, size)]
        full_height, full_width = self._resolution(height, width)
        fits_width, fits_height = full_width / width, full_height / height
        if fits_width < fits_height:
            inner_height, inner_width = min(math.ceil(height * fits_width), full_height), full_width
        else:
            inner_height, inner_width = full_height, min(math.ceil(width * fits_height), full_width)
        padded = np.zeros((full_height, full_width, 3), dtype=np.uint8)
        top, left = (full_height - inner_height) // 2, (full_width - inner_width) // 2
        padded[top : top + inner_height, left : left + inner_width] = _resized(pixels, inner_height, inner_width)
        cut = padded.reshape(full_height // size, size, full_width // size, size, 3).swapaxes(1, 2)
        return [_resized(pixels, size, size), *cut.reshape(-1, size, size, 3)]

    def n_tokens(self, height: int, width: int, tiled: bool) -> int:
        """Counts the visual tokens of an image of so many pixels."""
        if not tiled:
            return self.n_side**2 + 1
        rows, columns = self._resampled(*self._kept(height, width)[2:])
        return self.n_side**2 + rows * (columns + 1)

    def arrange(self, tiles: Embeddings, height: int, width: int, tiled: bool) -> Embeddings:
        """Puts the embeddings of an image's tiles in the order the model reads them.

        Args:
            tiles: ``[n_tiles, n_side * n_side, n_embd]`` of what ``tiles`` gave.
            height: Of the image, pixels.
            width: Likewise.
            tiled: See ``tiled``.

        Returns:
            ``[n_tokens, n_embd]``.
        """
        n_embd = tiles.shape[-1]
        if not tiled:
            return np.concatenate([tiles[0], self.newline[None]])
        n_rows, n_columns = (side // self.tile_size for side in self._resolution(height, width))
        grid = tiles[1:].reshape(n_rows, n_columns, self.n_side, self.n_side, n_embd).swapaxes(1, 2)
        grid = grid.reshape(n_rows * self.n_side, n_columns * self.n_side, n_embd)
        top, left, rows, columns = self._kept(height, width)
        grid = _bilinear(grid[top : top + rows, left : left + columns], *self._resampled(rows, columns))
        newlines = np.broadcast_to(self.newline, (len(grid), 1, n_embd))
        return np.concatenate([tiles[0], np.concatenate([grid, newlines], axis=1).reshape(-1, n_embd)])

    def _resolution(self, height: int, width: int) -> tuple[int, int]:
        """The pinpoint that keeps most of an image's pixels, of equal ones that with the least padding."""

        def merit(pinpoint: tuple[int, int]) -> tuple[int, int]:
            scale = min(pinpoint[1] / width, pinpoint[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - pinpoint[0] * pinpoint[1]

        return max(self.pinpoints, key=merit)  # the first of equals

    def _kept(self, height: int, width: int) -> tuple[int, int, int, int]:
        """The part of the grid that isn't padding: top, left, rows, columns."""
        rows, columns = (side // self.tile_size * self.n_side for side in self._resolution(height, width))
        if width / height > columns / rows:
            top = (rows - int(round(height * (columns / width), 7))) // 2
            return top, 0, rows - 2 * top, columns
        left = (columns - int(round(width * (rows / height), 7))) // 2
        return 0, left, rows, columns - 2 * left

    def _resampled(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns after the limit on tokens."""
        if self.max_tiles == 0:
            return rows, columns
        ratio = math.sqrt(rows * columns / (self.max_tiles * self.n_side**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > _SLACK else (rows, columns)


def _resized(pixels: Pixels, height: int, width: int) -> Pixels:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))


def _bilinear(grid: Embeddings, rows: int, columns: int) -> Embeddings:
    """Resamples the first two dimensions linearly, pixel centres aligned, without smoothing."""
    for axis, n_new in ((0, rows), (1, columns)):
        n_old = grid.shape[axis]
        if n_new == n_old:
            continue
        at = np.maximum((np.arange(n_new) + 0.5) * (n_old / n_new) - 0.5, 0)
        low = at.astype(np.int64)
        weight = np.expand_dims((at - low).astype(np.float32), tuple({0, 1, 2} - {axis}))
        high = np.minimum(low + 1, n_old - 1)
        grid = grid.take(low, axis) * (1 - weight) + grid.take(high, axis) * weight
    return grid
