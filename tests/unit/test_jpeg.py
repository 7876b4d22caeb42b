"""JPEG files are decoded by the fastest decoder whose pixels are Pillow's: what decides that, and that nothing else
differs."""

import io
import random
import sys
import types
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from reference_material import FOLDER

from dkd.data import jpeg
from dkd.data.sources import decode_pixels, decoding, to_rgb_tensor


def by_pillow(content):
    with Image.open(io.BytesIO(content)) as image:
        return to_rgb_tensor(image)


def saved(mode="RGB", size=(40, 30), **options):
    generator = np.random.default_rng(0)
    pixels = Image.fromarray(generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))
    file = io.BytesIO()
    pixels.convert(mode).save(file, "JPEG", **options)
    return file.getvalue()


def exif(**tags):
    block = Image.Exif()
    block[0x010F] = "a camera"
    for orientation in tags.values():
        block[0x0112] = orientation
    return block.tobytes()


def chosen(monkeypatch, module):
    """What is chosen where `import simplejpeg` gives that module."""
    monkeypatch.setitem(sys.modules, "simplejpeg", module)
    return jpeg.jpeg_decoder.__wrapped__()


def stand_in(decode):
    return types.SimpleNamespace(__version__="9.9", decode_jpeg=lambda content, *_, **options: decode(content))


def pillows_pixels(content):
    return np.array(Image.open(io.BytesIO(content)).convert("RGB"))


def test_without_simplejpeg_pillow_decodes(monkeypatch):
    decoder = chosen(monkeypatch, None)
    assert decoder.decode is None
    assert decoder.name.startswith("Pillow ")
    assert "simplejpeg is not installed" in decoder.name
    assert decoder.header(saved()) is None


def test_a_decoder_with_pillows_pixels_is_taken_and_named(monkeypatch):
    decoder = chosen(monkeypatch, stand_in(pillows_pixels))
    assert decoder.name.startswith("simplejpeg 9.9, pixels as by Pillow ")
    # Baseline and progressive, three samplings, with and without restart markers, three ways to say what the colours
    # are.
    assert len(decoder.kinds) == 2 * 3 * 2 * 3
    assert decoder.header(saved()) is not None


def test_a_decoder_that_differs_in_one_pixel_of_one_kind_is_not_taken(monkeypatch):
    def differs(content):
        pixels = pillows_pixels(content)
        if jpeg.read_header(content).kind.progressive and pixels.shape[0] > 40:
            pixels[-1, -1, 2] ^= 1
        return pixels

    decoder = chosen(monkeypatch, stand_in(differs))
    assert decoder.decode is None
    assert (
        "simplejpeg 9.9 is not used: its pixels differ from Pillow's, first in a trial image of 70×47" in decoder.name
    )


def test_a_decoder_that_fails_is_not_taken(monkeypatch):
    decoder = chosen(monkeypatch, stand_in(lambda content: 1 / 0))
    assert decoder.decode is None
    assert "a trial image cannot be decoded: ZeroDivisionError" in decoder.name


@pytest.mark.parametrize(("content", "why"), [
    (saved("L"), "grayscale"),
    (saved("CMYK"), "four colours"),
    (saved(keep_rgb=True), "colours that are not YCbCr"),
    (saved()[:100], "no scan"),
    (b"\x89PNG" + bytes(100), "another format"),
    (saved().replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), "12 bits"),
    (saved().replace(b"\x01\x22\x00\x02\x11\x01\x03\x11", b"\x01\x41\x00\x02\x11\x01\x03\x11"), "another sampling"),
])  # fmt: skip
def test_unusual_files_are_left_to_pillow(monkeypatch, content, why):
    assert chosen(monkeypatch, stand_in(pillows_pixels)).header(content) is None, why


def test_too_many_pixels_are_left_to_pillow(monkeypatch):
    decoder = chosen(monkeypatch, stand_in(pillows_pixels))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1199)
    assert decoder.header(saved()) is None
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1200)
    assert decoder.header(saved()) is not None


def test_a_file_that_the_decoder_refuses_is_pillows_to_judge(monkeypatch):
    def refuses(content):
        raise ValueError("Premature end of JPEG file")

    decoder = chosen(monkeypatch, stand_in(pillows_pixels))
    refusing = jpeg.JpegDecoder(decoder.name, refuses, decoder.kinds)
    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: refusing)
    assert torch.equal(decode_pixels(saved()), by_pillow(saved()))
    with pytest.raises(OSError, match="image file is truncated"):
        decode_pixels(saved()[:-200])


@pytest.mark.parametrize("orientation", [None, 1, 2, 6, 8])
def test_files_with_exif_are_turned_as_by_pillow(monkeypatch, orientation):
    content = saved(exif=exif(**({} if orientation is None else {"orientation": orientation})))
    used = []
    decoder = chosen(monkeypatch, stand_in(pillows_pixels))
    noted = jpeg.JpegDecoder(decoder.name, lambda content: (used.append(1), pillows_pixels(content))[1], decoder.kinds)
    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: noted)
    assert torch.equal(decode_pixels(content), by_pillow(content))
    assert bool(used) == (orientation in (None, 1))


def test_an_orientation_in_xmp_counts_too(monkeypatch):
    content = saved(xmp=b'<x:xmpmeta tiff:Orientation="6"></x:xmpmeta>')
    decoder = chosen(monkeypatch, stand_in(pillows_pixels))
    monkeypatch.setattr(decoding, "jpeg_decoder", lambda: decoder)
    assert decode_pixels(content).shape == by_pillow(content).shape == (3, 40, 30)


def mutated(content, generator):
    """A file that is cut, changed, or has bytes too many or too few."""
    changed, how = bytearray(content), generator.randrange(5)
    place = generator.randrange(len(changed))
    if how == 0:
        del changed[place:]
    elif how == 1:
        changed[place] = generator.randrange(256)
    elif how == 2:  # in the headers
        changed[generator.randrange(max(1, content.find(b"\xff\xda")))] = generator.randrange(256)
    elif how == 3:
        del changed[place : place + generator.randrange(1, 40)]
    else:
        changed[place:place] = bytes(generator.randrange(256) for _ in range(generator.randrange(1, 20)))
    return bytes(changed)


def test_pixels_and_errors_are_pillows_for_damaged_files_too():
    """1,500 damaged files: the same pixels, or the same error."""
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: the extra fast")
    if jpeg.jpeg_decoder().decode is None:
        pytest.skip(f"its libjpeg has other pixels here: {jpeg.jpeg_decoder().name}")
    generator = random.Random(0)
    files = [
        *jpeg.trial_images(),
        saved("L"),
        saved("CMYK"),
        saved(exif=exif(orientation=6)),
        saved(exif=exif()),
        saved(comment=b"words"),
    ]
    decoded = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(1500):
            content = mutated(generator.choice(files), generator)
            results = []
            for decode in (by_pillow, decode_pixels):
                try:
                    results.append(decode(content))
                except Exception as error:
                    results.append(f"{type(error).__name__}: {error}".split(" object at 0x")[0])
            ours, theirs = results
            if isinstance(ours, str) or isinstance(theirs, str):
                assert isinstance(ours, str), number
                assert ours == theirs, number
            else:
                decoded += 1
                assert torch.equal(ours, theirs), number
    assert decoded > 300


def test_photographs_have_pillows_pixels():
    pytest.importorskip("simplejpeg", reason="simplejpeg is not installed: the extra fast")
    folder = FOLDER / "data" / "imagenet1k_sample"
    if not folder.exists():
        pytest.skip(
            f"photographs are not there: {folder} (set DKD_TEST_MATERIAL to the folder that holds "
            "data/imagenet1k_sample/)"
        )
    import pyarrow.parquet as parquet

    cells = parquet.read_table(sorted(folder.glob("*.parquet"))[0])["image"].to_pylist()
    assert len(cells) > 100
    assert all(torch.equal(decode_pixels(cell["bytes"]), by_pillow(cell["bytes"])) for cell in cells)
