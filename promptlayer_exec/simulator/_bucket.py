"""A token bucket."""

from attrs import define, field


@define
class TokenBucket:
    """Lets `rate` requests per second through, and up to `burst` at once.

    Args:
        rate: Tokens that come back per second.
        burst: Tokens that the bucket holds; it starts full.
        now: The time in seconds.
    """

    rate: float
    burst: float
    _then: float = field(alias="now")
    _tokens: float = field(init=False)

    def __attrs_post_init__(self) -> None:
        self._tokens = self.burst

    def take(self, now: float) -> float:
        """Take a token at `now`; return 0.0, or if there is none the seconds until there is."""
        self._tokens = min(self.burst, self._tokens + (now - self._then) * self.rate)
        self._then = now
        # The tolerance lets through a request that waited exactly as long as it was told.
        if self._tokens < 1 - 1e-6:
            return (1 - self._tokens) / self.rate
        self._tokens -= 1
        return 0.0
