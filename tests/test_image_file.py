"""Image files of every mode: the right values, and what is refused."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from imcl_fast.data import DataError, image_file

CLEAR = 0, 0, 0  # a colour that hides where nothing is seen


def rgb(image: Image.Image, tmp_path, **options) -> np.ndarray:
    """What is read of a file that holds ``image``: uint8 (H, W, 3)."""
    name = f"image.{options.pop('suffix', 'png')}"
    image.save(tmp_path / name, **options)
    return pixels(tmp_path / name)


def pixels(path) -> np.ndarray:
    image = image_file.read(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def converted(image: Image.Image) -> list[int]:
    """The colour of the first pixel, without a file, for modes that Pillow writes into none."""
    return np.asarray(image_file._rgb(image))[0, 0].tolist()


def palette(mode: str) -> Image.Image:
    """Colour 1 is (10, 20, 30), and the other is black."""
    image = Image.new("P", (2, 2), 1)
    image.putpalette([*CLEAR, 10, 20, 30])
    return image.convert(mode)


@pytest.mark.parametrize(
    ("image", "colour"),
    [
        (Image.new("1", (2, 2), 1), [255, 255, 255]),
        (Image.new("L", (2, 2), 100), [100, 100, 100]),
        (Image.new("LA", (2, 2), (100, 255)), [100, 100, 100]),
        (Image.new("LA", (2, 2), (0, 0)), [255, 255, 255]),
        (Image.new("LA", (2, 2), (100, 51)), [224, 224, 224]),  # 0.2 * 100 + 0.8 * 255
        (Image.new("LA", (2, 2), (100, 51)).convert("La"), [224, 224, 224]),
        (palette("P"), [10, 20, 30]),
        (palette("PA"), [10, 20, 30]),
        (Image.new("RGB", (2, 2), (1, 2, 3)), [1, 2, 3]),
        (Image.new("RGBX", (2, 2), (1, 2, 3, 0)), [1, 2, 3]),
        (Image.new("RGBA", (2, 2), (1, 2, 3, 255)), [1, 2, 3]),
        (Image.new("RGBA", (2, 2), (1, 2, 3, 0)), [255, 255, 255]),
        (Image.new("RGBA", (2, 2), (0, 100, 200, 51)), [204, 224, 244]),
        (Image.new("RGBA", (2, 2), (0, 100, 200, 51)).convert("RGBa"), [204, 224, 244]),
        (Image.new("CMYK", (2, 2), (255, 0, 55, 0)), [0, 255, 200]),
        (Image.new("YCbCr", (2, 2), (76, 85, 255)), [254, 0, 0]),
        (Image.new("HSV", (2, 2), (85, 255, 200)), [0, 200, 0]),
        (Image.new("I;16", (2, 2), 25700), [100, 100, 100]),
        (Image.new("I;16L", (2, 2), 25700), [100, 100, 100]),
        (Image.new("I;16B", (2, 2), 25700), [100, 100, 100]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_every_mode_becomes_the_colour_that_is_seen(image, colour):
    assert converted(image) == colour


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_keep_all_levels_that_eight_can_show(tmp_path, suffix):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    got = rgb(Image.fromarray(ramp), tmp_path, suffix=suffix)
    assert np.array_equal(got, np.repeat(np.rint(ramp / 257)[..., None], 3, 2))
    assert len(np.unique(got)) == 256 and got.mean() == 127.5


def test_the_other_byte_order(tmp_path):
    numbers = np.arange(0, 65536, 257, dtype=">u2")
    got = rgb(Image.frombytes("I;16B", (16, 16), numbers.tobytes()), tmp_path, suffix="tif")
    assert got[..., 0].flatten().tolist() == list(range(256))


def test_ten_bits(tmp_path):
    numbers = np.array([[0, 341], [682, 1023]], ">u2")
    (tmp_path / "a.pgm").write_bytes(b"P5 2 2 1023\n" + numbers.tobytes())
    assert pixels(tmp_path / "a.pgm")[..., 0].tolist() == [[0, 85], [170, 255]]


def test_twelve_bits(tmp_path):
    """In a TIFF, of 4 grey pixels in a row: 0, 1365, 2730 and 4095 of 4095."""
    data = bytes.fromhex("000555aaafff")
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1),
            (278, 1), (279, len(data))]  # fmt: skip
    entries = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    (tmp_path / "a.tif").write_bytes(
        struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data
        + struct.pack("<H", len(tags)) + entries + bytes(4)
    )  # fmt: skip


    assert pixels(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 85, 170, 255]


def test_sixteen_bits_whose_zero_is_white(tmp_path):
    image = Image.fromarray(np.array([[0, 25700, 65535]], np.uint16))
    got = rgb(image, tmp_path, suffix="tif", tiffinfo={262: 0})
    assert got[0, :, 0].tolist() == [255, 155, 0]


@pytest.mark.parametrize(
    ("image", "key", "expected"),
    [
        (Image.fromarray(np.array([[7, 9]], np.uint8)), 7, [[255] * 3, [9] * 3]),
        (Image.fromarray(np.array([[257, 9 * 257]], np.uint16)), 257, [[255] * 3, [9] * 3]),
        (Image.fromarray(np.array([[[1, 2, 3], [4, 5, 6]]], np.uint8)), (1, 2, 3),
         [[255] * 3, [4, 5, 6]]),
    ],
    ids=["L", "I;16", "RGB"],
)  # fmt: skip
def test_the_colour_that_stands_for_transparent_shows_white(tmp_path, image, key, expected):
    assert rgb(image, tmp_path, transparency=key)[0].tolist() == expected


@pytest.mark.parametrize("suffix", ["png", "gif", "webp", "tif"])
def test_transparent_parts_show_white_in_files(tmp_path, suffix):
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.paste((0, 255, 0, 255), (0, 0, 4, 2))
    options = {"lossless": True} if suffix == "webp" else {}
    got = rgb(image, tmp_path, suffix=suffix, **options)
    assert got[0, 0].tolist() == [0, 255, 0] and got[3, 3].tolist() == [255, 255, 255]


def test_lab_is_read(tmp_path):
    got = rgb(Image.new("LAB", (2, 2), (255, 128, 128)), tmp_path, suffix="tif")
    assert got.min() >= 254  # white, but for rounding


@pytest.mark.parametrize("orientation", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_photos_stand_upright(tmp_path, orientation, suffix):
    """EXIF's number says where the stored image's first row and column belong."""
    upright = np.zeros((16, 32), np.uint8)
    upright[:8, :16] = 255  # white where a person sees the top left
    stored = {
        2: np.fliplr(upright), 3: np.rot90(upright, 2), 4: np.flipud(upright),
        5: upright.T, 6: np.rot90(upright), 7: np.rot90(upright, 2).T, 8: np.rot90(upright, -1),
    }.get(orientation, upright)  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored)).convert("RGB")
    got = rgb(image, tmp_path, suffix=suffix, exif=exif)
    assert got.shape == (16, 32, 3)
    assert np.abs(got[..., 1].astype(int) - upright).max() < 16


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
def test_damaged_exif_is_passed_over(tmp_path):
    image = Image.new("RGB", (4, 2), (1, 2, 3))
    got = rgb(image, tmp_path, exif=b"Exif\0\0II*\0\xff\xff\xff\xff damaged")
    assert got.shape == (2, 4, 3)


@pytest.mark.parametrize("suffix", ["gif", "png", "tif", "webp"])
def test_of_several_frames_the_first_is_taken(tmp_path, suffix):
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("lime", "red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    got = rgb(
        frames[0], tmp_path, suffix=suffix, save_all=True, append_images=frames[1:], **options
    )
    assert (got == [0, 255, 0]).all()


@pytest.mark.parametrize(
    ("mode", "suffix", "kind"),
    [("I", "tif", "32-bit integers"), ("F", "tif", "floats"), ("F", "pfm", "floats")],
)
def test_numbers_without_a_white_are_refused(tmp_path, mode, suffix, kind):
    with pytest.raises(DataError) as raised:
        rgb(Image.new(mode, (2, 2), 1), tmp_path, suffix=suffix)
    message = str(raised.value)
    assert message.startswith(f"{tmp_path}/image.{suffix}: can't be read as an image (its pixels ")
    assert f"{kind}, and nothing says which number is white" in message and "\n" not in message


@pytest.mark.filterwarnings("ignore::UserWarning:PIL.*")
@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "tif", "webp", "bmp", "ppm", "tga"])
def test_a_damaged_file_is_read_or_named(tmp_path, suffix):
    generator = np.random.default_rng(0)
    buffer = io.BytesIO()
    image = Image.fromarray(generator.integers(0, 256, (24, 24, 3), np.uint8))
    image.save(buffer, Image.registered_extensions()[f".{suffix}"])
    whole = buffer.getvalue()
    damaged = [whole[: int(len(whole) * share)] for share in (0, 0.02, 0.1, 0.5, 0.9)]
    for _ in range(60):
        content = bytearray(whole)
        for place in generator.integers(0, min(len(whole), 200), 3):
            content[place] = generator.integers(256)
        damaged.append(bytes(content))
    path, refused = tmp_path / f"a.{suffix}", 0
    for content in damaged:
        path.write_bytes(content)
        try:
            image_file.read(str(path))
        except DataError as error:
            refused += 1
            assert str(error).startswith(f"{path}: can't be read as an image (")
            assert "\n" not in str(error) and not str(error).endswith("()")
    assert refused >= 3


def test_text_in_an_image_may_not_fill_the_memory(tmp_path):
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "a" * (PngImagePlugin.MAX_TEXT_CHUNK + 1), zip=True)
    with pytest.raises(DataError, match="image.png: can't be read as an image"):
        rgb(Image.new("RGB", (2, 2)), tmp_path, pnginfo=text)
