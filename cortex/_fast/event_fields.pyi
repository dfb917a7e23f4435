from typing import Final

# Nothing for Python: the module serves the other extensions.
__pyx_capi__: Final[dict[str, object]]
