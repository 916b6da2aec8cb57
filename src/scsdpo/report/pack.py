"""Data for the page's scripts: compressed, and in letters that no parser of HTML stumbles over."""

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
    """JSON, deflated, in base64. What a response says cannot end a script element in it."""
    text = json.dumps(
        plain(value, digits), ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    # A lone surrogate, which a broken row may hold, is no UTF-8.
    return base64.b64encode(zlib.compress(text.encode(errors="replace"), 9)).decode()


def plain(value: Any, digits: int) -> Any:
    """Numbers to so many digits, none that is not finite, and everything else as it was."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): plain(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item, digits) for item in value]
    return value


def readable(text: str) -> str:
    """Marks that would turn or hide the text around them, by their numbers instead."""
    return _CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def content_hash(text: str) -> str:
    """As a content security policy names a script or style that stands in the page."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
