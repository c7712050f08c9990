"""Picture files as arrays: by Pillow (`pictures` extra), DICOM files by pydicom (`dicom` extra).

The bit depth and the photometric interpretation that a file states decide what is read, not the
mode that a library opens it in: what a library would read wrong is put right here, or refused with
the reason. Skip this file when you read for the methods.
"""

import io
import os
import re
import struct
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from minilora import data
from minilora.data import Refused

MOST_PIXELS = 2**30 // 12  # Pillow's limit, for DICOM files too
PNG = b"\x89PNG\r\n\x1a\n"
# The first element of a DICOM file without its preamble: group 2 or 8, then a value
# representation or the length of a short value; or the same in big-endian order.
PLAIN_DICOM = re.compile(rb"[\2\10]\0.\0([A-Z]{2}|(?!\0\0)..\0\0)|\0[\2\10]\0.[A-Z]{2}", re.DOTALL)
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT")  # pydicom gives RGB of each


def read_picture(path, rgb=False):
    """uint8 [H,W], or [H,W,3] with rgb, of one picture file; an .npy array as it is stored.
    `Refused` says why not.

    Palettes and colour become grey by ITU-R 601, alpha lies over black, EXIF rotation is applied.
    Grey of more than 8 bits is stretched from the picture's lowest to its highest visible value; a
    DICOM file's by its rescale and its window. Pillow's limit against decompression bombs (89
    megapixels) stays on."""
    path = Path(path)
    if not path.is_file():
        raise Refused(f"{path}: no such file")
    kind = "picture"
    try:
        with open(path, "rb") as f:
            start = f.read(132)
        suffix = path.suffix.lower()
        if start[128:] == b"DICM" or suffix in (".dcm", ".dicom") or PLAIN_DICOM.match(start):
            kind = "DICOM file"
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("an archive, not an array")
            return array
        picture = _dicom(path) if kind == "DICOM file" else _pillow(path, rgb)
        return _channels(picture, rgb)
    except ImportError as error:
        library = (error.name or "").split(".")[0]
        extra = {"PIL": "pictures", "pydicom": "studies"}.get(library)
        if extra is None:
            raise Refused(f"{path}: not readable ({error})") from None
        raise Refused(f"{path}: reading it needs {library}: "
                      f"pip install 'minilora[{extra}]'") from None
    except Refused:
        raise
    except Exception as error:  # the libraries raise many types for a file that is no picture
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise Refused(f"{path}: not a readable {kind} ({reason})") from None


# ---------------------------------------------------------------------------------------- pictures


def _pillow(path, rgb):
    """uint8 [H,W], or [H,W,3] of colour pictures with rgb, of a file that Pillow reads."""
    from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

    warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
    content = bytearray(path.read_bytes())
    white_is_zero = _white_is_zero(content)
    grey_alpha = _grey_alpha_16(content)
    try:
        picture = Image.open(io.BytesIO(content))
    except UnidentifiedImageError:
        raise ValueError(f"damaged, or no {path.suffix or 'picture'} that Pillow reads") from None
    # A phone's JPEG (MPO) carries a preview as its second frame.
    if getattr(picture, "n_frames", 1) > 1 and picture.format != "MPO":
        raise Refused(f"{path}: has {picture.n_frames} frames; need one")
    dtype = _tiff_dtype(picture) if picture.format == "TIFF" else None
    key = picture.info.get("transparency")  # the level or colour that is not seen, or many alphas
    if picture.format == "PNG" and picture.mode in ("1", "L", "RGB") and key is not None:
        key = picture.info["transparency"] = _in_8_bits(key, content[24])
    plain_inks = picture.mode == "CMYK" and picture.format == "JPEG" and "adobe" not in picture.info
    picture = ImageOps.exif_transpose(picture)
    values = np.asarray(picture)
    if grey_alpha:
        words = values.view(">u2")  # [H,W,2]
        return _over_black(words[..., 0], words[..., 1] / 65535)
    if picture.mode.startswith(("I", "F")) or dtype is np.int8:
        values = values.view(dtype or values.dtype).astype(np.float64)
        return _over_black(-values if white_is_zero else values, values != key)
    if white_is_zero:
        if picture.mode not in ("1", "L"):
            raise ValueError(f"white is zero in {picture.mode}; this is read of grey alone")
        return 255 - np.asarray(picture.convert("L"))
    if picture.mode == "La":
        return values[..., 0]  # its grey is multiplied with its alpha: it lies over black
    if plain_inks:
        # Pillow takes the inks of every JPEG for inverted, and only Adobe inverts them.
        picture = ImageChops.invert(picture)
    if picture.mode == "LAB":
        picture = picture.convert("RGB")
    if picture.mode in ("LA", "PA", "RGBA", "RGBa") or key is not None:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return np.asarray(picture.convert("RGB" if rgb else "L"))


def _white_is_zero(content):
    """Whether zero is white in a TIFF file (bytearray), which then says in place that it is black:
    Pillow inverts some depths of such files and others not."""
    order = {b"II": "<", b"MM": ">"}.get(bytes(content[:2]))
    version = sum(content[2:4])
    if order is None or version not in (42, 43):
        return False
    # Where its directory is stated; an offset, a count; the size of an entry, where its value is.
    start, offset, count, size, value = 4, "I", "H", 12, 8
    if version == 43:  # BigTIFF
        start, offset, count, size, value = 8, "Q", "Q", 20, 12
    try:
        (place,) = struct.unpack_from(order + offset, content, start)
        (entries,) = struct.unpack_from(order + count, content, place)
        place += struct.calcsize(count)
        for entry in range(place, place + entries * size, size):
            tag, kind = struct.unpack_from(order + "HH", content, entry)
            if tag == 262:  # photometric interpretation
                number = order + {1: "B", 3: "H", 4: "I"}[kind]
                if struct.unpack_from(number, content, entry + value) != (0,):
                    return False
                struct.pack_into(number, content, entry + value, 1)
                return True
    except struct.error:
        raise ValueError("a TIFF file that is cut off") from None
    raise ValueError("a TIFF file that does not say whether zero is black")


def _tiff_dtype(picture):
    """What the numbers of a TIFF file are where Pillow takes them for others, else None. ValueError
    on planes that it mixes up."""
    tags = picture.tag_v2
    bits = max(tags.get(258, (1,)))
    sample_format = max(tags.get(339, (1,)))
    codec, box, place, (rawmode, *others) = picture.tile[0]
    planes = tags.get(284, 1) == 2 and tags.get(277, 1) > 1
    if planes and (bits > 8 or picture.mode not in ("RGB", "RGBA", "CMYK")):
        raise ValueError(f"{bits}-bit {picture.mode} in separate planes; such planes are read of "
                         "8-bit RGB, RGBA and CMYK")
    if codec == "libtiff" and rawmode in ("I;16BS", "I;32BS", "F;32BF"):
        # libtiff has put the bytes into the machine's own order.
        native = codec, box, place, (rawmode.replace("B", "N"), *others)
        picture.tile = [getattr(type(picture.tile[0]), "_make", tuple)(native)]
    return {(1, 32): np.uint32, (2, 8): np.int8}.get((sample_format, bits))


def _grey_alpha_16(content):
    """Whether a PNG file (bytearray) is grey and alpha of 16 bits, which Pillow would cut to 8. It
    then says in place that it is RGBA of 8 bits: as many bytes, of which none is lost."""
    if content[:8] != PNG or content[24:26] != b"\x10\x04":
        return False
    content[24:26] = b"\x08\x06"
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return True


def _in_8_bits(key, bits):
    """The level or colour that a PNG file of so many bits does not show, as Pillow's 8 bits."""
    if bits == 16:
        return tuple(level >> 8 for level in key)
    if bits < 8 and key < 2**bits:
        return key * 255 // (2**bits - 1)
    return key


def _over_black(values, alpha):
    """uint8 of numbers, stretched from the lowest to the highest that is seen; alpha in 0..1."""
    pixels = _stretch(values, _span(values[alpha > 0]))
    return np.rint(pixels * alpha).astype(np.uint8)


def _span(values):
    """(lowest, highest) of the numbers that are finite; zeros without any."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 0.0
    return float(finite.min()), float(finite.max())


def _stretch(values, span):
    """uint8 of numbers, from 0 at the lowest of the span to 255 at its highest; not numbers become
    0."""
    lowest, highest = span
    if values.dtype == np.uint8 and (lowest, highest) == (0, 255):
        return values
    scale = 255 / ((highest - lowest) or 1)
    pixels = np.nan_to_num(values.astype(np.float64), nan=lowest, posinf=highest, neginf=lowest)
    return np.rint(np.clip((pixels - lowest) * scale, 0, 255)).astype(np.uint8)


# ------------------------------------------------------------------------------------- DICOM files


def _dicom(path):
    """uint8 [H,W] or [H,W,3] of a DICOM file."""
    import pydicom
    from pydicom.pixels import apply_color_lut

    with warnings.catch_warnings():
        # pydicom warns of values that break the standard in ways that do not matter here.
        warnings.simplefilter("ignore")
        file = pydicom.dcmread(path, force=True)
        frames = int(file.get("NumberOfFrames") or 1)
        area = int(file.get("Rows") or 0) * int(file.get("Columns") or 0)
        if frames != 1:
            raise Refused(f"{path}: has {frames} frames; need one")
        if area > MOST_PIXELS:
            raise Refused(f"{path}: has {area} pixels; the limit is {MOST_PIXELS}")
        if not area:
            raise ValueError("no DICOM, or one without a picture")
        _complete(file)
        kind = file.PhotometricInterpretation
        if kind in ("MONOCHROME1", "MONOCHROME2"):
            return _dicom_greys(file)
        if kind == "PALETTE COLOR":
            stored, _ = _stored(file)
            if "RedPaletteColorLookupTableData" in file:
                return _dicom_palette(file, stored)
            colours = apply_color_lut(stored, file)  # of segments
            return _stretch(colours, (0, np.iinfo(colours.dtype).max))
        if kind not in COLOURS:
            raise ValueError(f"{kind}; read are MONOCHROME1, MONOCHROME2, PALETTE COLOR, "
                             f"{', '.join(COLOURS)}")
        return _stretch(file.pixel_array, (0, 2**file.BitsStored - 1))


def _complete(file):
    """Name the byte order of a file without a header, and put what an enhanced file says of its one
    frame where other files say it."""
    if "TransferSyntaxUID" not in file.file_meta:
        from pydicom import uid

        if file["PixelData"].is_undefined_length:
            raise ValueError("compressed, and its header does not say how")
        implicit, little = file.original_encoding
        if implicit:
            file.file_meta.TransferSyntaxUID = uid.ImplicitVRLittleEndian
        elif little:
            file.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
        else:
            file.file_meta.TransferSyntaxUID = uid.ExplicitVRBigEndian
    for groups in ("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"):
        for group in file.get(groups) or []:
            for macro in ("PixelValueTransformationSequence", "FrameVOILUTSequence"):
                file.update((group.get(macro) or [{}])[0])


def _dicom_greys(file):
    """uint8 [H,W] of a DICOM file, by its rescale and its window; padding is black."""
    stored, padding = _stored(file)
    values = _rescale(file, stored)
    levels = _window(file, values)
    if levels is None:
        pixels = _stretch(values, _span(values[~padding]))
    else:
        # The window maps to a range of its own, whatever this picture uses of it.
        pixels = _stretch(levels, (0, 1))
    shape = file.get("PresentationLUTShape") or "IDENTITY"
    if shape not in ("IDENTITY", "INVERSE") or "PresentationLUTSequence" in file:
        raise ValueError("has a presentation LUT; read are the shapes IDENTITY and INVERSE")
    # In an image, INVERSE stands beside MONOCHROME1 and says the same again: the lowest value is
    # white. IDENTITY changes nothing: a file that says it beside MONOCHROME1 is inverted.
    if file.PhotometricInterpretation == "MONOCHROME1" or shape == "INVERSE":
        pixels = 255 - pixels
    pixels[padding] = 0
    return pixels


def _stored(file):
    """(numbers, bool where they are padding) [H,W] of a DICOM file."""
    bits = file.get("BitsStored")
    syntax = file.file_meta.TransferSyntaxUID
    in_words = "PixelData" in file and (not syntax.is_compressed or syntax.name == "RLE Lossless")
    if in_words:
        file.BitsStored = file.BitsAllocated  # pydicom then gives whole words
        words = file.pixel_array
        file.BitsStored = bits
        stored = _sample(words, bits, file.get("HighBit", bits - 1))
    else:
        stored = file.pixel_array
    prefix = next(name for name in ("", "Float", "DoubleFloat") if f"{name}PixelData" in file)
    value = file.get(f"{prefix}PixelPaddingValue")
    if value is None:
        return stored, np.zeros(stored.shape, bool)
    limit = file.get(f"{prefix}PixelPaddingRangeLimit")
    ends = np.array([value, value if limit is None else limit])
    if stored.dtype.itemsize == 2:
        ends = ends.astype(stored.dtype)  # some files give signed words an unsigned value
    numbers = stored
    if in_words and (_sample(ends.astype(stored.dtype), bits, bits - 1) != ends).any():
        numbers = words  # 12 bits cannot hold 63536: it stands in the whole word
    return stored, (numbers >= ends.min()) & (numbers <= ends.max())


def _sample(words, bits, high):
    """The numbers of so many bits that end at the high bit of words; signed in signed words."""
    width = 8 * words.dtype.itemsize
    if not bits <= high + 1 <= width:
        raise ValueError(f"HighBit is {high}; must be in {bits - 1}..{width - 1}")
    return words << (width - 1 - high) >> (width - bits)


def _rescale(file, stored):
    """Stored numbers by the modality LUT or the rescale of a DICOM file."""
    if file.get("ModalityLUTSequence"):
        item = file.ModalityLUTSequence[0]
        signed = bool(file.PixelRepresentation)
        return _look_up(file, stored, item.LUTDescriptor, item.LUTData, signed)[0]
    slope = file.get("RescaleSlope")
    intercept = file.get("RescaleIntercept")
    values = stored.astype(np.float64)
    return values * float(1 if slope is None else slope) + float(intercept or 0)


def _window(file, values):
    """Levels in 0..1 of rescaled numbers, by the first VOI LUT or window of a DICOM file (PS3.3
    C.11.2.1); None without one."""
    item = (file.get("VOILUTSequence") or [{}])[0]
    if "LUTData" in item:
        # The first number may be negative where the input may be.
        lowest = -(2 ** (file.BitsStored - 1)) if file.PixelRepresentation else 0
        ends = _rescale(file, np.array([lowest, lowest + 2**file.BitsStored - 1]))
        levels, top = _look_up(file, values, item.LUTDescriptor, item.LUTData, ends.min() < 0)
        return levels / top
    center = np.ravel(file.get("WindowCenter"))[0]
    width = np.ravel(file.get("WindowWidth"))[0]
    if center is None or width is None:
        return None
    center = float(center)
    width = float(width)
    function = file.get("VOILUTFunction") or "LINEAR"
    if function == "SIGMOID" and width > 0:
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-4 * (values - center) / width))
    if function == "LINEAR" and width >= 1:
        center -= 0.5
        width -= 1
    elif function != "LINEAR_EXACT" or width <= 0:
        raise ValueError(f"window function {function} of width {width:g}; read are LINEAR from 1, "
                         "LINEAR_EXACT and SIGMOID above 0")
    if not width:
        return values > center
    return np.clip((values - center) / width + 0.5, 0, 1)


def _look_up(file, values, descriptor, entries, signed):
    """(what a lookup table makes of numbers, the highest it can say). descriptor: how many entries,
    the number of the first, their bits."""
    length = descriptor[0] % 2**16 or 2**16
    first = descriptor[1] % 2**16
    if signed and first >= 2**15:
        first -= 2**16
    bits = descriptor[2]
    if isinstance(entries, bytes):
        order = "<" if file.file_meta.TransferSyntaxUID.is_little_endian else ">"
        # Entries of 8 bits may stand in words of their own.
        width = 2 if len(entries) >= 2 * length else 1
        bits = min(bits, 8 * width)
        entries = np.frombuffer(entries, f"{order}u{width}")
    table = np.ravel(entries)[:length].astype(np.int64) & 0xFFFF
    if len(table) < length:
        raise ValueError(f"a lookup table has {len(table)} entries and states {length}")
    places = np.clip(np.rint(values).astype(np.int64) - first, 0, length - 1)
    return table[places], 2**bits - 1


def _dicom_palette(file, stored):
    """uint8 [H,W,3] of the numbers of a palette."""
    channels = []
    for colour in ("Red", "Green", "Blue"):
        descriptor = file[f"{colour}PaletteColorLookupTableDescriptor"].value
        entries = file[f"{colour}PaletteColorLookupTableData"].value
        signed = bool(file.PixelRepresentation)
        levels, top = _look_up(file, stored, descriptor, entries, signed)
        channels.append(_stretch(levels, (0, top)))
    return np.stack(channels, 2)


def _channels(picture, rgb):
    """[H,W] of a picture [H,W] or [H,W,3]; with rgb [H,W,3], to which grey is repeated."""
    if not rgb:
        return data.grey(picture)
    if picture.ndim == 2:
        return np.repeat(picture[..., None], 3, 2)
    return picture


def find_picture(folder, cell):
    """The file that a cell names: as it is written, or with a usual suffix; None without one."""
    for suffix in ("", ".png", ".jpg", ".jpeg", ".dcm"):
        path = folder / (cell + suffix)
        if path.is_file():
            return path
    return None


def outside(root, cell, path):
    """Where a cell leads, if that is outside of the picture folder, else None; by an absolute path,
    .., a drive or, where it names the file `path`, a link. root: the folder, its links followed."""
    if os.name != "nt" and re.match("[A-Za-z]:", cell):
        return cell
    # A table may come from Windows; and no file has a zero byte in its name.
    named = root / cell.replace("\\", "/").replace("\0", "")
    for place in (named, path or named):
        place = Path(os.path.realpath(place))
        if not place.is_relative_to(root):
            return place
    return None


def read_square(path, size, fit, rgb):
    """(uint8 [size,size] or [size,size,3], stored (height, width)) of one picture file. `Refused`
    if it is not readable, or shows nothing."""
    picture = read_picture(path, rgb)
    # An .npy array comes as it is.
    if picture.dtype != np.uint8 or picture.shape[2:] not in ((), (3,)) or not picture.size:
        raise Refused(f"{path}: is {picture.dtype} {list(picture.shape)}; "
                      "need uint8 [H,W] or [H,W,3]")
    picture = _channels(picture, rgb)
    if picture.min() == picture.max():
        raise Refused(f"{path}: one grey level throughout")
    squares = data.square(picture[None], fit)  # [1,..]
    return data.resize(squares, size)[0], picture.shape[:2]


def read_pictures(paths, size, fit, rgb):
    """({path: uint8 [size,size] or [size,size,3]}, {path: its stored (height, width)}, [why a file
    is not readable]) of distinct files, on all cores."""
    images = {}
    shapes = {}
    faults = []
    last_line = time.monotonic()
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = {path: pool.submit(read_square, path, size, fit, rgb) for path in paths}
        for path, future in futures.items():
            try:
                images[path], shapes[path] = future.result()
            except Refused as error:
                if "pip install" in str(error):  # a library is missing, not a picture
                    raise
                faults.append(str(error))
            if time.monotonic() - last_line > 5:
                last_line = time.monotonic()
                print(f"{len(images) + len(faults)} of {len(paths)} pictures read", flush=True)
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C must not wait for what is queued
    return images, shapes, faults
