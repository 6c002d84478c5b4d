"""Reads images from where users have them, within limits, into upright RGB pixels.

What is done to the pixels, because a user expects to see what the model sees:
 - EXIF orientation is applied: phone photos come upright.
 - Transparency is composited on white: dark drawings on a transparent ground stay readable.
 - 16-bit and float greys are scaled to 8 bits; of animations and multi-page files the first frame counts.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import os
import urllib.error
import urllib.parse
import urllib.request
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Union

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

ImageSource = Union[str, bytes, "os.PathLike[str]", Image.Image]

MAX_BYTES = 64 * 2**20
MAX_PIXELS = 64 * 10**6
HTTP_TIMEOUT = 20.0  # seconds

# what photos and screenshots come in; Pillow's readers that start other programs (EPS) are left out
_FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

# http and https alone: no redirect leads to files or ftp
_HTTP_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)


@dataclass(frozen=True)
class LoadedImage:
    """An image ready for the vision encoder.

    Attributes:
        source: Where it came from, shortened for error texts.
        pixels: ``[height, width, 3]`` u8, RGB, contiguous.
        digest: SHA-256 of size and pixels: two images with the same digest are the same to the model.
    """

    source: str
    pixels: npt.NDArray[np.uint8]
    digest: str


@dataclass(frozen=True)
class ImageLoader:
    """Loads images within limits.

    Attributes:
        allow_http: Whether ``http://`` and ``https://`` sources are fetched. Off by default: a message from elsewhere
            must not make this process call arbitrary hosts.
        max_bytes: Most bytes of an encoded image.
        max_pixels: Most pixels, checked before decoding.
    """

    allow_http: bool = False
    max_bytes: int = MAX_BYTES
    max_pixels: int = MAX_PIXELS

    def load(self, source: ImageSource) -> LoadedImage:
        """Loads one image.

        Args:
            source: A path, a ``file://``, ``data:`` or ``http(s)://`` URL, encoded bytes, or a Pillow image.

        Raises:
            ValueError: Missing, undecodable, over a limit, or http without ``allow_http``; names source and reason.
        """
        name = _describe(source)
        try:
            if isinstance(source, Image.Image):
                pixels = self._pixels(source)
            else:
                with _open(self._bytes(source)) as image:
                    pixels = self._pixels(image)
        except Exception as error:  # Pillow raises nearly anything on damaged files
            reason = str(error) or type(error).__name__
            raise ValueError(f"image {name}: {reason}") from error
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(pixels)
        return LoadedImage(name, pixels, digest.hexdigest())

    def _bytes(self, source: str | bytes | os.PathLike[str]) -> bytes:
        """Gets the encoded image, never more than ``max_bytes`` of it."""
        if isinstance(source, (bytes, bytearray, memoryview)):
            return self._within(bytes(source))
        if not isinstance(source, (str, os.PathLike)):
            raise TypeError("an image is a path, a URL, bytes or a Pillow image")
        text = os.fspath(source)
        # anything else, a Windows drive for one, is a path
        scheme = text.split(":", 1)[0].lower() if ":" in text else ""
        if scheme == "data":
            return self._within(_data_url(text, self.max_bytes))
        if scheme in ("http", "https"):
            if not self.allow_http:
                raise ValueError("fetching http(s) URLs is off; allow it with allow_http=True")
            return self._within(_fetch(text, self.max_bytes))
        path = Path(_file_url(text) if scheme == "file" else text)
        if not path.is_file():
            raise ValueError("no such file")
        with path.open("rb") as file:
            return self._within(file.read(self.max_bytes + 1))

    def _within(self, data: bytes) -> bytes:
        if len(data) > self.max_bytes:
            raise ValueError(f"more than {self.max_bytes} bytes")
        if not data:
            raise ValueError("empty")
        return data

    def _pixels(self, image: Image.Image) -> npt.NDArray[np.uint8]:
        """Checks the size, decodes, and brings to upright RGB on white."""
        width, height = image.size
        if width * height > self.max_pixels:
            raise ValueError(f"{width} x {height} pixels, more than max_image_pixels={self.max_pixels}")
        if width * height == 0:
            raise ValueError(f"{width} x {height} pixels")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            image = Image.fromarray(_to_8_bits(np.asarray(image)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        return np.ascontiguousarray(image.convert("RGB"), dtype=np.uint8)


def _describe(source: object) -> str:
    """Names a source in at most a line."""
    if isinstance(source, Image.Image):
        return f"<PIL image {source.width} x {source.height} {source.mode}>"
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"<{len(source)} bytes>"
    if isinstance(source, (str, os.PathLike)):
        text = os.fspath(source)
        return repr(text) if len(text) <= 200 else f"{text[:60]!r}... ({len(text)} characters)"
    return f"<{type(source).__name__}>"


def _open(data: bytes) -> Image.Image:
    """Reads the header. The pixel limit is ours, so Pillow's warning for large images is not wanted."""
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(io.BytesIO(data), formats=[name for name in _FORMATS if name in Image.OPEN])
        except Image.UnidentifiedImageError:
            raise ValueError(f"not an image in a known format ({len(data)} bytes)") from None


def _to_8_bits(grey: npt.NDArray[np.generic]) -> npt.NDArray[np.uint8]:
    """Scales 16-bit greys by their range, floats in 0 .. 1 by 255."""
    if grey.dtype.kind == "f":
        grey = np.nan_to_num(grey) * (255.0 if grey.max(initial=0) <= 1.0 else 1.0)
    elif grey.max(initial=0) > 255:
        grey = grey / 257.0
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)


def _data_url(url: str, max_bytes: int) -> bytes:
    """Decodes a ``data:`` URL, base64 or percent-encoded."""
    head, comma, body = url.partition(",")
    if not comma:
        raise ValueError("a data: URL without a comma")
    if len(body) > 3 * max_bytes:
        raise ValueError(f"more than {max_bytes} bytes")
    body_bytes = urllib.parse.unquote_to_bytes(body)
    if not head.lower().endswith(";base64"):
        return body_bytes
    try:
        return base64.b64decode(b"".join(body_bytes.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"invalid base64: {error}") from None


def _file_url(url: str) -> str:
    """Gives the path of a ``file://`` URL."""
    parts = urllib.parse.urlsplit(url)
    if parts.netloc not in ("", "localhost"):
        raise ValueError(f"a file:// URL names another host, {parts.netloc!r}")
    return urllib.request.url2pathname(parts.path)


def _fetch(url: str, max_bytes: int) -> bytes:
    """Fetches a URL; stops one byte over the limit."""
    opener = urllib.request.OpenerDirector()
    for handler in _HTTP_HANDLERS:
        opener.add_handler(handler())
    request = urllib.request.Request(url, headers={"User-Agent": "ggml-qcache"})
    try:
        with opener.open(request, timeout=HTTP_TIMEOUT) as response:
            return response.read(max_bytes + 1)
    except urllib.error.URLError as error:
        raise ValueError(f"can't be fetched: {error.reason}") from None
