"""What a `.pt` holds, read without running anything: plain values, and tensors as arrays.

Two forms exist: the zip archive of PyTorch 1.6 and later, and several pickles in a row before it.
`torch.load(weights_only=True)` builds no objects but tensors and plain values. It still lets a few
hundred bytes ask for any amount of memory, by a tensor whose elements share their place, a tensor
or bytes without content, or lists that hold each other; these are refused here.
"""

import errno
import mmap
import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from convert.checks import shown
from tinyllm_jax.errors import InputError

# A state dict has thousands of values; one that keeps its samplers' order has millions.
MOST_VALUES = 10_000_000
# Layers may share their weights, and then together have more bytes than the file.
MOST_TIMES_THE_FILE = 100


def load(path: Path) -> Any:
    """Read a file with every tensor as a NumPy array, most of them maps of the file.

    Raises:
        InputError: it is damaged, no PyTorch file, or would run code.
    """
    import torch

    try:
        archive = zipfile.is_zipfile(path)
        if archive or _starts_like_zip(path):
            _check_archive(path)
        else:
            _check_pickle(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what it cannot read it raises as well
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive)
        return _Reading(path, torch).plain(content)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        raise InputError(_refusal(path, str(error))) from None
    except OSError as error:
        if error.errno != errno.EINVAL:  # a damaged archive points to before its beginning
            raise
        problem: Exception = error
    # A damaged byte may lead parsers of archives and pickles into any exception there is.
    except Exception as error:
        problem = error
    lines = str(problem).strip().splitlines() or [repr(problem)]
    raise InputError(f"{path}: no whole PyTorch file ({shown(lines[0])}). Get the file again.")


class _Reading:
    """Turns one file's tensors into arrays on the same memory, and counts what there is."""

    def __init__(self, path: Path, torch: Any):
        self._path, self._torch = path, torch
        self._size = path.stat().st_size
        self._values = 0
        self._bytes = 0

    def plain(self, value: Any) -> Any:
        """Turn tensors, wherever they stand, into arrays."""
        self._values += 1
        if self._values > MOST_VALUES:
            raise InputError(
                f"{self._path}: holds more than {MOST_VALUES:,} values. Save the state dict and "
                "the settings alone."
            )
        if isinstance(value, self._torch.Tensor):
            return self._array(value.detach())
        if isinstance(value, Mapping):
            return {key: self.plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [self.plain(item) for item in value]
        return value

    def _array(self, tensor: Any) -> np.ndarray:
        torch = self._torch
        dense = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
        if not dense or tensor.device.type != "cpu":
            raise InputError(
                f"{self._path}: holds tensors that are sparse, quantized, nested or without "
                "content. Save them dense first."
            )
        wanted = tensor.numel() * tensor.element_size()
        self._bytes += wanted
        if wanted > min(tensor.untyped_storage().nbytes(), self._size) or (
            self._bytes > MOST_TIMES_THE_FILE * self._size
        ):
            raise InputError(
                f"{self._path}: a tensor of shape {shown(list(tensor.shape))} whose elements share "
                "their bytes. Save it with .contiguous()."
            )
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()


def _starts_like_zip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def _check_archive(path: Path) -> None:
    """Refuse archives that PyTorch did not write, before PyTorch words it its way."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            pickles = [entry for entry in entries if re.search(r"(^|/)data\.pkl$", entry.filename)]
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise InputError(
                    f"{path}: a compressed archive, which PyTorch never writes. Give the file that "
                    "torch.save made."
                )
            content = b"".join(archive.read(entry) for entry in pickles)
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError, EOFError) as error:
        raise InputError(
            f"{path}: cut short or damaged ({shown(str(error))}). Get the file again."
        ) from None
    if any(re.search(r"(^|/)constants\.pkl$", entry.filename) for entry in entries):
        raise InputError(
            f"{path}: a TorchScript program, which holds code. Save its state dict instead."
        )
    if not pickles:
        raise InputError(
            f"{path}: a zip archive, and no checkpoint of PyTorch. Give a .pt or .pth file."
        )
    _refuse_empty_bytes(path, content)


def _check_pickle(path: Path) -> None:
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        _refuse_empty_bytes(path, content)


def _refuse_empty_bytes(path: Path, content: Any) -> None:
    """Refuse `bytearray(N)`, the one call that PyTorch allows and that fills N bytes of memory."""
    if content.find(b"\nbytearray\n") >= 0:
        raise InputError(
            f"{path}: holds a bytearray, which no state dict needs. Save the state dict and a "
            "plain dict of settings."
        )


def _refusal(path: Path, message: str) -> str:
    """Say which object a pickle would have built."""
    found = re.search(r"GLOBAL ([\w.]+)", message) or re.search(
        r"Unsupported (?:class|global) ([\w.]+)", message
    )
    what = f" ({shown(found[1])})" if found else ", or is damaged"
    return (
        f"{path}: holds Python objects that would run code when read{what}. Only tensors and plain "
        "values are read; save the state dict and a plain dict of settings."
    )
