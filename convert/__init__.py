"""Move checkpoints between frameworks and formats: `python -m convert SRC DST --to FORMAT`.

Everything passes through a `Bundle`: config, weights, optimizer moments, counters and tokenizer, in
NumPy, under Hugging Face's names and in PyTorch's layout. `formats/` holds one file a format.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert.bundle import Bundle, Training
    from convert.conversion import read, write

__all__ = ["Bundle", "Training", "read", "write"]

_HOMES = {"Bundle": "bundle", "Training": "bundle", "read": "conversion", "write": "conversion"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'convert' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"convert.{_HOMES[name]}"), name)
