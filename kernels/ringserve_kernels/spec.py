"""AttentionSpec: what one attention layer computes, recorded once when the model loads."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """Scores are `scale * q.k`, soft-capped if asked, over keys `i - window < j <= i` (all `j <= i` without)."""

    num_heads: int
    num_kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int | None = None
    """A row at index i sees the keys (i - window, i], itself included; None sees all of them."""
    softcap: float | None = None
    """Scores become `softcap * tanh(score / softcap)`."""
    has_sink: bool = False
    """One learned logit per head joins the softmax and has no value; merged once, where the row lives."""

    def __post_init__(self) -> None:
        assert self.num_heads % self.num_kv_heads == 0, (self.num_heads, self.num_kv_heads)
        assert self.window is None or self.window > 0, self.window

    @property
    def cache_shape(self) -> tuple[int, int, int]:
        """(kv heads, key dim, value dim): layers with the same shape and window form a layer group."""
        return (self.num_kv_heads, self.key_dim, self.value_dim)
