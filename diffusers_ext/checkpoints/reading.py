"""Read a checkpoint: torch's own reader for what torch wrote, and `pickles` for EDM's, which `pickle` wrote.

torch reads with `weights_only=True`: tensors and plain data, no code. EDM's files hold whole modules: each is a record
of its class's name, that class's source as text, and its state. The text is left alone; state and names are what we
read. Tensors inside such a file are small files of torch's.
"""

from __future__ import annotations

import io
import mmap
import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .pickles import Record, read_pickle

ZIP = b"PK\x03\x04"
LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
"""The first bytes of what `torch.save` writes: of a zip archive, and of the format before it."""


def read_checkpoint(path: str | Path) -> Any:
    """Return the content of a checkpoint: dicts, lists, numbers, texts, tensors on the CPU, and a `Record` for what was
    an object of EDM's. Nothing of the file is executed.

    Raises:
        InputError: there is no such file, or it is none of these, is damaged, or names something that is not needed.
    """
    if str(path).startswith(("http://", "https://")):
        raise InputError(f"{path} is an address: download the file first")
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{path} is a folder: name the file in it")
    if not path.is_file():
        raise InputError(f"there is no file {path}")
    try:
        return _read(path)
    except PermissionError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _read(path: Path) -> Any:
    with path.open("rb") as file:
        start = file.read(len(LEGACY))
        if start.startswith(ZIP):
            _require_stored(path)
            return _by_torch(path, mmap=True)
        if start == LEGACY:
            return _by_torch(path)
        if not start.startswith(b"\x80"):
            raise InputError(f"{path.name} {_other_kind(start)}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            try:
                return read_pickle(content, _NAMES)  # type: ignore[arg-type]
            except InputError as error:
                raise InputError(f"{path.name} cannot be read: {error}") from error


def _other_kind(start: bytes) -> str:
    """Say what a file is that begins so, and is neither torch's nor a pickle."""
    if not start:
        return "is empty"
    if start[8:9] == b"{":
        return "is a safetensors file: a model of diffusers needs no conversion, open it by from_pretrained"
    if len(start) > 4 and all(byte in b"\t\n\r" or 32 <= byte < 127 for byte in start):
        return "is text, perhaps a page or a Git LFS pointer in the place of the file: download the file itself"
    return "is neither a file of torch.save nor a pickle"


def _require_stored(path: Path) -> None:
    """Refuse an archive with compressed files, which torch does not write, and which may fill the memory."""
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise InputError(f"{path.name} is cut off or damaged: compare its size with that of the original") from error
    if compressed:
        raise InputError(f"{path.name} cannot be read: {compressed[0]!r:.99} in it is compressed, unlike torch's files")


def _by_torch(file: Any, **options: Any) -> Any:
    name = getattr(file, "name", "a tensor")
    try:
        with warnings.catch_warnings(), torch.serialization.safe_globals(_NUMBERS):
            warnings.simplefilter("ignore")  # of storages, which we do not use as such
            return torch.load(file, map_location="cpu", weights_only=True, **options)
    except pickle.UnpicklingError as error:
        # torch's whole message has advice to load the file with its code.
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise InputError(f"{name} cannot be read: it names {found[1]!r}{_hint(found[1])}") from error
        found = re.search(r"WeightsUnpickler error: ([^\n]+)", str(error))
        what = found[1] if found else "it is damaged, or holds more than weights and numbers"
        raise InputError(f"{name} cannot be read: {what}") from error
    except Exception as error:  # whatever a damaged file leads torch to
        first = (str(error).splitlines() or [""])[0][:200]
        raise InputError(f"{name} cannot be read, it may be damaged: {type(error).__name__}: {first}") from error


def _hint(name: str) -> str:
    if "persist" in name:
        return ": of EDM, convert network-snapshot-*.pkl and not training-state-*.pt"
    if ".nn." in name or name.startswith("diffusers."):
        return ": it holds a whole module, with its code; save its state_dict() instead"
    return ", which no checkpoint of the known kinds needs"


# --- what EDM's pickles name ------------------------------------------------------------------------------------------


def _dict(items: Any = ()) -> dict[Any, Any]:
    return dict(_pairs(items))


def _pairs(items: Any) -> Any:
    if isinstance(items, dict):
        return items.items()
    if not isinstance(items, list | tuple) or not all(isinstance(i, list | tuple) and len(i) == 2 for i in items):
        raise ValueError("a dict of what is no list of pairs")
    return items


def _set(items: Any = ()) -> set[Any]:
    if not isinstance(items, list | tuple) or not all(isinstance(i, str | int | float) for i in items):
        raise ValueError("a set of what is no list of texts and numbers")
    return set(items)


def _persistent(meta: Any) -> Record:
    """An object of a class whose source lies in the file: only its name and its state are taken."""
    if not (isinstance(meta, dict) and meta.get("type") == "class" and isinstance(meta.get("class_name"), str)):
        raise ValueError("an object without a class's name")
    state = meta.get("state")
    return Record(meta["class_name"], state=dict(state) if isinstance(state, dict) else {})


def _module_dict(*args: Any) -> Record:
    return Record("ModuleDict")


class _DType(Record):
    """The type of a number of numpy's, of which its name is taken."""

    def __init__(self, text: Any, *_: Any) -> None:
        if text not in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1"):
            raise ValueError(f"numbers of numpy's type {str(text)[:20]!r}")
        super().__init__(text)

    def __setstate__(self, _: Any) -> None:
        """What torch's reader calls with the rest of the type's description: the order of the bytes, and no more."""


def _scalar(dtype: Any, content: Any) -> float | int:
    if not (isinstance(dtype, _DType) and isinstance(content, bytes)):
        raise ValueError("a number of numpy's without type or content")
    return np.frombuffer(content, f"<{dtype.name}", count=1)[0].item()


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError("bytes of what is no text")
    return text.encode("latin-1")


def _storage(content: Any) -> Any:
    if not isinstance(content, bytes | bytearray):
        raise ValueError("a tensor without content")
    storage = _by_torch(io.BytesIO(content))
    if not isinstance(storage, torch.TypedStorage):
        raise ValueError(f"a {type(storage).__name__} as the content of a tensor")
    return storage


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> Tensor:
    if not isinstance(storage, torch.TypedStorage):
        raise ValueError("a tensor without content")
    numbers = (offset, *size, *stride)
    if not all(type(n) is int and n >= 0 for n in numbers) or len(size) != len(stride):
        raise ValueError("a tensor of no shape")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flat = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
    try:
        return flat.as_strided(size, stride, offset)
    except RuntimeError as error:
        raise ValueError(f"a tensor that reaches beyond its content: {error}") from error


def _parameter(tensor: Any, *_: Any) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError("a parameter that is no tensor")
    return tensor


_NAMES = {
    "builtins.dict": _dict,
    "builtins.set": _set,
    "collections.OrderedDict": _dict,
    "dnnlib.util.EasyDict": _dict,
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent,
    "torch.nn.modules.container.ModuleDict": _module_dict,
    "torch.nn.modules.container.ModuleList": _module_dict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage._load_from_bytes": _storage,
    "numpy.dtype": _DType,
    "numpy.core.multiarray.scalar": _scalar,
    "numpy._core.multiarray.scalar": _scalar,
    "_codecs.encode": _encode,
}

_NUMBERS: list[Any] = [
    (function, name) for name, function in _NAMES.items() if name.startswith("numpy.") or name == "_codecs.encode"
]
"""What torch's reader may call beside its own: optimizers hold numbers of numpy's, which become numbers here, too."""
