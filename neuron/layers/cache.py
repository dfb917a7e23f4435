"""Memory that a layer keeps of earlier tokens, as declared."""

import dataclasses


@dataclasses.dataclass(frozen=True, slots=True)
class PagedKV:
    """Keys and values of each token."""

    num_kv_heads: int
    head_dim: int
    window_tokens: int = 0

    @property
    def elements_per_token(self) -> int:
        """Number of elements of a token."""
        return 2 * self.num_kv_heads * self.head_dim


Cache = PagedKV
