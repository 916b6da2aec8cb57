"""Data for the page's scripts: compressed, and encoded in characters that are safe in HTML."""

import base64
import hashlib
import json
import math
import re
import zlib
from typing import Any

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff"
    "\ud800-\udfff]"
)


def pack(value: Any, digits: int = 6) -> str:
    """JSON, deflated, in base64, so that no response's text can end a script element."""
    text = json.dumps(
        plain(value, digits), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    # A lone surrogate, which a broken row may hold, cannot be encoded as UTF-8.
    return base64.b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode()


def plain(value: Any, digits: int) -> Any:
    """Round numbers to `digits`, replace those that are not finite by None, and keep the rest."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    return value


def readable(text: str) -> str:
    """The text with marks of text direction and invisible characters replaced by their numbers."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def content_hash(text: str) -> str:
    """The hash by which a content security policy names an inline script or style."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
