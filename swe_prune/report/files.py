"""Files of an experiment, one at a time: what cannot be read or is not in its form is named."""

import os
import sys
from collections.abc import Iterable
from typing import Any

from etils import epath

from swe_prune.errors import InputError
from swe_prune.runtime import storage


def there(path: epath.Path) -> bool:
    """Returns whether something has this name, be it a link that leads nowhere."""
    return path.exists() or (not storage.in_bucket(path) and os.path.islink(path))


def malformed(path: epath.Path, reason: str) -> InputError:
    """Returns the error of a file that cannot be read, with what to do."""
    advice = "repair or remove it"
    if path.parent.parent.name == "cells":  # whose row would have no file
        advice = "remove it and run the experiment's command again, which makes it again"
    return InputError(f"{str(path)!r} cannot be read: {reason}; {advice}")


def text_of(path: epath.Path) -> str:
    """Returns the text of a file, or raises what names it."""
    try:
        return storage.read_text(path, log=True)
    except (ValueError, OSError) as error:
        raise malformed(path, str(error)) from None


def read_object(path: epath.Path) -> dict[str, Any]:
    """Returns the JSON object of a file, or raises what names it."""
    try:
        return storage.read_json(path)
    except (ValueError, OSError) as error:
        raise malformed(path, str(error)) from None


def read_lines(path: epath.Path) -> Iterable[dict[str, Any]]:
    """Yields the JSON objects of a log's lines, each of which has a step."""
    try:
        yield from storage.read_log(path)
    except (ValueError, OSError) as error:
        raise malformed(path, str(error)) from None


def fits(value: Any, form: Any) -> bool:
    """Returns whether a JSON value is of a form: types, and lists and dicts of forms."""
    if isinstance(form, tuple):
        return any(fits(value, one) for one in form)
    if isinstance(form, dict):
        return isinstance(value, dict) and all(fits(value.get(k), one) for k, one in form.items())
    if isinstance(form, list):
        return isinstance(value, list) and all(fits(one, form[0]) for one in value)
    if form is float:  # finite; JSON may have an integer in its place, of any size
        return type(value) in (int, float) and abs(value) <= sys.float_info.max
    return type(value) is form
