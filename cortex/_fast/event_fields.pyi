from typing import Final

# Nothing for Python: what the module shares with the other extensions.
__pyx_capi__: Final[dict[str, object]]
