"""Pictures and masks that a request brings: read in one way, or refused in a sentence before they cost anything."""

import base64
import io
import json
import re
import struct
import warnings
import zlib
from unittest.mock import patch

import numpy as np
import pytest
from handled import drawn_by
from PIL import Image, ImageFilter

from sdworker.serve.handler import handler
from sdworker.serve.image_input import MAX_SCANS, RequestError, decode_base64, read_mask, read_picture

CLEAR = (0, 0, 0, 0)


def file_bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def as_text(content: bytes | Image.Image) -> str:
    return base64.b64encode(file_bytes(content) if isinstance(content, Image.Image) else content).decode()


def png_with(kind: bytes, content: bytes = b"", times: int = 1) -> bytes:
    "A PNG with a chunk more behind its header."
    png = file_bytes(Image.new("RGB", (64, 64)))
    chunk = struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    return png[:33] + chunk * times + png[33:]


def jpeg_with(marker: int, content: bytes = b"", times: int = 1) -> bytes:
    "A JPEG with a segment more behind its first two bytes."
    jpeg = file_bytes(Image.new("RGB", (64, 64)), "JPEG")
    return jpeg[:2] + (bytes([255, marker]) + struct.pack(">H", len(content) + 2) + content) * times + jpeg[2:]


GENERATOR = np.random.default_rng(0)
PHOTO = Image.fromarray(GENERATOR.integers(0, 255, (64, 64, 3), np.uint8))
PALE = Image.fromarray(GENERATOR.integers(200, 255, (64, 64, 3), np.uint8))  # as on a white or grey background
DARK = Image.fromarray(np.repeat(GENERATOR.choice([0, 255], (64, 64, 1)), 3, 2).astype(np.uint8))
GREY = PHOTO.convert("L").convert("RGB")
SKY, WHITE = Image.new("RGB", (64, 64), (90, 150, 220)), Image.new("RGB", (64, 64), "white")
ramp = np.linspace(0, 1, 64)[:, None, None] * np.ones((1, 64, 1))
SUNSET = Image.fromarray((ramp * (250, 90, 40) + (1 - ramp) * (120, 40, 110)).astype(np.uint8))
JPEG_PHOTO = Image.open(io.BytesIO(file_bytes(SUNSET, "JPEG", quality=50))).convert("RGB")


def erased(picture: Image.Image, alpha: int = 0, colour=None) -> Image.Image:
    "A picture whose right half is transparent, with its own colours there or another."
    image = picture.convert("RGBA")
    right = Image.new("RGBA", (32, 64), colour or CLEAR) if colour else image.crop((32, 0, 64, 64))
    right.putalpha(alpha)
    image.paste(right, (32, 0))
    return image


def strokes(*colours) -> Image.Image:
    "The left half painted in stripes on a transparent ground."
    image = Image.new("RGBA", (64, 64), CLEAR)
    for at, colour in enumerate(colours):
        image.paste(Image.new("RGBA", (32, 64 // len(colours)), colour), (0, at * (64 // len(colours))))
    return image


SOFT = Image.new("RGBA", (64, 64), CLEAR)  # a soft brush, whose edge is darker, since the ground is black
SOFT.paste(Image.new("RGBA", (32, 64), "red"), (0, 0))
SOFT = SOFT.filter(ImageFilter.GaussianBlur(4))
FEATHERED = PHOTO.convert("RGBA")  # a soft eraser
FEATHERED.putalpha(Image.fromarray(np.tile(np.clip(np.arange(64) * -20 + 32 * 20 + 128, 0, 255), (64, 1)).astype(
    np.uint8)))
MASKS = {  # picture, mask, half that is drawn anew; empty: refused
    "a photo, erased": (PHOTO, erased(PHOTO), "right"),
    "a photo, erased to black": (PHOTO, erased(PHOTO, colour="black"), "right"),
    "a photo, erased softly": (PHOTO, FEATHERED, "right"),
    "a pale photo, erased": (PALE, erased(PALE), "right"),
    "a pale photo, erased to white": (PALE, erased(PALE, colour="white"), "right"),
    "a grey photo, erased": (GREY, erased(GREY), "right"),
    "a photo, its mask without colours": (PHOTO, erased(PHOTO).convert("LA"), "right"),
    "black and white, erased": (DARK, erased(DARK), "right"),
    "a sunset, erased": (SUNSET, erased(SUNSET), "right"),
    "a sunset, sent as JPEG": (JPEG_PHOTO, erased(SUNSET), "right"),
    "one colour, erased": (SKY, erased(SKY), ""), "a white page, erased": (WHITE, erased(WHITE), ""),
    "another photo, erased": (PHOTO, erased(SUNSET), ""),
    "white strokes": (PHOTO, strokes("white"), "left"), "white strokes on white": (WHITE, strokes("white"), ""),
    "white strokes on pale": (PALE, strokes("white"), "left"),
    "red strokes": (PHOTO, strokes("red"), "left"), "dark red strokes": (PHOTO, strokes((120, 0, 0)), "left"),
    "red strokes on sky": (SKY, strokes("red"), "left"), "a soft red brush": (PHOTO, SOFT, "left"),
    "half transparent strokes": (PHOTO, strokes((255, 0, 0, 128)), "left"),
    "strokes of a fifth": (PHOTO, strokes((255, 0, 0, 50)), ""),
    "strokes of just under a half": (PHOTO, strokes((255, 0, 0, 127)), ""),
    "black strokes": (PHOTO, strokes("black"), ""), "grey strokes": (PHOTO, strokes("grey"), ""),
    "red and blue strokes": (PHOTO, strokes("red", "blue"), ""),
    "red and dark red strokes": (PHOTO, strokes("red", (120, 0, 0)), ""),
    "black and white strokes": (PHOTO, strokes("black", "white"), ""),
    "a grey photo, erased by a fifth": (GREY, erased(GREY, alpha=200), ""),
    "a photo, erased by a fifth": (PHOTO, erased(PHOTO, alpha=200), ""),
    "white on black": (PHOTO, erased(WHITE, 255, "black"), "left"),
    "white on black, a fifth of it transparent": (PHOTO, erased(WHITE, 200, "black"), ""),
}


def side(mask: Image.Image) -> str:
    "Which half is drawn anew."
    redrawn = np.asarray(mask) >= 128
    left, right = redrawn[:, :24].mean(), redrawn[:, 40:].mean()
    return {(1, 0): "left", (0, 1): "right"}.get((left, right), f"{left:.2f} of the left, {right:.2f} of the right")


@pytest.mark.parametrize("case", MASKS)
def test_a_mask_means_one_thing_or_is_refused(case):
    picture, mask, half = MASKS[case]
    try:
        redrawn = side(read_mask(as_text(mask), "mask_image", picture))
    except RequestError as error:
        assert str(error).startswith("mask_image ") and str(error).endswith(".") and "\n" not in str(error)
        assert "white where the picture is to be drawn anew" in str(error)
        redrawn = ""
    assert redrawn == half


@pytest.mark.parametrize("alpha", [0, 1, 100, 127])
def test_a_mask_that_is_nowhere_opaque_is_named_so(alpha):
    words = f"nowhere more than half opaque (alpha {alpha} of 255 at most)" if alpha else "transparent everywhere"
    with pytest.raises(RequestError, match=rf"^mask_image is {re.escape(words)}: make"):
        read_mask(as_text(strokes((255, 0, 0, alpha))), "mask_image", PHOTO)


def test_in_openais_dialect_transparency_alone_is_the_mask():
    for mask in (erased(PHOTO), strokes("white"), strokes("black"), strokes("red", "blue"), erased(WHITE)):
        assert side(read_mask(as_text(mask), "mask", PHOTO, alpha_is_mask=True)) == "right"


@pytest.mark.parametrize("value", [0, 1, 100, 127])
def test_a_mask_that_redraws_nothing_is_refused(value):
    with pytest.raises(RequestError, match=f"^mask_image is {value} of 255 where it is brightest"):
        read_mask(as_text(Image.new("L", (64, 64), value)), "mask_image", PHOTO)
    assert read_mask(as_text(Image.new("L", (64, 64), 128)), "mask_image", PHOTO).getextrema() == (128, 128)


def test_a_mask_is_one_picture_of_the_pictures_size():
    with pytest.raises(RequestError, match=r"^mask_image has 32x32 pixels, and the picture 64x64: "):
        read_mask(as_text(Image.new("L", (32, 32), 255)), "mask_image", PHOTO)
    moving = file_bytes(WHITE, "WebP", save_all=True, append_images=[SKY])
    with pytest.raises(RequestError, match=r"^mask_image has more than one picture: "):
        read_mask(as_text(moving), "mask_image", PHOTO)


def with_mask_in_red(spec, params) -> Image.Image:
    "The picture that was sent, with the mask's part in red."
    image = (spec.image or Image.new("RGB", (params.width, params.height))).convert("RGB")
    if spec.mask_image:
        image.paste("red", mask=spec.mask_image.point(lambda grey: 255 * (grey >= 128)))
    return image


@pytest.fixture
def drawn_at_once():
    with drawn_by(with_mask_in_red):
        yield


def edit(**fields) -> dict:
    body = {"prompt": "a star"} | fields
    return handler({"id": "edit", "input": {"openai_route": "/v1/images/edits", "openai_input": body}})


def test_the_transparent_part_of_an_openai_edit_is_its_mask(drawn_at_once):
    answer = edit(image=as_text(erased(PHOTO)))
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")
    assert image.getpixel((60, 32)) == (255, 0, 0) and np.array_equal(np.asarray(image)[:, :32], PHOTO.crop(
        (0, 0, 32, 64)))
    assert answer["warnings"] == ["image is transparent in places; they are drawn anew, since there is no mask."]
    answer = edit(image=as_text(erased(PHOTO)), mask=as_text(strokes("white").transpose(Image.Transpose.ROTATE_180)))
    image = Image.open(io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))).convert("RGB")
    assert image.getpixel((5, 32)) == (255, 0, 0) != image.getpixel((60, 32)), "a mask that is sent goes first"
    assert answer["warnings"] == ["image is transparent in places; they are white here."]
    plain = handler({"id": "plain", "input": {"prompt": "a star", "image": as_text(erased(PHOTO))}})
    assert "they are white here" in plain["warnings"][0], "and only in this dialect"
    assert "warnings" not in edit(image=as_text(PHOTO)) or edit(image=as_text(PHOTO))["warnings"] == []


@pytest.mark.parametrize("empty", ["", " ", "\n", "\ufeff", "data:image/png;base64,"])
def test_an_empty_picture_is_refused_by_its_name(empty, drawn_at_once):
    for name in ("image", "image_url", "mask_image"):
        payload = {"prompt": "a star", "image": as_text(PHOTO)} if name == "mask_image" else {"prompt": "a star"}
        answer = handler({"id": "empty", "input": payload | {name: empty}})
        assert (answer["field"], answer["error"]) == (
            name, f"{name} is empty: send a picture, leave it out or send null.")


def test_only_the_first_picture_of_a_file_is_read_and_a_warning_says_so(drawn_at_once):
    for kind in ("WebP", "PNG", "MPO"):
        moving = file_bytes(PHOTO, kind, save_all=True, append_images=[SKY, WHITE])
        answer = handler({"id": "moving", "input": {"prompt": "a star", "image": as_text(moving)}})
        assert answer["warnings"] == ["image has more than one picture; the first one is used."], kind
    for kind in ("WebP", "PNG", "JPEG"):
        assert read_picture(as_text(file_bytes(PHOTO, kind)), "image")[2] == []


def scans(times: int) -> bytes:
    "A progressive JPEG, its last scan repeated."
    jpeg = file_bytes(SUNSET, "JPEG", progressive=True)
    last = jpeg.rindex(b"\xff\xda")
    return jpeg[:last] + jpeg[last:-2] * times + jpeg[-2:]


SLOW = {  # small files that take long to read
    "scans": scans(400), "chunks": png_with(b"abCd", times=50_000), "chunks of the picture": png_with(
        b"IDAT", times=50_000), "segments": jpeg_with(0xFE, times=50_000), "tables": jpeg_with(
        0xDB, (b"\0" + bytes([1] * 64)) * 1000, 20), "filling": jpeg_with(0xFE).replace(
        b"\xff\xfe", b"\xff" * 100_000 + b"\xfe"), "skipped": jpeg_with(0xFE).replace(
        b"\xff\xfe", b"\xff\0" * 50_000 + b"\xff\xfe")}


@pytest.mark.parametrize("what", SLOW)
def test_a_file_that_takes_long_is_not_begun(what):
    sentence = r"^image is a (JPEG|PNG) in more than [0-9,]+ (scans|parts), which take long to read: save it anew"
    with patch("PIL.Image.open", side_effect=AssertionError("begun")), pytest.raises(RequestError, match=sentence):
        read_picture(as_text(SLOW[what]), "image")


def test_files_with_many_parts_as_programs_write_them_are_read():
    first = scans(1).count(b"\xff\xda")
    for content in (scans(MAX_SCANS - first + 1), png_with(b"abCd", times=5000), jpeg_with(0xFE, b"\xff\xda" * 3000),
                    file_bytes(PHOTO, "JPEG") + b"\xff\xda\0\4" * 1000,  # as a film behind the picture
                    jpeg_with(0xE2, b"x" * 60_000, 200)):
        assert read_picture(as_text(content), "image")[0].size == (64, 64)


def overlapping_exif(entries: int) -> bytes:
    "EXIF whose fields all have the same 60 kB as value."
    fields = b"".join(struct.pack(">HHII", at + 300, 2, 60_000, 8) for at in range(entries))
    return b"MM\0*\0\0\0\x08" + struct.pack(">HHHIHH", entries + 1, 274, 3, 1, 6, 0) + fields + bytes(4)


@pytest.mark.parametrize("marker, name", [(0xE1, b"Exif\0\0"), (0xE2, b"MPF\0")])
def test_the_fields_of_exif_are_not_copied(marker, name):
    content = jpeg_with(marker, name + overlapping_exif(4000))
    with patch("PIL.TiffImagePlugin.ImageFileDirectory_v2.load", side_effect=AssertionError("begun")):
        image, _, _ = read_picture(as_text(content), "image")
        png, _, _ = read_picture(as_text(png_with(b"eXIf", overlapping_exif(4000))), "image")
    assert image.size == png.size == (64, 64)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WebP"])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_picture_is_turned_upright(kind, order):
    wide = SUNSET.crop((0, 0, 64, 32))
    exif = Image.Exif()
    exif.endian = order
    for orientation in range(10):
        exif[274] = orientation
        expected = wide.transpose({
            2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_90}[orientation]) if 1 < orientation < 9 else wide
        options = {"lossless": True} if kind == "WebP" else {"quality": 100} if kind == "JPEG" else {}
        image = read_picture(as_text(file_bytes(wide, kind, exif=exif, **options)), "image")[0]
        assert image.size == expected.size
        assert np.abs(np.asarray(image, int) - np.asarray(expected)).mean() < 3, orientation


LARGE = {
    "image has more than 178,956,970 pixels: should have at most 16,000,000 in all.": file_bytes(
        Image.new("1", (14_000, 14_000))),
    "image has 4600x4600 pixels: should have at most 16,000,000 in all.": file_bytes(Image.new("1", (4600, 4600))),
    "image is a PNG whose colour profile or texts unpack to more than a megabyte: save it without them.": png_with(
        b"iCCP", b"x\0\0" + zlib.compress(bytes(3_000_000))),
    " image is a PNG whose colour profile or texts unpack to more than a megabyte: save it without them.": png_with(
        b"zTXt", b"x\0\0" + zlib.compress(bytes(900_000)), 100),
}


@pytest.mark.parametrize("sentence", LARGE)
def test_what_is_too_large_is_not_called_damaged(sentence):
    with pytest.raises(RequestError) as raised:
        read_picture(as_text(LARGE[sentence]), "image")
    assert str(raised.value) == sentence.strip()


def wrapped(text: str, width: int, between: str) -> str:
    return between.join(text[at:at + width] for at in range(0, len(text), width))


@pytest.mark.parametrize("length", range(400, 520))
def test_base64_without_a_plus_may_have_blanks_between(length):
    data = bytes([7]) * length
    text = base64.b64encode(data).decode()
    assert "+" not in text
    for spelling in (text, text.rstrip("=")):
        for width, between in ((76, " "), (76, "\n  "), (76, " \n"), (64, " "), (64, "\r\n"), (60, "   ")):
            assert decode_base64(wrapped(spelling, width, between), "image") == data, (width, between)
    once = f"{text[:200]} {text[200:]}"
    assert decode_base64(once, "image") == data, "its length says that the blank is none of the letters"


def test_a_forms_blanks_are_its_plus_signs():
    for seed in range(200):
        data = b"\x89PNG" + np.random.default_rng(seed).integers(0, 255, 600 + seed, np.uint8).tobytes() + b"\xffD\xae"
        text = base64.b64encode(data).decode()
        assert text.count("+") > 2 and decode_base64(text.replace("+", " "), "image") == data
        assert decode_base64(text.replace("+", " ").rstrip("="), "image") == data
        lines = wrapped(text, 76, "\n").replace("+", " ")
        assert decode_base64(lines, "image") == data


def test_only_the_escapes_of_base64_are_decoded():
    with pytest.raises(RequestError, match="is not base64"):
        decode_base64("%41" * 1000, "image")
    assert decode_base64("A\n" * 1_000_000, "image") == bytes(750_000)


JXL = b"\xff\x0a\xfa\x1f\x41\x91\x08\x06\x01\x00\x10\x00"
NAMED = {
    "a JPEG XL": [JXL, b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), b"\xff\x0a\x00\x10\xb0"],
    "an ICO": [file_bytes(SKY, "ICO")], "a PSD": [b"8BPS\0\1" + bytes(20)],
    "a JPEG 2000": [file_bytes(SKY, "JPEG2000"), file_bytes(SKY, "JPEG2000", no_jp2=True)],
    "a film": [b"\0\0\0\x18ftypmp42\0\0\0\0", b"\0\0\0\x14ftypqt  ", b"\x1a\x45\xdf\xa3" + bytes(9)],
    "an HTML page": [b"\xef\xbb\xbf<!DOCTYPE html>", b"<!-- made by x -->\n<html>", b"<!--a--><!--b--> <!doctype html"],
    "an SVG": [b"\xef\xbb\xbf<svg/>", b'<?xml version="1.0"?><!-- x --><svg xmlns="">',
               b"<?xml version='1.0'?><!DOCTYPE svg PUBLIC '-//W3C'><svg>"],
    "an XML file": [b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', b"\xef\xbb\xbf<?xml version='1.0'?><a/>"],
    "base64 that was encoded twice": [as_text(PHOTO).encode(), b"data:image/png;base64,iVBOR", as_text(
        file_bytes(PHOTO, "JPEG")).encode(), as_text(file_bytes(PHOTO, "WebP")).encode()],
}


@pytest.mark.parametrize("kind", NAMED)
def test_what_came_in_place_of_a_picture_is_named(kind):
    for content in NAMED[kind]:
        with pytest.raises(RequestError, match=rf"^image is {kind}: should be a PNG, JPEG or WebP\.$"):
            read_picture(as_text(content), "image")


def test_a_path_is_no_base64():
    for path in ("/workspace/x.png", "/workspace/inputs/photo", "/etc/passwd", "/wp-content/x.png", "/woods/x.jpg"):
        with pytest.raises(RequestError, match="is a path"):
            decode_base64(path, "image")


def test_data_uris_in_other_wrappings_are_read():
    content = file_bytes(PHOTO)
    text = as_text(content)
    uri = f"data:image/png;base64,{text}"
    escaped = uri.replace(":", "%3A").replace("/", "%2F").replace(";", "%3B").replace(",", "%2C").replace(
        "+", "%2B").replace("=", "%3D")
    for spelling in (escaped, escaped.replace("%3A", "%3a").replace("%2F", "%2f"), f"\ufeff{text}",
                     f"\u200b{uri}", f'"{uri}"', f"'{text}'", f"b'{text}'", f'b"{text}"', f'"{text}"\n',
                     uri.removeprefix("data:"), f"IMAGE/PNG;BASE64,{text}", f"image/svg+xml;base64,{text}",
                     f"data:image/png;name=a.png;base64,{text}", f"data:,{text}"):
        assert decode_base64(spelling, "image") == content, spelling[:40]


def test_no_warning_of_a_parser_reaches_the_log():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for content in (jpeg_with(0xE2, b"MPF\0II*\0" + bytes(40)), jpeg_with(0xE1, b"Exif\0\0II*\0" + bytes(40))):
            assert read_picture(as_text(content), "image")[0].size == (64, 64)
    assert json.dumps(read_picture(as_text(jpeg_with(0xE2, b"MPF\0II*\0" + bytes(40))), "image")[2])
