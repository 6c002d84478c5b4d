"""Image sources, limits and pixels of `images.ImageLoader`."""

import base64
import http.server
import io
import threading
import urllib.parse
import zlib

import numpy as np
import pytest
from PIL import Image
from tiny_llava import picture

from ggml_qcache.images import ImageLoader

LOADER = ImageLoader()


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def server():
    """A server on this machine: /picture, /missing, /endless, /to-file, /to-picture."""
    data = encoded(picture())

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            if self.path in ("/to-file", "/to-picture"):
                self.send_response(302)
                self.send_header("Location", "file:///etc/hostname" if self.path == "/to-file" else "/picture")
                self.end_headers()
            elif self.path == "/picture":
                self.send_response(200)
                self.end_headers()
                self.wfile.write(data)
            elif self.path == "/endless":
                self.send_response(200)
                self.end_headers()
                try:
                    while True:
                        self.wfile.write(bytes(2**16))
                except OSError:
                    pass
            else:
                self.send_error(404, "no such picture")

        def log_message(self, *_args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_every_source_gives_the_same_image(tmp_path, server):
    image = picture()
    data = encoded(image)
    path = tmp_path / "a picture, 50%.png"
    path.write_bytes(data)
    sources = (
        image,
        data,
        bytearray(data),
        path,
        str(path),
        path.as_uri(),
        "file://localhost" + urllib.parse.quote(str(path)),
        "data:image/png;base64," + base64.b64encode(data).decode(),
        "data:," + urllib.parse.quote(data),
    )
    expected = np.asarray(image)
    loaded = [LOADER.load(source) for source in sources]
    loaded += [ImageLoader(allow_http=True).load(server + path) for path in ("/picture", "/to-picture")]
    assert len({one.digest for one in loaded}) == 1
    for one in loaded:
        np.testing.assert_array_equal(one.pixels, expected)
    assert LOADER.load(picture(1)).digest != loaded[0].digest


def test_photos_are_upright():
    image = picture(width=7, height=5)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    turned = LOADER.load(encoded(image, exif=exif)).pixels
    np.testing.assert_array_equal(turned, np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_white(mode):
    image = Image.new("RGBA", (4, 2), (0, 0, 0, 0))
    image.putpixel((1, 1), (0, 0, 0, 255))
    options = {"transparency": 0} if mode == "P" else {}
    if mode == "P":
        image = Image.new("P", (4, 2), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 1), 1)
    pixels = LOADER.load(encoded(image.convert(mode), **options)).pixels
    expected = np.full((2, 4, 3), 255, np.uint8)
    expected[1, 1] = 0
    np.testing.assert_array_equal(pixels, expected)


@pytest.mark.parametrize("mode", ["1", "L", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_other_modes_become_rgb(mode):
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.array([[0, 257 * 100, 65535]], dtype=np.uint16)).convert(mode)
        expected = [0, 100, 255]
    elif mode == "F":
        image, expected = Image.fromarray(np.array([[0.0, 100.0, 255.0]], dtype=np.float32)), [0, 100, 255]
    else:
        image = Image.new("L", (3, 1))
        image.putdata([0, 0, 255])
        image, expected = image.convert(mode), [0, 0, 255]
    pixels = LOADER.load(image).pixels
    assert pixels.shape == (1, 3, 3) and pixels.dtype == np.uint8
    np.testing.assert_allclose(pixels[0, :, 0], expected, atol=1)


def test_of_an_animation_the_first_frame():
    frames = [Image.new("RGB", (3, 3), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert LOADER.load(data).pixels[0, 0].tolist() == [255, 0, 0]


PNG = encoded(picture())
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def bomb() -> bytes:
    """A small file that says it has 60000 x 60000 pixels."""
    data = bytearray(encoded(Image.new("1", (8, 8))))
    data[16:24] = (60000).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


BAD_SOURCES = [
    ("/nowhere/photo.jpg", "'/nowhere/photo.jpg'.*no such file"),
    ("/tmp", "no such file"),
    ("", "no such file"),
    ("file://elsewhere/photo.jpg", "another host, 'elsewhere'"),
    ("file:///nowhere.png", "no such file"),
    (b"", "empty"),
    (b"not an image", "<12 bytes>.*not an image"),
    (PNG[: len(PNG) // 2], "truncated"),
    (PNG[:20], "image <20 bytes>"),
    (EPS, "not an image"),
    ("data:image/png;base64,####", "base64"),
    ("data:image/png;base64", "comma"),
    ("data:image/png;base64," + base64.b64encode(b"text" * 99).decode(), "not an image"),
    ("http://127.0.0.1:9/photo.png", "allow_http=True"),
    ("HTTPS://127.0.0.1:9/photo.png", "allow_http=True"),
    ("ftp://127.0.0.1/photo.png", "no such file"),
    (bomb(), "pixels"),
    (Image.new("RGB", (9000, 9000)), "9000 x 9000 pixels.*64000000"),
    (42, "<int>.*a path, a URL, bytes or a Pillow image"),
    ("x\0y.png", "null|no such file"),
]


@pytest.mark.parametrize("source, reason", BAD_SOURCES, ids=[reason for _, reason in BAD_SOURCES])
def test_bad_sources(source, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        LOADER.load(source)
    assert str(caught.value).startswith("image ") and len(str(caught.value)) < 500


def test_limits(tmp_path):
    path = tmp_path / "photo.png"
    path.write_bytes(PNG)
    small = ImageLoader(max_bytes=len(PNG) - 1)
    for source in (PNG, path, "data:image/png;base64," + base64.b64encode(PNG).decode()):
        assert ImageLoader(max_bytes=len(PNG)).load(source)
        with pytest.raises(ValueError, match=f"more than {len(PNG) - 1} bytes"):
            small.load(source)
    with pytest.raises(ValueError, match="80 x 60 pixels, more than max_image_pixels=4799"):
        ImageLoader(max_pixels=4799).load(PNG)


def test_http(server):
    loader = ImageLoader(allow_http=True, max_bytes=2**18)
    for path, reason in (
        ("/missing", "no such picture"),
        ("/endless", f"more than {2**18} bytes"),
        ("/to-file", "."),
    ):
        with pytest.raises(ValueError, match=reason):
            loader.load(server + path)
    with pytest.raises(ValueError, match="can't be fetched"):
        loader.load("http://127.0.0.1:9/photo.png")
