"""Picture files of every kind give the picture that was drawn, within a grey level, or are refused by name."""

import io
import itertools
import math
import struct
import zlib

import numpy as np
import pytest

from minilora.data import Refused
from minilora.pictures import read_picture

Image = pytest.importorskip("PIL.Image", reason="Pillow is in the pictures extra")
from PIL import TiffImagePlugin  # noqa: E402

GREY = np.add.outer(np.arange(11) * 9, np.arange(17) * 7).astype(np.uint8)  # a ramp with a square, so that turns and flips show
GREY[1:4, 1:6] = 255
COLOUR = np.stack([GREY, 255 - GREY, np.roll(GREY, 5, 1)], 2)
TURN = {1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.swapaxes(0, 1),
        6: lambda a: np.rot90(a, 1), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1), 8: lambda a: np.rot90(a, -1)}  # what is stored for each orientation


def luma(colour):
    return np.rint(np.asarray(colour, float) @ [0.299, 0.587, 0.114])


def over(grey, alpha):
    return np.rint(np.asarray(grey, float) * alpha)


# ------------------------------------------------------------------------------------- TIFF, PNG and JPEG files, by hand


def packed(samples, bits, order=">"):
    """Rows of samples [H,W] as a file stores them."""
    if bits >= 8:
        return [row.astype(f"{order}u{bits // 8}").tobytes() for row in samples]
    ones = np.unpackbits(samples.astype(np.uint8)[..., None], axis=2)[..., 8 - bits :]  # [H,W,bits]
    return [np.packbits(row).tobytes() for row in ones]


def tiff(samples, bits, photometric, order="<", sample_format=1, orientation=1, planar=1, alpha=(), deflate=False, big=False, tags=()):
    """A TIFF file of samples [H,W] or [H,W,C]; of numbers that are no plain integers, of their own bytes."""
    high, wide, *channels = samples.shape
    count = channels[0] if channels else 1
    planes = [samples.reshape(high, -1)] if planar == 1 else list(np.moveaxis(samples, 2, 0))
    plain = samples.dtype.kind == "u" and sample_format == 1
    strips = [b"".join(packed(p, bits, order)) if plain else np.ascontiguousarray(p).astype(p.dtype.newbyteorder(order)).tobytes() for p in planes]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    starts = np.cumsum([16, *map(len, strips)]).tolist()
    entries = {256: [wide], 257: [high], 258: [bits] * count, 259: [8 if deflate else 1], 262: [photometric], 273: starts[:-1], 274: [orientation], 277: [count],
               278: [high], 279: [*map(len, strips)], 284: [planar], 338: list(alpha), 339: [sample_format] * count, **dict(tags)}  # fmt: skip
    entries = {tag: entries[tag] for tag in sorted(entries) if entries[tag] and entries[tag] != [None]}
    width, room, head = ("Q", 8, "HHQ") if big else ("I", 4, "HHI")
    after = starts[-1] + (8 + 20 * len(entries) + 8 if big else 2 + 12 * len(entries) + 4)
    directory, rest = struct.pack(order + ("Q" if big else "H"), len(entries)), b""
    for tag, values in entries.items():
        letter = "I" if tag in (273, 279) else "H"
        content = struct.pack(order + letter * len(values), *values)
        if len(content) > room:
            content, rest = struct.pack(order + width, after + len(rest)), rest + content
        directory += struct.pack(order + head, tag, 4 if letter == "I" else 3, len(values)) + content.ljust(room, b"\0")
    start = struct.pack(order + "HHHQ", 43, 8, 0, starts[-1]) if big else struct.pack(order + "HI", 42, starts[-1])
    return {"<": b"II", ">": b"MM"}[order] + start.ljust(14, b"\0") + b"".join(strips) + directory + bytes(room) + rest


def chunk(name, content):
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(samples, bits, kind, *chunks):
    high, wide = samples.shape[:2]
    rows = b"".join(b"\0" + row for row in packed(samples.reshape(high, -1), bits))
    header = struct.pack(">IIBBBBB", wide, high, bits, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def exif(orientation):
    return b"MM" + struct.pack(">HIHHHIHHI", 42, 8, 1, 274, 3, 1, orientation, 0, 0)


def jpeg(samples, mode, marker=None, **options):
    """A JPEG file of samples; marker: the transform that its Adobe marker states, or no such marker."""
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(samples), mode).save(content, "JPEG", quality=100, subsampling=0, **options)
    content = content.getvalue()
    place = content.find(b"\xff\xee\x00\x0eAdobe")
    if place >= 0:  # of colours in inks
        adobe = b"" if marker is None else content[place : place + 15] + bytes([marker])
        content = content[:place] + adobe + content[place + 16 :]
    return content


def levels(bits):
    """(samples of so many bits, the grey levels that they stand for)."""
    samples = np.rint(GREY / 255 * (2**bits - 1)).astype(np.uint32)
    return samples, np.rint(samples * (255 / (2**bits - 1)))


def picture_files():
    """{name: (suffix, content, wanted grey or colour)}."""
    files = {}
    for order, bits in itertools.product("<>", (1, 2, 4, 8, 16)):
        samples, wanted = levels(bits)
        files[f"tiff {bits} bits {order} black is zero"] = ".tif", tiff(samples, bits, 1, order), wanted
        files[f"tiff {bits} bits {order} white is zero"] = ".tif", tiff(2**bits - 1 - samples, bits, 0, order), wanted
        files[f"tiff {bits} bits {order} white is zero, deflated"] = ".tif", tiff(2**bits - 1 - samples, bits, 0, order, deflate=True), wanted
        if order == "<":
            files[f"tiff {bits} bits white is zero, big"] = ".tif", tiff(2**bits - 1 - samples, bits, 0, big=True), wanted
        if bits == 16:
            files[f"tiff rgb 16 {order}"] = ".tif", tiff(COLOUR.astype(np.uint32) * 257, 16, 2, order), COLOUR
            files[f"tiff rgb 16 {order} deflated"] = ".tif", tiff(COLOUR.astype(np.uint32) * 257, 16, 2, order, deflate=True), COLOUR
    for order in "<>":
        real = (GREY / 100 - 1).astype(np.float32)
        hole = real.copy()
        hole[5:7] = np.nan
        black = np.where(np.isnan(hole), 0, GREY)
        files[f"tiff float {order} white is zero"] = ".tif", tiff(-real, 32, 0, order, 3), GREY
        files[f"tiff float {order} with holes"] = ".tif", tiff(hole, 32, 1, order, 3), black
        files[f"tiff float {order} white is zero, with holes"] = ".tif", tiff(-hole, 32, 0, order, 3), black
        files[f"tiff signed 8 {order}"] = ".tif", tiff((GREY.astype(int) - 128).astype(np.int8), 8, 1, order, 2), GREY
        for deflate in (False, True):
            files[f"tiff signed 16 {order} {deflate}"] = ".tif", tiff((GREY.astype(np.int16) - 128) * 200, 16, 1, order, 2, deflate=deflate), GREY
            files[f"tiff signed 32 {order} {deflate}"] = ".tif", tiff((GREY.astype(np.int32) - 128) * 2**23, 32, 1, order, 2, deflate=deflate), GREY
            files[f"tiff float {order} {deflate}"] = ".tif", tiff(real, 32, 1, order, 3, deflate=deflate), GREY
        files[f"tiff rgb 8 {order} in planes"] = ".tif", tiff(COLOUR, 8, 2, order, planar=2), COLOUR
        grey_alpha = np.stack([GREY, np.where(GREY > 200, 0, 255).astype(np.uint8)], 2)
        files[f"tiff grey and alpha {order}"] = ".tif", tiff(grey_alpha, 8, 1, order, alpha=[2]), np.where(GREY > 200, 0, GREY)
        multiplied = np.stack([GREY // 2, np.full_like(GREY, 128)], 2)
        if "La" in dict(TiffImagePlugin.OPEN_INFO.values()):  # not in every version of Pillow
            files[f"tiff grey multiplied with alpha {order}"] = ".tif", tiff(multiplied, 8, 1, order, alpha=[1]), GREY // 2
    files["tiff 32 bits"] = ".tif", tiff(GREY.astype(np.uint32) * (2**24 + 1), 32, 1), GREY
    files["tiff 32 bits, deflated"] = ".tif", tiff(GREY.astype(np.uint32) * (2**24 + 1), 32, 1, deflate=True), GREY
    lab = np.stack([GREY, np.zeros_like(GREY), np.zeros_like(GREY)], 2)
    lightness = GREY / 2.55  # CIE: L to luminance, then by the curve of sRGB
    luminance = np.where(lightness > 8, ((lightness + 16) / 116) ** 3, lightness / 903.3)
    srgb = np.where(luminance > 0.0031308, 1.055 * luminance ** (1 / 2.4) - 0.055, 12.92 * luminance)
    files["tiff lab"] = ".tif", tiff(lab, 8, 8), np.repeat(np.rint(255 * srgb)[..., None], 3, 2)
    inks = np.stack([255 - COLOUR[..., i] for i in range(3)] + [np.full_like(GREY, 51)], 2)
    files["tiff cmyk"] = ".tif", tiff(inks, 8, 5), np.rint(COLOUR * 0.8)
    for orientation, turn in TURN.items():
        files[f"tiff orientation {orientation}"] = ".tif", tiff(turn(GREY), 8, 1, orientation=orientation), GREY
        deep = turn(GREY.astype(np.uint32) * 257)
        files[f"tiff 16 bits orientation {orientation}"] = ".tif", tiff(deep, 16, 1, ">", orientation=orientation), GREY
        files[f"tiff colour orientation {orientation}"] = ".tif", tiff(turn(COLOUR), 8, 2, orientation=orientation, deflate=True), COLOUR
        files[f"png orientation {orientation}"] = ".png", png(turn(GREY), 8, 0, chunk(b"eXIf", exif(orientation))), GREY
        blocks = np.kron(turn(GREY[:3, :2]), np.ones((8, 8), np.uint8))
        files[f"jpeg orientation {orientation}"] = ".jpg", jpeg(blocks, "L", exif=b"Exif\0\0" + exif(orientation)), np.kron(GREY[:3, :2], np.ones((8, 8)))
    for bits in (1, 2, 4, 8, 16):
        samples, wanted = levels(bits)
        key = int(samples[8, 8])
        files[f"png {bits} bits"] = ".png", png(samples, bits, 0), wanted
        files[f"png {bits} bits, one not seen"] = ".png", png(samples, bits, 0, chunk(b"tRNS", struct.pack(">H", key))), np.where(samples == key, 0, wanted)
    low = GREY.astype(np.uint32) * 16 + 900  # 12 bits in 16
    files["png 12 bits in 16"] = ".png", png(low, 16, 0), GREY
    for name, alpha in (("opaque", np.ones(GREY.shape)), ("half", np.full(GREY.shape, 0.5)), ("hole", GREY < 200)):
        deep_alpha = np.rint(alpha * 65535).astype(np.uint32)
        visible = low[alpha > 0]
        wanted = over((low - 900.0) * 255 / (visible.max() - 900), alpha)
        files[f"png grey and alpha 16, {name}"] = ".png", png(np.stack([low, deep_alpha], 2), 16, 4), wanted
        files[f"png grey and alpha 8, {name}"] = ".png", png(np.stack([GREY, deep_alpha // 257], 2), 8, 4), over(GREY, alpha)
        files[f"png rgba 16, {name}"] = ".png", png(np.dstack([COLOUR.astype(np.uint32) * 257, deep_alpha]), 16, 6), over(COLOUR, np.asarray(alpha)[..., None])
    deep = COLOUR.astype(np.uint32) * 257
    files["png rgb 16"] = ".png", png(deep, 16, 2), COLOUR
    deep = COLOUR.astype(np.uint32) * 256 + 77
    files["png rgb 16, one not seen"] = ".png", png(deep, 16, 2, chunk(b"tRNS", struct.pack(">3H", *deep[8, 8]))), np.where((COLOUR == COLOUR[8, 8]).all(2)[..., None], 0, COLOUR)
    palette = np.stack([np.arange(256), 255 - np.arange(256), np.arange(256) // 2], 1).astype(np.uint8)
    alphas = np.where(np.arange(256) % 3, 255, 128)
    plte = chunk(b"PLTE", palette.tobytes())
    files["png palette"] = ".png", png(GREY, 8, 3, plte), palette[GREY]
    files["png palette with alphas"] = ".png", png(GREY, 8, 3, plte, chunk(b"tRNS", alphas.astype(np.uint8).tobytes())), over(palette[GREY], alphas[GREY][..., None] / 255)
    blocks = np.kron(COLOUR[:3, :4], np.ones((8, 8, 1), np.uint8))
    black = np.full(blocks.shape[:2], 204, np.uint8)  # inverted: the share of light that is left
    wanted = np.rint(blocks * 0.8)
    files["jpeg cmyk of Adobe"] = ".jpg", jpeg(255 - np.dstack([blocks, black]), "CMYK", 0), wanted
    files["jpeg cmyk of others"] = ".jpg", jpeg(np.dstack([blocks, black]), "CMYK"), wanted
    red, green, blue = np.moveaxis(255.0 - blocks, 2, 0)  # YCCK: the inks, which are inverted, as luma and chroma
    luma_of = 0.299 * red + 0.587 * green + 0.114 * blue
    ycc = [np.rint(plane) for plane in (luma_of, 128 + (blue - luma_of) / 1.772, 128 + (red - luma_of) / 1.402)]
    files["jpeg ycck"] = ".jpg", jpeg((255 - np.dstack([*ycc, black])).astype(np.uint8), "CMYK", 2), wanted
    return files


FILES = picture_files()
LOSSY = 3  # grey levels, for JPEG files of colour


@pytest.mark.parametrize("name", FILES)
def test_a_picture_file_gives_what_was_drawn(name, tmp_path):
    suffix, content, wanted = FILES[name]
    path = tmp_path / f"p{suffix}"
    path.write_bytes(content)
    colour = wanted.ndim == 3
    found = read_picture(path, colour)
    assert found.dtype == np.uint8 and found.shape == wanted.shape
    assert abs(found - wanted.astype(float)).max() <= (LOSSY if "jpeg" in name and colour else 1)
    if colour:
        assert abs(read_picture(path) - luma(wanted)).max() <= (LOSSY if "jpeg" in name else 1)
    else:
        np.testing.assert_array_equal(read_picture(path, rgb=True), np.repeat(found[..., None], 3, 2))


def refused_files():
    """{name: (content, what the refusal says)}."""
    two = np.stack([GREY, GREY], 2)
    deep = COLOUR.astype(np.uint32) * 257
    return {
        "16 bits in planes": (tiff(deep, 16, 2, planar=2), "16-bit RGB in separate planes"),
        "grey and alpha in planes": (tiff(two, 8, 1, planar=2, alpha=[2], deflate=True), "8-bit LA in separate planes"),
        "no photometric interpretation": (tiff(GREY, 8, None), "does not say whether zero is black"),
        "white is zero with alpha": (tiff(two, 8, 0, alpha=[2]), "white is zero in LA"),
        "rgb of floats": (tiff(COLOUR / np.float32(255), 32, 2, sample_format=3), "damaged, or no .tif that Pillow reads"),
        "64-bit float": (tiff(GREY / 7.0, 64, 1, sample_format=3), "damaged, or no .tif that Pillow reads"),
        "big file, big-endian": (tiff(GREY, 8, 1, ">", big=True), "damaged, or no .tif that Pillow reads"),
        "cut": (tiff(GREY, 8, 1)[:100], "not a readable picture"),
        "cut directory": (tiff(GREY, 8, 0)[:-100], "not a readable picture"),
    }


@pytest.mark.parametrize("name", refused_files())
def test_what_would_be_read_wrong_is_refused(name, tmp_path):
    content, reason = refused_files()[name]
    (tmp_path / "p.tif").write_bytes(content)
    with pytest.raises(Refused, match=f"p.tif: not a readable picture .*{reason}" if reason != "not a readable picture" else reason):
        read_picture(tmp_path / "p.tif")


# ------------------------------------------------------------------------------------------------------------------ DICOM

# Each option changes how the same drawing is stored; options of one group exclude each other.
OPTIONS = {
    "signed": ("sign", dict(signed=True)),
    "8 bits": ("bits", dict(bits=8, allocated=8)),
    "16 bits": ("bits", dict(bits=16)),
    "high bit 14": ("bits", dict(high=14)),
    "slope -2": ("rescale", dict(slope=-2, intercept=300)),
    "slope 0.25": ("rescale", dict(slope=0.25, intercept=-1024)),
    "modality table": ("rescale", dict(modality=True)),
    "window": ("window", dict(function="LINEAR")),
    "exact window": ("window", dict(function="LINEAR_EXACT")),
    "sigmoid": ("window", dict(function="SIGMOID")),
    "narrowest window": ("window", dict(function="LINEAR", narrow=True)),
    "window table": ("window", dict(table="OW")),
    "window table of numbers": ("window", dict(table="US")),
    "MONOCHROME1": ("shape", dict(kind="MONOCHROME1")),
    "MONOCHROME1, INVERSE": ("shape", dict(kind="MONOCHROME1", shape="INVERSE")),
    "MONOCHROME1, IDENTITY": ("shape", dict(kind="MONOCHROME1", shape="IDENTITY")),
    "MONOCHROME2, INVERSE": ("shape", dict(shape="INVERSE")),
    "padding": ("padding", dict(padding=(0, None))),
    "padding up to": ("padding", dict(padding=(0, 9))),
    "padding down to": ("padding", dict(padding=(9, 0))),
    "implicit": ("syntax", dict(syntax="ImplicitVRLittleEndian")),
    "big-endian": ("syntax", dict(syntax="ExplicitVRBigEndian")),
    "deflated": ("syntax", dict(syntax="DeflatedExplicitVRLittleEndian")),
    "run lengths": ("syntax", dict(syntax="RLELossless")),
    "no preamble": ("syntax", dict(preamble=False)),
    "no header": ("syntax", dict(preamble=False, header=False)),
    "no header, implicit": ("syntax", dict(preamble=False, header=False, syntax="ImplicitVRLittleEndian")),
    "no header, big-endian": ("syntax", dict(preamble=False, header=False, syntax="ExplicitVRBigEndian")),
}
PAIRS = [pair for pair in itertools.combinations(OPTIONS, 2) if OPTIONS[pair[0]][0] != OPTIONS[pair[1]][0]]


def level(x, function, center, width):
    """PS3.3 C.11.2.1.2 and C.11.2.1.3 for one number, in 0..1."""
    if function == "SIGMOID":
        return 1 / (1 + math.exp(-4 * (x - center) / width))
    if function == "LINEAR":
        if x <= center - 0.5 - (width - 1) / 2:
            return 0
        if x > center - 0.5 + (width - 1) / 2:
            return 1
        return (x - (center - 0.5)) / (width - 1) + 0.5
    if x <= center - width / 2:
        return 0
    if x > center + width / 2:
        return 1
    return (x - center) / width + 0.5


def lookup(item, length, first, bits, entries, how, order):
    """A lookup table of a sequence, as words in bytes or as numbers."""
    item.add_new(0x00283002, "SS" if first < 0 else "US", [length, first, bits])
    item.add_new(0x00283006, how, entries.astype(f"{order}u2").tobytes() if how == "OW" else entries.tolist())
    return item


def dicom(path, signed=False, bits=12, allocated=16, high=None, slope=None, intercept=None, modality=False, function=None, narrow=False, table=None, kind="MONOCHROME2",
          shape=None, padding=None, syntax="ExplicitVRLittleEndian", preamble=True, header=True):  # fmt: skip
    """Write a DICOM file of GREY by these options; returns the wanted picture."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    order = ">" if "Big" in syntax else "<"
    file = pydicom.Dataset()
    lowest = -(2 ** (bits - 1)) if signed else 0
    stored = lowest + 20 + np.rint(GREY / 255.0 * (2**bits - 60)).astype(np.int64)
    hidden = np.zeros(GREY.shape, bool)
    if padding:
        limit = padding[0] if padding[1] is None else padding[1]
        hidden[5:7] = True
        stored[5], stored[6] = lowest + padding[0], lowest + limit
        stored[6, ::2] = lowest + (padding[0] + limit) // 2
        file.add_new(0x00280120, "SS" if signed else "US", int(lowest + padding[0]))
        if padding[1] is not None:
            file.add_new(0x00280121, "SS" if signed else "US", int(lowest + limit))
    values = stored.astype(float)
    if slope:
        file.RescaleSlope, file.RescaleIntercept = str(slope), str(intercept)
        values = values * slope + intercept
    if modality:
        entries = (np.arange(200) * 321) % 50000
        item = lookup(pydicom.Dataset(), 200, lowest + 25, 16, entries, "OW", order)
        file.ModalityLUTSequence = [item]
        values = entries[np.clip(stored - lowest - 25, 0, 199)].astype(float)
    if function:
        center, width = float(values.mean()) // 1, 1 if narrow else float(np.ptp(values)) * 0.6 // 1
        file.WindowCenter, file.WindowWidth = [str(center), "3"], [str(width), "5"]
        if function != "LINEAR":
            file.VOILUTFunction = function
        shares = np.array([level(x, function, center, width) for x in values.ravel()]).reshape(values.shape)
    elif table:
        first, entries = int(values.min()) + 50, np.arange(100) ** 2 // 4
        file.VOILUTSequence = [lookup(pydicom.Dataset(), 100, first, 12, entries, table, order)]
        file.WindowCenter, file.WindowWidth = "7", "7"  # the table goes first
        shares = entries[np.clip(np.rint(values) - first, 0, 99).astype(int)] / 4095
    else:
        visible = values[~hidden]
        shares = (values - visible.min()) / np.ptp(visible)
    wanted = np.rint(np.clip(shares, 0, 1) * 255)
    if kind == "MONOCHROME1" or shape == "INVERSE":
        wanted = 255 - wanted
    wanted[hidden] = 0
    if shape:
        file.PresentationLUTShape = shape
    file.Rows, file.Columns = GREY.shape
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, kind, int(signed)
    file.BitsAllocated, file.BitsStored = allocated, bits
    file.HighBit = high = bits - 1 if high is None else high
    words = (stored % 2**bits) << (high + 1 - bits)
    if bits < allocated:  # what else stands in the words, as old overlays do
        junk = np.random.default_rng(0).integers(0, 2**allocated, words.shape)
        words |= junk & ~((2**bits - 1) << (high + 1 - bits))
    words = words.astype(f"{order}u{allocated // 8}")
    write_dicom(file, path, words, syntax, preamble, header)
    return wanted


def write_dicom(file, path, words, syntax="ExplicitVRLittleEndian", preamble=True, header=True):
    import pydicom

    file.SOPClassUID, file.SOPInstanceUID = pydicom.uid.SecondaryCaptureImageStorage, "1.2.3"
    file.add_new(0x7FE00010, "OB" if words.dtype.itemsize == 1 and "Implicit" not in syntax else "OW", words.tobytes() + bytes(words.nbytes % 2))
    encoding = dict(implicit_vr="Implicit" in syntax, little_endian="Big" not in syntax)
    if not header:
        return file.save_as(path, enforce_file_format=False, **encoding)
    file.file_meta = pydicom.dataset.FileMetaDataset()
    file.file_meta.TransferSyntaxUID = getattr(pydicom.uid, syntax)
    file.file_meta.MediaStorageSOPClassUID, file.file_meta.MediaStorageSOPInstanceUID = file.SOPClassUID, file.SOPInstanceUID
    if syntax == "RLELossless":
        segments = []  # the high bytes, then the low ones, in runs of up to 128 that repeat nothing
        for plane in reversed(words.view(np.uint8).reshape(*words.shape, -1).transpose(2, 0, 1)):
            runs = b"".join(bytes([len(row) - 1]) + row.tobytes() for row in plane)
            segments.append(runs + bytes(len(runs) % 2))
        starts = np.cumsum([64, *map(len, segments)])[: len(segments)].tolist()
        head = struct.pack("<16I", len(segments), *starts, *[0] * (15 - len(segments)))
        file.PixelData = pydicom.encaps.encapsulate([head + b"".join(segments)])
        file["PixelData"].is_undefined_length = True
    if preamble:
        return file.save_as(path, enforce_file_format=True)
    file.save_as(path, enforce_file_format=True)
    path.write_bytes(path.read_bytes()[132:])


@pytest.mark.parametrize("options", [*[(name,) for name in OPTIONS], *PAIRS], ids=" + ".join)
def test_a_dicom_file_gives_what_the_standard_declares(options, tmp_path):
    chosen = {}
    for name in options:
        chosen |= OPTIONS[name][1]
    path = tmp_path / "picture"  # no suffix says what it is
    wanted = dicom(path, **chosen)
    found = read_picture(path)
    assert found.dtype == np.uint8 and found.shape == wanted.shape
    assert abs(found - wanted).max() <= 1
    assert found.max() > 60  # no black picture agrees with the wanted one


def colour_dicom(path, samples, kind, bits=8, allocated=8, planar=0, palette=None, **tags):
    """A DICOM file of colour samples [H,W,3], [H,W*2] of 4:2:2, or indices [H,W] into a palette (first, bits, 8 or 16 in a word, [N,3])."""
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    file = pydicom.Dataset()
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = *GREY.shape, 1 if palette else 3, kind
    file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = allocated, bits, bits - 1, 0
    if not palette:
        file.PlanarConfiguration = planar
    else:
        first, depth, width, colours = palette
        for i, name in enumerate(("Red", "Green", "Blue")):
            setattr(file, f"{name}PaletteColorLookupTableDescriptor", [len(colours), first, depth])
            setattr(file, f"{name}PaletteColorLookupTableData", colours[:, i].astype(f"<u{width // 8}").tobytes())
    for name, value in tags.items():
        setattr(file, name, value)
    write_dicom(file, path, samples.astype(f"<u{allocated // 8}"))


def colour_dicoms():
    """{name: (arguments, wanted colours)}."""
    r, g, b = np.moveaxis(COLOUR.astype(float), 2, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    ybr = np.rint(np.dstack([y, 128 + (b - y) / 1.772, 128 + (r - y) / 1.402])).astype(int)
    colours = np.stack([np.arange(300) % 256, 255 - np.arange(300) % 256, np.arange(300) // 2], 1)
    indices = GREY.astype(int) + 44
    return {
        "rgb": (dict(samples=COLOUR, kind="RGB"), COLOUR),
        "rgb in planes": (dict(samples=np.moveaxis(COLOUR, 2, 0), kind="RGB", planar=1), COLOUR),
        "rgb of 12 bits": (dict(samples=np.rint(COLOUR * (4095 / 255)), kind="RGB", bits=12, allocated=16), COLOUR),
        "rgb of 16 bits, dark": (dict(samples=COLOUR.astype(int) * 128, kind="RGB", bits=16, allocated=16), np.rint(COLOUR * (128 / 257))),
        "ybr": (dict(samples=ybr, kind="YBR_FULL"), COLOUR),
        "ybr in planes": (dict(samples=np.moveaxis(ybr, 2, 0), kind="YBR_FULL", planar=1), COLOUR),
        "palette of bytes": (dict(samples=indices, kind="PALETTE COLOR", bits=16, allocated=16, palette=(0, 8, 8, colours)), colours[indices]),
        "palette of bytes in words": (dict(samples=indices, kind="PALETTE COLOR", bits=16, allocated=16, palette=(0, 8, 16, colours)), colours[indices]),
        "palette of bytes that states 16 bits": (dict(samples=GREY, kind="PALETTE COLOR", palette=(0, 16, 8, colours[:256])), colours[GREY]),
        "palette of words": (dict(samples=GREY, kind="PALETTE COLOR", palette=(20, 16, 16, colours * 257)), colours[np.maximum(GREY.astype(int) - 20, 0)]),
    }


@pytest.mark.parametrize("name", colour_dicoms())
def test_colours_of_dicom_files(name, tmp_path):
    arguments, wanted = colour_dicoms()[name]
    colour_dicom(tmp_path / "p.dcm", **arguments)
    tolerance = 2 if "ybr" in name else 1  # a grey level of luma or chroma is up to two of blue
    assert abs(read_picture(tmp_path / "p.dcm", rgb=True) - wanted.astype(float)).max() <= tolerance
    assert abs(read_picture(tmp_path / "p.dcm") - luma(wanted)).max() <= tolerance


def test_an_enhanced_file_of_one_frame_has_its_window(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    group, rescale, window = pydicom.Dataset(), pydicom.Dataset(), pydicom.Dataset()
    rescale.RescaleSlope, rescale.RescaleIntercept = "2", "-100"
    window.WindowCenter, window.WindowWidth = "100", "101"
    group.PixelValueTransformationSequence, group.FrameVOILUTSequence = [rescale], [window]
    shared, per_frame = pydicom.Dataset(), pydicom.Dataset()
    shared.PixelValueTransformationSequence, per_frame.FrameVOILUTSequence = [rescale], [window]
    wanted = np.rint(np.clip((GREY * 2.0 - 100 - 99.5) / 100 + 0.5, 0, 1) * 255)
    for tags in (dict(SharedFunctionalGroupsSequence=[group]), dict(SharedFunctionalGroupsSequence=[shared], PerFrameFunctionalGroupsSequence=[per_frame])):
        file = pydicom.Dataset()
        file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation, file.NumberOfFrames = *GREY.shape, 1, "MONOCHROME2", 1
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 8, 8, 7, 0
        for name, value in tags.items():
            setattr(file, name, value)
        write_dicom(file, tmp_path / "p.dcm", GREY)
        assert abs(read_picture(tmp_path / "p.dcm") - wanted).max() <= 1


def test_floats_and_their_padding(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    file = pydicom.Dataset()
    file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation, file.BitsAllocated = *GREY.shape, 1, "MONOCHROME2", 32
    values = GREY / np.float32(100)
    values[5:7] = -1e6
    file.FloatPixelPaddingValue = -1e6
    file.FloatPixelData = values.astype("<f4").tobytes()
    write_dicom(file, tmp_path / "p", GREY)
    file = pydicom.dcmread(tmp_path / "p")
    del file.PixelData
    file.save_as(tmp_path / "p")
    assert abs(read_picture(tmp_path / "p") - np.where(values < 0, 0, GREY).astype(float)).max() <= 1


def test_padding_that_the_stored_bits_cannot_hold(tmp_path):
    pydicom = pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    for signed, bits, padding, word in ((0, 12, 63536, 63536), (1, 16, 63536, -2000), (1, 12, -2000, -2000)):
        file = pydicom.Dataset()
        file.Rows, file.Columns, file.SamplesPerPixel, file.PhotometricInterpretation = *GREY.shape, 1, "MONOCHROME1"
        file.BitsAllocated, file.BitsStored, file.HighBit, file.PixelRepresentation = 16, bits, bits - 1, signed
        file.add_new(0x00280120, "US" if padding > 0 else "SS", padding)
        words = GREY.astype(int) * 4
        words[5:8] = word
        write_dicom(file, tmp_path / "p", (words % 2**16).astype("<u2"))
        wanted = 255 - GREY.astype(int)
        wanted[5:8] = 0
        assert abs(read_picture(tmp_path / "p") - wanted).max() <= 1


REFUSED = {
    "LINEAR of width 0.5": dict(WindowCenter="1", WindowWidth="0.5"),
    "LINEAR_EXACT of width 0": dict(WindowCenter="1", WindowWidth="0", VOILUTFunction="LINEAR_EXACT"),
    "CUBIC of width 9": dict(WindowCenter="1", WindowWidth="9", VOILUTFunction="CUBIC"),
    "presentation LUT; read are the shapes IDENTITY and INVERSE": dict(PresentationLUTShape="LIN OD"),
    "HighBit is 5; must be in 7..7": dict(HighBit=5),
    "YBR_PARTIAL_422; read are MONOCHROME1": dict(PhotometricInterpretation="YBR_PARTIAL_422"),
    "no DICOM, or one without a picture": dict(Rows=0),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_dicom_files_that_say_nothing_sensible_are_refused(reason, tmp_path):
    colour_dicom(tmp_path / "p.dcm", GREY, "MONOCHROME2", palette=(0, 8, 8, np.zeros((2, 3))), **REFUSED[reason])
    with pytest.raises(Refused, match=f"p.dcm: not a readable DICOM file .*{reason}"):
        read_picture(tmp_path / "p.dcm")


def test_what_only_looks_like_dicom_is_refused_in_a_clean_line(tmp_path):
    pytest.importorskip("pydicom", reason="pydicom is in the dicom extra")
    for name, content in (("text.dcm", b"not a picture " * 40), ("short.dcm", b"x"), ("none.dcm", b""), ("noise", b"\x08\0\x05\0CS" + bytes(range(256)) * 3), ("meta.dicom", b"\x02\0\0\0UL\4\0" + b"\xff" * 300)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=f"{name}: not a readable DICOM file"):
            read_picture(tmp_path / name)
    (tmp_path / "png.dcm").write_bytes(png(GREY, 8, 0))
    with pytest.raises(Refused, match="png.dcm: not a readable DICOM file"):
        read_picture(tmp_path / "png.dcm")
    tga = tmp_path / "p.tga"  # its first byte counts the letters that follow its header
    Image.fromarray(GREY).save(tga, id_section=b"eight of")
    assert tga.read_bytes()[:4] == b"\x08\0\3\0"
    np.testing.assert_array_equal(read_picture(tga), GREY)
