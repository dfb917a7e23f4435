"""Pages of a list of items, as OpenAI's listings have them: by the id of the last item of the page before."""

from collections.abc import Mapping, Sequence
from typing import Any

from cortex.wire.errors import InvalidRequestError

MAX_LIMIT = 100


def page_of(items: Sequence[dict[str, Any]], query: Mapping[str, str]) -> dict[str, Any]:
    """Return one page of ``items``, the latest first unless asked otherwise.

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
        ids = [item["id"] for item in found]
        if after not in ids:
            raise InvalidRequestError(f"Invalid 'after': there is no item '{after}'.", param="after")
        found = found[ids.index(after) + 1 :]
    page = found[: int(limit)]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else None,
        "last_id": page[-1]["id"] if page else None,
        "has_more": len(page) < len(found),
    }
