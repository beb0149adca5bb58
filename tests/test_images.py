import itertools
import threading
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageCms, features

from topk_jax import images


def pattern(height, width):
    """An image without smooth parts, the same on every machine."""
    numbers = np.arange(height * width * 3, dtype=np.uint64) * 2654435761
    return ((numbers >> 13) & 255).astype(np.uint8).reshape(height, width, 3)


def save(path, values, mode=None, **options):
    """Saves an array as an image file, read by no code of ours."""
    image = values if isinstance(values, Image.Image) else Image.fromarray(values)
    if mode:
        image = image.convert(mode)
    image.save(path, **options)
    return path


# --- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "bmp", "ppm", "tif", "webp"])
def test_rgb_files_are_read_as_they_are(tmp_path, suffix):
    image = pattern(7, 5)
    options = {"lossless": True} if suffix == "webp" else {}
    read = images.read_image(save(tmp_path / f"ä b.{suffix}", image, **options))
    np.testing.assert_array_equal(read, image)
    assert read.dtype == np.uint8
    read[0, 0] = 1  # the caller's own
    assert images.read_size(str(tmp_path / f"ä b.{suffix}")) == (7, 5)


def test_jpeg_is_what_pillow_decodes(tmp_path):
    path = save(tmp_path / "a.jpg", pattern(20, 30))
    with Image.open(path) as expected:
        np.testing.assert_array_equal(images.read_image(path), np.asarray(expected))


def test_grey_and_black_and_white(tmp_path):
    grey = pattern(4, 6)[..., 0]
    three = np.repeat(grey[..., None], 3, -1)
    np.testing.assert_array_equal(images.read_image(save(tmp_path / "l.png", grey)), three)
    bits = grey > 127
    np.testing.assert_array_equal(
        images.read_image(save(tmp_path / "1.png", bits)), np.repeat(bits[..., None], 3, -1) * 255
    )


def on_white(rgb, alpha):
    """Compositing in floats; half a level is the most that rounding may differ."""
    share = alpha[..., None].astype(np.float64) / 255
    return rgb * share + 255 * (1 - share)


def test_transparency_is_on_white(tmp_path):
    rgb, alpha = pattern(16, 16), np.arange(256, dtype=np.uint8).reshape(16, 16)
    read = images.read_image(save(tmp_path / "rgba.png", np.dstack([rgb, alpha])))
    np.testing.assert_allclose(read, on_white(rgb, alpha), atol=0.51)
    np.testing.assert_array_equal(read[0, 0], [255, 255, 255])
    np.testing.assert_array_equal(read[-1, -1], rgb[-1, -1])
    grey = rgb[..., :1]
    read = images.read_image(save(tmp_path / "la.png", np.dstack([grey, alpha])))
    np.testing.assert_allclose(read, on_white(np.repeat(grey, 3, -1), alpha), atol=0.51)


def test_palettes(tmp_path):
    indices = np.array([[0, 1], [2, 3]], np.uint8)
    palette = [10, 20, 30, 200, 0, 0, 0, 200, 0, 7, 8, 9]
    image = Image.fromarray(indices)
    image.putpalette(palette)
    assert image.mode == "P"
    colours = np.array(palette, np.uint8).reshape(2, 2, 3)
    np.testing.assert_array_equal(images.read_image(save(tmp_path / "p.png", image)), colours)
    # One index that is wholly transparent, and a transparency for each index.
    hole = images.read_image(save(tmp_path / "hole.gif", image, transparency=1))
    np.testing.assert_array_equal(hole[0, 1], [255, 255, 255])
    np.testing.assert_array_equal(hole[1], colours[1])
    each = save(tmp_path / "each.png", image, transparency=bytes([255, 0, 128, 255]))
    alpha = np.array([[255, 0], [128, 255]])
    np.testing.assert_allclose(images.read_image(each), on_white(colours, alpha), atol=0.51)


def test_one_transparent_colour(tmp_path):
    rgb = pattern(3, 3)
    path = save(tmp_path / "a.png", rgb, transparency=tuple(rgb[1, 2].tolist()))
    expected = rgb.copy()
    expected[1, 2] = 255
    np.testing.assert_array_equal(images.read_image(path), expected)
    sixteen = (rgb[..., 0].astype(np.uint16) * 257).copy()
    path = save(tmp_path / "b.png", sixteen, transparency=int(sixteen[0, 0]))
    expected = np.repeat(rgb[..., :1], 3, -1)
    expected[0, 0] = 255
    np.testing.assert_array_equal(images.read_image(path), expected)


@pytest.mark.parametrize("quarter", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg", "tif"])
def test_exif_orientation(tmp_path, quarter, suffix):
    # Exif 2.32: where row 0 and column 0 of the stored picture belong.
    upright = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 8, 0), 8, 1)
    upright = np.repeat(upright[..., None], 3, -1)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.swapaxes(0, 1),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(upright, -1),
    }[quarter]
    exif = Image.Exif()
    exif[0x0112] = quarter
    path = save(tmp_path / f"a.{suffix}", np.ascontiguousarray(stored), exif=exif)
    read = images.read_image(path)
    np.testing.assert_allclose(read, upright, atol=4 if suffix == "jpg" else 0)


def test_nonsense_orientation_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 77
    image = pattern(3, 4)
    path = save(tmp_path / "a.png", image, exif=exif)
    np.testing.assert_array_equal(images.read_image(path), image)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    expected = np.repeat(grey[..., None].astype(np.uint8), 3, -1)
    for name in ("a.png", "a.tif"):
        read = images.read_image(save(tmp_path / name, grey * 257))
        np.testing.assert_array_equal(read, expected)
    # The nearest of the 256 levels, which are 257 apart.
    off = (grey[:, 1:-1].astype(np.int64) * 257 + [[128], [-128]] * 8).clip(0, 65535)
    read = images.read_image(save(tmp_path / "b.png", off.astype(np.uint16)))
    np.testing.assert_array_equal(read, expected[:, 1:-1])
    # PGM with a maximum of 65535: mode "I" in Pillow; its numbers are big-endian.
    header = b"P5 16 16 65535\n"
    (tmp_path / "a.pgm").write_bytes(header + (grey * 257).astype(">u2").tobytes())
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.pgm"), expected)
    whole = save(tmp_path / "i.tif", Image.fromarray(grey.astype(np.int32) * 257))
    np.testing.assert_array_equal(images.read_image(whole), expected)


def test_sixteen_bit_colour(tmp_path):
    """A PNG written by hand: Pillow reads such files but does not write them."""
    image = pattern(2, 3)

    def chunk(kind, data):
        checksum = zlib.crc32(kind + data)
        return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")

    rows = b"".join(b"\0" + (row.astype(np.uint16) * 257).astype(">u2").tobytes() for row in image)
    size = (3).to_bytes(4, "big") + (2).to_bytes(4, "big")
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", size + bytes([16, 2, 0, 0, 0]))
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    np.testing.assert_array_equal(images.read_image(tmp_path / "a.png"), image)


def test_floats(tmp_path):
    values = np.array([[0, 0.5, 1]], np.float32)
    read = images.read_image(save(tmp_path / "one.tif", values))
    np.testing.assert_array_equal(read[0, :, 0], [0, 128, 255])
    read = images.read_image(save(tmp_path / "levels.tif", values * 254))
    np.testing.assert_array_equal(read[0, :, 1], [0, 127, 254])


@pytest.mark.parametrize(
    "values",
    [
        np.array([[0, np.nan]], np.float32),
        np.array([[-0.1, 1]], np.float32),
        np.array([[0, 300]], np.float32),
        np.array([[-1, 5]], np.int32),
        np.array([[0, 70000]], np.int32),
    ],
)
def test_grey_values_of_unknown_range_are_refused(tmp_path, values):
    path = save(tmp_path / "a.tif", Image.fromarray(values))
    with pytest.raises(ValueError, match=r"a\.tif: .*grey values from .* expected 0 to"):
        images.read_image(path)


def test_cmyk(tmp_path):
    inks = np.array([[[0, 0, 0, 0], [0, 0, 0, 255]], [[255, 0, 0, 0], [0, 255, 255, 0]]], np.uint8)
    expected = [[[255, 255, 255], [0, 0, 0]], [[0, 255, 255], [255, 0, 0]]]
    path = save(tmp_path / "a.tif", Image.fromarray(inks, "CMYK"))
    np.testing.assert_array_equal(images.read_image(path), expected)
    # Adobe stores inverted inks in a JPEG. Pillow writes it so, marker included.
    large = np.kron(inks, np.ones((16, 16, 1), np.uint8))
    path = save(tmp_path / "a.jpg", Image.fromarray(large, "CMYK"), quality=100)
    assert b"Adobe" in path.read_bytes()
    read = images.read_image(path)
    np.testing.assert_allclose(read[8::16, 8::16], expected, atol=3)


def test_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.png", "a.webp", "a.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        read = images.read_image(tmp_path / name)
        np.testing.assert_allclose(read, np.broadcast_to([255, 0, 0], (3, 4, 3)), atol=2)


# --- colour profiles -----------------------------------------------------------------------------


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def matrix_profile(columns, gamma, space=b"RGB "):
    """A minimal ICC version 2 profile: three primaries (XYZ, D50), one gamma or curve."""

    def fixed(*numbers):
        return b"".join(round(number * 65536).to_bytes(4, "big", signed=True) for number in numbers)

    white = (0.9642, 1.0, 0.8249)
    numbers = [round(gamma * 256)] if np.isscalar(gamma) else np.rint(gamma * 65535)
    curve = b"curv" + bytes(4) + len(numbers).to_bytes(4, "big")
    curve += np.asarray(numbers, ">u2").tobytes()
    curve += bytes(-len(curve) % 4)
    tags = {b"wtpt": b"XYZ " + bytes(4) + fixed(*white)}
    if space == b"GRAY":
        tags[b"kTRC"] = curve
    else:
        for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
            tags[name] = b"XYZ " + bytes(4) + fixed(*column)
        tags |= {b"rTRC": curve, b"gTRC": curve, b"bTRC": curve}
    table, data = len(tags).to_bytes(4, "big"), b""
    start = 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + (start + len(data)).to_bytes(4, "big") + len(content).to_bytes(4, "big")
        data += content
    header = bytes(4) + bytes(4) + b"\x02\x10\0\0" + b"mntr" + space + b"XYZ " + bytes(12)
    header += b"acsp" + bytes(28) + fixed(*white) + bytes(48)
    whole = header + table + data
    return len(whole).to_bytes(4, "big") + whole[4:]


# Columns of sRGB's matrix adapted to D50 (IEC 61966-2-1 and ICC.1, Bradford).
SRGB = ((0.43607, 0.22249, 0.01392), (0.38515, 0.71687, 0.09708), (0.14307, 0.06061, 0.71410))


def srgb_of_linear(linear):
    """The transfer curve of IEC 61966-2-1, 0 to 255."""
    linear = np.clip(linear, 0, 1)
    curve = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return 255 * curve


def test_srgb_profile_changes_nothing(tmp_path):
    image = pattern(40, 40)
    for name in ("a.png", "a.tif"):
        path = save(tmp_path / name, image, icc_profile=srgb_profile())
        np.testing.assert_array_equal(images.read_image(path), image)


def test_profile_that_is_nearly_srgb_changes_nothing(tmp_path):
    # The widespread profile of IEC 61966-2-1 has a table of 1024 values: some pixels come out one
    # level off.
    encoded = np.linspace(0, 1, 1024)
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    columns = tuple(tuple(number + 0.0001 for number in column) for column in SRGB)
    image = pattern(100, 100)
    path = save(tmp_path / "a.png", image, icc_profile=matrix_profile(columns, linear))
    np.testing.assert_array_equal(images.read_image(path), image)


def test_profile_with_swapped_primaries_and_another_gamma(tmp_path):
    image = pattern(20, 20)
    profile = matrix_profile((SRGB[1], SRGB[0], SRGB[2]), 1.8)
    path = save(tmp_path / "a.png", image, icc_profile=profile)
    expected = srgb_of_linear((image[..., [1, 0, 2]] / 255) ** 1.8)
    np.testing.assert_allclose(images.read_image(path), expected, atol=2)
    # With transparency the colours change alike, and the alpha does not.
    alpha = np.full((20, 20), 255, np.uint8)
    alpha[0] = 0
    path = save(tmp_path / "b.png", np.dstack([image, alpha]), icc_profile=profile)
    read = images.read_image(path)
    np.testing.assert_allclose(read[1:], expected[1:], atol=2)
    assert (read[0] == 255).all()


def test_profiles_of_grey_images(tmp_path):
    grey = np.arange(0, 256, 5, dtype=np.uint8).reshape(4, 13)
    expected = np.repeat(srgb_of_linear((grey / 255.0) ** 1.4)[..., None], 3, -1)
    profile = matrix_profile(SRGB, 1.4, b"GRAY")
    path = save(tmp_path / "grey.png", grey, icc_profile=profile)
    np.testing.assert_allclose(images.read_image(path), expected, atol=2)
    path = save(tmp_path / "rgb.png", grey, icc_profile=matrix_profile(SRGB, 1.4))
    np.testing.assert_allclose(images.read_image(path), expected, atol=2)
    opaque = np.full_like(grey, 255)
    path = save(tmp_path / "la.png", np.dstack([grey, opaque]), icc_profile=profile)
    np.testing.assert_allclose(images.read_image(path), expected, atol=2)


@pytest.mark.parametrize(
    "profile", [b"", b"nonsense", matrix_profile(SRGB, 2.2)[:200], matrix_profile(SRGB, 1, b"GRAY")]
)
def test_profile_that_does_not_fit_is_left_out(tmp_path, profile):
    image = pattern(3, 4)
    path = save(tmp_path / "a.png", image, icc_profile=profile)
    np.testing.assert_array_equal(images.read_image(path), image)


def test_profile_that_does_not_fit_is_logged(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(images.logging, "log_first_n", lambda level, text, n, *a: said.append(a))
    said = []
    images.read_image(save(tmp_path / "a.png", pattern(3, 4), icc_profile=b"nonsense"))
    assert said[0][0] == tmp_path / "a.png"


# --- bad files -----------------------------------------------------------------------------------


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        images.read_image(tmp_path / "nothing.png")
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        images.read_image(tmp_path)


@pytest.mark.parametrize("read", [images.read_image, images.read_size])
@pytest.mark.parametrize(
    ("content", "message"), [(b"", "an empty file"), (b"This is text.", "not an image")]
)
def test_files_that_are_no_images(tmp_path, read, content, message):
    (tmp_path / "a b.png").write_bytes(content)
    with pytest.raises(ValueError, match=rf"a b\.png: .*{message}"):
        read(tmp_path / "a b.png")


DAMAGED_FORMATS = ["png", "jpg", "gif", "bmp", "tif", "webp", "ppm"]
if features.check("avif"):
    DAMAGED_FORMATS.append("avif")


@pytest.mark.parametrize("suffix", DAMAGED_FORMATS)
def test_truncated_files(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", pattern(50, 60))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"a\.{suffix}: ") as caught:
        images.read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", DAMAGED_FORMATS)
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_nothing_else(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", pattern(9, 8))
    content = np.frombuffer(path.read_bytes(), np.uint8)
    rng = np.random.default_rng(0)
    errors = []
    for _ in range(150):
        damaged = content.copy()
        places = rng.integers(0, min(content.size, 200), 3)
        damaged[places] = rng.integers(0, 256, 3)
        path.write_bytes(damaged.tobytes())
        try:
            images.read_image(path)
        except (ValueError, OSError) as error:
            errors.append(str(error))
    assert errors
    assert all(path.name in error for error in errors)


def test_decompression_bomb(tmp_path, monkeypatch):
    path = save(tmp_path / "bomb.png", np.zeros((40, 40), np.uint8))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ValueError, match=r"bomb\.png: more than 700 pixels"):
        images.read_image(path)
    with pytest.raises(ValueError, match=r"bomb\.png: more than 700 pixels"):
        images.read_size(path)


# --- writing and listing -------------------------------------------------------------------------


def test_write_image(tmp_path):
    image = pattern(9, 4)
    images.write_image(tmp_path / "new" / "a.png", image[:, ::-1])
    with Image.open(tmp_path / "new" / "a.png") as read:
        np.testing.assert_array_equal(np.asarray(read), image[:, ::-1])
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("name", "image", "message"),
    [
        ("a.jpg", pattern(2, 2), "ends in .png"),
        ("a.png", pattern(2, 2).astype(np.float32), "float32"),
        ("a.png", pattern(2, 2)[..., 0], r"\[2, 2\]"),
        ("a.png", pattern(2, 2)[:0], r"\[0, 2, 3\]"),
    ],
)
def test_write_image_refuses(tmp_path, name, image, message):
    with pytest.raises(ValueError, match=message):
        images.write_image(tmp_path / name, image)
    assert not list(tmp_path.iterdir())


def test_list_images(tmp_path):
    for name in ("b.PNG", "a.jpeg", ".hidden.png", "._a.jpeg", "notes.txt", "c.webp"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in images.list_images(tmp_path)] == ["a.jpeg", "b.PNG", "c.webp"]
    with pytest.raises(FileNotFoundError, match="missing"):
        images.list_images(tmp_path / "missing")


# --- resizing ------------------------------------------------------------------------------------

# height, width, resize, crop; shape after Resize; CRC-32 of the pixels after Resize, CenterCrop and
# both, on pattern(height, width), by torchvision 0.29.1 with Pillow 13.0.0.
TORCHVISION = [
    (37, 50, 16, 14, (16, 21), 2638224462, 1814385076, 287388163),
    (50, 37, 16, 14, (21, 16), 587980710, 296029956, 2939040383),
    (11, 64, 24, 16, (24, 139), 3542937885, 936587719, 3389975517),
    (5, 5, 8, 8, (8, 8), 2163330470, 270479015, 2163330470),
    (30, 41, 20, 33, (20, 27), 290259703, 2411169057, 693545367),
    (101, 100, 32, 32, (32, 32), 2184965995, 1260404933, 2184965995),
    (3, 7, 5, 12, (5, 11), 3951180632, 43299926, 2295339427),
]


@pytest.mark.parametrize("stored", TORCHVISION)
def test_resize_and_crop_as_stored(stored):
    height, width, resize, crop, shape, *checksums = stored
    image = pattern(height, width)
    resized = images.resize_short_side(image, resize)
    assert resized.shape[:2] == shape
    preprocessing = images.Preprocessing(crop, resize, (0, 0, 0), (1, 1, 1))
    got = (resized, images.center_crop(image, crop), images.preprocess(image, preprocessing))
    assert [zlib.crc32(result.tobytes()) for result in got] == checksums
    assert all(result.flags.writeable and result.dtype == np.uint8 for result in got)


def test_resized_pixels_by_hand():
    # Halving: triangle filter of radius 2 around 0.5 + 2i, weights 1/8 3/8 3/8 1/8 in the middle.
    row = np.array([8, 16, 40, 80, 120, 200, 240, 248], np.float64)
    image = np.repeat(np.repeat(row[None, :, None], 8, 0), 3, -1).astype(np.uint8)
    expected = [(3 * 8 + 3 * 16 + 40) / 7]
    expected += [np.dot([1, 3, 3, 1], row[i : i + 4]) / 8 for i in (1, 3)]
    expected += [(200 + 3 * 240 + 3 * 248) / 7]
    resized = images.resize_short_side(image, 4)
    np.testing.assert_allclose(resized[1, :, 0], expected, atol=0.5001)


def test_crop_offsets_round_half_to_even():
    column = np.repeat(np.arange(13, dtype=np.uint8)[:, None, None], 3, -1).repeat(4, 1)
    # (13 - 4) / 2 = 4.5 -> 4; (11 - 4) / 2 = 3.5 -> 4
    assert images.center_crop(column, 4)[0, 0, 0] == 4
    assert images.center_crop(column[:11], 4)[0, 0, 0] == 4
    padded = images.center_crop(column[:3] + 1, 6)
    np.testing.assert_array_equal(padded[:, 1, 0], [0, 1, 2, 3, 0, 0])
    np.testing.assert_array_equal(padded[1, :, 0], [0, 1, 1, 1, 1, 0])


def test_fit():
    image = pattern(24, 24)
    np.testing.assert_array_equal(images.fit(image, 24), image)
    wide = pattern(24, 40)
    np.testing.assert_array_equal(images.fit(wide, 24), wide[:, 8:32])
    by_pillow = Image.fromarray(wide).resize((20, 12), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(images.fit(wide, 12), np.asarray(by_pillow)[:, 4:16])


@pytest.mark.parametrize("function", [images.resize_short_side, images.center_crop, images.fit])
@pytest.mark.parametrize("image", [pattern(4, 5).astype(np.float32), pattern(4, 5)[..., :2]])
def test_bad_arrays_and_sizes(function, image):
    with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
        function(image, 4)
    with pytest.raises(ValueError, match="size 0"):
        function(pattern(4, 5), 0)


def test_resizing_a_line_is_refused():
    with pytest.raises(ValueError, match="30000 x 1 pixels: too narrow"):
        images.resize_short_side(np.zeros((1, 30000, 3), np.uint8), 256)


@pytest.mark.parametrize("size", [(5, 9), (24, 7), (31, 12), (11, 40)])
def test_resize_to_both_sides_is_pillows_lanczos(size):
    image = pattern(13, 12)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.LANCZOS)
    found = images.resize(image, *size)
    assert found.shape == (*size, 3)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, np.asarray(expected))


def test_resized_by_a_lanczos_sum():
    row = np.array([8, 16, 40, 80, 120, 200, 240, 248], np.float64)
    image = np.repeat(np.repeat(row[None, :, None], 8, 0), 3, -1).astype(np.uint8)
    found = images.resize(image, 8, 4)
    centres = (np.arange(4) + 0.5) * 2
    for i, centre in enumerate(centres):
        # sinc(t) sinc(t / 3) within three pixels of the result, that is six of the image.
        t = (np.arange(8) + 0.5 - centre) / 2
        weights = np.where(np.abs(t) < 3, np.sinc(t) * np.sinc(t / 3), 0)
        expected = np.clip(weights @ row / weights.sum(), 0, 255)
        np.testing.assert_allclose(found[0, i], expected, atol=1)


def test_resize_to_the_same_size_is_the_image_itself():
    image = pattern(6, 7)
    assert images.resize(image, 6, 7) is image


def test_resize_refuses(monkeypatch):
    for image in (pattern(4, 5).astype(np.float32), pattern(4, 5)[..., :2], pattern(4, 5)[:0]):
        with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\]"):
            images.resize(image, 4, 4)
    for size in ((0, 4), (4, 0), (-1, 4)):
        with pytest.raises(ValueError, match="expected a number of pixels of at least 1"):
            images.resize(pattern(4, 5), *size)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)
    with pytest.raises(ValueError, match="36 x 20 pixels: more than 700"):
        images.resize(pattern(4, 5), 20, 36)


@pytest.mark.parity
def test_parity_with_torchvision():
    pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    rng = np.random.default_rng(0)
    for _ in range(400):
        height, width = rng.integers(1, 120, 2)
        resize, crop = rng.integers(1, 90, 2).tolist()
        image = rng.integers(0, 256, (height, width, 3), np.uint8)
        pil = Image.fromarray(image)
        resized = transforms.Resize(resize)(pil)
        cropped = transforms.CenterCrop(crop)(pil)
        both = transforms.CenterCrop(crop)(resized)
        np.testing.assert_array_equal(images.resize_short_side(image, resize), np.asarray(resized))
        np.testing.assert_array_equal(images.center_crop(image, crop), np.asarray(cropped))
        preprocessing = images.Preprocessing(crop, resize, (0, 0, 0), (1, 1, 1))
        np.testing.assert_array_equal(images.preprocess(image, preprocessing), np.asarray(both))
        if (height, width) != (crop, crop):
            fitted = transforms.CenterCrop(crop)(transforms.Resize(crop)(pil))
            np.testing.assert_array_equal(images.fit(image, crop), np.asarray(fitted))


@pytest.mark.parity
def test_normalize_as_torchvision():
    pytest.importorskip("torch")
    transforms = pytest.importorskip("torchvision.transforms")
    image = np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3)
    preprocessing = images.IMAGENET_PREPROCESSING
    expected = transforms.Normalize(preprocessing.mean, preprocessing.std)(
        transforms.ToTensor()(Image.fromarray(image))
    )
    got = images.normalize(image, preprocessing)
    np.testing.assert_array_equal(got.transpose(2, 0, 1), expected.numpy())


@pytest.mark.parametrize("shape", [(256, 1, 3), (2, 8, 16, 3), (1, 2, 2, 64, 3)])
def test_normalize(shape):
    levels = np.resize(np.arange(256), np.prod(shape)).astype(np.uint8).reshape(shape)
    preprocessing = images.IMAGENET_PREPROCESSING
    expected = np.empty(shape, np.float64)
    for channel, (mean, std) in enumerate(
        [(0.485, 0.229), (0.456, 0.224), (0.406, 0.225)]  # spec of the ImageNet networks
    ):
        expected[..., channel] = (levels[..., channel] / 255.0 - mean) / std
    on_host = images.normalize(levels, preprocessing)
    on_device = images.normalize(jnp.asarray(levels), preprocessing)
    compiled = jax.jit(lambda x: images.normalize(x, preprocessing))
    for got in (on_host, on_device, compiled(levels), compiled(levels.astype(np.float32))):
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, expected, atol=5e-7)
    assert isinstance(on_host, np.ndarray)
    assert isinstance(on_device, jax.Array)


# --- parallel map --------------------------------------------------------------------------------


def test_map_parallel_keeps_the_order():
    rng = np.random.default_rng(0)
    pauses = rng.uniform(0, 0.003, 50)

    def function(index):
        time.sleep(pauses[index])
        return index * index

    got = list(images.map_parallel(function, range(50), workers=4, ahead=7))
    assert got == [index * index for index in range(50)]
    assert list(images.map_parallel(function, [])) == []
    assert list(images.map_parallel(str, (n for n in range(3)), ahead=1, workers=1)) == list("012")


def test_map_parallel_works_in_parallel():
    barrier = threading.Barrier(3, timeout=10)
    assert sorted(images.map_parallel(lambda _: barrier.wait(), range(3), workers=3)) == [0, 1, 2]


def test_map_parallel_looks_ahead_but_not_far():
    taken = []

    def items():
        for index in itertools.count():
            taken.append(index)
            yield index

    results = images.map_parallel(lambda index: index, items(), workers=2, ahead=5)
    assert taken == []
    for index in range(20):
        assert next(results) == index
        assert len(taken) == index + 1 + 5
    results.close()  # pyright: ignore


def test_map_parallel_error_comes_in_its_place_and_stops_the_rest():
    begun = []

    def function(index):
        begun.append(index)
        if index == 3:
            raise ValueError("item 3")
        return index

    before = threading.active_count()
    got = []
    with pytest.raises(ValueError, match="item 3"):
        got.extend(images.map_parallel(function, range(10_000), workers=2, ahead=4))
    results = images.map_parallel(function, range(10_000), workers=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="item 3"):
        next(results)
    assert max(begun) < 3 + 4 + 1
    assert threading.active_count() == before


def test_map_parallel_close_cancels():
    gate = threading.Event()
    begun = []

    def function(index):
        begun.append(index)
        if index:
            gate.wait(10)
        return index

    before = threading.active_count()
    results = images.map_parallel(function, range(1000), workers=2, ahead=50)
    assert next(results) == 0
    timer = threading.Timer(0.1, gate.set)
    timer.start()
    results.close()  # pyright: ignore
    timer.join()
    assert len(begun) <= 3
    assert threading.active_count() == before


def test_map_parallel_bad_numbers():
    for options in ({"workers": 0}, {"ahead": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            images.map_parallel(str, [1], **options)


@pytest.mark.real
def test_real_photographs(shared):
    wnids = sorted(path for path in (shared / "images" / "imagenet_val").iterdir())
    paths = [path for wnid in wnids for path in images.list_images(wnid)]
    assert len(paths) == 250
    for path, image in zip(paths, images.map_parallel(images.read_image, paths), strict=True):
        assert image.shape == (224, 224, 3), path
        assert images.read_size(path) == (224, 224)


def test_normalization_table_is_normalize():
    pixels = np.random.default_rng(0).integers(0, 256, size=(2, 5, 7, 3), dtype=np.uint8)
    preprocessing = images.IMAGENET_PREPROCESSING
    table = images.normalization_table(preprocessing)
    found = table[pixels, np.arange(3)]
    np.testing.assert_array_equal(found, images.normalize(pixels, preprocessing))
    red = (np.float32(200) / np.float32(255) - np.float32(0.485)) / np.float32(0.229)
    assert table[200, 0] == red
