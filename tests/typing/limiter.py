"""The limiter of docs/costs.md; it is type-checked, and run by the tests of that page."""

# ruff: noqa: D101, D102, D103 - word for word as in the docs
from pyrate_limiter import Duration, InMemoryBucket, Limiter, Rate, RedisBucket
from redis.asyncio import Redis


class SharedLimiter:
    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter

    async def acquire(self) -> None:
        await self._limiter.try_acquire_async("promptlayer")


def in_memory(per_second: int) -> SharedLimiter:
    return SharedLimiter(Limiter(InMemoryBucket([Rate(per_second, Duration.SECOND)])))


async def in_redis(redis: Redis, per_second: int) -> SharedLimiter:
    rates = [Rate(per_second, Duration.SECOND)]
    return SharedLimiter(Limiter(await RedisBucket.init(rates, redis, "promptlayer")))


async def use(redis: Redis) -> None:
    """Pass both limiters to a session."""
    from promptlayer_exec import Session

    Session(limiter=in_memory(50))
    Session(limiter=await in_redis(redis, 50))
