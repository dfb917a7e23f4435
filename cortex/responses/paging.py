"""Pages of a list of items, in OpenAI's form: by the id of the previous page's last item."""

from collections.abc import Mapping, Sequence

import msgspec

from cortex.responses.items import id_of
from cortex.wire.errors import InvalidRequestError

MAX_LIMIT = 100


class _Page(msgspec.Struct):
    object: str
    data: Sequence[msgspec.Raw]
    first_id: str | None
    last_id: str | None
    has_more: bool


def page_of(items: Sequence[msgspec.Raw], query: Mapping[str, str]) -> bytes:
    """Return one page of ``items`` as JSON, the latest first by default.

    Raises:
        InvalidRequestError: ``limit``, ``order`` or ``after`` is wrong.
    """
    order, limit, after = query.get("order", "desc"), query.get("limit", "20"), query.get("after")
    if order not in ("asc", "desc"):
        raise InvalidRequestError("Invalid 'order': it is 'asc' or 'desc'.", param="order")
    if not limit.isdecimal() or not 1 <= int(limit) <= MAX_LIMIT:
        raise InvalidRequestError(f"Invalid 'limit': it is between 1 and {MAX_LIMIT}.", param="limit")
    found = list(items) if order == "asc" else list(reversed(items))
    if after is not None:
        at = next((at for at, item in enumerate(found) if id_of(item) == after), None)
        if at is None:
            raise InvalidRequestError(f"Invalid 'after': there is no item '{after}'.", param="after")
        found = found[at + 1 :]
    page = found[: int(limit)]
    first, last = (id_of(page[0]), id_of(page[-1])) if page else (None, None)
    return msgspec.json.encode(_Page("list", page, first, last, len(page) < len(found)))
